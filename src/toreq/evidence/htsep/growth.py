"""H11: dimensions are added as a stream needs them, without changing what was read before."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from toreq.evidence.claim import Claim, Criterion, Outcome, Picture, Quantity, Trial
from toreq.evidence.htsep import nets
from toreq.evidence.protocols import continual
from toreq.evidence.protocols.continual.streams import PermutedMNIST
from toreq.memory import TorusMemory
from toreq.systems.htsep import HTSEP
from toreq.systems.htsep_growth import wanted

VARIANCE, CURVATURE, FIXED = "variance", "variance and curvature", "fixed"
SIDES = {
    VARIANCE: "grows when a batch is far from every context and no slot is free",
    CURVATURE: "grows also when it would be put into a valley of the torus, between slots that have seen much",
    FIXED: "never grows",
}
BASE, SHARE, RATE, BEND, SHEETS = (3, 3), 0.3, 2e-3, 1.0, 8
"""Slots before growth, share that a context opens, Adam's rate, curvature that counts as crowded, most sheets."""


class GrowingLearner(continual.ModuleLearner):
    """A learner whose network unfolds a dimension when its contexts need one; the optimizer starts anew there.

    Args:
        net: freshly drawn.
        rule: a key of `SIDES`.
    """

    def __init__(self, net: HTSEP, rule: str) -> None:
        self.net, self.rule, self.largest_change = net, rule, 0.0
        self.make = functools.partial(torch.optim.Adam, lr=RATE, betas=(0.0, 0.999))
        super().__init__(net, self.make)

    def observe(self, x: Tensor, y: Tensor) -> None:
        """Grow if the rule says so, then learn from the batch."""
        if self.wanted(x):
            self.net.eval()
            with torch.no_grad():
                before = self.net(x)
                self.net.grow(2)
                self.largest_change = max(self.largest_change, float((self.net(x) - before).abs().max()))
            self.optimizer = self.make(self.net.parameters())
            self._cost.clear()
        super().observe(x, y)

    def wanted(self, x: Tensor) -> bool:
        """Whether this batch asks for another dimension."""
        torus = self.net.context
        if self.rule == FIXED or len(torus.count) >= SHEETS * math.prod(torus.shape):
            return False
        return wanted(self.net, x, "variance" if self.rule == VARIANCE else "curvature", BEND)


def run(trial: Trial) -> Outcome:
    """Learn a stream whose permutations come one by one."""
    tasks, images, test = trial.budget.pick((3, 320, 20), (12, 1500, 300), (12, 10_000, 1000))
    stream = PermutedMNIST(tasks, trial.seed, train=images, test=test, batch_size=trial.budget.pick(32, 64, 64))
    net = nets.build("dense", trial.seed, hidden=(trial.budget.pick(16, 128, 256),), torus=BASE, open_share=SHARE)
    learner = GrowingLearner(net, trial.side)
    # without a scratch folder: the shapes of a grown network are not those that a restored run begins with
    found = continual.run(stream, learner, scratch=None)
    metrics = {
        **found.metrics,
        "largest change by unfolding": Quantity(learner.largest_change, "logits"),
        "largest change of a read": Quantity(reads(trial.seed), "relative"),
        "dimensions": Quantity(float(net.context.slots.shape[1]), ""),
        "contexts": Quantity(float(net.context.contexts), ""),
        "batches without room": Quantity(float(net.context.full), ""),
    }
    return Outcome(metrics, found.curves, found.cost, found.notes)


def reads(seed: int) -> float:
    """The largest relative change of any read of a torus memory by unfolding it, before and after further writes."""
    g = torch.Generator().manual_seed(seed)
    memory = TorusMemory((5, 4), 6, 0.8)
    state = memory.empty(3, torch.float64)
    for _ in range(7):
        state = memory.write(memory.advance(state), torch.randn(3, 6, generator=g, dtype=torch.float64), [1.5])
    wider, grown = memory.unfold(state, 3, place=1)
    worst = 0.0
    for _ in range(4):
        at = 4 * torch.rand(3, 1, generator=g, dtype=torch.float64)
        old, new = memory.read(state, at), wider.read(grown, torch.cat([at, torch.full_like(at, 2.0)], 1))
        worst = max(worst, float((old - new).abs().max() / old.abs().max()))
        value = torch.randn(3, 6, generator=g, dtype=torch.float64)
        state = memory.write(memory.advance(state), value, at)
        grown = wider.write(wider.advance(grown), value, torch.cat([at, torch.ones_like(at)], 1))
    return worst


CLAIM = Claim(
    id="H11",
    system="htsep",
    seed_file=nets.SEED_FILE,
    sentence="The torus gains dimensions as the input needs them, guided by its curvature, and no read changes.",
    criteria=(
        Criterion(
            "reads are preserved", "largest change of a read", "relative", "at_most", VARIANCE, aim=1e-6,
            words="unfold/add dims",
        ),
        Criterion(
            "outputs are preserved", "largest change by unfolding", "logits", "at_most", VARIANCE, aim=1e-4,
            words="unfold/add dims", beside=(CURVATURE,),
        ),
        Criterion(
            "growth: dimensions", "dimensions", "", "at_least", VARIANCE, versus=(FIXED,), beside=(CURVATURE,),
            words="buffer dimensions adapt if variance exceeds a threshold",
        ),
        Criterion(
            "growth: accuracy", "final accuracy", "points", "at_least", VARIANCE, versus=(FIXED,),
            words="dynamically adaptive",
        ),
        Criterion(
            "curvature: accuracy", "final accuracy", "points", "at_least", CURVATURE, versus=(VARIANCE,),
            words="compute curvature metrics (e.g., Ricci scalar on the manifold)",
        ),
    ),
    protocol=f"""
    Permuted MNIST, whose 12 permutations, the factors of its stream, come one after the other, 1,500 (quick) or 10,000
    digits each, in one pass without labels of tasks. The network (one layer with a lateral coupling) begins with a
    torus of {BASE[0]} x {BASE[1]} slots, of which each context opens {SHARE:g} of the units. A batch is novel when its
    mean likelihood falls below what its context is used to, which is a statement about variance. One rule unfolds a
    dimension (twice the units and slots) when a novel batch finds no free slot; the other also when more than half of
    the slots are taken and the scalar curvature, at the slot that the batch would get, of the geometry of what the
    slots hold is below {-BEND:g}; the third never. Growth ends at {SHEETS} sheets. Adam without momentum, rate
    {RATE:g}. Outputs on the batch at hand are compared before and after each unfolding, and reads of a torus memory in
    float64. Growth buys parameters, which stand beside: the comparison with the fixed torus says that it helps, not
    that it is free.
    """,
    sides=SIDES,
    run=run,
    picture=Picture(
        "Accuracy on the tasks so far", x_label="phase", y_label="accuracy (%)", curves=("accuracy on the past",)
    ),
)  # fmt: skip
