"""Labels saved: how many labels the baseline needs for the accuracy a method reaches with fewer."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.optimize import isotonic_regression

from labelwise.measures.statistics import CONFIDENCE, FEWEST_DRAWS, Floats, mean_squares

_SAMPLES = 4000
_FINE = 64  # places between two numbers of labels where the curve is computed


@dataclass(frozen=True)
class LabelsSaved:
    """`labels` labels with a method match `matches` labels of the baseline, 95 % interval [low, high].

    The curve of the baseline reaches from `fewest` to `most` labels. Infinite: more than the most. Zero: fewer than
    the fewest.
    """

    labels: int
    matches: float
    low: float
    high: float
    n: int
    fewest: int
    most: int

    def to_json(self) -> dict[str, float | int | None]:
        """Encode for report.json; JSON has no infinity, so null."""
        return {key: None if value == math.inf else value for key, value in asdict(self).items()}


def labels_saved(
    baseline: dict[int, dict[int, Floats]], labels: int, method: dict[int, Floats], seed: int = 0
) -> LabelsSaved | None:
    """Read off the baseline's curve how many labels it needs to be as accurate as a method.

    The curve is the mean over draws and images, made monotone and joined by monotone cubics in the logarithm of the labels
    (curves bend: straight lines are further off, recipes/LOG.md). Its interval: the means of curve and method are drawn
    anew together, with their crossed covariance over draws x images (Student's t for the part of the draws, which are few),
    and each time the curve is read again.

    Args:
        baseline: By labels and draw, right or not, (T,); the same T test images everywhere. Numbers of labels with
            fewer than three draws are left out.
        labels: Labels of the method.
        method: By draw, right or not, (T,).
        seed: Of the samples.

    Returns:
        None where the baseline has one number of labels only, there is one test image, or fewer than three draws are shared by all.

    Source: Fritsch and Butland 1984 (SIAM J. Sci. Stat. Comput. 5), the slopes of the cubics.
    """
    counts = sorted(count for count, draws in baseline.items() if len(draws) >= FEWEST_DRAWS)
    arms = [*(baseline[count] for count in counts), method]
    shared = sorted(set.intersection(*(set(arm) for arm in arms)))
    if len(counts) < 2 or len(shared) < FEWEST_DRAWS or len(method[shared[0]]) == 1:
        return None
    means = np.array([np.mean(list(arm.values())) for arm in arms])  # of all draws that each has
    values = np.stack([np.stack([arm[draw] for draw in shared]) for arm in arms])  # (K + 1, R, T)
    _, r, t = values.shape
    squares = mean_squares(values)
    has = np.array([[draw in arm for draw in sorted(set().union(*arms))] for arm in arms], dtype=float)
    has /= has.sum(axis=1, keepdims=True)
    ties = has @ has.T / t  # a draw that two arms share ties their means
    by_draws = ties * _of_eigenvalues(squares.draws - squares.rest)
    by_images = ties * squares.rest + _of_eigenvalues(squares.images - squares.rest) / (r * t)
    rng = np.random.default_rng(seed)
    luck, ease = (
        rng.standard_normal((_SAMPLES, len(means))) @ _of_eigenvalues(each, np.sqrt)
        for each in (by_draws, by_images)
    )
    samples = means + luck / np.sqrt(rng.chisquare(r - 1, (_SAMPLES, 1)) / (r - 1)) + ease
    every = np.vstack([means, samples])
    matches, *read = _read_off(counts, every[:, :-1], every[:, -1])
    low, high = (
        float(np.quantile(read, share, method="nearest"))
        for share in ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
    )
    return LabelsSaved(labels, float(matches), low, high, r, counts[0], counts[-1])


def expected_accuracy(curve: dict[int, float], labels: int) -> float | None:
    """Read a curve at a number of labels; beyond its end it goes on as between its last two numbers.

    Made monotone, and straight in the logarithm of the labels. Curves bend down, so what is read beyond the end is rather too much.

    Args:
        curve: Mean accuracy by number of labels.
        labels: Where.

    Returns:
        None before its begin, and where it has one number of labels only.
    """
    counts = sorted(curve)
    if len(counts) < 2 or labels < counts[0]:
        return None
    rising = isotonic_regression([curve[count] for count in counts]).x
    knots = np.log(counts)
    beyond = max(0.0, math.log(labels) - knots[-1]) * (rising[-1] - rising[-2]) / (knots[-1] - knots[-2])
    return min(1.0, float(np.interp(math.log(labels), knots, rising) + beyond))


def _read_off(counts: Sequence[int], curves: Floats, accuracies: Floats) -> Floats:
    """Fewest labels at which each monotone curve reaches an accuracy; 0 or infinite beyond its ends, (S,).

    Args:
        counts: Numbers of labels, (K,), ascending.
        curves: Accuracies at those, (S, K).
        accuracies: What each curve shall reach, (S,).
    """
    rising = np.stack([isotonic_regression(curve).x for curve in curves])
    knots = np.log(counts)
    places = np.interp(np.arange(_FINE * (len(counts) - 1) + 1) / _FINE, np.arange(len(counts)), knots)
    heights = PchipInterpolator(knots, rising, axis=1)(places)  # (S, G)
    heights[:, ::_FINE] = rising  # exactly
    after = (heights < accuracies[:, None]).sum(axis=1)  # the first that is no lower: left end of a plateau
    last = np.clip(after, 1, len(places) - 1)[:, None]
    left, right = (np.take_along_axis(heights, each, axis=1)[:, 0] for each in (last - 1, last))
    share = np.divide(accuracies - left, right - left, out=np.zeros(len(rising)), where=right > left)
    share = share.clip(0, 1)  # outside, where it does not count
    labels = np.exp(places[last - 1] + share[:, None] * (places[last] - places[last - 1]))[:, 0]
    labels = np.where(accuracies > rising[:, -1], math.inf, labels)
    found: Floats = np.where(accuracies < rising[:, 0], 0.0, np.where(after == 0, counts[0], labels))
    return found


def _of_eigenvalues(matrix: Floats, function: Callable[[Floats], Floats] = np.positive) -> Floats:
    """A function of a symmetric matrix: of its eigenvalues, negative ones as zero."""
    values, vectors = np.linalg.eigh(matrix)
    found: Floats = (vectors * function(np.maximum(values, 0))) @ vectors.T
    return found
