"""Attention as an energy: softmax attention (Energy Transformer) and its linear-time form."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from toreq.core.couplings import Coupling, _logistic, _softplus
from toreq.core.nodes import log_sum_exp, softmax
from toreq.core.state import Bound, State, per_example
from toreq.errors import ConfigError


class _Heads(Coupling):
    """Queries and keys of one token node ``(B, N, D)``, several heads."""

    analytic = True

    def __init__(
        self,
        node: str,
        features: int,
        heads: int = 4,
        head_features: int | None = None,
        inverse_temperature: float | None = None,
        scale: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__([node])
        if heads < 1 or features < 1:
            raise ConfigError(f"{type(self).__name__}: expected heads, features >= 1, got {heads}, {features}")
        head_features = head_features or max(1, features // heads)
        self.node, self.heads, self.head_features = node, heads, head_features
        self.inverse_temperature = 1 / math.sqrt(head_features) if inverse_temperature is None else inverse_temperature
        if not self.inverse_temperature > 0:
            raise ConfigError(
                f"{type(self).__name__}: expected inverse_temperature > 0, got {inverse_temperature}; leave it None"
            )
        std = 0.5 / math.sqrt(features) if scale is None else scale
        rows = heads * head_features
        self.query = nn.Parameter(torch.randn(rows, features, generator=generator) * std)
        self.key = nn.Parameter(torch.randn(rows, features, generator=generator) * std)

    def bind(self, x: Any) -> Bound:
        return Bound(shared={"qk": torch.cat([self.query, self.key])})

    def _project(self, h: Tensor, bound: Bound) -> tuple[Tensor, Tensor]:
        qk = nn.functional.linear(h, bound["qk"]).unflatten(-1, (2, self.heads, self.head_features))
        q, k = qk.permute(2, 0, 3, 1, 4)
        return q, k

    def _merge(self, dq: Tensor, dk: Tensor, bound: Bound) -> Tensor:
        both = torch.stack([dq, dk]).permute(1, 3, 0, 2, 4).flatten(2)
        return both @ bound["qk"]


class Attention(_Heads):
    r"""Softmax attention as a coupling of one token node (Hoover et al. 2023, Energy Transformer).

    .. math:: K = \frac1b\sum_{heads}\sum_i\log\sum_j\exp(b\,\langle q_i, k_j\rangle), \quad q = W_q h,\ k = W_k h

    Its field has two parts, one through the queries (ordinary attention with the keys as values) and one through
    the keys.

    Args:
        node: name of a node of shape ``(N, D)``.
        features: D.
        heads: number of heads.
        head_features: size of queries and keys per head; ``D // heads`` when None.
        inverse_temperature: b; :math:`1/\sqrt{\text{head\_features}}` when None.
        scale: standard deviation of the initial weights; :math:`0.5/\sqrt D` when None.
        generator: source of the initial weights.
    """

    def value(self, h: State, bound: Bound) -> Tensor:
        q, k = self._project(h[self.node], bound)
        b = self.inverse_temperature
        return log_sum_exp(b * q @ k.transpose(-1, -2)).flatten(1).sum(1) / b

    def field(self, h: State, bound: Bound) -> State:
        q, k = self._project(h[self.node], bound)
        p = softmax(self.inverse_temperature * q @ k.transpose(-1, -2))
        return {self.node: self._merge(p @ k, p.transpose(-1, -2) @ q, bound)}

    def gradient(self, plus: State, minus: State, weight: Tensor, bound: Bound) -> dict[str, Tensor]:
        if plus[self.node].is_complex():
            return super().gradient(plus, minus, weight, bound)
        # every quantity as its mean and its difference over the two states: differences are formed before products, so
        # that a small nudge loses no digits
        d, m = plus[self.node] - minus[self.node], torch.lerp(plus[self.node], minus[self.node], 0.5)
        (dq, dk), (mq, mk) = self._project(d, bound), self._project(m, bound)
        b = self.inverse_temperature
        logits = b * (mq @ mk.transpose(-1, -2) + 0.25 * dq @ dk.transpose(-1, -2))
        change = b * (mq @ dk.transpose(-1, -2) + dq @ mk.transpose(-1, -2))
        low = (logits - 0.5 * change).softmax(-1)
        dp = low * (change - torch.log1p((low * change.expm1()).sum(-1, keepdim=True))).expm1()
        mp = low + 0.5 * dp
        dp_t, mp_t = dp.transpose(-1, -2), mp.transpose(-1, -2)
        # of the fields on queries and keys, p k and p^T q
        df = torch.stack([dp @ mk + mp @ dk, dp_t @ mq + mp_t @ dq])
        mf = torch.stack([mp @ mk + 0.25 * dp @ dk, mp_t @ mq + 0.25 * dp_t @ dq])
        fields = torch.cat([df, mf], 1).permute(1, 3, 0, 2, 4).flatten(2)
        states = torch.cat([m * per_example(weight, m), d * per_example(weight, d)])
        return {"qk": fields.flatten(0, 1).T @ states.flatten(0, 1)}


class LinearAttention(_Heads):
    r"""Attention with a positive feature map, linear in the number of tokens.

    .. math:: K = \frac1b\sum_{heads}\sum_i\log\,\langle\psi(q_i), \textstyle\sum_j\psi(k_j)\rangle,
              \quad \psi(z) = \mathrm{softplus}(z)

    Args: as for :class:`Attention`.
    """

    def value(self, h: State, bound: Bound) -> Tensor:
        q, k = self._project(h[self.node], bound)
        z = (_softplus(q) * _softplus(k).sum(-2, keepdim=True)).sum(-1)
        return z.log().flatten(1).sum(1) / self.inverse_temperature

    def field(self, h: State, bound: Bound) -> State:
        q, k = self._project(h[self.node], bound)
        fq, total = _softplus(q), _softplus(k).sum(-2, keepdim=True)
        z = (fq * total).sum(-1, keepdim=True) * self.inverse_temperature
        dq = _logistic(q) * total / z
        dk = _logistic(k) * (fq / z).sum(-2, keepdim=True)
        return {self.node: self._merge(dq, dk, bound)}
