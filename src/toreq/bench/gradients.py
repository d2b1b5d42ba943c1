"""What the settings cost in exactness: cosines of the gradient with the exact one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from toreq import systems
from toreq.bench.timing import environment, ratio, threads
from toreq.data import Batches, load
from toreq.estimators import Implicit
from toreq.solvers import Anderson
from toreq.systems import System

BATCH = 128
NETS: dict[str, dict[str, Any]] = {
    "mlp": {"arch": "hopfield", "hidden": (512,), "output": "node", "nonlinearity": "hard_sigmoid", "norm_bound": None},
    "lateral": {"arch": "mlp"},
    "conv": {"arch": "conv"},
    "transformer": {"arch": "transformer"},
}
TARGETS = {"exact": 0.999, "mixed": 0.999, "fast": 0.99}
"""Least cosine with the exact gradient: of any parameter's own, and for ``fast`` of the whole gradient. ``mixed`` is
exact with a free phase in bfloat16 and a float32 finish."""


def run(
    nets: Sequence[str] = tuple(NETS),
    steps: Sequence[int] = (0, 150),
    images: int = BATCH,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Cosines of the float32 gradient with the implicit one in float64 (both solves to 1e-10), untrained and trained.

    ``cosine`` is of the whole gradient, ``least`` the smallest of any parameter's own, with its ``parameter``.

    Args:
        nets: of ``mlp`` (784-512-10, output node), ``lateral`` (ToroidalMLP 512), ``conv``, ``transformer``.
        steps: training steps (exact settings) before each measurement, increasing.
        images: in the batch that is measured.
        options: of the systems, over the nets' own.
    """
    x, y = load("mnist").split("train")
    rows: list[dict[str, Any]] = []
    ratios: list[dict[str, Any]] = []
    with threads(1):
        for net in nets:
            torch.manual_seed(0)
            system = systems.create("toreqprop", (1, 28, 28), 10, **{**NETS[net], **(options or {})})
            stream = iter(Batches(x, y, BATCH, seed=0, drop_last=True).epoch(0))
            optimizer = torch.optim.Adam(system.parameters(), lr=1e-3)
            done = 0
            for wanted in steps:
                for a, b in (next(stream) for _ in range(wanted - done)):
                    optimizer.zero_grad()
                    system.criterion(system(a), b).backward()
                    optimizer.step()
                done = wanted
                batch = x[-images:].float() / 255, y[-images:]
                exact = _exact(system, *batch)
                for name, target in TARGETS.items():
                    found = _gradient(_with(system, name), *batch)
                    cosines = {k: _cosine(found[k], g) for k, g in exact.items()}
                    least = min(cosines, key=lambda k: cosines[k])
                    whole = _cosine(*(torch.cat([part[k].flatten() for k in exact]) for part in (found, exact)))
                    row = {"net": net, "trained_steps": wanted, "settings": name, "cosine": whole}
                    rows.append({**row, "least": cosines[least], "parameter": least})
                    what, value = ("cosine", whole) if name == "fast" else ("least cosine", cosines[least])
                    ratios.append(ratio(f"{net}, {name}, after {wanted} steps: {what}", value, target, at_most=False))
    return {"bench": "gradients", "environment": environment(), "batch_size": images, "rows": rows, "ratios": ratios}


def _with(system: System, settings: str) -> System:
    net = copy.deepcopy(system).eval()
    layer = net.equilibrium
    if settings == "fast":
        layer.hasten()
    elif settings == "mixed":
        layer.solver = replace(layer.solver, precision="mixed")
    return net


def _exact(system: System, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    net = copy.deepcopy(system).double().eval()
    net.equilibrium.solver = Anderson(tolerance=1e-10, max_steps=500)
    net.equilibrium.estimator = Implicit(tolerance=1e-10, max_steps=500)
    return _gradient(net, x.double(), y)


def _gradient(net: System, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    net.criterion(net(x), y).backward()
    return {n: p.grad.double() for n, p in net.named_parameters() if p.grad is not None}


def _cosine(a: Tensor, b: Tensor) -> float:
    size = float(a.norm() * b.norm())
    return float((a * b).sum()) / size if size > 0 else 1.0
