"""M4 and M7: baselines by hand, the order of a window in time, lumps and limits against the plain environment."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from toreq import systems
from toreq.data import Sequences, SequenceTask
from toreq.errors import ConfigError
from toreq.evidence import BUDGETS, claim
from toreq.evidence.mstep import control, sequences
from toreq.evidence.protocols.control.delayed import DelayedTask, pendulum
from toreq.evidence.protocols.sequences import plans

SMOKE = BUDGETS["smoke"]


def _task(train: list[list[int]], y: list[int], test: list[list[int]], test_y: list[int]) -> SequenceTask:
    def part(x: list[list[int]], targets: list[int]) -> Sequences:
        return Sequences(torch.tensor(x, dtype=torch.uint8), torch.tensor(targets, dtype=torch.uint8))

    return SequenceTask("t", "t", part(train, y), part(test, test_y), classes=4, vocabulary=8)


def test_the_guesses_without_a_network_are_those_counted_by_hand() -> None:
    # symbol 1 mostly means 0, symbol 2 always 3; symbol 5 was never seen
    made = _task([[1, 4], [1, 6], [1, 7], [2, 4]], [0, 0, 3, 3], [[1, 2], [2, 2], [2, 7], [5, 1]], [0, 3, 1, 0])
    assert sequences.by_first_symbol(made) == 50.0  # the first and the second of four
    made = _task([[1, 4], [1, 6], [1, 7], [2, 4]], [0, 0, 0, 3], [[1, 2], [2, 2], [2, 7]], [0, 3, 0])
    assert sequences.majority(made) == pytest.approx(200 / 3)


def test_a_random_part_is_held_out_with_all_classes_where_classes_take_turns() -> None:
    y = [i % 4 for i in range(80)]
    made = _task([[i % 7, 1] for i in range(80)], y, [[1, 2]], [0])
    part = plans.held_out(made, share=0.25, seed=1)
    assert len(part.test) == 20
    assert len(part.train) == 60
    assert set(part.test.y.tolist()) == set(part.train.y.tolist()) == {0, 1, 2, 3}
    # nothing is in both parts, nothing is lost
    kept = torch.cat([part.train.y, part.test.y]).bincount()
    assert kept.tolist() == [20] * 4
    assert torch.equal(plans.held_out(made, 0.25, seed=1).test.x, part.test.x)
    assert not torch.equal(plans.held_out(made, 0.25, seed=2).test.x, part.test.x)
    # what it is for: at equal distances there is one class
    assert set(plans.held_out(made, share=0.25).test.y.tolist()) == {0}


def test_expressions_of_a_budget_fit_its_tokens() -> None:
    size = sequences.Size(32, 8, 1, bounds=(48, 129))
    made = sequences.task("listops", size, BUDGETS["quick"], seed=3)
    assert made.length == 128
    assert made.train.lengths is not None
    assert int(made.train.lengths.min()) >= 49
    again = sequences.task("listops", size, BUDGETS["quick"], seed=4)
    assert not torch.equal(made.train.x, again.train.x)


@pytest.mark.parametrize("name", ["listops", "cifar10"])
def test_one_level_is_the_looped_transformer_and_the_pyramid_shares_its_weights(name: str) -> None:
    size = sequences.SIZES[name]["smoke"]
    made = sequences.task(name, size, SMOKE, 0)
    x = made.batch(made.test, slice(0, 4)).x
    one, more = (sequences.build(how, made, size, 5).eval() for how in ("one-level", "mstep"))
    options: dict[str, Any] = {"vocabulary": made.vocabulary} if made.vocabulary else {"patch": "rows"}
    shape = (made.length,) if made.vocabulary else (1, made.length, made.features)
    torch.manual_seed(5)
    base = systems.create(
        "toreqprop", shape, 10, arch="transformer", features=size.features, heads=2, hidden=2 * size.features, **options
    )
    own = dict(base.named_parameters())
    assert sum(p.numel() for p in one.parameters()) == sum(p.numel() for p in own.values())
    with torch.no_grad():
        expected = base.eval()(x if x.ndim == 2 else x.unsqueeze(1))
        # the fast settings stop earlier
        torch.testing.assert_close(one(x), expected, rtol=0.05, atol=0.05)
        assert more(x).shape == expected.shape
    assert 1 < sum(p.numel() for p in more.parameters()) / sum(p.numel() for p in one.parameters()) < 1.15


@pytest.mark.parametrize("how", sequences.HOW)
def test_every_side_learns_what_one_symbol_says(how: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(1, 5, (96, 4), generator=generator)
    made = _task(x[:64].tolist(), (x[:64, 2] - 1).tolist(), x[64:].tolist(), (x[64:, 2] - 1).tolist())
    size = sequences.Size(64, 32, 16, features=8, levels=2)
    model = sequences.build(how, made, size, 0)
    recipe = sequences.Recipe(size.steps, 32, 3e-2, 100.0, size.steps, warmup=1)
    found = sequences.train(model, made, recipe, seed=0)
    assert found.curve[-1][1] > 75  # chance is 25, and the test sequences are others


# -- control


def test_a_token_of_the_trunk_is_one_observation_in_time() -> None:
    torch.manual_seed(0)
    window, inputs = 4, 3
    trunk = control.Pyramid(2, window=window, features=8)(window * inputs).eval()
    x = torch.randn(1, window * inputs)
    for step in range(window):
        changed = x.clone()
        changed[0, step * inputs : (step + 1) * inputs] += 1.0
        with torch.no_grad(), trunk.equilibrium.couplings_off():  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
            before, after = (trunk(v).reshape(window, 8) for v in (x, changed))
        moved = (before - after).abs().amax(1) > 1e-3
        assert moved.tolist() == [i == step for i in range(window)]


def test_the_feed_forward_trunk_gives_as_many_features_and_carries_the_past_only_through_the_net() -> None:
    settled, forward = (control.Pyramid(2, f, window=4, features=8)(12) for f in (False, True))
    x = torch.randn(5, 12)
    assert settled(x).shape == forward(x).shape == (5, 32)


def _trace(env: Any, actions: np.ndarray, seed: int) -> tuple[list[np.ndarray], list[float], bool, bool]:
    seen, rewards, ended = [env.reset(seed=seed)[0]], [], (False, False)
    for action in actions:
        observation, reward, *ended = env.step(action)[:4]
        seen.append(observation)
        rewards.append(float(reward))
        if any(ended):
            break
    return seen, rewards, bool(ended[0]), bool(ended[1])


@pytest.mark.parametrize(("limit", "lump", "push"), [(7, 3, 0.0), (6, 3, 0.0), (50, 4, 3.0)])
def test_lumps_and_windows_are_those_of_the_plain_environment(limit: int, lump: int, push: float) -> None:
    gym = pytest.importorskip("gymnasium")
    pytest.importorskip("stable_baselines3")
    pytest.importorskip("mujoco")
    window = 3
    task = pendulum(limit, lump, window, {})
    actions = np.full((limit, 1), push, dtype=np.float32)
    seen, rewards, terminated, truncated = _trace(task.make(False)(), actions, seed=2)
    plain, earned, fell, _ = _trace(gym.make("InvertedPendulum-v5"), actions, seed=2)
    steps = len(rewards)
    assert steps == len(earned)
    assert terminated == fell
    assert truncated == (steps == limit)
    expected, begin = np.zeros(steps), 0
    for end in sorted({*range(lump, steps + 1, lump), steps}):
        expected[end - 1], begin = sum(earned[begin:end]), end
    np.testing.assert_allclose(rewards, expected)
    for t, stacked in enumerate(seen):
        past = [plain[max(0, i)] for i in range(t - window + 1, t + 1)]
        np.testing.assert_allclose(stacked, np.concatenate(past))


def test_a_pole_that_falls_ends_an_episode_before_its_limit() -> None:
    pytest.importorskip("stable_baselines3")
    pytest.importorskip("mujoco")
    _, rewards, terminated, truncated = _trace(
        pendulum(50, 4, 1, {}).make(False)(), np.full((50, 1), 3.0, dtype=np.float32), 2
    )
    assert terminated
    assert not truncated
    assert len(rewards) < 50


@pytest.mark.parametrize(("limit", "lump"), [(0, 1), (10, 0)])
def test_limits_and_lumps_below_one_are_refused(limit: int, lump: int) -> None:
    with pytest.raises(ConfigError, match="DelayedTask"):
        pendulum(limit, lump, 2, {})


def test_a_corridor_has_no_limit_to_change() -> None:
    with pytest.raises(ConfigError, match="cue"):
        DelayedTask(name="x", env="cue", sentence="", threshold=1.0, sizes={})


def test_all_sides_are_there_and_judged_alike() -> None:
    for name in ("M4", "M7"):
        one = claim(name)
        assert one.tuning is not None
        assert set(one.tuning.spaces) == set(one.sides)
        # the one level that three levels are compared with must learn
        assert any(c.condition and c.side.endswith("one-level") for c in one.criteria)
        assert all(one.prescribed(side) == 3 for side in one.sides)
    assert "JPEG" in claim("M4").protocol
