"""The pyramids: one level is the base system, and several have the equilibrium and the gradients of their energy."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracles import residual_of
from toreq import data, systems
from toreq.core import Conv, Drive, Energy, Lateral, Spring
from toreq.core.state import detached
from toreq.diagnostics.gradients import against_implicit, compare, gradients, tight_copy
from toreq.errors import ConfigError
from toreq.estimators import Centered, Holomorphic, Implicit, Unrolled
from toreq.evidence.mstep.nets import radius_alone
from toreq.solvers import Anderson, CoarseToFine, FixedPoint
from toreq.systems.looped_transformer import Tokens
from toreq.systems.mstep import MultiScale, MultiScaleConv, MultiScaleDense, MultiScaleSequence
from toreq.systems.mstep.parts import PoolTokens
from toreq.systems.mstep.sharing import SharedConv, SharedDense

Make = Callable[..., MultiScale]
CONV: dict[str, Any] = {"channels": (3, 4), "kernel": 3}
DENSE: dict[str, Any] = {"hidden": (16, 8)}
TOKENS: dict[str, Any] = {"features": 8, "heads": 2, "hidden": 8, "patch": 2}


def conv(size: int = 16, **options: Any) -> MultiScale:
    return MultiScaleConv((1, size, size), 3, **{**CONV, **options})


def dense(size: int = 8, **options: Any) -> MultiScale:
    return MultiScaleDense((1, size, size), 3, **{**DENSE, **options})


def sequence(size: int = 8, **options: Any) -> MultiScale:
    return MultiScaleSequence((1, size, size), 3, **{**TOKENS, **options})


MAKES: dict[str, Make] = {"conv": conv, "dense": dense, "sequence": sequence}
EACH = pytest.mark.parametrize("name", MAKES)


def batch(net: MultiScale, size: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(size, *net.input_shape, generator=g).to(next(net.parameters()).dtype)
    return x, torch.randint(0, net.num_classes, (size,), generator=g)


def built(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> MultiScale:
    torch.manual_seed(0)
    return MAKES[name](**options).to(dtype).eval()


def driven(name: str, **options: Any) -> MultiScale:
    """A network that a flat solve can settle: tokens far enough from zero that layer norm is not too steep."""
    net = built(name, **options)
    for module in net.modules():
        if isinstance(module, Tokens):
            module.position.data.mul_(8 * max(1.0, options.get("strength", 1.0)))
    return net


BASES: dict[str, Callable[[], tuple[systems.System, MultiScale]]] = {
    "conv": lambda: (
        _seeded(lambda: systems.ConvHopfield((1, 14, 14), 3, **CONV, padding=1)),
        _seeded(lambda: conv(14, levels=1)),
    ),
    "conv_valid": lambda: (
        _seeded(lambda: systems.ConvHopfield((1, 14, 14), 3, **CONV, gated=True)),
        _seeded(lambda: conv(14, levels=1, padding=0, gated=True)),
    ),
    "dense": lambda: (
        _seeded(lambda: systems.ToroidalMLP((1, 7, 7), 3, hidden=(9,), gated=True)),
        _seeded(lambda: dense(7, levels=1, hidden=(9,), gated=True)),
    ),
    "sequence": lambda: (
        _seeded(lambda: systems.LoopedTransformer((1, 6, 6), 3, **TOKENS)),
        _seeded(lambda: sequence(6, levels=1)),
    ),
}


def _seeded(make: Callable[[], Any]) -> Any:
    torch.manual_seed(4)
    return make()


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("solver", [Anderson(length=3), CoarseToFine()], ids=["anderson", "coarse_to_fine"])
def test_one_level_is_the_base_system_bit_by_bit(name: str, solver: Anderson) -> None:
    base, net = BASES[name]()
    base.equilibrium.solver = net.equilibrium.solver = solver
    x, y = batch(net)
    for n in (base, net):
        n.criterion(n(x), y).backward()
    assert torch.equal(base(x), net(x))
    theirs, ours = list(base.parameters()), list(net.parameters())
    assert len(theirs) == len(ours)
    for a, b in zip(theirs, ours, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)


OPTIONS: list[dict[str, Any]] = [
    {"spring": "learned"},
    {"shared": False, "strength": 4.0},
    {"mu": 0.5, "strength": 0.1, "gated": True},
]


@EACH
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_coarse_to_fine_finds_the_equilibrium_of_a_flat_solve(name: str, options: dict[str, Any]) -> None:
    net = driven(name, **options)
    x, _ = batch(net)
    layer = net.equilibrium
    layer.solver = CoarseToFine(tolerance=1e-10, max_steps=300)
    found = layer.solve(x)
    layer.solver = FixedPoint(damping=0.02 if options.get("strength", 1) > 1 else 0.06, tolerance=1e-8, max_steps=4000)
    wanted = layer.solve(x)
    assert bool(found.converged.all())
    assert bool(wanted.converged.all())
    for n in wanted.h:
        assert float((found.h[n] - wanted.h[n]).norm()) <= 1e-5 * float(wanted.h[n].norm())


@EACH
def test_nudged_pairs_are_those_of_a_flat_solve(name: str) -> None:
    """Two stacked batches of opposite nudge, measured from the free equilibrium."""
    net = driven(name, spring="learned")
    x, _ = batch(net)
    layer = net.equilibrium
    layer.estimator = Centered(tolerance=1e-8, max_steps=4000)
    v = torch.randn(3, *layer.dynamics.shapes[layer.readout[0]], dtype=torch.float64)
    phases = []
    for solver in (
        CoarseToFine(tolerance=1e-11, max_steps=500),
        FixedPoint(damping=0.06, tolerance=1e-11, max_steps=4000),
    ):
        layer.solver = solver
        free, nudged = layer.solve(x), layer.solve_nudged(x, v)
        assert bool(nudged.converged.all())
        phases.append({n: t - torch.cat([free.h[n]] * 2) for n, t in nudged.h.items()})
    for n, wanted in phases[1].items():
        assert float((phases[0][n] - wanted).norm()) <= 1e-5 * float(wanted.norm())


@pytest.mark.parametrize("alone", [False, True], ids=["joint", "alone"])
@pytest.mark.parametrize("name", ["conv", "dense", pytest.param("sequence", marks=pytest.mark.slow)])
def test_gradients_against_finite_differences(name: str, alone: bool) -> None:
    """Along the gradient and at its largest entries, for every parameter, spring strengths and adapters among them."""
    net = tight_copy(built(name, spring="learned", mu=0.4, exits=True, alone=alone))
    x, y = batch(net)  # type: ignore[arg-type]
    found = gradients(net, x, y)
    assert any("log_strength" in k for k in found)
    assert any("adapter" in k for k in found)
    parameters = dict(net.named_parameters())
    for k, g in found.items():
        if float(g.norm()) < 1e-7:
            continue
        p, direction = parameters[k], g / g.norm()
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                p += sign * 1e-5 * direction
                values.append(float(net.criterion(net(x), y)))  # type: ignore[operator]
                p -= sign * 1e-5 * direction
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(float(g.norm()), rel=1e-4, abs=1e-9), k


@EACH
@pytest.mark.parametrize("options", [{"spring": "learned"}, {"strength": 4.0, "shared": False}], ids=str)
def test_estimators_agree_in_float32(name: str, options: dict[str, Any]) -> None:
    net = built(name, torch.float32, **options)
    x, y = batch(net)
    for rows in against_implicit(net, x, y, [("centered", Centered()), ("implicit", Implicit())]):
        for row in rows:
            assert row.passed, row


@pytest.mark.parametrize("name", ["conv", "sequence"])
def test_holomorphic_and_unrolled_agree(name: str) -> None:
    net = built(name)
    x, y = batch(net)
    exact = gradients(tight_copy(net), x, y)
    net.equilibrium.solver = CoarseToFine(tolerance=1e-9, max_steps=200)
    for label, estimator in (("holomorphic", Holomorphic(tolerance=1e-8)), ("unrolled", Unrolled())):
        net.equilibrium.estimator = estimator
        for row in compare(label, gradients(net, x, y), exact):
            assert row.passed, row


def test_norms_of_derived_operators_stay_below_those_they_derive_from() -> None:
    g = torch.Generator().manual_seed(0)
    base = Conv((4, 12, 12), 6, 5, 2, 2, generator=g)
    small = SharedConv(base, (4, 6, 6))
    from toreq.core import Dense

    matrix = Dense(16, 8, generator=g)
    pooled = SharedDense(matrix, 4)
    for derived, owner in ((small, base), (pooled, matrix)):
        with torch.no_grad():
            assert derived.adapter is not None
            derived.adapter.scale.copy_(torch.randn(derived.adapter.scale.shape, generator=g) * 3)
        assert derived.norm() <= owner.norm() * (1 + 1e-5)
        assert derived.norm() > 0.01 * owner.norm()


@EACH
def test_sharing_adds_few_parameters(name: str) -> None:
    torch.manual_seed(0)
    wide = {"conv": {"channels": (16, 32)}, "dense": {"hidden": (128,)}, "sequence": {"features": 32, "hidden": 64}}
    sizes = [sum(p.numel() for p in MAKES[name](levels=n, **wide[name]).parameters()) for n in (1, 3)]
    assert sizes[0] < sizes[1] <= 1.15 * sizes[0]
    own = sum(p.numel() for p in MAKES[name](levels=3, shared=False, **wide[name]).parameters())
    assert own > sizes[1]


@EACH
def test_norm_control_of_a_shared_weight_runs_once_per_relaxation(name: str) -> None:
    net = built(name).train()
    x, _ = batch(net)
    calls: list[int] = []
    from toreq.core import NormControl

    for module in net.modules():
        if isinstance(module, NormControl):
            module.register_forward_hook(lambda m, *_: calls.append(id(m)))
    net(x)
    assert calls
    assert len(calls) == len(set(calls))


@EACH
def test_sizes_that_do_not_halve_are_padded_or_refused(name: str) -> None:
    odd = {"conv": 13, "dense": 7, "sequence": 6}[name]
    net = built(name, size=odd)
    x, _ = batch(net)
    assert net(x).shape == (3, 3)
    with pytest.raises(ConfigError, match="divisible by"):
        MAKES[name](size=odd, pad=False)


def test_refusals() -> None:
    cases: list[tuple[Make, dict[str, Any], str]] = [
        (conv, {"levels": 0}, "levels >= 1"),
        (conv, {"spring": "stiff"}, "'fixed' or 'learned'"),
        (conv, {"strength": 0.0}, "strength > 0"),
        (conv, {"springs": "some"}, "'last' or 'all'"),
        (conv, {"kernel": 4}, "odd kernel"),
        (conv, {"nonlinearity": "softmax"}, "springs can be solved with"),
        (dense, {"hidden": (6,)}, r"use for example \(8,\)"),
        (sequence, {"vocabulary": 5}, "input_shape"),
    ]
    for make, options, match in cases:
        with pytest.raises(ConfigError, match=match):
            make(**options)


def test_symbols_are_pooled_after_their_embedding() -> None:
    torch.manual_seed(0)
    net = MultiScaleSequence((10,), 3, **{**TOKENS, "patch": 7}, vocabulary=5, pool="mean", attention="linear").eval()
    x = torch.randint(0, 5, (3, 10))
    assert {n: s[0] for n, s in net.equilibrium.dynamics.shapes.items()} == {
        "l3_tokens": 3,
        "l2_tokens": 6,
        "l1_tokens": 12,
    }
    assert net(x).shape == (3, 3)
    with pytest.raises(ConfigError, match="integer symbols"):
        net(x.float())


@EACH
def test_exits_train_every_head_and_let_examples_leave(name: str) -> None:
    net = built(name, torch.float32, exits=True)
    x, y = batch(net, 8)
    net.criterion(net(x), y).backward()
    for head in (net.head, *net.exit_heads):
        for p in head.parameters():
            assert p.grad is not None
            assert float(p.grad.norm()) > 0
    net.equilibrium.solver = replace(net.equilibrium.solver, tolerance=1e-6)
    all_stay, all_leave = net.predict(x, 1.0), net.predict(x, 0.0)
    assert all_stay.level.tolist() == [1] * 8
    torch.testing.assert_close(all_stay.logits, net(x), rtol=1e-3, atol=1e-4)
    assert all_leave.level.tolist() == [3] * 8
    assert bool((all_leave.steps[:, :2] == 0).all())
    assert bool((all_leave.steps[:, 2] > 0).all())
    # between the two some leave: each gives what its own level says
    margins = all_leave.logits.softmax(1).topk(2, 1).values
    gaps = margins[:, 0] - margins[:, 1]
    some = net.predict(x, float(gaps.median()))
    assert torch.equal(some.level == 3, gaps > float(gaps.median()))
    torch.testing.assert_close(some.logits[some.level == 3], all_leave.logits[some.level == 3])


@EACH
def test_exits_alone_are_trained_where_they_are_read(name: str) -> None:
    net = built(name, torch.float32, exits=True, alone=True)
    net.equilibrium.solver = replace(net.equilibrium.solver, tolerance=1e-6)
    x, y = batch(net, 8)
    loss = net.criterion(net(x), y)
    losses = [torch.nn.functional.cross_entropy(net.predict(x, 1.0).logits, y)]
    for level in (2, 3):
        part = net.parts.layer(net.equilibrium, level)
        assert set(part.dynamics.names) == {n for n in net.equilibrium.dynamics.names if int(n[1]) >= level}
        losses.append(torch.nn.functional.cross_entropy(net.exit_heads[level - 2](part(x)), y))
    torch.testing.assert_close(loss, sum(losses[1:], losses[0]), rtol=1e-4, atol=1e-5)
    coarsest = net.predict(x, 0.0).logits
    torch.testing.assert_close(
        coarsest, net.exit_heads[-1](net.parts.layer(net.equilibrium, 3)(x)), rtol=1e-3, atol=1e-4
    )
    # the joint equilibrium gives the coarsest exit something else
    joint = net.equilibrium.solve(x).h[net.tops[2]]
    assert not torch.allclose(coarsest, net.exit_heads[-1](joint), rtol=1e-3, atol=1e-4)


@EACH
def test_exits_alone_have_the_same_weights_and_follow_the_solver(name: str) -> None:
    net = built(name, torch.float32, exits=True, alone=True)
    assert net.state_dict().keys() == built(name, torch.float32, exits=True).state_dict().keys()
    x, y = batch(net, 4)
    net.criterion(net(x), y).backward()
    for level in (2, 3):
        part = net.parts.layer(net.equilibrium, level)
        own = {id(p) for p in net.parameters()}
        assert {id(p) for p in part.parameters()} <= own
        net.equilibrium.estimator = Implicit()
        assert net.parts.layer(net.equilibrium, level).estimator == Implicit()
    other = copy.deepcopy(net)
    assert torch.equal(other(x), net(x))
    assert {id(p) for p in other.parts.layer(other.equilibrium, 2).parameters()} <= {id(p) for p in other.parameters()}


def test_leaving_early_needs_exits() -> None:
    net = built("conv", torch.float32)
    with pytest.raises(ConfigError, match="exits=True"):
        net.predict(batch(net)[0])


@EACH
def test_copies_and_pickles_give_the_same_logits(name: str) -> None:
    net = built(name, torch.float32, exits=True)
    x, _ = batch(net)
    wanted = net(x).detach()
    assert torch.equal(copy.deepcopy(net)(x), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(net))(x), wanted)
    torch.manual_seed(9)
    other = MAKES[name](exits=True).eval()
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), wanted)


@EACH
def test_feedforward_twin_learns(name: str) -> None:
    torch.manual_seed(0)
    net = MAKES[name]()
    twin = net.feedforward()
    x, y = batch(net, 16)
    optimizer = torch.optim.Adam(twin.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(twin(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is not None for p in twin.parameters())


@EACH
def test_springs_pull_levels_together(name: str) -> None:
    """The stretch of every spring falls with its strength, and is the energy's derivative."""
    stretches = []
    for strength in (0.1, 10.0):
        net = built(name, strength=strength)
        x, _ = batch(net)
        net.equilibrium.solver = CoarseToFine(tolerance=1e-9, max_steps=300)
        solution = net.equilibrium.solve(x)
        energy = net.equilibrium.dynamics
        assert isinstance(energy, Energy)
        springs = [c for _, c in energy.terms() if isinstance(c, Spring)]
        assert len(springs) == 2
        stretches.append([float((solution.h[c.a] - c.op(solution.h[c.b])).norm()) for c in springs])
        assert bool((residual_of(energy, x, solution.state) < 1e-8).all())
    assert all(stiff < 0.5 * soft for soft, stiff in zip(*stretches, strict=True))


def test_bound_tensors_of_shared_weights_are_one_tensor() -> None:
    net = built("sequence")
    x, _ = batch(net)
    bindings = detached(net.equilibrium.dynamics.bind(x))
    assert len(bindings) > 0
    originals = [k for k in net.state_dict() if "original" in k]
    assert len(originals) == 3  # queries, keys and one matrix for all levels


def test_pooled_tokens_are_means_as_long_as_what_they_stand_for() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 12, 9, generator=g, dtype=torch.float64)
    y = PoolTokens(4)(x)
    assert y.shape == (2, 3, 9)
    mean = x.unflatten(1, (3, 4)).mean(2)
    torch.testing.assert_close(y.mean(-1), mean.mean(-1))
    deviation = x.unflatten(1, (3, 4)).var(-1, correction=0).mean(2).sqrt()
    torch.testing.assert_close(y.std(-1, correction=0), deviation)
    cosine = torch.cosine_similarity(y - y.mean(-1, keepdim=True), mean - mean.mean(-1, keepdim=True), dim=-1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))
    # equal tokens stay as they are, and tokens that cancel do not blow up
    same = x[:, :1].expand(2, 4, 9)
    torch.testing.assert_close(PoolTokens(4)(same), same[:, :1])
    assert bool(PoolTokens(2)(torch.cat([x[:, :1], -x[:, :1]], 1)).isfinite().all())


def test_coarse_tokens_are_coupled_no_more_strongly_than_fine_ones() -> None:
    torch.manual_seed(0)
    x = data.load("mnist").limit(4, 1).inputs("train", slice(None))
    sizes = {}
    for levels in (1, 3):
        net = MultiScaleSequence((1, 28, 28), 10, levels=levels, features=32, heads=2, hidden=64, patch="rows")
        sizes[levels] = radius_alone(net, x)
    assert sizes[3] < 2 * sizes[1]


def test_gates_of_coarse_and_repeated_tokens_stay_gates() -> None:
    torch.manual_seed(0)
    net = MultiScaleSequence((7,), 3, levels=3, features=8, heads=2, hidden=8, vocabulary=5, gated=True)
    assert net.count == 8
    x = torch.randint(0, 5, (2, 7), generator=torch.Generator().manual_seed(0))
    gates = [c.gate(x) for _, c in net.equilibrium.dynamics.terms() if isinstance(c, Lateral) and c.gate is not None]
    assert [g.shape[1] for g in gates] == [2, 4, 8] or [g.shape[1] for g in gates] == [8, 4, 2]
    assert all(bool(((g > 0) & (g < 1)).all()) for g in gates)
    drives = {c.node: c.module(x) for _, c in net.equilibrium.dynamics.terms() if isinstance(c, Drive)}
    torch.testing.assert_close(drives["l1_tokens"][:, 7], drives["l1_tokens"][:, 6])
