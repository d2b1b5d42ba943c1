"""Image sets: the bundled MNIST, Fashion-MNIST and CIFAR-10."""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import itertools
import math
import os
import tarfile
import zlib
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from toreq.data.dataset import Dataset
from toreq.data.files import Source, check_content, find, find_or_fetch, read_checked
from toreq.errors import DataError

_IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)

# SHA-256 of the uncompressed files, so that any gzip of the originals is accepted.
MNIST_SHA256: dict[str, str] = dict(
    zip(
        _IDX_FILES,
        (
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
        strict=True,
    )
)
FASHION_SHA256: dict[str, str] = dict(
    zip(
        _IDX_FILES,
        (
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
        strict=True,
    )
)
# MD5 of the gzipped originals, as published by Zalando Research.
_FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
_FASHION_MD5: dict[str, str] = dict(
    zip(
        _IDX_FILES,
        (
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "25c81989df183df01b3e8a0aad5dffbe",
            "bef4ecab320f06d8554ea6380940ec79",
            "bb300cfdad3c16e7a12a480ee83cd310",
        ),
        strict=True,
    )
)
# The binary version rather than the Python one: the same pixels in fixed records, and nothing to unpickle.
CIFAR10_ARCHIVE = Source(
    "cifar10/cifar-10-binary.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    "md5:c32a1d4ab5d03f1284b67883e8d87530",
)
CIFAR10_SHA256 = {
    "train_jpeg.npz": "19ab0e5e033aa2798cad1b770d779bdb3218f49d32b83c041c79abbc5e9c2809",
    "test_jpeg.npz": "b097f7c20a3c74ddb4ae15e800cfa20d36672798b5c46067a56e9d2d8bb9654f",
    "train_first4000_lossless.npz": "fb13f43f973a70a8ac3852154b7a9234b66b7b9ed68037003c4af1f6d8438960",
}
_CIFAR10_LICENCE = "no licence stated; cite A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009"


def load_mnist(root: str | os.PathLike[str] | None = None) -> Dataset:
    """Return MNIST from the files inside the package; `root` is not needed and not used."""
    del root
    return _from_idx("mnist", _bundled, "CC BY-SA 3.0, copyright Yann LeCun and Corinna Cortes")


# Kept, 55 MB: unpacking takes longer than many a short run, and a worker or a tuner makes many runs. Every load copies
# the bytes, so that data sets share nothing.
@functools.lru_cache(maxsize=len(_IDX_FILES))
def _bundled(name: str) -> tuple[bytes, Path]:
    file = resources.files("toreq.data") / "mnist" / f"{name}.gz"
    return _unpacked(file.read_bytes(), Path(str(file)), MNIST_SHA256[name])


def load_fashion_mnist(root: str | os.PathLike[str] | None = None) -> Dataset:
    """Return Fashion-MNIST (Xiao et al. 2017) from the data folder or its original."""

    def read(name: str) -> tuple[bytes, Path]:
        source = Source(f"fashion_mnist/{name}.gz", f"{_FASHION_URL}{name}.gz", f"md5:{_FASHION_MD5[name]}")
        file = find_or_fetch(source, root)
        return _unpacked(file.read_bytes(), file, FASHION_SHA256[name])

    return _from_idx("fashion_mnist", read, "MIT, copyright 2017 Zalando SE")


def load_cifar10(root: str | os.PathLike[str] | None = None) -> Dataset:
    """Return CIFAR-10: the original if present, else a JPEG-recompressed copy if present, else a download.

    `variant` says which: `"cifar10"` or `"cifar10-jpeg-recompressed"`. Accuracies on the second are not
    comparable with published ones.
    """
    archive = find(CIFAR10_ARCHIVE.path, root)
    jpeg = [find(f"cifar10/{split}_jpeg.npz", root) for split in ("train", "test")]
    if archive is None and jpeg[0] is not None and jpeg[1] is not None:
        (train_x, train_y), (test_x, test_y) = (_decode_jpegs(file) for file in jpeg if file is not None)
        variant = "cifar10-jpeg-recompressed"
    else:
        train_x, train_y, test_x, test_y = _read_archive(find_or_fetch(CIFAR10_ARCHIVE, root))
        variant = "cifar10"
    return Dataset("cifar10", variant, train_x, train_y, test_x, test_y, 10, (3, 32, 32), _CIFAR10_LICENCE)


def load_cifar10_lossless(root: str | os.PathLike[str] | None = None) -> Dataset:
    """Return the first 4,000 training images of CIFAR-10, original pixels: 3,200 to train on, 800 to test.

    Raises:
        DataError: the data folder does not hold them; they have no download of their own.
    """
    file = find("cifar10/train_first4000_lossless.npz", root)
    if file is None:
        raise DataError(
            "toreq.data: expected cifar10/train_first4000_lossless.npz in the data folder, got no such file; "
            "set TOREQ_DATA to a folder that holds it, or load 'cifar10'"
        )
    with np.load(io.BytesIO(read_checked(file, CIFAR10_SHA256[file.name]))) as arrays:
        x = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2).contiguous()
        y = torch.from_numpy(arrays["labels"].astype(np.int64))
    cut = len(x) * 4 // 5
    return Dataset(
        "cifar10-lossless-4000",
        "cifar10-lossless-first-4000-of-train",
        x[:cut],
        y[:cut],
        x[cut:],
        y[cut:],
        10,
        (3, 32, 32),
        _CIFAR10_LICENCE,
    )


def read_idx(data: bytes, where: str) -> Tensor:
    """Return the uint8 array of an IDX file; raises `DataError` when header and length disagree."""
    dimensions = data[3] if len(data) >= 4 and data[:3] == b"\0\0\x08" else 0
    header = 4 + 4 * dimensions
    complete = dimensions > 0 and len(data) >= header
    shape = tuple(int(n) for n in np.frombuffer(data[4:header], dtype=">u4")) if complete else ()
    if not complete or len(data) - header != math.prod(shape):
        raise DataError(
            f"read_idx: expected a complete uint8 IDX file, got {len(data)} bytes starting with {data[:4]!r} "
            f"in {where}; delete the file and load again"
        )
    # bytearray: torch wants memory that it may write to
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=header).reshape(shape)


def _unpacked(packed: bytes, file: Path, sha256: str) -> tuple[bytes, Path]:
    try:
        data = gzip.decompress(packed)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"toreq.data: expected a complete gzip file {file}, got '{error}'; delete it and load again"
        ) from error
    check_content(data, sha256, file)
    return data, file


def _from_idx(name: str, read: Callable[[str], tuple[bytes, Path]], licence: str) -> Dataset:
    tensors = []
    for entry in _IDX_FILES:
        data, file = read(entry)
        tensors.append(read_idx(data, str(file)))
    train_x, train_y, test_x, test_y = tensors
    return Dataset(
        name,
        name,
        train_x.unsqueeze(1),
        train_y.long(),
        test_x.unsqueeze(1),
        test_y.long(),
        10,
        (1, *train_x.shape[1:]),
        licence,
    )


def _decode_jpegs(file: Path) -> tuple[Tensor, Tensor]:
    from PIL import Image

    with np.load(io.BytesIO(read_checked(file, CIFAR10_SHA256[file.name]))) as arrays:
        stream, offsets, labels = arrays["jpeg"].tobytes(), arrays["offsets"].tolist(), arrays["labels"]
    pixels = np.empty((len(labels), 32, 32, 3), dtype=np.uint8)
    for row, (start, stop) in enumerate(itertools.pairwise(offsets)):
        pixels[row] = np.asarray(Image.open(io.BytesIO(stream[start:stop]), formats=("JPEG",)))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels.astype(np.int64))


def _read_archive(file: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    packed = file.read_bytes()
    assert CIFAR10_ARCHIVE.download_hash is not None
    expected = CIFAR10_ARCHIVE.download_hash.removeprefix("md5:")
    found = hashlib.md5(packed, usedforsecurity=False).hexdigest()
    if found != expected:
        raise DataError(f"toreq.data: expected {file} with MD5 {expected}, got {found}; delete it and load again")
    batches: dict[str, np.ndarray] = {}
    with tarfile.open(fileobj=io.BytesIO(packed), mode="r:gz") as archive:
        # Read in memory, never extracted: member names of an archive cannot point anywhere then.
        for member in archive:
            if member.name.endswith(".bin") and (content := archive.extractfile(member)) is not None:
                records = np.frombuffer(content.read(), dtype=np.uint8).reshape(-1, 1 + 3 * 32 * 32)
                batches[Path(member.name).stem] = records
    train = np.concatenate([batches[f"data_batch_{number}"] for number in range(1, 6)])
    return (*_split_records(train), *_split_records(batches["test_batch"]))


def _split_records(records: np.ndarray) -> tuple[Tensor, Tensor]:
    x = torch.from_numpy(records[:, 1:].copy()).reshape(-1, 3, 32, 32)
    return x, torch.from_numpy(records[:, 0].astype(np.int64))
