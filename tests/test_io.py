"""Atomic writes: what is left after each kind of failure."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from toreq import io
from toreq.errors import ConfigError, ToreqError, WriteError, nearest
from toreq.io import atomic_path, atomic_write_bytes, atomic_write_json, atomic_write_text


def test_writes_replace_and_make_folders(tmp_path: Path):
    target = tmp_path / "a" / "b" / "file.txt"
    atomic_write_text(target, "one\n")
    atomic_write_text(target, "zweite Gruessé\n")
    assert target.read_bytes() == "zweite Gruessé\n".encode()
    atomic_write_bytes(str(target), b"\x00\xff")
    assert target.read_bytes() == b"\x00\xff"
    assert [path.name for path in target.parent.iterdir()] == ["file.txt"]


def test_json_round_trip_and_non_finite_numbers(tmp_path: Path):
    target = tmp_path / "summary.json"
    atomic_write_json(target, {"a": [1, 2.5, "x"], "nested": {"nan": float("nan"), "inf": (float("-inf"),)}})
    assert json.loads(target.read_text()) == {"a": [1, 2.5, "x"], "nested": {"nan": None, "inf": [None]}}
    assert target.read_text().endswith("}\n")


def test_a_value_that_is_not_json_leaves_the_old_file(tmp_path: Path):
    target = tmp_path / "summary.json"
    atomic_write_json(target, {"kept": True})
    with pytest.raises(TypeError):
        atomic_write_json(target, {"bad": object()})
    assert json.loads(target.read_text()) == {"kept": True}


@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.ENOSPC, "free some space"), (errno.EDQUOT, "quota"), (errno.EROFS, "writable file system")],
)
@pytest.mark.parametrize("step", ["write", "sync", "replace"])
def test_a_failing_disk_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str, step: str
):
    target = tmp_path / "weights.bin"
    atomic_write_bytes(target, b"old")

    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    if step == "write":
        real = Path.write_bytes

        def part(self: Path, data: bytes) -> int:
            real(self, data[: len(data) // 2])  # a full disk takes a part and then refuses
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(Path, "write_bytes", part)
    else:
        monkeypatch.setattr(io.os, {"sync": "fsync", "replace": "replace"}[step], fail)
    with pytest.raises(WriteError, match=words) as caught:
        atomic_write_bytes(target, b"new content")
    assert "previous file is unchanged" in str(caught.value)
    assert str(target) in str(caught.value)
    assert isinstance(caught.value, OSError)
    monkeypatch.undo()
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["weights.bin"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which only Linux has")
def test_a_really_full_device_is_reported(tmp_path: Path):
    def write() -> None:
        with atomic_path(tmp_path / "out.bin") as temporary:
            temporary.symlink_to("/dev/full")
            temporary.write_bytes(b"x" * 10_000)

    with pytest.raises(WriteError, match="free some space"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_inside_the_block_keeps_the_old_file(tmp_path: Path):
    target = tmp_path / "log.txt"
    atomic_write_text(target, "old")

    def write() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path):
    target = tmp_path / "state.txt"
    atomic_write_text(target, "old")
    code = (
        "import os, signal, sys\nfrom toreq import io\n"
        "io.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "io.atomic_write_text(sys.argv[1], 'new')\n"
    )
    source = Path(__file__).parents[1] / "src"
    result = subprocess.run([sys.executable, "-c", code, str(target)], cwd=source, timeout=120, check=False)
    assert result.returncode == -9
    assert target.read_text() == "old"


def test_readers_never_see_a_part(tmp_path: Path):
    target = tmp_path / "shared.txt"
    contents = {"a" * 300_000, "b" * 200_000}
    atomic_write_text(target, "a" * 300_000)
    stop = threading.Event()
    seen: set[str] = set()

    def read() -> None:
        while not stop.is_set():
            seen.add(target.read_text())
            time.sleep(0)

    reader = threading.Thread(target=read)
    reader.start()
    for turn in range(30):
        atomic_write_text(target, "ab"[turn % 2] * (300_000, 200_000)[turn % 2])
    stop.set()
    reader.join()
    assert seen <= contents
    assert seen


def test_a_parent_that_is_a_file_is_refused(tmp_path: Path):
    blocker = tmp_path / "run"
    blocker.write_text("a result")
    with pytest.raises(WriteError, match="parents are all folders"):
        atomic_write_text(blocker / "summary.json", "{}")
    assert blocker.read_text() == "a result"


def test_a_folder_as_target_is_refused(tmp_path: Path):
    (tmp_path / "summary.json").mkdir()
    with pytest.raises(WriteError, match="not a folder"):
        atomic_write_text(tmp_path / "summary.json", "{}")


def test_permissions_follow_the_umask(tmp_path: Path):
    before = os.umask(0o027)
    try:
        atomic_write_text(tmp_path / "file.txt", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file.txt").stat().st_mode) == 0o640


def test_nearest_names_the_closest_or_all():
    assert nearest("mnits", ["mnist", "fsdd"]) == "did you mean 'mnist'?"
    assert nearest("CENTERED", ["Centered", "Implicit"]) == "did you mean 'Centered'?"
    assert nearest("zzzz", ["b", "a"]) == "choose one of 'a', 'b'"
    assert nearest("a", []) == "there is nothing to choose from"


def test_errors_share_one_base_and_the_builtin_kind():
    assert issubclass(ConfigError, ToreqError)
    assert issubclass(ConfigError, ValueError)
    assert str(WriteError("message")) == "message"
