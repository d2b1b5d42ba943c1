"""The architectures of TPEqProp: perceptrons, residual networks, convolutions and transformers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from toreq.core.blocks import Branch, Convolution, Linear, Map, Norm, Pointwise, SelfAttention, Stack
from toreq.core.norm_control import control_norm
from toreq.errors import ConfigError
from toreq.estimators import Estimator
from toreq.solvers import Solver
from toreq.systems.base import System
from toreq.systems.looped_transformer import TokenHead, Tokens
from toreq.systems.tpeqprop import Levels, TPEqProp, depth_scale_of, topology_of

_GAIN = {"relu": math.sqrt(2.0), "tanh": 1.0, "gelu": 1.5}
"""Deviation of a weight times the square root of fan-in that keeps a state's size through a nonlinearity."""


def _levels_of(topology: str, levels: int, tied: bool, least: int) -> int:
    """The number of levels, checked against the topology."""
    topology_of(topology)
    if topology == "loop" and levels != 1:
        raise ConfigError(f"TPEqProp: expected levels=1 on a loop, got {levels}; use a ring for several")
    if topology != "loop" and levels < least:
        raise ConfigError(f"TPEqProp: expected levels >= {least} on a {topology}, got {levels}; add levels")
    if tied and topology != "chain":
        raise ConfigError(f"TPEqProp: expected tied=False on a {topology}, got True; a tied ring is a loop")
    return levels


def _bound(linear: nn.Module, bound: float | None, name: str = "weight") -> None:
    if bound is not None:
        control_norm(linear, bound, name)


class PredictiveMLP(TPEqProp):
    r"""Dense levels: :math:`f_1 = U x + c,\ f_l(h) = W_l\,\sigma(h) + b_l`, local update
    :math:`\Delta W_l \propto \epsilon_l\,\sigma(h_{l-1})^\top`.

    On a ring or loop :math:`f_1(h; x) = W_1\sigma(h_R) + b_1 + U x`, the norm of each W bounded.

    Args:
        input_shape: shape of one example; it is flattened.
        num_classes: number of classes.
        solver, estimator: override the shipped ones.
        hidden: widths of the levels.
        nonlinearity: ``"tanh"``, ``"relu"`` or ``"gelu"``.
        topology: ``"chain"``, ``"ring"`` (the levels in a circle) or ``"loop"`` (one level).
        feedback: ``"exact"`` or ``"learned"`` top-down weights.
        norm_bound: bound on each matrix's norm on rings and loops; None: free.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        solver: Solver | None = None,
        estimator: Estimator | None = None,
        *,
        hidden: Sequence[int] = (256, 256),
        nonlinearity: str = "relu",
        topology: str = "chain",
        feedback: str = "exact",
        norm_bound: float | None = 0.9,
    ) -> None:
        super().__init__(input_shape, num_classes)
        if not hidden or any(w < 1 for w in hidden):
            raise ConfigError(f"PredictiveMLP: expected positive widths, got hidden={tuple(hidden)}; e.g. (256, 256)")
        _levels_of(topology, len(hidden), False, 1 if topology == "chain" else 2)
        self.hidden, self.nonlinearity, self.norm_bound = tuple(hidden), nonlinearity, norm_bound
        self.feedback, self.topology = feedback, topology
        self.build(topology, solver, estimator)

    def levels(self) -> Levels:
        widths, gain = self.hidden, _GAIN.get(self.nonlinearity, 1.0)
        ring = self.topology != "chain"
        embed = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(self.input_shape), widths[0]))
        ends = list(pairwise(widths))
        if ring:
            ends = [(widths[-1], widths[0]), *ends]
        blocks: list[nn.Module] = []
        for i, (a, b) in enumerate(ends):
            linear = Linear(a, b, 0.5 if ring else gain, self.feedback)
            _bound(linear, self.norm_bound if ring else None)
            inner = Stack(Pointwise(self.nonlinearity), linear)
            blocks.append(Branch(inner, skip=False, inject=True) if ring and i == 0 else inner)
        head = nn.Sequential(Pointwise(self.nonlinearity), nn.Linear(widths[-1], self.num_classes))
        return Levels(embed, blocks, [(w,) for w in widths], head)


class PredictiveResidual(TPEqProp):
    r"""Residual levels of one width: :math:`f_l(h) = h + \rho\,[W_l\,\sigma(h) + b_l]`, :math:`\rho` scaled by depth.

    On a ring or loop the first block has no skip connection, :math:`f_1(h; x) = \rho\,[W_1\sigma(h_R) + b_1] + U x`:
    with one, the ring would have eigenvalues near 1 and nowhere to settle.

    Args:
        input_shape: shape of one example; it is flattened.
        num_classes: number of classes.
        solver, estimator: override the shipped ones.
        width: of every level.
        levels: their number, the first one (the embedded input) included.
        nonlinearity: ``"tanh"``, ``"relu"`` or ``"gelu"``.
        topology: ``"chain"``, ``"ring"`` or ``"loop"``.
        depth_scale: each of L branches is divided by the root of L (``"sqrt"``), by L (``"linear"``) or by
            nothing (``"none"``).
        branch_scale: every branch is multiplied by this.
        tied: all blocks of a chain share their weights.
        feedback: ``"exact"`` or ``"learned"`` top-down weights.
        norm_bound: bound on the first matrix's norm on rings and loops; None: free.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        solver: Solver | None = None,
        estimator: Estimator | None = None,
        *,
        width: int = 128,
        levels: int = 8,
        nonlinearity: str = "relu",
        topology: str = "chain",
        depth_scale: str = "sqrt",
        branch_scale: float = 1.0,
        tied: bool = False,
        feedback: str = "exact",
        norm_bound: float | None = 0.9,
    ) -> None:
        super().__init__(input_shape, num_classes)
        if width < 1:
            raise ConfigError(f"PredictiveResidual: expected width >= 1, got {width}; e.g. 128")
        levels = 1 if topology == "loop" else levels
        self.count = _levels_of(topology, levels, tied, 2)
        self.width, self.nonlinearity, self.tied, self.norm_bound = width, nonlinearity, tied, norm_bound
        self.feedback, self.topology = feedback, topology
        self.scale = depth_scale_of(depth_scale, branch_scale, max(levels - 1, 1))
        self.build(topology, solver, estimator)

    def levels(self) -> Levels:
        ring = self.topology != "chain"
        embed = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(self.input_shape), self.width))
        blocks: list[nn.Module] = []
        if ring:
            blocks.append(self._block(0.5, skip=False, scale=1.0))
        rest = self.count - 1
        first = [self._block(_GAIN.get(self.nonlinearity, 1.0), skip=True, scale=self.scale)] if rest else []
        more = (
            []
            if self.tied
            else [self._block(_GAIN.get(self.nonlinearity, 1.0), True, self.scale) for _ in range(rest - 1)]
        )
        blocks += first * rest if self.tied else [*first, *more]
        head = nn.Sequential(Pointwise(self.nonlinearity), nn.Linear(self.width, self.num_classes))
        return Levels(embed, blocks, [(self.width,)] * self.count, head)

    def _block(self, gain: float, skip: bool, scale: float) -> Branch:
        linear = Linear(self.width, self.width, gain, self.feedback)
        if not skip:
            _bound(linear, self.norm_bound)
        return Branch(Stack(Pointwise(self.nonlinearity), linear), scale, skip, inject=not skip)


class PredictiveConv(TPEqProp):
    r"""Residual convolutional levels: :math:`f_l(h) = h + \rho\,[W_l * \sigma(h) + b_l]`, stages joined by strided ones
    without skip connection; the first convolution embeds the input.

    A ring or loop has one stage; its first block has no skip connection.

    Args:
        input_shape: ``(C, H, W)``.
        num_classes: number of classes.
        solver, estimator: override the shipped ones.
        channels: filters of each stage.
        blocks: residual levels per stage.
        kernel: side of the residual blocks' kernels, odd.
        nonlinearity: ``"tanh"``, ``"relu"`` or ``"gelu"``.
        topology: ``"chain"``, ``"ring"`` or ``"loop"``.
        depth_scale, branch_scale: as for :class:`PredictiveResidual`.
        feedback: ``"exact"`` or ``"learned"`` top-down weights.
        loop_gain: initial gain of the first block of a ring or loop.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        solver: Solver | None = None,
        estimator: Estimator | None = None,
        *,
        channels: Sequence[int] = (32, 64),
        blocks: int = 1,
        kernel: int = 3,
        nonlinearity: str = "relu",
        topology: str = "chain",
        depth_scale: str = "sqrt",
        branch_scale: float = 1.0,
        feedback: str = "exact",
        loop_gain: float = 0.3,
    ) -> None:
        super().__init__(input_shape, num_classes)
        if len(self.input_shape) != 3:
            raise ConfigError(f"PredictiveConv: expected input_shape (C, H, W), got {self.input_shape}; use arch='mlp'")
        if not channels or any(c < 1 for c in channels) or blocks < 1 or kernel < 1 or kernel % 2 == 0:
            raise ConfigError(
                f"PredictiveConv: expected positive channels and blocks and an odd kernel, got {tuple(channels)}, "
                f"{blocks}, {kernel}; e.g. (32, 64), 1, 3"
            )
        if topology_of(topology) != "chain" and len(channels) > 1:
            raise ConfigError(
                f"PredictiveConv: expected one stage on a {topology}, got channels={tuple(channels)}; a loop needs an "
                "output of its input's shape"
            )
        self.channels, self.count, self.kernel, self.nonlinearity = tuple(channels), blocks, kernel, nonlinearity
        self.feedback, self.topology, self.loop_gain = feedback, topology, loop_gain
        if topology == "loop" and blocks != 1:
            raise ConfigError(f"PredictiveConv: expected blocks=1 on a loop, got {blocks}; use a ring for several")
        if topology == "ring" and blocks < 2:
            raise ConfigError(f"PredictiveConv: expected blocks >= 2 on a ring, got {blocks}; one block is a loop")
        self.scale = depth_scale_of(depth_scale, branch_scale, len(channels) * blocks)
        self.build(topology, solver, estimator)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def levels(self) -> Levels:
        c, height, width = self.input_shape
        gain = _GAIN.get(self.nonlinearity, 1.0)
        embed = nn.Conv2d(c, self.channels[0], 5, stride=2, padding=2)
        height, width = (height + 1) // 2, (width + 1) // 2
        shapes: list[tuple[int, ...]] = [] if self.topology != "chain" else [(self.channels[0], height, width)]
        blocks: list[nn.Module] = []
        for stage, channels in enumerate(self.channels):
            if stage:
                height, width = (height + 1) // 2, (width + 1) // 2
                down = Convolution(self.channels[stage - 1], channels, 3, 2, 1, gain, self.feedback)
                blocks.append(Stack(Pointwise(self.nonlinearity), down))
                shapes.append((channels, height, width))
            for i in range(self.count):
                first = self.topology != "chain" and i == 0
                blocks.append(self._block(channels, self.loop_gain if first else gain, skip=not first))
                shapes.append((channels, height, width))
        flat = nn.Linear(self.channels[-1] * height * width, self.num_classes)
        return Levels(embed, blocks, shapes, nn.Sequential(Pointwise(self.nonlinearity), nn.Flatten(), flat))

    def _block(self, channels: int, gain: float, skip: bool) -> Branch:
        conv = Convolution(channels, channels, self.kernel, 1, self.kernel // 2, gain, self.feedback)
        return Branch(Stack(Pointwise(self.nonlinearity), conv), self.scale if skip else 1.0, skip, inject=not skip)


class PredictiveTransformer(TPEqProp):
    r"""Ordinary pre-norm transformer blocks with untied softmax attention as levels: free queries, keys and values.

    .. math:: f(h) = z + \rho\,W_2\,\mathrm{gelu}(W_1\,\mathrm{LN}(z)), \qquad
              z = h + \rho\,\mathrm{Attention}(\mathrm{LN}(h))

    With ``sublayers`` attention and perceptron are levels of their own. On a ring or loop the first attention has no
    skip connection and the embedded input is added in its place.

    Args:
        input_shape: ``(C, H, W)``, or ``(N,)`` of symbol indices with ``vocabulary``.
        num_classes: number of classes.
        solver, estimator: override the shipped ones.
        features, heads, hidden: D, attention heads, width of the perceptron.
        blocks: number of transformer blocks.
        sublayers: attention and perceptron as levels of their own (not on a loop).
        patch: side of the image patches, or ``"rows"``.
        vocabulary: number of symbols; 0 for images.
        pool: ``"none"`` for a head that reads every token, ``"mean"`` for one that reads their mean.
        topology: ``"chain"``, ``"ring"`` or ``"loop"``.
        depth_scale, branch_scale: as for :class:`PredictiveResidual`; branches are two per block.
        loop_scale: factor of the first attention on a ring or loop.
        tied: all blocks of a chain share their weights.
        feedback: ``"exact"`` or ``"learned"`` top-down weights.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        solver: Solver | None = None,
        estimator: Estimator | None = None,
        *,
        features: int = 64,
        heads: int = 4,
        hidden: int = 128,
        blocks: int = 2,
        sublayers: bool = False,
        patch: int | str = 7,
        vocabulary: int = 0,
        pool: str = "none",
        topology: str = "chain",
        depth_scale: str = "sqrt",
        branch_scale: float = 1.0,
        loop_scale: float = 0.3,
        tied: bool = False,
        feedback: str = "exact",
    ) -> None:
        super().__init__(input_shape, num_classes)
        if features < 2 or heads < 1 or features % heads or hidden < 1 or blocks < 1:
            raise ConfigError(
                f"PredictiveTransformer: expected heads that divide features, hidden and blocks >= 1, got "
                f"features={features}, heads={heads}, hidden={hidden}, blocks={blocks}; e.g. 64, 4, 128, 2"
            )
        blocks = 1 if topology == "loop" else blocks
        levels = blocks * (2 if sublayers else 1)
        if topology_of(topology) == "loop" and sublayers:
            raise ConfigError("PredictiveTransformer: expected sublayers=False on a loop, got True; use a ring")
        _levels_of(topology, levels, tied, 1 if topology == "chain" else 2)
        self.features, self.heads, self.hidden, self.blocks, self.sublayers = features, heads, hidden, blocks, sublayers
        self.patch, self.vocabulary, self.pool, self.tied = patch, vocabulary, pool, tied
        self.feedback, self.topology, self.loop_scale = feedback, topology, loop_scale
        self.scale = (
            depth_scale_of(depth_scale, branch_scale, 2 * blocks)
            if topology == "chain"
            else (depth_scale_of("none", loop_scale, 1))
        )
        self.build(topology, solver, estimator)

    def check_dtype(self, x: Tensor) -> None:
        """Symbols are integer indices; images are floating point."""
        if not self.vocabulary:
            super().check_dtype(x)
        elif x.is_floating_point():
            raise ConfigError(f"PredictiveTransformer: expected integer symbols, got {x.dtype}; use x.long()")

    def levels(self) -> Levels:
        embed = Tokens(self.input_shape, self.features, self.patch, self.vocabulary)
        shape = (embed.count, self.features)
        ring = self.topology != "chain"
        blocks: list[nn.Module] = []
        for i in range(self.blocks):
            if i and self.tied:
                blocks += blocks[: 2 if self.sublayers else 1]
                continue
            attention, perceptron = self._attention(first=ring and i == 0), self._perceptron()
            blocks += [attention, perceptron] if self.sublayers else [Stack(attention, perceptron)]
        head = nn.Sequential(
            nn.LayerNorm(self.features), TokenHead(embed.count, self.features, self.num_classes, self.pool)
        )
        return Levels(embed, blocks, [shape] * (len(blocks) + (0 if ring else 1)), head)

    def _attention(self, first: bool) -> Branch:
        inner = Stack(Norm(self.features), SelfAttention(self.features, self.heads, feedback=self.feedback))
        return Branch(inner, self.scale, skip=not first, inject=first)

    def _perceptron(self) -> Map:
        up = Linear(self.features, self.hidden, _GAIN["gelu"], self.feedback)
        down = Linear(self.hidden, self.features, feedback=self.feedback)
        return Branch(Stack(Norm(self.features), up, Pointwise("gelu"), down), self.scale)


ARCHITECTURES: dict[str, type[System]] = {
    "mlp": PredictiveMLP,
    "residual": PredictiveResidual,
    "conv": PredictiveConv,
    "transformer": PredictiveTransformer,
}
"""``arch=`` of ``create("tpeqprop", ...)``; the first is the default."""
