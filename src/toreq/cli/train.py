"""`toreq train`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from toreq.cli.parsing import parse_set
from toreq.errors import ConfigError

_RECIPE = "(default: the system's recipe)"


def _option(metavar: str, hint: str) -> Any:
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=hint)


@dataclass(frozen=True)
class Train:
    """Train a system, or go on with a run that was stopped.

    Writes config.json, metrics.jsonl, TensorBoard events, a checkpoint and summary.json to the run folder. Ctrl-C saves
    and says how to go on.
    """

    system: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="SYSTEM", help_behavior_hint="")] = None
    """The system to train; `toreq systems` lists them. Left out with --resume."""
    resume: Annotated[Path | None, _option("RUN", "")] = None
    """Go on with the run in this folder; only --epochs may be given beside it."""
    data: Annotated[str, _option("NAME", "(default: mnist)")] = "mnist"
    """Data set."""
    epochs: Annotated[int | None, _option("N", _RECIPE)] = None
    """Passes over the training data."""
    seed: Annotated[int, _option("N", "(default: 0)")] = 0
    """Seed of the weights, the order of the examples and the noise."""
    limit_train: Annotated[int | None, _option("N", "(default: all)")] = None
    """Train on this many examples, balanced over the classes."""
    limit_test: Annotated[int | None, _option("N", "(default: all)")] = None
    """Test on this many examples, balanced over the classes."""
    holdout: Annotated[int | None, _option("N", "(default: none)")] = None
    """Hold out this many training examples and test on them; the test data are not looked at."""
    batch_size: Annotated[int | None, _option("N", _RECIPE)] = None
    """Examples in a batch, over all devices."""
    lr: Annotated[float | None, _option("RATE", _RECIPE)] = None
    """Peak learning rate."""
    optimizer: Annotated[str | None, _option("NAME", _RECIPE)] = None
    """adam, adamw, sgd or rmsprop."""
    schedule: Annotated[str | None, _option("NAME", _RECIPE)] = None
    """constant or cosine."""
    warmup: Annotated[float | None, _option("PART", _RECIPE)] = None
    """Part of the run, in [0, 1), over which the learning rate rises."""
    weight_decay: Annotated[float | None, _option("RATE", _RECIPE)] = None
    """Weight decay of the optimizer."""
    gradient_clip: Annotated[float | None, _option("NORM", _RECIPE)] = None
    """Largest norm of the gradient."""
    shift: Annotated[int | None, _option("PIXELS", _RECIPE)] = None
    """Move every training image by up to this many pixels, anew in each epoch."""
    rotate: Annotated[float | None, _option("DEGREES", _RECIPE)] = None
    """Turn every training image by up to this angle."""
    zoom: Annotated[float | None, _option("SHARE", _RECIPE)] = None
    """Stretch each axis of every training image by up to this share."""
    shear: Annotated[float | None, _option("SHARE", _RECIPE)] = None
    """Shear every training image by up to this share."""
    flip: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Mirror training images left to right, half of them."""
    normalize: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Bring each channel of the inputs to mean 0 and deviation 1 over the training images; saved with the weights."""
    out: Annotated[Path | None, _option("DIR", "(default: runs/SYSTEM[-ARCH]-DATA-SIDE-seedN)")] = None
    """The run folder, new or empty."""
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Replace the run in --out."""
    device: Annotated[str, _option("NAME", "(default: auto)")] = "auto"
    """auto, cpu, cuda or mps."""
    devices: Annotated[int, _option("N", "(default: 1)")] = 1
    """More than one trains under DistributedDataParallel."""
    precision: Annotated[str, _option("NAME", "(default: 32-true)")] = "32-true"
    """32-true, bf16-mixed, 16-mixed or 64-true."""
    side: Annotated[str, _option("NAME", "(default: eqprop)")] = "eqprop"
    """eqprop: the system's own estimator; bp-eq: the implicit gradient; bp-ff: backprop of the feed-forward twin."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, _option("KEY=VALUE", "(repeatable)")] = ()
    """An option of the system, `solver` or `estimator`, or a field of one, as in solver.tolerance=1e-5."""
    deterministic: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Use deterministic algorithms only, and one thread unless --threads says otherwise."""
    threads: Annotated[int | None, _option("N", "(default: torch's)")] = None
    """Number of threads."""
    checkpoint_every: Annotated[float, _option("SECONDS", "(default: 60)")] = 60.0
    """Time between checkpoints; one is written after each epoch too."""

    def run(self, console: Console, command: str) -> int:
        """Train and print the summary; returns the exit code."""
        from toreq import training

        if self.resume is not None:
            self._refuse_beside_resume()
            folder = self.resume
            summary = training.resume(folder, epochs=self.epochs, console=console, command=command)
        else:
            config = self._config()
            folder = Path(str(config.out))
            summary = training.train(config, overwrite=self.overwrite, console=console, command=command)
        if summary:
            _print_summary(console, summary, folder)
        return 0

    def _refuse_beside_resume(self) -> None:
        for item in dataclasses.fields(self):
            if item.name not in ("resume", "epochs") and getattr(self, item.name) != item.default:
                name = "SYSTEM" if item.name == "system" else "--" + item.name.replace("_", "-")
                raise ConfigError(
                    f"train: expected --resume with no other option than --epochs, got {name}; a run keeps its "
                    "configuration: leave it out, or train a new run"
                )

    def _config(self) -> Any:
        from toreq import systems, training
        from toreq.cli.systems import known_system

        if self.system is None:
            raise ConfigError(
                f"train: expected a SYSTEM ({', '.join(systems.names())}) or --resume RUN, got neither; "
                "for example `toreq train toreqprop`"
            )
        system = known_system(self.system)
        options = parse_set(self.set, lambda arch: systems.options(system, arch))
        given = {
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "learning_rate": self.lr,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "warmup": self.warmup,
            "weight_decay": self.weight_decay,
            "gradient_clip": self.gradient_clip,
            "shift": self.shift,
            "rotate": self.rotate,
            "zoom": self.zoom,
            "shear": self.shear,
            "flip": self.flip or None,
            "normalize": self.normalize or None,
            "holdout": self.holdout,
        }
        name = "-".join([system, *([str(options["arch"])] if "arch" in options else []), self.data])
        return training.config_for(
            system,
            options,
            **{key: value for key, value in given.items() if value is not None},
            data=self.data,
            seed=self.seed,
            limit_train=self.limit_train,
            limit_test=self.limit_test,
            out=str(self.out or Path("runs") / f"{name}-{self.side}-seed{self.seed}"),
            device=self.device,
            devices=self.devices,
            precision=self.precision,
            side=self.side,
            deterministic=self.deterministic,
            threads=self.threads,
            checkpoint_every=self.checkpoint_every,
        )


def _print_summary(console: Console, summary: dict[str, Any], folder: Path) -> None:
    from rich.table import Table

    table = Table(show_header=False, box=None)
    rows = {
        "test accuracy": f"{summary['test_accuracy']:.2%}",
        "couplings off": percent(summary["couplings_off_accuracy"]),
        "parameters": f"{summary['parameters']:,}",
        "seconds per epoch": f"{summary['seconds_per_epoch']:.2f}",
        "samples per second": f"{summary['samples_per_second']:,.0f}",
        "steps free / nudged": f"{number(summary['free_steps_mean'])} / {number(summary['nudged_steps_mean'])}",
        "settled": percent(summary["converged_fraction"]),
        "asym": number(summary["asym_mean"], 4),
        "radius": number(summary["radius"], 3),
        "peak memory": f"{summary['peak_memory_mb']:.0f} MB",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    console.print(f"written to {folder}; next: toreq show {folder}", soft_wrap=True)


def number(value: float | None, digits: int = 1) -> str:
    """Return `value` with `digits` decimals, or a dash for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """Return `value` in percent, or a dash for None."""
    return "-" if value is None else f"{value:.2%}"
