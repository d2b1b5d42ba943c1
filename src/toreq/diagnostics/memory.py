"""Training memory: an exact meter of live tensor bytes, and the peak resident memory of a fresh process."""

from __future__ import annotations

import copy
import dataclasses
import json
import resource
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from toreq import estimators, systems
from toreq.errors import ConfigError, ToreqError
from toreq.layer import equilibria

MEBIBYTE = 2.0**20
DEFAULT_STEPS = (10, 30, 100, 300, 1000)


@dataclasses.dataclass
class _Record:
    reference: weakref.ref[torch.UntypedStorage]
    base: int
    counted: int


class StorageMeter(TorchDispatchMode):
    """Counts the bytes of every tensor storage born inside the ``with`` block for as long as it lives.

    ``live`` and ``peak`` are in bytes. Storages that existed before (parameters, inputs) count zero; views and
    in-place results count once. Scratch memory that an operator frees before it returns is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: dict[int, _Record] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        inputs = list(_storages((args, kwargs)))
        for storage in inputs:
            # What arrives as an input without having been born under the meter existed before it.
            self._track(storage, base=storage.nbytes())
        result = func(*args, **kwargs)
        for storage in _storages(result):
            self._track(storage, base=0)
        for storage in inputs:
            self._recount(storage)
        self.peak = max(self.peak, self.live)
        return result

    def _track(self, storage: torch.UntypedStorage, base: int) -> None:
        key = storage._cdata
        if key in self._known:
            return

        def forget(_: object) -> None:
            self.live -= self._known.pop(key).counted

        counted = storage.nbytes() - base
        self._known[key] = _Record(weakref.ref(storage, forget), base, counted)
        self.live += counted

    def _recount(self, storage: torch.UntypedStorage) -> None:
        """``out=`` and ``resize_`` may grow a storage that was already there."""
        record = self._known[storage._cdata]
        counted = storage.nbytes() - record.base
        self.live += counted - record.counted
        record.counted = counted


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
            yield leaf.untyped_storage()


def peak_bytes(function: Callable[[], object]) -> int:
    """Peak bytes of the tensors born while ``function()`` runs; its result is dropped."""
    with StorageMeter() as meter:
        function()
    return meter.peak


@dataclasses.dataclass(frozen=True)
class MemoryPoint:
    """Peak memory (MiB) of one training step that was asked for ``steps`` and ran ``ran`` relaxation steps."""

    steps: int
    peak_mb: float
    ran: int


def fixed_steps(net: nn.Module, steps: int, estimator: str | None = None) -> nn.Module:
    """A copy of ``net`` whose every relaxation, nudged ones too, runs exactly ``steps`` steps (tolerance 0).

    ``estimator`` is one by name. No example is run again at a smaller nudge.

    Raises ConfigError for ``steps`` < 1 or a solver without ``max_steps`` and ``tolerance``.
    """
    if steps < 1:
        raise ConfigError(f"fixed_steps: expected steps >= 1, got {steps}; ask for at least one step")
    copied = copy.deepcopy(net)
    copied.zero_grad(set_to_none=True)
    for layer in equilibria(copied):
        layer.solver = with_tolerance(layer.solver, steps, 0.0)
        if estimator is not None:
            layer.estimator = named_estimator(estimator, steps)
        if isinstance(layer.estimator, estimators.Contrastive):
            layer.estimator = dataclasses.replace(layer.estimator, tolerance=0.0, max_halvings=0)
    return copied


def with_tolerance(solver: Any, max_steps: int, tolerance: float) -> Any:
    """The solver with another step budget and relative tolerance, everything else kept."""
    return dataclasses.replace(solver, max_steps=max_steps, tolerance=tolerance)


def named_estimator(name: str, steps: int) -> Any:
    """A shipped estimator by its lower-case name; ``unrolled`` takes the loop's length."""
    return estimators.Unrolled(steps=steps) if name == "unrolled" else estimators.create(name)


def training_step(net: Any, x: Tensor, y: Tensor) -> int:
    """One forward and backward pass, gradients dropped after it; returns the free relaxation's steps."""
    loss = net.criterion(net(x), y)
    loss.backward()
    net.zero_grad(set_to_none=True)
    ran = [int(layer.last.free.steps.max()) for layer in equilibria(net) if layer.last.free is not None]
    return max(ran, default=0)


def memory_against_steps(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    steps: Sequence[int] = DEFAULT_STEPS,
    estimator: str | None = None,
    limit_mb: float = 2048.0,
    report: Callable[[MemoryPoint], None] | None = None,
) -> list[MemoryPoint]:
    """Exact peak tensor memory of one training step, for each number of relaxation steps.

    Stops before a point that two earlier ones, taken as a straight line, put above ``limit_mb`` (MiB).
    """
    points: list[MemoryPoint] = []
    for count in steps:
        if _forecast(points, count) > limit_mb:
            break
        trial = fixed_steps(net, count, estimator)
        ran = 0

        def step(trial: nn.Module = trial) -> None:
            nonlocal ran
            ran = training_step(trial, x, y)

        peak = peak_bytes(step)
        points.append(MemoryPoint(count, peak / MEBIBYTE, ran))
        if report is not None:
            report(points[-1])
    return points


def _forecast(points: Sequence[MemoryPoint], steps: int) -> float:
    if len(points) < 2:
        return 0.0
    first, last = points[-2], points[-1]
    slope = (last.peak_mb - first.peak_mb) / (last.steps - first.steps)
    return last.peak_mb + slope * (steps - last.steps)


def growth(points: Sequence[MemoryPoint]) -> float:
    """Relative growth of the peak from the fewest to the most steps: 0 is flat."""
    ordered = sorted(points, key=lambda point: point.steps)
    if len(ordered) < 2 or ordered[0].peak_mb <= 0:
        return float("nan")
    return ordered[-1].peak_mb / ordered[0].peak_mb - 1.0


def resident_peak_mb(config: dict[str, Any], steps: int, batch_size: int, estimator: str | None = None) -> MemoryPoint:
    """Peak resident memory (MiB, interpreter and library included) of a fresh process that trains one step.

    Raises ToreqError with the child's last line when it fails.
    """
    order = json.dumps({"config": config, "steps": steps, "batch_size": batch_size, "estimator": estimator})
    child = subprocess.run(
        [sys.executable, "-c", "from toreq.diagnostics.memory import _child; _child()"],
        input=order,
        capture_output=True,
        text=True,
    )
    if child.returncode != 0:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise ToreqError(
            f"resident_peak_mb: expected the measuring process to finish, got exit {child.returncode} "
            f"({last}); run the check without the resident-memory confirmation"
        )
    answer = json.loads(child.stdout.strip().splitlines()[-1])
    return MemoryPoint(steps, float(answer["peak_mb"]), int(answer["ran"]))


def _child() -> None:
    order = json.loads(sys.stdin.read())
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net = systems.from_config(order["config"])
    shape = tuple(order["config"]["input_shape"])
    x = torch.rand(order["batch_size"], *shape, generator=generator)
    y = torch.randint(int(order["config"]["num_classes"]), (order["batch_size"],), generator=generator)
    # Lazily loaded kernels and buffers would otherwise be charged to the first measurement.
    training_step(fixed_steps(net, 2, order["estimator"]), x, y)
    ran = training_step(fixed_steps(net, order["steps"], order["estimator"]), x, y)
    print(json.dumps({"peak_mb": process_peak_bytes() / MEBIBYTE, "ran": ran}))


def process_peak_bytes() -> int:
    """This process's peak resident memory in bytes.

    Linux's ``ru_maxrss`` survives ``exec``, so a child would report its parent's peak; ``VmHWM`` is its own.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
