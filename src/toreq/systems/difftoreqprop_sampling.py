"""Generation by annealed Langevin dynamics: chains that pass the noise levels one after the other, on a ring."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from toreq.errors import ConfigError

Denoiser = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
"""(x, level, labels) -> the expected clean inputs, of the shape of x; labels None for none."""


@dataclass(frozen=True, kw_only=True)
class Anneal:
    r"""Noise levels and how a chain passes from one to the next (Song and Ermon 2019; Song et al. 2021).

    With :math:`D = D(x, s)` the denoised state, :math:`(D - x)/s^2` is the score of the data blurred by noise of
    deviation s. A chain at level s goes to the next, s', by

    .. math:: x \leftarrow D + \sqrt{s'^2 - u^2}\,\frac{x - D}{s} + u\,\xi,\qquad
              u = \eta\,s'\sqrt{1 - s'^2/s^2}

    which keeps the blurred law for any eta where the denoiser is exact, and ends with D itself. ``corrections`` steps
    of Langevin dynamics at each level, :math:`x \leftarrow x + r\,(D - x) + s\sqrt{2r}\,\xi`, go before it.

    Args:
        levels: number of noise levels, at least 2: as many denoisings, times one more than ``corrections``.
        high, low: largest and smallest deviation, 0 < low < high; geometric in between.
        eta: share of fresh noise in [0, 1]; 0 is deterministic after its start.
        corrections: Langevin steps at each level.
        rate: their step r in (0, 1).
    """

    levels: int = 50
    high: float = 2.0
    low: float = 0.03
    eta: float = 1.0
    corrections: int = 0
    rate: float = 0.1

    def __post_init__(self) -> None:
        where = "Anneal"
        if self.levels < 2:
            raise ConfigError(f"{where}: expected levels >= 2, got {self.levels}; try 50")
        if not 0 < self.low < self.high:
            raise ConfigError(f"{where}: expected 0 < low < high, got {self.low} and {self.high}; try 0.03 and 2")
        if not 0 <= self.eta <= 1:
            raise ConfigError(f"{where}: expected eta in [0, 1], got {self.eta}; try 1")
        if self.corrections < 0 or not 0 < self.rate < 1:
            raise ConfigError(
                f"{where}: expected corrections >= 0 and rate in (0, 1), got {self.corrections} and {self.rate}; "
                "try 0 and 0.1"
            )

    @property
    def evaluations(self) -> int:
        """Denoisings of one chain."""
        return self.levels * (1 + self.corrections)

    def table(self, like: Tensor) -> Tensor:
        """The levels from the highest to the lowest, then 0: ``(levels + 1,)``."""
        share = torch.linspace(0, 1, self.levels, dtype=like.dtype, device=like.device)
        log = (1 - share) * math.log(self.high) + share * math.log(self.low)
        return torch.cat([log.exp(), log.new_zeros(1)])


@dataclass(frozen=True)
class Known:
    """A part of the input that is given, for in-painting.

    Args:
        x: the given values ``(*input_shape)``, or ``(batch, *input_shape)`` for each chain of a batch.
        mask: True where they are given, broadcastable to x.
    """

    x: Tensor
    mask: Tensor


class Conveyor:
    """Chains at all noise levels at once, one batch in each slot of a ring.

    One :meth:`tick` denoises all slots in a single batch, moves every chain to its next level, and releases the batch
    that has passed the last one, whose slot then takes fresh noise. Nothing is copied: the levels move along the ring,
    the chains stay where they are. Memory is that of ``levels`` batches however many are drawn. Once ``limit`` batches
    are under way the ring runs empty.

    Args:
        denoiser: see :data:`Denoiser`.
        shape: of one input.
        batch: chains in a slot.
        anneal: the levels.
        generator: of all noise, on ``device``'s CPU.
        device, dtype: of the chains.
        labels: called with the number of the batch, gives its classes ``(batch,)`` int64; None for none.
        known: what is given of every input.
        limit: batches to draw; None for no end.
        begin: ``(count, generator) -> (count, *shape)``, inputs about which chains begin, such as draws from a Gaussian
            law; 0 when None, which only a highest level far above the data's deviation forgets.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        shape: Sequence[int],
        batch: int,
        anneal: Anneal,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        labels: Callable[[int], Tensor] | None = None,
        known: Known | None = None,
        limit: int | None = None,
        begin: Callable[[int, torch.Generator], Tensor] | None = None,
    ) -> None:
        if batch < 1:
            raise ConfigError(f"Conveyor: expected batch >= 1, got {batch}; it is the number of chains in a slot")
        self.denoiser, self.shape, self.batch, self.anneal = denoiser, tuple(shape), batch, anneal
        if known is not None and tuple(known.x.shape) not in (self.shape, (batch, *self.shape)):
            raise ConfigError(
                f"Conveyor: expected known values of {self.shape} or {(batch, *self.shape)}, got "
                f"{tuple(known.x.shape)}; give one input for all chains, or one for each chain of a batch"
            )
        self.generator, self.labels, self.known, self.begin = generator, labels, known, begin
        count = anneal.levels
        self.x = torch.zeros(count, batch, *self.shape, device=device, dtype=dtype)
        self.classes = torch.full((count, batch), -1, dtype=torch.int64, device=device)
        self.table = anneal.table(self.x)
        self.at = torch.full((count,), -1, dtype=torch.int64)  # index of each slot's level; -1 for an empty slot
        self.head = 0  # the slot that takes the next fresh batch
        self.tail = 0  # the slot whose batch is finished next
        self.started, self.limit = 0, limit

    @property
    def empty(self) -> bool:
        """Whether all batches are drawn."""
        return self.limit is not None and self.started >= self.limit and bool((self.at < 0).all())

    def tick(self) -> Tensor | None:
        """Load a fresh batch, move every chain one level on, and return the batch that is finished ``(batch, *shape)``;
        None while the ring is filling.

        Raises:
            ConfigError: when all batches are drawn.
        """
        if self.empty:
            raise ConfigError(f"Conveyor: expected at most {self.limit} batches, got another tick; raise limit")
        if self.limit is None or self.started < self.limit:
            self._load()
        filled = (self.at >= 0).nonzero().flatten()
        x, at = self.x[filled], self.at[filled].to(self.x.device)
        level, following = self.table[at], self.table[at + 1]
        labels = None if self.labels is None else self.classes[filled].flatten()
        for _ in range(self.anneal.corrections):
            move = self._denoised(x, level, labels) - x
            rate = self.anneal.rate
            x = self._given(x + rate * move + math.sqrt(2 * rate) * _over(level, x) * self._noise(x), level)
        clean = self._denoised(x, level, labels)
        s, t = _over(level, x), _over(following, x)
        u = self.anneal.eta * t * (1 - (t / s).square()).sqrt()
        x = clean + (t.square() - u.square()).clamp_min(0).sqrt() * (x - clean) / s + u * self._noise(x)
        self.x[filled] = self._given(x, following)
        self.at[filled] += 1
        done = self.tail
        if int(self.at[done]) < self.anneal.levels:
            return None
        self.at[done] = -1
        self.tail = (done + 1) % self.anneal.levels
        return self.x[done].clone()

    def _load(self) -> None:
        i = self.head
        self.x[i] = self.anneal.high * self._noise(self.x[i])
        if self.begin is not None:
            self.x[i] += self.begin(self.batch, self.generator)
        if self.labels is not None:
            self.classes[i] = self.labels(self.started).to(self.classes.device)
        self.x[i] = self._given(self.x[i][None], self.table[:1])[0]
        self.at[i] = 0
        self.started += 1
        self.head = (i + 1) % self.anneal.levels

    def _denoised(self, x: Tensor, level: Tensor, labels: Tensor | None) -> Tensor:
        flat = x.flatten(0, 1)
        return self.denoiser(flat, level.repeat_interleave(self.batch), labels).view_as(x)

    def _noise(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator, dtype=like.dtype).to(like.device)

    def _given(self, x: Tensor, level: Tensor) -> Tensor:
        """The given part at its noise level: a chain may only choose the rest."""
        if self.known is None:
            return x
        values = self.known.x.to(x).expand_as(x) + _over(level, x) * self._noise(x)
        return torch.where(self.known.mask.to(x.device), values, x)


def _over(level: Tensor, x: Tensor) -> Tensor:
    return level.view(-1, *(1 for _ in x.shape[1:]))


def stream(conveyor: Conveyor) -> Iterator[Tensor]:
    """Finished batches, without end where the ring has no limit."""
    while not conveyor.empty:
        done = conveyor.tick()
        if done is not None:
            yield done
