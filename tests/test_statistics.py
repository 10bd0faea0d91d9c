"""Intervals and verdicts, against printed tables and scipy's own tests."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from labelwise.measures import statistics
from labelwise.measures.statistics import (
    Interval,
    accuracy_interval,
    interval,
    paired_difference,
    verdict,
)

# Two-sided 95 % points of Student's t, from a printed table: values in the sample, t.
T_TABLE = [(2, 12.706), (3, 4.303), (5, 2.776), (10, 2.262), (30, 2.045)]


@pytest.mark.parametrize(("n", "t"), T_TABLE)
def test_interval_equals_a_table_of_students_t(n: int, t: float) -> None:
    values = np.linspace(0.60, 0.68, n)
    half = t * values.std(ddof=1) / math.sqrt(n)
    found = interval(list(values))
    assert found.n == n
    assert found.mean == pytest.approx(0.64)
    assert found.low == pytest.approx(0.64 - half, rel=1e-3)
    assert found.high == pytest.approx(0.64 + half, rel=1e-3)


def test_interval_equals_scipys_one_sample_interval() -> None:
    values = np.random.default_rng(1).normal(0.7, 0.05, 7)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    found = interval(list(values))
    assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high))


def test_95_of_100_intervals_hold_the_true_mean() -> None:
    samples = np.random.default_rng(2).normal(0.5, 0.1, (2000, 5))
    found = [interval(list(sample)) for sample in samples]
    holding = np.mean([each.low < 0.5 < each.high for each in found])
    assert holding == pytest.approx(0.95, abs=0.015)  # three standard errors of 2,000 intervals


def test_one_draw_has_no_interval_and_shows_nothing() -> None:
    found = interval([0.7])
    assert found == Interval(0.7, None, None, 1)
    assert verdict(found) == "no difference shown"


def test_paired_difference_equals_the_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    second = rng.normal(0.5, 0.1, 8)
    first = second + rng.normal(0.03, 0.01, 8)
    expected = stats.ttest_rel(first, second).confidence_interval(0.95)
    found = paired_difference(dict(enumerate(first)), dict(enumerate(second)))
    assert found is not None
    assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high))


def test_draws_are_paired_by_number_not_by_place() -> None:
    found = paired_difference({0: 0.5, 1: 0.6, 2: 0.9}, {2: 0.8, 0: 0.4, 1: 0.5})
    assert found is not None
    assert found.mean == pytest.approx(0.1)
    assert found.high - found.low == pytest.approx(0.0, abs=1e-9)  # each gains exactly 0.1


def test_only_draws_that_both_have_are_compared() -> None:
    found = paired_difference({0: 0.5, 1: 0.6, 2: 0.99}, {0: 0.4, 1: 0.4, 7: 0.01})
    assert found is not None
    assert (found.n, found.mean) == (2, pytest.approx(0.15))


def test_without_a_shared_draw_there_is_no_difference_to_show() -> None:
    assert paired_difference({0: 0.5}, {1: 0.4}) is None
    assert paired_difference({}, {}) is None


def test_pairing_sees_a_small_steady_gain_that_draws_would_hide() -> None:
    worse = dict(enumerate([0.30, 0.45, 0.60, 0.75]))
    better = dict(enumerate([0.32, 0.465, 0.621, 0.768]))
    assert stats.ttest_ind(list(better.values()), list(worse.values())).pvalue > 0.5
    assert verdict(paired_difference(better, worse)) == "helps"
    assert verdict(paired_difference(worse, better)) == "hurts"


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.001, 0.1, "helps"),
        (0.0, 0.1, "no difference shown"),
        (-0.02, 0.1, "no difference shown"),
        (-0.1, 0.0, "no difference shown"),
        (-0.1, -0.001, "hurts"),
    ],
)
def test_verdict_needs_an_interval_without_zero(low: float, high: float, words: str) -> None:
    assert verdict(Interval((low + high) / 2, low, high, 5)) == words


def test_an_interval_is_written_with_its_n() -> None:
    assert interval([0.7]).to_json() == {"mean": 0.7, "low": None, "high": None, "n": 1}


@pytest.mark.parametrize(("right", "images"), [(7, 10), (260, 372), (0, 12), (12, 12), (1, 2)])
def test_test_set_margin_equals_scipys_wilson_interval(right: int, images: int) -> None:
    expected = stats.binomtest(right, images).proportion_ci(0.95, method="wilson")
    found = statistics.test_set_margin(right / images, images)
    assert found == pytest.approx((expected.high - expected.low) / 2)


def test_372_images_leave_about_five_points_open() -> None:
    assert statistics.test_set_margin(0.7, 372) == pytest.approx(0.0464, abs=1e-3)


def test_an_accuracy_interval_ends_at_0_and_1() -> None:
    wide = accuracy_interval([0.82, 0.95, 0.99])
    assert wide == replace(interval([0.82, 0.95, 0.99]), high=1.0)
    assert accuracy_interval([0.0, 0.0, 0.3]).low == 0.0
    assert accuracy_interval([0.4, 0.41, 0.42]) == interval([0.4, 0.41, 0.42])
    assert accuracy_interval([0.5]).high is None


def test_two_draws_claim_nothing_however_well_they_agree() -> None:
    assert verdict(interval([0.1000, 0.1001])) == "no difference shown"
    assert verdict(interval([-0.067, -0.067])) == "no difference shown"
    assert verdict(interval([0.1000, 0.1001, 0.1002])) == "helps"
