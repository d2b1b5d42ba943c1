"""The other data sets: tiny files in every layout, checksums, downloads from a local server, and their failures."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import data_files
from toreq import data
from toreq.data import audio, files, images, text
from toreq.errors import DataError

SENTENCE = "To be, or not to be: that is the question.\n" * 60


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder that TOREQ_DATA points to."""
    monkeypatch.setenv("TOREQ_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No download works; the list collects what was asked for."""
    import pooch

    asked: list[str] = []

    def refuse(url: str, *_: object, **__: object) -> None:
        asked.append(url)
        raise ConnectionError("no route to host")

    monkeypatch.setattr(pooch, "retrieve", refuse)
    return asked


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """An http server on this machine and the folder that it serves."""
    served = tmp_path / "served"
    served.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            del format, args

    handler = functools.partial(Quiet, directory=str(served))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}/", served
        running.shutdown()
        thread.join()


# --- what is missing


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10", "fsdd", "tinyshakespeare"])
def test_a_missing_set_names_the_remedy(name: str, folder: Path, offline: list[str]):
    with pytest.raises(DataError, match="set TOREQ_DATA") as caught:
        data.load(name)
    message = str(caught.value)
    assert "no route to host" in message
    assert str(folder) in message
    assert len(offline) == 1
    assert offline[0] in message


def test_the_lossless_excerpt_has_no_download(folder: Path, offline: list[str]):
    with pytest.raises(DataError, match="TOREQ_DATA"):
        data.load("cifar10-lossless-4000")
    assert offline == []


def test_mnist_needs_neither_folder_nor_network(folder: Path, offline: list[str]):
    assert len(data.load("mnist").test_y) == 10_000
    assert offline == []


def test_an_explicit_root_goes_before_the_environment(folder: Path, tmp_path: Path):
    assert files.data_folders(tmp_path / "mine") == [tmp_path / "mine"]
    assert files.data_folders()[0] == folder
    assert len(files.data_folders()) == 2


# --- Fashion-MNIST


def test_fashion_mnist_from_the_folder(folder: Path, offline: list[str], monkeypatch: pytest.MonkeyPatch):
    hashes = data_files.write_idx_set(folder / "fashion_mnist")
    monkeypatch.setattr(images, "FASHION_SHA256", hashes)
    loaded = data.load("fashion_mnist")
    assert (loaded.name, loaded.variant) == ("fashion_mnist", "fashion_mnist")
    assert loaded.train_x.shape == (20, 1, 28, 28)
    assert loaded.test_y.tolist() == list(range(10))
    expected = np.random.default_rng(0).integers(0, 256, (20, 28, 28))
    assert np.array_equal(loaded.train_x[:, 0].numpy(), expected)
    assert offline == []


def test_other_content_is_refused(folder: Path, offline: list[str]):
    data_files.write_idx_set(folder / "fashion_mnist")
    with pytest.raises(DataError, match=r"SHA-256 .*delete it and load again"):
        data.load("fashion_mnist")


def test_a_truncated_file_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch):
    hashes = data_files.write_idx_set(folder / "fashion_mnist")
    monkeypatch.setattr(images, "FASHION_SHA256", hashes)
    file = folder / "fashion_mnist" / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match="complete gzip file"):
        data.load("fashion_mnist")
    file.write_bytes(b"<html>not found</html>")
    with pytest.raises(DataError, match="complete gzip file"):
        data.load("fashion_mnist")


@pytest.mark.parametrize("content", [b"", b"\0\0\x0d\x01\0\0\0\1x", b"\0\0\x08\x01\0\0\0\2x", b"\0\0\x08\x03\0\0"])
def test_idx_headers_are_checked(content: bytes):
    with pytest.raises(DataError, match="complete uint8 IDX"):
        images.read_idx(content, "file")


# --- downloads


def test_a_download_lands_in_the_folder_and_is_used_again(
    folder: Path, server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
):
    url, served = server
    hashes = data_files.write_idx_set(served)
    monkeypatch.setattr(images, "FASHION_SHA256", hashes)
    monkeypatch.setattr(images, "_FASHION_URL", url)
    md5 = {
        name: hashlib.md5((served / f"{name}.gz").read_bytes(), usedforsecurity=False).hexdigest()
        for name in data_files.IDX_FILES
    }
    monkeypatch.setattr(images, "_FASHION_MD5", md5)
    first = data.load("fashion_mnist")
    for file in served.iterdir():
        file.unlink()
    assert torch.equal(data.load("fashion_mnist").train_x, first.train_x)
    assert len(list((folder / "fashion_mnist").iterdir())) == 4


def test_a_download_with_another_checksum_is_not_kept(
    folder: Path, server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
):
    url, served = server
    (served / "input.txt").write_text("something else")
    monkeypatch.setattr(text, "TINY_SHAKESPEARE", dataclasses.replace(text.TINY_SHAKESPEARE, url=url + "input.txt"))
    with pytest.raises(DataError, match="hash"):
        data.load("tinyshakespeare")
    assert not (folder / "tinyshakespeare" / "input.txt").exists()


def test_a_server_without_the_file_is_reported(folder: Path, server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch):
    url, _ = server
    monkeypatch.setattr(text, "TINY_SHAKESPEARE", dataclasses.replace(text.TINY_SHAKESPEARE, url=url + "input.txt"))
    with pytest.raises(DataError, match="404"):
        data.load("tinyshakespeare")


def test_a_folder_that_cannot_be_written_is_reported(
    server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    url, served = server
    (served / "input.txt").write_text(SENTENCE)
    (tmp_path / "occupied").write_text("a file, not a folder")
    monkeypatch.setattr(text, "TINY_SHAKESPEARE", dataclasses.replace(text.TINY_SHAKESPEARE, url=url + "input.txt"))
    with pytest.raises(DataError, match="writable"):
        data.load("tinyshakespeare", root=tmp_path / "occupied")


# --- CIFAR-10


def test_cifar10_from_jpegs_says_so(folder: Path, offline: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(images, "CIFAR10_SHA256", data_files.write_cifar_jpegs(folder / "cifar10"))
    loaded = data.load("cifar10")
    assert (loaded.name, loaded.variant) == ("cifar10", "cifar10-jpeg-recompressed")
    assert loaded.train_x.shape == (20, 3, 32, 32)
    assert loaded.train_y[:12].tolist() == [*range(10), 0, 1]
    levels = loaded.train_x.float().mean((1, 2, 3))
    torch.testing.assert_close(levels, 10.0 * torch.arange(20), atol=1.5, rtol=0)
    assert offline == []


def test_cifar10_original_goes_first(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(images, "CIFAR10_SHA256", data_files.write_cifar_jpegs(folder / "cifar10"))
    archive = data_files.cifar_archive()
    (folder / "cifar10" / "cifar-10-binary.tar.gz").write_bytes(archive)
    with pytest.raises(DataError, match="MD5"):
        data.load("cifar10")
    md5 = "md5:" + hashlib.md5(archive, usedforsecurity=False).hexdigest()
    monkeypatch.setattr(images, "CIFAR10_ARCHIVE", dataclasses.replace(images.CIFAR10_ARCHIVE, download_hash=md5))
    loaded = data.load("cifar10")
    assert loaded.variant == "cifar10"
    assert loaded.train_x.shape == (20, 3, 32, 32)
    # The batches lie in the archive in the order 3 1 2 5 4 with labels counting from 0 1 2 3 4.
    assert loaded.train_y.tolist() == [1, 2, 3, 4, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 6, 7, 3, 4, 5, 6]
    assert torch.equal(loaded.train_x[:, 0, 0, 0].long(), loaded.train_y)


def test_the_lossless_excerpt(folder: Path, monkeypatch: pytest.MonkeyPatch):
    (folder / "cifar10").mkdir(parents=True)
    file = folder / "cifar10" / "train_first4000_lossless.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    np.savez(file, images=pixels, labels=(np.arange(20) % 10).astype(np.uint8))
    monkeypatch.setitem(images.CIFAR10_SHA256, file.name, data_files.sha256(file.read_bytes()))
    loaded = data.load("cifar10-lossless-4000")
    assert (len(loaded.train_y), len(loaded.test_y)) == (16, 4)
    assert np.array_equal(loaded.train_x[5].permute(1, 2, 0).numpy(), pixels[5])


# --- spoken digits


@pytest.fixture
def spoken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int, np.ndarray]]:
    rows = data_files.recordings()
    hashes = {name: data_files.sha256(array.tobytes()) for name, array in data_files.fsdd_arrays(rows).items()}
    monkeypatch.setattr(audio, "FSDD_SHA256", hashes)
    return rows


def test_recordings_from_npz_and_from_the_archive_agree(
    folder: Path, tmp_path: Path, spoken: list[tuple[int, int, int, np.ndarray]]
):
    (folder / "fsdd").mkdir(parents=True)
    np.savez(folder / "fsdd" / "fsdd.npz", **data_files.fsdd_arrays(spoken))
    packed = data.load_recordings()
    archive = tmp_path / "other" / audio.FSDD_ARCHIVE.path
    archive.parent.mkdir(parents=True)
    archive.write_bytes(data_files.fsdd_archive(spoken, "free-spoken-digit-dataset-x"))
    unpacked = data.load_recordings(tmp_path / "other")
    for field in ("audio", "offsets", "labels", "speakers", "takes"):
        assert torch.equal(getattr(packed, field), getattr(unpacked, field)), field
    assert len(packed) == len(spoken)
    digit, speaker, take, samples = spoken[17]
    assert torch.equal(packed.waveform(17), torch.from_numpy(samples).float() / 32768)
    assert packed.labels[17] == digit
    assert packed.speaker_names[int(packed.speakers[17])] == data_files.SPEAKERS[speaker]
    assert packed.takes[17] == take


def test_other_samples_are_refused(folder: Path, spoken: list[tuple[int, int, int, np.ndarray]]):
    arrays = data_files.fsdd_arrays(spoken)
    arrays["audio"][100] += 1
    (folder / "fsdd").mkdir(parents=True)
    np.savez(folder / "fsdd" / "fsdd.npz", **arrays)
    with pytest.raises(DataError, match="got other 'audio'"):
        data.load("fsdd")
    np.savez(folder / "fsdd" / "fsdd.npz", audio=arrays["audio"])
    with pytest.raises(DataError, match="expected the arrays"):
        data.load("fsdd")


def test_spoken_digits_as_images(folder: Path, spoken: list[tuple[int, int, int, np.ndarray]]):
    (folder / "fsdd").mkdir(parents=True)
    np.savez(folder / "fsdd" / "fsdd.npz", **data_files.fsdd_arrays(spoken))
    loaded = data.load("fsdd")
    # Takes 0 to 4 of six test the rest.
    assert (len(loaded.train_y), len(loaded.test_y)) == (12, 60)
    assert loaded.input_shape == (1, 64, 64)
    # Tones of 500 and 1500 Hz peak in the bands of 62.5 Hz that hold them (8 and 24, or their lower neighbours).
    peaks = loaded.train_x[:, 0, :, 2:6].float().mean(2).argmax(1)
    expected = torch.where(loaded.train_y == 0, 8, 24)
    assert bool(((peaks - expected).abs() <= 1).all())
    # Silence after the recording is black.
    assert int(loaded.train_x[:, 0, :, 20:].max()) == 0


def test_padding_cuts_and_fills(folder: Path, spoken: list[tuple[int, int, int, np.ndarray]]):
    (folder / "fsdd").mkdir(parents=True)
    np.savez(folder / "fsdd" / "fsdd.npz", **data_files.fsdd_arrays(spoken))
    recordings = data.load_recordings()
    padded = recordings.padded(torch.tensor([5, 0]), 1200)
    assert torch.equal(padded[0], recordings.waveform(5)[:1200])
    assert torch.equal(padded[1, :1000], recordings.waveform(0))
    assert float(padded[1, 1000:].abs().max()) == 0


def test_log_spectrogram_ignores_loudness_and_silence():
    time = torch.arange(4000) / 8000
    tone = torch.sin(2 * torch.pi * 1000 * time)
    loud, quiet = data.log_spectrogram(torch.stack([tone, 0.1 * tone]))
    assert loud.shape == (129, 32)
    torch.testing.assert_close(loud, quiet, atol=2e-3, rtol=0)
    assert int(loud[:, 10].argmax()) == 32
    assert float(loud.max()) == 1
    assert float(data.log_spectrogram(torch.zeros(1000)).abs().max()) == 0
    single = data.log_spectrogram(tone)
    torch.testing.assert_close(single, loud)
    # A tone 40 dB down stands half way to a floor of 80 dB.
    two = tone + 0.01 * torch.sin(2 * torch.pi * 3000 * time)
    assert float(data.log_spectrogram(two)[96, 10]) == pytest.approx(0.5, abs=0.01)


# --- Tiny Shakespeare


@pytest.fixture
def play(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    file = folder / "tinyshakespeare" / "input.txt"
    file.parent.mkdir(parents=True)
    file.write_text(SENTENCE)
    known = "sha256:" + data_files.sha256(SENTENCE.encode())
    monkeypatch.setattr(text, "TINY_SHAKESPEARE", dataclasses.replace(text.TINY_SHAKESPEARE, download_hash=known))
    return SENTENCE


def test_text_round_trip(play: str):
    loaded = data.load_text()
    assert loaded.decode(loaded.train) + loaded.decode(loaded.test) == play
    assert len(loaded.train) == len(play) * 9 // 10
    assert loaded.alphabet == "".join(sorted(set(play)))
    assert torch.equal(loaded.encode(play[:40]), loaded.train[:40])
    with pytest.raises(DataError, match="alphabet"):
        loaded.encode("ß")


def test_next_character_set(play: str):
    loaded = data.load("tinyshakespeare")
    whole = data.load_text()
    assert loaded.input_shape == (64,)
    assert loaded.num_symbols == loaded.num_classes == len(whole.alphabet)
    row = 7
    start = 16 * row
    assert whole.decode(loaded.train_x[row]) == play[start : start + 64]
    assert whole.decode(loaded.train_y[row : row + 1]) == play[start + 64]


def test_windows_need_enough_text():
    x, y = data.next_character_windows(torch.arange(10), 3, 2)
    assert x.tolist() == [[0, 1, 2], [2, 3, 4], [4, 5, 6], [6, 7, 8]]
    assert y.tolist() == [3, 5, 7, 9]
    for context, stride in ((10, 1), (0, 1), (3, 0)):
        with pytest.raises(DataError, match="shorter context"):
            data.next_character_windows(torch.arange(10), context, stride)


def test_an_unreadable_file_is_reported(tmp_path: Path):
    with pytest.raises(DataError, match="check its permissions"):
        files.read_checked(tmp_path, "0" * 64)


def test_any_gzip_of_the_originals_is_accepted(folder: Path, monkeypatch: pytest.MonkeyPatch):
    hashes = data_files.write_idx_set(folder / "fashion_mnist")
    monkeypatch.setattr(images, "FASHION_SHA256", hashes)
    file = folder / "fashion_mnist" / "train-labels-idx1-ubyte.gz"
    file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes()), compresslevel=1, mtime=5))
    assert len(data.load("fashion_mnist").train_y) == 20
