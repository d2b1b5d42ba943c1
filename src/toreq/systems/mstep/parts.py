"""Pieces that the pyramids are made of: inputs at lower resolution, and the parts of a base system."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toreq.core import Coupling, Drive, Lateral, Node
from toreq.errors import ConfigError
from toreq.systems.base import System
from toreq.systems.deep_hopfield import Bias


class PoolImage(nn.Module):
    """An image padded with zeros at its lower and right edge, averaged over windows, and repeated over them again.

    Args:
        size: height and width to pad to.
        factor: side of a window.
        repeat: give every pixel of a window its mean, instead of one pixel for each.
    """

    def __init__(self, size: Sequence[int], factor: int = 1, repeat: bool = False) -> None:
        super().__init__()
        self.size, self.factor, self.repeat = tuple(size), factor, repeat

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.size[0] - x.shape[-2], self.size[1] - x.shape[-1]
        # half of the padding on each side keeps the image in the middle
        x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)) if rows or columns else x
        if self.factor == 1:
            return x
        x = F.avg_pool2d(x, self.factor)
        return F.interpolate(x, scale_factor=self.factor, mode="nearest") if self.repeat else x


class PoolAxis(nn.Module):
    """Averages over windows of ``factor`` along one axis (-1: units, -2: tokens)."""

    def __init__(self, factor: int, axis: int) -> None:
        super().__init__()
        self.factor, self.axis = factor, axis

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(self.axis, (-1, self.factor)).mean(self.axis)


class PadTokens(nn.Module):
    """Repeats the last token, ``(B, N, D) -> (B, N + missing, D)``: a token without a drive would have no length, and
    a layer norm of it no bound.

    Args:
        missing: how many times.
    """

    def __init__(self, missing: int) -> None:
        super().__init__()
        self.missing = missing

    def forward(self, x: Tensor) -> Tensor:
        if not self.missing:
            return x
        return torch.cat([x, x[..., -1:, :].expand(*x.shape[:-2], self.missing, x.shape[-1])], -2)


class PoolTokens(nn.Module):
    """Averages tokens ``(B, N, D)`` over windows of ``factor``, each average as long as the tokens it stands for.

    Tokens that differ cancel in their average, and the layer norm of a short token is steep: each average's centred
    part is stretched to the root mean square of its tokens' centred parts, so that a coarse level reacts no more
    strongly than a fine one.

    Args:
        factor: tokens in a window.
    """

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        windows = x.unflatten(-2, (-1, self.factor))
        mean = windows.mean(-2)
        middle = mean.mean(-1, keepdim=True)
        centred = mean - middle
        wanted = windows.var(-1, correction=0, keepdim=True).mean(-2)
        # where tokens cancel altogether nothing is there to stretch
        found = centred.square().mean(-1, keepdim=True).clamp_min(1e-6)
        return middle + centred * (wanted / found).clamp_min(1e-12).sqrt()


def padded_size(where: str, size: Sequence[int], multiple: int, pad: bool) -> tuple[int, int]:
    """The next height and width that are multiples of ``multiple``.

    Raises:
        ConfigError: when they are not and ``pad`` is off; the message names sizes that work.
    """
    fits = [math.ceil(s / multiple) * multiple for s in size]
    if not pad and fits != list(size):
        below = [max(s - multiple, multiple) for s in fits]
        raise ConfigError(
            f"{where}: expected sizes divisible by {multiple}, got {tuple(size)}; use {tuple(below)} or {tuple(fits)}, "
            "fewer levels, or pad=True"
        )
    return fits[0], fits[1]


def nodes_of(system: System) -> list[Node]:
    """The nodes of a base system, in order."""
    energy = system.equilibrium.dynamics
    return [Node(n, s, energy.activation(n)) for n, s in energy.shapes.items()]


def pieces(system: System) -> list[Coupling]:
    """The couplings of a base system, in order."""
    return list(system.equilibrium.dynamics.couplings)  # type: ignore[arg-type]


def on_input(coupling: Coupling, prepare: nn.Module) -> Coupling:
    """A coupling whose drive or gate reads a prepared input."""
    if isinstance(coupling, Drive) and not isinstance(coupling.module, Bias):
        coupling.module = nn.Sequential(prepare, coupling.module)
    elif isinstance(coupling, Lateral) and coupling.gate is not None:
        coupling.gate = nn.Sequential(prepare, coupling.gate)
    return coupling
