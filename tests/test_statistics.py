"""Intervals and verdicts: against loops and scipy, and over thousands of simulated experiments."""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from scipy import special, stats

from labelwise.measures import statistics
from labelwise.measures.linear import macro_accuracy
from labelwise.measures.statistics import (
    UNCLEAR,
    Folds,
    Interval,
    TestSet,
    accuracy_interval,
    by_group,
    difference_on_images,
    interval,
    interval_over_encoders,
    macro_interval,
    macro_values,
    mean_squares,
    paired_difference,
    verdict,
)
from labelwise.stages.encoders import gains_over_encoders
from labelwise.stages.scoring import Scores

Floats = npt.NDArray[np.float64]
LOGISTIC = 1.7  # a logistic curve this steep is close to the normal one


def experiment(
    rng: np.random.Generator, draws: int, images: int, level: float, by_draw: float, by_image: float
) -> Floats:
    """Right or not, (R, T): images differ in difficulty, draws in luck, and each cell is a coin of its own."""
    luck, ease = by_draw * rng.normal(size=(draws, 1)), by_image * rng.normal(size=(1, images))
    share = special.expit(LOGISTIC * (level + luck + ease))
    return (rng.random((draws, images)) < share).astype(float)


def expected(level: float, by_draw: float, by_image: float) -> float:
    """Accuracy over all draws and images there could be."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(101)
    shares = special.expit(LOGISTIC * (level + np.hypot(by_draw, by_image) * nodes))
    return float(weights @ shares / weights.sum())


def settings(rng: np.random.Generator) -> tuple[int, int, float, float, float]:
    """Draws, test images and variances as experiments have them: accuracies of 25 to 90 %, draws that differ by up to 15 points."""
    level, by_image = rng.uniform(-0.8, 1.5), rng.uniform(0.5, 2.5)
    return int(rng.integers(3, 11)), int(rng.integers(200, 2001)), level, rng.uniform(0, 0.4), by_image


@pytest.mark.slow
@pytest.mark.statistics
def test_95_of_100_intervals_hold_the_true_accuracy() -> None:
    rng = np.random.default_rng(0)
    holding, narrow = [], []
    for _ in range(2000):
        asked = settings(rng)
        right, truth = experiment(rng, *asked), expected(*asked[2:])
        found = interval(right)
        holding.append(found.low < truth < found.high)
        over_draws = stats.ttest_1samp(right.mean(axis=1), truth)
        narrow.append(over_draws.pvalue > 0.05)
    assert 0.93 <= np.mean(holding) <= 0.97
    assert np.mean(narrow) < 0.93, "an interval over the draws alone would be too narrow"


@pytest.mark.statistics
@pytest.mark.parametrize("draws", [3, 5, 10])
def test_intervals_hold_the_truth_at_any_number_of_draws(draws: int) -> None:
    rng = np.random.default_rng(draws)
    holding = []
    for _ in range(1000):
        _, images, *variances = settings(rng)
        found = interval(experiment(rng, draws, images, *variances))
        holding.append(found.low < expected(*variances) < found.high)
    assert 0.93 <= np.mean(holding) <= 0.975


@pytest.mark.statistics
def test_groups_of_test_images_are_drawn_again_together() -> None:
    rng = np.random.default_rng(5)
    holding, alone = [], []
    for _ in range(1000):
        draws, level = int(rng.integers(3, 11)), rng.uniform(-0.5, 1.0)
        groups = np.repeat(np.arange(60), rng.integers(3, 15, 60))  # sixty patients
        ease = rng.normal(size=60)[groups] + rng.normal(size=len(groups))
        spread = 0.2 * rng.normal(size=(draws, 1))
        right = (rng.random((draws, len(groups))) < special.expit(LOGISTIC * (level + spread + ease))).astype(
            float
        )
        truth = expected(level, 0.2, np.sqrt(2))
        found, narrow = accuracy_interval(right, groups), accuracy_interval(right)
        holding.append(found.low < truth < found.high)
        alone.append(narrow.low < truth < narrow.high)
    assert 0.93 <= np.mean(holding) <= 0.975
    assert np.mean(alone) < 0.9, "images of one patient are not independent"


@pytest.mark.statistics
@pytest.mark.parametrize("count", [5, 10, 30])
def test_equal_methods_on_a_few_unequal_groups_are_seldom_said_to_differ(count: int) -> None:
    rng = np.random.default_rng(count)
    verdicts = []
    for _ in range(1000):
        groups = np.repeat(np.arange(count), rng.integers(3, 30, count))
        ease, taste = rng.normal(size=count)[groups], 0.4 * rng.normal(size=count)[groups]
        first, second = (
            {
                draw: (rng.random(len(groups)) < special.expit(LOGISTIC * (ease + sign * taste))).astype(
                    float
                )
                for draw in range(5)
            }
            for sign in (1, -1)
        )
        difference = paired_difference(first, second, groups)
        assert difference is not None
        verdicts.append(verdict(difference))
    assert np.mean([each != "no difference shown" for each in verdicts]) <= 0.065


def test_groups_keep_every_mean_and_groups_of_one_change_nothing() -> None:
    rng = np.random.default_rng(0)
    values, groups = rng.random((3, 50)), rng.integers(0, 9, 50)
    np.testing.assert_allclose(by_group(values, groups).mean(axis=1), values.mean(axis=1))
    assert by_group(values, groups).shape == (3, 9)
    np.testing.assert_allclose(by_group(values, np.arange(50)), values)
    assert by_group(values, None) is values


@pytest.mark.statistics
def test_the_same_method_twice_is_seldom_said_to_differ() -> None:
    rng = np.random.default_rng(1)
    verdicts = []
    for _ in range(1000):
        draws, images, level, by_draw, by_image = settings(rng)
        ease = by_image * rng.normal(size=images)
        first, second = (
            {
                draw: (
                    rng.random(images) < special.expit(LOGISTIC * (level + by_draw * rng.normal() + ease))
                ).astype(float)
                for draw in range(draws)
            }
            for _ in range(2)
        )
        difference = paired_difference(first, second)
        assert difference is not None
        verdicts.append(verdict(difference))
    assert np.mean([each != "no difference shown" for each in verdicts]) <= 0.065


@pytest.mark.statistics
def test_shuffled_labels_seldom_give_a_verdict() -> None:
    rng = np.random.default_rng(2)
    verdicts = []
    for _ in range(1000):
        draws, images = int(rng.integers(3, 11)), int(rng.integers(200, 2001))
        labels = rng.integers(0, 10, images)  # nothing to do with the images
        first, second = (
            {draw: (_guess(rng, images) == labels).astype(float) for draw in range(draws)} for _ in range(2)
        )
        difference = paired_difference(first, second)
        assert difference is not None
        verdicts.append(verdict(difference))
    assert np.mean([each != "no difference shown" for each in verdicts]) <= 0.065


def _guess(rng: np.random.Generator, images: int) -> npt.NDArray[np.int64]:
    """Predictions of a classifier that prefers some classes, differently in every draw."""
    return rng.choice(10, images, p=rng.dirichlet(np.full(10, 2.0)))


@pytest.mark.statistics
def test_a_true_difference_is_seen_more_often_with_more_draws() -> None:
    rng = np.random.default_rng(3)
    seen = []
    for draws in (3, 10):
        helps = 0
        for _ in range(300):
            ease = 1.5 * rng.normal(size=400)
            first, second = (
                {
                    draw: (
                        rng.random(400) < special.expit(LOGISTIC * (level + 0.1 * rng.normal() + ease))
                    ).astype(float)
                    for draw in range(draws)
                }
                for level in (0.3, 0.05)
            )
            difference = paired_difference(first, second)
            assert difference is not None
            helps += verdict(difference) == "helps"
        seen.append(helps / 300)
    assert seen[0] + 0.2 < seen[1]
    assert seen[1] > 0.9


@pytest.mark.statistics
def test_mean_squares_equal_loops() -> None:
    values = np.random.default_rng(4).normal(size=(2, 4, 7))
    found = mean_squares(values)
    k, r, t = values.shape
    for one in range(k):
        for two in range(k):
            x, y = values[one], values[two]
            draws = sum((x[i].mean() - x.mean()) * (y[i].mean() - y.mean()) for i in range(r)) * t / (r - 1)
            images = sum((x[:, j].mean() - x.mean()) * (y[:, j].mean() - y.mean()) for j in range(t))
            rest = sum(
                (x[i, j] - x[i].mean() - x[:, j].mean() + x.mean())
                * (y[i, j] - y[i].mean() - y[:, j].mean() + y.mean())
                for i in range(r)
                for j in range(t)
            )
            assert found.draws[one, two] == pytest.approx(draws)
            assert found.images[one, two] == pytest.approx(images * r / (t - 1))
            assert found.rest[one, two] == pytest.approx(rest / ((r - 1) * (t - 1)))


@pytest.mark.statistics
def test_where_only_draws_differ_it_is_students_interval_over_draws() -> None:
    accuracies = np.random.default_rng(5).normal(0.7, 0.05, 7)
    found = interval(np.repeat(accuracies[:, None], 50, axis=1))
    right = stats.ttest_1samp(accuracies, 0.0).confidence_interval(0.95)
    assert (found.low, found.high, found.n) == (pytest.approx(right.low), pytest.approx(right.high), 7)


@pytest.mark.statistics
def test_where_only_images_differ_it_is_students_interval_over_images() -> None:
    right = (np.random.default_rng(6).random(300) < 0.7).astype(float)
    found = interval(np.repeat(right[None], 5, axis=0))
    one = stats.ttest_1samp(right, 0.0).confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(one.low), pytest.approx(one.high))


@pytest.mark.statistics
def test_more_test_images_give_a_narrower_interval() -> None:
    rng = np.random.default_rng(7)
    wide, narrow = (interval(experiment(rng, 5, images, 0.5, 0.05, 1.5)) for images in (200, 20_000))
    assert narrow.high - narrow.low < 0.5 * (wide.high - wide.low)


@pytest.mark.statistics
@pytest.mark.parametrize("encoders", [3, 5])
def test_intervals_over_encoders_hold_the_truth(encoders: int) -> None:
    """Encoders differ as much as draws do; one encoder's interval says nothing of that."""
    rng = np.random.default_rng(encoders)
    holding, alone = [], []
    for _ in range(500):
        _, _, level, by_draw, by_image = settings(rng)
        luck, ease = by_draw * rng.normal(size=(1, 5, 1)), by_image * rng.normal(size=(1, 1, 400))
        skill = 0.3 * rng.normal(size=(encoders, 1, 1))
        share = special.expit(LOGISTIC * (level + skill + luck + ease))
        right = (rng.random(share.shape) < share).astype(float)
        truth = expected(level, np.hypot(0.3, by_draw), by_image)
        found, one = interval_over_encoders(right), interval(right[0])
        holding.append(found.low < truth < found.high)
        alone.append(one.low < truth < one.high)
    assert 0.93 <= np.mean(holding) < 1
    assert np.mean(alone) < 0.9


@pytest.mark.statistics
def test_equal_methods_over_encoders_are_seldom_said_to_differ() -> None:
    rng = np.random.default_rng(11)
    said = []
    for _ in range(500):
        skill, luck = 0.3 * rng.normal(size=(2, 3, 1, 1)), 0.2 * rng.normal(size=(2, 1, 5, 1))
        share = special.expit(LOGISTIC * (0.3 + skill + luck + rng.normal(size=400)))
        right = (rng.random(share.shape) < share).astype(float)
        said.append(verdict(interval_over_encoders(right[0] - right[1])) != UNCLEAR)
    assert np.mean(said) <= 0.065


def test_an_interval_over_encoders_is_of_their_means_and_of_the_mean_one() -> None:
    rng = np.random.default_rng(4)
    values = rng.random((4, 3, 50))
    within = interval(values.mean(axis=0))
    means = values.reshape(4, -1).mean(axis=1)
    student = stats.t.interval(0.95, 3, means.mean(), stats.sem(means))
    found = interval_over_encoders(values)
    assert found.mean == pytest.approx(values.mean())
    assert found.high - found.mean == pytest.approx(
        np.hypot(student[1] - means.mean(), within.high - within.mean)
    )
    assert found.n == 3
    assert interval_over_encoders(values[:1]).low is None


def test_one_draw_has_no_interval_and_shows_nothing() -> None:
    found = interval(np.array([[1.0, 0.0, 1.0, 1.0]]))
    assert found == Interval(0.75, None, None, 1)
    assert verdict(found) == "no difference shown"


def test_one_test_image_has_no_interval() -> None:
    assert interval(np.array([[1.0], [0.0], [1.0], [0.0]])) == Interval(0.5, None, None, 4)


def test_where_nothing_is_wrong_the_images_still_leave_a_width() -> None:
    assert interval(np.ones((4, 200))) == Interval(1.0, 1.0, 1.0, 4)
    wilson = stats.binomtest(200, 200).proportion_ci(0.95, method="wilson")
    assert accuracy_interval(np.ones((4, 200))).low == pytest.approx(wilson.low)
    assert accuracy_interval(np.zeros((4, 200))).high == pytest.approx(1 - wilson.low)


@pytest.mark.statistics
@pytest.mark.parametrize("images", [100, 400])
def test_intervals_of_nearly_perfect_classifiers_hold_the_truth(images: int) -> None:
    rng = np.random.default_rng(images)
    truth = expected(4.5, 0.1, 1.5)
    assert truth > 0.99
    found = [accuracy_interval(experiment(rng, 3, images, 4.5, 0.1, 1.5)) for _ in range(1000)]
    assert np.mean([each.low <= truth <= each.high for each in found]) >= 0.93


def test_a_difference_is_paired_over_the_draws_both_have() -> None:
    rng = np.random.default_rng(8)
    first, second = (
        {draw: rng.integers(0, 2, 60).astype(float) for draw in draws} for draws in (range(4), range(1, 6))
    )
    found = paired_difference(first, second)
    assert found == interval(np.stack([first[draw] - second[draw] for draw in (1, 2, 3)]))
    assert found is not None
    assert found.n == 3


def test_no_shared_draw_means_no_difference() -> None:
    assert paired_difference({0: np.ones(3)}, {1: np.ones(3)}) is None
    assert paired_difference({}, {}) is None


def test_pairing_takes_out_what_draws_and_images_share() -> None:
    rng = np.random.default_rng(9)
    second = {draw: (rng.random(500) < 0.3 + 0.1 * draw).astype(float) for draw in range(5)}
    first = {draw: np.maximum(right, rng.random(500) < 0.1) for draw, right in second.items()}
    difference = paired_difference(first, second)
    assert difference is not None
    assert verdict(difference) == "helps"
    alone = interval(np.stack(list(first.values())))
    assert difference.high - difference.low < 0.2 * (alone.high - alone.low)


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.01, 0.1, "helps"),
        (-0.1, -0.01, "hurts"),
        (-0.1, 0.1, "no difference shown"),
        (0.0, 0.1, "no difference shown"),
    ],
)
def test_verdict_needs_an_interval_without_zero(low: float, high: float, words: str) -> None:
    assert verdict(Interval((low + high) / 2, low, high, 5)) == words


def test_two_draws_claim_nothing() -> None:
    assert verdict(Interval(0.1, 0.09, 0.11, 2)) == "no difference shown"
    assert verdict(Interval(0.1, 0.09, 0.11, 3)) == "helps"


def test_an_interval_is_written_with_its_n() -> None:
    assert interval(np.ones((1, 3))).to_json() == {"mean": 1.0, "low": None, "high": None, "n": 1}


def test_macro_values_average_to_the_macro_accuracy() -> None:
    rng = np.random.default_rng(10)
    truth = np.repeat([0, 3, 4], [200, 30, 7])
    predicted = np.where(rng.random((4, len(truth))) < 0.6, truth, 0)
    right = (predicted == truth).astype(float)
    values = macro_values(right, truth)
    assert values.mean(axis=1) == pytest.approx([macro_accuracy(each, truth) for each in predicted])


@pytest.mark.statistics
@pytest.mark.parametrize("sizes", [(300, 100, 40), (200, 50, 10)])
def test_macro_intervals_hold_the_truth(sizes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(11)
    truth = np.repeat([0, 1, 2], sizes)
    levels = np.array([1.2, 0.2, -0.5])
    true = np.mean([expected(level, 0.1, 1.0) for level in levels])
    holding = []
    for _ in range(1000):
        ease = rng.normal(size=len(truth))
        share = special.expit(LOGISTIC * (levels[truth] + 0.1 * rng.normal(size=(5, 1)) + ease))
        found = macro_interval((rng.random(share.shape) < share).astype(float), truth)
        holding.append(found.low < true < found.high)
    assert 0.93 <= np.mean(holding) <= 0.985


@pytest.mark.statistics
@pytest.mark.parametrize(("rare", "share"), [(5, 0.95), (5, 0.6), (8, 0.8), (15, 0.9)])
def test_macro_intervals_hold_the_truth_with_a_rare_class(rare: int, share: float) -> None:
    """Five draws that agree on seven of ten answers; 495 images of a class that is right in 98 %."""
    rng = np.random.default_rng(12)
    truth = np.repeat([0, 1], (495, rare))
    chance = np.where(truth == 0, 0.98, share)
    holding, widths = [], []
    for _ in range(500):
        own, anew = rng.random(len(truth)) < chance, rng.random((5, len(truth))) < chance
        found = macro_interval(np.where(rng.random(anew.shape) < 0.3, anew, own).astype(float), truth)
        holding.append(found.low <= (0.98 + share) / 2 <= found.high)
        widths.append(found.high - found.low)
    assert np.mean(holding) >= 0.95
    assert np.mean(widths) < 0.5, "and says something"


@pytest.mark.statistics
@pytest.mark.parametrize("rare", [6, 20])
def test_a_macro_difference_of_equal_methods_is_rarely_claimed(rare: int) -> None:
    rng = np.random.default_rng(13)
    truth = np.repeat([0, 1], (300, rare))
    test, claimed = TestSet(truth, None), []
    for _ in range(500):
        ease = rng.normal(size=len(truth))
        share = special.expit(LOGISTIC * (0.3 + ease + 0.1 * rng.normal(size=(2, 5, 1))))
        first, second = ((rng.random(each.shape) < each).astype(float) for each in share)
        found = test.macro_difference(dict(enumerate(first)), dict(enumerate(second)))
        claimed.append(verdict(found) != "no difference shown")
    assert np.mean(claimed) <= 0.065


def test_a_macro_difference_is_that_of_the_macro_accuracies() -> None:
    rng = np.random.default_rng(14)
    truth = np.repeat([0, 1, 2], (30, 12, 8))
    first, second = ({draw: rng.integers(0, 2, 50).astype(float) for draw in range(3)} for _ in range(2))
    for test in (
        TestSet(truth, None),
        Folds(dict.fromkeys(range(3), truth), dict.fromkeys(range(3), np.arange(50)), 0.25),
    ):
        found = test.macro_difference(first, second)
        means = [test.macro(each).mean for each in (first, second)]
        assert found.mean == pytest.approx(means[0] - means[1])
        assert found.low < found.mean < found.high
        assert test.macro_difference(first, {7: first[0]}) is None
    assert TestSet(np.repeat([0, 1], (46, 4)), None).macro_difference(first, second).low is None, (
        "four say nothing"
    )


@pytest.mark.parametrize(("images", "claims"), [(2, False), (4, False), (5, False), (6, True), (8, True)])
def test_a_few_images_that_all_agree_leave_a_difference_open(images: int, claims: bool) -> None:
    first, second = ({draw: np.full(images, value) for draw in range(3)} for value in (1.0, 0.0))
    found = paired_difference(first, second)
    assert found is not None
    assert found.low < 0.6
    assert (verdict(found) == "helps") is claims
    equal = paired_difference(first, first)
    assert equal is not None
    assert equal.low < 0 < equal.high


@pytest.mark.parametrize("by_class", [False, True])
def test_a_gain_over_encoders_is_left_as_open_as_that_of_one(by_class: bool) -> None:
    """Two test images that all encoders agree on, or a rare class of five, claim no more than with one encoder."""
    truth = np.repeat([0, 1], (95, 5)) if by_class else np.zeros(2, dtype=int)
    better = np.where(truth == 1, 1.0, 0.0) if by_class else np.ones(2)
    right = {
        10: {"simclr": dict.fromkeys(range(3), better), "supervised": dict.fromkeys(range(3), 0 * better)}
    }
    names, series = [f"{n}" for n in range(len(truth))], {10: {"series": "random"}}
    scores = Scores(right, TestSet(truth, None), names, None, ["a", "b"], [], by_class, series)
    (over,) = gains_over_encoders([scores] * 3)
    one = scores.difference(10, "simclr", "supervised")
    assert one is not None
    assert over["mean"] == pytest.approx(one.mean)
    assert over["low"] <= one.low < one.mean - 0.2
    assert over["high"] >= one.high
    assert over["verdict"] == "no difference shown"


def test_a_class_of_a_few_test_images_leaves_the_macro_accuracy_without_an_interval() -> None:
    truth = np.repeat([0, 1], [50, 4])
    right = np.random.default_rng(12).integers(0, 2, (5, 54)).astype(float)
    found = macro_interval(right, truth)
    assert (found.low, found.high) == (None, None)
    assert found.mean == pytest.approx(
        np.mean([macro_accuracy(np.where(each == 1, truth, -1), truth) for each in right])
    )


@pytest.mark.parametrize(("right", "images"), [(50, 60), (449, 449), (0, 30), (700, 2000)])
def test_what_images_leave_open_equals_scipys_wilson_interval(right: int, images: int) -> None:
    found = stats.binomtest(right, images).proportion_ci(0.95, method="wilson")
    low, high = statistics.left_open_by_images(right / images, images)
    assert (low, high) == pytest.approx((found.low, found.high))


def test_an_accuracy_interval_ends_at_0_and_1() -> None:
    right = np.ones((3, 40))
    right[0, :9] = 0
    wide = interval(right)
    assert wide.high > 1
    assert accuracy_interval(right) == replace(wide, high=1.0)
    assert accuracy_interval(1 - right).low == 0.0
    assert accuracy_interval(right[:1]).high is None


def test_no_difference_of_accuracies_is_beyond_a_hundred_points() -> None:
    first = {0: np.array([1.0, 1.0, 0.0]), 1: np.array([0.0, 1.0, 1.0])}
    second = {0: np.array([0.0, 1.0, 1.0]), 1: np.array([0.0, 0.0, 0.0])}
    found = paired_difference(first, second)
    assert found is not None
    assert (found.low, found.high) == (-1.0, 1.0)


def test_two_classifiers_differ_by_what_their_test_images_alone_leave_open() -> None:
    rng = np.random.default_rng(0)
    after, before = (rng.random((2, 400)) < [[0.9], [0.8]]).astype(float)
    truth = rng.integers(3, size=400)
    found = difference_on_images(after, before, truth, np.arange(400), by_class=False)
    oracle = stats.ttest_rel(after, before).confidence_interval()
    assert found.mean == pytest.approx(after.mean() - before.mean())
    assert (found.low, found.high) == pytest.approx((oracle.low, oracle.high), abs=0.003)
    tiled = (np.tile(each, 2) for each in (after, before, truth, np.arange(400)))
    twice = difference_on_images(*tiled, by_class=False)
    assert twice == found, "copies of an image are one"
    by_class = difference_on_images(after, before, truth, np.arange(400), by_class=True)
    parts = [stats.ttest_rel(after[truth == each], before[truth == each]) for each in range(3)]
    means = [(after - before)[truth == each].mean() for each in range(3)]
    half = [part.confidence_interval().high - mean for part, mean in zip(parts, means, strict=True)]
    assert by_class.mean == pytest.approx(np.mean(means))
    assert by_class.high == pytest.approx(np.mean(means) + np.linalg.norm(half) / 3)
    same = difference_on_images(before[:5], before[:5], truth[:5], np.arange(5), by_class=False)
    assert same.low is not None
    assert same.high is not None
    assert same.low < -0.3 < 0.3 < same.high, "five that agree prove nothing"
