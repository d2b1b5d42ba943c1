"""Trainings of protocols that go on where they were stopped: module, optimizer, random streams and progress."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from toreq.errors import CheckpointError
from toreq.training import checkpoint, rng


def save(
    folder: Path,
    identity: Mapping[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Mapping[str, Any],
) -> None:
    """Write a training's state.

    Args:
        folder: of this training alone.
        identity: what makes it this training, JSON-able.
        model, optimizer: their states are written, and the random streams of ``model``.
        progress: how far it is, JSON-able.
    """
    tensors, record = checkpoint.optimizer_tensors(optimizer)
    checkpoint.save(
        folder,
        {
            **checkpoint.prefixed("model", model.state_dict()),
            **checkpoint.prefixed("optimizer", tensors),
            **checkpoint.prefixed("rng", rng.capture(model)),
        },
        {"identity": identity, "optimizer": record, "progress": progress},
    )


def restored(
    folder: Path | None, where: str, identity: Mapping[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any] | None:
    """Put a saved state into ``model``, ``optimizer`` and the random streams; its progress, None if nothing is saved.

    Raises:
        CheckpointError: for a state of another training, or a damaged one.
    """
    if folder is None or not (folder / checkpoint.STATE).exists():
        return None
    where = f"{where}: {folder}"
    tensors, state = checkpoint.load(folder)
    checkpoint.expect(state, ("identity", "optimizer", "progress"), where)
    if state["identity"] != identity:
        raise CheckpointError(
            f"{where}: expected the training {identity}, got {state['identity']}; use another folder, or delete it"
        )
    checkpoint.restore_module(model, checkpoint.within("model", tensors), where)
    checkpoint.restore_optimizer(optimizer, checkpoint.within("optimizer", tensors), state["optimizer"], where)
    rng.restore(model, checkpoint.within("rng", tensors))
    return state["progress"]
