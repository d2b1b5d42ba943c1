"""`toreq demo`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console

if TYPE_CHECKING:
    from toreq.training.recipes import DemoRow

PROBE_STEPS = 6
LEAST_EXAMPLES = 1_000


@dataclass(frozen=True)
class Demo:
    """Train every system on the bundled MNIST for some seconds, backprop of the same widths beside, and report.

    Shows live progress, prints the results and writes them as results.json and report.html.
    """

    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: runs/demo-TIME)")] = None
    """Where the runs, the results and the report are written; new or empty."""
    seed: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Seed of the weights and the order of the examples."""
    limit_train: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: each row's)")] = None
    """Train on at most this many examples."""
    limit_test: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: each row's)")] = None
    """Test on at most this many examples."""

    def run(self, console: Console, command: str) -> int:
        """Train, print and write; returns the exit code."""
        from toreq.diagnostics.report import write_demo_report
        from toreq.io import atomic_write_json
        from toreq.training.recipes import demo_rows
        from toreq.training.run import RunFolder

        started = time.perf_counter()
        folder = self.out or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
        RunFolder.create(folder)
        console.print(f"toreq demo: MNIST, seed {self.seed}, runs in {folder}", soft_wrap=True)
        results = [line for row in demo_rows() for line in self._row(row, folder, console, command)]
        console.print(_table(results))
        seconds = time.perf_counter() - started
        values = {"title": "toreq demo", "data": "mnist", "seconds": seconds, "commands": [command], "rows": results}
        atomic_write_json(folder / "results.json", values)
        report = write_demo_report(values, folder)
        console.print(f"{seconds:.0f} s; results: {folder / 'results.json'}; report: {report}", soft_wrap=True)
        return 0

    def _row(self, row: DemoRow, folder: Path, console: Console, command: str) -> list[dict[str, Any]]:
        from toreq import training

        limit = row.limit_train if self.limit_train is None else min(row.limit_train, self.limit_train)
        limit_test = row.limit_test if self.limit_test is None else min(row.limit_test, self.limit_test)
        base = training.config_for(
            row.system,
            row.options,
            epochs=row.epochs,
            seed=self.seed,
            limit_train=limit,
            limit_test=limit_test,
            **row.train,
        )
        # Each epoch is followed by a test, the last one also by a test with couplings off; a test example costs about
        # half a training example, which has the nudged phase on top.
        tests = limit_test * (row.epochs + 1) / 2
        affordable = int((_samples_per_second(base) * row.seconds - tests) / row.epochs)
        if affordable < limit:
            limit = max(min(limit, LEAST_EXAMPLES), affordable)
            console.print(f"{row.label}: this machine trains on {limit:,} examples in {row.seconds:.0f} s")
        results = []
        for side in ("eqprop", "bp-ff"):
            out = folder / f"{row.label.replace(' ', '-')}-{side}"
            values = {**base.to_json(), "side": side, "limit_train": limit, "out": str(out)}
            summary = training.train(training.TrainConfig.from_json(values), console=console, command=command)
            results.append({**summary, "label": row.label, "run": str(out)})
        return results


def _samples_per_second(config: Any) -> float:
    """Return the examples per second of a few training steps of both sides, after one to warm up."""
    import dataclasses

    from toreq import training

    data = training.prepare(dataclasses.replace(config, limit_train=config.batch_size, limit_test=1), "cpu")
    net = training.build(config, data.input_shape, data.num_classes, data.train_x)
    seconds = 0.0
    for model in (net, net.feedforward()):
        started = 0.0
        for step in range(PROBE_STEPS + 1):
            if step == 1:
                started = time.perf_counter()
            net.criterion(model(data.train_x), data.train_y).backward()
        seconds += time.perf_counter() - started
    return PROBE_STEPS * len(data.train_x) / seconds


def _table(results: list[dict[str, Any]]) -> Any:
    from rich import box
    from rich.table import Table

    from toreq.cli.train import number, percent

    table = Table(title="EqProp beside backprop of the same widths, on the same images", box=box.SIMPLE_HEAD)
    table.add_column("system")
    headings = ("images", "accuracy", "backprop", "s/epoch", "backprop", "free", "nudged", "settled", "asym", "radius")
    for heading in headings:
        table.add_column(heading, justify="right")
    twins = {line["label"]: line for line in results if line["side"] == "bp-ff"}
    for line in results:
        twin = twins[line["label"]]
        if line is twin:
            continue
        table.add_row(
            line["label"],
            f"{line['train_examples'] * line['epochs']:,}",
            percent(line["test_accuracy"]),
            percent(twin["test_accuracy"]),
            number(line["seconds_per_epoch"], 2),
            number(twin["seconds_per_epoch"], 2),
            number(line["free_steps_mean"]),
            number(line["nudged_steps_mean"]),
            percent(line["converged_fraction"]),
            number(line["asym_mean"], 3),
            number(line["radius"], 2),
        )
    return table
