"""DeepHopfield: layered Hopfield networks, dense and convolutional."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from toreq.core import (
    Activation,
    Bilinear,
    Conv,
    Coupling,
    Dense,
    Drive,
    Energy,
    Lateral,
    Node,
    ReLU,
    Tanh,
    activation,
    control_norm,
)
from toreq.errors import ConfigError
from toreq.estimators import Estimator
from toreq.solvers import Anderson, Solver
from toreq.systems.base import System, chain_bounds


class DeepHopfield(System):
    r"""Layers joined by symmetric (forward and transposed) couplings (Hopfield 1984; Scellier and Bengio 2017).

    .. math:: E = \sum_l\left[\langle a_l, h_l\rangle - \Phi(a_l)\right] - \langle h_1, U x + c\rangle
              - \sum_l\langle h_{l+1}, A_l h_l + c_{l+1}\rangle - \tfrac12\langle g * h_1, W(g * h_1)\rangle

    The last term is there only when ``gated``, with :math:`g = \mathrm{logistic}(G x + d)`. The read-out is a linear
    head on the last layer, or with ``output="node"`` a further layer of ``num_classes`` units inside the energy, the
    papers' network, which is trained by the squared error to one-hot targets.

    Args:
        input_shape: shape of one example; it is flattened.
        num_classes: number of classes.
        solver, estimator: override the shipped ones.
        hidden: widths of the hidden layers.
        nonlinearity: of the hidden layers.
        gain: ratio of one layer's slope to that of the layer below (tanh and relu; 16 when None). The way up is then
            ``gain`` times as strong as the way down, at the same radius of the relaxation.
        gated: add a gated lateral coupling on the first layer.
        output: ``"head"`` or ``"node"``.
        coupling_scale: the initial couplings' deviation is this over the square root of fan-in.
        norm_bound: bound on the norm of all couplings together, which bounds the relaxation's radius; None: free.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        solver: Solver | None = None,
        estimator: Estimator | None = None,
        *,
        hidden: Sequence[int] = (512, 256),
        nonlinearity: str = "tanh",
        gain: float | None = None,
        gated: bool = False,
        output: str = "head",
        coupling_scale: float = 0.4,
        norm_bound: float | None = 0.8,
    ) -> None:
        super().__init__(input_shape, num_classes)
        self.hidden, self.nonlinearity, self.output = tuple(hidden), nonlinearity, _output(output)
        if not self.hidden or any(w < 1 for w in self.hidden):
            raise ConfigError(f"DeepHopfield: expected positive widths, got hidden={self.hidden}; e.g. (512, 256)")
        inputs = math.prod(self.input_shape)
        widths = list(self.hidden) + ([num_classes] if output == "node" else [])
        names = [f"h{i + 1}" for i in range(len(self.hidden))] + (["output"] if output == "node" else [])
        kinds = [nonlinearity] * len(self.hidden) + (["identity"] if output == "node" else [])
        slopes = _slopes(nonlinearity, gain, len(self.hidden)) + [1.0] * (len(widths) - len(self.hidden))
        nodes = [Node(n, w, _activation(k, g)) for n, w, k, g in zip(names, widths, kinds, slopes, strict=True)]
        couplings: list[Coupling] = [Drive("h1", nn.Sequential(nn.Flatten(), nn.Linear(inputs, widths[0])))]
        joint, own = chain_bounds(norm_bound, len(widths), gated)
        for i, (a, b) in enumerate(pairwise(widths)):
            couplings.append(Drive(names[i + 1], Bias((b,))))
            op = Dense(a, b, scale=coupling_scale / math.sqrt(a))
            if joint is not None:
                control_norm(op, joint / math.sqrt(slopes[i] * slopes[i + 1]))
            couplings.append(Bilinear(op, names[i], names[i + 1]))
        if gated:
            gate = nn.Sequential(nn.Flatten(), nn.Linear(inputs, widths[0]), nn.Sigmoid())
            lateral = Dense(widths[0], widths[0], symmetric=True, scale=0.25 / math.sqrt(widths[0]))
            if own is not None:
                control_norm(lateral, own)
            couplings.append(Lateral(lateral, "h1", gate))
        solver = Anderson(length=3) if solver is None else solver
        head = nn.Linear(widths[-1], num_classes) if output == "head" else nn.Identity()
        self.assemble(Energy(nodes, couplings), solver, estimator, head)

    def criterion(self, logits: Tensor, y: Tensor) -> Tensor:
        """Mean cross entropy, or half the squared error to one-hot targets with an output node."""
        if self.output == "head":
            return super().criterion(logits, y)
        self.check_labels(y)
        target = nn.functional.one_hot(y, self.num_classes).to(logits.dtype)
        return 0.5 * (logits - target).square().sum(1).mean()

    def feedforward(self) -> nn.Module:
        """The same widths and nonlinearity, feed-forward."""
        sizes = [math.prod(self.input_shape), *self.hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for a, b in pairwise(sizes):
            layers += [nn.Linear(a, b), activation(self.nonlinearity)]
        return nn.Sequential(*layers, nn.Linear(sizes[-1], self.num_classes))


class ConvHopfield(System):
    r"""Convolutional layers joined by convolutions and their transposes (Laborieux et al. 2021).

    .. math:: E = \sum_l\left[\langle a_l, h_l\rangle - \Phi(a_l)\right] - \langle h_1, U * x + c\rangle
              - \sum_l\langle h_{l+1}, A_l * h_l + c_{l+1}\rangle - \tfrac12\langle g * h_1, W * (g * h_1)\rangle

    with strided convolutions :math:`A_l`. The first convolution is the drive: computed once per relaxation. The last
    term (W a symmetric convolution) is there only when ``gated``.

    Args:
        input_shape: ``(C, H, W)``.
        num_classes: number of classes.
        solver, estimator: override the shipped ones.
        channels: filters of each layer.
        kernel: side of every kernel.
        stride: stride of every convolution.
        padding: zero padding of every convolution.
        nonlinearity: of the hidden layers.
        gain: ratio of one layer's slope to that of the layer below (tanh and relu; 16 when None). The way up is then
            ``gain`` times as strong as the way down, at the same radius of the relaxation.
        gated: add a gated lateral coupling on the first layer.
        coupling_scale: the initial couplings' deviation is this over the square root of fan-in.
        norm_bound: bound on the norm of all couplings together, which bounds the relaxation's radius; None: free.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        solver: Solver | None = None,
        estimator: Estimator | None = None,
        *,
        channels: Sequence[int] = (32, 64),
        kernel: int = 5,
        stride: int = 2,
        padding: int = 0,
        nonlinearity: str = "tanh",
        gain: float | None = None,
        gated: bool = False,
        coupling_scale: float = 0.5,
        norm_bound: float | None = 0.8,
    ) -> None:
        super().__init__(input_shape, num_classes)
        if len(self.input_shape) != 3:
            raise ConfigError(f"ConvHopfield: expected input_shape (C, H, W), got {self.input_shape}; use arch='mlp'")
        if not channels or any(c < 1 for c in channels) or kernel < 1 or stride < 1:
            raise ConfigError(
                f"ConvHopfield: expected positive channels, kernel and stride, got {tuple(channels)}, {kernel}, "
                f"{stride}; "
                "e.g. channels=(32, 64), kernel=5, stride=2"
            )
        self.channels, self.nonlinearity = tuple(channels), nonlinearity
        self.geometry = (kernel, stride, padding)
        first = self._convolution(self.input_shape[0], channels[0])
        probe = Conv(self.input_shape, channels[0], *self.geometry)
        shapes = [probe.out_shape]
        couplings: list[Coupling] = [Drive("h1", first)]
        joint, own = chain_bounds(norm_bound, len(self.channels), gated)
        slopes = _slopes(nonlinearity, gain, len(self.channels))
        for i, c in enumerate(channels[1:], start=1):
            fan_in = channels[i - 1] * kernel * kernel
            op = Conv(shapes[-1], c, *self.geometry, scale=coupling_scale / math.sqrt(fan_in))
            if joint is not None:
                control_norm(op, joint / math.sqrt(slopes[i - 1] * slopes[i]))
            shapes.append(op.out_shape)
            couplings.append(Drive(f"h{i + 1}", Bias((c, 1, 1), op.out_shape)))
            couplings.append(Bilinear(op, f"h{i}", f"h{i + 1}"))
        if gated:
            gate = nn.Sequential(self._convolution(self.input_shape[0], channels[0]), nn.Sigmoid())
            lateral = Conv(shapes[0], channels[0], 3, 1, 1, symmetric=True, scale=0.1 / math.sqrt(9 * channels[0]))
            if own is not None:
                control_norm(lateral, own)
            couplings.append(Lateral(lateral, "h1", gate))
        nodes = [
            Node(f"h{i + 1}", s, _activation(nonlinearity, g))
            for i, (s, g) in enumerate(zip(shapes, slopes, strict=True))
        ]
        solver = Anderson(length=3) if solver is None else solver
        head = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shapes[-1]), num_classes))
        self.assemble(Energy(nodes, couplings), solver, estimator, head)
        # channels-last weights make the whole relaxation channels-last, in which both directions are 2 to 3 times
        # faster
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _convolution(self, a: int, b: int) -> nn.Conv2d:
        return nn.Conv2d(a, b, *self.geometry)

    def feedforward(self) -> nn.Module:
        """The same convolutions, feed-forward."""
        layers: list[nn.Module] = []
        shape = self.input_shape
        for c in self.channels:
            layers += [self._convolution(shape[0], c), activation(self.nonlinearity)]
            shape = Conv(shape, c, *self.geometry).out_shape
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(math.prod(shape), self.num_classes))


class Bias(nn.Module):
    """A learned constant, expanded to the batch of the input it is called with.

    Args:
        shape: of the parameter.
        expanded: shape of one example's result; ``shape`` when None.
    """

    def __init__(self, shape: Sequence[int], expanded: Sequence[int] | None = None) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(*shape))
        self.expanded = tuple(shape if expanded is None else expanded)

    def forward(self, x: Tensor) -> Tensor:
        return self.value.expand(x.shape[0], *self.expanded)


_STEEP: dict[str, Callable[[float], Activation]] = {"tanh": Tanh, "relu": ReLU}
"""Activations whose slope can be set."""


def _slopes(nonlinearity: str, gain: float | None, layers: int) -> list[float]:
    if gain is not None and nonlinearity not in _STEEP:
        raise ConfigError(
            f"DeepHopfield: expected gain=None with nonlinearity={nonlinearity!r}, got {gain}; only "
            f"{' and '.join(_STEEP)} have a slope to set"
        )
    if gain is not None and not gain > 0:
        raise ConfigError(f"DeepHopfield: expected gain > 0, got {gain}; 1 makes all layers alike")
    ratio = (16.0 if gain is None else gain) if nonlinearity in _STEEP else 1.0
    return [ratio**i for i in range(layers)]


def _activation(kind: str, slope: float) -> Activation:
    return _STEEP[kind](slope) if kind in _STEEP else activation(kind)


def _output(kind: str) -> str:
    if kind not in ("head", "node"):
        raise ConfigError(f"DeepHopfield: expected output 'head' or 'node', got {kind!r}; choose one")
    return kind
