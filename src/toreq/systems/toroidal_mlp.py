"""ToroidalMLP: dense layers with lateral couplings and a torus of past iterates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from toreq.core import Bilinear, Coupling, Dense, Drive, Energy, Lateral, Node, activation, control_norm
from toreq.errors import ConfigError
from toreq.estimators import Estimator
from toreq.solvers import Anderson, Solver
from toreq.systems.base import System, chain_bounds


class ToroidalMLP(System):
    r"""Dense hidden layers, each coupled to itself, read out by a linear head.

    .. math:: E = \sum_l\left[\langle a_l, h_l\rangle - \Phi(a_l)\right] - \langle h_1, U x + c\rangle
              - \tfrac12\sum_l\langle g_l * h_l, W_l (g_l * h_l)\rangle - \sum_l\langle h_{l+1}, A_l h_l\rangle

    with :math:`W_l` symmetric and :math:`g_l = 1` unless ``gated``, where :math:`g_1 = \mathrm{logistic}(G x + d)`.
    Past iterates sit on the solver's ring, over which the next one is extrapolated.

    Args:
        input_shape: shape of one example; it is flattened.
        num_classes: number of classes.
        solver, estimator: override the shipped ones.
        hidden: widths of the hidden layers.
        nonlinearity: ``"tanh"`` or ``"hard_sigmoid"`` (any name of :func:`toreq.core.activation`).
        gated: gate the first layer's lateral coupling by the input.
        coupling_scale: initial lateral weights have standard deviation ``coupling_scale / sqrt(width)``; the radius
            of a symmetric Gaussian matrix is twice ``coupling_scale``.
        norm_bound: bound on the norm of all couplings together, which bounds the relaxation's radius; None: free.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        solver: Solver | None = None,
        estimator: Estimator | None = None,
        *,
        hidden: Sequence[int] = (512,),
        nonlinearity: str = "tanh",
        gated: bool = False,
        coupling_scale: float = 0.25,
        norm_bound: float | None = 0.8,
    ) -> None:
        super().__init__(input_shape, num_classes)
        self.hidden, self.nonlinearity = tuple(hidden), nonlinearity
        if not self.hidden or any(w < 1 for w in self.hidden):
            raise ConfigError(f"ToroidalMLP: expected positive widths, got hidden={self.hidden}; e.g. (512,)")
        inputs = math.prod(self.input_shape)
        nodes = [Node(f"h{i + 1}", w, activation(nonlinearity)) for i, w in enumerate(self.hidden)]
        drive = nn.Sequential(nn.Flatten(), nn.Linear(inputs, self.hidden[0]))
        couplings: list[Coupling] = [Drive("h1", drive)]
        joint, own = chain_bounds(norm_bound, len(self.hidden), lateral=True)
        for i, width in enumerate(self.hidden):
            op = Dense(width, width, symmetric=True, scale=coupling_scale / math.sqrt(width))
            if own is not None:
                control_norm(op, own)
            gate = None
            if gated and i == 0:
                gate = nn.Sequential(nn.Flatten(), nn.Linear(inputs, width), nn.Sigmoid())
            couplings.append(Lateral(op, f"h{i + 1}", gate))
        for i, (below, above) in enumerate(pairwise(self.hidden)):
            between = Dense(below, above)
            if joint is not None:
                control_norm(between, joint)
            couplings.append(Bilinear(between, f"h{i + 1}", f"h{i + 2}"))
        solver = Anderson(length=3) if solver is None else solver
        self.assemble(Energy(nodes, couplings), solver, estimator, nn.Linear(self.hidden[-1], num_classes))

    def feedforward(self) -> nn.Module:
        """The same widths and nonlinearity without couplings: flatten, then linear layers."""
        sizes = [math.prod(self.input_shape), *self.hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for a, b in pairwise(sizes):
            layers += [nn.Linear(a, b), activation(self.nonlinearity)]
        return nn.Sequential(*layers, nn.Linear(sizes[-1], self.num_classes))
