"""Intervals and where they stand: known numbers, and what must not matter."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from toreq.errors import ConfigError
from toreq.evidence import Interval, interval, paired, standing
from toreq.evidence.statistics import mean_curve

# Student's t with two degrees of freedom has a closed form: (2p - 1) / sqrt(2p (1 - p)) at p = 0.975
T_OF_TWO = 0.95 / math.sqrt(2 * 0.975 * 0.025)
VALUES = st.lists(st.floats(-100, 100, allow_subnormal=False), min_size=2, max_size=8)


def test_the_interval_of_three_known_numbers() -> None:
    found = interval([1.0, 2.0, 3.0])
    half = T_OF_TWO / math.sqrt(3)  # the deviation is 1
    assert (found.mean, found.n) == (2.0, 3)
    assert found.low == pytest.approx(2 - half, rel=1e-12)
    assert found.high == pytest.approx(2 + half, rel=1e-12)


def test_another_level_and_ten_numbers() -> None:
    found = interval([float(i) for i in range(10)], level=0.9)
    half = 1.8331129326536333 * math.sqrt(55 / 6) / math.sqrt(10)
    assert found.low == pytest.approx(4.5 - half, rel=1e-12)


def test_a_single_seed_has_no_interval_and_equal_ones_have_no_width() -> None:
    assert interval([4.0]) == Interval(4.0, None, None, 1)
    assert interval([0.1, 0.1, 0.1]) == Interval(0.1, 0.1, 0.1, 3)


def test_logarithms() -> None:
    found = interval([1.0, 10.0, 100.0], scale="log")
    half = T_OF_TWO * math.log(10) / math.sqrt(3)
    assert found.mean == pytest.approx(10)
    assert found.low == pytest.approx(10 * math.exp(-half))
    assert found.high == pytest.approx(10 * math.exp(half))


@pytest.mark.parametrize(
    ("values", "level", "scale"), [([], 0.95, "linear"), ([1, math.nan], 0.95, "linear"), ([1.0], 1.0, "linear")]
)
def test_what_has_no_interval_is_refused(values: list[float], level: float, scale: str) -> None:
    with pytest.raises(ConfigError, match="expected finite values"):
        interval(values, level, scale)  # type: ignore[arg-type]


def test_no_logarithm_of_zero() -> None:
    with pytest.raises(ConfigError, match="above 0"):
        interval([0.0, 1.0], scale="log")


def test_pairs_are_of_seeds_that_both_have() -> None:
    assert paired({2: 5.0, 0: 3.0, 1: 9.0}, {0: 1.0, 2: 1.5, 7: 4.0}) == {0: 2.0, 2: 3.5}


@pytest.mark.parametrize(
    ("low", "high", "direction", "bound", "strict", "wanted"),
    [
        (1.0, 2.0, "at_least", 0.5, False, "holds"),
        (1.0, 2.0, "at_least", 1.0, False, "holds"),
        (1.0, 2.0, "at_least", 1.0, True, "not settled"),
        (1.0, 2.0, "at_least", 1.5, False, "not settled"),
        (1.0, 2.0, "at_least", 2.0, True, "fails"),
        (1.0, 2.0, "at_least", 2.5, False, "fails"),
        (1.0, 2.0, "at_most", 2.5, False, "holds"),
        (1.0, 2.0, "at_most", 1.5, False, "not settled"),
        (1.0, 2.0, "at_most", 0.5, False, "fails"),
        (0.0, 0.0, "at_least", 0.0, True, "fails"),
        (1.0, 2.0, "between", (0.0, 3.0), False, "holds"),
        (1.0, 2.0, "between", (1.5, 3.0), False, "not settled"),
        (1.0, 2.0, "between", (2.5, 3.0), False, "fails"),
    ],
)
def test_standing(low: float, high: float, direction: str, bound: object, strict: bool, wanted: str) -> None:
    found = Interval((low + high) / 2, low, high, 3)
    assert standing(found, direction, bound, strict=strict) == wanted  # type: ignore[arg-type]


def test_one_seed_stands_by_its_value() -> None:
    assert standing(interval([3.0]), "at_least", 2.0) == "holds"
    assert standing(interval([3.0]), "at_most", 2.0) == "fails"


@given(VALUES, st.floats(0.1, 50))
@settings(max_examples=60, deadline=None)
def test_moving_all_values_across_the_bound_turns_the_verdict(values: list[float], margin: float) -> None:
    found = interval(values)
    assert found.low is not None
    width = 2 * (found.mean - found.low) + margin
    above = interval([v - found.mean + width for v in values])
    below = interval([v - found.mean - width for v in values])
    for direction, first, second in (("at_least", "holds", "fails"), ("at_most", "fails", "holds")):
        assert standing(above, direction, 0.0) == first  # type: ignore[arg-type]
        assert standing(below, direction, 0.0) == second  # type: ignore[arg-type]


@given(VALUES, st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_the_order_of_the_seeds_does_not_matter(values: list[float], random: object) -> None:
    shuffled = list(values)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one, two = interval(values), interval(shuffled)
    assert (one.mean, one.low, one.high) == pytest.approx((two.mean, two.low, two.high), rel=1e-12, abs=1e-12)


@given(VALUES, st.floats(-100, 100))
@settings(max_examples=60, deadline=None)
def test_an_interval_moves_and_turns_with_its_values(values: list[float], by: float) -> None:
    found, moved, turned = interval(values), interval([v + by for v in values]), interval([-v for v in values])
    assume(found.low is not None)
    assert (moved.low, moved.high) == pytest.approx(((found.low or 0) + by, (found.high or 0) + by), abs=1e-9)
    assert (turned.low, turned.high) == pytest.approx((-(found.high or 0), -(found.low or 0)), abs=1e-9)


def test_a_curve_is_averaged_where_every_seed_has_a_number() -> None:
    found = mean_curve([[(1.0, 2.0), (2.0, 4.0), (3.0, None)], [(2.0, 6.0), (3.0, 1.0), (1.0, 2.0)]])
    assert [(x, mean) for x, mean, _, _ in found] == [(1.0, 2.0), (2.0, 5.0)]
    assert mean_curve([]) == []
