"""Labels that do not fit their image: what the images most alike, and a probe trained on the others, say instead."""

import numpy as np
import numpy.typing as npt
import torch

from labelwise import seeding
from labelwise.measures.knn import neighbour_votes
from labelwise.measures.linear import fit_probe, one_of_each, stratified_folds

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]

_FEWEST = 2  # groups with labels of a class; with one there is no other to judge it by

# Compared on 5 % wrong labels, digits and CIFAR-10: recipes/LOG.md.
_FOLDS = 5
_NEIGHBOURS = 10
_STRENGTH = 3.0
_MOST = 10_000  # images a probe is fitted on, or neighbours are looked for among; more would take minutes


def judged_classes(labels: Indices, groups: Indices) -> Indices:
    """Classes whose labels can be judged by others of their own: most labels in two groups or more are theirs.

    Args:
        labels: Class indices, (n,).
        groups: What belongs together, (n,).
    """
    judged = np.unique(labels)
    while True:
        left = np.isin(labels, judged)
        classes, sizes = np.unique(one_of_each(groups[left], labels[left])[1], return_counts=True)
        enough: Indices = classes[sizes >= _FEWEST]
        if len(enough) in (0, len(judged)):
            return enough
        judged = enough


def class_support(
    features: Floats,
    labels: Indices,
    classes: int,
    *,
    groups: Indices,
    balanced: bool,
    reference: Floats,
    seed: int,
) -> Floats:
    """How much speaks for each class of each image; its own label and those of its group are not heard.

    Args:
        features: Frozen features of the labeled images, (n, F).
        labels: Class indices, (n,); each class one of `judged_classes`.
        classes: Number of classes, C, two or more.
        groups: What belongs together, (n,): a wrong label and its copy would vouch for each other.
        balanced, reference: See `fit_probe`.
        seed: Of the folds.

    Returns:
        (n, C), rows adding up to one: the mean of the votes of the ten nearest images and of a linear probe that was
        trained on the other folds.

    Source: out-of-fold probabilities find wrong labels: Northcutt et al. 2021 (arXiv 1911.00068).
    """
    folds = min(_FOLDS, int(np.bincount(one_of_each(groups, labels)[1], minlength=classes).min()))
    probed = np.empty((len(labels), classes), dtype=np.float32)
    for rest, held in stratified_folds(labels, folds, seed, groups):
        train = _thin(rest, labels, seed)
        probe = fit_probe(
            features[train], labels[train], classes, _STRENGTH, balanced=balanced, reference=reference
        )
        probed[held] = torch.softmax(torch.from_numpy(probe.logits(features[held])), dim=1).numpy()
    support: Floats = (probed + _votes(features, labels, classes, groups, seed)) / np.float32(2)
    return support


def doubt(support: Floats, labels: Indices) -> tuple[Floats, Indices]:
    """How much more speaks for the best other class than for the label, from -1 to 1, and which class that is.

    Args:
        support: (n, C), from `class_support`.
        labels: Class indices, (n,).
    """
    rows = np.arange(len(labels))
    others = support.copy()
    others[rows, labels] = -1
    other: Indices = others.argmax(axis=1)
    margin: Floats = support[rows, other] - support[rows, labels]
    return margin, other


def _votes(features: Floats, labels: Indices, classes: int, groups: Indices, seed: int) -> Floats:
    """Votes of the nearest images, of all or of a random part that everyone is compared with, (n, C)."""
    everyone = torch.from_numpy(features)
    bank = torch.from_numpy(_thin(np.arange(len(labels)), labels, seed))
    belongs = torch.from_numpy(groups)
    known = everyone[bank], torch.from_numpy(labels)[bank]
    apart = belongs[bank], belongs
    votes: Floats = neighbour_votes(
        *known, everyone, classes=classes, neighbours=_NEIGHBOURS, groups=apart
    ).numpy()
    return votes


def _thin(rows: Indices, labels: Indices, seed: int) -> Indices:
    """No more rows than can be compared with in a short time: all, or a random part with one of each class at least."""
    if len(rows) <= _MOST:
        return rows
    shuffled = seeding.generator(seed, "label check", len(rows)).permutation(rows)
    first = np.unique(labels[shuffled], return_index=True)[1]
    rest = np.setdiff1d(np.arange(len(shuffled)), first)
    kept: Indices = shuffled[np.concatenate([first, rest])[:_MOST]]
    return kept
