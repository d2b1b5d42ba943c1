"""Pictures of many images at once: a grid, and chains of samples as they move."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from toreq.errors import ConfigError

GAP, EDGE = 2, 0.5
"""Pixels between images, and their grey."""


def grid(x: Tensor, columns: int | None = None, scale: int = 2) -> NDArray[np.uint8]:
    """Images side by side, row by row, clipped to [0, 1].

    Args:
        x: ``(K, C, H, W)`` with one channel or three, K at least 1.
        columns: in a row; as many as make the grid nearly square when None.
        scale: side of the square that a pixel becomes, at least 1.

    Returns:
        ``(rows, columns)`` of grey values, or ``(rows, columns, 3)``.

    Raises:
        ConfigError: for what is no batch of images.
    """
    if x.dim() != 4 or x.shape[1] not in (1, 3) or len(x) == 0:
        raise ConfigError(
            f"grid: expected images (K, 1 or 3, H, W), got {tuple(x.shape)}; only images can be drawn as a grid"
        )
    if scale < 1 or (columns is not None and columns < 1):
        raise ConfigError(f"grid: expected scale >= 1 and columns >= 1, got {scale} and {columns}; try 2 and 8")
    count, channels, height, width = x.shape
    columns = min(count, math.ceil(math.sqrt(count)) if columns is None else columns)
    rows = -(-count // columns)
    tiles = x.new_full((rows * columns, channels, height + GAP, width + GAP), EDGE)
    tiles[:, :, :height, :width] = 0
    tiles[:count, :, :height, :width] = x.detach().clamp(0, 1)
    tiles = tiles.view(rows, columns, channels, height + GAP, width + GAP).permute(0, 3, 1, 4, 2)
    sheet = tiles.reshape(rows * (height + GAP), columns * (width + GAP), channels)[:-GAP, :-GAP]
    sheet = sheet.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    pixels = (255 * sheet).round().to(torch.uint8).cpu().numpy()
    return pixels[:, :, 0] if channels == 1 else pixels


def png(pixels: NDArray[np.uint8]) -> bytes:
    """A picture as the content of a PNG file."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG", optimize=True)
    return out.getvalue()


def gif(frames: Sequence[NDArray[np.uint8]], milliseconds: int = 80, rest: int = 1500) -> bytes:
    """Pictures one after the other as the content of a GIF file that begins again at its end.

    Args:
        frames: of one shape, at least 1.
        milliseconds: that each is shown.
        rest: that the last one is shown.
    """
    if not frames:
        raise ConfigError("gif: expected at least one frame, got none; give the states of a chain")
    images = [Image.fromarray(frame) for frame in frames]
    shown = [milliseconds] * (len(images) - 1) + [rest]
    out = io.BytesIO()
    images[0].save(out, format="GIF", save_all=True, append_images=images[1:], duration=shown, loop=0)
    return out.getvalue()
