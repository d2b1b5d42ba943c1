"""DiffTorEqProp: networks whose input is a node that settles too, and which so denoise, classify and generate."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from itertools import islice, pairwise

import torch
from torch import Tensor, nn

from toreq.core import Activation, Bilinear, Coupling, Dense, Drive, Energy, HardSigmoid, Identity, Node, Tanh
from toreq.core.norm_control import control_norm
from toreq.core.operators import Operator
from toreq.core.state import detached
from toreq.errors import ConfigError, nearest
from toreq.estimators import Estimator
from toreq.layer import Equilibrium
from toreq.solvers import Anderson, Solver
from toreq.systems.base import System, chain_bounds
from toreq.systems.difftoreqprop_parts import Clamp, LabelClamp, Offset, Seen, drawn_like, own_generator
from toreq.systems.difftoreqprop_sampling import Anneal, Conveyor, Known, stream

VISIBLE: dict[str, Callable[[float], Activation]] = {"identity": Identity, "hard_sigmoid": HardSigmoid}
"""Activations of the visible node: one that can be sampled, and one that stays in [0, 1]."""
UNLABELLED, UNLEVELLED = 0.5, 0.2
"""Shares of the examples that are denoised without their class, and without their noise level."""


class DiffTorEqProp(System):
    r"""A visible node under a soft clamp, hidden layers, and a label node (the seed's diffusion-enhanced equilibrium).

    .. math:: E = \sum_i\Phi_i^*(h_i) - \kappa\langle v, x\rangle - \langle h_1, A_0 v\rangle
              - \sum_l\langle h_{l+1}, A_l h_l\rangle - \langle y, A_L h_L\rangle - \text{biases}

    The input does not drive the hidden layers; it pulls on the visible node, whose slope :math:`1/(1+\kappa)` makes the
    clamp implicit: :math:`v = \sigma_v((A_0^\top h_1 + b + \kappa x)/(1 + \kappa))`. Relaxation so denoises while it
    classifies. ``forward`` reads the label node; :meth:`denoise` the visible one.

    Subclasses give the hidden shapes and the operators by :meth:`operators` and call :meth:`build`.
    """

    denoising: float
    span: tuple[float, float]

    @abstractmethod
    def operators(self, scale: float) -> list[Operator]:
        """Freshly drawn operators from the visible node to the first hidden one and so on, without the label node's.

        Args:
            scale: deviation of the weights times the square root of fan-in.
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
        lift: float,
        gain: float,
        coupling_scale: float,
        norm_bound: float | None,
    ) -> None:
        """Put nodes and couplings together."""
        self._check(clamp, visible, noise, denoising, span)
        if not (lift > 0 and gain > 0):
            raise ConfigError(f"DiffTorEqProp: expected lift > 0 and gain > 0, got {lift} and {gain}; try 4 and 16")
        self.denoising, self.span = float(denoising), (float(span[0]), float(span[1]))
        ops = self.operators(coupling_scale)
        levels = denoising > 0
        shapes = [op.out_shape for op in ops]
        names = [f"h{i + 1}" for i in range(len(ops))]
        own = 1 / (1 + clamp)
        slopes = [own * lift * gain**i for i in range(len(ops))]
        label = Dense(shapes[-1], self.num_classes, scale=coupling_scale / math.sqrt(math.prod(shapes[-1])))
        nodes = [Node("v", self.input_shape, VISIBLE[visible](own))]
        nodes += [Node(n, s, Tanh(g)) for n, s, g in zip(names, shapes, slopes, strict=True)]
        nodes.append(Node("y", self.num_classes, Identity(slopes[-1])))
        chain, steep = ["v", *names, "y"], [own, *slopes, slopes[-1]]
        couplings: list[Coupling] = [Drive("v", Clamp(self.input_shape, clamp, noise, levels))]
        couplings += [Drive(n, Offset(s, levels)) for n, s in zip(names, shapes, strict=True)]
        couplings.append(Drive("y", LabelClamp(self.num_classes, 1.0)))
        joint, _ = chain_bounds(norm_bound, len(chain), lateral=False)
        for op, (a, b), (low, high) in zip([*ops, label], pairwise(chain), pairwise(steep), strict=True):
            if joint is not None:
                control_norm(op, joint / math.sqrt(low * high))
            couplings.append(Bilinear(op, a, b))
        solver = Anderson(length=3) if solver is None else solver
        self.equilibrium = Equilibrium(Energy(nodes, couplings), solver, estimator, ("y", "v"))
        self.head = nn.Identity()
        self.generator = own_generator()
        self._clean: Tensor | None = None

    @staticmethod
    def _check(clamp: float, visible: str, noise: float | None, denoising: float, span: Sequence[float]) -> None:
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
                f"{where}: expected span (low, high) with 0 < low < high, got {tuple(span)}; try (0.02, 2)"
            )

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_clean": None}

    def forward(self, x: Tensor | Seen) -> Tensor:
        """Logits ``(B, num_classes)``, the label node at equilibrium.

        Args:
            x: ``(B, *input_shape)``, or what is :class:`Seen`.
        """
        self.check_input(Seen.of(x).x)
        self._clean = Seen.of(x).x if self.training and self.denoising > 0 else None
        return self.equilibrium(x)["y"]

    def denoise(self, x: Tensor | Seen) -> Tensor:
        """The visible node at equilibrium, ``(B, *input_shape)``.

        Args:
            x: as in :meth:`forward`.
        """
        self.check_input(Seen.of(x).x)
        return self.equilibrium(x)["v"]

    def criterion(self, logits: Tensor, y: Tensor) -> Tensor:
        r"""Mean cross entropy; with ``denoising`` in training also that many times the mean of
        :math:`\tfrac12\|v^*(x + s\xi) - x\|^2/(s^2 + 0.01)` per pixel over the latest batch, s drawn log-uniformly from
        ``span``."""
        total = super().criterion(logits, y)
        x, self._clean = self._clean, None
        if x is None or len(x) != len(y):
            return total
        return total + self.denoising * self.denoising_cost(x, y)

    def denoising_cost(self, x: Tensor, y: Tensor) -> Tensor:
        """The weighted squared error of denoising a batch whose noise is drawn here."""
        low, high = (math.log(s) for s in self.span)
        drawn = torch.rand(3, len(x), generator=self.generator, dtype=x.dtype).to(x.device)
        level = (low + (high - low) * drawn[0]).exp()
        per = level.view(-1, *(1 for _ in x.shape[1:]))
        labels = torch.where(drawn[1] < UNLABELLED, torch.full_like(y, -1), y)
        seen = Seen(x + per * drawn_like(x, self.generator), level, labels)
        if float(torch.rand((), generator=self.generator)) < UNLEVELLED:
            seen = Seen(seen.x, None, labels)
        error = (self.denoise(seen) - x).square().flatten(1).mean(1)
        return 0.5 * (error / (level.square() + 0.01)).mean()

    @torch.no_grad()
    def energy(self, x: Tensor | Seen) -> Tensor:
        r"""E at equilibrium per example, ``(B,)``, with :math:`\tfrac\kappa2\|x\|^2` so that the clamp costs
        :math:`\tfrac\kappa2\|v - x\|^2`: low for inputs that the network expects."""
        seen = Seen.of(x)
        self.check_input(seen.x)
        layer = self.equilibrium
        dynamics = layer.dynamics
        assert isinstance(dynamics, Energy)
        bindings = detached(dynamics.bind(x))
        found = layer.free_phase(bindings)
        clamp = next(c.module for _, c in dynamics.terms() if isinstance(c, Drive) and isinstance(c.module, Clamp))
        return dynamics(found.state, bindings) + 0.5 * clamp.strength * seen.x.square().flatten(1).sum(1)

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
        if self.denoising == 0:
            raise ConfigError(
                "DiffTorEqProp.sample: expected a system built with denoising > 0, got a classifier only; create and "
                "train it with denoising=1"
            )
        if count < 1 or (labels is not None and labels.shape != (count,)):
            raise ConfigError(
                f"DiffTorEqProp.sample: expected count >= 1 and labels (count,), got {count} and "
                f"{None if labels is None else tuple(labels.shape)}; give one class for each"
            )
        low, high = self.span
        first = next(self.parameters())
        batch = min(batch, count)
        number = -(-count // batch)
        ring = Conveyor(
            lambda x, level, given: self.denoise(Seen(x, level, given)),
            self.input_shape,
            batch,
            Anneal(high=high, low=low) if anneal is None else anneal,
            self.generator if generator is None else generator,
            first.device,
            first.dtype,
            None if labels is None else _batches(labels, batch),
            known,
        )
        training = self.training
        self.eval()  # no noise on the clamp but the chain's own
        try:
            return torch.cat(list(islice(stream(ring), number)))[:count]
        finally:
            self.train(training)


def _batches(labels: Tensor, batch: int) -> Callable[[int], Tensor]:
    """The classes of each batch; of any class beyond, where the ring loads batches that nobody waits for."""
    parts = torch.cat([labels, labels.new_full((-len(labels) % batch,), -1)]).split(batch)
    rest = labels.new_full((batch,), -1)
    return lambda i: parts[i] if i < len(parts) else rest
