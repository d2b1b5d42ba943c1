"""MultiScaleConv: a pyramid of convolutional layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from toreq.errors import ConfigError
from toreq.estimators import Estimator
from toreq.solvers import Solver
from toreq.systems.deep_hopfield import ConvHopfield
from toreq.systems.mstep.feedforward import MultiResolution
from toreq.systems.mstep.parts import PoolImage, nodes_of, on_input, padded_size, pieces
from toreq.systems.mstep.pyramid import Level, MultiScale, Springs, check_nodes, check_pyramid
from toreq.systems.mstep.sharing import Derive


class MultiScaleConv(MultiScale):
    r"""Convolutional pyramid: a :class:`~toreq.systems.ConvHopfield` on every level.

    .. math:: E = \sum_{l=1}^{L} E_{\mathrm{conv}}(h^l; x^l) + \sum_{l<L}\frac{\lambda_l}2\|h^l_{top} -
              \uparrow h^{l+1}_{top}\|^2 + \sum_{l<L}\frac{\mu_l}2\|h^{l+1}_{top} - \downarrow h^l_{top}\|^2

    with :math:`x^1 = x` and :math:`x^{l+1}` its average over windows of 2 x 2, :math:`\uparrow` copying a unit to its
    window, :math:`\downarrow` the average over one. Springs add a positive semi-definite part to the energy's
    curvature: there is one equilibrium whenever the levels alone have one. Into the relaxation's Jacobian they bring
    eigenvalues down to :math:`-s\,(1 + c + 2\sqrt c\cos(\pi/L))`, s the ``strength`` and c = 4 the units of a window
    (twice that with a second spring at most), so that the plain iteration needs a damping below 2 over one plus
    ``norm_bound`` plus that; :class:`~toreq.solvers.CoarseToFine` treats springs implicitly and needs none.

    Args:
        input_shape: ``(C, H, W)``.
        num_classes: number of classes.
        solver, estimator: override the shipped ones.
        levels: L; 1 is the base system.
        shared: one set of weights for all levels, with adapters (a scale and a bias per channel of the drive, a bias
            per channel, and a scale per channel of each coupling); else each level has its own.
        spring: ``"fixed"`` or ``"learned"`` strengths.
        strength: :math:`\lambda` over the curvature of the finer node's own energy at rest (the slope of its tanh is
            divided out).
        mu: the same for the second spring; None for none.
        springs: ``"last"`` joins the last layers, ``"all"`` every layer.
        exits: read every level out, and nudge all of them.
        alone: read (and nudge) the exit of level l at the equilibrium of the levels l to L alone, which is where
            :meth:`predict` reads it, instead of at the joint one; about a third more work in training.
        pad: pad images with zeros to the next size that halves on every level; else refuse them.
        channels, kernel, stride, nonlinearity, gain, gated, coupling_scale, norm_bound: of the base system, which is
            padded by half its kernel.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        solver: Solver | None = None,
        estimator: Estimator | None = None,
        *,
        levels: int = 3,
        shared: bool = True,
        spring: str = "fixed",
        strength: float = 1.0,
        mu: float | None = None,
        springs: str = "last",
        exits: bool = False,
        alone: bool = False,
        pad: bool = True,
        channels: Sequence[int] = (32, 64),
        kernel: int = 5,
        stride: int = 2,
        padding: int | None = None,
        nonlinearity: str = "tanh",
        gain: float | None = None,
        gated: bool = False,
        coupling_scale: float = 0.5,
        norm_bound: float | None = 0.8,
    ) -> None:
        super().__init__(input_shape, num_classes)
        where = type(self).__name__
        options = {"levels": levels, "spring": spring, "strength": strength, "mu": mu, "springs": springs}
        check_pyramid(where, options)
        if len(self.input_shape) != 3:
            raise ConfigError(f"{where}: expected input_shape (C, H, W), got {self.input_shape}; use arch='dense'")
        if levels > 1 and (kernel % 2 == 0 or padding not in (None, kernel // 2)):
            raise ConfigError(
                f"{where}: expected an odd kernel padded by half of it, got {kernel} and {padding}; only then do all "
                "layers halve"
            )
        self.levels, self.exits, self.alone, self.shared = levels, exits, alone, shared
        channels_in, *size = self.input_shape
        multiple = stride ** len(tuple(channels)) * 2 ** (levels - 1) if levels > 1 else 1
        self.size = padded_size(where, size, multiple, pad)
        inner = {
            "channels": channels, "kernel": kernel, "stride": stride,
            "padding": kernel // 2 if padding is None else padding, "nonlinearity": nonlinearity, "gain": gain,
            "gated": gated, "coupling_scale": coupling_scale, "norm_bound": norm_bound,
        }  # fmt: skip
        base = self._base(channels_in, 1, inner)
        owns = [base] + [self._base(channels_in, 2**i, inner) for i in range(1, levels)]
        # the finest level last: its drives are changed in place, after the others have borrowed them
        parts = [self._level(owns[i], base, 2**i) for i in range(levels - 1, -1, -1)][::-1]
        if levels > 1:
            check_nodes(where, parts[0].nodes)
        self.twin = {k: inner[k] for k in ("channels", "kernel", "stride", "padding", "nonlinearity")}
        self.build(parts, Springs(strength, spring == "learned", mu, springs, (-2, -1)), solver, estimator)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _base(self, channels: int, factor: int, options: dict[str, object]) -> ConvHopfield:
        shape = (channels, self.size[0] // factor, self.size[1] // factor)
        return ConvHopfield(shape, self.num_classes, **options)  # type: ignore[arg-type]

    def _level(self, own: ConvHopfield, base: ConvHopfield, factor: int) -> Level:
        prepare = PoolImage(self.size, factor)
        couplings = pieces(own)
        nodes = nodes_of(own)
        if factor == 1:
            if self.size != self.input_shape[1:]:
                couplings = [on_input(c, prepare) for c in couplings]
        elif self.shared:
            shapes = {n.name: n.shape for n in nodes}
            derive = Derive(prepare, nn.Identity(), 1, adapt=True, per_channel=2)
            couplings = [derive(c, shapes[c.nodes[-1]], shapes[c.nodes[0]]) for c in pieces(base)]
        else:
            couplings = [on_input(c, prepare) for c in couplings]
        return Level(nodes, couplings, own.head if factor == 1 or self.exits else None)

    def feedforward(self) -> nn.Module:
        """The same pyramid of convolutions run once, coarse features added to the next finer level's last layer."""
        return MultiResolution(self.input_shape, self.num_classes, self.levels, self.size, self.shared, **self.twin)
