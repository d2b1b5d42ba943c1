"""The SQLite file that a search is kept in."""

from __future__ import annotations

import sqlite3
import sys
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from toreq.errors import WriteError
from toreq.io import set_aside
from toreq.tuning.tuned import TuneError

_JOURNALS = ("-journal", "-wal", "-shm")


@contextmanager
def opened(optuna: Any, path: Path | None) -> Iterator[Any]:
    """A storage of Optuna in the file ``path``, or one in memory for None.

    A file that is no such storage is renamed to ``NAME.corrupt-N``, with a warning that names it, and never deleted.

    Raises:
        WriteError: the file cannot be made or written.
        TuneError: another process has it open.
    """
    if path is None:
        yield optuna.storages.InMemoryStorage()
        return
    with _alone(path):
        reason = _defect(path)
        if reason:
            _set_aside(path, reason)
        with _database(optuna, path) as backend:
            yield backend


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Refuse a second process, which would take this one's running trial for one that was cut off."""
    lock = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    except OSError as error:
        raise WriteError(f"tune: expected to write {path}, got '{error.strerror}'; choose another folder") from error
    with file:
        if sys.platform != "win32":
            import fcntl

            try:
                # given back when the file is closed, also by a kill
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise TuneError(
                    f"tune: expected {path} for this process alone, got another one that searches there; wait for it, "
                    "or write to another place"
                ) from error
        yield


@contextmanager
def _database(optuna: Any, path: Path) -> Iterator[Any]:
    from sqlalchemy.engine import URL
    from sqlalchemy.exc import OperationalError

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
        stacklevel=6,
    )
