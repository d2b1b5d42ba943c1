r"""The state of a state-space map at the borders of a segment: what it does to the tokens after it, and what is left.

A sequence may be cut into segments. The map over the whole is, on a later segment, the map over that segment alone and
the free response of the state at its border.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from toreq.core.ssm import SSM, inflow
from toreq.errors import ConfigError


@dataclass(frozen=True)
class _Passage:
    """What happens at each token: ``(B or 1, N, M)``, the root ``(B or 1, N, M, S)``."""

    step: Tensor
    gate_in: Tensor
    gate_out: Tensor
    root: Tensor


def _passage(op: SSM, x: Any, length: int) -> _Passage:
    rate = op.log_rate.exp()
    one = torch.ones(1, length, op.out_shape[0], dtype=rate.dtype, device=rate.device)
    step, gate_in, gate_out = (one, one, one) if op.gates is None else op.steps(x)
    root = inflow(rate * step[..., None])
    if op.mask is not None:
        mask = op.mask(x).to(rate.dtype)[..., None]
        gate_in, gate_out = gate_in * mask, gate_out * mask
        step = step * mask if op.selective else step
    return _Passage(step, gate_in, gate_out, root)


def _decay(op: SSM, time: Tensor) -> Tensor:
    """Complex decay over a time ``(..., M)``: ``(..., M, S)``."""
    return torch.polar((-op.log_rate.exp() * time[..., None]).exp(), op.frequency * time[..., None])


def response(op: SSM, state: Tensor, x: Any, length: int) -> Tensor:
    r"""What a state at the border adds to the map's output,
    :math:`y_t = g^{out}_t\sum_k\mathrm{Re}\bigl(c_k\sqrt{1 - |a_{tk}|}\prod_{j<t} a_{jk}\,s_{0k}\bigr)`.

    Args:
        op: the map.
        state: :math:`s_0`, complex ``(B, M, S)``.
        x: the input, which gates and mask read.
        length: N.

    Returns:
        ``(B, N, M)``.
    """
    _check(op, state)
    at = _passage(op, x, length)
    c = torch.complex(*op.coefficients()[0].unbind(0))
    before = at.step.cumsum(1) - at.step
    return at.gate_out * (at.root * (c * _decay(op, before) * state[:, None]).real).sum(-1)


def advance(op: SSM, u: Tensor, state: Tensor, x: Any) -> Tensor:
    r"""The state after a segment, :math:`s_N = \prod_t a_t\,s_0 + \sum_t\prod_{j>t} a_j\,g^{in}_t\sqrt{1-|a_t|}\,v_t`.

    Args:
        op: the map.
        u: the segment's tokens, ``(B, N, D)``.
        state: :math:`s_0`, complex ``(B, M, S)``.
        x: the input, which gates and mask read.

    Returns:
        complex ``(B, M, S)``.
    """
    _check(op, state)
    at = _passage(op, x, u.shape[1])
    v = F.linear(u, op.project.tensors()["weight"])
    total = at.step.sum(1, keepdim=True)
    written = (at.gate_in * v)[..., None] * at.root * _decay(op, total - at.step.cumsum(1))
    return _decay(op, total[:, 0]) * state + written.sum(1)


def at_rest(op: SSM, batch: int) -> Tensor:
    """The state before anything was written: zeros, complex ``(B, M, S)``."""
    return torch.zeros(batch, *op.log_rate.shape, dtype=_complex(op), device=op.log_rate.device)


def _complex(op: SSM) -> torch.dtype:
    return torch.complex128 if op.log_rate.dtype == torch.float64 else torch.complex64


def _check(op: SSM, state: Tensor) -> None:
    if state.dim() != 3 or state.shape[1:] != op.log_rate.shape or state.dtype != _complex(op):
        raise ConfigError(
            f"SSM: expected a state {_complex(op)} of shape (B, {', '.join(map(str, op.log_rate.shape))}), got "
            f"{state.dtype} {tuple(state.shape)}; begin with at_rest(op, batch)"
        )


__all__ = ["advance", "at_rest", "response"]
