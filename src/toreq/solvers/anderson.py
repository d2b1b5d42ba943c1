"""Anderson acceleration over the ring of past iterates."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from toreq.core.state import State
from toreq.solvers.base import Solver, require
from toreq.solvers.problem import Problem


@dataclass
class _History:
    eliminated: frozenset[str]  # nodes recomputed from the others
    moved: frozenset[str]  # the others, which the accelerated map moves
    last: frozenset[str]  # nodes kept in channels-last order
    gram: Tensor  # (B, R, R) inner products of the residuals, float64; a slot that may not be used has a row of zeros
    best: Tensor  # (B,) smallest squared residual norm so far
    y: list[Tensor]  # (B, n) where a damped step from each past iterate leads
    g: list[Tensor]  # (B, n) the residuals of these iterates
    valid: Tensor | None = None  # (B, R) slots that may be used, once some example has restarted
    head: int = 0


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
        wide = torch.complex128 if flat.is_complex() else torch.float64
        gram = torch.zeros(flat.shape[0], self.length, self.length, dtype=wide, device=flat.device)
        best = torch.full((flat.shape[0],), torch.inf, dtype=flat.abs().dtype, device=flat.device)
        return _History(first, moved, last, gram, best, [], [])

    def select(self, carry: _History, index: Tensor) -> _History:
        return replace(
            carry,
            gram=carry.gram[index],
            best=carry.best[index],
            valid=None if carry.valid is None else carry.valid[index],
            y=[t.index_select(0, index) for t in carry.y],
            g=[t.index_select(0, index) for t in carry.g],
        )

    def step(self, problem: Problem, a: State, h: State, carry: _History) -> tuple[State, State, State]:
        field, swept = self._sweep(problem, a, h, carry)
        before = {n: t for n, t in a.items() if n in carry.moved}
        x, f = _flatten(before, carry.last), _flatten({n: field[n] for n in before}, carry.last)
        g = f - x
        y = f if self.damping == 1 else torch.lerp(x, f, self.damping)
        new = _unflatten(self._extrapolated(g, y, carry), before, carry.last)
        # of the eliminated nodes nothing is left: they are recomputed from the others
        residual = _unflatten(g, before, carry.last)
        h = {**swept, **problem.activate(new)}
        return {n: new[n] if n in new else field[n] for n in a}, {n: h[n] for n in a}, residual

    @staticmethod
    def _sweep(problem: Problem, a: State, h: State, carry: _History) -> tuple[State, State]:
        if not carry.eliminated:
            return problem.field(h), {}
        first = problem.field(h, carry.eliminated)
        swept = problem.activate(first)
        return {**first, **problem.field({**h, **swept}, carry.moved)}, swept

    def _extrapolated(self, g: Tensor, y: Tensor, carry: _History) -> Tensor:
        i = carry.head
        carry.head = (i + 1) % self.length
        if len(carry.g) < self.length:
            carry.g.append(g)
            carry.y.append(y)
        else:
            carry.g[i], carry.y[i] = g, y
        k = len(carry.g)
        conjugate = g.conj()
        # elementwise, since a batched matrix-vector product is several times slower on a CPU
        row = torch.stack([(past * conjugate).sum(1) for past in carry.g], 1)
        self._restart(row, i, carry)
        carry.gram[:, i, :k], carry.gram[:, :k, i] = row, row.conj()
        if k == 1:
            return y
        c = self._coefficients(carry.gram[:, :k, :k], carry.valid).to(g.dtype)
        new = c[:, :1] * carry.y[0]
        for r in range(1, k):
            new.addcmul_(c[:, r : r + 1], carry.y[r])
        return new

    def _restart(self, row: Tensor, i: int, carry: _History) -> None:
        """Forget the history of examples whose residual has grown; the slots stay, but count no more."""
        size = row[:, i].real
        grown = size > self.safeguard**2 * carry.best
        if not bool(grown.any()):
            carry.best = torch.minimum(carry.best, size)
            if carry.valid is None:
                return
            carry.valid[:, i] = True
        else:
            carry.best = torch.where(grown, size, torch.minimum(carry.best, size))
            valid = carry.gram.new_zeros(carry.gram.shape[:2], dtype=torch.bool) if carry.valid is None else carry.valid
            if carry.valid is None:
                valid[:, : row.shape[1]] = True
            carry.valid = valid & ~grown[:, None]
            carry.valid[:, i] = True
            carry.gram *= carry.valid[:, :, None] & carry.valid[:, None, :]
        row *= carry.valid[:, : row.shape[1]]

    def _coefficients(self, gram: Tensor, valid: Tensor | None) -> Tensor:
        k = gram.shape[1]
        if k == 2 and valid is None:
            # the same in closed form: many small batched solves would cost as much as a small network's field
            first, cross, second = gram[:, 0, 0], gram[:, 0, 1], gram[:, 1, 1]
            ridge = (self.ridge + 1e-14) * (first + second).real.clamp_min(torch.finfo(torch.float64).tiny)
            a, b = second + ridge - cross, first + ridge - cross.conj()
            return torch.stack([a, b], 1) / (a + b)[:, None]
        trace = gram.diagonal(dim1=1, dim2=2).real.sum(1).clamp_min(torch.finfo(torch.float64).tiny)
        # normalised, so that the ridge is relative
        gram = gram / trace[:, None, None]
        gram.diagonal(dim1=1, dim2=2).add_(self.ridge + 1e-14)
        ones = gram.new_ones(gram.shape[0], k, 1)
        if valid is not None:  # a slot that may not be used gets a unit row and no weight
            gram.diagonal(dim1=1, dim2=2).add_(~valid[:, :k])
            ones = ones * valid[:, :k, None]
        # solve_ex: an overflowed example must not raise for the whole batch
        c = torch.linalg.solve_ex(gram, ones)[0][:, :, 0]
        return c / c.sum(1, keepdim=True)


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
