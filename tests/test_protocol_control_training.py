"""Training by the control protocol: exact resumption, separate evaluation, and what a run returns."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from toreq.errors import CheckpointError, ConfigError, DataError
from toreq.evidence import BUDGETS, Trial
from toreq.evidence.protocols import control
from toreq.evidence.protocols.control import page, protocol
from toreq.evidence.protocols.control.__main__ import main
from toreq.evidence.protocols.control.results import Results
from toreq.evidence.workers import perform
from toreq.training import checkpoint

sb3 = pytest.importorskip("stable_baselines3")
pytest.importorskip("mujoco")

from toreq.evidence.protocols.control.training import evaluate, train  # noqa: E402

TINY = control.Sizes(
    steps=192, every=64, episodes=2, final=2, hidden=(6, 6), envs=4, rollout=8, batch=32, epochs=1, rate=3e-3
)
DELAYED = replace(control.find("pendulum-pushed"), name="test", delayed=True, every=7)


def numbers(found: Any) -> list[Any]:
    """All that a training ends with: curve, weights, moments of Adam and of the observations."""
    model = found.model
    moments = [v for s in model.policy.optimizer.state_dict()["state"].values() for v in s.values()]
    weights = list(model.policy.state_dict().values())
    envs = model.get_vec_normalize_env()
    running = [] if envs is None else [*envs.obs_rms.mean.tolist(), float(envs.ret_rms.var), *envs.returns.tolist()]
    return [found.curve, running, [t.tolist() for t in (*weights, *moments)]]


def cut(monkeypatch: pytest.MonkeyPatch, updates: int, action: Callable[[], Any]) -> None:
    """Run until the given update of PPO, at which the process is interrupted."""
    count, original = 0, sb3.PPO.train

    def stop(model: Any) -> None:
        nonlocal count
        count += 1
        if count == updates:
            raise KeyboardInterrupt
        original(model)

    monkeypatch.setattr(sb3.PPO, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        action()
    monkeypatch.setattr(sb3.PPO, "train", original)


@pytest.mark.parametrize(
    ("task", "side"),
    [(DELAYED, "eqprop"), (control.find("hopper-pushed"), "bp-ff"), (control.find("cue"), "eqprop")],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_an_interrupted_training_equals_an_unbroken_one(
    task: control.Task, side: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = control.trunk(side, TINY.hidden)
    whole = train(task, made, TINY, 1, tmp_path / "whole", save_seconds=1e9)
    assert [x for x, _ in whole.curve] == [0, 64, 128, 192]
    assert not (tmp_path / "whole" / "control").exists()

    def go() -> Any:
        return train(task, made, TINY, 1, tmp_path / "cut", save_seconds=0)

    cut(monkeypatch, 3, go)  # its rollout is done, its update is not: both are lost
    torch.manual_seed(99)
    cut(monkeypatch, 2, go)
    found = go()
    assert found.resumed
    assert not whole.resumed
    assert numbers(found) == numbers(whole)
    assert len(list((tmp_path / "cut" / "control").iterdir())) == 3  # one agent, its state and its tensors


def test_a_training_is_that_of_its_seed(tmp_path: Path) -> None:
    made = control.trunk("bp-ff", TINY.hidden)
    a, b, c = (numbers(train(DELAYED, made, TINY, seed, tmp_path / str(i))) for i, seed in enumerate((2, 2, 3)))
    assert a == b
    assert a != c


def test_evaluation_leaves_training_alone(tmp_path: Path) -> None:
    made = control.trunk("bp-ff", TINY.hidden)
    often = numbers(train(DELAYED, made, replace(TINY, every=32), 0, tmp_path / "a"))
    seldom = numbers(train(DELAYED, made, replace(TINY, every=192, episodes=3), 0, tmp_path / "b"))
    assert often[1:] == seldom[1:]


def test_every_evaluation_meets_the_same_episodes(tmp_path: Path) -> None:
    found = train(DELAYED, control.trunk("bp-ff", TINY.hidden), TINY, 0, tmp_path)
    first = evaluate(found.model, DELAYED, 0, 3, True)
    assert len(first) == 3
    assert evaluate(found.model, DELAYED, 0, 3, True) == first
    assert evaluate(found.model, DELAYED, 1, 3, True) != first


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The scratch folder of an interrupted training."""
    made = control.trunk("bp-ff", TINY.hidden)
    cut(monkeypatch, 3, lambda: train(DELAYED, made, TINY, 0, tmp_path, save_seconds=0))
    return tmp_path


def again(saved: Path, task: control.Task = DELAYED, sizes: control.Sizes = TINY) -> Any:
    return train(task, control.trunk("bp-ff", TINY.hidden), sizes, 0, saved)


def test_a_truncated_agent_is_named(saved: Path) -> None:
    (agent,) = (saved / "control").glob("agent-*.zip")
    agent.write_bytes(agent.read_bytes()[:200])
    with pytest.raises(CheckpointError, match=agent.name):
        again(saved)


def test_a_damaged_state_is_named(saved: Path) -> None:
    state = saved / "control" / checkpoint.STATE
    state.write_text(state.read_text()[:-50])
    with pytest.raises(CheckpointError, match=r"state\.json"):
        again(saved)


@pytest.mark.parametrize(
    ("task", "sizes"), [(control.find("pendulum"), TINY), (DELAYED, replace(TINY, rate=1e-4))], ids=["task", "sizes"]
)
def test_a_checkpoint_of_something_else_is_refused(saved: Path, task: control.Task, sizes: control.Sizes) -> None:
    with pytest.raises(CheckpointError, match="another folder"):
        again(saved, task, sizes)


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="divide"):
        replace(TINY, every=50)
    with pytest.raises(ConfigError, match="divide"):
        replace(TINY, steps=200)


CURVE = [(0.0, 1.0), (10.0, 3.0), (30.0, 5.0), (40.0, 4.0)]


@pytest.mark.parametrize(("threshold", "steps"), [(0.5, 0.0), (3.0, 10.0), (4.5, 30.0), (6.0, None)])
def test_steps_to_the_threshold(threshold: float, steps: float | None) -> None:
    found = protocol.learned(CURVE, threshold)
    assert found["steps to threshold"].value == steps
    assert found["steps to threshold, or all"].value == (40.0 if steps is None else steps)
    # 2 x 10 + 4 x 20 + 4.5 x 10 over 40 steps
    assert found["return over training"].value == pytest.approx(145 / 40)
    assert protocol.mean_return(CURVE[:1]) == 1.0


SMOKE = BUDGETS["smoke"]


@pytest.mark.parametrize(
    ("task", "name"),
    [*((task, "eqprop") for task in control.TASKS), ("pendulum", "bp-eq"), ("pendulum", "bp-ff"), ("cue", "bp-ff")],
)
def test_the_smoke_budget_of_every_side_and_task(task: str, name: str, tmp_path: Path) -> None:
    trial = Trial(SMOKE, name, 0, "cpu", tmp_path, {"learning_rate": 1e-3})
    outcome, _ = perform(lambda t: control.side(name, t, task), trial, 1)
    values = {key: quantity.value for key, quantity in outcome.metrics.items()}
    wanted = {"steps to threshold", "steps to threshold, or all", "return over training", "return", "learning rate"}
    wanted |= {"CPU seconds per 1000 steps"}
    if control.find(task).push is not None:
        wanted.add("return, pushed")
    if name != "bp-ff":
        wanted |= {"return, couplings off", "radius, actor", "radius, critic"}
        wanted |= {f"relaxations, {phase} {what}" for phase in ("free", "nudged") for what in ("settled", "steps")}
        assert values["relaxations, free settled"] == 100.0
        assert 0.3 < (values["radius, actor"] or 0) < 0.85  # bounded at 0.8, and not weak
    assert set(values) == wanted
    assert values["learning rate"] == 1e-3
    assert all(v is not None for key, v in values.items() if key != "steps to threshold")
    assert [x for x, _ in outcome.curves["return"]] == [0, 96, 192]
    assert outcome.cost.samples == 192
    assert outcome.cost.parameters
    assert outcome.cost.flops
    assert not any("Error" in note or "diverge" in note for note in outcome.notes)
    assert type(outcome).from_json(json.loads(json.dumps(outcome.to_json()))).metrics == outcome.metrics


def test_a_relaxation_costs_more_than_one_pass(tmp_path: Path) -> None:
    flops = {}
    for name in ("bp-ff", "eqprop"):
        trial = Trial(SMOKE, name, 0, "cpu", tmp_path / name)
        flops[name] = control.run(control.trunk(name, (6, 6)), trial, "cue", TINY).cost.flops
    # two networks of 24 x 6 + 6 x 6, heads of 3 and 1: a forward pass and its backward pass of twice the size
    forward = 2 * (2 * (24 * 6 + 6 * 6) + 6 * 4)
    assert flops["bp-ff"] == pytest.approx(192 * forward * 4, rel=0.35)  # no gradient reaches the observations
    assert flops["bp-ff"] <= 192 * forward * 4
    assert flops["eqprop"] > 2 * flops["bp-ff"]


def test_tuning_sees_a_part_of_the_training(tmp_path: Path) -> None:
    trial = Trial(SMOKE, "bp-ff", 10_000, "cpu", tmp_path)
    made = control.trunk("bp-ff", (16, 16))
    found = control.objective(made, trial, "cue", {"learning_rate": 1e-3})
    short = replace(control.find("cue").size(SMOKE), steps=96, rate=1e-3)
    curve = train(control.find("cue"), made, short, 10_000, tmp_path / "again").curve
    assert found == protocol.mean_return(curve)


def test_the_runner_measures_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "control-cue-smoke.json"
    words = ["--task", "cue", "--budget", "smoke", "--sides", "bp-ff", "--trials", "2", "--out", str(out)]
    assert main([*words, "--seeds", "1"]) == 0
    first = Results.load(out)
    assert list(first.runs) == [("bp-ff", 0)]
    assert len(first.tuned["bp-ff"].trials) == 2
    assert first.runs["bp-ff", 0].metrics["learning rate"].value == first.tuned["bp-ff"].best["learning_rate"]
    assert main([*words, "--seeds", "2"]) == 0
    both = Results.load(out)
    assert both.runs["bp-ff", 0] == first.runs["bp-ff", 0]
    assert list(both.runs) == [("bp-ff", 0), ("bp-ff", 1)]
    assert both.environment["versions"]["mujoco"]
    assert capsys.readouterr().out.count("seed 0") == 1  # not run again
    assert main([*words[:-3], "3", *words[-2:], "--seeds", "1"]) == 2  # another number of trials
    assert main([*words, "--seeds", "1", "--sides", "nobody"]) == 2
    assert "nobody" in capsys.readouterr().err
    text = page.body([both])
    assert "| bp-ff | 2 |" in text
    assert page.replaced(f"a\n{page.BEGIN}\nstale text\n{page.END}\nb", text).count("stale text") == 0
    assert page.draw(both).axes[0].get_lines()


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    file = tmp_path / "control-x.json"
    file.write_text("{}")
    with pytest.raises(DataError, match=r"control-x\.json"):
        Results.load(file)
    with pytest.raises(DataError, match="markers"):
        page.replaced("no markers", "text")


def test_the_documentation_shows_the_committed_results() -> None:
    root = Path(__file__).resolve().parent.parent
    text = (root / "docs" / "protocols" / "control.md").read_text()
    found = page.load(root / "evidence" / "results" / "protocols")
    assert page.replaced(text, page.body(found)) == text, "run: python -m toreq.evidence.protocols.control.page"
