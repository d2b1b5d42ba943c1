"""Norm control of an operator as a parametrization, so that any optimizer keeps the bound."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from toreq.core.operators import Operator
from toreq.errors import ConfigError


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

    The norm is estimated by power iteration warm-started from the last call (in training mode only, so that evaluation
    does not change the module); the estimate is differentiable in W. A bound on each weight does not bound the
    relaxation Jacobian of several couplings together: watch its radius too
    (:func:`toreq.core.spectral.relaxation_radius`).

    Args:
        operator: the operator whose weight is controlled; linear in that weight.
        weight: its present value.
        name: the tensor's name.
        bound: c, above 0.
        iterations: power iterations per training step.
    """

    vector: Tensor

    def __init__(self, operator: Operator, weight: Tensor, name: str, bound: float, iterations: int = 2) -> None:
        super().__init__()
        if not bound > 0:
            raise ConfigError(f"NormControl: expected bound > 0, got {bound}; use for example 0.9")
        self._operator = (operator,)  # in a tuple: the operator owns this module, not the other way round
        self.name, self.bound, self.iterations = name, bound, iterations
        start = torch.randn(1, *operator.in_shape, generator=torch.Generator().manual_seed(0))
        self.register_buffer("vector", start.to(weight))
        with torch.no_grad():
            self._iterate(self._tensors(weight.detach()), 30)

    def _tensors(self, weight: Tensor) -> dict[str, Tensor]:
        return {self.name: self._operator[0].symmetrised(weight)}

    def _iterate(self, t: dict[str, Tensor], times: int) -> None:
        op, v = self._operator[0], self.vector
        for _ in range(times):
            v = op.adjoint(op.forward(v, t), t)
            v = v / v.norm().clamp_min(torch.finfo(v.dtype).tiny)
        self.vector.copy_(v)

    def forward(self, weight: Tensor) -> Tensor:
        t = self._tensors(weight)
        if self.training:
            with torch.no_grad():
                self._iterate({k: v.detach() for k, v in t.items()}, self.iterations)
        sigma = self._operator[0].forward(self.vector.clone(), t).norm()
        return weight * (self.bound / sigma.clamp_min(self.bound))


def control_norm(module: nn.Module, bound: float, name: str = "weight", iterations: int = 2) -> None:
    """Register :class:`NormControl` on an operator's weight, or on a matrix of any other module.

    Args:
        module: a :class:`~toreq.core.operators.Dense`, :class:`~toreq.core.operators.Conv` or
            :class:`~toreq.core.operators.Circulant` operator, or a module with a 2-d parameter of that name.
        bound: largest operator norm allowed, above 0.
        name: the parameter to control.
        iterations: power iterations per training step.

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
