"""H6: sequential MNIST from a ring that holds the stream, by the shared protocol for sequences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from toreq.data import SequenceTask
from toreq.data.sequences import sequential_mnist
from toreq.evidence import counting
from toreq.evidence.claim import Claim, Cost, Criterion, Outcome, Picture, Quantity, Trial, Tuning
from toreq.evidence.htsep import nets, streaming
from toreq.evidence.protocols.sequences import models, plans, scores
from toreq.evidence.protocols.sequences.training import Progress, Recipe, flops_per_sample, train
from toreq.memory import TorusMemory
from toreq.tuning import Real, Space
from toreq.tuning.space import Value

VARIANTS = {"rows": 28, "chunks": 16}
"""Name -> pixels that come in a step."""
OWN, FADED, GRU = "htsep", "faded", "gru"
KINDS = {
    OWN: "HTSEP on what a ring of the last steps holds",
    FADED: "HTSEP on one faded read, without the ring's slots (torus off)",
    GRU: "a GRU that reads the steps, backprop through time",
}
SIDES = {f"{variant} {kind}": what for variant in VARIANTS for kind, what in KINDS.items()}
TRIALS, RATE, DECAY, AIM, BATCH = 3, 2e-3, 0.98, 98.0, 64
COOLDOWN = 0.5
"""Share of the steps over which the rate falls to 0."""
HELD = 1 / 3
"""Share of the digits of a trial that judge it."""
SPACE = Space({"rate": Real(5e-4, 1e-2, log=True)})


@dataclass(frozen=True)
class Size:
    """Digits for training and test, and in a trial of the rate; epochs; units of HTSEP; parameters of the GRU."""

    train: int
    test: int
    trial: int
    epochs: int
    width: int
    parameters: int


SIZES = {
    "smoke": Size(48, 16, 48, 1, 12, 1500),
    "quick": Size(60_000, 10_000, 12_000, 3, 256, 50_000),
    "full": Size(60_000, 10_000, 12_000, 6, 512, 150_000),
}


class Streamed(nn.Module):
    """A network on what a ring holds when a sequence has ended, ``(B, N, F)`` to ``(B, C)``.

    Args:
        inner: from the ring's slots ``(B, N * F)``, or from a faded read ``(B, F)``.
        memory: a ring as long as the sequence.
        slots: whether all slots are read.
    """

    def __init__(self, inner: nn.Module, memory: TorusMemory, *, slots: bool) -> None:
        super().__init__()
        self.inner, self.memory = inner, memory
        self.recall = streaming.held if slots else streaming.faded

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.inner(self.recall([x], self.memory))


def build(trial: Trial, task: SequenceTask) -> nn.Module:
    """The model of a side, freshly drawn."""
    kind, size = trial.side.split()[1], SIZES[trial.budget.name]
    if kind == GRU:
        return models.build(kind, task, size.parameters, trial.seed, trial.device)
    steps, pixels = task.train.x.shape[1:]
    memory = TorusMemory((steps,), pixels, DECAY)
    inputs = steps * pixels if kind == OWN else pixels
    net = nets.build("dense", trial.seed, (inputs,), hidden=(size.width,), gates="off")
    return Streamed(net, memory, slots=kind == OWN).to(trial.device)


def _trained(trial: Trial, params: Mapping[str, Value], task: SequenceTask) -> tuple[nn.Module, Progress]:
    size = SIZES[trial.budget.name]
    batch = min(BATCH, len(task.train))
    steps = size.epochs * (len(task.train) // batch)
    rate = float(str(params.get("rate", RATE)))
    recipe = Recipe(steps, batch, rate, AIM, max(1, steps // 20), tested=2000)
    net = build(trial, task)
    seed, scratch, device = trial.seed, trial.scratch, trial.device
    return net, train(net, task, recipe, seed=seed, scratch=scratch, device=device, cooldown=COOLDOWN)


def _task(trial: Trial, train_on: int) -> SequenceTask:
    size = SIZES[trial.budget.name]
    return sequential_mnist(train_on, size.test, chunk=VARIANTS[trial.side.split()[0]])


def run(trial: Trial) -> Outcome:
    """Train one side on one variant; an interrupted run goes on."""
    task = _task(trial, SIZES[trial.budget.name].train)
    net, at = _trained(trial, trial.tuned, task)
    accuracy = scores.evaluate(net, task, task.test, device=trial.device).metric
    metrics = {"accuracy": Quantity(accuracy, "%"), "samples to 98%": Quantity(at.reached, "samples")}
    samples = at.step * min(BATCH, len(task.train))
    flops = flops_per_sample(net, task) * samples
    notes = ("continued from a checkpoint",) if at.resumed else ()
    return Outcome(metrics, {"accuracy": list(at.curve)}, Cost(counting.parameters(net), flops, samples), notes)


def held_out_accuracy(trial: Trial, params: Mapping[str, Value]) -> float:
    """Percent of held-out training digits, after a training on a part of the others."""
    task = plans.held_out(_task(trial, SIZES[trial.budget.name].trial), HELD, seed=trial.seed)
    net, _ = _trained(trial, params, task)
    return scores.evaluate(net, task, task.test, device=trial.device).metric


_FULL, _QUICK = SIZES["full"], SIZES["quick"]
CLAIM = Claim(
    id="H6",
    system="htsep",
    seed_file=nets.SEED_FILE,
    sentence="Sequential MNIST is classified beyond 98%.",
    criteria=tuple(
        Criterion(
            f"{variant}: accuracy", "accuracy", "%", "at_least", f"{variant} {OWN}", target=AIM,
            words=">98% on MNIST sequential variants", aim=AIM,
            beside=tuple(f"{variant} {kind}" for kind in (FADED, GRU)),
        )
        for variant in VARIANTS
    ),
    protocol=f"""
    MNIST digits come row by row (28 steps of 28 pixels) or in chunks of 16 pixels (49 steps), as in the shared protocol
    for sequences, whose training and GRU are used. Each step is written to a ring as long as the stream; at its end a
    dense HTSEP ({_QUICK.width} units quick, {_FULL.width} full) settles on what the ring's slots hold, and learns by
    Equilibrium Propagation; no gradient goes back in time. The ring is a delay line that holds the whole digit, and its
    reader has weights for every slot: the claim is met by memory, not by recurrence, which the side that gets one faded
    read (decay {DECAY:g}) shows. All units are open: there is one context. The GRU ({_QUICK.parameters:,} parameters
    quick, {_FULL.parameters:,} full) carries its own state and is trained through time. All digits, {_QUICK.epochs}
    epochs (quick) or {_FULL.epochs}; Adam in batches of {BATCH}, its rate constant and over the last half of the steps
    falling to 0, tuned in {TRIALS} trials on two thirds of {_FULL.trial:,} training digits, judged by the last third.
    """,
    sides=SIDES,
    run=run,
    picture=Picture(
        "Sequential MNIST: accuracy on 2,000 test digits", x_label="digits seen", y_label="test accuracy (%)",
        curves=("accuracy",),
    ),
    tuning=Tuning(held_out_accuracy, dict.fromkeys(SIDES, SPACE), TRIALS, {side: {"rate": RATE} for side in SIDES}),
)  # fmt: skip
