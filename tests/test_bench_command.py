"""`toreq bench`: the tables, the files it leaves, and how it refuses what it cannot do."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

from toreq.bench import registry, timing
from toreq.bench.plots import DRAW
from toreq.cli import main
from toreq.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import results  # noqa: E402

SETTLING = ["bench", "settling", "--set", "seeds=(0,)", "radii=(0.5,)", "tolerances=(1e-2,)", "width=8", "batch=4"]


def quiet() -> Console:
    return Console(file=io.StringIO(), width=120)


def fake(monkeypatch: pytest.MonkeyPatch, name: str, outcome: Any, calls: list[Any] | None = None) -> None:
    """Replace one bench by a function that notes its thread counts and gives (or raises) ``outcome``."""

    def run(threads: tuple[int, ...] = (1, 2), depth: int = 3) -> dict[str, Any]:
        if calls is not None:
            calls.append((name, threads, depth))
        if isinstance(outcome, BaseException):
            raise outcome
        return {"bench": name, "environment": {}, "rows": [{"n": outcome}], "ratios": []}

    module = SimpleNamespace(run=run)
    monkeypatch.setitem(registry.MODULES, name, f"{name}_fake")
    monkeypatch.setitem(sys.modules, f"toreq.bench.{name}_fake", module)


def test_the_command_prints_its_tables_and_writes_numbers_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "deep" / "bench.json"
    assert main([*SETTLING, "--json", str(file), "--plots", str(tmp_path / "plots")]) == 0
    assert "settling: rows" in capsys.readouterr().out
    (result,) = json.loads(file.read_text())["results"]
    assert set(result) >= {"bench", "environment", "rows", "ratios", "options", "seconds"}
    assert result["options"]["width"] == 8
    assert all(row["steps"] > 0 for row in result["rows"])
    with Image.open(tmp_path / "plots" / "settling.png") as picture:
        assert picture.width > 500
        assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_a_command_from_the_docs_makes_the_same_run(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    assert main([*SETTLING, "--json", str(file)]) == 0
    (result,) = json.loads(file.read_text())["results"]
    words = results.shlex.split(results.bench_command(result))
    words[words.index("--json") + 1] = str(tmp_path / "again.json")
    assert main(words[1:]) == 0
    (again,) = json.loads((tmp_path / "again.json").read_text())["results"]
    assert again["rows"] == result["rows"]


def test_an_unknown_bench_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "rooflin"]) == 2
    assert "did you mean 'roofline'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["settling", "--set", "raddii=1"], "did you mean 'radii'?"),
        (["settling", "--set", "radii"], "key=value"),
        (["settling", "systems", "--set", "radii=1"], "one benchmark"),
        (["settling", "--threads", "0"], "at least 1"),
    ],
)
def test_bad_arguments_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_file_of_something_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.json"
    file.write_text('{"mine": 1}')
    assert main([*SETTLING, "--json", str(file)]) == 2
    assert file.read_text() == '{"mine": 1}'
    assert "choose another file" in capsys.readouterr().err


def test_the_module_is_the_command() -> None:
    words = [sys.executable, "-m", "toreq.bench", "rooflin"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2
    assert "did you mean 'roofline'?" in done.stderr


def test_benches_run_in_order_with_the_threads_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    for name in registry.names():
        fake(monkeypatch, name, 1, calls)
    registry.run_benches([], quiet(), threads=[1])
    assert [name for name, _, _ in calls] == [
        "epoch", "gradients", "overhead", "roofline", "memory", "settling", "systems", "compiled", "scaling",
        "profile", "time-to-accuracy",
    ]  # fmt: skip
    assert {threads for _, threads, _ in calls} == {(1,)}
    calls.clear()
    registry.run_benches(["overhead"], quiet(), chosen={"depth": 5})
    assert calls == [("overhead", (1, 2), 5)]


def test_an_interruption_loses_only_the_bench_it_hits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    fake(monkeypatch, "overhead", 1)
    fake(monkeypatch, "memory", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        registry.run_benches(["overhead", "memory"], quiet(), json_path=file)
    assert [r["bench"] for r in json.loads(file.read_text())["results"]] == ["overhead"]
    fake(monkeypatch, "memory", 2)
    registry.run_benches(["memory"], quiet(), json_path=file)
    assert [r["rows"] for r in json.loads(file.read_text())["results"]] == [[{"n": 1}], [{"n": 2}]]


def test_every_bench_can_be_found_and_has_a_picture() -> None:
    assert list(DRAW) == registry.names()
    for name in ("epoch", "overhead", "roofline", "compiled", "scaling"):
        assert registry.options(name)["threads"] == (1, 2)
    with pytest.raises(ConfigError, match="did you mean 'memory'"):
        registry.find("memori")


def test_interleaved_takes_turns_and_counts_what_it_should() -> None:
    order: list[str] = []
    sides = {"a": lambda: order.append("a"), "b": lambda: (order.append("b"), time.sleep(0.003))}
    found = timing.interleaved(sides, repetitions=4, warmup=1)
    assert order == ["a", "b"] * 5
    assert found["b"].minimum >= 0.003 > found["a"].median
    assert found["b"].cpu < 0.003  # sleeping is no work
    for side in found.values():
        assert side.minimum <= side.lower <= side.median <= side.upper


def test_quartiles_are_those_of_the_repetitions() -> None:
    summary = timing.Timing.of([5.0, 1.0, 2.0, 4.0, 3.0], [1.0, 9.0, 2.0, 2.0, 2.0])
    assert (summary.minimum, summary.lower, summary.median, summary.upper, summary.cpu) == (1, 2, 3, 4, 2)


def test_thread_counts_are_put_back_and_subnormals_flushed() -> None:
    before = torch.get_num_threads()

    def fails() -> None:
        with timing.threads(before + 1):
            assert torch.get_num_threads() == before + 1
            assert timing.denormals_flushed() == torch.set_flush_denormal(True)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fails()
    assert torch.get_num_threads() == before


def test_the_environment_names_no_place() -> None:
    text = json.dumps(timing.environment())
    assert str(ROOT) not in text
    assert __import__("platform").node() not in text
    assert {"torch", "capability", "denormals_flushed", "commit", "threads_available"} <= set(json.loads(text))


@pytest.mark.parametrize(
    ("value", "target", "at_most", "holds"),
    [(1.1, 1.15, True, True), (1.2, 1.15, True, False), (0.6, 0.6, False, True), (None, 1.0, True, False)],
)
def test_a_verdict_is_computed(value: float | None, target: float, at_most: bool, holds: bool) -> None:
    assert timing.ratio("x", value, target, at_most)["holds"] is holds
    assert timing.ratio("x", value, None)["holds"] is None


def test_misses_are_shown_plainly() -> None:
    ratios = [timing.ratio("a / b", 3.0, 2.0), timing.ratio("c / d", 1.0, 2.0), timing.ratio("e / f", 1.0, None)]
    text = results.bench_body([{"bench": "x", "environment": {}, "ratios": ratios, "rows": [{"n": 1}]}])
    assert "2 ratios have a target; 1 hold and 1 are missed" in text
    assert "| a / b | 3 | 2 | missed |" in text
    assert "| c / d | 1 | 2 | holds |" in text
    assert "| e / f | 1 | - | - |" in text


def test_a_bench_file_holds_its_own_bench(tmp_path: Path) -> None:
    (tmp_path / "overhead.json").write_text('{"results": [{"bench": "memory"}]}')
    with pytest.raises(results.ToreqError, match="overhead"):
        results.load_benches(tmp_path)


def test_the_command_stands_beside_its_numbers_and_not_beside_older_ones() -> None:
    bench = {"bench": "overhead", "environment": {}, "ratios": [], "rows": [{"n": 1}]}
    command = "toreq bench overhead --threads 1 --set 'batches=(16, 64)' --json evidence/results/bench/overhead.json"
    options = {"threads": [1], "batches": [16, 64]}
    assert command in results.bench_body([{**bench, "options": options}])
    assert "toreq bench" not in results.bench_body([bench])
