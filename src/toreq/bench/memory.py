"""Peak training memory against the number of relaxation steps and against depth."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from toreq import systems
from toreq.bench.timing import environment, ratio
from toreq.bench.timing import threads as at_threads
from toreq.diagnostics.memory import MEBIBYTE, fixed_steps, peak_bytes, training_step
from toreq.errors import ConfigError, nearest
from toreq.solvers import FixedPoint

FLAT = 1.02
INPUT_SHAPE, CLASSES = (1, 28, 28), 10
SIDES = ("eqprop", "eqprop, plain", "unrolled", "torchdeq")


def run(
    steps: Sequence[int] = (10, 30, 100, 300, 1000),
    depths: Sequence[int] = (1, 2, 4, 8),
    width: int = 512,
    width_at_depth: int = 256,
    batch: int = 64,
    steps_at_depth: int = 30,
    sides: Sequence[str] = SIDES,
) -> dict[str, Any]:
    """Exact peak bytes of the tensors born in one training step (forward and backward), tolerance 0.

    Against steps the network is ToroidalMLP (one tanh layer coupled to itself), against depth DeepHopfield (tanh layers
    of one width and an output node). ``eqprop`` is ``Centered`` on the shipped solver, ``eqprop, plain`` the same on
    plain iteration (no ring of past iterates), ``unrolled`` autograd through the loop of the shipped solver;
    ``torchdeq`` is a network of the same layers and couplings by that library: fixed-point iteration and implicit
    gradient, as many steps forward and backward.

    Args:
        steps: relaxation steps.
        depths: numbers of hidden layers.
        width: of the layer while the steps vary.
        width_at_depth: of each hidden layer while the depth varies.
        batch: batch size.
        steps_at_depth: relaxation steps while the depth varies.
        sides: which of the four to measure.

    Raises:
        ConfigError: for an unknown side, or where torchdeq is not installed.
    """
    for side in sides:
        if side not in SIDES:
            raise ConfigError(f"memory: expected sides of {list(SIDES)}, got {side!r}; {nearest(side, SIDES)}")
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(batch, *INPUT_SHAPE, generator=generator)
    y = torch.randint(CLASSES, (batch,), generator=generator)
    rows: list[dict[str, Any]] = []
    with at_threads(1):
        for against, points in (
            ("steps", [((width,), count) for count in steps]),
            ("depth", [((width_at_depth,) * depth, steps_at_depth) for depth in depths]),
        ):
            for side in sides:
                for hidden, count in points:
                    peak, ran = _measure(side, against, hidden, count, x, y)
                    row = {"against": against, "side": side, "depth": len(hidden), "steps": count, "ran": ran}
                    rows.append({**row, "peak_mib": peak / MEBIBYTE})
        found = environment()
    return {"bench": "memory", "environment": found, "batch_size": batch, "rows": rows, "ratios": _ratios(rows)}


def _measure(side: str, against: str, hidden: tuple[int, ...], steps: int, x: Tensor, y: Tensor) -> tuple[int, int]:
    """Peak bytes and free relaxation steps of one training step."""
    torch.manual_seed(0)
    if side == "torchdeq":
        net: nn.Module = ImplicitLayers(hidden if against == "steps" else (*hidden, CLASSES), steps)
        step: Callable[[], int] = functools.partial(_implicit_step, net, x, y)
    else:
        options: dict[str, Any] = {"arch": "mlp"} if against == "steps" else {"arch": "hopfield", "output": "node"}
        solver = FixedPoint() if side == "eqprop, plain" else None
        base = systems.create("toreqprop", INPUT_SHAPE, CLASSES, solver=solver, hidden=hidden, **options)
        base.equilibrium.warn = False  # the steps are fixed, settled or not
        net = fixed_steps(base, steps, side if side == "unrolled" else "centered")
        step = functools.partial(training_step, net, x, y)
    step()  # buffers that are made once would be charged to the measured step
    ran = 0

    def measured() -> None:
        nonlocal ran
        ran = step()

    return peak_bytes(measured), ran


class ImplicitLayers(nn.Module):
    r"""A layered deep equilibrium network by torchdeq: :math:`z_l = \tanh(A_l z_{l-1} + A_{l+1}^\top z_{l+1} + c_l)`.

    A single layer is coupled to itself and read out by a linear head; of several the last one is the output. Exactly
    ``steps`` forward and ``steps`` backward iterations.

    Args:
        hidden: widths of the layers.
        steps: iterations of either solver.
    """

    def __init__(self, hidden: Sequence[int], steps: int) -> None:
        super().__init__()
        self.deq = _torchdeq().get_deq(
            f_solver="fixed_point_iter",
            b_solver="fixed_point_iter",
            f_max_iter=steps,
            b_max_iter=steps,
            f_tol=0.0,
            b_tol=0.0,
            ift=True,
        )
        inputs = INPUT_SHAPE[0] * INPUT_SHAPE[1] * INPUT_SHAPE[2]
        self.drive = nn.Linear(inputs, hidden[0])
        self.head = nn.Linear(hidden[0], CLASSES) if len(hidden) == 1 else nn.Identity()
        ends = [hidden[0], *hidden] if len(hidden) == 1 else hidden
        self.joins = nn.ParameterList(nn.Parameter(torch.randn(b, a) * 0.2 / a**0.5) for a, b in pairwise(ends))
        self.hidden = tuple(hidden)
        self.ran = 0

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, 10)``."""
        drive = self.drive(x.flatten(1))
        self.ran = 0

        def field(*z: Tensor) -> list[Tensor] | Tensor:
            # the solver runs without a graph; what follows it for the gradient is no step of the relaxation
            self.ran += not torch.is_grad_enabled()
            if len(z) == 1:
                return torch.tanh(torch.addmm(drive, z[0], self.joins[0].T))
            new = []
            for i, _ in enumerate(z):
                f = drive if i == 0 else z[i - 1] @ self.joins[i - 1].T
                new.append(torch.tanh(f if i == len(z) - 1 else f + z[i + 1] @ self.joins[i]))
            return new

        start = [x.new_zeros(len(x), width) for width in self.hidden]
        out, _ = self.deq(field, start[0] if len(start) == 1 else start)
        last = out[-1]
        return self.head(last if isinstance(last, Tensor) else last[-1])


def _implicit_step(net: ImplicitLayers, x: Tensor, y: Tensor) -> int:
    nn.functional.cross_entropy(net(x), y).backward()
    net.zero_grad(set_to_none=True)
    return net.ran


def _torchdeq() -> Any:
    try:
        import torchdeq
    except ImportError as error:
        raise ConfigError(
            "memory: expected torchdeq 0.1.0, got none; pip install 'toreq[bench]', or leave torchdeq out of sides"
        ) from error
    return torchdeq


def _ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Growth of each side from the fewest to the most steps and layers, and each side over EqProp at the most."""
    out = []
    for against in ("steps", "depth"):
        peaks: dict[str, dict[int, float]] = {}
        for row in rows:
            if row["against"] == against:
                peaks.setdefault(row["side"], {})[row[against]] = row["peak_mib"]
        for side, found in peaks.items():
            few, most = min(found), max(found)
            target = FLAT if side == "eqprop" and against == "steps" else None
            out.append(ratio(f"{side}: peak at {most} / {few} {against}", found[most] / found[few], target))
            if side != "eqprop" and "eqprop" in peaks:
                out.append(ratio(f"{side} / eqprop at {most} {against}", found[most] / peaks["eqprop"][most], None))
    return out
