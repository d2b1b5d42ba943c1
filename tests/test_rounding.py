"""Shortcuts in arithmetic, each against its plain form: bfloat16 weights, tanh, symmetric weights, norm control."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrize

from toreq.core import (
    Bilinear,
    Conv,
    Dense,
    Energy,
    LayerNorm,
    Node,
    Operator,
    Potential,
    Tanh,
    control_norm,
)
from toreq.core.norm_control import NormControl
from toreq.core.operators import _Symmetric
from toreq.core.state import detached

OPERATORS = {
    "dense": lambda g: Dense(96, 80, generator=g),
    "symmetric": lambda g: Dense(70, 70, symmetric=True, generator=g),
    "shaped": lambda g: Dense((4, 5, 5), 64, generator=g),
    "conv": lambda g: Conv((3, 9, 9), 5, 3, 2, 1, generator=g),
    "pooled": lambda g: Conv((3, 9, 9), 5, 2, pool=2, generator=g),
    "symmetric conv": lambda g: Conv((4, 6, 6), 4, 3, 1, 1, symmetric=True, generator=g),
}
EACH_OPERATOR = pytest.mark.parametrize("build", OPERATORS.values(), ids=OPERATORS.keys())


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


# --- bfloat16 weights


@EACH_OPERATOR
def test_rounded_weights_multiply_states_of_float32(build) -> None:
    """What goes in and comes out keeps its dtype; every product is within a percent."""
    op = build(gen())
    t = {k: v.detach() for k, v in op.tensors().items()}
    low = op.rounded(t)
    assert {v.dtype for v in low.values()} == {torch.bfloat16}
    assert {v.dtype for v in t.values()} == {torch.float32}, "the weights that are given must stay as they are"
    u, w = torch.randn(4, *op.in_shape, generator=gen(1)), torch.randn(4, *op.out_shape, generator=gen(2))
    acc_in, acc_out = torch.randn(u.shape, generator=gen(3)), torch.randn(w.shape, generator=gen(4))
    kept = acc_in.clone(), acc_out.clone()
    with torch.no_grad():
        for found, wanted in (
            (op.forward(u, low), op.forward(u, t)),
            (op.adjoint(w, low), op.adjoint(w, t)),
            (op.add(None, u, low), op.forward(u, t)),
            (op.add_adjoint(None, w, low), op.adjoint(w, t)),
            (op.add(acc_out, u, low), acc_out + op.forward(u, t)),
            (op.add_adjoint(acc_in, w, low), acc_in + op.adjoint(w, t)),
            (op.gradient(w, u, low)["weight"], op.gradient(w, u, t)["weight"]),
        ):
            assert found.dtype == torch.float32
            assert found.shape == wanted.shape
            assert 0 < error(found, wanted) < 1e-2
        left, right = (op.forward(u, low) * w).sum(), (u * op.adjoint(w, low)).sum()
    scale = float((op.forward(u, t) * w).norm() * math.sqrt(w.numel()))
    assert abs(float(left - right)) < 1e-2 * scale
    assert torch.equal(acc_in, kept[0])
    assert torch.equal(acc_out, kept[1]), "an accumulator belongs to its owner"


def test_a_thin_matrix_is_not_rounded() -> None:
    """Casting its states would take longer than multiplying by it."""
    for shape in ((200, 10), (10, 200)):
        op = Dense(*shape)
        t = op.tensors()
        assert op.rounded(t) is t


@EACH_OPERATOR
def test_adding_in_place_is_adding(build) -> None:
    op = build(gen()).double()
    t = {k: v.detach() for k, v in op.tensors().items()}
    u = torch.randn(4, *op.in_shape, generator=gen(1), dtype=torch.float64)
    w = torch.randn(4, *op.out_shape, generator=gen(2), dtype=torch.float64)
    once = torch.ones(1, *([1] * (w.dim() - 1)), dtype=torch.float64).expand_as(w)
    torch.testing.assert_close(op.add(once, u, t), op.forward(u, t) + 1)
    torch.testing.assert_close(op.add_adjoint(u, w, t), op.adjoint(w, t) + u)
    assert bool((once == 1).all())


# --- symmetric weights


def test_the_symmetric_part_and_its_gradient() -> None:
    w = torch.randn(5, 5, generator=gen(), dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(_Symmetric.apply(w), (w + w.T) / 2)
    assert torch.autograd.gradcheck(_Symmetric.apply, (w,))
    assert torch.autograd.gradgradcheck(_Symmetric.apply, (w,))
    op = Dense(5, 5, symmetric=True).double()
    seed = torch.randn(5, 5, generator=gen(1), dtype=torch.float64)
    (found,) = torch.autograd.grad((op.tensors()["weight"] * seed).sum(), [op.weight])
    torch.testing.assert_close(found, (seed + seed.T) / 2)


@pytest.mark.parametrize("build", [OPERATORS["symmetric"], OPERATORS["symmetric conv"]], ids=["dense", "conv"])
@pytest.mark.parametrize("bound", [0.3, 100.0])
def test_a_bounded_symmetric_weight_is_symmetrised_once(build, bound: float, monkeypatch: pytest.MonkeyPatch) -> None:
    op = build(gen())
    control_norm(op, bound)
    calls: list[int] = []
    plain = type(op).__mro__[1].symmetrised
    monkeypatch.setattr(type(op).__mro__[1], "symmetrised", lambda self, w: calls.append(1) or plain(self, w))
    weight = op.tensors()["weight"].detach()
    assert len(calls) == 1
    mirrored = weight.T if weight.dim() == 2 else weight.transpose(0, 1).flip(-1, -2)
    torch.testing.assert_close(weight, mirrored)
    original = dict(op.named_parameters())["parametrizations.weight.original"].detach()
    if bound == 100.0:
        torch.testing.assert_close(weight, plain(op, original))
    assert op.norm() < 1.02 * bound
    u, v = (torch.randn(1, *op.in_shape, generator=gen(s)) for s in (1, 2))
    with torch.no_grad():
        torch.testing.assert_close((op.forward(u) * v).sum(), (u * op.forward(v)).sum())


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_the_norm_of_few_rows_is_exact(rows: int) -> None:
    """One call is enough after any change of the weight, and the gradient is that of the largest singular value."""
    op = Dense(40, rows, generator=gen()).double()
    control_norm(op, 0.7)
    (control,) = (m for m in op.modules() if isinstance(m, NormControl))
    for seed in range(3):
        fresh = torch.randn(rows, 40, generator=gen(seed), dtype=torch.float64, requires_grad=True)
        found, exact = control(fresh), fresh * (0.7 / torch.linalg.matrix_norm(fresh, 2))
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)
        seeds = torch.randn(rows, 40, generator=gen(9), dtype=torch.float64)
        (ours,) = torch.autograd.grad((found * seeds).sum(), [fresh])
        (theirs,) = torch.autograd.grad((exact * seeds).sum(), [fresh])
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_many_rows_are_followed() -> None:
    """Where subspace iteration estimates it, the norm of a weight that stays is found after some calls."""
    op = Dense(40, 30, generator=gen()).double()
    control_norm(op, 0.2)
    with torch.no_grad():
        weight = [op.tensors()["weight"] for _ in range(20)][-1]
    assert float(torch.linalg.matrix_norm(weight, 2)) == pytest.approx(0.2, rel=1e-3)
    assert parametrize.is_parametrized(op)


# --- tanh


@pytest.mark.parametrize("gain", [1.0, 0.3, 16.0])
def test_the_fast_tanh_has_the_digits_of_float32(gain: float) -> None:
    a = torch.cat([torch.linspace(-30, 30, 20001), torch.tensor([0.0, torch.inf, -torch.inf, 1e-8, 1e38, -1e38])])
    kept = a.clone()
    found = Tanh(gain)(a)
    assert torch.equal(a, kept)
    wanted = (gain * a.double()).tanh()
    assert float((found.double() - wanted).abs().max()) < 3e-7
    assert float(found.abs().max()) <= 1
    assert float(Tanh(gain)(torch.zeros(3)).abs().max()) == 0
    assert bool(Tanh(gain)(torch.tensor([torch.nan])).isnan().all())
    assert not torch.equal(found, (gain * a).tanh()), "expected the fast branch"


def test_tanh_elsewhere_is_the_ordinary_one() -> None:
    """With a graph to record, in float64 and for complex states."""
    a = torch.randn(50, generator=gen(), requires_grad=True)
    h = Tanh(2.0)(a)
    assert torch.equal(h, (2 * a).tanh())
    (grad,) = torch.autograd.grad(h.sum(), [a])
    torch.testing.assert_close(grad, 2 * (1 - h * h))
    with torch.no_grad():
        assert not torch.equal(Tanh(2.0)(a), (2 * a).tanh())
        for t in (a.detach().double(), torch.complex(a.detach(), a.detach().flip(0))):
            assert torch.equal(Tanh(2.0)(t), (2 * t).tanh())
            assert torch.equal(Tanh()(t), t.tanh())


# --- whole networks


def test_a_rounded_binding_leaves_the_weights_alone() -> None:
    energy = Energy(
        [Node("a", 80, Tanh()), Node("b", 70, Tanh())], [Bilinear(Dense(80, 70, generator=gen()), "a", "b")]
    )
    bindings = detached(energy.bind(torch.zeros(2, 80)))
    low = energy.rounded(bindings)
    assert {t.dtype for t in low["coupling_0"].shared.values()} == {torch.bfloat16}
    assert {t.dtype for t in bindings["coupling_0"].shared.values()} == {torch.float32}
    (op,) = (c.op for c in energy.couplings if isinstance(c, Bilinear))
    assert isinstance(op, Operator)
    assert op.tensors()["weight"].dtype == torch.float32


# --- contrasts of states that nearly agree


def _pair(shape: tuple[int, ...], response: float) -> tuple[Tensor, Tensor]:
    """Two float32 states whose difference is exact: what is lost in a contrast is lost by the contrast."""
    base = torch.randn(6, *shape, generator=gen(1))
    change = response * torch.randn(6, *shape, generator=gen(2))
    return base + change, base - change


@pytest.mark.parametrize("response", [1e-4, 1e-3, 3.0])
def test_the_contrast_of_layer_norms_keeps_its_digits(response: float) -> None:
    plus, minus = _pair((5, 24), response)
    weight = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])  # examples that nearly cancel
    sigma = LayerNorm(24)
    with torch.no_grad():
        sigma.bias.normal_(generator=gen(3))
        sigma.log_gain.fill_(0.3)
    found = sigma.gradient(plus, minus, weight, detached({"": sigma.bind()})[""])
    wide = sigma.double()
    bound = wide.bind()
    leaf = bound.map(lambda t: t.detach().requires_grad_(), lambda t: t)
    total = weight.double() * (wide.potential(plus.double(), leaf) - wide.potential(minus.double(), leaf))
    wanted = dict(zip(leaf.shared, torch.autograd.grad(total.sum(), list(leaf.shared.values())), strict=True))
    assert found.keys() == wanted.keys()
    for k, g in wanted.items():
        assert error(found[k], g) < 5e-6, k


@pytest.mark.parametrize("response", [1e-4, 1e-3, 3.0])
@pytest.mark.parametrize("phi", ["log_cosh", "softplus", "relu2"])
def test_the_contrast_of_tied_blocks_keeps_its_digits(phi: str, response: float) -> None:
    plus, minus = _pair((5, 24), response)
    weight = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    c = Potential(Dense(24, 40, generator=gen(4)), "h", phi)
    assert c.bias is not None
    with torch.no_grad():
        c.bias.normal_(generator=gen(5))
    found = c.gradient({"h": plus}, {"h": minus}, weight, detached({"": c.bind(None)})[""])
    wide = c.double()
    leaf = wide.bind(None).map(lambda t: t.detach().requires_grad_(), lambda t: t)
    total = weight.double() * (wide.value({"h": plus.double()}, leaf) - wide.value({"h": minus.double()}, leaf))
    wanted = dict(zip(leaf.shared, torch.autograd.grad(total.sum(), list(leaf.shared.values())), strict=True))
    assert found.keys() == wanted.keys()
    for k, g in wanted.items():
        assert error(found[k], g) < 5e-6, k
