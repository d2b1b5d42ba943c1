"""The example of denoising runs and does what it says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from test_examples import CHANCE, load


def test_denoising_learns_all_of_it_at_once(tmp_path: Path) -> None:
    out = tmp_path / "digits.png"
    accuracy, left = load("denoising").main(train=600, test=100, epochs=3, hidden=64, levels=4, out=str(out))
    assert accuracy > 4 * CHANCE
    assert (
        left < 0.5
    )  # the best scalar filter leaves 0.26 of a signal of deviation 0.3, and more of a mean that is not 0
    picture = np.asarray(Image.open(out))
    assert picture.shape == (2 * (6 * 30 - 2), 2 * (10 * 30 - 2))
    # the upper halves of completed digits are those of the clean ones in the row above
    rows = [picture[2 * 30 * r : 2 * 30 * r + 28] for r in (2, 3)]
    assert np.array_equal(rows[0], rows[1])
