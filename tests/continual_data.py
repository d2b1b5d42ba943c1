"""A small set of images for the tests of the continual-learning protocol."""

from __future__ import annotations

import torch

from toreq.data import Dataset


def images(train: int = 40, test: int = 20, size: int = 6, classes: int = 10) -> Dataset:
    """Noise around a pattern for each class, balanced; every image differs from every other one."""
    generator = torch.Generator().manual_seed(1)
    patterns = torch.randint(0, 200, (classes, 1, size, size), generator=generator)

    def split(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.arange(count) % classes
        noise = torch.randint(0, 56, (count, 1, size, size), generator=generator)
        return (patterns[y] + noise).to(torch.uint8), y

    (train_x, train_y), (test_x, test_y) = split(train), split(test)
    return Dataset("tiny", "tiny", train_x, train_y, test_x, test_y, classes, (1, size, size), "none")
