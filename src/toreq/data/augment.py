"""Training images moved, turned and stretched at random."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from toreq.data.transforms import random_shift
from toreq.errors import ConfigError, DataError


@dataclass(frozen=True)
class Augmentation:
    r"""Random geometric changes of images, drawn anew for each image of each call.

    Whole-pixel shifts and mirroring copy pixels. With any of the others an image is sampled bilinearly at

    .. math:: u' = R(\theta)\begin{pmatrix}1 & k\\ 0 & 1\end{pmatrix}\mathrm{diag}(s_1, s_2)\,u,
              \quad \theta, k, s_i - 1 \text{ uniform in } \pm(\text{rotate, shear, zoom}),

    u the position from the centre in half heights or widths; zeros come in from outside.

    Args:
        shift: largest move in whole pixels, at least 0.
        rotate: largest angle in degrees, in [0, 180].
        zoom: largest relative stretch of each axis, in [0, 1).
        shear: largest shear, at least 0.
        flip: mirror each image left to right with probability 1/2.

    Raises:
        ConfigError: for a value out of range.
    """

    shift: int = 0
    rotate: float = 0.0
    zoom: float = 0.0
    shear: float = 0.0
    flip: bool = False

    def __post_init__(self) -> None:
        for name, low, high in (("shift", 0, math.inf), ("rotate", 0, 180), ("shear", 0, math.inf)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(
                    f"Augmentation.{name}: expected a number in [{low}, {high}], got {value}; 0 changes nothing"
                )
        if not 0 <= self.zoom < 1:
            raise ConfigError(f"Augmentation.zoom: expected a number in [0, 1), got {self.zoom}; try 0.1")

    @property
    def active(self) -> bool:
        """Whether anything is changed at all."""
        return bool(self.shift or self.flip or self.warps)

    @property
    def warps(self) -> bool:
        """Whether images are resampled between pixels."""
        return bool(self.rotate or self.zoom or self.shear)

    def __call__(self, x: Tensor, *, generator: torch.Generator) -> Tensor:
        """Images ``(B, C, H, W)``, changed.

        Args:
            x: floating-point images ``(B, C, H, W)``.
            generator: on their device.

        Raises:
            DataError: for something else than images.
        """
        if x.ndim != 4 or not x.is_floating_point():
            raise DataError(
                f"Augmentation: expected floating-point images (B, C, H, W), got {x.dtype} of shape {tuple(x.shape)}; "
                "reshape them, or train without shift, rotate, zoom, shear and flip"
            )
        if self.shift:
            x = random_shift(x, self.shift, generator=generator)
        if self.flip:
            mirrored = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device) < 0.5
            x = torch.where(mirrored, x.flip(-1), x)
        return self._warped(x, generator) if self.warps else x

    def _warped(self, x: Tensor, generator: torch.Generator) -> Tensor:
        def draw(size: float) -> Tensor:
            # in the generator's own precision, so that the draws do not depend on the images' one
            u = torch.rand(len(x), generator=generator, device=x.device)
            return (size * (2 * u - 1)).to(x.dtype)

        angle, shear, wide, high = (draw(s) for s in (math.radians(self.rotate), self.shear, self.zoom, self.zoom))
        cos, sin = angle.cos(), angle.sin()
        wide, high = 1 + wide, 1 + high
        rows = [
            torch.stack([wide * cos, high * (shear * cos - sin)], 1),
            torch.stack([wide * sin, high * (shear * sin + cos)], 1),
        ]
        maps = torch.cat([torch.stack(rows, 1), x.new_zeros(len(x), 2, 1)], 2)
        grid = torch.nn.functional.affine_grid(maps, list(x.shape), align_corners=False)
        return torch.nn.functional.grid_sample(x, grid, align_corners=False)
