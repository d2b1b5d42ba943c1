"""From a `TrainConfig` to the network it trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from toreq import systems
from toreq.core import Standardize
from toreq.errors import ConfigError, nearest
from toreq.layer import equilibria
from toreq.systems import System
from toreq.training.config import TrainConfig

PARTS = ("solver", "estimator")
NAMED = (*PARTS, "settings")


def build(config: TrainConfig, input_shape: Sequence[int], num_classes: int, images: Tensor | None = None) -> System:
    """Return the system of `config`.

    In `config.set`, `solver` and `estimator` name one, `settings` is `exact` or `fast`, `solver.tolerance` (or any
    field of either) changes the one in place, and every other key is an option of the system. The side `bp-eq` trains
    by the implicit gradient. The system observes `images`, and with `normalize` inputs are standardised as they are;
    without them, by numbers that a checkpoint is to replace. Raises `ConfigError` for an unknown name, with the nearest
    valid one.
    """
    parts: dict[str, Any] = {}
    options: dict[str, Any] = {}
    fields: list[tuple[str, str, Any]] = []
    for key, value in config.set.items():
        part, dot, name = key.partition(".")
        if dot:
            if part not in PARTS:
                raise ConfigError(f"set: expected solver.NAME or estimator.NAME, got {key!r}; {nearest(part, PARTS)}")
            fields.append((part, name, value))
        elif key in NAMED:
            parts[key] = value
        else:
            options[key] = value
    if config.side == "bp-eq":
        if "estimator" in parts:
            raise ConfigError("set: the side 'bp-eq' has the estimator 'implicit'; leave out `estimator`")
        parts["estimator"] = "implicit"
    net = systems.create(config.system, input_shape=tuple(input_shape), num_classes=num_classes, **parts, **options)
    for part, name, value in fields:
        for layer in equilibria(net):
            setattr(layer, part, _replaced(getattr(layer, part), part, name, value))
    if images is not None:
        net.observe(images)
    if config.normalize:
        channels = input_shape[0] if len(input_shape) == 3 else 1
        net.standardize(Standardize([0.0] * channels, [1.0] * channels) if images is None else Standardize.of(images))
    return net


def _replaced(holder: Any, part: str, name: str, value: Any) -> Any:
    kind = type(holder).__name__
    if not dataclasses.is_dataclass(holder) or isinstance(holder, type):
        raise ConfigError(f"set: {part} {kind} has no fields that can be set; leave out {part}.{name}")
    names = [item.name for item in dataclasses.fields(holder) if item.init]
    if name not in names:
        raise ConfigError(f"set: expected a field of {part} {kind}, got {name!r}; {nearest(name, names)}")
    return dataclasses.replace(holder, **{name: value})


def trained_module(net: System, config: TrainConfig) -> nn.Module:
    """Return the module whose parameters `config` trains: `net`, or its feed-forward twin for the side `bp-ff`."""
    if config.side != "bp-ff":
        return net
    twin, prepare = net.feedforward(), net.equilibrium.dynamics.prepare
    return nn.Sequential(prepare, twin) if isinstance(prepare, Standardize) else twin


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return the optimizer of `config` over the parameters of `model`."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rate, decay = config.learning_rate, config.weight_decay
    match config.optimizer:
        case "adam":
            return torch.optim.Adam(parameters, lr=rate, weight_decay=decay)
        case "adamw":
            return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
        case "sgd":
            return torch.optim.SGD(parameters, lr=rate, weight_decay=decay, momentum=config.momentum)
        case _:
            return torch.optim.RMSprop(parameters, lr=rate, weight_decay=decay)
