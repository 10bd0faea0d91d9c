"""What every classifier of a comparison got right, from its stored predictions."""

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np

from labelwise import rundir
from labelwise.errors import CheckpointError
from labelwise.measures.statistics import FEWEST_PER_CLASS, Floats, Folds, Interval, TestSet, macro_values
from labelwise.predictions import CONFIDENCE, read_predictions
from labelwise.rundir import RANDOM, SUGGESTED, RunDirectory

PREDICTED = ("method", "labels", "draw", "name", "label", "group", "prediction", CONFIDENCE)  # columns

ARMS = {
    "simclr": "SimCLR, fine-tuned",
    "simclr_probe": "SimCLR, linear probe",
    "supervised": "From scratch",
    "random_probe": "Random features, probe",
    "pixels": "Pixels, logistic regression",
    "imagenet": "ImageNet weights, fine-tuned",
    "imagenet_probe": "ImageNet weights, linear probe",
    "dinov2_probe": "DINOv2, linear probe",
}
OURS = ("simclr", "simclr_probe", "supervised", "random_probe", "pixels")  # all else others trained

Result = dict[str, Any]


def classifier_of(result: Result) -> tuple[str, int, int]:
    """Method, number of labels and draw: which classifier a result is of."""
    return result["method"], result["labels"], result["draw"]


def without_result(results: list[Result], predictions: dict[str, list[Any]]) -> set[tuple[str, int, int]]:
    """Classifiers that have predictions and no result."""
    keys = zip(*(predictions[key] for key in ("method", "labels", "draw")), strict=True)
    return set(keys) - set(map(classifier_of, results))


def counts_of_all_labels(results: list[Result]) -> set[int]:
    """The number of labels that was all that could be drawn, if it was measured."""
    return {
        row["labels"]
        for row in results
        if row["labels"] >= row["labels_there"] and row.get("series", RANDOM) == RANDOM
    }


def series_by_labels(results: list[Result]) -> dict[int, dict[str, Any]]:
    """At each number of labels the `series`, and where `suggest` chose labels how many (`suggested`); earlier versions noted none."""
    return {
        row["labels"]: {"series": row["series"], "suggested": row["suggested"]}
        if row.get("series") == SUGGESTED
        else {"series": row.get("series", RANDOM)}
        for row in results
    }


@dataclass(frozen=True)
class Scores:
    """What every classifier got right.

    Attributes:
        right: By labels, method and draw: 1 where right, else 0, (T,).
        test: What was tested, the same images for all or folds of the labels in turn.
        names: Of all images that were tested, sorted.
        groups: How many groups they are in; None where each stands for itself.
        classes: That were tested; the truth of `test` is a place in this list.
        untested: Classes without a test image.
        by_class: Differences are of the mean over classes: classes differ in size, and each has test images enough.
        series: See `series_by_labels`.
    """

    right: dict[int, dict[str, dict[int, Floats]]]
    test: TestSet | Folds
    names: list[str]
    groups: int | None
    classes: list[str]
    untested: list[str]
    by_class: bool
    series: dict[int, dict[str, Any]]

    def difference(self, labels: int, first: str, second: str) -> Interval | None:
        """One method minus another at a number of labels, over the draws both have; None if they share none."""
        arms = self.right[labels]
        compare = self.test.macro_difference if self.by_class else self.test.difference
        return compare(arms.get(first, {}), arms.get(second, {}))

    def left_open(self, found: Interval, values: Floats) -> Interval:
        """An interval of a difference, as `TestSet.left_open`; in folds as it is."""
        return (
            found
            if isinstance(self.test, Folds)
            else self.test.left_open(found, values, by_class=self.by_class)
        )

    def counted(self, draws: dict[int, Floats]) -> dict[int, Floats]:
        """Of each draw, values per test image whose mean is what differences are of, (T,)."""
        if not self.by_class:
            return draws
        return {draw: macro_values(right[None], self.test.truth_of(draw))[0] for draw, right in draws.items()}


def read_scores(run: RunDirectory) -> Scores:
    """Read what was predicted in a run, and compare it with the labels.

    Raises:
        CheckpointError: A file of the run is damaged, or predictions are missing.
    """
    return score(rundir.read_jsonl(run.results), read_predictions(run.predictions, PREDICTED))


def score(results: list[Result], predictions: dict[str, list[Any]]) -> Scores:
    """Compare the predictions behind each result with the labels, the test images in one order for all.

    Raises:
        CheckpointError: A result has no predictions, or was tested on other images than the rest.
    """
    rows: dict[tuple[int, str, int], list[int]] = defaultdict(list)
    keys = zip(predictions["labels"], predictions["method"], predictions["draw"], strict=True)
    for row, key in enumerate(keys):
        rows[key].append(row)
    names, label, predicted = (np.array(predictions[key]) for key in ("name", "label", "prediction"))
    group = dict(zip(predictions["name"], predictions["group"], strict=True))
    right: dict[int, dict[str, dict[int, Floats]]] = defaultdict(lambda: defaultdict(dict))
    folds = results[0].get("folds", 0) if results else 0
    tested: dict[int, list[tuple[str, str]]] = {}  # by draw; a test set is the same for all
    for result in results:
        labels, method, draw = result["labels"], result["method"], result["draw"]
        order = sorted(rows[labels, method, draw], key=names.__getitem__)
        images = list(zip(names[order].tolist(), label[order].tolist(), strict=True)) if order else []
        if not images or images != tested.setdefault(draw if folds else 0, images):
            raise CheckpointError(
                f"{method}, {labels:,} labels, draw {draw}: has no predictions of the test images that the others "
                "have; run `labelwise finetune` again."
            )
        right[labels][method][draw] = (label[order] == predicted[order]).astype(float)
    there = sorted({name for images in tested.values() for name, _ in images})
    tied = (
        len({group[name] for name in there}) < len(there) and None not in group.values()
    )  # earlier versions wrote none
    number = {name: group[name] if tied else place for place, name in enumerate(there)}
    classes = sorted({each for images in tested.values() for _, each in images})
    truth = {draw: np.array([classes.index(each) for _, each in images]) for draw, images in tested.items()}
    groups = {draw: np.array([number[name] for name, _ in images]) for draw, images in tested.items()}
    test: TestSet | Folds
    if folds:
        shares = [row["n_test"] / (row["labels_there"] - row["n_test"]) for row in results]
        test = Folds(truth, groups, float(np.mean(shares)))
    else:
        test = TestSet(truth.get(0, np.array([])), groups[0] if tied else None)
    independent = Counter(
        each for each, _ in {(each, number[name]) for images in tested.values() for name, each in images}
    )
    untested = sorted({name for row in results for name in row.get("untested", [])})
    fewest = 0 if untested else min(independent.values(), default=0)
    by_class = not all(row["balanced"] for row in results) and fewest >= FEWEST_PER_CLASS
    count = len(set(number.values())) if tied else None
    return Scores(right, test, there, count, classes, untested, by_class, series_by_labels(results))
