"""Images that may not be torn apart: one on the test side and one on the training side would be a leak."""

import errno
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from labelwise.images.cache import ImageCache
from labelwise.images.duplicates import connect, say_two_labels
from labelwise.images.near_copies import NearCopies, find_near_copies
from labelwise.images.source import ImageSet
from labelwise.rundir import write_atomically

Rows = npt.NDArray[np.int64]

SMALLEST = 24  # pixels of the short side; below, different images of one kind agree as well as copies do
BURST_SECONDS = 2  # between two shots of one camera; EXIF times have whole seconds
MOST_IN_A_SECOND = 50  # shots of one camera; more is a clock that stands still, or a scanner
MOST_COMPARED = 200_000  # images; the search takes 90 s for 60,000 and grows faster than they do
LARGEST_SHARE = 0.1  # of the images in one group of near-copies; beyond, all images look alike
FEWEST_IN_LARGEST = 20

_SAY_SO = "If some belong together (one patient, one video), say so with --labels FILE --group-column NAME"
_FILE = "near-copies-4.npz"  # in the cache; the number is that of the rule


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


def group_images(
    images: ImageSet, cache: ImageCache, progress: Callable[[int], None] = lambda count: None
) -> Groups:
    """Put together exact copies, near-copies, shots of one burst, and what the group column says.

    A group of near-copies that holds a tenth of the images is none: a fixed camera makes all its pictures alike, and
    only a person knows what belongs together there.

    Args:
        images: The set.
        cache: Its decoded images.
        progress: Called with the number of images just compared.
    """
    readable = np.flatnonzero(cache.readable)
    near, notes = _near_copies(cache, readable, progress)
    bursts, standing = _bursts(cache.shots, readable)
    if standing:
        notes.append(f"{standing:,} images carry the same time of shooting as many others; it is not used")
    notes += say_two_labels(images.names, cache.keys, images.labels)
    numbers: dict[str | None, int] = {None: -1}
    number = np.array([numbers.setdefault(group, len(numbers)) for group in images.groups], np.int64)
    in_group = np.flatnonzero(number >= 0)
    ties = {
        "exact copies": _chain(readable, cache.keys[readable]),
        "near-copies": near.pairs,
        "shots of one burst": bursts,
        "tied by the group column": _chain(in_group, number[in_group]),
    }
    of = connect(len(images.names), np.concatenate(list(ties.values())))
    counts = {name: len(np.unique(pairs)) for name, pairs in ties.items()}
    return Groups(of, near, counts, notes)


def _chain(rows: Rows, values: npt.NDArray[np.generic]) -> Rows:
    """Tie each row to the one before it with the same value, (P, 2)."""
    order = np.argsort(values, kind="stable")
    rows, values = rows[order], values[order]
    same = np.flatnonzero(values[:-1] == values[1:])
    return np.stack([rows[same], rows[same + 1]], axis=1)


def _bursts(shots: Rows, readable: Rows) -> tuple[Rows, int]:
    """Pairs of shots that follow each other closely, (P, 2), and the number of images whose time cannot be trusted.

    Args:
        shots: Camera and second of each image, 0 where unknown, (N, 2).
        readable: Rows to look at.
    """
    rows = readable[shots[readable, 1] != 0]
    if not len(rows):
        return np.empty((0, 2), np.int64), 0
    _, moment, sizes = np.unique(shots[rows], axis=0, return_inverse=True, return_counts=True)
    standing = sizes[moment.reshape(-1)] > MOST_IN_A_SECOND
    rows = rows[~standing]
    rows = rows[np.lexsort((rows, shots[rows, 1], shots[rows, 0]))]
    camera, second = shots[rows, 0], shots[rows, 1]
    follows = (np.diff(camera) == 0) & (np.diff(second) <= BURST_SECONDS)
    return np.stack([rows[:-1], rows[1:]], axis=1)[follows], int(standing.sum())


def _near_copies(
    cache: ImageCache, readable: Rows, progress: Callable[[int], None]
) -> tuple[NearCopies, list[str]]:
    """Near-copies, searched for once in each cache, without those of a group that is too large; and what to say of it."""
    _, first = np.unique(cache.keys[readable], return_index=True)  # exact copies are tied without looking
    rows = readable[np.sort(first)]
    rows = rows[cache.sizes[rows].min(axis=1) >= SMALLEST]
    if cache.squares.shape[1] < SMALLEST:
        return NearCopies.none(), []
    if len(rows) > MOST_COMPARED:
        return NearCopies.none(), [f"more than {MOST_COMPARED:,} images: near-copies are not looked for"]
    file: Path = cache.folder / _FILE
    try:
        near = NearCopies.load(file)
        if near.pairs.max(initial=0) >= len(cache.keys):
            raise ValueError("of other images")
        progress(len(rows))
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):  # not there, or damaged; the images are
        near = find_near_copies(cache.squares, cache.sizes.min(axis=1), rows, progress)
        try:
            write_atomically(file, near.save)
        except OSError as error:
            if error.errno not in (
                errno.EACCES,
                errno.EPERM,
                errno.EROFS,
            ):  # a shared cache that others write
                raise
    notes = []
    if not near.is_whole:
        notes.append(
            "so many images look alike that not all could be compared; near-copies may be left. " + _SAY_SO
        )
    group = connect(len(cache.keys), near.pairs)
    sizes = np.bincount(group)
    is_large = (sizes >= FEWEST_IN_LARGEST) & (sizes > LARGEST_SHARE * len(rows))
    if not is_large.any():
        return near, notes
    kept = ~is_large[group[near.pairs[:, 0]]]
    notes.append(
        f"{sizes[is_large].sum():,} images look like near-copies of each other; they are not taken for copies. {_SAY_SO}"
    )
    return NearCopies(near.pairs[kept], near.agreement[kept], near.is_whole), notes
