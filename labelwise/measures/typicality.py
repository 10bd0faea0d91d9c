"""Which images to label next: with few labels typical ones of clusters that hold none (TypiClust), with many those a classifier doubts."""

import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]

NEIGHBOURS = 20
MOST_CLUSTERS = 500
SMALL = 5  # images; a cluster of no more is a few outliers
_AIMS = (10, 20, 50)  # and ten, a hundred... times as many
_FITTED = 10_000  # images that clusters are fitted on; 20 for each of the most clusters
_TILE = 2**24  # similarities, 64 MB
_CLOSEST = 1e-5  # as in the authors' code: copies have no distance to divide by


@dataclass(frozen=True)
class Choice:
    """An image to label.

    Attributes:
        row: Of the features.
        cluster: Number of its cluster, from 1 as they come.
        size: Images in that cluster.
        labeled: How many of those have a label, or were chosen before it.
    """

    row: int
    cluster: int
    size: int
    labeled: int


def choose_typical(
    features: Floats, labeled: npt.NDArray[np.bool_], budget: int, seed: int = 0
) -> list[Choice]:
    """Choose images whose labels teach most while there are few: the most typical one of the largest cluster without a label.

    Clusters are made anew for the first 10, 20, 50, 100, 200, 500... choices, as many as there are labels and choices by then, so
    that what is chosen first does not depend on the budget.

    Args:
        features: (N, F); only their directions count.
        labeled: What has a label already, (N,).
        budget: How many to choose; fewer where fewer are left.
        seed: Of k-means.

    Source: Hacohen et al. 2022 (arXiv 2202.02794), Algorithm 1, in rounds of several budgets. Clusters of five images or fewer come last,
        where their code drops them; typicality is that within the cluster and there are 500 clusters at most, as in their code.
    """
    unit = F.normalize(torch.from_numpy(features), dim=1).numpy()
    taken, chosen = labeled.copy(), list[Choice]()
    budget = min(budget, int((~labeled).sum()))
    clusters_before = 0
    for aim in _aims():
        if len(chosen) == budget:
            break
        count = min(MOST_CLUSTERS, int(taken.sum()) + aim - len(chosen), len(unit))
        clusters = _cluster(unit, count, seed)
        sizes = np.bincount(clusters, minlength=count)
        held = np.bincount(clusters[taken], minlength=count)
        ranked: dict[int, Iterator[int]] = {}  # rows of a cluster, the most typical first
        numbers: dict[int, int] = {}
        while len(chosen) < min(aim, budget):
            order = np.lexsort((-sizes, held, sizes <= SMALL, held == sizes))
            cluster = int(order[0])
            if cluster not in ranked:
                members = np.flatnonzero(clusters == cluster)
                by_typicality = members[np.argsort(-typicality(unit[members]), kind="stable")]
                ranked[cluster] = iter(by_typicality[~taken[by_typicality]].tolist())
                numbers[cluster] = clusters_before + len(ranked)
            row = next(ranked[cluster])
            chosen.append(Choice(row, numbers[cluster], int(sizes[cluster]), int(held[cluster])))
            taken[row] = True
            held[cluster] += 1
        clusters_before += len(ranked)
    return chosen


def choose_doubtful(chances: npt.NDArray[np.float32], labeled: npt.NDArray[np.bool_], budget: int) -> Indices:
    """Choose the images whose two most probable classes are closest to each other, the closest first.

    Args:
        chances: Of each class, (N, C), two classes or more.
        labeled: What has a label already, (N,).
        budget: How many to choose; fewer where fewer are left.

    Source: Scheffer et al. 2001 (IDA), the margin.
    """
    best = np.sort(chances, axis=1)
    order = np.argsort(best[:, -1] - best[:, -2], kind="stable")
    return order[~labeled[order]][:budget]


def typicality(unit: Floats) -> npt.NDArray[np.float64]:
    """How close the nearest neighbours of each row are: 1 / their mean distance, (N,).

    Args:
        unit: Rows of length one, (N, F); 20 neighbours are asked, or half of the rows where that is fewer.
    """
    neighbours = min(NEIGHBOURS, max(1, len(unit) // 2), len(unit) - 1)
    if not neighbours:
        return np.ones(len(unit))
    rows, found = torch.from_numpy(unit), []
    tile = max(1, _TILE // len(rows))
    for start in range(0, len(rows), tile):
        similarity = rows[start : start + tile] @ rows.T  # (tile, N)
        similarity[:, start:].fill_diagonal_(-torch.inf)
        nearest = similarity.topk(neighbours, dim=1).values
        found.append((2 - 2 * nearest).clamp(min=0).sqrt().mean(dim=1))
    return 1 / (torch.cat(found).double().numpy() + _CLOSEST)


def _aims() -> Iterator[int]:
    """After how many choices clusters are made anew: 10, 20, 50, 100, 200, 500, 1000..."""
    for power in itertools.count():
        yield from (aim * 10**power for aim in _AIMS)


def _cluster(unit: Floats, count: int, seed: int) -> Indices:
    """Number of the cluster of each row by k-means, (N,); with many rows it is fitted on a sample."""
    fitted = unit
    if len(unit) > _FITTED:
        fitted = unit[np.random.default_rng(seed).choice(len(unit), _FITTED, replace=False)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different rows than clusters
        model = KMeans(count, n_init=1, random_state=seed).fit(fitted)
    found: Indices = model.predict(unit).astype(np.int64)
    return found
