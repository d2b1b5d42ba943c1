"""Training images held out: never trained on, the same for every seed, and in the place of the test data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from toreq import data as datasets
from toreq import training
from toreq.cli import main
from toreq.errors import ConfigError, DataError
from toreq.training import TrainConfig, hold_out, prepare


def config(**changes: object) -> TrainConfig:
    return TrainConfig.from_json(
        {"system": "toreqprop", "limit_train": 300, "holdout": 100, "device": "cpu", **changes}
    )


def rows(x: torch.Tensor) -> set[bytes]:
    return {row.contiguous().numpy().tobytes() for row in x}


def test_held_out_images_are_of_the_training_set_and_not_trained_on() -> None:
    whole = datasets.load("mnist")
    found = hold_out(whole, 500)
    held, kept = rows(found.test_x), rows(found.train_x)
    assert not held & kept
    assert held | kept == rows(whole.train_x)
    assert not held & rows(whole.test_x)
    assert len(found.train_x) == len(whole.train_x) - 500
    assert torch.bincount(found.test_y).tolist() == [50] * 10
    assert "500 training examples held out" in found.variant
    # with their own labels
    index = {row.numpy().tobytes(): int(y) for row, y in zip(whole.train_x, whole.train_y, strict=True)}
    assert all(index[x.contiguous().numpy().tobytes()] == y for x, y in zip(found.test_x, found.test_y, strict=True))


def test_a_run_is_held_against_the_same_images_whatever_its_seed_and_size() -> None:
    one, two = prepare(config(), "cpu"), prepare(config(seed=7, limit_train=50), "cpu")
    assert torch.equal(one.test_x, two.test_x)
    assert (len(one.train_x), len(two.train_x), len(one.test_x)) == (300, 50, 100)
    assert not rows(one.train_x) & rows(one.test_x)
    plain = prepare(config(holdout=None, limit_test=100), "cpu")
    assert not rows(plain.test_x) & rows(one.test_x)


def test_a_run_reports_accuracy_on_them_and_eval_on_the_test_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    one = config(epochs=1, batch_size=50, set={"hidden": (8,)}, out=str(out), side="bp-ff")
    summary = training.train(one)
    data = prepare(one, "cpu")
    run = training.load_run(out)
    with torch.no_grad():
        right = (run.model(data.test_x).argmax(1) == data.test_y).double().mean()
    assert summary["test_accuracy"] == pytest.approx(float(right))
    assert (summary["test_examples"], summary["config"]["holdout"]) == (100, 100)
    assert "held out" in summary["variant"]
    assert main(["eval", str(out), "--limit-test", "200"]) == 0
    said = capsys.readouterr().out
    assert "200 test examples" in said
    assert "held out" not in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"holdout": 0}, "at least 1"),
        ({"limit_test": 10}, "None beside a holdout"),
        ({"holdout": True}, "whole number"),
    ],
)
def test_holdouts_that_make_no_sense_are_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config(**changes)


@pytest.mark.parametrize("count", [60_000, 100_000])
def test_something_must_be_left_to_train_on(count: int) -> None:
    with pytest.raises(DataError, match=r"of the \d+ training examples, got"):
        prepare(config(holdout=count), "cpu")


def test_configurations_written_before_there_were_holdouts_are_read() -> None:
    values = config(holdout=None).to_json()
    del values["holdout"]
    assert TrainConfig.from_json(values).holdout is None
