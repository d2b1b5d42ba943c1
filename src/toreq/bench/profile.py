"""Where a training step's time goes, by kind of operation."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from toreq.bench.nets import build
from toreq.bench.references import Trainer
from toreq.bench.timing import environment, threads
from toreq.data import Batches, load

BATCH = 128
KINDS: dict[str, tuple[str, ...]] = {
    "products": ("mm", "addmm", "bmm", "linear", "baddbmm", "addmv", "mv", "dot"),
    "convolutions": ("convolution", "_convolution", "mkldnn_convolution", "convolution_backward", "conv2d"),
    "activations": ("tanh", "tanh_backward", "sigmoid", "sigmoid_", "clamp", "clamp_min", "threshold_backward", "relu",
                    "native_layer_norm", "_softmax", "hardtanh", "native_layer_norm_backward"),
    "norms and sums": ("linalg_vector_norm", "sum", "mean", "max", "min", "all", "any", "isfinite", "abs"),
    "small linear algebra": ("_linalg_solve_ex", "linalg_lu_factor_ex", "linalg_lu_solve", "linalg_qr", "_linalg_eigh"),
    "copies and casts": ("copy_", "cat", "clone", "_to_copy", "contiguous", "index_select", "index", "stack", "fill_",
                         "zero_", "index_copy", "index_put_", "where"),
}  # fmt: skip
"""Kind -> operators of torch; what is in none is elementwise arithmetic (views cost next to nothing)."""


class _Clock(TorchDispatchMode):
    """Adds up the time inside each operator; what Python and the dispatcher do around it is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.spent: defaultdict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        started = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        self.spent[func.overloadpacket.__name__] += time.perf_counter() - started
        return out


def run(
    nets: Sequence[str] = ("mlp", "lateral", "conv"),
    sides: Sequence[str] = ("toreq", "toreq-exact", "backprop"),
    steps: int = 30,
    warm: int = 60,
) -> dict[str, Any]:
    """Milliseconds of a training step at one thread by kind of operation.

    Operators are timed one by one in steps of their own; ``optimizer`` is the whole of Adam's step, and ``python and
    dispatch`` what remains of the median step without that. Nothing is judged.

    Args:
        nets, sides: see :data:`toreq.bench.nets.SIDES`.
        steps: profiled, and timed without the profiler.
        warm: steps of training before.
    """
    data = load("mnist")
    x, y = data.split("train")
    rows = []
    with threads(1):
        for net in nets:
            for side in sides:
                trainer = build(net, side)
                stream = iter([b for e in range(2) for b in Batches(x, y, BATCH, seed=e, drop_last=True).epoch(0)])
                for _ in range(warm):
                    trainer.step(*next(stream))
                wall = []
                for _ in range(steps):
                    batch = next(stream)
                    started = time.perf_counter()
                    trainer.step(*batch)
                    wall.append((time.perf_counter() - started) * 1e3)
                rows.append({"net": net, "side": side, "step_ms": median(wall), **_kinds(trainer, stream, steps, wall)})
    return {"bench": "profile", "environment": environment(), "batch_size": BATCH, "rows": rows, "ratios": []}


def _kinds(
    trainer: Trainer, stream: Iterator[tuple[Tensor, Tensor]], steps: int, wall: Sequence[float]
) -> dict[str, float]:
    adam = trainer.optimizer.step
    clock, adams = _Clock(), []

    def timed(*args: Any, **options: Any) -> Any:
        # outside of the clock: Adam's operators are one kind
        with _disable_current_modes():
            started = time.perf_counter()
            out = adam(*args, **options)
            adams.append(time.perf_counter() - started)
        return out

    trainer.optimizer.step = timed  # type: ignore[method-assign]
    try:
        with clock:
            for _ in range(steps):
                trainer.step(*next(stream))
    finally:
        trainer.optimizer.step = adam  # type: ignore[method-assign]
    out = dict.fromkeys([*KINDS, "elementwise"], 0.0)
    for name, seconds in clock.spent.items():
        kind = next((k for k, names in KINDS.items() if name in names), "elementwise")
        out[kind] += seconds / steps * 1e3
    out["optimizer"] = sum(adams) / steps * 1e3
    return {**out, "python and dispatch": max(0.0, median(wall) - sum(out.values()))}
