"""The best linear filter: what a denoising network of DiffTorEqProp knows of its data before it learns."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from toreq.errors import ConfigError
from toreq.systems.difftoreqprop_parts import DEVIATION, Seen, among

LEVELS = 64
"""Between which a noise level that is not known is looked for."""
EXAMPLES = 10_000
"""Of the training inputs, evenly spaced, from which moments are taken."""


def shrunk(variances: Tensor, count: int) -> Tensor:
    r"""Eigenvalues of a covariance taken from ``count`` examples, drawn towards their mean as far as the oracle
    approximating shrinkage (Chen et al. 2010) says; all of them, ``(n,)``."""
    n = len(variances)
    total, squares = variances.sum(), variances.square().sum()
    below = (count + 1 - 2 / n) * (squares - total.square() / n)
    above = (1 - 2 / n) * squares + total.square()
    share = torch.where(below > 0, above / below.clamp_min(torch.finfo(below.dtype).tiny), torch.ones_like(below))
    share = share.clamp(0, 1)
    return (1 - share) * variances + share * variances.mean()


class LinearFilter(nn.Module):
    r"""The posterior mean of data with a Gaussian law of the same mean and covariance (Wiener's filter),

    .. math:: W_s(x) = V\,\mathrm{diag}\Big(\frac{\lambda}{\lambda + s^2}\Big)V^\top (x - \mu)

    for x = data + noise of deviation s; :math:`r_s^2 = \langle\lambda s^2/(\lambda + s^2)\rangle` is the mean square
    per pixel that it leaves. What a network has to learn is the rest. Before :meth:`observe` the mean is 0 and all
    variances are those of deviation 0.3, with which W is the best scalar filter.

    Args:
        shape: of one input.
        span: smallest and largest deviation of the noise.
        components: principal directions that are kept; all others have one variance.
    """

    mean: Tensor
    basis: Tensor
    variances: Tensor
    rest: Tensor

    def __init__(self, shape: tuple[int, ...], span: tuple[float, float], components: int = 512) -> None:
        super().__init__()
        size = torch.Size(shape).numel()
        self.shape, self.span, self.kept = shape, span, min(components, size)
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("basis", torch.zeros(size, self.kept))
        self.register_buffer("variances", torch.full((self.kept,), DEVIATION**2))
        self.register_buffer("rest", torch.tensor(DEVIATION**2))

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Take mean and covariance from inputs ``(B, *shape)``, at least two of them.

        Raises:
            ConfigError: for another shape, fewer inputs, or inputs that are all the same.
        """
        where = "LinearFilter.observe"
        if tuple(x.shape[1:]) != self.shape or len(x) < 2 or not x.is_floating_point():
            raise ConfigError(
                f"{where}: expected floating-point inputs (B, {', '.join(map(str, self.shape))}) with B >= 2, got "
                f"{x.dtype} {tuple(x.shape)}; give it training inputs"
            )
        flat = x[:: max(1, len(x) // EXAMPLES)].flatten(1).to(torch.float64)
        mean = flat.mean(0)
        variances, basis = torch.linalg.eigh(torch.cov(flat.T).reshape(len(mean), len(mean)))
        if not float(variances.sum()) > 0:
            raise ConfigError(f"{where}: expected inputs that differ, got a variance of 0; check the data")
        variances = shrunk(variances.clamp_min(0), len(flat)).flip(0)
        kept = self.kept
        self.mean.copy_(mean)
        self.basis.copy_(basis.flip(1)[:, :kept])
        self.variances.copy_(variances[:kept])
        # a single variance for all that is left, and the last one kept where nothing is
        self.rest.copy_(variances[kept:].mean() if kept < len(mean) else variances[-1])

    def gains(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """Share of each kept direction ``(B, K)`` and of all others ``(B, 1)`` that passes."""
        noise = level.to(self.variances.dtype).square()[:, None]
        return self.variances / (self.variances + noise), self.rest / (self.rest + noise)

    def left(self, level: Tensor) -> Tensor:
        """Mean square per pixel that the filter leaves at noise of deviation ``level`` ``(B,)``: ``(B,)``."""
        kept, others = self.gains(level)
        total = kept.sum(1) + (len(self.mean) - self.kept) * others[:, 0]
        return level.to(total.dtype).square() * total / len(self.mean)

    def level(self, x: Tensor) -> Tensor:
        r"""The noise level of inputs ``(B, *shape)`` that is most likely under the Gaussian law, ``(B,)``,

        .. math:: s = \arg\min_s \sum_k \log(\lambda_k + s^2) + \frac{(V^\top(x - \mu))_k^2}{\lambda_k + s^2} ,

        within the span, from a parabola through the best of 64 levels and its neighbours.
        """
        low, high = (math.log(s) for s in self.span)
        log = torch.linspace(low, high, LEVELS, dtype=self.mean.dtype, device=self.mean.device)
        flat = (x - self.centre()).flatten(1)
        parts = flat @ self.basis
        others = len(self.mean) - self.kept
        variances = self.variances[:, None] + (2 * log).exp()
        cost = variances.log().sum(0) + parts.square() @ variances.reciprocal()
        if others:
            rest = self.rest + (2 * log).exp()
            beside = (flat.square().sum(1) - parts.square().sum(1)).clamp_min(0)
            cost = cost + others * rest.log() + beside[:, None] / rest
        best = cost.argmin(1).clamp(1, LEVELS - 2)
        before, at, after = (cost.gather(1, (best + i)[:, None])[:, 0] for i in (-1, 0, 1))
        bend = (before - 2 * at + after).clamp_min(torch.finfo(cost.dtype).tiny)
        shift = (0.5 * (before - after) / bend).clamp(-1, 1)
        return (log[best] + shift * (log[1] - log[0])).exp().to(x.dtype)

    def centre(self) -> Tensor:
        """The data's mean, of the shape of an input."""
        return self.mean.view(self.shape)

    def drawn(self, count: int, generator: torch.Generator) -> Tensor:
        """Inputs of the Gaussian law, ``(count, *shape)``."""
        like = self.mean
        a, b = (
            torch.randn(count, k, generator=generator, dtype=like.dtype).to(like.device) for k in (self.kept, len(like))
        )
        # noise in all directions, taken out of the kept ones, which have their own
        b = b - (b @ self.basis) @ self.basis.T
        out = like + (a * self.variances.sqrt()) @ self.basis.T + self.rest.sqrt() * b
        return out.view(count, *self.shape)

    def forward(self, given: Tensor | Seen) -> Seen:
        """What a network sees, about the data's mean, with the filtered input beside it.

        Where the level is not known it is estimated.
        """
        seen = Seen.of(given)
        if seen.filtered is not None:
            return seen
        level = self.level(seen.x) if seen.level is None else seen.level
        x = seen.x - self.centre()
        kept, others = self.gains(level)
        flat = x.flatten(1)
        passed = others * flat + ((flat @ self.basis) * (kept - others)) @ self.basis.T
        return replace(seen, x=x, level=level, filtered=passed.view_as(x))

    def restored(self, seen: Seen, v: Tensor) -> Tensor:
        r"""The denoised input, :math:`\mu + W_s(x) + (r_s/0.3)\,v`.

        Args:
            seen: from :meth:`forward`.
            v: what the network says, of the shape of its input.
        """
        assert seen.level is not None
        assert seen.filtered is not None
        scale = self.left(seen.level).sqrt() / DEVIATION
        return self.centre() + seen.filtered + among(scale.to(v.dtype), v) * v

    def extra_repr(self) -> str:
        """Shape and kept directions."""
        return f"shape={self.shape}, components={self.kept}"
