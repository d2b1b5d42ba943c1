"""Settling under noise: chains that sample the stationary law of an energy at a temperature."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from toreq.core.energy import Dynamics
from toreq.core.nodes import Identity
from toreq.core.state import State, added, chosen, difference, sum_squares
from toreq.errors import ConfigError
from toreq.solvers.anderson import Anderson
from toreq.solvers.base import Solver, _joined, _shifted, require
from toreq.solvers.curvature import check_step
from toreq.solvers.law import Judged, judged, summed, unsampled
from toreq.solvers.loop import Loop
from toreq.solvers.noise import Noise
from toreq.solvers.problem import Measure, Problem, Relaxation, relative
from toreq.solvers.solution import Solution, Step


@dataclass
class _Carry:
    generator: torch.Generator
    done: int = 0  # steps
    halves: tuple[State, State] = ({}, {})  # sums of the activations over the first and the second half of the samples
    judged: Judged | None = None  # the present state of an adjusted chain
    accepted: Tensor | None = None  # its proposals accepted since the burn-in


@dataclass(frozen=True, kw_only=True)
class Langevin(Solver):
    r"""Langevin dynamics of the law :math:`p(h) \propto \exp(-E(h)/\tau)` (Roberts and Tweedie 1996), per example.

    .. math:: a \leftarrow a - \eta\,\nabla U(a) + \sqrt{2\eta\tau}\,\xi, \quad
              U(a) = E(a) - \tau\log\det\sigma'(a), \quad
              \nabla U = \sigma'(a)\,(a - f) - \tau\,\nabla\log\det\sigma'(a)

    It moves pre-activations, in which the law has the density :math:`e^{-U/\tau}`: without the determinant the flat
    tails of a saturating activation would hold infinite mass. The nodes have to be tanh, or the identity where the
    energy grows in every direction. Under noise that is drawn anew at each step there is no fixed point to settle to,
    but a stationary law: ``Solution.h`` is the mean of the activations over the last ``samples`` samples, which is what
    a read-out should see; ``Solution.state`` the last sample; ``residual`` the relative distance of the means of the
    samples' two halves, which falls like :math:`1/\sqrt{\mathrm{samples}}`; all ``burn_in + samples * thin`` steps are
    run. The error of a finite step in the law is of first order in :math:`\eta`; on a quadratic energy of curvature
    :math:`\Lambda` the covariance is :math:`\tau[\Lambda(1 - \eta\Lambda/2)]^{-1}` for
    :math:`\tau\Lambda^{-1}`. ``adjusted`` removes it. With ``preconditioned`` each node has the step :math:`\eta/g`, g
    being its activation's slope at 0: the law is the same, and a node beside steeper ones moves as fast as they do.

    With ``noisy`` these nodes u alone have a law, that of the energy which the others w leave at their equilibrium,
    :math:`p(u) \propto \exp(-\min_w E(u, w)/\tau)`. By the envelope theorem its gradient is that of E in u at this
    equilibrium, so that contrasts need nothing else; the others follow by one step :math:`w \leftarrow \sigma(f)` for
    each step of u, which costs an error of first order in :math:`\eta` and has to contract.

    ``mode="annealed"`` takes noise as a search: ``burn_in`` noisy steps under the schedule, then none, and the
    deterministic solver ``finish`` settles to ``tolerance``; nudged phases are settled by that solver alone. Where the
    relaxation contracts there is one equilibrium, and this is a slow way to it.

    Args:
        max_steps: most field evaluations of chain and finish together; a longer chain is refused.
        tolerance: of the finish, above 0. For a sample 0, or the residual up to which an example counts as converged.
        precision: ``"mixed"`` only with ``mode="annealed"``, for the finish.
        temperature: :math:`\tau > 0`, in units of the energy.
        step_size: :math:`\eta > 0`, below :meth:`limit`; a larger one is refused at the start of a chain.
        preconditioned: steps in units of each node's slope.
        noisy: nodes that are sampled while the others settle; all are when None. Not with ``adjusted``.
        burn_in: steps before the first sample, at least 0.
        samples: samples averaged over, at least 2.
        thin: steps from one sample to the next, at least 1.
        schedule: how the temperature gets from ``start_temperature`` to ``temperature`` over the burn-in:
            ``"constant"`` (it is there from the start), ``"linear"`` or ``"geometric"``.
        start_temperature: above 0; only with a schedule that moves.
        mode: ``"sample"`` or ``"annealed"``.
        adjusted: accept or reject each step by Metropolis and Hastings' rule: the law is exact at any stable step.
        finish: how an annealed state settles; its tolerance, precision and step limit are those given here.
            :class:`~toreq.solvers.Anderson` when None.
        copies: equal parts of the batch that get the same noise, e.g. 2 nudged phases.
        seed: of the noise; a layer's chains go on with the stream from batch to batch.
        noise: the stream itself. Copies made by ``dataclasses.replace`` share it unless given another seed; those made
            by ``copy.deepcopy`` or pickle go on with an equal one of their own.

    Raises:
        ConfigError: for a value out of range; at the start of a chain for a step above the limit, which it names, or a
            network that cannot be sampled.
        DivergenceError: at the start of a chain, where a quadratic energy falls in some direction.
    """

    max_steps: int = 10_000
    tolerance: float = 0.0
    temperature: float = 0.1
    step_size: float = 0.1
    preconditioned: bool = False
    noisy: tuple[str, ...] | None = None
    burn_in: int = 100
    samples: int = 100
    thin: int = 1
    schedule: Literal["constant", "linear", "geometric"] = "constant"
    start_temperature: float | None = None
    mode: Literal["sample", "annealed"] = "sample"
    adjusted: bool = False
    finish: Solver | None = None
    copies: int = 1
    seed: int = 0
    noise: Noise | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise is None or self.noise.seed != self.seed:
            object.__setattr__(self, "noise", Noise.of(self.seed))

        def check(name: str, ok: bool, expected: str, remedy: str) -> None:
            require("Langevin", name, getattr(self, name), ok, expected, remedy)

        check("temperature", 0 < self.temperature < math.inf, "> 0", "without noise use FixedPoint or Anderson")
        check("step_size", 0 < self.step_size < math.inf, "> 0", "try 0.1")
        least = 1 if self.mode == "annealed" else 0
        check("burn_in", self.burn_in >= least, f"an integer >= {least}", "try 100")
        check("samples", self.samples >= 2, "an integer >= 2", "try 100")
        check("thin", self.thin >= 1, "an integer >= 1", "1 takes every step")
        ok = self.noisy is None or (len(self.noisy) > 0 and not self.adjusted)
        check("noisy", ok, "None or names of nodes, without adjusted=True", "leave it None to sample every node")
        check("copies", self.copies >= 1, "an integer >= 1", "1 gives every example its own noise")
        for name, kinds in (("schedule", ("constant", "linear", "geometric")), ("mode", ("sample", "annealed"))):
            check(name, getattr(self, name) in kinds, f"one of {kinds}", "choose one")
        first = self.start_temperature
        if self.schedule == "constant":
            check("start_temperature", first is None, "None with schedule='constant'", "choose 'linear' or 'geometric'")
        else:
            ok = first is not None and 0 < first < math.inf
            check("start_temperature", ok, f"> 0 with schedule={self.schedule!r}", "say where it starts")
            check("burn_in", self.burn_in >= 1, f">= 1 with schedule={self.schedule!r}", "the schedule runs over it")
        self._check_mode(check)

    def _check_mode(self, check: Callable[[str, bool, str, str], None]) -> None:
        if self.mode == "sample":
            check("finish", self.finish is None, "None with mode='sample'", "leave it out, or use mode='annealed'")
            check("precision", self.precision != "mixed", "'full' or 'rounded' with mode='sample'", "a law has no end")
            check("max_steps", self.steps <= self.max_steps, f">= burn_in + samples * thin = {self.steps}", "raise it")
            return
        check("tolerance", self.tolerance > 0, "> 0 with mode='annealed'", "the finish settles to it: try 3e-4")
        check("max_steps", self.burn_in < self.max_steps, f"> burn_in = {self.burn_in}", "leave the finish some steps")
        own = self.finish
        ok = own is None or (isinstance(own, Solver) and not own.sampling() and own.self_coupling() == 0)
        check("finish", ok, "a solver that settles and adds no self-coupling", "use Anderson() or FixedPoint()")

    @property
    def steps(self) -> int:
        """Steps of a chain: those before the last sample."""
        return self.burn_in if self.mode == "annealed" else self.burn_in + self.samples * self.thin

    def sampling(self) -> bool:
        return self.mode == "sample"

    def nudged(self) -> Solver:
        return self if self.sampling() else self._finish()

    def refusal(self, dynamics: Dynamics) -> str:
        return unsampled(dynamics, self.noisy)

    def _finish(self) -> Solver:
        base = self.finish
        if base is None:
            base = Anderson(check_every=self.check_every, compaction=self.compaction, compile=self.compile)
        left = self.max_steps - self.burn_in
        return replace(base, tolerance=self.tolerance, precision=self.precision, max_steps=left)

    def temperature_at(self, t: int) -> float:
        """The temperature of step ``t``, counted from 1."""
        if self.schedule == "constant" or t >= self.burn_in:
            return self.temperature
        assert self.start_temperature is not None
        share = (t - 1) / (self.burn_in - 1)
        if self.schedule == "linear":
            return self.start_temperature + share * (self.temperature - self.start_temperature)
        return self.start_temperature ** (1 - share) * self.temperature**share

    def limit(self, problem: Problem, a: State) -> float:
        r"""The stable limit of the step, :math:`2/\lambda_{\max}` of the Hessian of U (preconditioned, if so asked).

        Of the Hessians at ``a`` and at a = 0, where tanh is steepest, at the highest temperature of the schedule, on
        the first examples of the batch.

        Raises:
            DivergenceError: where a quadratic energy falls in some direction.
        """
        with torch.no_grad():
            return check_step(self._sampled(problem), a, self._hottest(), None, self.preconditioned, self.noisy)

    def _hottest(self) -> float:
        return max(self.temperature, self.start_temperature or 0.0)

    def solve(
        self,
        problem: Problem,
        a: State,
        measure: Measure = relative,
        callback: Callable[[Step], None] | None = None,
        record: bool | str = False,
        h: State | None = None,
    ) -> Solution:
        with torch.no_grad():
            chained = self._prepared(problem, a)
            run = _Chain(owner=self, max_steps=self.steps, tolerance=0.0)
            loop = Loop(run, chained, a, measure, h)
            solution = loop.run(callback, record)
        if self.mode == "sample":
            return self._averaged(solution, loop.carry)
        shifted = None if callback is None else _shifted(callback, self.burn_in)
        last = self._finish().solve(problem, solution.state, measure, shifted, record, solution.h)
        return replace(last, steps=last.steps + self.burn_in, trace=_joined(solution.trace, last.trace))

    def sample(
        self, problem: Problem, a: State, h: State | None = None, stable: bool = False
    ) -> Iterator[tuple[State, State]]:
        """One chain: its samples' pre-activations and activations, as they are drawn.

        Args:
            problem: an energy bound to an input, perhaps with constant forces.
            a: start, each node ``(B, ...)``.
            h: activations of the start, if they are known.
            stable: the step is known to be below the limit, as after another chain of this energy.
        """
        with torch.no_grad():
            chained = self._sampled(problem) if stable else self._prepared(problem, a)
            h = chained.activate(a) if h is None else h
            return self._samples(chained, a, h, self.begin(chained, a, h))

    def _samples(self, problem: Problem, a: State, h: State, carry: _Carry) -> Iterator[tuple[State, State]]:
        for t in range(1, self.burn_in + self.samples * self.thin + 1):
            with torch.no_grad():
                a, h, _ = self.step(problem, a, h, carry)
            if self._is_sample(t):
                yield a, h

    def _is_sample(self, t: int) -> bool:
        return t > self.burn_in and (t - self.burn_in) % self.thin == 0

    def _sampled(self, problem: Problem) -> Relaxation:
        """The problem as the chain needs it: with the field of an energy, in the precision and form asked for."""
        if not isinstance(problem, Relaxation):
            raise ConfigError(
                f"Langevin: expected a Relaxation of an energy, got {type(problem).__name__}; settle it with FixedPoint"
            )
        reason = unsampled(problem.dynamics, self.noisy)
        if reason:
            raise ConfigError(f"Langevin: expected a network it can sample; {reason}")
        if self.adjusted and (problem.origin is not None or problem.extra is not None):
            raise ConfigError(
                "Langevin: expected constant forces with adjusted=True, got one that moves; the energies of proposals "
                "do not know it: use adjusted=False"
            )
        if problem.as_map and getattr(problem.dynamics, "predictive", False):
            # the map of a prediction-error energy shares the zero of its gradient, but is no gradient
            own = (problem.force, problem.extra, False, problem.origin)
            problem = Relaxation(problem.dynamics, problem.bindings, *own)
        if self.compile:
            problem = problem.compiled()
        return (problem.rounded() or problem) if self.precision == "rounded" else problem

    def _prepared(self, problem: Problem, a: State) -> Relaxation:
        chained = self._sampled(problem)
        check_step(chained, a, self._hottest(), self.step_size, self.preconditioned, self.noisy)
        return chained

    def begin(self, problem: Problem, a: State, h: State) -> _Carry:
        first = next(iter(a.values()))
        if first.shape[0] % self.copies:
            raise ConfigError(
                f"Langevin: expected a batch of {self.copies} equal parts (copies), got {first.shape[0]} examples; "
                "stack as many copies"
            )
        assert self.noise is not None
        carry = _Carry(self.noise.chain(first.device))
        if self.adjusted:
            assert isinstance(problem, Relaxation)
            carry.judged = judged(problem, a, h)
        return carry

    def step(self, problem: Problem, a: State, h: State, carry: _Carry) -> tuple[State, State, State]:
        assert isinstance(problem, Relaxation)
        carry.done += 1
        tau = self.temperature_at(carry.done)
        f = problem.field(h) if carry.judged is None else carry.judged.field
        residual = difference(f, a)
        new = self._moved(problem, a, h, residual, tau)
        noise = {n: self._normal(t, carry.generator) for n, t in a.items() if self._sampled_node(n)}
        for n, t in new.items():
            if self._sampled_node(n):
                t.add_(noise[n], alpha=math.sqrt(2 * self._eta(problem, n) * tau))
        new_h = problem.activate(new)
        if self.adjusted:
            new, new_h = self._chosen(problem, (a, h), (new, new_h), noise, tau, carry)
        if self._is_sample(carry.done):
            k = (carry.done - self.burn_in) // self.thin - 1
            carry.halves = summed(carry.halves, int(k >= self.samples // 2), new_h)
        return new, new_h, residual

    def _moved(self, problem: Relaxation, a: State, h: State, residual: State, tau: float) -> State:
        r""":math:`a - \eta\,\nabla U(a)`."""
        own = problem.dynamics
        out: State = {}
        for n, t in a.items():
            if not self._sampled_node(n):
                out[n] = t + residual[n]
                continue
            sigma, eta = own.activation(n), self._eta(problem, n)
            pull = sigma.derivative(t, h[n], residual[n], problem.bindings[f"node_{n}"])
            out[n] = torch.add(t, pull, alpha=eta)
            if not isinstance(sigma, Identity):  # whose slope is constant
                out[n].add_(sigma.log_slope_gradient(t, h[n]), alpha=eta * tau)
        return out

    def _sampled_node(self, n: str) -> bool:
        return self.noisy is None or n in self.noisy

    def _eta(self, problem: Relaxation, n: str) -> float:
        """The step of one node."""
        return self.step_size / (problem.dynamics.activation(n).gain if self.preconditioned else 1.0)

    def _normal(self, like: Tensor, generator: torch.Generator) -> Tensor:
        shape = (like.shape[0] // self.copies, *like.shape[1:])
        drawn = torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
        return drawn if self.copies == 1 else torch.cat([drawn] * self.copies)

    def _chosen(
        self, problem: Relaxation, old: tuple[State, State], new: tuple[State, State], noise: State, tau: float,
        carry: _Carry,
    ) -> tuple[State, State]:  # fmt: skip
        """The proposal where it is accepted, else the old state, example by example."""
        now, then = carry.judged, judged(problem, *new)
        assert now is not None
        back = difference(old[0], self._moved(problem, *new, difference(then.field, new[0]), tau))
        log_ratio = (now.energy - then.energy) / tau - now.slope + then.slope
        back = {n: t / math.sqrt(4 * self._eta(problem, n) * tau) for n, t in back.items()}
        log_ratio = log_ratio + 0.5 * sum_squares(noise) - sum_squares(back)
        size, like = log_ratio.shape[0] // self.copies, log_ratio
        drawn = torch.rand(size, generator=carry.generator, dtype=like.dtype, device=like.device)
        # an overflowed proposal has a ratio that is not a number, and is not taken
        taken = drawn.repeat(self.copies).log() < log_ratio
        if carry.done > self.burn_in:
            carry.accepted = taken.long() if carry.accepted is None else carry.accepted + taken
        energy, slope = torch.where(taken, then.energy, now.energy), torch.where(taken, then.slope, now.slope)
        carry.judged = Judged(chosen(taken, then.field, now.field), energy, slope)
        return chosen(taken, new[0], old[0]), chosen(taken, new[1], old[1])

    def _averaged(self, last: Solution, carry: _Carry) -> Solution:
        first = self.samples // 2
        one, two = carry.halves
        mean = {n: t / self.samples for n, t in added(one, two).items()}
        apart = {n: t / first - two[n] / (self.samples - first) for n, t in one.items()}
        residual = relative(apart, mean)
        if carry.accepted is not None:
            # a chain that stood still has sampled nothing, however well its halves agree
            residual = torch.where(carry.accepted > 0, residual, residual.clamp_min(1.0))
        converged = residual <= self.tolerance if self.tolerance > 0 else torch.isfinite(residual)
        return replace(last, h=mean, residual=residual, converged=converged)


@dataclass(frozen=True, kw_only=True)
class _Chain(Solver):
    """The chain of a :class:`Langevin` for the loop: all steps, no check on the way."""

    owner: Langevin

    def begin(self, problem: Problem, a: State, h: State) -> Any:
        return self.owner.begin(problem, a, h)

    def step(self, problem: Problem, a: State, h: State, carry: Any) -> tuple[State, State, State]:
        return self.owner.step(problem, a, h, carry)
