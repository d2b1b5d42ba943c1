"""Sides that are tuned before they are run: equally, once, and without the seeds and data that they are judged by."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evidence_claims import BASE, OURS, Inline, diverges, dying, make, tuned_score, tuning
from toreq.errors import ConfigError, ToreqError
from toreq.evidence import BUDGETS, Claim, Trial, Tuning, claims, report, run, runner, store
from toreq.evidence.base import accuracy
from toreq.evidence.claim import TUNING_SEED
from toreq.evidence.store import Result
from toreq.tuning import Choice, Integer, Real, Space, tune

pytest.importorskip("optuna", reason="the search needs the extra `tune`")


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which protocols and objectives note what they run; jobs run in this process."""
    monkeypatch.setenv("EVIDENCE_LOG", str(tmp_path / "log"))
    monkeypatch.setattr(runner, "scheduler", lambda *_: Inline())
    return tmp_path / "log"


def lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def tuned_claim(**changes: Any) -> Claim:
    return make(**{"run": tuned_score, "tuning": tuning(), **changes})


def once(claim: Claim, results: Path, **options: Any) -> Result:
    (found,) = run([claim], results=results, **options)
    return found


def test_sides_are_tuned_first_and_run_with_what_was_found(tmp_path: Path, ran: Path) -> None:
    found = once(tuned_claim(), tmp_path / "r")
    assert lines(ran) == [f"{OURS} trial"] * 6 + [f"{BASE} trial"] * 6 + [
        f"{side} {seed}" for seed in range(3) for side in (OURS, BASE)
    ]
    best = {side: found.tuning[side].best["x"] for side in (OURS, BASE)}
    assert best[OURS] == pytest.approx(0.8, abs=0.2)
    assert best[BASE] == pytest.approx(0.2, abs=0.2)
    for (side, _), outcome in found.outcomes.items():
        wanted = {OURS: 0.8, BASE: 0.2}[side]
        assert outcome.metrics["score"].value == pytest.approx(100 - abs(float(best[side] or 0) - wanted))
    # both sides try the same points but for those that follow from their own values
    tried = {side: [a.params["x"] for a in found.tuning[side].trials] for side in (OURS, BASE)}
    assert tried[OURS][:5] == tried[BASE][:5]
    written = json.loads((tmp_path / "r" / "X1-full.json").read_text())
    assert set(written["tuning"]) == {OURS, BASE}
    assert written["tuning"][OURS]["best"] == {"x": best[OURS]}
    assert len(written["tuning"][OURS]["trials"]) == 6
    assert {r["tuned"]["x"] for r in written["runs"] if r["side"] == BASE} == {best[BASE]}
    assert not any((tmp_path / "r" / store.SCRATCH).glob("*/*"))


def test_what_was_tuned_is_read_back_and_not_tuned_again(tmp_path: Path, ran: Path) -> None:
    one = tuned_claim()
    made = once(one, tmp_path / "r", seeds=1)
    assert len(lines(ran)) == 14
    once(one, tmp_path / "r", seeds=2)
    assert lines(ran)[14:] == [f"{OURS} 1", f"{BASE} 1"]
    kept = store.load(tmp_path / "r", "X1", "full")
    assert kept is not None
    assert kept.tuning == made.tuning
    once(one, tmp_path / "r", seeds=2, again=True)
    assert len(lines(ran)) == 16 + 16


def test_a_smoke_budget_tries_two_points(tmp_path: Path, ran: Path) -> None:
    found = once(tuned_claim(), tmp_path / "r", budget="smoke")
    assert [len(t.trials) for t in found.tuning.values()] == [2, 2]


def test_another_tuning_makes_results_stale_and_none_leaves_the_fingerprint_alone() -> None:
    plain, one = make(), tuned_claim(run=make().run)
    assert plain.fingerprint == "1e8f2472a4b816ab"
    assert one.fingerprint != plain.fingerprint
    space = Space({"x": Real(0.0, 2.0)})
    others = [
        tuning(trials=7),
        tuning(spaces={OURS: space, BASE: space}),
        tuning(start={OURS: {"x": 0.5}}),
        tuning(seed=1),
        tuning(direction="minimize"),
    ]
    prints = {tuned_claim(run=make().run, tuning=other).fingerprint for other in others}
    assert len(prints | {one.fingerprint}) == 6


def test_the_committed_results_of_untuned_claims_stay_valid() -> None:
    results = Path(__file__).parents[1] / "evidence" / "results"
    for claim in claims():
        kept = store.load(results, claim.id, "full") if results.exists() else None
        if kept is not None and claim.id == "B6":
            assert not kept.stale(claim)


def test_runs_that_were_made_with_other_values_are_made_anew(tmp_path: Path, ran: Path) -> None:
    one = tuned_claim()
    once(one, tmp_path / "r", seeds=1)
    file = tmp_path / "r" / "X1-full.json"
    values = json.loads(file.read_text())
    values["tuning"][OURS]["best"] = {"x": 0.75}
    file.write_text(json.dumps(values))
    found = once(one, tmp_path / "r", seeds=1)
    assert lines(ran)[14:] == [f"{OURS} 0"]
    assert found.runs[OURS, 0]["tuned"] == {"x": 0.75}


def test_a_search_that_was_stopped_goes_on_where_it_was(
    tmp_path: Path, ran: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = once(tuned_claim(), tmp_path / "whole")
    ran.unlink()

    class Stops(Inline):
        def run(self, jobs: Any, done: Callable[..., None]) -> None:
            from toreq.evidence import tuning as stage

            calls = iter(range(100))
            tuned = stage.tune

            def stopping(objective: Any, *rest: Any, **named: Any) -> Any:
                def cut(number: int, params: Any) -> float:
                    if next(calls) == 8:  # the third trial of the second side
                        raise KeyboardInterrupt
                    return objective(number, params)

                return tuned(cut, *rest, **named)

            monkeypatch.setattr(stage, "tune", stopping)
            try:
                super().run(jobs, done)
            finally:
                monkeypatch.setattr(stage, "tune", tuned)

    monkeypatch.setattr(runner, "scheduler", lambda *_: Stops())
    with pytest.raises(ToreqError, match="stopped after 1 of 8 runs, which are kept"):
        once(tuned_claim(), tmp_path / "r")
    assert len(lines(ran)) == 8
    monkeypatch.setattr(runner, "scheduler", lambda *_: Inline())
    resumed = once(tuned_claim(), tmp_path / "r")
    assert lines(ran)[8:] == [f"{BASE} trial"] * 4 + [f"{side} {s}" for s in range(3) for side in (OURS, BASE)]
    for side in (OURS, BASE):
        assert [(a.params, a.value) for a in resumed.tuning[side].trials] == [
            (a.params, a.value) for a in unbroken.tuning[side].trials
        ]


@pytest.mark.slow
def test_a_worker_that_dies_in_a_search_goes_on_in_the_next(tmp_path: Path) -> None:
    plain = once(tuned_claim(), tmp_path / "plain", seeds=1, jobs=2)
    died = once(tuned_claim(tuning=tuning(dying)), tmp_path / "died", seeds=1, jobs=2)
    assert not died.failures
    for side in (OURS, BASE):
        assert [a.params for a in died.tuning[side].trials] == [a.params for a in plain.tuning[side].trials]
        assert died.tuning[side].value == plain.tuning[side].value
    assert died.outcomes[OURS, 0].metrics == plain.outcomes[OURS, 0].metrics


@pytest.mark.slow
def test_searches_give_the_same_on_ray(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    one = once(tuned_claim(), tmp_path / "one", seeds=1, jobs=1)
    far = once(tuned_claim(), tmp_path / "ray", seeds=1, jobs=2, scheduler_name="ray")
    assert not far.failures
    assert {side: found.best for side, found in far.tuning.items()} == {s: f.best for s, f in one.tuning.items()}
    assert far.judged(tuned_claim()) == one.judged(tuned_claim())


@pytest.mark.slow
def test_a_side_whose_search_fails_is_not_run_and_settles_nothing(tmp_path: Path) -> None:
    one = tuned_claim(tuning=tuning(diverges))
    found = once(one, tmp_path, jobs=1)
    assert set(found.tuning) == {OURS}
    assert {side for side, _ in found.runs} == {OURS}
    why = found.failures[BASE, TUNING_SEED]["reason"]
    assert why.startswith("tuning: TuneError:")
    assert "it grew without bound" in why
    judged = found.judged(one)
    assert judged.verdict == "not settled"
    assert f"the side {BASE!r} has no run" in judged.reasons


@pytest.mark.parametrize(
    ("make_it", "said"),
    [
        (lambda: tuning(spaces={}), "a space for some side"),
        (lambda: tuning(trials=0), "at least one trial"),
        (
            lambda: tuning(spaces={OURS: Space({"x": Real(0.0, 1.0)}), BASE: Space({"x": Integer(0, 3)})}),
            "spaces of one size for all sides, got 1 continuous for 'ours' and 4 values for 'baseline'",
        ),
        (
            lambda: tuning(spaces={OURS: Space({"x": Choice([1, 2])}), BASE: Space({"x": Choice([1, 2, 3])})}),
            "give every side as much to tune",
        ),
        (lambda: tuning(start={"our": {"x": 0.0}}), "did you mean 'ours'"),
        (lambda: tuning(start={OURS: {"x": 2.0}}), "expected x in"),
        (lambda: tuned_claim(tuning=tuning(spaces={OURS: Space({"x": Real(0.0, 1.0)})})), "name all, each once"),
        (lambda: tuned_claim(tuning=tuning(untuned={BASE: "a formula"})), "name all, each once"),
    ],
)
def test_an_unequal_tuning_is_refused(make_it: Callable[[], Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_it()


def test_a_side_with_nothing_to_tune_says_why(tmp_path: Path, ran: Path) -> None:
    from evidence_claims import scores

    spared = tuning(spaces={OURS: Space({"x": Real(0.0, 1.0)})}, untuned={BASE: "a formula has no rate"})
    one = make(scores, tuning=spared)
    found = once(one, tmp_path / "r", seeds=1)
    assert set(found.tuning) == {OURS}
    assert set(found.runs) == {(OURS, 0), (BASE, 0)}
    assert report.tuned(one, found)[1][:2] == [BASE, "a formula has no rate"]
    once(one, tmp_path / "r", seeds=1)
    assert len(lines(ran)) == 8


def test_the_report_tells_what_each_side_was_given(tmp_path: Path, ran: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_end = Space({"x": Real(0.0, 0.805)})
    one = tuned_claim(tuning=tuning(spaces={OURS: at_end, BASE: at_end}, start={OURS: {"x": 0.8}}))
    found = once(one, tmp_path / "r")
    monkeypatch.setattr(report, "claims", lambda system=None: [one])
    report.write_report(tmp_path / "r", tmp_path / "out")
    assert report.tuned(one, found)[0][:5] == [OURS, "x 0.8", "x: 0 .. 0.805", "6", "1 continuous"]
    for name in ("index.md", "report.html"):
        text = (tmp_path / "out" / name).read_text()
        for word in ("parameters", "FLOPs", "samples", "tuned values", "x 0.8", "size of the search", "1 continuous"):
            assert word in text, word
        assert f"the best x of {OURS} lies at an end of its range" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.0, "0"), (999.0, "999"), (1000.0, "1 k"), (1.4213e13, "14.2 T"), (2e21, "2e+03 E")],
)
def test_counts_are_legible(value: float | None, text: str) -> None:
    assert report.count(value) == text


def test_without_optuna_nothing_is_begun(tmp_path: Path, ran: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    def missing(name: str, *rest: Any) -> Any:
        if name == "optuna":
            raise ImportError(name)
        return imported(name, *rest)

    imported = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=r'pip install "toreq\[tune\]"'):
        once(tuned_claim(), tmp_path / "r")
    assert not (tmp_path / "r").exists()


# -- B2


def test_accuracy_is_tuned_on_held_out_training_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (one,) = [c for c in claims() if c.id == "B2"]
    assert isinstance(one.tuning, Tuning)
    assert one.tuning.trials == accuracy.TRIALS
    for side in one.sides:
        rate = one.tuning.start[side]["learning_rate"]
        assert isinstance(rate, float)
        parameter = one.tuning.spaces[side].parameters["learning_rate"]
        assert isinstance(parameter, Real)
        assert (parameter.low, parameter.high) == pytest.approx((rate / 4, rate * 4))
    seen: list[Any] = []
    monkeypatch.setattr(
        accuracy, "_train", lambda config, path: (seen.append(config), ({"test_accuracy": 0.5}, path, ()))[1]
    )
    for budget in ("quick", "full"):
        for side in one.sides:
            trial = Trial(BUDGETS[budget], side, one.tuning.seed, "cpu", tmp_path)
            assert accuracy.held_out_accuracy(trial, {"learning_rate": 1e-3}) == 50.0
    for config in seen:
        assert config.holdout is not None
        assert config.limit_test is None
        assert (config.learning_rate, config.seed) == (1e-3, TUNING_SEED)
        assert config.set.get("settings") == (None if config.side == "bp-ff" else "fast")
    # sides of one network differ in nothing else
    for arch in accuracy.NETS:
        of_arch = [c.to_json() for c in seen if c.set["arch"] == arch]
        for values in of_arch:
            del values["side"], values["set"]
        assert of_arch.count(of_arch[0]) == 3


def test_a_short_training_is_judged_in_small(tmp_path: Path) -> None:
    (one,) = [c for c in claims() if c.id == "B2"]
    assert one.tuning is not None
    trial = Trial(BUDGETS["smoke"], "mlp bp-ff", one.tuning.seed, "cpu", tmp_path)

    def objective(number: int, params: Any) -> float:
        import dataclasses

        assert one.tuning is not None
        return one.tuning.objective(dataclasses.replace(trial, scratch=tmp_path / str(number)), params)

    found = tune(objective, one.tuning.spaces[trial.side], 2)
    assert all(0 <= float(a.value or 0) <= 100 for a in found.trials)
