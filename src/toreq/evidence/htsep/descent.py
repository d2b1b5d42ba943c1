"""H12: the energy descends while a network settles."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from toreq import systems
from toreq.core import Bindings, Energy
from toreq.core.state import detached
from toreq.evidence.base import nets as shared
from toreq.evidence.claim import Claim, Criterion, Outcome, Picture, Quantity, Trial
from toreq.evidence.htsep import nets
from toreq.layer import equilibria
from toreq.solvers import FixedPoint, Relaxation
from toreq.systems.htsep import HTSEP

STEPS, DAMPING, SCALE, AIM = 60, 0.3, 3.0, 1e-9
OPTIONS = {
    "mlp": {"hidden": (48,)},
    "hopfield": {"hidden": (48, 24)},
    "conv": {"channels": (4, 6)},
    "transformer": {"features": 16, "heads": 2, "hidden": 16, "patch": 14},
    "dense": {"hidden": (48,)},
    "residual": {"width": 16, "levels": 3},
    "sequence": {"features": 16, "heads": 2, "hidden": 16, "patch": 14},
    "classifier": {"features": 16, "heads": 2, "hidden": 16},
}


def _sides() -> dict[str, str]:
    found = {}
    for system in systems.names():
        for arch in systems.architectures(system):
            found[f"{system} {arch}"] = f"the energy of `{system}`, arch `{arch}`"
    return found


SIDES = _sides()
OWN = ("htsep dense", "htsep conv")
RISE, UNFOLDING, OF = "largest rise", "change by the unfolding", "of the whole descent"
WORDS = "strict energy descent, provable via Lyapunov analysis"


def run(trial: Trial) -> Outcome:
    """Relax random networks from random states in float64, and look for any step on which the energy rises."""
    system, arch = trial.side.split()
    draws, batch, steps = trial.budget.pick((1, 2, 5), (5, 8, STEPS), (20, 16, STEPS))
    data = nets.digits(20, 10)
    worst, rises, total = 0.0, 0, 0
    unfolding: float | None = None
    curve: list[tuple[float, float | None]] = []
    for draw in range(draws):
        torch.manual_seed(1000 * trial.seed + draw)
        small = (shared.SMALL if trial.budget.name == "smoke" else OPTIONS).get(arch, {})
        net = systems.create(system, (1, 28, 28), 10, arch=arch, **small).double().eval()
        parts = energies(net, data.inputs("train", slice(0, batch)).double(), steps)
        trace = torch.cat([parts[0], *(part[1:] for part in parts[1:])])
        size = (trace.amax(0) - trace.amin(0)).clamp_min(torch.finfo(trace.dtype).tiny)
        for part in parts:
            change = part.diff(dim=0)
            worst = max(worst, float((change / size).max()))
            rises += int((change > AIM * size).sum())
            total += change.numel()
        for before, after in pairwise(parts):
            unfolding = max(unfolding or 0.0, float(((after[0] - before[-1]).abs() / size).max()))
        if draw == 0:
            above = (trace - trace[-1]) / size
            curve = [(float(t), float(v)) for t, v in enumerate(above.mean(1)[:-1])]
    metrics = {
        RISE: Quantity(max(worst, 0.0), OF),
        "steps that rise": Quantity(100 * rises / total, "%"),
        UNFOLDING: Quantity(unfolding, OF),
    }
    return Outcome(metrics, {"energy above its last value": curve})


@torch.no_grad()
def energies(net: nn.Module, x: Tensor, steps: int) -> list[Tensor]:
    """The energy after each damped step from a random state, ``(steps + 1, B)``.

    A network of HTSEP first takes the batch for its context, and unfolds a dimension half-way: two parts of half the
    steps each, the second from the state where the first ended, with zeros for the new units.
    """
    grows = isinstance(net, HTSEP)
    if grows:
        net.context.observe(x)
    energy, _ = _bound(net, x)
    generator = torch.Generator().manual_seed(0)
    start = {
        n: SCALE * torch.randn(t.shape, generator=generator, dtype=t.dtype)
        for n, t in energy.initial(energy.bind(x)).items()
    }
    if not grows:
        return [_descent(net, x, start, steps)[0]]
    first, end = _descent(net, x, start, steps // 2)
    net.grow(2)
    energy, bindings = _bound(net, x)
    wider = energy.initial(bindings)
    for name, value in end.items():
        wider[name] = torch.zeros_like(wider[name])
        wider[name][:, : value.shape[1]] = value
    return [first, _descent(net, x, wider, steps - steps // 2)[0]]


def _bound(net: nn.Module, x: Tensor) -> tuple[Energy, Bindings]:
    (layer,) = equilibria(net)
    energy = layer.dynamics
    assert isinstance(energy, Energy)
    return energy, detached(energy.bind(x))


def _descent(net: nn.Module, x: Tensor, start: dict[str, Tensor], steps: int) -> tuple[Tensor, dict[str, Tensor]]:
    energy, bindings = _bound(net, x)
    solver = FixedPoint(damping=DAMPING, max_steps=steps, tolerance=0.0)
    trace = solver.solve(Relaxation(energy, bindings), start, record="states").trace
    assert trace is not None
    assert trace.states is not None
    return torch.stack([energy(a, bindings) for a in trace.states]), dict(trace.states[-1])


CLAIM = Claim(
    id="H12",
    system="htsep",
    seed_file=nets.SEED_FILE,
    sentence="The energy descends while the network settles, between unfoldings of the torus.",
    criteria=(
        *(
            Criterion(f"{side}: {RISE}", RISE, OF, "at_most", side, aim=AIM, words=WORDS)
            for side in SIDES
        ),
        *(Criterion(f"{side}: {UNFOLDING}", UNFOLDING, OF, "at_most", side, aim=AIM, words=WORDS) for side in OWN),
    ),
    protocol=f"""
    Every registered system, each a conservative energy, with weights freshly drawn (5 draws quick, 20 full) at the
    shipped bounds on its couplings, in float64. From a random state (deviation {SCALE:g}) {STEPS} steps of the plain
    iteration with damping {DAMPING:g}, all nodes together, the input fixed; HTSEP with the gates of a context, and
    half-way its torus unfolds a dimension of two places, by which the units double. The metric is the
    largest rise of the energy over one step, as a share of the whole descent of that example; rounding alone allows
    {AIM:g}. That of the unfolding itself is taken apart, rise or fall. A step of the undamped iteration, of Anderson's
    method or of spikes may raise the energy, and is not claimed not to.
    """,
    sides=SIDES,
    run=run,
    picture=Picture(
        "Energy while settling", x_label="step", y_label="energy above its last value, share of the descent",
        curves=("energy above its last value",), log_y=True,
    ),
)  # fmt: skip
