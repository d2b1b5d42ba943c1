"""DiffTorEqProp with dense and with convolutional layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from toreq.core import Conv, Dense
from toreq.core.operators import Operator
from toreq.errors import ConfigError
from toreq.estimators import Estimator
from toreq.solvers import Solver
from toreq.systems.base import System
from toreq.systems.difftoreqprop import DiffTorEqProp


class DiffMLP(DiffTorEqProp):
    """Dense hidden layers above the visible node; see :class:`~toreq.systems.difftoreqprop.DiffTorEqProp`.

    Args:
        input_shape: shape of one example.
        num_classes: number of classes.
        solver, estimator: override the shipped ones.
        hidden: widths of the hidden layers.
        clamp: strength of the pull of the input on the visible node, above 0.
        visible: ``"identity"``, or ``"hard_sigmoid"`` to stay in [0, 1].
        noise: initial deviation of the learned noise on the clamp in training, in units of the input; None for none.
        denoising: weight of the denoising cost in training; 0 for a classifier only.
        span: smallest and largest deviation of the noise that is to be removed.
        direct: whether the input also drives the hidden layers.
        lift: slope of the first hidden layer over that of the visible node; None for 0.5 with ``direct``, else 1024.
        gain: ratio of one hidden layer's slope to that of the layer below; None for 2 with ``direct``, else 16; 1/16
            with ``memory``.
        label_gain: slope of the label node over that of the last hidden layer; None for 4 with ``direct``, else 1; 128
            with ``memory``.
        coupling_scale: the initial couplings' deviation is this over the square root of fan-in.
        norm_bound: bound on the norm of all couplings together, which bounds the relaxation's radius; None: free.
        memory: patterns of an associative memory beside the layers
            (:class:`~toreq.systems.difftoreqprop_memory.PatternMemory`); 0 for none. Needs ``denoising``.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        solver: Solver | None = None,
        estimator: Estimator | None = None,
        *,
        hidden: Sequence[int] = (512,),
        clamp: float = 1.0,
        visible: str = "identity",
        noise: float | None = None,
        denoising: float = 0.0,
        span: tuple[float, float] = (0.02, 4.0),
        direct: bool = True,
        lift: float | None = None,
        gain: float | None = None,
        label_gain: float | None = None,
        coupling_scale: float = 0.5,
        norm_bound: float | None = 0.8,
        memory: int = 0,
    ) -> None:
        super().__init__(input_shape, num_classes)
        self.hidden = tuple(hidden)
        if not self.hidden or any(w < 1 for w in self.hidden):
            raise ConfigError(f"DiffMLP: expected positive widths, got hidden={self.hidden}; e.g. (512,)")
        self.build(
            solver,
            estimator,
            clamp=clamp,
            visible=visible,
            noise=noise,
            denoising=denoising,
            span=span,
            direct=direct,
            lift=lift,
            gain=gain,
            label_gain=label_gain,
            coupling_scale=coupling_scale,
            norm_bound=norm_bound,
            memory=memory,
        )

    def operators(self, scale: float) -> list[Operator]:
        shapes = [self.input_shape, *((w,) for w in self.hidden)]
        return [Dense(a, b, scale=scale / math.sqrt(math.prod(a))) for a, b in pairwise(shapes)]

    def views(self, channels: int) -> list[nn.Module]:
        inputs = channels * math.prod(self.input_shape[1:])
        return [nn.Sequential(nn.Flatten(), nn.Linear(inputs, w, bias=False)) for w in self.hidden]

    def feedforward(self) -> nn.Module:
        """The same widths, feed-forward, with tanh."""
        sizes = [math.prod(self.input_shape), *self.hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for a, b in pairwise(sizes):
            layers += [nn.Linear(a, b), nn.Tanh()]
        return nn.Sequential(*layers, nn.Linear(sizes[-1], self.num_classes))


class DiffConv(DiffTorEqProp):
    """Convolutional hidden layers above the visible node, and dense ones above these; see
    :class:`~toreq.systems.difftoreqprop.DiffTorEqProp`.

    Args:
        input_shape: ``(C, H, W)``.
        num_classes: number of classes.
        solver, estimator: override the shipped ones.
        channels: filters of each convolutional hidden layer.
        dense: widths of the dense hidden layers above, which see the whole image at once.
        kernel: side of every kernel.
        stride: stride of every convolution.
        padding: zero padding of every convolution.
        clamp, visible, noise, denoising, span, direct, lift, gain, label_gain, coupling_scale,
            norm_bound, memory: as for :class:`DiffMLP`.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        solver: Solver | None = None,
        estimator: Estimator | None = None,
        *,
        channels: Sequence[int] = (32, 64),
        dense: Sequence[int] = (),
        kernel: int = 5,
        stride: int = 2,
        padding: int = 2,
        clamp: float = 1.0,
        visible: str = "identity",
        noise: float | None = None,
        denoising: float = 0.0,
        span: tuple[float, float] = (0.02, 4.0),
        direct: bool = True,
        lift: float | None = None,
        gain: float | None = None,
        label_gain: float | None = None,
        coupling_scale: float = 0.5,
        norm_bound: float | None = 0.8,
        memory: int = 0,
    ) -> None:
        super().__init__(input_shape, num_classes)
        if len(self.input_shape) != 3:
            raise ConfigError(f"DiffConv: expected input_shape (C, H, W), got {self.input_shape}; use arch='mlp'")
        if not channels or any(c < 1 for c in (*channels, *dense)) or kernel < 1 or stride < 1:
            raise ConfigError(
                f"DiffConv: expected positive channels, widths, kernel and stride, got {tuple(channels)}, "
                f"{tuple(dense)}, {kernel}, {stride}; e.g. channels=(32, 64), dense=(), kernel=5, stride=2"
            )
        self.channels, self.dense, self.geometry = tuple(channels), tuple(dense), (kernel, stride, padding)
        self.build(
            solver,
            estimator,
            clamp=clamp,
            visible=visible,
            noise=noise,
            denoising=denoising,
            span=span,
            direct=direct,
            lift=lift,
            gain=gain,
            label_gain=label_gain,
            coupling_scale=coupling_scale,
            norm_bound=norm_bound,
            memory=memory,
        )
        # in which both directions of a convolution are faster
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def operators(self, scale: float) -> list[Operator]:
        ops: list[Operator] = []
        shape, kernel = self.input_shape, self.geometry[0]
        for c in self.channels:
            ops.append(Conv(shape, c, *self.geometry, scale=scale / math.sqrt(shape[0] * kernel * kernel)))
            shape = ops[-1].out_shape
        for w in self.dense:
            ops.append(Dense(shape, w, scale=scale / math.sqrt(math.prod(shape))))
            shape = (w,)
        return ops

    def views(self, channels: int) -> list[nn.Module]:
        """For a convolutional layer one convolution of the pixels that a unit would see through the layers below it;
        dense layers see all pixels."""
        kernel, stride, padding = self.geometry
        found: list[nn.Module] = []
        field, step, edge = 1, 1, 0
        for c in self.channels:
            field, edge, step = field + (kernel - 1) * step, edge + padding * step, step * stride
            found.append(nn.Conv2d(channels, c, field, step, edge, bias=False))
        inputs = channels * math.prod(self.input_shape[1:])
        return [*found, *(nn.Sequential(nn.Flatten(), nn.Linear(inputs, w, bias=False)) for w in self.dense)]

    def feedforward(self) -> nn.Module:
        """The same convolutions, feed-forward, with tanh."""
        layers: list[nn.Module] = []
        shape = self.input_shape
        for c in self.channels:
            layers += [nn.Conv2d(shape[0], c, *self.geometry), nn.Tanh()]
            shape = Conv(shape, c, *self.geometry).out_shape
        layers.append(nn.Flatten())
        for a, b in pairwise([math.prod(shape), *self.dense]):
            layers += [nn.Linear(a, b), nn.Tanh()]
        return nn.Sequential(*layers, nn.Linear([math.prod(shape), *self.dense][-1], self.num_classes))


ARCHITECTURES: dict[str, type[System]] = {"mlp": DiffMLP, "conv": DiffConv}
"""``arch=`` of ``create("difftoreqprop", ...)``; the first is the default."""
