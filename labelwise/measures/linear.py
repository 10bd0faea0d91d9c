"""Classifiers on frozen features: the linear probe, and a small network. The door of scikit-learn."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.neural_network import MLPClassifier

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]

warnings.filterwarnings(
    "ignore", message="The number of unique classes is greater than 50%"
)  # few labels are our case

_ITERATIONS = 500
_NETWORK_PASSES = 60  # over the rows, at most
_WIDE = 4  # with so many features a row, a fit in the span of the rows is faster, the basis included


@dataclass(frozen=True)
class Probe:
    """A linear classifier: logits = (features - mean) / scale @ weight.T + bias.

    Attributes:
        mean, scale: Of each feature, (F,).
        weight: (C, F).
        bias: (C,).
    """

    mean: Floats
    scale: Floats
    weight: Floats
    bias: Floats

    def logits(self, features: Floats) -> Floats:
        """Score features, (M, F) -> (M, C)."""
        return (((features - self.mean) / self.scale) @ self.weight.T + self.bias).astype(np.float32)

    def folded(self) -> tuple[Floats, Floats]:
        """The same classifier as weight (C, F) and bias (C,) on features as they come."""
        weight: Floats = self.weight / self.scale
        bias: Floats = self.bias - weight @ self.mean
        return weight, bias


def fit_probe(
    features: Floats, labels: Indices, classes: int, strength: float, *, balanced: bool, reference: Floats
) -> Probe:
    """Fit an L2-regularised multinomial logistic regression on standardised features.

    Args:
        features: Of the labeled images, (n, F).
        labels: Class indices, (n,); every class occurs.
        classes: Number of classes, C.
        strength: scikit-learn's C, on features scaled to rows of about unit length: larger regularises less.
        balanced: Weigh each class by the inverse of its size.
        reference: Features whose mean and spread standardise all others, (N, F); unlabeled images do.

    Source: the protocol of Chen et al. 2020 (arXiv 2002.05709), App. B.8: L-BFGS, no augmentation.
    """
    mean, spread = reference.mean(axis=0), reference.std(axis=0)
    flat = 0.01 * float(spread.mean()) + 1e-6  # a feature that hardly moves is not blown up
    scale = (spread + flat) * np.sqrt(
        reference.shape[1]
    )  # rows of about unit length, so that C means the same at any F
    model = LogisticRegression(
        C=strength, max_iter=_ITERATIONS, class_weight="balanced" if balanced else None
    )
    rows, basis = (features - mean) / scale, None
    if _WIDE * len(rows) < rows.shape[1]:  # the optimum lies in the span of the rows: look only there
        basis = np.linalg.qr(rows.T)[0]  # (F, n)
        rows = rows @ basis
    model.fit(rows, labels)
    weight, bias = model.coef_, model.intercept_
    if basis is not None:
        weight = weight @ basis.T
    if classes == 2:  # scikit-learn keeps one row for two classes
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return Probe(mean, scale.astype(np.float32), weight.astype(np.float32), bias.astype(np.float32))


def fit_network(features: Floats, labels: Indices, seed: int) -> Callable[[Floats], Indices]:
    """Fit a network of one hidden layer, as wide as the features, and give what names the class of others.

    Args:
        features: (n, F); standardised inside.
        labels: Class indices, (n,).
        seed: Of its weights and order.
    """
    mean, scale = features.mean(axis=0), features.std(axis=0) + 1e-6
    model = MLPClassifier((features.shape[1],), max_iter=_NETWORK_PASSES, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit((features - mean) / scale, labels)

    def name_others(others: Floats) -> Indices:
        found: Indices = model.predict((others - mean) / scale)
        return found

    return name_others


def stratified_folds(
    labels: Indices, folds: int, seed: int, groups: Indices | None = None
) -> list[tuple[Indices, Indices]]:
    """Split labeled images into folds: rows to train on and rows to score, per fold.

    Args:
        labels: Class indices, (n,); each class in at least `folds` groups, see `one_of_each`.
        folds, seed: How many, and of their draw.
        groups: What no fold may tear apart, (n,); default: every image is a group.
    """
    members, kept = one_of_each(np.arange(len(labels)) if groups is None else groups, labels)
    splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
    return [
        (np.flatnonzero(np.isin(members, train)), np.flatnonzero(np.isin(members, held)))
        for train, held in splitter.split(np.zeros(len(kept)), kept)
    ]


def one_of_each(groups: Indices, labels: Indices) -> tuple[Indices, Indices]:
    """Number groups as they come, and give each the label that most of its images have.

    Args:
        groups, labels: Of each image, (n,).

    Returns:
        Group of each image, from 0, (n,), and label of each group, (G,).
    """
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    order = np.argsort(first)
    members = np.argsort(order)[inverse]
    pairs, sizes = np.unique(np.stack([members, labels]), axis=1, return_counts=True)
    largest_first = np.lexsort((pairs[1], -sizes, pairs[0]))
    return members, pairs[1, largest_first[np.unique(pairs[0, largest_first], return_index=True)[1]]]


def accuracy(predicted: Indices, truth: Indices) -> float:
    """Share of predictions that are right."""
    return float((predicted == truth).mean())


def macro_accuracy(predicted: Indices, truth: Indices) -> float:
    """Mean over the classes that occur of the share that is right in each."""
    return float(np.mean([(predicted[truth == index] == index).mean() for index in np.unique(truth)]))
