"""Which images to label next: TypiClust against the paper's algorithm as loops, and what must hold whatever the features."""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.cluster import KMeans

from labelwise.measures import typicality
from labelwise.measures.typicality import choose_doubtful, choose_typical

Floats = npt.NDArray[np.float32]


def bunches(seed: int, count: int = 230, width: int = 6) -> Floats:
    """Directions around a few centres, some centres with many and some with few."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(9, width))
    which = rng.choice(9, count, p=rng.dirichlet(np.full(9, 2.0)))
    features = centres[which] + rng.uniform(0.1, 0.6, (count, 1)) * rng.normal(size=(count, width))
    return (features * rng.uniform(0.5, 3, (count, 1))).astype(np.float32)


def plain_round(points: list[list[float]], clusters: list[int], covered: list[int], budget: int) -> list[int]:
    """Algorithm 1 of the paper after its clustering, word by word: of the largest uncovered cluster the most typical image."""
    chosen: list[int] = []
    for _ in range(budget):
        sizes = {each: clusters.count(each) for each in set(clusters)}
        uncovered = [each for each in sizes if not any(clusters[row] == each for row in covered + chosen)]
        cluster = max((each for each in uncovered if sizes[each] > 5), key=lambda each: (sizes[each], -each))
        members = [row for row, each in enumerate(clusters) if each == cluster]
        best, best_typicality = -1, -1.0
        for row in members:
            distances = sorted(math.dist(points[row], points[other]) for other in members if other != row)
            nearest = distances[: min(20, len(members) // 2)]
            typical = 1 / (sum(nearest) / len(nearest))
            if typical > best_typicality:
                best, best_typicality = row, typical
        chosen.append(best)
    return chosen


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("already", [0, 7])
def test_the_first_round_is_the_papers_algorithm(seed: int, already: int) -> None:
    features = bunches(seed)
    labeled = np.zeros(len(features), bool)
    labeled[np.random.default_rng(seed).choice(len(features), already, replace=False)] = True
    points = [[value / math.hypot(*row) for value in row] for row in features.astype(float).tolist()]
    model = KMeans(already + 10, n_init=1, random_state=seed).fit(np.array(points, np.float32))
    budget = 6  # of the ten clusters more than there are labels, some are small
    expected = plain_round(points, model.labels_.tolist(), np.flatnonzero(labeled).tolist(), budget)
    assert [choice.row for choice in choose_typical(features, labeled, budget, seed)] == expected


@pytest.mark.parametrize("already", [0, 12])
def test_fewer_choices_are_the_first_of_more(already: int) -> None:
    features, labeled = bunches(1), np.arange(230) < already
    most = choose_typical(features, labeled, 120)
    for budget in (1, 9, 10, 11, 20, 37, 50, 100):
        assert choose_typical(features, labeled, budget) == most[:budget]


def test_each_image_is_chosen_once_and_none_that_has_a_label() -> None:
    features, labeled = bunches(2), np.arange(230) % 3 == 0
    rows = [choice.row for choice in choose_typical(features, labeled, 1000)]
    assert sorted(rows) == np.flatnonzero(~labeled).tolist()


def test_a_cluster_that_holds_a_label_waits_for_those_that_hold_none() -> None:
    centres = np.eye(40, dtype=np.float32)
    features = np.repeat(centres, 8, axis=0) + 0.01 * bunches(3, 320, 40)
    labeled = np.zeros(320, bool)
    labeled[: 8 * 30 : 8] = True  # thirty of forty bunches hold a label
    choices = choose_typical(features, labeled, 10)
    assert {choice.row // 8 for choice in choices} == set(range(30, 40))
    assert all(choice.labeled == 0 and choice.size == 8 for choice in choices)


def test_a_few_outliers_come_last() -> None:
    far = np.concatenate([np.full((4, 1), 1.0), np.zeros((4, 5))], axis=1)
    rest = np.concatenate([np.zeros((96, 1)), bunches(4, 96, 5)], axis=1)
    features = np.concatenate([far, rest]).astype(np.float32)
    rows = [choice.row for choice in choose_typical(features, np.zeros(100, bool), 100)]
    assert set(rows[:20]).isdisjoint(range(4))


@pytest.mark.parametrize("make", [np.ones, np.zeros], ids=["alike", "zero"])
@pytest.mark.parametrize("count", [1, 2, 3, 30])
def test_features_that_say_nothing_still_give_choices(make: Callable[..., Floats], count: int) -> None:
    features = make((count, 4), dtype=np.float32)
    rows = [choice.row for choice in choose_typical(features, np.zeros(count, bool), 30)]
    assert sorted(rows) == list(range(count))


def test_tiles_and_samples_change_nothing_that_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    features = bunches(5)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    whole = typicality.typicality(unit)
    monkeypatch.setattr(typicality, "_TILE", 7 * len(unit))
    np.testing.assert_allclose(typicality.typicality(unit), whole, rtol=1e-4)
    monkeypatch.setattr(typicality, "_FITTED", 120)
    choices = choose_typical(features, np.zeros(len(unit), bool), 30)
    assert len({choice.row for choice in choices}) == 30
    assert choices == choose_typical(features, np.zeros(len(unit), bool), 30)


@pytest.mark.parametrize("classes", [2, 5])
def test_what_is_doubted_most_comes_first(classes: int) -> None:
    rng = np.random.default_rng(0)
    chances = rng.dirichlet(np.ones(classes), 60).astype(np.float32)
    labeled = np.arange(60) % 4 == 0
    margins = []
    for row, shares in enumerate(chances.tolist()):
        best = max(range(classes), key=shares.__getitem__)
        second = max(share for place, share in enumerate(shares) if place != best)
        margins += [] if labeled[row] else [(shares[best] - second, row)]
    expected = [row for _, row in sorted(margins)]
    assert choose_doubtful(chances, labeled, 100).tolist() == expected
    assert choose_doubtful(chances, labeled, 7).tolist() == expected[:7]
