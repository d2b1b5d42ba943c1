"""Where environments are, in numbers that JSON holds exactly, and putting them back there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from toreq.errors import ConfigError
from toreq.evidence.protocols.control.envs import CueCorridor, DelayedReward, Pushes
from toreq.evidence.protocols.control.extra import require

require()

import gymnasium as gym  # noqa: E402
import mujoco as _mujoco  # noqa: E402
from gymnasium.envs.mujoco import MujocoEnv  # noqa: E402
from gymnasium.wrappers import FlattenObservation, FrameStackObservation, OrderEnforcing, TimeLimit  # noqa: E402
from stable_baselines3.common.monitor import Monitor  # noqa: E402
from stable_baselines3.common.running_mean_std import RunningMeanStd  # noqa: E402
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize  # noqa: E402

mujoco: Any = _mujoco  # its names come from a compiled module, which type checkers cannot read
_KEPT: dict[type, tuple[str, ...]] = {
    TimeLimit: ("_elapsed_steps",),
    OrderEnforcing: ("_has_reset",),
    Monitor: ("rewards", "needs_reset", "total_steps"),
    FlattenObservation: (),
}
"""Attributes that a wrapper's behaviour depends on."""
_INTEGRATION = int(mujoco.mjtState.mjSTATE_INTEGRATION)


def capture(env: gym.Env) -> list[dict[str, Any]]:
    """The state of an environment and its wrappers, the outermost first: values that JSON keeps exactly.

    Raises:
        ConfigError: for a wrapper or environment whose state is not known.
    """
    return [_captured(layer) for layer in _layers(env)]


def restore(env: gym.Env, states: list[dict[str, Any]]) -> None:
    """Put an environment that is built alike where `capture` found it."""
    layers = list(_layers(env))
    if [type(layer).__name__ for layer in layers] != [state["kind"] for state in states]:
        raise ConfigError(
            f"snapshots: expected the wrappers {[state['kind'] for state in states]}, got "
            f"{[type(layer).__name__ for layer in layers]}; build the environment of the same task"
        )
    for layer, state in zip(layers, states, strict=True):
        _restored(layer, state)


def _layers(env: gym.Env) -> Iterator[gym.Env]:
    while isinstance(env, gym.Wrapper):
        yield env
        env = env.env
    yield env


def _captured(layer: gym.Env) -> dict[str, Any]:
    state: dict[str, Any] = {"kind": type(layer).__name__}
    if isinstance(layer, Pushes | DelayedReward | CueCorridor):
        state["where"] = layer.where()
    elif type(layer) in _KEPT:
        state |= {name: _plain(getattr(layer, name)) for name in _KEPT[type(layer)]}
    elif isinstance(layer, FrameStackObservation):
        state["frames"] = [np.asarray(frame).tolist() for frame in layer.obs_queue]
    elif isinstance(layer, MujocoEnv):
        numbers = np.empty(mujoco.mj_stateSize(layer.model, _INTEGRATION))
        mujoco.mj_getState(layer.model, layer.data, numbers, _INTEGRATION)
        state["numbers"] = numbers.tolist()
    else:
        raise ConfigError(
            f"snapshots: expected a wrapper or environment whose state is known, got {type(layer).__name__}; add it to "
            "snapshots, or train without resuming"
        )
    if not isinstance(layer, gym.Wrapper):
        state["generator"] = layer.np_random.bit_generator.state
    return state


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value


def _restored(layer: gym.Env, state: Mapping[str, Any]) -> None:
    if isinstance(layer, Pushes | DelayedReward | CueCorridor):
        layer.put(state["where"])
    elif isinstance(layer, FrameStackObservation):
        layer.obs_queue.clear()
        layer.obs_queue.extend(np.array(f, dtype=layer.env.observation_space.dtype) for f in state["frames"])
    elif isinstance(layer, MujocoEnv):
        mujoco.mj_setState(layer.model, layer.data, np.array(state["numbers"]), _INTEGRATION)
    else:
        for name in _KEPT[type(layer)]:
            setattr(layer, name, _plain(state[name]))
    if not isinstance(layer, gym.Wrapper):
        layer.np_random.bit_generator.state = state["generator"]


def capture_all(env: VecEnv) -> dict[str, Any]:
    """The state of a vector of environments, and of its running normalisation if there is one."""
    inner, state = _inner(env), {}
    if isinstance(env, VecNormalize):
        state["normalise"] = {
            "observations": _moments(env.obs_rms),
            "returns": _moments(env.ret_rms),
            "discounted": env.returns.tolist(),
        }
    return {**state, "envs": [capture(one) for one in inner.envs]}


def restore_all(env: VecEnv, state: Mapping[str, Any]) -> None:
    """Put a vector of environments that is built alike where `capture_all` found it."""
    inner = _inner(env)
    for one, own in zip(inner.envs, state["envs"], strict=True):
        one.reset()  # so that every wrapper and the simulator have begun an episode
        restore(one, own)
    if isinstance(env, VecNormalize):
        _set_moments(env.obs_rms, state["normalise"]["observations"])
        _set_moments(env.ret_rms, state["normalise"]["returns"])
        env.returns = np.array(state["normalise"]["discounted"])


def _inner(env: VecEnv) -> DummyVecEnv:
    inner = env.venv if isinstance(env, VecNormalize) else env
    if not isinstance(inner, DummyVecEnv):
        raise ConfigError(f"snapshots: expected environments of this process, got {type(inner).__name__}")
    return inner


def _moments(found: Any) -> dict[str, Any]:
    assert isinstance(found, RunningMeanStd)
    return {"mean": np.asarray(found.mean).tolist(), "var": np.asarray(found.var).tolist(), "count": found.count}


def _set_moments(target: Any, state: Mapping[str, Any]) -> None:
    assert isinstance(target, RunningMeanStd)
    target.mean, target.var = np.array(state["mean"]), np.array(state["var"])
    target.count = state["count"]
