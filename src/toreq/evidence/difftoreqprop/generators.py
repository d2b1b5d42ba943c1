"""What DiffTorEqProp's samples are compared with: a denoiser trained by backprop, and a variational autoencoder.

All of them also classify, by a linear head on what they see of the image, and are trained on the same loss for that.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toreq.systems import Anneal
from toreq.systems.difftoreqprop_filter import LinearFilter
from toreq.systems.difftoreqprop_parts import LevelFeatures, Seen, denoising_cost, drawn_like, own_generator, views
from toreq.systems.difftoreqprop_sampling import Conveyor, stream

SPAN = (0.02, 4.0)
CLASSES = 10


def _halved(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 5, stride=2, padding=2)


def _doubled(inputs: int, outputs: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(inputs, outputs, 5, stride=2, padding=2, output_padding=1)


class PlainDenoiser(nn.Module):
    r"""A feed-forward denoiser of 28 x 28 pixels that is told the noise level and perhaps the class.

    A strided convolution and its transpose, and between them a dense layer that sees the whole image; conditioned by
    offsets, behind the same linear filter and with the same inputs as DiffTorEqProp:
    :math:`D = \mu + W_s(x) + (r_s/0.3)\,F`.

    Args:
        channels: of the convolution.
        width: of the dense layer.
        span: of the noise in training.
    """

    def __init__(self, channels: int = 24, width: int = 512, span: tuple[float, float] = SPAN) -> None:
        super().__init__()
        self.channels, self.span = channels, span
        self.filter = LinearFilter((1, 28, 28), span)
        self.down, self.up = _halved(2, channels), _doubled(channels, 1)
        self.see, self.rise = nn.Linear(2 * 784, width), nn.Linear(196 * channels, width)
        self.fall = nn.Linear(width, 196 * channels)
        self.levels = nn.ModuleList([LevelFeatures(channels), LevelFeatures(width)])
        self.names = nn.Embedding(CLASSES + 1, width)
        self.head = nn.Linear(width, CLASSES)
        self.generator = own_generator()
        self._clean: Tensor | None = None

    def observe(self, x: Tensor) -> None:
        """Fit the filter to training images."""
        self.filter.observe(x)

    def _encoded(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """Channels ``(B, C, 14, 14)`` and the dense layer ``(B, W)``."""
        both = views(seen)
        low, high = self.down(both), self.see(both.flatten(1))
        if seen.level is not None:
            low = low + self.levels[0](seen.level)[:, :, None, None]
            high = high + self.levels[1](seen.level)
        if seen.labels is not None:
            high = high + self.names(seen.labels + 1)
        low = F.silu(low)
        return low, F.silu(high + self.rise(low.flatten(1)))

    def denoise(self, given: Seen) -> Tensor:
        """The denoised images, of the shape of the input."""
        seen = self.filter(given)
        low, high = self._encoded(seen)
        return self.filter.restored(seen, self.up(low + F.silu(self.fall(high)).view_as(low)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, 10)`` of images ``(B, 1, 28, 28)``."""
        self._clean = x if self.training else None
        return self.head(self._encoded(self.filter(x))[1])

    def criterion(self, logits: Tensor, y: Tensor) -> Tensor:
        """Cross entropy; in training also the denoising cost of the latest batch."""
        total = F.cross_entropy(logits, y)
        x, self._clean = self._clean, None
        if x is None or len(x) != len(y):
            return total
        return total + denoising_cost(self.denoise, self.filter.left, x, y, self.span, self.generator)

    @torch.no_grad()
    def sample(
        self, count: int, *, anneal: Anneal, labels: Tensor | None, batch: int, generator: torch.Generator
    ) -> Tensor:
        """Images on the same ring of noise levels, ``(count, 1, 28, 28)``."""
        first = next(self.parameters())
        padded = None if labels is None else torch.cat([labels, labels.new_full((-count % batch,), -1)]).split(batch)
        given: Callable[[int], Tensor] | None = None if padded is None else (lambda i: padded[i])
        ring = Conveyor(
            lambda x, level, names: self.denoise(Seen(x, level, names)), (1, 28, 28), batch, anneal, generator,
            first.device, first.dtype, given, None, -(-count // batch), self.filter.drawn,
        )  # fmt: skip
        return torch.cat(list(stream(ring)))[:count]


class VAE(nn.Module):
    r"""A variational autoencoder of 28 x 28 pixels whose decoder may know the class (Kingma and Welling 2014).

    Bernoulli pixels, a Gaussian code; its loss per pixel is the negative evidence lower bound.

    Args:
        channels: of the encoder's convolutions, and of the decoder's in reverse.
        width: of a dense layer between convolutions and code, on both ways.
        code: dimensions of the code.
    """

    def __init__(self, channels: tuple[int, int] = (32, 64), width: int = 512, code: int = 16) -> None:
        super().__init__()
        first, second = channels
        self.second, self.code = second, code
        self.encoder = nn.Sequential(
            _halved(1, first), nn.SiLU(), _halved(first, second), nn.SiLU(), nn.Flatten(),
            nn.Linear(49 * second, width), nn.SiLU(),
        )  # fmt: skip
        self.moments = nn.Linear(width, 2 * code)
        self.decode_in = nn.Sequential(nn.Linear(code + CLASSES, width), nn.SiLU(), nn.Linear(width, 49 * second))
        self.decoder = nn.Sequential(nn.SiLU(), _doubled(second, first), nn.SiLU(), _doubled(first, 1))
        self.head = nn.Linear(width, CLASSES)
        self.generator = own_generator()
        self._seen: tuple[Tensor, Tensor] | None = None

    def _decoded(self, z: Tensor, labels: Tensor) -> Tensor:
        hot = F.one_hot(labels.clamp_min(0), CLASSES).to(z.dtype) * (labels >= 0)[:, None]
        return self.decoder(self.decode_in(torch.cat([z, hot], 1)).view(-1, self.second, 7, 7))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, 10)`` of images ``(B, 1, 28, 28)``."""
        found = self.encoder(x)
        self._seen = (x, found) if self.training else None
        return self.head(found)

    def criterion(self, logits: Tensor, y: Tensor) -> Tensor:
        """Cross entropy; in training also the negative bound of the latest batch, per pixel."""
        total = F.cross_entropy(logits, y)
        held, self._seen = self._seen, None
        return total if held is None or len(held[0]) != len(y) else total + self.bound(*held, y)

    def bound(self, x: Tensor, found: Tensor, y: Tensor) -> Tensor:
        """Negative evidence lower bound per pixel, half of the examples decoded without their class."""
        mean, log = self.moments(found).chunk(2, 1)
        z = mean + (0.5 * log).exp() * drawn_like(mean, self.generator)
        told = torch.rand(len(y), generator=self.generator).to(y.device) < 0.5
        pixels = F.binary_cross_entropy_with_logits(self._decoded(z, torch.where(told, y, -1)), x, reduction="sum")
        divergence = 0.5 * (mean.square() + log.exp() - 1 - log).sum()
        return (pixels + divergence) / x.numel()

    @torch.no_grad()
    def sample(
        self, count: int, *, anneal: Anneal, labels: Tensor | None, batch: int, generator: torch.Generator
    ) -> Tensor:
        """Means of decoded codes, ``(count, 1, 28, 28)``; there are no noise levels to anneal."""
        names = torch.full((count,), -1) if labels is None else labels
        device = next(self.parameters()).device
        z = torch.randn(count, self.code, generator=generator)
        parts = zip(z.split(batch), names.split(batch), strict=True)
        return torch.cat([self._decoded(a.to(device), b.to(device)).sigmoid() for a, b in parts])


def evaluations(net: nn.Module, anneal: Anneal) -> int:
    """Passes through the network that one sample takes."""
    return 1 if isinstance(net, VAE) else anneal.evaluations


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Chance that a score outside exceeds one inside, ties counted half, in percent."""
    both = torch.cat([inside, outside]).double()
    order = both.argsort()
    # the mean rank of equal scores
    _, inverse, counts = both[order].unique_consecutive(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    rank = torch.empty_like(both)
    rank[order] = (last - (counts.double() - 1) / 2)[inverse]
    n, m = len(inside), len(outside)
    if not math.isfinite(float(both.sum())):
        return float("nan")
    return 100 * float((rank[n:].sum() - m * (m + 1) / 2) / (n * m))
