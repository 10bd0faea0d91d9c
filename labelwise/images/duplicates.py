"""Images with the same pixels, and groups that pairs tie together."""

from collections import defaultdict

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from labelwise import seeding

Keys = npt.NDArray[np.uint64]


def exact_duplicates(names: list[str], keys: Keys) -> list[list[str]]:
    """Group images that show exactly the same pixels; groups of one are left out.

    Args:
        names: (N,).
        keys: Content keys; 0 for images that could not be read, (N,).
    """
    _, place, counts = np.unique(keys, return_inverse=True, return_counts=True)
    has_copy = (keys != 0) & (counts[place] > 1)
    groups: dict[int, list[str]] = defaultdict(list)
    for name, key, is_one in zip(names, keys, has_copy, strict=True):
        if is_one:
            groups[int(key)].append(name)
    return list(groups.values())


def say_two_labels(names: list[str], keys: Keys, labels: list[str | None]) -> list[str]:
    """What to say of pictures that are there twice, with another label each, as where a class folder was copied; nothing where there are none.

    Args:
        names: (N,).
        keys: Content keys; 0 for images that could not be read, (N,).
        labels: None where unknown, (N,).
    """
    label_of = {name: label for name, label in zip(names, labels, strict=True) if label is not None}
    torn = []
    for group in exact_duplicates(names, keys):
        by_label = {label_of[name]: name for name in reversed(group) if name in label_of}
        if len(by_label) > 1:
            torn.append(sorted(by_label.items())[:2])
    if not torn:
        return []
    (one, first), (other, second) = torn[0]
    return [
        f"{len(torn):,} images carry two labels, e.g. {first} ({one}) and {second} ({other}) are the same picture"
    ]


def unique_keys(keys: Keys) -> Keys:
    """Make the keys of copies differ, so that two copies in one batch never share a random draw."""
    before = count_before(keys)
    copies = before > 0
    result = keys.copy()
    result[copies] = seeding.combine(keys[copies], before[copies].astype(np.uint64))
    return result


def count_before(values: npt.NDArray[np.int64] | Keys) -> npt.NDArray[np.int64]:
    """How many equal values stand before each, (N,)."""
    order = np.argsort(values, kind="stable")
    _, first, counts = np.unique(values[order], return_index=True, return_counts=True)
    result = np.empty(len(values), np.int64)
    result[order] = np.arange(len(values)) - np.repeat(first, counts)
    return result


def connect(count: int, pairs: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Number the groups that pairs tie together, directly or over others, (count,)."""
    ones = np.ones(len(pairs), dtype=np.int32)
    graph = coo_array((ones, (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    return np.asarray(connected_components(graph, directed=False)[1], dtype=np.int64)
