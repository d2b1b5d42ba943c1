"""The data sets by name."""

from __future__ import annotations

import os
from collections.abc import Callable

from toreq.data.audio import load_fsdd
from toreq.data.dataset import Dataset
from toreq.data.images import load_cifar10, load_cifar10_lossless, load_fashion_mnist, load_mnist
from toreq.data.text import load_tinyshakespeare
from toreq.errors import ConfigError, nearest

_LOADERS: dict[str, Callable[[str | os.PathLike[str] | None], Dataset]] = {
    "mnist": load_mnist,
    "fashion_mnist": load_fashion_mnist,
    "cifar10": load_cifar10,
    "cifar10-lossless-4000": load_cifar10_lossless,
    "fsdd": load_fsdd,
    "tinyshakespeare": load_tinyshakespeare,
}


def names() -> list[str]:
    """Return the names that `load` knows."""
    return list(_LOADERS)


def load(name: str, *, root: str | os.PathLike[str] | None = None) -> Dataset:
    """Return a data set by name; `"mnist"` is inside the package, the others are looked for and else fetched.

    Args:
        name: one of `names()`.
        root: the data folder; by default `$TOREQ_DATA`, then the user's cache. Downloads go to the first.

    Raises:
        ConfigError: unknown name.
        DataError: the files are nowhere and cannot be fetched, or their content is not the published one.
    """
    if name not in _LOADERS:
        raise ConfigError(f"toreq.data.load: expected the name of a data set, got {name!r}; {nearest(name, names())}")
    return _LOADERS[name](root)
