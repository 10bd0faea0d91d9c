"""Images that may not be torn apart: one on the test side and one on the training side would be a leak."""

from collections import defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from labelwise.images.cache import ImageCache
from labelwise.images.near_copies import NearCopies, find_near_copies
from labelwise.images.source import ImageSet
from labelwise.rundir import write_atomically

Rows = npt.NDArray[np.int64]

SMALLEST = 24  # pixels of the short side; below, different images of one kind agree as well as copies do
BURST_SECONDS = 2  # between two shots of one camera; EXIF times have whole seconds
LARGEST_BURST = 50  # more at one time is a clock that stands still, or a scanner
LARGEST_SHARE = 0.1  # of the images in one group of near-copies; beyond, all images look alike
FEWEST_IN_LARGEST = 20

_FILE = "near-copies-1.npz"  # in the cache; the number is that of the rule


@dataclass(frozen=True)
class Groups:
    """Which images belong together.

    Attributes:
        of: Group of each image; images of the same number belong together, (N,).
        near: The near-copies among them.
        counts: Images that share their group with another, by what ties them.
        notes: What a person should know.
    """

    of: Rows
    near: NearCopies
    counts: dict[str, int]
    notes: list[str]


def group_images(images: ImageSet, cache: ImageCache) -> Groups:
    """Put together exact copies, near-copies, shots of one burst, and what the group column says.

    Near-copies are left out where one group of them would hold a tenth of the images: a fixed camera makes all
    its pictures alike, and only a person knows what belongs together there.
    """
    notes = []
    near = _near_copies(cache)
    largest = int(np.bincount(connect(len(images.names), near.pairs)).max(initial=0))
    if largest >= FEWEST_IN_LARGEST and largest > LARGEST_SHARE * len(images.names):
        notes.append(
            f"{largest:,} images look like near-copies of each other; they are not taken for copies. "
            "If some belong together (one patient, one video), say so with --labels FILE --group-column NAME"
        )
        near = NearCopies.none()
    readable = np.flatnonzero(cache.readable)
    bursts, standing = _bursts(cache.shots, readable)
    if standing:
        notes.append(f"{standing:,} images carry the same time of shooting as many others; it is not used")
    ties = {
        "exact copies": _chain((row, int(cache.keys[row])) for row in readable.tolist()),
        "near-copies": near.pairs,
        "shots of one burst": bursts,
        "group column": _chain((row, group) for row, group in enumerate(images.groups) if group is not None),
    }
    of = connect(len(images.names), np.concatenate(list(ties.values())))
    counts = {name: len(np.unique(pairs)) for name, pairs in ties.items()}
    return Groups(of, near, counts, notes)


def connect(count: int, pairs: Rows) -> Rows:
    """Number the groups that pairs tie together, directly or over others, (count,)."""
    ones = np.ones(len(pairs), dtype=np.int8)
    graph = coo_array((ones, (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    return np.asarray(connected_components(graph, directed=False)[1], dtype=np.int64)


def _chain(members: Iterable[tuple[int, Hashable]]) -> Rows:
    """Tie each row to the one before it with the same value, (P, 2)."""
    by_value: dict[Hashable, list[int]] = defaultdict(list)
    for row, value in members:
        by_value[value].append(row)
    pairs = [pair for rows in by_value.values() for pair in pairwise(rows)]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def _bursts(shots: Rows, readable: Rows) -> tuple[Rows, int]:
    """Pairs of shots that follow each other closely, (P, 2), and the number of images whose time cannot be trusted.

    Args:
        shots: Camera and second of each image, 0 where unknown, (N, 2).
        readable: Rows to look at.
    """
    rows = readable[shots[readable, 1] != 0]
    rows = rows[np.lexsort((rows, shots[rows, 1], shots[rows, 0]))]
    camera, second = shots[rows, 0], shots[rows, 1]
    follows = (np.diff(camera) == 0) & (np.diff(second) <= BURST_SECONDS)
    burst = np.concatenate([[0], np.cumsum(~follows)]) if len(rows) else np.empty(0, np.int64)
    sizes = np.bincount(burst)
    trusted = sizes[burst[1:]] <= LARGEST_BURST if len(rows) else np.empty(0, bool)
    pairs = np.stack([rows[:-1], rows[1:]], axis=1)[follows & trusted] if len(rows) else np.empty((0, 2))
    return pairs.astype(np.int64), int(sizes[sizes > LARGEST_BURST].sum())


def _near_copies(cache: ImageCache) -> NearCopies:
    """Near-copies among the readable images, found once for each cache."""
    file: Path = cache.folder / _FILE
    if file.exists():
        return NearCopies.load(file)
    found = find_near_copies(
        cache.squares, np.flatnonzero(cache.readable & (cache.sizes.min(axis=1) >= SMALLEST))
    )
    write_atomically(file, found.save)
    return found
