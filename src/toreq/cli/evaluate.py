"""`toreq eval`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console


@dataclass(frozen=True)
class Eval:
    """Evaluate the checkpoint of a run: accuracy, loss, confusion matrix and settling."""

    run_folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run folder."""
    data: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: that of the run)")] = None
    """Data set whose test part is used; of the same input shape and number of classes."""
    limit_test: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: as in the run)")] = None
    """Use this many test examples."""
    corrupt: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: clean)")] = None
    """Corruption of the inputs."""
    severity: Annotated[int, tyro.conf.arg(metavar="1..5")] = 3
    """Severity of the corruption."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Write the results to this file."""

    def run(self, console: Console, command: str) -> int:
        """Evaluate, print and write; returns the exit code."""
        import dataclasses

        from toreq import data as datasets
        from toreq import training
        from toreq.errors import ConfigError
        from toreq.io import atomic_write_json

        run = training.load_run(self.run_folder)
        config = run.config
        kept = config.limit_test if self.data in (None, config.data) else None
        limit = kept if self.limit_test is None else self.limit_test
        # The training part is not used, so one example of it is enough.
        config = dataclasses.replace(
            config, data=self.data or config.data, limit_train=1, limit_test=limit, holdout=None
        )
        found = training.prepare(config, "cpu")
        expected = (run.net.num_classes, run.net.input_shape)
        if (found.num_classes, found.input_shape) != expected:
            raise ConfigError(
                f"eval: expected data with {expected[0]} classes of shape {expected[1]}, got {found.name} with "
                f"{found.num_classes} of {found.input_shape}; choose another --data"
            )
        corrupt: Any = None
        if self.corrupt is not None:
            generator = datasets.seeded(config.seed, 1)
            name, severity = self.corrupt, self.severity
            datasets.corrupt(found.test_x[:1], name, severity, generator=datasets.seeded(0))
            corrupt = lambda x: datasets.corrupt(x, name, severity, generator=generator)  # noqa: E731
        result = training.evaluate(
            run.model, run.net.criterion, found.test_x, found.test_y, num_classes=found.num_classes, corrupt=corrupt
        )
        values = {
            "run": str(self.run_folder),
            "system": config.system,
            "side": config.side,
            "data": found.name,
            "variant": found.variant,
            "corruption": None if self.corrupt is None else {"name": self.corrupt, "severity": self.severity},
            "epoch": run.epoch,
            "step": run.step,
            **result.to_json(),
        }
        _print(console, values)
        if self.json is not None:
            atomic_write_json(self.json, values)
        return 0


def _print(console: Console, values: dict[str, Any]) -> None:
    from rich.table import Table

    from toreq.cli.train import number, percent

    console.print(
        f"{values['system']} on {values['data']} ({values['variant']}), {values['examples']} test examples, after "
        f"epoch {values['epoch']}: accuracy {values['accuracy']:.2%}, loss {values['loss']:.4f}, free steps "
        f"{number(values['free_steps_mean'])}, settled {percent(values['free_converged_fraction'])}",
        soft_wrap=True,
    )
    if len(values["confusion"]) > 20:
        return
    table = Table(title="confusion: rows are labels, columns are answers")
    table.add_column("")
    for index in range(len(values["confusion"])):
        table.add_column(str(index), justify="right")
    for index, row in enumerate(values["confusion"]):
        table.add_row(str(index), *(str(count) if count else "." for count in row))
    console.print(table)
