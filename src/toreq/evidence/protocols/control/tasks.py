"""Tasks: an environment, its pushes and delays, a threshold, and sizes by budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from toreq.errors import ConfigError, nearest
from toreq.evidence.budgets import Budget


@dataclass(frozen=True)
class Push:
    """Random pushes, see :class:`~toreq.evidence.protocols.control.envs.Pushes`."""

    body: str
    magnitude: float
    interval: int
    duration: int = 1


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much work a run does; the same for every side.

    Attributes:
        steps: interactions with the environment, over all its copies.
        every: steps between two evaluations.
        episodes: of an evaluation.
        final: episodes of each evaluation after training.
        hidden: widths of each trunk.
        envs: copies that are stepped together.
        rollout: steps of each copy between two updates; ``envs * rollout`` divides ``every``, and ``every`` ``steps``.
        batch, epochs, rate, gamma, trace, entropy: PPO's minibatch, passes, Adam's rate, discount, lambda of the
            advantages, and weight of the entropy.
    """

    steps: int
    every: int
    episodes: int = 5
    final: int = 20
    hidden: tuple[int, ...] = (64, 64)
    envs: int = 8
    rollout: int = 128
    batch: int = 256
    epochs: int = 10
    rate: float = 3e-3
    gamma: float = 0.99
    trace: float = 0.95
    entropy: float = 0.0

    def __post_init__(self) -> None:
        if self.every % (self.envs * self.rollout) or self.steps % self.every:
            raise ConfigError(
                f"Sizes: expected envs * rollout to divide every and every to divide steps, got {self.envs} * "
                f"{self.rollout}, {self.every} and {self.steps}; change one of them"
            )


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be learned.

    Attributes:
        name: what the commands call it.
        env: the id of a Gymnasium environment, or ``cue`` for the corridor.
        sentence: what it is, in words.
        threshold: return from which it counts as learned.
        chance: mean return of random actions where it is known; for the picture.
        push: pushes in the evaluation with pushes; None for no such evaluation.
        pushed: whether the training and its curve have pushes as well.
        delayed: whether rewards are delayed.
        every: steps between two payments of delayed rewards; None pays at the end.
        length: of the corridor.
        window: observations stacked, the newest last.
        normalise: whether observations and rewards are divided by running deviations.
        sizes: by budget.
    """

    name: str
    env: str
    sentence: str
    threshold: float
    sizes: dict[str, Sizes] = field(repr=False)
    push: Push | None = None
    pushed: bool = False
    delayed: bool = False
    every: int | None = None
    length: int = 6
    window: int = 1
    normalise: bool = True

    def size(self, budget: Budget) -> Sizes:
        """The sizes of a budget."""
        return self.sizes[budget.name]

    def make(self, pushed: bool) -> Callable[[], Any]:
        """A function that builds one copy of the environment, with or without pushes.

        Raises:
            ConfigError: for pushes on a task that has none.
        """
        if pushed and self.push is None:
            raise ConfigError(f"control: expected a task with pushes, got {self.name!r}; add a Push to it")
        return lambda: self._build(pushed)

    def base(self) -> Any:
        """The environment without pushes, delays and windows."""
        import gymnasium as gym

        from toreq.evidence.protocols.control import envs

        return envs.CueCorridor(self.length) if self.env == "cue" else gym.make(self.env, disable_env_checker=True)

    def _build(self, pushed: bool) -> Any:
        import gymnasium as gym
        from stable_baselines3.common.monitor import Monitor

        from toreq.evidence.protocols.control import envs

        env = self.base()
        if pushed and self.push is not None:
            push = self.push
            env = envs.Pushes(
                env, body=push.body, magnitude=push.magnitude, interval=push.interval, duration=push.duration
            )
        if self.delayed:
            env = envs.DelayedReward(env, self.every)
        if self.window > 1:
            env = gym.wrappers.FlattenObservation(gym.wrappers.FrameStackObservation(env, self.window))
        return Monitor(env)


_SMOKE = Sizes(steps=192, every=96, episodes=2, final=2, hidden=(16, 16), envs=4, rollout=24, batch=48, epochs=2)
_PENDULUM = {
    "smoke": _SMOKE,
    "quick": Sizes(steps=16384, every=1024),
    "full": Sizes(steps=40960, every=1024, episodes=10, final=50),
}
_HOPPER = {
    "smoke": _SMOKE,
    "quick": Sizes(steps=30720, every=5120, rate=1e-3),
    "full": Sizes(steps=1_024_000, every=20480, episodes=10, final=50, rate=1e-3),
}
_CUE = {
    "smoke": _SMOKE,
    "quick": Sizes(steps=40960, every=2048, episodes=40, final=200),
    "full": Sizes(steps=102400, every=2048, episodes=40, final=200),
}
_POLE = Push("pole", 60.0, 50)
_TORSO = Push("torso", 40.0, 100, 5)

TASKS = {
    task.name: task
    for task in (
        Task(
            name="pendulum",
            env="InvertedPendulum-v5",
            sentence="balance a pole on a cart, trained without pushes",
            threshold=950.0,
            push=_POLE,
            sizes=_PENDULUM,
        ),
        Task(
            name="pendulum-pushed",
            env="InvertedPendulum-v5",
            sentence="balance a pole on a cart, pushed in training as well",
            threshold=950.0,
            push=_POLE,
            pushed=True,
            sizes=_PENDULUM,
        ),
        Task(
            name="pendulum-delayed",
            env="InvertedPendulum-v5",
            sentence="balance a pole on a cart, paid every 50 steps and at the end",
            threshold=950.0,
            push=_POLE,
            delayed=True,
            every=50,
            sizes=_PENDULUM,
        ),
        Task(
            name="hopper",
            env="Hopper-v5",
            sentence="hop forwards on one leg, trained without pushes",
            threshold=1000.0,
            push=_TORSO,
            sizes=_HOPPER,
        ),
        Task(
            name="hopper-pushed",
            env="Hopper-v5",
            sentence="hop forwards on one leg, pushed in training as well",
            threshold=1000.0,
            push=_TORSO,
            pushed=True,
            sizes=_HOPPER,
        ),
        Task(
            name="cue",
            env="cue",
            sentence="turn at the end of a corridor as a cue at its start said, the last 8 observations stacked",
            threshold=0.9,
            window=8,
            normalise=False,
            sizes=_CUE,
        ),
    )
}


def find(name: str) -> Task:
    """A task by its name.

    Raises:
        ConfigError: for an unknown one, with the nearest.
    """
    if name not in TASKS:
        raise ConfigError(f"control: expected a task, got {name!r}; {nearest(name, TASKS)}")
    return TASKS[name]
