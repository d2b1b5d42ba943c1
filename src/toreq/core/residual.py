"""Any ordinary module as a term of an energy, and as a vector field."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from toreq.core.couplings import Coupling, Only, _grads, _leaf
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
    shared = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    return Bound(shared=shared, batched={} if x is None else {"<x>": x})


def call_block(block: nn.Module, bound: Bound, *args: Any) -> Any:
    """The block as a function of its bound tensors."""
    if "<x>" in bound.batched:
        args = (*args, bound.batched["<x>"])
    return functional_call(block, bound.shared, args)


class Residual(Coupling):
    r"""A predicted node: :math:`K = \tfrac12\|h\|^2 - \tfrac12\|h - f(h_s; x)\|^2`, so that :math:`E` is the
    squared error.

    Field (source s = node): :math:`f + J^\top(h - f)`, by one vector-Jacobian product; any ordinary module serves as f.

    Args:
        block: f, called as ``f(h_s)``, ``f(h_s, x)`` or ``f(x)``; deterministic and without batch statistics.
        node: the predicted node; its activation must be the identity.
        source: the node f reads, often the same one; None for a block of the input only.
        inject: pass ``x`` as the last argument.
    """

    def __init__(self, block: nn.Module, node: str, source: str | None = None, inject: bool = True) -> None:
        super().__init__([node] if source is None else [node, source])
        if source is None and not inject:
            raise ConfigError(
                "Residual: expected a source node or inject=True, got neither; the block needs an argument"
            )
        check_block("Residual", block)
        self.block, self.node, self.source, self.inject = block, node, source, inject
        self.muted = False

    def bind(self, x: Tensor) -> Bound:
        return bind_block(self.block, x if self.inject else None)

    def prediction(self, h: State, bound: Bound) -> Tensor:
        """:math:`f(h_s; x)`."""
        if self.source is None:
            out = call_block(self.block, bound)
        else:
            source = torch.zeros_like(h[self.source]) if self.muted else h[self.source]
            out = call_block(self.block, bound, source)
            if self.source == self.node and out.shape != source.shape:
                raise ConfigError(
                    f"Residual: expected the block to return {tuple(source.shape)} on node {self.node!r}, got "
                    f"{tuple(out.shape)}; a loop needs an output of its input's shape"
                )
        return out

    def value(self, h: State, bound: Bound) -> Tensor:
        e = h[self.node] - self.prediction(h, bound)
        return 0.5 * dot(h[self.node], h[self.node]) - 0.5 * dot(e, e)

    def _linearised(self, h: State, bound: Bound) -> tuple[Tensor, Tensor]:
        assert self.source is not None
        with torch.enable_grad():
            s = h[self.source].detach().requires_grad_()
            return s, self.prediction({**h, self.source: s}, bound)

    def transpose(self, h: State, bound: Bound, cotangent: Tensor) -> Tensor:
        r""":math:`J^\top c` at the source, with J the block's Jacobian at ``h``."""
        s, f = self._linearised(h, bound)
        return torch.autograd.grad(f, s, cotangent, materialize_grads=True)[0]

    def prediction_gradient(self, h: State, bound: Bound, cotangent: Tensor) -> dict[str, Tensor]:
        r"""Gradient of :math:`\langle c, f(h_s; x)\rangle` with respect to the bound tensors, from this block's
        states."""
        with torch.enable_grad():
            leaf = bound.map(_leaf, _leaf)
            source = {} if self.source is None else {self.source: h[self.source].detach()}
            total = (cotangent.detach() * self.prediction(source, leaf)).sum()
        return _grads(total, leaf)

    def field(self, h: State, bound: Bound) -> State:
        if torch.is_grad_enabled():
            return super().field(h, bound)
        if self.source is None:
            return {self.node: self.prediction(h, bound)}
        s, f = self._linearised(h, bound)
        out = f.detach()
        (g,) = torch.autograd.grad(f, s, h[self.node] - out, materialize_grads=True)
        return {self.node: out + g} if self.source == self.node else {self.node: out, self.source: g}

    def add_field(self, acc: State, h: State, bound: Bound, only: Only = None) -> None:
        if only is None or any(n in only for n in self.nodes):
            super().add_field(acc, h, bound, only)
