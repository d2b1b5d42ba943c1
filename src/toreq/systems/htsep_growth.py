"""Growth of HTSEP's torus by a dimension: new sheets of units that no context has opened yet."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from toreq.errors import ConfigError, nearest
from toreq.systems.htsep_norm import OpenNorm

if TYPE_CHECKING:
    from toreq.systems.htsep import HTSEP

RULES = ("variance", "curvature")
NUMBERS_A_WEIGHT = 4
"""A weight, its gradient and Adam's two moments."""

log = logging.getLogger("toreq.htsep")


@torch.no_grad()
def grow(net: HTSEP, size: int = 2, limit: int = 2**30) -> dict[str, Any]:
    """Unfold a dimension of ``size`` places, the network at the first of them.

    The units and the slots of all sheets so far are laid out again at each further place. No bump reaches from place to
    place, so that every context known opens the units it did, and every output stays as it is; a context that finds no
    room is put on a new sheet. What joins sheets starts at zero; weights inside new ones are drawn from torch's default
    generator, as at the network's creation. Parameters are new tensors: give the optimizer those of the grown network.

    Args:
        net: changed in place, and its ``config`` with it.
        size: places, at least 2.
        limit: most bytes that weights, gradients, an optimizer's moments and statistics may take afterwards.

    Returns:
        what happened, also logged: ``axis``, ``size``, ``contexts``, ``slots``, ``parameters`` and ``bytes`` after it.

    Raises:
        ConfigError: for a size below 2, a network without contexts, or growth beyond the limit, with the numbers.
    """
    torus = net.context
    if size < 2:
        raise ConfigError(
            f"grow: expected size >= 2, got {size}; an axis of one place holds nothing apart, leave it out"
        )
    if torus.mode == "off" or torus.source != "statistics":
        raise ConfigError("grow: expected a network with contexts, got one without; gates='probabilistic' has some")
    widths = [shape[0] * size for shape in net.equilibrium.dynamics.shapes.values()]
    _check_bytes(net, widths, size, limit)
    changed = {net.widths: tuple(widths), "sheets": (*torus.sheets, size)}
    wider = type(net)(net.input_shape, net.num_classes, **{**net.made, **changed})
    like = next(net.parameters())
    wider.to(device=like.device, dtype=like.dtype)
    _copy_weights(net, wider)
    wider.context.take(torus)
    layer = wider.equilibrium
    layer.solver, layer.estimator, layer.warn = (
        net.equilibrium.solver,
        net.equilibrium.estimator,
        net.equilibrium.warn,
    )
    net.equilibrium, net.head, net.context, net.made = layer, wider.head, wider.context, wider.made
    net.norms = wider.norms
    net.train(net.training)
    setattr(net, net.widths, tuple(widths))
    if net.config:
        net.config["options"].update({k: list(v) for k, v in changed.items()})
    record = {
        "axis": net.context.slots.shape[1] - 1,
        "size": size,
        "contexts": net.context.contexts,
        "slots": len(net.context.count),
        "parameters": sum(p.numel() for p in net.parameters()),
        "bytes": _bytes(net),
    }
    net.context.growth.append(record)
    log.info("a dimension unfolded: %s", record)
    return record


@torch.no_grad()
def wanted(net: HTSEP, x: Tensor, rule: str = "variance", bend: float = 1.0) -> bool:
    """Whether a batch asks for another dimension: it is novel, and no slot is free.

    With ``rule="curvature"`` also where more than half of the slots are taken and the slot that it would get lies in a
    valley between places that hold much: the scalar curvature of the torus's geometry there is below ``-bend``.

    Args:
        net: as it is before it sees the batch.
        x: the batch.
        rule: ``"variance"`` or ``"curvature"``.
        bend: above 0, in squares of inverse slots.

    Raises:
        ConfigError: for another rule, or a network without contexts.
    """
    torus = net.context
    if rule not in RULES or torus.mode == "off" or torus.source != "statistics":
        raise ConfigError(
            f"growth: expected a rule in {RULES} and a network with contexts, got {rule!r} with gates={torus.mode!r}, "
            f"context={torus.source!r}; {nearest(rule, RULES)}"
        )
    if torus.contexts == 0 or not torus.novel(x):
        return False
    place = torus.candidate()
    if place is None or rule == "variance":
        return place is None
    curvature = torus.geometry().ricci_scalar().flatten()
    return torus.contexts * 2 > len(torus.count) and float(curvature[place % len(curvature)]) < -bend


def _bytes(net: HTSEP) -> int:
    weights = sum(p.numel() * p.element_size() for p in net.parameters()) * NUMBERS_A_WEIGHT
    return weights + net.context.laws.bytes()


def _check_bytes(net: HTSEP, widths: list[int], size: int, limit: int) -> None:
    """Refuse before anything is allocated; what joins two grown layers grows by the square of ``size``."""
    shapes = dict(net.equilibrium.dynamics.shapes)
    units = {shape[0] for shape in shapes.values()}
    wanted = size * net.context.laws.bytes()
    for p in net.parameters():
        grown = sum(n in units for n in p.shape[:2]) if p.dim() > 1 else 1
        wanted += NUMBERS_A_WEIGHT * p.numel() * p.element_size() * size ** max(1, grown)
    if wanted > limit:
        raise ConfigError(
            f"grow: expected at most {limit} bytes for weights, gradients, moments and statistics, got {wanted} with "
            f"widths of {', '.join(map(str, widths))} and {len(net.context.count) * size} slots; grow by fewer than "
            f"{size} places, or raise the limit"
        )


def _copy_weights(net: HTSEP, wider: HTSEP) -> None:
    """The old weights into the leading part of the new ones, zeros where old and new units meet."""
    old = dict(net.named_parameters())
    bounds = {id(n._operator[0].weight): n.bound for n in wider.norms if isinstance(n, OpenNorm)}
    for name, new in wider.named_parameters():
        new.copy_(_widened(old[name], new, bounds.get(id(new))))


def _widened(value: Tensor, fresh: Tensor, bound: float | None) -> Tensor:
    out = fresh.detach().clone()
    grown = [i for i in range(out.dim()) if out.shape[i] != value.shape[i]]
    if grown[:2] == [0, 1]:
        rows, columns = value.shape[:2]
        block = out[rows:, columns:].clone()
        out.zero_()
        if bound is not None:
            # at most the norm of the operator: the sum over the places of a kernel
            size = torch.linalg.matrix_norm(block.flatten(2).movedim(2, 0) if block.dim() > 2 else block, ord=2).sum()
            block *= min(1.0, bound / float(size))
        out[rows:, columns:] = block
    out[tuple(slice(n) for n in value.shape)] = value
    return out
