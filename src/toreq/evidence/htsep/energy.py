"""H3: modelled energy of spikes against dense relaxations and a network that is run once."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from toreq.core import Energy
from toreq.core.state import State, difference, norm
from toreq.evidence import counting
from toreq.evidence.claim import Claim, Cost, Criterion, Outcome, Picture, Quantity, Trial
from toreq.evidence.htsep import nets
from toreq.solvers import Anderson, Spiking
from toreq.solvers.events import DRAM, SRAM, Work, dense_work, fan_out
from toreq.systems.htsep import HTSEP, HTSEPConv

TOLERANCE = 0.02
"""Relative residual at which spikes and dense relaxations stop alike."""
MOST = 2000
SPIKES, NO_GATES, DENSE, ONCE = "htsep", "gates off", "dense", "one pass"
HALF_SPIKES, HALF_DENSE = "half the channels, spikes", "half the channels, dense"
SIDES = {
    SPIKES: "sigma-delta spikes, half of the channels opened by the torus",
    NO_GATES: "sigma-delta spikes, all channels open",
    HALF_SPIKES: "sigma-delta spikes in a network of half as many channels, all open",
    DENSE: "the network with all channels open, relaxed by Anderson in multiply-adds",
    HALF_DENSE: "the network of half as many channels, relaxed by Anderson in multiply-adds",
    ONCE: "the same convolutions trained by backprop, run once",
}
RELAXED = (DENSE, HALF_DENSE)
TENFOLD, HALF = -1.0, math.log10(0.5)


def run(trial: Trial) -> Outcome:
    """Train a side's network; classify the test images and count what that takes."""
    train, test, epochs = trial.budget.pick((64, 8, 1), (10_000, 500, 2), (60_000, 2000, 8))
    data = nets.digits(train, test)
    channels = trial.budget.pick((4, 4), (16, 32), (32, 64))
    if trial.side in (HALF_SPIKES, HALF_DENSE):
        channels = tuple(c // 2 for c in channels)
    whole = nets.build("conv", trial.seed, channels=channels, gates="hard" if trial.side == SPIKES else "off")
    assert isinstance(whole, HTSEPConv)
    net: nn.Module = whole.feedforward() if trial.side == ONCE else whole
    net = net.to(trial.device)
    at = nets.train(net, trial, data, epochs, 2e-3)
    works, right, settled, apart = [], 0, 0.0, 0.0
    for part in torch.arange(test).split(100):
        x, y = data.inputs("test", part).to(trial.device), data.test_y[part].to(trial.device)
        logits, work, share, away = _measured(trial.side, net, x)
        works.append(work)
        right += int((logits.argmax(1) == y).sum())
        settled, apart = settled + share * len(y), apart + away * len(y)
    metrics = {
        "accuracy": Quantity(100 * right / test, "%"),
        "settled": Quantity(100 * settled / test, "%"),
        "distance from the equilibrium": Quantity(100 * apart / test, "% of the rates"),
    }
    for name, word in (("without memory", 0.0), ("on-chip memory", SRAM), ("off-chip memory", DRAM)):
        nanojoules = 1e-3 * float(torch.cat([w.picojoules(word) for w in works]).mean())
        metrics[f"energy, {name}"] = Quantity(nanojoules, "nJ")
        metrics[f"log energy, {name}"] = Quantity(math.log10(nanojoules), "log10 nJ")
    operations = torch.cat([w.adds + w.multiply_adds for w in works]).mean()
    metrics["operations"] = Quantity(float(operations), "")
    metrics["log operations"] = Quantity(math.log10(float(operations)), "log10")
    return Outcome(metrics, cost=Cost(counting.parameters(net), None, at.samples))


def _measured(side: str, net: nn.Module, x: Tensor) -> tuple[Tensor, Work, float, float]:
    """Logits, operations, the share of settled examples, and how far the rates are from the tight equilibrium."""
    if not isinstance(net, HTSEP):
        with torch.no_grad():
            return net(x), _once(net, x), 1.0, 0.0
    layer = nets.layer(net)
    layer.solver = Anderson(length=3, tolerance=1e-5, max_steps=500)
    exact = layer.solve(x).h
    if side in RELAXED:
        layer.solver = Anderson(length=3, tolerance=TOLERANCE, max_steps=200)
        found = layer.solve(x)
        with torch.no_grad():
            logits = net.head(net.opened(x, found.h[layer.readout[0]]))
        energy = layer.dynamics
        assert isinstance(energy, Energy)
        work = dense_work(fan_out(energy, energy.bind(x)), found.steps)
        return logits, work, float(found.converged.double().mean()), _apart(found.h, exact)
    solver = Spiking(tolerance=TOLERANCE, max_steps=MOST)
    logits, run = net.spike(x, solver)
    own, _ = net.work(x, run, solver)
    return logits, own, float(run.converged.double().mean()), _apart(run.h, exact)


def _apart(found: State, exact: State) -> float:
    return float((norm(difference(found, exact)) / norm(exact)).mean())


def _once(net: nn.Module, x: Tensor) -> Work:
    """One pass: the first layer, the drive of the others, and the head are left out on every side."""
    products, units, h = 0.0, 0.0, x[:1]
    layers = list(net.children())
    with torch.no_grad():
        for i, layer in enumerate(layers):
            before, h = h, layer(h)
            if isinstance(layer, nn.Conv2d) and i > 0:
                products += h.numel() * math.prod(layer.weight.shape[1:])
            elif not isinstance(layer, nn.Conv2d | nn.Linear | nn.Flatten):
                units += before.numel()
    like = torch.ones(len(x), dtype=torch.float64)
    return Work(2 * units * like, products * like, (products + 2 * units) * like)


def _against(sides: tuple[str, ...], name: str, words: str) -> list[Criterion]:
    return [
        Criterion(
            f"energy against {name}, {memory}", f"log energy, {memory}", "log10 nJ", "at_most", SPIKES,
            target=math.log10(0.2), words=words, aim=TENFOLD, versus=sides,
        )
        for memory in ("without memory", "on-chip memory")
    ]  # fmt: skip


CLAIM = Claim(
    id="H3",
    system="htsep",
    seed_file=nets.SEED_FILE,
    sentence="Spikes cut energy tenfold at equal accuracy, and gates alone halve the operations.",
    criteria=(
        *_against(RELAXED, "the better of the dense relaxations", "5-10x vs. dense EqProp"),
        *_against((ONCE,), ONCE, "5-10x"),
        Criterion(
            "gates alone: operations", "log operations", "log10", "at_most", SPIKES, target=HALF,
            words="reducing power by 50-70% via sparsity", versus=(NO_GATES,),
        ),
        Criterion(
            "gates against a narrower network: operations", "log operations", "log10", "at_most", SPIKES,
            words="reducing power by 50-70% via sparsity", versus=(HALF_SPIKES,),
        ),
        Criterion(
            "accuracy", "accuracy", "%", "at_least", SPIKES, aim=99.0,
            beside=(NO_GATES, HALF_SPIKES, DENSE, HALF_DENSE, ONCE),
        ),
        Criterion(
            "accuracy of spikes against the dense relaxation", "accuracy", "points", "at_least", SPIKES, target=-0.1,
            words="at equal accuracy", versus=(DENSE,),
        ),
    ),
    protocol=f"""
    MNIST, two convolutional layers (16 and 32 channels quick, 32 and 64 full; 5 x 5, stride 2), trained for 2 (quick,
    10,000 digits) or 8 epochs, at the mean field on the sides that settle. Then each test digit is classified: by
    sigma-delta spikes until the relative residual of its rates is {TOLERANCE:g} (at most {MOST:,} steps, all of which
    are counted), by Anderson's method to the same residual of its pre-activations, or in one pass; how far the rates
    then are from the tight equilibrium is printed, since the two residuals are not the same thing. The gated side
    trains with its gates and opens half of the channels. All digits being of one context, the others never open: a
    network of half as many channels is the honest opponent, and stands beside it, fired and relaxed. Counted are
    synaptic events, resets, thresholds and drives of spikes; the multiply-adds of every weight at every step of a dense
    relaxation; those of the second convolution of the network that is run once. The drive (the first convolution) and
    the head are the same on all sides and are left out. Energy by the 45 nm figures: 0.9 pJ an addition, 4.6 pJ a
    multiply-add, and with memory {SRAM:g} pJ a word on the chip; {DRAM:g} pJ off it is shown. The model knows nothing
    of routing, leakage or clocks, and spikes are counted on hardware that does nothing for a silent unit. Differences
    are of logarithms: -1 is a tenth.
    """,
    sides=SIDES,
    run=run,
    printed=("settled", "distance from the equilibrium"),
    picture=Picture(
        "Modelled energy of one digit", y_label="nJ", log_y=True,
        metrics=("energy, without memory", "energy, on-chip memory"),
    ),
)  # fmt: skip
