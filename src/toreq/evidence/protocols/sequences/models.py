"""The sides: recurrent nets, a transformer, a state-space model, and the looped transformer with two gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from toreq.data import SequenceTask
from toreq.errors import ConfigError, nearest
from toreq.evidence import counting
from toreq.evidence.protocols.sequences.looped import Looped
from toreq.evidence.protocols.sequences.parts import Embedding
from toreq.evidence.protocols.sequences.ssm import SSMBlock

HEADS, LAYERS, STATES = 4, 2, 16
STEP, WIDEST = 4, 1024
"""Widths are multiples of the number of heads."""

SIDES = {
    "lstm": "LSTM, backprop through time",
    "gru": "GRU, backprop through time",
    "transformer": "untied pre-norm transformer encoder, backprop",
    "ssm": "diagonal state-space model (S4D), backprop through time",
    "looped-implicit": "the looped transformer with the implicit gradient",
    "looped-eqprop": "the looped transformer with Equilibrium Propagation",
}
BACKPROP = ("lstm", "gru", "transformer", "ssm")


class Recurrent(nn.Module):
    """An LSTM or a GRU of one layer, ``(B, N, ...) -> (B, N, C)``; a sequence's answer is the last one."""

    pool: Literal["last", "mean"] = "last"

    def __init__(self, task: SequenceTask, width: int, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.embed = Embedding(task, width, positioned=False)
        self.inner = kind(width, width, batch_first=True)
        self.head = nn.Linear(width, task.outputs)
        if kind is nn.LSTM:
            # a forget gate that starts open (Gers et al. 2000); torch adds two biases, gates in order i, f, g, o
            for name, bias in self.inner.named_parameters():
                if name.startswith("bias"):
                    nn.init.constant_(bias.detach()[width : 2 * width], 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.embed(x))[0])


class Transformer(nn.Module):
    """A pre-norm transformer encoder; it sees no later positions where the task is causal, and no padding."""

    pool: Literal["last", "mean"] = "mean"

    def __init__(self, task: SequenceTask, width: int, layers: int = LAYERS) -> None:
        super().__init__()
        self.causal, self.padding = task.causal, task.padding
        self.embed = Embedding(task, width, positioned=True)
        block = nn.TransformerEncoderLayer(
            width, HEADS, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.inner = nn.TransformerEncoder(block, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, task.outputs)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device) if self.causal else None
        hidden = None if self.padding is None else x == self.padding
        out = self.inner(self.embed(x), mask=mask, src_key_padding_mask=hidden, is_causal=self.causal)
        return self.head(out)


class StateSpace(nn.Module):
    """Blocks of diagonal state spaces; causal, and read out over the whole sequence."""

    pool: Literal["last", "mean"] = "mean"

    def __init__(self, task: SequenceTask, width: int, layers: int = LAYERS, states: int = STATES) -> None:
        super().__init__()
        self.embed = Embedding(task, width, positioned=False)
        self.blocks = nn.ModuleList([SSMBlock(width, states) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, task.outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))

    def uncounted_flops(self, length: int) -> float:
        """Of a forward pass of one sequence, what torch's counter does not see."""
        return sum(b.ssm.uncounted_flops(length) for b in self.blocks if isinstance(b, SSMBlock))


def _looped(task: SequenceTask, width: int, implicit: bool) -> Looped:
    embed = Embedding(task, width, positioned=True)
    return Looped(embed, width, HEADS, 2 * width, task.outputs, task.length, causal=task.causal, implicit=implicit)


_MAKERS: dict[str, Callable[[SequenceTask, int], nn.Module]] = {
    "lstm": lambda task, width: Recurrent(task, width, nn.LSTM),
    "gru": lambda task, width: Recurrent(task, width, nn.GRU),
    "transformer": Transformer,
    "ssm": StateSpace,
    "looped-implicit": lambda task, width: _looped(task, width, implicit=True),
    "looped-eqprop": lambda task, width: _looped(task, width, implicit=False),
}


def build(name: str, task: SequenceTask, parameters: int, seed: int, device: torch.device | str = "cpu") -> nn.Module:
    """A side's model, freshly drawn, with the width that brings it nearest to a number of parameters.

    Args:
        name: of `SIDES`.
        task: what it is to learn.
        parameters: trainable numbers wanted, the same for all sides.
        seed: of the weights.
        device: where it is to be.

    Raises:
        ConfigError: an unknown side.
    """
    if name not in _MAKERS:
        raise ConfigError(f"sequences.build: expected a side, got {name!r}; {nearest(name, _MAKERS)}")
    width = _width(name, task, parameters)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _MAKERS[name](task, width).to(device)


def _width(name: str, task: SequenceTask, parameters: int) -> int:
    """The largest width of at most so many parameters, or the next one where that is nearer; they grow with it."""

    def count(width: int) -> int:
        with torch.random.fork_rng(devices=[]):
            return counting.parameters(_MAKERS[name](task, STEP * width))

    low, high = 1, WIDEST // STEP
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) <= parameters else (low, middle)
    return STEP * min((low, high), key=lambda width: abs(count(width) - parameters))
