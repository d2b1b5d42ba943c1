"""Runs of the continual-learning protocol: what is measured, going on after an interruption, the sides, the runner."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from continual_data import images
from toreq.errors import CheckpointError, ConfigError
from toreq.evidence import BUDGETS, Outcome, Trial
from toreq.evidence.protocols.continual import (
    SIDES,
    STREAMS,
    ClassMeans,
    DriftingStream,
    Mixed,
    RecursiveRidge,
    SplitMNIST,
    Stream,
    create,
    fits,
    learner,
    run,
    running,
    side,
    summary,
    tuning,
)
from toreq.evidence.protocols.continual import report as pages
from toreq.evidence.protocols.continual import sides as baselines
from toreq.evidence.protocols.continual.__main__ import main
from toreq.training.interrupt import Interrupted

ROOT = Path(__file__).resolve().parent.parent
SMOKE = BUDGETS["smoke"]
QUICK = ROOT / "evidence" / "results" / "protocols" / "continual-quick.json"


def trial(name: str, scratch: Path, **changes: Any) -> Trial:
    return dataclasses.replace(Trial(SMOKE, name, 0, "cpu", scratch), **changes)


def tiny(name: str = "split") -> Stream:
    """A stream of small images."""
    if name == "drifting":
        return DriftingStream(0, phases=3, batch_size=5, data=images())
    return SplitMNIST(0, batch_size=5, data=images())


class Scripted:
    """Answers the class that it was told last."""

    boundaries, flops = False, 0.0

    def __init__(self) -> None:
        self.answer, self.asked = -1, 0

    def observe(self, x: Tensor, y: Tensor) -> None:
        self.answer = int(y[-1])

    def predict(self, x: Tensor) -> Tensor:
        self.asked += 1
        return torch.full((len(x),), self.answer)

    def boundary(self) -> None:
        raise AssertionError("it asked for no boundaries")

    def parameters(self) -> int:
        return 1

    def memory(self) -> int:
        return 0

    def state(self) -> Any:
        return {}, {"answer": self.answer}

    def restore(self, state: Any) -> None:
        self.answer = state[1]["answer"]


# -- what is measured


def test_the_numbers_of_a_matrix_are_those_worked_out_by_hand() -> None:
    found = summary([[0.9, 0.1, 0.2], [0.6, 0.8, 0.3], [0.7, 0.5, 1.0]])
    assert found["final accuracy"].value == pytest.approx(100 * (0.7 + 0.5 + 1.0) / 3)
    assert found["forgetting"].value == pytest.approx(100 * ((0.9 - 0.7) + (0.8 - 0.5)) / 2)
    assert found["backward transfer"].value == pytest.approx(100 * ((0.7 - 0.9) + (0.5 - 0.8)) / 2)
    # better later than it ever was: negative forgetting, which the accuracy at its own end does not show
    better = summary([[0.5, 0.0], [0.6, 0.9]])
    assert better["forgetting"].value == pytest.approx(-10)
    assert summary([[0.5, 0.6]])["forgetting"].value is None


def test_a_learner_is_tested_on_a_batch_before_it_learns_from_it_and_on_every_set_after_a_phase() -> None:
    stream, scripted = tiny(), Scripted()
    outcome = run(stream, scripted)
    last, right = -1, 0
    for number in range(len(stream)):
        batch = stream.batch(number)
        right += int((batch.y == last).sum())
        last = int(batch.y[-1])
        if batch.last:
            row = outcome.curves[f"after phase {batch.phase + 1}"]
            wanted = [100 * float((stream.test(j)[1] == last).double().mean()) for j in range(5)]
            assert [y for _, y in row] == pytest.approx(wanted)
    assert outcome.metrics["prequential accuracy"].value == pytest.approx(100 * right / 40)
    assert scripted.asked == len(stream) + 25
    assert outcome.cost.samples == 40
    windows = outcome.curves["prequential accuracy"]
    assert windows[-1][0] == 40
    past = [y for _, y in outcome.curves["accuracy on the past"]]
    assert past[0] == outcome.curves["after phase 1"][0][1]


def test_joint_training_has_no_past() -> None:
    outcome = run(Mixed(tiny()), ClassMeans(36, 10))
    assert "accuracy on the past" not in outcome.curves
    assert outcome.metrics["forgetting"].value is None
    assert run(tiny(), ClassMeans(36, 10)).metrics["final accuracy"] == outcome.metrics["final accuracy"]


# -- interruptions


class Stops(Stream):
    """A stream that is torn off at a batch, as by a loss of power."""

    def __init__(self, inner: Stream, at: int) -> None:
        vars(self).update(vars(inner))
        self.inner, self.at, self.name, self.tests = inner, at, inner.name, inner.tests
        self.boundaries = inner.boundaries

    def describe(self) -> dict[str, Any]:
        return self.inner.describe()

    def batch(self, number: int) -> Any:
        if number == self.at:
            raise KeyboardInterrupt
        return self.inner.batch(number)

    def render(self, x: Tensor, place: Tensor) -> Tensor:
        return self.inner.render(x, place)

    def test(self, number: int) -> tuple[Tensor, Tensor]:
        return self.inner.test(number)


@pytest.mark.parametrize("name", SIDES)
def test_an_interrupted_run_equals_an_unbroken_one(name: str, tmp_path: Path) -> None:
    stream: Stream = Mixed(tiny()) if SIDES[name].mixed else tiny()
    whole = run(stream, learner(name, stream, trial(name, tmp_path)))
    for at in (3, 7):
        own = learner(name, stream, trial(name, tmp_path))
        with pytest.raises(KeyboardInterrupt):
            run(Stops(stream, at), own, scratch=tmp_path, save_every=0)
        torch.manual_seed(99)  # another process has another state
    seen: list[int] = []
    last = learner(name, stream, trial(name, tmp_path))
    observe = last.observe
    last.observe = lambda x, y: (seen.append(len(y)), observe(x, y))[1]  # type: ignore[method-assign]
    resumed = run(stream, last, scratch=tmp_path, save_every=0)
    assert sum(seen) == stream.samples - sum(len(stream.batch(i).y) for i in range(7))
    assert resumed.notes == ("interrupted and continued 2 times",)
    assert resumed.metrics == whole.metrics
    assert resumed.curves == whole.curves
    assert resumed.cost == whole.cost


def test_a_signal_ends_the_batch_saves_and_says_so(tmp_path: Path) -> None:
    stream, first = tiny(), ClassMeans(36, 10)
    observe, done = first.observe, []

    def observed(x: Tensor, y: Tensor) -> None:
        done.append(len(y))
        if len(done) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        observe(x, y)

    first.observe = observed  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match="stopped after batch 4 of 10, which is kept"):
        run(stream, first, scratch=tmp_path, save_every=1e9)
    assert run(stream, ClassMeans(36, 10), scratch=tmp_path).metrics == run(stream, ClassMeans(36, 10)).metrics


def test_the_state_of_another_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(Stops(tiny(), 3), ClassMeans(36, 10), scratch=tmp_path, save_every=0)
    other = SplitMNIST(1, batch_size=5, data=images())
    with pytest.raises(CheckpointError, match="use another folder"):
        run(other, ClassMeans(36, 10), scratch=tmp_path)
    with pytest.raises(CheckpointError, match="use another folder"):
        run(tiny(), RecursiveRidge(36, 10, 8), scratch=tmp_path)


# -- the sides


@pytest.mark.parametrize("name", SIDES)
@pytest.mark.parametrize("stream", ["split", "drifting"])
def test_every_side_gives_finite_numbers_of_one_shape(name: str, stream: str, tmp_path: Path) -> None:
    if not fits(name, stream):
        with pytest.raises(ConfigError, match="needs no end of a task"):
            side(name, trial(name, tmp_path), tiny("drifting"))
        return
    outcome = side(name, trial(name, tmp_path), tiny(stream))
    assert Outcome.from_json(json.loads(json.dumps(outcome.to_json()))) == outcome
    for metric, quantity in outcome.metrics.items():
        assert (quantity.value is None) == (SIDES[name].mixed and metric in ("forgetting", "backward transfer"))
        assert quantity.value is None or math.isfinite(quantity.value)
    assert outcome.cost.flops
    assert outcome.cost.parameters
    assert outcome.cost.samples == 40


@pytest.mark.parametrize("stream", STREAMS)
def test_streams_of_a_budget_are_drawn_from_mnist(stream: str, tmp_path: Path) -> None:
    outcome = side("class means", trial("class means", tmp_path), stream)
    assert (outcome.metrics["final accuracy"].value or 0) > 30
    made = create(stream, BUDGETS["smoke"], 0)
    assert made.describe()["data"] == "mnist"


def test_tuning_sees_training_images_alone_and_gives_every_side_as_much() -> None:
    held = create("split", SMOKE, 0, validation=True)
    train = {bytes(x.numpy().tobytes()) for x in baselines.mnist().train_x}
    assert all(bytes(x.numpy().tobytes()) in train for x in held.data.test_x)
    assert not {x.numpy().tobytes() for x in held.data.test_x} & {x.numpy().tobytes() for x in held.data.train_x}
    found = tuning("permuted")
    assert found.spaces.keys() | found.untuned.keys() == SIDES.keys()
    assert "EWC" not in tuning("drifting").spaces
    assert all(found.start[name] == SIDES[name].shipped for name in found.spaces)


def test_tuned_values_reach_the_learner(tmp_path: Path) -> None:
    made = learner("EWC", tiny(), trial("EWC", tmp_path, tuned={"strength": 7.0}))
    assert made.strength == 7.0  # type: ignore[attr-defined]
    assert made.optimizer.param_groups[0]["lr"] == SIDES["EWC"].shipped["learning_rate"]  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="strenght"):
        learner("EWC", tiny(), trial("EWC", tmp_path, tuned={"strenght": 7.0}))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: create("splt", SMOKE, 0), "did you mean 'split'"),
        (lambda: baselines.find("ridge, 1K "), "did you mean 'ridge, 1k'"),
        (lambda: tuning("permutd"), "did you mean 'permuted'"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(call: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


# -- the runner and the page

NAMES = ("class means", "ridge, 1k", "ridge, 4k")


def test_the_runner_tunes_keeps_what_is_done_and_sets_aside_what_is_not_its_own(tmp_path: Path) -> None:
    file, said = tmp_path / "continual-smoke.json", []
    options: dict[str, Any] = {"streams": ["split"], "names": NAMES, "trials": 2, "say": said.append}
    found = running.measure(file, SMOKE, seeds=[0], **options)
    assert set(found.runs) == {("split", name, 0) for name in NAMES}
    assert len(found.tuned["split", "ridge, 1k"].trials) == 2
    assert found.runs["split", "ridge, 4k", 0]["tuned"] == found.tuned["split", "ridge, 1k"].best
    assert running.load(file).to_json() == found.to_json()
    count = len(said)
    again = running.measure(file, SMOKE, seeds=[0, 1], **options)
    assert len(said) == count + 3  # seed 1 alone, nothing is tuned twice
    assert again.outcomes["split", "ridge, 1k", 0] == found.outcomes["split", "ridge, 1k", 0]
    (scratch,) = (tmp_path / ".scratch").glob("continual-smoke-*")
    assert not any((scratch / "split-ridge-1k").iterdir())
    running.measure(file, SMOKE, seeds=[0], **{**options, "trials": 0, "names": ["class means"]})
    assert (tmp_path / "continual-smoke.json.stale-1").exists()
    file.write_text("{", encoding="utf-8")
    running.measure(file, SMOKE, seeds=[0], **{**options, "trials": 0, "names": ["class means"]})
    assert (tmp_path / "continual-smoke.json.corrupt-1").exists()


def test_the_command_writes_a_file_and_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, page = tmp_path / "continual-smoke.json", tmp_path / "page.md"
    words = ["--budget", "smoke", "--seeds", "2", "--trials", "0", "--out", str(file)]
    assert main([*words, "--streams", "split", "drifting", "--sides", "class means", "fine-tuning", "joint"]) == 0
    page.write_text("# A\n\n<!-- begin continual-smoke -->\n<!-- end continual-smoke -->\n", encoding="utf-8")
    monkeypatch.setattr(pages, "PAGE", page)
    pages.write(file, page)
    text = page.read_text(encoding="utf-8")
    found = running.load(file)
    value = found.outcomes["split", "class means", 0].metrics["final accuracy"].value
    assert value is not None
    assert re.search(rf"^\| class means \| {value:.1f} ", text, re.MULTILINE)
    assert "told: EWC." in text
    assert "Still to be measured: fine-tuning, SGD; EWC; online EWC; LSTM; EqProp; ridge, 1k; ridge, 4k." in text
    assert str(tmp_path) not in text
    drawn = (tmp_path / "continual-smoke-dark.svg").read_text(encoding="utf-8")
    assert "class means" in drawn
    assert main([*words, "--trials", "-1"]) == 1


def test_the_page_shows_the_committed_results() -> None:
    page = (ROOT / "docs" / "protocols" / "continual.md").read_text(encoding="utf-8")
    found = running.load(QUICK)
    assert pages.replaced(page, QUICK.stem, pages.body(found)) == page, f"run: {found.command} --report"
    assert found.runs.keys() == {key for key in found.runs if key[0] in STREAMS and key[1] in SIDES}
    assert running.fingerprint("quick", found.trials) == json.loads(QUICK.read_text())["protocol"], "measure anew"
