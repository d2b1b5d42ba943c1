"""`toreq evidence`: the list, the tables of a run, and the pages of the report."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from evidence_claims import BASE, OURS, Inline, make
from toreq.cli import main
from toreq.errors import WriteError
from toreq.evidence import Claim, Criterion, Outcome, Picture, Quantity, Trial, registry, report, run, runner
from toreq.evidence.pictures import picture, svg
from toreq.evidence.report import number, write_report


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> list[Claim]:
    """Claims that are all there is; jobs run in this process."""
    known: list[Claim] = []
    monkeypatch.setattr(registry, "claims", lambda system=None: list(known))
    monkeypatch.setattr(report, "claims", lambda system=None: list(known))
    monkeypatch.setattr(runner, "scheduler", lambda *_: Inline())
    return known


class Tags(HTMLParser):
    """Opened and closed tags, and what is fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "br", "link", "source", "path", "use"):
            self.open.append(tag)
        self.scripts += tag == "script"
        self.fetched += [v for k, v in attrs if k in ("src", "href", "srcset", "xlink:href") and v and v[0] != "#"]

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "use"):
            assert self.open.pop() == tag


def low(trial: Trial) -> Outcome:
    """Ours is below what is claimed, and still above the baseline."""
    return Outcome({"score": Quantity({OURS: 60.0, BASE: 50.0}[trial.side] + trial.seed, "%")})


def test_the_pages_show_every_claim_also_failed_stale_and_missing_ones(tmp_path: Path, registered: list[Claim]) -> None:
    good, bad, old = make(), make(low, id="X2"), make(id="X3")
    absent = make(id="X4", sentence="Nobody has looked.")
    run([good, bad, old], results=tmp_path / "r")
    registered += [good, bad, make(id="X3", version=2), absent]
    paths = write_report(tmp_path / "r", tmp_path / "out")
    assert all(path.exists() for path in paths)
    page, text = (tmp_path / "out" / "report.html").read_text(), (tmp_path / "out" / "index.md").read_text()
    for shown in (page, text):
        for word in ("✓ holds", "✗ fails", "↻ stale", "– not run", "about 85", "≥ 95", "What does hold: ahead"):
            assert word in shown, word
        assert "toreq evidence run X1 --budget full" in shown
        assert "toreq evidence run X4 --budget full" in shown
    assert "Ours &lt;scores&gt;." in page
    assert "<scores>" not in page
    parser = Tags()
    parser.feed(page)
    assert (parser.open, parser.fetched, parser.scripts) == ([], [], 0)
    # pictures: light and dark of each claim with curves, no identifier twice
    identifiers = re.findall(r'\bid="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))
    assert {p.name for p in paths} >= {"X1-light.svg", "X1-dark.svg"}
    assert "X1-dark.svg#only-dark" in text
    for row in (line for line in text.splitlines() if line.startswith("|")):
        assert row.replace("\\|", "").count("|") in {8, 10, 7}


def test_the_same_results_give_the_same_pages(tmp_path: Path, registered: list[Claim]) -> None:
    registered.append(make())
    run(registered, results=tmp_path / "r")
    pages = []
    for name in ("a", "b"):
        write_report(tmp_path / "r", tmp_path / name)
        pages.append({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()})
    assert pages[0] == pages[1]


def test_the_largest_fresh_budget_is_shown_and_the_others_named(tmp_path: Path, registered: list[Claim]) -> None:
    one = make()
    registered.append(one)
    for budget in ("smoke", "quick"):
        run([one], results=tmp_path, budget=budget)
    run([make(version=2)], results=tmp_path, budget="full")
    (entry,) = report.entries(tmp_path)
    assert entry.result is not None
    assert entry.result.budget == "quick"
    assert entry.others == {"smoke": "not settled", "full": "stale"}
    assert entry.verdict == "holds"


def test_a_claim_without_an_aim_has_none_to_reach(tmp_path: Path, registered: list[Claim]) -> None:
    aimless = Criterion("score", "score", "%", "at_least", OURS, target=1.0)
    registered.append(make(criteria=(aimless,)))
    run(registered, budget="full", results=tmp_path)
    (entry,) = report.entries(tmp_path)
    assert entry.verdict == "holds"
    assert entry.aim == "-"
    registered[0] = make(criteria=(replace(aimless, aim=1.0),))
    assert report.entries(tmp_path)[0].aim == "yes"


def test_a_page_that_cannot_be_written_is_said(tmp_path: Path, registered: list[Claim]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError):
        write_report(tmp_path, tmp_path / "file" / "out")


def outcomes() -> dict[tuple[str, int], Outcome]:
    return {
        (side, seed): Outcome(
            {"score": Quantity(value + seed / 10, "%"), "cosine, a": Quantity(1 - value / 1e6, "")},
            {"curve": [(0.1, value + seed), (1.0, value + 1), (10.0, None)]},
        )
        for side, value in ((OURS, 90.0), (BASE, 80.0))
        for seed in range(3)
    }


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(
    "spec",
    [
        Picture("T", curves=("curve",), log_x=True, log_y=True),
        Picture("T", metrics=("score",)),
        Picture("T", metrics=("cosine, a",), log_x=True, complement=True),
    ],
)
def test_pictures_hold_every_side(spec: Picture, theme: Any) -> None:
    criterion = Criterion("c", "score", "%", "at_least", OURS, target=85.0, aim=95.0)
    one = make(picture=spec, criteria=(criterion,))
    figure = picture(one, outcomes(), theme)
    assert figure is not None
    text = svg(figure, "X1-light")
    root = ElementTree.fromstring(text)
    said = " ".join("".join(t.itertext()) for t in root.iter("{http://www.w3.org/2000/svg}text"))
    assert OURS in said
    assert BASE in said
    if "score" in spec.metrics:
        assert "aim: 95" in said
        assert "the seed's number: 85" in said
    assert root.get("width") is None  # the page sets it
    assert root.get("viewBox")


def test_nothing_is_drawn_of_nothing() -> None:
    assert picture(make(), {}, "light") is None
    assert picture(make(picture=Picture("T", metrics=("other",))), outcomes(), "light") is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.0, "0"),
        (0.99997, "0.99997"),
        (0.99999999, "1 - 1.0e-08"),
        (1.0, "1"),
        (98.2345, "98.23"),
        (3.84e-14, "3.84e-14"),
        (-0.05, "-0.05"),
    ],
)
def test_numbers_are_not_rounded_into_what_they_are_not(value: float | None, text: str) -> None:
    assert number(value) == text


def test_the_command_lists_runs_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = ["--results", str(tmp_path / "r")]
    assert main(["evidence", "list", *results]) == 0
    said = capsys.readouterr().out
    assert "B6" in said
    assert "not run" in said
    assert main(["evidence", "run", "B4", "--budget", "smoke", "--jobs", "1", *results]) == 0
    said = capsys.readouterr().out
    assert "B4 anderson, seed 0" in said
    assert "(5 of 5)" in said
    assert "the smoke budget only shows that the protocol runs" in said
    assert main(["evidence", "report", "--out", str(tmp_path / "out"), *results]) == 0
    assert "report.html" in capsys.readouterr().out
    assert "heavy ball" in (tmp_path / "out" / "B4-light.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "B0"], "expected the id of a claim, got 'B0'"),
        (["run", "B1", "--budget", "fulll"], "did you mean 'full'"),
        (["run", "B1", "--scheduler", "slurm"], "expected a scheduler"),
        (["walk"], ""),
    ],
)
def test_bad_usage(arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--results", str(tmp_path)] if arguments[0] == "run" else []
    assert main(["evidence", *arguments, *where]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
