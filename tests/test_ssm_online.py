"""Eligibility traces of a state-space layer against its gradient through time, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from test_ssm import KINDS, B, D, M, _draw, _op
from toreq.core import SSM, control_norm
from toreq.core.ssm_online import OnlineSSM
from toreq.errors import ConfigError


def _losses(y: Tensor, weight: Tensor) -> Tensor:
    """A loss for every token, ``(B, N)``, nonlinear in the outputs ``(B, N, M)``."""
    return (weight * y.tanh()).sum(-1).square()


def _by_traces(op: SSM, x: Tensor, weight: Tensor) -> tuple[dict[str, Tensor], OnlineSSM]:
    op.zero_grad()
    online = OnlineSSM(op, B)
    for t in range(x.shape[1]):
        _losses(online.step(x[:, t]), weight[:, t]).sum().backward()
    online.finish()
    return {n: p.grad.clone() for n, p in op.named_parameters() if p.grad is not None}, online


@pytest.mark.parametrize("bound", [None, 0.3])
@KINDS
def test_traces_give_the_gradient_through_time(selective: bool, bound: float | None) -> None:
    op, x, weight = _op(selective), _draw(17, D, 1), _draw(17, M, 2)
    if bound is not None:
        control_norm(op.project, bound)
        op.eval()
    _losses(op(x, {**op.tensors(), **op.inputs(x)}), weight).sum().backward()
    wanted = {n: p.grad.clone() for n, p in op.named_parameters() if p.grad is not None}
    found, online = _by_traces(op, x, weight)
    assert set(found) == set(wanted)
    for name, g in wanted.items():
        torch.testing.assert_close(found[name], g, rtol=1e-10, atol=1e-12, msg=name)
    assert not online.truncated


def test_traces_do_not_grow_with_the_sequence() -> None:
    op = _op(True)
    short, long = (_by_traces(op, _draw(n, D, 1), _draw(n, M, 2))[1] for n in (3, 60))
    assert short.size == long.size == B * M * op.states * (1 + 1 + 1 + D + 2 * (D + 1))
    assert not any(t.requires_grad for t in (long._state, *long._traces.values()))


def test_stacked_traces_are_truncated_and_say_so() -> None:
    below, above, x, weight = _op(False), _op(False), _draw(9, D, 1), _draw(9, M, 2)
    lift = _draw(M, D, 3, batch=1)[0]
    _losses(above((below(x) @ lift).tanh()), weight).sum().backward()
    exact_above = {n: p.grad.clone() for n, p in above.named_parameters() if p.grad is not None}
    exact_below = {n: p.grad.clone() for n, p in below.named_parameters() if p.grad is not None}
    below.zero_grad()
    above.zero_grad()
    first, second = OnlineSSM(below, B), OnlineSSM(above, B)
    for t in range(9):
        _losses(second.step((first.step(x[:, t]) @ lift).tanh()), weight[:, t]).sum().backward()
    first.finish()
    second.finish()
    assert second.truncated
    assert not first.truncated
    for name, p in above.named_parameters():
        torch.testing.assert_close(p.grad, exact_above[name], rtol=1e-10, atol=1e-12)
    assert below.log_rate.grad is not None
    assert float((below.log_rate.grad - exact_below["log_rate"]).norm() / exact_below["log_rate"].norm()) > 1e-2


@pytest.mark.parametrize("bound", [None, 0.3])
@KINDS
def test_learning_while_it_runs(selective: bool, bound: float | None) -> None:
    op, x, weight = _op(selective), _draw(12, D, 1), _draw(12, M, 2)
    if bound is not None:
        control_norm(op.project, bound)
    optimizer = torch.optim.SGD(op.parameters(), lr=1e-3)
    online, before = OnlineSSM(op, B), {n: p.detach().clone() for n, p in op.named_parameters()}
    state = online._state
    for t in range(12):
        _losses(online.step(x[:, t]), weight[:, t]).sum().backward()
        online.finish()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(p, before[n]) for n, p in op.named_parameters())
    assert float((online._state - state).abs().max()) > 0
    # what the next token is read with are the parameters as they are now
    fresh = OnlineSSM(op, B)
    fresh._state, fresh._traces = online._state, online._traces
    op.eval()
    torch.testing.assert_close(online.step(x[:, 0]), fresh.step(x[:, 0]))


def test_a_closed_step_has_a_finite_gradient_in_float32() -> None:
    op, x, weight = _op(True).float(), _draw(9, D, 1).float(), _draw(9, M, 2).float()
    assert isinstance(op.gates, nn.Linear)
    with torch.no_grad():
        op.gates.bias[:M] = -18.0
    found, _ = _by_traces(op, x, weight)
    op.zero_grad()
    _losses(op(x, {**op.tensors(), **op.inputs(x)}), weight).sum().backward()
    for name, p in op.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=2e-3, atol=1e-6, msg=name)


def test_traces_refuse_what_they_cannot_hold() -> None:
    with pytest.raises(ConfigError, match="mask"):
        OnlineSSM(_op(False, masked=True), 2)
    gates = nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, 3 * M))
    with pytest.raises(ConfigError, match="not per channel"):
        OnlineSSM(SSM(D, M, gates=gates), 2)
