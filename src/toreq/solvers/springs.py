r"""Springs between levels, solved on all levels at once.

With the other couplings' field z held, the pre-activations of a chain of levels joined by springs solve
:math:`a + S\,\sigma(a) = z`, S the springs' curvature. A fine unit has one parent, so that with :math:`\sigma` replaced
by a line through its present value this is a linear system on a tree: eliminated from the finest level to the coarsest
and substituted back, at the price of a few elementwise operations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from toreq.core.operators import Operator
from toreq.core.state import State, norm, per_example
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
        out = {n: self.own[n] * h[n] if n in self.own else torch.zeros_like(h[n]) for n in self.nodes}
        for i, (up, strength) in enumerate(zip(self.ups, self.strengths, strict=True)):
            fine, coarse = self.nodes[i], self.nodes[i + 1]
            pull = strength * (h[fine] - up(h[coarse]))
            out[fine], out[coarse] = out[fine] + pull, out[coarse] - up.adjoint(pull)
        return out

    def diagonal(self) -> State:
        """The part of S that is a number per node."""
        out = {n: self.own.get(n, torch.zeros(())) for n in self.nodes}
        for i, (up, strength) in enumerate(zip(self.ups, self.strengths, strict=True)):
            fine, coarse = self.nodes[i], self.nodes[i + 1]
            assert up.gram is not None
            out[fine], out[coarse] = out[fine] + strength, out[coarse] + up.gram[0] * strength
        return out

    def eliminated(self, z: State, lines: dict[str, tuple[Tensor, Tensor]]) -> State:
        """The solution of :math:`a + S (w a + o) = z` with ``lines[node] = (w, o)``."""
        own = self.diagonal()
        offset = self.stretched({n: o.expand_as(z[n]) for n, (_, o) in lines.items()})
        right, diagonal = {}, {}
        for i, n in enumerate(self.nodes):
            w = lines[n][0]
            right[n], diagonal[n] = z[n] - offset[n], 1 + own[n] * w
            if i:
                below, up, strength = self.nodes[i - 1], self.ups[i - 1], self.strengths[i - 1]
                share = strength * lines[below][0] / diagonal[below]
                right[n] = right[n] + up.adjoint(share * right[below])
                diagonal[n] = diagonal[n] - strength * _summed(up, share, right[below]) * w
        a: State = {}
        for i in range(len(self.nodes) - 1, -1, -1):
            n = self.nodes[i]
            if i + 1 < len(self.nodes):
                above = self.nodes[i + 1]
                right[n] = right[n] + self.strengths[i] * self.ups[i](lines[above][0] * a[above])
            a[n] = right[n] / diagonal[n]
        return a


def _summed(up: Operator, share: Tensor, like: Tensor) -> Tensor:
    # one number a token is summed over its window like any other unit
    return up.adjoint(share if share.shape == like.shape else share.expand_as(like))


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


def settle_chain(problem: Joint, chain: Chain, a: State, h: State, z: State, rounds: int = 3) -> State:
    r"""Solves :math:`a + S\sigma(a) = z` on a chain, from the present state, to a twentieth of its residual.

    Every round replaces the activations by lines and solves on all levels at once. Where that was a bad guess, so that
    an example's residual is above a quarter of what it was, the example takes the better of two states: the guess or
    the present state, each solved once more level by level (exactly, the neighbours held). Solving level by level
    lowers a convex function and so cannot diverge.

    Args:
        problem: gives activations, their lines, and the solutions level by level.
        chain: the levels.
        a, h: where to begin; the nodes of the chain.
        z: right side.
        rounds: most rounds, at least 1.
    """
    size = _residual(chain, z, a, h)
    goal = GOAL * size
    active = size > goal
    for _ in range(rounds):
        if not bool(active.any()):
            break
        guess = chain.eliminated(z, problem.lines(a, h))
        new = (guess, problem.activate(guess))
        left = _residual(chain, z, *new)
        good = left <= ACCEPTED * size
        if not bool((good | ~active).all()):
            joint, plain = _swept(problem, chain, z, *new), _swept(problem, chain, z, a, h)
            ends = _residual(chain, z, *joint), _residual(chain, z, *plain)
            other = _chosen(ends[0] < ends[1], joint, plain)
            new = _chosen(good, new, other)
            left = torch.where(good, left, torch.where(ends[0] < ends[1], *ends))
        a, h = _chosen(active, new, (a, h))
        size = torch.where(active, left, size)
        active = active & (size > goal)
    return a


def _chosen(which: Tensor, first: tuple[State, State], second: tuple[State, State]) -> tuple[State, State]:
    a, h = (
        {n: torch.where(per_example(which, t), t, y[n]) for n, t in x.items()}
        for x, y in zip(first, second, strict=True)
    )
    return a, h


def _swept(problem: Layered, chain: Chain, z: State, a: State, h: State) -> tuple[State, State]:
    """Every level solved exactly with its neighbours held, from coarse to fine."""
    a, h, own = dict(a), dict(h), chain.diagonal()
    for i in range(len(chain.nodes) - 1, -1, -1):
        n = chain.nodes[i]
        right = z[n]
        if i:
            right = right + chain.strengths[i - 1] * chain.ups[i - 1].adjoint(h[chain.nodes[i - 1]])
        if i + 1 < len(chain.nodes):
            right = right + chain.strengths[i] * chain.ups[i](h[chain.nodes[i + 1]])
        a.update(problem.resolved({n: right}, {n: own[n]}))
        h.update(problem.activate({n: a[n]}))
    return a, h


def _residual(chain: Chain, z: State, a: State, h: State) -> Tensor:
    pull = chain.stretched(h)
    return norm({n: z[n] - t - pull[n] for n, t in a.items()})
