"""Norm control of an operator as a parametrization, so that any optimizer keeps the bound."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from toreq.core.operators import Dense, Operator
from toreq.errors import ConfigError

_DIRECTIONS = 8


class _Matrix(Operator):
    """A bare matrix parameter of any module, seen as an operator."""

    def __init__(self, name: str, shape: torch.Size) -> None:
        super().__init__()
        self.name, self.in_shape, self.out_shape = name, (shape[1],), (shape[0],)

    def forward(self, u: Tensor, t: dict[str, Tensor] | None = None) -> Tensor:
        assert t is not None
        return u @ t[self.name].T

    def adjoint(self, w: Tensor, t: dict[str, Tensor] | None = None) -> Tensor:
        assert t is not None
        return w @ t[self.name]


class NormControl(nn.Module):
    r"""Scale a weight so that its operator's norm stays below a bound: :math:`W \mapsto W\min(1, c/\|A_W\|)`.

    The norm is estimated by subspace iteration on a few directions, warm-started from the last call (in training mode
    only, so that evaluation does not change the module); one direction alone would lag whenever another overtakes it.
    The estimate is differentiable in W. A bound on each weight does not bound the relaxation Jacobian of several
    couplings together: watch its radius too (:func:`toreq.core.spectral.relaxation_radius`).

    Args:
        operator: the operator whose weight is controlled; linear in that weight.
        weight: its present value.
        name: the tensor's name.
        bound: c, above 0.
        iterations: subspace iterations per training step.
    """

    symmetrises = True
    basis: Tensor
    vector: Tensor

    def __init__(self, operator: Operator, weight: Tensor, name: str, bound: float, iterations: int = 1) -> None:
        super().__init__()
        if not bound > 0:
            raise ConfigError(f"NormControl: expected bound > 0, got {bound}; use for example 0.9")
        self._operator = (operator,)  # in a tuple: the operator owns this module, not the other way round
        self.name, self.bound, self.iterations = name, bound, iterations
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(min(_DIRECTIONS, math.prod(operator.in_shape)), *operator.in_shape, generator=generator)
        self.register_buffer("basis", start.to(weight))
        self.register_buffer("vector", start[:1].to(weight))
        self.renew(weight)

    def _tensors(self, weight: Tensor) -> dict[str, Tensor]:
        return {self.name: self._operator[0].symmetrised(weight)}

    def _iterate(self, t: dict[str, Tensor], times: int) -> None:
        op, v = self._operator[0], self.basis
        if isinstance(op, Dense | _Matrix) and t[self.name].shape[0] <= 2 * _DIRECTIONS:
            # few rows: their Gram matrix is small, and its eigenvectors are exact and cheaper
            weight = t[self.name]
            _, mixing = torch.linalg.eigh(weight @ weight.T)
            best = mixing[:, -1] @ weight
            self.vector.copy_((best / best.norm().clamp_min(torch.finfo(best.dtype).tiny)).reshape(self.vector.shape))
            return
        for _ in range(times):
            z = op.adjoint(op.forward(v, t), t).flatten(1)
            v = torch.linalg.qr(z.T)[0].T.reshape(self.basis.shape).contiguous()
        # the best direction inside the subspace (Rayleigh-Ritz)
        image = op.forward(v, t).flatten(1)
        _, mixing = torch.linalg.eigh(image @ image.T)
        self.basis.copy_(v)
        self.vector.copy_((mixing[:, -1] @ v.flatten(1)).reshape(self.vector.shape))

    @torch.no_grad()
    def renew(self, weight: Tensor) -> None:
        """Find the norm's direction anew, after the weight has been written over."""
        self._iterate(self._tensors(weight.detach()), 30)

    def forward(self, weight: Tensor) -> Tensor:
        t = self._tensors(weight)
        if self.training:
            with torch.no_grad():
                self._iterate({k: v.detach() for k, v in t.items()}, self.iterations)
        sigma = self._operator[0].forward(self.vector.clone(), t).norm()
        return t[self.name] * (self.bound / sigma.clamp_min(self.bound))


def control_norm(module: nn.Module, bound: float, name: str = "weight", iterations: int = 1) -> None:
    """Register :class:`NormControl` on an operator's weight, or on a matrix of any other module.

    Args:
        module: a :class:`~toreq.core.operators.Dense`, :class:`~toreq.core.operators.Conv` or
            :class:`~toreq.core.operators.Circulant` operator, or a module with a 2-d parameter of that name.
        bound: largest operator norm allowed, above 0.
        name: the parameter to control.
        iterations: subspace iterations per training step.

    Raises:
        ConfigError: if the bound is not positive or the module has no such parameter.
    """
    weight = getattr(module, name, None)
    if not isinstance(weight, nn.Parameter) or not (isinstance(module, Operator) or weight.dim() == 2):
        raise ConfigError(
            f"control_norm: expected an operator, or a module with a matrix parameter {name!r}, got "
            f"{type(module).__name__} with {[n for n, _ in module.named_parameters(recurse=False)]}; name one of these"
        )
    operator = module if isinstance(module, Operator) else _Matrix(name, weight.shape)
    parametrize.register_parametrization(module, name, NormControl(operator, weight, name, bound, iterations))


@torch.no_grad()
def write_weight(module: nn.Module, value: Tensor, name: str = "weight") -> None:
    """Write over a weight in place, be its norm controlled or not.

    Args:
        module: whose weight.
        value: of the weight's shape.
        name: of the parameter.

    Raises:
        ConfigError: where the norm of ``value`` is above the bound on it.
    """
    if not parametrize.is_parametrized(module, name):
        getattr(module, name).copy_(value)
        return
    lists: Any = module.parametrizations
    held = lists[name]
    held.original.copy_(value)
    for part in held:
        if isinstance(part, NormControl):
            part.renew(value)
    if not torch.allclose(getattr(module, name), value.to(held.original)):
        bound = min(part.bound for part in held)
        raise ConfigError(
            f"write_weight: expected a {name} with a norm below {bound:.3g}, got more; scale what it is made of, or "
            "leave the norm free"
        )
