"""The example of contexts keeps what it learned; pictures of the torus and of spikes are drawn."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from test_examples import CHANCE, load
from toreq import systems, training
from toreq.diagnostics.contexts import spike_raster, torus_view
from toreq.diagnostics.show import run_show
from toreq.systems.htsep import HTSEP


def test_contexts_keep_the_first_task() -> None:
    found = load("continual_contexts").main(train=480, test=200, tasks=3, hidden=64)
    before, after, contexts = found["probabilistic"]
    assert contexts == 3
    assert before > 3 * CHANCE
    assert after > before - 0.08
    assert found["off"][2] == 0


def _net() -> HTSEP:
    torch.manual_seed(0)
    net = systems.create("htsep", (1, 28, 28), 10, hidden=(40,))
    assert isinstance(net, HTSEP)
    net.train()(torch.rand(30, 1, 28, 28))
    return net.eval()


def test_the_view_of_a_torus_is_what_its_context_opens() -> None:
    net, x = _net(), torch.rand(2, 1, 28, 28)
    view = torus_view(net, x)
    assert view is not None
    assert view.occupancy.shape == view.curvature.shape == (4, 4)
    assert view.occupancy[0, 0] == view.occupancy.sum() == 30
    assert np.array_equal(view.opening >= 0.5, net.context.gates(x, "h1")[0].bool().numpy())
    net.grow(2)
    again = torus_view(net, x)
    assert again is not None
    assert again.occupancy.shape == (4, 4)
    assert torus_view(systems.create("toreqprop", (1, 28, 28), 10, hidden=(4,)), x) is None


def test_a_raster_holds_the_spikes_of_the_run() -> None:
    net, x = _net(), torch.rand(2, 1, 28, 28)
    found = spike_raster(net, x, steps=25)
    assert found is not None
    assert found.spikes.shape == (25, 40)
    assert set(np.unique(found.spikes)) == {0.0, 1.0}
    assert found.spikes[:, ~found.opened].sum() == 0
    from toreq.solvers import Spiking

    _, run = net.spike(x[:1], Spiking(max_steps=25, tolerance=0.0))
    assert found.spikes.sum() == float(run.spikes["h1"].sum())


def test_show_draws_the_torus_and_the_raster(tmp_path: Path) -> None:
    options = {"arch": "dense", "hidden": [24]}
    config = training.config_for(
        "htsep", options, epochs=1, limit_train=128, limit_test=64, out=str(tmp_path / "run"), device="cpu"
    )
    training.train(config)
    out = io.StringIO()
    assert run_show(tmp_path / "run", console=Console(file=out, width=200)) == 0
    for name in ("torus", "raster", "energy"):
        assert (tmp_path / "run" / "plots" / f"{name}.png").stat().st_size > 5000, out.getvalue()
