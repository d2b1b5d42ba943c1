"""The Free Spoken Digit Dataset: raw waveforms of different lengths, and log-spectrogram images of them."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import wave
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from toreq.data.dataset import Dataset
from toreq.data.files import Source, find, find_or_fetch
from toreq.errors import DataError

_COMMIT = "26eb9aaf76e81b692f806f9140c2d2777410d7a1"
# GitHub builds archives on request and promises no hash for them; the samples themselves are checked instead.
FSDD_ARCHIVE = Source(
    f"fsdd/free-spoken-digit-dataset-{_COMMIT}.tar.gz",
    f"https://github.com/Jakobovski/free-spoken-digit-dataset/archive/{_COMMIT}.tar.gz",
    None,
)
FSDD_SHA256 = {
    "audio": "801bcecb25fa3bfb54fb3c0b1d94732d8456ce5b0c1f036667852a341a3aacd4",
    "offsets": "95c7ee1b78f21637fe1836733adae7137ad5652a44718ae606b8c27e27a9e868",
    "labels": "46344ee0505619dd08f4b2617071eafbbb449fb88baad2ad34d003e40bd6613f",
    "speakers": "583e267be7000d95a5ae37c81b6e9ad36e408e08b453ad36ba0b0b3ab70756be",
    "takes": "57841e77a40daa1bf2f2f6cdca0c6d701586ac9f8507fb9299aaf9d6fb691131",
}
_SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
_RATE = 8000
_FRAME, _HOP = 256, 128
# 63 hops, that is 64 centred frames, of about a second; a handful of recordings is longer.
_CLIP = 63 * _HOP
_LICENCE = "CC BY-SA 4.0, the Free Spoken Digit Dataset and its contributors"


@dataclass(frozen=True)
class Recordings:
    """Recordings of different lengths, one after the other in one tensor.

    Attributes:
        audio: int16 (samples,), all recordings.
        offsets: int64 (N + 1,); recording i is `audio[offsets[i]:offsets[i + 1]]`.
        labels, speakers, takes: int64 (N,).
        speaker_names: the names that `speakers` indexes.
        sample_rate: in Hz.
    """

    audio: Tensor
    offsets: Tensor
    labels: Tensor
    speakers: Tensor
    takes: Tensor
    speaker_names: tuple[str, ...]
    sample_rate: int

    def __len__(self) -> int:
        """Return the number of recordings."""
        return len(self.labels)

    def waveform(self, index: int) -> Tensor:
        """Return one recording as float32 (samples,) in [-1, 1)."""
        start, stop = self.offsets[index : index + 2].tolist()
        return self.audio[start:stop].float() / 32768

    def padded(self, index: Tensor, length: int) -> Tensor:
        """Return recordings as float32 (len(index), length) in [-1, 1), cut or padded with silence."""
        out = torch.zeros(len(index), length)
        for row, recording in enumerate(index.tolist()):
            samples = self.waveform(recording)[:length]
            out[row, : len(samples)] = samples
        return out

    def official_split(self) -> tuple[Tensor, Tensor]:
        """Return the indices (train, test); takes 0 to 4 of each speaker and digit are the test set."""
        test = self.takes < 5
        return (~test).nonzero().flatten(), test.nonzero().flatten()


def log_spectrogram(waveform: Tensor, frame: int = _FRAME, hop: int = _HOP, floor: float = 80.0) -> Tensor:
    """Return the log power spectrogram of (..., samples) as (..., frame // 2 + 1, 1 + samples // hop).

    Hann window, centred frames; decibels below the loudest bin of each waveform, cut at `floor` and scaled to
    [0, 1], so that loudness drops out and silence is 0.
    """
    window = torch.hann_window(frame, dtype=waveform.dtype, device=waveform.device)
    flat = waveform.reshape(-1, waveform.shape[-1])
    power = torch.stft(flat, frame, hop, window=window, return_complex=True, pad_mode="constant").abs().square()
    level = 10 * torch.log10(power + 1e-12)
    top = level.amax((-2, -1), keepdim=True)
    # An all-silent waveform has nothing above the epsilon and stays at 0.
    scaled = ((level - top + floor) / floor).clamp(0, 1) * (power.amax((-2, -1), keepdim=True) > 0)
    return scaled.reshape(*waveform.shape[:-1], *scaled.shape[-2:])


def load_recordings(root: str | os.PathLike[str] | None = None) -> Recordings:
    """Return the 3,000 recordings of the Free Spoken Digit Dataset, sorted by digit, speaker and take."""
    packed = find("fsdd/fsdd.npz", root)
    file = packed if packed is not None else find_or_fetch(FSDD_ARCHIVE, root)
    arrays = _read_npz(file) if packed is not None else _read_archive(file)
    for name, sha256 in FSDD_SHA256.items():
        if hashlib.sha256(arrays[name].tobytes()).hexdigest() != sha256:
            raise DataError(
                f"toreq.data: expected the published samples in {file}, got other '{name}'; the file is "
                "damaged or another version: delete it and load again"
            )
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Recordings(
        tensors["audio"],
        tensors["offsets"],
        tensors["labels"].long(),
        tensors["speakers"].long(),
        tensors["takes"].long(),
        _SPEAKERS,
        _RATE,
    )


def load_fsdd(root: str | os.PathLike[str] | None = None) -> Dataset:
    """Return spoken digits as 64 x 64 log-spectrogram images, official split: 2,700 to train, 300 to test.

    The first 1.008 s of each recording (shorter ones padded): 64 bands of 62.5 Hz to 4 kHz, 64 frames of 32 ms
    every 16 ms. Use `load_recordings` for the waveforms.
    """
    recordings = load_recordings(root)
    images = torch.empty(len(recordings), 1, 64, 64, dtype=torch.uint8)
    for index in torch.arange(len(recordings)).split(256):
        level = log_spectrogram(recordings.padded(index, _CLIP))[:, :-1]
        images[index, 0] = (level.unflatten(1, (64, 2)).mean(2) * 255).round().to(torch.uint8)
    train, test = recordings.official_split()
    y = recordings.labels
    return Dataset(
        "fsdd",
        "fsdd-logspectrogram-64",
        images[train],
        y[train],
        images[test],
        y[test],
        10,
        (1, 64, 64),
        _LICENCE,
    )


def _read_npz(file: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(file) as arrays:
            return {name: arrays[name] for name in FSDD_SHA256}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(
            f"toreq.data: expected the arrays {', '.join(FSDD_SHA256)} in {file}, got '{error}'; "
            "delete it and load again"
        ) from error


def _read_archive(file: Path) -> dict[str, np.ndarray]:
    rows: list[tuple[int, int, int, np.ndarray]] = []
    with tarfile.open(file, mode="r:gz") as archive:
        for member in archive:
            path = PurePosixPath(member.name)
            if path.suffix != ".wav" or path.parent.name != "recordings":
                continue
            content = archive.extractfile(member)
            assert content is not None
            digit, speaker, take = path.stem.split("_")
            with wave.open(io.BytesIO(content.read())) as recording:
                samples = np.frombuffer(recording.readframes(recording.getnframes()), dtype="<i2")
            rows.append((int(digit), _SPEAKERS.index(speaker), int(take), samples.astype(np.int16)))
    if not rows:
        raise DataError(f"toreq.data: expected recordings/*.wav in {file}, got none; delete it and load again")
    rows.sort(key=lambda row: row[:3])
    return {
        "audio": np.concatenate([row[3] for row in rows]),
        "offsets": np.cumsum([0, *(len(row[3]) for row in rows)], dtype=np.int64),
        "labels": np.array([row[0] for row in rows], dtype=np.uint8),
        "speakers": np.array([row[1] for row in rows], dtype=np.uint8),
        "takes": np.array([row[2] for row in rows], dtype=np.uint8),
    }
