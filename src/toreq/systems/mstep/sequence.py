"""MultiScaleSequence: a pyramid of token levels."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

from torch import Tensor, nn

from toreq.core import Coupling, Drive, Lateral, LayerNorm, Node
from toreq.errors import ConfigError
from toreq.estimators import Estimator
from toreq.solvers import Solver
from toreq.systems.looped_transformer import LoopedTransformer, TokenHead
from toreq.systems.mstep.feedforward import MultiResolutionTokens
from toreq.systems.mstep.parts import PadTokens, PoolAxis, PoolTokens, pieces
from toreq.systems.mstep.pyramid import Level, MultiScale, Springs, check_pyramid
from toreq.systems.mstep.sharing import Derive


class MultiScaleSequence(MultiScale):
    r"""Pyramid over tokens: a :class:`~toreq.systems.LoopedTransformer` on every level, half the tokens on each
    coarser one.

    .. math:: E = \sum_{l=1}^{L} E_{\mathrm{tokens}}(h^l; x^l) + \sum_{l<L}\frac{\lambda_l}2\|h^l -
              \uparrow h^{l+1}\|^2 + \sum_{l<L}\frac{\mu_l}2\|h^{l+1} - \downarrow h^l\|^2

    The drive of level l averages the embedded tokens in windows of :math:`2^{l-1}` and gives each average the length
    of its tokens (:class:`~toreq.systems.mstep.parts.PoolTokens`); :math:`\uparrow` copies a token to its pair. To fill
    the last window of the coarsest level the last token is repeated. Springs and their stability: as in
    :class:`MultiScaleConv`, with c = 2.

    Args:
        input_shape: ``(C, H, W)``, or ``(N,)`` of symbol indices with ``vocabulary``.
        num_classes: number of classes.
        solver, estimator: override the shipped ones.
        levels, shared, spring, strength, mu, exits, alone, pad: as in :class:`MultiScaleConv`.
        features, heads, hidden, patch, vocabulary, pool, attention, gated, coupling_scale, norm_bound: of the base
            system.
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
        exits: bool = False,
        alone: bool = False,
        pad: bool = True,
        features: int = 96,
        heads: int = 4,
        hidden: int = 192,
        patch: int | str = 7,
        vocabulary: int = 0,
        pool: str = "none",
        attention: str = "softmax",
        gated: bool = False,
        coupling_scale: float = 0.4,
        norm_bound: float | None = 0.9,
    ) -> None:
        super().__init__(input_shape, num_classes)
        where = type(self).__name__
        check_pyramid(where, {"levels": levels, "spring": spring, "strength": strength, "mu": mu, "springs": "last"})
        self.levels, self.exits, self.alone, self.shared, self.vocabulary = levels, exits, alone, shared, vocabulary
        self.widths = (features, heads, hidden, patch, vocabulary, pool)
        base = LoopedTransformer(
            self.input_shape, num_classes, features=features, heads=heads, hidden=hidden, patch=patch,
            vocabulary=vocabulary, pool=pool, attention=attention, gated=gated, coupling_scale=coupling_scale,
            norm_bound=norm_bound,
        )  # fmt: skip
        (tokens,) = base.equilibrium.dynamics.shapes.values()
        coarsest = 2 ** (levels - 1)
        self.count = math.ceil(tokens[0] / coarsest) * coarsest
        if self.count != tokens[0] and not pad:
            raise ConfigError(
                f"{where}: expected a number of tokens divisible by {coarsest}, got {tokens[0]}; use "
                f"{max(self.count - coarsest, coarsest)} or {self.count} tokens, fewer levels, or pad=True"
            )
        self.missing = self.count - tokens[0]
        parts = [self._level(base, 2**i, features, pool) for i in range(levels - 1, -1, -1)][::-1]
        self.build(parts, Springs(strength, spring == "learned", mu, "last", (-2,)), solver, estimator)

    def _level(self, base: LoopedTransformer, factor: int, features: int, pool: str) -> Level:
        node = Node("tokens", (self.count // factor, features), LayerNorm(features))
        head: nn.Module | None = None
        if factor == 1:
            couplings = pieces(base)
            node = Node("tokens", node.shape, base.equilibrium.dynamics.activation("tokens"))
            if self.missing:
                pad = PadTokens(self.missing)
                couplings = [_then(c, pad, pad) for c in couplings]
            head = base.head
        else:
            pad, average = PadTokens(self.missing), nn.Sequential(PadTokens(self.missing), PoolAxis(factor, -2))
            pooled = nn.Sequential(pad, PoolTokens(factor))
            if self.shared:
                derive = Derive(nn.Identity(), pooled, 1, adapt=True, gate_pool=average)
                couplings = [derive(c, node.shape, node.shape) for c in pieces(base)]
            else:
                couplings = [_then(copy.deepcopy(c), pooled, average) for c in pieces(base)]
        if (head is None and self.exits) or (factor == 1 and self.missing):
            head = TokenHead(node.shape[0], features, self.num_classes, pool)
        return Level([node], couplings, head)

    def check_dtype(self, x: Tensor) -> None:
        """Symbols are integer indices; images are floating point."""
        if not self.vocabulary:
            super().check_dtype(x)
        elif x.is_floating_point():
            raise ConfigError(f"MultiScaleSequence: expected integer symbols, got {x.dtype}; use x.long()")
        elif x.device.type == "cpu" and not 0 <= int(x.min()) <= int(x.max()) < self.vocabulary:
            raise ConfigError(
                f"MultiScaleSequence: expected symbols in [0, {self.vocabulary}), got {int(x.min())} to "
                f"{int(x.max())}; create the system with a larger vocabulary"
            )

    def feedforward(self) -> nn.Module:
        """One ordinary transformer block over the tokens of every level, coarse tokens added to the finer ones."""
        return MultiResolutionTokens(self.input_shape, self.num_classes, self.levels, self.shared, self.widths)


def _then(coupling: Coupling, pool: nn.Module, gate_pool: nn.Module) -> Coupling:
    """A coupling whose drive or gate is pooled; a gate is averaged, so that it stays in (0, 1)."""
    if isinstance(coupling, Drive):
        coupling.module = nn.Sequential(coupling.module, pool)
    elif isinstance(coupling, Lateral) and coupling.gate is not None:
        coupling.gate = nn.Sequential(coupling.gate, gate_pool)
    return coupling
