"""Intervals and verdicts, against hand tables and scipy's own tests."""

import math

import numpy as np
import pytest
from scipy import stats

from labelwise.measures.statistics import (
    Interval,
    interval,
    judge,
    paired_interval,
    wilson_half_width,
    wilson_interval,
)


def test_interval_equals_a_table_of_students_t() -> None:
    found = interval([0.60, 0.62, 0.64, 0.66, 0.68])
    half = 2.776 * 0.0316228 / math.sqrt(5)  # t for 4 degrees of freedom, from a printed table
    assert found.n == 5
    assert found.mean == pytest.approx(0.64)
    assert (found.low, found.high) == (
        pytest.approx(0.64 - half, abs=1e-4),
        pytest.approx(0.64 + half, abs=1e-4),
    )


def test_one_draw_has_no_interval_and_shows_nothing() -> None:
    found = interval([0.7])
    assert (found.low, found.high, found.n) == (None, None, 1)
    assert judge(found) == "no difference shown"


def test_the_paired_interval_agrees_with_the_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    theirs = rng.normal(0.5, 0.1, 8)
    ours = theirs + rng.normal(0.03, 0.01, 8)
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    found = paired_interval(list(ours), list(theirs))
    assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high))


def test_pairing_sees_a_small_steady_gain_that_draws_would_hide() -> None:
    theirs = [0.30, 0.45, 0.60, 0.75]
    ours = [0.32, 0.465, 0.621, 0.768]
    assert judge(paired_interval(ours, theirs)) == "helps"
    assert judge(paired_interval(theirs, ours)) == "hurts"


def test_an_interval_that_touches_zero_shows_no_difference() -> None:
    assert judge(Interval(0.05, 0.0, 0.1, 5)) == "no difference shown"
    assert judge(Interval(-0.05, -0.1, 0.0, 5)) == "no difference shown"


def test_pairs_of_unequal_number_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        paired_interval([0.1, 0.2], [0.1])


@pytest.mark.parametrize(("right", "n"), [(7, 10), (260, 372), (0, 12), (12, 12)])
def test_wilson_interval_equals_scipys(right: int, n: int) -> None:
    expected = stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(right / n, n) == (pytest.approx(expected.low), pytest.approx(expected.high))


def test_372_images_leave_about_five_points_open() -> None:
    assert wilson_half_width(0.7, 372) == pytest.approx(0.0464, abs=1e-3)
