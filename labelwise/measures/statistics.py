"""What a set of draws says: means with intervals, paired differences, verdicts."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
FEWEST_DRAWS = 3  # two may agree by chance, and then their interval is as narrow as one likes
HELPS, UNCLEAR, HURTS = "helps", "no difference shown", "hurts"


@dataclass(frozen=True)
class Interval:
    """A mean over n draws and its 95 % interval; without bounds when there is one draw."""

    mean: float
    low: float | None
    high: float | None
    n: int

    def to_json(self) -> dict[str, float | int | None]:
        """Encode for report.json."""
        return asdict(self)


def interval(values: Sequence[float]) -> Interval:
    """Mean of independent values with Student's t interval.

    Args:
        values: One per draw, at least one.

    Source: Student 1908; the t interval over draws. It holds for these test images and this encoder:
    neither is drawn again.
    """
    n = len(values)
    mean = float(np.mean(values))
    if n == 1:
        return Interval(mean, None, None, 1)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def accuracy_interval(accuracies: Sequence[float]) -> Interval:
    """Mean accuracy over draws with its t interval, cut off at 0 and 1, which no accuracy can pass."""
    found = interval(accuracies)
    if found.low is None or found.high is None:
        return found
    return replace(found, low=max(found.low, 0.0), high=min(found.high, 1.0))


def paired_difference(first: dict[int, float], second: dict[int, float]) -> Interval | None:
    """Mean of first minus second over the draws both have, with its interval; None if they share none.

    Args:
        first, second: Accuracy by draw.
    """
    shared = sorted(first.keys() & second.keys())
    return interval([first[draw] - second[draw] for draw in shared]) if shared else None


def verdict(difference: Interval) -> str:
    """Helps or hurts when three draws or more leave out zero, else no difference shown."""
    if difference.n < FEWEST_DRAWS:
        return UNCLEAR
    if difference.low is not None and difference.low > 0:
        return HELPS
    if difference.high is not None and difference.high < 0:
        return HURTS
    return UNCLEAR


def test_set_margin(accuracy: float, images: int) -> float:
    """Half width of the Wilson interval: what the test images alone leave open about an accuracy.

    Source: Wilson 1927 (JASA 22), the score interval of a proportion.
    """
    z = float(stats.norm.ppf((1 + CONFIDENCE) / 2))
    spread = math.sqrt(accuracy * (1 - accuracy) / images + z**2 / (4 * images**2))
    return z * spread / (1 + z**2 / images)
