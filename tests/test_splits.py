"""What is locked away for testing, what may be trained on, and which labels a draw gets."""

import hashlib
import json
import random
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from labelwise.errors import DataError, UsageError
from labelwise.images.duplicates import exact_duplicates
from labelwise.images.source import Files, ImageSet
from labelwise.images.splits import draw_labels, hash_names, lock_test, pool_indices

Keys = npt.NDArray[np.uint64]


def listed(
    names: list[str], labels: list[str | None] | None = None, splits: list[str | None] | None = None
) -> ImageSet:
    """A set known by name only; splitting looks at no pixel."""
    none: list[str | None] = [None] * len(names)
    files = Files(Path("photos"), len(names))
    return ImageSet(files.folder, names, labels or none, splits or none, "flat folder", {}, [], [files])


def classes(**sizes: int) -> ImageSet:
    names = [f"{label}/{number:05d}.png" for label, size in sizes.items() for number in range(size)]
    return listed(names, [name.split("/")[0] for name in names])


def different(images: ImageSet) -> tuple[Keys, npt.NDArray[np.bool_]]:
    """Keys of a set without copies, all readable."""
    count = len(images.names)
    return np.arange(1, count + 1, dtype=np.uint64), np.ones(count, dtype=bool)


def lock(images: ImageSet, holdout: float | None = None, seed: int = 0) -> dict[str, Any]:
    return lock_test(images, *different(images), holdout, seed)


def per_class(names: list[str]) -> dict[str, int]:
    return dict(Counter(name.split("/")[0] for name in names))


def pool_names(images: ImageSet, readable: npt.NDArray[np.bool_], locked: dict[str, Any]) -> set[str]:
    return {images.names[row] for row in pool_indices(images, readable, locked)}


# The lock


def test_ones_own_test_split_comes_before_any_holdout() -> None:
    images = listed(
        ["a.png", "b.png", "c.png", "d.png"],
        ["x", "y", "x", "y"],
        ["train", "test", "val", "test"],
    )
    found = lock(images, 0.5)
    assert found["method"] == "your test split"
    assert found["names"] == ["b.png", "d.png"]
    assert pool_names(images, different(images)[1], found) == {"a.png", "c.png"}


def test_a_labeled_holdout_takes_its_share_of_every_class() -> None:
    images = classes(cat=500, dog=300, emu=200)
    found = lock(images)
    assert per_class(found["names"]) == {"cat": 100, "dog": 60, "emu": 40}
    assert found["method"] == "20% of the labeled images held out, by class"
    assert per_class(lock(images, 0.1)["names"]) == {"cat": 50, "dog": 30, "emu": 20}


def test_a_labeled_holdout_is_at_most_2000_images_and_still_by_class() -> None:
    held = per_class(lock(classes(cat=8000, dog=6000, emu=2000))["names"])
    assert held == {"cat": 1000, "dog": 750, "emu": 250}


@pytest.mark.parametrize(("count", "size"), [(97, 155), (300, 45), (7, 2003)])
def test_rounding_by_class_never_exceeds_2000(count: int, size: int) -> None:
    images = classes(**{f"c{place}": size for place in range(count)})
    held = lock(images)["names"]
    assert len(held) <= 2000
    assert all(abs(found - 2000 / count) <= 1 for found in per_class(held).values())


def test_many_small_classes_still_give_the_share_asked_for() -> None:
    images = classes(**{f"c{place}": 2 for place in range(50)})
    assert len(lock(images)["names"]) == 20


@pytest.mark.parametrize("share", [0.9, 1.0])
def test_a_class_of_one_image_stays_trainable(share: float) -> None:
    images = classes(cat=10, dog=1, emu=1)
    assert per_class(lock(images, share)["names"]) == {"cat": 9}


def test_only_labeled_images_are_held_out_of_a_partly_labeled_set() -> None:
    names = [f"{number:03d}.png" for number in range(200)]
    labels: list[str | None] = [("cat", "dog")[row % 2] if row < 100 else None for row in range(200)]
    images = listed(names, labels)
    held = lock(images)["names"]
    assert len(held) == 20
    assert max(held) < "100.png"
    assert Counter(labels[int(name[:3])] for name in held) == {"cat": 10, "dog": 10}


def test_without_labels_the_holdout_is_uniform_and_at_most_1000_images() -> None:
    names = [f"{number:05d}.png" for number in range(10_000)]
    found = lock(listed(names))
    assert found["method"] == "20% held out at random, to be labeled later"
    assert len(found["names"]) == 1000
    thirds = Counter(int(name[:5]) * 3 // 10_000 for name in found["names"])
    assert all(abs(third - 333) < 75 for third in thirds.values())  # five standard deviations
    assert len(lock(listed(names[:100]))["names"]) == 20


def test_one_class_alone_is_treated_as_no_labels() -> None:
    assert "to be labeled later" in lock(classes(cat=50))["method"]


def test_a_holdout_of_zero_holds_nothing_out() -> None:
    for images in (classes(cat=20, dog=20), listed([f"{number}.png" for number in range(40)])):
        found = lock(images, 0)
        assert (found["names"], found["excluded_duplicates"]) == ([], [])
        assert found["method"] == "none held out"
        assert pool_indices(images, different(images)[1], found).tolist() == list(range(40))


def test_unreadable_images_are_neither_tested_nor_trained_on() -> None:
    for images in (
        listed(["a.png", "b.png", "c.png", "d.png"], None, ["test", "test", None, None]),
        classes(cat=20, dog=20),
        listed([f"{number}.png" for number in range(40)]),
    ):
        keys, readable = different(images)
        readable[::2] = False
        keys[::2] = 0
        broken = {name for name, fine in zip(images.names, readable, strict=True) if not fine}
        found = lock_test(images, keys, readable, 0.5, 0)
        assert found["names"]
        assert broken.isdisjoint(found["names"])
        assert broken.isdisjoint(found["excluded_duplicates"])
        assert broken.isdisjoint(pool_names(images, readable, found))


def test_copies_of_test_images_never_enter_the_pool() -> None:
    images = listed(
        ["a.png", "copy of t.png", "t.png", "u.png", "other copy.png"],
        None,
        ["train", "train", "test", "test", None],
    )
    keys = np.array([1, 7, 7, 8, 8], np.uint64)
    found = lock_test(images, keys, np.ones(5, dtype=bool), None, 0)
    assert found["names"] == ["t.png", "u.png"]
    assert found["excluded_duplicates"] == ["copy of t.png", "other copy.png"]
    assert pool_names(images, np.ones(5, dtype=bool), found) == {"a.png"}


@pytest.mark.parametrize("labeled", [True, False])
def test_a_holdout_never_parts_copies(labeled: bool) -> None:
    images = classes(cat=300, dog=300) if labeled else listed([f"{number:03d}.png" for number in range(600)])
    keys = (np.random.default_rng(0).permutation(600) // 3 + 1).astype(np.uint64)  # three of each
    readable = np.ones(600, dtype=bool)
    found = lock_test(images, keys, readable, None, 0)
    held = set(found["names"])
    tested = {int(key) for name, key in zip(images.names, keys, strict=True) if name in held}
    pool = pool_indices(images, readable, found)
    assert 100 <= len(held) <= 120
    assert tested.isdisjoint(keys[pool].tolist())
    assert len(held) + len(found["excluded_duplicates"]) + len(pool) == 600
    if not labeled:
        assert found["excluded_duplicates"] == []


def test_a_holdout_never_parts_groups_that_hold_several_classes() -> None:
    images = classes(cat=120, dog=60)
    groups = np.random.default_rng(0).permutation(180) // 6  # thirty patients of six images
    found = lock_test(images, *different(images), 0.2, 0, groups=groups)
    held = np.array([name in set(found["names"]) for name in images.names])
    assert set(groups[held]).isdisjoint(groups[~held])
    assert found["excluded_groups"] == []
    assert 24 <= held.sum() <= 36
    assert 5 <= per_class(found["names"])["dog"] <= 12


def test_a_group_larger_than_the_test_set_stays_in_training() -> None:
    images = classes(cat=50, dog=50)
    groups = np.arange(100)
    groups[:40] = 0
    found = lock_test(images, *different(images), 0.2, 0, groups=groups)
    assert per_class(found["names"]) == {"cat": 10, "dog": 10}
    assert {f"cat/{number:05d}.png" for number in range(40)}.isdisjoint(found["names"])


def test_a_class_whose_groups_are_all_large_is_tested_all_the_same() -> None:
    images = classes(cat=40, dog=40)
    groups = np.arange(80)
    groups[:40] = np.arange(40) // 20  # two patients of twenty cats each
    found = lock_test(images, *different(images), 0.2, 0, groups=groups)
    assert per_class(found["names"]) == {"cat": 20, "dog": 8}


def test_a_class_that_is_one_group_is_named_and_stays_in_training() -> None:
    images = classes(cat=40, dog=40)
    groups = np.arange(80)
    groups[:40] = 0
    found = lock_test(images, *different(images), 0.2, 0, groups=groups)
    assert per_class(found["names"]) == {"dog": 8}
    assert found["method"].endswith("none of cat, where one group holds too much")


def test_the_last_images_of_another_class_are_not_held_out() -> None:
    images = listed([f"{n:02}.png" for n in range(51)], ["a"] * 6 + ["b"] * 5 + ["a"] * 40)
    groups = np.array([0] * 11 + [1] * 20 + [2] * 20)
    found = lock_test(images, *different(images), 0.2, 0, groups=groups)
    left = {images.labels[row] for row in range(51) if images.names[row] not in found["names"]}
    assert left == {"a", "b"}


@pytest.mark.parametrize("labeled", [True, False])
def test_the_holdout_depends_on_the_seed_and_not_on_the_listing(labeled: bool) -> None:
    images = classes(cat=60, dog=40) if labeled else listed([f"{number:03d}.png" for number in range(100)])
    keys, readable = different(images)
    order = list(range(100))
    random.Random(0).shuffle(order)
    shuffled = listed([images.names[row] for row in order], [images.labels[row] for row in order])
    first = lock_test(images, keys, readable, None, 3)
    assert lock_test(shuffled, keys[order], readable, None, 3) == first
    other = lock_test(images, keys, readable, None, 4)
    assert other["names"] != first["names"]
    assert len(other["names"]) == len(first["names"])


def test_a_lock_says_how_it_was_made_and_survives_json() -> None:
    found = lock(classes(cat=20, dog=20), seed=5)
    assert found["seed"] == 5
    assert found["names"] == sorted(found["names"])
    assert found["sha256"] == hash_names(found["names"])
    assert json.loads(json.dumps(found)) == found


def test_a_lock_is_kept_when_images_arrive() -> None:
    before = classes(cat=20, dog=20)
    first = lock(before)
    copied = before.names.index(first["names"][0])
    names = [*before.names, "cat/copy.png", "cat/new.png"]
    after = listed(names, [*before.labels, "cat", "cat"])
    keys, readable = different(after)
    keys[40] = keys[copied]
    found = lock_test(after, keys, readable, 0.5, 0, locked=first)
    assert {**found, "excluded_duplicates": []} == first
    assert found["excluded_duplicates"] == ["cat/copy.png"]
    pool = pool_names(after, readable, found)
    assert "cat/new.png" in pool
    assert pool.isdisjoint([*first["names"], "cat/copy.png"])


def test_a_kept_lock_keeps_the_seed_it_was_drawn_with() -> None:
    images = classes(cat=20, dog=20)
    first = lock(images, seed=7)
    assert lock_test(images, *different(images), None, 0, locked=first) == first


def test_a_locked_image_that_is_gone_is_refused_by_name() -> None:
    images = classes(cat=20, dog=20)
    first = lock(images)
    gone = first["names"][2]
    rest = listed([name for name in images.names if name != gone])
    with pytest.raises(DataError) as caught:
        keys, readable = different(images)
        kept = np.array([name != gone for name in images.names])
        lock_test(rest, keys[kept], readable[kept], None, 0, locked=first)
    assert str(caught.value) == f"photos: 1 of the locked test images are gone, e.g. {gone}; put them back."


def test_a_locked_image_is_known_by_its_pixels_under_another_name() -> None:
    images = classes(cat=20, dog=20)
    first = lock(images)
    moved = [f"2026/{name}" for name in images.names]
    found = lock_test(listed(moved, images.labels), *different(images), None, 0, locked=first)
    assert found["names"] == [f"2026/{name}" for name in first["names"]]
    assert found["keys"] == first["keys"]


def a_locked_and_a_free_row(images: ImageSet, lock: dict[str, Any]) -> tuple[int, int]:
    free = next(row for row, name in enumerate(images.names) if name not in lock["names"])
    return images.names.index(lock["names"][0]), free


def test_a_name_that_now_shows_another_image_does_not_unlock_the_first() -> None:
    images = classes(cat=20, dog=20)
    first = lock(images)
    keys, readable = different(images)
    shown, other = a_locked_and_a_free_row(images, first)
    keys[[shown, other]] = keys[[other, shown]]  # the two files swapped names
    found = lock_test(images, keys, readable, None, 0, locked=first)
    assert images.names[other] in found["names"]
    assert images.names[other] not in pool_names(images, readable, found)
    assert images.names[shown] in pool_names(images, readable, found)


def test_what_has_taken_the_name_of_a_locked_image_is_neither_tested_nor_trained_on() -> None:
    images = classes(cat=20, dog=20)
    first = lock(images)
    keys, readable = different(images)
    taken, other = a_locked_and_a_free_row(images, first)
    keys[taken] = keys[other]  # a copy of a training image lies there now
    found = lock_test(images, keys, readable, None, 0, locked=first)
    assert found["names"] == first["names"][1:]
    assert found["excluded_groups"] == first["names"][:1]
    assert first["names"][0] not in pool_names(images, readable, found)
    with pytest.raises(DataError, match=r"none of the locked test images has the pixels it had, e\.g\. "):
        lock_test(images, keys + np.uint64(10**6), readable, None, 0, locked=first)


def test_a_holdout_too_small_for_one_image_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"^--holdout 0.001: leaves photos without a test image: too few images"
    ):
        lock(classes(cat=20, dog=20), holdout=0.001)


def test_a_later_test_split_does_not_leak_into_the_pool() -> None:
    images = classes(cat=20, dog=20)
    first = lock(images)
    late = next(name for name in images.names if name not in first["names"])
    splits: list[str | None] = ["test" if name == late else None for name in images.names]
    after = listed(images.names, images.labels, splits)
    found = lock_test(after, *different(after), None, 0, locked=first)
    assert found["names"] == first["names"]
    assert late not in pool_names(after, different(after)[1], found)


# The draws


def draw(images: ImageSet, draws: int = 1, seed: int = 0) -> list[list[int]]:
    labels = [str(label) for label in images.labels]
    return [draw_labels(images.names, labels, draw, seed) for draw in range(draws)]


@pytest.mark.parametrize("sizes", [{"a": 50, "b": 30, "c": 20}, {"a": 80, "b": 60, "c": 40, "d": 20}])
def test_every_smaller_label_set_lies_in_the_larger_and_follows_the_classes(sizes: dict[str, int]) -> None:
    images = classes(**sizes)
    total = len(images.names)
    for order in draw(images, draws=3):
        assert sorted(order) == list(range(total))
        for count in range(len(sizes), total + 1):
            found = per_class([images.names[row] for row in order[:count]])
            for label, size in sizes.items():
                assert abs(found[label] - count * size / total) <= 1


@pytest.mark.parametrize("sizes", [{"a": 1000, "b": 5, "c": 1}, {"a": 1, "b": 2, "c": 3, "d": 500}])
def test_the_first_labels_are_one_of_every_class(sizes: dict[str, int]) -> None:
    images = classes(**sizes)
    for order in draw(images, draws=5):
        first = [images.labels[row] for row in order[: len(sizes)]]
        assert sorted(map(str, first)) == sorted(sizes)
        assert sorted(order) == list(range(len(images.names)))


def test_a_draw_does_not_depend_on_the_listing() -> None:
    images = classes(cat=30, dog=20, emu=20)
    rows = list(range(70))
    random.Random(1).shuffle(rows)
    shuffled = listed([images.names[row] for row in rows], [images.labels[row] for row in rows])
    for one, other in zip(draw(images, 3), draw(shuffled, 3), strict=True):
        assert [images.names[row] for row in one] == [shuffled.names[row] for row in other]


def test_draws_and_seeds_differ_and_repeat() -> None:
    images = classes(cat=30, dog=20)
    three = draw(images, 3, seed=0)
    assert len({tuple(order) for order in three}) == 3
    assert draw(images, 3, seed=0) == three
    assert draw(images, 1, seed=0) == three[:1]
    assert draw(images, 1, seed=1) != three[:1]


def test_every_image_of_a_class_is_drawn_first_equally_often() -> None:
    images = classes(cat=5, dog=5)
    firsts = Counter(images.names[order[0]] for order in draw(images, 1000))
    assert len(firsts) == 5
    assert all(abs(times - 200) < 64 for times in firsts.values())  # five standard deviations


# Names


def test_the_hash_of_names_is_sha256_of_their_json() -> None:
    assert hash_names(["a", "b/ü.png"]) == hashlib.sha256(b'["a", "b/\\u00fc.png"]').hexdigest()
    assert len({hash_names(names) for names in (["a", "b"], ["b", "a"], ["ab"], ["a, b"], ['a", "b'])}) == 5


def test_a_lock_is_made_and_found_again_in_little_memory() -> None:
    images = classes(cat=5_000, dog=5_000)
    keys, readable = different(images)
    groups = np.arange(10_000)
    locked = lock_test(images, keys, readable, None, 0, groups=groups)

    def bytes_an_image(work: Callable[[], object]) -> float:
        tracemalloc.start()
        try:
            work()
            return tracemalloc.get_traced_memory()[1] / len(images.names)
        finally:
            tracemalloc.stop()

    assert bytes_an_image(lambda: lock_test(images, keys, readable, None, 0, groups=groups)) < 190
    assert bytes_an_image(lambda: lock_test(images, keys, readable, None, 0, locked=locked)) < 130
    assert bytes_an_image(lambda: exact_duplicates(images.names, keys)) < 100
    assert bytes_an_image(lambda: hash_names(name for name in images.names)) < 10


def test_a_lock_is_found_again_among_many_copies() -> None:
    names = [f"{number:05d}.png" for number in range(6_000)]
    keys = np.arange(6_000, dtype=np.uint64) % 3 + 1
    test: list[str | None] = ["test" if number < 1_000 else None for number in range(6_000)]
    images, readable = listed(names, splits=test), np.ones(6_000, bool)
    locked = lock_test(images, keys, readable, None, 0)
    assert lock_test(images, keys, readable, None, 0, locked=locked) == locked
