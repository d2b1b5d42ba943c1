"""Anderson acceleration over the ring of past iterates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from toreq.core.state import State
from toreq.solvers.base import Problem, Solver, require


@dataclass
class _History:
    eliminated: frozenset[str]  # nodes recomputed from the others
    moved: frozenset[str]  # the others, which the accelerated map moves
    last: frozenset[str]  # nodes kept in channels-last order
    y: Tensor  # (B, R, n) where a damped step from each past iterate leads
    g: Tensor  # (B, R, n) the residuals of these iterates
    gram: Tensor  # (B, R, R) inner products of the residuals
    valid: Tensor  # (B, R) slots that may be used
    best: Tensor  # (B,) smallest residual norm so far
    head: int = 0
    used: int = 0  # slots written so far; the others hold no numbers yet


@dataclass(frozen=True, kw_only=True)
class Anderson(Solver):
    r"""Anderson acceleration (Anderson 1965, Walker and Ni 2011), per example, over a ring of R past iterates.

    .. math:: a \leftarrow \sum_r c_r\,(a_r + \gamma g_r), \quad c = \arg\min_{\sum c = 1}
              \Big\|\sum_r c_r g_r\Big\|^2 + \lambda\,\mathrm{tr}(G)\|c\|^2, \quad g = \mathrm{field} - a

    With ``order="gauss_seidel"`` (default) nodes that can be recomputed exactly from all others (one of the two
    colours of a layered network) are eliminated: the accelerated map is a block sweep seen from the other nodes, and
    its radius is squared. Where there are none it is the Jacobi map.

    Safeguarded: an example whose residual exceeds ``safeguard`` times its best so far forgets its history and takes one
    damped step. Only the newest row of the Gram matrix is computed each step; the R x R systems are solved in float64.

    Args:
        length: R, at least 2.
        order: ``"gauss_seidel"`` or ``"jacobi"``.
        damping: mixing :math:`\gamma` in (0, 1].
        ridge: :math:`\lambda \ge 0`, relative to the trace of the Gram matrix.
        safeguard: growth of the residual at which an example restarts, above 1.
    """

    length: int = 5
    order: Literal["jacobi", "gauss_seidel"] = "gauss_seidel"
    damping: float = 1.0
    ridge: float = 1e-8
    safeguard: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require("Anderson", "length", self.length, self.length >= 2, "an integer >= 2", "try 5")
        orders = ("jacobi", "gauss_seidel")
        require("Anderson", "order", self.order, self.order in orders, f"one of {orders}", "choose one")
        require("Anderson", "damping", self.damping, 0 < self.damping <= 1, "in (0, 1]", "try 1")
        require("Anderson", "ridge", self.ridge, self.ridge >= 0, ">= 0", "try 1e-8")
        require("Anderson", "safeguard", self.safeguard, self.safeguard > 1, "> 1", "try 4")

    def extrapolates(self) -> bool:
        return True

    def checked(self, carry: _History, old: tuple[State, State], new: tuple[State, State]) -> tuple[State, State]:
        # the eliminated nodes have been recomputed from the old state of the others: their own residual is zero
        a, h = (
            {n: x if n in carry.moved else swept[n] for n, x in o.items()} for o, swept in zip(old, new, strict=True)
        )
        return a, h

    def begin(self, problem: Problem, a: State, h: State) -> _History:
        first = problem.eliminable() if self.order == "gauss_seidel" else frozenset()
        moved = frozenset(a) - first
        last = frozenset(n for n, t in a.items() if _channels_last(t))
        flat = _flatten({n: t for n, t in a.items() if n in moved}, last)
        size, n = flat.shape
        real = flat.abs().dtype
        return _History(
            first,
            moved,
            last,
            flat.new_empty(size, self.length, n),
            flat.new_empty(size, self.length, n),
            flat.new_zeros(size, self.length, self.length),
            torch.zeros(size, self.length, dtype=torch.bool, device=flat.device),
            torch.full((size,), torch.inf, dtype=real, device=flat.device),
        )

    def step(self, problem: Problem, a: State, h: State, carry: _History) -> tuple[State, State, State]:
        field, swept = self._sweep(problem, a, h, carry)
        before = {n: t for n, t in a.items() if n in carry.moved}
        x, f = _flatten(before, carry.last), _flatten({n: field[n] for n in before}, carry.last)
        y = f if self.damping == 1 else torch.lerp(x, f, self.damping)
        c = self._coefficients(f - x, y, carry)
        new = _unflatten(torch.bmm(c[:, None, :], carry.y[:, : carry.used])[:, 0], before, carry.last)
        h = {**swept, **problem.activate(new)}
        return {n: new.get(n, field[n]) for n in a}, {n: h[n] for n in a}, field

    @staticmethod
    def _sweep(problem: Problem, a: State, h: State, carry: _History) -> tuple[State, State]:
        if not carry.eliminated:
            return problem.field(h), {}
        first = problem.field(h, carry.eliminated)
        swept = problem.activate(first)
        return {**first, **problem.field({**h, **swept}, carry.moved)}, swept

    def _coefficients(self, g: Tensor, y: Tensor, carry: _History) -> Tensor:
        size = torch.linalg.vector_norm(g, dim=1)
        grown = size > self.safeguard * carry.best
        carry.best = torch.where(grown, size, torch.minimum(carry.best, size))
        i = carry.head
        carry.head, carry.used = (i + 1) % self.length, min(carry.used + 1, self.length)
        k = carry.used
        carry.valid = carry.valid & ~grown[:, None]
        carry.valid[:, i] = True
        carry.y[:, i], carry.g[:, i] = y, g
        row = torch.bmm(carry.g[:, :k], g.conj()[:, :, None])[:, :, 0]
        carry.gram[:, i, :k], carry.gram[:, :k, i] = row, row.conj()
        mask = carry.valid[:, :k]
        if k == 1:
            return mask.to(g.dtype)
        wide = torch.complex128 if g.is_complex() else torch.float64
        gram = carry.gram[:, :k, :k].to(wide) * (mask[:, :, None] & mask[:, None, :])
        trace = gram.diagonal(dim1=1, dim2=2).real.sum(1).clamp_min(torch.finfo(torch.float64).tiny)
        # normalised, so that the ridge is relative; unused slots get a unit row and no weight
        gram = gram / trace[:, None, None]
        gram.diagonal(dim1=1, dim2=2).add_(self.ridge + 1e-14 + (~mask).double())
        # solve_ex: an overflowed example must not raise for the whole batch
        c = torch.linalg.solve_ex(gram, mask.to(wide)[:, :, None])[0][:, :, 0] * mask
        return (c / c.sum(1, keepdim=True)).to(g.dtype)


def _channels_last(t: Tensor) -> bool:
    return t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


def _flatten(a: State, last: frozenset[str]) -> Tensor:
    """All nodes as one vector per example; the nodes in ``last`` in channels-last order, which for them is a view."""
    parts = [(t.permute(0, 2, 3, 1) if n in last else t).flatten(1) for n, t in a.items()]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _unflatten(flat: Tensor, like: State, last: frozenset[str]) -> State:
    out: State = {}
    for (n, t), p in zip(like.items(), flat.split([math.prod(t.shape[1:]) for t in like.values()], 1), strict=True):
        if n in last:
            b, c, height, width = t.shape
            out[n] = p.reshape(b, height, width, c).permute(0, 3, 1, 2)
        else:
            out[n] = p.reshape(t.shape)
    return out
