"""H1: what is kept of a stream whose data move on, without replay and without a label of the task."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace

import torch

from toreq.data import seeded
from toreq.evidence.claim import Claim, Criterion, Outcome, Picture, Quantity, Trial, Tuning
from toreq.evidence.htsep import nets
from toreq.evidence.protocols import continual
from toreq.evidence.protocols.continual.sides import Sizes, fits, sizes
from toreq.evidence.protocols.continual.streams import PermutedMNIST, Stream, mnist
from toreq.systems.htsep import HTSEP
from toreq.tuning import Real, Space
from toreq.tuning.space import Value

STREAMS = ("permuted", "split", "drifting")
OWN, GATES_OFF, TORUS_OFF = "htsep", "gates off", "torus off"
OWN_SIDES = {
    OWN: "gates of the torus of contexts, the context inferred from the input's statistics",
    GATES_OFF: "the same network with all units open",
    TORUS_OFF: "the same share of units open, by a fixed random projection of the input and not by a context",
}
SHARED = ("LSTM", "EWC", "online EWC", "fine-tuning", "ridge, 1k")
TRIALS, RATE, SHARE = 4, 2e-3, 0.12
SPACE = Space({"learning_rate": Real(3e-4, 1e-2, log=True), "open_share": Real(0.05, 0.5, log=True)})
ALL_OPEN = Space({"learning_rate": Real(3e-4, 1e-2, log=True), "second_moment": Real(0.9, 0.999)})
IMAGES, TESTED = 20_000, 2000
"""Of each task of the permuted stream of a full run: for training, and for its test."""
HIDDEN = {"smoke": 24, "quick": 256, "full": 512}
"""Units of our own layer, which is joined to itself; a perceptron of two such layers has as many weights."""
RECURRENT = {"smoke": 8, "quick": 128, "full": 256}
ADAM = 0.999
"""Adam's memory of squares; of the gradient itself it keeps none: it would go on moving units that have closed."""


def _sides() -> dict[str, str]:
    found: dict[str, str] = {}
    for stream in STREAMS:
        found |= {f"{stream}: {name}": what for name, what in OWN_SIDES.items()}
        found |= {f"{stream}: {n}": continual.SIDES[n].what for n in SHARED if fits(n, stream)}
    return found


SIDES = _sides()


def split(side: str) -> tuple[str, str]:
    """Stream and learner of a side."""
    stream, name = side.split(": ")
    return stream, name


def learner(trial: Trial, stream: Stream) -> continual.ModuleLearner:
    """The learner of one of our own sides, freshly drawn."""
    _, name = split(trial.side)
    params = trial.tuned
    rate, second = float(str(params.get("learning_rate", RATE))), float(str(params.get("second_moment", ADAM)))
    net = nets.build(
        "dense",
        trial.seed,
        tuple(stream.data.input_shape),
        stream.data.num_classes,
        hidden=(HIDDEN[trial.budget.name],),
        open_share=float(str(params.get("open_share", SHARE))),
        gates="off" if name == GATES_OFF else "probabilistic",
        context="input" if name == TORUS_OFF else "statistics",
    ).to(trial.device)
    return continual.ModuleLearner(net, functools.partial(torch.optim.Adam, lr=rate, betas=(0.0, second)))


def stream_of(trial: Trial, *, validation: bool = False) -> Stream:
    """The stream of a side: that of the continual protocol, its permuted one shorter in a full run."""
    name = split(trial.side)[0]
    if name == "permuted" and trial.budget.name == "full" and not validation:
        # drawn at random: the first ones of MNIST's test set are harder than the others
        data = mnist().limit(None, TESTED, seeded(0))
        return PermutedMNIST(10, trial.seed, train=IMAGES, test=TESTED, batch_size=64, data=data)
    return continual.create(name, trial.budget, trial.seed, validation=validation)


def widths(trial: Trial) -> Sizes:
    """Widths of the other sides: two layers of our own width."""
    name = trial.budget.name
    return replace(sizes(trial.budget), hidden=(HIDDEN[name],) * 2, recurrent=RECURRENT[name])


def run(trial: Trial) -> Outcome:
    """Learn one stream once; an interrupted run goes on."""
    return _learned(trial, stream_of(trial))


def _learned(trial: Trial, stream: Stream) -> Outcome:
    _, name = split(trial.side)
    if name in SHARED:
        return continual.side(name, replace(trial, side=name), stream, widths(trial))
    own = learner(trial, stream)
    found = continual.run(stream, own, scratch=trial.scratch)
    assert isinstance(own.module, HTSEP)
    contexts = {"contexts": Quantity(float(own.module.context.contexts), "")}
    return replace(found, metrics={**found.metrics, **contexts})


def held_out_accuracy(trial: Trial, params: Mapping[str, Value]) -> float:
    """Mean final accuracy in percent on held-out training images, on a smaller stream of another seed."""
    value = _learned(replace(trial, tuned=params), stream_of(trial, validation=True)).metrics["final accuracy"].value
    assert value is not None
    return value


def _tuning() -> Tuning:
    spaces: dict[str, Space] = {}
    start: dict[str, Mapping[str, Value]] = {}
    for side in SIDES:
        _, name = split(side)
        if name in SHARED:
            shared = continual.SIDES[name]
            assert shared.space is not None
            spaces[side], start[side] = shared.space, shared.shipped
        elif name == GATES_OFF:
            spaces[side], start[side] = ALL_OPEN, {"learning_rate": RATE, "second_moment": ADAM}
        else:
            spaces[side], start[side] = SPACE, {"learning_rate": RATE, "open_share": SHARE}
    return Tuning(held_out_accuracy, spaces, TRIALS, start)


def _criteria() -> tuple[Criterion, ...]:
    def beside(stream: str, *judged: str) -> tuple[str, ...]:
        return tuple(s for s in SIDES if split(s)[0] == stream and split(s)[1] not in judged)

    own = {stream: f"{stream}: {OWN}" for stream in STREAMS}
    metric, unit = "final accuracy", "%"
    return (
        Criterion(
            "permuted: final accuracy", metric, unit, "at_least", own["permuted"], target=80.0,
            words="80-90% retention on shifting distributions", aim=90.0, beside=beside("permuted", OWN),
        ),
        Criterion(
            "permuted: against the LSTM", metric, "points", "at_least", own["permuted"], target=30.0,
            words="vs. 50% in LSTMs due to forgetting", versus=("permuted: LSTM",),
        ),
        Criterion(
            "split: final accuracy", metric, unit, "at_least", own["split"], aim=96.9, beside=beside("split", OWN)
        ),
        Criterion(
            "drifting: against the best of the others", metric, "points", "at_least", own["drifting"],
            versus=tuple(s for s in SIDES if split(s)[0] == "drifting" and split(s)[1] in SHARED),
        ),
        *(
            Criterion(
                f"{stream}: the {name.split()[0]} helps", metric, "points", "at_least", own[stream],
                versus=(f"{stream}: {name}",),
            )
            for stream in ("permuted", "drifting")
            for name in (TORUS_OFF, GATES_OFF)
        ),
    )  # fmt: skip


CLAIM = Claim(
    id="H1",
    system="htsep",
    seed_file=nets.SEED_FILE,
    sentence="On data that shift, what was learned is kept without replay and without a label of the task.",
    criteria=_criteria(),
    protocol=f"""
    The permuted, split and drifting streams of the continual protocol of this package, each in one pass; at full the
    permuted one has {IMAGES:,} images of each of its ten tasks and {TESTED:,}, drawn once, for each
    test. Our own sides are one
    hidden layer of {HIDDEN["quick"]} (quick) or {HIDDEN["full"]} (full) units with a lateral coupling at the fast
    settings; the perceptrons of EWC and fine-tuning have two layers of that width, and so as many weights, the LSTM
    {RECURRENT["quick"]} or {RECURRENT["full"]} units. The share of units that a context opens starts at {SHARE} of all.
    Contexts are opened and recognised from the mean and covariance of the inputs alone; which context an image is of
    is inferred for each image by itself in the test, and for a batch in training. Adam keeps no momentum (its memory of
    squares is {ADAM}), since a momentum goes on moving units that closed. Tuned are the rate and the share (all units
    open: the rate and the memory of squares); the other sides tune their own two; {TRIALS} trials each on a smaller
    stream of held-out training images under another seed, so that on the permuted one tasks are several times shorter
    there for every side. EWC alone is told where tasks end. Parameters and memory of each side stand beside its
    accuracy: statistics of contexts are memory, of 16 slots with the covariance and its factor of 128 numbers.
    """,
    sides=SIDES,
    run=run,
    picture=Picture(
        "Accuracy over all tests after each phase", x_label="phase", y_label="accuracy (%)",
        curves=("accuracy on all",),
    ),
    printed=("contexts",),
    tuning=_tuning(),
)  # fmt: skip
