"""States at the borders of segments: against the whole scan; networks that read a sequence in segments."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from toreq.core import SSM, Standardize
from toreq.core.ssm_state import advance, at_rest, response
from toreq.diagnostics.gradients import gradients
from toreq.errors import ConfigError
from toreq.estimators import Implicit
from toreq.systems.tepssr_memory import Recirculated
from toreq.systems.tepssr_nets import CausalStateSpace, StateSpaceClassifier, StateSpaceTagger
from toreq.systems.tepssr_parts import Segment

N, VOCABULARY, CLASSES = 13, 6, 3


class Positive(nn.Module):
    """Tokens whose first number is above -1 count."""

    def forward(self, x: Tensor) -> Tensor:
        return x[..., 0] > -1


def _op(selective: bool, masked: bool) -> SSM:
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(1)
    op = SSM(
        3, 4, 2, nn.Linear(3, 12) if selective else None, Positive() if masked else None, chunk=5, generator=g
    )  # fmt: skip
    return op.double()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("selective", [False, True])
@pytest.mark.parametrize("cut", [1, 6, 12])
def test_two_segments_make_the_whole_scan(selective: bool, masked: bool, cut: int) -> None:
    op = _op(selective, masked)
    g = torch.Generator().manual_seed(2)
    u, x = (torch.randn(2, N, 3, generator=g, dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        whole = op(u, {**op.tensors(), **op.inputs(x)})
        state, found = at_rest(op, 2), []
        for part, seen in ((u[:, :cut], x[:, :cut]), (u[:, cut:], x[:, cut:])):
            own = op(part, {**op.tensors(), **op.inputs(seen)})
            found.append(own + response(op, state, seen, part.shape[1]))
            state = advance(op, part, state, seen)
        torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(state, advance(op, u, at_rest(op, 2), x), rtol=1e-10, atol=1e-12)
        alone = op(u[:, cut:], {**op.tensors(), **op.inputs(x[:, cut:])})
    assert float((found[1] - alone).abs().max()) > 1e-4


def test_a_state_of_another_shape_or_type_is_refused() -> None:
    op = _op(False, False)
    u = torch.zeros(2, 5, 3, dtype=torch.float64)
    for state in (torch.zeros(2, 4, 2), at_rest(op, 2)[:, :3]):
        with pytest.raises(ConfigError, match="begin with at_rest"):
            response(op, state, u, 5)
        with pytest.raises(ConfigError, match="begin with at_rest"):
            advance(op, u, state, u)


def _causal() -> CausalStateSpace:
    torch.manual_seed(0)
    net = CausalStateSpace((N,), CLASSES, features=8, hidden=10, states=2, vocabulary=VOCABULARY, chunk=4).double()
    net.equilibrium.solver = replace(net.equilibrium.solver, tolerance=1e-12, max_steps=2000)
    return net.eval()


def _symbols(batch: int = 2, length: int = N) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("size", [1, 5, 20])
def test_a_causal_network_in_segments_says_what_it_says_of_the_whole(size: int) -> None:
    net, x = _causal(), _symbols()
    with torch.no_grad():
        torch.testing.assert_close(
            Recirculated(net, decay=1e-12).over(x, size), net(x), rtol=1e-8, atol=1e-9
        )  # fmt: skip


def test_gradients_on_a_segment_are_those_of_its_equilibrium() -> None:
    """Shipped estimator against the implicit gradient and finite differences, with a state that is not empty."""
    torch.manual_seed(0)
    net = StateSpaceTagger(
        (N,), CLASSES, features=8, hidden=10, layers=2, gain=2.0, states=2, vocabulary=VOCABULARY, chunk=4
    ).double()
    net.equilibrium.solver = replace(net.equilibrium.solver, tolerance=1e-12, max_steps=2000)
    net.equilibrium.estimator = replace(net.equilibrium.estimator, beta=1e-3, tolerance=1e-8, max_steps=2000)
    x, y = _symbols(), torch.randint(CLASSES, (2, N), generator=torch.Generator().manual_seed(4))
    g = torch.Generator().manual_seed(5)
    states = tuple(
        torch.complex(*torch.randn(2, 2, *op.log_rate.shape, generator=g, dtype=torch.float64)) for op in net.maps()
    )

    class Begun(nn.Module):
        def __init__(self, own: StateSpaceTagger) -> None:
            super().__init__()
            self.net, self.equilibrium, self.criterion = own, own.equilibrium, own.criterion

        def forward(self, x: Tensor) -> Tensor:
            return self.net.head(self.equilibrium(Segment(x, states)))

    exact = copy.deepcopy(net)
    exact.equilibrium.estimator = Implicit(tolerance=1e-12, max_steps=2000)
    found, wanted = gradients(Begun(net), x, y), gradients(Begun(exact), x, y)
    flat, goal = (torch.cat([t.flatten() for t in part.values()]) for part in (found, wanted))
    assert float(torch.nn.functional.cosine_similarity(flat, goal, dim=0)) > 0.99999
    name = next(n for n in wanted if n.endswith("log_rate"))
    parameter = dict(Begun(exact).named_parameters())[name]
    direction = torch.randn(parameter.shape, generator=g, dtype=torch.float64)
    values = []
    with torch.no_grad():
        for sign in (1, -2):
            parameter += sign * 1e-5 * direction
            values.append(float(exact.criterion(Begun(exact)(x), y)))
    slope = (values[0] - values[1]) / 2e-5
    assert float((wanted[name] * direction).sum()) == pytest.approx(slope, rel=1e-4)


def test_the_ring_gives_a_weighted_mean_of_border_states_and_padding_is_not_written() -> None:
    torch.manual_seed(0)
    net = StateSpaceTagger((N,), CLASSES, features=8, hidden=4, vocabulary=VOCABULARY, padding=0, attention="none")
    model = Recirculated(net, slots=3, decay=0.5)
    x = _symbols(2, 6)
    memory = model.empty(2)
    assert not any(bool(s.abs().any()) for s in model.recall(memory))
    seen = []
    for _ in range(4):
        before = model.recall(memory)
        with torch.no_grad():
            _, memory = model(x, memory)
            h = net.equilibrium.solve(Segment(x, before)).h["tokens"]
            seen.append(advance(net.maps()[0], h, before[0], x))
    mean = (seen[-1] + seen[-2] / 2 + seen[-3] / 4) / 1.75
    torch.testing.assert_close(model.recall(memory)[0], mean, rtol=1e-3, atol=1e-5)
    padded = torch.cat([x, torch.zeros(2, 3, dtype=torch.int64)], 1)
    with torch.no_grad():
        _, one = model(x, model.empty(2))
        _, other = model(padded, model.empty(2))
    torch.testing.assert_close(model.recall(one)[0], model.recall(other)[0], rtol=1e-3, atol=1e-5)


def test_a_classifier_says_what_its_last_segment_says_and_learns() -> None:
    torch.manual_seed(0)
    net = StateSpaceClassifier((N, 2), CLASSES, features=8, hidden=10, attention="none")
    model = Recirculated(net)
    logits = model.over(torch.randn(4, 11, 2, generator=torch.Generator().manual_seed(6)), 4)
    assert logits.shape == (4, CLASSES)
    net.criterion(logits, torch.tensor([0, 1, 2, 0])).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters() if p.requires_grad)
    assert net.equilibrium.last.free is not None


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="rows of numbers"):
        Recirculated(StateSpaceClassifier((1, 6, 6), CLASSES, features=8, hidden=8))
    with pytest.raises(ConfigError, match="any length"):
        Recirculated(StateSpaceClassifier((N, 2), CLASSES, features=8, hidden=8, positions=True))
    with pytest.raises(ConfigError, match="at least 1 token"):
        Recirculated(_causal()).over(_symbols(), 0)


@pytest.mark.parametrize("selective", [False, True])
def test_segments_of_padding_alone_change_nothing(selective: bool) -> None:
    torch.manual_seed(0)
    net = StateSpaceClassifier(
        (8,), CLASSES, features=8, hidden=10, vocabulary=VOCABULARY, padding=0, pool="mean", selective=selective
    )
    whole = Recirculated(net.double().eval(), slots=3, decay=0.5)
    short, long = _symbols(2, 10), _symbols(1, 22)
    padded = torch.cat([torch.cat([short, torch.zeros(2, 12, dtype=torch.long)], 1), long])
    with torch.no_grad():
        found = whole.over(padded, 5)
        torch.testing.assert_close(found[:2], whole.over(short, 5), rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(found[2:], whole.over(long, 5), rtol=1e-7, atol=1e-9)
        # a pause of padding between segments: the rings are where they were, each at its own age
        _, memory = whole(short[:, :5], whole.empty(2))
        _, waited = whole(torch.zeros(2, 5, dtype=torch.long), memory)
        for _ in range(2):
            for a, b in zip(whole.recall(memory), whole.recall(waited), strict=True):
                torch.testing.assert_close(a, b)
            (_, memory), (_, waited) = (whole(short[:, 5:], m) for m in (memory, waited))


def test_segments_of_a_network_with_standardised_inputs() -> None:
    torch.manual_seed(0)
    net = StateSpaceClassifier((8, 1), CLASSES, features=8, hidden=10, pool="mean", window=1).eval()
    x = torch.randn(2, 12, 1, generator=torch.Generator().manual_seed(4))
    plain = Recirculated(net, slots=2).over(x, 4)
    net.standardize(Standardize([3.0], [2.0]))
    torch.testing.assert_close(Recirculated(net, slots=2).over(2 * x + 3, 4), plain)
