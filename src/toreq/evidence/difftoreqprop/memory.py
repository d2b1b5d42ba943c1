"""D5: memory of sampling, against the steps of a chain at fixed noise levels and against the number of levels."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from toreq.diagnostics.memory import MEBIBYTE, fixed_steps, peak_bytes, with_tolerance
from toreq.evidence import counting
from toreq.evidence.budgets import Budget
from toreq.evidence.claim import Claim, Cost, Criterion, Outcome, Picture, Quantity, Trial
from toreq.evidence.difftoreqprop import nets
from toreq.systems import Anneal, DiffTorEqProp
from toreq.systems.difftoreqprop_parts import denoising_cost

RING, ALONE, TRAINING, THROUGH = "ring", "one batch at a time", "training by EqProp", "backprop through the steps"
SIDES = {
    RING: "batches at all noise levels at once, one in each slot of the ring",
    ALONE: "the same chains, one batch after the other, as samplers usually are",
    TRAINING: "a training step of the denoiser, its relaxation of so many steps",
    THROUGH: "the same step by backprop through the relaxation",
}
FLAT = 2.0
STEPS = "growth of peak memory with steps"
LEVELS = "growth of peak memory with levels"


def steps_of(budget: Budget) -> tuple[int, ...]:
    """Langevin corrections at each level, or relaxation steps of a training step."""
    return budget.pick((1, 3), (1, 4, 16), (1, 4, 16, 64))


def levels_of(budget: Budget) -> tuple[int, ...]:
    """Noise levels."""
    return budget.pick((2, 4), (4, 8, 16), (4, 8, 16, 32))


def _net(trial: Trial) -> DiffTorEqProp:
    widths = trial.budget.pick((2, 3), (16, 32), (16, 32))
    net = nets.build(trial.seed, trial.device, arch="conv", channels=widths, denoising=1.0)
    layer = nets.layer(net)
    # all steps are run: memory must not depend on how fast a state settles
    layer.solver = with_tolerance(layer.solver, trial.budget.pick(2, 8, 8), 0.0)
    return net.eval()


def sampled(net: DiffTorEqProp, side: str, levels: int, corrections: int, batch: int) -> float:
    """Peak MiB of drawing as many batches as fill the ring."""
    anneal = Anneal(levels=levels, corrections=corrections)
    count = batch * levels

    def draw() -> None:
        if side == RING:
            net.sample(count, anneal=anneal, batch=batch, generator=torch.Generator().manual_seed(0))
            return
        for i in range(levels):
            net.sample(batch, anneal=anneal, batch=batch, generator=torch.Generator().manual_seed(i))

    return _peak(draw)


def _peak(function: Callable[[], object]) -> float:
    with torch.no_grad():
        function()  # what is made once is not charged
    return peak_bytes(function) / MEBIBYTE


def trained(net: DiffTorEqProp, side: str, steps: int, batch: int) -> float:
    """Peak MiB of a training step of the denoiser with a relaxation of exactly so many steps."""
    twin = fixed_steps(net, steps, "unrolled" if side == THROUGH else None).train()
    assert isinstance(twin, DiffTorEqProp)
    kept = twin.filter
    assert kept is not None
    g = torch.Generator().manual_seed(0)
    x: Tensor = torch.rand(batch, *nets.SHAPE, generator=g).to(next(twin.parameters()).device)
    y = torch.arange(batch, device=x.device) % nets.CLASSES

    def step() -> None:
        with torch.enable_grad():
            denoising_cost(twin.denoise, kept.left, x, y, twin.span, g).backward()
        twin.zero_grad(set_to_none=True)

    step()
    return peak_bytes(step) / MEBIBYTE


def growth(points: list[tuple[float, float]]) -> float:
    """Of the last number over the first, in percent."""
    return 100 * (points[-1][1] / points[0][1] - 1)


def run(trial: Trial) -> Outcome:
    """Peak memory of one side, against steps and, for samplers, against levels."""
    net, budget = _net(trial), trial.budget
    batch = budget.pick(2, 16, 16)
    sampling = trial.side in (RING, ALONE)
    few = levels_of(budget)[0]
    by_steps = [
        (float(n), sampled(net, trial.side, few, n, batch) if sampling else trained(net, trial.side, 4 * n, batch))
        for n in steps_of(budget)
    ]
    if not sampling:
        by_steps = [(4 * n, peak) for n, peak in by_steps]
    metrics = {
        STEPS: Quantity(growth(by_steps), "%"),
        "peak memory at most steps": Quantity(by_steps[-1][1], "MiB"),
    }
    curves = {"peak memory against steps": by_steps}
    if sampling:
        by_levels = [(float(n), sampled(net, trial.side, n, 0, batch)) for n in levels_of(budget)]
        (a, p), (b, q) = by_levels[-2:]
        metrics[LEVELS] = Quantity(growth(by_levels), "%")
        metrics["exponent of memory in levels"] = Quantity(math.log(q / p) / math.log(b / a), "")
        curves["peak memory against levels"] = by_levels
    return Outcome(metrics, {n: list(p) for n, p in curves.items()}, Cost(counting.parameters(net), None, batch))


CLAIM = Claim(
    id="D5",
    system="difftoreqprop",
    seed_file=nets.SEED_FILE,
    sentence="The memory of a diffusion chain does not grow with its steps.",
    criteria=(
        Criterion("sampling on the ring: growth with steps", STEPS, "%", "at_most", RING, aim=FLAT,
                  words="O(1) memory for multi-step diffusion chains", beside=(ALONE,)),
        Criterion("training: growth with steps", STEPS, "%", "at_most", TRAINING, aim=FLAT, words="O(1) memory",
                  beside=(THROUGH,)),
        Criterion("training: against backprop through the steps", "peak memory at most steps", "MiB", "at_most",
                  TRAINING, versus=(THROUGH,), words="unlike standard diffusion models that require O(T) storage"),
    ),
    protocol=f"""
    Peak bytes of all tensors alive at a time, counted as they are born and die. Freshly drawn convolutions (16 and 32
    channels) on 28 x 28 pixels, batches of 16; the relaxation of every denoising runs the same number of steps
    (tolerance 0). Sampling: Langevin corrections at each of {levels_of(Budget("full", 0))[0]} levels from
    {steps_of(Budget("full", 0))[0]} to {steps_of(Budget("full", 0))[-1]}, and without corrections from
    {levels_of(Budget("full", 0))[0]} to {levels_of(Budget("full", 0))[-1]} levels; as many batches are drawn as fill
    the ring. Training: the denoising cost of one batch, its relaxation of 4 to 256 steps. Said plainly: ordinary
    samplers keep one state and need no more memory for more steps either, of which the second side is the proof;
    storage that grows with the steps is that of backprop through a chain. The ring holds a batch for every level, so
    its memory grows with the levels, in exchange for a batch that is finished with every tick.
    """,
    sides=SIDES,
    run=run,
    picture=Picture("Peak memory", x_label="steps", y_label="peak of live tensors (MiB)",
                    curves=("peak memory against steps",), log_x=True, log_y=True),
    printed=("peak memory at most steps",),
)  # fmt: skip
