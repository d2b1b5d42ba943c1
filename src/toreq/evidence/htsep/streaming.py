"""What H5, H6 and H9 share: sequences written to a torus memory step by step, and a training on what it holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from toreq.memory import TorusMemory

Loss = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def held(parts: Sequence[Tensor], memory: TorusMemory) -> Tensor:
    """Everything that a torus holds after a stream, its newest row first, flattened.

    Args:
        parts: modalities, each ``(B, T, F)``: part m is written at address m of the second axis; on a ring all parts
            are written to the same slot.
        memory: a ring, or a torus of time by modality.

    Returns:
        ``(B, slots * F)``.
    """
    state = memory.empty(len(parts[0]))
    for step in range(parts[0].shape[1]):
        state = memory.advance(state)
        for place, part in enumerate(parts):
            state = memory.write(state, part[:, step], [float(place)] if memory.sizes else None)
    return state.slots.flatten(1)


@torch.no_grad()
def faded(parts: Sequence[Tensor], memory: TorusMemory) -> Tensor:
    """What a single read at the head recalls after a stream: the sum of all that was written, faded by age."""
    state = memory.empty(len(parts[0]))
    for step in range(parts[0].shape[1]):
        state = memory.advance(state)
        for place, part in enumerate(parts):
            state = memory.write(state, part[:, step], [float(place)] if memory.sizes else None)
    return memory.read(state, [0.0] * len(memory.sizes) if memory.sizes else None)


class Recurrent(nn.Module):
    """A GRU (Cho et al. 2014) or LSTM whose last state, or every state, is read linearly.

    Args:
        inputs: numbers a step.
        width: units.
        outputs: of the read-out.
        kind: ``"gru"`` or ``"lstm"``.
        every: read every step.
    """

    def __init__(self, inputs: int, width: int, outputs: int, kind: str = "gru", every: bool = False) -> None:
        super().__init__()
        self.inner = (nn.GRU if kind == "gru" else nn.LSTM)(inputs, width, batch_first=True)
        self.head, self.every = nn.Linear(width, outputs), every

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, inputs)`` to ``(B, outputs)``, or ``(B, T, outputs)``."""
        states, _ = self.inner(x)
        return self.head(states if self.every else states[:, -1])


def fit(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epochs: int,
    rate: float,
    batch: int,
    seed: int,
    loss: Loss = nn.functional.cross_entropy,
) -> int:
    """Train by Adam, the rate falling linearly to 0; returns the samples seen. Leaves the net in evaluation mode."""
    g = torch.Generator().manual_seed(seed)
    adam = torch.optim.Adam(net.parameters(), lr=rate)
    steps = epochs * -(-len(x) // batch)
    falling = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, steps)
    net.train()
    for _ in range(epochs):
        for part in torch.randperm(len(x), generator=g).split(batch):
            adam.zero_grad()
            loss(net(x[part]), y[part]).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            adam.step()
            falling.step()
    net.eval()
    return epochs * len(x)


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percent classified correctly."""
    right = sum(int((net(x[part]).argmax(1) == y[part]).sum()) for part in torch.arange(len(x)).split(500))
    return 100 * right / len(x)
