"""The equilibrium layer: an ``nn.Module`` whose forward settles and whose backward runs an estimator."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from toreq.core.energy import Dynamics, Energy
from toreq.core.nodes import Identity, Node
from toreq.core.quadratic import SelfCoupling
from toreq.core.residual import Residual
from toreq.core.spectral import relaxation_radius
from toreq.core.state import Bindings, State, detached, leaves
from toreq.core.vector_field import VectorField
from toreq.errors import ConfigError, ConvergenceWarning, DivergenceError
from toreq.estimators import Centered, Estimator, NonConservative, Predictive, Statistics, Thermal, Unrolled
from toreq.estimators.base import Cost, FreePhase, LinearNudge
from toreq.estimators.pairs import Paired
from toreq.hardware import multiplies_bfloat16
from toreq.settle import Last, Settle, cost_per_example, full_precision
from toreq.solvers import Fading, FixedPoint, Relaxation, Solution, Solver, Step
from toreq.starts import Visit


class Equilibrium(nn.Module):
    r"""A network that settles, as a layer.

    ``forward(x)`` returns the read-out nodes' activations at the equilibrium :math:`a^* = f(\sigma(a^*); x)`. No
    graph is stored through the relaxation; ``backward`` runs the estimator with the cotangent it receives as a linear
    cost, so any loss and any head work.

    Args:
        dynamics: an :class:`~toreq.core.Energy` or :class:`~toreq.core.VectorField`.
        solver: how to settle; undamped fixed-point iteration when None.
        estimator: how to learn; ``Centered`` for energies, ``Predictive`` for pure prediction-error energies,
            ``NonConservative`` for vector fields, and ``Thermal`` with a solver that samples a law, when None.
        readout: name of the read-out node (forward then returns a tensor), or several (a dictionary); the last node
            when None.
        warn: whether unsettled examples give a :class:`~toreq.errors.ConvergenceWarning`, the first time in each phase;
            :attr:`last` counts them always.

    Raises:
        ConfigError: for an unknown read-out, or an estimator that does not support the dynamics (with the reason).
    """

    def __init__(
        self,
        dynamics: Dynamics,
        solver: Solver | None = None,
        estimator: Estimator | None = None,
        readout: str | Sequence[str] | None = None,
        warn: bool = True,
    ) -> None:
        super().__init__()
        solver = FixedPoint() if solver is None else solver
        self.dynamics = _with_self_coupling(dynamics, solver)
        self._solver = self._fitting(solver)
        self._estimator = self._checked(_default_estimator(dynamics, solver) if estimator is None else estimator)
        self._check_pair()
        readout = dynamics.names[-1] if readout is None else readout
        self.readout = (readout,) if isinstance(readout, str) else tuple(readout)
        self.single = isinstance(readout, str)
        if not self.readout or len(set(self.readout)) < len(self.readout):
            raise ConfigError(
                f"Equilibrium: expected distinct read-out nodes, got {list(self.readout)}; name each once"
            )
        for name in self.readout:
            if name not in dynamics.shapes:
                raise ConfigError(
                    f"Equilibrium: expected a read-out among {list(dynamics.shapes)}, got {name!r}; name a node"
                )
        self.warn = warn
        self.visit: Visit | None = None
        self._warned: set[str] = set()
        self.last = Last()

    def report_to(self, other: Equilibrium) -> None:
        """Keep statistics, and what has been warned of, where another layer keeps its own."""
        self.last, self._warned = other.last, other._warned

    def _checked(self, estimator: Estimator) -> Estimator:
        support = estimator.supports(self.dynamics)
        if not support:
            raise ConfigError(f"Equilibrium: expected an estimator that supports this network; {support.reason}")
        return estimator

    def _fitting(self, solver: Solver) -> Solver:
        reason = solver.refusal(self.dynamics)
        if reason:
            raise ConfigError(f"Equilibrium: expected a solver that can relax this network; {reason}")
        return solver

    def _check_pair(self) -> None:
        # not when one of the two is assigned: both may be about to change
        support = self._estimator.accepts(self._solver)
        if not support:
            raise ConfigError(f"Equilibrium: expected an estimator that fits the solver; {support.reason}")

    @property
    def estimator(self) -> Estimator:
        """The gradient estimator; assigning one that does not support the network is refused."""
        return self._estimator

    @estimator.setter
    def estimator(self, value: Estimator) -> None:
        self._estimator = self._checked(value)

    @property
    def solver(self) -> Solver:
        """The solver; assigning one that adds another self-coupling (a recurrent torus) is refused."""
        return self._solver

    @solver.setter
    def solver(self, value: Solver) -> None:
        if value.self_coupling() != self._solver.self_coupling():
            raise ConfigError(
                "Equilibrium: expected a solver with the same self-coupling, got another recurrent torus, which "
                "changes "
                "the energy; build a new layer"
            )
        self._solver = self._fitting(value)

    def hasten(self) -> None:
        """Loosen solver and estimator to settings that train as well in a fraction of the time.

        With linear couplings the free phase settles to a relative residual of 1e-2 and the difference of the nudged
        phases to 5e-2, with others to 3e-3 and 2e-2; linear couplings and drives are rounded to bfloat16 where the
        parameters' device multiplies these natively. The gradient's cosine with the exact one then still is above 0.99
        in the shipped systems (the performance page has the numbers; ``toreq check`` measures it for yours).
        """
        linear = isinstance(self.dynamics, Energy) and self.dynamics.linear
        free, nudged = (1e-2, 5e-2) if linear else (3e-3, 2e-2)
        device = next((p.device for p in self.parameters()), torch.device("cpu"))
        precision = "rounded" if multiplies_bfloat16(device) else self._solver.precision
        if self._solver.sampling():  # whose tolerance is that of a mean
            free = self._solver.tolerance
        self._solver = replace(self._solver, tolerance=max(self._solver.tolerance, free), precision=precision)
        if isinstance(self._estimator, Paired):
            self._estimator = replace(self._estimator, tolerance=max(self._estimator.tolerance, nudged))

    def __getstate__(self) -> dict[str, Any]:
        # statistics belong to a process's latest batch; a pickled or copied layer starts without
        return {**self.__dict__, "last": Last(), "visit": None}

    def extra_repr(self) -> str:
        return f"readout={list(self.readout)}, solver={self._solver}, estimator={self._estimator}"

    def forward(self, x: Any) -> Any:
        """Settle and read out.

        Args:
            x: input, batch first.

        Returns:
            The read-out node ``(B, *shape)``, or a dictionary of several.

        Raises:
            DivergenceError: when an example's state is no longer finite.
        """
        return self._run(x, None)

    def loss(self, x: Any, cost: Cost) -> Tensor:
        r"""Mean cost at equilibrium, its backward nudged by the cost itself: :math:`-\beta\,\partial C/\partial h` at
        the moving state, as the papers do when the estimator has ``nudge="cost"``.

        Args:
            x: input, batch first.
            cost: maps the read-out state (a dictionary) to a cost per example ``(B,)``.
        """
        return self._run(x, cost)

    def _run(self, x: Any, cost: Cost | None) -> Any:
        bindings = self._bind(x)
        flat = leaves(bindings)
        learning = torch.is_grad_enabled() and any(t.requires_grad for t in flat)
        if learning or isinstance(self._estimator, Unrolled):
            self._check_pair()
        if isinstance(self._estimator, Unrolled):
            out = self._unrolled(bindings, self._estimator)
            return cost_per_example(out, cost).mean() if cost else self._shape(out)
        if getattr(self._estimator, "nudge", None) == "cost" and cost is None and torch.is_grad_enabled():
            raise ConfigError(
                "Equilibrium: expected loss(x, cost) with nudge='cost', got forward(x); a cotangent alone is a "
                "linear cost: "
                "call layer.loss, or choose nudge='relative'"
            )
        if learning:
            result = Settle.apply(self, bindings, cost, *flat)
            if cost is None:
                return self._shape(dict(zip(self.readout, result, strict=True)))
            # parameters of the cost itself do not pass the equilibrium: their gradient is the direct one
            direct = cost_per_example(dict(zip(self.readout, result[1:], strict=True)), cost).mean()
            return result[0] + (direct - direct.detach()) if direct.requires_grad else result[0]
        with torch.no_grad():
            free = self.free_phase(detached(bindings))
            out = {n: free.h[n] for n in self.readout}
            return cost_per_example(out, cost).mean() if cost else self._shape(out)

    def _bind(self, x: Any) -> Bindings:
        return self.dynamics.bind(x, rounded=self._solver.precision == "rounded")

    def _shape(self, out: State) -> Any:
        return out[self.readout[0]] if self.single else out

    def _unrolled(self, bindings: Bindings, estimator: Unrolled) -> State:
        solver = estimator.loop(self._solver)
        with full_precision(bindings):
            problem = Relaxation(self.dynamics, bindings, as_map=True)
            solution = solver.solve(problem, self.dynamics.initial(bindings))
        self._note(solution, "free", expected=estimator.steps is None and solver.tolerance > 0)
        return {n: solution.h[n] for n in self.readout}

    def free_phase(
        self,
        bindings: Bindings,
        record: bool | str = False,
        callback: Callable[[Step], None] | None = None,
    ) -> Solution:
        """The free equilibrium of detached bindings; its statistics go to :attr:`last`."""
        with torch.no_grad(), full_precision(bindings):
            start = self.dynamics.initial(bindings)
            if self.visit is not None:
                start = self.visit.start(start)
            solution = self._solver.solve(
                Relaxation(self.dynamics, bindings, as_map=True), start, record=record, callback=callback
            )
            if self.visit is not None:
                self.visit.keep(solution.state)
        self._note(solution, "free", expected=self._solver.tolerance > 0)
        return solution

    def solve(self, x: Any, record: bool | str = False, callback: Callable[[Step], None] | None = None) -> Solution:
        """The free equilibrium without a gradient.

        Args:
            x: input, batch first.
            record: keep the residual and energy of every step; ``"states"`` keeps the states too.
            callback: called after every step with a :class:`~toreq.solvers.Step`.
        """
        with torch.no_grad():
            return self.free_phase(detached(self._bind(x)), record, callback)

    def solve_nudged(self, x: Any, cotangent: Tensor | State, record: bool = False) -> Solution:
        """The nudged phase for a given cotangent of the read-out (for ``Centered``: +beta stacked on -beta).

        Args:
            x: input, batch first.
            cotangent: :math:`\\partial C/\\partial h` per read-out node.
            record: keep the trace.
        """
        self._check_pair()
        with torch.no_grad():
            bindings = detached(self._bind(x))
            free = self.free_phase(bindings)
            v = {self.readout[0]: cotangent} if isinstance(cotangent, Tensor) else cotangent
            phase = FreePhase(self.dynamics, bindings, self._solver.nudged(), free.state, free.h)
            with full_precision(bindings):
                estimate = self._estimator.estimate(phase, LinearNudge(v), record)
        self.last.nudged = estimate.statistics
        return estimate.solution

    def radius(self, x: Any, iterations: int = 60) -> float:
        """Mean over the batch of the relaxation Jacobian's spectral radius at equilibrium (below 1: it contracts)."""
        with torch.no_grad():
            bindings = detached(self._bind(x))
            solution = self.free_phase(bindings)
            return float(relaxation_radius(self.dynamics, bindings, solution.state, iterations).mean())

    @contextlib.contextmanager
    def couplings_off(self) -> Iterator[None]:
        """A context in which every coupling except the drives is zero."""
        assert isinstance(self.dynamics, Energy | VectorField)
        with self.dynamics.couplings_off():
            yield

    def _note(self, solution: Solution, phase: Literal["free", "nudged"], expected: bool) -> None:
        statistics = Statistics.of(solution)
        if phase == "free":
            self.last.free = statistics
            self.last.nudged = None
        bad = ~torch.isfinite(statistics.residual)
        if bool(bad.any()):
            raise DivergenceError(
                f"Equilibrium: expected a finite state, got {int(bad.sum())} of {bad.numel()} examples "
                f"overflowing after "
                f"{int(statistics.steps.max())} steps; lower the damping, control the couplings' norm, or check "
                f"the input"
            )
        self.warn_unsettled(statistics, phase, expected)

    def warn_unsettled(self, statistics: Statistics, phase: str, expected: bool) -> None:
        """Warn, once in each phase, of examples above the tolerance (if settling was ``expected`` at all)."""
        unsettled = ~statistics.converged
        if self.warn and expected and phase not in self._warned and bool(unsettled.any()):
            self._warned.add(phase)
            warnings.warn(
                f"Equilibrium: expected the {phase} phase to settle, got {int(unsettled.sum())} of {unsettled.numel()} "
                f"examples above tolerance after {int(statistics.steps.max())} steps (largest relative residual "
                f"{float(statistics.residual.max()):.1e}); raise max_steps, use Anderson or damping, or a "
                "looser tolerance",
                ConvergenceWarning,
                stacklevel=4,
            )


def _default_estimator(dynamics: Dynamics, solver: Solver) -> Estimator:
    if solver.sampling():
        return Thermal()
    if not isinstance(dynamics, Energy):
        return NonConservative()
    return Predictive() if dynamics.predictive else Centered()


def _with_self_coupling(dynamics: Dynamics, solver: Solver) -> Dynamics:
    strength = solver.self_coupling()
    if strength == 0:
        return dynamics
    if not isinstance(dynamics, Energy) or dynamics.predictive:
        raise ConfigError(
            "Equilibrium: expected an energy with a recurrent torus, got a network without one; use "
            "Fading(mode='memory')"
        )
    # the recurrent torus is this self-coupling, seen through its delay: the solver adds only what vanishes at
    # equilibrium
    nodes = [Node(n, s, dynamics.activation(n)) for n, s in dynamics.shapes.items()]
    couplings = [c for _, c in dynamics.terms()]
    return Energy(nodes, [*couplings, *(SelfCoupling(n, strength) for n in dynamics.names)])


def equilibria(module: nn.Module) -> list[Equilibrium]:
    """All equilibrium layers inside a module, in order."""
    return [m for m in module.modules() if isinstance(m, Equilibrium)]


class _Inject(nn.Module):
    """``block(h + x)``."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return self.block(h + x)


def wrap(
    block: nn.Module,
    shape: int | Sequence[int],
    form: Literal["vector_field", "residual"] = "residual",
    inject: Literal["argument", "add"] = "argument",
    solver: Solver | None = None,
    estimator: Estimator | None = None,
) -> Equilibrium:
    r"""Any ordinary module as an equilibrium layer: :math:`h^* = \mathrm{block}(h^*, x)`.

    Args:
        block: maps ``(B, *shape)`` to ``(B, *shape)``; deterministic, without batch statistics.
        shape: shape of one example's state.
        form: ``"residual"`` builds the prediction-error energy :math:`\tfrac12\|h - \mathrm{block}(h, x)\|^2`,
            learned in one phase by ``Predictive``; ``"vector_field"`` takes the block as a field, learned by
            ``NonConservative``. The equilibrium and its gradient are the same.
        inject: ``"argument"`` calls ``block(h, x)``, ``"add"`` calls ``block(h + x)``.
        solver, estimator: as for :class:`Equilibrium`.

    Raises:
        ConfigError: for an unknown form, a block with batch statistics or dropout.
    """
    if form not in ("residual", "vector_field") or inject not in ("argument", "add"):
        raise ConfigError(
            f"wrap: expected form 'residual' or 'vector_field' and inject 'argument' or 'add', got {form!r}, "
            f"{inject!r}; "
            "choose among these"
        )
    inner = block if inject == "argument" else _Inject(block)
    node = Node("h", shape, Identity())
    dynamics: Dynamics
    if form == "vector_field":
        dynamics = VectorField(node, inner)
    else:
        dynamics = Energy([node], [Residual(inner, "h", source="h")])
    return Equilibrium(dynamics, solver, estimator)


__all__ = ["Equilibrium", "Fading", "Last", "equilibria", "wrap"]
