"""H13: associative recall from a torus whose metric is learned, against a flat one of the same slots."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from toreq.evidence.claim import Claim, Criterion, Outcome, Picture, Quantity, Trial, Tuning
from toreq.evidence.htsep import nets
from toreq.memory import MemoryState, TorusGeometry, TorusMemory
from toreq.tuning import Real, Space
from toreq.tuning.space import Value

LEARNED, STATISTICS, FLAT = "learned metric", "metric from statistics", "flat"
SIDES = {
    LEARNED: "the logarithm of the scale at each slot, learned by contrast of right and wrong recalls",
    STATISTICS: "lengths stretched where addresses are frequent",
    FLAT: "a flat torus of the same slots",
}
SLOTS, FEATURES, CENTRES, SPREAD = 6, 32, 3, 0.7
LOADS, NOISES = (6, 12, 24), (0.0, 0.3, 0.6)
TRIALS, SCALE = 4, 1.0
SPACE = Space({"scale": Real(0.3, 5.0, log=True)})


def addresses(count: int, seed: int, g: torch.Generator) -> Tensor:
    """Addresses on the torus ``(count, 2)``, crowded around a few centres that a seed fixes; a fifth lie anywhere."""
    centre = SLOTS * torch.rand(CENTRES, 2, generator=torch.Generator().manual_seed(seed))
    at = centre[torch.randint(CENTRES, (count,), generator=g)] + SPREAD * torch.randn(count, 2, generator=g)
    anywhere = torch.rand(count, generator=g) < 0.2
    return torch.where(anywhere[:, None], SLOTS * torch.rand(count, 2, generator=g), at).remainder(SLOTS)


def memory(scale: float) -> TorusMemory:
    """A torus of slots whose flat kernel falls to 1/e in ``1 / scale`` slots; time plays no part in an episode."""
    return TorusMemory((2, SLOTS, SLOTS), FEATURES, math.exp(-scale))


def written(torus: TorusMemory, at: Tensor, values: Tensor) -> MemoryState:
    """What the torus holds after writing each value ``(P, F)`` at its address, between its four neighbours."""
    state = torus.empty(1)
    for address, value in zip(at, values, strict=True):
        state = torus.write(state, value[None], address)
    return state


def scores(recalled: Tensor, values: Tensor) -> Tensor:
    """Correlation of what each cue recalls with every value that was written, ``(P, P)``."""
    return torch.nn.functional.normalize(recalled, dim=1) @ torch.nn.functional.normalize(values, dim=1).T


@dataclass(frozen=True)
class Episode:
    """Cues ``(P, 2)``, what the torus holds, and the values ``(P, F)`` that they should recall."""

    cues: Tensor
    held: MemoryState
    values: Tensor

    def scores(self, torus: TorusMemory, metric: TorusGeometry) -> Tensor:
        """See :func:`scores`."""
        return scores(torus.read(self.held, self.cues[None], metric)[0].to(self.values.dtype), self.values)


def episode(torus: TorusMemory, load: int, noise: float, seed: int, g: torch.Generator) -> Episode:
    """Values at addresses, and cues that are those with noise."""
    at = addresses(load, seed, g)
    values = torch.randn(load, FEATURES, generator=g)
    cues = (at + noise * torch.randn(load, 2, generator=g)).remainder(SLOTS)
    return Episode(cues, written(torus, at, values), values)


def geometry(side: str, torus: TorusMemory, seed: int, steps: int) -> TorusGeometry:
    """The metric of a side, made from other episodes than it is tested on."""
    g = torch.Generator().manual_seed(7919 + seed)
    if side == FLAT:
        return torus.geometry()
    if side == STATISTICS:
        counter = replace(torus, features=1)
        seen = written(counter, addresses(40 * steps, seed, g), torch.ones(40 * steps, 1))
        lengths = torus.geometry().lengths
        return TorusGeometry.from_statistics(seen.row(0)[0, ..., 0], lengths=lengths).prepared()
    phi = torch.zeros(SLOTS, SLOTS, requires_grad=True)
    adam = torch.optim.Adam([phi], lr=0.05)
    for _ in range(steps):
        one = episode(torus, LOADS[1], NOISES[1], seed, g)
        found = one.scores(torus, torus.geometry(phi))
        # the right value against all others of the episode
        loss = torch.nn.functional.cross_entropy(5 * found, torch.arange(len(one.values)))
        adam.zero_grad()
        loss.backward()
        adam.step()
    return torus.geometry(phi.detach()).prepared()


def measured(
    torus: TorusMemory, made: TorusGeometry, seed: int, episodes: int, shift: int
) -> dict[tuple[int, float], float]:
    """Share of cues whose recall is nearest to its own value, in percent, by load and noise."""
    found: dict[tuple[int, float], float] = {}
    for load in LOADS:
        for noise in NOISES:
            g = torch.Generator().manual_seed(104_729 * (shift + 1) + seed)
            right = 0.0
            for _ in range(episodes):
                best = episode(torus, load, noise, seed, g).scores(torus, made).argmax(1)
                right += float((best == torch.arange(load)).double().mean())
            found[load, noise] = 100 * right / episodes
    return found


def run(trial: Trial) -> Outcome:
    """Make a side's metric and recall from it."""
    steps, episodes = trial.budget.pick((2, 1), (60, 40), (200, 200))
    torus = memory(float(str(trial.tuned.get("scale", SCALE))))
    made = geometry(trial.side, torus, trial.seed, steps)
    found = measured(torus, made, trial.seed, episodes, 0)
    metrics = {"recall": Quantity(sum(found.values()) / len(found), "%")}
    for (load, noise), value in found.items():
        metrics[f"recall, load {load}, noise {noise:g}"] = Quantity(value, "%")
    bend = made.ricci_scalar().abs().max() if made.phi is not None else torch.zeros(())
    metrics["largest curvature"] = Quantity(float(bend), "")
    curves = {f"noise {noise:g}": [(float(load), found[load, noise]) for load in LOADS] for noise in NOISES}
    return Outcome(metrics, curves)


def held_out_recall(trial: Trial, params: Mapping[str, Value]) -> float:
    """Mean recall on episodes apart from those of the test."""
    steps, episodes = trial.budget.pick((2, 1), (30, 20), (60, 60))
    torus = memory(float(str(params["scale"])))
    made = geometry(trial.side, torus, trial.seed, steps)
    found = measured(torus, made, trial.seed, episodes, 1)
    return math.fsum(found.values()) / len(found)


CLAIM = Claim(
    id="H13",
    system="htsep",
    seed_file=nets.SEED_FILE,
    sentence="Memories live in the geometry: a learned metric recalls more than a flat torus of the same slots.",
    criteria=(
        Criterion(
            "recall against a flat torus", "recall", "points", "at_least", LEARNED, versus=(FLAT,),
            beside=(STATISTICS,),
            words="encodes memories in the toroidal manifold's curvature, allowing geometry-driven retrieval",
        ),
        Criterion(
            "recall of the metric from statistics", "recall", "points", "at_least", STATISTICS, versus=(FLAT,),
            words="a learnable manifold embedding that warps the buffer geometry",
        ),
    ),
    protocol=f"""
    A `TorusMemory` of {SLOTS} x {SLOTS} slots of {FEATURES} numbers. In an episode values (Gaussian) are written at
    their addresses, each shared by the four slots around, which crowd around {CENTRES} centres (deviation
    {SPREAD:g} of a slot; a fifth lie anywhere); the centres are fixed by the seed. Cues are the addresses with
    noise. A cue recalls the slots weighted by the exponential of minus the geodesic distance (`read` with a
    geometry), and is right when its recall is nearer in angle to its own value than to any other of the episode.
    Loads of {LOADS} values, noise of {NOISES} slots, mean over all. The learned side descends the cross entropy of
    right against wrong values over 60 (quick) or 200 (full) episodes of other draws; the side from statistics sees
    as many addresses. The scale of lengths at phi = 0, which is the width of a flat kernel and minus the logarithm
    of the decay from slot to slot, is tuned on every side in {TRIALS} trials. All that is learned is one number a
    slot, and it is learned by automatic differentiation through the distances.
    """,
    sides=SIDES,
    run=run,
    picture=Picture("Recall at noise 0.3", x_label="values held", y_label="right (%)", curves=("noise 0.3",)),
    tuning=Tuning(held_out_recall, dict.fromkeys(SIDES, SPACE), TRIALS, {s: {"scale": SCALE} for s in SIDES}),
)  # fmt: skip
