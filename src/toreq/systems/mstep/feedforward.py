"""Feed-forward twins of the pyramids: the same layers on every level, run once from coarse to fine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from toreq.core import Replicate, activation
from toreq.systems.looped_transformer import TokenHead, Tokens
from toreq.systems.mstep.parts import PadTokens, PoolImage, PoolTokens


class MultiResolution(nn.Module):
    """Layers on every level of an image pyramid; the last layer of each adds what the next coarser level found there.

    Args:
        input_shape: shape of one example.
        num_classes: number of classes.
        levels: number of levels.
        size: padded height and width of the finest level; None for inputs that are not pooled.
        shared: one set of convolutions for all levels (dense layers have their own: their widths differ).
        channels, kernel, stride, padding: of convolutional layers, or
        hidden: widths of dense ones.
        nonlinearity: of the layers.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        levels: int,
        size: Sequence[int] | None,
        shared: bool,
        *,
        channels: Sequence[int] = (),
        kernel: int = 5,
        stride: int = 2,
        padding: int = 2,
        hidden: Sequence[int] = (),
        nonlinearity: str = "tanh",
    ) -> None:
        super().__init__()
        self.inputs = nn.ModuleList(nn.Identity() if size is None else PoolImage(size, 2**i) for i in range(levels))
        self.act = activation(nonlinearity)
        self.weights = nn.Parameter(torch.ones(max(levels - 1, 0)))
        stacks: list[nn.ModuleList] = []
        for i in range(levels):
            if channels:
                widths = [input_shape[0], *channels]
                stack: list[nn.Module] = [nn.Conv2d(a, b, kernel, stride, padding) for a, b in pairwise(widths)]
            else:
                pixels = input_shape if size is None else (input_shape[0], size[0] // 2**i, size[1] // 2**i)
                widths = [math.prod(pixels), *(w // 2**i for w in hidden)]
                stack = [nn.Sequential(nn.Flatten(), nn.Linear(a, b)) for a, b in pairwise(widths)]
            stacks.append(stacks[0] if shared and channels and stacks else nn.ModuleList(stack))
        self.stacks = nn.ModuleList(stacks)
        self.axes = (-2, -1) if channels else (-1,)
        with torch.no_grad():
            units = self._features(torch.zeros(1, *input_shape)).flatten(1).shape[1]
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(units, num_classes))

    def _features(self, x: Tensor) -> Tensor:
        above: Tensor | None = None
        for i in range(len(self.stacks) - 1, -1, -1):
            *first, last = list(self.stacks[i])  # type: ignore[arg-type]
            h = self.inputs[i](x)
            for layer in first:
                h = self.act(layer(h))
            a = last(h)
            if above is not None:
                a = a + self.weights[i] * Replicate(above.shape[1:], 2, self.axes)(above)
            above = self.act(a)
        assert above is not None
        return above

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self._features(x))


class MultiResolutionTokens(nn.Module):
    """A pre-norm transformer block over the tokens of every level; each adds what the next coarser level found.

    Args:
        input_shape: ``(C, H, W)`` or ``(N,)``.
        num_classes: number of classes.
        levels: number of levels.
        shared: one block for all levels.
        widths: features, heads, hidden, patch, vocabulary and pool of the looped transformer.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        levels: int,
        shared: bool,
        widths: tuple[int, int, int, int | str, int, str],
    ) -> None:
        super().__init__()
        features, heads, hidden, patch, vocabulary, pool = widths
        self.embed = Tokens(input_shape, features, patch, vocabulary)
        coarsest = 2 ** (levels - 1)
        self.count = math.ceil(self.embed.count / coarsest) * coarsest
        self.pad = PadTokens(self.count - self.embed.count)
        self.pools = nn.ModuleList(PoolTokens(2**i) if i else nn.Identity() for i in range(levels))
        blocks: list[nn.Module] = []
        for _ in range(levels):
            fresh = nn.TransformerEncoderLayer(
                features, heads, hidden, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            blocks.append(blocks[0] if shared and blocks else fresh)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(features)
        self.head = TokenHead(self.count, features, num_classes, pool)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.pad(self.embed(x))
        above: Tensor | None = None
        for pool, block in zip(reversed(list(self.pools)), reversed(list(self.blocks)), strict=True):
            h = pool(tokens)
            above = block(h if above is None else h + above.repeat_interleave(2, -2))
        return self.head(self.norm(above))
