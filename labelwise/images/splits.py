"""Which images are locked away for testing, which may be trained on, which get labels in a draw."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from labelwise import seeding
from labelwise.errors import DataError, UsageError
from labelwise.images.source import ImageSet

DEFAULT_HOLDOUT = 0.2
OWN_TEST_SPLIT = "your test split"
MOST_HELD_OUT_LABELED = 2000
MOST_HELD_OUT_UNLABELED = 1000

Rows = npt.NDArray[np.int64]


def lock_test(
    images: ImageSet,
    keys: npt.NDArray[np.uint64],
    readable: npt.NDArray[np.bool_],
    holdout: float | None,
    seed: int,
    *,
    groups: Rows | None = None,
    locked: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Choose the test images, before anything is trained.

    The user's own test split comes first; else a stratified holdout where labels are known, else a
    uniform one. A group is never torn apart: what shares one with a test image is not left to train on.

    Args:
        images, keys, readable: The set, (N,) each.
        holdout: Share to hold out when there is no test split; default 0.2, 0 for none.
        seed: Of the holdout's draw.
        groups: Number of the group of each image, (N,); default: images with the same pixels are one.
        locked: A lock made before: its images stay the test images.

    Returns:
        `method` in words, `names`, their content `keys`, `excluded_duplicates` (same pixels as a test image),
        `excluded_groups` (others of its group, and what has taken a locked image's name) and their content keys, `earlier_keys` of a lock whose images are elsewhere now, `seed`, `sha256` of the names.
    """
    groups = np.unique(keys, return_inverse=True)[1] if groups is None else groups
    changed: set[int] = set()
    if locked is not None:
        rows, changed = _find_locked(images, keys, locked)
        method, seed = locked["method"], locked["seed"]
    elif "test" in images.splits:
        rows = [row for row, split in enumerate(images.splits) if split == "test" and readable[row]]
        method = OWN_TEST_SPLIT
    else:
        share = DEFAULT_HOLDOUT if holdout is None else holdout
        rows, method = _hold_out(images, groups, readable, share, seed)
        if share and not rows:
            raise UsageError(
                f"--holdout {share:g}: leaves {images.root} without a test image: too few images, or one group of what belongs "
                "together holds too many; hold out more, or 0 for none."
            )
    rows = sorted(rows, key=images.names.__getitem__)
    is_other = readable.copy()
    is_other[rows] = False
    is_copy = np.isin(keys, keys[rows])
    is_tied = np.isin(groups, groups[rows])
    is_tied[list(changed)] = True
    if locked is not None:  # groups may have tied images that are not known any more
        earlier = set(locked.get("excluded_groups", ()))
        is_copy |= np.isin(keys, np.array(locked["keys"], np.uint64))
        is_tied |= np.isin(keys, np.array(locked.get("excluded_groups_keys", ()), np.uint64))
        is_tied |= np.array([name in earlier for name in images.names], bool)
    duplicates = [images.names[row] for row in np.flatnonzero(is_other & is_copy)]
    tied = np.flatnonzero(is_other & is_tied & ~is_copy).tolist()
    tied.sort(key=images.names.__getitem__)
    names = [images.names[row] for row in rows]
    return {
        "method": method,
        "names": names,
        "keys": [int(keys[row]) for row in rows],
        "excluded_duplicates": duplicates,
        "excluded_groups": [images.names[row] for row in tied],
        "excluded_groups_keys": [int(keys[row]) for row in tied],
        "earlier_keys": sorted(set(locked["keys"]) - {int(keys[row]) for row in rows}) if locked else [],
        "seed": seed,
        "sha256": hash_names(names),
    }


def _find_locked(
    images: ImageSet, keys: npt.NDArray[np.uint64], locked: dict[str, Any]
) -> tuple[list[int], set[int]]:
    """Find the images of a lock again, by their pixels, wherever they lie now.

    Returns:
        Their rows, and rows whose names were locked and whose pixels are others now: an image that was trained on may have
        taken a test image's name, so they are neither tested nor trained on.

    Raises:
        DataError: An image is gone, or none has its pixels any more.
    """
    wanted = set(locked["names"])
    by_name = {name: row for row, name in enumerate(images.names) if name in wanted}
    by_key: dict[int, list[int]] = defaultdict(list)
    for row in np.flatnonzero(np.isin(keys, np.array(locked["keys"], np.uint64))).tolist():
        by_key[int(keys[row])].append(row)
    rows: dict[int, None] = {}  # in order
    changed, gone = [], []
    for name, key in zip(locked["names"], locked["keys"], strict=True):
        same_name, same_pixels = by_name.get(name), by_key.get(key, [])
        if same_pixels:
            free = [row for row in same_pixels if row not in rows]
            rows |= dict.fromkeys([same_name] if same_name in free else free[:1])
        elif same_name is not None:
            changed.append(same_name)
        else:
            gone.append(name)
    if gone:
        raise DataError(
            f"{images.root}: {len(gone)} of the locked test images are gone, e.g. {gone[0]}; put them back."
        )
    if changed and not rows:
        raise DataError(
            f"{images.root}: none of the locked test images has the pixels it had, e.g. {images.names[changed[0]]}: whether the encoder "
            "was trained on what lies there now cannot be told (files written anew do that, and another version of the decoder). Put them "
            "back, pretrain again, or give --test FOLDER."
        )
    return list(rows), set(changed) - set(rows)


def pool_indices(images: ImageSet, readable: npt.NDArray[np.bool_], lock: dict[str, Any]) -> Rows:
    """Rows that may be trained on: readable, not a test image, not of the group of one, (P,)."""
    forbidden = {*lock["names"], *lock["excluded_duplicates"], *lock["excluded_groups"]}
    is_free = [
        name not in forbidden and split != "test"
        for name, split in zip(images.names, images.splits, strict=True)
    ]
    return np.flatnonzero(readable & np.array(is_free, bool))


def draw_labels(names: list[str], labels: list[str], draw: int, seed: int) -> list[int]:
    """Order the labeled images anew for a draw, so that the first n are its label set of size n.

    The order starts with one image of every class, largest class first, and then follows the class
    sizes (Sainte-Lague), so every prefix is stratified and smaller sets lie within larger ones. The
    order does not depend on how files are listed.

    Args:
        names: Of the images that have labels, (n,).
        labels: Their labels, (n,).
        draw: Which; each is drawn by itself.
        seed: Of all of them.

    Returns:
        All n indices.
    """
    by_class: dict[str, list[int]] = defaultdict(list)
    for index in sorted(range(len(names)), key=names.__getitem__):
        by_class[labels[index]].append(index)
    classes = sorted(by_class, key=lambda label: (-len(by_class[label]), label))
    turns = [(-1.0, place, 0) for place in range(len(classes))]
    for place, label in enumerate(classes):
        size = len(by_class[label])
        turns += [((2 * taken + 1) / size, place, taken) for taken in range(1, size)]
    turns.sort()
    shuffled = [
        seeding.generator(seed, "labels", draw, label).permutation(by_class[label]) for label in classes
    ]
    return [int(shuffled[place][taken]) for _, place, taken in turns]


def hash_names(names: Iterable[str]) -> str:
    """SHA-256 of a list of names as JSON, in the order given; a million need not be held at once."""
    digest, between = hashlib.sha256(b"["), b""
    for name in names:
        digest.update(between + json.dumps(name).encode())
        between = b", "
    digest.update(b"]")
    return digest.hexdigest()


def _quotas(sizes: dict[str, int], most: int) -> dict[str, int]:
    """Share `most` test images among classes by size, by largest remainder; one of each class stays trainable."""
    shares = {label: most * size / max(1, sum(sizes.values())) for label, size in sizes.items()}
    quotas = {label: min(int(share), sizes[label] - 1) for label, share in shares.items()}
    rest = most - sum(quotas.values())
    for label in sorted(sizes, key=lambda label: (int(shares[label]) - shares[label], hash_names([label]))):
        if rest > 0 and quotas[label] < sizes[label] - 1:
            quotas[label] += 1
            rest -= 1
    return quotas


def _hold_out(
    images: ImageSet, groups: Rows, readable: npt.NDArray[np.bool_], share: float, seed: int
) -> tuple[list[int], str]:
    if share == 0:
        return [], "none held out"
    labels = [str(label) for label in images.labels]
    rows = np.flatnonzero(readable & np.array([label is not None for label in images.labels], bool))
    if len({labels[row] for row in rows}) > 1:
        most = min(MOST_HELD_OUT_LABELED, round(share * len(rows)))
        words = f"{share:.0%} of the labeled images held out, by class"
    else:
        labels = [""] * len(labels)
        rows = np.flatnonzero(readable)
        most = min(MOST_HELD_OUT_UNLABELED, round(share * len(rows)))
        words = f"{share:.0%} held out at random, to be labeled later"
    chosen: list[int] = []
    left = Counter(labels[row] for row in rows)
    quotas = asked = _quotas(left, most)
    by_class, members = _groups_by_class(images.names, groups, rows, labels)
    for label, class_groups in sorted(by_class.items()):
        for place in seeding.generator(seed, "holdout", label).permutation(len(class_groups)):
            if quotas[label] <= 0:
                break
            found = members(class_groups[place])
            sizes = Counter(labels[row] for row in found)
            if all(size <= quotas[each] for each, size in sizes.items()):
                chosen += found
                quotas = {each: quota - sizes[each] for each, quota in quotas.items()}
    left.subtract(labels[row] for row in chosen)
    for label, class_groups in sorted(by_class.items()):
        if asked[label] and label not in {
            labels[row] for row in chosen
        }:  # all are larger than what was asked for
            for found in sorted(map(members, class_groups), key=len):
                sizes = Counter(labels[row] for row in found)
                if all(size < left[each] for each, size in sizes.items()):
                    chosen += found
                    left.subtract(sizes)
                    break
    without = sorted({label for label in asked if asked[label]} - {labels[row] for row in chosen})
    if chosen and not most / 2 <= len(chosen) <= 2 * most:
        words += f"; {len(chosen):,} images, because groups stay whole"
    if chosen and without:
        words += f"; none of {', '.join(without)}, where one group holds too much"
    return sorted(chosen), words


def _groups_by_class(
    names: list[str], groups: Rows, rows: Rows, labels: list[str]
) -> tuple[dict[str, list[int]], Callable[[int], list[int]]]:
    """Groups of the labeled rows by the label most of their images have, in an order that file systems do not change; and what gives the rows of one."""
    ordered = np.array(sorted(rows.tolist(), key=names.__getitem__), np.int64)
    _, first, group, sizes = np.unique(
        groups[ordered], return_index=True, return_inverse=True, return_counts=True
    )
    together, ends = ordered[np.argsort(group, kind="stable")], np.cumsum(sizes)

    def members(group: int) -> list[int]:
        found: list[int] = together[ends[group] - sizes[group] : ends[group]].tolist()
        return found

    by_class: dict[str, list[int]] = defaultdict(list)
    for number in np.argsort(first).tolist():
        counts = Counter(labels[row] for row in members(number))
        by_class[min(counts, key=lambda label: (-counts[label], label))].append(number)
    return by_class, members
