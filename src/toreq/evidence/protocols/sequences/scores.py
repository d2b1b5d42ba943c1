"""How a task is measured: the loss, and what of it is right."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from toreq.data import Batch, Sequences, SequenceTask
from toreq.data.algorithmic import TOLERANCE
from toreq.errors import ConfigError


def read_out(model: nn.Module, task: SequenceTask, batch: Batch) -> Tensor:
    """The outputs that belong to the targets: (B, C) for one per sequence, (B, N, C) for one per position.

    A model that gives (B, N, C) where a sequence has one target is read at its last position (``model.pool`` is
    ``"last"``) or averaged over all (``"mean"``, the default), padding left out.

    Raises:
        ConfigError: outputs of another shape.
    """
    out = model(batch.x)
    own, expected = tuple(batch.x.shape[:2]), task.outputs
    if task.targets == "position":
        if tuple(out.shape) != (*own, expected):
            raise ConfigError(
                f"sequences: expected outputs of shape {(*own, expected)} for a target per position, got "
                f"{tuple(out.shape)}; give an output for each position"
            )
        return out
    if tuple(out.shape) == (own[0], expected):
        return out
    if tuple(out.shape) != (*own, expected):
        raise ConfigError(
            f"sequences: expected outputs of shape {(own[0], expected)} or {(*own, expected)}, got {tuple(out.shape)}; "
            "change the read-out"
        )
    return _pooled(out, batch.lengths, getattr(model, "pool", "mean"))


def _pooled(out: Tensor, lengths: Tensor | None, pool: str) -> Tensor:
    if pool == "last":
        return out[:, -1] if lengths is None else out[torch.arange(len(out), device=out.device), lengths - 1]
    if lengths is None:
        return out.mean(1)
    real = torch.arange(out.shape[1], device=out.device) < lengths[:, None]
    return (out * real[:, :, None]).sum(1) / lengths[:, None]


def loss(task: SequenceTask, out: Tensor, batch: Batch) -> Tensor:
    """Mean over the targets that count: cross entropy in nats, or the squared error of a number."""
    out, y = _counted(out, batch)
    if not task.classes:
        return nn.functional.mse_loss(out[..., 0], y)
    return nn.functional.cross_entropy(out, y)


def _counted(out: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The targets that count, in a row, with their outputs."""
    if batch.y.ndim == 1:
        return out, batch.y
    if batch.mask is None:
        return out.flatten(0, 1), batch.y.flatten()
    return out[batch.mask], batch.y[batch.mask]


@dataclass(frozen=True)
class Score:
    """What a test gave.

    Attributes:
        metric: the task's metric, in its unit.
        loss: mean of the loss.
        whole: percent of sequences of which every counted target is right; None where there is one per sequence.
    """

    metric: float
    loss: float
    whole: float | None


@torch.no_grad()
def evaluate(
    model: nn.Module, task: SequenceTask, part: Sequences, *, batch: int = 128, device: torch.device | str = "cpu"
) -> Score:
    """Test a model on a part of a task, in evaluation mode."""
    was = model.training
    model.eval()
    total = right = whole = 0.0
    count = 0
    for start in range(0, len(part), batch):
        chosen = task.batch(part, slice(start, start + batch), device)
        out = read_out(model, task, chosen)
        flat, y = _counted(out, chosen)
        total += float(loss(task, out, chosen)) * len(y)
        count += len(y)
        right += float(_right(task, flat, y).sum())
        if task.targets == "position" and task.classes:
            wrong = out.argmax(-1) != chosen.y
            wrong = wrong if chosen.mask is None else wrong & chosen.mask
            whole += float((~wrong.any(1)).sum())
    model.train(was)
    share = 100 * right / count
    metric = total / count / math.log(2) if task.metric == "bits per character" else share
    return Score(metric, total / count, 100 * whole / len(part) if task.targets == "position" else None)


def _right(task: SequenceTask, out: Tensor, y: Tensor) -> Tensor:
    return out.argmax(-1) == y if task.classes else (out[..., 0] - y).abs() < TOLERANCE


def unit(task: SequenceTask) -> str:
    """The unit of the task's metric."""
    return "bit" if task.metric == "bits per character" else "%"


def reached(task: SequenceTask, value: float, threshold: float) -> bool:
    """Whether a value of the metric is as good as the threshold."""
    return value >= threshold if task.more_is_better else value <= threshold
