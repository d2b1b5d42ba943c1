"""Operators between the levels of a pyramid: replication to a finer grid, and adjoints as operators."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from toreq.core.operators import Operator, Tensors
from toreq.errors import ConfigError


class Replicate(Operator):
    r"""Copies every unit of a coarse grid to a window of the fine one; the adjoint sums over windows, so that
    :math:`A^\top A = c\,I` with c units in a window.

    Args:
        in_shape: shape of one example's coarse grid.
        factor: side of a window, at least 1.
        axes: the axes that are refined, counted from the last, e.g. ``(-2, -1)`` for images, ``(-2,)`` for tokens.

    Raises:
        ConfigError: for a factor below 1, or axes that the shape does not have.
    """

    def __init__(self, in_shape: Sequence[int], factor: int = 2, axes: Sequence[int] = (-2, -1)) -> None:
        super().__init__()
        self.in_shape, self.factor, self.axes = tuple(in_shape), factor, tuple(axes)
        valid = all(-len(self.in_shape) <= axis < 0 for axis in self.axes) and len(set(self.axes)) == len(self.axes)
        if factor < 1 or not self.axes or not valid:
            raise ConfigError(
                f"Replicate: expected factor >= 1 and distinct negative axes of {self.in_shape}, got {factor}, "
                f"{self.axes}; e.g. 2, (-2, -1)"
            )
        sizes = list(self.in_shape)
        for axis in self.axes:
            sizes[axis] *= factor
        self.out_shape = tuple(sizes)
        self.window = factor ** len(self.axes)
        self.gram = (float(self.window), float(self.window))
        # these keep a channels-last image channels-last
        self.image = len(self.in_shape) == 3 and set(self.axes) == {-2, -1}

    def forward(self, u: Tensor, t: Tensors | None = None) -> Tensor:
        if self.image and not u.is_complex():
            return F.interpolate(u, scale_factor=self.factor, mode="nearest")
        for axis in self.axes:
            u = u.repeat_interleave(self.factor, axis)
        return u

    def adjoint(self, w: Tensor, t: Tensors | None = None) -> Tensor:
        if self.image and not w.is_complex():
            return F.avg_pool2d(w, self.factor, divisor_override=1)
        for axis in self.axes:
            w = w.unflatten(axis, (-1, self.factor)).sum(axis)
        return w

    def extra_repr(self) -> str:
        return f"{self.in_shape} -> {self.out_shape}"


class Adjoint(Operator):
    r"""The adjoint of an operator without weights, times a number: with :class:`Replicate` and one over its window,
    the average over windows.

    Args:
        op: an operator A without weights.
        scale: s in :math:`s A^\top`.

    Raises:
        ConfigError: for an operator with weights, which would be owned twice.
    """

    def __init__(self, op: Operator, scale: float = 1.0) -> None:
        super().__init__()
        if op.tensors():
            raise ConfigError(f"Adjoint: expected an operator without weights, got {op}; use its own adjoint")
        self.op, self.scale = op, scale
        self.in_shape, self.out_shape = op.out_shape, op.in_shape
        if op.gram is not None:
            # A A^T has the eigenvalues of A^T A, and zeros where the grids differ in size
            square = math.prod(op.in_shape) == math.prod(op.out_shape)
            self.gram = (op.gram[0] * scale**2 if square else 0.0, op.gram[1] * scale**2)

    def forward(self, u: Tensor, t: Tensors | None = None) -> Tensor:
        return self.scale * self.op.adjoint(u)

    def adjoint(self, w: Tensor, t: Tensors | None = None) -> Tensor:
        return self.scale * self.op.forward(w)
