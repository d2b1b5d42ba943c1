"""Attention as an energy: softmax attention (Energy Transformer) and its linear-time form."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from toreq.core.couplings import Coupling, _logistic, _logistic_rise, _softplus
from toreq.core.functions import log_sum_exp, softmax
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

    def among(self, bound: Bound) -> tuple[Tensor, Tensor] | None:
        """What is added to all scores and what multiplies the queries' terms ``(B, 1, N, 1)``, where only some tokens
        take part; None where all do."""
        return None

    def _scores(self, q: Tensor, k: Tensor, bound: Bound) -> Tensor:
        scores, some = self.inverse_temperature * q @ k.transpose(-1, -2), self.among(bound)
        return scores if some is None else scores + some[0]

    def _counted(self, p: Tensor, bound: Bound) -> Tensor:
        some = self.among(bound)
        return p if some is None else p * some[1]

    def value(self, h: State, bound: Bound) -> Tensor:
        logs = log_sum_exp(self._scores(*self._project(h[self.node], bound), bound))
        return self._counted(logs[..., None], bound).flatten(1).sum(1) / self.inverse_temperature

    def field(self, h: State, bound: Bound) -> State:
        q, k = self._project(h[self.node], bound)
        p = self._counted(softmax(self._scores(q, k, bound)), bound)
        return {self.node: self._merge(p @ k, p.transpose(-1, -2) @ q, bound)}

    def gradient(self, plus: State, minus: State, weight: Tensor, bound: Bound) -> dict[str, Tensor]:
        if plus[self.node].is_complex():
            return super().gradient(plus, minus, weight, bound)
        # every quantity as its mean and its difference over the two states: differences are formed before products, so
        # that a small nudge loses no digits
        d, m = plus[self.node] - minus[self.node], torch.lerp(plus[self.node], minus[self.node], 0.5)
        (dq, dk), (mq, mk) = self._project(d, bound), self._project(m, bound)
        b = self.inverse_temperature
        logits = self._scores(mq, mk, bound) + 0.25 * b * dq @ dk.transpose(-1, -2)
        change = b * (mq @ dk.transpose(-1, -2) + dq @ mk.transpose(-1, -2))
        low = (logits - 0.5 * change).softmax(-1)
        dp = low * (change - torch.log1p((low * change.expm1()).sum(-1, keepdim=True))).expm1()
        dp, mp = self._counted(dp, bound), self._counted(low + 0.5 * dp, bound)
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

    def among(self, bound: Bound) -> Tensor | None:
        """1 for tokens that take part and 0 for others, ``(B, 1, N, 1)``; None where all do."""
        return None

    def value(self, h: State, bound: Bound) -> Tensor:
        q, k = self._project(h[self.node], bound)
        some, keys = self.among(bound), _softplus(k)
        z = (_softplus(q) * (keys if some is None else keys * some).sum(-2, keepdim=True)).sum(-1)
        if some is not None:
            # a row of padding has a sum too, unless all is padding
            z = torch.where(some[..., 0] != 0, z, torch.ones_like(z))
        return z.log().flatten(1).sum(1) / self.inverse_temperature

    def field(self, h: State, bound: Bound) -> State:
        q, k = self._project(h[self.node], bound)
        some, fq, keys = self.among(bound), _softplus(q), _softplus(k)
        total = (keys if some is None else keys * some).sum(-2, keepdim=True)
        share = self._share((fq * total).sum(-1, keepdim=True), some)
        dq = _logistic(q) * total * share
        dk = _logistic(k) * (fq * share).sum(-2, keepdim=True)
        return {self.node: self._merge(dq, dk if some is None else dk * some, bound)}

    def _share(self, z: Tensor, some: Tensor | None) -> Tensor:
        """1/(b z), 0 for tokens that take no part."""
        if some is None:
            return 1 / (z * self.inverse_temperature)
        return some / (torch.where(some != 0, z, torch.ones_like(z)) * self.inverse_temperature)

    def gradient(self, plus: State, minus: State, weight: Tensor, bound: Bound) -> dict[str, Tensor]:
        if plus[self.node].is_complex():
            return super().gradient(plus, minus, weight, bound)
        # as for Attention: mean and difference of every quantity over the two states
        d, m = plus[self.node] - minus[self.node], torch.lerp(plus[self.node], minus[self.node], 0.5)
        (dq, dk), (mq, mk) = self._project(d, bound), self._project(m, bound)
        some = self.among(bound)
        q, k, q_slope, k_slope = _soft(mq, dq), _soft(mk, dk), _rising(mq, dq), _rising(mk, dk)
        if some is not None:
            k, k_slope = _each(lambda t: t * some, k), _each(lambda t: t * some, k_slope)
        total = _each(lambda t: t.sum(-2, keepdim=True), k)
        z = _each(lambda t: t.sum(-1, keepdim=True), _product(q, total))
        high, low = (self._share(z[0] + sign * z[1], some) for sign in (0.5, -0.5))
        share = 0.5 * (high + low), -z[1] * self.inverse_temperature * high * low
        on_q = _product(_product(q_slope, total), share)
        on_k = _product(k_slope, _each(lambda t: t.sum(-2, keepdim=True), _product(q, share)))
        fields = torch.cat([torch.stack([on_q[i], on_k[i]]) for i in (1, 0)], 1).permute(1, 3, 0, 2, 4).flatten(2)
        states = torch.cat([m * per_example(weight, m), d * per_example(weight, d)])
        return {"qk": fields.flatten(0, 1).T @ states.flatten(0, 1)}


_Pair = tuple[Tensor, Tensor]  # mean and difference over two states


def _each(f: Callable[[Tensor], Tensor], pair: _Pair) -> _Pair:
    """A linear map of both."""
    return f(pair[0]), f(pair[1])


def _product(a: _Pair, b: _Pair) -> _Pair:
    return a[0] * b[0] + 0.25 * a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def _soft(m: Tensor, d: Tensor) -> _Pair:
    low = m - 0.5 * d
    rise = torch.log1p(d.expm1() * _logistic(low))
    return _softplus(low) + 0.5 * rise, rise


def _rising(m: Tensor, d: Tensor) -> _Pair:
    high, low = _logistic(m + 0.5 * d), _logistic(m - 0.5 * d)
    return 0.5 * (high + low), _logistic_rise(d, high, low)
