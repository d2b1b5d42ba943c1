"""Environments: pushes on a MuJoCo body, delayed rewards, and a corridor whose end depends on its beginning.

Each of them can say where it is (``where``) and be put back there (``put``), so that training resumes inside an
episode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from toreq.errors import ConfigError
from toreq.evidence.protocols.control.extra import require

require()

import gymnasium as gym  # noqa: E402
from gymnasium import spaces  # noqa: E402

_PUSHES = 0x9055  # a stream of its own: pushes do not depend on what the environment draws


class Pushes(gym.Wrapper):
    r"""Random pushes on one body of a MuJoCo environment.

    A push is a constant force of ``magnitude`` newtons at the body's centre of mass, through ``xfrc_applied``, for
    ``duration`` control steps, in a direction uniform on the unit sphere of ``axes`` (a sign for one axis). Between the
    end of a push and the next one lie :math:`g` control steps, g uniform in
    :math:`\{\lceil n/2\rceil, \dots, \lfloor 3n/2\rfloor\}` with n the ``interval``. The observation does not show it.

    ``reset(seed=s)`` seeds the pushes with s in a stream apart from the environment's; without a seed they go on.

    Args:
        env: a Gymnasium MuJoCo environment.
        body: the body's name.
        magnitude: newtons, at least 0.
        interval: mean control steps between two pushes, at least 1.
        duration: control steps of a push, at least 1.
        axes: world axes along which it may point: 0, 1, 2 for x, y, z.

    Raises:
        ConfigError: for an environment without that body, or values out of range.
    """

    def __init__(
        self,
        env: gym.Env,
        *,
        body: str,
        magnitude: float,
        interval: int = 50,
        duration: int = 1,
        axes: Sequence[int] = (0,),
    ) -> None:
        super().__init__(env)
        model = getattr(env.unwrapped, "model", None)
        names = [] if model is None else [model.body(i).name for i in range(model.nbody)]
        if body not in names:
            raise ConfigError(f"Pushes: expected a body among {names}, got {body!r}; name one of a MuJoCo environment")
        if not magnitude >= 0 or interval < 1 or duration < 1:
            raise ConfigError(
                f"Pushes: expected magnitude >= 0, interval >= 1 and duration >= 1, got {magnitude}, {interval}, "
                f"{duration}; e.g. 20 newtons for 1 step every 50"
            )
        if not axes or not set(axes) <= {0, 1, 2}:
            raise ConfigError(f"Pushes: expected axes among 0, 1, 2, got {tuple(axes)}; (0,) is along x")
        self.body = names.index(body)
        self.magnitude, self.interval, self.duration, self.axes = magnitude, interval, duration, tuple(axes)
        self.generator = np.random.default_rng()
        self.force = np.zeros(3)
        self.wait, self.left = 0, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode without a force; the first push comes after one gap."""
        if seed is not None:
            self.generator = np.random.default_rng([seed, _PUSHES])
        found = self.env.reset(seed=seed, options=options)
        self.force, self.left, self.wait = np.zeros(3), 0, self._gap()
        self._apply()
        return found

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """One control step; ``info["push"]`` is the force in newtons."""
        if self.left == 0:
            if self.wait == 0:
                self.force, self.left, self.wait = self._draw(), self.duration, self._gap()
            else:
                self.force, self.wait = np.zeros(3), self.wait - 1
        if self.left > 0:
            self.left -= 1
        self._apply()
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, reward, terminated, truncated, {**info, "push": self.force.copy()}

    def _apply(self) -> None:
        data: Any = getattr(self.env.unwrapped, "data")  # noqa: B009 - not every environment has one
        data.xfrc_applied[self.body, :3] = self.force

    def _gap(self) -> int:
        return int(self.generator.integers(-(-self.interval // 2), 3 * self.interval // 2 + 1))

    def _draw(self) -> np.ndarray:
        direction = np.zeros(3)
        chosen = self.generator.standard_normal(len(self.axes))
        direction[list(self.axes)] = chosen / np.linalg.norm(chosen)
        return self.magnitude * direction

    def where(self) -> dict[str, Any]:
        """All that the next pushes depend on."""
        return {
            "generator": self.generator.bit_generator.state,
            "force": self.force.tolist(),
            "wait": self.wait,
            "left": self.left,
        }

    def put(self, state: Mapping[str, Any]) -> None:
        """Go on from `where`."""
        self.generator.bit_generator.state = state["generator"]
        self.force, self.wait, self.left = np.array(state["force"]), state["wait"], state["left"]


class DelayedReward(gym.Wrapper):
    """Rewards are summed and paid every ``every`` steps and at the end of the episode; 0 in between.

    An episode's return stays the same. A time limit must be inside, as `gymnasium.make` puts it: an end that this
    wrapper does not see would keep what is owed.

    Args:
        env: any environment.
        every: steps between two payments, at least 1; None pays at the end of the episode alone.
    """

    def __init__(self, env: gym.Env, every: int | None) -> None:
        super().__init__(env)
        if every is not None and every < 1:
            raise ConfigError(f"DelayedReward: expected every >= 1 or None, got {every}; None pays at the end")
        self.every = every
        self.owed, self.steps = 0.0, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode with nothing owed."""
        self.owed, self.steps = 0.0, 0
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One step; ``info["reward"]`` is the reward that the environment gave."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.owed, self.steps = self.owed + float(reward), self.steps + 1
        paid = 0.0
        if terminated or truncated or (self.every is not None and self.steps % self.every == 0):
            paid, self.owed = self.owed, 0.0
        return observation, paid, terminated, truncated, {**info, "reward": float(reward)}

    def where(self) -> dict[str, Any]:
        """What is owed, and the steps since the episode's start."""
        return {"owed": self.owed, "steps": self.steps}

    def put(self, state: Mapping[str, Any]) -> None:
        """Go on from `where`."""
        self.owed, self.steps = state["owed"], state["steps"]


class CueCorridor(gym.Env):
    r"""A T-maze (as in Bakker 2002): a cue at the start says which way to turn at the end, and only the turn is paid.

    The observation is (cue, place, noise) in :math:`[-1, 1]^3`: the cue, -1 or 1, is shown at the first step alone, and
    is 0 after it; the place runs from -1 at the start to 1 at the junction; the noise is uniform and means nothing. The
    actions are 0 ahead, 1 left, 2 right. In the corridor turning does nothing, at the junction going ahead does
    nothing. A turn at the junction ends the episode with reward 1 if it is left for -1 or right for 1, and 0 otherwise.
    After ``4 * length`` steps the episode is truncated. A policy that sees the present observation only is paid 0.5 on
    average at most; it needs a memory of ``length`` steps, or ``length + 1`` observations stacked.

    Args:
        length: steps from start to junction, at least 1.
        noise: range of the noise in [0, 1].
    """

    def __init__(self, length: int = 6, noise: float = 1.0) -> None:
        if length < 1 or not 0 <= noise <= 1:
            raise ConfigError(
                f"CueCorridor: expected length >= 1 and noise in [0, 1], got {length} and {noise}; e.g. 6 and 1.0"
            )
        self.length, self.noise = length, noise
        self.observation_space = spaces.Box(-1.0, 1.0, (3,), np.float32)
        self.action_space = spaces.Discrete(3)
        self.cue, self.place, self.steps = 1, 0, 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin at the start with a cue drawn anew."""
        super().reset(seed=seed)
        self.cue = 1 if self.np_random.random() < 0.5 else -1
        self.place, self.steps = 0, 0
        return self._observation(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Go ahead (0), left (1) or right (2)."""
        turn = {0: 0, 1: -1, 2: 1}[int(action)]
        self.steps += 1
        terminated = self.place == self.length and turn != 0
        reward = float(terminated and turn == self.cue)
        if turn == 0:
            self.place = min(self.place + 1, self.length)
        truncated = not terminated and self.steps >= 4 * self.length
        return self._observation(), reward, terminated, truncated, {}

    def _observation(self) -> np.ndarray:
        cue = self.cue if self.steps == 0 else 0
        noise = self.noise * self.np_random.uniform(-1.0, 1.0)
        return np.array([cue, 2 * self.place / self.length - 1, noise], dtype=np.float32)

    def where(self) -> dict[str, Any]:
        """Cue, place and steps of this episode."""
        return {"cue": self.cue, "place": self.place, "steps": self.steps}

    def put(self, state: Mapping[str, Any]) -> None:
        """Go on from `where`."""
        self.cue, self.place, self.steps = state["cue"], state["place"], state["steps"]
