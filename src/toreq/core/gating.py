"""Two nodes joined through gates: units that are closed neither send nor receive."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from toreq.core.couplings import Coupling, Only, flat
from toreq.core.operators import Operator
from toreq.core.state import Bound, State, difference, dot, mean, per_example
from toreq.errors import ConfigError


class GatedBilinear(Coupling):
    r"""Two nodes joined by one operator and a gate at each end:
    :math:`K = \langle g_{post} * h_{post}, A(g_{pre} * h_{pre})\rangle`.

    Field: :math:`g_{post} * A(g_{pre} * h_{pre})` on ``post`` and :math:`g_{pre} * A^\top(g_{post} * h_{post})` on
    ``pre``. A gate is a function of the input alone, constant while the network settles; one that has parameters is
    learned by contrast.

    Args:
        op: operator from the shape of ``pre`` to that of ``post``.
        pre, post: two different nodes.
        gate_pre, gate_post: modules mapping ``x`` to gates that broadcast to ``(B, *node_shape)``; one with a true
            attribute ``flat`` opens and closes without a slope, and no gradient is computed for it.
    """

    analytic = True
    linear = True
    self_reading = False

    def __init__(self, op: Operator, pre: str, post: str, gate_pre: nn.Module, gate_post: nn.Module) -> None:
        super().__init__([pre, post])
        if pre == post:
            raise ConfigError(
                f"GatedBilinear: expected two different nodes, got {pre!r} twice; use Lateral(op, {pre!r}, gate)"
            )
        self.op, self.pre, self.post, self.gate_pre, self.gate_post = op, pre, post, gate_pre, gate_post

    def bind(self, x: Any) -> Bound:
        return Bound(self.op.tensors(), {"gate_pre": self.gate_pre(x), "gate_post": self.gate_post(x)})

    def value(self, h: State, bound: Bound) -> Tensor:
        return dot(bound["gate_post"] * h[self.post], self.op(bound["gate_pre"] * h[self.pre], bound.shared))

    def field(self, h: State, bound: Bound) -> State:
        acc: State = {}
        self.add_field(acc, h, bound)
        return acc

    def add_field(self, acc: State, h: State, bound: Bound, only: Only = None) -> None:
        below, above = bound["gate_pre"], bound["gate_post"]
        parts: State = {}
        if only is None or self.post in only:
            parts[self.post] = above * self.op(below * h[self.pre], bound.shared)
        if only is None or self.pre in only:
            parts[self.pre] = below * self.op.adjoint(above * h[self.post], bound.shared)
        for n, f in parts.items():
            acc[n] = acc[n] + f if n in acc else f

    def gradient(self, plus: State, minus: State, weight: Tensor, bound: Bound) -> dict[str, Tensor]:
        # <p+, A q+> - <p-, A q-> = <dp, A mq> + <mp, A dq>, as for Bilinear: differences before products
        d, m = difference(plus, minus), mean(plus, minus)
        dp = d[self.post] * per_example(weight, d[self.post])
        mp = m[self.post] * per_example(weight, m[self.post])
        below, above = bound["gate_pre"], bound["gate_post"]
        ends = torch.cat([above * dp, above * mp]), torch.cat([below * m[self.pre], below * d[self.pre]])
        grads = self.op.gradient(*ends, bound.shared)
        if not (flat(self.gate_pre) and flat(self.gate_post)):
            up = dp * self.op(below * m[self.pre], bound.shared) + mp * self.op(below * d[self.pre], bound.shared)
            down = m[self.pre] * self.op.adjoint(above * dp, bound.shared)
            down = down + d[self.pre] * self.op.adjoint(above * mp, bound.shared)
            grads["gate_post"], grads["gate_pre"] = up.sum_to_size(above.shape), down.sum_to_size(below.shape)
        return grads
