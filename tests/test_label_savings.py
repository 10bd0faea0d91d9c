"""Labels saved: known curves, their ends, and simulated experiments."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import special
from scipy.interpolate import PchipInterpolator

from labelwise.measures import label_savings
from labelwise.measures.label_savings import _read_off, expected_accuracy, labels_saved
from labelwise.reports.text import saved_in_words

COUNTS = (10, 40, 160, 640)
Floats = npt.NDArray[np.float64]


def exact(accuracy: float, draws: int = 3, images: int = 1000) -> dict[int, Floats]:
    """The same in every draw: that share of the images right."""
    return dict.fromkeys(range(draws), (np.arange(images) < accuracy * images).astype(float))


def curve(*accuracies: float) -> dict[int, dict[int, Floats]]:
    return dict(zip(COUNTS, map(exact, accuracies), strict=False))


@pytest.mark.parametrize(
    ("accuracy", "labels"),
    [(0.2, 10), (0.4, 40), (0.3, 20), (0.6, 160), (0.7, 320), (0.8, 640), (0.9, math.inf), (0.1, 0)],
)
def test_the_curve_is_read_in_the_logarithm_of_the_labels(accuracy: float, labels: float) -> None:
    found = labels_saved(curve(0.2, 0.4, 0.6, 0.8), 10, exact(accuracy))
    assert found is not None
    assert found.matches == pytest.approx(labels)
    assert found.low <= found.matches <= found.high


def test_the_left_end_of_a_plateau_counts() -> None:
    found = labels_saved(curve(0.2, 0.6, 0.6, 0.8), 10, exact(0.6))
    assert found is not None
    assert found.matches == pytest.approx(40)


def test_a_curve_that_falls_is_made_monotone_first() -> None:
    found = labels_saved(curve(0.2, 0.7, 0.5, 0.8), 10, exact(0.6))
    assert found is not None
    assert found.matches == pytest.approx(40)  # 0.7 and 0.5 become 0.6 each


def test_beyond_the_curve_is_null_or_zero_in_json() -> None:
    above, below = (
        found.to_json()
        for accuracy in (0.95, 0.05)
        if (found := labels_saved(curve(0.2, 0.4, 0.6, 0.8), 10, exact(accuracy)))
    )
    assert (above["matches"], above["low"], above["high"]) == (None, None, None)
    assert (below["matches"], below["low"], below["high"]) == (0, 0, 0)


def test_one_count_or_two_draws_say_nothing() -> None:
    assert labels_saved(curve(0.5), 10, exact(0.6)) is None
    assert labels_saved(curve(0.5, 0.6), 10, exact(0.6, draws=2)) is None


def test_numbers_of_labels_with_too_few_draws_are_left_out() -> None:
    whole = curve(0.2, 0.4, 0.6, 0.8)
    assert labels_saved({**whole, 500: exact(0.1, draws=1)}, 10, exact(0.5)) == labels_saved(
        whole, 10, exact(0.5)
    )


def test_the_ends_are_those_of_the_curve_that_was_read() -> None:
    found = labels_saved({**curve(0.2, 0.4), 500: exact(0.9, draws=1)}, 10, exact(0.6))
    assert found is not None
    assert (found.matches, found.fewest, found.most) == (math.inf, 10, 40)


def test_every_draw_counts_in_the_means_and_shared_ones_in_the_spread() -> None:
    method = {**exact(0.5), 3: exact(0.7)[0], 4: exact(0.7)[0], 5: exact(0.7)[0]}
    found = labels_saved(curve(0.2, 0.4, 0.6, 0.8), 10, method)
    assert found is not None
    assert found.matches == pytest.approx(160)  # 0.6 is the mean of all six
    assert found.n == 3


@pytest.mark.slow
@pytest.mark.statistics
@pytest.mark.parametrize("draws", [3, 5, 10])
def test_intervals_hold_the_true_labels(monkeypatch: pytest.MonkeyPatch, draws: int) -> None:
    monkeypatch.setattr(label_savings, "_SAMPLES", 500)
    rng = np.random.default_rng(draws)
    levels, method, images = np.array([-0.6, 0.0, 0.6, 1.2]), 0.3, 600
    nodes, weights = np.polynomial.hermite_e.hermegauss(101)

    def expected(level: float) -> float:
        return float(weights @ special.expit(1.7 * (level + math.hypot(0.15, 1.5) * nodes)) / weights.sum())

    accuracies = [expected(level) for level in levels]
    share = (expected(method) - accuracies[1]) / (accuracies[2] - accuracies[1])
    truth = math.exp(math.log(COUNTS[1]) + share * math.log(COUNTS[2] / COUNTS[1]))
    holding = []
    for _ in range(150):
        ease = 1.5 * rng.normal(size=images)
        luck = 0.15 * rng.normal(size=(len(levels) + 1, draws, 1))
        chance = special.expit(1.7 * (np.append(levels, method)[:, None, None] + luck + ease))
        right = (rng.random(chance.shape) < chance).astype(float)
        *curves, top = [dict(enumerate(each)) for each in right]
        found = labels_saved(dict(zip(COUNTS, curves, strict=True)), 10, top)
        assert found is not None
        holding.append(found.low <= truth <= found.high)
    assert 0.9 <= np.mean(holding) < 1


@pytest.mark.slow
@pytest.mark.statistics
@pytest.mark.parametrize("bend", ["slows down", "speeds up", "both"])
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_curves_that_bend_are_read_nearly_right(
    monkeypatch: pytest.MonkeyPatch, bend: str, share: float
) -> None:
    """Baselines measured at every fourfold number of labels, level against the logarithm of the labels."""
    monkeypatch.setattr(label_savings, "_SAMPLES", 500)
    shapes = {
        "slows down": lambda x: 1 - (1 - x) ** 2.2,
        "speeds up": lambda x: x**2.2,
        "both": lambda x: special.expit(10 * (x - 0.5)),
    }
    rng = np.random.default_rng(7)
    places = np.array([0, 1 / 3, 2 / 3, 1, share])  # the last: the method, as good as the baseline is there
    levels, truth = -0.6 + 1.8 * shapes[bend](places), COUNTS[0] * 64**share
    holding, read = [], []
    for _ in range(100):
        ease = 1.5 * rng.normal(size=600)
        chance = special.expit(1.7 * (levels[:, None, None] + 0.15 * rng.normal(size=(5, 5, 1)) + ease))
        *curves, top = [dict(enumerate(each)) for each in (rng.random(chance.shape) < chance).astype(float)]
        found = labels_saved(dict(zip(COUNTS, curves, strict=True)), 10, top)
        assert found is not None
        holding.append(found.low <= truth <= found.high)
        read.append(found.matches)
    assert np.mean(holding) >= 0.9
    assert 0.8 < np.median(read) / truth < 1.3  # of 250: 0.90 to 1.14; of straight lines 0.78 to 1.29


@pytest.mark.parametrize("count", [2, 3, 5])
def test_between_measured_numbers_it_is_scipys_monotone_cubic(count: int) -> None:
    rng = np.random.default_rng(count)
    counts = np.sort(rng.choice(np.arange(5, 3000), count, replace=False)).tolist()
    curves = np.sort(rng.random((20, count)), axis=1)
    wanted = curves[:, 0] + rng.random(20) * (curves[:, -1] - curves[:, 0])
    found = _read_off(counts, curves, wanted)
    for curve, accuracy, labels in zip(curves, wanted, found, strict=True):
        cubic = PchipInterpolator(np.log(counts), curve)
        assert cubic(math.log(labels)) == pytest.approx(accuracy, abs=5e-4)


@pytest.mark.parametrize(
    ("ends", "words"),
    [
        (
            {},
            "match 62 without [40, more than 135]; at 0.4 a label that saves 19.60 [10.80, more than 48.80]",
        ),
        ({"high": 90.0}, "match 62 without [40, 90]; at 0.4 a label that saves 19.60 [10.80, 30.80]"),
        (
            {"low": 0.0, "high": 90.0},
            "[fewer than 13, 90]; at 0.4 a label that saves 19.60 [less than 0.00, 30.80]",
        ),
        ({"matches": None}, "match more than 135 without"),
    ],
)
def test_labels_saved_are_told_in_labels_and_in_money(ends: dict[str, float], words: str) -> None:
    saved = {"labels": 13, "matches": 62.0, "low": 40.0, "high": None, "fewest": 13, "most": 135} | ends
    assert words in saved_in_words(saved, 0.4)
    assert saved_in_words(saved, 0.4).startswith(saved_in_words(saved, None))
    assert "at 0 a label that saves" in saved_in_words(saved, 0)


def test_an_interval_that_holds_everything_says_nothing() -> None:
    saved = {"labels": 170, "matches": None, "low": 0.0, "high": None, "fewest": 170, "most": 341}
    words = "170 labels: how many without pretraining match them cannot be told from these numbers"
    assert saved_in_words(saved, None) == saved_in_words(saved, 0.4) == words


def test_more_labels_than_the_baseline_was_measured_at_are_not_compared_with_fewer() -> None:
    beyond: dict[str, Any] = {"matches": None, "low": None, "high": None, "fewest": 10, "most": 20}
    assert saved_in_words({**beyond, "labels": 32}, 0.4).endswith("cannot be told from these numbers")
    assert saved_in_words({**beyond, "labels": 20}, 0.4) == (
        "20 labels with pretraining match more than 20 without [more than 20, more than 20]"
    ), "in money that is more than nothing"
    worse = {"labels": 32, "matches": 15.0, "low": 11.0, "high": None, "fewest": 10, "most": 20}
    assert "32 labels with pretraining match 15 without [11, more than 20]" in saved_in_words(worse, None)


@pytest.mark.parametrize(
    ("labels", "accuracy"),
    [
        (9, None),
        (10, 0.2),
        (20, 0.3),
        (40, 0.4),
        (80, 0.5),
        (160, 0.6),
        (320, 0.7),
        (2560, 1.0),
        (10**6, 1.0),
    ],
)
def test_a_curve_goes_on_as_it_ended_and_never_above_all_right(labels: int, accuracy: float | None) -> None:
    found = expected_accuracy({160: 0.6, 10: 0.2, 40: 0.4}, labels)
    assert found == (accuracy if accuracy is None else pytest.approx(accuracy))


def test_a_curve_that_falls_promises_nothing_and_one_number_is_no_curve() -> None:
    assert expected_accuracy({10: 0.2, 40: 0.7, 160: 0.5}, 640) == pytest.approx(0.6)
    assert expected_accuracy({10: 0.2}, 10) is None
    assert expected_accuracy({}, 10) is None
