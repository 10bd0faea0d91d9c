"""Whether a classifier is as often right as it says: confidence against accuracy."""

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_BINS = 15  # Guo et al. 2017
_POINTS = 10


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
