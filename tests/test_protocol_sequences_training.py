"""Training on sequences: what is learned, breaks that change no number, tuning, results on disk, tables and picture."""

from __future__ import annotations

import json
import os
import signal
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from toreq import data
from toreq.data import SequenceTask
from toreq.errors import CheckpointError, ConfigError, DataError, DivergenceError
from toreq.evidence import Outcome, Quantity, Trial
from toreq.evidence.budgets import BUDGETS
from toreq.evidence.claim import Cost
from toreq.evidence.protocols import sequences
from toreq.evidence.protocols.sequences import __main__ as command
from toreq.evidence.protocols.sequences import plans, report, running
from toreq.evidence.protocols.sequences.training import Progress, Recipe, train
from toreq.training.interrupt import Interrupted

RECIPE = Recipe(12, 4, 1e-2, 95.0, 3, tested=8, warmup=2, save_every=0.0)


@pytest.fixture
def task() -> SequenceTask:
    # 26 sequences: epochs of six batches, one of which is cut short and left out
    return data.sequence_task("parity", train=26, test=8, length=4)


def _numbers(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def _run(task: SequenceTask, side: str, scratch: Path | None, recipe: Recipe = RECIPE, watch=None):
    model = sequences.build(side, task, 1500, 0)
    return model, train(model, task, recipe, seed=0, scratch=scratch, watch=watch)


def test_an_lstm_learns_parity_and_the_samples_are_counted():
    task = data.sequence_task("parity", train=4000, test=200, length=5)
    recipe = Recipe(160, 32, 1e-2, 95.0, 20, tested=200)
    model = sequences.build("lstm", task, 2000, 0)
    at = train(model, task, recipe, seed=0)
    assert at.curve[0][1] < 70
    assert at.curve[-1][1] == pytest.approx(100.0)
    first = next(samples for samples, value in at.curve if value >= 95)
    assert at.reached == first < 160 * 32
    assert first % (20 * 32) == 0
    # parity of every prefix is a machine of two states: what has learned it, has learned it for any length
    assert sequences.evaluate(model, task, task.longer["4x"]).metric > 95


def test_equilibrium_propagation_learns_to_sort():
    task = data.sequence_task("sort", train=2000, test=100, length=3, longer=())
    recipe = Recipe(40, 16, 1e-2, 95.0, 40, tested=50, warmup=10)
    model = sequences.build("looped-eqprop", task, 3000, 0)
    at = train(model, task, recipe, seed=0)
    assert at.losses[-1][1] < 0.85 * at.losses[0][1]
    assert at.settled == pytest.approx(40)


@pytest.mark.parametrize("side", ["lstm", "ssm", "looped-eqprop"])
def test_a_broken_training_goes_on_to_the_same_numbers(task: SequenceTask, side: str, tmp_path: Path):
    whole, at = _run(task, side, None)

    def stop(progress: Progress) -> None:
        if progress.step == 6:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="step 6 of 12, which is kept"):
        _run(task, side, tmp_path, watch=stop)
    resumed, again = _run(task, side, tmp_path)
    assert again.resumed == 1
    assert torch.equal(_numbers(resumed), _numbers(whole))
    assert (again.curve, again.losses, again.step, again.relaxed) == (at.curve, at.losses, at.step, at.relaxed)
    # a finished one has nothing left to do
    finished, last = _run(task, side, tmp_path)
    assert torch.equal(_numbers(finished), _numbers(whole))
    assert last.curve == at.curve


def test_a_training_that_was_killed_goes_on_at_the_step_saved_last(task: SequenceTask, tmp_path: Path):
    whole, at = _run(task, "gru", None)

    def die(progress: Progress) -> None:
        if progress.step == 9:
            raise MemoryError

    with pytest.raises(MemoryError):
        _run(task, "gru", tmp_path, watch=die)
    seen: list[int] = []
    resumed, again = _run(task, "gru", tmp_path, watch=lambda progress: seen.append(progress.step))
    assert seen == [9, 12]
    assert torch.equal(_numbers(resumed), _numbers(whole))
    assert again.curve == at.curve


def test_the_state_of_another_training_is_refused(task: SequenceTask, tmp_path: Path):
    _run(task, "lstm", tmp_path)
    with pytest.raises(CheckpointError, match="another folder"):
        _run(task, "lstm", tmp_path, replace(RECIPE, rate=2e-2))
    with pytest.raises(CheckpointError, match="another folder"):
        _run(task, "transformer", tmp_path)


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_the_rate_rises_stays_and_falls_to_zero(task: SequenceTask, monkeypatch: pytest.MonkeyPatch, share: float):
    rates: list[float] = []
    step = torch.optim.Adam.step

    def seen(self: torch.optim.Adam, *arguments: object) -> object:
        rates.append(self.param_groups[0]["lr"] / RECIPE.rate)
        return step(self, *arguments)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(torch.optim.Adam, "step", seen)
    model = sequences.build("gru", task, 1500, 0)
    train(model, task, RECIPE, seed=0, cooldown=share)
    long = round(12 * share)
    falling = [(i + 1) / long for i in reversed(range(long))]
    wanted = [min(a, b) for a, b in zip([0.5, *[1.0] * 11], [1.0] * (12 - long) + falling, strict=True)]
    assert rates == pytest.approx(wanted)


def test_a_cooldown_is_part_of_what_a_training_is(task: SequenceTask, tmp_path: Path):
    _run(task, "gru", tmp_path)
    model = sequences.build("gru", task, 1500, 0)
    with pytest.raises(CheckpointError, match="another folder"):
        train(model, task, RECIPE, seed=0, scratch=tmp_path, cooldown=0.5)
    with pytest.raises(ConfigError, match="cooldown in"):
        train(model, task, RECIPE, seed=0, cooldown=1.5)


def test_a_loss_that_is_not_finite_stops_the_training(task: SequenceTask):
    model = sequences.build("lstm", task, 1500, 0)
    with torch.no_grad():
        next(iter(model.parameters())).fill_(torch.nan)
    with pytest.raises(DivergenceError, match="lower rate"):
        train(model, task, RECIPE, seed=0)


def test_bad_recipes_are_refused():
    for changes in ({"steps": 0}, {"rate": 0.0}, {"batch": 0}, {"tested": 0}, {"evaluate_every": 0}):
        with pytest.raises(ConfigError):
            replace(RECIPE, **changes)  # pyright: ignore[reportArgumentType]


# --- tuning


def test_held_out_sequences_come_from_the_training_set_and_leave_it():
    task = data.sequence_task("copy", train=100, test=30, length=3)
    tuned = sequences.held_out(task)
    assert (len(tuned.train), len(tuned.test)) == (90, 10)
    whole = {bytes(x) for x in task.train.x.tolist()}
    parts = [{bytes(x) for x in part.x.tolist()} for part in (tuned.train, tuned.test)]
    assert parts[0] | parts[1] == whole
    assert not parts[0] & parts[1]
    assert not tuned.longer
    assert tuned.test.mask is not None
    for share in (0.0, 1.0):
        with pytest.raises(ConfigError, match="both parts"):
            sequences.held_out(task, share)


def test_the_objective_of_tuning_does_not_look_at_the_test_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    trial = Trial(BUDGETS["smoke"], "lstm", 10_000, "cpu", tmp_path / "one")
    found = sequences.rate_of("lstm", "parity", trial, {"rate": 1e-3})
    made = data.sequence_task("parity", **sequences.plan("parity", BUDGETS["smoke"]).options, seed=10_000)
    spoiled = replace(made, test=replace(made.test, y=1 - made.test.y))
    monkeypatch.setattr(plans, "make", lambda *arguments: spoiled)
    again = sequences.rate_of("lstm", "parity", replace(trial, scratch=tmp_path / "two"), {"rate": 1e-3})
    assert found == again < 0
    sequences.SPACE.check({"rate": 3e-3})


# --- results on disk


def _measure(file: Path, said: list[str], **changes: object) -> running.Results:
    settings: dict[str, object] = {
        "seeds": [0, 1],
        "tasks": ["parity"],
        "sides": ["lstm"],
        "trials": 1,
        "command": "measure it",
        "say": said.append,
    }
    with warnings.catch_warnings():
        # optuna calls parts of itself experimental
        warnings.simplefilter("ignore")
        return running.measure(file, BUDGETS["smoke"], **{**settings, **changes})  # pyright: ignore[reportArgumentType]


def test_what_is_measured_is_kept_and_not_measured_again(tmp_path: Path):
    file, said = tmp_path / "r.json", []
    first = _measure(file, said)
    assert sorted(first.runs) == [("parity", "lstm", 0), ("parity", "lstm", 1)]
    assert len(said) == 3
    assert not (tmp_path / ".scratch" / "r").exists()
    again = running.read(file)
    assert again.to_json() == first.to_json()
    both = _measure(file, said, seeds=[0], sides=["lstm", "gru"])
    assert len(said) == 5
    assert sorted(both.runs)[0] == ("parity", "gru", 0)
    assert both.outcomes("parity", "lstm") == again.outcomes("parity", "lstm")
    assert both.tuned["parity", "gru"].best == both.tuned["parity", "lstm"].best == {"rate": 3e-3}


def test_results_of_another_plan_or_file_are_refused(tmp_path: Path):
    file = tmp_path / "r.json"
    _measure(file, [], trials=0, seeds=[0])
    values = json.loads(file.read_text(encoding="utf-8"))
    values["plans"]["parity"]["parameters"] += 1
    file.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(DataError, match="today's plan"):
        _measure(file, [])
    file.write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="move the file away"):
        _measure(file, [])
    assert file.read_text(encoding="utf-8") == "{"


def _outcome(accuracy: float, samples: float | None) -> Outcome:
    metrics = {
        "accuracy": Quantity(accuracy, "%"),
        "samples to threshold": Quantity(samples, "samples"),
        "threshold": Quantity(95.0, "%"),
        "rate": Quantity(0.003, ""),
        "processor time": Quantity(7.0, "s"),
        "accuracy, 2x length": Quantity(51.0, "%"),
    }
    curve = [(0.0, 50.0), (100.0, accuracy)]
    return Outcome(metrics, {"accuracy": curve}, Cost(1234, 5e9, 100), ("parity-4-seed0",))


def _results() -> running.Results:
    results = running.Results("smoke", {"parity": {"recipe": {"steps": 2, "batch": 4}}})
    for seed, (accuracy, samples) in enumerate(((90.0, None), (96.0, 100.0), (99.0, 200.0))):
        outcome = _outcome(accuracy, samples)
        results.runs["parity", "ssm", seed] = {"outcome": outcome, "seconds": 1.0, "commit": None, "command": "do it"}
    return results


def test_the_table_says_means_intervals_and_how_many_got_there():
    text = report.tables(_results())
    (row,) = (line for line in text.splitlines() if line.startswith("| ssm"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    # Student's interval of three: 4.303 deviations / sqrt 3; of two: 12.706 / sqrt 2
    assert cells == [
        "ssm",
        "95.00 ± 11.38",
        "150 ± 635 (2 of 3)",
        "51.0 ± 0.0",
        "1,234",
        "5",
        "7",
        "0.003",
        "3",
    ]
    assert "samples to 95 %" in text
    assert "    do it" in text


def test_the_page_gets_table_and_picture_between_its_marks(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n", encoding="utf-8")
    report.write(_results(), page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "old" not in text
    assert "| ssm |" in text
    light, dark = ((tmp_path / name).read_bytes() for name in report.PICTURES)
    assert light.startswith(b"\x89PNG")
    assert light != dark
    (axes, legend) = report.picture(_results(), "light").axes
    assert axes.get_title("left") == "parity"
    assert np.asarray(axes.lines[0].get_ydata()).tolist() == [50.0, pytest.approx(95.0)]
    assert not legend.axison
    page.write_text("no marks", encoding="utf-8")
    with pytest.raises(DataError, match="marks"):
        report.write(_results(), page)


def test_the_command_measures_and_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    words = ["--tasks", "parity", "--sides", "lstm", "--budget", "smoke", "--seeds", "1", "--trials", "0"]
    assert command.main(words) == 0
    assert "parity, lstm, seed 0: accuracy" in capsys.readouterr().out
    file = command.OUT / "sequences-smoke.json"
    assert " ".join(words) in running.read(file).runs["parity", "lstm", 0]["command"]
    page = tmp_path / "page.md"
    page.write_text(f"{report.BEGIN}\n{report.END}", encoding="utf-8")
    assert command.main(["--budget", "smoke", "--report", "--page", str(page)]) == 0
    assert "| lstm |" in page.read_text(encoding="utf-8")
    file.write_text("{}", encoding="utf-8")
    assert command.main(words) == 1
    assert "move the file away" in capsys.readouterr().err


def test_the_page_shows_the_committed_results():
    root = Path(__file__).parents[1]
    text = (root / report.PAGE).read_text(encoding="utf-8")
    shown = text[text.index(report.BEGIN) + len(report.BEGIN) : text.index(report.END)]
    assert shown.strip() == report.tables(running.read(root / command.OUT / "sequences-quick.json")).strip()
