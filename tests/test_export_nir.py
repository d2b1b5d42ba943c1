"""The exported graph runs in snnTorch as the network does here."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

from test_htsep import batch, conv, dense
from toreq.errors import ConfigError
from toreq.solvers import Spiking
from toreq.solvers.events import events, fan_out

nir = pytest.importorskip("nir")
pytest.importorskip("snntorch")
export = importlib.import_module("toreq.export.nir")


@pytest.mark.parametrize("make", [dense, conv])
def test_the_simulator_fires_the_same_spikes(make: type) -> None:
    net = make().float().eval()
    x = batch(4)[0].float()
    graph = export.to_nir(net, slot=0)
    found = export.simulate(graph, x, steps=50)
    # its spikes of step t are ours of step t + 1
    logits, solution = net.spike(x, Spiking(max_steps=51, tolerance=0.0))
    ours = torch.cat([t.flatten(1) for t in solution.spikes.values()], 1)
    assert float((found.rates * 50).sum()) > 50
    # a sum in another order may move a membrane across the threshold a step later
    assert float((ours - found.rates * 50).abs().max()) <= 1
    assert float((logits - found.logits).abs().max()) < 0.1
    counted = events(solution.spikes, fan_out(net.equilibrium.dynamics, net.equilibrium.dynamics.bind(x)))
    # ours have one step more
    torch.testing.assert_close(found.events, counted, rtol=0.05, atol=20)


def test_more_steps_come_nearer_to_the_equilibrium_that_was_trained() -> None:
    net = dense().float().eval()
    x = batch(4)[0].float()
    with torch.no_grad():
        wanted = net(x)
    graph = export.to_nir(net)
    errors = [float((export.simulate(graph, x, steps).logits - wanted).norm()) for steps in (30, 480)]
    assert errors[1] < errors[0] / 5


def test_a_file_holds_all_that_the_simulator_needs(tmp_path: Path) -> None:
    net = dense().float().eval()
    x = batch(3)[0].float()
    graph = export.to_nir(net)
    nir.write(tmp_path / "net.nir", graph)
    again = nir.read(tmp_path / "net.nir")
    assert torch.equal(export.simulate(again, x, 20).rates, export.simulate(graph, x, 20).rates)
    matrix = graph.nodes["recurrent"].weight / graph.nodes["units"].r[:, None]
    gains = np.array([1.0] * 24 + [2.0] * 12)
    symmetric = matrix / gains[:, None]
    np.testing.assert_allclose(symmetric, symmetric.T, atol=1e-6)
    # the context's gates are in the weights
    closed = (net.context.gates(x, "h1")[0] == 0).numpy()
    assert closed.any()
    assert np.abs(matrix[:24][closed]).max() == 0 == np.abs(matrix[:, :24][:, closed]).max()
    assert np.abs(graph.nodes["drive"].weight[:24][closed]).max() == 0


def test_units_that_reset_hard_are_refused_and_would_settle_elsewhere() -> None:
    net = dense().float().eval()
    graph = export.to_nir(net)
    graph.nodes["units"].metadata["reset"] = "zero"
    with pytest.raises(ConfigError, match="subtract"):
        export.simulate(graph, batch(2)[0].float())


def test_too_many_units_and_unknown_slots_are_refused() -> None:
    net = dense().float()
    with pytest.raises(ConfigError, match="at most 20 units, got 36"):
        export.to_nir(net, most=20)
    with pytest.raises(ConfigError, match=r"slot in \[0, 9\)"):
        export.to_nir(net, slot=9)
    net.head = torch.nn.Linear(7, 4)
    with pytest.raises(ConfigError, match="linear map"):
        export.to_nir(net)
