"""Convolutions as operators."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toreq.core.operators import Operator, Tensors, like, onto
from toreq.errors import ConfigError


class Conv(Operator):
    """A 2-d convolution, optionally followed by average pooling; both are linear, so the adjoint is exact.

    Args:
        in_shape: ``(C, H, W)`` of one example.
        out_channels: number of filters.
        kernel: size of the square kernel.
        stride, padding: as in ``torch.nn.Conv2d``.
        pool: side of non-overlapping average-pooling windows (1: none); rows that do not fill a window are dropped.
        symmetric: make the operator its own adjoint; needs as many filters as channels and an output of the
            input's size.
        scale: standard deviation of the initial weights; half of :math:`1/\\sqrt{\\text{fan-in}}` when None.
        generator: source of the initial weights.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_channels: int,
        kernel: int = 3,
        stride: int = 1,
        padding: int = 0,
        pool: int = 1,
        symmetric: bool = False,
        scale: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if len(in_shape) != 3:
            raise ConfigError(f"Conv: expected in_shape (C, H, W), got {tuple(in_shape)}; give channels, height, width")
        if min(out_channels, kernel, stride, pool) < 1 or padding < 0:
            raise ConfigError(
                f"Conv: expected out_channels, kernel, stride, pool >= 1 and padding >= 0, got {out_channels}, "
                f"{kernel}, "
                f"{stride}, {pool} and {padding}; e.g. 32, 5, 2, 1 and 0"
            )
        self.in_shape = tuple(in_shape)
        channels, *size = self.in_shape
        self.stride, self.padding, self.pool = stride, padding, pool
        conv = [(s + 2 * padding - kernel) // stride + 1 for s in size]
        self.conv_size = (conv[0], conv[1])
        pooled = [s // pool for s in conv]
        if min(pooled) < 1:
            raise ConfigError(
                f"Conv: expected an input of at least {kernel + (pool - 1) * stride - 2 * padding} pixels a side, "
                f"got {size}; use a smaller kernel or pool"
            )
        self.out_shape = (out_channels, pooled[0], pooled[1])
        # what a transposed convolution must append so that its size is the input's again
        self.output_padding = tuple(
            s - ((c - 1) * stride - 2 * padding + kernel) for s, c in zip(size, conv, strict=True)
        )
        if symmetric and (self.out_shape != self.in_shape or stride != 1 or pool != 1):
            raise ConfigError(
                f"Conv: expected an output of the input's shape when symmetric, got {self.in_shape} -> "
                f"{self.out_shape}; "
                "use stride 1, no pooling, an odd kernel and padding (kernel - 1) / 2"
            )
        self.symmetric = symmetric
        std = 0.5 / math.sqrt(channels * kernel * kernel) if scale is None else scale
        std = std * math.sqrt(2) if symmetric else std
        self.weight = nn.Parameter(torch.randn(out_channels, channels, kernel, kernel, generator=generator) * std)

    def tensors(self) -> Tensors:
        return {"weight": self._effective("weight")}

    def symmetrised(self, weight: Tensor) -> Tensor:
        return (weight + weight.transpose(0, 1).flip(-1, -2)) / 2 if self.symmetric else weight

    def rounded(self, t: Tensors) -> Tensors:
        return {**t, "weight": t["weight"].bfloat16()}

    def _t(self, t: Tensors | None) -> Tensor:
        return (self.tensors() if t is None else t)["weight"]

    def _convolved(self, u: Tensor, t: Tensors | None) -> Tensor:
        weight = self._t(t)
        return _average_pool(F.conv2d(like(u, weight), weight, stride=self.stride, padding=self.padding), self.pool)

    def _transposed(self, w: Tensor, t: Tensors | None) -> Tensor:
        weight = self._t(t)
        return F.conv_transpose2d(
            _spread(like(w, weight), self.pool, self.conv_size),
            weight,
            stride=self.stride,
            padding=self.padding,
            output_padding=self.output_padding,
        )

    def forward(self, u: Tensor, t: Tensors | None = None) -> Tensor:
        return self._convolved(u, t).to(u.dtype)

    def adjoint(self, w: Tensor, t: Tensors | None = None) -> Tensor:
        return self._transposed(w, t).to(w.dtype)

    def add(self, acc: Tensor | None, u: Tensor, t: Tensors) -> Tensor:
        return onto(acc, self._convolved(u, t), u.dtype)

    def add_adjoint(self, acc: Tensor | None, w: Tensor, t: Tensors) -> Tensor:
        return onto(acc, self._transposed(w, t), w.dtype)

    def gradient(self, w: Tensor, u: Tensor, t: Tensors) -> Tensors:
        weight = t["weight"]
        grad = torch.ops.aten.convolution_backward(
            _spread(like(w, weight), self.pool, self.conv_size), like(u, weight), weight, None,
            [self.stride] * 2, [self.padding] * 2, [1, 1], False, [0, 0], 1, [False, True, False],
        )[1]  # fmt: skip
        return {"weight": grad.to(w.dtype)}

    def extra_repr(self) -> str:
        return f"{self.in_shape} -> {self.out_shape}, stride={self.stride}, pool={self.pool}"


def _average_pool(x: Tensor, pool: int) -> Tensor:
    if pool == 1:
        return x
    if not x.is_complex():
        return F.avg_pool2d(x, pool)
    return torch.complex(F.avg_pool2d(x.real, pool), F.avg_pool2d(x.imag, pool))


def _spread(w: Tensor, pool: int, size: tuple[int, int]) -> Tensor:
    """Adjoint of average pooling, with zeros where pooling dropped rows or columns."""
    if pool == 1:
        return w
    w = (w / pool**2).repeat_interleave(pool, -1).repeat_interleave(pool, -2)
    return F.pad(w, (0, size[1] - w.shape[-1], 0, size[0] - w.shape[-2]))
