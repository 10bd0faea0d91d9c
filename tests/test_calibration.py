"""Calibration error and reliability, against loops and against classifiers whose calibration is known."""

import math
from pathlib import Path

import numpy as np
import pytest
from scipy.special import softmax

from labelwise.measures.calibration import calibration_error, fit_temperature, quantile_of_next, reliability
from labelwise.predictions import CONFIDENCE, read_predictions, store_predictions


def test_calibration_error_equals_the_formula_written_as_loops() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0, 1, 500)
    confidence[:4] = (0.0, 1.0, 1 / 15, 14 / 15)  # the edges of bins: (0, 1/15], ..., (14/15, 1]
    right = rng.integers(0, 2, 500).astype(float)
    expected = 0.0
    for bin_ in range(15):
        low, high = bin_ / 15, (bin_ + 1) / 15
        inside = [i for i, c in enumerate(confidence) if low < c <= high or (c == 0 and bin_ == 0)]
        if inside:
            expected += len(inside) / 500 * abs(confidence[inside].mean() - right[inside].mean())
    assert calibration_error(confidence, right) == pytest.approx(expected)


@pytest.mark.parametrize("surplus", [0.0, 0.2])
def test_who_is_surer_than_right_by_so_much_is_said_so(surplus: float) -> None:
    rng = np.random.default_rng(1)
    chance = rng.uniform(0.2, 0.8, 100_000)
    right = (rng.uniform(size=len(chance)) < chance).astype(float)
    assert calibration_error(chance + surplus, right) == pytest.approx(surplus, abs=0.01)
    groups = reliability(chance + surplus, right)
    assert len(groups) == 10
    assert [group["n"] for group in groups] == [10_000] * 10
    assert [group["confidence"] - group["accuracy"] for group in groups] == pytest.approx(
        [surplus] * 10, abs=0.03
    )
    assert groups == sorted(groups, key=lambda group: group["confidence"])


def test_fewer_predictions_than_groups_are_groups_of_one() -> None:
    groups = reliability(np.array([0.9, 0.5, 0.7]), np.array([1.0, 0.0, 1.0]))
    assert groups == [
        {"confidence": 0.5, "accuracy": 0.0, "n": 1},
        {"confidence": 0.7, "accuracy": 1.0, "n": 1},
        {"confidence": 0.9, "accuracy": 1.0, "n": 1},
    ]


def test_confidence_is_the_probability_of_the_predicted_class(tmp_path: Path) -> None:
    file = tmp_path / "predictions.parquet"
    assert read_predictions(file, (CONFIDENCE,)) == {CONFIDENCE: []}
    for draw in range(2):
        probabilities = np.random.default_rng(draw).dirichlet([1, 1, 1], 7).astype(np.float32)
        store_predictions(
            file, "pixels", draw, 10, names=list("abcdefg"), truth=["x"] * 7, groups=[0] * 7, predicted=["x"] * 7, probabilities=probabilities,
        )  # fmt: skip
    found = read_predictions(file, ("probabilities", CONFIDENCE, "draw"))
    assert found[CONFIDENCE] == [max(each) for each in found["probabilities"]]
    assert found["draw"] == [0] * 7 + [1] * 7


@pytest.mark.parametrize("truly", [0.4, 1.0, 3.0])
def test_the_temperature_that_labels_were_drawn_with_is_found(truly: float) -> None:
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(20_000, 4)) * 2
    truth = np.array([rng.choice(4, p=each) for each in softmax(logits / truly, axis=1)])
    assert fit_temperature(logits, truth) == pytest.approx(truly, rel=0.05)


def test_few_labels_move_the_temperature_little() -> None:
    assert fit_temperature(np.zeros((0, 3)), np.zeros(0, int)) == pytest.approx(1, abs=1e-3)
    logits = np.array([[4.0, 0, 0]] * 5)
    right, wrong = np.zeros(5, int), np.ones(5, int)
    assert 0.5 < fit_temperature(logits, right) < 1 < fit_temperature(logits, wrong) < 5
    assert fit_temperature(np.tile(logits, (100, 1)), np.tile(wrong, 100)) > 15, "many are followed"


@pytest.mark.parametrize(("count", "coverage"), [(50, 0.9), (9, 0.9), (99, 0.99), (200, 0.5), (37, 0.8)])
def test_the_next_score_is_covered_as_often_as_promised(count: int, coverage: float) -> None:
    rng = np.random.default_rng(count)
    trials = 20_000
    scores = rng.gamma(0.3, size=(trials, count + 1))
    covered = np.mean([each[-1] <= quantile_of_next(each[:-1], coverage) for each in scores])
    exactly = math.ceil((count + 1) * coverage - 1e-9) / (count + 1)
    assert coverage <= exactly <= coverage + 1 / (count + 1) + 1e-9
    assert covered == pytest.approx(exactly, abs=4 * math.sqrt(coverage * (1 - coverage) / trials))


def test_too_few_scores_promise_nothing() -> None:
    assert quantile_of_next(np.arange(8.0), 0.9) == math.inf
    assert quantile_of_next(np.arange(9.0)[::-1], 0.9) == 8.0
    assert quantile_of_next(np.zeros(0), 0.5) == math.inf
