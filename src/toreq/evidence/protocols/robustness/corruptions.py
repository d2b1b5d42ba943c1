"""Accuracy under noise and other corruptions, the same draws for every network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from toreq import data
from toreq.diagnostics.relaxation import predictions
from toreq.evidence.claim import Points

SIGMAS = tuple(round(0.1 * i, 1) for i in range(11))
SEVERITIES = (1, 2, 3, 4, 5)
CLIPS: dict[str, tuple[float, float] | None] = {"clipped": (0.0, 1.0), "unclipped": None}


@runtime_checkable
class Informed(Protocol):
    """A classifier that is told the noise's standard deviation."""

    def given(self, sigma: float) -> nn.Module:
        """The classifier for noise of this standard deviation."""
        ...


def told(net: nn.Module, sigma: float) -> nn.Module:
    """The classifier that knows sigma where there is one, else the net itself."""
    return net.given(sigma) if isinstance(net, Informed) else net


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percent classified rightly."""
    return 100 * float((predictions(net, x) == y).double().mean())


def noisy(x: Tensor, sigma: float, clip: str, seed: int) -> Tensor:
    """x with white noise; the same draw for one seed whatever sigma and clipping, so that curves are comparable."""
    generator = data.seeded(seed, 11, device=x.device)
    return data.gaussian_noise(x, sigma, CLIPS[clip], generator=generator)


def noise_curve(net: nn.Module, x: Tensor, y: Tensor, clip: str, seed: int, sigmas: Sequence[float] = SIGMAS) -> Points:
    """Points (sigma, accuracy in percent) under Gaussian noise, ``clipped`` to [0, 1] or ``unclipped``."""
    return [(sigma, accuracy(told(net, sigma), noisy(x, sigma, clip, seed), y)) for sigma in sigmas]


def corruption_curve(
    net: nn.Module, x: Tensor, y: Tensor, name: str, seed: int, severities: Sequence[int] = SEVERITIES
) -> Points:
    """Points (severity, accuracy in percent) under a named corruption of `toreq.data.corruptions`."""
    points: list[tuple[float, float | None]] = []
    for severity in severities:
        generator = data.seeded(seed, 12, data.corruptions().index(name), severity, device=x.device)
        bad = data.corrupt(x, name, severity, generator=generator)
        points.append((float(severity), accuracy(told(net, 0.0), bad, y)))
    return points
