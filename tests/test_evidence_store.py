"""Results on disk, and what a run does with those that are there: kept, set aside, made anew."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from evidence_claims import BASE, OURS, Inline, make
from toreq.errors import ConfigError, ToreqError, WriteError
from toreq.evidence import Claim, Criterion, run, runner, store
from toreq.evidence.store import Result


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which the protocols note what they run; jobs run in this process."""
    monkeypatch.setenv("EVIDENCE_LOG", str(tmp_path / "log"))
    monkeypatch.setattr(runner, "scheduler", lambda *_: Inline())
    return tmp_path / "log"


def lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def once(claim: Claim, results: Path, **options: Any) -> Result:
    (found,) = run([claim], results=results, **options)
    return found


def content(results: Path, budget: str = "full") -> dict[str, Any]:
    return json.loads((results / f"X1-{budget}.json").read_text())


def test_a_result_says_all_that_it_should(tmp_path: Path, ran: Path) -> None:
    results = tmp_path / "results"
    once(make(), results, command="toreq evidence run X1 --results /somewhere")
    found = content(results)
    assert (found["claim"], found["budget"], found["verdict"], found["aim_reached"]) == ("X1", "full", "holds", False)
    assert found["seeds"] == [0, 1, 2]
    assert set(found["sides"]) == {OURS, BASE}
    assert found["command"] == "toreq evidence run X1 --budget full"  # no folder of this machine
    assert found["environment"]["versions"]["torch"]
    assert found["seconds"] == pytest.approx(sum(r["seconds"] for r in found["runs"]))
    first = found["criteria"][0]
    assert {"mean", "low", "high", "target", "aim", "verdict"} <= set(first)
    assert (first["target"], first["aim"]) == (85.0, 95.0)
    scores = {(r["side"], r["seed"]): r["metrics"]["score"]["value"] for r in found["runs"]}
    assert scores[OURS, 2] == pytest.approx(90.2)
    assert len(scores) == 6
    assert found["runs"][0]["curves"]["score"][-1] == [3.0, None]
    assert found["runs"][0]["cost"] == {"parameters": 12, "flops": 3.5e6, "samples": 100}


def test_what_was_written_is_read_back(tmp_path: Path, ran: Path) -> None:
    one = make()
    made = once(one, tmp_path)
    again = store.load(tmp_path, "X1", "full")
    assert again is not None
    assert again.to_json(one) == made.to_json(one)
    assert not again.stale(one)


def test_finished_runs_are_kept_and_missing_ones_made(tmp_path: Path, ran: Path) -> None:
    once(make(), tmp_path / "r", seeds=1)
    assert lines(ran) == [f"{OURS} 0", f"{BASE} 0"]
    assert content(tmp_path / "r")["verdict"] == "not settled"
    once(make(), tmp_path / "r")
    assert lines(ran)[2:] == [f"{OURS} 1", f"{BASE} 1", f"{OURS} 2", f"{BASE} 2"]
    assert content(tmp_path / "r")["verdict"] == "holds"
    once(make(), tmp_path / "r")
    assert len(lines(ran)) == 6
    once(make(), tmp_path / "r", again=True)
    assert len(lines(ran)) == 12


def test_budgets_have_files_of_their_own_and_smoke_runs_one_seed(tmp_path: Path, ran: Path) -> None:
    once(make(), tmp_path / "r", budget="smoke")
    assert content(tmp_path / "r", "smoke")["seeds"] == [0]
    assert not (tmp_path / "r" / "X1-full.json").exists()


def test_ctrl_c_keeps_what_is_done(tmp_path: Path, ran: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "scheduler", lambda *_: Inline(stop_after=3))
    with pytest.raises(ToreqError, match=r"stopped after 3 of 6 runs, which are kept; go on with: toreq evidence run"):
        once(make(), tmp_path / "r", command="toreq evidence run X1")
    assert len(content(tmp_path / "r")["runs"]) == 3
    monkeypatch.setattr(runner, "scheduler", lambda *_: Inline())
    once(make(), tmp_path / "r")
    assert len(lines(ran)) == 6


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "other"}', '{"claim": "X1"}', '"x"'])
def test_a_corrupt_file_is_set_aside_and_named(tmp_path: Path, ran: Path, text: str) -> None:
    file = tmp_path / "X1-full.json"
    file.write_text(text)
    (tmp_path / "X1-full.json.corrupt-1").write_text("an earlier one")
    with pytest.warns(UserWarning, match=r"X1-full\.json, got something else .* kept as X1-full\.json\.corrupt-2"):
        once(make(), tmp_path)
    assert (tmp_path / "X1-full.json.corrupt-2").read_text() == text
    assert (tmp_path / "X1-full.json.corrupt-1").read_text() == "an earlier one"
    assert len(content(tmp_path)["runs"]) == 6


def test_a_result_of_another_claim_is_corrupt_too(tmp_path: Path, ran: Path) -> None:
    once(make(), tmp_path)
    (tmp_path / "X1-full.json").rename(tmp_path / "X1-quick.json")
    with pytest.warns(UserWarning, match=r"it is of X1 \(full\)"):
        assert store.load(tmp_path, "X1", "quick") is None


def test_a_changed_protocol_makes_results_stale_and_runs_are_made_anew(tmp_path: Path, ran: Path) -> None:
    once(make(), tmp_path / "r")
    changed = make(protocol="Run it otherwise.")
    kept = store.load(tmp_path / "r", "X1", "full")
    assert kept is not None
    assert kept.stale(changed)
    with pytest.warns(UserWarning, match="an earlier one"):
        once(changed, tmp_path / "r")
    assert len(lines(ran)) == 12
    assert json.loads((tmp_path / "r" / "X1-full.json.stale-1").read_text())["fingerprint"] == make().fingerprint
    assert content(tmp_path / "r")["fingerprint"] == changed.fingerprint


def test_each_side_is_run_under_as_many_seeds_as_its_criteria_prescribe(tmp_path: Path, ran: Path) -> None:
    ours = Criterion("ours", "score", "%", "at_least", OURS, target=85.0)
    dear = Criterion("dear", "score", "%", "at_least", BASE, target=85.0, seeds=1)
    once(make(criteria=(ours, dear)), tmp_path)
    runs = [(run["side"], run["seed"]) for run in content(tmp_path)["runs"]]
    assert sorted(runs) == sorted([*((OURS, seed) for seed in range(3)), (BASE, 0)])


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, ran: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    once(make(), tmp_path / "r", seeds=1)
    before = (tmp_path / "r" / "X1-full.json").read_bytes()

    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(WriteError, match="free some space"):
        once(make(), tmp_path / "r")
    monkeypatch.undo()
    assert (tmp_path / "r" / "X1-full.json").read_bytes() == before
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == [".scratch", "X1-full.json"]


def test_scratch_is_kept_until_a_run_is_finished(tmp_path: Path, ran: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "scheduler", lambda *_: Inline(stop_after=1))
    folder = store.scratch(tmp_path, make(), "full", BASE, 0)
    folder.mkdir(parents=True)
    (folder / "checkpoint").touch()
    with pytest.raises(ToreqError):
        once(make(), tmp_path)
    assert (folder / "checkpoint").exists()
    monkeypatch.setattr(runner, "scheduler", lambda *_: Inline())
    once(make(), tmp_path)
    assert [p.name for p in (tmp_path / ".scratch").iterdir()] == [".gitignore"]
    changed = store.scratch(tmp_path, make(version=2), "full", BASE, 0)
    assert changed != folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "ful"}, "did you mean 'full'"),
        ({"scheduler_name": "rai"}, "did you mean 'ray'"),
        ({"seeds": 0}, "at least one seed"),
        ({"jobs": 0}, "at least one job"),
        ({"threads": 0}, "at least one"),
    ],
)
def test_bad_options_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run([make()], results=tmp_path, **options)
    assert not list(tmp_path.iterdir())
