"""The data sets, and the tasks on sequences, by name."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from toreq.data.algorithmic import adding_task, copy_task, maze_task, parity_task, sort_task
from toreq.data.audio import load_fsdd
from toreq.data.dataset import Dataset
from toreq.data.images import load_cifar10, load_cifar10_lossless, load_fashion_mnist, load_mnist
from toreq.data.listops import SMALL, listops
from toreq.data.sequences import SequenceTask, sequential_cifar10, sequential_mnist, tiny_shakespeare
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
_TASKS: dict[str, Callable[..., SequenceTask]] = {
    "copy": copy_task,
    "adding": adding_task,
    "parity": parity_task,
    "parity-whole": partial(parity_task, running=False),
    "sort": sort_task,
    "maze": maze_task,
    "maze-reach": partial(maze_task, path=False),
    "listops": listops,
    "listops-small": partial(listops, grammar=SMALL, name="listops-small"),
    "mnist-pixels": sequential_mnist,
    "mnist-rows": partial(sequential_mnist, chunk=28),
    "mnist-permuted": partial(sequential_mnist, permuted=True),
    "cifar10-pixels": sequential_cifar10,
    "cifar10-rows": partial(sequential_cifar10, chunk=32),
    "text": tiny_shakespeare,
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


def sequence_task_names() -> list[str]:
    """Return the names that `sequence_task` knows."""
    return list(_TASKS)


def sequence_task(name: str, **options: Any) -> SequenceTask:
    """Return a task on sequences by name; the same for the same options.

    Args:
        name: one of `sequence_task_names()`.
        options: of the function behind it: `train` and `test` sizes for all, `seed`, `length` or `root` for some.

    Raises:
        ConfigError: unknown name, or an option that the task has not.
        DataError: its files are nowhere and cannot be fetched, or sizes that it cannot give.
    """
    if name not in _TASKS:
        raise ConfigError(
            f"toreq.data.sequence_task: expected the name of a task, got {name!r}; "
            f"{nearest(name, sequence_task_names())}"
        )
    known = inspect.signature(_TASKS[name]).parameters
    for option in options:
        if option not in known:
            raise ConfigError(
                f"toreq.data.sequence_task: expected options of {name!r}, got {option!r}; {nearest(option, known)}"
            )
    return _TASKS[name](**options)
