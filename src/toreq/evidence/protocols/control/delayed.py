"""Delayed rewards with short episodes: rewards in lumps, a time limit of the task's own, and a window of observations.

The lumps are :class:`~toreq.evidence.protocols.control.envs.DelayedReward`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from toreq.errors import ConfigError
from toreq.evidence.protocols.control.tasks import Sizes, Task


@dataclass(frozen=True, kw_only=True)
class DelayedTask(Task):
    """A task whose rewards come in lumps, in episodes of at most ``limit`` steps.

    An episode's return is that of the environment; only the times of payment differ. With a window of W, observations
    are ``(W * inputs,)``, the oldest first; before the W-th step of an episode its first observation stands for those
    that are missing.

    Args:
        limit: steps after which an episode is cut off, at least 1; in the place of the environment's own limit.
        lump: steps between two payments, at least 1; whatever is owed at an episode's end is paid then.

    Raises:
        ConfigError: a limit or lump below 1, or an environment without a time limit.
    """

    limit: int = 100
    lump: int = 20

    def __post_init__(self) -> None:
        if self.limit < 1 or self.lump < 1 or self.env == "cue":
            raise ConfigError(
                f"DelayedTask: expected limit and lump >= 1 and an environment of Gymnasium, got {self.limit}, "
                f"{self.lump} and {self.env!r}; e.g. 100, 20 and InvertedPendulum-v5"
            )
        # what the task's own wrapper reads
        object.__setattr__(self, "delayed", True)
        object.__setattr__(self, "every", self.lump)

    def base(self) -> Any:
        """The environment, cut off after ``limit`` steps."""
        import gymnasium as gym

        return gym.make(self.env, max_episode_steps=self.limit, disable_env_checker=True)


def pendulum(limit: int, lump: int, window: int, sizes: dict[str, Sizes]) -> DelayedTask:
    """The inverted pendulum: a reward of 1 for each step that the pole stands, paid in lumps.

    Args:
        limit, lump: of :class:`DelayedTask`.
        window: observations stacked.
        sizes: by budget.
    """
    return DelayedTask(
        name="pendulum-lumps",
        env="InvertedPendulum-v5",
        sentence=f"balance a pole on a cart for {limit} steps, paid every {lump} steps and at the end",
        threshold=0.95 * limit,
        sizes=sizes,
        limit=limit,
        lump=lump,
        window=window,
    )
