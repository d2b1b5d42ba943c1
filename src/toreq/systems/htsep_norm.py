"""Norm control that leaves closed units alone: the bound is held among the units that are open."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from toreq.core import Conv, Dense
from toreq.errors import ConfigError

_DIRECTIONS, _ROUNDS = 8, 2


class OpenNorm(nn.Module):
    r"""Keep an operator's norm among open units below a bound, by clipping singular values.

    .. math:: W \leftarrow W - \sum_i (\sigma_i - c)_+\,u_i v_i^\top, \qquad
              G_{post} A_W G_{pre} = \sum_i \sigma_i u_i v_i^\top

    with G the gates of the units that any example of the batch opens: the nearest weight of that norm, once after each
    step of an optimizer. u and v are zero at closed units, so none of their weights moves. A factor on the whole weight
    (:class:`~toreq.core.norm_control.NormControl`) would move them, by its gradient and with every context that makes
    the norm grow; and scaling a weight instead of clipping it would wear down all but its largest directions. The norm
    of the whole may exceed the bound; each context's own does not. Directions are estimated by subspace iteration,
    eight of them, warm-started; for a convolution the change is to first order.

    Args:
        op: whose weight is held; its initial weight is scaled to the bound.
        bound: c, above 0.
        pre, post: names of the nodes that it joins.

    Raises:
        ConfigError: for a bound that is not above 0.
    """

    basis: Tensor

    def __init__(self, op: Dense | Conv, bound: float, pre: str, post: str) -> None:
        super().__init__()
        if not bound > 0:
            raise ConfigError(f"OpenNorm: expected bound > 0, got {bound}; use for example 0.8")
        self._operator = (op,)  # in a tuple: a coupling owns the operator
        self.bound, self.pre, self.post = bound, pre, post
        count = min(_DIRECTIONS, math.prod(op.in_shape))
        start = torch.randn(count, *op.in_shape, generator=torch.Generator().manual_seed(0))
        self.register_buffer("basis", start.to(op.weight))
        self._seen = -1
        self.renew()

    @torch.no_grad()
    def renew(self) -> None:
        """Scale the weight to the bound with all units open, after it has been written over."""
        weight = self._operator[0].weight
        every = [weight.new_ones(n) for n in weight.shape[:2]]
        sizes, _, _ = self._directions(*every, times=30)
        weight.mul_(self.bound / sizes[0].clamp_min(self.bound))
        self._seen = weight._version

    @torch.no_grad()
    def hold(self, pre: Tensor, post: Tensor) -> None:
        """Clip singular values among open units; nothing where no optimizer has moved the weight since the last time,
        so that graphs of several batches may stand beside each other.

        Args:
            pre, post: gates ``(B, U)`` of the nodes.
        """
        op = self._operator[0]
        if op.weight._version == self._seen:
            return
        for _ in range(_ROUNDS):
            self._clip(post.amax(0), pre.amax(0))
        self._seen = op.weight._version

    def _clip(self, post: Tensor, pre: Tensor) -> None:
        op = self._operator[0]
        sizes, left, right = self._directions(post, pre, times=1)
        excess = (sizes - self.bound).clamp_min(0)
        t = {"weight": op.symmetrised(op.weight)}
        if isinstance(op, Dense):
            op.weight.sub_(op.gradient(excess[:, None] * left, right, t)["weight"])
        else:
            # a kernel acts in many places, and moves several singular values at once: the least change to first order
            slopes = [op.gradient(left[i : i + 1], right[i : i + 1], t)["weight"].flatten() for i in range(len(sizes))]
            steep = torch.stack(slopes) * (excess > 0)[:, None]
            shares = torch.linalg.pinv(steep @ steep.T, rtol=1e-2, hermitian=True) @ excess
            op.weight.sub_((shares @ steep).view_as(op.weight))

    def _directions(self, post: Tensor, pre: Tensor, times: int) -> tuple[Tensor, Tensor, Tensor]:
        """The largest singular values among open units, falling, and their directions on both sides."""
        op = self._operator[0]
        t = {"weight": op.symmetrised(op.weight)}
        above, below = (g.reshape(-1, *[1] * (len(op.in_shape) - 1)) for g in (post, pre))
        v = self.basis * below
        for _ in range(times):
            z = below * op.adjoint(above * op.forward(v, t), t)
            # where fewer units are open than there are directions, some of these are of closed units
            v = below * torch.linalg.qr(z.flatten(1).T)[0].T.reshape(v.shape)
        image = (above * op.forward(v, t)).flatten(1)
        squares, mixing = torch.linalg.eigh(image @ image.T)
        order = squares.argsort(descending=True)
        sizes, mixing = squares[order].clamp_min(0).sqrt(), mixing[:, order].T
        self.basis.copy_(torch.where(below > 0, v, self.basis))
        left = (mixing @ image / sizes.clamp_min(torch.finfo(sizes.dtype).tiny)[:, None]).reshape(-1, *op.out_shape)
        return sizes, left, (mixing @ v.flatten(1)).reshape(v.shape)


__all__ = ["OpenNorm"]
