"""Warm starts: free phases that begin where the same example settled the last time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from toreq.core.state import State, per_example
from toreq.errors import ConfigError


class Visited(Protocol):
    """A layer whose free phases can be started elsewhere."""

    visit: Visit | None


class WarmStarts:
    """The free equilibria of a data set's examples, kept from one epoch to the next.

    The equilibrium is the one that any start leads to as long as there is only one; fewer steps lead to it when the
    weights have moved little since the last visit and the input is the same (no random augmentation). Memory: one state
    for each example.

        starts = WarmStarts(net.equilibrium, len(images))
        for index in batches:
            with starts(index):
                loss = criterion(net(images[index]), labels[index])
            loss.backward()

    Args:
        layer: an :class:`~toreq.Equilibrium` layer.
        size: number of examples, at least 1.
        dtype: in which states are kept; bfloat16 halves the memory and costs no more than a step.
    """

    def __init__(self, layer: Visited, size: int, dtype: torch.dtype = torch.float32) -> None:
        if size < 1 or not dtype.is_floating_point:
            raise ConfigError(
                f"WarmStarts: expected size >= 1 and a floating dtype, got {size}, {dtype}; give the number of examples"
            )
        self.layer, self.size, self.dtype = layer, size, dtype
        self.states: State = {}
        self.seen: Tensor | None = None

    @contextlib.contextmanager
    def __call__(self, index: Tensor) -> Iterator[None]:
        """A context in which the layer's free phase belongs to the examples ``index``, int64 ``(B,)``.

        Raises:
            ConfigError: for an index out of range or not of int64.
        """
        if index.dtype != torch.int64 or index.dim() != 1 or bool(((index < 0) | (index >= self.size)).any()):
            raise ConfigError(
                f"WarmStarts: expected int64 indices (B,) below {self.size}, got {index.dtype} {tuple(index.shape)}; "
                "pass the examples' places in the data set"
            )
        self.layer.visit = Visit(self, index)
        try:
            yield
        finally:
            self.layer.visit = None


class Visit:
    """One batch of known examples."""

    def __init__(self, starts: WarmStarts, index: Tensor) -> None:
        self.starts, self.index = starts, index

    def start(self, first: State) -> State:
        """What was kept for the examples seen before, ``first`` for the others."""
        store = self.starts
        size = next(iter(first.values())).shape[0]
        if size != self.index.shape[0]:
            raise ConfigError(
                f"WarmStarts: expected a batch of {self.index.shape[0]} examples, got {size}; pass one index per "
                "example"
            )
        if store.seen is None:
            return first
        index = self.index.to(store.seen.device)
        seen = store.seen[index]
        return {n: torch.where(per_example(seen, t), store.states[n][index].to(t.dtype), t) for n, t in first.items()}

    def keep(self, state: State) -> None:
        """Keep these equilibria for the next visit; those that are not finite are forgotten."""
        store = self.starts
        if store.seen is None:
            device = next(iter(state.values())).device
            store.seen = torch.zeros(store.size, dtype=torch.bool, device=device)
            store.states = {
                n: torch.zeros(store.size, *t.shape[1:], dtype=store.dtype, device=device) for n, t in state.items()
            }
        index = self.index.to(store.seen.device)
        finite = torch.ones_like(index, dtype=torch.bool)
        for n, t in state.items():
            store.states[n][index] = t.detach().to(store.dtype)
            finite &= torch.isfinite(t).flatten(1).all(1)
        store.seen[index] = finite
