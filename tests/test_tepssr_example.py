"""The tagging example, at a small setting."""

from __future__ import annotations

import pytest

from test_examples import load


@pytest.mark.slow
def test_tagging_has_the_implicit_gradient_and_learns() -> None:
    cosine, short, long = load("tagging").main(steps=60, batch=16, length=12)
    assert cosine > 0.9999
    assert short > 0.9  # the rarer of two tags is on a third of the tokens
    assert long > 0.6


def test_tagging_draws_what_it_says() -> None:
    example = load("tagging")
    x, y = example.sequences(50, 20, example.torch.Generator().manual_seed(0))
    assert ((x == example.PADDING) == (y == example.NONE)).all()
    for row, tags in zip(x.tolist(), y.tolist(), strict=True):
        first, last = row.index(example.OPEN), row.index(example.CLOSE)
        assert first < last
        assert [i for i, tag in enumerate(tags) if tag == 1] == list(range(first, last + 1))
