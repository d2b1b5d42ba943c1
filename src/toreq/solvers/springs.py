r"""Springs between levels, solved on all levels at once.

With the other couplings' field held, the pre-activations of a chain of levels joined by springs solve
:math:`a + S\,\sigma(a) = z`, S the springs' curvature. A fine unit has one parent, so that with :math:`\sigma` replaced
by a line through its present value this is a linear system on a tree: eliminated from the finest level to the coarsest
and substituted back, at the price of a few elementwise operations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from toreq.core.operators import Operator
from toreq.core.state import State, chosen_pair, norm
from toreq.solvers.problem import Joint, Layered

GOAL, ACCEPTED = 0.05, 0.25
"""Shares of the residual at which a chain is settled well enough for one step, and at which a guess is taken."""


@dataclass(frozen=True)
class Chain:
    """Nodes joined by springs, the finest first.

    Args:
        nodes: their names.
        ups: operators that replicate each node after the first onto the one before.
        strengths: of the springs between neighbours.
        own: further strengths of pulls of each node on itself, by node; may miss some.
    """

    nodes: tuple[str, ...]
    ups: tuple[Operator, ...]
    strengths: tuple[Tensor, ...]
    own: State

    def stretched(self, h: State) -> State:
        """:math:`S h`."""
        out = {n: s * h[n] for n, s in self.own.items()}
        for i, (up, strength) in enumerate(zip(self.ups, self.strengths, strict=True)):
            fine, coarse = self.nodes[i], self.nodes[i + 1]
            pull = strength * (h[fine] - up(h[coarse]))
            out[coarse] = out[coarse] - up.adjoint(pull) if coarse in out else -up.adjoint(pull)
            out[fine] = pull + out[fine] if fine in out else pull
        return out

    def diagonal(self) -> State:
        """The part of S that is a number per node."""
        out = {n: self.own.get(n, torch.zeros(())) for n in self.nodes}
        for i, (up, strength) in enumerate(zip(self.ups, self.strengths, strict=True)):
            fine, coarse = self.nodes[i], self.nodes[i + 1]
            assert up.gram is not None
            out[fine], out[coarse] = out[fine] + strength, out[coarse] + up.gram[0] * strength
        return out

    def eliminated(self, r: State, slopes: State) -> State:
        r"""The solution d of :math:`d + S W d = r`, W the slopes; one of these has the shape of its node, or a last
        axis of 1."""
        own = self.diagonal()
        right, diagonal = dict(r), {}
        for i, n in enumerate(self.nodes):
            w = slopes[n]
            diagonal[n] = 1 + own[n] * w
            if i:
                below, up, strength = self.nodes[i - 1], self.ups[i - 1], self.strengths[i - 1]
                share = strength * (slopes[below] / diagonal[below])
                right[n] = right[n] + up.adjoint(share * right[below])
                diagonal[n] = diagonal[n] - strength * up.adjoint(share.expand_as(right[below])) * w
        d: State = {}
        for i in range(len(self.nodes) - 1, -1, -1):
            n = self.nodes[i]
            if i + 1 < len(self.nodes):
                above = self.nodes[i + 1]
                right[n] = right[n] + self.ups[i](self.strengths[i] * slopes[above] * d[above])
            d[n] = right[n] / diagonal[n]
        return d


def chains(problem: Joint) -> list[Chain]:
    """The chains of a problem: every node with at most one finer and one coarser neighbour."""
    links: dict[str, tuple[str, Operator, Tensor]] = {}
    taken: set[str] = set()
    for fine, coarse, up, strength in problem.joints():
        if fine not in links and coarse not in taken:
            links[fine] = (coarse, up, strength)
            taken.add(coarse)
    out = []
    stiffness = problem.stiffness()
    for n in links:
        if n in taken:
            continue
        nodes, ups, strengths = [n], [], []
        while nodes[-1] in links:
            coarse, up, strength = links[nodes[-1]]
            nodes.append(coarse)
            ups.append(up)
            strengths.append(strength)
        chain = Chain(tuple(nodes), tuple(ups), tuple(strengths), {})
        inside = chain.diagonal()
        rest = {m: stiffness[m] - inside[m] for m in nodes}
        out.append(Chain(chain.nodes, chain.ups, chain.strengths, {m: s for m, s in rest.items() if bool(s.real > 0)}))
    return out


def settle_chain(
    problem: Joint, chain: Chain, a: State, h: State, field: State, rounds: int = 3
) -> tuple[State, State]:
    r"""Solves :math:`a' + S\sigma(a') = f + S h` on a chain, to a twentieth of the residual f - a it begins with.

    Every round replaces the activations by lines and solves on all levels at once. Where that was a bad guess, so that
    an example's residual is above a quarter of what it was, the example takes the better of two states: the guess or
    the present state, each solved once more level by level (exactly, the neighbours held). Solving level by level
    lowers a convex function and so cannot diverge.

    Args:
        problem: gives activations, their slopes, and the solutions level by level.
        chain: the levels.
        a, h: present state; the nodes of the chain.
        field: f at h.
        rounds: most rounds, at least 1.

    Returns:
        a' and its activations.
    """
    # what changes is what is multiplied, so that a small response keeps its digits
    rest = {n: f - a[n] for n, f in field.items()}
    start, size = h, norm(rest)
    goal, active = GOAL * size, size > 0
    for _ in range(rounds):
        if not bool(active.any()):
            break
        step = chain.eliminated(rest, problem.slopes(a, h))
        guess = {n: t + step[n] for n, t in a.items()}
        new = (guess, problem.activate(guess))
        remaining = _rest(chain, field, start, *new)
        left = norm(remaining)
        good = left <= ACCEPTED * size
        if not bool((good | ~active).all()):
            joint, plain = (_swept(problem, chain, field, start, *s) for s in (new, (a, h)))
            ends = [norm(_rest(chain, field, start, *s)) for s in (joint, plain)]
            new = chosen_pair(good, new, chosen_pair(ends[0] < ends[1], joint, plain))
            left = torch.where(good, left, torch.where(ends[0] < ends[1], *ends))
            remaining = _rest(chain, field, start, *new)
        a, h = new if bool(active.all()) else chosen_pair(active, new, (a, h))
        rest, size = remaining, torch.where(active, left, size)
        active = active & (size > goal)
    return a, h


def _swept(problem: Layered, chain: Chain, field: State, start: State, a: State, h: State) -> tuple[State, State]:
    """Every level solved exactly with its neighbours held, from coarse to fine."""
    a, h, own, pull = dict(a), dict(h), chain.diagonal(), chain.stretched(start)
    for i in range(len(chain.nodes) - 1, -1, -1):
        n = chain.nodes[i]
        right = field[n] + pull[n]
        if i:
            right = right + chain.strengths[i - 1] * chain.ups[i - 1].adjoint(h[chain.nodes[i - 1]])
        if i + 1 < len(chain.nodes):
            right = right + chain.strengths[i] * chain.ups[i](h[chain.nodes[i + 1]])
        a.update(problem.resolved({n: right}, {n: own[n]}))
        h.update(problem.activate({n: a[n]}))
    return a, h


def _rest(chain: Chain, field: State, start: State, a: State, h: State) -> State:
    pull = chain.stretched({n: t - start[n] for n, t in h.items()})
    return {n: f - a[n] - pull[n] for n, f in field.items()}
