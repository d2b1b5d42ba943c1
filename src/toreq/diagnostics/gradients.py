"""Are the gradients right: every estimator against the implicit gradient, and that against finite differences."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toreq import estimators
from toreq.diagnostics.memory import with_tolerance
from toreq.errors import ConfigError
from toreq.layer import equilibria

# Cosine asked of every supported estimator at its shipped beta, and the length error that a right direction may hide
# (a factor 1/2 has cosine 1).
MIN_COSINE = 0.999
MAX_RELATIVE_ERROR = 0.1
# Below this share of the largest parameter gradient a direction is rounding noise: the absolute error is judged.
NEGLIGIBLE = 1e-6
MAX_NEGLIGIBLE_ERROR = 1e-3
MAX_DIFFERENCE_ERROR = 1e-4

TIGHT_TOLERANCE = 1e-12
TIGHT_STEPS = 20_000

Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class GradientRow:
    """One estimator on one parameter against the reference.

    ``cosine`` in [-1, 1] and ``relative_error`` = ||g - r|| / ||r|| are None for a negligible reference (norm below
    1e-6 of the largest); ``absolute_error`` = ||g - r|| / (largest parameter's ||r||) is always there.
    """

    estimator: str
    parameter: str
    cosine: float | None
    relative_error: float | None
    absolute_error: float

    @property
    def negligible(self) -> bool:
        """Whether the reference gradient is too small for a direction."""
        return self.cosine is None

    @property
    def passed(self) -> bool:
        """Whether the row meets the bounds above; a gradient that is not finite does not."""
        if self.cosine is None or self.relative_error is None:
            return self.absolute_error <= MAX_NEGLIGIBLE_ERROR
        return self.cosine >= MIN_COSINE and self.relative_error <= MAX_RELATIVE_ERROR


@dataclass(frozen=True)
class DifferenceRow:
    """The largest relative error of a gradient against central finite differences, over ``directions`` of them."""

    estimator: str
    parameter: str
    directions: int
    relative_error: float


def gradients(net: nn.Module, x: Tensor, y: Tensor) -> Gradients:
    """Gradient of the net's criterion for every parameter that asks for one; what stood in ``.grad`` is put back."""
    parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
    held = {name: p.grad for name, p in parameters.items()}
    net.zero_grad(set_to_none=True)
    try:
        criterion(net)(net(x), y).backward()
        return {
            name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for name, p in parameters.items()
        }
    finally:
        for name, p in parameters.items():
            p.grad = held[name]


def criterion(net: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """The net's own loss, or cross entropy for a module that has none."""
    own: Any = getattr(net, "criterion", None)
    return own if callable(own) else nn.functional.cross_entropy  # type: ignore[no-any-return]


def with_estimator(net: nn.Module, estimator: Any) -> nn.Module:
    """A copy of the net whose equilibrium layers all use ``estimator``."""
    copied = copy.deepcopy(net)
    for layer in equilibria(copied):
        layer.estimator = estimator
    return copied


def tight_copy(net: nn.Module, tolerance: float = TIGHT_TOLERANCE) -> nn.Module:
    """A float64 copy that settles to ``tolerance`` and takes the implicit gradient to the same tolerance."""
    copied = copy.deepcopy(net).double()
    for layer in equilibria(copied):
        layer.solver = with_tolerance(layer.solver, TIGHT_STEPS, tolerance)
        layer.estimator = estimators.Implicit(tolerance=tolerance, max_steps=TIGHT_STEPS)
    return copied


def supported(net: nn.Module) -> list[tuple[str, Any]]:
    """The shipped estimators, by name, that every equilibrium layer of the net supports.

    Raises ConfigError for a module without an equilibrium layer.
    """
    layers = equilibria(net)
    if not layers:
        raise ConfigError(
            "supported: expected a module with an Equilibrium layer, got none; build one with toreq.systems.create"
        )
    shipped = estimators.all_for(layers[0].dynamics)
    return [pair for pair in shipped if all(pair[1].supports(layer.dynamics) for layer in layers)]


def unsupported(net: nn.Module) -> list[tuple[str, str]]:
    """Name and reason of every shipped estimator that the net's first equilibrium layer refuses."""
    dynamics = equilibria(net)[0].dynamics
    answers = ((name, estimators.create(name).supports(dynamics)) for name in estimators.names())
    return [(name, answer.reason) for name, answer in answers if not answer]


def compare(name: str, found: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> list[GradientRow]:
    """One row per parameter: ``found`` of the estimator ``name`` against ``reference``, in float64."""
    exact = {key: value.detach().double().flatten() for key, value in reference.items()}
    largest = max((float(value.norm()) for value in exact.values()), default=0.0)
    rows = []
    for key, target in exact.items():
        value = found[key].detach().double().flatten()
        length, error = float(target.norm()), float((value - target).norm())
        absolute = error / largest if largest > 0 else error
        if length <= NEGLIGIBLE * largest:
            rows.append(GradientRow(name, key, None, None, absolute))
            continue
        scale = float(value.norm()) * length
        # A gradient of exact zeros has no direction: cosine 0 says "not aligned" and fails.
        cosine = float(value @ target) / scale if scale > 0 else 0.0
        rows.append(GradientRow(name, key, cosine, error / length, absolute))
    return rows


def against_implicit(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    candidates: list[tuple[str, Any]] | None = None,
    reference: Gradients | None = None,
) -> Iterator[list[GradientRow]]:
    """For each estimator, as it is measured, its rows against the implicit gradient in float64 at 1e-12."""
    exact = gradients(tight_copy(net), as_double(x), y) if reference is None else reference
    for name, estimator in supported(net) if candidates is None else candidates:
        yield compare(name, gradients(with_estimator(net, estimator), x, y), exact)


def as_double(x: Tensor) -> Tensor:
    """Floating inputs in float64; symbols as they are."""
    return x.double() if x.is_floating_point() else x


def loss_value(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """The criterion, no gradient."""
    with torch.no_grad():
        return float(criterion(net)(net(x), y))


def directions(
    gradient: Tensor, count: int, coordinates: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, float]]:
    """Unit directions to differentiate along: the gradient's own, ``count`` random ones and its largest coordinates.

    The number beside each is the size that a derivative along it has when it is typical; errors are relative to it,
    so that a random direction, almost orthogonal to the gradient, does not ask for digits the difference lacks.
    """
    flat = gradient.flatten()
    length = float(flat.norm())
    if length > 0:
        yield gradient / length, length
    for _ in range(count):
        random = torch.randn(gradient.shape, generator=generator, dtype=gradient.dtype).to(gradient.device)
        yield random / random.norm(), length / math.sqrt(flat.numel())
    for index in flat.abs().topk(min(coordinates, flat.numel())).indices.tolist():
        one = torch.zeros_like(flat)
        one[index] = 1.0
        yield one.view_as(gradient), float(flat[index].abs())


def against_differences(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    found: Mapping[str, Gradients],
    *,
    random_directions: int = 2,
    coordinates: int = 2,
    step: float = 1e-5,
    seed: int = 0,
) -> Iterator[list[DifferenceRow]]:
    """For each parameter, as it is measured, one row per entry of ``found`` (estimator -> gradients).

    The derivative of the loss along a unit direction u is ``(C(p + s u) - C(p - s u)) / 2s`` of a float64 copy that
    settles to 1e-12, with ``s = step * max(1, ||p||)``. Parameters of negligible gradient are left out.
    """
    exact = tight_copy(net)
    x, inner = as_double(x), dict(exact.named_parameters())
    generator = torch.Generator().manual_seed(seed)
    guide = found["implicit"]
    largest = max(float(value.norm()) for value in guide.values())
    for name, reference in guide.items():
        if float(reference.norm()) <= NEGLIGIBLE * largest:
            continue
        worst = dict.fromkeys(found, 0.0)
        count = 0
        parameter = inner[name]
        start = parameter.detach().clone()
        size = step * max(1.0, float(start.norm()))
        for unit, typical in directions(reference.double(), random_directions, coordinates, generator):
            ends = []
            for sign in (1.0, -1.0):
                with torch.no_grad():
                    parameter.copy_(start + sign * size * unit)
                ends.append(loss_value(exact, x, y))
            slope = (ends[0] - ends[1]) / (2 * size)
            count += 1
            for estimator, values in found.items():
                predicted = float((values[name].double() * unit).sum())
                error = abs(predicted - slope) / max(abs(slope), typical)
                # max() would drop a NaN that comes second.
                worst[estimator] = error if not error <= worst[estimator] else worst[estimator]
        with torch.no_grad():
            parameter.copy_(start)
        yield [DifferenceRow(estimator, name, count, error) for estimator, error in worst.items()]
