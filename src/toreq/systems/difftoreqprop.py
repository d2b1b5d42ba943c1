"""DiffTorEqProp: networks whose input is a node that settles too, and which so denoise, classify and generate."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from toreq.core import (
    Activation,
    Bilinear,
    Coupling,
    Dense,
    Drive,
    Energy,
    HardSigmoid,
    Identity,
    Node,
    Standardize,
    Tanh,
)
from toreq.core.norm_control import control_norm
from toreq.core.operators import Operator
from toreq.core.state import detached
from toreq.errors import ConfigError, nearest
from toreq.estimators import Estimator
from toreq.layer import Equilibrium
from toreq.solvers import Anderson, Solver
from toreq.systems.base import System, chain_bounds
from toreq.systems.difftoreqprop_filter import LinearFilter
from toreq.systems.difftoreqprop_memory import PatternMemory
from toreq.systems.difftoreqprop_parts import (
    Clamp,
    LabelClamp,
    Offset,
    Seen,
    denoising_cost,
    own_generator,
)
from toreq.systems.difftoreqprop_sampling import Anneal, Conveyor, Known, stream

VISIBLE: dict[str, Callable[[float], Activation]] = {"identity": Identity, "hard_sigmoid": HardSigmoid}
"""Activations of the visible node: one that can be sampled, and one that stays in [0, 1]."""
DIRECT, THROUGH, RECALLING = (0.5, 2.0, 4.0), (1024.0, 16.0, 1.0), (0.5, 1 / 16, 128.0)
"""Lift, gain, and the label node's slope over that of the last hidden layer, where the input drives the hidden layers,
where it has to pass the visible node, and beside a memory, whose nodes are judged one by one. Flatter hidden layers
denoise better and leave less of the class's pull to the visible node, whose gradients then lose their digits in
float32; a steeper label node learns classes faster."""


class DiffTorEqProp(System):
    r"""A visible node under a soft clamp, hidden layers, and a label node (the seed's diffusion-enhanced equilibrium).

    .. math:: E = \sum_i\Phi_i^*(h_i) - \kappa\langle v, x\rangle - \langle h_1, A_0 v\rangle
              - \sum_l\langle h_{l+1}, A_l h_l\rangle - \langle y, A_L h_L\rangle
              - \sum_l\langle h_l, U_l x + b_l\rangle

    The input pulls on the visible node, whose slope :math:`1/(1+\kappa)` makes the clamp implicit:
    :math:`v = \sigma_v((A_0^\top h_1 + b + \kappa x)/(1 + \kappa))`. Relaxation so denoises while it classifies.
    :meth:`forward` reads the label node, :meth:`denoise` the visible one.

    The bound on the couplings' norm, under which the relaxation contracts, bounds the product of the way up from the
    visible node and of the way down to it. With ``direct`` the hidden layers see the input too, by maps
    :math:`U_l` that no bound holds, and the couplings are left for the way down; without, :math:`U_l = 0`, and all that
    the hidden layers know of the input has passed the visible node.

    Subclasses give the hidden shapes and the operators by :meth:`operators`, the maps by :meth:`views`, and call
    :meth:`build`.
    """

    denoising: float
    span: tuple[float, float]

    @abstractmethod
    def operators(self, scale: float) -> list[Operator]:
        """Freshly drawn operators from the visible node to the first hidden one and so on, without the label node's.

        Args:
            scale: deviation of the weights times the square root of fan-in.
        """

    @abstractmethod
    def views(self, channels: int) -> list[nn.Module]:
        """Freshly drawn linear maps from the input to each hidden node.

        Args:
            channels: those of what they see: the input's, or twice as many where it comes with the filtered one.
        """

    def build(
        self,
        solver: Solver | None,
        estimator: Estimator | None,
        *,
        clamp: float,
        visible: str,
        noise: float | None,
        denoising: float,
        span: tuple[float, float],
        direct: bool,
        lift: float | None,
        gain: float | None,
        label_gain: float | None,
        coupling_scale: float,
        norm_bound: float | None,
        memory: int,
    ) -> None:
        """Put nodes and couplings together."""
        self._check(clamp, visible, noise, denoising, span, memory)
        usual = RECALLING if memory else DIRECT if direct else THROUGH
        lift, gain, label_gain = (
            u if given is None else given for u, given in zip(usual, (lift, gain, label_gain), strict=True)
        )
        if not (lift > 0 and gain > 0 and label_gain > 0):
            raise ConfigError(
                f"DiffTorEqProp: expected lift > 0, gain > 0 and label_gain > 0, got {lift}, {gain} and {label_gain}; "
                f"leave them None for {', '.join(f'{u:g}' for u in usual)}"
            )
        self.denoising, self.span = float(denoising), (float(span[0]), float(span[1]))
        ops = self.operators(coupling_scale)
        levels = denoising > 0
        shapes = [op.out_shape for op in ops]
        names = [f"h{i + 1}" for i in range(len(ops))]
        own = 1 / (1 + clamp)
        slopes = [own * lift * gain**i for i in range(len(ops))]
        top = slopes[-1] * label_gain
        label = Dense(shapes[-1], self.num_classes, scale=coupling_scale / math.sqrt(math.prod(shapes[-1])))
        nodes = [Node("v", self.input_shape, VISIBLE[visible](own))]
        nodes += [Node(n, s, Tanh(g)) for n, s, g in zip(names, shapes, slopes, strict=True)]
        nodes.append(Node("y", self.num_classes, Identity(top)))
        chain, steep = ["v", *names, "y"], [own, *slopes, top]
        begin = 0.0 if direct else 1.0  # where all passes the visible node, it has to see something from the start
        couplings: list[Coupling] = [Drive("v", Clamp(self.input_shape, clamp, noise, levels, begin))]
        seen = self.input_shape[0] * (2 if levels else 1)
        views = self.views(seen) if direct else [None] * len(names)
        for n, shape, slope, view in zip(names, shapes, slopes, views, strict=True):
            couplings.append(Drive(n, Offset(shape, slope, levels, view)))
        couplings.append(Drive("y", LabelClamp(self.num_classes, top)))
        joint, _ = chain_bounds(norm_bound, len(chain), lateral=False)
        for op, (a, b), (low, high) in zip([*ops, label], pairwise(chain), pairwise(steep), strict=True):
            if joint is not None:
                control_norm(op, joint / math.sqrt(low * high))
            couplings.append(Bilinear(op, a, b))
        self.memory = (
            PatternMemory(memory, self.input_shape, self.num_classes, self.span, norm_bound) if memory else None
        )
        if self.memory is not None:
            nodes, couplings = [*nodes, *self.memory.nodes], [*couplings, *self.memory.couplings]
        # logits of a memory are larger than all else by orders of magnitude
        solver = Anderson(length=3, by_node=memory > 0) if solver is None else solver
        energy = Energy(nodes, couplings)
        if levels:
            energy.prepare = LinearFilter(self.input_shape, self.span)
        self.equilibrium = Equilibrium(energy, solver, estimator, ("y", "v", "c") if memory else ("y", "v"))
        self.head = nn.Identity()
        self.generator = own_generator()
        self._clean: Tensor | None = None

    @staticmethod
    def _check(
        clamp: float, visible: str, noise: float | None, denoising: float, span: Sequence[float], memory: int
    ) -> None:
        where = "DiffTorEqProp"
        if visible not in VISIBLE:
            raise ConfigError(
                f"{where}: expected visible in {list(VISIBLE)}, got {visible!r}; {nearest(visible, VISIBLE)}"
            )
        if not (clamp > 0 and math.isfinite(clamp)):
            raise ConfigError(f"{where}: expected clamp > 0, got {clamp}; try 1")
        if noise is not None and not noise > 0:
            raise ConfigError(f"{where}: expected noise > 0 or None, got {noise}; None turns it off")
        if not denoising >= 0:
            raise ConfigError(f"{where}: expected denoising >= 0, got {denoising}; 0 turns it off")
        if len(span) != 2 or not 0 < span[0] < span[1]:
            raise ConfigError(
                f"{where}: expected span (low, high) with 0 < low < high, got {tuple(span)}; try (0.02, 4)"
            )

        if memory and not denoising:
            raise ConfigError(f"{where}: expected memory=0 without denoising, got {memory}; set denoising=1")

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_clean": None}

    @property
    def filter(self) -> LinearFilter | None:
        """The linear filter that every input passes first; None without denoising."""
        found = self.equilibrium.dynamics.prepare
        return found if isinstance(found, LinearFilter) else None

    def observe(self, x: Tensor) -> None:
        """Fit the linear filter to training inputs, and the first patterns; nothing to do without denoising."""
        if self.filter is not None:
            self.filter.observe(x)
            if self.memory is not None:
                self.memory.observe(x, self.filter.centre(), self.generator)

    def standardize(self, how: Standardize) -> None:
        """Refused where the network denoises, which has mean and covariance from :meth:`observe`."""
        if self.denoising > 0:
            raise ConfigError(
                f"{type(self).__name__}.standardize: expected a system with denoising=0, got {self.denoising:g}, which "
                "filters its inputs by their own moments; leave it (or --normalize) out"
            )
        super().standardize(how)

    def forward(self, x: Tensor | Seen) -> Tensor:
        """Logits ``(B, num_classes)``, the label node at equilibrium.

        Args:
            x: ``(B, *input_shape)``, or what is :class:`Seen`.
        """
        self.check_input(Seen.of(x).x)
        self._clean = Seen.of(x).x if self.training and self.denoising > 0 else None
        return self.equilibrium(x)["y"]

    def denoise(self, x: Tensor | Seen) -> Tensor:
        r"""The input without its noise, ``(B, *input_shape)``.

        The visible node says what the best linear filter
        (:class:`~toreq.systems.difftoreqprop_filter.LinearFilter`) misses of noise of deviation s, in units of what
        that leaves: :math:`\mu + W_s(x) + (r_s/0.3)\,v` (the preconditioning of Karras et al. 2022, with a matrix in
        the place of their number). Where s is not known it is estimated. Without ``denoising``, v is all.

        Args:
            x: as in :meth:`forward`.
        """
        seen = Seen.of(x)
        self.check_input(seen.x)
        if self.filter is None:
            return self.equilibrium(seen)["v"]
        seen = self.filter(seen)
        found = self.equilibrium(seen)
        if self.memory is not None:
            return self.filter.centre() + self.memory.restored(seen, found["c"], found["v"])
        return self.filter.restored(seen, found["v"])

    def criterion(self, logits: Tensor, y: Tensor) -> Tensor:
        """Mean cross entropy; with ``denoising`` in training also that many times
        :func:`~toreq.systems.difftoreqprop_parts.denoising_cost` of the latest batch."""
        total = super().criterion(logits, y)
        x, self._clean = self._clean, None
        if x is None or len(x) != len(y):
            return total
        return total + self.denoising * self.denoising_cost(x, y)

    def denoising_cost(self, x: Tensor, y: Tensor) -> Tensor:
        """The weighted squared error of denoising a batch whose noise is drawn here."""
        if self.filter is None:
            raise ConfigError(
                "DiffTorEqProp.denoising_cost: expected a system built with denoising > 0, got a classifier only; "
                "create it with denoising=1"
            )
        return denoising_cost(self.denoise, self.filter.left, x, y, self.span, self.generator)

    @torch.no_grad()
    def energy(self, x: Tensor | Seen) -> Tensor:
        r"""E at equilibrium per example, ``(B,)``, with :math:`\tfrac\kappa2\|x\|^2` so that the clamp costs
        :math:`\tfrac\kappa2\|v - x\|^2`: low for inputs that the network expects."""
        seen = Seen.of(x)
        self.check_input(seen.x)
        if self.filter is not None:
            seen = self.filter(seen)  # once, for the relaxation and for the clamp
        layer = self.equilibrium
        dynamics = layer.dynamics
        assert isinstance(dynamics, Energy)
        bindings = detached(dynamics.bind(seen))
        found = layer.free_phase(bindings)
        clamp = next(c.module for _, c in dynamics.terms() if isinstance(c, Drive) and isinstance(c.module, Clamp))
        pulling = seen.x if seen.filtered is None else seen.filtered
        total = dynamics(found.state, bindings) + 0.5 * clamp.strength * pulling.square().flatten(1).sum(1)
        return total if self.memory is None else total + self.memory.recall.distance(seen)

    def conveyor(
        self,
        count: int,
        *,
        anneal: Anneal | None = None,
        labels: Tensor | None = None,
        known: Known | None = None,
        batch: int = 64,
        generator: torch.Generator | None = None,
    ) -> Conveyor:
        """The ring of noise levels on which :meth:`sample` draws, for whoever wants to watch; arguments as there.

        Raises:
            ConfigError: for a system that was not built to denoise, or labels of another length.
        """
        if self.filter is None:
            raise ConfigError(
                "DiffTorEqProp.sample: expected a system built with denoising > 0, got a classifier only; create and "
                "train it with denoising=1"
            )
        if count < 1 or batch < 1 or (labels is not None and labels.shape != (count,)):
            raise ConfigError(
                f"DiffTorEqProp.sample: expected count >= 1, batch >= 1 and labels (count,), got {count}, {batch} and "
                f"{None if labels is None else tuple(labels.shape)}; give one class for each"
            )
        if labels is not None and not -1 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise ConfigError(
                f"DiffTorEqProp.sample: expected classes in [0, {self.num_classes}) or -1, got {int(labels.min())} to "
                f"{int(labels.max())}; -1 is any class"
            )
        low, high = self.span
        first = next(self.parameters())
        batch = min(batch, count)
        return Conveyor(
            lambda x, level, given: self.denoise(Seen(x, level, given)),
            self.input_shape,
            batch,
            Anneal(high=high, low=low) if anneal is None else anneal,
            self.generator if generator is None else generator,
            first.device,
            first.dtype,
            None if labels is None else _batches(labels, batch),
            known,
            -(-count // batch),
            self.filter.drawn,
        )

    @torch.no_grad()
    def sample(
        self,
        count: int,
        *,
        anneal: Anneal | None = None,
        labels: Tensor | None = None,
        known: Known | None = None,
        batch: int = 64,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Inputs drawn by annealed Langevin dynamics, ``(count, *input_shape)``, not clipped.

        Args:
            count: how many, at least 1.
            anneal: noise levels; those of ``span`` when None.
            labels: classes ``(count,)``, -1 for any; None for any.
            known: what is given of every input.
            batch: chains in each slot of the ring; all slots are denoised together.
            generator: of all noise; the system's own when None.

        Raises:
            ConfigError: for a system that was not built to denoise, or labels of another length.
        """
        ring = self.conveyor(count, anneal=anneal, labels=labels, known=known, batch=batch, generator=generator)
        training = self.training
        self.eval()  # no noise on the clamp but the chain's own
        try:
            return torch.cat(list(stream(ring)))[:count]
        finally:
            self.train(training)


def _batches(labels: Tensor, batch: int) -> Callable[[int], Tensor]:
    """The classes of each batch, the last one filled up with any class."""
    parts = torch.cat([labels, labels.new_full((-len(labels) % batch,), -1)]).split(batch)
    return lambda i: parts[i]
