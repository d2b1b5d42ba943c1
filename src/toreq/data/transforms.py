"""Seeded noise, corruptions and augmentation of image batches (B, C, H, W) with values in [0, 1].

Inputs are not changed. Every random draw comes from the generator that is passed, on the device of x.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from toreq.errors import ConfigError, DataError, nearest


def gaussian_noise(
    x: Tensor, sigma: float, clip: tuple[float, float] | None = (0.0, 1.0), *, generator: torch.Generator
) -> Tensor:
    """Return x plus white noise of standard deviation `sigma` >= 0, clipped to `clip` unless that is None."""
    _require(sigma >= 0, "gaussian_noise", "sigma >= 0", sigma)
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    noisy = x + sigma * noise
    return noisy if clip is None else noisy.clamp_(*clip)


def salt_and_pepper(x: Tensor, amount: float, *, generator: torch.Generator) -> Tensor:
    """Return x with a share `amount` in [0, 1] of its pixels set to 0 or 1 at equal odds, channels alike."""
    _images(x, "salt_and_pepper")
    _require(0 <= amount <= 1, "salt_and_pepper", "amount in [0, 1]", amount)
    draw = torch.rand(len(x), 1, *x.shape[2:], generator=generator, device=x.device)
    flat = (draw < amount / 2).to(x.dtype)
    return torch.where(draw < amount, flat, x)


def occlusion(x: Tensor, size: int, value: float = 0.0, *, generator: torch.Generator) -> Tensor:
    """Return x with a `size` x `size` square of `value` at a random place, wholly inside each image."""
    _images(x, "occlusion")
    height, width = x.shape[2:]
    _require(0 <= size <= min(height, width), "occlusion", f"size in [0, {min(height, width)}]", size)
    top = torch.randint(height - size + 1, (len(x), 1), generator=generator, device=x.device)
    left = torch.randint(width - size + 1, (len(x), 1), generator=generator, device=x.device)
    row, column = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    inside_rows = (row >= top) & (row < top + size)
    inside_columns = (column >= left) & (column < left + size)
    inside = inside_rows[:, None, :, None] & inside_columns[:, None, None, :]
    return x.masked_fill(inside, value)


def blur(x: Tensor, sigma: float) -> Tensor:
    """Return x convolved with a normalised Gaussian of `sigma` > 0 pixels, borders replicated."""
    _images(x, "blur")
    _require(sigma > 0, "blur", "sigma > 0", sigma)
    radius = max(1, round(3 * sigma))
    offset = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-(offset**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, -1)
    padded = torch.nn.functional.pad(x, (radius, radius, radius, radius), mode="replicate")
    rows = torch.nn.functional.conv2d(padded, kernel[..., None, :], groups=x.shape[1])
    return torch.nn.functional.conv2d(rows, kernel[..., :, None], groups=x.shape[1])


def contrast(x: Tensor, factor: float) -> Tensor:
    """Return x moved towards (`factor` < 1) or away from its mean over each image, clipped to [0, 1]."""
    _images(x, "contrast")
    _require(factor >= 0, "contrast", "factor >= 0", factor)
    mean = x.mean((1, 2, 3), keepdim=True)
    return (mean + factor * (x - mean)).clamp_(0, 1)


def shift(x: Tensor, down: int, right: int) -> Tensor:
    """Return x moved by whole pixels (negative: up, left), zeros coming in."""
    _images(x, "shift")
    offsets = torch.tensor([[down, right]], device=x.device).expand(len(x), 2)
    return _shift_each(x, offsets)


def random_shift(x: Tensor, pixels: int, *, generator: torch.Generator) -> Tensor:
    """Return x with each image moved by up to `pixels` >= 0 in both directions, zeros coming in."""
    _images(x, "random_shift")
    _require(pixels >= 0, "random_shift", "pixels >= 0", pixels)
    offsets = torch.randint(-pixels, pixels + 1, (len(x), 2), generator=generator, device=x.device)
    return _shift_each(x, offsets)


def corruptions() -> list[str]:
    """Return the names that `corrupt` knows."""
    return list(_CORRUPTIONS)


def corrupt(x: Tensor, name: str, severity: int, *, generator: torch.Generator) -> Tensor:
    """Return x under a named corruption of `severity` 1 (mild) to 5, after Hendrycks and Dietterich (2019).

    Raises:
        ConfigError: unknown name, or a severity outside 1 to 5.
    """
    if name not in _CORRUPTIONS:
        raise ConfigError(f"corrupt: expected the name of a corruption, got {name!r}; {nearest(name, _CORRUPTIONS)}")
    _require(severity in (1, 2, 3, 4, 5), "corrupt", "a severity of 1 to 5", severity)
    return _CORRUPTIONS[name](x, severity - 1, generator)


_CORRUPTIONS: dict[str, Callable[[Tensor, int, torch.Generator], Tensor]] = {
    "gaussian_noise": lambda x, s, g: gaussian_noise(x, (0.08, 0.15, 0.25, 0.35, 0.5)[s], generator=g),
    "salt_and_pepper": lambda x, s, g: salt_and_pepper(x, (0.02, 0.05, 0.1, 0.2, 0.3)[s], generator=g),
    "occlusion": lambda x, s, g: occlusion(x, round(min(x.shape[2:]) * (0.15, 0.25, 0.35, 0.45, 0.55)[s]), generator=g),
    "blur": lambda x, s, g: blur(x, (0.5, 0.75, 1.0, 1.5, 2.0)[s]),
    "contrast": lambda x, s, g: contrast(x, (0.75, 0.5, 0.4, 0.3, 0.15)[s]),
    "shift": lambda x, s, g: random_shift(x, s + 1, generator=g),
}


def _shift_each(x: Tensor, offsets: Tensor) -> Tensor:
    height, width = x.shape[2:]
    row = torch.arange(height, device=x.device) - offsets[:, :1]
    column = torch.arange(width, device=x.device) - offsets[:, 1:]
    inside = ((row >= 0) & (row < height))[:, :, None] & ((column >= 0) & (column < width))[:, None, :]
    example = torch.arange(len(x), device=x.device)[:, None, None]
    # Advanced indices around the slice of the channels: the result comes out as (B, H, W, C).
    moved = x[example, :, row.clamp(0, height - 1)[:, :, None], column.clamp(0, width - 1)[:, None, :]]
    return moved.permute(0, 3, 1, 2) * inside[:, None].to(x.dtype)


def _images(x: Tensor, where: str) -> None:
    if x.ndim != 4 or not x.is_floating_point():
        raise DataError(
            f"{where}: expected floating-point images (B, C, H, W), got {x.dtype} of shape {tuple(x.shape)}; "
            "use Dataset.images or reshape"
        )


def _require(condition: bool, where: str, expected: str, got: float) -> None:
    if not condition:
        raise ConfigError(f"{where}: expected {expected}, got {got}; use a value in that range")
