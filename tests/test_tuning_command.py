"""`toreq tune`: what it searches, that it goes on after Ctrl-C, and that its command trains with what it found."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from toreq import training
from toreq.cli import main, tune_view
from toreq.cli.parsing import expand_set
from toreq.cli.train import Train
from toreq.cli.tune import parse_space
from toreq.errors import ConfigError, DivergenceError
from toreq.training import Interrupted, TrainConfig, config_for
from toreq.tuning import Choice, Integer, Real, Space, tune
from toreq.tuning import systems as tuned_systems
from toreq.tuning.systems import default_space, present, train_command

pytest.importorskip("optuna", reason="the search needs the extra `tune`")

SMALL = ["--set", "hidden=8", "--epochs", "1", "--limit-train", "60", "--holdout", "40", "--threads", "1"]


def command(out: Path, *more: str, system: str = "toreqprop") -> list[str]:
    return ["tune", system, *SMALL, "--out", str(out), *more]


def best(out: Path) -> dict[str, Any]:
    return json.loads((out / "best.json").read_text())


# -- the space


def test_spaces_are_read() -> None:
    space = parse_space(["learning_rate=1e-4..1e-2:log", "patch=2..7", "damping=.5..1", "kind=a,true,3,none"])
    assert space.parameters == {
        "learning_rate": Real(1e-4, 1e-2, log=True),
        "patch": Integer(2, 7),
        "damping": Real(0.5, 1),
        "kind": Choice(["a", True, 3, None]),
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr", "expected NAME=LOW..HIGH"),
        ("=1..2", "expected NAME=LOW..HIGH"),
        ("lr=1", "expected NAME=LOW..HIGH"),
        ("lr=1..2:lin", "expected NAME=LOW..HIGH"),
        ("lr=a..b", "expected numbers as the ends"),
        ("lr=2..1", "low < high"),
        ("lr=0..1:log", "above 0"),
        ("lr=3,3", "two or more different"),
    ],
)
def test_what_is_no_space_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_space([text])
    with pytest.raises(ConfigError, match="each name once"):
        parse_space(["a=1..2", "a=1..3"])


def test_several_ranges_may_follow_one_flag() -> None:
    given = ["tune", "--space", "a=1..2", "b.c=3..4", "--set", "x=1", "y=2", "toreqprop"]
    assert expand_set(given) == [
        "tune", "--space", "a=1..2", "--space", "b.c=3..4", "--set", "x=1", "--set", "y=2", "toreqprop",
    ]  # fmt: skip


def test_by_default_a_search_holds_what_the_system_has() -> None:
    own = default_space(config_for("toreqprop", {"arch": "conv"}))
    assert list(own.parameters) == ["learning_rate", "weight_decay", "coupling_scale", "norm_bound"]
    assert own.parameters["learning_rate"] == Real(3e-4, 1e-2, log=True)
    scale = own.parameters["coupling_scale"]
    assert scale.holds(0.5)
    # the feed-forward twin has no couplings
    assert list(default_space(config_for("toreqprop", side="bp-ff")).parameters) == ["learning_rate", "weight_decay"]


def test_the_search_starts_at_the_recipe_or_as_near_as_the_space_allows() -> None:
    config = config_for("toreqprop", {"arch": "mlp"}, learning_rate=1e-3)
    space = Space({
        "learning_rate": Real(1e-4, 1e-2), "weight_decay": Real(1e-6, 1e-3), "norm_bound": Real(0.5, 0.7),
        "shift": Integer(0, 3), "optimizer": Choice(["sgd", "adam"]),
    })  # fmt: skip
    assert present(config, space) == {
        "learning_rate": 1e-3, "weight_decay": 1e-6, "norm_bound": 0.7, "shift": config.shift, "optimizer": "adam",
    }  # fmt: skip
    assert present(config, Space({"optimizer": Choice(["sgd", "rmsprop"])})) is None
    assert present(config, Space({"solver.damping": Real(0.1, 1.0)})) is None


# -- the command that is printed


def configured_by(words: str, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """What `toreq train` would train."""
    seen: list[TrainConfig] = []

    def caught(self: Train, console: Any, command: str) -> int:
        seen.append(self._config())
        return 0

    monkeypatch.setattr(Train, "run", caught)
    assert main(shlex.split(words)[1:]) == 0
    return seen[0]


def test_the_command_trains_with_exactly_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"arch": "mlp", "hidden": (8, 4), "nonlinearity": "tanh", "gated": True}
    config = config_for("toreqprop", options, seed=3, side="bp-eq", data="mnist")
    params = {
        "learning_rate": 1 / 3, "weight_decay": 1e-05, "batch_size": 17, "optimizer": "rmsprop", "schedule": "constant",
        "warmup": 0.1, "gradient_clip": 2.5, "shift": 2, "norm_bound": None, "coupling_scale": 0.1 + 0.2,
        "solver.damping": 0.7,
    }  # fmt: skip
    found = configured_by(train_command(config, params), monkeypatch)
    wanted = tuned_systems.configured(config, params)
    assert dataclasses.replace(found, out=None) == dataclasses.replace(wanted, out=None)


def test_a_search_writes_its_best_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    space = ["--space", "learning_rate=1e-3..1e-1:log", "norm_bound=0.5..0.9", "shift=0,1"]
    assert main([*command(tmp_path / "a"), "--trials", "3", *space]) == 0
    said = capsys.readouterr().out
    for word in ("2 continuous, 2 values", "60 training examples, judged by 40 held-out", "trial 3 of 3", "train with"):
        assert word in said, word
    found = best(tmp_path / "a")
    assert len(found["trials"]) == 3
    assert found["value"] == max(t["value"] for t in found["trials"])
    assert found["command"] in said
    assert (tmp_path / "a" / "trials.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (tmp_path / "a").iterdir() if p.name[0] != ".") == [
        "best.json", "study.sqlite", "trials.png",
    ]  # fmt: skip
    # the first trial again, by hand: a training on what is not held out
    first = found["trials"][0]
    own = {"hidden": (8,), "norm_bound": first["params"]["norm_bound"]}
    sizes = {"epochs": 1, "limit_train": 60, "holdout": 40, "threads": 1}
    config = config_for(
        "toreqprop",
        own,
        learning_rate=first["params"]["learning_rate"],
        shift=first["params"]["shift"],
        out=str(tmp_path / "b"),
        **sizes,
    )
    assert training.train(config)["test_accuracy"] == first["value"]
    # and the command, which names neither the held-out part nor the subset
    full = configured_by(found["command"], monkeypatch)
    assert (full.holdout, full.limit_train, full.epochs) == (None, None, config_for("toreqprop").epochs)
    assert full.learning_rate == found["best"]["learning_rate"]
    assert full.set["norm_bound"] == found["best"]["norm_bound"]


def test_ctrl_c_keeps_the_trials_and_the_same_command_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def fake(stop: int | None) -> Any:
        def trained(config: TrainConfig) -> tuple[dict[str, Any], bool]:
            calls.append(1)
            if len(calls) == stop:
                raise Interrupted("stopped at step 3; go on with: toreq train --resume nowhere")
            return {"test_accuracy": config.learning_rate}, False

        return trained

    arguments = [*command(tmp_path / "a"), "--trials", "4"]
    monkeypatch.setattr(tuned_systems, "trained", fake(3))
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert "stopped after 2 of 4 trials, which are kept; go on with: toreq tune toreqprop" in said
    assert shlex.join(arguments) in said
    assert "--resume" not in said
    assert not (tmp_path / "a" / "best.json").exists()
    calls.clear()
    monkeypatch.setattr(tuned_systems, "trained", fake(None))
    assert main(arguments) == 0
    assert len(calls) == 2
    assert len(best(tmp_path / "a")["trials"]) == 4
    # other settings are another search, more trials are not
    assert main([*arguments, "--epochs", "2"]) == 1
    assert "the settings of the search" in capsys.readouterr().err
    assert main([*arguments, "--trials", "5"]) == 0
    assert len(calls) == 3


def test_failed_trials_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(config: TrainConfig) -> tuple[dict[str, Any], bool]:
        if config.learning_rate > 2e-3:
            raise DivergenceError("it grew")
        return {"test_accuracy": 0.5}, False

    monkeypatch.setattr(tuned_systems, "trained", trained)
    assert main([*command(tmp_path / "a"), "--trials", "5"]) == 0
    said = capsys.readouterr().out
    assert "failed: it grew" in said
    assert "5 trials, " in said
    assert " failed: accuracy" in said


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--trials", "0"], "at least one trial"),
        (["--space", "learning_rat=1..2"], "did you mean 'learning_rate'"),
        (["--space", "arch=mlp,conv"], "expected something that can be tuned, got 'arch'"),
        (["--space", "hidden=4..8"], "expected hidden to be set or tuned, got both"),
        (["--side", "bp"], "expected one of eqprop, bp-eq, bp-ff"),
        (["--holdout", "60000"], "training examples"),
    ],
)
def test_bad_usage(tmp_path: Path, more: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command(tmp_path / "a"), *more]) in (1, 2)
    assert said in capsys.readouterr().err
    assert not (tmp_path / "a" / "best.json").exists()


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").touch()
    assert main(command(tmp_path)) == 2
    assert "with files in it; choose another --out" in capsys.readouterr().err
    assert main(command(tmp_path / "thesis.tex")) == 2
    assert "got the file" in capsys.readouterr().err


@pytest.mark.parametrize("names", [1, 2, 3])
def test_pictures_hold_every_parameter(names: int) -> None:
    kinds: list[Any] = [Real(1e-4, 1e-2, log=True), Integer(0, 3), Choice(["a", True, None])]
    space = Space({f"p{i}": kind for i, kind in enumerate(kinds[:names])})

    def objective(number: int, params: Any) -> float:
        if number == 1:
            raise DivergenceError("no")
        return 0.1 * number

    found = tune(objective, space, 4)
    assert tune_view.picture(found, space).startswith(b"\x89PNG")
