"""Labels that do not fit their image: what the images most alike, and a probe trained on the others, say instead."""

import numpy as np
import numpy.typing as npt
import torch

from labelwise import seeding
from labelwise.measures.knn import neighbour_votes
from labelwise.measures.linear import fit_probe, stratified_folds

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]

FEWEST_LABELS = 2  # with one label there is no other to judge it by

# Compared on 5 % wrong labels, digits and CIFAR-10: recipes/LOG.md.
_FOLDS = 5
_NEIGHBOURS = 10
_STRENGTH = 3.0
_MOST = 10_000  # images a probe is fitted on, or neighbours are looked for among; more would take minutes


def class_support(
    features: Floats, labels: Indices, classes: int, *, balanced: bool, reference: Floats, seed: int
) -> Floats:
    """How much speaks for each class of each image, its own label not heard.

    Args:
        features: Frozen features of the labeled images, (n, F).
        labels: Class indices, (n,); each class at least `FEWEST_LABELS` times.
        classes: Number of classes, C, two or more.
        balanced, reference: See `fit_probe`.
        seed: Of the folds.

    Returns:
        (n, C), rows adding up to one: the mean of the votes of the ten nearest images and of a linear probe that was
        trained on the other folds.

    Source: out-of-fold probabilities find wrong labels: Northcutt et al. 2021 (arXiv 1911.00068).
    """
    folds = min(_FOLDS, int(np.bincount(labels, minlength=classes).min()))
    probed = np.empty((len(labels), classes), dtype=np.float32)
    for rest, held in stratified_folds(labels, folds, seed):
        train = _thin(rest, labels, seed)
        probe = fit_probe(
            features[train], labels[train], classes, _STRENGTH, balanced=balanced, reference=reference
        )
        probed[held] = torch.softmax(torch.from_numpy(probe.logits(features[held])), dim=1).numpy()
    support: Floats = (probed + _votes(features, labels, classes, seed)) / np.float32(2)
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


def _votes(features: Floats, labels: Indices, classes: int, seed: int) -> Floats:
    """Votes of the nearest images, of all or of a random part that everyone is compared with, (n, C)."""
    bank = _thin(np.arange(len(labels)), labels, seed)
    others = np.setdiff1d(np.arange(len(labels)), bank)
    known, classes_known = torch.from_numpy(features[bank]), torch.from_numpy(labels[bank])
    votes = np.empty((len(labels), classes), dtype=np.float32)
    for rows, asked in ((bank, None), (others, torch.from_numpy(features[others]))):
        votes[rows] = neighbour_votes(
            known, classes_known, asked, classes=classes, neighbours=_NEIGHBOURS
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
