"""Checkpoints: one safetensors file and one JSON file, no pickle, never half written.

`checkpoint/state.json` names the tensor file by the hash of its content and is replaced last, in one step. Until that
moment the previous checkpoint is whole, so a crash, a full disk or Ctrl-C at any point loses nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from toreq.errors import CheckpointError
from toreq.io import atomic_write_bytes, atomic_write_text

FORMAT = "toreq-checkpoint"
VERSION = 1
STATE = "state.json"


def save(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write `tensors` and the JSON-able `state` as the checkpoint in `folder`, replacing the one before.

    Raises `CheckpointError` when the disk refuses; the checkpoint before is then untouched.
    """
    # A clone each, since safetensors refuses tensors that share memory.
    blob = safetensors.torch.save({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()})
    digest = hashlib.sha256(blob).hexdigest()
    name = f"{digest[:16]}.safetensors"
    record = {
        "format": FORMAT,
        "version": VERSION,
        "tensors": {"file": name, "bytes": len(blob), "sha256": digest},
        "state": dict(state),
    }
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(folder / name, blob)
        atomic_write_text(folder / STATE, text)
    except OSError as error:
        raise CheckpointError(f"checkpoint: {error}; a checkpoint saved before is intact") from error
    for old in folder.glob("*.safetensors"):
        if old.name != name:
            old.unlink(missing_ok=True)


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors (on the CPU) and the state of the checkpoint in `folder`.

    Raises `CheckpointError`, with the reason, for one that is missing, truncated, damaged or of another program.
    """
    record = _record(folder)
    entry = record["tensors"]
    path = folder / str(entry["file"])
    try:
        blob = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"checkpoint: cannot read {path}: {error.strerror or error}; restore it, or train again"
        ) from error
    if len(blob) != entry["bytes"]:
        raise CheckpointError(
            f"checkpoint: expected {entry['bytes']} bytes in {path}, got {len(blob)}; the file is truncated: "
            "restore it from a copy, or train again"
        )
    if hashlib.sha256(blob).hexdigest() != entry["sha256"]:
        raise CheckpointError(
            f"checkpoint: the content of {path} is not what was written (its SHA-256 differs); the file is "
            "damaged: restore it from a copy, or train again"
        )
    try:
        return safetensors.torch.load(blob), record["state"]
    except SafetensorError as error:
        raise CheckpointError(
            f"checkpoint: expected safetensors in {path}, got {error}; restore it, or train again"
        ) from error


def _record(folder: Path) -> dict[str, Any]:
    path = folder / STATE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"checkpoint: expected {path}, got {error.strerror or error}; nothing was saved there yet: train again"
        ) from error
    except ValueError as error:
        raise CheckpointError(
            f"checkpoint: expected JSON in {path}, got {error}; the file is truncated or foreign: restore it, or "
            "train again"
        ) from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else type(record).__name__
        raise CheckpointError(
            f"checkpoint: expected the format {FORMAT!r} in {path}, got {found!r}; it was not written by toreq"
        )
    if record.get("version") != VERSION:
        raise CheckpointError(
            f"checkpoint: expected version {VERSION} in {path}, got {record.get('version')!r}; "
            "use the version of toreq that wrote it"
        )
    entry = record.get("tensors")
    if not isinstance(entry, dict) or not {"file", "bytes", "sha256"} <= set(entry) or "state" not in record:
        raise CheckpointError(
            f"checkpoint: expected the entries 'tensors' and 'state' in {path}; the file is damaged: restore it"
        )
    return record


def expect(state: Mapping[str, Any], names: Iterable[str], where: str) -> None:
    """Raise `CheckpointError` for the first of `names` that `state` lacks."""
    for name in names:
        if name not in state:
            raise CheckpointError(
                f"{where}: expected the entry {name!r}, got none; it is damaged or of another program"
            )


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `tensors` under names that begin with `prefix/`."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def within(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix/`, without it."""
    start = f"{prefix}/"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def restore_module(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Load `tensors` into `module`; raises `CheckpointError` naming the first entry that does not fit."""
    own = module.state_dict()
    for name in own:
        if name not in tensors:
            raise CheckpointError(f"{where}: expected the tensor {name!r}, got none; it is of another network")
        if own[name].shape != tensors[name].shape:
            raise CheckpointError(
                f"{where}: expected {name!r} of shape {tuple(own[name].shape)}, got {tuple(tensors[name].shape)}; "
                "it is of a network of other widths"
            )
    for name in tensors:
        if name not in own:
            raise CheckpointError(f"{where}: got the tensor {name!r}, which this network has not; it is of another")
    module.load_state_dict(dict(tensors))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split the state of `optimizer` into tensors by name and JSON-able values."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    full = optimizer.state_dict()
    for index, entries in full["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}/{name}"] = value
            else:
                values.setdefault(str(index), {})[name] = value
    return tensors, {"values": values, "groups": full["param_groups"]}


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], record: Mapping[str, Any], where: str
) -> None:
    """Put back what `optimizer_tensors` returned; raises `CheckpointError` when it is of another optimizer."""
    state: dict[int, dict[str, Any]] = {}
    for index, entries in record["values"].items():
        state.setdefault(int(index), {}).update(entries)
    for path, tensor in tensors.items():
        index, _, name = path.partition("/")
        state.setdefault(int(index), {})[name] = tensor
    groups = []
    for own, saved in zip(optimizer.state_dict()["param_groups"], record["groups"], strict=False):
        # JSON has no tuples: betas come back as a list.
        groups.append({key: tuple(v) if isinstance(own.get(key), tuple) else v for key, v in saved.items()})
    try:
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{where}: the optimizer's state does not fit: {error}; resume with its own") from error
