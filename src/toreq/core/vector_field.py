"""Vector fields: networks whose field need not be the gradient of any energy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from toreq.core.couplings import Only
from toreq.core.energy import Dynamics
from toreq.core.nodes import Node
from toreq.core.residual import bind_block, call_block, check_block
from toreq.core.state import Bindings, Bound, State
from toreq.errors import ConfigError


class VectorField(Dynamics):
    """A field that need not be the gradient of any energy: an ordinary module read as ``a <- block(h, x)``.

    It has no energy to contrast: train it by ``NonConservative``, ``Implicit`` or ``Unrolled``.

    Args:
        node: the node, or several.
        block: called as ``block(h, x)`` (or ``block(h)`` with ``inject=False``) with ``h`` of shape ``(B,
            *node.shape)`` and a result of that shape; with several nodes, both are dictionaries.
        inject: pass ``x``; otherwise a ``drive`` must carry the input.
        drive: module mapping ``x`` to a constant part of the field on the first node, computed once.

    Raises:
        ConfigError: for a block with batch statistics or dropout, or when nothing carries the input.
    """

    def __init__(
        self,
        node: Node | Sequence[Node],
        block: nn.Module,
        inject: bool = True,
        drive: nn.Module | None = None,
    ) -> None:
        nodes = [node] if isinstance(node, Node) else list(node)
        super().__init__(nodes)
        check_block("VectorField", block)
        if not inject and drive is None:
            raise ConfigError("VectorField: expected inject=True or a drive, got neither; the input would not enter")
        self.single = isinstance(node, Node)
        self.block, self.inject, self.drive = block, inject, drive
        self.muted = False

    @contextlib.contextmanager
    def couplings_off(self) -> Iterator[None]:
        """A context in which the block reads zeros instead of the state."""
        self.muted = True
        try:
            yield
        finally:
            self.muted = False

    def _bind(self, x: Any, rounded: bool) -> Bindings:
        out = {"block": bind_block(self.block, x if self.inject else None)}
        if self.drive is not None:
            out["drive"] = Bound(batched={"drive": self.drive(x)})
        return out

    def static(self, bindings: Bindings) -> State:
        return {self.names[0]: bindings["drive"]["drive"]} if "drive" in bindings else {}

    def field(self, h: State, bindings: Bindings, static: State | None = None, only: Only = None) -> State:
        static = self.static(bindings) if static is None else static
        h = {n: torch.zeros_like(t) for n, t in h.items()} if self.muted else h
        arg: Any = h[self.names[0]] if self.single else h
        out: Any = call_block(self.block, bindings["block"], arg)
        fields: State = {self.names[0]: out} if self.single else dict(out)
        for n, t in fields.items():
            if t.shape != h[n].shape:
                raise ConfigError(
                    f"VectorField: expected the block to return {tuple(h[n].shape)} on node {n!r}, got "
                    f"{tuple(t.shape)}; a loop needs an output of its input's shape"
                )
        fields = {n: fields[n] + static[n] if n in static else fields[n] for n in fields}
        return {n: t for n, t in fields.items() if only is None or n in only}
