"""`toreq show` of a predictive network: the error of each level by step."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from toreq import data, systems, training
from toreq.diagnostics.errors import level_errors
from toreq.diagnostics.show import run_show
from toreq.systems import registry
from toreq.systems.tpeqprop_nets import ARCHITECTURES, PredictiveMLP, PredictiveResidual
from toreq.training import recipes


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    digits = data.load("mnist").limit(6, 1)
    return digits.inputs("train", slice(None)), digits.train_y


def test_errors_travel_one_level_a_step_and_end_at_those_of_the_estimator():
    torch.manual_seed(0)
    net = PredictiveResidual((1, 28, 28), 10, width=12, levels=5)
    x, y = _batch()
    found = level_errors(net, x, y)
    assert found is not None
    assert found.names == ("h1", "h2", "h3", "h4", "h5")
    assert found.sizes.shape == (5, 5, 6)
    # after t steps the last t + 1 levels have heard of the nudge, and no other
    reached = (found.sizes > 0).all(axis=2)
    assert np.array_equal(reached, np.tri(5, dtype=bool)[:, ::-1])
    wanted = net.errors(x, y)
    top = wanted["h5"]
    for place, name in enumerate(found.names):
        np.testing.assert_allclose(found.sizes[-1, place], (wanted[name] / top).numpy(), rtol=1e-4)


def test_errors_of_a_loop_settle():
    torch.manual_seed(0)
    net = PredictiveMLP((1, 28, 28), 10, hidden=(16,), topology="loop").double()
    x, y = _batch()
    found = level_errors(net, x.double(), y)
    assert found is not None
    assert 3 < len(found.sizes) <= 200
    # what the nudge adds comes round again, smaller each time
    change = np.abs(np.diff(found.sizes[:, 0], axis=0)).max(axis=1)
    assert change[-1] < 1e-4 * change[0]
    assert found.sizes[0] == pytest.approx(1.0)


def test_a_network_that_predicts_nothing_has_no_errors():
    x, y = _batch()
    assert level_errors(systems.create("toreqprop", (1, 28, 28), 10, hidden=(8,)), x, y) is None


def test_show_draws_the_errors_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(registry._SYSTEMS, "tpeqprop", ARCHITECTURES)
    monkeypatch.setitem(recipes._TRAIN, ("tpeqprop", "mlp"), {"epochs": 1})
    config = training.config_for(
        "tpeqprop", {"hidden": (8, 8)}, epochs=1, limit_train=32, limit_test=20, out=str(tmp_path / "run"), threads=1
    )
    training.train(config)
    run_show(tmp_path / "run", None, Console(file=io.StringIO()))
    drawn = {p.stem for p in (tmp_path / "run" / "plots").glob("*.png")}
    assert {"errors", "residual"} <= drawn
    assert "each level&#x27;s error" in (tmp_path / "run" / "plots" / "index.html").read_text()
