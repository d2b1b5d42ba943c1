"""Spaces, the search, and what an interruption, a failure or a damaged file does to it."""

from __future__ import annotations

import importlib
import math
import random
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toreq.errors import ConfigError, DivergenceError, WriteError
from toreq.tuning import Attempt, Choice, Integer, Real, Size, Space, Tuned, TuneError, tune

pytest.importorskip("optuna", reason="the search needs the extra `tune`")

SPACE = Space({"rate": Real(1e-4, 1e-1, log=True), "width": Integer(1, 8), "kind": Choice(["a", "b", None])})
START = {"rate": 1e-2, "width": 5, "kind": None}


def bowl(number: int, params: Mapping[str, Any]) -> float:
    """Largest, 0, at rate 3e-3, width 3 and kind b."""
    return -(math.log(params["rate"] / 3e-3) ** 2) - 0.1 * (params["width"] - 3) ** 2 - float(params["kind"] != "b")


class Cut(Exception):
    """What stops a search in the middle of a trial, as Ctrl-C or a kill would."""


def cut_at(stop: int) -> Callable[[int, Mapping[str, Any]], float]:
    def objective(number: int, params: Mapping[str, Any]) -> float:
        if number == stop:
            raise Cut
        return bowl(number, params)

    return objective


def points(found: Tuned) -> list[dict[str, Any]]:
    return [attempt.params for attempt in found.trials]


# -- spaces

REALS = st.builds(Real, st.floats(1e-6, 1.0), st.floats(2.0, 1e6), st.booleans())
INTEGERS = st.builds(Integer, st.integers(1, 20), st.integers(21, 500), st.booleans())
CHOICES = st.builds(Choice, st.lists(st.integers(-9, 9), min_size=2, unique=True))


# beartype draws the items that it checks
@pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
@given(st.one_of(REALS, INTEGERS, CHOICES), st.floats(0, 1))
def test_every_share_of_a_range_is_a_value_of_it(parameter: Real | Integer | Choice, share: float) -> None:
    assert parameter.holds(parameter.at(share))


@given(REALS, st.floats(0, 1))
def test_a_share_is_recovered_from_its_value(parameter: Real, share: float) -> None:
    assert parameter.share(parameter.at(share)) == pytest.approx(share, abs=1e-6)


@pytest.mark.parametrize("log", [False, True])
def test_shares_spread_evenly_over_whole_numbers(log: bool) -> None:
    parameter = Integer(1, 8, log)
    drawn = [parameter.at((i + 0.5) / 10_000) for i in range(10_000)]
    for value in range(1, 9):
        wanted = math.log((value + 1) / value) / math.log(9) if log else 1 / 8
        assert drawn.count(value) / 10_000 == pytest.approx(wanted, abs=1e-3)


def test_a_logarithmic_range_has_its_geometric_mean_in_the_middle() -> None:
    assert Real(1e-4, 1e-2, log=True).at(0.5) == pytest.approx(1e-3)
    assert Real(1.0, 3.0).at(0.5) == pytest.approx(2.0)


def test_sizes_compare_dimensions_and_values() -> None:
    assert SPACE.size == Size(1, (3, 8))
    other = Space({"k": Choice([True, False, None]), "n": Integer(11, 18), "x": Real(0.0, 5.0)})
    assert other.size == SPACE.size
    assert Space({"n": Integer(1, 9)}).size != Space({"n": Integer(1, 8)}).size
    assert str(SPACE.size) == "1 continuous, 3 values, 8 values"


def test_values_at_the_ends_of_a_range_are_named() -> None:
    assert SPACE.at_edge({"rate": 1e-4, "width": 8, "kind": "a"}) == ["rate", "width"]
    assert SPACE.at_edge({"rate": 1e-3, "width": 7, "kind": "a"}) == []


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Real(1.0, 1.0), "low < high"),
        (lambda: Real(0.0, 1.0, log=True), "above 0 on a logarithmic scale"),
        (lambda: Real(0.0, math.inf), "both finite"),
        (lambda: Integer(3, 2), "low < high"),
        (lambda: Choice([1]), "two or more"),
        (lambda: Choice([1, 1]), "two or more"),
        (lambda: Space({}), "at least one parameter"),
        (lambda: SPACE.check({**START, "rat": 1}), "did you mean 'rate'"),
        (lambda: SPACE.check({"rate": 1e-2, "width": 5}), "expected a value of 'kind'"),
        (lambda: SPACE.check({**START, "rate": 1.0}), r"expected rate in 0\.0001 \.\. 0\.1 \(log\), got 1\.0"),
        (lambda: SPACE.check({**START, "width": True}), "expected width"),
        (lambda: tune(bowl, SPACE, 0), "at least one trial"),
        (lambda: tune(bowl, SPACE, 1, start={**START, "width": 9}), "expected width"),
    ],
)
def test_bad_ranges_and_arguments_are_refused(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make()


def test_values_of_a_wrong_type_are_refused() -> None:
    # in another process, since in this one the type checker of the tests would refuse them first
    code = """
from toreq.errors import ConfigError
from toreq.tuning import Choice, Integer, Space, tune, Real
for make in (
    lambda: Integer(1, 2.5),
    lambda: Choice([1, (2, 3)]),
    lambda: Space({"a": 3}),
    lambda: tune(print, Space({"a": Real(0, 1)}), 1, direction="up"),
):
    try:
        make()
    except ConfigError as error:
        print(error)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    wanted = ("use Real for others", "name it by a text", "expected Real, Integer or Choice", "choose one")
    assert len(told) == len(wanted)
    for line, said in zip(told, wanted, strict=True):
        assert said in line


# -- the search


def test_the_search_finds_more_than_random_points_do() -> None:
    found = tune(bowl, SPACE, 40, seed=3)
    draw = random.Random(0)
    by_chance = [max(bowl(0, SPACE.at([draw.random() for _ in range(3)])) for _ in range(40)) for _ in range(200)]
    better = sum(value < found.value for value in by_chance) / len(by_chance)
    assert better > 0.8
    assert found.value == max(a.value for a in found.trials if a.value is not None)
    assert found.best == next(a.params for a in found.trials if a.value == found.value)


def test_the_first_trials_are_the_start_and_spread_out() -> None:
    space = Space({"x": Real(0.0, 1.0)})
    found = tune(lambda n, p: 0.0, space, 5, start={"x": 0.5})
    assert points(found)[0] == {"x": 0.5}
    # four points of a Sobol sequence: one in each quarter
    assert sorted(int(4 * p["x"]) for p in points(found)[1:]) == [0, 1, 2, 3]
    assert found.best == {"x": 0.5}  # of equal ones the first


def test_seeds_decide_and_nothing_else_does() -> None:
    one, two = tune(bowl, SPACE, 8, seed=1), tune(bowl, SPACE, 8, seed=1)
    assert points(one) == points(two)
    assert points(one) != points(tune(bowl, SPACE, 8, seed=2))


def test_minimising_is_maximising_the_negative() -> None:
    up = tune(bowl, SPACE, 10, seed=1)
    down = tune(lambda n, p: -bowl(n, p), SPACE, 10, seed=1, direction="minimize")
    assert points(up) == points(down)
    assert (down.best, down.value) == (up.best, -up.value)


@pytest.mark.parametrize("cuts", [[3], [0], [2, 2, 5], [4, 6, 7, 7]])
def test_an_interrupted_search_tries_what_an_unbroken_one_does(tmp_path: Path, cuts: list[int]) -> None:
    unbroken = tune(bowl, SPACE, 8, seed=5, start=START)
    file = tmp_path / "deep" / "odd ?#%41 name.sqlite"
    for stop in cuts:
        with pytest.raises(Cut):
            tune(cut_at(stop), SPACE, 8, seed=5, start=START, storage=file)
    seen: list[int] = []

    def watched(number: int, params: Mapping[str, Any]) -> float:
        seen.append(number)
        return bowl(number, params)

    told: list[Attempt] = []
    resumed = tune(watched, SPACE, 8, seed=5, start=START, storage=file, done=told.append)
    assert seen == list(range(cuts[-1], 8))
    assert [a.number for a in told] == list(range(8))
    assert points(resumed) == points(unbroken)
    assert [a.value for a in resumed.trials] == [a.value for a in unbroken.trials]
    assert (resumed.best, resumed.value) == (unbroken.best, unbroken.value)
    # what is finished is read, and more trials are added to it
    assert tune(cut_at(0), SPACE, 8, seed=5, start=START, storage=file) == resumed
    assert points(tune(bowl, SPACE, 9, seed=5, start=START, storage=file))[:8] == points(unbroken)


def test_a_failed_trial_counts_and_says_why() -> None:
    def brittle(number: int, params: Mapping[str, Any]) -> float:
        if number == 1:
            raise DivergenceError("it blew up")
        return math.nan if number == 2 else bowl(number, params)

    told: list[Attempt] = []
    found = tune(brittle, SPACE, 5, done=told.append)
    assert [a.state for a in found.trials] == ["complete", "failed", "failed", "complete", "complete"]
    assert (found.trials[1].reason, found.trials[1].value) == ("it blew up", None)
    assert "expected a finite value, got nan" in found.trials[2].reason
    assert found.failed == 2
    assert tuple(told) == found.trials


def test_the_search_keeps_away_from_where_trials_fail() -> None:
    def half(number: int, params: Mapping[str, Any]) -> float:
        if params["x"] > 0.5:
            raise DivergenceError("too large")
        return params["x"]

    found = tune(half, Space({"x": Real(0.0, 1.0)}), 30)
    late = found.trials[15:]
    assert sum(a.state == "failed" for a in late) < len(late) / 2
    assert 0.4 < found.value <= 0.5


def test_when_every_trial_fails_the_search_says_so(tmp_path: Path) -> None:
    def never(number: int, params: Mapping[str, Any]) -> float:
        raise DivergenceError(f"trial {number}")

    with pytest.raises(TuneError, match=r"one of 3 trials at least, all failed; the first one: trial 0"):
        tune(never, SPACE, 3, storage=tmp_path / "s.sqlite")


def test_any_other_error_ends_the_search_and_its_trial_is_begun_again(tmp_path: Path) -> None:
    file = tmp_path / "s.sqlite"
    with pytest.raises(ZeroDivisionError):
        tune(lambda n, p: 1 / (n - 1), SPACE, 3, storage=file)
    assert len(tune(bowl, SPACE, 3, storage=file).trials) == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 1}, "the seed of the search"),
        ({"direction": "minimize"}, "the direction of the search"),
        ({"start": START}, "the start of the search"),
        ({"about": {"epochs": 2}}, "the settings of the search"),
        ({"space": Space({"rate": Real(1e-4, 1.0)})}, "the space of the search"),
    ],
)
def test_another_search_does_not_go_on_with_this_one(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    file = tmp_path / "s.sqlite"
    tune(bowl, SPACE, 2, storage=file)
    arguments = {"space": SPACE, **changes}
    with pytest.raises(TuneError, match=said):
        tune(bowl, trials=3, storage=file, **arguments)
    assert len(tune(bowl, SPACE, 2, storage=file).trials) == 2


def test_two_processes_do_not_share_a_search(tmp_path: Path) -> None:
    file = tmp_path / "s.sqlite"

    def second(number: int, params: Mapping[str, Any]) -> float:
        with pytest.raises(TuneError, match="another one that searches there"):
            tune(bowl, SPACE, 2, storage=file)
        return bowl(number, params)

    assert len(tune(second, SPACE, 2, storage=file).trials) == 2


def _foreign(file: Path) -> None:
    with sqlite3.connect(file) as base:
        base.execute("CREATE TABLE recipes (cake TEXT)")
    base.close()


def _torn(file: Path) -> None:
    tune(bowl, SPACE, 3, storage=file)
    file.write_bytes(file.read_bytes()[:5000])


def _noise(file: Path) -> None:
    file.write_text("not a database at all, but long enough to look like one" * 100)


@pytest.mark.parametrize("spoil", [_foreign, _torn, _noise])
def test_a_file_that_holds_no_search_is_set_aside_and_named(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    file = tmp_path / "s.sqlite"
    spoil(file)
    before = file.read_bytes()
    with pytest.warns(UserWarning, match=r"s\.sqlite, got something else .* kept as s\.sqlite\.corrupt-1"):
        found = tune(bowl, SPACE, 2, storage=file)
    assert (tmp_path / "s.sqlite.corrupt-1").read_bytes() == before
    assert len(found.trials) == 2


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="choose another folder"):
        tune(bowl, SPACE, 1, storage=tmp_path / "file" / "s.sqlite")


def test_results_are_read_back_as_written(tmp_path: Path) -> None:
    import json

    found = tune(bowl, SPACE, 6, start=START)
    assert Tuned.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert found.space == {"rate": "0.0001 .. 0.1 (log)", "width": "1 .. 8, whole", "kind": "one of a, b, None"}


def test_optuna_is_quiet_and_its_log_left_as_it_was(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import optuna

    before = optuna.logging.get_verbosity()
    tune(bowl, SPACE, 7, storage=tmp_path / "s.sqlite")
    assert optuna.logging.get_verbosity() == before
    assert capfd.readouterr() == ("", "")


def test_without_optuna_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, *rest: Any) -> Any:
        if name == "optuna":
            raise ImportError(name)
        return imported(name, *rest)

    imported = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=r'pip install "toreq\[tune\]"'):
        tune(bowl, SPACE, 1)
