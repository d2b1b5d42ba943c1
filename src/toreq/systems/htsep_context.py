"""Where HTSEP's units live: a torus on which the input's own statistics choose a place, and a bump opens what is near.

No label of a task enters, and no example is kept.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from toreq.errors import ConfigError, nearest
from toreq.memory import TorusGeometry
from toreq.solvers.noise import Noise
from toreq.systems.htsep_laws import SLOWEST, GaussianLaws

MODES = ("probabilistic", "hard", "off")
SOURCES = ("statistics", "input")
GRACE = 256
"""Examples of a context before others are held against it."""
MATURE = 4096
"""Examples after which a context is used to what it has seen: its level then follows at the slowest rate, so that
inputs that drift away become novel in the end."""
ERRORS = 5.0
"""Standard errors of a batch's mean likelihood that novelty takes at least: a small batch strays by chance."""
RARE = 0.05
"""Opening probabilities below it are 0, those as near to 1 are 1."""
FAR = 1e6
"""Distance between the sheets of an unfolded axis, which no bump bridges."""

log = logging.getLogger("toreq.htsep")


class ContextTorus(nn.Module):
    r"""Units at coordinates of a torus, opened by a bump at the place of the input's context.

    Every slot of the torus can hold one context: mean and covariance of its inputs in a random projection. The place
    of an input x is the slot under whose Gaussian it is likeliest (:class:`~toreq.systems.htsep_laws.GaussianLaws`),

    .. math:: k(x) = \arg\max_k \ell_k(x), \qquad p_i(x) = \frac1{1 + \exp((d(u_i, c_{k(x)}) - r)/e)},

    with d the distance around the torus between the unit and the slot, and p cut to 0 below 0.05 and to 1 above 0.95.
    The bump's radius r is such that the share of
    units with :math:`p \ge \tfrac12`, averaged over the slots, is ``share``. In training mode each gate is drawn anew,
    open with probability p; otherwise it is open where :math:`p \ge \tfrac12`. A batch in training mode belongs to the
    context under which all of it is likeliest, and updates that one; it opens a new one, on the free slot farthest from
    those in use, where its mean likelihood falls below what the context is used to by ``novelty`` standard deviations
    of an example's, and by five of its own standard errors.

    Args:
        features: numbers in an input.
        shape: slots along each axis, each at least 2.
        units: node name -> number of units (channels of an image).
        share: of units that a bump opens, in (0, 1].
        edge: e, softness of the bump in slots, above 0.
        novelty: standard deviations of an example's likelihood, above 0.
        mode: ``"probabilistic"``, ``"hard"`` (never drawn) or ``"off"`` (all units open, no context kept).
        source: ``"statistics"``; or ``"input"``, without a torus: each input opens the same share of units by a fixed
            random projection of itself.
        sheets: places along each unfolded axis, which no bump bridges; see :func:`toreq.systems.htsep_growth.grow`.
        seed: of the draws and of that projection.

    Raises:
        ConfigError: for a value out of range.
    """

    laws: GaussianLaws
    level: Tensor
    wobble: Tensor
    slots: Tensor
    scale: Tensor

    def __init__(
        self,
        features: int,
        shape: Sequence[int],
        units: Mapping[str, int],
        *,
        share: float = 0.25,
        edge: float = 0.1,
        novelty: float = 0.6,
        mode: str = "probabilistic",
        source: str = "statistics",
        sheets: Sequence[int] = (),
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.shape, self.sheets = tuple(shape), tuple(sheets)
        _check(self.shape, share, edge, novelty, mode, source)
        self.features, self.share, self.edge, self.novelty = features, share, edge, novelty
        self.mode, self.source, self.seed = mode, source, seed
        self.growth: list[dict[str, Any]] = []
        self.noise = Noise.of(seed)
        self.full = 0
        self._open: dict[str, Tensor] = {}
        self._drawing: Tensor | None = None
        self._pinned: int | None = None
        copies = math.prod(self.sheets)
        total = math.prod(self.shape) * copies
        self.laws = GaussianLaws(features, total, seed)
        for name in ("level", "wobble"):
            self.register_buffer(name, torch.zeros(total))
        self.register_buffer("slots", _laid_out(_grid(self.shape), self.sheets))
        self.register_buffer("scale", torch.tensor([1.0] * len(self.shape) + [FAR] * len(self.sheets)))
        self.radius: dict[str, float] = {}
        for name, number in units.items():
            if number % copies:
                raise ConfigError(
                    f"ContextTorus: expected a width that {copies} sheets divide, got {number} on {name}; the units "
                    "of a sheet are laid out again on each"
                )
            base = spread(number // copies, self.shape)
            self.radius[name] = self._radius(base)
            self.register_buffer(f"place_{name}", _laid_out(base, self.sheets))
        if source == "input":
            generator = torch.Generator().manual_seed(seed)
            for name, number in units.items():
                drawn = torch.randn(number, features, generator=generator) / math.sqrt(features)
                self.register_buffer(f"projection_{name}", drawn)

    # -- places

    def places(self, name: str) -> Tensor:
        """Coordinates of a node's units, ``(U, A)``."""
        return self.get_buffer(f"place_{name}")

    def bump(self, name: str) -> Tensor:
        """Opening probabilities p of a node's units at every slot, ``(S, U)``."""
        p = ((self.radius[name] - self._distance(self.places(name))) / self.edge).sigmoid()
        # a unit that opens once in a thousand times is taught by a context that is not its own
        return torch.where(p < RARE, 0.0, torch.where(p > 1 - RARE, 1.0, p))

    def _distance(self, places: Tensor) -> Tensor:
        return _around(self.slots[:, None] - places, self.slots.new_tensor([*self.shape, *self.sheets]), self.scale)

    def _radius(self, base: Tensor) -> float:
        grid = _grid(self.shape)
        distance = _around(grid[:, None] - base, torch.tensor(self.shape), torch.ones(len(self.shape)))
        if self.share == 1:
            return float(distance.max()) + 100 * self.edge
        # of a part, where there are many: the units are spread alike around every slot
        return float(distance[: max(1, 2**23 // base.shape[0])].flatten().quantile(self.share))

    def take(self, other: ContextTorus) -> None:
        """Go on with what a torus of fewer sheets has learned: its slots are the first of this one."""
        self.laws.take(other.laws)
        for name in ("level", "wobble"):
            held = other.get_buffer(name)
            self.get_buffer(name)[: len(held)] = held
        self.noise, self.full, self.growth = other.noise, other.full, list(other.growth)

    # -- contexts

    @property
    def count(self) -> Tensor:
        """Examples seen by each slot's context, ``(S,)``; 0 where there is none."""
        return self.laws.count

    @property
    def contexts(self) -> int:
        """Slots in use."""
        return len(self.laws.used)

    @torch.no_grad()
    def address(self, x: Tensor) -> Tensor:
        """The slot of each input's context, int64 ``(B,)``; slot 0 before anything has been seen."""
        if self._pinned is not None:
            return torch.full((x.shape[0],), self._pinned, dtype=torch.int64, device=x.device)
        used = self.laws.used
        if not len(used):
            return torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        return used[self.laws.likelihood(x).argmax(1)]

    @torch.no_grad()
    def observe(self, x: Tensor) -> int:
        """Learn from a batch's statistics; returns its slot.

        A context that finds no free slot stays with the nearest one, and :attr:`full` counts such batches.
        """
        if self.contexts == 0:
            return self._open_new(x, 0)
        slot, own, z = self._nearest(x)
        if z > self._threshold(x):
            place = self.candidate()
            if place is not None:
                return self._open_new(x, place)
            self.full += 1
        self._follow(slot, x, own)
        return slot

    @torch.no_grad()
    def novel(self, x: Tensor) -> bool:
        """Whether a batch would open a context, had it room."""
        return self.contexts == 0 or self._nearest(x)[2] > self._threshold(x)

    def _threshold(self, x: Tensor) -> float:
        return max(self.novelty, ERRORS / math.sqrt(x.shape[0]))

    def candidate(self) -> int | None:
        """The slot that the next context would get, None where there is none left."""
        free = (self.count == 0).nonzero().flatten()
        if not len(free) or self.contexts == 0:
            return 0 if len(free) else None
        return self._farthest(free, self.laws.used)

    def _nearest(self, x: Tensor) -> tuple[int, Tensor, float]:
        """The slot under which a batch is likeliest, its likelihoods there, and by how many deviations they fall short
        of what that context is used to; 0 while it is new."""
        found = self.laws.likelihood(x)
        means = found.mean(0)
        best = int(means.argmax())
        slot = int(self.laws.used[best])
        z = (self.level[slot] - means[best]) / self.wobble[slot].clamp_min(1e-12).sqrt()
        return slot, found[:, best], float(z) if float(self.count[slot]) >= GRACE else 0.0

    def _farthest(self, free: Tensor, used: Tensor) -> int:
        sizes = self.slots.new_tensor([*self.shape, *self.sheets])
        away = _around(self.slots[free][:, None] - self.slots[used], sizes, self.scale)
        # of equally far slots the first
        return int(free[away.amin(1).argmax()])

    def _open_new(self, x: Tensor, slot: int) -> int:
        self.laws.start(slot, x)
        own = self.laws.likelihood(x)[:, int((self.laws.used == slot).nonzero())]
        self.level[slot] = own.mean()
        self.wobble[slot] = own.var(correction=0)
        log.info("context %d opened at slot %d of %s", self.contexts, slot, (*self.shape, *self.sheets))
        return slot

    def _follow(self, slot: int, x: Tensor, found: Tensor) -> None:
        rate = self.laws.follow(slot, x)
        # likelihoods change while the statistics form
        quick = max(rate, 0.1) if float(self.count[slot]) < MATURE else SLOWEST
        self.level[slot].lerp_(found.mean(), quick)
        self.wobble[slot].lerp_((found - self.level[slot]).square().mean(), quick)

    def geometry(self) -> TorusGeometry:
        """The base torus with lengths stretched where contexts have seen much: its curvature shows crowding."""
        return TorusGeometry.from_statistics(self.count.reshape(-1, *self.shape).double().sum(0))

    # -- gates

    @contextlib.contextmanager
    def drawn(self, x: Tensor, draw: bool) -> Iterator[None]:
        """A context in which each node's gates of ``x`` are worked out once, and drawn if asked for."""
        self._open, self._drawing = {}, x
        generator = self.noise.chain(x.device) if draw and self.mode == "probabilistic" else None
        try:
            for name in self.radius:
                self._open[name] = self._gates(x, name, generator)
            yield
        finally:
            self._open, self._drawing = {}, None

    @contextlib.contextmanager
    def pinned(self, slot: int) -> Iterator[None]:
        """A context in which every input has the place of one slot; within another one, that one's."""
        before = self._pinned
        self._pinned = slot if before is None else before
        try:
            yield
        finally:
            self._pinned = before

    @torch.no_grad()
    def gates(self, x: Tensor, name: str) -> Tensor:
        """Gates of a node's units for inputs, 0 or 1, ``(B, U)``."""
        if self._drawing is x and name in self._open:
            return self._open[name]
        return self._gates(x, name, None)

    @torch.no_grad()
    def _gates(self, x: Tensor, name: str, generator: torch.Generator | None) -> Tensor:
        if self.mode == "off":
            return torch.ones(x.shape[0], len(self.places(name)), dtype=x.dtype, device=x.device)
        if self.source == "input":
            seen = x.flatten(1) @ self.get_buffer(f"projection_{name}").to(x).T
            kept = max(1, round(self.share * seen.shape[1]))
            return torch.zeros_like(seen).scatter_(1, seen.topk(kept, 1).indices, 1.0)
        p = self.bump(name)[self.address(x)]
        if generator is None:
            return (p >= 0.5).to(x.dtype)
        drawn = torch.rand(p.shape, generator=generator, dtype=p.dtype, device=p.device)
        return (drawn < p).to(x.dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}, "_drawing": None}


class Gate(nn.Module):
    """The gates of one node, as a module from the network's input.

    Args:
        torus: shared by all nodes.
        name: of the node.
        shape: of the node; a gate is that of its first axis, broadcast over the others.
    """

    flat = True

    def __init__(self, torus: ContextTorus, name: str, shape: Sequence[int]) -> None:
        super().__init__()
        self._torus = (torus,)  # in a tuple: the system owns it
        self.name, self.trailing = name, len(tuple(shape)) - 1

    def forward(self, x: Tensor) -> Tensor:
        """Gates ``(B, U)``, or ``(B, U, 1, 1)`` for channels."""
        gates = self._torus[0].gates(x, self.name)
        return gates.reshape(*gates.shape, *[1] * self.trailing)


class Gated(nn.Module):
    """A module whose output is multiplied by gates, as a drive.

    Args:
        inner: maps the input to ``(B, *shape)``.
        gate: maps it to what broadcasts with that.
    """

    def __init__(self, inner: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.inner, self.gate = inner, gate

    def forward(self, x: Tensor) -> Tensor:
        """The gated output."""
        out = self.inner(x)
        return out * self.gate(x).to(out.dtype)


def spread(count: int, shape: Sequence[int]) -> Tensor:
    r"""Places of ``count`` units on a torus, spread evenly by multiples of the generalised golden ratio (the root of
    :math:`x^{A+1} = x + 1`), so that each part of them is spread evenly too; ``(count, A)``."""
    axes, root = len(shape), 2.0
    for _ in range(60):
        root = (1 + root) ** (1 / (axes + 1))
    step = torch.tensor([root ** -(i + 1) for i in range(axes)], dtype=torch.float64)
    at = (torch.arange(count, dtype=torch.float64)[:, None] * step + 0.5).remainder(1)
    return (at * torch.tensor(shape, dtype=torch.float64)).float()


def _around(apart: Tensor, sizes: Tensor, scale: Tensor) -> Tensor:
    """Distances around a torus of differences of coordinates, over the last axis."""
    apart = apart.abs().remainder(sizes)
    return torch.linalg.vector_norm(torch.minimum(apart, sizes - apart) * scale, dim=-1)


def _laid_out(places: Tensor, sheets: Sequence[int]) -> Tensor:
    """The places once more at each coordinate of each further axis; at the first of them they come first."""
    for size in sheets:
        at = torch.arange(size, dtype=places.dtype).repeat_interleave(len(places))
        places = torch.cat([places.repeat(size, 1), at[:, None]], 1)
    return places


def _grid(shape: Sequence[int]) -> Tensor:
    return torch.tensor(list(itertools.product(*[range(n) for n in shape])), dtype=torch.float32)


def _check(shape: tuple[int, ...], share: float, edge: float, novelty: float, mode: str, source: str) -> None:
    if not shape or any(n < 2 for n in shape):
        raise ConfigError(
            f"ContextTorus: expected a torus of sizes >= 2, got {shape}; an axis of one slot holds nothing apart, "
            "leave it out"
        )
    if not (0 < share <= 1 and edge > 0 and novelty > 0):
        raise ConfigError(
            f"ContextTorus: expected open_share in (0, 1], edge > 0 and novelty > 0, got {share}, {edge} and "
            f"{novelty}; e.g. 0.25, 0.1, 0.6"
        )
    for name, value, legal in (("gates", mode, MODES), ("context", source, SOURCES)):
        if value not in legal:
            raise ConfigError(f"ContextTorus: expected {name} in {legal}, got {value!r}; {nearest(value, legal)}")
