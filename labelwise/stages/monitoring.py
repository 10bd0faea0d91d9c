"""What a person can look at while and after an encoder trains: view mosaic, health, neighbours."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from labelwise import rundir, seeding, terminal
from labelwise.images.cache import ImageCache
from labelwise.images.near_copies import NearCopies
from labelwise.images.source import ImageSet
from labelwise.measures import health
from labelwise.measures.knn import knn_accuracy, nearest
from labelwise.models.encoder import Encoder
from labelwise.models.features import extract_features
from labelwise.rundir import RunDirectory
from labelwise.stages.pooling import Pool
from labelwise.views.draws import Policy
from labelwise.views.mosaic import draw_mosaic, encode_thumbnail
from labelwise.views.pipeline import Normalization, make_views

_LISTED = 1000  # near-copies that are named
MONITORED = 2000  # images whose features are looked at while training


def save_mosaic(run: RunDirectory, policy: Policy, pool: Pool, seed: int, rows: int = 6) -> None:
    """Draw what the augmentations do to a few images of the pool."""
    members = np.linspace(0, len(pool.rows) - 1, rows).astype(np.int64)
    squares, sizes = pool.squares(members, torch.device("cpu"))
    columns = tuple(range(8))
    views = make_views(policy, squares, sizes, pool.keys[members], seed, 0, columns)
    views = views.reshape(len(columns), rows, *views.shape[1:]).transpose(0, 1)  # (rows, V, 3, H, W)
    rundir.write_atomically(run.views, lambda fresh: draw_mosaic(squares, views).save(fresh, format="PNG"))
    terminal.say(f"views      {run.views} shows what the augmentations do")


def save_near_copies(
    run: RunDirectory,
    images: ImageSet,
    cache: ImageCache,
    near: NearCopies,
    lock: dict[str, Any],
    shown: int = 12,
) -> None:
    """Write the near-copies for a person to look at: those of test images first, the least certain first."""
    test = set(lock["names"])
    found: list[dict[str, Any]] = []
    for pair, agreement in zip(near.pairs.tolist(), near.agreement.tolist(), strict=True):
        names = [images.names[row] for row in pair]
        is_test = [name in test for name in names]
        found.append({"rows": pair, "names": names, "is_test": is_test, "agreement": round(agreement, 3)})
    found.sort(key=lambda each: (not any(each["is_test"]), each["agreement"], each["names"]))
    for place, each in enumerate(found):
        rows = each.pop("rows")
        if place < shown:
            each["thumbnails"] = [encode_thumbnail(cache.evaluations[row]) for row in rows]
    rundir.write_json(
        run.near_copies, {"signature": lock["sha256"], "pairs": found[:_LISTED], "found": len(found)}
    )


def monitored_features(
    pool: Pool, encoder: Encoder, normalization: Normalization, device: torch.device
) -> torch.Tensor:
    """Features of a fixed random sample of the pool, (N, F)."""
    rows = pool.rows[_monitored(pool)]
    return extract_features(encoder, pool.cache.evaluations, rows, normalization, device)


def look(pool: Pool, features: torch.Tensor) -> dict[str, Any]:
    """Effective rank of the monitored features, and kNN accuracy among them where labels exist (monitoring only)."""
    labels = [pool.labels[member] for member in _monitored(pool)]
    figures: dict[str, Any] = {"effective_rank": health.effective_rank(features), "knn": None}
    classes = sorted({label for label in labels if label is not None})
    if len(classes) > 1:
        known = [row for row, label in enumerate(labels) if label is not None]
        indices = torch.tensor([classes.index(str(labels[row])) for row in known])
        figures["knn"] = knn_accuracy(features[known], indices)
    return figures


def _monitored(pool: Pool) -> npt.NDArray[np.int64]:
    """A fixed random sample of the pool."""
    order = seeding.generator(0, "monitor").permutation(len(pool.rows))
    return np.sort(order[:MONITORED])


def save_neighbours(
    run: RunDirectory,
    pool: Pool,
    encoder: Encoder,
    normalization: Normalization,
    images: ImageSet,
    device: torch.device,
    queries: int = 6,
) -> None:
    """Write the nearest images of a few, for a person to look at."""
    members = _monitored(pool)
    features = monitored_features(pool, encoder, normalization, device)

    def card(member: int) -> dict[str, Any]:
        row = pool.rows[member]
        return {
            "name": images.names[row],
            "label": images.labels[row],
            "thumbnail": encode_thumbnail(pool.cache.evaluations[row]),
        }

    asked = np.linspace(0, len(members) - 1, queries).astype(int)
    cards = [
        {
            **card(members[query]),
            "neighbours": [
                {**card(members[near]), "similarity": similarity}
                for near, similarity in nearest(features, int(query), 6)
            ],
        }
        for query in asked
    ]
    rundir.write_json(run.neighbours, {"queries": cards})
