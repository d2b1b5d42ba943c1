"""The optional packages of the control protocol."""

from __future__ import annotations

import importlib
import importlib.metadata

from toreq.errors import ConfigError

PACKAGES = {"gymnasium": "gymnasium", "mujoco": "mujoco", "stable_baselines3": "stable-baselines3"}
"""Module -> distribution."""


def require() -> None:
    """Make sure that the packages of the extra ``rl`` are there.

    Raises:
        ConfigError: for the first one that is missing, with the command that installs it.
    """
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise  # it is there, but something that it needs is not: that name helps more
            raise ConfigError(
                f"control: expected the package {name}, got none; install it with pip install 'toreq[rl]'"
            ) from error


def versions() -> dict[str, str]:
    """The versions of these packages.

    Raises:
        ConfigError: for one that is missing.
    """
    require()
    return {name: importlib.metadata.version(name) for name in PACKAGES.values()}
