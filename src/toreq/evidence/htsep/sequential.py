"""H6: sequential MNIST from a ring that holds the stream."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from toreq.evidence import counting
from toreq.evidence.claim import Claim, Cost, Criterion, Outcome, Picture, Quantity, Trial, Tuning
from toreq.evidence.htsep import nets, streaming
from toreq.memory import TorusMemory
from toreq.tuning import Real, Space
from toreq.tuning.space import Value

VARIANTS = {"rows": 28, "chunks": 16}
"""Name -> pixels that come in a step."""
OWN, FADED, GRU = "htsep", "faded", "GRU"
KINDS = {
    OWN: "HTSEP on what a ring of the last steps holds",
    FADED: "HTSEP on one faded read, without the ring's slots (torus off)",
    GRU: "a GRU that reads the steps, backprop through time",
}
SIDES = {f"{variant} {kind}": what for variant in VARIANTS for kind, what in KINDS.items()}
TRIALS, RATE, DECAY, HELD = 3, 2e-3, 0.98, 4000
SPACE = Space({"rate": Real(5e-4, 1e-2, log=True)})


def sequences(images: Tensor, pixels: int) -> Tensor:
    """Digits ``(B, 1, 28, 28)`` as ``(B, T, pixels)``."""
    return images.flatten(1).unflatten(1, (-1, pixels))


def _data(trial: Trial, *, validation: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    train, test = trial.budget.pick((48, 16), (60_000, 10_000), (60_000, 10_000))
    data = nets.digits(train, test)
    x, y = data.inputs("train", slice(None)), data.train_y
    if not validation:
        return x, y, data.inputs("test", slice(None)), data.test_y
    held = min(max(8, len(x) // 5), HELD)
    return x[held : 3 * held], y[held : 3 * held], x[:held], y[:held]


def _trained(trial: Trial, params: Mapping[str, Value], *, validation: bool) -> tuple[nn.Module, float, int]:
    variant, kind = trial.side.split()
    x, y, tx, ty = _data(trial, validation=validation)
    parts, tests = (sequences(images, VARIANTS[variant]) for images in (x, tx))
    torch.manual_seed(trial.seed)
    width = trial.budget.pick(12, 256, 512)
    if kind == GRU:
        net: nn.Module = streaming.Recurrent(parts.shape[2], trial.budget.pick(8, 96, 192), 10)
    else:
        memory = TorusMemory((parts.shape[1],), parts.shape[2], DECAY, limit=2**33)
        read = streaming.held if kind == OWN else streaming.faded
        parts, tests = read([parts], memory), read([tests], memory)
        net = nets.build("dense", trial.seed, (parts.shape[1],), hidden=(width,), gates="off")
    rate = float(str(params.get("rate", RATE)))
    epochs = trial.budget.pick(1, 3, 6)
    seen = streaming.fit(net, parts, y, epochs=epochs, rate=rate, batch=trial.budget.pick(16, 64, 64), seed=trial.seed)
    return net, streaming.accuracy(net, tests, ty), seen


def run(trial: Trial) -> Outcome:
    """Train one side on one variant."""
    net, accuracy, seen = _trained(trial, trial.tuned, validation=False)
    return Outcome({"accuracy": Quantity(accuracy, "%")}, cost=Cost(counting.parameters(net), None, seen))


def held_out_accuracy(trial: Trial, params: Mapping[str, Value]) -> float:
    """Percent of held-out training digits, after a training on a part of the others."""
    return _trained(trial, params, validation=True)[1]


CLAIM = Claim(
    id="H6",
    system="htsep",
    seed_file=nets.SEED_FILE,
    sentence="Sequential MNIST is classified beyond 98%.",
    criteria=tuple(
        Criterion(
            f"{variant}: accuracy", "accuracy", "%", "at_least", f"{variant} {OWN}", target=98.0,
            words=">98% on MNIST sequential variants", aim=98.0,
            beside=tuple(f"{variant} {kind}" for kind in (FADED, GRU)),
        )
        for variant in VARIANTS
    ),
    protocol=f"""
    MNIST digits come row by row (28 steps of 28 pixels) or in chunks of 16 pixels (49 steps). Each step is written to a
    ring as long as the stream; at its end a dense HTSEP (256 units quick, 512 full) settles on what the ring's slots
    hold, and learns by Equilibrium Propagation; no gradient goes back in time. The ring is a delay line that holds the
    whole digit, and its reader has weights for every slot: the claim is met by memory, not by recurrence, which the
    side that gets one faded read shows. All units are open: there is one context. The GRU (96 or 192 units) carries its
    own state and is trained through time. All digits, three epochs (quick) or six; Adam, its rate tuned in {TRIALS}
    trials on {2 * HELD:,} training digits, judged by {HELD:,} others.
    """,
    sides=SIDES,
    run=run,
    picture=Picture("Sequential MNIST", y_label="test accuracy (%)", metrics=("accuracy",)),
    tuning=Tuning(held_out_accuracy, dict.fromkeys(SIDES, SPACE), TRIALS, {side: {"rate": RATE} for side in SIDES}),
)  # fmt: skip
