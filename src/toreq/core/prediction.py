"""Pure prediction-error energies: levels that predict one another and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from toreq.core.couplings import Only
from toreq.core.energy import Energy
from toreq.core.nodes import Identity, Node
from toreq.core.residual import Residual, forward_order
from toreq.core.state import Bindings, State, added, norm
from toreq.errors import ConfigError

RESPONSE = 3e-5
"""Relative response for contrasts of a chain."""


class PredictionEnergy(Energy):
    r""":math:`E = \tfrac12\sum_l\|h_l - f_l(h_{s(l)}; x)\|^2`, one block for each level (Rao and Ballard 1999).

    It is zero at the free equilibrium :math:`h_l = f_l(h_{s(l)})`. Where no level reads a later one (a chain or a
    tree), ``order`` names the levels in the order of a forward pass, which reaches that equilibrium exactly; on rings
    and loops ``order`` is None.

    Args:
        terms: one :class:`~toreq.core.Residual` per level.
        shapes: node name -> shape of one example, in the order in which a ring is swept.

    Raises:
        ConfigError: for a level without a block or with several.
    """

    def __init__(self, terms: Sequence[Residual], shapes: dict[str, int | tuple[int, ...]]) -> None:
        super().__init__([Node(n, s, Identity()) for n, s in shapes.items()], list(terms))
        if sorted(c.node for c in terms) != sorted(self.names):
            raise ConfigError(
                f"PredictionEnergy: expected one Residual for each of {list(self.names)}, got them for "
                f"{[c.node for c in terms]}; predict every level once"
            )
        self.order = forward_order(terms)
        # errors grow on their way down and cross kinks; on a chain the sweeps end exactly, and the contrast of energies
        # that are zero between the phases keeps its digits at small responses
        self.response = None if self.order is None else RESPONSE
        self._predicting = {c.node: (f"coupling_{i}", c) for i, c in enumerate(terms)}

    @property
    def predictive(self) -> bool:
        return True

    def map(self, h: State, bindings: Bindings, static: State | None = None, only: Only = None) -> State:
        out: State = {}
        for n in self.names if only is None else only:
            name, c = self._predicting[n]
            out[n] = c.prediction(h, bindings[name])
            self._check_shape("prediction", n, out[n], out[n].shape[0])
        # there are no drives: what is static are constant forces
        return added(out, {n: t for n, t in static.items() if n in out}) if static else out

    def errors(self, h: State, bindings: Bindings, force: State) -> State:
        r"""On a chain or tree :math:`\epsilon_l = F_l + \sum_m J_m(h)^\top\epsilon_m` over the levels m that l
        predicts, in one sweep.

        Args:
            h: at which the blocks are linearised.
            bindings: what ``bind`` returned.
            force: F; a level that is missing has none.

        Raises:
            ConfigError: on a ring, where no level is last.
        """
        pending, out = dict(force), {}
        for n in reversed(self._ordered("errors")):
            name, c = self._predicting[n]
            out[n] = pending[n] if n in pending else torch.zeros_like(h[n])
            if c.source is not None:
                message, _ = c.linearised(h, bindings[name]).back(out[n], message=True, gradient=False)
                assert message is not None
                pending[c.source] = pending[c.source] + message if c.source in pending else message
        return {n: out[n] for n in self.names}

    def response_size(self, a: State, h: State, v: State, bindings: Bindings) -> Tensor:
        """On a chain or tree the size of all errors that the force causes, which may grow on their way down."""
        return super().response_size(a, h, v, bindings) if self.order is None else norm(self.errors(h, bindings, v))

    def forward_from(self, eps: State, bindings: Bindings) -> State:
        r"""On a chain or tree the states :math:`h_l = f_l(h_{l-1}) + \epsilon_l`, in one sweep.

        Raises:
            ConfigError: on a ring, where no level is first.
        """
        h: State = {}
        for n in self._ordered("forward_from"):
            name, c = self._predicting[n]
            h[n] = c.prediction(h, bindings[name]) + eps[n]
        return {n: h[n] for n in self.names}

    def _ordered(self, where: str) -> tuple[str, ...]:
        if self.order is None:
            raise ConfigError(
                f"PredictionEnergy.{where}: expected a chain or tree of levels, got a ring; relax it with a solver"
            )
        return self.order

    def initial(self, bindings: Bindings) -> State:
        """Zeros for a chain, which one sweep settles; for a ring one pass in node order, the first level at zero."""
        if self.order is None:
            return super().initial(bindings)
        size, dtype, device = self.batch(bindings)
        zero = torch.zeros((), dtype=dtype, device=device)
        return {n: zero.expand(size, *s) for n, s in self.shapes.items()}

    def colours(self) -> list[frozenset[str]]:
        """The levels one by one, in the order of a forward pass: a block sweep then is one."""
        return [frozenset([n]) for n in self.order or self.names]

    def eliminable(self) -> frozenset[str]:
        # with two levels the colours would look like those of a symmetric pair, which they are not
        return frozenset()
