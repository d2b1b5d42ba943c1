"""What a training run is, as one frozen object that is written to `config.json` and read back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from toreq.errors import ConfigError, nearest

SIDES = ("eqprop", "bp-eq", "bp-ff")
OPTIMIZERS = ("adam", "adamw", "sgd", "rmsprop")
SCHEDULES = ("constant", "cosine")
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "64-true")
DEVICES = ("auto", "cpu", "cuda", "mps")


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    `side` says how the gradient is made: `eqprop` by the system's own estimator, `bp-eq` by the implicit gradient
    through the same equilibrium, `bp-ff` by plain backprop through the feed-forward twin of the same widths.
    `holdout` training examples, balanced over the classes and the same for every seed, are not trained on and take the
    place of the test data, which then are not looked at (for tuning); `limit_train` counts the examples trained on.
    `set` holds the options of the system (`toreq.systems.options(name)`), and may hold `solver` and `estimator`.

    The learning rate rises linearly over `warmup` steps (a fraction of the run in [0, 1)) and then is constant, or
    falls as a half cosine to `final_learning_rate` times its peak. `gradient_clip` bounds the norm of the whole
    gradient (None: no bound). `shift` moves every training image by up to that many pixels, anew in each epoch and
    alike for every side; `rotate` (degrees), `zoom` and `shear` (shares) and `flip` do the same
    (`toreq.data.Augmentation`). `normalize` lets every input pass a `toreq.core.Standardize` fitted to the training
    images, which is saved with the weights and changes no data. `checkpoint_every` is in seconds; one is also written
    after each epoch. `devices` above one trains under DistributedDataParallel, each with its share of `batch_size`.
    `threads` is torch's number of threads (None: as it is; one if `deterministic`).

    Raises `ConfigError` for a value out of range or an unknown name.
    """

    system: str
    data: str = "mnist"
    epochs: int = 12
    seed: int = 0
    limit_train: int | None = None
    limit_test: int | None = None
    holdout: int | None = None
    batch_size: int = 128
    learning_rate: float = 1e-3
    optimizer: str = "adam"
    momentum: float = 0.9
    schedule: str = "cosine"
    warmup: float = 0.0
    final_learning_rate: float = 0.0
    weight_decay: float = 0.0
    gradient_clip: float | None = None
    shift: int = 0
    rotate: float = 0.0
    zoom: float = 0.0
    shear: float = 0.0
    flip: bool = False
    normalize: bool = False
    out: str | None = None
    device: str = "auto"
    devices: int = 1
    precision: str = "32-true"
    side: str = "eqprop"
    set: dict[str, Any] = field(default_factory=dict)
    deterministic: bool = False
    checkpoint_every: float = 60.0
    threads: int | None = None

    def __post_init__(self) -> None:
        choices = {
            "side": SIDES,
            "optimizer": OPTIMIZERS,
            "schedule": SCHEDULES,
            "precision": PRECISIONS,
            "device": DEVICES,
        }
        for name, valid in choices.items():
            if getattr(self, name) not in valid:
                self._refuse(name, f"one of {', '.join(valid)}", nearest(str(getattr(self, name)), valid))
        for name in ("epochs", "batch_size", "devices"):
            self._integer(name, 1)
        self._integer("seed", 0)
        self._integer("shift", 0)
        for name in ("limit_train", "limit_test", "holdout", "threads"):
            if getattr(self, name) is not None:
                self._integer(name, 1)
        if self.holdout is not None and self.limit_test is not None:
            self._refuse("limit_test", "None beside a holdout, which stands in for the test data", "leave one out")
        self._number("learning_rate", 0.0, math.inf, open_low=True)
        for name in ("weight_decay", "checkpoint_every", "shear"):
            self._number(name, 0.0, math.inf)
        self._number("rotate", 0.0, 180.0, open_high=False)
        self._number("zoom", 0.0, 1.0)
        for name in ("momentum", "warmup"):
            self._number(name, 0.0, 1.0)
        self._number("final_learning_rate", 0.0, 1.0, open_high=False)
        if self.gradient_clip is not None:
            self._number("gradient_clip", 0.0, math.inf, open_low=True)
        if not isinstance(self.set, dict) or not all(isinstance(key, str) for key in self.set):
            self._refuse("set", "a dict of system options by name")

    def _refuse(self, name: str, expected: str, remedy: str = "") -> None:
        hint = f"; {remedy}" if remedy else ""
        raise ConfigError(f"TrainConfig.{name}: expected {expected}, got {getattr(self, name)!r}{hint}")

    def _integer(self, name: str, low: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            self._refuse(name, f"a whole number of at least {low}")

    def _number(self, name: str, low: float, high: float, *, open_low: bool = False, open_high: bool = True) -> None:
        value = getattr(self, name)
        span = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
        if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
            self._refuse(name, f"a number in {span}")
        if value < low or (open_low and value == low) or value > high or (open_high and value == high):
            self._refuse(name, f"a number in {span}")

    def to_json(self) -> dict[str, Any]:
        """Return the configuration as JSON-able values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Return the configuration written by `to_json`; raises `ConfigError` for unknown or missing names."""
        names = [item.name for item in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                raise ConfigError(f"TrainConfig: expected one of its fields, got {key!r}; {nearest(key, names)}")
        if "system" not in values:
            raise ConfigError("TrainConfig: expected the field 'system', got none; name the system to train")
        return cls(**values)

    def learning_rate_at(self, step: int, total: int) -> float:
        """Return the learning rate of `step` (from 0) in a run of `total` steps: a pure function, so a resumed run
        needs no scheduler state."""
        rising = math.ceil(self.warmup * total)
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        if self.schedule == "constant":
            return self.learning_rate
        progress = min(1.0, (step - rising) / max(1, total - rising))
        low = self.final_learning_rate
        return self.learning_rate * (low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * progress)))
