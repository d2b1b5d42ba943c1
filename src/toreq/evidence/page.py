"""The report as one self-contained HTML page, and as a Markdown page with its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from toreq.diagnostics import html
from toreq.diagnostics.plots import Theme
from toreq.evidence.pictures import picture, svg
from toreq.evidence.report import (
    GIVEN,
    TUNED,
    Entry,
    baselines,
    between,
    given,
    judged,
    ours,
    target,
    tuned,
    tuning_notes,
    verdict,
)
from toreq.io import atomic_write_text

TITLE = "Evidence"
LEAD = (
    "Each claim, the number it stands for, and what was measured. Verdicts are computed from 95% intervals over seeds, "
    "never typed; a claim that fails stays here as failed, with the part of it that does hold."
)
MARKS = {"holds": "✓", "fails": "✗", "not settled": "?", "stale": "↻", "not run": "–"}
AIMS = {"holds": "yes", "fails": "no", "not settled": "not settled"}
TUNING = "Every side was tuned by the same search before it was run, on held-out training data:"
THEMES: tuple[Theme, ...] = ("light", "dark")
STYLE = """<style>
table.cards td.text, table.cards th { white-space: normal; }
table.cards td { vertical-align: top; }
.verdict { font-weight: 600; } .holds { color: var(--good); } .fails { color: var(--bad); }
:root { --good: #006b4b; --bad: #a3341a; }
figure.plot { padding: .6rem .4rem 0; max-width: 34rem; margin: 1rem 0; }
figure.plot svg { display: block; width: 100%; height: auto; font-family: inherit; }
figure.plot .dark { display: none; }
details { margin: .8rem 0; } summary { cursor: pointer; }
section { border-top: 1px solid var(--line); margin-top: 2.2rem; }
@media (prefers-color-scheme: dark) {
  :root { --good: #2fc79a; --bad: #ff9575; }
  figure.plot .dark { display: block; } figure.plot .light { display: none; }
}
@media (max-width: 40rem) {
  table.cards td.text:not(:first-child) { text-align: right; }
  table.cards td::before { flex: none; text-align: left; }
  table.cards td:first-child { display: block; }
}
</style>"""
SUMMARY = ("id", "claim", "verdict", "aim reached", "criteria that hold", "budget", "seeds")
CRITERIA = (
    "criterion",
    "seed's target",
    "aim",
    "baselines",
    "ours",
    "judged",
    "95% interval",
    "verdict",
    "aim reached",
)


def write(entries: Sequence[Entry], out: Path) -> list[Path]:
    """Write the pages and pictures into ``out`` and return their paths."""
    drawn: dict[str, dict[Theme, str]] = {}
    for entry in entries:
        for theme in THEMES:
            figure = None if entry.result is None else picture(entry.claim, entry.result.outcomes, theme)
            if figure is not None:
                drawn.setdefault(entry.claim.id, {})[theme] = svg(figure, f"{entry.claim.id}-{theme}")
    written = []
    for name, images in drawn.items():
        for theme, text in images.items():
            path = out / f"{name}-{theme}.svg"
            atomic_write_text(path, _standalone(text))
            written.append(path)
    for name, text in (("report.html", as_html(entries, drawn)), ("index.md", as_markdown(entries, drawn))):
        atomic_write_text(out / name, text)
        written.append(out / name)
    return written


def _standalone(text: str) -> str:
    return text if "xmlns=" in text else text.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)


def _summary(entry: Entry) -> list[str]:
    found = [] if entry.judgement is None else [f for f in entry.judgement.findings if not f.condition]
    hold = "-" if not found else f"{sum(f.verdict == 'holds' for f in found)} of {len(found)}"
    return [
        entry.claim.id,
        entry.claim.sentence,
        f"{MARKS[entry.verdict]} {entry.verdict}",
        entry.aim,
        hold,
        "-" if entry.result is None else entry.result.budget,
        f"{entry.seeds} of {entry.claim.seeds}",
    ]


def _criteria(entry: Entry) -> list[list[str]]:
    if entry.judgement is None:
        return [
            [c.name, "condition" if c.condition else target(c), c.describe(c.aim), "-", "-", "-", "-", "not run", "-"]
            for c in entry.claim.criteria
        ]
    return [
        [
            f"{f.name} ({f.unit})" if f.unit else f.name,
            "condition" if f.condition else target(c),
            c.describe(c.aim),
            baselines(f),
            ours(f),
            judged(f),
            between(f),
            verdict(f),
            "-" if f.condition or f.aim_verdict is None else AIMS[f.aim_verdict],
        ]
        for c, f in zip(entry.claim.criteria, entry.judgement.findings, strict=True)
    ]


def _remarks(entry: Entry) -> list[str]:
    """What a reader must know before trusting the numbers."""
    said = []
    if entry.stale:
        said.append("Stale: the protocol has changed since these runs; they are judged by the present criteria.")
    if entry.judgement is not None:
        said += [f"Not settled: {reason}." for reason in entry.judgement.reasons]
        if entry.judgement.verdict == "fails" and entry.judgement.holding:
            said.append(f"What does hold: {'; '.join(entry.judgement.holding)}.")
    if entry.result is not None:
        for (side, seed), why in sorted(entry.result.failures.items()):
            said.append(f"Failed to run: {side}, seed {seed}: {why['reason']}.")
        said += [f"Note: {note}." for note in tuning_notes(entry.result)]
        notes = [note for outcome in entry.result.outcomes.values() for note in outcome.notes]
        said += [f"Note: {note}." for note in dict.fromkeys(n.rstrip(".") for n in notes)]
    said += [f"At the {name} budget: {text}." for name, text in entry.others.items()]
    return said


def _made(entry: Entry) -> str:
    """Where, from what and in how long the numbers were made."""
    if entry.result is None:
        return ""
    made = entry.result.environment
    parts = [
        f"commit {entry.result.commit}" if entry.result.commit else "",
        str(made.get("processor", "")),
        f"torch {made['versions']['torch']}" if "versions" in made else "",
        f"{entry.result.seconds:.0f} s in all, one run after the other",
    ]
    return ", ".join(part for part in parts if part)


def as_html(entries: Sequence[Entry], drawn: dict[str, dict[Theme, str]]) -> str:
    """The self-contained page: nothing is fetched, no script runs."""
    body = [STYLE, f"<h1>{TITLE}</h1>", f"<p>{escape(LEAD)}</p>"]
    body.append(html.table(SUMMARY, [_summary(entry) for entry in entries], text=(0, 1)))
    for entry in entries:
        name = entry.claim.id
        body.append(f'<section id="{name}"><h2>{escape(name)}: {escape(entry.claim.sentence)}</h2>')
        kind = entry.verdict if entry.verdict in ("holds", "fails") else "soft"
        aim_ = "" if entry.aim == "-" else f"; aim reached: {entry.aim}"
        body.append(
            f'<p><span class="verdict {kind}">{MARKS[entry.verdict]} {escape(entry.verdict)}</span>{escape(aim_)}</p>'
        )
        body += [f'<p class="soft">{escape(line)}</p>' for line in _remarks(entry)]
        if name in drawn:
            images = "".join(f'<div class="{theme}">{text}</div>' for theme, text in drawn[name].items())
            caption = escape(
                f"{entry.claim.picture.title}. Mean over seeds, with 95% intervals where there are several."
            )
            body.append(f'<figure class="plot" role="img">{images}<figcaption>{caption}</figcaption></figure>')
        body.append(html.table(CRITERIA, _criteria(entry), text=(0, 1, 3, 7)))
        body.append(html.commands([entry.command]))
        protocol = " ".join(entry.claim.protocol.split())
        body.append(f"<details><summary>Protocol, sides and what each was given</summary><p>{escape(protocol)}</p>")
        if entry.result is not None:
            body.append(html.table(GIVEN, given(entry.claim, entry.result), text=(0, 1)))
            if entry.claim.tuning is not None:
                body.append(f"<p>{escape(TUNING)}</p>")
                body.append(html.table(TUNED, tuned(entry.claim, entry.result), text=(0, 1, 2, 4)))
        body.append(f'<p class="soft">{escape(_made(entry))}</p></details></section>')
    return html.page(TITLE, body)


def as_markdown(entries: Sequence[Entry], drawn: dict[str, dict[Theme, str]]) -> str:
    """The page of the docs, with the pictures beside it."""
    lines = [f"# {TITLE}", "", LEAD, ""]
    lines += ["Written by `toreq evidence report` from `evidence/results`; [all of it in one file](report.html).", ""]
    lines += _table(SUMMARY, [_summary(entry) for entry in entries])
    for entry in entries:
        lines += ["", f"## {entry.claim.id}: {entry.claim.sentence}", ""]
        lines += [f"**{entry.verdict}**" + ("" if entry.aim == "-" else f"; aim reached: {entry.aim}"), ""]
        lines += [f"* {_plain(line)}" for line in _remarks(entry)] + [""]
        for theme in drawn.get(entry.claim.id, {}):
            # the site shows the one that fits the reader's scheme
            lines.append(f"![{_plain(entry.claim.picture.title)}]({entry.claim.id}-{theme}.svg#only-{theme})")
        lines += ["", *_table(CRITERIA, _criteria(entry)), "", f"    {entry.command}", ""]
        lines += [_plain(" ".join(entry.claim.protocol.split())), ""]
        if entry.result is not None:
            lines += [*_table(GIVEN, given(entry.claim, entry.result)), ""]
            if entry.claim.tuning is not None:
                lines += [TUNING, "", *_table(TUNED, tuned(entry.claim, entry.result)), ""]
            lines += [f"Made with {_plain(_made(entry))}.", ""]
    return "\n".join(lines).rstrip() + "\n"


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    head = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    return head + [f"| {' | '.join(_plain(cell) for cell in row)} |" for row in rows]
