"""Parts of DiffTorEqProp: what a network sees, the soft clamp on its visible node, and its other drives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

FREQUENCIES = (0.25, 0.5, 1.0, 2.0)
"""Of the features of a noise level, in cycles per factor of e."""


@dataclass(frozen=True)
class Seen:
    """What a network sees.

    Attributes:
        x: inputs ``(B, *input_shape)``.
        level: standard deviation of the noise in x per example ``(B,)``, above 0; None where it is not known.
        labels: classes that the label node is clamped to, ``(B,)`` int64, -1 for none; None for none at all.
    """

    x: Tensor
    level: Tensor | None = None
    labels: Tensor | None = None

    @staticmethod
    def of(x: Tensor | Seen) -> Seen:
        """A plain tensor is seen without its noise level or class."""
        return x if isinstance(x, Seen) else Seen(x)


def own_generator() -> torch.Generator:
    """A generator seeded from torch's default one, so that ``torch.manual_seed`` decides it; its numbers are drawn on
    the CPU and so are the same on every device."""
    return torch.Generator().manual_seed(int(torch.randint(2**62, ()).item()))


def drawn_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers of the shape, type and device of ``x``."""
    return torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)


class Clamp(nn.Module):
    r"""The pull :math:`\kappa\,(c\,x + s\,\xi) + b` on the visible node.

    In training :math:`\xi\sim N(0, 1)` is drawn once per relaxation, which so has an energy of its own; s is learned by
    the contrast of :math:`\kappa\langle\xi, v\rangle`. Where the noise level of x is known, c is a learned function of
    it, 1 otherwise.

    Args:
        shape: of one example.
        strength: :math:`\kappa`, above 0.
        noise: initial s in units of x, above 0; None for no noise.
        levels: whether noise levels are made use of.
    """

    def __init__(self, shape: Sequence[int], strength: float, noise: float | None, levels: bool) -> None:
        super().__init__()
        self.strength = strength
        self.bias = nn.Parameter(torch.zeros(*shape))
        self.log_noise = None if noise is None else nn.Parameter(torch.tensor(math.log(noise)))
        self.trust = LevelFeatures(1) if levels else None
        self.generator = own_generator()

    def forward(self, given: Tensor | Seen) -> Tensor:
        seen = Seen.of(given)
        x = seen.x
        if self.trust is not None and seen.level is not None:
            x = x * self.trust(seen.level).exp().view(-1, *(1 for _ in x.shape[1:]))
        if self.log_noise is not None and self.training:
            x = x + self.log_noise.exp() * drawn_like(x, self.generator)
        return self.strength * x + self.bias


class LevelFeatures(nn.Module):
    """A learned function of the noise level, zero at first: ``(B,) -> (B, features)``."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * len(FREQUENCIES) + 2, features)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, level: Tensor) -> Tensor:
        u = level.to(self.linear.weight.dtype).log()[:, None]
        waves = 2 * math.pi * u * u.new_tensor(FREQUENCIES)
        return self.linear(torch.cat([u, level[:, None].to(u.dtype), waves.sin(), waves.cos()], 1))


class Offset(nn.Module):
    """A learned constant per feature, moved by the noise level where that is known.

    Args:
        shape: of one example; an image's feature is a channel, a vector's a unit.
        levels: whether noise levels are made use of.
    """

    def __init__(self, shape: Sequence[int], levels: bool) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.value = nn.Parameter(torch.zeros(self.shape[0]))
        self.level = LevelFeatures(self.shape[0]) if levels else None

    def forward(self, given: Tensor | Seen) -> Tensor:
        seen = Seen.of(given)
        value = self.value.expand(seen.x.shape[0], -1)
        if self.level is not None and seen.level is not None:
            value = value + self.level(seen.level)
        return value.view(*value.shape, *(1 for _ in self.shape[1:])).expand(-1, *self.shape)


class LabelClamp(nn.Module):
    """The pull of a given class on the label node, and a bias.

    Args:
        classes: number of classes.
        strength: of the pull on the given class's unit.
    """

    def __init__(self, classes: int, strength: float) -> None:
        super().__init__()
        self.strength = strength
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, given: Tensor | Seen) -> Tensor:
        seen = Seen.of(given)
        out = self.bias.expand(seen.x.shape[0], -1)
        if seen.labels is None:
            return out
        named = seen.labels >= 0
        hot = nn.functional.one_hot(seen.labels.clamp_min(0), out.shape[1]).to(out.dtype)
        return out + self.strength * hot * named[:, None]
