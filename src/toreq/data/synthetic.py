"""Generated data for tests and first experiments."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from toreq.data.batches import seeded
from toreq.data.dataset import Dataset


def blobs(
    count: int,
    input_shape: Sequence[int],
    num_classes: int,
    *,
    noise: float = 0.1,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Return clouds around one random image per class: x (count, *input_shape) in [0, 1], y int64 (count,).

    The classes take turns. Small `noise` (standard deviation) makes them linearly separable.
    """
    centres = torch.rand(num_classes, *input_shape, generator=generator)
    y = torch.arange(count) % num_classes
    x = centres[y] + noise * torch.randn(count, *input_shape, generator=generator)
    return x.clamp_(0, 1), y


def two_moons(count: int, *, noise: float = 0.1, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return two interleaved half circles: x (count, 2), y int64 (count,), not linearly separable."""
    y = torch.arange(count) % 2
    angle = math.pi * torch.rand(count, generator=generator)
    sign = 1.0 - 2.0 * y
    x = torch.stack([torch.cos(angle) * sign + y, torch.sin(angle) * sign + 0.5 * y], dim=1)
    return x + noise * torch.randn(count, 2, generator=generator), y


def blob_dataset(
    train: int = 256,
    test: int = 64,
    input_shape: Sequence[int] = (1, 8, 8),
    num_classes: int = 4,
    *,
    noise: float = 0.1,
    seed: int = 0,
) -> Dataset:
    """Return `blobs` as a `Dataset` of uint8 images, the same for the same arguments."""
    x, y = blobs(train + test, input_shape, num_classes, noise=noise, generator=seeded(seed))
    pixels = (x * 255).round().to(torch.uint8)
    return Dataset(
        "blobs",
        f"blobs-seed{seed}",
        pixels[:train],
        y[:train],
        pixels[train:],
        y[train:],
        num_classes,
        tuple(input_shape),
        "generated",
    )
