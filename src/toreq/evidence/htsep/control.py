"""H2: steps of an environment until a policy has learned, under pushes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from toreq.evidence.claim import Claim, Criterion, Outcome, Picture, Trial, Tuning
from toreq.evidence.htsep import nets
from toreq.evidence.protocols import control
from toreq.systems.htsep import HTSEP
from toreq.tuning.space import Value

TASKS = {"pendulum": "pendulum-pushed", "hopper": "hopper-pushed"}
OWN, ABLATION, FORWARD = "htsep", "gates off", "bp-ff"
KINDS = {
    OWN: "actor and critic with gates of a torus of contexts, Equilibrium Propagation",
    ABLATION: "the same with all units open",
    FORWARD: "feed-forward actor and critic of the same widths, backprop",
}
SIDES = {f"{task} {kind}": what for task in TASKS for kind, what in KINDS.items()}
GAIN, HALF = 0.3, 50.0
TRIALS, WIDTH, SHARE, SEEDS = 2, 64, 0.75, {"pendulum": 20, "hopper": 3}

TINY = control.Sizes(steps=8, every=8, episodes=1, final=1, envs=2, rollout=2, batch=4, epochs=1)


class ContextTrunk(control.Settling):
    """The layer of an HTSEP network as a trunk, its contexts learned from the observations of each update.

    Args:
        net: the network, whose head is left out.
    """

    def __init__(self, net: HTSEP) -> None:
        super().__init__(net)
        self.context = net.context
        self._net = (net,)  # in a tuple: its head is no part of the trunk

    def forward(self, x: Tensor) -> Tensor:
        """Features ``(B, F)`` in [0, 1]."""
        if self.training and torch.is_grad_enabled() and self.context.mode != "off":
            self.context.observe(x)
        # probabilities are not drawn: a policy's ratio of likelihoods needs the same gates twice
        with self.context.drawn(x, draw=False):
            return self._net[0].opened(x, super().forward(x))


@dataclass(frozen=True)
class Contexts:
    """Makes a trunk of HTSEP.

    Args:
        width: units.
        gates: ``"hard"`` or ``"off"``.
    """

    width: int
    gates: str

    def __call__(self, inputs: int) -> nn.Module:
        # the trunk's weights follow torch's own generator, which the protocol seeds for every side
        seed = int(torch.randint(2**31, ()))
        net = nets.build(
            "dense", seed, (inputs,), 2, hidden=(self.width,), torus=(2, 2), open_share=SHARE, gates=self.gates
        )
        return ContextTrunk(net)


def trunk(trial: Trial) -> control.Trunk:
    """The trunk of a side; narrow in a smoke run."""
    width = trial.budget.pick(8, WIDTH, WIDTH)
    kind = trial.side.split(maxsplit=1)[1]
    if kind == FORWARD:
        return control.Forward((width, width))
    return Contexts(width, "hard" if kind == OWN else "off")


def task(side: str) -> control.Task:
    """The task of a side; a few steps in a smoke run."""
    found = control.find(TASKS[side.split()[0]])
    return replace(found, sizes={**found.sizes, "smoke": TINY})


def run(trial: Trial) -> Outcome:
    """Train and measure one side's policy."""
    return control.with_steps(control.run(trunk(trial), trial, task(trial.side)))


def mean_return(trial: Trial, params: Mapping[str, Value]) -> float:
    """What tuning maximises: the mean return over a training of a quarter of the steps."""
    return control.objective(trunk(trial), trial, task(trial.side), params)


def _criteria() -> tuple[Criterion, ...]:
    found = []
    for name in TASKS:
        own, forward, ablation = (f"{name} {kind}" for kind in (OWN, FORWARD, ABLATION))
        found.append(
            Criterion(
                f"{name}: {control.SPENT}, against backprop", control.SPENT, "ln steps", "at_most", own,
                words="+30% sample efficiency in RL tasks (MuJoCo with perturbations)", target=-math.log(1 + GAIN),
                versus=(forward,), beside=(ablation,), seeds=SEEDS[name],
            )
        )  # fmt: skip
        found.append(
            Criterion(
                f"{name}: return over training against backprop", "return over training", "return", "at_least", own,
                words="+30% sample efficiency in RL tasks (MuJoCo with perturbations)", versus=(forward,),
                beside=(ablation,), seeds=SEEDS[name],
            )
        )  # fmt: skip
        found.append(
            Criterion(
                f"{name}: runs of backprop that reach the threshold", control.REACHED, "%", "at_least", forward,
                target=HALF, beside=(own, ablation), condition=True, seeds=SEEDS[name],
            )
        )  # fmt: skip
    return tuple(found)


CLAIM = Claim(
    id="H2",
    system="htsep",
    seed_file=nets.SEED_FILE,
    sentence="Policies learn from fewer steps of a perturbed environment.",
    criteria=_criteria(),
    protocol=f"""
    The inverted pendulum and the hopper of MuJoCo with random pushes in training and test, tasks of the control
    protocol of this package, PPO of Stable-Baselines3 as it is there, the same for every side. Actor and critic each
    have one layer of {WIDTH} units with a lateral coupling, of which contexts of observations open {SHARE:.0%} on a
    torus of 2 x 2 slots; or two feed-forward layers of {WIDTH} units, which have about as many weights. Adam's rate is
    tuned on each side in {TRIALS} trials of a quarter of the steps. Judged are the logarithm of the steps to the
    protocol's threshold, all of them where it was not reached, and the return averaged over the training, paired by
    {SEEDS["pendulum"]} seeds on the pendulum and {SEEDS["hopper"]} on the hopper: {-math.log(1 + GAIN):.3f} is a sample
    efficiency {100 * GAIN:g}% above. It counts where backprop reaches the threshold in half of its runs.
    """,
    sides=SIDES,
    run=run,
    picture=Picture("Return against steps", x_label="steps", y_label="return", curves=("return",)),
    tuning=Tuning(
        mean_return, dict.fromkeys(SIDES, control.SPACE), TRIALS, {side: {"learning_rate": 3e-3} for side in SIDES}
    ),
)  # fmt: skip
