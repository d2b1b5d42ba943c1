r"""Learning a state-space recurrence while it runs: eligibility traces instead of a graph through time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toreq.core.ssm import RESTING, SSM, inflow
from toreq.errors import ConfigError


class OnlineSSM:
    r"""An :class:`~toreq.core.SSM` run token by token, with the gradient of every past token's loss at hand.

    The recurrence is diagonal, so that a parameter of one channel moves the states of that channel only. Its trace
    :math:`e_t = \partial s_t/\partial\theta` then is a state of its own (Williams and Zipser 1989; Zucchet et al.
    2023),

    .. math:: e_t = a_t e_{t-1} + \frac{\partial a_t}{\partial\theta} s_{t-1} +
              \frac{\partial (b_t v_t)}{\partial\theta}, \qquad
              \frac{dL}{d\theta} = \sum_t\Bigl[\frac{\partial L_t}{\partial\theta} +
              \mathrm{Re}\,\overline{\frac{\partial L_t}{\partial s_{t-1}}}\,e_{t-1}\Bigr]

    and nothing that was computed for an earlier token is kept: memory is B S M (D + ...) numbers at any length.

        online = OnlineSSM(op, batch=len(x))
        for t in range(x.shape[1]):
            loss(head(online.step(x[:, t]).tanh()), y[:, t]).backward()
        online.finish()

    or, to learn at every token, ``finish``, a step of the optimizer and ``zero_grad`` within the loop.

    For one recurrent layer on given inputs that is the gradient of the summed losses, exactly. Inputs that themselves
    come from a graph (an embedding that learns, a recurrent layer below) are given the instantaneous part of their
    gradient only: what they do by way of the state is cut off, and :attr:`truncated` says so.

    Args:
        op: the map; without a mask, and with gates that are one ``nn.Linear`` of the token, or none.
        batch: B.

    Raises:
        ConfigError: for a mask or other gates.
    """

    def __init__(self, op: SSM, batch: int) -> None:
        if op.mask is not None or not isinstance(op.gates, nn.Linear | None):
            raise ConfigError(
                f"OnlineSSM: expected an SSM without a mask and with gates None or one nn.Linear, got mask={op.mask}, "
                f"gates={type(op.gates).__name__}; the trace of other gates' parameters is not per channel"
            )
        self.op, self.truncated = op, False
        self._effective: dict[str, Tensor] = {}
        self._leaf: dict[str, Tensor] = {}
        channels, states = op.log_rate.shape
        wide = torch.complex128 if op.log_rate.dtype == torch.float64 else torch.complex64
        self._state = torch.zeros(batch, channels, states, dtype=wide, device=op.log_rate.device)
        # of step sizes and input gates, the last column is the bias
        inputs = {"log_rate": 0, "frequency": 0, "weight": op.in_shape[0]}
        if isinstance(op.gates, nn.Linear):
            inputs |= {"step": op.gates.in_features + 1, "gate_in": op.gates.in_features + 1}
        self._traces = {k: self._state[..., None].expand(*self._state.shape, max(n, 1)) for k, n in inputs.items()}

    def _bind(self) -> None:
        """Take the operator's parameters as they are now."""
        op = self.op
        c, d = op.coefficients()
        self._effective = {
            "weight": op.project.tensors()["weight"],
            "log_rate": op.log_rate,
            "frequency": op.frequency,
            "c": c,
            "d": d,
        }
        if isinstance(op.gates, nn.Linear):
            self._effective["gates"] = op.gates.weight
            self._effective["gate_bias"] = op.gates.bias
        # copies: an optimizer changes parameters in place
        self._leaf = {k: v.detach().clone().requires_grad_() for k, v in self._effective.items()}

    @property
    def size(self) -> int:
        """Numbers kept from token to token."""
        return self._state.numel() + sum(t.numel() for t in self._traces.values())

    def step(self, u: Tensor, x: Tensor | None = None) -> Tensor:
        """The output for the next token, ``(B, M)``; backward through it leaves this token's share of the gradient.

        Args:
            u: the token, ``(B, D)``.
            x: what the gates read, ``(B, F)``; u when None.
        """
        x = u if x is None else x
        if not self._leaf:
            self._bind()
        self.truncated = self.truncated or u.requires_grad or x.requires_grad
        p = self._leaf
        with torch.enable_grad():
            before = self._state.detach().requires_grad_()
            traces = self._traces
            before.register_hook(lambda q: self._credit(q, traces))
            v = F.linear(u, p["weight"])
            step, gate_in, gate_out = self._gates(x)
            root = inflow(p["log_rate"].exp() * step)
            read = torch.complex(p["c"][0], p["c"][1]) * root * before
            out = gate_out[..., 0] * read.real.sum(-1) + p["d"] * v
        self._move(u.detach(), x.detach(), v.detach(), (step.detach(), gate_in.detach()))
        return out

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step sizes and gates ``(B, M, 1)``."""
        if "gates" not in self._leaf:
            one = torch.ones_like(self._leaf["d"])[None, :, None]
            return one, one, one
        raw = F.linear(x, self._leaf["gates"], self._leaf["gate_bias"])[..., None]
        step, gate_in, gate_out = raw.chunk(3, 1)
        return F.softplus(step + RESTING), gate_in.sigmoid(), gate_out.sigmoid()

    @torch.no_grad()
    def _move(self, u: Tensor, x: Tensor, v: Tensor, gates: tuple[Tensor, Tensor]) -> None:
        """One token on: the traces first, from the state before."""
        step, gate = gates
        rate, omega = self._leaf["log_rate"].exp(), self._leaf["frequency"]
        lam = torch.complex(-rate, omega)
        size = (-rate * step).exp()
        a, root = torch.polar(size, omega * step), inflow(rate * step)
        s, v = self._state, v[..., None]
        # d root / d step; none where the root's own argument is held above 0
        steeper = torch.where(rate * step > torch.finfo(rate.dtype).tiny, rate * size / (2 * root), 0.0)
        moves = {
            "log_rate": (-rate * step * a * s + steeper * step * gate * v)[..., None],
            "frequency": (1j * step * a * s)[..., None],
            "weight": (root * gate)[..., None] * u[:, None, None],
        }
        if "step" in self._traces:
            seen = torch.cat([x, torch.ones_like(x[:, :1])], 1)[:, None, None]
            slope = -torch.expm1(-step)  # of softplus, at its value
            moves["step"] = (slope * (lam * a * s + steeper * gate * v))[..., None] * seen
            moves["gate_in"] = (gate * (1 - gate) * root * v)[..., None] * seen
        self._traces = {k: a[..., None] * e + moves[k] for k, e in self._traces.items()}
        self._state = a * s + root * gate * v

    @torch.no_grad()
    def _credit(self, q: Tensor, traces: dict[str, Tensor]) -> None:
        """Add what a cotangent of the state says of the parameters, through the traces of that moment."""
        found = {k: torch.einsum("bms,bms...->ms...", q.conj(), e).real for k, e in traces.items()}
        self._add("log_rate", found["log_rate"][..., 0])
        self._add("frequency", found["frequency"][..., 0])
        self._add("weight", found["weight"].sum(1))
        if "step" in found:
            rows = torch.cat([found["step"].sum(1), found["gate_in"].sum(1)])
            rest = torch.zeros_like(rows[: rows.shape[0] // 2])  # output gates have no part in the state
            rows = torch.cat([rows, rest])
            self._add("gates", rows[:, :-1])
            self._add("gate_bias", rows[:, -1])

    def _add(self, name: str, grad: Tensor) -> None:
        leaf, grad = self._leaf[name], grad.contiguous()
        leaf.grad = grad if leaf.grad is None else leaf.grad + grad

    def finish(self) -> None:
        """Hand the gradient of all tokens so far to the operator's parameters; the state and its traces stay.

        The next token is read with the parameters as they are then. After a step of an optimizer the traces are those
        of earlier weights, an error of the order of that step.
        """
        pairs = [(self._effective[k], p.grad) for k, p in self._leaf.items() if p.grad is not None]
        torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])
        self._effective, self._leaf = {}, {}


__all__ = ["OnlineSSM"]
