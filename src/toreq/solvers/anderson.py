"""Anderson acceleration over the ring of past iterates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from toreq.core.state import State
from toreq.solvers.base import Problem, Solver, require


@dataclass
class _History:
    x: Tensor  # (B, R, n) past iterates
    g: Tensor  # (B, R, n) their residuals
    gram: Tensor  # (B, R, R) inner products of the residuals
    valid: Tensor  # (B, R) slots that may be used
    best: Tensor  # (B,) smallest residual norm so far
    head: int = 0


@dataclass(frozen=True, kw_only=True)
class Anderson(Solver):
    r"""Anderson acceleration (Anderson 1965, Walker and Ni 2011), per example, over a ring of R past iterates.

    .. math:: a \leftarrow \sum_r c_r\,(a_r + \gamma g_r), \quad c = \arg\min_{\sum c = 1}
              \Big\|\sum_r c_r g_r\Big\|^2 + \lambda\,\mathrm{tr}(G)\|c\|^2, \quad g = \mathrm{field} - a

    Safeguarded: an example whose residual exceeds ``safeguard`` times its best so far forgets its history and takes one
    damped step. Only the newest row of the Gram matrix is computed each step; the R x R systems are solved in float64.

    Args:
        length: R, at least 2.
        damping: mixing :math:`\gamma` in (0, 1].
        ridge: :math:`\lambda \ge 0`, relative to the trace of the Gram matrix.
        safeguard: growth of the residual at which an example restarts, above 1.
    """

    length: int = 5
    damping: float = 1.0
    ridge: float = 1e-8
    safeguard: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require("Anderson", "length", self.length, self.length >= 2, "an integer >= 2", "try 5")
        require("Anderson", "damping", self.damping, 0 < self.damping <= 1, "in (0, 1]", "try 1")
        require("Anderson", "ridge", self.ridge, self.ridge >= 0, ">= 0", "try 1e-8")
        require("Anderson", "safeguard", self.safeguard, self.safeguard > 1, "> 1", "try 4")

    def begin(self, problem: Problem, a: State, h: State) -> _History:
        flat = _flatten(a)
        size, n = flat.shape
        real = flat.abs().dtype
        return _History(
            flat.new_zeros(size, self.length, n),
            flat.new_zeros(size, self.length, n),
            flat.new_zeros(size, self.length, self.length),
            torch.zeros(size, self.length, dtype=torch.bool, device=flat.device),
            torch.full((size,), torch.inf, dtype=real, device=flat.device),
        )

    def step(self, problem: Problem, a: State, h: State, carry: _History) -> tuple[State, State, State]:
        field = problem.field(h)
        x = _flatten(a)
        g = _flatten({n: field[n] for n in a}) - x
        c = self._coefficients(g, x, carry)
        new = torch.einsum("br,brn->bn", c, carry.x)
        new = new + self.damping * torch.einsum("br,brn->bn", c, carry.g)
        a = _unflatten(new, a)
        return a, problem.activate(a), field

    def _coefficients(self, g: Tensor, x: Tensor, carry: _History) -> Tensor:
        size = torch.linalg.vector_norm(g, dim=1)
        grown = size > self.safeguard * carry.best
        carry.best = torch.where(grown, size, torch.minimum(carry.best, size))
        i = carry.head
        carry.valid = carry.valid & ~grown[:, None]
        carry.valid[:, i] = True
        carry.x[:, i], carry.g[:, i] = x, g
        row = torch.einsum("brn,bn->br", carry.g, g.conj())
        carry.gram[:, i, :], carry.gram[:, :, i] = row.conj(), row
        carry.head = (i + 1) % self.length
        mask = carry.valid
        both = mask[:, :, None] & mask[:, None, :]
        wide = torch.complex128 if g.is_complex() else torch.float64
        gram = torch.where(both, carry.gram, torch.zeros_like(carry.gram)).to(wide)
        trace = gram.diagonal(dim1=1, dim2=2).real.sum(1).clamp_min(torch.finfo(torch.float64).tiny)
        # normalised, so that the ridge is relative; unused slots get a unit row and no weight
        gram = gram / trace[:, None, None] + torch.diag_embed((self.ridge + (~mask).double()).to(wide))
        gram = gram + 1e-14 * torch.eye(self.length, dtype=wide, device=g.device)
        # solve_ex: an overflowed example must not raise for the whole batch
        c = torch.linalg.solve_ex(gram, mask.to(wide)[:, :, None])[0][:, :, 0]
        c = torch.where(mask, c, torch.zeros_like(c))
        return (c / c.sum(1, keepdim=True)).to(g.dtype)


def _flatten(a: State) -> Tensor:
    parts = [t.flatten(1) for t in a.values()]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _unflatten(flat: Tensor, like: State) -> State:
    sizes = [t[0].numel() for t in like.values()]
    parts = flat.split(sizes, 1)
    return {n: p.reshape(t.shape) for (n, t), p in zip(like.items(), parts, strict=True)}
