"""Synaptic events, operations and modelled energy against counts by hand and nonzero entries of Jacobians."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from test_spiking import joined, network
from toreq.core import (
    Bilinear,
    Conv,
    Dense,
    Drive,
    Energy,
    HardSigmoid,
    IdentityOperator,
    Lateral,
    Node,
    Potential,
    SelfCoupling,
)
from toreq.errors import ConfigError
from toreq.solvers import Spiking, events
from toreq.solvers.events import Work, dense_work, fan_out, spiking_work
from toreq.solvers.spiking import SpikingSolution


def test_events_and_energy_of_a_tiny_net_by_hand() -> None:
    """Three units onto two, and the two onto each other: a spike of the three reaches 2 units, of the two 3 + 1."""
    across, lateral = Dense(3, 2).double(), Dense(2, 2, symmetric=True).double()
    with torch.no_grad():
        across.weight.copy_(torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.0]]))  # one synapse less
        lateral.weight.copy_(torch.tensor([[0.0, 0.2], [0.2, 0.0]]))
    nodes = [Node("h1", 3, HardSigmoid()), Node("h2", 2, HardSigmoid())]
    couplings = [Drive("h1", nn.Linear(2, 3)), Bilinear(across, "h1", "h2"), Lateral(lateral, "h2")]
    energy = Energy(nodes, couplings).double()
    synapses = fan_out(energy, energy.bind(torch.zeros(1, 2, dtype=torch.float64)))
    assert synapses["h1"].tolist() == [[2, 2, 1]]
    assert synapses["h2"].tolist() == [[4, 3]]
    spikes = {"h1": torch.tensor([[5.0, 0.0, 7.0]]), "h2": torch.tensor([[1.0, 2.0]])}
    happened = 5 * 2 + 7 * 1 + 1 * 4 + 2 * 3
    assert events.events(spikes, synapses).tolist() == [happened]
    steps = torch.tensor([10])
    solution = SpikingSolution({}, {}, steps, torch.zeros(1), torch.ones(1, dtype=torch.bool), None, spikes)
    work = spiking_work(Spiking(), solution, synapses)
    assert work.adds.tolist() == [happened + 15 + 2 * 5 * 10]  # events, resets, drives and thresholds
    assert work.multiply_adds.tolist() == [0]
    assert work.words.tolist() == [3 * happened + 2 * 5 * 10]
    assert float(work.picojoules()) == pytest.approx(0.9 * 142)
    assert float(work.picojoules(events.SRAM)) == pytest.approx(0.9 * 142 + 5 * 181)
    noisy = spiking_work(Spiking(scheme="bernoulli"), solution, synapses)
    assert (noisy.adds.tolist(), noisy.multiply_adds.tolist()) == ([happened + 100], [50])
    dense = dense_work(synapses, steps)
    assert dense.multiply_adds.tolist() == [12 * 10]
    assert float(dense.picojoules()) == pytest.approx(4.6 * 120 + 0.9 * 100)
    assert dense.words.tolist() == [120 + 100]
    total = work + dense
    assert isinstance(total, Work)
    assert float(total.picojoules(events.DRAM)) == pytest.approx(
        float(work.picojoules(events.DRAM) + dense.picojoules(events.DRAM))
    )


class Half(nn.Module):
    """A gate that is open for the first half of six units."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([[1.0, 0.5, 0.2, 0, 0, 0]], dtype=x.dtype).expand(x.shape[0], 6)


def jacobian_synapses(energy: Energy, x: Tensor) -> Tensor:
    """Nonzero entries in each unit's column of the field's Jacobian, for one example."""
    with torch.no_grad():
        bindings = energy.bind(x[:1])
        shapes = {n: t.shape for n, t in energy.initial(bindings).items()}

    def field(flat: Tensor) -> Tensor:
        parts = flat.split([math.prod(s[1:]) for s in shapes.values()])
        h = {n: p.reshape(shapes[n]) for n, p in zip(shapes, parts, strict=True)}
        return torch.cat([t.flatten() for t in energy.field(h, bindings).values()])

    at = torch.full((sum(math.prod(s[1:]) for s in shapes.values()),), 0.5, dtype=torch.float64)
    matrix = torch.autograd.functional.jacobian(field, at)
    assert isinstance(matrix, Tensor)
    return (matrix != 0).sum(0)


@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("kernel", [2, 3])
def test_fan_out_of_convolutions(kernel: int, pool: int) -> None:
    """Against the Jacobian; with pooling, of the convolution before it, where only what is pooled counts."""
    first = Conv((2, 7, 7), 3, kernel, pool=pool).double()
    size = first.out_shape
    nodes = [Node("image", (2, 7, 7), HardSigmoid()), Node("maps", size, HardSigmoid())]
    lateral = Conv(size, 3, 3, padding=1, symmetric=True).double()
    couplings = [Bilinear(first, "image", "maps"), Lateral(lateral, "maps"), SelfCoupling("image", 0.1)]
    energy = Energy([*nodes], [Drive("image", nn.Identity()), *couplings]).double()
    x = torch.rand(1, 2, 7, 7, dtype=torch.float64)
    found = fan_out(energy, energy.bind(x))
    if pool == 1:
        assert torch.equal(joined(found)[0], jacobian_synapses(energy, x).double())
        return
    covered = pool * size[-1]
    taps = [sum(0 <= i - k < covered for k in range(kernel)) for i in range(7)]
    assert found["image"][0, 0].tolist() == [[1 + 3 * a * b for b in taps] for a in taps]
    beside = [sum(0 <= i + k < size[-1] for k in (-1, 0, 1)) for i in range(size[-1])]
    assert found["maps"][0, 0].tolist() == [[2 * (kernel * pool) ** 2 + 3 * a * b for b in beside] for a in beside]


def test_closed_gates_and_absent_weights_have_no_synapses() -> None:
    energy, x = network(gate=Half())
    found = fan_out(energy, energy.bind(x))
    assert torch.equal(joined(found)[0], jacobian_synapses(energy, x).double())
    assert found["h2"][0].tolist() == [11, 11, 11, 8, 8, 8]
    assert found["h2"].shape == (16, 6)


def test_synapses_that_cannot_be_counted_are_refused() -> None:
    node = [Node("h", (4,), HardSigmoid())]
    potential = Energy(node, [Drive("h", nn.Identity()), Potential(Dense(4, 4), "h")])
    with pytest.raises(ConfigError, match="got Potential"):
        fan_out(potential, potential.bind(torch.zeros(1, 4)))
    identity = Energy(node, [Drive("h", nn.Identity()), Lateral(IdentityOperator(4), "h")])
    assert fan_out(identity, identity.bind(torch.zeros(1, 4)))["h"].tolist() == [[1, 1, 1, 1]]
