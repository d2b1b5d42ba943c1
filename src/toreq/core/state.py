"""States of a network, and the tensors that a relaxation is bound to.

A *state* maps node names to tensors of shape ``(B, *node_shape)``. What depends on the input and the weights only
(drives, effective weights, gates) is computed once per relaxation and kept in a :class:`Bound`, one per component.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

State = dict[str, Tensor]


@dataclass(frozen=True)
class Bound:
    """Tensors that one component (a coupling or an activation) needs during a relaxation.

    Args:
        shared: tensors without a batch axis, e.g. an effective weight ``(out, in)``.
        batched: tensors whose first axis is the batch, e.g. a drive ``(B, N, D)``.
    """

    shared: dict[str, Tensor] = field(default_factory=dict)
    batched: dict[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Tensor:
        return self.shared[key] if key in self.shared else self.batched[key]

    def map(self, shared: Callable[[Tensor], Tensor], batched: Callable[[Tensor], Tensor]) -> Bound:
        """Apply one function to every shared tensor and another to every batched one."""
        return Bound({k: shared(v) for k, v in self.shared.items()}, {k: batched(v) for k, v in self.batched.items()})


Bindings = dict[str, Bound]
"""Component name -> what that component is bound to."""


def _same(t: Tensor) -> Tensor:
    return t


def leaves(bindings: Bindings) -> list[Tensor]:
    """All bound tensors in a fixed order (components in order, shared before batched)."""
    return [t for b in bindings.values() for group in (b.shared, b.batched) for t in group.values()]


def with_leaves(bindings: Bindings, new: Iterable[Tensor]) -> Bindings:
    """The same structure with other tensors, in the order of :func:`leaves`."""
    it = iter(new)
    return {
        name: Bound({k: next(it) for k in b.shared}, {k: next(it) for k in b.batched}) for name, b in bindings.items()
    }


def detached(bindings: Bindings) -> Bindings:
    """The same tensors outside of any graph."""
    return {name: b.map(torch.Tensor.detach, torch.Tensor.detach) for name, b in bindings.items()}


def repeated(bindings: Bindings, times: int) -> Bindings:
    """The batch stacked ``times`` times along its first axis: ``(B, ...) -> (times * B, ...)``."""
    return {name: b.map(_same, lambda t: joined([t] * times)) for name, b in bindings.items()}


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape one after the other along the batch, in the memory order of the first.

    ``torch.cat`` turns an order of its own, as a scan's channels first, into the usual one, and every operation of both
    orders then takes several times as long.
    """
    first = parts[0]
    if first.dim() < 3 or first.is_contiguous():
        return torch.cat(list(parts))
    if first.stride(0) == 0 and all(part is first for part in parts):
        return first[:1].expand(len(parts) * first.shape[0], *first.shape[1:])
    order = sorted(range(first.dim()), key=first.stride, reverse=True)
    if not first.permute(order).is_contiguous():
        return torch.cat(list(parts))
    whole = torch.cat([part.permute(order) for part in parts], order.index(0))
    return whole.permute([order.index(i) for i in range(first.dim())])


def laid_out(t: Tensor, like: Tensor) -> Tensor:
    """The same numbers in the memory order of another tensor of that shape."""
    if t.stride() == like.stride() or t.shape != like.shape or t.dim() < 3:
        return t
    return torch.empty_like(like, dtype=t.dtype).copy_(t)


def rows(t: Tensor, index: Tensor) -> Tensor:
    """The examples ``index`` (int64, ``(b,)``) of one tensor, in its memory format."""
    # index_select would turn channels-last into channels-first, in which convolutions are several times slower
    return t[index] if t.dim() == 4 else t.index_select(0, index)


def selected(bindings: Bindings, index: Tensor) -> Bindings:
    """The examples ``index`` (int64, ``(b,)``) of the batch."""
    return {name: b.map(_same, lambda t: rows(t, index)) for name, b in bindings.items()}


def cast(bindings: Bindings, dtype: torch.dtype) -> Bindings:
    """Every floating or complex tensor in another dtype; integer and boolean tensors as they are."""

    def to(t: Tensor) -> Tensor:
        return t.to(dtype) if t.is_floating_point() or t.is_complex() else t

    return {name: b.map(to, to) for name, b in bindings.items()}


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product per example, without conjugation: ``(B, ...), (B, ...) -> (B,)``."""
    return (a * b).sum(dim=tuple(range(1, a.dim())))


def sum_squares(state: State) -> Tensor:
    """Squared Euclidean norm per example over all nodes: ``(B,)``, real."""
    total: Tensor | None = None
    for t in state.values():
        # not flatten(1): that would copy a channels-last state
        n = torch.linalg.vector_norm(t, dim=tuple(range(1, t.dim()))).square()
        total = n if total is None else total + n
    if total is None:
        raise ValueError("sum_squares: expected at least one node, got an empty state; give the network a node")
    return total


def norm(state: State) -> Tensor:
    """Euclidean norm per example over all nodes: ``(B,)``, real."""
    if len(state) == 1:
        (t,) = state.values()
        return torch.linalg.vector_norm(t, dim=tuple(range(1, t.dim())))
    return sum_squares(state).sqrt()


def per_example(weight: Tensor, like: Tensor) -> Tensor:
    """A ``(B,)`` vector reshaped to multiply a ``(B, ...)`` tensor."""
    return weight.view(-1, *([1] * (like.dim() - 1)))


def chosen(which: Tensor, first: State, second: State) -> State:
    """The examples of ``first`` where ``which`` ``(B,)`` is true, those of ``second`` elsewhere."""
    return {n: torch.where(per_example(which, t), t, second[n]) for n, t in first.items()}


def chosen_pair(which: Tensor, first: tuple[State, State], second: tuple[State, State]) -> tuple[State, State]:
    """`chosen` for pre-activations and states ``(a, h)`` together."""
    return chosen(which, first[0], second[0]), chosen(which, first[1], second[1])


def scaled(state: State, weight: Tensor) -> State:
    """Every node times one number per example."""
    return {k: t * per_example(weight, t) for k, t in state.items()}


def added(a: State, b: State) -> State:
    """Node by node sum; a node missing on one side counts as zero there."""
    out = dict(a)
    for k, t in b.items():
        out[k] = out[k] + t if k in out else t
    return out


def stacked(*states: State) -> State:
    """States of the same nodes put into one larger batch."""
    return {k: joined([s[k] for s in states]) for k in states[0]}


def take(state: State, index: Tensor) -> State:
    """The examples ``index`` of every node."""
    return {k: rows(t, index) for k, t in state.items()}


def halves(state: State) -> tuple[State, State]:
    """The first and the second half of a stacked batch."""
    size = next(iter(state.values())).shape[0] // 2
    return {k: t[:size] for k, t in state.items()}, {k: t[size:] for k, t in state.items()}


def difference(a: State, b: State) -> State:
    """Node by node ``a - b``."""
    return {k: t - b[k] for k, t in a.items()}


def mean(a: State, b: State) -> State:
    """Node by node ``(a + b) / 2``."""
    return {k: torch.lerp(t, b[k], 0.5) for k, t in a.items()}


def at_least_float(t: Tensor) -> Tensor:
    """Half precision as float32: under autocast or with half-precision weights a drive arrives in few digits, and a
    contrast of equilibria needs them."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t
