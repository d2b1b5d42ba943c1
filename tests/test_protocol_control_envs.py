"""Environments of the control protocol: pushes against Newton's law, delays by brute force, the corridor's rules."""

from __future__ import annotations

import itertools
import json
import sys
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from toreq.errors import ConfigError
from toreq.evidence.protocols.control import extra, tasks

pytest.importorskip("stable_baselines3")
gym = pytest.importorskip("gymnasium")
mujoco: Any = pytest.importorskip("mujoco")

from gymnasium import spaces  # noqa: E402
from gymnasium.utils.env_checker import check_env  # noqa: E402

from toreq.evidence.protocols.control import snapshots  # noqa: E402
from toreq.evidence.protocols.control.envs import CueCorridor, DelayedReward, Pushes  # noqa: E402

MASS, SUBSTEPS, TIMESTEP = 2.0, 4, 0.005
BALL = f"""
<mujoco><option gravity="0 0 0" timestep="{TIMESTEP}" integrator="Euler"/><worldbody>
<body name="ball"><joint type="slide" axis="1 0 0"/><joint type="slide" axis="0 1 0"/>
<geom type="sphere" size="0.1" mass="{MASS}"/></body></worldbody></mujoco>
"""


class Ball(gym.Env):
    """A free mass without gravity, whose momentum is the impulse it was given."""

    def __init__(self) -> None:
        self.model = mujoco.MjModel.from_xml_string(BALL)
        self.data = mujoco.MjData(self.model)
        self.observation_space, self.action_space = spaces.Box(-np.inf, np.inf, (2,)), spaces.Discrete(1)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        mujoco.mj_resetData(self.model, self.data)
        return self.data.qvel.copy(), {}

    def step(self, action: Any):
        mujoco.mj_step(self.model, self.data, SUBSTEPS)
        return self.data.qvel.copy(), 1.0, False, False, {}


def forces(seed: int | None, steps: int = 300, **options: Any) -> np.ndarray:
    """The force of every step of one episode."""
    env = Pushes(Ball(), body="ball", magnitude=3.0, **options)
    env.reset(seed=seed)
    return np.array([env.step(0)[4]["push"] for _ in range(steps)])


def test_momentum_is_the_impulse() -> None:
    env = Pushes(Ball(), body="ball", magnitude=3.0, interval=10, duration=2, axes=(0, 1))
    env.reset(seed=1)
    impulse = np.zeros(2)
    for _ in range(200):
        velocity, *_, info = env.step(0)
        impulse += info["push"][:2] * SUBSTEPS * TIMESTEP
        np.testing.assert_allclose(MASS * velocity, impulse, atol=1e-9)
    assert np.abs(impulse).max() > 0


def test_pushes_have_the_size_length_and_gaps_asked_for() -> None:
    found = forces(0, interval=10, duration=3)
    assert np.allclose(found[:, 1:], 0)
    assert set(np.abs(found[:, 0])) == {0.0, 3.0}
    assert set(np.sign(found[:, 0])) == {-1.0, 0.0, 1.0}
    runs = [(bool(on), len(list(group))) for on, group in itertools.groupby(found[:, 0] != 0)]
    assert not runs[0][0]  # an episode begins without a push
    gaps, lengths = ([n for on, n in runs[:-1] if on is kind] for kind in (False, True))
    assert set(lengths) == {3}
    assert 5 <= min(gaps) < max(gaps) <= 15


def test_directions_are_uniform_on_the_sphere() -> None:
    found = forces(0, steps=4000, interval=1, duration=1, axes=(0, 1))
    pushed = found[np.linalg.norm(found, axis=1) > 0]
    np.testing.assert_allclose(np.linalg.norm(pushed, axis=1), 3.0)
    angles = np.arctan2(pushed[:, 1], pushed[:, 0])
    counts, _ = np.histogram(angles, bins=4, range=(-np.pi, np.pi))
    assert abs(counts / len(angles) - 0.25).max() < 0.04


def test_pushes_follow_the_seed_alone() -> None:
    assert np.array_equal(forces(3), forces(3))
    assert not np.array_equal(forces(3), forces(4))
    env = Pushes(Ball(), body="ball", magnitude=3.0)
    env.reset(seed=3)
    env.np_random.random(7)  # what the environment draws is another stream
    assert np.array_equal([env.step(0)[4]["push"] for _ in range(300)], forces(3))
    first = [env.step(0)[4]["push"] for _ in range(300)]
    env.reset()  # without a seed they go on, and are not those of before
    assert not np.array_equal([env.step(0)[4]["push"] for _ in range(300)], first)


def test_a_new_episode_begins_without_the_last_ones_force() -> None:
    ball = Ball()
    env = Pushes(ball, body="ball", magnitude=3.0, interval=3, duration=4)
    env.reset(seed=0)
    while not env.step(0)[4]["push"].any():
        pass
    env.reset()
    assert not ball.data.xfrc_applied.any()
    assert not env.step(0)[4]["push"].any()


@pytest.mark.parametrize("name", ["pendulum", "hopper"])
def test_pushes_are_forces_on_the_body_of_the_task(name: str) -> None:
    task = tasks.find(name)
    assert task.push is not None
    # an untrained pole falls before the first push of the task itself
    often = replace(task, push=replace(task.push, interval=6))
    pushed, plain = often.make(True)(), task.make(False)()
    np.testing.assert_array_equal(pushed.reset(seed=2)[0], plain.reset(seed=2)[0])
    body = plain.unwrapped.model.body(task.push.body).id
    still = np.zeros(pushed.action_space.shape, np.float32)
    sizes = []
    for _ in range(200):
        observation, _, ended, _, info = pushed.step(still)
        plain.unwrapped.data.xfrc_applied[body, :3] = info["push"]
        np.testing.assert_array_equal(observation, plain.step(still)[0])
        sizes.append(float(np.linalg.norm(info["push"])))
        if ended:
            pushed.reset()
            plain.reset()
            plain.unwrapped.data.qpos[:] = pushed.unwrapped.data.qpos
            plain.unwrapped.data.qvel[:] = pushed.unwrapped.data.qvel
            plain.unwrapped.data.qacc_warmstart[:] = pushed.unwrapped.data.qacc_warmstart
    assert set(sizes) == {0.0, task.push.magnitude}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"body": "arm"}, "ball"),
        ({"magnitude": -1.0}, "magnitude"),
        ({"interval": 0}, "interval"),
        ({"duration": 0}, "duration"),
        ({"axes": (3,)}, "axes"),
        ({"axes": ()}, "axes"),
    ],
)
def test_pushes_refuse_what_has_no_meaning(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Pushes(Ball(), **{"body": "ball", "magnitude": 1.0, **options})


def test_pushes_need_a_body() -> None:
    with pytest.raises(ConfigError, match="body"):
        Pushes(CueCorridor(), body="torso", magnitude=1.0)


class Paying(gym.Env):
    """Pays the rewards of a list, then ends."""

    def __init__(self, rewards: list[float], truncates: bool) -> None:
        self.rewards, self.truncates, self.at = rewards, truncates, 0
        self.observation_space, self.action_space = spaces.Discrete(1), spaces.Discrete(1)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        self.at = 0
        return 0, {}

    def step(self, action: Any):
        self.at += 1
        end = self.at == len(self.rewards)
        return 0, self.rewards[self.at - 1], end and not self.truncates, end and self.truncates, {}


@pytest.mark.parametrize("truncates", [False, True])
@pytest.mark.parametrize("every", [1, 3, 7, 50, None])
def test_delayed_rewards_are_the_sums_of_what_was_earned(every: int | None, truncates: bool) -> None:
    earned = np.random.default_rng(0).normal(size=20).tolist()
    env = DelayedReward(Paying(earned, truncates), every)
    for _ in range(2):  # the second episode starts with nothing owed
        env.reset()
        paid, given = [], []
        for _ in earned:
            _, reward, *_, info = env.step(0)
            paid.append(reward)
            given.append(info["reward"])
        assert given == earned
        ends = [*range(every, 20, every), 20] if every else [20]
        expected, begin = np.zeros(20), 0
        for end in ends:
            expected[end - 1], begin = sum(earned[begin:end]), end
        np.testing.assert_allclose(paid, expected, atol=1e-12)


def test_a_delay_of_no_steps_is_refused() -> None:
    with pytest.raises(ConfigError, match="every"):
        DelayedReward(CueCorridor(), 0)


def test_the_corridor_is_a_proper_environment() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*spec.*")  # it is not registered, so it has none
        check_env(CueCorridor(4))


def play(env: Any, policy: Any, episodes: int, seed: int = 0) -> list[float]:
    """Returns of a policy of the observations so far."""
    returns = []
    for episode in range(episodes):
        seen = [env.reset(seed=seed + episode)[0]]
        total, end = 0.0, False
        while not end:
            observation, reward, terminated, truncated, _ = env.step(policy(seen))
            seen.append(observation)
            total, end = total + reward, terminated or truncated
        returns.append(total)
    return returns


def test_the_corridor_pays_for_remembering_the_cue() -> None:
    env = CueCorridor(5)

    def remembers(seen: list[np.ndarray]) -> int:
        at_junction = seen[-1][1] == 1.0
        return (1 if seen[0][0] < 0 else 2) if at_junction else 0

    assert play(env, remembers, 50) == [1.0] * 50
    returns = play(env, lambda seen: 2 if seen[-1][1] == 1.0 else 0, 400)
    assert abs(np.mean(returns) - 0.5) < 0.1  # always right: the cue is a fair coin
    assert play(env, lambda seen: 0, 5) == [0.0] * 5
    assert play(env, lambda seen: 1, 5) == [0.0] * 5  # turning in the corridor does nothing


def test_the_corridor_shows_the_cue_once_and_ends_in_time() -> None:
    env = CueCorridor(3)
    first, _ = env.reset(seed=1)
    assert abs(first[0]) == 1
    assert first[1] == -1
    seen = [env.step(0) for _ in range(12)]
    assert all(s[0][0] == 0 for s in seen)
    assert [float(s[0][1]) for s in seen[:3]] == pytest.approx([-1 / 3, 1 / 3, 1.0])
    assert [s[3] for s in seen] == [False] * 11 + [True]
    assert len({float(s[0][2]) for s in seen}) == 12


@pytest.mark.parametrize("arguments", [{"length": 0}, {"noise": 2.0}])
def test_a_corridor_without_length_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="CueCorridor"):
        CueCorridor(**arguments)


@pytest.mark.parametrize("name", list(tasks.TASKS))
def test_an_environment_goes_on_where_it_was(name: str) -> None:
    task = tasks.TASKS[name]
    make = task.make(task.push is not None)
    env = make()
    env.reset(seed=5)
    generator = np.random.default_rng(0)

    def go(one: Any, actions: list[Any]) -> list[Any]:
        found = []
        for action in actions:
            observation, reward, terminated, truncated, _ = one.step(action)
            found.append((observation.tolist(), float(reward), terminated, truncated))
            if terminated or truncated:
                found.append(one.reset()[0].tolist())
        return found

    space = env.action_space
    actions = [
        int(generator.integers(3)) if task.env == "cue" else generator.uniform(space.low, space.high).astype(np.float32)
        for _ in range(120)
    ]
    go(env, actions[:37])
    state = json.loads(json.dumps(snapshots.capture(env)))
    expected = go(env, actions[37:])
    other = make()
    other.reset(seed=99)
    go(other, actions[:11])
    snapshots.restore(other, state)
    assert go(other, actions[37:]) == expected


def test_an_unknown_wrapper_cannot_be_resumed() -> None:
    with pytest.raises(ConfigError, match="TransformReward"):
        snapshots.capture(gym.wrappers.TransformReward(CueCorridor(), float))


def test_other_wrappers_are_refused() -> None:
    state = snapshots.capture(CueCorridor())
    with pytest.raises(ConfigError, match="wrappers"):
        snapshots.restore(DelayedReward(CueCorridor(), 1), state)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    with pytest.raises(ConfigError, match=r"stable_baselines3.*toreq\[rl\]"):
        extra.require()


def test_an_unknown_task_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'pendulum'"):
        tasks.find("pendulun")
    with pytest.raises(ConfigError, match="pushes"):
        tasks.find("cue").make(True)
