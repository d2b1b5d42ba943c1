"""The ring of past tensors: index modulo R, and the O(1) fading sum against brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toreq.errors import ConfigError
from toreq.memory.ring import Ring


def _tensors(count: int, seed: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, generator=g, dtype=torch.float64) for _ in range(count)]


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 7),
    pushes=st.integers(0, 40),
    decay=st.floats(0.05, 1.0),
    seed=st.integers(0, 1000),
)
def test_ring_holds_the_last_tensors_modulo_its_length(length: int, pushes: int, decay: float, seed: int) -> None:
    first, *new = _tensors(pushes + 1, seed)
    ring = Ring(first, length, decay)
    history = [first] * length
    for t in new:
        ring.push(t)
        history = [t, *history[:-1]]
        brute = sum(decay**age * m for age, m in enumerate(history))
        torch.testing.assert_close(ring.fading_sum, torch.as_tensor(brute), rtol=1e-9, atol=1e-9)
    assert len(ring) == length
    for age in range(length):
        assert ring[age] is history[age], "a push must copy nothing"
        assert ring[age + length] is history[age]
        assert ring[age - length] is history[age]
    brute = sum(decay**age * m for age, m in enumerate(history))
    torch.testing.assert_close(ring.fading_sum, torch.as_tensor(brute), rtol=1e-9, atol=1e-9)


def test_fading_sum_does_not_drift() -> None:
    """Ten thousand pushes of an O(1) update stay at the brute-force sum, in float32 too."""
    g = torch.Generator().manual_seed(0)
    ring = Ring(torch.zeros(4), 5, 0.9)
    history = [torch.zeros(4)] * 5
    for _ in range(10_000):
        t = torch.randn(4, generator=g)
        ring.push(t)
        history = [t, *history[:-1]]
    brute = sum(0.9**age * m for age, m in enumerate(history))
    torch.testing.assert_close(ring.fading_sum, torch.as_tensor(brute), rtol=1e-4, atol=1e-5)


def test_constant_history_sums_to_the_geometric_series() -> None:
    one = torch.ones(2, dtype=torch.float64)
    torch.testing.assert_close(Ring(one, 4, 0.5).fading_sum, one * 1.875)
    torch.testing.assert_close(Ring(one, 4).fading_sum, one * 4)
    single = Ring(one, 1, 0.5)
    single.push(3 * one)
    assert torch.equal(single.fading_sum, 3 * one)


@pytest.mark.parametrize(("length", "decay"), [(0, 0.5), (3, 0.0), (3, 1.1), (3, -0.5)])
def test_bad_input(length: int, decay: float) -> None:
    with pytest.raises(ConfigError, match=r"length >= 1 and decay in \(0, 1\]"):
        Ring(torch.zeros(2), length, decay)
