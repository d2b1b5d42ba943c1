"""Geometry of a torus of slots: a conformal metric, its curvature, and distances along its geodesics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.csgraph import shortest_path
from torch import Tensor

from toreq.errors import ConfigError

MOST_SLOTS = 1024
"""Slots up to which distances between all of them are computed: S^2 of them by S^3 operations."""
_CHUNK = 2**22
"""Numbers in the largest tensor of one part of a computation of distances."""


@dataclass(frozen=True, eq=False)
class TorusGeometry:
    r"""The metric :math:`g = e^{2\phi} I` of an A-dimensional torus of slots; flat without :math:`\phi`.

    :math:`\phi` is given at the slots and interpolated between them by its periodic Fourier series, so that derivatives
    are exact for what the slots can represent, and everything here is differentiable in :math:`\phi`.

    Args:
        shape: slots along each axis, each at least 2.
        phi: logarithm of the scale at each slot, of this shape, floating; flat when None.
        lengths: circumference of each axis at :math:`\phi = 0`; one unit a slot when None.
        table: distances between the slots of this very :math:`\phi`, see :meth:`prepared`.

    Raises:
        ConfigError: for sizes, lengths or a :math:`\phi` that do not fit.
    """

    shape: tuple[int, ...]
    phi: Tensor | None
    lengths: tuple[float, ...]
    table: Tensor | None

    def __init__(
        self,
        shape: Sequence[int],
        phi: Tensor | None = None,
        lengths: Sequence[float] | None = None,
        table: Tensor | None = None,
    ) -> None:
        shape = tuple(shape)
        lengths = tuple(float(n) for n in shape) if lengths is None else tuple(lengths)
        if not shape or any(n < 2 for n in shape):
            raise ConfigError(
                f"TorusGeometry: expected a shape of sizes >= 2, got {shape}; an axis of one slot has no extent, "
                "leave it out"
            )
        if len(lengths) != len(shape) or not all(0 < length < math.inf for length in lengths):
            raise ConfigError(
                f"TorusGeometry: expected a length > 0 for each of {len(shape)} axes, got {lengths}; the number of "
                "slots makes them one apart"
            )
        if phi is not None and (phi.shape != shape or not phi.is_floating_point()):
            raise ConfigError(
                f"TorusGeometry: expected a floating phi of shape {shape}, got {tuple(phi.shape)} of {phi.dtype}; give "
                "one number a slot"
            )
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "phi", phi)
        object.__setattr__(self, "lengths", lengths)
        object.__setattr__(self, "table", table)

    @staticmethod
    def from_statistics(
        statistics: Tensor,
        strength: float = 1.0,
        smoothing: float = 1.0,
        lengths: Sequence[float] | None = None,
    ) -> TorusGeometry:
        r"""A geometry in which slots that hold more lie further apart, of the flat torus's volume.

        :math:`\phi = \tfrac{s}{2}\log(v / \bar v)`, smoothed, plus the constant that keeps the volume. An empty slot
        counts as a hundredth of the mean.

        Args:
            statistics: v >= 0 at each slot, e.g. its mean square or variance; its shape is the geometry's.
            strength: s; 1 makes lengths proportional to root mean squares.
            smoothing: standard deviation, in slots, of the Gaussian by which the logarithm is smoothed, >= 0.
            lengths: as for the geometry.

        Raises:
            ConfigError: for statistics that are negative or not finite, or a negative smoothing.
        """
        v = statistics.detach()
        if not bool((torch.isfinite(v) & (v >= 0)).all()):
            raise ConfigError(
                "TorusGeometry.from_statistics: expected finite statistics >= 0, got others; take mean squares"
            )
        if smoothing < 0:
            raise ConfigError(
                f"TorusGeometry.from_statistics: expected smoothing >= 0, got {smoothing}; 1 averages over neighbours"
            )
        # an empty torus is flat
        v = (v + 0.01 * v.mean()).clamp_min(torch.finfo(v.dtype).tiny)
        flat = TorusGeometry(v.shape, torch.zeros_like(v), lengths)
        damping = torch.ones_like(v)
        for axis, n in enumerate(v.shape):
            k = 2 * math.pi * torch.fft.fftfreq(n, dtype=v.dtype, device=v.device)
            damping = damping * flat._along((-0.5 * (k * smoothing).square()).exp(), axis)
        phi = 0.5 * strength * v.log()
        phi = torch.fft.ifftn(torch.fft.fftn(phi) * damping).real
        return TorusGeometry(v.shape, phi, lengths).normalised()

    @property
    def dims(self) -> int:
        """A, the number of axes."""
        return len(self.shape)

    def normalised(self) -> TorusGeometry:
        r"""The same up to a constant in :math:`\phi`, of the flat torus's volume."""
        if self.phi is None:
            return self
        # of the largest part first: exp must not overflow
        top = self.phi.detach().amax()
        mean = (self.dims * (self.phi - top)).exp().mean()
        return TorusGeometry(self.shape, self.phi - top - mean.log() / self.dims, self.lengths)

    def volume(self) -> Tensor:
        r""":math:`\int e^{A\phi}\,dx`, a scalar; the mean over the slots is exact where they resolve the integrand."""
        return math.prod(self.lengths) * (self.dims * self._phi()).exp().mean()

    def gradient(self, f: Tensor) -> Tensor:
        """Partial derivatives of f along each axis, in units of its length: ``(A, *shape)``."""
        spectrum = torch.fft.fftn(f)
        parts = []
        for axis, n in enumerate(self.shape):
            k = self._wavenumbers(axis, f)
            if n % 2 == 0:
                k[n // 2] = 0  # the cosine that alternates from slot to slot is flat at each
            parts.append(torch.fft.ifftn(1j * self._along(k, axis) * spectrum).real)
        return torch.stack(parts)

    def laplacian(self, f: Tensor) -> Tensor:
        r"""Laplace and Beltrami's :math:`\Delta_g f = e^{-2\phi}[\Delta f + (A - 2)\,\nabla\phi\cdot\nabla f]`.

        Args:
            f: a function at each slot, of the geometry's shape.
        """
        flat = self._flat_laplacian(f)
        if self.phi is None:
            return flat
        if self.dims != 2:
            flat = flat + (self.dims - 2) * (self.gradient(self.phi) * self.gradient(f)).sum(0)
        return (-2 * self.phi).exp() * flat

    def ricci_scalar(self) -> Tensor:
        r"""The scalar curvature at each slot,
        :math:`R = -e^{-2\phi}[2(A-1)\,\Delta\phi + (A-2)(A-1)\,|\nabla\phi|^2]`: zero where A = 1, or flat."""
        phi, a = self._phi(), self.dims
        if self.phi is None or a == 1:
            return torch.zeros_like(phi)
        bracket = 2 * (a - 1) * self._flat_laplacian(phi)
        if a > 2:
            bracket = bracket + (a - 2) * (a - 1) * self.gradient(phi).square().sum(0)
        return -(-2 * phi).exp() * bracket

    def interpolated(self, points: Tensor) -> Tensor:
        r""":math:`\phi` between the slots.

        Args:
            points: coordinates in units of slots, ``(P, A)``.

        Returns:
            ``(P,)``.
        """
        spectrum = torch.fft.fftn(self._phi().to(points.dtype), norm="forward")
        out = (self._phases(points[:, 0], 0) @ spectrum.flatten(1)) if self.dims > 1 else spectrum
        for axis in range(1, self.dims):
            out = out.reshape(points.shape[0], self.shape[axis], -1)
            out = (out * self._phases(points[:, axis], axis)[..., None]).sum(1)
        return out.real[:, 0] if self.dims > 1 else (self._phases(points[:, 0], 0) @ out).real

    def prepared(self) -> TorusGeometry:
        r"""The same with the distances between its slots computed once, for many reads.

        They are those of :math:`\phi` as it is now: prepare anew when it has changed.
        """
        table = None if self.phi is None else self._slot_distances()
        return TorusGeometry(self.shape, self.phi, self.lengths, table)

    def distances(self, points: Tensor) -> Tensor:
        r"""Geodesic distances from points to every slot.

        An approximation from above: the shortest of the ways that go from slot to slot by straight pieces, whose
        lengths :math:`\int e^{\phi}|dx|` are taken by Gauss and Legendre's rule. Exact where the metric is flat or
        :math:`\phi` constant, and with one axis; elsewhere the error is of second order in :math:`\phi`, since
        geodesics are stationary.

        Args:
            points: coordinates in units of slots, wrapped around the torus, ``(P, A)``.

        Returns:
            ``(P, *shape)``.

        Raises:
            ConfigError: for more than 1024 slots, unless the metric is flat.
        """
        if self.phi is None:
            return self._straight(points)[1].reshape(-1, *self.shape)
        table = (self._slot_distances() if self.table is None else self.table).to(points.dtype)
        slots = math.prod(self.shape)
        size = max(1, _CHUNK // max(slots * slots, slots * self._nodes * max(self.shape)))
        parts = []
        for part in points.split(size):
            first = self._lengths(part)
            # either straight there, or straight to some slot and on from it
            parts.append((first[:, :, None] + table).amin(1))
        return torch.cat(parts).reshape(-1, *self.shape)

    def kernel(self, points: Tensor) -> Tensor:
        """:math:`e^{-d}` of the geodesic distances from points ``(P, A)`` to every slot, ``(P, *shape)``."""
        return (-self.distances(points)).exp()

    def _phi(self) -> Tensor:
        return torch.zeros(self.shape) if self.phi is None else self.phi

    def _along(self, t: Tensor, axis: int) -> Tensor:
        return t.reshape(*[1] * axis, -1, *[1] * (self.dims - 1 - axis))

    def _wavenumbers(self, axis: int, like: Tensor) -> Tensor:
        n, length = self.shape[axis], self.lengths[axis]
        return 2 * math.pi / length * torch.fft.fftfreq(n, 1 / n, dtype=like.dtype, device=like.device)

    def _flat_laplacian(self, f: Tensor) -> Tensor:
        squares = torch.zeros_like(f)
        for axis in range(self.dims):
            squares = squares + self._along(self._wavenumbers(axis, f).square(), axis)
        return torch.fft.ifftn(-squares * torch.fft.fftn(f)).real

    def _phases(self, x: Tensor, axis: int) -> Tensor:
        """What each Fourier coefficient along an axis is multiplied by at ``x`` slots from the first, ``(P, n)``."""
        n = self.shape[axis]
        k = torch.fft.fftfreq(n, 1 / n, dtype=x.dtype, device=x.device)
        angle = 2 * math.pi / n * x[:, None] * k
        imaginary = angle.sin()
        if n % 2 == 0:
            # the real one of the functions that alternate from slot to slot
            imaginary = imaginary * (k != -n // 2)
        return torch.complex(angle.cos(), imaginary)

    @property
    def _nodes(self) -> int:
        # a piece goes half around at most, where the finest wave turns n / 4 times
        return max(self.shape) + 4

    def _rule(self, like: Tensor) -> tuple[Tensor, Tensor]:
        x, w = np.polynomial.legendre.leggauss(self._nodes)
        return like.new_tensor((x + 1) / 2), like.new_tensor(w / 2)

    def _straight(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Shortest straight ways to every slot: ``(P, S, A)`` in slots, and their lengths where phi is zero."""
        n = points.new_tensor(self.shape)
        slots = torch.cartesian_prod(*[torch.arange(m, device=points.device) for m in self.shape])
        away = slots.reshape(-1, self.dims).to(points.dtype) - points[:, None]
        away = (away + n / 2).remainder(n) - n / 2
        scale = points.new_tensor([length / m for length, m in zip(self.lengths, self.shape, strict=True)])
        return away, torch.linalg.vector_norm(away * scale, dim=-1)

    def _lengths(self, points: Tensor) -> Tensor:
        """How long the straight ways from points to every slot are, ``(P, S)``."""
        away, flat = self._straight(points)
        x, w = self._rule(points)
        on_the_way = points[:, None, None] + x[:, None] * away[:, :, None]
        phi = self.interpolated(on_the_way.flatten(0, 2)).unflatten(0, on_the_way.shape[:3])
        return flat * (phi.exp() * w).sum(-1)

    def _slot_lengths(self) -> Tensor:
        """How long the straight ways between slots are, ``(S, S)``: of each displacement for all slots at once."""
        phi = self._phi()
        away, flat = self._straight(phi.new_zeros(1, self.dims))
        x, w = self._rule(phi)
        spectrum = torch.fft.fftn(phi)
        rows = []
        step = max(1, _CHUNK // (phi.numel() * self._nodes))
        for part in away[0].split(step):
            at = (part[:, None] * x[:, None]).flatten(0, 1)
            shifted = spectrum.expand(at.shape[0], *self.shape)
            for axis in range(self.dims):
                phases = self._phases(at[:, axis], axis)
                shifted = shifted * phases.reshape(-1, *[1] * axis, self.shape[axis], *[1] * (self.dims - 1 - axis))
            values = torch.fft.ifftn(shifted, dim=tuple(range(1, self.dims + 1))).real.exp()
            rows.append((values.flatten(1).unflatten(0, (-1, self._nodes)) * w[:, None]).sum(1))
        by_displacement = torch.cat(rows) * flat[0][:, None]
        slots = torch.cartesian_prod(*[torch.arange(m, device=phi.device) for m in self.shape]).reshape(-1, self.dims)
        offset = torch.zeros(len(slots), len(slots), dtype=torch.int64, device=phi.device)
        for axis, n in enumerate(self.shape):
            offset = offset * n + (slots[None, :, axis] - slots[:, None, axis]) % n
        one_way = by_displacement.T.gather(1, offset)
        # two slots half around from each other have two straight ways
        return torch.minimum(one_way, one_way.T)

    def _slot_distances(self) -> Tensor:
        """Distances between all slots, ``(S, S)``; the ways are found without a graph, their lengths carry one."""
        slots = math.prod(self.shape)
        if slots > MOST_SLOTS:
            raise ConfigError(
                f"TorusGeometry: expected at most {MOST_SLOTS} slots for distances in a curved metric, got {slots}: "
                f"they take {slots}^3 operations; use a smaller torus, or a flat metric"
            )
        lengths = self._slot_lengths()
        before = torch.from_numpy(_before(lengths.detach().cpu().numpy())).to(lengths.device)
        start = torch.arange(slots, device=lengths.device)[:, None].expand(slots, slots)
        at, total = start.T, torch.zeros_like(lengths)
        while bool((at != start).any()):
            previous = torch.where(at == start, at, before.gather(1, at))
            total = total + lengths[previous, at]
            at = previous
        return total


def _before(lengths: np.ndarray) -> np.ndarray:
    """The slot before each on the shortest way from each, ``(S, S)`` int64."""
    if not np.isfinite(lengths).all():
        raise ConfigError("TorusGeometry: expected a finite phi, got one that overflows; lower it, or normalise it")
    _, before = shortest_path(lengths, method="FW", directed=False, return_predecessors=True)
    return before.astype(np.int64)
