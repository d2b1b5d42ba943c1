"""HTSEP: units that fire, on a torus of contexts that opens some of them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from toreq.core import (
    Conv,
    Coupling,
    Dense,
    Drive,
    Energy,
    GatedBilinear,
    HardSigmoid,
    Lateral,
    Node,
)
from toreq.errors import ConfigError
from toreq.estimators import Estimator
from toreq.solvers import Anderson, Solver, Spiking, SpikingSolution
from toreq.solvers.events import Work, dense_work, fan_out, spiking_work
from toreq.systems.base import System, chain_bounds
from toreq.systems.deep_hopfield import Bias
from toreq.systems.htsep_context import ContextTorus, Gate, Gated
from toreq.systems.htsep_growth import grow
from toreq.systems.htsep_langevin import ExploredCentered
from toreq.systems.htsep_norm import OpenNorm

RESTING = 0.1
"""Rate at which units of upper layers start where the layer below is silent."""

RESPONSE = 1e-3
"""Of nudged phases, beside the state: at the usual hundredth more units cross a kink than the gradient bears."""


class HTSEP(System):
    r"""Layers of spiking units whose gates a torus of contexts opens (the seed's hyper-toroidal stochastic EqProp).

    .. math:: E = \sum_l\left[\langle a_l, h_l\rangle - \Phi_l(a_l)\right] - \langle h_1, g_1 * (U x + c_1)\rangle
              - \tfrac12\langle g_1 * h_1, W(g_1 * h_1)\rangle
              - \sum_l\langle g_{l+1} * h_{l+1}, A_l(g_l * h_l) + c_{l+1}\rangle

    with :math:`h = \mathrm{clip}(s a, 0, 1)`, firing rates, and gates :math:`g_l \in \{0, 1\}` of
    :class:`~toreq.systems.htsep_context.ContextTorus`. A closed unit has field 0 and so rate 0, fires no spike, and
    none of its weights changes. It trains at the mean field, the equilibrium of the rates, or with
    ``solver=Spiking()`` by the spikes themselves; :meth:`spike` runs any trained network by spikes.

    Subclasses make the layers and call :meth:`build`.
    """

    context: ContextTorus
    norms: nn.ModuleList
    """What holds the norms of the couplings among open units, see :class:`~toreq.systems.htsep_norm.OpenNorm`."""
    widths: str
    """The option that holds the layers' widths."""
    made: dict[str, Any]
    """What it was made with, for :meth:`grow`."""

    def build(
        self,
        nodes: Sequence[Node],
        drives: Sequence[nn.Module],
        joints: Sequence[Dense | Conv],
        lateral: Dense | Conv | None,
        bounds: tuple[float | None, float | None],
        solver: Solver | None,
        estimator: Estimator | None,
        head: nn.Module,
        temperature: float,
    ) -> None:
        """Put gates on the parts and assemble them.

        Args:
            nodes: the layers.
            drives: one for each layer.
            joints: one from each layer to the next.
            lateral: of the first layer.
            bounds: on the norms of joints, in units of the slopes they join, and of the lateral one; None: free.
            solver, estimator: the shipped ones when None.
            head: the read-out.
            temperature: of the Langevin noise in nudged phases.
        """
        for node, drive in zip(nodes, drives, strict=True):
            if isinstance(drive, Bias) and isinstance(node.activation, HardSigmoid):
                # a unit that nothing reaches would otherwise sit exactly on the kink at 0
                nn.init.constant_(drive.value, RESTING / node.activation.gain)
        names = [n.name for n in nodes]
        gates = {n.name: Gate(self.context, n.name, n.shape) for n in nodes}
        self.norms = nn.ModuleList()
        couplings: list[Coupling] = [Drive(n, Gated(drive, gates[n])) for n, drive in zip(names, drives, strict=True)]
        joint, own = bounds
        for (a, b), op in zip(pairwise(nodes), joints, strict=True):
            couplings.append(GatedBilinear(op, a.name, b.name, gates[a.name], gates[b.name]))
            if joint is not None:
                slope = math.sqrt(a.activation.gain * b.activation.gain)
                self.norms.append(OpenNorm(op, joint / slope, a.name, b.name))
        if lateral is not None:
            couplings.append(Lateral(lateral, names[0], gates[names[0]]))
            if own is not None:
                self.norms.append(OpenNorm(lateral, own, names[0], names[0]))
        if estimator is None and temperature > 0:
            estimator = ExploredCentered(temperature=temperature)
        solver = Anderson(length=3) if solver is None else solver
        energy = Energy(nodes, couplings)
        energy.response = RESPONSE
        self.assemble(energy, solver, estimator, head)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, num_classes)`` at equilibrium; in training mode the batch's statistics are learned first.

        Args:
            x: ``(B, *input_shape)``, floating point.
        """
        self.check_input(x)
        with self.placed(x):
            self.hold(x)
            return self.head(self.opened(x, self.equilibrium(x)))

    @contextlib.contextmanager
    def placed(self, x: Tensor) -> Iterator[None]:
        """A context in which the gates of a batch are worked out once. In training mode its statistics are learned
        first, and all of it belongs to the context that it is told by as a whole: single examples that look like
        another one would teach that one what it has no examples against."""
        torus = self.context
        learning = self.training and torus.mode != "off" and torus.source == "statistics"
        pinned = torus.pinned(torus.observe(x)) if learning else contextlib.nullcontext()
        with pinned, torus.drawn(x, draw=self.training):
            yield

    def hold(self, x: Tensor) -> None:
        """In training mode, scale couplings among the units that a batch opens to their bounds."""
        if not self.training:
            return
        for norm in self.norms:
            assert isinstance(norm, OpenNorm)
            norm.hold(self.context.gates(x, norm.pre), self.context.gates(x, norm.post))

    def opened(self, x: Tensor, h: Tensor) -> Tensor:
        """The read-out node's rates times its gates: as they are, but a nudge then reaches open units alone.

        Args:
            x: ``(B, *input_shape)``.
            h: rates of the read-out node, ``(B, *shape)``.
        """
        gates = self.context.gates(x, self.equilibrium.readout[0])
        return h * gates.reshape(*gates.shape, *[1] * (h.dim() - gates.dim())).to(h.dtype)

    @torch.no_grad()
    def spike(self, x: Tensor, solver: Spiking | None = None) -> tuple[Tensor, SpikingSolution]:
        """Logits from the rates of spikes, and the run itself.

        Args:
            x: ``(B, *input_shape)``.
            solver: how to fire; sigma-delta units with a tolerance of 0.01 when None.
        """
        self.check_input(x)
        layer = self.equilibrium
        shipped, warned = layer.solver, layer.warn
        layer.warn = False  # the solution says which examples have settled
        try:
            layer.solver = Spiking() if solver is None else solver
            with self.context.drawn(x, draw=False):
                solution = layer.solve(x)
        finally:
            layer.solver, layer.warn = shipped, warned
        assert isinstance(solution, SpikingSolution)
        return self.head(solution.h[layer.readout[0]]), solution

    @torch.no_grad()
    def work(self, x: Tensor, solution: SpikingSolution, solver: Spiking | None = None) -> tuple[Work, Work]:
        """Operations by example: of that run of spikes, and of a dense relaxation of all units (gates open) by the
        shipped solver to its own tolerance.

        Args:
            x: the run's input.
            solution: from :meth:`spike`.
            solver: the one that was used.
        """
        energy = self.equilibrium.dynamics
        assert isinstance(energy, Energy)
        own = spiking_work(Spiking() if solver is None else solver, solution, fan_out(energy, energy.bind(x)))
        steps = self.equilibrium.solve(x).steps
        mode, self.context.mode = self.context.mode, "off"
        try:
            every = fan_out(energy, energy.bind(x))
        finally:
            self.context.mode = mode
        return own, dense_work(every, steps)

    def grow(self, size: int = 2, limit: int = 2**30) -> dict[str, Any]:
        """Unfold a dimension: ``size`` - 1 further sheets of units and of slots for contexts, see
        :func:`toreq.systems.htsep_growth.grow`."""
        return grow(self, size, limit)


class HTSEPDense(HTSEP):
    r"""Dense layers of :class:`HTSEP`.

    Args:
        input_shape: shape of one example; it is flattened.
        num_classes: number of classes.
        solver, estimator: override the shipped ones.
        hidden: widths of the layers.
        torus: slots along each axis of the torus of contexts.
        sheets: places along each axis unfolded later; ``hidden`` counts the units on all of them.
        open_share: share of the units that a context opens, in (0, 1].
        edge: softness of the bump, in slots.
        novelty: standard deviations of an example's likelihood by which a batch's mean must be unlikely to open a
            context.
        gates: ``"probabilistic"``, ``"hard"`` or ``"off"``.
        context: ``"statistics"``, or ``"input"`` (no torus: a fixed random projection of each input).
        lateral: couple the first layer to itself.
        gain: ratio of one layer's slope to that of the layer below.
        temperature: of Langevin noise in both nudged phases, the same in both; 0 for none.
        coupling_scale: the initial couplings' deviation is this over the square root of fan-in.
        norm_bound: bound on the norm of all couplings together among the units that a batch of training opens, which
            bounds the relaxation's radius; None: free.
    """

    widths = "hidden"

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        solver: Solver | None = None,
        estimator: Estimator | None = None,
        *,
        hidden: Sequence[int] = (512,),
        torus: Sequence[int] = (4, 4),
        sheets: Sequence[int] = (),
        open_share: float = 0.5,
        edge: float = 0.1,
        novelty: float = 0.6,
        gates: str = "probabilistic",
        context: str = "statistics",
        lateral: bool = True,
        gain: float = 2.0,
        temperature: float = 0.0,
        coupling_scale: float = 0.25,
        norm_bound: float | None = 0.8,
    ) -> None:
        super().__init__(input_shape, num_classes)
        self.made = {
            "hidden": tuple(hidden), "torus": tuple(torus), "sheets": tuple(sheets), "open_share": open_share,
            "edge": edge, "novelty": novelty, "gates": gates, "context": context, "lateral": lateral, "gain": gain,
            "temperature": temperature, "coupling_scale": coupling_scale, "norm_bound": norm_bound,
        }  # fmt: skip
        self.hidden = tuple(hidden)
        if not self.hidden or any(w < 1 for w in self.hidden) or not gain > 0:
            raise ConfigError(
                f"HTSEPDense: expected positive widths and gain > 0, got hidden={self.hidden} and gain={gain}; "
                "e.g. (512,) and 2"
            )
        inputs = math.prod(self.input_shape)
        names = [f"h{i + 1}" for i in range(len(self.hidden))]
        self.context = ContextTorus(
            inputs, torus, dict(zip(names, self.hidden, strict=True)), share=open_share, edge=edge,
            novelty=novelty, mode=gates, source=context, sheets=sheets,
        )  # fmt: skip
        slopes = [gain**i for i in range(len(names))]
        nodes = [Node(n, w, HardSigmoid(s)) for n, w, s in zip(names, self.hidden, slopes, strict=True)]
        bounds = chain_bounds(norm_bound, len(self.hidden), lateral)
        drives: list[nn.Module] = [nn.Sequential(nn.Flatten(), nn.Linear(inputs, self.hidden[0]))]
        joints: list[Dense | Conv] = []
        for below, above in pairwise(self.hidden):
            joints.append(Dense(below, above, scale=coupling_scale / math.sqrt(below)))
            drives.append(Bias((above,)))
        around = None
        if lateral:
            around = Dense(
                self.hidden[0], self.hidden[0], symmetric=True, scale=coupling_scale / math.sqrt(self.hidden[0])
            )
        head = nn.Linear(self.hidden[-1], num_classes, bias=False)
        self.build(nodes, drives, joints, around, bounds, solver, estimator, head, temperature)

    def feedforward(self) -> nn.Module:
        """The same widths and slopes, feed-forward, without gates."""
        sizes = [math.prod(self.input_shape), *self.hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for i, (a, b) in enumerate(pairwise(sizes)):
            layers += [nn.Linear(a, b), HardSigmoid(_slope(self, i))]
        return nn.Sequential(*layers, nn.Linear(sizes[-1], self.num_classes))


class HTSEPConv(HTSEP):
    r"""Convolutional layers of :class:`HTSEP`; a channel has one place on the torus, and one gate.

    Args:
        input_shape: ``(C, H, W)``.
        num_classes: number of classes.
        solver, estimator: override the shipped ones.
        channels: filters of each layer.
        kernel, stride, padding: of every convolution between layers and of the drive.
        torus, sheets, open_share, edge, novelty, gates, context: as for :class:`HTSEPDense`.
        lateral: couple the first layer to itself by a symmetric 3 x 3 convolution.
        gain, temperature, coupling_scale, norm_bound: as for :class:`HTSEPDense`.
    """

    widths = "channels"

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
        torus: Sequence[int] = (4, 4),
        sheets: Sequence[int] = (),
        open_share: float = 0.5,
        edge: float = 0.1,
        novelty: float = 0.6,
        gates: str = "probabilistic",
        context: str = "statistics",
        lateral: bool = False,
        gain: float = 4.0,
        temperature: float = 0.0,
        coupling_scale: float = 0.5,
        norm_bound: float | None = 0.8,
    ) -> None:
        super().__init__(input_shape, num_classes)
        if len(self.input_shape) != 3:
            raise ConfigError(f"HTSEPConv: expected input_shape (C, H, W), got {self.input_shape}; use arch='dense'")
        if not channels or any(c < 1 for c in channels) or kernel < 1 or stride < 1 or not gain > 0:
            raise ConfigError(
                f"HTSEPConv: expected positive channels, kernel, stride and gain, got {tuple(channels)}, {kernel}, "
                f"{stride} and {gain}; e.g. channels=(32, 64), kernel=5, stride=2, gain=4"
            )
        self.made = {
            "channels": tuple(channels), "kernel": kernel, "stride": stride, "padding": padding,
            "torus": tuple(torus), "sheets": tuple(sheets), "open_share": open_share, "edge": edge,
            "novelty": novelty, "gates": gates, "context": context, "lateral": lateral, "gain": gain,
            "temperature": temperature, "coupling_scale": coupling_scale, "norm_bound": norm_bound,
        }  # fmt: skip
        self.channels, self.geometry = tuple(channels), (kernel, stride, padding)
        names = [f"h{i + 1}" for i in range(len(self.channels))]
        self.context = ContextTorus(
            math.prod(self.input_shape), torus, dict(zip(names, self.channels, strict=True)), share=open_share,
            edge=edge, novelty=novelty, mode=gates, source=context, sheets=sheets,
        )  # fmt: skip
        slopes = [gain**i for i in range(len(names))]
        bounds = chain_bounds(norm_bound, len(names), lateral)
        drives: list[nn.Module] = [nn.Conv2d(self.input_shape[0], self.channels[0], *self.geometry)]
        shapes = [Conv(self.input_shape, self.channels[0], *self.geometry).out_shape]
        joints: list[Dense | Conv] = []
        for i, c in enumerate(self.channels[1:], start=1):
            fan_in = self.channels[i - 1] * kernel * kernel
            op = Conv(shapes[-1], c, *self.geometry, scale=coupling_scale / math.sqrt(fan_in))
            joints.append(op)
            shapes.append(op.out_shape)
            drives.append(Bias((c, 1, 1), op.out_shape))
        around = None
        if lateral:
            scale = 0.1 / math.sqrt(9 * self.channels[0])
            around = Conv(shapes[0], self.channels[0], 3, 1, 1, symmetric=True, scale=scale)
        nodes = [Node(n, s, HardSigmoid(k)) for n, s, k in zip(names, shapes, slopes, strict=True)]
        head = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shapes[-1]), num_classes, bias=False))
        self.build(nodes, drives, joints, around, bounds, solver, estimator, head, temperature)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def feedforward(self) -> nn.Module:
        """The same convolutions and slopes, feed-forward, without gates."""
        layers: list[nn.Module] = []
        shape: tuple[int, ...] = self.input_shape
        for i, c in enumerate(self.channels):
            layers += [nn.Conv2d(shape[0], c, *self.geometry), HardSigmoid(_slope(self, i))]
            shape = Conv(shape, c, *self.geometry).out_shape
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(math.prod(shape), self.num_classes))


def _slope(net: HTSEP, layer: int) -> float:
    sigma = net.equilibrium.dynamics.activation(f"h{layer + 1}")
    assert isinstance(sigma, HardSigmoid)
    return sigma.gain


ARCHITECTURES: dict[str, type[System]] = {"dense": HTSEPDense, "conv": HTSEPConv}
"""``arch=`` of ``create("htsep", ...)``; the first is the default."""
