"""HTSEP's sigma-delta network as a graph of the Neuromorphic Intermediate Representation (Pedersen et al. 2024), and
its run in a simulator that knows nothing of this package: snnTorch's neurons (Eshraghian et al. 2023).

Needs the extra ``neuromorphic``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from toreq.core import Energy
from toreq.core.nodes import HardSigmoid
from toreq.core.state import State
from toreq.errors import ConfigError
from toreq.solvers.spiking import CLAMP, start_of_membranes
from toreq.systems.htsep import HTSEP

if TYPE_CHECKING:
    import nir

MOST_UNITS = 8192
"""Units of the one population: its matrix has their square."""


@dataclass(frozen=True)
class Simulation:
    """A run in the independent simulator.

    Args:
        logits: ``(B, num_classes)``, the head at the rates.
        rates: ``(B, N)``, spikes a step.
        spikes: ``(B,)``, how many in all.
        events: ``(B,)``, every spike times the nonzero weights it reaches.
        steps: of the run.
    """

    logits: Tensor
    rates: Tensor
    spikes: Tensor
    events: Tensor
    steps: int


def _library(name: str) -> ModuleType:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise ConfigError(
            f"toreq.export.nir: expected the package {name!r}, got none; pip install 'toreq[neuromorphic]'"
        ) from e


@torch.no_grad()
def to_nir(net: HTSEP, slot: int | None = None, most: int = MOST_UNITS) -> nir.NIRGraph:
    r"""The network as one population of integrate-and-fire units with a block-symmetric matrix onto itself.

    ``input -> drive (Affine) -> units (IF) -> head (Affine) -> output``, and ``units -> recurrent (Linear) -> units``.
    Weights are multiplied by the units' slopes, so that every threshold is 1:

    .. math:: u \leftarrow u - s + G\,[W s + D x + b], \qquad s = [u > 1].

    A chip that cannot compute gates holds one context: the gates of ``slot`` are part of the weights. NIR's ``IF``
    resets to a constant; that the threshold is subtracted instead, the clamp of the membranes and where they start is
    in the units' metadata, which an importer has to honour.

    Args:
        net: an :class:`~toreq.systems.htsep.HTSEP` whose head is linear (after a flattening).
        slot: of the context; that of the most examples when None.
        most: units beyond which it is refused.

    Raises:
        ConfigError: without the extra, for too many units, a slot that is not there, or another head.
    """
    library = _library("nir")
    energy = net.equilibrium.dynamics
    assert isinstance(energy, Energy)
    sizes = {n: math.prod(shape) for n, shape in energy.shapes.items()}
    total = sum(sizes.values())
    if total > most:
        raise ConfigError(
            f"to_nir: expected at most {most} units, got {total}: their matrix would have {total**2} entries; export "
            "a smaller network, or raise most"
        )
    slot = int(net.context.count.argmax()) if slot is None else slot
    if not 0 <= slot < len(net.context.count):
        raise ConfigError(
            f"to_nir: expected a slot in [0, {len(net.context.count)}), got {slot}; see net.context.count"
        )
    training = net.training
    net.eval()
    try:
        with net.context.pinned(slot):
            drive, bias = _drive(net, energy, sizes)
            matrix = _matrix(net, energy, sizes)
    finally:
        net.train(training)
    gains = torch.cat([torch.full((size,), _gain(energy, n)) for n, size in sizes.items()]).to(matrix)
    head, offset = _head(net, sizes)
    start = torch.cat([start_of_membranes(torch.zeros(1, *energy.shapes[n]), k).flatten() for k, n in enumerate(sizes)])
    ones = torch.ones(total)
    rules = {"reset": "subtract", "clamp_low": -CLAMP, "clamp_high": 1 + CLAMP, "start": _array(start)}
    nodes = {
        "input": library.Input(_shape(drive.shape[1])),
        "drive": library.Affine(_array(gains[:, None] * drive), _array(gains * bias)),
        "units": library.IF(_array(ones), _array(ones), metadata=rules),
        "recurrent": library.Linear(_array(gains[:, None] * matrix)),
        "head": library.Affine(_array(head), _array(offset)),
        "output": library.Output(_shape(head.shape[0])),
    }
    ways = [
        ("input", "drive"), ("drive", "units"), ("units", "recurrent"), ("recurrent", "units"), ("units", "head"),
        ("head", "output"),
    ]  # fmt: skip
    return library.NIRGraph(nodes, ways, metadata={"context": slot})


@torch.no_grad()
def simulate(graph: nir.NIRGraph, x: Tensor, steps: int = 200) -> Simulation:
    """Run an exported graph in snnTorch: ``snn.Leaky`` without leak that subtracts its threshold.

    Nothing but the graph is used: its arrays, its edges and its units' metadata.

    Args:
        graph: from :func:`to_nir`, or read from a file by ``nir.read``.
        x: ``(B, *input_shape)``, constant over the run.
        steps: at least 1.

    Raises:
        ConfigError: without the extra, or for a graph whose units reset in another way.
    """
    snn = _library("snntorch")
    if steps < 1:
        raise ConfigError(f"simulate: expected steps >= 1, got {steps}; e.g. 200")
    nodes: dict[str, Any] = graph.nodes
    rules = nodes["units"].metadata
    reset = rules.get("reset", "zero")
    reset = reset.decode() if isinstance(reset, bytes) else str(reset)
    if reset != "subtract":
        raise ConfigError(
            f"simulate: expected units that subtract their threshold, got reset={reset!r}; export them by to_nir"
        )
    drive, recurrent, head = (torch.as_tensor(nodes[n].weight).float() for n in ("drive", "recurrent", "head"))
    current = x.flatten(1).float() @ drive.T + torch.as_tensor(nodes["drive"].bias).float()
    neuron = snn.Leaky(beta=1.0, threshold=1.0, reset_mechanism="subtract")
    low, high = float(rules["clamp_low"]), float(rules["clamp_high"])
    membrane = torch.as_tensor(rules["start"]).float().expand_as(current).contiguous()
    spikes, total = torch.zeros_like(current), torch.zeros_like(current)
    for _ in range(steps):
        spikes, membrane = neuron(current + spikes @ recurrent.T, membrane)
        membrane = membrane.clamp(low, high)
        total += spikes
    rates = total / steps
    fan_out = (recurrent != 0).sum(0).to(torch.float64)
    logits = rates @ head.T + torch.as_tensor(nodes["head"].bias).float()
    counted = total.to(torch.float64)
    return Simulation(logits, rates, counted.sum(1), (counted * fan_out).sum(1), steps)


def _gain(energy: Energy, name: str) -> float:
    sigma = energy.activation(name)
    assert isinstance(sigma, HardSigmoid)
    return sigma.gain


def _drive(net: HTSEP, energy: Energy, sizes: dict[str, int]) -> tuple[Tensor, Tensor]:
    """The affine map from input to drives, by its values at 0 and at every unit vector: ``(N, D)``, ``(N,)``."""
    inputs = math.prod(net.input_shape)
    like = next(net.parameters())
    points = torch.cat([torch.zeros(1, inputs), torch.eye(inputs)]).to(like).reshape(-1, *net.input_shape)
    rows = []
    for part in points.split(512):
        static = energy.static(energy.bind(part))
        found = [static[n].flatten(1) if n in static else part.new_zeros(len(part), size) for n, size in sizes.items()]
        rows.append(torch.cat(found, 1))
    values = torch.cat(rows)
    return (values[1:] - values[0]).T, values[0]


def _matrix(net: HTSEP, energy: Energy, sizes: dict[str, int]) -> Tensor:
    """What every unit's spike adds to every field, ``(N, N)``; column by column, since the couplings are linear."""
    like = next(net.parameters())
    columns = []
    total = sum(sizes.values())
    for at in torch.arange(total).split(256):
        units = torch.zeros(len(at), total).to(like)
        units[torch.arange(len(at)), at] = 1
        state: State = {
            n: part.reshape(-1, *energy.shapes[n])
            for n, part in zip(sizes, units.split(list(sizes.values()), 1), strict=True)
        }
        bindings = energy.bind(like.new_zeros(len(at), *net.input_shape))
        field = energy.field(state, bindings, static={})
        columns.append(torch.cat([field[n].flatten(1) for n in sizes], 1))
    return torch.cat(columns).T


def _head(net: HTSEP, sizes: dict[str, int]) -> tuple[Tensor, Tensor]:
    linear = [m for m in net.head.modules() if isinstance(m, torch.nn.Linear)]
    name = net.equilibrium.readout[0]
    if len(linear) != 1 or linear[0].in_features != sizes[name]:
        raise ConfigError(
            f"to_nir: expected a head with one linear map from node {name!r}, got {net.head}; export the network "
            "before its head is changed"
        )
    weight = linear[0].weight
    before = sum(size for n, size in list(sizes.items())[: list(sizes).index(name)])
    head = weight.new_zeros(weight.shape[0], sum(sizes.values()))
    head[:, before : before + sizes[name]] = weight
    return head, weight.new_zeros(len(weight)) if linear[0].bias is None else linear[0].bias


def _array(t: Tensor) -> Any:
    return t.detach().cpu().float().contiguous().numpy()


def _shape(size: int) -> Any:
    import numpy as np

    return np.array([size])
