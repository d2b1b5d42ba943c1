"""Jobs in worker processes and on Ray: deaths, failures, Ctrl-C, and numbers that depend on neither."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from evidence_claims import OURS, make, mishaps, noisy
from toreq.evidence import run, runner
from toreq.evidence.workers import Local

pytestmark = pytest.mark.slow


def numbers(result: Any) -> dict[Any, float | None]:
    return {key: outcome.metrics["score"].value for key, outcome in result.outcomes.items()}


def test_a_death_costs_one_run_and_no_other(tmp_path: Path) -> None:
    sides = ("fine", "dies once", "dies always", "raises", "warns")
    claim = make(mishaps, sides, criteria=(make(sides=("fine",)).criteria[0],))
    (result,) = run([claim], results=tmp_path, seeds=1, jobs=2)
    assert numbers(result) == {("fine", 0): 1.0, ("dies once", 0): 1.0, ("warns", 0): 1.0}
    assert result.runs["dies once", 0]["attempts"] == 2
    assert result.runs["fine", 0]["attempts"] == 1
    dead, raised = result.failures["dies always", 0], result.failures["raises", 0]
    assert (dead["exit_code"], dead["attempts"]) == (-signal.SIGKILL, 2)
    assert "SIGKILL" in dead["reason"]
    assert (raised["reason"], raised["attempts"]) == ("ValueError: no such luck", 1)
    assert "UserWarning: a word of caution" in result.outcomes["warns", 0].notes
    # the file holds what the session holds, and a second call runs the failed ones alone
    written = json.loads((tmp_path / "X1-full.json").read_text())
    assert {f["side"] for f in written["failures"]} == {"dies always", "raises"}
    (again,) = run([claim], results=tmp_path, seeds=1, jobs=1)
    assert again.runs["fine", 0]["seconds"] == result.runs["fine", 0]["seconds"]
    assert set(again.failures) == {("dies always", 0), ("raises", 0)}


def test_exclusive_claims_run_after_the_others_in_one_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, list[str]]] = []

    class Watched(Local):
        def run(self, jobs: Any, done: Any) -> None:
            seen.append((self.jobs, [job.claim.id for job in jobs]))
            super().run(jobs, done)

    monkeypatch.setattr(runner, "Local", Watched)
    one, two = make(mishaps, ("fine",), exclusive=True), make(mishaps, ("fine",), id="X2")
    three = make(mishaps, ("fine",), id="X3", exclusive=True)
    found = run([one, two, three], results=tmp_path, seeds=2, jobs=2)
    assert seen == [(2, ["X2", "X2"]), (1, ["X1", "X1"]), (1, ["X3", "X3"])]
    processes = {note for seed in (0, 1) for note in found[0].outcomes["fine", seed].notes}
    assert len(processes) == 1


def test_numbers_do_not_depend_on_the_scheduler(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    claim = make(noisy)
    (one,) = run([claim], results=tmp_path / "one", jobs=1)
    (two,) = run([claim], results=tmp_path / "two", jobs=2)
    (far,) = run([claim], results=tmp_path / "ray", jobs=2, scheduler_name="ray")
    assert not far.failures
    assert len(numbers(one)) == 6
    assert len(set(numbers(one).values())) == 6
    assert numbers(one) == numbers(two) == numbers(far)
    assert far.judged(claim) == one.judged(claim)


def test_failures_on_ray_are_reported(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    sides = ("fine", "dies always", "raises")
    claim = make(mishaps, sides, criteria=(make(sides=("fine",)).criteria[0],))
    (result,) = run([claim], results=tmp_path, seeds=1, jobs=2, scheduler_name="ray")
    assert numbers(result) == {("fine", 0): 1.0}
    assert "ValueError: no such luck" in result.failures["raises", 0]["reason"]
    assert "died" in result.failures["dies always", 0]["reason"]


def started(tmp_path: Path) -> subprocess.Popen[str]:
    """A run whose first side and seed is done, and whose two workers sleep over the others."""
    code = (
        "import signal\nfrom pathlib import Path\n"
        "from evidence_claims import make, sleepy\nfrom toreq.evidence import run\n"
        "if __name__ == '__main__':\n"
        # a shell starts what it puts into the background with interrupts ignored
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"    run([make(sleepy, ('ours',))], results=Path({str(tmp_path)!r}), jobs=2)\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.Popen(
        [sys.executable, str(script)], stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "X1-full.json").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    time.sleep(1)  # until the sleepers sleep
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_signal_stops_the_workers_and_keeps_what_is_done(tmp_path: Path, number: signal.Signals) -> None:
    process = started(tmp_path)
    process.send_signal(number)
    _, said = process.communicate(timeout=180)
    assert "stopped after 1 of 3 runs, which are kept" in said
    runs = json.loads((tmp_path / "X1-full.json").read_text())["runs"]
    assert [(r["side"], r["seed"]) for r in runs] == [(OURS, 0)]


@pytest.mark.skipif(not Path("/proc").exists(), reason="children are found in /proc")
def test_workers_end_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    process = started(tmp_path)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= 2
    process.kill()
    process.communicate(timeout=180)
    deadline = time.monotonic() + 60
    while any(alive(pid) for pid in children):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def alive(pid: str) -> bool:
    try:
        # an orphan that nobody has waited for is a zombie
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
