"""H9: where one is on a torus arena, from velocities alone, and whether one gets to a goal."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from toreq.evidence import counting
from toreq.evidence.claim import Claim, Cost, Criterion, Outcome, Picture, Quantity, Trial, Tuning
from toreq.evidence.htsep import nets, streaming
from toreq.memory import TorusMemory
from toreq.tuning import Real, Space
from toreq.tuning.space import Value

OWN, TRANSFORMER, BARE, LSTM, RECKONING = "htsep", "transformer", "transformer, no positions", "LSTM", "dead reckoning"
SIDES = {
    OWN: "a bump moved over a torus memory by the velocity, read out by HTSEP",
    TRANSFORMER: "a causal transformer of two blocks, backprop",
    BARE: "the same without positions in time, of which it has seen none beyond the length of its training",
    LSTM: "an LSTM, backprop through time",
    RECKONING: "the sum of the measured velocities, nothing learned",
}
LEARNED = (OWN, TRANSFORMER, BARE, LSTM)
CELLS, SPEED, INERTIA, NOISE, GOAL = 8, 0.05, 0.8, 0.05, 0.1
"""Slots along each axis of the arena, deviation of the velocity in arena lengths a step, its memory from step to step,
deviation of its measurement beside its own, and radius of a goal."""
TRAINED = 40
HORIZONS = (10, 20, 40, 80, 160)
TRIALS, RATE = 3, 2e-3
SPACE = Space({"rate": Real(3e-4, 1e-2, log=True)})
LESS = math.log(0.75)


def walks(count: int, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """Measured velocities ``(B, T, 2)`` of smooth random walks from the origin, and positions in [0, 1) after them."""
    g = torch.Generator().manual_seed(seed)
    v = torch.randn(count, steps, 2, generator=g)
    for t in range(1, steps):
        v[:, t] = INERTIA * v[:, t - 1] + math.sqrt(1 - INERTIA**2) * v[:, t]
    v = SPEED * v
    measured = v + NOISE * SPEED * torch.randn(v.shape, generator=g)
    return measured / SPEED, v.cumsum(1).remainder(1)


def phases(position: Tensor) -> Tensor:
    """Positions ``(..., 2)`` as cosines and sines ``(..., 4)``: what all sides learn to give."""
    angle = 2 * math.pi * position
    return torch.cat([angle.cos(), angle.sin()], -1)


def decoded(found: Tensor) -> Tensor:
    """Positions in [0, 1) of cosines and sines."""
    return (torch.atan2(found[..., 2:], found[..., :2]) / (2 * math.pi)).remainder(1)


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Around the torus, in arena lengths."""
    apart = (a - b).abs().remainder(1)
    return torch.minimum(apart, 1 - apart).norm(dim=-1)


@torch.no_grad()
def bumps(measured: Tensor) -> Tensor:
    """The slots of a torus memory after each step, ``(B, T, CELLS^2)``: one bump, written where the address has been
    carried by the velocities so far, that fades within a step."""
    memory = TorusMemory((2, CELLS, CELLS), 1, 0.01)
    address = torch.zeros(len(measured), 2)
    one = torch.ones(len(measured), 1)
    state, out = memory.empty(len(measured)), []
    for step in range(measured.shape[1]):
        address = address + CELLS * SPEED * measured[:, step]
        state = memory.write(memory.advance(state), one, address)
        out.append(state.row(0).flatten(1))
    return torch.stack(out, 1)


class Transformer(nn.Module):
    """A causal transformer over velocities with sines and cosines of the position in time.

    Args:
        width: features, a multiple of 4.
        placed: tell it positions.
    """

    def __init__(self, width: int, placed: bool) -> None:
        super().__init__()
        self.placed = placed
        self.width, self.embed, self.head = width, nn.Linear(2, width), nn.Linear(width, 4)
        block = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.inner = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, 2)`` to ``(B, T, 4)``."""
        time = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
        rate = torch.exp(torch.arange(0, self.width, 2) * (-math.log(1e3) / self.width))
        place = torch.cat([(time * rate).sin(), (time * rate).cos()], 1)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.head(self.inner(self.embed(x) + place * self.placed, mask=mask, is_causal=True))


class Sum(nn.Module):
    """Dead reckoning: velocities added up."""

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, 2)`` to ``(B, T, 4)``."""
        return phases(SPEED * x.cumsum(1))


class Reader(nn.Module):
    """HTSEP on the slots of each step by itself.

    Args:
        seed: of the weights.
        width: of its layer.
    """

    def __init__(self, seed: int, width: int) -> None:
        super().__init__()
        self.net = nets.build("dense", seed, (CELLS * CELLS,), 4, hidden=(width,), gates="off")

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, S)`` to ``(B, T, 4)``."""
        return self.net(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def build(side: str, trial: Trial) -> nn.Module:
    """A side's network, freshly drawn."""
    torch.manual_seed(trial.seed)
    if side == OWN:
        return Reader(trial.seed, trial.budget.pick(12, 128, 256))
    if side in (TRANSFORMER, BARE):
        return Transformer(trial.budget.pick(8, 48, 64), side == TRANSFORMER)
    if side == RECKONING:
        return Sum()
    return streaming.Recurrent(2, trial.budget.pick(8, 64, 128), 4, "lstm", every=True)


def _inputs(side: str, measured: Tensor) -> Tensor:
    return bumps(measured) if side == OWN else measured


def _trained(trial: Trial, params: Mapping[str, Value], share: int = 1) -> tuple[nn.Module, int]:
    count, steps = trial.budget.pick((12, 10), (1500, TRAINED), (8000, TRAINED))
    measured, position = walks(count // share, steps, 2 * trial.seed)
    net = build(trial.side, trial)
    if trial.side == RECKONING:
        return net, 0
    rate, epochs = float(str(params.get("rate", RATE))), trial.budget.pick(1, 6, 20)
    seen = streaming.fit(
        net, _inputs(trial.side, measured), phases(position), epochs=epochs, rate=rate,
        batch=trial.budget.pick(6, 32, 32), seed=trial.seed, loss=nn.functional.mse_loss,
    )  # fmt: skip
    return net, seen


@torch.no_grad()
def errors(net: nn.Module, side: str, measured: Tensor, position: Tensor) -> Tensor:
    """Distances between estimated and true positions, ``(B, T)``."""
    parts = [decoded(net(_inputs(side, part))) for part in measured.split(100)]
    return distance(torch.cat(parts), position)


def run(trial: Trial) -> Outcome:
    """Train on walks of one length, and go on for longer."""
    net, seen = _trained(trial, trial.tuned)
    horizons = trial.budget.pick((5, 20), HORIZONS, HORIZONS)
    measured, position = walks(trial.budget.pick(6, 200, 500), horizons[-1], 2 * trial.seed + 1)
    found = errors(net, trial.side, measured, position)
    curve = [(float(t), float(found[:, t - 1].mean())) for t in horizons]
    reached = [(float(t), 100 * float((found[:, t - 1] < GOAL).double().mean())) for t in horizons]
    metrics = {f"error after {t:.0f} steps": Quantity(value, "arena") for t, value in curve}
    trained = dict(curve)[float(trial.budget.pick(5, TRAINED, TRAINED))]
    metrics["error at the longest horizon"] = Quantity(curve[-1][1], "arena")
    metrics["log error at the longest horizon"] = Quantity(math.log(max(curve[-1][1], 1e-9)), "ln arena")
    metrics["log error at the trained length"] = Quantity(math.log(max(trained, 1e-9)), "ln arena")
    metrics["goals within reach at the longest horizon"] = Quantity(reached[-1][1], "%")
    return Outcome(metrics, {"error": curve, "goals": reached}, Cost(counting.parameters(net), None, seen))


def held_out_error(trial: Trial, params: Mapping[str, Value]) -> float:
    """Minus the mean distance on other walks of the trained length, after a third of the walks."""
    net, _ = _trained(trial, params, share=3)
    measured, position = walks(trial.budget.pick(6, 100, 200), trial.budget.pick(10, TRAINED, TRAINED), 31 + trial.seed)
    return -float(errors(net, trial.side, measured, position).mean())


CLAIM = Claim(
    id="H9",
    system="htsep",
    seed_file=nets.SEED_FILE,
    sentence="On a torus arena, long paths are integrated better than by transformers.",
    criteria=(
        Criterion(
            "error at the longest horizon", "log error at the longest horizon", "ln arena", "at_most", OWN, target=LESS,
            words="outperforming transformers on long-horizon planning by 25%", versus=(TRANSFORMER, BARE, LSTM),
            beside=(RECKONING,),
        ),
        Criterion(
            "error at the trained length", "log error at the trained length", "ln arena", "at_most", OWN, target=LESS,
            words="outperforming transformers ... by 25%", versus=(TRANSFORMER, BARE, LSTM), beside=(RECKONING,),
        ),
        Criterion(
            "goals within reach at the longest horizon", "goals within reach at the longest horizon", "points",
            "at_least", OWN, words="long-horizon planning", versus=(TRANSFORMER, BARE, LSTM), beside=(RECKONING,),
        ),
        Criterion(
            "against dead reckoning", "log error at the longest horizon", "ln arena", "at_most", OWN,
            words="grid cells", versus=(RECKONING,),
        ),
    ),
    protocol=f"""
    Smooth random walks on a square whose opposite sides are joined, from a known start; seen are velocities alone
    (deviation {SPEED:g} of the arena a step, measured with noise of {NOISE:.0%}). All sides give cosines and sines of
    both coordinates after every step, trained by squared error on walks of {TRAINED} steps and tested on up to
    {HORIZONS[-1]}. HTSEP reads the {CELLS} x {CELLS} slots of a torus memory with one bump, whose address the velocity
    carries on: the integration is by the torus itself, which shares the arena's topology and units, and not learned;
    what is learned is the read-out. That is the advantage that the seed claims from grid cells, and it is given by
    construction. There is no policy here: a goal counts as within reach where the estimated position, from which a
    straight way would lead there, is within {GOAL:g} of the true one. The sum of the measured velocities is what any of
    them could do at best without knowing how velocities follow one another. Noise of the measurement alone leaves an
    error that grows with the root of the horizon, for every side. 1,500 walks and six epochs (quick) or 8,000 and
    twenty; Adam's rate tuned in {TRIALS} trials on walks of their own.
    """,
    sides=SIDES,
    run=run,
    picture=Picture(
        "Error of the position", x_label="steps since the start", y_label="distance (arena lengths)",
        curves=("error",), log_x=True,
    ),
    tuning=Tuning(held_out_error, dict.fromkeys(LEARNED, SPACE), TRIALS, {side: {"rate": RATE} for side in LEARNED},
        {RECKONING: "learns nothing"},
    ),
)  # fmt: skip
