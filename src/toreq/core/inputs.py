"""What is done to the input before any coupling sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from toreq.errors import ConfigError


class Standardize(nn.Module):
    r"""Bring every channel of the input to mean 0 and deviation 1.

    .. math:: x'_c = (x_c - m_c) / s_c

    An input with a large common part (a natural image's mean colour) spends the couplings' bounded norm on that part,
    and learns slowly.

    Args:
        mean: m, one number per channel, or one for all.
        deviation: s > 0, as many.

    Raises:
        ConfigError: for lengths that differ, numbers that are not finite, or a deviation that is not positive.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, mean: Sequence[float], deviation: Sequence[float]) -> None:
        super().__init__()
        m, s = (torch.as_tensor(v, dtype=torch.float64).flatten() for v in (mean, deviation))
        if m.shape != s.shape or not m.numel() or not bool((m.isfinite() & s.isfinite() & (s > 0)).all()):
            raise ConfigError(
                f"Standardize: expected as many finite means as positive deviations, got {m.tolist()} and "
                f"{s.tolist()}; leave out channels that never change"
            )
        self.register_buffer("mean", m.to(torch.get_default_dtype()))
        self.register_buffer("deviation", s.to(torch.get_default_dtype()))

    @classmethod
    def of(cls, x: Tensor) -> Standardize:
        """The map that standardises ``x``: ``(B, C, H, W)`` by its channels, ``(B, ...)`` of other shapes as a whole.

        Raises:
            ConfigError: for symbols, or a channel that never changes.
        """
        if not x.is_floating_point():
            raise ConfigError(f"Standardize: expected floating-point inputs, got {x.dtype}; symbols have no mean")
        over = (0, 2, 3) if x.dim() == 4 else tuple(range(x.dim()))
        return cls(x.double().mean(over).flatten().tolist(), x.double().std(over).flatten().tolist())

    def forward(self, x: Any) -> Tensor:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise ConfigError(
                f"Standardize: expected a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}; do "
                "without it for other inputs"
            )
        count = self.mean.numel()
        if count > 1 and (x.dim() < 2 or x.shape[1] != count):
            raise ConfigError(f"Standardize: expected {count} channels, got x of shape {tuple(x.shape)}")
        shape = (1, count) + (1,) * (x.dim() - 2) if count > 1 else (1,)
        return (x - self.mean.view(shape)) / self.deviation.view(shape)

    def extra_repr(self) -> str:
        """Its numbers."""
        return f"mean={self.mean.tolist()}, deviation={self.deviation.tolist()}"
