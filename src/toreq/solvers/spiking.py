"""Settling by spikes: units that fire, and rates that converge to the equilibrium of hard sigmoids."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Literal

import torch
from torch import Tensor

from toreq.core.energy import Dynamics, Energy
from toreq.core.nodes import HardSigmoid
from toreq.core.state import State, per_example
from toreq.errors import ConfigError
from toreq.memory.ring import Ring
from toreq.solvers.base import Solver, require
from toreq.solvers.loop import Loop
from toreq.solvers.noise import Noise
from toreq.solvers.problem import Compilable, Measure, Problem, Relaxation, Roundable, relative
from toreq.solvers.solution import Solution, Step

CLAMP = 3.0
"""How far beyond 0 and 1 a membrane may go. A clamp at 0 would rectify what the spikes of the others make its input
waver, and so raise the rates of silent units."""
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class SpikingSolution(Solution):
    """A solution with the spikes that led to it.

    Args:
        spikes: how often each unit has fired, per node ``(B, *shape)``; over all steps that the example took.
    """

    spikes: State = field(default_factory=dict)


@dataclass
class _Carry:
    generator: torch.Generator
    x: State  # membranes, or the running fields of the stochastic schemes
    gains: dict[str, float]  # slopes of the hard sigmoids
    spikes: State  # sums over the run
    fields: State
    rings: dict[str, tuple[Ring, Ring]] | None = None  # the last spikes and fields, with a window
    done: int = 0  # steps


@dataclass(frozen=True, kw_only=True)
class Spiking(Solver):
    r"""Units that fire, of which only the spikes cross the couplings; for hard-sigmoid nodes and linear couplings.

    Each step evaluates the field :math:`f(s)` of the spikes :math:`s`. With the averages over the run

    .. math:: \bar s_t = \frac1t\sum_{k \le t} s_k, \qquad \bar f_t = \frac1t\sum_{k \le t} f(s_k) = f(\bar s_t)

    (the last since the couplings are linear), ``Solution.h`` is the rate :math:`\bar s`, ``Solution.state`` the mean
    input :math:`\bar f`, and what is left to settle is :math:`\sigma(\bar f) - \bar s`, the residual that is reported:
    where it vanishes the state is the equilibrium.

    * ``"sigma_delta"``: integrate and fire, :math:`s = [u \ge 1]`, then
      :math:`u \leftarrow \mathrm{clip}(u - s + g f(s), -c, 1 + c)`, c = 3. Membranes are bounded, so that rates and
      mean inputs differ by O(1/t): in a contraction the error falls like 1/t. Deterministic, unless thresholds are
      noisy: the membranes start spread over :math:`[0, 1)`, so that units of equal input do not fire together.
    * ``"bernoulli"``: :math:`s \sim \mathrm{Bernoulli}(\sigma(x))` with
      :math:`x \leftarrow x + t^{-p}(f(s) - x)`, stochastic approximation (Robbins and Monro 1951) with averaging
      (Polyak and Juditsky 1992): the error falls like :math:`1/\sqrt t`.
    * ``"poisson"``: the same with counts :math:`s \sim \mathrm{Poisson}(\sigma(x))`; a count of k is k spikes in one
      step, and the rate of a saturated unit wavers like that of any other.

    Args:
        max_steps: steps of the run, one field evaluation each.
        tolerance: relative residual at which an example has settled; 0 runs all steps.
        scheme: ``"sigma_delta"``, ``"bernoulli"`` or ``"poisson"``.
        threshold_noise: standard deviation in [0, 0.5] of the thresholds of ``"sigma_delta"``, drawn anew for each
            unit and step; what is subtracted at a spike stays 1, so that the rates keep their limit. The other schemes
            are noisy already.
        power: p in (1/2, 1), by which the gain of the stochastic schemes falls.
        window: average over the last R steps only, from a ring, to follow an input that changes; the error then stays
            at that of R steps. None averages over the run. Needs a tolerance of 0.
        copies: equal parts of the batch that get the same noise.
        nudged_copies: the same for nudged phases; 2 with estimators that stack +beta on -beta.
        precision: not ``"mixed"``: averages cannot be taken up where a coarse run has left them.
        seed: of the noise; a layer's runs go on with the stream from batch to batch.
        noise: the stream itself. Copies made by ``dataclasses.replace`` share it unless given another seed.

    Raises:
        ConfigError: for a value out of range; at the start of a run for a network that has other activations, couplings
            that are not linear, or no energy.
    """

    max_steps: int = 1000
    tolerance: float = 1e-2
    scheme: Literal["sigma_delta", "bernoulli", "poisson"] = "sigma_delta"
    threshold_noise: float = 0.0
    power: float = 0.7
    window: int | None = None
    copies: int = 1
    nudged_copies: int = 1
    seed: int = 0
    noise: Noise | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise is None or self.noise.seed != self.seed:
            object.__setattr__(self, "noise", Noise.of(self.seed))

        def check(name: str, ok: bool, expected: str, remedy: str) -> None:
            require("Spiking", name, getattr(self, name), ok, expected, remedy)

        kinds = ("sigma_delta", "bernoulli", "poisson")
        check("scheme", self.scheme in kinds, f"one of {kinds}", "choose one")
        check("threshold_noise", 0 <= self.threshold_noise <= 0.5, "in [0, 0.5]", "try 0.1")
        quiet = self.scheme == "sigma_delta" or self.threshold_noise == 0
        check("threshold_noise", quiet, f"0 with scheme={self.scheme!r}", "its spikes are drawn at random already")
        check("power", 0.5 < self.power < 1, "in (0.5, 1)", "try 0.7")
        check("window", self.window is None or self.window >= 1, "None or an integer >= 1", "try 100")
        whole = self.window is None or self.tolerance == 0
        check("tolerance", whole, "0 with a window", "the error of a window stays: run a fixed number of steps")
        check("copies", self.copies >= 1, "an integer >= 1", "1 gives every example its own noise")
        check("nudged_copies", self.nudged_copies >= 1, "an integer >= 1", "2 with Centered")
        check("precision", self.precision != "mixed", "'full' or 'rounded'", "averages have no coarse start")

    def nudged(self) -> Solver:
        return self if self.copies == self.nudged_copies else replace(self, copies=self.nudged_copies)

    def refusal(self, dynamics: Dynamics) -> str:
        """Why its spikes would not average to the equilibrium of a network; empty where they do."""
        if not isinstance(dynamics, Energy):
            return f"{type(dynamics).__name__} has no couplings that are known to be linear; use FixedPoint"
        curved = [type(c).__name__ for _, c in dynamics.terms() if not c.linear]
        if curved:
            return (
                f"the mean field of spikes is the field of their mean for linear couplings only, and "
                f"{', '.join(sorted(set(curved)))} is not linear; use FixedPoint"
            )
        for n in dynamics.names:
            if not isinstance(dynamics.activation(n), HardSigmoid):
                return (
                    f"the rates of spiking units are hard sigmoids of their input, in [0, 1], and node {n!r} has "
                    f"{type(dynamics.activation(n)).__name__}; use HardSigmoid, or FixedPoint"
                )
        return ""

    def solve(
        self,
        problem: Problem,
        a: State,
        measure: Measure = relative,
        callback: Callable[[Step], None] | None = None,
        record: bool | str = False,
        h: State | None = None,
    ) -> SpikingSolution:
        if self.compile and isinstance(problem, Compilable):
            problem = problem.compiled()
        if self.precision == "rounded" and isinstance(problem, Roundable):
            problem = problem.rounded() or problem
        loop = Loop(self, problem, a, measure, h)
        found = loop.run(callback, record)
        carry: _Carry = loop.carry
        spikes = carry.spikes
        if self.window is None:  # also of examples that have settled before the others
            spikes = {n: (t * per_example(found.steps, t)).round() for n, t in found.h.items()}
        return SpikingSolution(**{f.name: getattr(found, f.name) for f in fields(Solution)}, spikes=spikes)

    def begin(self, problem: Problem, a: State, h: State) -> _Carry:
        network = _relaxation(problem).dynamics
        reason = self.refusal(network)
        if reason:
            raise ConfigError(f"Spiking: expected a network whose rates settle; {reason}")
        first = next(iter(a.values()))
        if first.shape[0] % self.copies:
            raise ConfigError(
                f"Spiking: expected a batch of {self.copies} equal parts (copies), got {first.shape[0]} examples; "
                "stack as many copies"
            )
        assert self.noise is not None
        gains = {n: _gain(network, n) for n in a}
        start = (
            {n: t + start_of_membranes(t, k) for k, (n, t) in enumerate(h.items())}
            if self.scheme == "sigma_delta"
            else a
        )
        zeros = {n: torch.zeros_like(t) for n, t in a.items()}
        rings = None
        if self.window is not None:
            rings = {n: (Ring(t, self.window), Ring(t, self.window)) for n, t in zeros.items()}
        return _Carry(self.noise.chain(first.device), dict(start), gains, zeros, dict(zeros), rings)

    def step(self, problem: Problem, a: State, h: State, carry: _Carry) -> tuple[State, State, State]:
        carry.done += 1
        spikes = self._spikes(problem, carry)
        f = problem.field(spikes)
        if any(t.requires_grad for t in f.values()):
            raise ConfigError(
                "Spiking: expected no graph through the run, got one; spikes have no derivative: contrast equilibria "
                "(Centered) or settle with FixedPoint"
            )
        for n, t in f.items():
            x = carry.x[n]
            if self.scheme == "sigma_delta":
                x = torch.add(x - spikes[n], t, alpha=carry.gains[n]).clamp_(-CLAMP, 1 + CLAMP)
            else:
                x = torch.lerp(x, t, carry.done**-self.power)
            carry.x[n] = x
            carry.spikes[n] = carry.spikes[n] + spikes[n]
            carry.fields[n] = carry.fields[n] + t
        rate, mean = self._averages(spikes, f, carry)
        sigma = problem.activate(mean)
        return mean, rate, {n: t - rate[n] for n, t in sigma.items()}

    def _spikes(self, problem: Problem, carry: _Carry) -> State:
        if self.scheme == "sigma_delta":
            return {n: (u >= self._threshold(u, carry)).to(u.dtype) for n, u in carry.x.items()}
        rates = problem.activate(carry.x)
        return {n: self._drawn(p, carry.generator) for n, p in rates.items()}

    def _threshold(self, u: Tensor, carry: _Carry) -> Tensor | float:
        if self.threshold_noise == 0:
            return 1.0
        shape = (u.shape[0] // self.copies, *u.shape[1:])
        xi = torch.randn(shape, generator=carry.generator, dtype=u.dtype, device=u.device)
        return 1 + self.threshold_noise * self._copied(xi)

    def _drawn(self, p: Tensor, generator: torch.Generator) -> Tensor:
        part = p.shape[0] // self.copies
        if self.scheme == "bernoulli":
            xi = torch.rand((part, *p.shape[1:]), generator=generator, dtype=p.dtype, device=p.device)
            return (self._copied(xi) < p).to(p.dtype)
        if self.copies == 1:
            return torch.poisson(p, generator=generator)
        # by inversion, so that one number drawn gives every copy its own count at its own rate
        xi = self._copied(torch.rand((part, *p.shape[1:]), generator=generator, dtype=p.dtype, device=p.device))
        return _poisson_quantile(xi, p)

    def _copied(self, t: Tensor) -> Tensor:
        return t if self.copies == 1 else torch.cat([t] * self.copies)

    def _averages(self, spikes: State, f: State, carry: _Carry) -> tuple[State, State]:
        if carry.rings is None:
            rate = {n: t / carry.done for n, t in carry.spikes.items()}
            return rate, {n: t / carry.done for n, t in carry.fields.items()}
        assert self.window is not None
        held = min(carry.done, self.window)
        for n, (own, received) in carry.rings.items():
            own.push(spikes[n])
            received.push(f[n])
        rate = {n: ring.fading_sum / held for n, (ring, _) in carry.rings.items()}
        return rate, {n: ring.fading_sum / held for n, (_, ring) in carry.rings.items()}


def _relaxation(problem: Problem) -> Relaxation:
    inner = problem
    while not isinstance(inner, Relaxation):
        below = getattr(inner, "problem", None)  # of one that counts what is asked for
        if below is None:
            raise ConfigError(
                f"Spiking: expected a Relaxation of an energy, got {type(problem).__name__}; settle it with FixedPoint"
            )
        inner = below
    return inner


def _gain(network: Dynamics, name: str) -> float:
    sigma = network.activation(name)
    assert isinstance(sigma, HardSigmoid)
    return sigma.gain


def start_of_membranes(like: Tensor, offset: int) -> Tensor:
    """Numbers in [0, 1), one for each unit and alike for all examples, spread by multiples of the golden ratio."""
    count = math.prod(like.shape[1:])
    index = torch.arange(count, dtype=torch.float64) * GOLDEN + 0.5 + offset * GOLDEN**2
    return index.remainder(1).to(like).reshape(1, *like.shape[1:])


def _poisson_quantile(xi: Tensor, rate: Tensor) -> Tensor:
    """The smallest count whose cumulative probability is at least ``xi``, for rates in [0, 1]."""
    term = (-rate).exp()
    total, count = term, torch.zeros_like(rate)
    # at rate 1 a count above 20 has a probability below 1e-19
    for k in range(1, 21):
        above = xi > total
        count = count + above
        term = term * rate / k
        total = total + term
    return count
