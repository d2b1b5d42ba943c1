"""Settings that train each system well: what `toreq train SYSTEM` and `toreq demo` use unless told otherwise.

A system adds its entries here, by name and architecture; one without trains with the defaults of `TrainConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from toreq import systems
from toreq.training.config import TrainConfig

_TRAIN: dict[tuple[str, str], dict[str, Any]] = {
    ("toreqprop", "mlp"): {"epochs": 12, "learning_rate": 1e-3, "batch_size": 128, "shift": 1},
    ("toreqprop", "hopfield"): {"epochs": 12, "learning_rate": 1e-3, "batch_size": 128},
    ("toreqprop", "conv"): {"epochs": 8, "learning_rate": 2e-3, "batch_size": 128, "shift": 1},
    ("toreqprop", "transformer"): {"epochs": 6, "learning_rate": 2e-3, "batch_size": 128, "warmup": 0.05},
    ("difftoreqprop", "mlp"): {"epochs": 12, "learning_rate": 1e-3, "batch_size": 128, "shift": 1},
    ("difftoreqprop", "conv"): {"epochs": 8, "learning_rate": 2e-3, "batch_size": 128, "shift": 1},
    ("mstep", "conv"): {"epochs": 8, "learning_rate": 2e-3, "batch_size": 128, "shift": 1},
    ("mstep", "dense"): {"epochs": 12, "learning_rate": 1e-3, "batch_size": 128, "shift": 1},
    ("mstep", "sequence"): {"epochs": 6, "learning_rate": 2e-3, "batch_size": 128, "warmup": 0.05},
    ("tepssr", "classifier"): {"epochs": 8, "learning_rate": 5e-3, "batch_size": 64, "warmup": 0.05},
    ("tpeqprop", "mlp"): {"epochs": 12, "learning_rate": 1e-3, "batch_size": 128, "shift": 1},
    ("tpeqprop", "residual"): {"epochs": 12, "learning_rate": 1e-3, "batch_size": 128, "warmup": 0.05},
    ("tpeqprop", "conv"): {"epochs": 8, "learning_rate": 2e-3, "batch_size": 128, "shift": 1},
    ("tpeqprop", "transformer"): {"epochs": 8, "learning_rate": 2e-3, "batch_size": 128, "warmup": 0.05},
    ("htsep", "dense"): {"epochs": 12, "learning_rate": 1e-3, "batch_size": 64, "shift": 1},
    ("htsep", "conv"): {"epochs": 8, "learning_rate": 2e-3, "batch_size": 64, "shift": 1},
}


@dataclass(frozen=True)
class DemoRow:
    """One row of `toreq demo`: a system with its options, how long it trains, and on how many examples.

    `seconds` bounds the time of the row (its backprop twin included) on a slow machine: fewer examples are used there.
    `train` holds further fields of `TrainConfig`.
    """

    system: str
    label: str
    options: dict[str, Any] = field(default_factory=dict)
    epochs: int = 2
    limit_train: int = 20_000
    limit_test: int = 10_000
    seconds: float = 20.0
    train: dict[str, Any] = field(default_factory=dict)


_DEMO: dict[str, tuple[DemoRow, ...]] = {
    "toreqprop": (
        # A short run bears a higher rate than the recipes above, and sees too little to overfit.
        DemoRow(
            "toreqprop",
            "toreqprop mlp",
            {"arch": "mlp"},
            epochs=2,
            limit_train=60_000,
            train={"learning_rate": 2e-3, "shift": 0},
        ),
        DemoRow(
            "toreqprop",
            "toreqprop hopfield",
            {"arch": "hopfield"},
            epochs=2,
            limit_train=20_000,
            seconds=10.0,
            train={"learning_rate": 2e-3, "shift": 0},
        ),
        DemoRow(
            "toreqprop",
            "toreqprop conv",
            {"arch": "conv"},
            epochs=1,
            limit_train=5_000,
            limit_test=2_000,
            seconds=15.0,
            train={"learning_rate": 2e-3, "shift": 0},
        ),
        DemoRow(
            "toreqprop",
            "toreqprop transformer",
            {"arch": "transformer"},
            epochs=2,
            limit_train=5_000,
            limit_test=2_000,
            seconds=15.0,
            train={"learning_rate": 2e-3, "shift": 0},
        ),
    ),
    "difftoreqprop": (
        DemoRow(
            "difftoreqprop",
            "difftoreqprop mlp",
            {"arch": "mlp"},
            epochs=2,
            limit_train=20_000,
            seconds=12.0,
            train={"learning_rate": 2e-3, "shift": 0},
        ),
    ),
    "mstep": (
        DemoRow(
            "mstep",
            "mstep conv",
            # the fast settings, since three levels cost more than one
            {"arch": "conv", "channels": [16, 32], "settings": "fast"},
            epochs=1,
            limit_train=10_000,
            limit_test=2_000,
            seconds=20.0,
            train={"learning_rate": 3e-3, "batch_size": 32, "shift": 0},
        ),
    ),
    "tepssr": (
        DemoRow(
            "tepssr",
            "tepssr classifier",
            {"arch": "classifier", "selective": False, "attention": "none", "settings": "fast"},
            epochs=2,
            limit_train=10_000,
            limit_test=2_000,
            seconds=20.0,
            train={"learning_rate": 5e-3, "batch_size": 32},
        ),
    ),
    "tpeqprop": (
        DemoRow(
            "tpeqprop",
            "tpeqprop mlp",
            {"arch": "mlp"},
            epochs=2,
            limit_train=20_000,
            seconds=5.0,
            train={"learning_rate": 2e-3, "shift": 0},
        ),
        DemoRow(
            "tpeqprop",
            "tpeqprop transformer",
            {"arch": "transformer"},
            epochs=2,
            limit_train=10_000,
            limit_test=2_000,
            seconds=15.0,
            train={"learning_rate": 2e-3},
        ),
    ),
    "htsep": (
        DemoRow(
            "htsep",
            "htsep dense",
            {"arch": "dense"},
            epochs=2,
            limit_train=20_000,
            seconds=15.0,
            train={"learning_rate": 2e-3, "shift": 0},
        ),
    ),
}


def config_for(system: str, options: Mapping[str, Any] | None = None, **given: Any) -> TrainConfig:
    """Return the configuration of `system` with `options`: its recipe, changed by the fields `given`.

    Raises `ConfigError` for a name or value that is not valid.
    """
    options = dict(options or {})
    arch = options.get("arch") or systems.architectures(system)[0]
    recipe = _TRAIN.get((system, arch), {})
    return TrainConfig.from_json({"system": system, "set": options, **recipe, **given})


def demo_rows() -> list[DemoRow]:
    """Return the rows of the demo, at least one for each registered system."""
    return [row for name in systems.names() for row in _DEMO.get(name, (DemoRow(name, name),))]
