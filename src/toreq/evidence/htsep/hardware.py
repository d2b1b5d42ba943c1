"""H10: the exported network in a simulator that is not ours, and power as a model."""

from __future__ import annotations

import importlib.util

import torch

from toreq.errors import ConfigError
from toreq.evidence import counting
from toreq.evidence.claim import Claim, Cost, Criterion, Outcome, Picture, Quantity, Trial
from toreq.evidence.htsep import nets
from toreq.solvers import Spiking
from toreq.solvers.events import ADD, MULTIPLY_ADD, SRAM

OWN, SIMULATOR = "htsep", "simulator"
SIDES = {
    OWN: "sigma-delta units of this package",
    SIMULATOR: "the exported graph in snnTorch's neurons",
}
STEPS, RATE = 400, 1000.0
"""Steps of a run, and classifications a second that a watt should be enough for."""
POWER = "digits a second at one watt"


def run(trial: Trial) -> Outcome:
    """Train, export, and classify the test images on one side."""
    train, test, epochs = trial.budget.pick((64, 10, 1), (10_000, 500, 2), (60_000, 10_000, 6))
    steps = trial.budget.pick(20, STEPS, STEPS)
    data = nets.digits(train, test)
    net = nets.build("dense", trial.seed, hidden=(trial.budget.pick(16, 256, 512),))
    at = nets.train(net, trial, data, epochs, 2e-3)
    right, events, spikes = 0, 0.0, 0.0
    if trial.side == SIMULATOR:
        if importlib.util.find_spec("nir") is None:
            raise ConfigError("H10: expected the package 'nir', got none; pip install 'toreq[neuromorphic]'")
        from toreq.export import nir as export

        graph = export.to_nir(net)
        for part in torch.arange(test).split(200):
            found = export.simulate(graph, data.inputs("test", part), steps)
            right += int((found.logits.argmax(1) == data.test_y[part]).sum())
            events, spikes = events + float(found.events.sum()), spikes + float(found.spikes.sum())
    else:
        solver = Spiking(max_steps=steps, tolerance=0.0)
        for part in torch.arange(test).split(200):
            x = data.inputs("test", part)
            logits, solution = net.spike(x, solver)
            right += int((logits.argmax(1) == data.test_y[part]).sum())
            work, _ = net.work(x, solution, solver)
            fired = sum(float(t.double().sum()) for t in solution.spikes.values())
            spikes += fired
            # of all additions those that are events: without resets, drives and thresholds
            units = sum(t[0].numel() for t in solution.spikes.values())
            events += float(work.adds.sum()) - fired - 2 * units * steps * len(part)
    units = sum(shape[0] for shape in nets.layer(net).dynamics.shapes.values())
    each = events / test
    # an event is an addition and three words; a unit is brought up to date at every step
    nanojoules = 1e-3 * (ADD * (each + 2 * units * steps) + SRAM * (3 * each + 2 * units * steps))
    # the drive, once a digit: its products in multiply-adds with a word each
    products = sum(p.numel() for n, p in net.named_parameters() if n.endswith("inner.1.weight"))
    drive = 1e-3 * products * (MULTIPLY_ADD + SRAM)
    metrics = {
        "accuracy": Quantity(100 * right / test, "%"),
        "accuracy, negated": Quantity(-100 * right / test, "%"),
        "events": Quantity(each, "a digit"),
        "spikes": Quantity(spikes / test, "a digit"),
        "modelled energy": Quantity(nanojoules + drive, "nJ a digit"),
        "of it the drive": Quantity(drive, "nJ a digit"),
        POWER: Quantity(1e9 / (nanojoules + drive), "digits a second"),
    }
    return Outcome(metrics, cost=Cost(counting.parameters(net), None, at.samples))


CLAIM = Claim(
    id="H10",
    system="htsep",
    seed_file=nets.SEED_FILE,
    sentence="The network maps onto event-based hardware and runs there below one watt.",
    criteria=(
        Criterion(
            "the simulator is as good", "accuracy", "points", "at_least", SIMULATOR, target=-0.1,
            words="maps directly to event-based chips", aim=-0.1, versus=(OWN,),
        ),
        Criterion(
            "and no better", "accuracy, negated", "points", "at_least", SIMULATOR, target=-0.1,
            words="maps directly to event-based chips", aim=-0.1, versus=(OWN,),
        ),
        Criterion(POWER, POWER, "digits a second", "at_least", SIMULATOR, target=RATE, words="runs at <1W",
                  beside=(OWN,)),
    ),
    protocol=f"""
    A dense network (256 units quick, 512 full) is trained on MNIST at the mean field, exported as a graph of NIR with
    the gates of its context in the weights, and run from that graph alone in snnTorch: all units one population of
    integrate-and-fire neurons without leak that subtract their threshold, with the block-symmetric matrix onto itself.
    Both sides fire {STEPS} steps for each test digit. The accuracies may differ by a tenth of a point. No chip and no
    meter are at hand: power is a model from counted events and the drive's products by 45 nm figures with on-chip
    memory. A power without a rate says nothing, and the seed names none: given is how many digits a second one watt is
    enough for, judged against {RATE:g}, a choice of this project. The model says nothing about routing, leakage or the
    host.
    """,
    sides=SIDES,
    run=run,
    picture=Picture("Accuracy here and in the simulator", y_label="%", metrics=("accuracy",)),
)  # fmt: skip
