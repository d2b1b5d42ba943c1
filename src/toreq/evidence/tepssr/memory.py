"""S2: training memory, online against sequence length and at equilibrium against settling steps."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from toreq.core import SSM
from toreq.core.scan import sequential
from toreq.core.ssm import inflow
from toreq.core.ssm_online import OnlineSSM
from toreq.data import seeded
from toreq.diagnostics.memory import MEBIBYTE, fixed_steps, peak_bytes
from toreq.evidence import counting
from toreq.evidence.claim import Claim, Cost, Criterion, Outcome, Picture, Quantity, Trial
from toreq.evidence.tepssr import nets
from toreq.systems.tepssr_nets import StateSpaceClassifier

SIDES = {
    "online": "one state-space layer, token by token, with eligibility traces",
    "bptt": "the same layer and losses, backprop through time",
    "joint": "a network of TEP-SSR, centered EqProp at its equilibrium",
    "unrolled": "the same network, backprop through the steps of its relaxation",
}
LENGTHS, STEPS = (64, 256, 1024, 4096), (10, 30, 100, 300, 1000)
LIMIT, FLAT = 400, 2.0
"""Most steps that are unrolled; percent of growth that counts as none."""
FEATURES, HIDDEN, BATCH, CLASSES, TOKENS = 16, 32, 4, 5, 64
GROWTH = "growth of peak memory"
ERROR = "error of the gradient, online against through time"


def layer_step(side: str, length: int, seed: int, hidden: int) -> Callable[[], nn.Module]:
    """A function that runs one layer over a sequence and leaves the gradient of its losses in a copy of it, which it
    returns.

    Args:
        side: ``online`` or ``bptt``.
        length: of the sequence.
        seed: of weights and sequence.
        hidden: channels.
    """
    torch.manual_seed(seed)
    op = SSM(FEATURES, hidden, gates=nn.Linear(FEATURES, 3 * hidden), generator=seeded(seed, 1))
    net = nn.ModuleDict({"op": op, "head": nn.Linear(hidden, CLASSES)})
    u = torch.randn(BATCH, length, FEATURES, generator=seeded(seed, 2))
    y = torch.randint(CLASSES, (BATCH, length), generator=seeded(seed, 3))

    def step() -> nn.Module:
        own = copy.deepcopy(net)
        (_online if side == "online" else _through_time)(own, u, y)
        return own

    return step


def _loss(net: nn.ModuleDict, z: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(net["head"](z.tanh()), y, reduction="sum")


def _online(net: nn.ModuleDict, u: Tensor, y: Tensor) -> None:
    op = net["op"]
    assert isinstance(op, SSM)
    online = OnlineSSM(op, len(u))
    for t in range(u.shape[1]):
        _loss(net, online.step(u[:, t]), y[:, t]).backward()
    online.finish()


def _through_time(net: nn.ModuleDict, u: Tensor, y: Tensor) -> None:
    op = net["op"]
    assert isinstance(op, SSM)
    v = nn.functional.linear(u, op.project.tensors()["weight"])
    step, gate_in, gate_out = op.steps(u)
    c, d = op.coefficients()
    rate = op.log_rate.exp() * step[..., None]
    root = inflow(rate)
    decay = torch.polar((-rate).exp(), op.frequency * step[..., None])
    read = torch.complex(c[0], c[1]) * root * gate_out[..., None]
    z = sequential(v, decay, (root * gate_in[..., None]).to(decay.dtype), read) + d * v
    _loss(net, z.flatten(0, 1), y.flatten()).backward()


def disagreement(length: int, seed: int, hidden: int) -> float:
    """Relative error of the whole gradient by traces against the one through time."""
    found, wanted = (
        torch.cat(
            [p.grad.flatten() for p in layer_step(side, length, seed, hidden)().parameters() if p.grad is not None]
        )
        for side in ("online", "bptt")
    )
    return float((found - wanted).norm() / wanted.norm())


def _network(count: int, seed: int) -> StateSpaceClassifier:
    torch.manual_seed(seed)
    return StateSpaceClassifier((count, 2), CLASSES, features=FEATURES, hidden=HIDDEN, attention="none")


def _network_step(side: str, steps: int, seed: int, budget_small: bool) -> Callable[[], None]:
    count = 6 if budget_small else TOKENS
    net = _network(count, seed)
    net.equilibrium.warn = False  # the number of steps is fixed, settled or not
    fixed: Any = fixed_steps(net, steps, "unrolled" if side == "unrolled" else None)
    x = torch.randn(BATCH, count, 2, generator=seeded(seed, 4))
    y = torch.randint(CLASSES, (BATCH,), generator=seeded(seed, 5))

    def step() -> None:
        fixed.criterion(fixed(x), y).backward()
        fixed.zero_grad(set_to_none=True)

    return step


def run(trial: Trial) -> Outcome:
    """Peak bytes of one training step, against length or steps."""
    small = not trial.budget.conclusive
    metrics: dict[str, Quantity] = {}
    if trial.side in ("online", "bptt"):
        hidden = 4 if small else HIDDEN
        sizes = (3, 6) if small else LENGTHS
        make: Callable[[int], Callable[[], object]] = functools.partial(
            _layer, trial.side, seed=trial.seed, hidden=hidden
        )
        name = "peak memory against length"
        if trial.side == "online":
            metrics[ERROR] = Quantity(disagreement(sizes[1], trial.seed, hidden), "")
    else:
        sizes = (2, 4) if small else tuple(n for n in STEPS if trial.side == "joint" or n <= LIMIT)
        make = functools.partial(_settled, trial.side, seed=trial.seed, small=small)
        name = "peak memory against steps"
    points = []
    for size in sizes:
        step = make(size)
        step()  # what is made once is not charged to the measured step
        points.append((float(size), peak_bytes(step) / MEBIBYTE))
    (first, low), (last, high) = points[0], points[-1]
    metrics[GROWTH] = Quantity(100 * (high / low - 1), "%")
    metrics["exponent of peak memory"] = Quantity(math.log(high / low) / math.log(last / first), "")
    metrics["peak memory at the most"] = Quantity(high, "MiB")
    return Outcome(metrics, {name: points}, Cost(_parameters(trial.side, trial.seed), None, BATCH * len(points)))


def _layer(side: str, size: int, *, seed: int, hidden: int) -> Callable[[], object]:
    return layer_step(side, size, seed, hidden)


def _settled(side: str, size: int, *, seed: int, small: bool) -> Callable[[], object]:
    return _network_step(side, size, seed, small)


def _parameters(side: str, seed: int) -> int:
    if side in ("online", "bptt"):
        return counting.parameters(layer_step(side, 2, seed, HIDDEN)())
    return counting.parameters(_network(TOKENS, seed))


CLAIM = Claim(
    id="S2",
    system="tepssr",
    seed_file=nets.SEED_FILE,
    sentence="Training takes constant memory.",
    criteria=(
        Criterion(
            f"online: {GROWTH} with the length", GROWTH, "%", "at_most", "online", words="Constant memory training",
            aim=FLAT, beside=("bptt",),
        ),
        Criterion(
            f"joint: {GROWTH} with settling steps", GROWTH, "%", "at_most", "joint", words="Constant memory training",
            aim=FLAT, beside=("unrolled",),
        ),
        Criterion(ERROR, ERROR, "", "at_most", "online", aim=1e-4, condition=True),
    ),
    protocol=f"""
    Peak bytes of live tensors born in one training step (inputs, weights and what is made once left out; gradients
    included), by a hook on every operation. Online: one selective state-space layer of {FEATURES} inputs and {HIDDEN}
    channels with a loss at every token, {BATCH} sequences of {LENGTHS[0]} to {LENGTHS[-1]:,} tokens, learned by
    eligibility traces while it runs, against the same losses by backprop through time; growth is the peak at the
    longest over that at the shortest. It counts only where both gradients agree (relative error of the whole at the
    second length). This mode is a forward recurrence; it does not settle. Joint: a network of {FEATURES} features and
    one layer of {HIDDEN} channels on {TOKENS} tokens, {STEPS[0]} to {STEPS[-1]} relaxation steps, all of them run
    (tolerance 0), centered EqProp against backprop through the steps (up to {LIMIT}). The joint mode's memory is linear
    in the length: a state has a vector for every token. Only one of these two things is constant at a time.
    """,
    sides=SIDES,
    run=run,
    picture=Picture(
        "Peak memory of a training step against sequence length", x_label="tokens",
        y_label="peak of live tensors (MiB)", curves=("peak memory against length",), log_x=True, log_y=True,
    ),
    exclusive=True,
    printed=("exponent of peak memory",),
)  # fmt: skip
