"""What robustness is compared with: ordinary networks, a denoiser before one, and Gaussians that know the noise."""

from __future__ import annotations

import torch
from torch import Tensor, nn

FLOOR = 0.1
"""Least standard deviation that the Gaussians assume: without noise, pixels that never vary have no density."""


def mlp(inputs: int = 784, width: int = 512, classes: int = 10) -> nn.Module:
    """A hidden layer of ReLUs."""
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, classes))


def cnn(channels: tuple[int, int] = (16, 32), classes: int = 10) -> nn.Module:
    """Two 5 x 5 convolutions of stride 2 and a linear layer: 28,938 parameters on 28 x 28 pixels."""
    first, second = channels
    # strides rather than maximum pooling, which noise biases upwards
    return nn.Sequential(
        nn.Conv2d(1, first, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(first, second, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(second * 49, classes),
    )


class Wiener(nn.Module):
    r"""The best linear denoiser of white noise with the training set's moments, before a classifier.

    .. math:: \hat x = \mu + C\,(C + \sigma^2 I)^{-1}(x - \mu)

    It is told sigma. On clipped noise it is applied all the same, though that noise is not white.

    Args:
        classifier: trained on clean images.
        x: clean training images ``(N, ...)``, at least 2.
    """

    mean: Tensor
    values: Tensor
    vectors: Tensor

    def __init__(self, classifier: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.classifier = classifier
        mean, values, vectors = _moments(x)
        self.register_buffer("mean", mean)
        self.register_buffer("values", values)
        self.register_buffer("vectors", vectors)
        self.sigma = 0.0

    def given(self, sigma: float) -> nn.Module:
        """This denoiser for noise of standard deviation ``sigma``."""
        self.sigma = sigma
        return self

    def denoised(self, x: Tensor) -> Tensor:
        """The estimate of the clean images; x itself where sigma is 0."""
        if self.sigma == 0:
            return x
        gain = self.values / (self.values + self.sigma**2)
        flat = x.flatten(1).double() - self.mean
        return (self.mean + (flat @ self.vectors * gain) @ self.vectors.T).to(x.dtype).view_as(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, classes)``."""
        return self.classifier(self.denoised(x))


class Gaussians(nn.Module):
    r"""Quadratic discriminant analysis that knows the noise: :math:`x \sim N(\mu_k, C_k + \sigma^2 I)` in class k.

    The maximum-likelihood class under the model that every class of clean images is Gaussian. It is told sigma, of
    which at least `FLOOR` is assumed.

    Args:
        x: clean training images ``(N, ...)``.
        y: labels ``(N,)``; at least 2 images of every class.
        classes: number of classes.
    """

    means: Tensor
    values: Tensor
    vectors: Tensor
    priors: Tensor

    def __init__(self, x: Tensor, y: Tensor, classes: int) -> None:
        super().__init__()
        parts = [_moments(x[y == k]) for k in range(classes)]
        for place, name in enumerate(("means", "values", "vectors")):
            self.register_buffer(name, torch.stack([part[place] for part in parts]))
        self.register_buffer("priors", torch.bincount(y, minlength=classes).double() / len(y))
        self.sigma = 0.0

    def given(self, sigma: float) -> nn.Module:
        """These Gaussians for noise of standard deviation ``sigma``."""
        self.sigma = sigma
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Log densities times priors, up to a constant, ``(B, classes)``."""
        flat = x.flatten(1).double()
        scores = []
        for mean, values, vectors, prior in zip(self.means, self.values, self.vectors, self.priors, strict=True):
            variance = values + max(self.sigma, FLOOR) ** 2
            along = (flat - mean) @ vectors
            scores.append(prior.log() - 0.5 * ((along**2 / variance).sum(1) + variance.log().sum()))
        return torch.stack(scores, 1).to(x.dtype)


def _moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, and eigenvalues and eigenvectors of the covariance, in float64."""
    flat = x.flatten(1).double()
    mean = flat.mean(0)
    centred = flat - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / (len(flat) - 1))
    return mean, values.clamp(min=0), vectors
