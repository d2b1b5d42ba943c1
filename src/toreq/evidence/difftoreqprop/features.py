"""The fixed small network whose features the digit FID compares, and the Fréchet distance of two sets of features."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from toreq.errors import DataError

WEIGHTS = Path(__file__).parent / "digits.safetensors"
"""Written by ``scripts/digit_features.py``; stored in half precision, used in single precision."""
FEATURES = 64


class DigitFeatures(nn.Module):
    """Two strided convolutions and a layer of 64 ReLUs, a linear classifier behind them: 114,314 parameters.

    Small, so that the distance is cheap and its weights are shipped with this library. A digit FID by another network
    is another number: only those by this one are to be compared.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.ReLU(),
            nn.Conv2d(16, 32, 5, stride=2, padding=2), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * 49, FEATURES), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(FEATURES, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, 10)`` of images ``(B, 1, 28, 28)`` in [0, 1]."""
        return self.head(self.body(x))

    @torch.no_grad()
    def features(self, x: Tensor, batch: int = 500) -> Tensor:
        """Features ``(B, 64)`` of images ``(B, 1, 28, 28)``, clipped to [0, 1] first."""
        return torch.cat([self.body(part.clamp(0, 1)) for part in x.split(batch)])


@functools.lru_cache(maxsize=1)
def shipped() -> DigitFeatures:
    """The network with the weights that are shipped, in evaluation mode, without gradients.

    Raises:
        DataError: the weights are missing or those of another network.
    """
    net = DigitFeatures()
    try:
        held = safetensors.torch.load_file(WEIGHTS)
        net.load_state_dict({name: t.float() for name, t in held.items()})
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise DataError(
            f"features: expected the weights of the digit network in {WEIGHTS}, got {error}; reinstall the package, or "
            "run scripts/digit_features.py"
        ) from error
    return net.eval().requires_grad_(False)


@dataclass(frozen=True)
class Moments:
    """Mean ``(F,)`` and covariance ``(F, F)`` of features, float64."""

    mean: Tensor
    covariance: Tensor

    @staticmethod
    def of(features: Tensor) -> Moments:
        """Those of features ``(N, F)``, N at least 2."""
        flat = features.double()
        return Moments(flat.mean(0), torch.cov(flat.T))


def frechet(a: Moments, b: Moments) -> float:
    r"""The squared Fréchet distance of two Gaussians (Dowson and Landau 1982; as a score: Heusel et al. 2017),

    .. math:: \|\mu_a - \mu_b\|^2 + \mathrm{tr}\big(C_a + C_b - 2(C_a^{1/2}C_b\,C_a^{1/2})^{1/2}\big)
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    inner = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp_min(0).sqrt().sum()
    traces = a.covariance.trace() + b.covariance.trace() - 2 * inner
    return float((a.mean - b.mean).square().sum() + traces)


def digit_fid(x: Tensor, reference: Moments) -> float:
    """The squared distance of images ``(N, 1, 28, 28)`` from the moments of reference features."""
    return frechet(Moments.of(shipped().features(x)), reference)


def classes_found(x: Tensor) -> Tensor:
    """The class of each image according to the network, ``(N,)``."""
    net = shipped()
    with torch.no_grad():
        return torch.cat([net(part.clamp(0, 1)).argmax(1) for part in x.split(500)])
