"""`toreq sample`: grids and animations of a small run, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from toreq.cli import main
from toreq.diagnostics.samples import gif, grid, png
from toreq.errors import ConfigError

COMMON = ["--limit-train", "100", "--limit-test", "50", "--batch-size", "50", "--epochs", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests only read it."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    chosen = ["--set", "hidden=12", "denoising=1.0", "settings=fast"]
    assert main(["train", "difftoreqprop", *COMMON, "--out", str(out), *chosen]) == 0
    return out


def test_a_grid_and_an_animation_are_written(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, chain = tmp_path / "digits.png", tmp_path / "chain.gif"
    more = ["--n", "6", "--levels", "5", "--out", str(out), "--animation", str(chain)]
    assert main(["sample", str(run), *more]) == 0
    text = capsys.readouterr().out
    assert "6 images, 5 denoisings each" in text
    assert "5 frames" in text
    with Image.open(out) as picture:
        assert picture.size == (2 * (3 * 30 - 2), 2 * (2 * 30 - 2))
        last = np.asarray(picture)
    with Image.open(chain) as moving:
        assert getattr(moving, "n_frames", 1) == 5
        moving.seek(4)
        shown = np.asarray(moving.convert("L"))
    assert np.abs(shown.astype(int) - last.astype(int)).max() <= 8  # a palette's rounding


def test_a_seed_gives_the_same_picture_and_classes_another(run: Path, tmp_path: Path) -> None:
    found = []
    for extra in (["--seed", "3"], ["--seed", "3"], ["--seed", "4"], ["--seed", "3", "--labels", "1,7"]):
        out = tmp_path / "a.png"
        assert main(["sample", str(run), "--n", "4", "--levels", "3", "--out", str(out), *extra]) == 0
        found.append(out.read_bytes())
    assert found[0] == found[1]
    assert found[0] != found[2]
    assert found[0] != found[3]


def test_the_half_that_is_given_is_kept(run: Path, tmp_path: Path) -> None:
    halves = []
    for seed in ("0", "1"):
        out = tmp_path / "kept.png"
        words = ["--n", "1", "--levels", "3", "--keep", "left", "--seed", seed, "--out", str(out)]
        assert main(["sample", str(run), *words]) == 0
        with Image.open(out) as picture:
            halves.append(np.asarray(picture)[:, :28])
    assert np.array_equal(*halves)
    assert halves[0].max() > 100  # a digit's ink


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--labels", "one"], "whole numbers"),
        (["--labels", "12"], "classes in"),
        (["--levels", "1"], "levels >= 2"),
        (["--eta", "2"], "eta in"),
        (["--n", "0"], "count >= 1"),
        (["--n", "10001", "--keep", "top"], "lower --n"),
    ],
)
def test_bad_usage_is_told_in_a_line(
    run: Path, tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", str(run), "--n", "2", "--out", str(tmp_path / "x.png"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


def test_a_run_that_cannot_draw_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for system, message in (("toreqprop", "run of difftoreqprop"), ("difftoreqprop", "denoising > 0")):
        out = tmp_path / system
        assert main(["train", system, *COMMON, "--out", str(out), "--set", "hidden=8"]) == 0
        capsys.readouterr()
        assert main(["sample", str(out), "--n", "2"]) == 2
        assert message in capsys.readouterr().err


# -- pictures


def test_a_grid_puts_images_in_rows_and_clips_them() -> None:
    x = torch.stack([torch.full((1, 2, 3), v) for v in (-1.0, 0.0, 0.5, 1.0, 2.0)])
    pixels = grid(x, columns=2, scale=1)
    assert pixels.shape == (3 * 4 - 2, 2 * 5 - 2)
    corners = pixels[::4, ::5]
    assert corners.tolist() == [[0, 0], [128, 255], [255, 0]]
    assert pixels[2, 0] == 128  # the gap
    assert grid(x.expand(-1, 3, -1, -1), scale=2).shape == (2 * (2 * 4 - 2), 2 * (3 * 5 - 2), 3)
    assert png(pixels)[:4] == b"\x89PNG"
    assert gif([pixels, pixels])[:3] == b"GIF"


def test_what_is_no_picture_is_refused() -> None:
    for wrong in (torch.zeros(3, 4), torch.zeros(2, 2, 4, 4), torch.zeros(0, 1, 4, 4)):
        with pytest.raises(ConfigError, match="images"):
            grid(wrong)
    with pytest.raises(ConfigError, match="scale >= 1"):
        grid(torch.zeros(1, 1, 4, 4), scale=0)
    with pytest.raises(ConfigError, match="at least one frame"):
        gif([])
