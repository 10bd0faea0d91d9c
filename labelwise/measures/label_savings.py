"""Labels saved: how many labels the baseline needs for the accuracy a method reaches with fewer."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import isotonic_regression

from labelwise.measures.statistics import CONFIDENCE, FEWEST_DRAWS, Floats, mean_squares

_SAMPLES = 4000


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

    The curve is the mean over draws and images, made monotone and interpolated in the logarithm of the labels. Its
    interval: the means of curve and method are drawn anew together, with their crossed covariance over draws x
    images (Student's t for the part of the draws, which are few), and each time the curve is read again.

    Args:
        baseline: By labels and draw, right or not, (T,); the same T test images everywhere. Numbers of labels with
            fewer than three draws are left out.
        labels: Labels of the method.
        method: By draw, right or not, (T,).
        seed: Of the samples.

    Returns:
        None where the baseline has one number of labels only, there is one test image, or fewer than three draws are shared by all.
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
    read = np.array([_read_off(counts, sample[:-1], sample[-1]) for sample in samples])
    low, high = (
        float(np.quantile(read, share, method="nearest"))
        for share in ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
    )
    return LabelsSaved(labels, _read_off(counts, means[:-1], means[-1]), low, high, r, counts[0], counts[-1])


def _read_off(counts: Sequence[int], curve: Floats, accuracy: float) -> float:
    """Fewest labels at which the monotone curve reaches an accuracy; 0 or infinite beyond its ends."""
    rising: npt.NDArray[np.float64] = isotonic_regression(curve).x
    if accuracy > rising[-1]:
        return math.inf
    after = int(np.searchsorted(rising, accuracy))  # the first that is no lower: left end of a plateau
    if after == 0:
        return float(counts[0]) if accuracy == rising[0] else 0.0
    share = (accuracy - rising[after - 1]) / (rising[after] - rising[after - 1])
    low, high = math.log(counts[after - 1]), math.log(counts[after])
    return math.exp(low + share * (high - low))


def _of_eigenvalues(matrix: Floats, function: Callable[[Floats], Floats] = np.positive) -> Floats:
    """A function of a symmetric matrix: of its eigenvalues, negative ones as zero."""
    values, vectors = np.linalg.eigh(matrix)
    found: Floats = (vectors * function(np.maximum(values, 0))) @ vectors.T
    return found
