"""The papers' layered Hopfield network: what both of its reference trainers share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from toreq.errors import ConfigError


class LayeredNet(nn.Module):
    r"""Layers joined to their neighbours, the last one the output, all inside the energy.

    .. math:: E = \sum_l \tfrac12\|s_l\|^2 - \sum_l \langle s_l, W_l s_{l-1} + b_l\rangle, \qquad s_0 = x

    Hidden units are hard-sigmoid (their state clipped to [0, 1]), output units linear; the cost is
    :math:`C = \tfrac12\|s_L - y\|^2` with one-hot y.

    Args:
        layers: the maps :math:`W_l` with their biases, ``Linear`` (which takes its input
            flattened) or ``Conv2d``.
        input_shape: shape of one example.
    """

    def __init__(self, layers: Sequence[nn.Module], input_shape: Sequence[int]) -> None:
        super().__init__()
        for layer in layers:
            if not isinstance(layer, nn.Linear | nn.Conv2d) or layer.bias is None:
                raise ConfigError(f"LayeredNet: expected Linear or Conv2d layers with a bias, got {layer}; use those")
        self.layers = nn.ModuleList(layers)
        self.input_shape = tuple(input_shape)
        self.shapes: list[tuple[int, ...]] = []
        for layer in layers:
            self.shapes.append(_out_shape(layer, self.shapes[-1] if self.shapes else self.input_shape))

    @property
    def classes(self) -> int:
        """Number of output units."""
        return self.shapes[-1][0]

    def start(self, x: Tensor) -> list[Tensor]:
        """States ``(B, *shape)`` of all layers at zero."""
        return [x.new_zeros(x.shape[0], *shape) for shape in self.shapes]

    def up(self, index: int, below: Tensor) -> Tensor:
        """:math:`W_l s_{l-1} + b_l`, of shape ``(B, *shape of layer l)``."""
        layer = self.layers[index]
        return layer(below.flatten(1)) if isinstance(layer, nn.Linear) else layer(below)

    def down(self, index: int, above: Tensor) -> Tensor:
        """:math:`W_l^T s_l`, of the shape of the layer below."""
        layer = self.layers[index]
        shape = self.shapes[index - 1]
        if isinstance(layer, nn.Linear):
            return (above @ layer.weight).view(-1, *shape)
        assert isinstance(layer, nn.Conv2d)
        (stride, _), (padding, _), kernel = layer.stride, layer.padding, layer.kernel_size[0]
        assert isinstance(padding, int)
        extra = shape[-1] - ((above.shape[-1] - 1) * stride - 2 * padding + kernel)
        return F.conv_transpose2d(above, layer.weight, None, stride, padding, extra)

    def field(self, index: int, x: Tensor, states: Sequence[Tensor], pull: Tensor | None = None) -> Tensor:
        """Field of one layer from its neighbours, by hand; ``pull`` is the nudge on the output layer."""
        field = self.up(index, states[index - 1] if index > 0 else x)
        if index + 1 < len(states):
            return field + self.down(index + 1, states[index + 1])
        return field if pull is None else field + pull

    def activate(self, index: int, field: Tensor) -> Tensor:
        """State of a layer from its field: clipped to [0, 1], the output's as it is."""
        return field if index == len(self.shapes) - 1 else field.clamp(0, 1)

    def targets(self, labels: Tensor, like: Tensor) -> Tensor:
        """One-hot targets ``(B, classes)`` in the dtype of ``like``."""
        return F.one_hot(labels, self.classes).to(like.dtype)


def mlp(
    input_shape: Sequence[int] = (1, 28, 28),
    hidden: Sequence[int] = (512,),
    classes: int = 10,
    gain: float = 1.0,
) -> LayeredNet:
    """The dense network, 784-512-10 unless told otherwise, with uniform weights up to ``gain / sqrt(fan-in)``."""
    widths = [math.prod(input_shape), *hidden, classes]
    return LayeredNet([_scaled(nn.Linear(a, b), gain) for a, b in pairwise(widths)], input_shape)


def conv(
    input_shape: Sequence[int] = (1, 28, 28),
    channels: Sequence[int] = (32, 64),
    kernel: int = 5,
    stride: int = 2,
    classes: int = 10,
    gain: float = 1.0,
) -> LayeredNet:
    """Strided convolutions (the papers pool), then a dense output, with weights as in :func:`mlp`."""
    layers: list[nn.Module] = []
    shape = tuple(input_shape)
    for count in channels:
        layers.append(_scaled(nn.Conv2d(shape[0], count, kernel, stride), gain))
        shape = _out_shape(layers[-1], shape)
    layers.append(_scaled(nn.Linear(math.prod(shape), classes), gain))
    return LayeredNet(layers, input_shape)


def _scaled(layer: nn.Linear | nn.Conv2d, gain: float) -> nn.Linear | nn.Conv2d:
    # torch draws both uniformly up to 1 / sqrt(fan-in), as the papers do
    with torch.no_grad():
        layer.weight.mul_(gain)
    return layer


def _out_shape(layer: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    probe = torch.zeros(1, *shape, dtype=next(layer.parameters()).dtype)
    with torch.no_grad():
        return tuple(layer(probe.flatten(1) if isinstance(layer, nn.Linear) else probe).shape[1:])
