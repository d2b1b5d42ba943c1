"""Networks that settle: nodes, couplings and their energy."""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from toreq.core.couplings import Coupling, Drive, Only
from toreq.core.levels import check_levels, check_operator
from toreq.core.nodes import Activation, Identity, Node
from toreq.core.residual import Residual
from toreq.core.state import Bindings, Bound, State, added, at_least_float, leaves, norm, with_leaves
from toreq.errors import ConfigError, nearest

Terms = list[tuple[Coupling, Bound]]
"""Couplings, each with what it is bound to."""


class Dynamics(nn.Module, ABC):
    r"""Nodes and a field: what a solver relaxes, :math:`a \leftarrow f(\sigma(a))`.

    Args:
        nodes: the nodes, in the order in which a first feed-forward guess visits them.

    Raises:
        ConfigError: without nodes, or when two share a name.
    """

    conservative: bool = False
    response: float | None = None
    """The relative response that suits contrasts of this network; None leaves it to the estimator."""
    prepare: nn.Module | None
    """What every input passes first, as a `Standardize`; None for nothing."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        super().__init__()
        names = [n.name for n in nodes]
        if not names or len(set(names)) < len(names):
            where = type(self).__name__
            raise ConfigError(f"{where}: expected at least one node and unique names, got {names}; rename one")
        self.shapes = {n.name: n.shape for n in nodes}
        # named so that a node called like a Module attribute ("type", "training") cannot clash
        self.activations = nn.ModuleDict({f"node_{n.name}": n.activation for n in nodes})
        self.register_module("prepare", None)

    @property
    def names(self) -> tuple[str, ...]:
        """Node names in order."""
        return tuple(self.shapes)

    def activation(self, name: str) -> Activation:
        """The activation of one node."""
        return cast(Activation, self.activations[f"node_{name}"])

    def bind(self, x: Any, rounded: bool = False) -> Bindings:
        """Everything that depends on the input and the weights only, with its autograd graph.

        Args:
            x: the input; a tensor with the batch first, or whatever the drives' modules accept.
            rounded: compute the drives of an energy under autocast to bfloat16.
        """
        out = {f"node_{n}": self.activation(n).bind() for n in self.names}
        out.update(self._bind(self.prepared(x), rounded))
        return {k: b.map(at_least_float, at_least_float) for k, b in out.items()}

    def prepared(self, x: Any) -> Any:
        """The input as the couplings read it."""
        return x if self.prepare is None else self.prepare(x)

    @abstractmethod
    def _bind(self, x: Any, rounded: bool) -> Bindings: ...

    def activate(self, a: State, bindings: Bindings, only: Only = None) -> State:
        r""":math:`h = \sigma(a)` for every node."""
        return {n: self.activation(n)(t, bindings[f"node_{n}"]) for n, t in a.items() if only is None or n in only}

    def increment(self, a: State, origin: tuple[State, State], bindings: Bindings) -> State:
        r""":math:`\sigma(a) - h_0` for every node, ``origin`` being :math:`(a_0, h_0 = \sigma(a_0))`."""
        (b, h), bound = origin, {n: bindings[f"node_{n}"] for n in a}
        return {n: self.activation(n).increment(t, b[n], h[n], bound[n]) for n, t in a.items()}

    def derivative(self, a: State, h: State, w: State, bindings: Bindings) -> State:
        r""":math:`\sigma'(a)\,w` for the nodes of ``w``."""
        return {n: self.activation(n).derivative(a[n], h[n], t, bindings[f"node_{n}"]) for n, t in w.items()}

    def response_size(self, a: State, h: State, v: State, bindings: Bindings) -> Tensor:
        """About how far a unit of the force v in h moves each example, ``(B,)``: before the couplings spread it."""
        return norm(self.derivative(a, h, v, bindings))

    def static(self, bindings: Bindings) -> State:
        """The part of the field that no state enters (the drives), per node; nodes without one are missing."""
        return {}

    @abstractmethod
    def field(self, h: State, bindings: Bindings, static: State | None = None, only: Only = None) -> State:
        """The field on every node (or those in ``only``).

        Args:
            h: state, each node ``(B, *shape)``.
            bindings: what :meth:`bind` returned.
            static: what :meth:`static` returned, possibly plus constant forces; computed when None.
            only: names of the nodes wanted.
        """

    def rounded(self, bindings: Bindings) -> Bindings:
        """The bindings with the weights of linear operators rounded to bfloat16; the same where there are none."""
        return bindings

    def map(self, h: State, bindings: Bindings, static: State | None = None, only: Only = None) -> State:
        """The map whose fixed point is the free equilibrium; the field, unless a cheaper one has the same
        fixed point."""
        return self.field(h, bindings, static, only)

    def batch(self, bindings: Bindings) -> tuple[int, torch.dtype, torch.device]:
        """Batch size, dtype and device of the states that belong to these bindings."""
        tensors = [t for b in bindings.values() for t in b.batched.values()]
        if not tensors:
            raise ConfigError(
                f"{type(self).__name__}: expected at least one coupling to the input, got none; add a Drive"
            )
        floating = [t for t in leaves(bindings) if t.is_floating_point() or t.is_complex()]
        dtype = floating[0].dtype
        for t in floating[1:]:
            dtype = torch.promote_types(dtype, t.dtype)
        return tensors[0].shape[0], dtype, tensors[0].device

    def initial(self, bindings: Bindings) -> State:
        """A deterministic start: the first node at its drive, the others by one pass in node order."""
        size, dtype, device = self.batch(bindings)
        static = self.static(bindings)
        a = {
            n: static[n].to(dtype) if n in static else torch.zeros(size, *s, dtype=dtype, device=device)
            for n, s in self.shapes.items()
        }
        for n, t in a.items():
            self._check_shape("drive", n, t, size)
        if len(a) > 1:
            h = self.activate(a, bindings)
            for n in self.names[1:]:
                a[n] = self.map(h, bindings, static, frozenset([n]))[n]
                self._check_shape("field", n, a[n], size)
                h.update(self.activate({n: a[n]}, bindings))
        return a

    def _check_shape(self, what: str, name: str, t: Tensor, size: int) -> None:
        if t.shape != (size, *self.shapes[name]):
            raise ConfigError(
                f"{type(self).__name__}: expected a {what} of shape {(size, *self.shapes[name])} on node {name!r}, got "
                f"{tuple(t.shape)}; check the shapes of its drive and operators, and of the input"
            )

    def colours(self) -> list[frozenset[str]]:
        """Groups of nodes that do not read each other, for block sweeps; all in one group when nothing is known."""
        return [frozenset(self.names)]

    def eliminable(self) -> frozenset[str]:
        """Nodes that can be recomputed exactly from all others: one of two colours, none of it reading itself."""
        return frozenset()

    def levels(self) -> list[frozenset[str]]:
        """Groups of nodes from the finest resolution to the coarsest; one group unless the network is a pyramid."""
        return [frozenset(self.names)]

    def field_gradient(self, u: State, w: State, a: State, h: State, bindings: Bindings) -> list[Tensor | None]:
        r"""Gradient of :math:`\langle u, f(h;\theta)\rangle + \langle w, \sigma(a;\theta)\rangle` for each bound
        tensor, f
        being :meth:`map`."""
        flat = [t.detach() for t in leaves(bindings)]
        flat = [t.requires_grad_() if t.is_floating_point() else t for t in flat]
        with torch.enable_grad():
            bound = with_leaves(bindings, flat)
            f = self.map({n: t.detach() for n, t in h.items()}, bound)
            total = sum((u[n].detach() * t).sum() for n, t in f.items())
            for n, t in w.items():
                if bound[f"node_{n}"].shared:
                    total = total + (t.detach() * self.activation(n)(a[n].detach(), bound[f"node_{n}"])).sum()
        return list(_grad(total, flat))


def _bfloat16(x: Any) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(x.device.type, torch.bfloat16) if isinstance(x, Tensor) else contextlib.nullcontext()


def _grad(total: Any, flat: list[Tensor]) -> list[Tensor | None]:
    wanted = [t for t in flat if t.requires_grad]
    if not isinstance(total, Tensor) or not total.requires_grad or not wanted:
        return [None] * len(flat)
    grads = iter(torch.autograd.grad(total, wanted, allow_unused=True))
    return [next(grads) if t.requires_grad else None for t in flat]


class Energy(Dynamics):
    r"""An energy of nodes and couplings.

    .. math:: E(a) = \sum_i\left[\langle a_i, h_i\rangle - \Phi_i(a_i)\right] - K(h; x), \quad h_i = \sigma_i(a_i)

    per example; equilibria satisfy :math:`a_i = \partial K/\partial h_i`.

    Args:
        nodes: the nodes.
        couplings: the terms of K.
        levels: the nodes of each level of a pyramid, the finest first; one level of all nodes when None.

    Raises:
        ConfigError: when a coupling names a node that is not there, or the levels do not hold every node once.
    """

    conservative = True

    def __init__(
        self, nodes: Sequence[Node], couplings: Sequence[Coupling], levels: Sequence[Sequence[str]] | None = None
    ) -> None:
        super().__init__(nodes)
        self._levels = check_levels(levels, self.names)
        for c in couplings:
            for n in c.nodes:
                if n not in self.shapes:
                    raise ConfigError(
                        f"Energy: expected couplings between {list(self.shapes)}, got {type(c).__name__} on {n!r}; "
                        f"{nearest(n, list(self.shapes))}"
                    )
        for c in couplings:
            check_operator(c, self.shapes)
            if isinstance(c, Residual):
                own = self.activation(c.node)
                if not isinstance(own, Identity) or own.gain != 1:
                    found = (
                        f"{type(own).__name__} of gain {getattr(own, 'gain', 1)}; put the nonlinearity into the block"
                    )
                    raise ConfigError(f"Energy: expected the identity on the predicted node {c.node!r}, got {found}")
        self.couplings = nn.ModuleList(couplings)
        self.muted = False

    def terms(self) -> Iterator[tuple[str, Coupling]]:
        """Names and couplings; while muted, the drives and the predicting blocks only."""
        for i, c in enumerate(self.couplings):
            assert isinstance(c, Coupling)
            if not self.muted or isinstance(c, Drive | Residual):
                yield f"coupling_{i}", c

    @property
    def linear(self) -> bool:
        """Whether every term's field is linear in the state, apart from the drives."""
        return all(c.linear for _, c in self.terms())

    @property
    def predictive(self) -> bool:
        """Whether every term is a :class:`Residual` and every node is predicted: then E = 0 at the free equilibrium."""
        terms = [c for _, c in self.terms()]
        predicted = [c.node for c in terms if isinstance(c, Residual)]
        return len(predicted) == len(terms) and sorted(predicted) == sorted(self.names)

    @contextlib.contextmanager
    def couplings_off(self) -> Iterator[None]:
        """A context in which every coupling except the drives is zero, and predicting blocks read zeros."""
        blocks = [c for c in self.couplings if isinstance(c, Residual)]
        self.muted = True
        for c in blocks:
            c.muted = True
        try:
            yield
        finally:
            self.muted = False
            for c in blocks:
                c.muted = False

    def _bind(self, x: Any, rounded: bool) -> Bindings:
        out: Bindings = {}
        # levels may share a weight: its norm control then runs once, and not once a level
        with parametrize.cached() if len(self._levels) > 1 else contextlib.nullcontext():
            for name, c in self.terms():
                # not norm control and the like, which would lose what they measure
                with _bfloat16(x) if rounded and isinstance(c, Drive) else contextlib.nullcontext():
                    out[name] = c.bind(x)
        return out

    def rounded(self, bindings: Bindings) -> Bindings:
        couplings = dict(self.terms())
        return {name: couplings[name].rounded(b) if name in couplings else b for name, b in bindings.items()}

    def static(self, bindings: Bindings) -> State:
        out: State = {}
        for name, c in self.terms():
            if isinstance(c, Drive):
                d = bindings[name]["drive"]
                out[c.node] = out[c.node] + d if c.node in out else d
        return out

    def field(self, h: State, bindings: Bindings, static: State | None = None, only: Only = None) -> State:
        static = self.static(bindings) if static is None else static
        return self.accumulate(self.moving(bindings), h, static, only)

    def moving(self, bindings: Bindings) -> Terms:
        """The terms that read the state, each with what it is bound to: all but the drives."""
        return [(c, bindings[name]) for name, c in self.terms() if not isinstance(c, Drive)]

    @staticmethod
    def accumulate(terms: Terms, h: State, static: State, only: Only = None) -> State:
        """The field of these terms at ``h`` plus ``static``, on every node (or those in ``only``)."""
        acc = dict(static) if only is None else {n: t for n, t in static.items() if n in only}
        for c, bound in terms:
            if only is None or not only.isdisjoint(c.nodes):
                c.add_field(acc, h, bound, only)
        for n in h if only is None else only:
            if n not in acc:
                acc[n] = torch.zeros_like(h[n])
        return acc

    def map(self, h: State, bindings: Bindings, static: State | None = None, only: Only = None) -> State:
        """The field; for a pure prediction-error energy the predictions :math:`h \\leftarrow f(h)`, which
        share its zero."""
        if not self.predictive:
            return self.field(h, bindings, static, only)
        blocks = [(name, c) for name, c in self.terms() if isinstance(c, Residual)]
        out = {c.node: c.prediction(h, bindings[name]) for name, c in blocks if only is None or c.node in only}
        # there are no drives: what is static are constant forces
        return added(out, {n: t for n, t in (static or {}).items() if n in out})

    def coupling(self, h: State, bindings: Bindings) -> Tensor:
        """K per example, ``(B,)``."""
        first = next(iter(h.values()))
        total = torch.zeros(first.shape[0], dtype=first.dtype, device=first.device)
        for name, c in self.terms():
            total = total + c.value(h, bindings[name])
        return total

    def forward(self, a: State, bindings: Bindings) -> Tensor:
        """E per example, ``(B,)``, at pre-activations ``a``."""
        h = self.activate(a, bindings)
        return self.local(a, h, bindings) - self.coupling(h, bindings)

    def local(self, a: State, h: State, bindings: Bindings) -> Tensor:
        r"""The nodes' own energy :math:`\sum_i\Phi_i^*(h_i)` per example, ``(B,)``."""
        parts = [self.activation(n).conjugate(t, h[n], bindings[f"node_{n}"]) for n, t in a.items()]
        return torch.stack(parts).sum(0)

    def contrast(
        self, plus: tuple[State, State], minus: tuple[State, State], weight: Tensor, bindings: Bindings
    ) -> list[Tensor | None]:
        r"""Gradient of :math:`\sum_b w_b\,[E_b(h^+) - E_b(h^-)]` at fixed a, for each bound tensor.

        :math:`\partial E/\partial\theta = -\partial K/\partial\theta - \partial\Phi/\partial\theta`, the second term
        only for learnable activations. Every component reads the states of its own nodes alone.

        Args:
            plus, minus: pairs ``(a, h)`` of states.
            weight: ``(B,)``.
            bindings: of B examples.
        """
        grads: dict[str, dict[str, Tensor]] = {}
        for name, c in self.terms():
            grads[name] = c.gradient(plus[1], minus[1], -weight, bindings[name])
        for n in self.names:
            grads[f"node_{n}"] = self.activation(n).gradient(plus[0][n], minus[0][n], -weight, bindings[f"node_{n}"])
        return [
            grads.get(name, {}).get(k) for name, b in bindings.items() for group in (b.shared, b.batched) for k in group
        ]

    def colours(self) -> list[frozenset[str]]:
        """Greedy colouring of the node graph: nodes of one colour do not read each other."""
        neighbours: dict[str, set[str]] = {n: set() for n in self.names}
        for _, c in self.terms():
            for n in c.nodes:
                neighbours[n].update(m for m in c.nodes if m != n)
        colour: dict[str, int] = {}
        for n in self.names:
            used = {colour[m] for m in neighbours[n] if m in colour}
            colour[n] = next(k for k in range(len(self.names)) if k not in used)
        return [frozenset(n for n in self.names if colour[n] == k) for k in range(max(colour.values()) + 1)]

    def eliminable(self) -> frozenset[str]:
        colours = self.colours()
        reading = {n for _, c in self.terms() if c.self_reading for n in c.nodes}
        # with one colour (couplings off) there is nothing to recompute a node from
        if len(colours) == 1 or (len(colours) > 2 and len(self._levels) == 1):
            return frozenset()
        # of the two, the one with more units: what is left to extrapolate over is then small
        free = [c for c in colours if not c & reading]
        if len(self._levels) > 1:  # of a pyramid's colours, what does not read itself
            free = [c - reading for c in colours]
        return max(free, key=lambda c: sum(math.prod(self.shapes[n]) for n in c), default=frozenset())

    def levels(self) -> list[frozenset[str]]:
        return list(self._levels)
