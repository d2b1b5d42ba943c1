"""Each coupling's closed-form field and weight gradient against autograd of its value."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from oracles import autograd_field
from toreq.core import (
    Attention,
    Bilinear,
    Bound,
    Circulant,
    Conv,
    Coupling,
    Dense,
    Drive,
    IdentityOperator,
    Lateral,
    LinearAttention,
    Potential,
    Resample,
    Residual,
    SelfCoupling,
    Spring,
)
from toreq.errors import ConfigError
from zoo import Block, linear

B = 3
State = dict[str, Tensor]
Made = tuple[Coupling, dict[str, tuple[int, ...]], tuple[int, ...]]


def _make(name: str, seed: int = 0) -> Made:
    """A coupling with non-zero parameters everywhere, the shapes of its nodes and of the input."""
    g = torch.Generator().manual_seed(seed)
    gate = nn.Sequential(linear(4, 5, g), nn.Sigmoid())
    table: dict[str, Made] = {
        "drive": (Drive("a", linear(4, 5, g)), {"a": (5,)}, (4,)),
        "bilinear": (Bilinear(Dense(5, 3, generator=g), "a", "b"), {"a": (5,), "b": (3,)}, (4,)),
        "bilinear_tokens": (Bilinear(Dense(5, 3, generator=g), "a", "b"), {"a": (2, 5), "b": (2, 3)}, (4,)),
        "bilinear_conv": (
            Bilinear(Conv((2, 7, 6), 3, 3, stride=2, padding=1, pool=2, generator=g), "a", "b"),
            {"a": (2, 7, 6), "b": (3, 2, 1)},
            (4,),
        ),
        "lateral": (Lateral(Dense(5, 5, symmetric=True, generator=g), "a"), {"a": (5,)}, (4,)),
        "lateral_gated": (Lateral(Dense(5, 5, symmetric=True, generator=g), "a", gate), {"a": (5,)}, (4,)),
        "lateral_circulant": (Lateral(Circulant(5, symmetric=True, generator=g), "a"), {"a": (5,)}, (4,)),
        "potential": (Potential(Dense(5, 7, scale=0.5, generator=g), "a"), {"a": (5,)}, (4,)),
        "potential_tokens": (Potential(Dense(5, 7, scale=0.5, generator=g), "a"), {"a": (2, 5)}, (4,)),
        "potential_softplus": (
            Potential(Dense(5, 7, scale=0.5, generator=g), "a", "softplus", drive=linear(4, 7, g)),
            {"a": (5,)},
            (4,),
        ),
        "potential_relu2": (
            Potential(Dense(5, 7, scale=0.5, generator=g), "a", "relu2", bias=False),
            {"a": (5,)},
            (4,),
        ),
        "potential_conv": (
            Potential(Conv((2, 5, 5), 3, 3, padding=1, pool=2, generator=g), "a"),
            {"a": (2, 5, 5)},
            (4,),
        ),
        "attention": (Attention("a", 6, heads=2, scale=0.5, generator=g), {"a": (4, 6)}, (4,)),
        "attention_wide": (
            Attention("a", 6, heads=3, head_features=4, inverse_temperature=1.7, scale=0.4, generator=g),
            {"a": (4, 6)},
            (4,),
        ),
        "linear_attention": (LinearAttention("a", 6, heads=2, scale=0.5, generator=g), {"a": (4, 6)}, (4,)),
        "linear_attention_wide": (
            LinearAttention("a", 6, heads=3, head_features=4, inverse_temperature=1.7, scale=0.4, generator=g),
            {"a": (4, 6)},
            (4,),
        ),
        "spring": (Spring("a", "b", Dense(3, 5, generator=g), 0.7, learnable=True), {"a": (5,), "b": (3,)}, (4,)),
        "spring_identity": (Spring("a", "b", IdentityOperator(5), 0.7), {"a": (5,), "b": (5,)}, (4,)),
        "spring_resample": (Spring("a", "b", Resample((2, 4), 2, 1)), {"a": (2, 2), "b": (2, 4)}, (4,)),
        "self_coupling": (SelfCoupling("a", -0.4), {"a": (5,)}, (4,)),
        "residual_self": (Residual(Block(5, g, inputs=4), "a", source="a"), {"a": (5,)}, (4,)),
        "residual_chain": (
            Residual(nn.Sequential(linear(3, 5, g), nn.Tanh()), "a", source="b", inject=False),
            {"a": (5,), "b": (3,)},
            (4,),
        ),
        "residual_input": (Residual(linear(4, 5, g), "a"), {"a": (5,)}, (4,)),
    }
    coupling, shapes, inputs = table[name]
    coupling = coupling.double()
    if isinstance(coupling, Potential) and coupling.bias is not None:
        with torch.no_grad():
            coupling.bias.copy_(torch.randn(coupling.bias.shape, generator=g) * 0.5)
    return coupling, shapes, inputs


NAMES = [
    "drive",
    "bilinear",
    "bilinear_tokens",
    "bilinear_conv",
    "lateral",
    "lateral_gated",
    "lateral_circulant",
    "potential",
    "potential_tokens",
    "potential_softplus",
    "potential_relu2",
    "potential_conv",
    "attention",
    "attention_wide",
    "linear_attention",
    "linear_attention_wide",
    "spring",
    "spring_identity",
    "spring_resample",
    "self_coupling",
    "residual_self",
    "residual_chain",
    "residual_input",
]
EACH = pytest.mark.parametrize("name", NAMES)


def _draw(shapes: dict[str, tuple[int, ...]], seed: int, scale: float = 1.0) -> State:
    g = torch.Generator().manual_seed(seed)
    return {n: scale * torch.randn(B, *s, generator=g, dtype=torch.float64) for n, s in shapes.items()}


def _bound(coupling: Coupling, inputs: tuple[int, ...]) -> Bound:
    x = torch.randn(B, *inputs, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    with torch.no_grad():
        return coupling.bind(x)


@EACH
def test_field_is_the_gradient_of_the_value(name: str) -> None:
    coupling, shapes, inputs = _make(name)
    h, bound = _draw(shapes, 1), _bound(coupling, inputs)
    assert coupling.value(h, bound).shape == (B,)
    wanted = autograd_field(lambda s: coupling.value(s, bound), h)
    with torch.no_grad():
        found = coupling.field(h, bound)
    assert set(found) <= set(shapes)
    for n, w in wanted.items():
        torch.testing.assert_close(found.get(n, torch.zeros_like(w)), w, rtol=1e-11, atol=1e-12)


@EACH
def test_field_by_finite_differences(name: str) -> None:
    coupling, shapes, inputs = _make(name)
    h, d, bound, eps = _draw(shapes, 1), _draw(shapes, 2), _bound(coupling, inputs), 1e-6
    with torch.no_grad():
        up = coupling.value({n: t + eps * d[n] for n, t in h.items()}, bound)
        down = coupling.value({n: t - eps * d[n] for n, t in h.items()}, bound)
        field = coupling.field(h, bound)
        slope = sum((field[n] * d[n]).flatten(1).sum(1) for n in field)
    torch.testing.assert_close(slope, (up - down) / (2 * eps), rtol=1e-6, atol=1e-7)


@EACH
def test_value_has_one_number_per_example(name: str) -> None:
    coupling, shapes, inputs = _make(name)
    h, bound = _draw(shapes, 1), _bound(coupling, inputs)
    together = coupling.value(h, bound).detach()
    for i in range(B):
        alone = coupling.value(
            {n: t[i : i + 1] for n, t in h.items()}, bound.map(lambda t: t, lambda t, i=i: t[i : i + 1])
        )
        torch.testing.assert_close(alone.detach(), together[i : i + 1], rtol=1e-11, atol=1e-12)


@EACH
def test_add_field_accumulates_only_what_is_wanted(name: str) -> None:
    coupling, shapes, inputs = _make(name)
    h, bound = _draw(shapes, 1), _bound(coupling, inputs)
    with torch.no_grad():
        field = coupling.field(h, bound)
        for node in shapes:
            start = _draw(shapes, 3)
            acc = dict(start)
            copies = {n: t.clone() for n, t in start.items()}
            coupling.add_field(acc, h, bound, frozenset([node]))
            for n, t in start.items():
                wanted = t + field[n] if n == node and n in field else t
                torch.testing.assert_close(acc[n], wanted, rtol=1e-12, atol=1e-12)
                assert torch.equal(t, copies[n]), "the accumulator's tensors must not be written to"
            empty: State = {}
            coupling.add_field(empty, h, bound, frozenset([node]))
            assert set(empty) <= {node}
            if node in field:
                torch.testing.assert_close(empty[node], field[node], rtol=1e-12, atol=1e-12)


@EACH
@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_gradient_of_the_contrast(name: str, spread: float) -> None:
    """With a different weight on each example, and for states far apart and close together."""
    coupling, shapes, inputs = _make(name)
    minus = _draw(shapes, 1)
    plus = {n: t + spread * d for (n, t), d in zip(minus.items(), _draw(shapes, 2).values(), strict=True)}
    weight = torch.tensor([0.7, -1.3, 2.1], dtype=torch.float64)
    x = torch.randn(B, *inputs, generator=torch.Generator().manual_seed(9), dtype=torch.float64).requires_grad_()
    bound = coupling.bind(x)
    leaves = {**bound.shared, **bound.batched}
    targets = [p for p in coupling.parameters() if p.requires_grad] + [x]
    total = (weight * (coupling.value(plus, bound) - coupling.value(minus, bound))).sum()
    if not total.requires_grad:
        assert not any(t.requires_grad for t in leaves.values()), "the value must depend on what is learnt"
        return
    wanted = torch.autograd.grad(total, targets, retain_graph=True, materialize_grads=True, allow_unused=True)
    # compared in the parameters: a symmetric weight is only defined up to what symmetrising removes
    with torch.no_grad():
        detached = bound.map(torch.Tensor.detach, torch.Tensor.detach)
        found = coupling.gradient(plus, minus, weight, detached)
    pairs = [(leaves[k], g.sum_to_size(leaves[k].shape)) for k, g in found.items() if leaves[k].requires_grad]
    outputs, cotangents = zip(*pairs, strict=True)
    pulled = torch.autograd.grad(outputs, targets, cotangents, materialize_grads=True, allow_unused=True)
    assert any(float(w.norm()) > 0 for w in wanted)
    for f, w in zip(pulled, wanted, strict=True):
        torch.testing.assert_close(f, w, rtol=1e-9, atol=1e-11 * (spread + float(w.norm())))


@EACH
def test_field_is_differentiable_for_second_derivatives(name: str) -> None:
    """``NonConservative`` and ``Implicit`` take products with dField/dh: it must be the Hessian, hence symmetric."""
    coupling, shapes, inputs = _make(name)
    h = {n: t.requires_grad_() for n, t in _draw(shapes, 1).items()}
    bound, v, w = _bound(coupling, inputs), _draw(shapes, 2), _draw(shapes, 3)
    field = coupling.field(h, bound)

    def product(u: State) -> State:
        total = sum((f * u[n]).sum() for n, f in field.items())
        if not isinstance(total, Tensor) or not total.requires_grad:
            return {n: torch.zeros_like(t) for n, t in h.items()}
        grads = torch.autograd.grad(total, list(h.values()), retain_graph=True, allow_unused=True)
        return {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(h.items(), grads, strict=True)}

    jv, jw = product(v), product(w)
    left = sum((jv[n] * w[n]).sum() for n in h)
    right = sum((jw[n] * v[n]).sum() for n in h)
    torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-10)
    # and against a finite difference of the field
    eps = 1e-6
    with torch.no_grad():
        up = coupling.field({n: t + eps * v[n] for n, t in h.items()}, bound)
        down = coupling.field({n: t - eps * v[n] for n, t in h.items()}, bound)
        slope = sum(((up[n] - down[n]) * w[n]).sum() / (2 * eps) for n in up)
    torch.testing.assert_close(torch.as_tensor(slope), torch.as_tensor(left), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in NAMES if "relu2" not in n and "residual" not in n])
def test_analytic_couplings_accept_complex_states(name: str) -> None:
    coupling, shapes, inputs = _make(name)
    assert coupling.analytic
    h, d, eps = _draw(shapes, 1), _draw(shapes, 2), 1e-6
    bound = _bound(coupling, inputs)
    wide = bound.map(lambda t: t.to(torch.complex128), lambda t: t.to(torch.complex128))
    with torch.no_grad():
        z = {n: t.to(torch.complex128) for n, t in h.items()}
        torch.testing.assert_close(coupling.value(z, wide).real, coupling.value(h, bound), rtol=1e-11, atol=1e-12)
        # the field into the imaginary direction: Cauchy-Riemann against the real field's own difference
        up = coupling.field({n: t + 1j * eps * d[n] for n, t in z.items()}, wide)
        real = coupling.field({n: t + eps * d[n] for n, t in h.items()}, bound)
        base = coupling.field(h, bound)
    for n in base:
        torch.testing.assert_close(up[n].real, base[n], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(up[n].imag / eps, (real[n] - base[n]) / eps, rtol=1e-4, atol=1e-4)


def test_gate_of_one_is_no_gate() -> None:
    class Ones(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ones(x.shape[0], 5, dtype=x.dtype)

    op = Dense(5, 5, symmetric=True, generator=torch.Generator().manual_seed(0)).double()
    h, x = _draw({"a": (5,)}, 1), torch.zeros(B, 4, dtype=torch.float64)
    plain, open_gate = Lateral(op, "a"), Lateral(op, "a", Ones())
    torch.testing.assert_close(plain.field(h, plain.bind(x))["a"], open_gate.field(h, open_gate.bind(x))["a"])


def test_attention_field_holds_the_queries_and_the_keys_part() -> None:
    coupling, shapes, inputs = _make("attention")
    assert isinstance(coupling, Attention)
    h, bound = _draw(shapes, 1), _bound(coupling, inputs)
    q = torch.einsum("bnd,hed->bhne", h["a"], coupling.query.view(2, 3, 6))
    k = torch.einsum("bnd,hed->bhne", h["a"], coupling.key.view(2, 3, 6))
    p = (q @ k.transpose(-1, -2) / 3**0.5).softmax(-1)
    from_queries = torch.einsum("bhne,hed->bnd", p @ k, coupling.query.view(2, 3, 6))
    from_keys = torch.einsum("bhne,hed->bnd", p.transpose(-1, -2) @ q, coupling.key.view(2, 3, 6))
    torch.testing.assert_close(coupling.field(h, bound)["a"], from_queries + from_keys, rtol=1e-11, atol=1e-12)


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="use Lateral"):
        Bilinear(Dense(3, 3), "a", "a")
    with pytest.raises(ConfigError, match="symmetric=True"):
        Lateral(Dense(3, 3), "a")
    with pytest.raises(ConfigError, match="expected phi in"):
        Potential(Dense(3, 3), "a", phi="cosine")
    with pytest.raises(ConfigError, match="strength > 0"):
        Spring("a", "b", IdentityOperator(3), strength=-1.0)
    with pytest.raises(ConfigError, match="two nodes"):
        Spring("a", "a", IdentityOperator(3))
    with pytest.raises(ConfigError, match="inverse_temperature > 0"):
        Attention("a", 4, inverse_temperature=0.0)
    with pytest.raises(ConfigError, match="heads, features >= 1"):
        LinearAttention("a", 4, heads=0)
    with pytest.raises(ConfigError, match="needs an argument"):
        Residual(nn.Linear(3, 3), "a", inject=False)
    with pytest.raises(ConfigError, match="LayerNorm or GroupNorm"):
        Residual(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), "a", source="a", inject=False)
    with pytest.raises(ConfigError, match="noise redrawn at every step"):
        Residual(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)), "a", source="a", inject=False)
    Residual(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.0)), "a", source="a", inject=False)


@pytest.mark.parametrize("name", ["attention", "spring"])
def test_contrasts_of_close_states_keep_their_digits_in_float32(name: str) -> None:
    """Weighted by 1/beta, as an estimator does; by autograd of two values most digits are lost."""
    case = next(n for n in NAMES if n.startswith(name))
    coupling, shapes, inputs = _make(case)
    coupling.float()
    minus = {n: t.float() for n, t in _draw(shapes, 1).items()}
    plus = {n: t + 1e-4 * _draw(shapes, 2)[n].float() for n, t in minus.items()}
    weight = torch.tensor([0.7, -1.3, 2.1])
    x = torch.randn(B, *inputs, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        bound = coupling.bind(x)
        wide = bound.map(torch.Tensor.double, torch.Tensor.double)

        def error(found: dict[str, Tensor], key: str) -> float:
            exact = Coupling.gradient(
                coupling, {n: t.double() for n, t in plus.items()}, {n: t.double() for n, t in minus.items()},
                weight.double(), wide,
            )[key]  # fmt: skip
            return float((found[key].double() - exact).norm() / exact.norm())

        key = "qk" if name == "attention" else "strength"
        assert error(coupling.gradient(plus, minus, weight, bound), key) < 1e-5
        assert error(Coupling.gradient(coupling, plus, minus, weight, bound), key) > 1e-4
