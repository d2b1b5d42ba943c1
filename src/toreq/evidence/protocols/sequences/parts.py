"""What every model on sequences starts with: the embedding of symbols or features, and positions of any length."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from toreq.data import SequenceTask


def positions(length: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    r"""Sines and cosines of the position at frequencies from 1 to :math:`10^{-4}` (Vaswani et al. 2017), (N, D)."""
    rate = torch.exp(-math.log(1e4) / max(1, width // 2) * torch.arange((width + 1) // 2, device=device))
    angle = torch.arange(length, device=device)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], 2).flatten(1)[:, :width]


class Embedding(nn.Module):
    """Symbols ``(B, N)`` or features ``(B, N, F)`` as vectors ``(B, N, D)``.

    Args:
        task: says which, and how many.
        width: D.
        positioned: add sines and cosines of the position, for models that cannot tell the order otherwise.
    """

    def __init__(self, task: SequenceTask, width: int, positioned: bool) -> None:
        super().__init__()
        self.width, self.positioned = width, positioned
        self.inner = nn.Embedding(task.vocabulary, width) if task.vocabulary else nn.Linear(task.features, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        return h + positions(x.shape[1], self.width, x.device).to(h.dtype) if self.positioned else h
