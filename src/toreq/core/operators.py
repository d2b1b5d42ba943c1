"""Linear operators with an exact adjoint: the matrices that couple nodes.

``forward(u)`` is :math:`A u` and ``adjoint(w)`` is :math:`A^\\top w`. (The forward map is not called ``apply``, which
``nn.Module`` already has for initialisation functions.) Both take the operator's tensors as an optional second
argument: a relaxation materialises them once (symmetrised, norm-controlled) and passes them to every step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toreq.core.pickling import Picklable
from toreq.errors import ConfigError

Tensors = dict[str, Tensor]


def _shape(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


class Operator(Picklable, ABC):
    r"""A linear map :math:`A` from ``(B, *in_shape)`` to ``(B, *out_shape)`` with
    :math:`\langle A u, w\rangle = \langle u, A^\top w\rangle`."""

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    symmetric: bool = False
    gram: tuple[float, float] | None = None
    r"""Smallest and largest eigenvalue of :math:`A^\top A` where they are known beforehand."""

    def tensors(self) -> Tensors:
        """The effective weights, after any parametrization; ``{}`` if there are none."""
        return {}

    def inputs(self, x: Any) -> Tensors:
        """What of the operator depends on the input, batch first: computed once per relaxation and passed on beside
        :meth:`tensors`; ``{}`` for a plain matrix."""
        return {}

    def symmetrised(self, weight: Tensor) -> Tensor:
        """The weight as :meth:`tensors` would give it."""
        return weight

    def _effective(self, name: str) -> Tensor:
        weight = getattr(self, name)
        chain = getattr(self, "parametrizations", {})
        # norm control returns the symmetrised weight already; doing it twice costs as much as a relaxation step
        done = name in chain and getattr(chain[name][-1], "symmetrises", False)
        return weight if done else self.symmetrised(weight)

    def rounded(self, t: Tensors) -> Tensors:
        """``t`` with the weights in bfloat16 if this operator can multiply by these; what goes in and out keeps
        its dtype."""
        return t

    @abstractmethod
    def forward(self, u: Tensor, t: Tensors | None = None) -> Tensor:
        r""":math:`A u`."""

    @abstractmethod
    def adjoint(self, w: Tensor, t: Tensors | None = None) -> Tensor:
        r""":math:`A^\top w`."""

    def add(self, acc: Tensor | None, u: Tensor, t: Tensors) -> Tensor:
        """``acc + A u``, fused where that is cheaper."""
        return self.forward(u, t) if acc is None else acc + self.forward(u, t)

    def add_adjoint(self, acc: Tensor | None, w: Tensor, t: Tensors) -> Tensor:
        """``acc + A^T w``, fused where that is cheaper."""
        return self.adjoint(w, t) if acc is None else acc + self.adjoint(w, t)

    def gradient(self, w: Tensor, u: Tensor, t: Tensors) -> Tensors:
        r"""Gradient of :math:`\sum_b\langle w_b, A u_b\rangle` with respect to each of :meth:`tensors`."""
        with torch.enable_grad():
            leaf = {k: v.detach().requires_grad_() for k, v in t.items()}
            value = (w.detach() * self.forward(u.detach(), leaf)).sum()
        return dict(zip(leaf, torch.autograd.grad(value, list(leaf.values())), strict=True))

    @torch.no_grad()
    def norm(self, iterations: int = 50, generator: torch.Generator | None = None) -> float:
        r"""Largest singular value by power iteration on :math:`A^\top A`.

        Args:
            iterations: number of applications of :math:`A^\top A`, at least 1.
            generator: source of the start vector; seed 0 when None.
        """
        t = self.tensors()
        like = next(iter(t.values()), torch.zeros(()))
        generator = generator or torch.Generator(device=like.device).manual_seed(0)
        v = torch.randn(1, *self.in_shape, generator=generator, dtype=like.dtype, device=like.device)
        sigma = 0.0
        for _ in range(iterations):
            v = v / v.norm().clamp_min(torch.finfo(v.dtype).tiny)
            u = self.forward(v, t)
            sigma = float(u.norm())
            v = self.adjoint(u, t)
        return sigma


class IdentityOperator(Operator):
    """The identity, e.g. for a spring between two nodes of one shape."""

    symmetric = True
    gram = (1.0, 1.0)

    def __init__(self, shape: int | Sequence[int]) -> None:
        super().__init__()
        self.in_shape = self.out_shape = _shape(shape)

    def forward(self, u: Tensor, t: Tensors | None = None) -> Tensor:
        return u

    def adjoint(self, w: Tensor, t: Tensors | None = None) -> Tensor:
        return w


class Dense(Operator):
    r"""A matrix acting on the last axis, or on all axes at once when a shape is given.

    Args:
        in_features: size of the last axis, or a shape such as ``(C, H, W)`` to be flattened.
        out_features: likewise for the result.
        symmetric: use :math:`(W + W^\top)/2`; needs equal sizes.
        scale: standard deviation of the initial weights; :math:`1/\sqrt{\text{fan-in}}` times one half when None.
        generator: source of the initial weights; torch's default generator when None.
    """

    def __init__(
        self,
        in_features: int | Sequence[int],
        out_features: int | Sequence[int],
        symmetric: bool = False,
        scale: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.in_shape, self.out_shape = _shape(in_features), _shape(out_features)
        n_in, n_out = math.prod(self.in_shape), math.prod(self.out_shape)
        if n_in < 1 or n_out < 1:
            raise ConfigError(f"Dense: expected positive sizes, got {self.in_shape} and {self.out_shape}; e.g. 512, 10")
        if symmetric and n_in != n_out:
            raise ConfigError(
                f"Dense: expected equal sizes when symmetric, got {n_in} and {n_out}; set symmetric=False"
            )
        self.symmetric = symmetric
        std = 0.5 / math.sqrt(n_in) if scale is None else scale
        # symmetrising shrinks the off-diagonal deviation by sqrt(2); undo that
        std = std * math.sqrt(2) if symmetric else std
        self.weight = nn.Parameter(torch.randn(n_out, n_in, generator=generator) * std)

    def tensors(self) -> Tensors:
        return {"weight": self._effective("weight")}

    def symmetrised(self, weight: Tensor) -> Tensor:
        return _Symmetric.apply(weight) if self.symmetric else weight

    def rounded(self, t: Tensors) -> Tensors:
        # a thin matrix is done sooner than its states are cast
        return t if min(t["weight"].shape) < 64 else {**t, "weight": t["weight"].bfloat16()}

    def _t(self, t: Tensors | None) -> Tensor:
        return (self.tensors() if t is None else t)["weight"]

    def forward(self, u: Tensor, t: Tensors | None = None) -> Tensor:
        weight = self._t(t)
        if len(self.in_shape) > 1:
            u = u.flatten(1)
        out = F.linear(like(u, weight), weight).to(u.dtype)
        return out.unflatten(-1, self.out_shape) if len(self.out_shape) > 1 else out

    def adjoint(self, w: Tensor, t: Tensors | None = None) -> Tensor:
        weight = self._t(t)
        if len(self.out_shape) > 1:
            w = w.flatten(1)
        out = (like(w, weight) @ weight).to(w.dtype)
        return out.unflatten(-1, self.in_shape) if len(self.in_shape) > 1 else out

    def add(self, acc: Tensor | None, u: Tensor, t: Tensors) -> Tensor:
        weight = t["weight"]
        if acc is None or acc.dim() != 2 or u.dim() != 2:
            return super().add(acc, u, t)
        if weight.dtype == torch.bfloat16:
            return onto(acc, like(u, weight) @ weight.T, u.dtype)
        return torch.addmm(acc, u, weight.T)

    def add_adjoint(self, acc: Tensor | None, w: Tensor, t: Tensors) -> Tensor:
        weight = t["weight"]
        if acc is None or acc.dim() != 2 or w.dim() != 2:
            return super().add_adjoint(acc, w, t)
        if weight.dtype == torch.bfloat16:
            return onto(acc, like(w, weight) @ weight, w.dtype)
        return torch.addmm(acc, w, weight)

    def gradient(self, w: Tensor, u: Tensor, t: Tensors) -> Tensors:
        weight = t["weight"]
        n_out, n_in = weight.shape
        return {"weight": (like(w, weight).reshape(-1, n_out).T @ like(u, weight).reshape(-1, n_in)).to(w.dtype)}

    def extra_repr(self) -> str:
        return f"{self.in_shape} -> {self.out_shape}, symmetric={self.symmetric}"


class Resample(Operator):
    """Average over windows of ``factor`` along the last ``len(axes)`` axes (down), or its adjoint (up) on a pyramid.

    Args:
        in_shape: shape of one example's fine grid.
        factor: window size; every resampled axis must be divisible by it.
        dims: how many of the last axes are resampled.
    """

    def __init__(self, in_shape: Sequence[int], factor: int = 2, dims: int = 2) -> None:
        super().__init__()
        self.in_shape = tuple(in_shape)
        self.factor, self.dims = factor, dims
        if factor < 1 or dims < 1 or dims > len(self.in_shape):
            raise ConfigError(
                f"Resample: expected factor >= 1 and 1 <= dims <= {len(self.in_shape)}, got {factor}, {dims}; e.g. 2, 2"
            )
        head, tail = self.in_shape[: len(self.in_shape) - dims], self.in_shape[len(self.in_shape) - dims :]
        if any(s % factor for s in tail):
            raise ConfigError(f"Resample: expected sizes divisible by {factor}, got {tail}; pad the input")
        self.out_shape = (*head, *(s // factor for s in tail))

    def forward(self, u: Tensor, t: Tensors | None = None) -> Tensor:
        for axis in range(-self.dims, 0):
            u = u.unflatten(axis, (-1, self.factor)).mean(axis)
        return u

    def adjoint(self, w: Tensor, t: Tensors | None = None) -> Tensor:
        for axis in range(-self.dims, 0):
            w = w.repeat_interleave(self.factor, axis)
        return w / self.factor**self.dims


class Circulant(Operator):
    """Circular convolution along the last axis, in O(n log n) by FFT.

    Args:
        features: size n of the last axis.
        symmetric: use the even part of the kernel, so that the operator is its own adjoint.
        scale: standard deviation of the initial kernel; half of :math:`1/\\sqrt n` when None.
        generator: source of the initial kernel.
    """

    def __init__(
        self,
        features: int,
        symmetric: bool = False,
        scale: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.in_shape = self.out_shape = (features,)
        self.symmetric = symmetric
        std = 0.5 / math.sqrt(features) if scale is None else scale
        self.kernel = nn.Parameter(torch.randn(features, generator=generator) * std)

    def tensors(self) -> Tensors:
        return {"kernel": self._effective("kernel")}

    def symmetrised(self, weight: Tensor) -> Tensor:
        return (weight + weight.flip(0).roll(1)) / 2 if self.symmetric else weight

    def _convolve(self, u: Tensor, t: Tensors | None, conjugate: bool) -> Tensor:
        kernel = (self.tensors() if t is None else t)["kernel"]
        spectrum = torch.fft.fft(kernel)
        if conjugate:
            # the index-reversed kernel rather than conj(): the same for real kernels, and analytic for complex ones
            spectrum = torch.fft.fft(kernel.flip(-1).roll(1))
        out = torch.fft.ifft(torch.fft.fft(u) * spectrum)
        return out if u.is_complex() else out.real

    def forward(self, u: Tensor, t: Tensors | None = None) -> Tensor:
        return self._convolve(u, t, conjugate=False)

    def adjoint(self, w: Tensor, t: Tensors | None = None) -> Tensor:
        return self._convolve(w, t, conjugate=True)


class _Symmetric(torch.autograd.Function):
    """The symmetric part of a matrix; the projection is its own adjoint."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        # a contiguous transpose first: adding a strided one is three times as slow
        return torch.lerp(weight, weight.T.contiguous(), 0.5)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Symmetric.apply(grads[0])


def like(u: Tensor, weight: Tensor) -> Tensor:
    """``u`` as it is, or in bfloat16 if the weight has been rounded to that."""
    return u.to(torch.bfloat16) if weight.dtype == torch.bfloat16 else u


def onto(acc: Tensor | None, fresh: Tensor, dtype: torch.dtype) -> Tensor:
    """``acc + fresh`` in ``dtype``, written into the fresh tensor or its cast.

    A sum of two dtypes takes several times as long as a cast and a sum; and the fresh tensor has the memory format of
    a convolution, which an expanded bias has not.
    """
    fresh = fresh.to(dtype)
    if acc is None:
        return fresh
    return fresh.add_(acc) if acc.dtype == dtype else acc + fresh
