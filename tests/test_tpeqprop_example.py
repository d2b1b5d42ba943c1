"""The example of plain transformer blocks trained by local errors runs and does what it says."""

from __future__ import annotations

from test_examples import CHANCE, FOLDER, load


def test_predictive_transformer_has_backprops_gradient_and_learns() -> None:
    cosine, accuracy = load("predictive_transformer").main(train=300, test=200, epochs=3)
    assert cosine > 0.99999
    assert accuracy > 2 * CHANCE


def test_predictive_transformer_fits_in_ten_lines() -> None:
    text = (FOLDER / "predictive_transformer.py").read_text()
    part = text.split("[start:ten]")[1].split("# --8<-- [end:ten]")[0]
    assert 5 <= len([line for line in part.splitlines() if line.strip()]) <= 10
