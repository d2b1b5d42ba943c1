"""What every system is: an equilibrium layer, a head, and a feed-forward twin to be compared with."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from toreq.core import Dynamics, Standardize
from toreq.errors import ConfigError
from toreq.estimators import Estimator
from toreq.layer import Equilibrium
from toreq.solvers import Solver


def chain_bounds(total: float | None, layers: int, lateral: bool) -> tuple[float | None, float | None]:
    r"""Bounds on each coupling's norm under which a layered network's whole coupling matrix has norm at most ``total``.

    A chain of L layers joined by operators of norm c has norm at most :math:`2c\cos(\pi/(L+1))`, laterals of norm l
    add l; with both, each gets half.

    Args:
        total: the bound wanted; None for none.
        layers: L.
        lateral: whether layers are also coupled to themselves.

    Returns:
        the bound on joining operators and the bound on lateral ones.
    """
    if total is None:
        return None, None
    share = total / 2 if lateral and layers > 1 else total
    return share / max(2 * math.cos(math.pi / (layers + 1)), 1e-9), share


class System(nn.Module, ABC):
    """A classifier around one :class:`~toreq.Equilibrium` layer: ``(B, *input_shape) -> (B, num_classes)`` logits.

    Subclasses take ``input_shape``, ``num_classes``, ``solver``, ``estimator`` and keyword options, call
    :meth:`assemble`, and say what their backprop twin is.

    Args:
        input_shape: shape of one example.
        num_classes: number of classes, at least 2.
    """

    equilibrium: Equilibrium
    head: nn.Module

    def __init__(self, input_shape: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.input_shape, self.num_classes = tuple(input_shape), num_classes
        if not self.input_shape or any(s < 1 for s in self.input_shape) or num_classes < 2:
            raise ConfigError(
                f"{type(self).__name__}: expected a shape of positive sizes and num_classes >= 2, got "
                f"{self.input_shape} "
                f"and {num_classes}; e.g. input_shape=(1, 28, 28), num_classes=10"
            )
        self.config: dict[str, Any] = {}

    def assemble(self, dynamics: Dynamics, solver: Solver, estimator: Estimator | None, head: nn.Module) -> None:
        """Put the layer and its head together; the last node is read out."""
        self.equilibrium = Equilibrium(dynamics, solver, estimator)
        self.head = head

    def standardize(self, how: Standardize) -> None:
        """Let every input pass ``how`` first; it is saved with the weights.

        Args:
            how: for example ``Standardize.of(images)``.
        """
        self.equilibrium.dynamics.prepare = how.to(next(self.parameters()))

    def observe(self, x: Tensor) -> None:
        """Take what a system knows of its inputs before training, such as their covariance; nothing by default.

        Args:
            x: training inputs ``(N, *input_shape)``.
        """

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, num_classes)`` at equilibrium.

        Args:
            x: ``(B, *input_shape)``, floating point.

        Raises:
            ConfigError: for a wrong shape, dtype or device, or an empty batch.
        """
        self.check_input(x)
        return self.head(self.equilibrium(x))

    def check_input(self, x: Tensor) -> None:
        """Refuse an input that does not fit, with the remedy."""
        where = type(self).__name__
        if not isinstance(x, Tensor):
            raise ConfigError(f"{where}: expected a tensor x, got {type(x).__name__}; convert it with torch.as_tensor")
        if x.dim() == 0 or tuple(x.shape[1:]) != self.input_shape:
            raise ConfigError(
                f"{where}: expected x of shape (B, {', '.join(map(str, self.input_shape))}), got {tuple(x.shape)}; "
                "reshape the input or create the system with another input_shape"
            )
        if x.shape[0] == 0:
            raise ConfigError(f"{where}: expected at least one example, got an empty batch; drop empty batches")
        self.check_dtype(x)
        device = next(self.parameters()).device
        if x.device != device:
            raise ConfigError(f"{where}: expected x on {device}, got {x.device}; move it with x.to({str(device)!r})")

    def check_dtype(self, x: Tensor) -> None:
        """Inputs are floating point unless a system says otherwise."""
        own = next(self.parameters()).dtype
        if x.is_floating_point() and x.dtype != own and not torch.is_autocast_enabled(x.device.type):
            raise ConfigError(f"{type(self).__name__}: expected x of {own}, got {x.dtype}; convert it with x.to({own})")
        if not x.is_floating_point():
            raise ConfigError(
                f"{type(self).__name__}: expected floating-point x, got {x.dtype}; scale images to [0, 1] with "
                f"x.float() / 255"
            )

    def criterion(self, logits: Tensor, y: Tensor) -> Tensor:
        """Mean cross entropy.

        Args:
            logits: ``(B, num_classes)``.
            y: class indices ``(B,)``, int64, in ``[0, num_classes)``.
        """
        self.check_labels(y)
        return nn.functional.cross_entropy(logits, y)

    def check_labels(self, y: Tensor) -> None:
        """Refuse labels that are no class indices (ranges are checked on the CPU only, where that costs no sync)."""
        where = f"{type(self).__name__}.criterion"
        if y.dtype != torch.int64 or y.dim() != 1:
            raise ConfigError(f"{where}: expected int64 labels (B,), got {y.dtype} {tuple(y.shape)}; use y.long()")
        if y.device.type == "cpu" and y.numel() and not 0 <= int(y.min()) <= int(y.max()) < self.num_classes:
            raise ConfigError(
                f"{where}: expected labels in [0, {self.num_classes}), got {int(y.min())} to {int(y.max())}; "
                f"create the "
                "system with more classes or mend the labels"
            )

    @abstractmethod
    def feedforward(self) -> nn.Module:
        """A freshly initialised feed-forward network of the same widths, for ordinary backprop."""

    @torch.no_grad()
    def radius(self, x: Tensor) -> float:
        """Spectral radius of the relaxation's Jacobian at the equilibria of ``x``, averaged over the batch."""
        self.check_input(x)
        return self.equilibrium.radius(x)
