"""Parts of DiffTorEqProp: what a network sees, the soft clamp on its visible node, and its other drives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

FREQUENCIES = (0.25, 0.5, 1.0, 2.0)
"""Of the features of a noise level, in cycles per factor of e."""
DEVIATION = 0.3
"""Standard deviation that the data are taken to have where noise is weighed against them; that of MNIST is 0.31."""
UNLABELLED = 0.5
"""Share of the examples that are denoised without their class."""
FLOOR = 0.0005
"""Least mean square per pixel by which errors of denoising are divided: less noise is not worth its removal."""
CERTAIN = 30.0
"""Logit that a given class adds to its unit of the label node."""


@dataclass(frozen=True)
class Seen:
    """What a network sees.

    Attributes:
        x: inputs ``(B, *input_shape)``.
        level: standard deviation of the noise in x per example ``(B,)``, above 0; None where it is not known: a
            denoising network then estimates it.
        labels: classes that the label node is clamped to, ``(B,)`` int64, -1 for none; None for none at all.
        filtered: x without the noise that a linear filter removes, of its shape; set by the network, which then has
            taken the data's mean out of both.
    """

    x: Tensor
    level: Tensor | None = None
    labels: Tensor | None = None
    filtered: Tensor | None = None

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


def among(values: Tensor, x: Tensor) -> Tensor:
    """Numbers per example, shaped to multiply ``x``."""
    return values.view(-1, *(1 for _ in x.shape[1:]))


def signal(level: Tensor) -> Tensor:
    r"""Share of the data in the variance of data plus noise, :math:`1/(1 + (s/0.3)^2)`: the gain of the best scalar
    filter."""
    return 1 / (1 + (level / DEVIATION).square())


def denoising_cost(
    denoise: Callable[[Seen], Tensor],
    left: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    span: tuple[float, float],
    generator: torch.Generator,
) -> Tensor:
    r"""Mean of :math:`\tfrac12\|D(x + s\xi) - x\|^2/(r_s^2 + 0.0005)` per pixel, s drawn log-uniformly from ``span``.

    Args:
        denoise: D, of the shape of its input.
        left: :math:`r_s^2`, what the best linear filter leaves of noise of deviation s, ``(B,) -> (B,)``.
        x: clean inputs ``(B, ...)``.
        y: their classes ``(B,)``, of which some are told.
        span: smallest and largest deviation of the noise.
        generator: of levels and noise.
    """
    low, high = (math.log(s) for s in span)
    drawn = torch.rand(2, len(x), generator=generator, dtype=x.dtype).to(x.device)
    level = (low + (high - low) * drawn[0]).exp()
    labels = torch.where(drawn[1] < UNLABELLED, torch.full_like(y, -1), y)
    seen = Seen(x + among(level, x) * drawn_like(x, generator), level, labels)
    error = (denoise(seen) - x).square().flatten(1).mean(1)
    return 0.5 * (error / (left(level) + FLOOR)).mean()


class Clamp(nn.Module):
    r"""The pull :math:`\kappa\,(c\,x + s\,\xi) + b` on the visible node.

    In training :math:`\xi\sim N(0, 1)` is drawn once per relaxation, which so has an energy of its own; s is learned by
    the contrast of :math:`\kappa\langle\xi, v\rangle`. Where the noise level of x is known, x is filtered and c a
    learned function of the level that begins at ``begin``; 1 otherwise.

    Args:
        shape: of one example.
        strength: :math:`\kappa`, above 0.
        noise: initial s in units of x, above 0; None for no noise.
        levels: whether noise levels are made use of.
        begin: the gain before training.
    """

    def __init__(
        self, shape: Sequence[int], strength: float, noise: float | None, levels: bool, begin: float = 1.0
    ) -> None:
        super().__init__()
        self.strength, self.begin = strength, begin
        self.bias = nn.Parameter(torch.zeros(*shape))
        self.log_noise = None if noise is None else nn.Parameter(torch.tensor(math.log(noise)))
        self.trust = LevelFeatures(1) if levels else None
        self.generator = own_generator()

    def forward(self, given: Tensor | Seen) -> Tensor:
        seen = Seen.of(given)
        x = seen.x if seen.filtered is None else seen.filtered
        if self.trust is not None and seen.level is not None:
            x = x * among(self.begin + self.trust(seen.level)[:, 0], x)
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

    @staticmethod
    def waves(level: Tensor) -> Tensor:
        """What is learned from, ``(B,) -> (B, 10)``: the level, its logarithm, and waves of that."""
        u = level.log()[:, None]
        waves = 2 * math.pi * u * u.new_tensor(FREQUENCIES)
        return torch.cat([u, level[:, None], waves.sin(), waves.cos()], 1)

    def forward(self, level: Tensor) -> Tensor:
        return self.linear(self.waves(level.to(self.linear.weight.dtype)))


class Offset(nn.Module):
    """A learned constant per feature, in units of the activation's argument, moved by what is seen.

    Args:
        shape: of one example; an image's feature is a channel, a vector's a unit.
        slope: of the node's activation.
        levels: whether noise levels are made use of.
        view: a linear map of the input to the node; None where the input reaches the node by the visible one alone.
            With ``levels`` it sees the filtered input and the input as it is, both brought to unit deviation, as
            channels side by side.
    """

    def __init__(self, shape: Sequence[int], slope: float, levels: bool, view: nn.Module | None = None) -> None:
        super().__init__()
        self.shape, self.slope = tuple(shape), slope
        self.value = nn.Parameter(torch.zeros(self.shape[0]))
        self.level = LevelFeatures(self.shape[0]) if levels else None
        self.view = view

    def forward(self, given: Tensor | Seen) -> Tensor:
        seen = Seen.of(given)
        x, value = seen.x, self.value.expand(seen.x.shape[0], -1)
        if self.level is not None and seen.level is not None:
            value = value + self.level(seen.level)
        out = value.view(*value.shape, *(1 for _ in self.shape[1:])).expand(-1, *self.shape)
        if self.view is not None:
            out = out + self.view(x if seen.filtered is None else views(seen))
        return out / self.slope


def views(seen: Seen) -> Tensor:
    """The filtered input and the input as it is, brought to about unit deviation, as channels ``(B, 2 C, ...)``."""
    assert seen.filtered is not None
    raw = seen.x
    if seen.level is not None:
        raw = raw * among(signal(seen.level.to(raw.dtype)).sqrt(), raw)
    return torch.cat([seen.filtered, raw], 1) / DEVIATION


class LabelClamp(nn.Module):
    """The pull of a given class on the label node, and a bias, both as logits.

    Args:
        classes: number of classes.
        slope: of the label node.
    """

    def __init__(self, classes: int, slope: float) -> None:
        super().__init__()
        self.slope = slope
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, given: Tensor | Seen) -> Tensor:
        seen = Seen.of(given)
        out = self.bias.expand(seen.x.shape[0], -1)
        if seen.labels is not None:
            named = seen.labels >= 0
            hot = nn.functional.one_hot(seen.labels.clamp_min(0), out.shape[1]).to(out.dtype)
            out = out + CERTAIN * hot * named[:, None]
        return out / self.slope
