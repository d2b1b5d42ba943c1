"""A deep equilibrium model as users of torchdeq 0.1.0 write it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from toreq.bench.references.base import ModuleTrainer
from toreq.errors import ConfigError


def torchdeq() -> Any:
    """The library, or a plain error that says how to get it."""
    try:
        import torchdeq as library
    except ImportError as error:
        raise ConfigError(
            "torchdeq: expected the package for this comparison, got none; install it with pip install 'toreq[bench]'"
        ) from error
    return library


class DEQ(nn.Module):
    r"""A dense equilibrium layer with a linear head: :math:`z = \tanh(W z + U x + b)`.

    W is spectrally normalised as torchdeq offers it. The forward is the library's fixed-point iteration, the backward
    its implicit differentiation by the same iteration.

    Args:
        input_shape: shape of one example; it is flattened.
        width: units of the layer.
        classes: number of classes.
        max_iter: limit of both iterations.
        tolerance: of both, absolute as is the library's default. Its own default for the backward, 1e-6, takes about
            a third longer and changes the gradient in the third digit.
    """

    def __init__(self, input_shape: Sequence[int], width: int, classes: int, max_iter: int, tolerance: float) -> None:
        super().__init__()
        library = torchdeq()
        from torchdeq.norm import apply_norm

        self.drive = nn.Linear(math.prod(input_shape), width)
        self.couple = nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, classes)
        apply_norm(self.couple, "spectral_norm")
        self.solver = library.get_deq(
            ift=True, f_max_iter=max_iter, b_max_iter=max_iter, f_tol=tolerance, b_tol=tolerance
        )

    def forward(self, x: Tensor) -> Tensor:
        from torchdeq.norm import reset_norm

        # the library's normalised weight is computed once for each forward
        reset_norm(self.couple)
        drive = self.drive(x.flatten(1))
        states, _ = self.solver(lambda z: torch.tanh(self.couple(z) + drive), torch.zeros_like(drive))
        return self.head(states[-1])


class DEQTrainer(ModuleTrainer):
    """Trains a :class:`DEQ` by the cross entropy."""

    def __init__(
        self,
        input_shape: Sequence[int] = (1, 28, 28),
        width: int = 512,
        classes: int = 10,
        max_iter: int = 40,
        tolerance: float = 1e-3,
        lr: float = 1e-3,
    ) -> None:
        super().__init__(DEQ(input_shape, width, classes, max_iter, tolerance), nn.functional.cross_entropy, lr)
