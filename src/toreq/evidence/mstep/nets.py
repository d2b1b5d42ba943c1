"""What the protocols of MS-TEP share: pyramids by side, brief training, and the radius of the levels alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from toreq import systems
from toreq.core import Energy, Spring
from toreq.core.spectral import relaxation_radius
from toreq.core.state import detached
from toreq.data import Dataset
from toreq.evidence.base import nets
from toreq.evidence.budgets import Budget
from toreq.systems.mstep import MultiScale

SEED_FILE = "003_fb4cff0aa26f658d.txt"
WIDTHS: dict[str, dict[str, Any]] = {
    "conv": {"channels": (8, 16)},
    "dense": {"hidden": (128,)},
    "sequence": {"features": 32, "hidden": 64},
}
"""Narrow networks by architecture, so that a claim fits its budget; all else is as shipped."""
SMALL: dict[str, dict[str, Any]] = {
    "conv": {"channels": (3, 4), "kernel": 3, "levels": 2},
    "dense": {"hidden": (8,), "levels": 2},
    "sequence": {"features": 8, "heads": 2, "hidden": 8, "patch": 14, "levels": 2},
}
"""Options of a smoke run."""
RATE, BATCH = 3e-3, 64
"""Of brief training, by Adam."""


def pyramid(
    budget: Budget, seed: int, device: str, arch: str, shape: tuple[int, ...] = (1, 28, 28), **options: Any
) -> MultiScale:
    """A narrow network, freshly drawn; tiny for a smoke run."""
    torch.manual_seed(seed)
    widths = SMALL[arch] if budget.name == "smoke" else WIDTHS[arch]
    net = systems.create("mstep", shape, 10, arch=arch, **{**widths, **options}).to(device)
    assert isinstance(net, MultiScale)
    return net


@contextlib.contextmanager
def hastened(net: nn.Module) -> Iterator[None]:
    """Fast settings inside the block, those the network came with after it."""
    layer = nets.layer(net)
    held = layer.solver, layer.estimator
    layer.hasten()
    try:
        yield
    finally:
        layer.solver, layer.estimator = held


def fit(net: nn.Module, data: Dataset, steps: int, seed: int, batch: int = BATCH, rate: float = RATE) -> int:
    """Train briefly by EqProp with the fast settings; returns the number of samples seen."""
    with hastened(net):
        return nets.fit(net, data, steps, batch=batch, rate=rate, seed=seed)


def energy(net: MultiScale) -> Energy:
    """A network's energy."""
    found = net.equilibrium.dynamics
    assert isinstance(found, Energy)
    return found


def springs(net: MultiScale) -> list[Spring]:
    """All springs of a network."""
    return [c for _, c in energy(net).terms() if isinstance(c, Spring)]


@torch.no_grad()
def radius_alone(net: MultiScale, x: Tensor) -> float:
    """Mean spectral radius of the relaxation at its equilibria with the springs left out of the Jacobian.

    Springs alone make the plain iteration's radius large, whatever the levels' couplings are.
    """
    layer = net.equilibrium
    state = layer.free_phase(detached(layer.dynamics.bind(x))).state
    held = [(s, s.log_strength.detach().clone()) for s in springs(net)]
    try:
        for spring, _ in held:
            spring.log_strength.fill_(-torch.inf)
        bindings = detached(layer.dynamics.bind(x))
    finally:
        for spring, value in held:
            spring.log_strength.copy_(value)
    return float(relaxation_radius(layer.dynamics, bindings, state).mean())


def groups(net: MultiScale) -> Callable[[str], str]:
    """Maps a parameter's name to what it belongs to: a level's own weights, adapters, springs or read-outs."""
    owners: dict[int, str] = {}
    for i, (_, coupling) in enumerate(energy(net).terms()):
        owners[i] = "springs" if isinstance(coupling, Spring) else f"level {coupling.nodes[0][1:].split('_')[0]}"

    def group(name: str) -> str:
        parts = name.split(".")
        if "couplings" in parts:
            owner = owners[int(parts[parts.index("couplings") + 1])]
            borrowed = net.shared and owner not in ("springs", "level 1")
            return "adapters" if borrowed else owner
        node = next((p for p in parts if p.startswith("node_l")), None)
        return "read-outs" if node is None else f"level {node[6:].split('_')[0]}"

    return group
