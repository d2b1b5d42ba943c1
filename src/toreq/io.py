"""Atomic writes: a reader sees the old file or the new one, also after a crash or on a full disk."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from toreq.errors import WriteError

_REMEDIES = {
    errno.ENOSPC: "free some space on that disk or choose another folder",
    errno.EDQUOT: "free some of your quota or choose another folder",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.EROFS: "choose a folder on a writable file system",
    errno.ENOTDIR: "choose a path whose parents are all folders",
    errno.EEXIST: "choose a path whose parents are all folders",
    errno.EISDIR: "choose a file name that is not a folder",
}


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path` that replaces it when the block ends without an error.

    For libraries that write files themselves (`matplotlib`). The temporary name keeps the suffix of `path`.
    Missing parent folders are created.

    Raises:
        WriteError: the disk is full, the folder is not writable, or the block raised another `OSError`.
    """
    target = Path(path)
    # Not mkstemp: that makes the file private, and a result is shared like any other file of its user.
    temporary = target.with_name(f".{target.stem}-{os.getpid()}-{secrets.token_hex(4)}{target.suffix}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _publish(temporary, target)
    except OSError as error:
        if isinstance(error, WriteError):
            raise
        raise _explain(target, error) from error
    finally:
        # Also on Ctrl-C: the half-written file must not stay behind.
        # A parent that is not a folder has no temporary file in it, and its error is the one above.
        with contextlib.suppress(OSError):
            temporary.unlink()


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace the content of `path` by `data` at once; on failure keeps the old file, raises `WriteError`."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace the content of `path` by `text` in UTF-8, as `atomic_write_bytes` does."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: str | os.PathLike[str], value: Any, *, indent: int | None = 2) -> None:
    """Replace the content of `path` by `value` as JSON; non-finite numbers become null.

    Raises:
        WriteError: the file could not be written; the old one is kept.
        TypeError: `value` holds something that JSON cannot represent; nothing is written.
    """
    text = json.dumps(_finite(value), indent=indent, allow_nan=False) + "\n"
    atomic_write_text(path, text)


def set_aside(file: Path, why: str) -> Path:
    """Rename a file to the first free ``NAME.WHY-N`` beside it and return that path."""
    number = 1
    while (kept := file.with_name(f"{file.name}.{why}-{number}")).exists():
        number += 1
    file.rename(kept)
    return kept


def _publish(temporary: Path, target: Path) -> None:
    _sync(temporary)
    os.replace(temporary, target)
    if os.name == "posix":
        _sync(target.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _explain(target: Path, error: OSError) -> WriteError:
    remedy = _REMEDIES.get(error.errno or 0, "check the path and the disk")
    kept = "; the previous file is unchanged" if target.is_file() else ""
    reason = error.strerror or str(error)
    return WriteError(f"atomic write: expected to write {target}, got '{reason}'; {remedy}{kept}")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return value
