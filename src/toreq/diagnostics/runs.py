"""What the diagnostics read of a run folder: its curves, its losses and some of its data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from toreq import data as datasets
from toreq.training import Run, load_run

__all__ = ["Run", "Samples", "label", "learning_curve", "load_data", "load_run", "losses"]


@dataclass(frozen=True)
class Samples:
    """Some class-balanced examples of a data set; x (N, *input_shape), y (N,) int64."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    num_classes: int


def load_data(run: Run, train: int, test: int) -> Samples:
    """At most ``train`` and ``test`` of the examples that the run was trained and tested on."""
    config = run.config
    whole = datasets.load(config.data)
    some = whole.limit(
        min(train, config.limit_train or train, len(whole.train_x)),
        min(test, config.limit_test or test, len(whole.test_x)),
    )
    everything = slice(None)
    return Samples(
        some.inputs("train", everything),
        some.train_y.to(torch.int64),
        some.inputs("test", everything),
        some.test_y.to(torch.int64),
        some.num_classes,
    )


def label(run: Run) -> str:
    """The system's name, and its architecture where it has several."""
    arch = run.config.set.get("arch")
    return f"{run.config.system} {arch}" if arch else run.config.system


def learning_curve(run: Run) -> tuple[list[float], list[float], list[float]]:
    """Finished epochs, their training loss, and their test accuracy in percent."""
    lines = [line for line in run.folder.metrics() if line.get("kind") == "epoch"]
    return (
        [float(line["epoch"]) for line in lines],
        [_number(line.get("loss")) for line in lines],
        [100 * _number(line.get("test_accuracy")) for line in lines],
    )


def losses(run: Run) -> list[float]:
    """Training losses in order: of the steps that were logged, or of the epochs when no step was."""
    lines = run.folder.metrics()
    steps = [_number(line.get("loss")) for line in lines if line.get("kind") == "step" and "loss" in line]
    return steps or learning_curve(run)[1]


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else float("nan")
