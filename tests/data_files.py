"""Tiny files in the layouts of the data folder, for tests that must not need the real sets."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import wave
from pathlib import Path

import numpy as np
from PIL import Image

IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes()
    return header + array.astype(np.uint8).tobytes()


def write_idx_set(folder: Path, train: int = 20, test: int = 10) -> dict[str, str]:
    """Write a Fashion-MNIST-like set of 28 x 28 images; return the SHA-256 of the uncompressed files."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    hashes = {}
    arrays = []
    for count in (train, test):
        arrays += [random.integers(0, 256, (count, 28, 28)), np.arange(count) % 10]
    for name, array in zip(IDX_FILES, arrays, strict=True):
        data = idx(array)
        (folder / f"{name}.gz").write_bytes(gzip.compress(data, mtime=0))
        hashes[name] = sha256(data)
    return hashes


def write_cifar_jpegs(folder: Path, train: int = 20, test: int = 10) -> dict[str, str]:
    """Write train_jpeg.npz and test_jpeg.npz with images of one grey level each, 10 i; return their SHA-256."""
    folder.mkdir(parents=True, exist_ok=True)
    hashes = {}
    for split, count in (("train", train), ("test", test)):
        streams = []
        for row in range(count):
            buffer = io.BytesIO()
            Image.new("RGB", (32, 32), (10 * row, 10 * row, 10 * row)).save(buffer, format="JPEG")
            streams.append(buffer.getvalue())
        file = folder / f"{split}_jpeg.npz"
        np.savez(
            file,
            jpeg=np.frombuffer(b"".join(streams), dtype=np.uint8),
            offsets=np.cumsum([0, *map(len, streams)], dtype=np.int64),
            labels=(np.arange(count) % 10).astype(np.uint8),
        )
        hashes[file.name] = sha256(file.read_bytes())
    return hashes


def cifar_archive(rows: int = 4) -> bytes:
    """Return a CIFAR-10 binary archive with `rows` records in each of the six batches; pixel value = label."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for number, name in enumerate([*(f"data_batch_{n}" for n in (3, 1, 2, 5, 4)), "test_batch"]):
            labels = (np.arange(rows) + number) % 10
            records = np.repeat(labels[:, None], 1 + 3072, axis=1).astype(np.uint8)
            _add(archive, f"cifar-10-batches-bin/{name}.bin", records.tobytes())
        _add(archive, "cifar-10-batches-bin/readme.html", b"not a batch")
    return buffer.getvalue()


def recordings(digits: int = 2, takes: int = 6) -> list[tuple[int, int, int, np.ndarray]]:
    """Return (digit, speaker, take, int16 samples) sorted as in the packed set; tones of different lengths."""
    rows = []
    for digit in range(digits):
        for speaker in range(len(SPEAKERS)):
            for take in range(takes):
                time = np.arange(1000 + 100 * take + 10 * speaker)
                tone = np.sin(2 * np.pi * (500 + 1000 * digit) * time / 8000)
                rows.append((digit, speaker, take, (12000 * tone).astype(np.int16)))
    return rows


def fsdd_arrays(rows: list[tuple[int, int, int, np.ndarray]]) -> dict[str, np.ndarray]:
    return {
        "audio": np.concatenate([row[3] for row in rows]),
        "offsets": np.cumsum([0, *(len(row[3]) for row in rows)], dtype=np.int64),
        "labels": np.array([row[0] for row in rows], dtype=np.uint8),
        "speakers": np.array([row[1] for row in rows], dtype=np.uint8),
        "takes": np.array([row[2] for row in rows], dtype=np.uint8),
    }


def fsdd_archive(rows: list[tuple[int, int, int, np.ndarray]], top: str) -> bytes:
    """Return the recordings as a GitHub archive of wav files, in an order that needs sorting."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for digit, speaker, take, samples in reversed(rows):
            sound = io.BytesIO()
            with wave.open(sound, "wb") as out:
                out.setnchannels(1)
                out.setsampwidth(2)
                out.setframerate(8000)
                out.writeframes(samples.astype("<i2").tobytes())
            _add(archive, f"{top}/recordings/{digit}_{SPEAKERS[speaker]}_{take}.wav", sound.getvalue())
        _add(archive, f"{top}/README.md", b"text")
    return buffer.getvalue()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))
