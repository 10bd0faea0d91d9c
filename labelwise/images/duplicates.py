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
    groups: dict[int, list[str]] = defaultdict(list)
    for name, key in zip(names, keys.tolist(), strict=True):
        if key:
            groups[key].append(name)
    return [group for group in groups.values() if len(group) > 1]


def unique_keys(keys: Keys) -> Keys:
    """Make the keys of copies differ, so that two copies in one batch never share a random draw."""
    seen: dict[int, int] = defaultdict(int)
    result = keys.copy()
    for place, key in enumerate(keys.tolist()):
        if seen[key]:
            result[place] = seeding.combine(key, seen[key])
        seen[key] += 1
    return result


def connect(count: int, pairs: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Number the groups that pairs tie together, directly or over others, (count,)."""
    ones = np.ones(len(pairs), dtype=np.int32)
    graph = coo_array((ones, (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    return np.asarray(connected_components(graph, directed=False)[1], dtype=np.int64)
