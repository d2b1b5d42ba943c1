"""`toreq show` of state-space maps: eigenvalues in the unit disk, and the tokens settling."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from toreq import systems, training
from toreq.diagnostics.plots import png
from toreq.diagnostics.scans import draw_eigenvalues, draw_tokens, scans
from toreq.diagnostics.show import run_show
from toreq.solvers import FixedPoint
from toreq.systems.tepssr_nets import StateSpaceClassifier


def _net() -> tuple[StateSpaceClassifier, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    net = StateSpaceClassifier((9, 2), 3, features=8, hidden=6, layers=2, gain=2.0, states=2)
    x = torch.randn(4, 9, 2, generator=torch.Generator().manual_seed(1))
    return net, x, torch.tensor([0, 1, 2, 0])


def test_eigenvalues_are_those_of_the_maps_and_distances_fall_to_the_tolerance() -> None:
    net, x, y = _net()
    net.equilibrium.solver = FixedPoint(tolerance=1e-3)
    found = scans(net, x, y)
    assert found is not None
    assert [v.shape for v in found.eigenvalues] == [(12,), (12,)]
    assert all(np.all(np.abs(v) < 1) for v in found.eigenvalues)
    rate = net.maps()[1].log_rate.detach().exp().flatten()
    np.testing.assert_allclose(np.abs(found.eigenvalues[1]), (-rate).exp().numpy(), rtol=1e-5)
    assert found.distance.shape[1] == 9
    assert np.all(found.distance[0] > found.distance[-1])
    assert np.all(found.distance[-1] < 2e-2)
    # the settings that the layer had are back
    assert net.equilibrium.solver.tolerance == 1e-3


def test_a_network_without_maps_has_none() -> None:
    net = systems.create("toreqprop", (1, 28, 28), 10, hidden=(8,))
    assert scans(net, torch.rand(2, 1, 28, 28), torch.tensor([0, 1])) is None


def test_pictures_are_drawn_in_both_themes() -> None:
    net, x, y = _net()
    found = scans(net, x, y)
    assert found is not None
    for theme in ("light", "dark"):
        assert len(png(draw_eigenvalues(found.eigenvalues, theme))) > 5000
        assert len(png(draw_tokens(found.distance, theme))) > 5000


def test_show_draws_the_maps_of_a_run(tmp_path: Path) -> None:
    config = training.config_for(
        "tepssr", {"features": 8, "hidden": 8, "heads": 2}, epochs=1, limit_train=32, limit_test=20,
        out=str(tmp_path / "run"), threads=1,
    )  # fmt: skip
    training.train(config)
    run_show(tmp_path / "run", None, Console(file=io.StringIO()))
    drawn = {p.stem for p in (tmp_path / "run" / "plots").glob("*.png")}
    assert {"eigenvalues", "tokens", "residual"} <= drawn
    assert "inside the unit disk" in (tmp_path / "run" / "plots" / "index.html").read_text()
