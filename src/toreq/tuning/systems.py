"""Tuning a system: what to search unless told otherwise, and its accuracy on held-out training data."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toreq import systems, training
from toreq.errors import ConfigError, nearest
from toreq.training import RunFolder, TrainConfig
from toreq.tuning.space import Choice, Integer, Parameter, Real, Space, Value

FLAGS = {
    "learning_rate": "--lr",
    "weight_decay": "--weight-decay",
    "batch_size": "--batch-size",
    "optimizer": "--optimizer",
    "schedule": "--schedule",
    "warmup": "--warmup",
    "gradient_clip": "--gradient-clip",
    "shift": "--shift",
    "rotate": "--rotate",
    "zoom": "--zoom",
    "shear": "--shear",
}
"""Fields of `TrainConfig` that can be tuned, with the flag of ``toreq train`` that sets each."""
_PARTS = ("solver", "estimator")


def default_space(config: TrainConfig) -> Space:
    """The space that is searched unless another is given: learning rate, weight decay, and where the network settles
    and has them the initial scale of its couplings and the bound on their norm."""
    parameters: dict[str, Parameter] = {
        "learning_rate": Real(3e-4, 1e-2, log=True),
        "weight_decay": Real(1e-6, 1e-3, log=True),
    }
    if config.side != "bp-ff":
        known = _options(config)
        scale = known.get("coupling_scale")
        if isinstance(scale, float) and scale > 0:
            parameters["coupling_scale"] = Real(scale / 4, scale * 2, log=True)
        if isinstance(known.get("norm_bound"), float):
            parameters["norm_bound"] = Real(0.5, 0.95)
    return Space(parameters)


def _options(config: TrainConfig) -> dict[str, Any]:
    arch = config.set.get("arch")
    return systems.options(config.system, None if arch is None else str(arch))


def check_names(config: TrainConfig, space: Space) -> None:
    """Raise `ConfigError` for a parameter that is no field to tune and no option of the system, or one that is set."""
    known = [*FLAGS, *(name for name in _options(config) if name != "arch"), *_PARTS, "settings"]
    for name in space.parameters:
        part, dot, _ = name.partition(".")
        if not (dot and part in _PARTS) and name not in known:
            raise ConfigError(f"tune: expected something that can be tuned, got {name!r}; {nearest(name, known)}")
        if name in config.set:
            raise ConfigError(f"tune: expected {name} to be set or tuned, got both; leave it out of one")


def present(config: TrainConfig, space: Space) -> dict[str, Value] | None:
    """The point of the space nearest to the settings that ``config`` has; None where it has none there."""
    point: dict[str, Value] = {}
    options = _options(config)
    for name, parameter in space.parameters.items():
        value = getattr(config, name) if name in FLAGS else options.get(name)
        if isinstance(parameter, Real | Integer):
            if isinstance(value, bool) or not isinstance(value, int | float):
                return None
            value = min(max(value, parameter.low), parameter.high)
            value = round(value) if isinstance(parameter, Integer) else float(value)
        elif isinstance(parameter, Choice) and not parameter.holds(value):
            return None
        point[name] = value
    return point


def configured(config: TrainConfig, params: Mapping[str, Value], **changes: Any) -> TrainConfig:
    """``config`` with tuned parameters, and with further fields changed."""
    fields = {name: value for name, value in params.items() if name in FLAGS}
    options = {name: value for name, value in params.items() if name not in FLAGS}
    return dataclasses.replace(config, **fields, **changes, set={**config.set, **options})


def trained(config: TrainConfig) -> tuple[dict[str, Any], bool]:
    """Train into the folder ``config.out``; return the summary, and whether the run was begun in an earlier process.

    A run that was interrupted goes on at its checkpoint, and one that is finished is read.
    """
    folder = RunFolder(Path(str(config.out)))
    summary = folder.summary()
    if summary is not None:
        return summary, True
    if folder.checkpoint.exists():
        return training.resume(folder.path), True
    return training.train(config, overwrite=True), False


@dataclass(frozen=True)
class HeldOut:
    """The objective of ``toreq tune``: accuracy, in [0, 1], on the training examples that ``config`` holds out.

    Args:
        config: with a ``holdout``.
        folder: where runs are written, one after the other; those of finished trials are removed.
    """

    config: TrainConfig
    folder: Path

    def __call__(self, number: int, params: Mapping[str, Value]) -> float:
        """Train with ``params`` and return the accuracy; an interrupted trial goes on at its checkpoint."""
        out = self.folder / f"trial-{number}"
        summary, _ = trained(configured(self.config, params, out=str(out)))
        shutil.rmtree(out, ignore_errors=True)
        return float(summary["test_accuracy"])


def train_command(config: TrainConfig, params: Mapping[str, Value]) -> str:
    """The ``toreq train`` command that trains with ``params`` on all training data, after the system's recipe."""
    words = ["toreq", "train", config.system, "--data", config.data, "--seed", str(config.seed), "--side", config.side]
    options = dict(config.set)
    for name, value in params.items():
        if name in FLAGS:
            words += [FLAGS[name], str(value)]
        else:
            options[name] = value
    for name, value in options.items():
        words += ["--set", f"{name}={value}"]
    return shlex.join(words)
