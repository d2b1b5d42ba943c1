"""S5: samples to a threshold in control, with pushes, against a matched policy trained by backprop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from toreq.estimators import Implicit
from toreq.evidence.budgets import Budget
from toreq.evidence.claim import Claim, Criterion, Outcome, Picture, Trial, Tuning
from toreq.evidence.protocols import control
from toreq.evidence.protocols.control import protocol, tasks
from toreq.evidence.protocols.control.tasks import Sizes, Task
from toreq.evidence.tepssr import nets
from toreq.solvers import Anderson
from toreq.systems.tepssr_nets import StateSpaceClassifier
from toreq.tuning import Real, Space
from toreq.tuning.space import Value

HOW = {
    nets.OWN: "the last observations as tokens, settled; centered EqProp",
    nets.FORWARD: "one upward pass of the same network, backprop",
    nets.IMPLICIT: "the same network with the implicit gradient",
}
NAMES = {"pendulum": "pendulum-pushed", "hopper": "hopper-pushed"}
"""Our names -> those of the shared protocol's tasks."""
SEEDS = {"pendulum": 20, "hopper": 3}
WINDOW, FEATURES, HIDDEN = 4, 16, 32
RATE, TRIALS = 3e-3, 2
SPACE = Space({"learning_rate": Real(1e-3, 1e-2, log=True)})
GAIN = 0.8
HALF = 50.0
_COPIES = {"envs": 16, "rollout": 64, "batch": 512, "epochs": 6, "rate": RATE}
SIZES = {
    "pendulum": {
        "smoke": Sizes(steps=8, every=8, episodes=1, final=1, envs=2, rollout=2, batch=4, epochs=1, rate=RATE),
        "quick": Sizes(steps=16_384, every=1024, episodes=3, final=3, **_COPIES),
        "full": Sizes(steps=20_480, every=1024, episodes=5, final=20, **_COPIES),
    },
    "hopper": {
        "smoke": Sizes(steps=8, every=8, episodes=1, final=1, envs=2, rollout=2, batch=4, epochs=1, rate=RATE),
        "quick": Sizes(steps=30_720, every=1024, episodes=3, final=3, **_COPIES),
        "full": Sizes(steps=102_400, every=5120, episodes=5, final=20, **_COPIES),
    },
}


class Upward(nn.Module):
    """The feed-forward twin of a network as a trunk: its last layer's tokens, side by side.

    Args:
        net: whose twin it is; its input shape is (W, inputs).
    """

    def __init__(self, net: StateSpaceClassifier) -> None:
        super().__init__()
        self.shape, self.inner = net.input_shape, net.feedforward()
        self.inner.head = Flat()

    def forward(self, x: Tensor) -> Tensor:
        """Features ``(B, W M)``."""
        return self.inner(x.reshape(-1, *self.shape))


class Flat(nn.Module):
    """Tokens side by side, in a head's place."""

    def forward(self, h: Tensor, mask: Tensor | None = None) -> Tensor:
        return h.flatten(1)


@dataclass(frozen=True)
class Tokens:
    """Makes a trunk over a window of observations, a token for each.

    Args:
        how: a key of `HOW`.
        window: observations.
        features, hidden: D and M.
    """

    how: str
    window: int = WINDOW
    features: int = FEATURES
    hidden: int = HIDDEN

    def __call__(self, inputs: int) -> nn.Module:
        net = StateSpaceClassifier(
            (self.window, inputs // self.window),
            2,  # the head, which classes belong to, is left out
            # many small batches: no batch taken apart
            Anderson(length=3, tolerance=1e-3, compaction=0.0),
            Implicit() if self.how == nets.IMPLICIT else None,
            features=self.features,
            hidden=self.hidden,
            selective=False,
            attention="none",
            gain=4.0,
            window=1,
        )
        return Upward(net) if self.how == nets.FORWARD else control.Settling(net)


def task(name: str, budget: Budget) -> Task:
    """The pushed environment with a window of observations; a window of two in a smoke run."""
    found = tasks.find(NAMES[name])
    return replace(found, window=budget.pick(2, WINDOW, WINDOW), sizes=SIZES[name])


def trunk(trial: Trial) -> Tokens:
    """The trunk of a side; narrow in a smoke run."""
    pick, how = trial.budget.pick, trial.side.split()[1]
    return Tokens(how, pick(2, WINDOW, WINDOW), pick(4, FEATURES, FEATURES), pick(4, HIDDEN, HIDDEN))


def run(trial: Trial) -> Outcome:
    """Train and measure one side's policy on one task."""
    name = trial.side.split()[0]
    found = control.with_steps(control.run(trunk(trial), trial, task(name, trial.budget)))
    return replace(found, curves={name: found.curves["return"]})


def mean_return(trial: Trial, params: Mapping[str, Value]) -> float:
    """What tuning maximises: the mean return over a training of half the steps."""
    from toreq.evidence.protocols.control.training import train

    name = trial.side.split()[0]
    chosen = task(name, trial.budget)
    sizes = protocol.sized(chosen.size(trial.budget), params)
    half = max(1, sizes.steps // sizes.every // 2) * sizes.every
    found = train(chosen, trunk(trial), replace(sizes, steps=half), trial.seed, trial.scratch, trial.device)
    return protocol.mean_return(found.curve)


SIDES = {
    f"{name} {how}": words
    for name in NAMES
    for how, words in HOW.items()
    # twenty seeds of it would take longer than all else
    if (name, how) != ("pendulum", nets.IMPLICIT)
}


def _criteria() -> tuple[Criterion, ...]:
    found: list[Criterion] = []
    for name in NAMES:
        own, twin = f"{name} {nets.OWN}", f"{name} {nets.FORWARD}"
        found.append(
            Criterion(
                f"{name}: {control.SPENT}, against backprop", control.SPENT, "ln steps", "at_most", own,
                words=">80% sample efficiency gain in RL", target=-math.log(1 + GAIN), versus=(twin,),
                beside=(f"{name} {nets.IMPLICIT}",) if name == "hopper" else (), seeds=SEEDS[name],
            )
        )  # fmt: skip
        found.append(
            Criterion(
                f"{name}: runs of backprop that reach the threshold", control.REACHED, "%", "at_least", twin,
                target=HALF, beside=(own,), seeds=SEEDS[name], condition=True,
            )
        )  # fmt: skip
    return tuple(found)


def _protocol() -> str:
    said = "; ".join(
        f"{name}: {SEEDS[name]} seeds, {SIZES[name]['quick'].steps:,} steps (quick) or {SIZES[name]['full'].steps:,} "
        f"(full), threshold {tasks.find(NAMES[name]).threshold:g}"
        for name in NAMES
    )
    one = SIZES["pendulum"]["full"]
    return f"""
    The inverted pendulum and Hopper of MuJoCo with random pushes, in training too, as in H2 ({said}). Actor and critic
    see the last {WINDOW} observations, a token for each: {FEATURES} features, one tanh layer of {HIDDEN} channels
    joined to them by a time-invariant state-space map, its tokens side by side as features; the feed-forward twin runs
    the same drive, map and layer upwards once, with the same number of parameters. PPO of Stable-Baselines3, unchanged
    and the same for every side: {one.envs} environments of {one.rollout} steps between updates, {one.epochs} passes in
    batches of {one.batch}. The mean action is tested at equal distances on episodes whose starts are the same for all
    sides. Adam's rate is tuned on each side in {TRIALS} trials of half the training by the mean return over it, under a
    seed of its own. Judged is the logarithm of the steps to the threshold, all of them where it was not reached, paired
    by seed: {-math.log(1 + GAIN):.3f} is a sample efficiency {100 * GAIN:g}% above. It counts
    only where backprop reaches the threshold in half of its runs. On Hopper the implicit gradient of the same network
    stands beside it.
    """


CLAIM = Claim(
    id="S5",
    system="tepssr",
    seed_file=nets.SEED_FILE,
    sentence="Policies are learned from far fewer samples than by backprop.",
    criteria=_criteria(),
    protocol=_protocol(),
    sides=SIDES,
    run=run,
    picture=Picture(
        "Return against steps, pushed pendulum", x_label="steps", y_label="return", curves=("pendulum",)
    ),
    printed=("return, couplings off", "radius, actor"),
    tuning=Tuning(mean_return, dict.fromkeys(SIDES, SPACE), TRIALS, {side: {"learning_rate": RATE} for side in SIDES}),
)  # fmt: skip
