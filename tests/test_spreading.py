"""Labels spread over the graph of nearest neighbours, against scikit-learn's iteration and against the closed form."""

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.neighbors import kneighbors_graph
from sklearn.semi_supervised import LabelSpreading

from labelwise.measures import spreading
from labelwise.measures.spreading import HANDED_ON, NEIGHBOURS, spread

CLASSES = 3


@pytest.fixture(scope="module")
def features() -> npt.NDArray[np.float32]:
    """Directions around three centres, which touch each other."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(CLASSES, 6))
    return (centres[rng.integers(CLASSES, size=120)] + rng.normal(size=(120, 6))).astype(np.float32)


def graph(features: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Who is among the ten nearest of whom by cosine, made symmetric, (N, N)."""
    named = kneighbors_graph(features, NEIGHBOURS, metric="cosine", include_self=False).toarray()
    return (named + named.T) / 2


def test_hard_labels_are_spread_as_scikit_learn_spreads_them(features: npt.NDArray[np.float32]) -> None:
    labels = np.full(len(features), -1)
    labels[:6] = [0, 1, 2, 0, 1, 2]
    start = np.zeros((len(features), CLASSES), np.float32)
    start[np.arange(6), labels[:6]] = 1
    oracle = LabelSpreading(lambda rows, _: graph(rows), alpha=HANDED_ON, max_iter=1000, tol=1e-9)
    oracle.fit(features, labels)
    found = spread(features, start)
    np.testing.assert_allclose(
        found / found.sum(axis=1, keepdims=True), oracle.label_distributions_, atol=1e-3
    )


def test_soft_ones_rest_where_the_closed_form_says(features: npt.NDArray[np.float32]) -> None:
    start = np.random.default_rng(1).dirichlet(np.ones(CLASSES), len(features)).astype(np.float32)
    weights = graph(features)
    root = np.sqrt(weights.sum(axis=1))
    step = weights / root[:, None] / root
    rest = np.linalg.solve(np.eye(len(features)) - HANDED_ON * step, (1 - HANDED_ON) * start)
    np.testing.assert_allclose(spread(features, start), rest, atol=1e-3)


def test_what_is_known_of_few_images_reaches_all(
    features: npt.NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = np.zeros((5, 2), np.float32)
    start[0, 0] = start[1, 1] = 1
    assert (spread(features[:5], start) > 0).all(), "they are fewer than ten"
    monkeypatch.setattr(spreading, "_ROUNDS", 0)
    np.testing.assert_array_equal(spread(features[:5], start), start)
