"""MultiScaleDense: a pyramid of dense layers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from toreq.errors import ConfigError
from toreq.estimators import Estimator
from toreq.solvers import Solver
from toreq.systems.mstep.feedforward import MultiResolution
from toreq.systems.mstep.parts import PoolAxis, PoolImage, nodes_of, on_input, padded_size, pieces
from toreq.systems.mstep.pyramid import Level, MultiScale, Springs, check_nodes, check_pyramid
from toreq.systems.mstep.sharing import Derive
from toreq.systems.toroidal_mlp import ToroidalMLP


class MultiScaleDense(MultiScale):
    r"""Dense pyramid: a :class:`~toreq.systems.ToroidalMLP` on every level, half as wide on each coarser one.

    .. math:: E = \sum_{l=1}^{L} E_{\mathrm{mlp}}(h^l; x^l) + \sum_{l<L}\frac{\lambda_l}2\|h^l_{top} -
              \uparrow h^{l+1}_{top}\|^2 + \sum_{l<L}\frac{\mu_l}2\|h^{l+1}_{top} - \downarrow h^l_{top}\|^2

    Images are averaged over 2 x 2 windows from level to level; other inputs are the same on all. :math:`\uparrow`
    copies a unit to two. Shared weights are the finest level's between averaged units, :math:`D W U`. Springs and
    their stability: as in :class:`MultiScaleConv`, with c = 2.

    Args:
        input_shape: shape of one example; ``(C, H, W)`` is pooled, others are not.
        num_classes: number of classes.
        solver, estimator: override the shipped ones.
        levels, shared, spring, strength, mu, springs, exits, alone, pad: as in :class:`MultiScaleConv`.
        hidden: widths on the finest level; each must halve L - 1 times.
        nonlinearity, gated, coupling_scale, norm_bound: of the base system.
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
        hidden: Sequence[int] = (512,),
        nonlinearity: str = "tanh",
        gated: bool = False,
        coupling_scale: float = 0.25,
        norm_bound: float | None = 0.8,
    ) -> None:
        super().__init__(input_shape, num_classes)
        where = type(self).__name__
        check_pyramid(where, {"levels": levels, "spring": spring, "strength": strength, "mu": mu, "springs": springs})
        self.levels, self.exits, self.alone, self.shared, self.hidden = levels, exits, alone, shared, tuple(hidden)
        self.nonlinearity = nonlinearity
        coarsest = 2 ** (levels - 1)
        if any(w % coarsest for w in self.hidden):
            fits = tuple(math.ceil(w / coarsest) * coarsest for w in self.hidden)
            raise ConfigError(
                f"{where}: expected widths divisible by {coarsest}, got hidden={self.hidden}; use for example {fits} "
                "or fewer levels"
            )
        image = len(self.input_shape) == 3
        self.size = padded_size(where, self.input_shape[1:], coarsest, pad) if image else None
        inner = {
            "nonlinearity": nonlinearity, "gated": gated, "coupling_scale": coupling_scale, "norm_bound": norm_bound,
        }  # fmt: skip
        owns = [self._base(2**i, inner) for i in range(levels)]
        parts = [self._level(owns[i], owns[0], 2**i) for i in range(levels - 1, -1, -1)][::-1]
        if levels > 1:
            check_nodes(where, parts[0].nodes)
        self.build(parts, Springs(strength, spring == "learned", mu, springs, (-1,)), solver, estimator)

    def _base(self, factor: int, options: dict[str, object]) -> ToroidalMLP:
        shape = self.input_shape
        if self.size is not None:
            shape = (shape[0], self.size[0] // factor, self.size[1] // factor)
        hidden = [w // factor for w in self.hidden]
        return ToroidalMLP(shape, self.num_classes, hidden=hidden, **options)  # type: ignore[arg-type]

    def _level(self, own: ToroidalMLP, base: ToroidalMLP, factor: int) -> Level:
        couplings, nodes = pieces(own), nodes_of(own)
        padded = self.size is not None and self.size != self.input_shape[1:]
        if factor > 1 and self.shared:
            prepare = nn.Identity() if self.size is None else PoolImage(self.size, factor, repeat=True)
            derive = Derive(prepare, PoolAxis(factor, -1), factor, adapt=True)
            shapes = {n.name: n.shape for n in nodes}
            couplings = [derive(c, shapes[c.nodes[-1]], shapes[c.nodes[0]]) for c in pieces(base)]
        elif self.size is not None and (factor > 1 or padded):
            couplings = [on_input(c, PoolImage(self.size, factor)) for c in couplings]
        return Level(nodes, couplings, own.head if factor == 1 or self.exits else None)

    def feedforward(self) -> nn.Module:
        """The same pyramid of dense layers run once, coarse features added to the next finer level's last layer."""
        return MultiResolution(
            self.input_shape, self.num_classes, self.levels, self.size, self.shared, hidden=self.hidden,
            nonlinearity=self.nonlinearity,
        )  # fmt: skip
