"""D3: whether noise saves settling steps and escapes poor minima, on a contracting and on a multistable net."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from toreq.core import Dense, Drive, Energy, Lateral, Node, Tanh
from toreq.core.state import detached
from toreq.evidence.claim import Claim, Cost, Criterion, Outcome, Picture, Quantity, Trial
from toreq.evidence.difftoreqprop import nets
from toreq.solvers import Anderson, FixedPoint, Langevin, Relaxation, Solver

OFF, ON, FAST, LITERAL = "noise off", "annealed langevin", "anderson", "the seed's update"
SIDES = {
    OFF: "the plain relaxation, damped by a half",
    ON: "annealed Langevin dynamics, then the same relaxation to the end",
    FAST: "Anderson's method on the last five states",
    LITERAL: "the relaxation with noise of 0.1 x 0.995^t in every step and 0.01 of the energy's gradient taken off",
}
NOISE, DECAY, PULL = 0.1, 0.995, 0.01
"""Of the seed's update: eta_0, its factor per step, and alpha."""
DAMPING, GAP = 0.5, 1e-3
"""Damping of the plain relaxation, and the gap above the lowest energy that counts as settled, as a share of the gap
at the start."""
WARM, COLD, STEP = 0.3, 1e-3, 0.3
"""Temperatures from and to which annealing goes, and its step."""
CONTRACTING, MULTISTABLE = "contracting", "multistable"
SAVED = "evaluations saved against noise off, contracting"


@dataclass(frozen=True)
class Size:
    """What a budget buys: units, starts, stored patterns, networks of a kind, most field evaluations, and the annealed
    part of them."""

    units: int
    starts: int
    patterns: int
    networks: int
    most: int
    noisy: int


SIZES = {
    "smoke": Size(24, 4, 2, 1, 60, 20),
    "quick": Size(200, 64, 8, 4, 600, 150),
    "full": Size(400, 128, 12, 5, 1000, 300),
}


class Bias(nn.Module):
    """A constant drive, one for every start."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def forward(self, x: Tensor) -> Tensor:
        """The drive ``(B, units)`` of an input whose rows are the starts."""
        value = self.value
        assert isinstance(value, Tensor)
        return value.expand(len(x), -1)


def network(kind: str, size: Size, generator: torch.Generator) -> Energy:
    """A layer of tanh units coupled to itself.

    Contracting: a random symmetric matrix of norm 0.9 and a random drive. Multistable: a Hopfield network (Hopfield
    1984) of twice the critical strength with random patterns, and a weak drive that makes one of them the deepest.
    """
    n = size.units
    if kind == CONTRACTING:
        raw = torch.randn(n, n, generator=generator)
        matrix = raw + raw.T
        matrix *= 0.9 / torch.linalg.matrix_norm(matrix, 2)
        drive = 0.5 * torch.randn(n, generator=generator)
    else:
        patterns = torch.randint(2, (size.patterns, n), generator=generator).float() * 2 - 1
        matrix = 2 * patterns.T @ patterns / n
        matrix.fill_diagonal_(0)
        drive = 0.1 * patterns[0]
    coupling = Dense(n, n, symmetric=True)
    with torch.no_grad():
        coupling.weight.copy_(matrix)
    return Energy([Node("h", n, Tanh())], [Drive("h", Bias(drive)), Lateral(coupling, "h")])


Method = Callable[[Energy, Tensor, Size, int, str], Tensor]
"""(energy, starts, size, seed, kind) -> the energy after each evaluation of the field ``(T + 1, B)``, first the
start's."""


def _problem(energy: Energy, start: Tensor) -> Relaxation:
    return Relaxation(energy, detached(energy.bind(start)), as_map=True)


def _energy(problem: Relaxation, a: Tensor) -> Tensor:
    found = problem.energy({"h": a}, {"h": a.tanh()})
    assert found is not None
    return found


def _solved(make: Callable[[Size, int, str], Solver]) -> Method:
    def run(energy: Energy, start: Tensor, size: Size, seed: int, kind: str) -> Tensor:
        problem = _problem(energy, start)
        with torch.no_grad():
            found = make(size, seed, kind).solve(problem, {"h": start}, record=True)
            assert found.trace is not None
            assert found.trace.energy is not None
            # a step's entry is of the state that it starts from
            return torch.cat([found.trace.energy, _energy(problem, found.state["h"])[None]])

    return run


@torch.no_grad()
def _literal(energy: Energy, start: Tensor, size: Size, seed: int, kind: str) -> Tensor:
    """The seed's update: h <- Update(h) + eta_t N(0, I) - alpha dE/dh, on pre-activations, in which the library's
    relaxations move."""
    g = torch.Generator().manual_seed(seed)
    problem = _problem(energy, start)
    a, seen = start, [_energy(problem, start)]
    for t in range(size.most):
        residual = problem.field({"h": a.tanh()})["h"] - a
        a = a + (DAMPING + PULL) * residual + NOISE * DECAY**t * torch.randn(a.shape, generator=g)
        seen.append(_energy(problem, a))
    return torch.stack(seen)


def _plain(size: Size, seed: int, kind: str) -> Solver:
    return FixedPoint(damping=DAMPING, tolerance=1e-6, max_steps=size.most, check_every=1)


def _anderson(size: Size, seed: int, kind: str) -> Solver:
    return Anderson(length=5, tolerance=1e-6, max_steps=size.most, check_every=1)


def _annealed(size: Size, seed: int, kind: str) -> Solver:
    # where there is nothing to search, a short search
    noisy = size.noisy if kind == MULTISTABLE else max(1, size.noisy // 20)
    return Langevin(
        mode="annealed", temperature=COLD, start_temperature=WARM, schedule="geometric", step_size=STEP,
        burn_in=noisy, max_steps=size.most + noisy, tolerance=1e-6, seed=seed,
        finish=FixedPoint(damping=DAMPING, check_every=1),
    )  # fmt: skip


METHODS: dict[str, Method] = {
    OFF: _solved(_plain),
    ON: _solved(_annealed),
    FAST: _solved(_anderson),
    LITERAL: _literal,
}


def evaluations(energy: Tensor, lowest: Tensor) -> Tensor:
    """Evaluations of the field until the energy stays within the gap of the lowest one known, ``(B,)``; infinite where
    it never does.

    Args:
        energy: ``(T + 1, B)``.
        lowest: ``(B,)``.
    """
    bound = lowest + GAP * (energy[0] - lowest)
    outside = energy > bound
    steps = torch.arange(1, len(energy) + 1, dtype=energy.dtype)[:, None]
    last = (outside * steps).amax(0)  # 1 + the index of the last state outside
    return torch.where(last >= len(energy), torch.inf, last)


def run(trial: Trial) -> Outcome:
    """Relax both kinds of net from random starts by one method."""
    size = SIZES[trial.budget.name]
    g = torch.Generator().manual_seed(trial.seed)
    metrics: dict[str, Quantity] = {}
    curves: dict[str, list[tuple[float, float]]] = {}
    for kind in (CONTRACTING, MULTISTABLE):
        found = [_compared(kind, trial, size, g) for _ in range(size.networks)]
        needed, usual, best = (torch.cat([f[i] for f in found]) for i in range(3))
        reached = torch.isfinite(needed)
        median, plain = float(needed.median()), float(usual.median())
        metrics[f"evaluations to the gap, {kind}"] = Quantity(median if math.isfinite(median) else None, "")
        metrics[f"starts that reach the gap, {kind}"] = Quantity(100 * float(reached.double().mean()), "%")
        metrics[f"starts in the best basin, {kind}"] = Quantity(100 * float(best.double().mean()), "%")
        metrics[f"evaluations saved against noise off, {kind}"] = Quantity(_saved(median, plain), "%")
        length = min(len(f[3]) for f in found)
        mean = torch.stack([f[3][:length] for f in found]).mean(0)
        curves[f"energy above the best, {kind}"] = [(float(t), float(e)) for t, e in enumerate(mean)]
    flops = 2.0 * size.units**2
    metrics["operations of an evaluation"] = Quantity(flops, "FLOPs")
    return Outcome(metrics, {n: list(p) for n, p in curves.items()}, Cost(None, flops, size.starts * size.networks))


def _saved(median: float, plain: float) -> float:
    """In percent; a method that does not get there saves nothing and loses all."""
    return 100 * (1 - median / plain) if math.isfinite(median) and plain > 0 else -100.0


def _compared(kind: str, trial: Trial, size: Size, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of one network: evaluations needed, those of the plain relaxation, whether the best basin was found, and the mean
    gap after each evaluation."""
    energy = network(kind, size, g)
    start = torch.randn(size.starts, size.units, generator=g)
    runs = {side: method(energy, start, size, trial.seed, kind) for side, method in METHODS.items()}
    own, plain = runs[trial.side], runs[OFF]
    # the lowest energy that any method found from any start is that of the best basin
    best = min(float(found[-1].min()) for found in runs.values())
    spread = max(float(own[0].mean()) - best, 1e-12)
    # each method is measured by the basin that it ends in: noise off is not asked for another minimum than its own
    needed, usual = evaluations(own, own[-1]), evaluations(plain, plain[-1])
    return needed, usual, own[-1] <= best + GAP * spread, (own - best).mean(1) / spread


CLAIM = Claim(
    id="D3",
    system="difftoreqprop",
    seed_file=nets.SEED_FILE,
    sentence="Noise in the relaxation saves a quarter of the settling steps and escapes poor minima.",
    criteria=(
        Criterion("evaluations saved where it contracts", SAVED, "%", "at_least", ON, target=25.0,
                  words="Converges 25% faster", beside=(OFF, FAST, LITERAL)),
        Criterion("evaluations saved where it contracts, the seed's update", SAVED, "%", "at_least", LITERAL,
                  target=25.0, words="20 steps vs. 30", beside=(OFF, FAST)),
        Criterion("starts in the best basin, multistable", f"starts in the best basin, {MULTISTABLE}", "points",
                  "at_least", ON, versus=(OFF, FAST), words="helps escape suboptimal equilibria", beside=(LITERAL,)),
    ),
    protocol=f"""
    Layers of {SIZES["full"].units} tanh units coupled to themselves (quick: {SIZES["quick"].units}). Contracting: a
    random symmetric matrix of norm 0.9. Multistable: a Hopfield network of twice the critical strength with
    {SIZES["full"].patterns} random patterns (quick: {SIZES["quick"].patterns}), one of which a weak drive makes the
    deepest. {SIZES["full"].networks} networks of each kind (quick: {SIZES["quick"].networks}), {SIZES["full"].starts}
    random starts each (quick: {SIZES["quick"].starts}), the same for all sides. Work is counted in evaluations of the
    field, each 2 n^2 operations; the noise itself is not charged. Evaluations needed are those after which the energy
    stays within {GAP:g} of its own end, as a share of its descent; the median over starts is compared with that of the
    plain relaxation of the same starts, and a method that does not get there within {SIZES["full"].most} evaluations
    (quick: {SIZES["quick"].most}) counts as -100%. The best basin is that of the lowest energy which any side found.
    Annealing: {SIZES["full"].noisy} steps of {STEP:g} (quick: {SIZES["quick"].noisy}; a twentieth of them where the
    net contracts) at temperatures from {WARM:g} to {COLD:g}, geometric, then the plain relaxation. The seed's update
    has its own numbers, eta 0.1 x 0.995^t and alpha 0.01, beside a damping of {DAMPING:g}. A contraction has one
    equilibrium, so there is nothing there to escape.
    """,
    sides=SIDES,
    run=run,
    picture=Picture("Mean energy above the best, multistable", x_label="evaluations of the field",
                    y_label="share of the descent", curves=(f"energy above the best, {MULTISTABLE}",), log_y=True),
    printed=(f"starts in the best basin, {CONTRACTING}",),
)  # fmt: skip
