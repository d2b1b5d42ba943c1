"""The TEP-SSR system: gradients of every architecture, radius, padding, causality, any length, its twin, refusals."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from toreq.diagnostics.gradients import gradients
from toreq.diagnostics.locality import against_local
from toreq.errors import ConfigError
from toreq.estimators import Centered, Estimator, Implicit, NonConservative, OneSided
from toreq.solvers import FixedPoint
from toreq.systems.tepssr import TEPSSR
from toreq.systems.tepssr_nets import ARCHITECTURES, CausalStateSpace, StateSpaceClassifier, StateSpaceTagger
from toreq.systems.tepssr_parts import (
    OnePass,
    Reader,
)

N, CLASSES, VOCABULARY = 11, 3, 6
SMALL: dict[str, Any] = {"features": 8, "hidden": 10, "states": 2, "vocabulary": VOCABULARY, "chunk": 4}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "classifier": ("classifier", {}),
    "classifier_padded": ("classifier", {"padding": 0, "pool": "last"}),
    "classifier_invariant": ("classifier", {"selective": False, "attention": "none", "positions": True}),
    "classifier_softmax": ("classifier", {"attention": "softmax", "padding": 0, "pool": "none"}),
    "classifier_potential": ("classifier", {"layers": 0, "pool": "mean"}),
    "classifier_two_layers": ("classifier", {"layers": 2, "gain": 4.0, "pool": 3, "padding": 0, "attention": "none"}),
    "tagger": ("tagger", {"padding": 0}),
    "tagger_softmax": ("tagger", {"attention": "softmax", "selective": False}),
    "tagger_layer": ("tagger", {"layers": 1, "selective": False, "padding": 0}),
    "causal": ("causal", {}),
    "causal_padded": ("causal", {"padding": 0}),
    "causal_invariant": ("causal", {"selective": False}),
}
EACH = pytest.mark.parametrize("case", CASES)


def _net(case: str, dtype: torch.dtype = torch.float64, **more: Any) -> TEPSSR:
    arch, options = CASES[case]
    torch.manual_seed(0)
    net = ARCHITECTURES[arch]((N,), CLASSES, **{**SMALL, **options, **more})  # type: ignore[call-arg]
    assert isinstance(net, TEPSSR)
    # slopes, biases and gates away from their starts, where some gradients vanish
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith(("bias", "log_gain")):
                p.add_(0.1 * torch.randn(p.shape, generator=g))
    return net.to(dtype)


def _batch(net: TEPSSR, size: int = 3, length: int = N) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    x = torch.randint(1, VOCABULARY, (size, length), generator=g)
    if net.mask is not None and length > 4:
        x[0, length - 4 :] = 0
        x[1, length - 1 :] = 0
    shape = (size,) if isinstance(net, StateSpaceClassifier) else (size, length)
    y = torch.randint(0, CLASSES, shape, generator=g)
    return x, torch.where(x == 0, -100, y) if y.dim() == 2 else y


def _tight(net: TEPSSR, estimator: Estimator) -> TEPSSR:
    net = copy.deepcopy(net).eval()
    net.equilibrium.solver = replace(net.equilibrium.solver, tolerance=1e-12, max_steps=2000)
    net.equilibrium.estimator = estimator
    return net


def _cosines(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    assert set(found) == set(wanted)
    largest = max(float(w.norm()) for w in wanted.values())
    out = {}
    for name, w in wanted.items():
        if float(w.norm()) > 1e-6 * largest:
            out[name] = float((found[name] * w).sum() / (found[name].norm() * w.norm()))
        else:
            assert float(found[name].norm()) < 1e-5 * largest, name
    return out


@pytest.mark.parametrize("kind", ["centered", "onesided"])
@EACH
def test_gradient_against_implicit(case: str, kind: str) -> None:
    net = _net(case)
    x, y = _batch(net)
    exact = gradients(_tight(net, Implicit(tolerance=1e-12, max_steps=2000)), x, y)
    estimator: Estimator = Centered(beta=1e-3, tolerance=1e-8, max_steps=2000)
    if kind == "onesided":
        estimator = OneSided(beta=1e-5, tolerance=1e-8, max_steps=2000)
    if net.causal:
        if kind == "onesided":
            with pytest.raises(ConfigError, match="supports this network"):
                _tight(net, estimator)
            return
        estimator = NonConservative(beta=1e-4, tolerance=1e-8, max_steps=2000)
    cosines = _cosines(gradients(_tight(net, estimator), x, y), exact)
    assert len(cosines) > 10
    assert any("log_rate" in n for n in cosines)
    assert any("gates" in n for n in cosines) == net.selective
    assert min(cosines.values()) > 0.99999, min(cosines, key=cosines.__getitem__)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["classifier_padded", "tagger_softmax", "causal_padded"])
def test_implicit_gradient_by_finite_differences(case: str) -> None:
    net = _net(case)
    x, y = _batch(net)
    net = _tight(net, Implicit(tolerance=1e-13, max_steps=3000))
    grads = gradients(net, x, y)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in ((n, p) for n, p in net.named_parameters() if p.requires_grad):
            direction = torch.randn(p.shape, generator=g, dtype=torch.float64)
            kept, values = p.clone(), []
            for sign in (1, -1):
                p.copy_(kept + sign * 1e-5 * direction)
                values.append(float(net.criterion(net(x), y)))
            p.copy_(kept)
            slope = (values[0] - values[1]) / 2e-5
            assert float((grads[name] * direction).sum()) == pytest.approx(slope, rel=1e-4, abs=1e-7), name


@EACH
def test_shipped_settings_in_float32(case: str) -> None:
    """What is shipped, without any tightening: cosine of the whole gradient, settled, contracting."""
    net = _net(case, torch.float32).eval()
    x, y = _batch(net)
    found = gradients(net, x, y)
    exact = gradients(_tight(net.double(), Implicit(tolerance=1e-12, max_steps=2000)), x, y)
    flat, wanted = (torch.cat([g.double().flatten() for g in part.values()]) for part in (found, exact))
    assert float(flat @ wanted / (flat.norm() * wanted.norm())) > 0.9999
    assert net.equilibrium.last.free is not None
    assert bool(net.equilibrium.last.free.converged.all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@EACH
def test_radius_below_one_at_the_start(case: str, dtype: torch.dtype) -> None:
    net = _net(case, dtype)
    x, _ = _batch(net, 4)
    assert 0.005 < net.radius(x) < 1
    assert len(net.eigenvalues()) == max(1, net.layers)
    assert max(float(a.abs().max()) for a in net.eigenvalues()) < 1


@EACH
def test_updates_are_local(case: str) -> None:
    net = _net(case).eval()
    rows = against_local(net, *_batch(net))
    assert max(row.error for row in rows) < 1e-9


@pytest.mark.parametrize("case", [c for c, (_, o) in CASES.items() if "padding" in o and o.get("pool") != "none"])
def test_padding_changes_nothing(case: str) -> None:
    """Logits and gradients of a short sequence by itself, and filled up to different lengths."""
    net = _tight(_net(case), Implicit(tolerance=1e-12, max_steps=2000))
    g = torch.Generator().manual_seed(4)
    x = torch.randint(1, VOCABULARY, (2, 7), generator=g)
    y = torch.randint(0, CLASSES, (2,) if isinstance(net, StateSpaceClassifier) else (2, 7), generator=g)
    with torch.no_grad():
        logits = net(x)
    wanted = gradients(net, x, y)
    for more in (1, 6):
        padded = torch.cat([x, torch.zeros(2, more, dtype=torch.int64)], 1)
        labels = y if y.dim() == 1 else torch.cat([y, torch.full((2, more), -100)], 1)
        with torch.no_grad():
            found = net(padded)
        torch.testing.assert_close(found if y.dim() == 1 else found[:, :7], logits, rtol=1e-9, atol=1e-10)
        for name, g_found in gradients(net, padded, labels).items():
            torch.testing.assert_close(g_found, wanted[name], rtol=1e-7, atol=1e-9, msg=name)


def test_padding_is_not_read_where_every_token_has_weights_of_its_own() -> None:
    net = _tight(_net("classifier_softmax"), Implicit())
    x, _ = _batch(net)
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.head.linear.weight.unflatten(1, (N, -1))[:, 7:] += 1  # type: ignore[union-attr]
        torch.testing.assert_close(other(x)[0], net(x)[0], rtol=0, atol=0)
        assert float((other(x)[1] - net(x)[1]).abs().max()) > 1e-3


@pytest.mark.parametrize("case", ["causal", "causal_padded", "causal_invariant"])
def test_causal_tokens_hear_no_later_ones(case: str) -> None:
    net = _tight(_net(case), NonConservative())
    x, _ = _batch(net)
    later = x.clone()
    later[:, 6:] = torch.where(later[:, 6:] == 0, 0, 1 + later[:, 6:] % (VOCABULARY - 1))
    with torch.no_grad():
        a, b = net(x), net(later)
    torch.testing.assert_close(a[:, :6], b[:, :6], rtol=1e-9, atol=1e-10)
    assert float((a - b)[:, 6:].abs().max()) > 1e-3


@pytest.mark.parametrize("case", ["tagger", "tagger_softmax", "classifier"])
def test_tokens_hear_both_sides(case: str) -> None:
    net = _tight(_net(case), Centered())
    net.head = nn.Identity()
    x = torch.randint(1, VOCABULARY, (1, N), generator=torch.Generator().manual_seed(5))
    for place in (0, N - 1):
        other = x.clone()
        other[0, place] = 1 + x[0, place] % (VOCABULARY - 1)
        with torch.no_grad():
            moved = (net.equilibrium(x) - net.equilibrium(other)).norm(dim=-1)[0]
        assert float(moved.min()) > 1e-6


@pytest.mark.parametrize("case", ["classifier", "tagger", "causal"])
def test_any_number_of_tokens(case: str) -> None:
    net = _tight(_net(case), Implicit())
    for length in (1, 4, 29):
        x, y = _batch(net, 2, length)
        logits = net(x)
        assert logits.shape == ((2, CLASSES) if case == "classifier" else (2, length, CLASSES))
        net.criterion(logits, y).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("shape", "options", "count"),
    [
        ((1, 6, 8), {"patch": "rows"}, 6),
        ((2, 6, 8), {"patch": 2}, 12),
        ((1, 4, 4), {"patch": 1, "positions": True}, 16),
        ((9, 2), {}, 9),
    ],
)
def test_images_and_numbers(shape: tuple[int, ...], options: dict[str, Any], count: int) -> None:
    torch.manual_seed(0)
    net = StateSpaceClassifier(shape, CLASSES, features=8, hidden=8, **options)
    x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(7))
    assert net.equilibrium(x).shape == (2, count, 8)
    net.criterion(net(x), torch.tensor([0, 2])).backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
    if len(shape) == 2:
        assert net(torch.rand(2, 14, 2)).shape == (2, CLASSES)


def test_a_timestep_encoding_moves_the_start_and_nothing_else() -> None:
    plain, encoded = _net("tagger"), _net("tagger", encoding=6)
    x, y = _batch(plain)
    bindings = [n.equilibrium.dynamics.bind(x) for n in (plain, encoded)]
    starts = [
        n.equilibrium.dynamics.initial(b)["tokens"].detach() for n, b in zip((plain, encoded), bindings, strict=True)
    ]
    assert float((starts[0] - starts[1]).abs().max()) > 1e-2
    exact = Implicit(tolerance=1e-12, max_steps=2000)
    wanted, found = (gradients(_tight(n, exact), x, y) for n in (plain, encoded))
    for name, g in wanted.items():
        torch.testing.assert_close(found[name], g, rtol=1e-7, atol=1e-9)


def _twin(net: TEPSSR) -> OnePass:
    assert isinstance(net.head, Reader)
    return OnePass(net.equilibrium.dynamics, net.head, net.mask)


@EACH
def test_the_twin_has_the_same_parameters_and_a_gradient_for_each(case: str) -> None:
    net = _net(case)
    x, y = _batch(net)
    fresh = net.feedforward().double()
    assert sum(p.numel() for p in fresh.parameters()) == sum(p.numel() for p in net.parameters())
    net.criterion(fresh(x), y).backward()
    assert all(p.grad is not None for p in fresh.parameters() if p.requires_grad)


@pytest.mark.parametrize("case", [c for c, (arch, o) in CASES.items() if not o.get("layers", arch == "classifier")])
def test_the_twin_is_one_pass_of_the_block(case: str) -> None:
    net = _net(case)
    x, _ = _batch(net)
    one = copy.deepcopy(net)
    one.equilibrium.solver = FixedPoint(max_steps=1, tolerance=0.0)
    with torch.no_grad():
        torch.testing.assert_close(_twin(net)(x), one(x), rtol=1e-10, atol=1e-11)


def test_the_twin_of_layers_goes_up_once() -> None:
    net = _net("classifier_two_layers")
    x, _ = _batch(net)
    energy = net.equilibrium.dynamics
    bindings = energy.bind(x)
    with torch.no_grad():
        h = energy.activate(energy.static(bindings), bindings)["tokens"]
        for i, op in enumerate(net.maps()):
            constant = energy.static(bindings)[f"layer{i + 1}"]
            h = (4.0 ** (i + 1) * (op(h, {**op.tensors(), **op.inputs(x)}) + constant)).tanh()
        assert net.mask is not None
        torch.testing.assert_close(_twin(net)(x), net.head(h, net.mask(x)), rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["classifier", "tagger", "causal"])
def test_learns_the_symbol_before_and_keeps_contracting(case: str) -> None:
    """What to say of a token is known to its neighbour only; of a sequence, to its last token but one."""
    more = {"classifier": {"attention": "none", "pool": "last"}, "tagger": {"attention": "none"}, "causal": {}}[case]
    net = _net(case, torch.float32, features=24, hidden=32, **more)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-2)
    g, losses = torch.Generator().manual_seed(9), []
    for _ in range(50):
        x = torch.randint(1, VOCABULARY, (32, N), generator=g)
        y = torch.cat([torch.full((32, 1), -100), x[:, :-1] % CLASSES], 1)
        optimizer.zero_grad()
        loss = net.criterion(net(x), y[:, -1] if case == "classifier" else y)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) / 5 < 0.3 < 0.8 < losses[0]
    assert net.radius(torch.randint(1, VOCABULARY, (8, N), generator=g)) < 1


def test_labels_that_do_not_count() -> None:
    net = _net("tagger")
    logits = torch.randn(2, N, CLASSES, generator=torch.Generator().manual_seed(8))
    y = torch.zeros(2, N, dtype=torch.int64)
    part = y.clone()
    part[:, 4:] = -100
    wanted = nn.functional.cross_entropy(logits[:, :4].flatten(0, 1), part[:, :4].flatten())
    torch.testing.assert_close(net.criterion(logits, part), wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "cosine"}, "expected attention in"),
        ({"features": 9}, "heads that divide features"),
        ({"hidden": 0}, "hidden and states >= 1"),
        ({"norm_bound": 0.0}, "norm_bound None or > 0"),
        ({"padding": 7}, "one of 6 symbols"),
        ({"padding": 0, "vocabulary": 0}, "one of 0 symbols"),
        ({"pool": "max"}, "expected pool in"),
        ({"pool": 0}, "number of parts >= 1"),
        ({"layers": -1}, "layers >= 0"),
        ({"gain": 0.0}, "gain > 0"),
        ({"window": 2}, "1 for symbols"),
        ({"timescale": 0.5}, "timescale None or >= 1"),
        ({"encoding": -1}, "encoding >= 0"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StateSpaceClassifier((N,), CLASSES, **{**SMALL, **options})


def test_refused_inputs() -> None:
    net = _net("tagger", torch.float32)
    for x, message in (
        (torch.rand(2, N), "integer symbols"),
        (torch.full((2, N), VOCABULARY), "symbols in"),
        (torch.full((2, 5), VOCABULARY), "symbols in"),
        (torch.zeros(0, N, dtype=torch.int64), "empty batch"),
        (torch.ones(2, N, 2, dtype=torch.int64), "x of shape"),
    ):
        with pytest.raises(ConfigError, match=message):
            net(x)
    with pytest.raises(ConfigError, match="x of shape"):
        _net("classifier_invariant", torch.float32)(torch.ones(2, N + 1, dtype=torch.int64))
    logits = torch.zeros(2, N, CLASSES)
    for y in (
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(2, N),
        torch.full((2, N), CLASSES),
        torch.full((2, N), -100),
    ):
        with pytest.raises(ConfigError, match="criterion: expected"):
            net.criterion(logits, y)
    assert isinstance(net, StateSpaceTagger)
    with pytest.raises(ConfigError, match="supports this network"):
        CausalStateSpace((N,), CLASSES, estimator=Centered(), **SMALL)
