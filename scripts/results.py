"""Write the tables of README.md, docs/results.md and docs/performance.md from evidence/results.

    python scripts/results.py            rewrite the tables and draw the benches' pictures
    python scripts/results.py --check    exit 1 if a table is not what the files give

In evidence/results/foundation a file is the summary.json of a run by `toreq train`; in evidence/results/bench it is
what `toreq bench NAME --json FILE` wrote; the files beside these folders are what `toreq evidence run` wrote. Runs that
differ in their seed alone share a row. Nothing in the tables is typed: numbers, settings, machine and commands all come
from the files.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from toreq import systems, training
from toreq.bench.registry import cell, columns, names, verdict
from toreq.errors import ToreqError
from toreq.evidence import report as evidence
from toreq.evidence.verdicts import Judgement

ROOT = Path(__file__).resolve().parent.parent
SUMMARIES = ROOT / "evidence" / "results" / "foundation"
BENCH_FILES = ROOT / "evidence" / "results" / "bench"
PICTURES = ROOT / "docs" / "assets" / "bench"
NAME = "results"
BENCHES = "benches"
CLAIMS = "claims"
EVIDENCE = ROOT / "evidence" / "results"
EMPTY = "No runs are committed yet."
NO_BENCHES = "No benchmarks are committed yet."
SIDES = ("eqprop", "bp-eq", "bp-ff")
# what belongs to the place a run was made rather than to the run
LOCAL = ("out", "checkpoint_every", "device", "threads", "system", "set", "side", "seed", "epochs")
FLAGS = {"learning_rate": "lr"}
UNREACHABLE = ("momentum", "final_learning_rate")

Run = Mapping[str, Any]


def replace_between(text: str, name: str, body: str, where: str = "text") -> str:
    """Return ``text`` with ``body`` between its markers ``<!-- begin NAME -->`` and ``<!-- end NAME -->``."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ToreqError(f"{where}: expected the markers {begin} and {end} once and in this order; put them in")
    head, rest = text.split(begin)
    return f"{head}{begin}\n\n{body.strip()}\n\n{end}{rest.split(end)[1]}"


def rewrite(bodies: Mapping[Path, Mapping[str, str]], check: bool) -> int:
    """Put each body between its markers in each file; with ``check`` only say which files differ. 1 if any does."""
    stale = []
    for path, parts in bodies.items():
        text = new = path.read_text(encoding="utf-8")
        for name, body in parts.items():
            new = replace_between(new, name, body, str(path))
        if new != text:
            stale.append(path)
            if not check:
                path.write_text(new, encoding="utf-8")
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'is out of date' if check else 'rewritten'}")
    return int(check and bool(stale))


def load(folder: Path = SUMMARIES) -> list[Run]:
    """The summaries in ``folder``, sorted by file name."""
    return [_read(path) for path in sorted(folder.glob("*.json"))]


def load_benches(folder: Path = BENCH_FILES) -> list[Run]:
    """The benchmarks in ``folder``, one file ``NAME.json`` each, in the order in which they run."""
    found = []
    for path in sorted(folder.glob("*.json"), key=lambda path: _place(path.stem)):
        results = _read(path)["results"]
        if [result["bench"] for result in results] != [path.stem]:
            raise ToreqError(f"{path.name}: expected the results of {path.stem!r} alone, got others; run it again")
        found += results
    return found


def _place(bench: str) -> tuple[int, str]:
    return (names().index(bench) if bench in names() else len(names()), bench)


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def command(run: Run) -> str:
    """The command that makes this run anew: what differs from the system's recipe, spelled out."""
    config, options = run["config"], dict(run["options"])
    recipe = training.config_for(run["system"], options).to_json()
    words = ["toreq", "train", str(run["system"])]
    for key, value in options.items():
        words += ["--set", f"{key}={value}"]
    for name, value in config.items():
        if name in LOCAL or value == recipe[name]:
            continue
        if name in UNREACHABLE or value is None:
            raise ToreqError(f"results: expected settings that `toreq train` can be given, got {name}={value!r}")
        words += [f"--{FLAGS.get(name, name).replace('_', '-')}", *([] if value is True else [str(value)])]
    words += ["--epochs", str(config["epochs"]), "--side", str(run["side"]), "--seed", str(run["seed"])]
    return shlex.join(words)


def arch(run: Run) -> str:
    """The architecture of a run."""
    return str(run["options"].get("arch", systems.architectures(run["system"])[0]))


def groups(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that differ in their seed alone, in the order of the systems, architectures and sides."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        settings = {name: value for name, value in run["config"].items() if name not in LOCAL}
        key = [run["system"], run["options"], run["side"], run["epochs"], run["train_examples"], settings]
        found.setdefault(json.dumps(key, sort_keys=True), []).append(run)

    def order(group: list[Run]) -> tuple[int, int, str, int]:
        run = group[0]
        kinds = systems.architectures(run["system"])
        return systems.names().index(run["system"]), kinds.index(arch(run)), run["data"], SIDES.index(run["side"])

    return sorted((sorted(group, key=lambda run: run["seed"]) for group in found.values()), key=order)


def interval(values: Sequence[float]) -> float | None:
    """Half the 95% t interval of the mean; None for a single value."""
    n = len(values)
    if n < 2:
        return None
    mean = math.fsum(values) / n
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    return float(stats.t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)


def number(group: Sequence[Run], key: str, digits: int, scale: float = 1.0, spread: bool = False) -> str:
    """The mean of a value over a group, with its interval if asked; a dash where no run has it."""
    values = [scale * run[key] for run in group if run.get(key) is not None]
    if not values:
        return "-"
    text = f"{math.fsum(values) / len(values):.{digits}f}"
    half = interval(values) if spread else None
    return text if half is None else f"{text} ± {half:.{digits}f}"


COLUMNS = (
    "network",
    "side",
    "test accuracy, %",
    "couplings off, %",
    "seeds",
    "epochs",
    "parameters",
    "s/epoch",
    "free steps",
    "nudged steps",
    "settled, %",
    "asym",
    "radius",
)


def row(group: Sequence[Run]) -> list[str]:
    """One row of the table."""
    run = group[0]
    return [
        f"{run['system']} {arch(run)}" + ("" if run["data"] == "mnist" else f", {run['data']}"),
        str(run["side"]),
        number(group, "test_accuracy", 2, 100, spread=True),
        number(group, "couplings_off_accuracy", 1, 100),
        str(len(group)),
        str(run["epochs"]),
        f"{run['parameters']:,}",
        number(group, "seconds_per_epoch", 1),
        number(group, "free_steps_mean", 1),
        number(group, "nudged_steps_mean", 1),
        number(group, "converged_fraction", 2, 100),
        number(group, "asym_mean", 3),
        number(group, "radius", 2),
    ]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; every column but the first two is right-aligned."""
    rule = ["---" if i < 2 else "--:" for i in range(len(columns))]
    return "\n".join("| " + " | ".join(line) + " |" for line in [columns, rule, *rows])


def machines(runs: Sequence[Run]) -> str:
    """What the runs were made on."""
    found = {
        f"{e['processor']}, {e['threads']} {'thread' if e['threads'] == 1 else 'threads'}, torch "
        f"{e['versions']['torch']}"
        for e in (run["environment"] for run in runs)
    }
    return "; ".join(sorted(found))


def body(runs: Sequence[Run]) -> str:
    """The table, what it was measured on, and the command of each row."""
    if not runs:
        return EMPTY
    grouped = groups(runs)
    return "\n\n".join(
        [
            table(COLUMNS, [row(group) for group in grouped]),
            f"Measured on {machines(runs)}. Mean over the seeds, ± half of the 95% t interval. `eqprop`: the system's "
            "own estimator; `bp-eq`: the implicit gradient of the same network; `bp-ff`: backprop of the feed-forward "
            "twin of the same widths. Steps, settled, asym and radius are those of the last epoch.",
            "The command of each row (of its first seed):",
            "```sh\n" + "\n".join(command(group[0]) for group in grouped) + "\n```",
        ]
    )


def claims_body(results: Path = EVIDENCE) -> str:
    """One row for each claim: what it says, what became of it, and how much was run for that."""
    rows = []
    for entry in evidence.entries(results):
        result = entry.result
        run = "-" if result is None else f"{result.budget}, {entry.seeds} {'seed' if entry.seeds == 1 else 'seeds'}"
        held = "-" if entry.judgement is None else _held(entry.judgement)
        rows.append([entry.claim.id, entry.claim.sentence, f"**{entry.verdict}**", held, entry.aim, run])
    return table(("claim", "what it says", "verdict", "criteria that hold", "aim reached", "run"), rows)


def _held(judgement: Judgement) -> str:
    claimed = [finding for finding in judgement.findings if not finding.condition]
    return f"{len(judgement.holding)} of {len(claimed)}"


def bench_command(bench: Run) -> str:
    """The command that makes a benchmark's file anew."""
    words = ["toreq", "bench", str(bench["bench"])]
    for key, value in bench.get("options", {}).items():
        value = tuple(value) if isinstance(value, list) else value
        if key == "threads":
            words += ["--threads", *map(str, value)]
        else:
            words += ["--set", f"{key}={value}"]
    return shlex.join([*words, "--json", f"{BENCH_FILES.relative_to(ROOT).as_posix()}/{bench['bench']}.json"])


def bench_body(benches: Sequence[Run], pictures: Path = PICTURES) -> str:
    """A summary of the verdicts, then command, machine, picture, ratios and rows of each benchmark."""
    if not benches:
        return NO_BENCHES
    parts = [_summary(benches)]
    for bench in benches:
        where = ", ".join(f"{key.replace('_', ' ')} {cell(value)}" for key, value in bench["environment"].items())
        # a file from before the command existed was made by other code
        made = (
            f"```sh\n{bench_command(bench)}\n```" if "options" in bench else "From an earlier form of this benchmark."
        )
        parts += [f"### {bench['bench']}", made, f"Measured on: {where}."]
        picture = pictures / f"{bench['bench']}.png"
        if picture.exists():
            parts.append(f"![{bench['bench']}: the table below, drawn](assets/bench/{picture.name})")
        judged = [{**line, "holds": verdict(line)} for line in bench["ratios"]]
        parts += [_lines(judged), _lines(bench.get("fits", [])), _folded(bench["rows"])]
    return "\n\n".join(part for part in parts if part)


def _summary(benches: Sequence[Run]) -> str:
    """What was aimed at and what was missed, over all benchmarks."""
    lines = [(bench["bench"], line) for bench in benches for line in bench["ratios"] if line["holds"] is not None]
    missed = [(name, line) for name, line in lines if not line["holds"]]
    head = f"{len(lines)} ratios have a target; {len(lines) - len(missed)} hold and {len(missed)} are missed"
    if not missed:
        return head + "."
    rows = [[name, line["name"], cell(line["value"]), cell(line["target"])] for name, line in missed]
    return f"{head}:\n\n" + table(("benchmark", "missed", "value", "target"), rows)


def _lines(lines: Sequence[Run]) -> str:
    if not lines:
        return ""
    keys = columns(lines)
    return table([key.replace("_", " ") for key in keys], [[cell(line.get(key)) for key in keys] for line in lines])


def _folded(rows: Sequence[Run]) -> str:
    """The raw rows; a long table is folded away."""
    text = _lines(rows)
    if len(rows) <= 12:
        return text
    return f'<details markdown="1">\n<summary>All {len(rows)} rows</summary>\n\n{text}\n\n</details>'


def draw_benches(benches: Sequence[Run], folder: Path = PICTURES) -> None:
    """Draw the picture of each benchmark."""
    from toreq.bench.plots import write

    for bench in benches:
        print(f"{write(bench, folder).relative_to(ROOT)}: drawn")


def main() -> int:
    """Rewrite or check the tables; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a table is out of date")
    check = parser.parse_args().check
    text, benches = body(load()), load_benches()
    if not check:
        draw_benches(benches)
    files = {ROOT / "README.md": {CLAIMS: claims_body()}, ROOT / "docs" / "results.md": {NAME: text}}
    files[ROOT / "docs" / "performance.md"] = {BENCHES: bench_body(benches)}
    return rewrite(files, check)


if __name__ == "__main__":
    sys.exit(main())
