"""The states of every random generator that training uses, for exact resumption."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def named_generators(module: nn.Module) -> dict[str, torch.Generator]:
    """Return the generators held by `module`, its submodules and their solvers and estimators, by attribute path."""
    found: dict[str, torch.Generator] = {}
    seen: set[int] = set()

    def visit(path: str, holder: Any) -> None:
        if id(holder) in seen:
            return
        seen.add(id(holder))
        for name, value in vars(holder).items():
            where = f"{path}.{name}" if path else name
            if isinstance(value, torch.Generator):
                found[where] = value
            elif type(value).__module__.startswith("toreq.") and hasattr(value, "__dict__"):
                if not isinstance(value, nn.Module):
                    visit(where, value)
            elif dataclasses.is_dataclass(value) and not isinstance(value, type) and hasattr(value, "__dict__"):
                visit(where, value)

    for path, submodule in module.named_modules():
        visit(path, submodule)
    return found


def capture(module: nn.Module) -> dict[str, Tensor]:
    """Return the states (uint8 tensors on the CPU) of torch's generators and those of `module`."""
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            states[f"cuda.{index}"] = state
    for path, generator in named_generators(module).items():
        states[f"generator.{path}"] = generator.get_state()
    return {name: state.clone() for name, state in states.items()}


def restore(module: nn.Module, states: Mapping[str, Tensor]) -> None:
    """Put back what `capture` returned; raises KeyError for a generator of `module` that `states` lacks."""
    torch.set_rng_state(states["torch"].cpu())
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if f"cuda.{index}" in states:
                torch.cuda.set_rng_state(states[f"cuda.{index}"].cpu(), index)
    for path, generator in named_generators(module).items():
        generator.set_state(states[f"generator.{path}"].cpu())


@contextlib.contextmanager
def preserved(module: nn.Module) -> Iterator[None]:
    """Leave every generator as it was: what happens inside does not change the numbers of the training around it."""
    states = capture(module)
    try:
        yield
    finally:
        restore(module, states)
