r"""Causal scans of diagonal linear recurrences, :math:`s_t = a_t s_{t-1} + b_t v_t,\ y_t = \mathrm{Re}(c_t s_{t-1})`.

Complex numbers are kept as pairs of real ones, so that everything stays analytic in complex states. Both chunked forms
are matrix products within chunks and a short recurrence over them, linear in the number of tokens; reversed, the same
functions are their own adjoints. Their two layouts need no permutation of the tokens' features: a projection before the
scan writes, and one after it reads, either layout as it is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sequential(v: Tensor, decay: Tensor, inject: Tensor, read: Tensor) -> Tensor:
    r"""The recurrence itself, token by token: the reference that the chunked forms are held against.

    Args:
        v: ``(B, N, M)``.
        decay, inject, read: a, b, c, complex, each broadcastable to ``(B, N, M, S)``.

    Returns:
        :math:`\sum_S\mathrm{Re}(c_t s_{t-1})`, ``(B, N, M)``: a token reads what those before it have written.
    """
    shape = (*v.shape, decay.shape[-1])
    decay, inject, read = decay.expand(shape), inject.expand(shape), read.expand(shape)
    state = torch.zeros_like(decay[:, 0])
    out = []
    for t in range(v.shape[1]):
        out.append((read[:, t] * state).real.sum(-1))
        state = decay[:, t] * state + inject[:, t] * v[:, t, :, None]
    return torch.stack(out, 1)


def by_fft(v: Tensor, kernel: Tensor, reverse: bool = False) -> Tensor:
    r"""A time-invariant scan as a product of spectra, :math:`y_t = \sum_{j\le t} k_{t-j} v_j`, in O(N log N).

    Args:
        v: ``(M, B, N)``.
        kernel: ``(M, N)``.
        reverse: the adjoint.
    """
    n = v.shape[-1]
    spectrum = torch.fft.rfft(kernel, 2 * n)[:, None]
    return torch.fft.irfft(torch.fft.rfft(v, 2 * n) * (spectrum.conj() if reverse else spectrum), 2 * n)[..., :n]


def toeplitz(v: Tensor, within: Tensor, inject: Tensor, read: Tensor, turn: Tensor, reverse: bool = False) -> Tensor:
    r"""A time-invariant scan in chunks of T tokens.

    .. math:: y_k = K v_k + R\,q_k, \qquad q_{k+1} = a^T q_k + I v_k

    Args:
        v: ``(M, B, N)``, any N.
        within: ``(M, T, T)``, from token j (rows) to token i (columns) of one chunk.
        inject: ``(M, T, 2 S)``, from token j to the state after the chunk; real parts first.
        read: ``(M, 2 S, T)``, from the state before a chunk to its token i.
        turn: :math:`a^T` as ``(2, M, S)``.
        reverse: the adjoint.

    Returns:
        ``(M, B, N)``.
    """
    if reverse:
        within, inject, read = within.mT, read.mT, inject.mT
    channels, batch, n = v.shape
    size = within.shape[1]
    if n <= size:
        return torch.bmm(v, within[:, :n, :n])
    chunks = -(-n // size)
    if n % size:
        v = F.pad(v, (0, chunks * size - n))
    v = v.reshape(channels, batch * chunks, size)
    y, z = torch.bmm(v, within), torch.bmm(v, inject)
    re, im = z.view(channels, batch, chunks, 2, -1).unbind(3)
    re, im = _recur((re, im), (turn[0, :, None, None], turn[1, :, None, None]), 2, reverse)
    entering = torch.cat([re, im], -1).view(channels, batch * chunks, -1)
    return torch.baddbmm(y, entering, read).view(channels, batch, chunks * size)[..., :n]


def factored(v: Tensor, inject: Tensor, read: Tensor, turn: Tensor, reverse: bool = False) -> Tensor:
    r"""A scan whose decays differ from token to token and from example to example, in K chunks of T tokens.

    .. math:: y_t = \mathrm{Re}\,r_t\Bigl(q_k + \sum_{j < t,\ j \in k} i_j v_j\Bigr), \qquad
              q_{k+1} = w_k\Bigl(q_k + \sum_{j \in k} i_j v_j\Bigr)

    with :math:`i_j = b_j/A_j,\ r_t = c_t A_{t-1}`, A the product of the decays from the middle of the chunk on.

    Args:
        v: ``(B, N, M)``, N at most K T.
        inject: ``(B, 2, S, K T, M)``, real and imaginary parts of i.
        read: ``(B, 2, S, K T, M)``, real and negative imaginary parts of r.
        turn: w, ``(B, 2, S, K, M)``; the last one is not used.
        reverse: the adjoint.

    Returns:
        ``(B, N, M)``.
    """
    if reverse:
        inject, read = read, inject
    n, chunks = v.shape[1], turn.shape[3]
    size = inject.shape[3] // chunks
    if n < chunks * size:
        v = F.pad(v, (0, 0, 0, chunks * size - n))
    x = (inject * v[:, None, None]).unflatten(3, (chunks, size))
    # sums over the tokens before each one (after it, when reversed), and over all of them in the last (first) row
    ones = torch.ones(size + 1, size, dtype=x.dtype, device=x.device)
    within = (ones.triu() if reverse else ones.tril(-1)) @ x
    total, within = (within[..., 0, :], within[..., 1:, :]) if reverse else (within[..., -1, :], within[..., :-1, :])
    if chunks > 1:
        within = within + _entering(total, turn, reverse).unsqueeze(4)
    return (read.unflatten(3, (chunks, size)) * within).sum((1, 2)).flatten(1, 2)[:, :n]


def _entering(total: Tensor, turn: Tensor, reverse: bool) -> Tensor:
    """The states that enter the chunks from the chunks' own sums, ``(B, 2, S, K, M)``."""
    re, im = total.unbind(1)
    w = (turn[:, 0], turn[:, 1])
    if reverse:
        return torch.stack(_turned(_recur((re, im), w, 2, reverse), w, reverse), 1)
    return torch.stack(_recur(_turned((re, im), w, reverse), w, 2, reverse), 1)


Pair = tuple[Tensor, Tensor]
"""Real and imaginary parts."""


def _turned(z: Pair, w: Pair, transposed: bool) -> Pair:
    """``w z``, or the transpose of that real 2 x 2 map."""
    sign = -1 if transposed else 1
    return w[0] * z[0] - sign * (w[1] * z[1]), w[0] * z[1] + sign * (w[1] * z[0])


def _recur(z: Pair, w: Pair, dim: int, reverse: bool) -> Pair:
    r""":math:`e_0 = 0,\ e_{k+1} = w_k e_k + z_k` along ``dim``, or reversed
    :math:`e_{k-1} = w_k^\top e_k + z_k` from 0 at the end."""
    count = z[0].shape[dim]
    wr, wi = (t.unbind(dim) if t.shape[dim] == count else t.unbind(dim) * count for t in w)
    zr, zi = z[0].unbind(dim), z[1].unbind(dim)
    sign = -1 if reverse else 1
    re, im = torch.zeros_like(zr[0]), torch.zeros_like(zi[0])
    reals, imaginaries = [re], [im]
    for k in range(count - 1, 0, -1) if reverse else range(count - 1):
        new = torch.addcmul(torch.addcmul(zr[k], wr[k], re), wi[k], im, value=-sign)
        im = torch.addcmul(torch.addcmul(zi[k], wr[k], im), wi[k], re, value=sign)
        re = new
        reals.append(re)
        imaginaries.append(im)
    if reverse:
        reals.reverse()
        imaginaries.reverse()
    return torch.stack(reals, dim), torch.stack(imaginaries, dim)
