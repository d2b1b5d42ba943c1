"""The run folder: config.json, metrics.jsonl, checkpoint/, tensorboard/ and summary.json."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from toreq.errors import CheckpointError, ToreqError
from toreq.io import atomic_write_text
from toreq.systems import System
from toreq.training import checkpoint
from toreq.training.build import build, trained_module
from toreq.training.config import TrainConfig

FORMAT = "toreq-run"
CONFIG, METRICS, SUMMARY, CHECKPOINT, TENSORBOARD = (
    "config.json",
    "metrics.jsonl",
    "summary.json",
    "checkpoint",
    "tensorboard",
)


class RunError(ToreqError):
    """A run folder that cannot be used as asked."""


def resume_command(path: Path) -> str:
    """Return the command that continues the run in `path`."""
    return f"toreq train --resume {shlex.quote(str(path))}"


@dataclass(frozen=True)
class RunFolder:
    """The files of one run."""

    path: Path

    @classmethod
    def create(cls, path: Path, *, overwrite: bool = False) -> RunFolder:
        """Make an empty run folder; raises `RunError` when `path` is taken or cannot be written.

        With `overwrite` the files of an earlier run are removed, and nothing else: a folder with other files in it
        is refused all the same.
        """
        folder = cls(path)
        try:
            if path.exists() and not path.is_dir():
                raise RunError(f"out: expected a folder, got the file {path}; choose another --out")
            if path.exists() and any(path.iterdir()):
                if not overwrite:
                    remedy = "choose another --out"
                    if (path / CONFIG).exists():
                        remedy = f"`{resume_command(path)}` continues it, --overwrite replaces it, or {remedy}"
                    raise RunError(f"out: expected a new or empty folder, got {path} with files in it; {remedy}")
                folder._clear()
            path.mkdir(parents=True, exist_ok=True)
            probe = path / ".writable"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise RunError(f"out: cannot write to {path}: {error.strerror or error}; choose another --out") from error
        return folder

    def _clear(self) -> None:
        known = {CONFIG, METRICS, SUMMARY, CHECKPOINT, TENSORBOARD}
        foreign = sorted(item.name for item in self.path.iterdir() if item.name not in known | {"plots"})
        if foreign or not (self.path / CONFIG).exists():
            raise RunError(
                f"out: expected the files of a run in {self.path}, got {', '.join(foreign[:3]) or 'no config.json'}; "
                "--overwrite replaces runs only: choose another --out"
            )
        for item in sorted(self.path.rglob("*"), reverse=True):
            if item.is_dir() and not item.is_symlink():
                item.rmdir()
            else:
                item.unlink()

    @property
    def checkpoint(self) -> Path:
        """The folder of the checkpoint."""
        return self.path / CHECKPOINT

    @property
    def tensorboard(self) -> Path:
        """The folder of the TensorBoard events."""
        return self.path / TENSORBOARD

    def config(self) -> dict[str, Any]:
        """Return config.json; raises `CheckpointError` when the folder is not one of a run."""
        path = self.path / CONFIG
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(
                f"run: expected the folder of a run, got {self.path} ({CONFIG}: {error.strerror or error}); "
                "name a folder that `toreq train` wrote"
            ) from error
        except ValueError as error:
            raise CheckpointError(f"run: expected JSON in {path}, got {error}; restore it, or train again") from error
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise CheckpointError(f"run: expected the format {FORMAT!r} in {path}; it was not written by toreq")
        return values

    def append(self, line: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl, null for a number that is not finite; raises `RunError` on a full disk."""
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in line.items()
        }
        try:
            with (self.path / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(finite, allow_nan=False) + "\n")
        except OSError as error:
            raise RunError(
                f"out: cannot write to {self.path / METRICS}: {error.strerror or error}; make room, then go on with: "
                f"{resume_command(self.path)}"
            ) from error

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl; a last line cut short by a crash is left out."""
        path = self.path / METRICS
        if not path.exists():
            return []
        lines = path.read_text(encoding="utf-8").splitlines()
        found: list[dict[str, Any]] = []
        for number, line in enumerate(lines, start=1):
            try:
                found.append(json.loads(line))
            except ValueError as error:
                if number < len(lines):
                    raise CheckpointError(f"run: line {number} of {path} is not JSON; restore the file") from error
        return found

    def rewind(self, step: int, epochs: int) -> list[dict[str, Any]]:
        """Drop the lines written after the checkpoint at `step`, with `epochs` finished; return those that stay."""
        kept = [
            line
            for line in self.metrics()
            if line["step"] <= step and (line["kind"] != "epoch" or line["epoch"] <= epochs)
        ]
        atomic_write_text(self.path / METRICS, "".join(json.dumps(line) + "\n" for line in kept))
        return kept

    def summary(self) -> dict[str, Any] | None:
        """Return summary.json, or None for a run that has not finished."""
        path = self.path / SUMMARY
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"run: expected JSON in {path}, got {error}; restore it, or train again") from error


@dataclass(frozen=True)
class Run:
    """A run read back: `net` is the system with its trained weights, in evaluation mode on the CPU.

    For the side `bp-ff`, `model` is the trained feed-forward twin and `net` the untrained system it belongs to;
    otherwise both are the same module.
    """

    folder: RunFolder
    config: TrainConfig
    net: System
    model: nn.Module
    step: int
    epoch: int

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.folder.path


def load_run(path: Path | str) -> Run:
    """Return the run in the folder `path`; raises `CheckpointError` when it is missing, truncated or foreign."""
    folder = RunFolder(Path(path))
    values = folder.config()
    checkpoint.expect(values, ("train", "model"), f"run {folder.path}")
    checkpoint.expect(values["model"], ("input_shape", "num_classes"), f"run {folder.path}")
    config = TrainConfig.from_json(values["train"])
    net = build(config, tuple(values["model"]["input_shape"]), values["model"]["num_classes"])
    model = trained_module(net, config)
    tensors, state = checkpoint.load(folder.checkpoint)
    checkpoint.expect(state, ("step", "epoch"), f"checkpoint {folder.checkpoint}")
    checkpoint.restore_module(model, checkpoint.within("model", tensors), f"checkpoint {folder.checkpoint}")
    net.eval()
    model.eval()
    return Run(folder, config, net, model, step=state["step"], epoch=state["epoch"])
