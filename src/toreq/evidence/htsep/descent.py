"""H12: the energy descends while a network settles."""

from __future__ import annotations

import torch
from torch import nn

from toreq import systems
from toreq.core import Energy
from toreq.core.state import detached
from toreq.evidence.base import nets as shared
from toreq.evidence.claim import Claim, Criterion, Outcome, Picture, Quantity, Trial
from toreq.evidence.htsep import nets
from toreq.layer import equilibria
from toreq.solvers import FixedPoint, Relaxation

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


def run(trial: Trial) -> Outcome:
    """Relax random networks from random states in float64, and look for any step on which the energy rises."""
    system, arch = trial.side.split()
    draws, batch, steps = trial.budget.pick((1, 2, 5), (5, 8, STEPS), (20, 16, STEPS))
    data = nets.digits(20, 10)
    worst, rises, total = 0.0, 0, 0
    curve: list[tuple[float, float | None]] = []
    for draw in range(draws):
        torch.manual_seed(1000 * trial.seed + draw)
        small = (shared.SMALL if trial.budget.name == "smoke" else OPTIONS).get(arch, {})
        net = systems.create(system, (1, 28, 28), 10, arch=arch, **small).double().eval()
        x = data.inputs("train", slice(0, batch)).double()
        trace = energies(net, x, steps)
        change = trace.diff(dim=0)
        size = (trace.amax(0) - trace.amin(0)).clamp_min(torch.finfo(trace.dtype).tiny)
        worst = max(worst, float((change / size).max()))
        rises += int((change > AIM * size).sum())
        total += change.numel()
        if draw == 0:
            above = (trace - trace[-1]) / size
            curve = [(float(t), float(v)) for t, v in enumerate(above.mean(1)[:-1])]
    metrics = {
        "largest rise": Quantity(max(worst, 0.0), "of the whole descent"),
        "steps that rise": Quantity(100 * rises / total, "%"),
    }
    return Outcome(metrics, {"energy above its last value": curve})


def energies(net: nn.Module, x: torch.Tensor, steps: int) -> torch.Tensor:
    """The energy after each damped step from a random state, ``(steps + 1, B)``."""
    (layer,) = equilibria(net)
    energy = layer.dynamics
    assert isinstance(energy, Energy)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        bindings = detached(energy.bind(x))
        problem = Relaxation(energy, bindings)
        start = {
            n: SCALE * torch.randn(t.shape, generator=generator, dtype=t.dtype)
            for n, t in energy.initial(bindings).items()
        }
        solver = FixedPoint(damping=DAMPING, max_steps=steps, tolerance=0.0)
        trace = solver.solve(problem, start, record="states").trace
        assert trace is not None
        assert trace.states is not None
        return torch.stack([energy(a, bindings) for a in trace.states])


CLAIM = Claim(
    id="H12",
    system="htsep",
    seed_file=nets.SEED_FILE,
    sentence="The energy descends while the network settles, between unfoldings of the torus.",
    criteria=tuple(
        Criterion(
            f"{side}: largest rise", "largest rise", "of the whole descent", "at_most", side, aim=AIM,
            words="strict energy descent, provable via Lyapunov analysis",
        )
        for side in SIDES
    ),
    protocol=f"""
    Every registered system, each a conservative energy, with weights freshly drawn (5 draws quick, 20 full) at the
    shipped bounds on its couplings, in float64. From a random state (deviation {SCALE:g}) {STEPS} steps of the plain
    iteration with damping {DAMPING:g}, all nodes together, the input fixed; HTSEP with its gates. The metric is the
    largest rise of the energy over one step, as a share of the whole descent of that example; rounding alone allows
    {AIM:g}. A step of the undamped iteration, of Anderson's method or of spikes may raise the energy, and is not
    claimed not to. Where the torus unfolds, outputs stay as they are (H11), so that the energy of a known context does
    too.
    """,
    sides=SIDES,
    run=run,
    picture=Picture(
        "Energy while settling", x_label="step", y_label="energy above its last value, share of the descent",
        curves=("energy above its last value",), log_y=True,
    ),
)  # fmt: skip
