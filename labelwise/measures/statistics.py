"""What draws and test images say together: means with intervals, paired differences, verdicts.

Labels are drawn several times, and every draw's classifier sees the same test images. Both are samples: other
labels could have been drawn, and other images could have been tested. So an interval comes from the crossed
variance of draws x images; one over the draws alone is too narrow (measured: recipes/LOG.md). Where there is no test set, the
labels are tested in folds, and the interval is that of a resampled training set.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy import stats

CONFIDENCE = 0.95
FEWEST_DRAWS = 3  # two may agree by chance, and then their interval is as narrow as one likes
FEWEST_PER_CLASS = 5  # test images; fewer may agree by chance, and then a class looks certain
_FEWEST_ERRORS = 10  # images; with fewer the normal distribution does not hold
_FEW_OF_A_CLASS = 2  # images of a small class that disagree with its others; as _FEWEST_ERRORS
HELPS, UNCLEAR, HURTS = "helps", "no difference shown", "hurts"

Floats = npt.NDArray[np.float64]
Groups = npt.NDArray[np.int64]
OfFew = Callable[[Floats], tuple[float, float]]


@dataclass(frozen=True)
class Interval:
    """A mean over n draws and its 95 % interval; without bounds when there is one draw, or one test image."""

    mean: float
    low: float | None
    high: float | None
    n: int

    def to_json(self) -> dict[str, float | int | None]:
        """Encode for report.json."""
        return asdict(self)


@dataclass(frozen=True)
class MeanSquares:
    """Analysis of variance of draws x images, for K quantities measured on both; each (K, K).

    Attributes:
        draws, images: Between draws, R - 1 degrees of freedom; between images, T - 1.
        rest: What neither explains, (R - 1)(T - 1) degrees of freedom.
    """

    draws: Floats
    images: Floats
    rest: Floats


def mean_squares(values: Floats) -> MeanSquares:
    """Mean squares and products of K quantities over two crossed samples.

    Args:
        values: (K, R, T): R draws, T test images, two or more of each.

    Source: Scheffe 1959, The Analysis of Variance, the two-way layout with one observation a cell.
    """
    _, r, t = values.shape
    centred = values - values.mean(axis=(1, 2), keepdims=True)
    draws, images = centred.mean(axis=2), centred.mean(axis=1)  # (K, R), (K, T)
    rest = centred - draws[:, :, None] - images[:, None, :]
    flat = rest.reshape(len(values), -1)
    return MeanSquares(
        t * draws @ draws.T / (r - 1), r * images @ images.T / (t - 1), flat @ flat.T / ((r - 1) * (t - 1))
    )


def interval(values: Floats) -> Interval:
    """Mean over draws and test images with a t interval that lets both be drawn again.

    Args:
        values: (R, T): of each draw, one value per test image, as 1 where it was right.

    The variance of the mean has two parts: what draws add to the rest, (draws - rest) / RT in mean squares, and
    images with the rest, images / RT. Each is taken times the square of Student's quantile for its own degrees
    of freedom, R - 1 and T - 1. One quantile after Satterthwaite for the sum of both held the truth a point or two
    less often with three draws (simulated; recipes/LOG.md).

    Source: Banerjee 1960 (Sankhya 22), for means whose variances are estimated apart.
    """
    r, t = values.shape
    mean = float(values.mean())
    if min(r, t) == 1:
        return Interval(mean, None, None, r)
    squares = mean_squares(values[None])
    draws, images, rest = (float(each[0, 0]) for each in (squares.draws, squares.images, squares.rest))
    by_draws, by_images = (float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) for count in (r, t))
    square = by_draws**2 * max(draws - rest, 0) + by_images**2 * max(images, rest)
    half = math.sqrt(square / (r * t))
    return Interval(mean, mean - half, mean + half, r)


def by_group(values: Floats, groups: Groups | None) -> Floats:
    """One value for each group of test images, so that groups are drawn again and not single images.

    Args:
        values: (R, T).
        groups: Number of each image's group, (T,); None where every image stands for itself.

    Returns:
        (R, G): the mean over groups of each draw is its mean over images, and what differs between groups is what their
        images add to it together.

    Source: Kish 1965, Survey Sampling, the variance of a mean over clusters of unequal size.
    """
    if groups is None:
        return values
    _, place = np.unique(groups, return_inverse=True)
    means = values.mean(axis=1, keepdims=True)
    sums = np.zeros((len(values), place.max() + 1))
    np.add.at(sums.T, place, (values - means).T)
    return np.asarray(means + sums * sums.shape[1] / values.shape[1])


def accuracy_interval(values: Floats, groups: Groups | None = None) -> Interval:
    """Mean accuracy with its interval, cut off at 0 and 1, which no accuracy can pass; values as in `by_group`.

    Where fewer than ten images are wrong, or right, it is at least as wide as Wilson's.
    """
    values = by_group(values, groups)
    return _of_an_accuracy(interval(values), values.shape[1])


def _of_an_accuracy(found: Interval, images: int) -> Interval:
    """An interval of an accuracy: at least Wilson's where nearly all images are right or wrong, and never past 0 or 1."""
    if found.low is None or found.high is None:
        return found
    low, high = found.low, found.high
    if min(found.mean, 1 - found.mean) * images < _FEWEST_ERRORS:
        least, most = left_open_by_images(found.mean, images)
        low, high = min(low, least), max(high, most)
    return _within(replace(found, low=low, high=high), 0.0)


def macro_interval(right: Floats, truth: npt.NDArray[np.int64], groups: Groups | None = None) -> Interval:
    """Mean over classes of the accuracy in each, with its interval if each class has five test images or more.

    Args:
        right: (R, T), 1 where a draw's classifier was right.
        truth: Class of each image, (T,).
        groups: As in `by_group`; then each class has to be in five groups or more.
    """
    found = interval(by_group(macro_values(right, truth), groups))
    return _within(
        _of_classes(found, right.mean(axis=0), truth, _each_in_one(groups, len(truth)), _accuracy_of_few), 0.0
    )


def _of_classes(
    found: Interval, values: Floats, truth: npt.NDArray[np.int64], groups: Groups, of_few: OfFew
) -> Interval:
    """An interval of a mean over classes: at least as wide as what each class's own images leave open, by Student, together.

    None where a class is in fewer than five groups: they may agree by chance, and then the class looks certain.

    Args:
        values: Of each image, its mean over draws, or one for each time it was tested, (T,).
        of_few: Interval of the mean of a class whose images hardly differ, by few of them.

    Source: Zou and Donner 2008 (Statistics in Medicine 27), an interval of a sum from those of its parts.
    """
    found = _if_enough_of_each(found, truth, groups)
    if found.low is None or found.high is None:
        return found
    below = above = 0.0
    classes = np.unique(truth)
    for each in classes:
        own = _means_of_groups(values[truth == each], groups[truth == each])
        parts = by_group(values[truth == each][None], groups[truth == each])[0]
        mean, count = float(parts.mean()), len(parts)
        half = (
            float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * float(parts.std(ddof=1)) / math.sqrt(count)
        )
        low, high = mean - half, mean + half
        if _disagreeing(own) < min(_FEWEST_ERRORS, max(_FEW_OF_A_CLASS, count / 4)):
            few_low, few_high = of_few(own)
            low, high = min(low, few_low), max(high, few_high)
        below, above = below + (mean - low) ** 2, above + (high - mean) ** 2
    low, high = found.mean - math.sqrt(below) / len(classes), found.mean + math.sqrt(above) / len(classes)
    return replace(found, low=min(found.low, low), high=max(found.high, high))


def _if_enough_of_each(found: Interval, truth: npt.NDArray[np.int64], groups: Groups) -> Interval:
    """A mean over classes, without its interval where a class is in fewer than five groups."""
    pairs = np.unique(np.stack([truth, groups]), axis=1)
    if np.unique(pairs[0], return_counts=True)[1].min() < FEWEST_PER_CLASS:
        return replace(found, low=None, high=None)
    return found


def paired_difference(
    first: dict[int, Floats], second: dict[int, Floats], groups: Groups | None = None
) -> Interval | None:
    """Mean of first minus second over the draws both have, with its interval; None if they share none.

    Args:
        first, second: By draw, one value per test image, (T,); the same images in the same order.
        groups: As in `by_group`.
    """
    shared = sorted(first.keys() & second.keys())
    if not shared:
        return None
    values = np.stack([first[draw] - second[draw] for draw in shared])
    found, own = interval(by_group(values, groups)), _each_in_one(groups, values.shape[1])
    return _of_a_difference(found, _means_of_groups(values.mean(axis=0), own))


def difference_on_images(
    first: Floats, second: Floats, truth: npt.NDArray[np.int64], groups: Groups, *, by_class: bool
) -> Interval:
    """Mean of first minus second, two classifiers, with an interval that lets test images alone be drawn again.

    Args:
        first, second: One value per test image, 1 where it was right, (T,).
        truth, groups: Class and number of the group of each image, (T,).
        by_class: Take the mean over classes; without bounds where one is in fewer than five groups.
    """
    values = first - second
    if by_class:
        mean = float(macro_values(values[None], truth).mean())
        found = _of_classes(Interval(mean, mean, mean, 1), values, truth, groups, _difference_of_few)
        return _within(found, -1.0)
    low, high = _difference_of_few(_means_of_groups(values, groups))
    return _within(Interval(float(values.mean()), low, high, 1), -1.0)


def _of_a_difference(found: Interval, values: Floats) -> Interval:
    """An interval of a difference: never past -1 and 1, and where fewer than ten images disagree, or agree, as wide as few allow.

    Args:
        values: Of each image or group, its mean over draws, (T,).
    """
    if found.low is None or found.high is None:
        return found
    low, high = found.low, found.high
    if _disagreeing(values) < _FEWEST_ERRORS:
        few_low, few_high = _difference_of_few(values)
        low, high = min(low, few_low), max(high, few_high)
    return _within(replace(found, low=low, high=high), -1.0)


def _disagreeing(values: Floats) -> float:
    """How many images or groups do not agree with the others: are wrong, or right, or better, or worse, whichever are fewer."""
    better, worse = float(values.clip(0).sum()), float((-values).clip(0).sum())
    return min(better + worse, len(values) - max(better, worse))


def _difference_of_few(values: Floats) -> tuple[float, float]:
    """Interval of a paired difference over few images, (T,): one more where the first is right, and one where the second is.

    With Student's quantile in place of the normal one, so that five who all agree are no proof, as to a sign test.

    Source: Bonett and Price 2012 (Journal of Educational and Behavioral Statistics 37).
    """
    count = len(values) + 2
    better, worse = (1 + values.clip(0).sum()) / count, (1 + (-values).clip(0).sum()) / count
    mean = float(better - worse)
    by_images = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    half = by_images * math.sqrt((better + worse - mean**2) / count)
    return mean - half, mean + half


def _accuracy_of_few(values: Floats) -> tuple[float, float]:
    """Wilson's interval of an accuracy over few images or groups, (T,)."""
    return left_open_by_images(float(values.mean()), len(values))


def _within(found: Interval, least: float) -> Interval:
    """An interval cut off where no accuracy, or no difference, can lie: below `least` and above 1."""
    if found.low is None or found.high is None:
        return found
    return replace(found, low=max(found.low, least), high=min(found.high, 1.0))


def _each_in_one(groups: Groups | None, images: int) -> Groups:
    """Number of each image's group, (T,), where each without one is its own."""
    return np.arange(images) if groups is None else groups


def _means_of_groups(values: Floats, groups: Groups) -> Floats:
    """The mean of each group's values, (T,) -> (G,)."""
    _, place, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    return np.asarray(np.bincount(place, values) / sizes)


def macro_values(right: Floats, truth: npt.NDArray[np.int64]) -> Floats:
    """Values per image whose mean is the macro accuracy, and whose spread is that within the classes.

    Args:
        right: (R, T), 1 where a draw's classifier was right.
        truth: Class of each image, (T,).

    Returns:
        (R, T): the influence of each image on the mean over classes of the accuracy in each.
    """
    present, place, sizes = np.unique(truth, return_inverse=True, return_counts=True)
    accuracies = np.array([right[:, truth == each].mean() for each in present])  # (C,)
    values: Floats = accuracies.mean() + (right - accuracies[place]) * len(truth) / (
        len(present) * sizes[place]
    )
    return values


def interval_over_encoders(values: Floats) -> Interval:
    """Mean over encoders, draws and test images, with an interval that lets all three be drawn again.

    The squares of two half widths are added: that of the encoders' means, by Student, and that of the mean encoder over
    draws and images. Each encoder's mean holds some of what draws and images add, so that it is rather too wide.

    Args:
        values: (E, R, T): of each encoder and draw, one value per test image, as 1 where it was right.

    Returns:
        Within -1 and 1; without bounds where there is one encoder, draw or image; `n` is the number of encoders, or of draws if they are fewer.
    """
    count = len(values)
    within = interval(values.mean(axis=0))
    n = min(count, values.shape[1])
    if count == 1 or within.low is None:
        return Interval(within.mean, None, None, n)
    spread = float(values.mean(axis=(1, 2)).std(ddof=1)) / math.sqrt(count)
    half = math.hypot(float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * spread, within.mean - within.low)
    return Interval(within.mean, max(within.mean - half, -1.0), min(within.mean + half, 1.0), n)


def resampled_interval(splits: Sequence[Floats], share: float) -> Interval:
    """Mean over splits of one set of labels, each trained on one part and tested on the rest, with its t interval.

    Splits have most of their labels in common, so that their spread tells too little: the variance of the mean is taken
    as 1 / J + `share` times that over the J splits, which is never less than what the images of a split leave open.

    Args:
        splits: Of each, one value per image it tested, (T,), as 1 where it was right.
        share: Images that a split tests over images that it can be trained on.

    Source: Nadeau and Bengio 2003 (Machine Learning 52), the corrected resampled t-test.
    """
    means, count = np.array([values.mean() for values in splits]), len(splits)
    mean = float(means.mean())
    if count == 1:
        return Interval(mean, None, None, 1)
    by_images = np.mean([values.var(ddof=1) / len(values) if len(values) > 1 else 0.0 for values in splits])
    square = (1 / count + share) * max(float(means.var(ddof=1)), float(by_images))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * math.sqrt(square)
    return Interval(mean, mean - half, mean + half, count)


@dataclass(frozen=True)
class TestSet:
    """The same test images for all draws, and what their answers say.

    Attributes:
        truth: Class of each image, (T,).
        groups: Number of each image's group, (T,); None where each stands for itself.
    """

    __test__ = False  # not a test, pytest
    truth: npt.NDArray[np.int64]
    groups: Groups | None

    def truth_of(self, draw: int) -> npt.NDArray[np.int64]:
        """Class of each image that a draw is tested on."""
        return self.truth

    def groups_of(self, draw: int) -> Groups | None:
        """Group of each image that a draw is tested on."""
        return self.groups

    def accuracy(self, draws: dict[int, Floats]) -> Interval:
        """Mean accuracy; `draws` as in `paired_difference`."""
        return accuracy_interval(np.stack(list(draws.values())), self.groups)

    def macro(self, draws: dict[int, Floats]) -> Interval:
        """Mean over classes of the accuracy in each."""
        return macro_interval(np.stack(list(draws.values())), self.truth, self.groups)

    def difference(self, first: dict[int, Floats], second: dict[int, Floats]) -> Interval | None:
        """First minus second, see `paired_difference`."""
        return paired_difference(first, second, self.groups)

    def macro_difference(self, first: dict[int, Floats], second: dict[int, Floats]) -> Interval | None:
        """First minus second in the mean over classes."""
        shared = sorted(first.keys() & second.keys())
        if not shared:
            return None
        values = np.stack([first[draw] - second[draw] for draw in shared])
        found = interval(by_group(macro_values(values, self.truth), self.groups))
        return self.left_open(found, values.mean(axis=0), by_class=True)

    def left_open(self, found: Interval, values: Floats, *, by_class: bool) -> Interval:
        """An interval of a difference, at least as wide as its images alone leave it; values: of each image, its mean, (T,)."""
        own = _each_in_one(self.groups, len(self.truth))
        if not by_class:
            return _of_a_difference(found, _means_of_groups(values, own))
        return _within(_of_classes(found, values, self.truth, own, _difference_of_few), -1.0)


@dataclass(frozen=True)
class Folds:
    """No test set: every draw is tested on one fold of the labels, and trained on others.

    Attributes:
        truth: By draw, class of each image it is tested on, (T,).
        groups: By draw, number of each one's group, (T,).
        share: As in `resampled_interval`.
    """

    truth: dict[int, npt.NDArray[np.int64]]
    groups: dict[int, Groups]
    share: float

    def truth_of(self, draw: int) -> npt.NDArray[np.int64]:
        """Class of each image that a draw is tested on."""
        return self.truth[draw]

    def groups_of(self, draw: int) -> Groups | None:
        """Group of each image that a draw is tested on."""
        return self.groups[draw]

    def accuracy(self, draws: dict[int, Floats]) -> Interval:
        """Mean accuracy; `draws` as in `paired_difference`, each with its own images."""
        tested = np.unique(np.concatenate([self.groups[draw] for draw in draws]))
        return _of_an_accuracy(self._interval(draws), len(tested))

    def macro(self, draws: dict[int, Floats]) -> Interval:
        """Mean over classes of the accuracy in each."""
        return _within(self._of_classes(draws, _accuracy_of_few), 0.0)

    def difference(self, first: dict[int, Floats], second: dict[int, Floats]) -> Interval | None:
        """First minus second over the draws both have; None if they share none."""
        shared = sorted(first.keys() & second.keys())
        if not shared:
            return None
        values = {draw: first[draw] - second[draw] for draw in shared}
        every, groups = (np.concatenate([of[draw] for draw in shared]) for of in (values, self.groups))
        return _of_a_difference(self._interval(values), _means_of_groups(every, groups))

    def macro_difference(self, first: dict[int, Floats], second: dict[int, Floats]) -> Interval | None:
        """First minus second in the mean over classes."""
        shared = sorted(first.keys() & second.keys())
        if not shared:
            return None
        values = {draw: first[draw] - second[draw] for draw in shared}
        return _within(self._of_classes(values, _difference_of_few), -1.0)

    def _of_classes(self, draws: dict[int, Floats], of_few: OfFew) -> Interval:
        found = self._interval(
            {draw: macro_values(values[None], self.truth[draw])[0] for draw, values in draws.items()}
        )
        values, truth, groups = (
            np.concatenate([of[draw] for draw in draws]) for of in (draws, self.truth, self.groups)
        )
        return _of_classes(found, values, truth, groups, of_few)

    def _interval(self, draws: dict[int, Floats]) -> Interval:
        splits = [by_group(values[None], self.groups[draw])[0] for draw, values in draws.items()]
        return resampled_interval(splits, self.share)


def verdict(difference: Interval) -> str:
    """Helps or hurts when three draws or more leave out zero, else no difference shown."""
    if difference.n < FEWEST_DRAWS:
        return UNCLEAR
    if difference.low is not None and difference.low > 0:
        return HELPS
    if difference.high is not None and difference.high < 0:
        return HURTS
    return UNCLEAR


def left_open_by_images(accuracy: float, images: int) -> tuple[float, float]:
    """Wilson's interval: what the test images alone leave open about an accuracy.

    Source: Wilson 1927 (JASA 22), the score interval of a proportion.
    """
    z = float(stats.norm.ppf((1 + CONFIDENCE) / 2))
    spread = math.sqrt(accuracy * (1 - accuracy) / images + z**2 / (4 * images**2))
    shrink = 1 + z**2 / images
    centre, half = (accuracy + z**2 / (2 * images)) / shrink, z * spread / shrink
    return centre - half, centre + half
