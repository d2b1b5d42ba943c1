"""The state-space operator against matrices built entry by entry, in float64; its norm, masks and chunks."""

from __future__ import annotations

import cmath
import math
import warnings

import pytest
import torch
from torch import Tensor, nn

from oracles import autograd_field
from toreq.core import SSM, Bilinear, Dense, Drive, Energy, LayerNorm, Node, Potential, control_norm
from toreq.core.operators import Tensors
from toreq.core.scan import by_fft, sequential
from toreq.core.ssm import ShortenedChunkWarning
from toreq.core.state import Bound
from toreq.errors import ConfigError
from toreq.estimators import Centered, Holomorphic, Implicit, OneSided
from toreq.layer import Equilibrium
from toreq.solvers import FixedPoint

D, M, B = 3, 4, 2
LENGTHS = (1, 5, 12, 13, 30)
KINDS = pytest.mark.parametrize("selective", [False, True], ids=["invariant", "selective"])


class FirstPositive(nn.Module):
    """Tokens count whose first feature is above a threshold."""

    def forward(self, x: Tensor) -> Tensor:
        return x[..., 0] > -0.5


def _op(selective: bool, states: int = 2, chunk: int = 6, masked: bool = False, **more: object) -> SSM:
    g = torch.Generator().manual_seed(0)
    gates = None
    if selective:
        gates = nn.Linear(D, 3 * M)
        with torch.no_grad():
            gates.weight.copy_(torch.randn(gates.weight.shape, generator=g))
            gates.bias.copy_(torch.randn(gates.bias.shape, generator=g) * 0.3)
    mask = FirstPositive() if masked else None
    op = SSM(D, M, states, gates, mask, chunk, (1.0, 20.0), 1.0, scale=0.5, generator=g, **more)  # type: ignore[arg-type]
    return op.double()


def _draw(n: int, features: int, seed: int, batch: int = B) -> Tensor:
    return torch.randn(batch, n, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _tensors(op: SSM, x: Tensor) -> Tensors:
    return {k: v.detach() for k, v in {**op.tensors(), **op.inputs(x)}.items()}


def _matrices(op: SSM, x: Tensor) -> Tensor:
    """The scan of each example and channel as an (N, N) matrix, from the recurrence's definition, entry by entry."""
    n = x.shape[1]
    c, d = (t.detach() for t in op.coefficients())
    rate, omega = op.log_rate.detach().exp(), op.frequency.detach()
    ones = torch.ones(x.shape[0], n, M, dtype=torch.float64)
    step, g_in, g_out = (t.detach() for t in op.steps(x)) if op.selective else (ones, ones, ones)
    counts = torch.ones(x.shape[:2], dtype=torch.bool) if op.mask is None else op.mask(x)
    out = torch.zeros(x.shape[0], M, n, n, dtype=torch.float64)
    for b in range(x.shape[0]):
        for m in range(M):
            for k in range(op.states):
                lam = complex(-float(rate[m, k]), float(omega[m, k]))
                coefficient = complex(float(c[0, m, k]), float(c[1, m, k]))
                for j in range(n):
                    here = cmath.exp(lam * float(step[b, j, m]))
                    state = math.sqrt(1 - abs(here)) * float(g_in[b, j, m]) * float(counts[b, j])
                    for i in range(j + 1, n):
                        passing = cmath.exp(lam * float(step[b, i, m]))
                        root = math.sqrt(1 - abs(passing))
                        value = (coefficient * state).real * root * float(g_out[b, i, m]) * float(counts[b, i])
                        out[b, m, i, j] += value
                        if counts[b, i] or not op.selective:
                            state = passing * state
            out[b, m] += torch.diag(float(d[m]) * counts[b].double())
    return out


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("n", LENGTHS)
@KINDS
def test_forward_and_adjoint_are_the_matrices(selective: bool, n: int, masked: bool) -> None:
    op, x = _op(selective, masked=masked), _draw(n, D, 1)
    t = _tensors(op, x)
    matrices, weight = _matrices(op, x), op.project.weight.detach()
    u, w = _draw(n, D, 2), _draw(n, M, 3)
    wanted = torch.einsum("bmij,md,bjd->bim", matrices, weight, u)
    torch.testing.assert_close(op(u, t), wanted, rtol=1e-11, atol=1e-12)
    back = torch.einsum("bmij,md,bim->bjd", matrices, weight, w)
    torch.testing.assert_close(op.adjoint(w, t), back, rtol=1e-11, atol=1e-12)
    left, right = (op(u, t) * w).flatten(1).sum(1), (u * op.adjoint(w, t)).flatten(1).sum(1)
    torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("n", [7, 40])
@KINDS
def test_forms_agree(selective: bool, n: int) -> None:
    """The recurrence token by token, chunks of several lengths and, without gates, the spectra."""
    op, x, u = _op(selective), _draw(n, D, 1), _draw(n, D, 2)
    c, d = op.coefficients()
    rate, omega, read = op.log_rate.exp(), op.frequency, torch.complex(c[0], c[1])
    ones = torch.ones(B, n, M, dtype=torch.float64)
    step, g_in, g_out = op.steps(x) if selective else (ones, ones, ones)
    decay = torch.polar((-rate * step[..., None]).exp(), omega * step[..., None])
    root = (1 - decay.abs()).sqrt()
    v = u @ op.project.weight.T
    found = sequential(v, decay, root * g_in[..., None] + 0j, root * g_out[..., None] * read) + d * v
    for chunk in (1, 4, 6, 64):
        op.chunk = chunk
        torch.testing.assert_close(op(u, _tensors(op, x)), found, rtol=1e-10, atol=1e-12)
    if not selective:
        tau = torch.arange(n, dtype=torch.float64)
        power = torch.polar((-rate[..., None] * tau).exp(), omega[..., None] * tau)
        memory = ((read * (1 - (-rate).exp()))[..., None] * power).real.sum(1)
        kernel = torch.cat([d[:, None], memory[:, :-1]], 1)
        for reverse in (False, True):
            spectral = by_fft(v.permute(2, 0, 1), kernel, reverse).permute(1, 2, 0)
            torch.testing.assert_close(op._scan(v, op.tensors(), reverse), spectral, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("n", [1, 5, 13])
@KINDS
def test_gradient_in_every_tensor_and_parameter(selective: bool, n: int) -> None:
    op, x, u, w = _op(selective, masked=True), _draw(n, D, 1), _draw(n, D, 2), _draw(n, M, 3)
    bound = {**op.tensors(), **op.inputs(x)}
    with torch.no_grad():
        grads = op.gradient(w, u, {k: v.detach() for k, v in bound.items()})
    assert set(grads) == {k for k in bound if k != "mask"}
    names = [k for k in grads if bound[k].requires_grad]
    torch.autograd.backward([bound[k] for k in names], [grads[k] for k in names])

    def value() -> float:
        with torch.no_grad():
            return float((w * op(u, {**op.tensors(), **op.inputs(x)})).sum())

    for name, p in op.named_parameters():
        assert p.grad is not None
        direction = torch.randn(p.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        kept, eps, values = p.detach().clone(), 1e-6, []
        for sign in (1, -1):
            with torch.no_grad():
                p.copy_(kept + sign * eps * direction)
            values.append(value())
        with torch.no_grad():
            p.copy_(kept)
        slope = (values[0] - values[1]) / (2 * eps)
        assert float((p.grad * direction).sum()) == pytest.approx(slope, rel=1e-6, abs=1e-8), name


@KINDS
def test_potential_of_it(selective: bool) -> None:
    """Field and contrast of the coupling it is made for, against autograd of the coupling's value."""
    x, h = _draw(11, D, 1), {"a": _draw(11, D, 2)}
    coupling = Potential(_op(selective, masked=True), "a").double()
    assert coupling.bias is not None
    with torch.no_grad():
        coupling.bias.copy_(torch.randn(M, generator=torch.Generator().manual_seed(5)) * 0.5)
        bound = coupling.bind(x)
        found = coupling.field(h, bound)["a"]
    wanted = autograd_field(lambda s: coupling.value(s, bound), h)["a"]
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    plus, weight = {"a": _draw(11, D, 6)}, torch.tensor([0.7, -1.3], dtype=torch.float64)
    leaf = bound.map(lambda t: t.detach().requires_grad_(), lambda t: t.detach().requires_grad_())
    # the exact contrast of a nonlinear potential is the product rule's only to second order in the distance
    near = {"a": plus["a"] + 1e-4 * _draw(11, D, 8)}
    total = (weight * (coupling.value(near, leaf) - coupling.value(plus, leaf))).sum()
    wanted_by_name = torch.autograd.grad(total, list((leaf.shared | leaf.batched).values()), materialize_grads=True)
    grads = coupling.gradient(near, plus, weight, bound)
    for name, w in zip(leaf.shared | leaf.batched, wanted_by_name, strict=True):
        if name != "mask":
            torch.testing.assert_close(grads[name], w, rtol=1e-6, atol=1e-11)


@KINDS
def test_operator_is_analytic(selective: bool) -> None:
    op, x = _op(selective), _draw(13, D, 1)
    t = {k: v.to(torch.complex128) for k, v in _tensors(op, x).items()}
    u, w = (torch.complex(_draw(13, f, s), _draw(13, f, s + 1)) for f, s in ((D, 2), (M, 4)))
    real = _tensors(op, x)
    torch.testing.assert_close(op(u, t), torch.complex(op(u.real, real), op(u.imag, real)))
    torch.testing.assert_close((op(u, t) * w).sum(), (u * op.adjoint(w, t)).sum(), rtol=1e-10, atol=1e-12)


def test_later_tokens_change_nothing() -> None:
    for selective in (False, True):
        op, x, u = _op(selective), _draw(13, D, 1), _draw(13, D, 2)
        later = u.clone()
        later[:, 9:] += 1
        t = _tensors(op, x)
        torch.testing.assert_close(op(later, t)[:, :9], op(u, t)[:, :9], rtol=0, atol=1e-14)
        assert float((op(later, t) - op(u, t))[:, 9:].abs().min()) > 1e-6


@KINDS
def test_padding_changes_nothing(selective: bool) -> None:
    """A short sequence by itself, and with tokens after it that do not count."""
    op = _op(selective, masked=True)
    x = _draw(9, D, 1)
    x[..., 0] = x[..., 0].abs()
    tail = _draw(8, D, 2)
    tail[..., 0] = -1
    u, w = _draw(17, D, 3), _draw(17, M, 4)
    short, padded = _tensors(op, x), _tensors(op, torch.cat([x, tail], 1))
    torch.testing.assert_close(op(u, padded)[:, :9], op(u[:, :9], short), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(op.adjoint(w, padded)[:, :9], op.adjoint(w[:, :9], short), rtol=1e-12, atol=1e-13)
    assert not op(u, padded)[:, 9:].any()
    assert not op.adjoint(w, padded)[:, 9:].any()


def test_no_time_passes_at_masked_tokens_of_a_selective_map() -> None:
    op, x, u = _op(True, masked=True), _draw(20, D, 1, batch=1), _draw(20, D, 2, batch=1)
    counts = FirstPositive()(x)[0]
    assert 5 < int(counts.sum()) < 18
    found = op(u, _tensors(op, x))[:, counts]
    torch.testing.assert_close(found, op(u[:, counts], _tensors(op, x[:, counts])), rtol=1e-11, atol=1e-12)


@KINDS
def test_examples_do_not_mix(selective: bool) -> None:
    op, x, u = _op(selective), _draw(13, D, 1), _draw(13, D, 2)
    alone = op(u[1:], _tensors(op, x[1:]))
    torch.testing.assert_close(op(u, _tensors(op, x))[1:], alone, rtol=1e-12, atol=1e-13)


@KINDS
def test_norm_by_iteration_is_the_largest_singular_value(selective: bool) -> None:
    op, x = _op(selective), _draw(14, D, 1)
    whole = torch.einsum("bmij,md->bimjd", _matrices(op, x), op.project.weight.detach())
    wanted = float(torch.linalg.matrix_norm(whole.reshape(B, 14 * M, 14 * D), 2).max())
    t = {**op.tensors(), **op.inputs(x)} if selective else None
    assert op.norm(iterations=800, length=14, t=t) == pytest.approx(wanted, rel=1e-6)


def test_closed_form_norm_is_the_limit_of_long_sequences() -> None:
    op = _op(False, chunk=50)
    limit = op.norm_limit()
    short, long = op.norm(iterations=200, length=12), op.norm(iterations=400, length=500)
    assert short < long <= limit * (1 + 1e-9)
    assert long > 0.99 * limit


def test_closed_form_norm_of_a_slow_mode_off_its_centre() -> None:
    # a rate of 1/2000: the peak is 1/3 of the distance of two points of the grid, and beside the mode's frequency
    op = SSM(1, 1, chunk=64).double()
    with torch.no_grad():
        op.log_rate.fill_(-math.log(2000.0))
        op.frequency.fill_(0.7)
        op.coefficient.copy_(torch.tensor([0.0, 0.5])[:, None, None])
        op.skip.fill_(0.5)
        op.project.weight.fill_(1.0)
    fine = op.transfer(0.7 + torch.linspace(-0.01, 0.01, 200_001, dtype=torch.float64)).abs().amax()
    assert op.norm_limit() == pytest.approx(float(fine), rel=1e-4)


def test_closed_form_norm_of_one_mode() -> None:
    """One channel, one real mode, W = 1: the gain at frequency 0 is |c| + d whatever the decay."""
    for timescale in (1.0, 10.0, 1000.0):
        op = SSM(1, 1, timescales=(timescale, timescale), frequency=0.0, bounded=False).double()
        with torch.no_grad():
            op.project.weight.fill_(1.0)
            op.coefficient.copy_(torch.tensor([[[0.75]], [[0.0]]]))
            op.skip.fill_(0.25)
        assert op.norm_limit() == pytest.approx(1.0, rel=1e-12)


@KINDS
def test_bounded_by_the_weights_norm(selective: bool) -> None:
    """Whatever the parameters: large coefficients, slow and fast modes, steep gates."""
    op = _op(selective, states=3)
    with torch.no_grad():
        op.coefficient.mul_(20)
        op.skip.mul_(-7)
        op.log_rate.add_(torch.linspace(-3, 3, 3, dtype=torch.float64))
        if isinstance(op.gates, nn.Linear):
            op.gates.weight.mul_(3)
            op.gates.bias[M:] += 15  # open: closed ones only lower the norm
    control_norm(op.project, 0.6)
    x = _draw(40, D, 1, batch=6)
    t = {**op.tensors(), **op.inputs(x)} if selective else None
    assert 0.2 * 0.6 < op.norm(iterations=300, length=40, t=t) <= 0.6 * (1 + 1e-6)
    assert float(op.eigenvalues().abs().max()) < 1


def test_a_chunk_too_long_for_its_decay_is_shortened_and_said() -> None:
    x = _draw(40, D, 1)
    for dtype, factor in ((torch.float32, 8.0), (torch.float64, 60.0)):
        op = _op(True, chunk=32)
        with torch.no_grad():
            op.log_rate.fill_(math.log(factor))
        narrow = op.to(dtype)
        with pytest.warns(ShortenedChunkWarning, match=r"got exp\(\d+\); chunks of \d+ are used"):
            t = _tensors(narrow, x.to(dtype))
        assert t["inject"].shape[3] // t["turn"].shape[3] < 32
        wanted = torch.einsum(
            "bmij,md,bjd->bim", _matrices(op.double(), x), op.project.weight.detach(), _draw(40, D, 2)
        )
        tolerance = 2e-5 if dtype == torch.float32 else 1e-11
        found = op.to(dtype)(_draw(40, D, 2).to(dtype), t).double()
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            op.inputs(x.to(dtype))  # said once


@pytest.mark.parametrize("rate", [100.0, 400.0, 1e6])
def test_what_a_single_token_forgets_does_not_overflow(rate: float) -> None:
    op, x, u = _op(True, chunk=8), _draw(11, D, 1), _draw(11, D, 2)
    with torch.no_grad():
        op.log_rate[:, 0] = math.log(rate)  # the other states of each channel forget slowly
    wanted = torch.einsum("bmij,md,bjd->bim", _matrices(op, x), op.project.weight.detach(), u)
    narrow = op.float()
    with pytest.warns(ShortenedChunkWarning):
        t = _tensors(narrow, x.float())
    assert all(bool(torch.isfinite(v).all()) for v in t.values())
    torch.testing.assert_close(narrow(u.float(), t).double(), wanted, rtol=2e-4, atol=2e-5)
    grads = narrow.gradient(_draw(11, M, 3).float(), u.float(), t)
    assert all(bool(torch.isfinite(g).all()) for g in grads.values())


@pytest.mark.parametrize("n", [1, 13, 200])
@KINDS
def test_float32_keeps_its_digits(selective: bool, n: int) -> None:
    op, x, u = _op(selective, chunk=32), _draw(n, D, 1), _draw(n, D, 2)
    wanted = op(u, _tensors(op, x))
    narrow = op.float()
    found = narrow(u.float(), _tensors(narrow, x.float()))
    assert float((found.double() - wanted).norm() / wanted.norm()) < 2e-6


def _layer(selective: bool) -> tuple[Equilibrium, Tensor]:
    g = torch.Generator().manual_seed(3)
    op = _op(selective, masked=True)
    control_norm(op.project, 0.6)
    drive = nn.Linear(D, D).double()
    with torch.no_grad():
        drive.weight.copy_(torch.eye(D) * 2)
        drive.bias.copy_(0.3 * torch.randn(D, generator=g, dtype=torch.float64))
    terms = [Drive("a", drive), Potential(op, "a")]
    energy = Energy([Node("a", (9, D), LayerNorm(D))], terms).double()
    return Equilibrium(energy, FixedPoint(max_steps=1000, tolerance=1e-13)), torch.randn(
        B, 9, D, generator=g, dtype=torch.float64
    )


@pytest.mark.parametrize(
    "estimator",
    [
        Centered(beta=1e-4, tolerance=1e-10, max_steps=2000),
        OneSided(beta=1e-5, tolerance=1e-9, max_steps=2000),
        Holomorphic(beta=1e-3, tolerance=1e-11, max_steps=2000),
    ],
    ids=lambda e: e.name,
)
@KINDS
def test_estimators_agree_with_the_implicit_gradient(selective: bool, estimator: Centered) -> None:
    layer, x = _layer(selective)
    weight = _draw(9, D, 8)
    grads = []
    for one in (Implicit(tolerance=1e-13, max_steps=2000), estimator):
        layer.estimator = one
        layer.zero_grad()
        (weight * layer(x)).square().sum().backward()
        grads.append({n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None})
    assert set(grads[0]) == set(grads[1])
    assert any("gates" in n for n in grads[0]) == selective
    for name, wanted in grads[0].items():
        assert float((grads[1][name] - wanted).norm() / wanted.norm()) < 1e-3, name


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="features, hidden, states, chunk >= 1"):
        SSM(3, 4, states=0)
    with pytest.raises(ConfigError, match="timescales"):
        SSM(3, 4, timescales=(0.0, 3.0))
    with pytest.raises(ConfigError, match=r"gates of shape \(B, N, 12\)"):
        SSM(3, 4, gates=nn.Linear(3, 5)).inputs(torch.randn(2, 6, 3))
    with pytest.raises(ConfigError, match="depends on the input"):
        _op(True)(_draw(5, D, 1))
    x = _draw(9, D, 1)
    with pytest.raises(ConfigError, match="expected 7 to 12 tokens, as its inputs have, got 15"):
        _op(True)(_draw(15, D, 2), _tensors(_op(True), x))
    with pytest.raises(ConfigError, match="expected 9 tokens, as its inputs have, got 8"):
        _op(False, masked=True)(_draw(8, D, 2), _tensors(_op(False, masked=True), x))
    assert _op(True).norm(t=_tensors(_op(True), x)) == _op(True).norm(length=12, t=_tensors(_op(True), x))
    with pytest.raises(ConfigError, match="time-invariant map, got gates"):
        _op(True).norm_limit()
    coupling = Bilinear(_op(True), "a", "b")
    with pytest.raises(ConfigError, match="depends on the input"):
        coupling.field({"a": _draw(5, D, 1), "b": _draw(5, M, 2)}, Bound(coupling.op.tensors()))
    with pytest.raises(ConfigError, match="operator on"):
        Energy([Node("a", (5, D + 1), LayerNorm(D + 1))], [Potential(_op(False), "a")])
    assert isinstance(_op(False).project, Dense)
