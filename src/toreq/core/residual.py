"""Any ordinary module as a term of an energy, and as a vector field."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from toreq.core.blocks import INPUT, Map
from toreq.core.couplings import Coupling, Only, _leaf
from toreq.core.state import Bound, State, dot
from toreq.errors import ConfigError

_BATCH_STATISTICS = (nn.modules.batchnorm._BatchNorm,)
_RANDOM = (nn.modules.dropout._DropoutNd,)


def check_block(where: str, block: nn.Module) -> None:
    """Refuse modules that have no equilibrium of their own: batch statistics, and noise redrawn at every step.

    Raises:
        ConfigError: naming the offending submodule and what to use instead.
    """
    for name, module in block.named_modules():
        if isinstance(module, _BATCH_STATISTICS):
            raise ConfigError(
                f"{where}: expected a block whose output for one example depends on that example only, got "
                f"{type(module).__name__} at {name!r}; use LayerNorm or GroupNorm"
            )
        # layers call their own rate "p", attention and recurrent modules call it "dropout"
        rate = module.p if isinstance(module, _RANDOM) else getattr(module, "dropout", 0.0)
        if isinstance(rate, float) and rate > 0:
            raise ConfigError(
                f"{where}: expected a deterministic block, got {type(module).__name__}(p={rate}) at "
                f"{name!r}; "
                "noise redrawn at every step has no fixed point: set it to 0 or put dropout outside the equilibrium"
            )


def bind_block(block: nn.Module, x: Tensor | None) -> Bound:
    """A block's parameters and buffers, and the input if it takes one."""
    batched = {} if x is None else {INPUT: x}
    if isinstance(block, Map):
        return Bound(shared=block.tensors(), batched=batched)
    return Bound(shared={**dict(block.named_parameters()), **dict(block.named_buffers())}, batched=batched)


def call_block(block: nn.Module, bound: Bound, *args: Any) -> Any:
    """The block as a function of its bound tensors."""
    if isinstance(block, Map):
        return block.run(args[0], bound)[0]
    if INPUT in bound.batched:
        args = (*args, bound.batched[INPUT])
    return functional_call(block, bound.shared, args)


class Linearised(ABC):
    """A prediction at one state, with its adjoint there; ``out`` is detached."""

    out: Tensor

    @abstractmethod
    def back(self, c: Tensor, message: bool, gradient: bool) -> tuple[Tensor | None, dict[str, Tensor]]:
        r""":math:`J^\top c` for the source if ``message`` (None without a source), and the gradient of
        :math:`\langle c, f\rangle` in the bound tensors if ``gradient``; may be asked again and again."""


class _ClosedForm(Linearised):
    def __init__(self, term: Residual, h: State, bound: Bound) -> None:
        assert isinstance(term.block, Map)
        self.term, self.bound = term, bound
        self.out, self.saved = term.block.run(term.reads(h, bound), bound)
        term.check_shape(self.out, h)

    def back(self, c: Tensor, message: bool, gradient: bool) -> tuple[Tensor | None, dict[str, Tensor]]:
        block = self.term.block
        assert isinstance(block, Map)
        grads: dict[str, Tensor] | None = {} if gradient else None
        pulled = block.pull(c, self.saved, self.bound, grads)
        if self.term.source is None:
            if grads is not None:  # the first argument is the input
                grads[INPUT] = grads[INPUT] + pulled if INPUT in grads else pulled
            return None, grads or {}
        if not message:
            return None, grads or {}
        return (torch.zeros_like(pulled) if self.term.muted else pulled), grads or {}


class _ByAutograd(Linearised):
    def __init__(self, term: Residual, h: State, bound: Bound) -> None:
        self.leaf = bound.map(_leaf, _leaf)
        self.source: Tensor | None = None
        with torch.enable_grad():
            if term.source is not None:
                self.source = h[term.source].detach().requires_grad_()
                h = {**h, term.source: self.source}
            self.f = term.prediction(h, self.leaf)
        self.out = self.f.detach()

    def back(self, c: Tensor, message: bool, gradient: bool) -> tuple[Tensor | None, dict[str, Tensor]]:
        wanted = {k: t for g in (self.leaf.shared, self.leaf.batched) for k, t in g.items() if t.requires_grad}
        wanted = wanted if gradient else {}
        source = [self.source] if message and self.source is not None else []
        if not self.f.requires_grad or not (wanted or source):
            return (torch.zeros_like(source[0]) if source else None), {}
        inputs = [*source, *wanted.values()]
        found = torch.autograd.grad(self.f, inputs, c.detach(), retain_graph=True, allow_unused=True)
        first = None
        if source:
            first, *found = found
            first = torch.zeros_like(source[0]) if first is None else first
        return first, {k: g for k, g in zip(wanted, found, strict=True) if g is not None}


class Residual(Coupling):
    r"""A predicted node: :math:`K = \tfrac12\|h\|^2 - \tfrac12\|h - f(h_s; x)\|^2`, so that :math:`E` is the
    squared error.

    Field (source s = node): :math:`f + J^\top(h - f)`; any ordinary module serves as f. Its vector-Jacobian products
    are those of autograd, or closed forms for a :class:`~toreq.core.blocks.Map`.

    Args:
        block: f, called as ``f(h_s)``, ``f(h_s, x)`` or ``f(x)``; deterministic and without batch statistics.
        node: the predicted node; its activation must be the identity.
        source: the node f reads, often the same one; None for a block of the input only.
        inject: pass ``x`` as the last argument.
        drive: module through which ``x`` passes once per relaxation, by ordinary autograd, before the block sees it.
    """

    def __init__(
        self,
        block: nn.Module,
        node: str,
        source: str | None = None,
        inject: bool = True,
        drive: nn.Module | None = None,
    ) -> None:
        super().__init__([node] if source is None else [node, source])
        if not inject and (source is None or drive is not None):
            raise ConfigError(
                "Residual: expected a source node or inject=True, got neither; the block needs an argument"
                if source is None
                else "Residual: expected inject=True with a drive, got inject=False; the drive would not be read"
            )
        check_block("Residual", block)
        self.block, self.node, self.source, self.inject, self.drive = block, node, source, inject, drive
        self.muted = False

    def bind(self, x: Tensor) -> Bound:
        if not self.inject:
            return bind_block(self.block, None)
        return bind_block(self.block, x if self.drive is None else self.drive(x))

    def reads(self, h: State, bound: Bound) -> Tensor:
        """The block's first argument: the source's state, zeros while muted, or the input where there is no source."""
        if self.source is None:
            return bound.batched[INPUT]
        return torch.zeros_like(h[self.source]) if self.muted else h[self.source]

    def check_shape(self, out: Tensor, h: State) -> None:
        """Refuse a loop whose block changes the shape."""
        if self.source == self.node and out.shape != h[self.node].shape:
            raise ConfigError(
                f"Residual: expected the block to return {tuple(h[self.node].shape)} on node {self.node!r}, got "
                f"{tuple(out.shape)}; a loop needs an output of its input's shape"
            )

    def prediction(self, h: State, bound: Bound) -> Tensor:
        """:math:`f(h_s; x)`."""
        if self.source is None and not isinstance(self.block, Map):
            out = call_block(self.block, bound)
        else:
            out = call_block(self.block, bound, self.reads(h, bound))
        self.check_shape(out, h)
        return out

    def value(self, h: State, bound: Bound) -> Tensor:
        e = h[self.node] - self.prediction(h, bound)
        return 0.5 * dot(h[self.node], h[self.node]) - 0.5 * dot(e, e)

    def linearised(self, h: State, bound: Bound) -> Linearised:
        """The prediction at ``h`` and its adjoint there."""
        return (_ClosedForm if isinstance(self.block, Map) else _ByAutograd)(self, h, bound)

    def field(self, h: State, bound: Bound) -> State:
        if torch.is_grad_enabled():
            return super().field(h, bound)
        at = self.linearised(h, bound)
        if self.source is None:
            return {self.node: at.out}
        g, _ = at.back(h[self.node] - at.out, message=True, gradient=False)
        assert g is not None
        return {self.node: at.out + g} if self.source == self.node else {self.node: at.out, self.source: g}

    def add_field(self, acc: State, h: State, bound: Bound, only: Only = None) -> None:
        if only is None or any(n in only for n in self.nodes):
            super().add_field(acc, h, bound, only)


def forward_order(terms: Sequence[Residual]) -> tuple[str, ...] | None:
    """The predicted nodes in an order in which each follows the one it reads, or None where they form a ring."""
    source = {c.node: c.source for c in terms}
    order: dict[str, None] = {}
    for n in source:
        path: list[str] = []
        step: str | None = n
        while step is not None and step not in order:
            if step in path or step not in source:
                return None
            path.append(step)
            step = source[step]
        order.update(dict.fromkeys(reversed(path)))
    return tuple(order)


__all__ = ["Linearised", "Residual", "bind_block", "call_block", "check_block", "forward_order"]
