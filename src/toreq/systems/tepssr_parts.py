"""The parts of TEP-SSR: streams of tokens with padding, attention that overlooks it, dynamics of any length, heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toreq.core import SSM, Attention, Bindings, Bound, Dynamics, Energy, LinearAttention, State, VectorField
from toreq.core.couplings import Only
from toreq.core.functions import tanh
from toreq.core.ssm_state import response
from toreq.errors import ConfigError, nearest
from toreq.systems.looped_transformer import Tokens

POOLS = ("mean", "last", "none")
_HIDDEN = 1e9
"""What the scores of padding are lowered by: enough for an exponential of exactly 0."""


class Segment(NamedTuple):
    """A part of a longer sequence, and what the state-space maps hold where it begins.

    Attributes:
        x: the input of this part.
        states: of each map from the tokens upwards, complex ``(B, M, S)``.
    """

    x: Tensor
    states: tuple[Tensor, ...]


def content(x: Tensor | Segment) -> Tensor:
    """The input itself."""
    return x.x if isinstance(x, Segment) else x


class Real(nn.Module):
    """Which tokens are no padding, ``(B, N)``, true for those that count.

    Args:
        padding: the symbol that fills up short sequences.
    """

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.padding = padding

    def forward(self, x: Tensor | Segment) -> Tensor:
        return content(x) != self.padding


class Stream(Tokens):
    """An input as tokens ``(B, N, D)`` of mean 0 and variance 1 each; zeros for padding.

    Args:
        input_shape: ``(C, H, W)`` for images, ``(N, F)`` for F numbers at each position, ``(N,)`` for symbols.
        features: D.
        patch: height and width of an image's patches (1 for its pixels), or ``"rows"``.
        vocabulary: number of symbols; 0 for images and numbers.
        positions: add learned positions; without, any number of tokens will do.
        mask: tells padding; None where there is none.
        window: a token is made of this many of the input's rows, patches, pixels or positions: its own and those before
            it.

    Raises:
        ConfigError: for a window below 1, or one over symbols.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        features: int,
        patch: int | str,
        vocabulary: int,
        positions: bool = False,
        mask: Real | None = None,
        window: int = 1,
    ) -> None:
        if window < 1 or (window > 1 and vocabulary):
            raise ConfigError(
                f"Stream: expected a window >= 1, and 1 for symbols, got {window}; symbols are embedded one by one"
            )
        numbers = len(input_shape) == 2 and not vocabulary
        shape, patch = ((1, *input_shape), "rows") if numbers else (tuple(input_shape), patch)
        super().__init__(shape, features, patch, vocabulary, window)
        self.numbers, self.features, self.mask = numbers, features, mask
        if not positions:
            del self.position
            self.register_buffer("position", torch.zeros(()), persistent=False)

    def length(self, x: Tensor | Segment) -> int:
        """How many tokens an input has: symbols and numbers come one by one, images do not."""
        return content(x).shape[1] if self.size is None or self.numbers else self.count

    def forward(self, x: Tensor | Segment) -> Tensor:
        x = content(x)
        out = F.layer_norm(super().forward(x[:, None] if self.numbers else x), (self.features,))
        return out if self.mask is None else out * self.mask(x)[..., None]


class Carried(nn.Module):
    """What reaches a state-space map's output beside its tokens, ``(B, N, M)``: a learned constant, and on a segment
    the response of the state with which it begins.

    Args:
        op: the map.
        place: of its state among those of a segment.
        stream: says how many tokens an input has.
        constant: learn one.
    """

    def __init__(self, op: SSM, place: int, stream: Stream, constant: bool) -> None:
        super().__init__()
        # the coupling has it as a module
        self._op, self._stream, self.place = (op,), (stream,), place
        self.value = nn.Parameter(torch.zeros(op.out_shape)) if constant else None

    def forward(self, x: Tensor | Segment) -> Tensor:
        (op,), (stream,) = self._op, self._stream
        size, length = content(x).shape[0], stream.length(x)
        value = op.log_rate.new_zeros(op.out_shape) if self.value is None else self.value
        out = value.expand(size, length, -1)
        return out + response(op, x.states[self.place], x, length) if isinstance(x, Segment) else out


class MaskedAttention(Attention):
    """:class:`~toreq.core.Attention` among the tokens that count.

    Args:
        mask: module mapping ``x`` to ``(B, N)``.
        others: as for the base class.
    """

    def __init__(self, mask: nn.Module, *others: Any, **more: Any) -> None:
        super().__init__(*others, **more)
        self.mask = mask

    def bind(self, x: Any) -> Bound:
        return Bound(super().bind(x).shared, {"mask": self.mask(x).to(self.query.dtype)})

    def among(self, bound: Bound) -> tuple[Tensor, Tensor]:
        mask = bound["mask"]
        return _HIDDEN * (mask - 1)[:, None, None], mask[:, None, :, None]


class MaskedLinearAttention(LinearAttention):
    """:class:`~toreq.core.LinearAttention` among the tokens that count.

    Args: as for :class:`MaskedAttention`.
    """

    def __init__(self, mask: nn.Module, *others: Any, **more: Any) -> None:
        super().__init__(*others, **more)
        self.mask = mask

    def bind(self, x: Any) -> Bound:
        return Bound(super().bind(x).shared, {"mask": self.mask(x).to(self.query.dtype)})

    def among(self, bound: Bound) -> Tensor:
        return bound["mask"][:, None, :, None]


class _Elastic(Dynamics):
    r"""Dynamics of nodes ``(N, D)`` that take any N, and that may be started with a timestep encoding.

    Step k < K of the start has :math:`(1 - k/K)\,e_k` added to the field of the first node, the tokens, :math:`e_k`
    the sinusoids of k; from K on the encoding is constant (zero), so the equilibrium and its gradient are those without
    it, and it learns nothing.
    """

    elastic: bool = False
    encoding: int = 0

    def prepared(self, x: Any) -> Any:
        return x._replace(x=super().prepared(x.x)) if isinstance(x, Segment) else super().prepared(x)

    def initial(self, bindings: Bindings) -> State:
        a = super().initial(bindings)  # type: ignore[safe-super]
        static = self.static(bindings) if self.encoding else {}
        for k in range(self.encoding):
            h = self.activate(a, bindings)
            a = self.map(h, bindings, static)
            a[self.names[0]] = a[self.names[0]] + (1 - k / self.encoding) * sinusoids(k, a[self.names[0]])
        return a

    def _check_shape(self, what: str, name: str, t: Tensor, size: int) -> None:
        if self.elastic and t.dim() == 3:
            t = t[:, :1].expand(-1, self.shapes[name][0], -1)
        super()._check_shape(what, name, t, size)


class TokenEnergy(_Elastic, Energy):
    """An energy of tokens that takes any number of them."""


class CausalBlock(nn.Module):
    r""":math:`V\tanh(S_x h + c)` with a causal S: a token hears itself and those before it.

    Args:
        op: S, from D to M features.
        scale: standard deviation of the initial V; half of :math:`1/\sqrt M` when None.
    """

    def __init__(self, op: SSM, scale: float | None = None) -> None:
        super().__init__()
        (features,), (hidden,) = op.in_shape, op.out_shape
        self.op = op
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.out = nn.Linear(hidden, features, bias=False)
        nn.init.normal_(self.out.weight, std=0.5 / math.sqrt(hidden) if scale is None else scale)

    def bind(self, x: Any) -> Bound:
        """All that does not depend on the state."""
        bound = Bound({**self.op.tensors(), "bias": self.bias, "out": self.out.weight}, self.op.inputs(x))
        if isinstance(x, Segment):
            bound.batched["carried"] = response(self.op, x.states[0], x, x.x.shape[1])
        return bound

    def run(self, h: Tensor, bound: Bound) -> Tensor:
        """The block at ``h``, ``(B, N, D)``."""
        z = self.op(h, {**bound.shared, **bound.batched})
        z = z + bound["carried"] if "carried" in bound.batched else z
        out = F.linear(tanh(z + bound["bias"]), bound["out"])
        # the bias alone would move padding
        return out * bound["mask"] if "mask" in bound.batched else out

    def forward(self, h: Tensor, x: Any) -> Tensor:
        return self.run(h, self.bind(x))


class CausalField(_Elastic, VectorField):
    """A :class:`CausalBlock` as a field, with what depends on the input alone computed once per relaxation."""

    def _bind(self, x: Any, rounded: bool) -> Bindings:
        assert isinstance(self.block, CausalBlock)
        assert self.drive is not None
        return {"block": self.block.bind(x), "drive": Bound(batched={"drive": self.drive(x)})}

    def field(self, h: State, bindings: Bindings, static: State | None = None, only: Only = None) -> State:
        assert isinstance(self.block, CausalBlock)
        static = self.static(bindings) if static is None else static
        (name,) = self.names
        own = torch.zeros_like(h[name]) if self.muted else h[name]
        out = self.block.run(own, bindings["block"])
        return {name: out + static[name] if name in static else out}


def sinusoids(step: int, like: Tensor) -> Tensor:
    """The encoding of a step (Vaswani et al. 2017), ``(D,)`` for a tensor ``(..., D)``: sines, then cosines."""
    features = like.shape[-1]
    half = -(-features // 2)
    place = torch.arange(half, device=like.device, dtype=torch.float64)
    angle = step * torch.exp(place * (-math.log(10_000.0) / max(half - 1, 1)))
    return torch.cat([angle.sin(), angle.cos()])[:features].to(like)


class Reader(nn.Module):
    """A linear read-out of tokens ``(B, N, D)``.

    Args:
        count, features: N and D.
        num_classes: number of logits.
        pool: a number K reads the means of K parts of the sequence, equally long, with weights of their own;
            ``"mean"`` the mean of all tokens that count (K = 1), ``"last"`` the last one of these, ``"none"`` all with
            weights of their own, ``"tokens"`` each by itself: ``(B, N, num_classes)``.

    Raises:
        ConfigError: for another pool.
    """

    def __init__(self, count: int, features: int, num_classes: int, pool: int | str) -> None:
        super().__init__()
        if not (pool in (*POOLS, "tokens") if isinstance(pool, str) else isinstance(pool, int) and pool >= 1):
            raise ConfigError(
                f"TEPSSR: expected pool in {POOLS} or a number of parts >= 1, got {pool!r}; {nearest(str(pool), POOLS)}"
            )
        self.pool = pool
        self.parts = {"none": count, "last": 1, "mean": 1, "tokens": 1}[pool] if isinstance(pool, str) else pool
        self.linear = nn.Linear(self.parts * features, num_classes)

    def forward(self, h: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            h = h * mask[..., None]
        if self.pool == "none":
            h = h.flatten(1)
        elif self.pool == "last":
            h = h[:, -1] if mask is None else h[torch.arange(len(h), device=h.device), _last(mask)]
        elif self.pool != "tokens":
            h = _averages(h, mask, self.parts).flatten(1)
        return self.linear(h)


def _averages(h: Tensor, mask: Tensor | None, parts: int) -> Tensor:
    """Means ``(B, K, D)`` over K parts of the tokens that count; parts overlap where there are fewer tokens than that,
    and are zero where there is none."""
    if mask is None:
        mask = torch.ones(1, h.shape[1], dtype=torch.bool, device=h.device)
    place, total = (mask.cumsum(1) - 1)[:, None], mask.sum(1)[:, None, None]
    part = torch.arange(parts, device=h.device)[:, None]
    low, high = part * total // parts, -(-(part + 1) * total // parts)
    inside = mask[:, None] & (place >= low) & (place < high)
    return (inside / (high - low).clamp_min(1)).to(h.dtype) @ h


def _last(mask: Tensor) -> Tensor:
    """Where the last true of each row is, ``(B,)``."""
    place = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, place, 0).amax(1)


class OnePass(nn.Module):
    """The same drive and one pass upwards of the same block, for ordinary backprop.

    Args:
        dynamics: of the tokens, and of what is above them.
        head: its read-out.
        mask: tells padding; None where there is none.
    """

    def __init__(self, dynamics: Dynamics, head: Reader, mask: Real | None) -> None:
        super().__init__()
        self.dynamics, self.head, self.mask = dynamics, head, mask

    def forward(self, x: Tensor) -> Tensor:
        own = self.dynamics
        bindings = own.bind(x)
        static = own.static(bindings)
        h = own.activate(static, bindings)
        # upwards, with nothing to come down: what is above has not been computed yet
        h |= {name: torch.zeros_like(h[name]) for name in own.names[1:]}
        for name in own.names:
            only = frozenset([name])
            h |= own.activate(own.map(h, bindings, static, only), bindings, only)
        return self.head(h[own.names[-1]], None if self.mask is None else self.mask(x))
