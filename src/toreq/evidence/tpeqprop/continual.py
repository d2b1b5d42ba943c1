"""T7: continual learning of permuted images against EqProp."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace

import torch

from toreq.evidence.claim import Claim, Criterion, Outcome, Picture, Trial, Tuning
from toreq.evidence.protocols import continual
from toreq.evidence.protocols.continual.sides import sizes
from toreq.evidence.protocols.continual.streams import Stream
from toreq.evidence.tpeqprop import nets
from toreq.tuning.space import Value

STREAM, EQPROP, TUNING_AS = "permuted", "EqProp", "fine-tuning"
OWN = {
    "tpeqprop chain": "a perceptron of EqProp's widths as a chain of levels, by TPEqProp, Adam, learns on",
    "tpeqprop ring": "the same levels in a circle, by TPEqProp, Adam, learns on",
}
SHARED = (EQPROP, "fine-tuning", "EWC", "online EWC")
SIDES = {**OWN, **{name: continual.SIDES[name].what for name in SHARED}}
TRIALS = 4


def run(trial: Trial) -> Outcome:
    """Learn the stream once; an interrupted run goes on."""
    return _learned(trial, continual.create(STREAM, trial.budget, trial.seed))


def _learned(trial: Trial, stream: Stream) -> Outcome:
    if trial.side in SHARED:
        return continual.side(trial.side, trial, stream)
    params = {**continual.SIDES[TUNING_AS].shipped, **trial.tuned}
    rate, decay = (float(str(params[name])) for name in ("learning_rate", "weight_decay"))
    net = nets.build(
        "mlp",
        trial.seed,
        tuple(stream.data.input_shape),
        stream.data.num_classes,
        hidden=sizes(trial.budget).hidden,
        topology=trial.side.split()[1],
    ).to(trial.device)
    adam = functools.partial(torch.optim.Adam, lr=rate, weight_decay=decay)
    return continual.run(stream, continual.ModuleLearner(net, adam), scratch=trial.scratch)


def held_out_accuracy(trial: Trial, params: Mapping[str, Value]) -> float:
    """Mean final accuracy in percent on held-out training images, on a smaller stream of another seed."""
    stream = continual.create(STREAM, trial.budget, trial.seed, validation=True)
    value = _learned(replace(trial, tuned=params), stream).metrics["final accuracy"].value
    assert value is not None
    return value


def _tuning() -> Tuning:
    like = {name: continual.SIDES[name if name in SHARED else TUNING_AS] for name in SIDES}
    spaces = {name: side.space for name, side in like.items() if side.space is not None}
    return Tuning(held_out_accuracy, spaces, TRIALS, {name: like[name].shipped for name in spaces})


CLAIM = Claim(
    id="T7",
    system="tpeqprop",
    seed_file=nets.SEED_FILE,
    sentence="Continual learning without replay is better than by EqProp.",
    criteria=tuple(
        Criterion(
            f"{side}: final accuracy against EqProp", "final accuracy", "points", "at_least", side,
            words="outperform EqProp on continual learning", versus=(EQPROP,),
            beside=tuple(name for name in SHARED if name != EQPROP),
        )
        for side in OWN
    ),
    protocol=f"""
    The permuted stream of the continual protocol of this package: ten tasks of MNIST, each under another order of the
    pixels, in one pass without replay or task label (elastic weight consolidation alone is told where tasks end); 2,000
    images a task, 500 for each test in a quick run, all of them in a full one. Two hidden layers of 128 (quick) or 256
    (full) units on every side. Rate and weight decay, or strength of consolidation, are tuned for each side in
    {TRIALS} trials on a smaller stream of held-out training images and another seed. Final accuracy is the mean over
    all ten tests after the last task. On a chain the gradient is backprop's, so the side in a circle stands beside it.
    """,
    sides=SIDES,
    run=run,
    picture=Picture(
        "Permuted MNIST: accuracy on every batch before it is learned", x_label="images",
        y_label="accuracy (%)", curves=("prequential accuracy",),
    ),
    tuning=_tuning(),
)  # fmt: skip
