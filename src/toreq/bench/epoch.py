"""Training time of the base systems against backprop of their feed-forward twins, batch by batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from toreq import systems
from toreq.bench.timing import environment, interleaved, ratio
from toreq.data import Batches, load
from toreq.estimators import Implicit

TARGETS = {"mlp": 8.0}
BATCH = 128
TRAIN_IMAGES = 60_000
WARM_STEPS = 100


def run(archs: tuple[str, ...] = ("mlp", "conv", "transformer"), repetitions: int = 15) -> dict[str, Any]:
    """Time training steps (forward, backward, Adam) of toreq, of the same energy with the implicit gradient, and
    of backprop.

    Every side first trains for 100 steps, since settling takes other numbers of steps in a network that has learned
    something. An epoch is the median step times the number of batches in 60,000 images, at one thread and at two.

    Args:
        archs: architectures of ``toreqprop``.
        repetitions: counted steps of each side.
    """
    data = load("mnist")
    torch.set_flush_denormal(True)
    rows: list[dict[str, Any]] = []
    ratios: list[dict[str, Any]] = []
    before = torch.get_num_threads()
    try:
        for arch in archs:
            sides = _sides(arch, data)
            for _ in range(WARM_STEPS):
                for step in sides.values():
                    step()
            for threads in (1, 2):
                torch.set_num_threads(threads)
                timings = interleaved(sides, repetitions)
                for side, timing in timings.items():
                    epoch = timing.median * TRAIN_IMAGES / BATCH
                    rows.append(
                        {
                            "arch": arch,
                            "side": side,
                            "threads": threads,
                            "seconds_per_epoch": epoch,
                            "step_median_ms": timing.median * 1e3,
                            "step_minimum_ms": timing.minimum * 1e3,
                            "step_cpu_ms": timing.cpu * 1e3,
                        }
                    )
                value = timings["toreq"].median / timings["backprop"].median
                ratios.append(ratio(f"{arch}: toreq / backprop, {threads} thread(s)", value, TARGETS.get(arch)))
    finally:
        torch.set_num_threads(before)
    return {"bench": "epoch", "environment": environment(), "batch_size": BATCH, "rows": rows, "ratios": ratios}


def _sides(arch: str, data: Any) -> dict[str, Callable[[], None]]:
    torch.manual_seed(0)
    net = systems.create("toreqprop", data.input_shape, data.num_classes, arch=arch)
    torch.manual_seed(0)
    implicit = systems.create("toreqprop", data.input_shape, data.num_classes, estimator=Implicit(), arch=arch)
    x, y = data.split("train")
    return {
        "toreq": _stepper(net, x, y),
        "implicit": _stepper(implicit, x, y),
        "backprop": _stepper(net.feedforward(), x, y),
    }


def _stepper(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    batches = Batches(x, y, BATCH, seed=0, drop_last=True)
    stream = (batch for epoch in range(1000) for batch in batches.epoch(epoch))

    def step() -> None:
        images, labels = next(stream)
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step
