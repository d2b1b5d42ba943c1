"""The SQLite file that a search is kept in."""

from __future__ import annotations

import sqlite3
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from toreq.errors import WriteError
from toreq.io import set_aside

_JOURNALS = ("-journal", "-wal", "-shm")


@contextmanager
def opened(optuna: Any, path: Path | None) -> Iterator[Any]:
    """A storage of Optuna in the file ``path``, or one in memory for None.

    A file that is no such storage is renamed to ``NAME.corrupt-N``, with a warning that names it, and never deleted.

    Raises:
        WriteError: the file cannot be made or written.
    """
    if path is None:
        yield optuna.storages.InMemoryStorage()
        return
    from sqlalchemy.engine import URL
    from sqlalchemy.exc import OperationalError

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"tune: expected to write {path}, got '{error.strerror}'; choose another folder") from error
    reason = _defect(path)
    if reason:
        _set_aside(path, reason)
    address = URL.create("sqlite", database=str(path.resolve())).render_as_string()
    backend = None
    try:
        backend = optuna.storages.RDBStorage(address)
        yield backend
    except (OperationalError, optuna.exceptions.StorageInternalError) as error:
        raise WriteError(
            f"tune: expected to write {path}, got '{error}'; free some space or choose another folder; the trials "
            "that ended are kept"
        ) from error
    finally:
        if backend is not None:
            backend.remove_session()
            backend.engine.dispose()


def _defect(path: Path) -> str:
    """What is wrong with a file that is there; empty when nothing is."""
    if not path.exists() or path.stat().st_size == 0:
        return ""
    try:
        with closing(sqlite3.connect(path)) as file:
            told = [row[0] for row in file.execute("PRAGMA quick_check")]
            tables = {row[0] for row in file.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except sqlite3.DatabaseError as error:
        return str(error)
    if told != ["ok"]:
        return str(told[0])
    if tables and not {"studies", "trials"} <= tables:
        return "a database of something else"
    return ""


def _set_aside(path: Path, reason: str) -> None:
    kept = set_aside(path, "corrupt")
    for ending in _JOURNALS:
        journal = path.with_name(path.name + ending)
        if journal.exists():
            # a new file must not be mended by the journal of the old one
            journal.rename(kept.with_name(kept.name + ending))
    warnings.warn(
        f"tune: expected a search in {path}, got something else ({reason}); it is kept as {kept.name}, and the search "
        "begins anew",
        stacklevel=4,
    )
