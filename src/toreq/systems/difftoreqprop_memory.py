"""The associative memory of a denoising DiffTorEqProp: patterns, one of which an input is a noisy copy of."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from toreq.core import Bilinear, Dense, Drive, Identity, Node, Softmax
from toreq.core.norm_control import control_norm, write_weight
from toreq.errors import ConfigError
from toreq.systems.difftoreqprop_filter import LinearFilter
from toreq.systems.difftoreqprop_parts import DEVIATION, LevelFeatures, Seen

UNIT = 0.03
"""Of patterns and keys, which are parameters of about 10, so that they move by a thousandth of themselves where Adam's
rate suits couplings whose norm is bounded."""
ROUNDS = 10
"""Of Lloyd's iteration, after which the means of MNIST hardly move."""
PART = 10_000
"""Inputs whose distances are held at once."""


class Recall(nn.Module):
    r"""How likely each pattern is to be what an input is a noisy copy of, the drive of the memory node:

    .. math:: d_k = \frac1g\Big(\frac{1 + c(s)}{s^2 + \tau^2}\big(\langle u_k, x\rangle - \tfrac12\|u_k\|^2\big)
              + b_k + \ell_{k,\mathrm{class}}\Big)

    for noise of deviation s; with c = 0 the softmax of :math:`g\,d` is the posterior of a mixture of Gaussians of
    variance :math:`\tau^2` about the keys u.

    Args:
        patterns: K, at least 2.
        shape: of one input.
        classes: whose names move the odds.
        slope: g of the memory node.
    """

    def __init__(self, patterns: int, shape: Sequence[int], classes: int, slope: float) -> None:
        super().__init__()
        self.slope = slope
        self.keys = nn.Parameter(DEVIATION / UNIT * torch.randn(patterns, math.prod(shape)))
        self.share = nn.Parameter(torch.zeros(patterns))
        self.named = nn.Parameter(torch.zeros(classes, patterns))
        self.log_spread = nn.Parameter(torch.tensor(2 * math.log(DEVIATION)))
        self.trust = LevelFeatures(1)

    def _precision(self, seen: Seen) -> Tensor:
        assert seen.level is not None
        return (1 / (seen.level.square() + self.log_spread.exp()))[:, None]

    def forward(self, seen: Seen) -> Tensor:
        assert seen.level is not None
        keys = UNIT * self.keys
        match = seen.x.flatten(1) @ keys.T - 0.5 * keys.square().sum(1)
        odds = (1 + self.trust(seen.level)) * self._precision(seen) * match + self.share
        if seen.labels is not None:
            told = self.named[seen.labels.clamp_min(0)]
            odds = odds + torch.where(seen.labels[:, None] >= 0, told, torch.zeros_like(told))
        return odds / self.slope

    def distance(self, seen: Seen) -> Tensor:
        r"""What completes the square of the nearest pattern's energy,
        :math:`\tfrac1{2g}\|x\|^2/(s^2 + \tau^2)`, ``(B,)``."""
        return 0.5 / self.slope * seen.x.flatten(1).square().sum(1) * self._precision(seen)[:, 0]


class PatternMemory(nn.Module):
    r"""Nodes, couplings and first patterns of a dense associative memory (Krotov and Hopfield 2016; Ramsauer et al.
    2021), which as a denoiser is the score of a mixture (Ambrogioni 2024).

    .. math:: E_M = \Phi^*(m) + \tfrac1{2\gamma}\|c\|^2 - \langle m, P\,c\rangle - \langle m, d(x)\rangle,\qquad
              m = \mathrm{softmax}(g\,(d + P c)),\quad c = \gamma P^\top m

    The rows of :math:`\gamma P` are patterns, c is what is recalled, and :class:`Recall` is d. The slope g is so small
    that patterns of the deviation that data are taken to have keep within the bound on the couplings' norm.

    Args:
        patterns: how many, at least 2.
        shape: of one input.
        classes: number of classes.
        span: smallest and largest deviation of the noise.
        norm_bound: of the coupling between m and c, times the root of their slopes; None: free.

    Raises:
        ConfigError: for fewer than two patterns.
    """

    def __init__(
        self,
        patterns: int,
        shape: tuple[int, ...],
        classes: int,
        span: tuple[float, float],
        norm_bound: float | None,
    ) -> None:
        super().__init__()
        if patterns < 2:
            raise ConfigError(f"PatternMemory: expected patterns >= 2, got {patterns}; memory=0 leaves it out")
        size = math.prod(shape)
        largest = math.sqrt(patterns * size) * DEVIATION / UNIT
        # no softmax is steeper than half its slope
        slope = 2 / UNIT * ((norm_bound or 1.0) / largest) ** 2
        operator = Dense(shape, patterns, scale=DEVIATION / UNIT)
        if norm_bound is not None:
            control_norm(operator, largest)
        recall = Recall(patterns, shape, classes, slope)
        self.within = LinearFilter(shape, span)
        self._parts = (operator, recall)  # in a tuple: they belong to the energy
        self.nodes = (Node("m", patterns, Softmax(slope)), Node("c", shape, Identity(UNIT)))
        self.couplings = (Drive("m", recall), Bilinear(operator, "c", "m"))

    @property
    def recall(self) -> Recall:
        """The drive of the memory node."""
        return self._parts[1]

    @torch.no_grad()
    def observe(self, x: Tensor, mean: Tensor, generator: torch.Generator) -> None:
        """Begin with patterns that are means of inputs alike, and their filter with what is left about them.

        Args:
            x: training inputs ``(N, *shape)``, at least as many as patterns.
            mean: of the inputs, ``(*shape,)``.
            generator: picks the inputs that the means begin with.

        Raises:
            ConfigError: for fewer inputs than patterns, or of a larger deviation than the bound on the norm allows.
        """
        operator, recall = self._parts
        flat = (x - mean).flatten(1).to(recall.keys.dtype)
        if len(flat) < len(recall.keys):
            raise ConfigError(
                f"PatternMemory.observe: expected at least as many inputs as patterns ({len(recall.keys)}), got "
                f"{len(flat)}; lower memory"
            )
        found, nearest, counts = means_of(flat, len(recall.keys), generator)
        rest = flat - found[nearest]
        recall.keys.copy_(found / UNIT)
        recall.share.copy_((counts.clamp_min(0.5) / counts.sum()).log())
        recall.log_spread.copy_(rest.square().mean().clamp_min(1e-4).log())
        self.within.observe(rest.view_as(x))
        self.within.mean.zero_()
        write_weight(operator, found / UNIT)

    def restored(self, seen: Seen, centre: Tensor, v: Tensor) -> Tensor:
        r"""What is recalled and, of the rest, what the filter passes and the visible node adds:
        :math:`c + W_s(x - c) + (r_s/0.3)\,v`, W and r those of the inputs about their patterns.

        Args:
            seen: with its level; x about the data's mean.
            centre: c, of the shape of x.
            v: what the visible node says.
        """
        return centre + self.within.restored(self.within(Seen(seen.x - centre, seen.level)), v)


def means_of(x: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The means that Lloyd's iteration finds (1982), from inputs drawn at random.

    Args:
        x: ``(N, D)``.
        count: of means, K at most N.
        generator: on the CPU.

    Returns:
        the means ``(K, D)``, the nearest of each input ``(N,)``, and how many inputs each has ``(K,)``.
    """
    means = x[torch.randperm(len(x), generator=generator)[:count].to(x.device)].clone()
    nearest = _nearest(x, means)
    for _ in range(ROUNDS):
        counts = torch.bincount(nearest, minlength=count).to(x.dtype)
        total = torch.zeros_like(means).index_add_(0, nearest, x)
        # a mean that has lost all its inputs stays where it is
        means = torch.where(counts[:, None] > 0, total / counts.clamp_min(1)[:, None], means)
        nearest = _nearest(x, means)
    return means, nearest, torch.bincount(nearest, minlength=count).to(x.dtype)


def _nearest(x: Tensor, means: Tensor) -> Tensor:
    offset = 0.5 * means.square().sum(1)
    return torch.cat([(part @ means.T - offset).argmax(1) for part in x.split(PART)])
