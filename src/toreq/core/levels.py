"""What an energy checks about its parts: operators that fit the nodes they join, and levels that hold every node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from toreq.core.couplings import Bilinear, Coupling
from toreq.core.operators import Operator
from toreq.core.quadratic import Spring
from toreq.errors import ConfigError


def check_operator(c: Coupling, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a coupling whose operator does not fit the shapes of its nodes."""
    op = getattr(c, "op", None)
    if not isinstance(op, Operator):
        return
    if isinstance(c, Bilinear):
        ends = [(c.pre, op.in_shape), (c.post, op.out_shape)]
    elif isinstance(c, Spring):
        ends = [(c.b, op.in_shape), (c.a, op.out_shape)]
    else:
        ends = [(c.nodes[0], op.in_shape)]
    for node, shape in ends:
        # an operator of fewer axes acts on the last ones
        if shapes[node][-len(shape) :] != tuple(shape):
            raise ConfigError(
                f"Energy: expected an operator on {shapes[node]} for node {node!r} in {type(c).__name__}, got one "
                f"on {tuple(shape)}; match the operator's shapes to the nodes it joins"
            )


def check_levels(levels: Sequence[Sequence[str]] | None, names: Sequence[str]) -> list[frozenset[str]]:
    """The levels as sets of node names, the finest first; one of all ``names`` when None.

    Raises:
        ConfigError: unless every node is on exactly one level.
    """
    if levels is None:
        return [frozenset(names)]
    held = [n for level in levels for n in level]
    if sorted(held) != sorted(names) or not all(levels):
        raise ConfigError(
            f"Energy: expected levels that hold each of {list(names)} once, got {[list(part) for part in levels]}; "
            "name every node on one level"
        )
    return [frozenset(level) for level in levels]
