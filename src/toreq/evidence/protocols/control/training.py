"""Training by PPO, step by step resumable: the agent, its environments and the generators are saved together."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch

from toreq.errors import CheckpointError
from toreq.evidence.protocols.control import snapshots
from toreq.evidence.protocols.control.extra import require
from toreq.evidence.protocols.control.policies import TrunkPolicy
from toreq.evidence.protocols.control.tasks import Sizes, Task
from toreq.evidence.protocols.control.trunks import Trunk, flush
from toreq.io import atomic_path
from toreq.training import checkpoint, rng

require()

from stable_baselines3 import PPO  # noqa: E402
from stable_baselines3.common.callbacks import BaseCallback  # noqa: E402
from stable_baselines3.common.evaluation import evaluate_policy  # noqa: E402
from stable_baselines3.common.vec_env import (  # noqa: E402
    DummyVecEnv,
    VecEnv,
    VecNormalize,
    sync_envs_normalization,
)

SAVE_SECONDS = 30.0
_EVALUATION_SEEDS = 1_000_000
"""Training uses seeds below this, evaluation the ones from it on."""


@dataclass
class Trained:
    """A trained agent.

    Attributes:
        model: the agent of Stable-Baselines3.
        curve: (steps, mean return over the evaluation's episodes).
        resumed: whether it went on from a checkpoint.
        seconds: of processor time in training, without evaluations and without what an interruption lost.
    """

    model: PPO
    curve: list[tuple[float, float]] = field(default_factory=list)
    resumed: bool = False
    seconds: float = 0.0


def vector(task: Task, copies: int, pushed: bool, gamma: float, training: bool = True) -> VecEnv:
    """Copies of a task's environment in this process, normalised if the task says so."""
    made: VecEnv = DummyVecEnv([task.make(pushed)] * copies)
    if not task.normalise:
        return made
    return VecNormalize(made, training=training, norm_reward=training, gamma=gamma)


def agent(task: Task, trunk: Trunk, sizes: Sizes, seed: int, device: str = "cpu") -> PPO:
    """A fresh agent; it seeds torch, numpy and its environments."""
    return PPO(
        TrunkPolicy,
        vector(task, sizes.envs, task.pushed, sizes.gamma),
        learning_rate=sizes.rate,
        n_steps=sizes.rollout,
        batch_size=sizes.batch,
        n_epochs=sizes.epochs,
        gamma=sizes.gamma,
        gae_lambda=sizes.trace,
        ent_coef=sizes.entropy,
        policy_kwargs={"trunk": trunk},
        seed=seed,
        device=device,
    )


def evaluate(model: PPO, task: Task, seed: int, episodes: int, pushed: bool) -> list[float]:
    """Returns of episodes with the mean action, in environments of their own with seeds of their own.

    The seeds depend on ``seed`` alone: every side and every evaluation meets the same starts and the same pushes.
    """
    envs = vector(task, episodes, pushed, model.gamma, training=False)
    trained = model.get_env()
    if isinstance(envs, VecNormalize):
        assert trained is not None
        sync_envs_normalization(trained, envs)
    envs.seed(_EVALUATION_SEEDS * (1 + seed))
    returns, _ = evaluate_policy(model, envs, episodes, deterministic=True, return_episode_rewards=True)
    envs.close()
    return [float(r) for r in returns]  # type: ignore[union-attr]


def train(
    task: Task,
    trunk: Trunk,
    sizes: Sizes,
    seed: int,
    scratch: Path,
    device: str = "cpu",
    save_seconds: float = SAVE_SECONDS,
) -> Trained:
    """Train an agent, from the checkpoint in ``scratch`` if there is one.

    Saved before a rollout, when all that matters is the agent (weights, Adam's moments, counters, last observations),
    the environments (simulator, wrappers, running moments) and the generators: what follows is the same, number by
    number, as without the interruption. At most ``save_seconds`` and one rollout are lost.

    Args:
        task: what to learn.
        trunk: makes the networks of actor and critic.
        sizes: how much work.
        seed: of weights, exploration and environments.
        scratch: folder of the checkpoint.
        device: a torch device.
        save_seconds: between two checkpoints.

    Raises:
        CheckpointError: for a checkpoint that is damaged or of another task or size.
    """
    progress = _Progress(task, trunk, sizes, seed, scratch / "control", save_seconds)
    model = progress.resumed(device)
    resumed = model is not None
    if model is None:
        model = agent(task, trunk, sizes, seed, device)
    model.learn(sizes.steps - model.num_timesteps, callback=progress, reset_num_timesteps=not resumed)
    progress.measure()
    return Trained(model, progress.curve, resumed, progress.seconds)


class _Progress(BaseCallback):
    """Evaluates and saves between rollouts."""

    def __init__(self, task: Task, trunk: Trunk, sizes: Sizes, seed: int, folder: Path, save_seconds: float) -> None:
        super().__init__()
        self.task, self.trunk, self.sizes, self.seed = task, trunk, sizes, seed
        self.folder, self.save_seconds = folder, save_seconds
        self.curve: list[tuple[float, float]] = []
        self.seconds, self.since, self.saved = 0.0, time.process_time(), time.perf_counter()

    def _on_training_start(self) -> None:
        self.since, self.saved = time.process_time(), time.perf_counter()

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self.model.num_timesteps % self.sizes.every == 0:
            self.measure()
        if self.model.num_timesteps and time.perf_counter() - self.saved >= self.save_seconds:
            self.save()
            self.saved = time.perf_counter()

    def measure(self) -> None:
        """Add the mean return at this step to the curve, once."""
        at = float(self.model.num_timesteps)
        if not self.curve or self.curve[-1][0] < at:
            self._tick()
            assert isinstance(self.model, PPO)
            returns = evaluate(self.model, self.task, self.seed, self.sizes.episodes, self.task.pushed)
            self.curve.append((at, float(np.mean(returns))))
            self.since = time.process_time()

    def _tick(self) -> None:
        now = time.process_time()
        self.seconds, self.since = self.seconds + now - self.since, now

    def _described(self) -> dict[str, Any]:
        sizes = _listed(asdict(self.sizes))
        return {"task": repr(self.task), "seed": self.seed, "sizes": sizes, "trunk": repr(self.trunk)}

    def save(self) -> None:
        """Write agent, environments, generators and curve; the checkpoint before is whole until this one is."""
        self._tick()
        flush(self.model.policy)
        name = f"agent-{self.model.num_timesteps}.zip"
        with atomic_path(self.folder / name) as path:
            self.model.save(path)
        # Stable-Baselines3 shuffles its minibatches by numpy's global generator
        kind, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002 - the one of the library
        assert self.model.env is not None
        state = {
            "agent": name,
            "of": self._described(),
            "curve": self.curve,
            "seconds": self.seconds,
            "envs": snapshots.capture_all(self.model.env),
            "numpy": [kind, place, has_gauss, gauss],
        }
        generators = checkpoint.prefixed("rng", rng.capture(self.model.policy))
        tensors = {**generators, "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64))}
        checkpoint.save(self.folder, tensors, state)
        for old in self.folder.glob("agent-*.zip"):
            if old.name != name:
                old.unlink(missing_ok=True)

    def resumed(self, device: str) -> PPO | None:
        """The agent of the checkpoint, with its environments and generators where they were; None without one."""
        if not (self.folder / checkpoint.STATE).exists():
            return None
        tensors, state = checkpoint.load(self.folder)
        where = f"control: {self.folder}"
        checkpoint.expect(state, ("agent", "of", "curve", "seconds", "envs", "numpy"), where)
        if state["of"] != self._described():
            raise CheckpointError(
                f"{where}: expected a checkpoint of {self._described()}, got one of {state['of']}; use another folder"
            )
        envs = vector(self.task, self.sizes.envs, self.task.pushed, self.sizes.gamma)
        path = self.folder / state["agent"]
        try:
            model = PPO.load(path, envs, device=device, force_reset=False)
        except (OSError, ValueError, BadZipFile) as error:
            raise CheckpointError(f"{where}: expected an agent in {path}, got {error}; train again") from error
        model.set_env(envs, force_reset=False)
        snapshots.restore_all(envs, state["envs"])
        self.curve = [(float(x), float(y)) for x, y in state["curve"]]
        self.seconds = state["seconds"]
        kind, place, has_gauss, gauss = state["numpy"]
        np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), place, has_gauss, gauss))  # noqa: NPY002
        rng.restore(model.policy, checkpoint.within("rng", tensors))
        return model


def _listed(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back: tuples are lists."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
