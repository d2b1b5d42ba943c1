"""Training: what a run writes, that it goes on exactly after a break, and that divergence loses nothing."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from toreq import data as datasets
from toreq import systems, training
from toreq.errors import CheckpointError, ConfigError, DataError, DivergenceError
from toreq.layer import Equilibrium, equilibria
from toreq.training import TrainConfig, checkpoint
from toreq.training.session import Session
from toreq.training.totals import Totals, difference, means

SUMMARY = {
    "system", "data", "variant", "seed", "parameters", "test_accuracy", "seconds_per_epoch", "samples_per_second",
    "free_steps_mean", "nudged_steps_mean", "converged_fraction", "asym_mean", "radius", "peak_memory_mb", "side",
    "epochs", "command", "environment", "couplings_off_accuracy",
}  # fmt: skip
CLOCK = {"seconds", "samples_per_second", "peak_memory_mb"}


def _config(out: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "set": {"hidden": (24,)}, "epochs": 2, "limit_train": 400, "limit_test": 200, "batch_size": 50,
        "learning_rate": 3e-3, "device": "cpu", "deterministic": True, "out": str(out), **changes,
    }  # fmt: skip
    return TrainConfig("toreqprop", **values)


def _lines(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what a clock measured."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]


def _weights(run: Path) -> dict[str, Tensor]:
    return checkpoint.load(run / "checkpoint")[0]


def _assert_same_run(found: Path, expected: Path) -> None:
    assert _lines(found) == _lines(expected)
    one, other = _weights(found), _weights(expected)
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


# -- configuration


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"epochs": 0}, "at least 1"),
        ({"epochs": True}, "whole number"),
        ({"seed": -1}, "at least 0"),
        ({"limit_train": 0}, "at least 1"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"learning_rate": math.inf}, "learning_rate"),
        ({"warmup": 1.0}, "warmup"),
        ({"gradient_clip": -1.0}, "gradient_clip"),
        ({"side": "bp"}, "bp-ff"),
        ({"optimizer": "adm"}, "did you mean 'adam'"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"precision": "32"}, "precision"),
        ({"device": "gpu"}, "device"),
    ],
)
def test_a_value_out_of_range_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        TrainConfig.from_json({"system": "toreqprop", **changes})


def test_configurations_survive_json_and_refuse_unknown_fields(tmp_path: Path) -> None:
    config = _config(tmp_path, gradient_clip=1.0)
    again = TrainConfig.from_json(json.loads(json.dumps(config.to_json())))
    assert again == dataclasses.replace(config, set={"hidden": [24]})
    with pytest.raises(ConfigError, match="did you mean 'epochs'"):
        TrainConfig.from_json({"system": "toreqprop", "epoch": 3})
    with pytest.raises(ConfigError, match="'system'"):
        TrainConfig.from_json({"epochs": 3})


def test_the_learning_rate_rises_and_falls() -> None:
    config = TrainConfig("toreqprop", learning_rate=1.0, warmup=0.1, final_learning_rate=0.2)
    rates = [config.learning_rate_at(step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.6)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert config.learning_rate_at(100, 100) == pytest.approx(0.2)
    constant = dataclasses.replace(config, schedule="constant")
    assert {constant.learning_rate_at(step, 100) for step in range(10, 100)} == {1.0}


def test_recipes_are_valid_and_give_way_to_what_is_given() -> None:
    from toreq.training import recipes

    for name in systems.names():
        assert training.config_for(name).system == name
    for row in recipes.demo_rows():
        config = training.config_for(
            row.system, row.options, epochs=row.epochs, limit_train=row.limit_train, **row.train
        )
        assert isinstance(training.build(config, (1, 28, 28), 10), nn.Module)
    assert {row.system for row in recipes.demo_rows()} == set(systems.names())
    assert training.config_for("toreqprop", {}, epochs=77, learning_rate=0.5).epochs == 77


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"hiden": (8,)}, "hidden"),
        ({"solver.tolerence": 1e-3}, "did you mean 'tolerance'"),
        ({"solvr.tolerance": 1e-3}, "did you mean 'solver'"),
        ({"solver": "andersen"}, "anderson"),
        ({"estimator": "centred"}, "centered"),
    ],
)
def test_a_wrong_option_names_the_nearest(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        training.build(TrainConfig("toreqprop", set=options), (1, 4, 4), 3)


def test_options_reach_solver_and_estimator() -> None:
    options = {"hidden": (8,), "solver": "anderson", "solver.tolerance": 1e-3, "estimator": "onesided"}
    (layer,) = equilibria(training.build(TrainConfig("toreqprop", set=options), (1, 4, 4), 3))
    assert (type(layer.solver).__name__, layer.solver.tolerance) == ("Anderson", 1e-3)
    assert type(layer.estimator).__name__ == "OneSided"
    (layer,) = equilibria(training.build(TrainConfig("toreqprop", side="bp-eq"), (1, 4, 4), 3))
    assert type(layer.estimator).__name__ == "Implicit"


# -- sums and evaluation


def test_sums_give_means_over_examples_and_layers() -> None:
    net = systems.create("toreqprop", input_shape=(1, 4, 4), num_classes=3, hidden=(8,))
    layers = equilibria(net)
    totals = Totals(torch.device("cpu"))
    losses, hits, steps, asyms = [], [], [], []
    torch.manual_seed(1)
    for count in (5, 3):
        x, y = torch.rand(count, 1, 4, 4), torch.arange(count) % 3
        logits = net(x)
        loss = nn.functional.cross_entropy(logits, y)
        loss.backward()
        totals.add(layers, loss, logits, y)
        losses += nn.functional.cross_entropy(logits, y, reduction="none").tolist()
        hits += (logits.argmax(1) == y).tolist()
        steps += layers[0].last.free.steps.tolist()
        asyms += layers[0].last.nudged.asym.tolist()
    found = means(totals.read())
    assert found["loss"] == pytest.approx(sum(losses) / 8)
    assert found["accuracy"] == sum(hits) / 8
    assert found["free_steps_mean"] == pytest.approx(sum(steps) / 8)
    assert found["asym_mean"] == pytest.approx(sum(asyms) / 8)
    assert found["converged_fraction"] == 1.0
    again = Totals(torch.device("cpu"))
    again.write(totals.read())
    assert torch.equal(again.sums, totals.sums)
    assert set(difference(totals.read(), totals.read()).values()) == {0.0}


def test_a_network_without_relaxation_has_no_settle_statistics() -> None:
    totals = Totals(torch.device("cpu"))
    totals.add([], torch.tensor(1.0), torch.eye(3), torch.arange(3))
    found = means(totals.read())
    assert (found["accuracy"], found["free_steps_mean"], found["asym_mean"]) == (1.0, None, None)


def test_evaluation_is_that_of_a_plain_loop() -> None:
    net = systems.create("toreqprop", input_shape=(1, 4, 4), num_classes=3, hidden=(8,))
    x, y = torch.rand(23, 1, 4, 4), torch.arange(23) % 3
    before = torch.get_rng_state()
    found = training.evaluate(net, net.criterion, x, y, num_classes=3, batch_size=7)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        logits = net(x)
    answers = logits.argmax(1)
    assert found.accuracy == pytest.approx(float((answers == y).double().mean()))
    assert found.loss == pytest.approx(float(nn.functional.cross_entropy(logits, y)), rel=1e-4)
    assert found.confusion == [[int(((y == i) & (answers == j)).sum()) for j in range(3)] for i in range(3)]
    assert found.examples == 23
    assert found.settling["free_steps_mean"] == pytest.approx(
        float(equilibria(net)[0].last.free.steps.double().mean()), abs=3
    )
    blank = training.evaluate(net, net.criterion, x, y, num_classes=3, corrupt=torch.zeros_like)
    assert max(map(max, zip(*blank.confusion, strict=True))) >= 7
    assert sum(1 for column in zip(*blank.confusion, strict=True) if any(column)) == 1


def test_couplings_off_is_the_network_without_settling() -> None:
    net = systems.create("toreqprop", input_shape=(1, 4, 4), num_classes=3, hidden=(8,))
    (layer,) = equilibria(net)
    x, y = torch.rand(40, 1, 4, 4), torch.arange(40) % 3
    on = training.evaluate(net, net.criterion, x, y, num_classes=3)
    off = training.evaluate(net, net.criterion, x, y, num_classes=3, couplings=False)
    with torch.no_grad(), layer.couplings_off():
        expected = nn.functional.cross_entropy(net(x), y)
    assert off.loss == pytest.approx(float(expected), rel=1e-5)
    assert abs(off.loss - on.loss) > 1e-6
    assert training.evaluate(net, net.criterion, x, y, num_classes=3).loss == on.loss


# -- runs


def test_a_run_writes_all_it_should_and_learns(tmp_path: Path) -> None:
    config = _config(tmp_path / "run", epochs=4, limit_train=1000)
    summary = training.train(config, command="toreq train toreqprop")
    assert set(summary) >= SUMMARY
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert summary["test_accuracy"] > 0.6
    assert 0 < summary["radius"] < 1
    assert summary["converged_fraction"] > 0.99
    assert summary["steps"] == 4 * 20
    assert summary["parameters"] == sum(p.numel() for p in training.load_run(tmp_path / "run").net.parameters())
    lines = _lines(tmp_path / "run")
    assert [line["step"] for line in lines if line["kind"] == "step"] == [50]
    epochs = [line for line in lines if line["kind"] == "epoch"]
    assert [line["epoch"] for line in epochs] == [1, 2, 3, 4]
    assert epochs[-1]["loss"] < 0.7 * epochs[0]["loss"]
    assert any((tmp_path / "run" / "tensorboard").iterdir())
    assert not [path for path in (tmp_path / "run").rglob("*") if path.suffix in (".pt", ".pkl", ".pth", ".tmp")]


def test_a_run_read_back_gives_its_accuracy(tmp_path: Path) -> None:
    for side in ("eqprop", "bp-eq", "bp-ff"):
        summary = training.train(_config(tmp_path / side, side=side, epochs=1))
        run = training.load_run(tmp_path / side)
        data = training.prepare(run.config, "cpu")
        found = training.evaluate(run.model, run.net.criterion, data.test_x, data.test_y, num_classes=10)
        assert found.accuracy == summary["test_accuracy"]
        assert (summary["free_steps_mean"] is None) == (side == "bp-ff")
        assert (summary["couplings_off_accuracy"] is None) == (side == "bp-ff")


def test_the_same_seed_gives_the_same_numbers_and_another_does_not(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        training.train(_config(tmp_path / name, seed=seed, epochs=1))
    _assert_same_run(tmp_path / "a", tmp_path / "b")
    assert _lines(tmp_path / "a") != _lines(tmp_path / "c")


def _stop_at(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Have the session agree to stop after each of `steps`, as it does after a signal."""
    real = Session.agree

    def agree(self: Session, *flags: bool) -> list[bool]:
        found = real(self, *flags)
        return [True, *found[1:]] if self.at.step in steps and self.saved_step < self.at.step else found

    monkeypatch.setattr(Session, "agree", agree)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"side": "bp-ff"},
        {"side": "bp-eq", "optimizer": "sgd", "gradient_clip": 0.5, "schedule": "constant"},
        {"optimizer": "adamw", "weight_decay": 0.01, "warmup": 0.2, "set": {"hidden": (24,), "solver": "anderson"}},
    ],
)
def test_an_interrupted_run_goes_on_with_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    monkeypatch.setattr("toreq.training.loop.LOG_EVERY", 3)
    training.train(_config(tmp_path / "unbroken", **changes))
    # In the middle of an epoch, at its last step, and in the middle of the next.
    _stop_at(monkeypatch, 5, 8, 11)
    path = tmp_path / "it's broken"
    with pytest.raises(training.Interrupted, match="toreq train --resume"):
        training.train(_config(path, **changes))
    for _ in range(2):
        torch.rand(3)
        with pytest.raises(training.Interrupted):
            training.resume(path)
    summary = training.resume(path)
    _assert_same_run(path, tmp_path / "unbroken")
    assert summary["test_accuracy"] == json.loads((tmp_path / "unbroken" / "summary.json").read_text())["test_accuracy"]


class _Crash(BaseException):
    """Stands for the process dying."""


@pytest.mark.parametrize("call", [5, 6, 8, 11])
def test_a_crash_while_saving_is_recovered_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    training.train(_config(tmp_path / "unbroken"))
    real, calls = os.replace, 0

    def replace(source: str, target: str) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise _Crash
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        # A checkpoint after every step, so that lines after the last good one have to be taken back.
        with pytest.raises(_Crash):
            training.train(_config(tmp_path / "crashed", checkpoint_every=0.0))
    training.resume(tmp_path / "crashed")
    assert _lines(tmp_path / "crashed") == _lines(tmp_path / "unbroken")
    found, expected = _weights(tmp_path / "crashed"), _weights(tmp_path / "unbroken")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_lines_after_the_checkpoint_are_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toreq.training.loop.LOG_EVERY", 2)
    training.train(_config(tmp_path / "unbroken"))
    _stop_at(monkeypatch, 5)
    with pytest.raises(training.Interrupted):
        training.train(_config(tmp_path / "run"))
    monkeypatch.undo()
    monkeypatch.setattr("toreq.training.loop.LOG_EVERY", 2)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 6, "epoch": 1, "loss": 0.0}\n{"kind": "step", "st')
    training.resume(tmp_path / "run")
    _assert_same_run(tmp_path / "run", tmp_path / "unbroken")


def test_a_finished_run_is_extended_by_more_epochs_only(tmp_path: Path) -> None:
    training.train(_config(tmp_path / "run", epochs=1, schedule="constant"))
    with pytest.raises(training.RunError, match="--epochs 2"):
        training.resume(tmp_path / "run")
    assert training.resume(tmp_path / "run", epochs=2)["epochs"] == 2
    training.train(_config(tmp_path / "straight", epochs=2, schedule="constant"))
    assert _lines(tmp_path / "run") == _lines(tmp_path / "straight")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda run: (run / "config.json").unlink(), "expected the folder of a run"),
        (lambda run: (run / "config.json").write_text("{"), "expected JSON"),
        (lambda run: (run / "config.json").write_text("{}"), "not written by toreq"),
        (lambda run: (run / "checkpoint" / "state.json").unlink(), "nothing was saved"),
        (lambda run: (run / "checkpoint" / "state.json").write_text("{"), "truncated or foreign"),
    ],
)
def test_resuming_from_a_damaged_run_says_why(tmp_path: Path, damage: Any, reason: str) -> None:
    run = tmp_path / "run"
    training.train(_config(run, epochs=1))
    damage(run)
    with pytest.raises(CheckpointError, match=reason):
        training.resume(run, epochs=2)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    training.train(_config(tmp_path / "a", epochs=1))
    training.train(_config(tmp_path / "b", epochs=1, set={"hidden": (16,)}))
    for path in (tmp_path / "a" / "checkpoint").iterdir():
        path.unlink()
    (tmp_path / "a" / "checkpoint").rmdir()
    (tmp_path / "b" / "checkpoint").rename(tmp_path / "a" / "checkpoint")
    with pytest.raises(CheckpointError, match="other widths"):
        training.load_run(tmp_path / "a")


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def agree(self: Session, *flags: bool) -> list[bool]:
        nonlocal calls
        calls += 1
        if calls == 3:
            # Two signals within one step: the first asks, the second insists.
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return list(flags)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(Session, "agree", agree)
    with pytest.raises(training.Interrupted, match=r"at step 3; the checkpoint of step 0 is kept; go on with: toreq"):
        training.train(_config(tmp_path / "run"))
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.undo()
    assert training.resume(tmp_path / "run")["epochs"] == 2


def test_a_full_disk_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from toreq.training.run import RunFolder

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    folder = RunFolder(tmp_path)
    folder.append({"kind": "step", "step": 1, "radius": math.nan})
    assert folder.metrics() == [{"kind": "step", "step": 1, "radius": None}]
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(training.RunError, match=r"No space left on device; .*toreq train --resume"):
        folder.append({"kind": "step", "step": 2})


# -- bad input and divergence


def test_a_taken_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    note = tmp_path / "notes" / "thesis.txt"
    note.parent.mkdir()
    note.write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(training.RunError, match="choose another --out"):
            training.train(_config(note.parent), overwrite=overwrite)
        assert note.read_text() == "precious"
        for inside in (note, note / "run"):
            with pytest.raises(training.RunError, match="out:"):
                training.train(_config(inside), overwrite=overwrite)


def test_a_run_is_replaced_only_when_told_to(tmp_path: Path) -> None:
    training.train(_config(tmp_path / "run", epochs=1))
    before = _lines(tmp_path / "run")
    with pytest.raises(training.RunError, match=r"toreq train --resume .*--overwrite"):
        training.train(_config(tmp_path / "run", epochs=1, seed=5))
    assert _lines(tmp_path / "run") == before
    training.train(_config(tmp_path / "run", epochs=1, seed=5), overwrite=True)
    assert len(_lines(tmp_path / "run")) == len(before)
    assert _lines(tmp_path / "run") != before
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    with pytest.raises(training.RunError, match=r"thesis\.txt"):
        training.train(_config(tmp_path / "run"), overwrite=True)
    assert (tmp_path / "run" / "summary.json").exists()


def test_an_unknown_name_leaves_no_folder(tmp_path: Path) -> None:
    for changes in ({"data": "mnits"}, {"set": {"hiden": (8,)}}):
        with pytest.raises(ConfigError, match="did you mean"):
            training.train(_config(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("value", "label"), [(math.nan, 0), (math.inf, 0), (0.5, 10), (0.5, -1)])
def test_bad_data_are_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, label: int
) -> None:
    class Broken:
        num_classes, input_shape, variant = 10, (1, 28, 28), "broken"

        def limit(self, train: int | None, test: int | None) -> Broken:
            return self

        def inputs(self, split: str, index: slice) -> Tensor:
            x = torch.full((6, 1, 28, 28), 0.5)
            x[4, 0, 3, 3] = value if split == "test" else 0.5
            return x

        def split(self, split: str) -> tuple[None, Tensor]:
            y = torch.zeros(6, dtype=torch.int64)
            y[2] = label if split == "test" else 0
            return None, y

    monkeypatch.setattr(datasets, "load", lambda name: Broken())
    with pytest.raises(DataError, match=r"mnist \(test\)"):
        training.train(_config(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = training.build
    calls = 0

    def poisoned(*arguments: Any) -> nn.Module:
        net: Any = real(*arguments)
        criterion = net.criterion

        def bad(logits: Tensor, labels: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return criterion(logits, labels) * (math.nan if calls == 6 else 1.0)

        net.criterion = bad
        return net

    with monkeypatch.context() as patch:
        patch.setattr("toreq.training.session.build", poisoned)
        with pytest.raises(DivergenceError, match=r"finite loss.*step 5 is kept in"):
            training.train(_config(tmp_path / "run", checkpoint_every=0.0))
    run = training.load_run(tmp_path / "run")
    assert run.step == 5
    assert all(bool(torch.isfinite(p).all()) for p in run.net.parameters())
    # What was kept is good to go on from.
    training.resume(tmp_path / "run")
    training.train(_config(tmp_path / "unbroken"))
    assert _lines(tmp_path / "run") == _lines(tmp_path / "unbroken")


def test_a_diverging_relaxation_stops_and_keeps_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = Equilibrium.forward, 0

    def forward(self: Equilibrium, x: Tensor) -> Any:
        nonlocal calls
        calls += 1
        out = real(self, x)
        if calls == 4:
            assert self.last.free is not None
            self.last.free.residual[2] = math.inf
        return out

    monkeypatch.setattr(Equilibrium, "forward", forward)
    with pytest.raises(DivergenceError, match=r"diverging relaxations in equilibrium.*step 0 is kept"):
        training.train(_config(tmp_path / "run"))
    assert training.load_run(tmp_path / "run").step == 0


def test_an_error_of_the_layer_says_which_checkpoint_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Equilibrium, x: Tensor) -> Any:
        raise DivergenceError("Equilibrium: overflow")

    monkeypatch.setattr(Equilibrium, "forward", forward)
    with pytest.raises(DivergenceError, match=r"overflow \(at step 0, epoch 1\); the checkpoint of step 0 is kept"):
        training.train(_config(tmp_path / "run"))


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = torch.optim.Adam.step, 0

    def step(self: torch.optim.Adam, closure: Any = None) -> Any:
        nonlocal calls
        calls += 1
        found = real(self, closure)
        if calls == 8:
            with torch.no_grad():
                self.param_groups[0]["params"][0].fill_(math.nan)
        return found

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    with pytest.raises((DivergenceError, DataError), match=r"finite"):
        training.train(_config(tmp_path / "run"))
    assert all(bool(torch.isfinite(p).all()) for p in training.load_run(tmp_path / "run").net.parameters())


def test_process_settings_are_put_back(tmp_path: Path) -> None:
    before = (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
    training.train(_config(tmp_path / "run", epochs=1, deterministic=True, threads=1))
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_other_precisions_train(tmp_path: Path, precision: str) -> None:
    summary = training.train(_config(tmp_path / "run", precision=precision, deterministic=False))
    assert summary["train_loss"] < 2.3


# -- several processes

ARCHITECTURES = ("mlp", "hopfield")


def _gradients(arch: str, rank: int, world: int) -> dict[str, Tensor]:
    """The gradients of one batch of 8, of which each of `world` processes has its share."""
    torch.manual_seed(0)
    net = systems.create("toreqprop", input_shape=(1, 6, 6), num_classes=3, arch=arch, hidden=(12, 8)).double()
    x, y = torch.rand(8, 1, 6, 6, dtype=torch.float64)[rank::world], (torch.arange(8) % 3)[rank::world]
    model = nn.parallel.DistributedDataParallel(net) if world > 1 else net
    net.criterion(model(x), y).backward()
    return {f"{arch}/{name}": p.grad for name, p in net.named_parameters() if p.grad is not None}


def _one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        found = {name: grad for arch in ARCHITECTURES for name, grad in _gradients(arch, rank, 2).items()}
        checkpoint.save(Path(folder) / str(rank), found, {})
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.ddp
def test_two_processes_have_the_gradient_of_the_joint_batch(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_one_of_two, args=(str(tmp_path),), nprocs=2)  # type: ignore[attr-defined]
    first, second = (checkpoint.load(tmp_path / str(rank))[0] for rank in (0, 1))
    for arch in ARCHITECTURES:
        joint = _gradients(arch, 0, 1)
        assert len(joint) >= 4
        for name, expected in joint.items():
            assert torch.equal(first[name], second[name])
            assert torch.linalg.vector_norm(first[name] - expected) <= 1e-4 * torch.linalg.vector_norm(expected), name
