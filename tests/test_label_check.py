"""Wrong labels planted in real images are found; nobody's own label is heard."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.datasets import load_digits

from labelwise.measures import label_check
from labelwise.measures.knn import neighbour_votes
from labelwise.measures.label_check import class_support, doubt, judged_classes

Indices = npt.NDArray[np.int64]


def digits(count: int, seed: int) -> tuple[npt.NDArray[np.float32], Indices, npt.NDArray[np.float32]]:
    """Pixels of some digits, their classes, and the pixels of all."""
    pixels, classes = load_digits(return_X_y=True)
    chosen = np.random.default_rng(seed).permutation(len(pixels))[:count]
    everything = pixels.astype(np.float32) / 16
    return everything[chosen], classes[chosen].astype(np.int64), everything


def plant(labels: Indices, count: int, seed: int) -> tuple[Indices, set[int]]:
    """Give some images another class."""
    rng = np.random.default_rng(seed)
    wrong = rng.choice(len(labels), count, replace=False)
    planted = labels.copy()
    planted[wrong] = (planted[wrong] + rng.integers(1, 10, count)) % 10
    return planted, set(wrong.tolist())


def support_of(
    features: npt.NDArray[np.float32],
    labels: Indices,
    reference: npt.NDArray[np.float32],
    groups: Indices | None = None,
) -> npt.NDArray[np.float32]:
    groups = np.arange(len(labels)) if groups is None else groups
    return class_support(features, labels, 10, groups=groups, balanced=False, reference=reference, seed=0)


@pytest.mark.parametrize("seed", range(5))
def test_of_five_wrong_labels_in_a_hundred_four_are_among_the_first_fifteen(seed: int) -> None:
    features, truth, everything = digits(100, seed)
    labels, wrong = plant(truth, 5, seed)
    support = support_of(features, labels, everything)
    assert support.sum(axis=1) == pytest.approx(np.ones(100), abs=1e-5)
    margin, other = doubt(support, labels)
    assert len(wrong & set(np.argsort(-margin)[:15].tolist())) >= 4
    found = [row for row in wrong if margin[row] > 0]
    assert np.mean(other[found] == truth[found]) > 0.7  # and what they look like is mostly what they are


def test_doubt_is_the_lead_of_the_best_other_class() -> None:
    support = np.array([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [1.0, 0.0, 0.0]], dtype=np.float32)
    margin, other = doubt(support, np.array([0, 0, 1]))
    assert margin == pytest.approx([-0.2, 0.6, 1.0], abs=1e-6)
    assert other.tolist() == [1, 2, 0]


def test_no_image_votes_for_itself() -> None:
    features, labels, _ = digits(60, 0)
    bank = torch.from_numpy(features)
    votes = neighbour_votes(bank, torch.from_numpy(labels), classes=10, neighbours=10)
    for row in range(5):
        changed = torch.from_numpy(labels).clone()
        changed[row] = (changed[row] + 1) % 10
        assert torch.equal(neighbour_votes(bank, changed, classes=10, neighbours=10)[row], votes[row])


def test_votes_are_shares_of_the_neighbours_weights() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    votes = neighbour_votes(
        bank, torch.tensor([0, 1, 0]), torch.tensor([[1.0, 0.0]]), classes=3, neighbours=2
    )
    weights = np.exp(np.array([1.0, 0.0]) / 0.1)
    assert votes.numpy() == pytest.approx(np.array([[weights[0], weights[1], 0.0]]) / weights.sum(), abs=1e-6)


@pytest.mark.parametrize("smallest", [2, 3])
def test_a_class_of_two_labels_can_be_judged(smallest: int) -> None:
    features, truth, everything = digits(200, 3)
    kept = np.concatenate([np.flatnonzero(truth != 4), np.flatnonzero(truth == 4)[:smallest]])
    support = support_of(features[kept], truth[kept], everything)
    assert np.isfinite(support).all()
    assert support.sum(axis=1) == pytest.approx(np.ones(len(kept)), abs=1e-5)


def test_of_many_labels_a_part_is_fitted_with_every_class_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    features, truth, everything = digits(600, 4)
    rare = np.concatenate([np.flatnonzero(truth != 7), np.flatnonzero(truth == 7)[:5]])
    labels, wrong = plant(truth[rare], 10, 4)
    fitted: list[Indices] = []
    fit = label_check.fit_probe

    def watch(rows: Any, labels: Indices, *rest: Any, **options: Any) -> Any:
        fitted.append(labels)
        return fit(rows, labels, *rest, **options)

    monkeypatch.setattr(label_check, "_MOST", 100)
    monkeypatch.setattr(label_check, "fit_probe", watch)
    margin, _ = doubt(support_of(features[rare], labels, everything), labels)
    assert [len(each) for each in fitted] == [100] * 5
    assert all(set(each.tolist()) == set(range(10)) for each in fitted)
    assert len(wrong & set(np.argsort(-margin)[:30].tolist())) >= 8


def test_a_wrong_label_and_its_copies_do_not_vouch_for_each_other() -> None:
    """Five images, each six times and all six wrong: among strangers they would be each other's neighbours."""
    features, truth, everything = digits(100, 5)
    labels, wrong = plant(truth, 5, 5)
    copied = sorted(wrong)
    rows = np.concatenate([np.arange(100), np.repeat(copied, 5)])
    shifted = features[rows] + np.random.default_rng(0).normal(0, 1e-3, (len(rows), 64)).astype(np.float32)
    places = [np.flatnonzero(rows == row) for row in copied]
    apart, _ = doubt(support_of(shifted, labels[rows], everything), labels[rows])
    together, _ = doubt(support_of(shifted, labels[rows], everything, rows), labels[rows])
    assert sum(bool((apart[each] > 0).any()) for each in places) <= 1
    assert sum(bool((together[each] > 0).all()) for each in places) >= 4


def test_classes_are_judged_that_lead_in_two_groups_or_more() -> None:
    labels = np.array([0, 0, 1, 1, 2, 2, 3])
    assert judged_classes(labels, np.arange(7)).tolist() == [0, 1, 2]
    assert judged_classes(labels, np.array([0, 1, 2, 2, 3, 4, 5])).tolist() == [0, 2]
    # 0 leads in two groups only while class 1, which falls out itself, is counted
    assert judged_classes(np.array([0, 0, 1, 2, 2]), np.array([0, 0, 0, 1, 2])).tolist() == [2]
    assert judged_classes(np.array([0, 1]), np.array([0, 0])).tolist() == []


def test_images_of_one_group_do_not_vote_for_each_other() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    groups = torch.tensor([0, 0, 1])
    asked = {"classes": 2, "neighbours": 2}
    votes = neighbour_votes(bank, torch.tensor([0, 0, 1]), bank, groups=(groups, groups), **asked)
    assert votes[:2].tolist() == [[0.0, 1.0], [0.0, 1.0]]
    assert votes[2].tolist() == pytest.approx([1.0, 0.0])
    nobody = neighbour_votes(bank, torch.tensor([0, 0, 1]), bank, groups=(groups * 0, groups * 0), **asked)
    assert nobody.tolist() == [[0.0, 0.0]] * 3
