"""Whether a classifier is as often right as it says, and what makes it so: one temperature, and sets of classes that hold the right one."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

Floats = npt.NDArray[np.float64]

_BINS = 15  # Guo et al. 2017
_POINTS = 10
_WIDEST = 20.0  # temperature, or its inverse
_USUAL = (
    0.5  # how far the logarithm of a temperature usually lies from 0 (measured 2026-11-27, recipes/LOG.md)
)


def calibration_error(confidence: Floats, right: Floats) -> float:
    """Expected calibration error: mean distance of confidence and accuracy in 15 equal ranges of confidence.

    Chance alone makes it larger than zero, the more so the fewer predictions there are.

    Args:
        confidence: Probability of the predicted class, (n,).
        right: 1 where the prediction was right, else 0, (n,).

    Source: Guo et al. 2017 (arXiv 1706.04599), Eq. 3.
    """
    place = np.clip(np.ceil(confidence * _BINS).astype(int) - 1, 0, _BINS - 1)
    surplus = np.bincount(place, weights=confidence - right, minlength=_BINS)
    return float(np.abs(surplus).sum() / len(right))


def reliability(confidence: Floats, right: Floats) -> list[dict[str, Any]]:
    """Mean confidence and accuracy of ten groups of equal size, the least sure first; arguments as above."""
    order = np.argsort(confidence, kind="stable")
    return [
        {
            "confidence": float(confidence[group].mean()),
            "accuracy": float(right[group].mean()),
            "n": len(group),
        }
        for group in np.array_split(order, min(_POINTS, len(order)))
    ]


def fit_temperature(logits: Floats, truth: npt.NDArray[np.int64]) -> float:
    """The number that logits are divided by so that their log loss is least; 1 where few labels tell nothing else.

    The logarithm of the temperature has a normal prior, or 20 labels would be followed wherever they lead.

    Args:
        logits: Of images that the classifier did not learn from, (n, C).
        truth: Their class indices, (n,).

    Source: Guo et al. 2017 (arXiv 1706.04599), Sec. 4.2; the prior is ours.
    """
    place = np.arange(len(truth))

    def cost(log_temperature: float) -> float:
        scores = log_softmax(logits / math.exp(log_temperature), axis=1)
        return float(-scores[place, truth].sum() + (log_temperature / _USUAL) ** 2 / 2)

    ends = (-math.log(_WIDEST), math.log(_WIDEST))
    return math.exp(minimize_scalar(cost, bounds=ends, method="bounded").x)


def quantile_of_next(scores: Floats, coverage: float) -> float:
    """The number that the next score is not above in so large a share of cases, if all n + 1 come in any order alike.

    Args:
        scores: (n,).
        coverage: Between 0 and 1.

    Returns:
        The ceil((n + 1) coverage)-th smallest of them; infinity where n is too small for that.

    Source: Vovk et al. 2005; Lei et al. 2018 (arXiv 1604.04173), Sec. 2.
    """
    place = math.ceil((len(scores) + 1) * coverage - 1e-9)
    return float(np.sort(scores)[place - 1]) if place <= len(scores) else math.inf
