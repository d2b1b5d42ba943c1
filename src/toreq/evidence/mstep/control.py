"""M7: levels as horizons, on a control task whose rewards come late."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from toreq.evidence.budgets import Budget
from toreq.evidence.claim import Claim, Criterion, Outcome, Picture, Trial, Tuning
from toreq.evidence.mstep import nets
from toreq.evidence.protocols import control
from toreq.evidence.protocols.control import protocol
from toreq.evidence.protocols.control.delayed import DelayedTask, pendulum
from toreq.evidence.protocols.control.tasks import Sizes
from toreq.solvers import CoarseToFine
from toreq.systems.mstep import MultiScaleSequence
from toreq.tuning import Real, Space
from toreq.tuning.space import Value

LEVELS, HEADS, TRIALS = 3, 2, 2
WINDOW, FEATURES = 8, 16
LIMIT, LUMP = 100, 20
RATE = 3e-3
SPACE = Space({"learning_rate": Real(1e-3, 1e-2, log=True)})
"""What is tuned on every side: Adam's rate."""
LEARNS = 0.5
"""Share of the largest return from which one level counts as learning."""
SIDES = {
    "mstep": f"{LEVELS} levels over the window, Equilibrium Propagation",
    "one-level": "one level of the same widths, Equilibrium Propagation: the looped transformer (ablation, CEP)",
    "bp-ff": f"a transformer block over the tokens of {LEVELS} levels, run once from coarse to fine, backprop",
}
_COPIES: dict[str, Any] = {"envs": 32, "rollout": 32, "batch": 512, "epochs": 6, "rate": RATE}
SIZES = {
    "smoke": Sizes(steps=8, every=8, episodes=1, final=1, envs=2, rollout=2, batch=4, epochs=1, rate=RATE),
    "quick": Sizes(steps=12_288, every=2048, episodes=10, final=20, **_COPIES),
    "full": Sizes(steps=40_960, every=2048, episodes=20, final=100, **_COPIES),
}


class Windowed(nn.Module):
    """A feed-forward pyramid of tokens as a trunk: the tokens of the finest level, side by side.

    Args:
        net: the pyramid whose twin it is; its input shape is (1, W, inputs).
    """

    def __init__(self, net: MultiScaleSequence) -> None:
        super().__init__()
        self.shape, self.inner = net.input_shape, net.feedforward()
        self.inner.head = nn.Flatten()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.reshape(-1, *self.shape))


@dataclass(frozen=True)
class Pyramid:
    """Makes a trunk over a window of observations, a token for each.

    Args:
        levels: of tokens; each coarser one averages neighbours in time.
        forward: the feed-forward twin in its place.
        window: observations, at least 1.
        features: width of a token.
    """

    levels: int
    forward: bool = False
    window: int = WINDOW
    features: int = FEATURES

    def __call__(self, inputs: int) -> nn.Module:
        net = MultiScaleSequence(
            (1, self.window, inputs // self.window),
            2,  # the head, which classes belong to, is left out
            # many small batches: one linearisation of the springs' solve per step, and no batch taken apart
            CoarseToFine(rounds=1, check_every=1, compaction=0.0),
            levels=self.levels,
            features=self.features,
            heads=HEADS,
            hidden=2 * self.features,
            patch="rows",
        )
        if self.forward:
            return Windowed(net)
        net.equilibrium.hasten()
        return control.Settling(net)


def task(budget: Budget) -> DelayedTask:
    """The pendulum paid in lumps; episodes of a few steps in a smoke run, and a window of two."""
    return pendulum(budget.pick(4, LIMIT, LIMIT), budget.pick(2, LUMP, LUMP), budget.pick(2, WINDOW, WINDOW), SIZES)


def trunk(trial: Trial) -> Pyramid:
    """The trunk of a side; narrow, and of two levels at most, in a smoke run."""
    pick = trial.budget.pick
    levels = 1 if trial.side == "one-level" else pick(2, LEVELS, LEVELS)
    return Pyramid(levels, trial.side == "bp-ff", pick(2, WINDOW, WINDOW), pick(8, FEATURES, FEATURES))


def run(trial: Trial) -> Outcome:
    """Train and measure one side's policy."""
    return control.run(trunk(trial), trial, task(trial.budget))


def mean_return(trial: Trial, params: Mapping[str, Value]) -> float:
    """What tuning maximises: the mean return over a training of half the steps. In a quarter, as `control.objective`
    has it, nothing is learned here."""
    from toreq.evidence.protocols.control.training import train

    sizes = protocol.sized(SIZES[trial.budget.name], params)
    half = max(1, sizes.steps // sizes.every // 2) * sizes.every
    chosen = task(trial.budget)
    found = train(chosen, trunk(trial), replace(sizes, steps=half), trial.seed, trial.scratch, trial.device)
    return protocol.mean_return(found.curve)


def _protocol() -> str:
    # said from the numbers themselves, so that changing one of them makes earlier results stale
    quick, full = SIZES["quick"], SIZES["full"]
    return f"""
    The inverted pendulum of MuJoCo (InvertedPendulum-v5), a reward of 1 for each step that the pole stands, in episodes
    of at most {LIMIT} steps; rewards are summed and paid every {LUMP} steps and at the episode's end, so that most
    actions are paid for later than they are taken. Actor and critic see the last {WINDOW} observations, a token for
    each, of {FEATURES} features ({HEADS} heads, a hidden layer of twice the features, springs and shared weights as
    shipped): level 1 has {WINDOW} tokens, level 2 the averages of {WINDOW // 2} pairs in time, level 3 of
    {WINDOW // 4} fours; the policy and the value are read linearly from all tokens of level 1. PPO of
    Stable-Baselines3, unchanged, the same for every side: {quick.envs} environments of {quick.rollout} steps between
    updates, {quick.epochs} passes in batches of {quick.batch}, discount {quick.gamma:g}, lambda {quick.trace:g},
    observations and rewards divided by running deviations. {quick.steps:,} steps of the environment (quick) or
    {full.steps:,} (full); every {quick.every:,} steps the mean action is tested on {quick.episodes} ({full.episodes})
    episodes whose starts are the same for all sides, after training on {quick.final} ({full.final}). Adam's rate is
    tuned on each side in {TRIALS} trials of half the training by the mean return over it, under a seed of its
    own. Sides that settle use the fast settings and one linearisation of the springs' solve per step. Judged is the
    return averaged over the whole training, three levels minus one; beside it the steps to {0.95:.0%} of the largest
    return and the return after training. It counts only where one level reaches {LEARNS:.0%} of the largest return.
    Not among the sides is the implicit gradient of the same network (BP-eq), for its cost: M6 compares the two
    gradients directly.
    """


CLAIM = Claim(
    id="M7",
    system="mstep",
    seed_file=nets.SEED_FILE,
    sentence="With several levels as horizons a policy learns faster from delayed rewards.",
    criteria=(
        Criterion(
            f"return over training, {LEVELS} levels above one",
            "return over training",
            "return",
            "at_least",
            "mstep",
            words="multi-horizon: coarse for delayed rewards",
            versus=("one-level",),
            beside=("bp-ff",),
        ),
        Criterion(
            "one level learns",
            "return",
            "return",
            "at_least",
            "one-level",
            target=LEARNS * LIMIT,
            condition=True,
        ),
    ),
    protocol=_protocol(),
    sides=SIDES,
    run=run,
    picture=Picture(
        "Return against steps, the pendulum paid in lumps", x_label="steps", y_label="return", curves=("return",)
    ),
    printed=("return, couplings off", "radius, actor"),
    tuning=Tuning(mean_return, dict.fromkeys(SIDES, SPACE), TRIALS, {side: {"learning_rate": RATE} for side in SIDES}),
)
