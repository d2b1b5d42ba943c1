"""The named baselines: how each is built, at which size, and what of it is tuned."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from toreq import systems
from toreq.data import Dataset
from toreq.errors import ConfigError, nearest
from toreq.evidence.budgets import Budget
from toreq.evidence.claim import Outcome, Trial, Tuning
from toreq.evidence.protocols.continual.closed_form import ClassMeans, RecursiveRidge
from toreq.evidence.protocols.continual.consolidation import EWC, OnlineEWC
from toreq.evidence.protocols.continual.learner import Learner, ModuleLearner, Optimizer
from toreq.evidence.protocols.continual.loop import run
from toreq.evidence.protocols.continual.streams import (
    DriftingStream,
    Mixed,
    PermutedMNIST,
    SplitMNIST,
    Stream,
    held_out,
    mnist,
)
from toreq.tuning import Real, Space
from toreq.tuning.space import Value

STREAMS = {
    "permuted": "permuted-MNIST",
    "drifting": "MNIST turned by 0 to 180 degrees in one pass",
    "split": "split-MNIST, class-incremental",
}
TRIALS = 6
"""Trials of tuning for each side and stream."""
VALIDATION = 2000
"""Training images held out for tuning."""

_RATE = Real(1e-4, 1e-2, log=True)
_DECAY = Real(1e-7, 1e-2, log=True)
_STRENGTH = Real(1.0, 1e5, log=True)


@dataclass(frozen=True)
class Sizes:
    """Widths of a budget, the same on every stream.

    Attributes:
        hidden: widths of the networks trained by gradients, but for the LSTM.
        recurrent: width of the LSTM.
        fisher: images for each estimate of the Fisher information.
        every: batches between two of online EWC's estimates.
        features: of the two ridge sides.
    """

    hidden: tuple[int, ...] = (256, 256)
    recurrent: int = 128
    fisher: int = 200
    every: int = 50
    features: tuple[int, int] = (1000, 4000)


def sizes(budget: Budget) -> Sizes:
    """The widths that belong to a budget."""
    return budget.pick(Sizes((16, 16), 8, 16, 3, (32, 64)), Sizes((128, 128), 64, 64, 100), Sizes())


def create(name: str, budget: Budget, seed: int, *, validation: bool = False) -> Stream:
    """A stream of `STREAMS` at the size of a budget.

    Args:
        name: key of `STREAMS`.
        budget: picks the numbers of images.
        seed: of the stream.
        validation: a smaller one from training images alone, whose test sets are `VALIDATION` held-out ones.

    Raises:
        ConfigError: an unknown name, with the nearest.
    """
    if name not in STREAMS:
        raise ConfigError(f"continual: expected a stream, got {name!r}; {nearest(name, STREAMS)}")
    data: Dataset | None = None
    if validation:
        data = held_out(mnist(), budget.pick(50, VALIDATION, VALIDATION))
    batch = budget.pick(10, 64, 64)
    if name == "permuted":
        train, test = budget.pick((40, 20), (2000, 500), (60_000, 10_000))
        if validation:
            train, test = budget.pick(20, 300, 3000), budget.pick(20, 200, 500)
        return PermutedMNIST(budget.pick(3, 10, 10), seed, train=train, test=test, batch_size=batch, data=data)
    train, test = budget.pick((100, 100), (60_000, 10_000), (60_000, 10_000))
    if validation:
        train, test = budget.pick(50, 3000, 10_000), budget.pick(50, VALIDATION, VALIDATION)
    if name == "split":
        return SplitMNIST(seed, train=train, test=test, batch_size=batch, data=data)
    phases = budget.pick(3, 10, 10)
    if not validation:
        train, test = budget.pick((100, 20), (20_000, 500), (60_000, 10_000))
    else:
        test = budget.pick(20, 200, 500)
    return DriftingStream(seed, phases=phases, train=train, test=test, batch_size=batch, data=data)


class Rows(nn.Module):
    """An LSTM (Hochreiter and Schmidhuber 1997) that reads an image row by row, its last state read out linearly.

    Args:
        inputs: pixels of a row.
        width: units.
        classes: logits.
    """

    def __init__(self, inputs: int, width: int, classes: int) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(inputs, width, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, classes)`` of images ``(B, C, H, W)``; channels lie side by side in a row."""
        states, _ = self.recurrent(x.transpose(1, 2).flatten(2))
        return self.head(states[:, -1])


def perceptron(widths: tuple[int, ...]) -> nn.Sequential:
    """Flatten, then linear layers of these widths with relu between them."""
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@dataclass(frozen=True)
class _Maker:
    """What the builders share."""

    size: Sizes
    data: Dataset
    seed: int
    device: str
    params: Mapping[str, Any]

    @property
    def classes(self) -> int:
        return self.data.num_classes

    @property
    def inputs(self) -> int:
        return self.data.train_x[0].numel()

    def network(self) -> nn.Module:
        torch.manual_seed(self.seed)
        return perceptron((self.inputs, *self.size.hidden, self.classes)).to(self.device)

    def optimizer(self, kind: Literal["adam", "sgd"] = "adam") -> Optimizer:
        rate, decay = self.params["learning_rate"], self.params.get("weight_decay", 0.0)
        if kind == "sgd":
            return functools.partial(torch.optim.SGD, lr=rate, weight_decay=decay, momentum=0.9)
        return functools.partial(torch.optim.Adam, lr=rate, weight_decay=decay)

    def tuned(self) -> Learner:
        return ModuleLearner(self.network(), self.optimizer())

    def sgd(self) -> Learner:
        return ModuleLearner(self.network(), self.optimizer("sgd"))

    def ewc(self) -> Learner:
        strength = self.params["strength"]
        return EWC(self.network(), self.optimizer(), strength=strength, examples=self.size.fisher)

    def online(self) -> Learner:
        return OnlineEWC(
            self.network(),
            self.optimizer(),
            strength=self.params["strength"],
            examples=self.size.fisher,
            every=self.size.every,
        )

    def lstm(self) -> Learner:
        torch.manual_seed(self.seed)
        channels, _, columns = self.data.input_shape
        net = Rows(channels * columns, self.size.recurrent, self.classes)
        return ModuleLearner(net.to(self.device), self.optimizer())

    def eqprop(self) -> Learner:
        torch.manual_seed(self.seed)
        net = systems.create(
            "toreqprop", self.data.input_shape, self.classes, arch="mlp", hidden=self.size.hidden, settings="fast"
        )
        return ModuleLearner(net.to(self.device), self.optimizer())

    def means(self) -> Learner:
        return ClassMeans(self.inputs, self.classes, self.device)

    def ridge(self, which: int = 0) -> Learner:
        return RecursiveRidge(
            self.inputs,
            self.classes,
            self.size.features[which],
            penalty=self.params["penalty"],
            frequency=self.params["frequency"],
            seed=self.seed,
            device=self.device,
        )


@dataclass(frozen=True)
class Side:
    """A baseline.

    Attributes:
        what: it is, in a line.
        make: builds the learner.
        shipped: its hyperparameters where they are not tuned.
        space: what is searched; None where there is nothing.
        mixed: whether it sees all tasks at once.
        boundaries: whether it is told where a task ends.
        like: the side whose tuned values it takes, since tuning it would be too dear.
    """

    what: str
    make: Callable[[_Maker], Learner]
    shipped: Mapping[str, float]
    space: Space | None = None
    mixed: bool = False
    boundaries: bool = False
    like: str = ""


_FIRST = {"learning_rate": 1e-3, "weight_decay": 1e-6}
_BY_RATE = Space({"learning_rate": _RATE, "weight_decay": _DECAY})
_BY_STRENGTH = Space({"learning_rate": _RATE, "strength": _STRENGTH})
_RIDGE = {"penalty": 1.0, "frequency": 4.0}

SIDES: dict[str, Side] = {
    "fine-tuning": Side("MLP, Adam, learns on", _Maker.tuned, _FIRST, _BY_RATE),
    "fine-tuning, SGD": Side(
        "MLP, SGD with momentum 0.9, learns on",
        _Maker.sgd,
        {"learning_rate": 0.03, "weight_decay": 1e-6},
        Space({"learning_rate": Real(3e-3, 0.3, log=True), "weight_decay": _DECAY}),
    ),
    "EWC": Side(
        "MLP, elastic weight consolidation, told where tasks end",
        _Maker.ewc,
        {"learning_rate": 1e-3, "strength": 100.0},
        _BY_STRENGTH,
        boundaries=True,
    ),
    "online EWC": Side(
        "MLP, consolidates at fixed intervals, told nothing",
        _Maker.online,
        {"learning_rate": 1e-3, "strength": 10.0},
        _BY_STRENGTH,
    ),
    "LSTM": Side("LSTM over rows, Adam, learns on", _Maker.lstm, _FIRST, _BY_RATE),
    "EqProp": Side(
        "toreqprop mlp of the MLP's widths by Equilibrium Propagation, Adam, learns on", _Maker.eqprop, _FIRST, _BY_RATE
    ),
    "class means": Side("nearest mean image", _Maker.means, {}),
    "ridge, 1k": Side(
        "1,000 random Fourier features, recursive ridge",
        _Maker.ridge,
        _RIDGE,
        Space({"penalty": Real(1e-3, 1e2, log=True), "frequency": Real(1.0, 8.0, log=True)}),
    ),
    "joint": Side(
        "the fine-tuned MLP with all tasks mixed: an upper bound", _Maker.tuned, _FIRST, _BY_RATE, mixed=True
    ),
    "ridge, 4k": Side(
        "4,000 random Fourier features, recursive ridge",
        functools.partial(_Maker.ridge, which=1),
        _RIDGE,
        like="ridge, 1k",
    ),
}


def find(name: str) -> Side:
    """A side by its name; raises `ConfigError` for an unknown one, with the nearest."""
    if name not in SIDES:
        raise ConfigError(f"continual: expected a side, got {name!r}; {nearest(name, SIDES)}")
    return SIDES[name]


def fits(name: str, stream: str) -> bool:
    """Whether a side may run on a stream: one that must be told of tasks cannot where there are none."""
    return not (find(name).boundaries and stream == "drifting")


def too_dear(name: str, stream: str, budget: str) -> bool:
    """Whether the runner leaves a side out at a quick budget: the 4,000 features run on split-MNIST alone there."""
    return budget == "quick" and name == "ridge, 4k" and stream != "split"


def learner(name: str, stream: Stream, trial: Trial, widths: Sizes | None = None) -> Learner:
    """The learner of a side, freshly drawn, with the hyperparameters of ``trial.tuned`` over those it ships with, and
    the widths of the trial's budget where none are given."""
    side = find(name)
    unknown = set(trial.tuned) - set(side.shipped)
    if unknown:
        raise ConfigError(
            f"continual: expected hyperparameters of {name!r}, {list(side.shipped)}, got {sorted(unknown)}; drop them"
        )
    params = {**side.shipped, **trial.tuned}
    chosen = sizes(trial.budget) if widths is None else widths
    return side.make(_Maker(chosen, stream.data, trial.seed, trial.device, params))


def side(name: str, trial: Trial, stream: str | Stream, widths: Sizes | None = None) -> Outcome:
    """Run one named baseline.

    Args:
        name: key of `SIDES`.
        trial: its budget picks the sizes, its seed draws stream and weights, ``tuned`` overrides hyperparameters, and
            an interrupted run goes on in its scratch folder.
        stream: key of `STREAMS`, or a stream.
        widths: others than the budget's.

    Raises:
        ConfigError: an unknown name, or a side that must be told of tasks on a stream without them.
    """
    made = create(stream, trial.budget, trial.seed) if isinstance(stream, str) else stream
    seen = Mixed(made) if find(name).mixed else made
    return run(seen, learner(name, seen, trial, widths), scratch=trial.scratch)


def objective(trial: Trial, params: Mapping[str, Value], *, stream: str) -> float:
    """What is tuned: the final accuracy in percent of ``trial.side`` on held-out training images, on a subset."""
    own = replace(trial, tuned=params)
    value = side(trial.side, own, create(stream, trial.budget, trial.seed, validation=True))
    accuracy = value.metrics["final accuracy"].value
    assert accuracy is not None
    return accuracy


def tuning(stream: str, trials: int = TRIALS) -> Tuning:
    """How every side is tuned on a stream: two continuous hyperparameters each, the same trials, the shipped one first.

    Raises:
        ConfigError: an unknown stream.
    """
    if stream not in STREAMS:
        raise ConfigError(f"continual: expected a stream, got {stream!r}; {nearest(stream, STREAMS)}")
    chosen = {name: s for name, s in SIDES.items() if fits(name, stream)}
    return Tuning(
        objective=functools.partial(objective, stream=stream),
        spaces={name: s.space for name, s in chosen.items() if s.space is not None},
        trials=trials,
        start={name: s.shipped for name, s in chosen.items() if s.space is not None},
        untuned={
            name: f"takes the values of {s.like!r}" if s.like else "has no hyperparameters"
            for name, s in chosen.items()
            if s.space is None
        },
    )
