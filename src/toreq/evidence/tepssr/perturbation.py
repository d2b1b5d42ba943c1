"""S9: nudges in deep loops, states that go round a torus, and attention beside the state space."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toreq.core.state import detached
from toreq.data import seeded
from toreq.diagnostics.memory import fixed_steps
from toreq.estimators import Centered
from toreq.evidence import counting
from toreq.evidence.claim import Claim, Cost, Criterion, Outcome, Picture, Quantity, Trial, Tuning
from toreq.evidence.protocols.sequences.parts import positions
from toreq.evidence.tepssr import nets
from toreq.evidence.tepssr.symbols import IGNORED, KEYS, MARKS, SYMBOLS, across, last_mark, recall
from toreq.layer import equilibria, wrap
from toreq.solvers import Anderson, FixedPoint
from toreq.systems.looped_transformer import LoopedTransformer
from toreq.systems.tepssr_memory import Recirculated
from toreq.systems.tepssr_nets import StateSpaceClassifier, StateSpaceTagger
from toreq.tuning import Real, Space
from toreq.tuning.space import Value

SIDES = {
    "nudge tepssr": "nudged phases of a freshly drawn network of TEP-SSR, by number of steps",
    "nudge looped": "the same of the looped transformer",
    "torus on": "segments, with the maps' states on a ring from one to the next",
    "torus last": "segments that begin with the state in which the one before ended",
    "torus off": "segments that begin with empty states",
    "torus whole": "the whole sequence at once",
    "block both": "an ordinary block in a loop: fused softmax attention and a state space, wrapped",
    "block attention": "the same without the state space",
    "block ssm": "the same without the attention",
}
DEPTHS, DEEP, BETA = (1, 2, 3, 5, 10, 30, 100, 300), 10, 1e-2
LENGTH, SEGMENT, SLOTS = 64, 16, 4
DECAYS = {"on": 0.3, "last": 1e-6}
"""Of the ring by age: at the second one the last state is all that is left."""
PAIRS = 4
COUPLING = 2.0
"""Initial scale of the networks that are nudged, at which the norms are at their bounds."""
RATE, TRIALS, BATCH = 5e-3, 3, 32
SPACE = Space({"rate": Real(1e-3, 2e-2, log=True)})
KEPT, EARLY = "nudge response, deepest over 10 steps", "gradient at the loop's start, deepest over 10 steps"
FAR = "log of nudge response, farthest token over nudged"
ACROSS, ACCURACY, OFF = "accuracy across borders", "accuracy", "accuracy, couplings off"
WORDS = "standard EqProp struggles with vanishing perturbations in deep loops"


@dataclass(frozen=True)
class Size:
    """Optimizer steps of the taggers and of the blocks, test sequences, features and channels, and most steps of a
    loop."""

    steps: int
    blocks: int
    tested: int
    features: int
    hidden: int
    deepest: int


SIZES = {
    "smoke": Size(2, 2, 8, 8, 8, 10),
    "quick": Size(150, 800, 500, 32, 32, 300),
    "full": Size(1000, 4000, 2000, 32, 32, 300),
}


class Reader(nn.Module):
    """Symbols through a wrapped block, read out at the last position: ``(B, N)`` to ``(B, C)``.

    Args:
        block: the block.
        features: D.
        length: N.
    """

    def __init__(self, block: nets.Block, features: int, length: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(2 * KEYS, features)
        self.equilibrium = wrap(block, (length, features), solver=Anderson(length=3))
        self.head = nn.Linear(features, KEYS)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, C)``."""
        return self.head(self.equilibrium(self.drive(x))[:, -1])

    def drive(self, x: Tensor) -> Tensor:
        """What the block is driven by, ``(B, N, D)``."""
        h = self.embed(x)
        return h + positions(h.shape[1], h.shape[2], h.device)


class Segmented(nn.Module):
    """A tagger that reads a sequence in segments.

    Args:
        net: the tagger.
        size: of a segment.
        decay: of the ring by which the maps' states are handed on; None hands nothing on.
    """

    def __init__(self, net: StateSpaceTagger, size: int, decay: float | None) -> None:
        super().__init__()
        self.inner, self.size = Recirculated(net, SLOTS, 0.5 if decay is None else decay), size
        self.remember = decay is not None

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, N, C)``."""
        if self.remember:
            return self.inner.over(x, self.size)
        empty = self.inner.empty(len(x))
        return torch.cat([self.inner(part, empty)[0] for part in x.split(self.size, 1)], 1)


def fit(
    model: nn.Module, draw: Callable[[torch.Generator], tuple[Tensor, Tensor]], steps: int, rate: float, seed: int
) -> None:
    """Steps of Adam on sequences drawn anew, with a rate that rises over the first ones."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    generator, device = seeded(seed, 9), next(model.parameters()).device
    for layer in equilibria(model):
        layer.hasten()
        layer.warn = False
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / max(1, min(50, steps // 4)))
        x, y = (t.to(device) for t in draw(generator))
        optimizer.zero_grad()
        out = model(x)
        nn.functional.cross_entropy(out.flatten(0, -2), y.flatten(), ignore_index=IGNORED).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()


def tagged(how: str, size: Size, seed: int) -> nn.Module:
    """The tagger of a side, freshly drawn."""
    torch.manual_seed(seed)
    net = StateSpaceTagger(
        (LENGTH,), MARKS, features=size.features, hidden=size.hidden, layers=1, vocabulary=SYMBOLS, attention="none",
        timescale=float(LENGTH),
    )  # fmt: skip
    return net if how == "whole" else Segmented(net, SEGMENT, DECAYS.get(how))


def wrapped(how: str, size: Size, seed: int) -> Reader:
    """The wrapped block of a side, freshly drawn."""
    torch.manual_seed(seed)
    paths = ("attention", "ssm") if how == "both" else (how,)
    length = 2 * PAIRS + 1
    return Reader(nets.Block(size.features, size.hidden, 4, length, paths), size.features, length)


def run(trial: Trial) -> Outcome:
    """One side of one of the three parts."""
    part, how = trial.side.split()
    rate = float(str(trial.tuned.get("rate", RATE)))
    size = SIZES[trial.budget.name]
    if part == "nudge":
        return _nudged(how, size, trial)
    return _remembered(how, size, trial, rate) if part == "torus" else _recalled(how, size, trial, rate)


def _remembered(how: str, size: Size, trial: Trial, rate: float) -> Outcome:
    model = tagged(how, size, trial.seed).to(trial.device)
    fit(model, lambda g: last_mark(BATCH, LENGTH, g), size.steps, rate, trial.seed)
    x, y = (t.to(trial.device) for t in last_mark(size.tested, LENGTH, seeded(trial.seed, 10)))
    metrics = _tags(model, x, y)
    (layer,) = equilibria(model)
    metrics["radius"] = Quantity(layer.radius(x[:8, :SEGMENT]), "")
    with layer.couplings_off():
        metrics[OFF] = _tags(model, x, y)[ACCURACY]
    metrics["rate"] = Quantity(rate, "")
    return Outcome(metrics, cost=Cost(counting.parameters(model), None, size.steps * BATCH))


@torch.no_grad()
def _tags(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Quantity]:
    right = torch.cat([model(part) for part in x.split(250)]).argmax(-1) == y
    far, counted = across(x, SEGMENT), y != IGNORED
    return {
        ACROSS: Quantity(100 * float(right[far].double().mean()), "%"),
        "accuracy within a segment": Quantity(100 * float(right[counted & ~far].double().mean()), "%"),
        ACCURACY: Quantity(100 * float(right[counted].double().mean()), "%"),
    }


def _recalled(how: str, size: Size, trial: Trial, rate: float) -> Outcome:
    model = wrapped(how, size, trial.seed).to(trial.device)
    fit(model, lambda g: recall(BATCH, PAIRS, g), size.blocks, rate, trial.seed)
    x, y = (t.to(trial.device) for t in recall(size.tested, PAIRS, seeded(trial.seed, 10)))
    with model.equilibrium.couplings_off():
        off = _right(model, x, y)
    metrics = {
        ACCURACY: Quantity(_right(model, x, y), "%"),
        OFF: Quantity(off, "%"),
        "radius": Quantity(model.equilibrium.radius(model.drive(x[:8]).detach()), ""),
        "rate": Quantity(rate, ""),
    }
    return Outcome(metrics, cost=Cost(counting.parameters(model), None, size.blocks * BATCH))


@torch.no_grad()
def _right(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return 100 * float((torch.cat([model(part) for part in x.split(250)]).argmax(-1) == y).double().mean())


def _nudged(how: str, size: Size, trial: Trial) -> Outcome:
    torch.manual_seed(trial.seed)
    options: dict[str, Any] = {
        "features": size.features, "hidden": size.hidden, "vocabulary": SYMBOLS, "pool": "mean",
        "coupling_scale": COUPLING,
    }  # fmt: skip
    net: StateSpaceClassifier | LoopedTransformer
    if how == "looped":
        net = LoopedTransformer((LENGTH,), MARKS, **options)
    else:
        net = StateSpaceClassifier((LENGTH,), MARKS, attention="none", **options)
    net = net.to(trial.device)
    layer = net.equilibrium
    layer.warn = False  # the number of steps is fixed, settled or not
    layer.solver, layer.estimator = FixedPoint(), Centered(beta=BETA, nudge="absolute")
    x, _ = last_mark(4, LENGTH, seeded(trial.seed, 11))
    x = x.to(trial.device)
    v = torch.randn(4, *layer.dynamics.shapes[layer.readout[0]], generator=seeded(trial.seed, 12)).to(trial.device)
    depths = [n for n in DEPTHS if n <= size.deepest]
    response = [(float(n), nudge_response(net, x, v, n)) for n in depths]
    early = [(float(n), early_gradient(net, x, v, n)) for n in depths]
    profile = by_distance(net, x, v, depths[-1])
    metrics = {
        KEPT: Quantity(response[-1][1] / dict(response)[float(DEEP)], ""),
        EARLY: Quantity(early[-1][1] / max(dict(early)[float(DEEP)], 1e-300), ""),
        FAR: Quantity(math.log10(max(profile[-1][1], 1e-30) / profile[0][1]), "log10"),
        "radius": Quantity(layer.radius(x), ""),
    }
    curves = {"response": response, "gradient": early, "response by distance": profile}
    return Outcome(metrics, curves, Cost(counting.parameters(net)))


def nudge_response(net: StateSpaceClassifier | LoopedTransformer, x: Tensor, v: Tensor, steps: int) -> float:
    r"""Mean over examples of :math:`\|h^+ - h^-\|/2\beta` at the tokens, when both phases take so many steps."""
    own: Any = fixed_steps(net, steps)
    h = own.equilibrium.solve_nudged(x, v).h[own.equilibrium.dynamics.names[0]]
    plus, minus = h.flatten(1).chunk(2)
    return float((plus - minus).norm(dim=1).mean()) / (2 * BETA)


def by_distance(
    net: StateSpaceClassifier | LoopedTransformer, x: Tensor, v: Tensor, steps: int
) -> list[tuple[float, float]]:
    r"""Mean over examples of :math:`\|h^+_t - h^-_t\|/2\beta` at each token t when the last one alone is nudged,
    by the tokens that lie between."""
    own: Any = fixed_steps(net, steps)
    force = torch.zeros_like(v)
    force[:, -1] = v[:, -1]
    h = own.equilibrium.solve_nudged(x, force).h[own.equilibrium.dynamics.names[0]]
    plus, minus = h.double().chunk(2)
    size = ((plus - minus).norm(dim=2).mean(0) / (2 * BETA)).flip(0)
    return [(float(away), float(found)) for away, found in enumerate(size)]


def early_gradient(net: StateSpaceClassifier | LoopedTransformer, x: Tensor, v: Tensor, steps: int) -> float:
    r"""Mean over examples of the largest entry of :math:`\partial\langle v, h_T\rangle/\partial a_0`, backprop through
    T steps of the loop to its start; in float64, since it vanishes."""
    dynamics = net.equilibrium.dynamics
    bindings = detached(dynamics.bind(x))
    bindings = {n: b.map(_double, _double) for n, b in bindings.items()}
    start = {n: a.detach().double().requires_grad_() for n, a in dynamics.initial(bindings).items()}
    a = start
    with torch.enable_grad():
        for _ in range(steps):
            a = dynamics.map(dynamics.activate(a, bindings), bindings)
        total = (dynamics.activate(a, bindings)[dynamics.names[-1]] * v.double()).sum()
        grads = torch.autograd.grad(total, list(start.values()), materialize_grads=True)
    # squares of what is left would underflow
    return float(torch.stack([g.flatten(1).abs().amax(1) for g in grads]).amax(0).mean())


def _double(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def held_out(trial: Trial, params: Mapping[str, Value]) -> float:
    """Percent of what is right on sequences of another seed after a third of the training with ``params``."""
    part, how = trial.side.split()
    size = SIZES[trial.budget.name]
    steps = max(1, (size.steps if part == "torus" else size.blocks) // 3)
    rate = float(str(params.get("rate", RATE)))
    model = (tagged(how, size, trial.seed) if part == "torus" else wrapped(how, size, trial.seed)).to(trial.device)

    def draw(generator: torch.Generator, count: int = BATCH) -> tuple[Tensor, Tensor]:
        return last_mark(count, LENGTH, generator) if part == "torus" else recall(count, PAIRS, generator)

    fit(model, draw, steps, rate, trial.seed)
    x, y = (t.to(trial.device) for t in draw(seeded(trial.seed, 13), min(250, size.tested)))
    with torch.no_grad():
        return 100 * float((model(x).argmax(-1) == y)[y != IGNORED].double().mean())


TUNED = {side: SPACE for side in SIDES if not side.startswith("nudge")}
CLAIM = Claim(
    id="S9",
    system="tepssr",
    seed_file=nets.SEED_FILE,
    sentence="Perturbations do not vanish in deep loops, and the torus holds states of the state space.",
    criteria=(
        Criterion(
            f"{FAR}, against the looped transformer", FAR, "log10", "at_least", "nudge tepssr", words=WORDS,
            versus=("nudge looped",),
        ),
        Criterion(
            KEPT, KEPT, "", "at_least", "nudge tepssr", words=WORDS, aim=0.9, beside=("nudge looped",), condition=True
        ),
        Criterion(
            f"{ACROSS}, ring on above off", ACROSS, "points", "at_least", "torus on",
            words="toroidal buffer ... SSM hidden states for structured long-memory recirculation",
            versus=("torus off",), beside=("torus whole",),
        ),
        Criterion(
            f"{ACROSS}, ring above the last state alone", ACROSS, "points", "at_least", "torus on",
            words="toroidal buffer ... SSM hidden states for structured long-memory recirculation",
            versus=("torus last",),
        ),
        Criterion(
            "recall: attention and state space above either alone", ACCURACY, "points", "at_least", "block both",
            words="fuses these strengths", versus=("block attention", "block ssm"),
        ),
    ),
    protocol=f"""
    Three parts. Nudge: a freshly drawn network (32 features and channels, no attention, plain iteration, couplings at
    the bounds of their norms) and the looped transformer on 4 sequences of {LENGTH} symbols. A random force of strength
    {BETA:g} on the read-out node in nudged phases of {DEPTHS[0]} to {DEPTHS[-1]} steps, all of them run, free and
    nudged. In a loop that contracts a lasting force cannot vanish with the steps, whatever the network: that the
    response of the tokens at the most steps is not below that at {DEEP} is a condition. Judged is whether it vanishes
    with the distance: the last token alone is nudged, and the first one's response is compared with its own, on a
    logarithm, paired by seed with the looped transformer, where every token hears every other at once. Beside it, the
    gradient that backprop carries through as many steps to the loop's start, in float64. Torus: a tagger (one layer,
    selective maps, no attention) names the last of {MARKS} marks, which are a sixteenth of the symbols, at each of
    {LENGTH} positions, which it reads in segments of {SEGMENT}; the states at the borders go round a ring of {SLOTS}
    slots (decay {DECAYS["on"]:g}), the last one alone is handed on, or every segment begins empty. Judged is the
    accuracy at positions whose last mark stands in an earlier segment; half is chance, and a segment that begins empty
    can do no better. Nothing is learned across a border. Block: {PAIRS} pairs of a key and a value of {KEYS}, and one
    key again, whose value is asked for: to find it is attention's work, to join a value to the key before it is a
    recurrence's. One ordinary block in a loop, wrapped as a prediction error and learned by one nudged phase, with both
    paths or either; the same width, so that both together have more parameters. Sizes: taggers {SIZES["quick"].steps}
    steps (quick) or {SIZES["full"].steps:,} (full), blocks {SIZES["quick"].blocks} or {SIZES["full"].blocks:,}, in
    batches of {BATCH}, Adam with a rate that rises and stays, tuned for each trained side in {TRIALS} trials of a third
    of the steps on sequences of another seed. Fast settings.
    """,
    sides=SIDES,
    run=run,
    picture=Picture(
        "Response to a nudge of the last token, by distance", x_label="tokens from the nudged one", y_label="response",
        curves=("response by distance",), log_y=True,
    ),
    printed=("radius",),
    tuning=Tuning(
        held_out, TUNED, TRIALS, {side: {"rate": RATE} for side in TUNED},
        {side: "nothing is trained" for side in SIDES if side not in TUNED},
    ),
)  # fmt: skip
