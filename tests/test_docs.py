"""The README and the docs hold: their code runs, their commands parse, their tables are what the scripts give."""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro

from toreq import systems, training
from toreq.cli import demo, evaluate, inspect, sample, train, tune
from toreq.cli import systems as listing
from toreq.cli.parsing import expand_set
from toreq.errors import ToreqError
from toreq.evidence.registry import claims

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(path for path in DOCS.rglob("*.md") if "dev" not in path.relative_to(DOCS).parts)]

sys.path.insert(0, str(ROOT / "scripts"))
import docs_text  # noqa: E402
import matrix  # noqa: E402
import results  # noqa: E402

_FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
_SNIPPET = re.compile(r'^--8<-- "([^":]+):(\w+)"\n', re.MULTILINE)


def expanded(text: str) -> str:
    """The text with named sections of other files put in, as pymdownx.snippets does."""

    def section(match: re.Match[str]) -> str:
        source = (ROOT / match[1]).read_text()
        return source.split(f"# --8<-- [start:{match[2]}]\n")[1].split(f"# --8<-- [end:{match[2]}]")[0]

    return _SNIPPET.sub(section, text)


def code_blocks(page: Path) -> list[str]:
    return [expanded(block) for block in _FENCE.findall(page.read_text())]


WITH_CODE = [page for page in PAGES if code_blocks(page)]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_there_is_code_to_run() -> None:
    assert {"README.md", "docs/quickstart.md", "docs/new-energy.md", "docs/papers.md"} <= set(map(name, WITH_CODE))


@pytest.mark.parametrize("page", WITH_CODE, ids=name)
def test_the_code_of_a_page_runs(page: Path) -> None:
    torch.manual_seed(0)
    space: dict[str, Any] = {"__name__": "__docs__"}
    for i, block in enumerate(code_blocks(page)):
        exec(compile(block, f"{name(page)}, block {i + 1}", "exec"), space)


@pytest.mark.parametrize("path", list(matrix.bodies()), ids=name)
def test_tables_of_the_code_are_current(path: Path) -> None:
    text = path.read_text()
    for marker, body in matrix.bodies()[path].items():
        assert results.replace_between(text, marker, body) == text, "run: python scripts/matrix.py"


def test_the_results_are_those_of_the_summaries() -> None:
    text = (DOCS / "results.md").read_text()
    runs = results.load()
    assert results.replace_between(text, results.NAME, results.body(runs)) == text, "run: python scripts/results.py"
    assert (results.EMPTY in text) == (not runs)


def test_the_claims_in_the_readme_are_those_of_their_files() -> None:
    text = (ROOT / "README.md").read_text()
    body = results.claims_body()
    assert results.replace_between(text, results.CLAIMS, body) == text, "run: python scripts/results.py"
    for one in claims():
        assert f"| {one.id} | {one.sentence} |" in body


def test_a_claim_without_results_is_shown_as_not_run(tmp_path: Path) -> None:
    rows = results.claims_body(tmp_path).splitlines()[2:]
    assert len(rows) == len(claims())
    assert all("**not run**" in row for row in rows)


def test_the_benchmarks_are_those_of_their_files() -> None:
    text = (DOCS / "performance.md").read_text()
    body = results.bench_body(results.load_benches())
    assert results.replace_between(text, results.BENCHES, body) == text, "run: python scripts/results.py"


def test_a_benchmark_is_shown_with_its_ratios_and_rows() -> None:
    ratio = {"name": "a / b", "value": 3.14159, "target": None, "holds": None}
    rows = [{"side": "a", "step_median_ms": 2.0}]
    text = results.bench_body([{"bench": "epoch", "environment": {"torch": "2"}, "ratios": [ratio], "rows": rows}])
    assert "### epoch" in text
    assert "| a / b | 3.14 | - | - |" in text
    assert "| side | step median ms |" in text


def links() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        prose = re.sub(r"```.*?```|`[^`\n]*`|\\\(.*?\\\)", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", prose):
            if "://" not in target and not target.startswith("#"):
                yield name(page), target.split("#")[0]


@pytest.mark.parametrize(("page", "target"), sorted(set(links())))
def test_links_lead_somewhere(page: str, target: str) -> None:
    assert ((ROOT / page).parent / target).exists()


def test_the_menu_has_every_page() -> None:
    menu = (ROOT / "mkdocs.yml").read_text().split("\nnav:")[1].split("\nplugins:")[0]
    listed = re.findall(r"[\w/-]+\.md", menu)
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in PAGES[1:])


def test_pictures_are_small() -> None:
    pictures = list((DOCS / "images").glob("*.png"))
    assert pictures
    assert all(1_000 < path.stat().st_size < 200_000 for path in pictures)


COMMANDS: dict[str, Any] = {
    "systems": listing.Systems,
    "train": train.Train,
    "tune": tune.Tune,
    "eval": evaluate.Eval,
    "show": inspect.Show,
    "sample": sample.Sample,
    "check": inspect.Check,
    "doctor": inspect.Doctor,
    "demo": demo.Demo,
}


def parsed(words: list[str]) -> Any:
    """What `toreq WORDS` would run."""
    return tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="toreq", args=expand_set(words))


def commands() -> Iterator[str]:
    for page in PAGES:
        for line in re.findall(rf"^(?:    )?(toreq (?:{'|'.join(COMMANDS)}) .*)$", page.read_text(), re.MULTILINE):
            if "..." not in line:
                yield line


@pytest.mark.parametrize("line", sorted(set(commands())))
def test_commands_parse(line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    if words[-1] == "--help":
        assert words[0] in COMMANDS
        return
    command = parsed(words)
    if isinstance(command, train.Train) and command.resume is None:
        config = command._config()
        shape = (3, 32, 32) if config.data == "cifar10" else (1, 28, 28)
        training.build(config, shape, 10)  # every name given to --set is legal


def summary(seed: int = 0, accuracy: float = 0.98, **changes: Any) -> dict[str, Any]:
    """A made-up summary of a run with a few settings off its recipe."""
    options = {"arch": "hopfield", "hidden": (64, 32), "estimator.beta": 0.005}
    fields = {"epochs": 3, "learning_rate": 5e-4, "shift": 1, "gradient_clip": 1.0, "seed": seed, "out": "runs/x"}
    config = training.config_for("toreqprop", options, **fields, side=changes.pop("side", "eqprop"))
    return {
        "system": "toreqprop",
        "side": config.side,
        "options": options,
        "data": "mnist",
        "seed": seed,
        "epochs": 3,
        "train_examples": 60_000,
        "parameters": 12_345,
        "test_accuracy": accuracy,
        "couplings_off_accuracy": 0.5,
        "seconds_per_epoch": 2.0,
        "free_steps_mean": 6.0,
        "nudged_steps_mean": None,
        "converged_fraction": 1.0,
        "asym_mean": 0.02,
        "radius": 0.5,
        "config": config.to_json(),
        "environment": {"processor": "P", "threads": 1, "versions": {"torch": "2"}},
        **changes,
    }


def test_runs_that_differ_in_their_seed_share_a_row() -> None:
    runs = [summary(2, 0.97), summary(0, 0.98), summary(1, 0.99), summary(0, 0.9, side="bp-ff")]
    text = results.body([json.loads(json.dumps(run)) for run in runs])
    rows = [line for line in text.splitlines() if line.startswith("| toreqprop")]
    half = 4.302652729696142 * 1.0 / math.sqrt(3)  # Student's t with two degrees of freedom, deviation of one point
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[:5] for row in cells] == [
        ["toreqprop hopfield", "eqprop", f"98.00 ± {half:.2f}", "50.0", "3"],
        ["toreqprop hopfield", "bp-ff", "90.00", "50.0", "1"],
    ]
    assert cells[0][9] == "-"  # nothing is made of a value that is missing


def test_a_row_names_the_command_that_makes_it() -> None:
    run = json.loads(json.dumps(summary(1)))
    words = shlex.split(results.command(run))
    assert words[:3] == ["toreq", "train", "toreqprop"]
    again = parsed(words[1:])._config()
    given = training.TrainConfig.from_json(run["config"])
    local = {"out", "set"}
    assert {k: v for k, v in again.to_json().items() if k not in local} == {
        k: v for k, v in given.to_json().items() if k not in local
    }
    assert json.loads(json.dumps(again.set)) == run["config"]["set"]
    assert "runs/x" not in words


def test_a_setting_without_a_flag_is_not_left_out() -> None:
    run = summary()
    run["config"]["momentum"] = 0.5
    with pytest.raises(ToreqError, match="momentum"):
        results.command(run)


def test_markers_must_be_there() -> None:
    with pytest.raises(ToreqError, match="markers"):
        results.replace_between("no markers", "results", "x")
    text = "a\n<!-- begin results -->\nold\n<!-- end results -->\nb"
    new = results.replace_between(text, "results", "new")
    assert "old" not in new
    assert new.startswith("a\n")
    assert new.endswith("\nb")
    assert results.replace_between(new, "results", "new") == new


def test_mathematics_of_docstrings_becomes_markdown() -> None:
    text = "A :math:`x\n  y` of :class:`~toreq.core.Energy`.\n\n.. math:: a = b,\n          \\quad c\n\nNext."
    assert docs_text.to_markdown(text) == "A \\(x y\\) of `core.Energy`.\n\n\n\\[a = b, \\quad c\\]\n\n\nNext."


def test_every_system_is_described() -> None:
    text = (DOCS / "systems.md").read_text()
    for system in systems.names():
        assert f"\n## {system}\n" in text
        for arch in systems.architectures(system):
            assert f"\n### {arch}: " in text
