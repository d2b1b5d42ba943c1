"""`toreq show` of a pyramid: each level's way to its equilibrium."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from toreq import data, training
from toreq.diagnostics.levels import level_settling
from toreq.diagnostics.show import run_show
from toreq.solvers import CoarseToFine
from toreq.systems import ConvHopfield, MultiScaleConv, MultiScaleSequence


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    digits = data.load("mnist").limit(6, 1)
    return digits.inputs("train", slice(None)), digits.train_y


def test_distances_fall_to_the_tolerance_on_every_level():
    torch.manual_seed(0)
    net = MultiScaleConv((1, 28, 28), 10, channels=(4, 6), levels=3)
    solver = CoarseToFine(tolerance=1e-4, max_steps=60)
    net.equilibrium.solver = solver
    x, y = _batch()
    found = level_settling(net, x, y)
    assert found is not None
    assert net.equilibrium.solver is solver
    assert len(found.distance) == len(found.maps) == 3
    for distance, maps, size in zip(found.distance, found.maps, (8, 4, 2), strict=True):
        assert distance.shape[1] == 6
        assert np.all(distance[0] > 1e-2)
        # the state that the last residual was measured at
        assert np.all(distance[-1] < 1e-2)
        assert maps.shape == (len(distance), size, size)
        assert maps[-1].max() < 0.1 * maps[0].max()


def test_distances_are_of_the_same_nodes_as_solved_by_hand():
    torch.manual_seed(0)
    net = MultiScaleSequence((1, 28, 28), 10, features=8, heads=2, hidden=8, patch=7, levels=2)
    x, y = _batch()
    found = level_settling(net, x, y)
    assert found is not None
    assert not found.maps
    layer = net.equilibrium
    start = layer.dynamics.initial(layer.dynamics.bind(x))
    net.equilibrium.solver = CoarseToFine(tolerance=1e-6, max_steps=400)
    end = net.equilibrium.solve(x)
    (node,) = layer.dynamics.levels()[0]
    with torch.no_grad():
        h = layer.dynamics.activate(start, layer.dynamics.bind(x))[node]
    wanted = (h - end.h[node]).flatten(1).norm(dim=1) / end.h[node].flatten(1).norm(dim=1)
    np.testing.assert_allclose(found.distance[0][0], wanted.numpy(), rtol=1e-3)


def test_a_network_without_levels_has_none():
    x, y = _batch()
    assert level_settling(ConvHopfield((1, 28, 28), 10, channels=(4, 6)), x, y) is None


def test_show_draws_the_levels_of_a_run(tmp_path: Path):
    config = training.config_for(
        "mstep", {"channels": (4, 6)}, epochs=1, limit_train=32, limit_test=20, out=str(tmp_path / "run"), threads=1
    )
    training.train(config)
    run_show(tmp_path / "run", None, Console(file=io.StringIO()))
    drawn = {p.stem for p in (tmp_path / "run" / "plots").glob("*.png")}
    assert {"levels", "level_maps", "residual"} <= drawn
    assert "level of the pyramid" in (tmp_path / "run" / "plots" / "index.html").read_text()
