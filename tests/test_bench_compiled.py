"""The bench of torch.compile, with tiny trainers: rows and ratios, what is compared, and nothing judged."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from toreq import systems
from toreq.bench import compiled
from toreq.bench.plots import draw
from toreq.bench.references import ModuleTrainer, Trainer

SEEN: list[tuple[str, str, bool, int]] = []


class Sleeper(Trainer):
    """Counts its batches; the compiled one takes a tenth of the time."""

    def __init__(self, arch: str, settings: str, is_compiled: bool) -> None:
        self.key = (arch, settings, is_compiled)
        self.seconds = 1e-3 if is_compiled else 1e-2

    def step(self, images: Tensor, labels: Tensor) -> None:
        assert images.shape == (compiled.BATCH, 1, 28, 28)
        SEEN.append((*self.key, torch.get_num_threads()))
        time.sleep(self.seconds)

    def predict(self, images: Tensor) -> Tensor:
        raise AssertionError


@pytest.fixture
def result(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    SEEN.clear()
    monkeypatch.setattr(compiled, "_trainer", Sleeper)
    return compiled.run(archs=("mlp", "conv"), settings=("fast",), threads=(1,), repetitions=5, warm=2)


def test_every_side_has_a_row_and_every_net_a_ratio(result: dict[str, Any]) -> None:
    assert result["bench"] == "compiled"
    assert [(r["arch"], r["settings"], r["side"], r["threads"]) for r in result["rows"]] == [
        (arch, "fast", side, 1) for arch in ("mlp", "conv") for side in ("eager", "compiled")
    ]
    assert all(0 < r["step_minimum_ms"] <= r["step_median_ms"] for r in result["rows"])
    assert draw(result).axes


def test_the_ratio_is_the_gain_and_is_not_judged(result: dict[str, Any]) -> None:
    for i, line in enumerate(result["ratios"]):
        eager, fast = result["rows"][2 * i], result["rows"][2 * i + 1]
        assert line["value"] == pytest.approx(eager["step_median_ms"] / fast["step_median_ms"])
        assert line["value"] > 1.5
        assert (line["target"], line["holds"]) == (None, None)


def test_both_sides_are_warm_and_take_turns(result: dict[str, Any]) -> None:
    kinds = [is_compiled for arch, _, is_compiled, _ in SEEN if arch == "mlp"]
    assert kinds[:4] == [False, False, True, True], "the warm steps"
    timed = kinds[4:]
    assert timed == [False, True] * (len(timed) // 2)
    assert len(timed) >= 10
    assert {count for *_, count in SEEN} == {1}


@pytest.mark.parametrize("on", [False, True])
def test_only_the_solver_differs(on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[systems.System] = []
    create = systems.create
    monkeypatch.setattr(systems, "create", lambda *args, **kwargs: made.append(create(*args, **kwargs)) or made[-1])
    trainer = compiled._trainer("hopfield", "fast", on)
    assert isinstance(trainer, ModuleTrainer)
    (net,) = made
    assert net.config["settings"] == "fast"
    assert net.equilibrium.solver.compile is on
    assert net.equilibrium.solver.tolerance == 1e-2
