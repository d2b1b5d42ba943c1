"""Where data files are looked for, how they are fetched, and how their content is checked."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from toreq.errors import DataError


@dataclass(frozen=True)
class Source:
    """A file of the data folder and its official original.

    Attributes:
        path: place inside the data folder, with forward slashes.
        url: the original.
        download_hash: the published hash of the original as `pooch` writes it (`"md5:..."`), or None when
            none is published; the loaders then check the content.
    """

    path: str
    url: str
    download_hash: str | None


def data_folders(root: str | os.PathLike[str] | None = None) -> list[Path]:
    """Return the folders to look in: `root` alone if given, else `$TOREQ_DATA` and then the user's cache."""
    if root is not None:
        return [Path(root)]
    import pooch  # imported late: it brings requests, which the bundled data does not need

    folder = os.environ.get("TOREQ_DATA", "")
    return ([Path(folder)] if folder else []) + [Path(pooch.os_cache("toreq"))]


def find(path: str, root: str | os.PathLike[str] | None = None) -> Path | None:
    """Return the first existing file `path` in the data folders, or None."""
    return next((folder / path for folder in data_folders(root) if (folder / path).is_file()), None)


def find_or_fetch(source: Source, root: str | os.PathLike[str] | None = None) -> Path:
    """Return the local file of `source`, downloading it into the best data folder when it is nowhere.

    Raises:
        DataError: it is nowhere and cannot be fetched, with the remedy.
    """
    local = find(source.path, root)
    if local is not None:
        return local
    import pooch

    folders = data_folders(root)
    target = folders[0] / source.path
    try:
        pooch.retrieve(source.url, source.download_hash, fname=target.name, path=target.parent)
    # requests' errors are OSErrors; pooch reports a wrong hash as ValueError.
    except (OSError, ValueError) as error:
        looked = " or ".join(str(folder) for folder in folders)
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"toreq.data: expected {source.path} in {looked}, or to fetch it from {source.url}, got "
            f"'{reason[:300]}'; connect to the internet, or put the file there, or set TOREQ_DATA to a "
            "writable folder that holds it"
        ) from error
    return target


def check_content(data: bytes | memoryview, sha256: str, file: Path) -> None:
    """Raise `DataError` unless the SHA-256 of `data`, the content of `file`, is the one that is expected."""
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise DataError(
            f"toreq.data: expected content with SHA-256 {sha256[:16]}... in {file}, got {found[:16]}...; "
            "the file is damaged or another version: delete it and load again"
        )


def read_checked(file: Path, sha256: str) -> bytes:
    """Return the bytes of `file`; raises `DataError` when it cannot be read or its checksum is wrong."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(
            f"toreq.data: expected to read {file}, got '{error.strerror or error}'; check its permissions"
        ) from error
    check_content(data, sha256, file)
    return data
