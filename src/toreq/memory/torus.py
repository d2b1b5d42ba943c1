"""A torus of slots for inputs that change in time: one axis is time with a moving head, the others are addressed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from toreq.errors import ConfigError

if TYPE_CHECKING:
    from toreq.memory.geometry import TorusGeometry

Address = Tensor | Sequence[float] | None
"""Coordinates on the addressed axes in units of slots: ``(A - 1,)`` for all examples, ``(B, A - 1)``, or, for several
reads at once, ``(B, Q, A - 1)``; None for a ring, which has none."""


@dataclass(frozen=True, eq=False)
class MemoryState:
    """What a torus holds, never changed in place: whoever keeps a state can go on reading it.

    Args:
        rows: the T rows of slots, each ``(B, n_2, ..., n_A, F)``, in the order of the ring.
        head: place of the newest row among them.
        fading: the rows' sum, decayed by their age, ``(B, n_2, ..., n_A, F)``.
    """

    rows: tuple[Tensor, ...]
    head: int
    fading: Tensor

    def row(self, age: int) -> Tensor:
        """The row ``age`` steps behind the head (0: the newest), modulo T; ``(B, n_2, ..., n_A, F)``."""
        return self.rows[(self.head - age) % len(self.rows)]

    @property
    def slots(self) -> Tensor:
        """All slots, newest row first, ``(B, T, n_2, ..., n_A, F)``."""
        return torch.stack([self.row(age) for age in range(len(self.rows))], 1)

    def occupancy(self) -> Tensor:
        """Mean square of each slot over examples and features, newest row first: ``(T, n_2, ..., n_A)``."""
        means = [self.row(age).detach().square().mean((0, -1)) for age in range(len(self.rows))]
        return torch.stack(means)

    def map(self, function: Callable[[Tensor], Tensor]) -> MemoryState:
        """The same torus with every tensor replaced, e.g. detached, moved, or of some examples only."""
        return replace(self, rows=tuple(function(row) for row in self.rows), fading=function(self.fading))


@dataclass(frozen=True)
class TorusMemory:
    r"""An A-dimensional torus of slots that fades along every axis, as pure functions on a :class:`MemoryState`.

    .. math:: \mathrm{read}(p) = \sum_w \rho_1^{\,\mathrm{age}(w)} \prod_{i=2}^{A} \rho_i^{\,g_i d_i(p_i, q_i(w))}\, v_w

    over the writes :math:`v_w` at :math:`q(w)` not older than the first axis is long. The first axis is time: its head
    moves on by :meth:`advance`, by which no slot is copied and one row is cleared. On the others
    :math:`d_i(p, q) = \min(|p - q|, n_i - |p - q|)` is the distance around the torus, and addresses are wrapped. A
    write between slots is shared by its :math:`2^{A-1}` neighbours with weights linear in the distance.

    The sum over the ages is kept: :math:`S \leftarrow \rho_1 (S - \rho_1^{T-1} m_{oldest})` at each step, so that a
    read, a write and a step cost one row of slots, whatever T is; a ring (A = 1) is read and written in O(1).

    Args:
        shape: :math:`(T, n_2, \dots, n_A)`, each at least 2.
        features: F, numbers in a slot, at least 1.
        decay: :math:`\rho_i` in (0, 1): one for each axis, or one for all.
        opening: :math:`g_i` in [0, 1] of the addressed axes, 1 when None: an axis at 0 tells no addresses apart. The
            axes that :meth:`unfold` adds start there.
        limit: most bytes that a state may take.

    Raises:
        ConfigError: for a value out of range.
    """

    shape: tuple[int, ...]
    features: int
    decay: tuple[float, ...]
    opening: tuple[float, ...]
    limit: int

    def __init__(
        self,
        shape: Sequence[int],
        features: int,
        decay: float | Sequence[float] = 0.9,
        opening: Sequence[float] | None = None,
        limit: int = 2**30,
    ) -> None:
        shape = tuple(shape)
        decay = (float(decay),) * len(shape) if isinstance(decay, int | float) else tuple(decay)
        opening = (1.0,) * (len(shape) - 1) if opening is None else tuple(opening)
        if not shape or any(n < 2 for n in shape):
            raise ConfigError(
                f"TorusMemory: expected a shape of sizes >= 2, got {shape}; an axis of one slot holds nothing apart, "
                "leave it out"
            )
        if features < 1 or limit < 1:
            raise ConfigError(
                f"TorusMemory: expected features and limit >= 1, got {features} and {limit}; e.g. 64 and 2**30"
            )
        if len(decay) != len(shape) or not all(0 < d < 1 for d in decay):
            raise ConfigError(
                f"TorusMemory: expected a decay in (0, 1) for each of {len(shape)} axes, got {decay}; 0.9 fades to a "
                "third in ten slots"
            )
        if len(opening) != len(shape) - 1 or not all(0 <= g <= 1 for g in opening):
            raise ConfigError(
                f"TorusMemory: expected an opening in [0, 1] for each of {len(shape) - 1} addressed axes, got "
                f"{opening}; 1 is fully open"
            )
        for name, value in zip(
            ("shape", "features", "decay", "opening", "limit"), (shape, features, decay, opening, limit), strict=True
        ):
            object.__setattr__(self, name, value)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Slots along the addressed axes, :math:`(n_2, \\dots, n_A)`."""
        return self.shape[1:]

    def bytes(self, batch: int, dtype: torch.dtype = torch.float32) -> int:
        """What a state of ``batch`` examples takes: its slots and their fading sum."""
        return (self.shape[0] + 1) * math.prod(self.sizes) * self.features * batch * dtype.itemsize

    def empty(
        self, batch: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> MemoryState:
        """A state of ``batch`` examples that holds zeros.

        Raises:
            ConfigError: for one that would take more bytes than the limit.
        """
        self._check_bytes("TorusMemory.empty", batch, dtype, "take a smaller shape or batch")
        row = torch.zeros(batch, *self.sizes, self.features, dtype=dtype, device=device)
        return MemoryState((row,) * self.shape[0], 0, row)

    def advance(self, state: MemoryState) -> MemoryState:
        """One step in time: the head moves on, every slot ages, and the oldest row makes room for an empty one."""
        head = (state.head + 1) % self.shape[0]
        oldest, rho = state.rows[head], self.decay[0]
        fading = rho * torch.sub(state.fading, oldest, alpha=rho ** (self.shape[0] - 1))
        rows = (*state.rows[:head], torch.zeros_like(oldest), *state.rows[head + 1 :])
        return MemoryState(rows, head, fading)

    def write(self, state: MemoryState, value: Tensor, address: Address = None) -> MemoryState:
        """Add a value to the head's row at an address.

        Args:
            state: of B examples.
            value: ``(B, F)``.
            address: ``(A - 1,)`` or ``(B, A - 1)``, wrapped around the torus.

        Raises:
            ConfigError: for a value or address of another shape, or an address that is not finite.
        """
        batch = state.fading.shape[0]
        if value.shape != (batch, self.features):
            raise ConfigError(
                f"TorusMemory.write: expected a value of shape {(batch, self.features)}, got {tuple(value.shape)}; "
                "write one vector an example"
            )
        at = self._wrapped("TorusMemory.write", state, address, queries=False)[:, 0]
        index, weight = self._neighbours(at)
        index = index[..., None].expand(batch, -1, self.features)
        shares = weight[..., None] * value[:, None]

        def placed(into: Tensor) -> Tensor:
            return into.reshape(batch, -1, self.features).scatter_add(1, index, shares).reshape(into.shape)

        rows = list(state.rows)
        rows[state.head] = placed(rows[state.head])
        return MemoryState(tuple(rows), state.head, placed(state.fading))

    def read(self, state: MemoryState, address: Address = None, geometry: TorusGeometry | None = None) -> Tensor:
        r"""What the torus recalls at an address.

        Args:
            state: of B examples.
            address: ``(A - 1,)`` or ``(B, A - 1)``, or ``(B, Q, A - 1)`` for Q reads at once.
            geometry: metric of the addressed axes; the kernel then is :math:`e^{-d}` of its geodesic distance for the
                product over the axes, see :meth:`geometry`.

        Returns:
            ``(B, F)``, or ``(B, Q, F)``.

        Raises:
            ConfigError: for an address or geometry of another shape, or an address that is not finite.
        """
        at = self._wrapped("TorusMemory.read", state, address, queries=True)
        held = state.fading.flatten(1, -2) if self.sizes else state.fading[:, None]
        weights = self.kernel(at) if geometry is None else self._geodesic(at, geometry)
        out = weights.to(held.dtype) @ held
        several = isinstance(address, Tensor) and address.dim() == 3
        return out if several else out[:, 0]

    def kernel(self, address: Tensor) -> Tensor:
        r""":math:`\prod_i\rho_i^{\,g_i d_i}` from addresses ``(B, Q, A - 1)`` to every slot, ``(B, Q, slots)``."""
        weights = address.new_ones(*address.shape[:2], 1)
        for i, n in enumerate(self.sizes):
            apart = (address[..., i, None] - torch.arange(n, dtype=address.dtype, device=address.device)).remainder(n)
            distance = torch.minimum(apart, n - apart)
            axis = (self.opening[i] * math.log(self.decay[i + 1]) * distance).exp()
            weights = (weights[..., :, None] * axis[..., None, :]).flatten(-2)
        return weights

    def geometry(self, phi: Tensor | None = None) -> TorusGeometry:
        r"""A conformal geometry of the addressed axes in which the flat kernel of one axis is :math:`e^{-d}`.

        Axis i is :math:`n_i g_i|\log\rho_i|` long. With several axes the flat geodesic kernel is round where the
        product kernel is not: it decays with the Euclidean distance, and not with the sum over the axes.

        Args:
            phi: logarithm of the metric's scale at each slot, ``(n_2, ..., n_A)``; flat when None.

        Raises:
            ConfigError: for a ring, or an axis that is not open.
        """
        from toreq.memory.geometry import TorusGeometry

        if not self.sizes or not all(g > 0 for g in self.opening):
            raise ConfigError(
                f"TorusMemory.geometry: expected addressed axes that are open, got sizes {self.sizes} with openings "
                f"{self.opening}; open them, or read without a geometry"
            )
        each = zip(self.sizes, self.opening, self.decay[1:], strict=True)
        return TorusGeometry(self.sizes, phi, tuple(-n * g * math.log(rho) for n, g, rho in each))

    def opened(self, axis: int, opening: float) -> TorusMemory:
        """The same torus with another opening of one addressed axis (1: the second axis of the torus)."""
        if not 1 <= axis < len(self.shape):
            raise ConfigError(
                f"TorusMemory.opened: expected an addressed axis from 1 to {len(self.shape) - 1}, got {axis}; time is "
                "always open"
            )
        return replace(self, opening=(*self.opening[: axis - 1], opening, *self.opening[axis:]))

    def unfold(
        self, state: MemoryState, size: int, decay: float = 0.9, place: int = 0
    ) -> tuple[TorusMemory, MemoryState]:
        """Add a dimension without changing any read: the new axis is closed (opening 0), so that its coordinate plays
        no part, in this read or after further writes, until it is :meth:`opened`.

        Args:
            state: what is held.
            size: slots along the new, last axis.
            decay: along it.
            place: coordinate on it of all that is held already.

        Returns:
            The torus with A + 1 axes, and its state.

        Raises:
            ConfigError: for a size or decay out of range, or a state beyond the limit, with the numbers.
        """
        new = replace(self, shape=(*self.shape, size), decay=(*self.decay, decay), opening=(*self.opening, 0.0))
        batch, dtype = state.fading.shape[0], state.fading.dtype
        new._check_bytes("TorusMemory.unfold", batch, dtype, f"unfold by fewer than {size} slots, or raise the limit")

        def unfolded(row: Tensor) -> Tensor:
            out = row.new_zeros(*row.shape[:-1], size, self.features)
            return out.index_copy(-2, torch.tensor([place % size], device=row.device), row[..., None, :])

        return new, state.map(unfolded)

    def _check_bytes(self, where: str, batch: int, dtype: torch.dtype, remedy: str) -> None:
        wanted = self.bytes(batch, dtype)
        if wanted > self.limit:
            raise ConfigError(
                f"{where}: expected a state of at most {self.limit} bytes, got {wanted} for {batch} examples of "
                f"{' x '.join(map(str, self.shape))} slots with {self.features} numbers of {dtype.itemsize} bytes "
                f"and their fading sum; {remedy}"
            )

    def _wrapped(self, where: str, state: MemoryState, address: Address, queries: bool) -> Tensor:
        """The address as ``(B, Q, A - 1)`` on the torus."""
        like, axes = state.fading, len(self.sizes)
        given = () if address is None else address
        at = torch.as_tensor(given, dtype=like.dtype, device=like.device)
        legal = [(axes,), (like.shape[0], axes)]
        if at.shape not in legal and not (queries and at.dim() == 3 and at.shape[::2] == (like.shape[0], axes)):
            raise ConfigError(
                f"{where}: expected an address of shape {legal[0]} or {legal[1]}, got {tuple(at.shape)}; give one "
                "coordinate for each axis but time"
            )
        if not bool(torch.isfinite(at).all()):
            raise ConfigError(f"{where}: expected a finite address, got nan or inf; check what it is computed from")
        at = at if at.dim() == 3 else at.expand(like.shape[0], axes)[:, None]
        return at.remainder(at.new_tensor(self.sizes)) if axes else at

    def _neighbours(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """The slots around addresses ``(B, A - 1)``: flat indices and weights, each ``(B, 2^(A-1))``."""
        low = at.floor()
        share = at - low
        index, weight = [], []
        for corner in itertools.product((0, 1), repeat=len(self.sizes)):
            flat = at.new_zeros(at.shape[0], dtype=torch.int64)
            part = at.new_ones(at.shape[0])
            for i, up in enumerate(corner):
                # rounding may wrap an address to the size itself: its slot is 0
                flat = flat * self.sizes[i] + (low[:, i].long() + up) % self.sizes[i]
                part = part * (share[:, i] if up else 1 - share[:, i])
            index.append(flat)
            weight.append(part)
        return torch.stack(index, 1), torch.stack(weight, 1)

    def _geodesic(self, at: Tensor, geometry: TorusGeometry) -> Tensor:
        if geometry.shape != self.sizes:
            raise ConfigError(
                f"TorusMemory.read: expected a geometry of the addressed axes {self.sizes}, got {geometry.shape}; "
                "take memory.geometry(phi)"
            )
        return geometry.kernel(at.flatten(0, 1)).reshape(*at.shape[:2], -1)
