"""What ``torch.compile`` of the relaxation gains: a training step with it against one without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

from toreq import systems
from toreq.bench.references import ModuleTrainer, Trainer
from toreq.bench.timing import environment, interleaved, ratio
from toreq.bench.timing import threads as at_threads
from toreq.data import Batches, load

BATCH = 128


def run(
    archs: Sequence[str] = ("mlp", "conv", "transformer"),
    settings: Sequence[str] = ("exact", "fast"),
    threads: Sequence[int] = (1, 2),
    repetitions: int = 15,
    warm: int = 40,
) -> dict[str, Any]:
    """Milliseconds of a training step, eager and compiled; nothing is judged, since an option need not pay.

    Args:
        archs: architectures of ``toreqprop``.
        settings: see :func:`toreq.systems.create`.
        threads: thread counts.
        repetitions: counted steps of each side.
        warm: steps of training before the timing, in which the compiler meets the shapes; below an epoch.
    """
    data = load("mnist")
    x, y = data.split("train")
    rows: list[dict[str, Any]] = []
    ratios: list[dict[str, Any]] = []
    for arch in archs:
        for kind in settings:
            stream = list(islice(Batches(x, y, BATCH, seed=0, drop_last=True).epoch(0), warm + 1))
            sides = {name: _trainer(arch, kind, name == "compiled") for name in ("eager", "compiled")}
            for trainer in sides.values():
                for images, labels in stream[:warm]:
                    trainer.step(images, labels)
            for count in threads:
                with at_threads(count):
                    steps = {n: partial(t.step, *stream[warm]) for n, t in sides.items()}
                    timings = interleaved(steps, repetitions)
                for name, timing in timings.items():
                    row = {"arch": arch, "settings": kind, "side": name, "threads": count}
                    rows.append({**row, "step_median_ms": timing.median * 1e3, "step_minimum_ms": timing.minimum * 1e3})
                value = timings["eager"].median / timings["compiled"].median
                ratios.append(ratio(f"{arch}, {kind}: eager / compiled, {count} thread(s)", value, None))
    return {"bench": "compiled", "environment": environment(), "batch_size": BATCH, "rows": rows, "ratios": ratios}


def _trainer(arch: str, settings: str, compiled: bool) -> Trainer:
    net = systems.create("toreqprop", (1, 28, 28), 10, arch=arch, settings=settings)
    layer = net.equilibrium
    layer.solver = replace(layer.solver, compile=compiled)
    return ModuleTrainer(net, net.criterion, 1e-3)
