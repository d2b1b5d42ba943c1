"""Systems by name: creating, listing, and describing their options."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from toreq import estimators, solvers
from toreq.errors import ConfigError, nearest
from toreq.estimators import Estimator
from toreq.layer import equilibria
from toreq.options import check_types
from toreq.solvers import Solver
from toreq.systems import difftoreqprop_nets, htsep, mstep, tepssr_nets, tpeqprop_nets
from toreq.systems.base import System
from toreq.systems.toreqprop import ARCHITECTURES

_SYSTEMS: dict[str, dict[str, type[System]]] = {
    "toreqprop": ARCHITECTURES,
    "difftoreqprop": difftoreqprop_nets.ARCHITECTURES,
    "mstep": mstep.ARCHITECTURES,
    "tpeqprop": tpeqprop_nets.ARCHITECTURES,
    # the tagger and the causal one take a label for every token, which what goes through all systems does not give
    "tepssr": {"classifier": tepssr_nets.StateSpaceClassifier},
    "htsep": htsep.ARCHITECTURES,
}
"""System name -> architecture -> class; the first architecture is the default."""

SETTINGS = ("exact", "fast")


def names() -> list[str]:
    """Names that :func:`create` accepts."""
    return list(_SYSTEMS)


def architectures(name: str) -> list[str]:
    """The architectures of one system, the default first."""
    return list(_find(name))


def _find(name: str) -> dict[str, type[System]]:
    if name not in _SYSTEMS:
        raise ConfigError(f"systems.create: expected a system, got {name!r}; {nearest(name, names())}")
    return _SYSTEMS[name]


def _class(name: str, arch: str | None) -> type[System]:
    known = _find(name)
    arch = next(iter(known)) if arch is None else arch
    if not isinstance(arch, str) or arch not in known:
        raise ConfigError(f"systems.create: expected an arch of {name!r}, got {arch!r}; {nearest(str(arch), known)}")
    return known[arch]


def options(name: str, arch: str | None = None) -> dict[str, Any]:
    """All legal options of a system's architecture with their defaults (``arch`` among them).

    Args:
        name: a system's name.
        arch: the architecture; the default one when None.
    """
    parameters = inspect.signature(_class(name, arch)).parameters.values()
    arch = architectures(name)[0] if arch is None else arch
    return {"arch": arch, **{p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}}


def create(
    name: str,
    input_shape: Sequence[int],
    num_classes: int,
    solver: Solver | str | None = None,
    estimator: Estimator | str | None = None,
    settings: str = "exact",
    **chosen: Any,
) -> System:
    """A freshly initialised system, an ``nn.Module`` from ``(B, *input_shape)`` to logits ``(B, num_classes)``.

    Weights are drawn from torch's default generator: call ``torch.manual_seed`` before.

    Args:
        name: see :func:`names`.
        input_shape: shape of one example, e.g. ``(1, 28, 28)``.
        num_classes: number of classes.
        solver: overrides the shipped solver; an object, or a name of ``toreq.solvers.names()`` for its defaults.
        estimator: overrides the shipped estimator; an object, or a name of ``toreq.estimators.names()``.
        settings: ``"exact"`` leaves both as they are, ``"fast"`` loosens them by :meth:`toreq.Equilibrium.hasten`.
        chosen: options, see :func:`options`; ``arch`` picks the architecture.

    Raises:
        ConfigError: for an unknown name or option (with the nearest valid one), or values out of range.
    """
    arch = chosen.pop("arch", None)
    kind = _class(name, arch)
    legal = options(name, arch)
    for key in chosen:
        if key not in legal:
            raise ConfigError(
                f"systems.create: expected options of {name!r} arch={legal['arch']!r}, got {key!r}; "
                f"{nearest(key, legal)}"
            )
    where = f"systems.create({name!r})"
    annotations = {p.name: str(p.annotation) for p in inspect.signature(kind).parameters.values()}
    for key, value in chosen.items():
        if annotations[key] == "Sequence[int]" and isinstance(value, int) and not isinstance(value, bool):
            chosen[key] = (value,)
    check_types(where, chosen, annotations)
    check_types(where, {"input_shape": input_shape, "num_classes": num_classes}, annotations)
    for what, part, base in (("solver", solver, Solver), ("estimator", estimator, Estimator)):
        if not (part is None or isinstance(part, str | base)):
            example = "anderson" if base is Solver else "centered"
            raise ConfigError(f"{where}: expected a {what} object or its name, got {part!r}; e.g. {what}={example!r}")
    extra: dict[str, Any] = {
        "solver": solvers.create(solver) if isinstance(solver, str) else solver,
        "estimator": estimators.create(estimator) if isinstance(estimator, str) else estimator,
    }
    if settings not in SETTINGS:
        raise ConfigError(
            f"{where}: expected settings among {SETTINGS}, got {settings!r}; {nearest(str(settings), SETTINGS)}"
        )
    system = kind(tuple(input_shape), num_classes, **extra, **chosen)
    if settings == "fast":
        for layer in equilibria(system):
            layer.hasten()
    described = {k: list(v) if isinstance(v, tuple) else v for k, v in {**legal, **chosen}.items()}
    system.config = {
        "name": name,
        "input_shape": list(input_shape),
        "num_classes": num_classes,
        "solver": solver if isinstance(solver, str) else None,
        "estimator": estimator if isinstance(estimator, str) else None,
        "settings": settings,
        "options": described,
    }
    return system


def from_config(config: dict[str, Any]) -> System:
    """A system as described by another one's ``config`` (solver and estimator objects are not part of it)."""
    return create(
        config["name"],
        config["input_shape"],
        config["num_classes"],
        config.get("solver"),
        config.get("estimator"),
        config.get("settings", "exact"),
        **config["options"],
    )
