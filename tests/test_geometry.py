"""The torus's geometry against curvature by automatic differentiation, closed forms, and ways found by optimisation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import scipy.integrate
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import hessian, jacrev, vmap

from oracles import EXACT, TIGHT, assert_finite_differences, gradients, quadratic
from toreq import Equilibrium
from toreq.core import Dense, Drive, Energy, Lateral, Node, Tanh
from toreq.errors import ConfigError
from toreq.estimators import Centered
from toreq.memory import MemoryState, TorusGeometry, TorusMemory

LENGTHS = (5.0, 3.0, 4.0)


def wave(x: Tensor) -> Tensor:
    """A smooth function on the torus of these lengths, of the last axis of ``x``; three waves around at most."""
    t = [2 * math.pi * x[..., i] / LENGTHS[i] for i in range(x.shape[-1])]
    out = 0.3 * torch.cos(t[0]) + 0.1 * torch.sin(3 * t[0] + 0.4)
    for i in range(1, len(t)):
        out = out + 0.2 * torch.sin(t[i] - 0.3) * torch.cos(2 * t[0]) + 0.15 * torch.cos(2 * t[i] + i)
    return out


def other(x: Tensor) -> Tensor:
    """Another one."""
    return torch.sin(2 * math.pi * x / torch.tensor(LENGTHS[: x.shape[-1]], dtype=x.dtype) + 0.2).sum(-1).exp()


def slots(shape: tuple[int, ...]) -> Tensor:
    """Coordinates of all slots in units of slots, ``(S, A)``."""
    return torch.cartesian_prod(*[torch.arange(n, dtype=torch.float64) for n in shape]).reshape(-1, len(shape))


def places(shape: tuple[int, ...]) -> Tensor:
    """The same in units of length."""
    return slots(shape) * torch.tensor([LENGTHS[i] / n for i, n in enumerate(shape)], dtype=torch.float64)


def waved(shape: tuple[int, ...], scale: float = 1.0) -> TorusGeometry:
    return TorusGeometry(shape, scale * wave(places(shape)).reshape(shape), LENGTHS[: len(shape)])


def metric(x: Tensor) -> Tensor:
    return (2 * wave(x)).exp() * torch.eye(x.shape[-1], dtype=x.dtype)


def christoffel(x: Tensor) -> Tensor:
    r""":math:`\Gamma^a_{bc} = \tfrac12 g^{ad}(\partial_b g_{dc} + \partial_c g_{db} - \partial_d g_{bc})`."""
    d = jacrev(metric)(x)  # d[a, b, c] = the derivative of g_ab along c
    lowered = d.permute(0, 2, 1) + d - d.permute(2, 0, 1)
    return 0.5 * torch.einsum("ad,dbc->abc", torch.linalg.inv(metric(x)), lowered)


def curvature(x: Tensor) -> Tensor:
    """The scalar curvature from the Riemann tensor, all by automatic differentiation of the metric."""
    gamma, d = christoffel(x), jacrev(christoffel)(x)
    riemann = d.permute(0, 2, 3, 1) - d.permute(0, 2, 1, 3)  # R^a_{bcd}, from d[a, b, d, c]
    riemann = riemann + torch.einsum("ace,edb->abcd", gamma, gamma) - torch.einsum("ade,ecb->abcd", gamma, gamma)
    return torch.einsum("bd,abad->", torch.linalg.inv(metric(x)), riemann)


@pytest.mark.parametrize("shape", [(16, 15), (16, 9, 8)])
def test_curvature_is_that_of_the_riemann_tensor(shape: tuple[int, ...]) -> None:
    found = waved(shape).ricci_scalar().flatten()
    some = torch.arange(0, found.numel(), 7)
    wanted = vmap(curvature)(places(shape)[some])
    assert float(wanted.abs().max()) > 1
    torch.testing.assert_close(found[some], wanted, rtol=1e-9, atol=1e-9)


def test_there_is_no_curvature_on_a_ring_or_in_a_flat_torus() -> None:
    assert bool((waved((12,)).ricci_scalar() == 0).all())
    assert bool((TorusGeometry((4, 5, 6)).ricci_scalar() == 0).all())
    constant = TorusGeometry((4, 5), torch.full((4, 5), 0.7, dtype=torch.float64))
    assert float(constant.ricci_scalar().abs().max()) < 1e-12


@settings(max_examples=25, deadline=None)
@given(shape=st.tuples(st.integers(2, 9), st.integers(2, 9)), seed=st.integers(0, 1000))
def test_gauss_bonnet(shape: tuple[int, int], seed: int) -> None:
    """The curvature of a 2-torus integrates to nothing, however rough the metric; that of a 3-torus does not."""
    phi = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    geometry = TorusGeometry(shape, phi, (2.0, 3.0))
    weighted = geometry.ricci_scalar() * (2 * phi).exp()
    assert float(weighted.sum().abs()) < 1e-9 * (1 + float(weighted.abs().sum()))
    solid = waved((16, 9, 8))
    assert solid.phi is not None
    assert float((solid.ricci_scalar() * (3 * solid.phi).exp()).mean().abs()) > 0.1


@pytest.mark.parametrize("shape", [(15,), (16, 15), (16, 10, 9)])
def test_derivatives_are_exact_for_what_the_slots_resolve(shape: tuple[int, ...]) -> None:
    geometry, x = waved(shape), places(shape)
    f = wave(x + 0.3)
    found = geometry.gradient(f.reshape(shape)).flatten(1).T
    torch.testing.assert_close(found, vmap(jacrev(wave))(x + 0.3), rtol=1e-9, atol=1e-10)
    # div(sqrt(g) g^-1 grad f) / sqrt(g), by automatic differentiation
    a = len(shape)

    def flux(at: Tensor) -> Tensor:
        return ((a - 2) * wave(at)).exp() * jacrev(wave)(at + 0.3)

    wanted = vmap(jacrev(flux))(x).diagonal(dim1=1, dim2=2).sum(1) * (-a * wave(x)).exp()
    torch.testing.assert_close(geometry.laplacian(f.reshape(shape)).flatten(), wanted, rtol=1e-9, atol=1e-9)
    flat = TorusGeometry(shape, None, LENGTHS[:a]).laplacian(f.reshape(shape)).flatten()
    trace = vmap(hessian(wave))(x + 0.3).diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(flat, trace, rtol=1e-9, atol=1e-9)


def test_phi_between_the_slots() -> None:
    """The interpolant is the function itself where the slots resolve it; at the slots it always is phi."""
    points = 20 * torch.rand(9, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    geometry = waved((9, 8))
    unit = torch.tensor([LENGTHS[0] / 9, LENGTHS[1] / 8], dtype=torch.float64)
    torch.testing.assert_close(geometry.interpolated(points), wave(points * unit), rtol=1e-10, atol=1e-11)
    for shape in ((2,), (6, 3), (4, 2, 5)):
        phi = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        found = TorusGeometry(shape, phi).interpolated(slots(shape) - 3 * slots(shape).amax(0) - 3)
        back = TorusGeometry(shape, phi).interpolated(slots(shape))
        torch.testing.assert_close(back, phi.flatten())
        assert bool(torch.isfinite(found).all())


def test_volume() -> None:
    geometry = waved((24, 20))
    wanted = scipy.integrate.dblquad(
        lambda y, x: math.exp(2 * float(wave(torch.tensor([x, y], dtype=torch.float64)))),
        *(0, LENGTHS[0], 0, LENGTHS[1]),
        epsabs=1e-4,
        epsrel=1e-4,
    )[0]
    assert float(geometry.volume()) == pytest.approx(wanted, rel=1e-3)
    assert float(geometry.normalised().volume()) == pytest.approx(15)
    assert float(TorusGeometry((4, 5)).volume()) == 20
    huge = TorusGeometry((4, 5), torch.linspace(900, 1000, 20).reshape(4, 5))
    assert float(huge.normalised().volume()) == pytest.approx(20, rel=1e-4)


@settings(max_examples=20, deadline=None)
@given(shape=st.lists(st.integers(2, 5), min_size=1, max_size=3), constant=st.floats(-1, 1), seed=st.integers(0, 99))
def test_distances_in_a_flat_torus(shape: list[int], constant: float, seed: int) -> None:
    """Around the torus in a straight line; with a constant phi as much longer as it says."""
    g = torch.Generator().manual_seed(seed)
    points = 6 * torch.rand(3, len(shape), generator=g, dtype=torch.float64) - 2
    lengths = [1.5 * n for n in shape]
    wanted = torch.zeros(3, math.prod(shape), dtype=torch.float64)
    for p in range(3):
        for s, slot in enumerate(slots(tuple(shape))):
            apart = [min(abs(float(slot[i] - points[p, i]) + k * n) for k in range(-3, 4)) for i, n in enumerate(shape)]
            wanted[p, s] = 1.5 * math.hypot(*apart)
    found = TorusGeometry(shape, None, lengths).distances(points)
    torch.testing.assert_close(found.flatten(1), wanted)
    phi = torch.full(tuple(shape), constant, dtype=torch.float64)
    scaled = TorusGeometry(shape, phi, lengths).distances(points)
    torch.testing.assert_close(scaled, math.exp(constant) * found)


def test_distances_on_a_ring() -> None:
    """The shorter of the two ways around, by quadrature."""
    geometry = waved((14,), 2.0)
    points = torch.tensor([[0.4], [7.9]], dtype=torch.float64)
    found = geometry.distances(points)
    unit = LENGTHS[0] / 14

    def length(a: float, b: float) -> float:
        return scipy.integrate.quad(lambda x: math.exp(2 * float(wave(torch.tensor([x])))), a, b)[0]

    around = length(0, LENGTHS[0])
    for p in range(2):
        for s in range(0, 14, 3):
            one = abs(length(float(points[p, 0]) * unit, s * unit))
            assert float(found[p, s]) == pytest.approx(min(one, around - one), rel=1e-6)


def shortest(phi: Callable[[Tensor], Tensor], start: Tensor, end: Tensor, pieces: int = 16) -> float:
    """The length of a way of many pieces from start to end, bent until it is shortest."""
    share = torch.linspace(0, 1, pieces + 1, dtype=torch.float64)[1:-1, None]
    straight = start + share * (end - start)

    def length(flat: Any) -> tuple[float, Any]:
        inner = torch.as_tensor(flat, dtype=torch.float64).reshape(-1, 2).requires_grad_()
        way = torch.cat([start[None], inner, end[None]])
        total = ((phi((way[1:] + way[:-1]) / 2)).exp() * (way[1:] - way[:-1]).norm(dim=1)).sum()
        total.backward()
        assert inner.grad is not None
        return float(total.detach()), inner.grad.flatten().numpy()

    return float(scipy.optimize.minimize(length, straight.flatten().numpy(), jac=True, method="L-BFGS-B").fun)


def test_distances_in_a_curved_torus() -> None:
    """A few percent above the length of the best way, where the straight one is clearly longer."""
    shape = (12, 10)
    lengths = torch.tensor(LENGTHS[:2], dtype=torch.float64)

    def hill(at: Tensor) -> Tensor:
        t = 2 * math.pi * (at - torch.tensor([1.3, 0.8], dtype=torch.float64)) / lengths
        return 0.8 * torch.cos(t[..., 0]) * torch.cos(t[..., 1])

    geometry = TorusGeometry(shape, hill(places(shape)).reshape(shape), LENGTHS[:2])
    points = torch.tensor([[0.3, 0.6]], dtype=torch.float64)
    found, straight = geometry.distances(points).flatten(), geometry._lengths(points).flatten()
    unit = lengths / torch.tensor(shape)
    over, saved = [], []
    for s in (26, 49, 72, 95):
        images = [slots(shape)[s] * unit + lengths * torch.tensor(k) for k in itertools.product((-1, 0, 1), repeat=2)]
        # those that even the smallest scale does not bring nearer need not be tried
        near = [image for image in images if float((image - points[0] * unit).norm()) * math.exp(-0.8) < found[s]]
        best = min(shortest(hill, points[0] * unit, image) for image in near)
        over.append(float(found[s]) / best - 1)
        saved.append(float(straight[s]) / best - 1)
    assert min(over) > -2e-3, "no way is shorter than the shortest"
    assert max(over) < 0.03
    assert max(saved) > 0.1


def test_distances_between_slots_are_those_of_a_metric() -> None:
    geometry = waved((6, 5), 2.0)
    d = geometry.distances(slots((6, 5))).flatten(1)
    torch.testing.assert_close(d, d.T)
    assert float(d.diagonal().abs().max()) < 1e-12
    assert bool((d[:, None, :] <= d[:, :, None] + d[None] + 1e-9).all())
    prepared = geometry.prepared()
    assert prepared.table is not None
    points = torch.rand(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 9
    assert torch.equal(prepared.distances(points), geometry.distances(points))


def test_the_kernel_is_differentiable() -> None:
    phi = 0.5 * torch.randn(4, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    points = torch.tensor([[0.3, 1.2], [2.7, 0.1]], dtype=torch.float64)

    def kernel(phi: Tensor, points: Tensor) -> Tensor:
        return TorusGeometry((4, 3), phi, (2.0, 3.0)).kernel(points)

    assert torch.autograd.gradcheck(kernel, (phi.requires_grad_(), points.requires_grad_()))


def held(memory: TorusMemory, batch: int = 3) -> MemoryState:
    g = torch.Generator().manual_seed(0)
    state = memory.empty(batch, torch.float64)
    for _ in range(3):
        at = 5 * torch.rand(batch, len(memory.sizes), generator=g, dtype=torch.float64)
        value = torch.randn(batch, memory.features, generator=g, dtype=torch.float64)
        state = memory.write(memory.advance(state), value, at)
    return state


def test_a_flat_geometry_of_one_axis_reads_as_the_memory_does() -> None:
    memory = TorusMemory((3, 6), 2, (0.7, 0.4))
    state = held(memory)
    at = 8 * torch.rand(3, 4, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plain = memory.read(state, at)
    torch.testing.assert_close(memory.read(state, at, memory.geometry()), plain)
    zero = memory.geometry(torch.zeros(6, dtype=torch.float64)).prepared()
    torch.testing.assert_close(memory.read(state, at, zero), plain)
    sharper = memory.geometry(torch.full((6,), math.log(2.0), dtype=torch.float64))
    twice = TorusMemory((3, 6), 2, (0.7, 0.16))
    torch.testing.assert_close(memory.read(state, at, sharper), twice.read(state, at))
    round_ = TorusMemory((2, 4, 4), 1, 0.5)
    spot = round_.write(round_.empty(1, torch.float64), torch.ones(1, 1, dtype=torch.float64), [1, 1])
    assert float(round_.read(spot, [2, 2], round_.geometry())) == pytest.approx(0.5 ** math.sqrt(2))
    assert float(round_.read(spot, [2, 2])) == pytest.approx(0.5**2)


class Recall(nn.Module):
    """A drive that reads a torus at an address given by the input, in a metric that is learned."""

    def __init__(self, memory: TorusMemory, state: MemoryState) -> None:
        super().__init__()
        self.memory, self.state = memory, state
        g = torch.Generator().manual_seed(2)
        self.phi = nn.Parameter(0.3 * torch.randn(memory.sizes, generator=g, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.memory.read(self.state, x, self.memory.geometry(self.phi))


def test_the_metric_is_learned_by_contrast() -> None:
    """The gradient that an equilibrium gives the metric of the memory that drives it is that of finite differences."""
    memory = TorusMemory((3, 3, 4), 5, 0.6)
    op = Dense(5, 5, symmetric=True, generator=torch.Generator().manual_seed(0)).double()
    energy = Energy([Node("h", 5, Tanh())], [Drive("h", Recall(memory, held(memory))), Lateral(op, "h")])
    x = 4 * torch.rand(3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    layer = Equilibrium(energy, TIGHT, EXACT)
    found = gradients(layer, x, quadratic())
    assert_finite_differences(layer, x, quadratic(), found)
    layer.estimator = Centered(beta=1e-4, tolerance=1e-10)
    again = gradients(layer, x, quadratic())
    name = "dynamics.couplings.0.module.phi"
    torch.testing.assert_close(again[name], found[name], rtol=1e-4, atol=1e-8)


def test_geometry_from_statistics() -> None:
    v = torch.ones(6, 5, dtype=torch.float64)
    v[2, 3] = 100
    geometry = TorusGeometry.from_statistics(v, smoothing=0.0)
    assert geometry.phi is not None
    assert float(geometry.volume()) == pytest.approx(30)
    wide = geometry.phi[2, 3] - geometry.phi[0, 0]
    floor = 0.01 * float(v.mean())
    assert float(wide) == pytest.approx(0.5 * math.log((100 + floor) / (1 + floor)))
    smooth = TorusGeometry.from_statistics(v, smoothing=1.0)
    assert smooth.phi is not None
    assert int(smooth.phi.argmax()) == 2 * 5 + 3
    assert 0 < float(smooth.phi[2, 3] - smooth.phi[0, 0]) < 0.5 * float(wide)
    empty = TorusGeometry.from_statistics(torch.zeros(6, 5))
    assert float(empty.ricci_scalar().abs().max()) < 1e-5
    assert float(empty.volume()) == pytest.approx(30, rel=1e-5)
    with pytest.raises(ConfigError, match="finite statistics >= 0"):
        TorusGeometry.from_statistics(v - 2)
    with pytest.raises(ConfigError, match="smoothing >= 0"):
        TorusGeometry.from_statistics(v, smoothing=-1)


def test_bad_geometry_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"sizes >= 2, got .*leave it out"):
        TorusGeometry((4, 1))
    with pytest.raises(ConfigError, match="length > 0 for each of 2 axes"):
        TorusGeometry((4, 3), None, (1.0, 0.0))
    with pytest.raises(ConfigError, match=r"floating phi of shape \(4, 3\)"):
        TorusGeometry((4, 3), torch.zeros(3, 4))
    with pytest.raises(ConfigError, match=r"at most 1024 slots .*got 1056"):
        TorusGeometry((33, 32), torch.zeros(33, 32)).prepared()
    TorusGeometry((33, 32)).distances(torch.zeros(1, 2))
    with pytest.raises(ConfigError, match="finite phi"):
        TorusGeometry((4, 3), torch.full((4, 3), torch.nan)).prepared()
    memory = TorusMemory((3, 4, 3), 2, 0.9)
    with pytest.raises(ConfigError, match=r"geometry of the addressed axes \(4, 3\), got \(3, 4\)"):
        memory.read(memory.empty(1), [0, 0], TorusGeometry((3, 4)))
    closed = memory.unfold(memory.empty(1), 3)[0]
    for bad in (closed, TorusMemory((5,), 2, 0.9)):
        with pytest.raises(ConfigError, match="axes that are open"):
            bad.geometry()
