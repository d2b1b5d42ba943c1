"""What a torus of contexts knows about the inputs of each context: a Gaussian law in a random projection."""

from __future__ import annotations

import torch
from torch import Tensor, nn

DIMS = 128
"""Numbers that a law is of; inputs of more are projected."""
FLOOR = 0.01
"""Added to every variance: a direction that has never varied is not proof of another context."""
STALE = 0.05
"""Share of a law that may have changed before its covariance is factored anew."""
SLOWEST = 1e-3
"""Smallest rate at which a law follows."""


class GaussianLaws(nn.Module):
    r"""A Gaussian law for each slot, of inputs seen through a fixed orthonormal map z = P x to at most 128 numbers.

    .. math:: \ell_k(x) = -\frac1{2d}\left[(z - \mu_k)^\top\Sigma_k^{-1}(z - \mu_k) + \log\det\Sigma_k\right], \qquad
              \Sigma_k = \frac{n_k C_k + d\,B_k}{n_k + d} + v_0 I,

    with mean and covariance C of the n inputs seen, and a belief B that counts as much as d inputs: all directions
    alike, or the covariance of a law in use, whichever makes a law's first batch likelier. Without the latter a new law
    would lose its own second batch to an older one that knows how such inputs vary. The whole covariance tells apart
    what means and variances do not, such as pairs of digits.

    Args:
        features: numbers in an input.
        slots: number of laws.
        seed: of the projection.
    """

    count: Tensor
    mean: Tensor
    covariance: Tensor
    whitening: Tensor
    logdet: Tensor
    stale: Tensor
    projection: Tensor | None

    def __init__(self, features: int, slots: int, seed: int = 0) -> None:
        super().__init__()
        self.features, self.dims = features, min(features, DIMS)
        self.register_buffer("count", torch.zeros(slots))
        self.register_buffer("mean", torch.zeros(slots, self.dims))
        for name in ("covariance", "whitening"):
            self.register_buffer(name, torch.zeros(slots, self.dims, self.dims))
        for name in ("logdet", "stale"):
            self.register_buffer(name, torch.zeros(slots))
        made = None
        if features > self.dims:
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.randn(features, self.dims, generator=generator, dtype=torch.float64)
            made = torch.linalg.qr(drawn)[0].to(self.mean.dtype)
        # drawn from the seed alone, so that no checkpoint needs it
        self.register_buffer("projection", made, persistent=False)

    @property
    def used(self) -> Tensor:
        """Slots that hold a law, int64 ``(K,)``."""
        return (self.count > 0).nonzero().flatten()

    def likelihood(self, x: Tensor) -> Tensor:
        """The log likelihood of inputs by dimension, without its constant, under the laws in use: ``(B, K)``."""
        used = self.used
        apart = self._seen(x) - self.mean[used][:, None]
        white = apart @ self.whitening[used].mT
        return -0.5 * (white.square().sum(2) + self.logdet[used][:, None]).T / self.dims

    def start(self, slot: int, x: Tensor) -> None:
        """Begin a law with a batch; of the two beliefs about its covariance, all directions alike or as under the law
        in use that the batch is likeliest under, the one that makes the batch likelier."""
        z, used = self._seen(x), self.used
        own, eye = _covariance(z), torch.eye(self.dims).to(self.mean)
        beliefs = [own.trace() / self.dims * eye]
        if len(used):
            beliefs.append(self.covariance[used[self.likelihood(x).mean(0).argmax()]])
        self.count[slot] = n = z.shape[0]
        self.mean[slot] = z.mean(0)
        found = []
        for belief in beliefs:
            self.covariance[slot] = (n * own + self.dims * belief) / (n + self.dims)
            self._factor(slot)
            place = int((self.used == slot).nonzero())
            found.append((float(self.likelihood(x)[:, place].mean()), self.covariance[slot].clone()))
        self.covariance[slot] = max(found, key=lambda pair: pair[0])[1]
        self._factor(slot)

    def follow(self, slot: int, x: Tensor) -> float:
        """Take a batch into a law: the mean over all that was seen, or, in the end, over the last thousand batches.
        Returns the batch's share."""
        z = self._seen(x)
        self.count[slot] += z.shape[0]
        n = float(self.count[slot])
        rate, share = max(z.shape[0] / n, SLOWEST), max(z.shape[0] / (n + self.dims), SLOWEST)
        apart = z.mean(0) - self.mean[slot]
        both = _covariance(z) + (1 - rate) * torch.outer(apart, apart)
        self.covariance[slot] += share * (both - self.covariance[slot])
        self.mean[slot] += rate * apart
        self.stale[slot] += share
        if float(self.stale[slot]) >= STALE:
            self._factor(slot)
        return rate

    def take(self, other: GaussianLaws) -> None:
        """The laws of another's slots, which are the first of these."""
        for name, held in other.named_buffers():
            if name != "projection":
                self.get_buffer(name)[: len(held)] = held

    def bytes(self) -> int:
        """What the laws take, the projection left out."""
        return sum(b.numel() * b.element_size() for n, b in self.named_buffers() if n != "projection")

    def _seen(self, x: Tensor) -> Tensor:
        x = x.flatten(1).to(self.mean)
        return x if self.projection is None else x @ self.projection

    def _factor(self, slot: int) -> None:
        eye = torch.eye(self.dims).to(self.mean)
        factor = torch.linalg.cholesky(self.covariance[slot] + FLOOR * eye)
        self.whitening[slot] = torch.linalg.solve_triangular(factor, eye, upper=False)
        self.logdet[slot] = 2 * factor.diagonal().log().sum()
        self.stale[slot] = 0


def _covariance(z: Tensor) -> Tensor:
    apart = z - z.mean(0)
    return apart.T @ apart / len(z)
