"""Decode once: what is in the cache, when it is used again, and that the user's folder is left alone."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from labelwise.errors import DataError, ResourceError
from labelwise.images import cache as cache_module
from labelwise.images.cache import (
    ImageCache,
    build_cache,
    cache_root,
    channel_statistics,
    list_caches,
    sample_sizes,
)
from labelwise.images.decoding import decode_image, evaluation_pixels, square_pixels
from labelwise.images.duplicates import exact_duplicates, unique_keys
from labelwise.images.source import ImageSet, open_images

Photo = Callable[..., Image.Image]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "photos"


def build(root: Path, side: int = 24, evaluation_size: int = 16) -> ImageCache:
    return build_cache(open_images(root), side=side, evaluation_size=evaluation_size)


def state(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Size, time and inode of all there is in a folder, itself included."""
    found = [folder, *sorted(folder.rglob("*"))]
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns, path.stat().st_ino)
        for path in found
        if path != folder or folder.is_dir()
    }


def test_rows_are_the_square_and_the_evaluation_image_of_each_file(root: Path, photo: Photo) -> None:
    for seed, (name, size) in enumerate([("b/1.png", (40, 30)), ("a/2.bmp", (20, 60)), ("c.tif", (24, 24))]):
        photo(root / name, seed, size)
    images = open_images(root)
    cache = build_cache(images, side=24, evaluation_size=16)
    assert cache.squares.shape == (3, 24, 24, 3)
    assert cache.evaluations.shape == (3, 16, 16, 3)
    for row, name in enumerate(images.names):
        image = decode_image((root / name).read_bytes())[0]
        assert np.array_equal(cache.squares[row], square_pixels(image, 24))
        assert np.array_equal(cache.evaluations[row], evaluation_pixels(image, 16))
        assert tuple(cache.sizes[row]) == (image.height, image.width)
    assert cache.readable.all()
    assert cache.quarantined == []


def test_unreadable_files_are_set_aside_with_reasons_and_the_rest_goes_on(root: Path, photo: Photo) -> None:
    photo(root / "a.png", 0)
    whole = photo(root / "b.jpg", 1) and (root / "b.jpg").read_bytes()
    (root / "b.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "c.jpg").write_bytes(b"")
    (root / "d.jpg").write_bytes(b"<!DOCTYPE html><p>Not found")
    (root / "e.jpg").write_bytes(b"hello")
    last = photo(root / "f.png", 2)
    cache = build(root)
    assert cache.quarantined == [
        {"file": "b.jpg", "reason": "truncated"},
        {"file": "c.jpg", "reason": "empty file"},
        {"file": "d.jpg", "reason": "not an image (HTML or XML)"},
        {"file": "e.jpg", "reason": "not an image we can read"},
    ]
    assert cache.readable.tolist() == [True, False, False, False, False, True]
    assert (cache.keys != 0).tolist() == cache.readable.tolist()
    assert not cache.squares[1:5].any()
    assert not cache.evaluations[1:5].any()
    assert np.array_equal(cache.squares[5], square_pixels(last, 24))


def test_a_file_that_vanishes_is_set_aside(root: Path, photo: Photo) -> None:
    photo(root / "a.png", 0)
    photo(root / "b.png", 1)
    images = open_images(root)
    (root / "a.png").unlink()
    cache = build_cache(images, side=8, evaluation_size=8)
    assert cache.quarantined == [{"file": "a.png", "reason": "cannot be read (No such file or directory)"}]


def test_an_image_as_thin_as_a_thread_never_stops_the_rest(root: Path, photo: Photo) -> None:
    photo(root / "a.png", 0)
    Image.new("L", (1, 4_300_000), 128).save(root / "b.png")
    cache = build(root, 8, 448)
    assert cache.readable[0]


def test_a_folder_of_unreadable_files_is_refused_and_leaves_no_cache(root: Path, cache: Path) -> None:
    root.mkdir()
    for name in ("a.jpg", "b.jpg"):
        (root / name).write_bytes(b"")
    with pytest.raises(DataError) as caught:
        build(root)
    assert str(caught.value) == f"{root}: none of its 2 images can be read, e.g. a.jpg: empty file."
    assert list(cache.iterdir()) == []


def test_the_same_images_use_the_same_cache_untouched(root: Path, photo: Photo, cache: Path) -> None:
    for seed in range(3):
        photo(root / f"{seed}.png", seed)
    done: list[int] = []
    images = open_images(root)
    first = build_cache(images, side=8, evaluation_size=8, progress=done.append)
    assert sum(done) == 3
    before = state(cache)
    second = build_cache(open_images(root), side=8, evaluation_size=8, progress=done.append)
    assert sum(done) == 6
    assert second.folder == first.folder
    assert state(cache) == before
    assert np.array_equal(first.squares, second.squares)
    assert first.intensity_range == second.intensity_range
    assert np.array_equal(first.keys, second.keys)


def test_a_changed_file_gets_another_cache(root: Path, photo: Photo) -> None:
    photo(root / "a.bmp", 0)
    first = build(root)
    photo(root / "a.bmp", 1)
    os.utime(root / "a.bmp", ns=(1, 1))  # an older file copied over it, of the same size
    second = build(root)
    assert second.folder != first.folder
    assert not np.array_equal(second.squares, first.squares)


def test_added_renamed_and_removed_files_get_another_cache(root: Path, photo: Photo) -> None:
    photo(root / "a.png", 0)
    folders = [build(root).folder]
    photo(root / "b.png", 1)
    folders.append(build(root).folder)
    (root / "b.png").rename(root / "c.png")
    folders.append(build(root).folder)
    (root / "a.png").unlink()
    folders.append(build(root).folder)
    assert len(set(folders)) == 4


def test_other_sizes_get_another_cache(root: Path, photo: Photo) -> None:
    photo(root / "a.png", 0)
    assert len({build(root, 8, 8).folder, build(root, 16, 8).folder, build(root, 8, 16).folder}) == 3


def saved_dataset(folder: Path, seeds: list[int], *, deep: bool = False) -> None:
    pixels = [np.random.default_rng(seed).integers(0, 1000 * (seed + 1), (8, 8)) for seed in seeds]
    pictures = [Image.fromarray(values.astype(np.uint16 if deep else np.uint8)) for values in pixels]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("string")})
    columns = {"img": pictures, "label": ["x"] * len(seeds)}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(folder)


@pytest.mark.parametrize("with_test_folder", [False, True])
def test_a_saved_dataset_written_anew_gets_another_cache(
    tmp_path: Path, photo: Photo, with_test_folder: bool
) -> None:
    photo(tmp_path / "exam/a.png", 5)
    found = []
    for seed in (0, 1):
        shutil.rmtree(tmp_path / "set", ignore_errors=True)
        saved_dataset(tmp_path / "set", [seed, 2])
        images = open_images(tmp_path / "set", test=tmp_path / "exam" if with_test_folder else None)
        found.append(build_cache(images, side=8, evaluation_size=8))
    assert found[0].folder != found[1].folder
    assert not np.array_equal(found[0].squares[0], found[1].squares[0])


def test_deep_images_of_a_saved_dataset_share_one_range(tmp_path: Path, photo: Photo) -> None:
    saved_dataset(tmp_path / "set", [1, 9], deep=True)
    photo(tmp_path / "exam/a.png", 5)
    alone = build(tmp_path / "set", 8, 8)
    images = open_images(tmp_path / "set", test=tmp_path / "exam")
    beside_a_test_folder = build_cache(images, side=8, evaluation_size=8)
    assert alone.intensity_range is not None
    assert alone.intensity_range[1] > 9000
    assert alone.squares[0].max() < 64
    assert beside_a_test_folder.intensity_range == alone.intensity_range


def test_the_cache_lies_where_the_environment_says(
    root: Path, photo: Photo, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo(root / "a.png", 0)
    assert cache_root() == cache
    assert build(root).folder.parent == cache
    monkeypatch.delenv("LABELWISE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg/labelwise"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_root() == tmp_path / "home/.cache/labelwise"


def test_the_folder_of_images_is_never_written_to(root: Path, photo: Photo) -> None:
    for name in ("cat/1.png", "dog/2.jpg"):
        photo(root / name)
    (root / "broken.jpg").write_bytes(b"")
    before = state(root)
    assert len(before) == 6
    build(root)
    build(root)
    sample_sizes(open_images(root))
    assert state(root) == before


def test_a_cache_that_does_not_fit_is_refused_before_work_starts(
    root: Path, photo: Photo, cache: Path
) -> None:
    photo(root / "a.png", 0)
    done: list[int] = []
    with pytest.raises(ResourceError) as caught:
        build_cache(open_images(root), side=10**7, evaluation_size=8, progress=done.append)
    assert "the image cache needs 279396.8 GiB and" in str(caught.value)
    assert str(caught.value).endswith(
        "GiB are free; free some, name another place in LABELWISE_CACHE, or use a smaller --image-size."
    )
    assert caught.value.exit_code == 5
    assert done == []
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("place", ["taken", "taken/deeper"])
def test_a_cache_that_cannot_be_made_is_refused(
    root: Path, photo: Photo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    photo(root / "a.png", 0)
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setenv("LABELWISE_CACHE", str(tmp_path / place))
    with pytest.raises(
        ResourceError, match=r"cannot hold the image cache .* name another place in LABELWISE_C"
    ):
        build(root)


def contents(cache: ImageCache) -> list[npt.NDArray[Any]]:
    return [
        np.array(part) for part in (cache.squares, cache.evaluations, cache.sizes, cache.keys, cache.shots)
    ]


def test_a_stopped_build_goes_on_where_it_stopped(
    root: Path, photo: Photo, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(7):
        photo(root / f"{seed}.png", seed)
    (root / "1.png").write_bytes(b"")
    monkeypatch.setenv("LABELWISE_CACHE", str(tmp_path / "whole"))
    expected = build(root, 8, 8)
    monkeypatch.setenv("LABELWISE_CACHE", str(cache))
    monkeypatch.setattr("labelwise.images.cache._CHUNK", 2)
    monkeypatch.setattr("labelwise.images.cache._SAVE_SECONDS", 0.0)
    seen = 0

    def stop(count: int) -> None:
        nonlocal seen
        seen += count
        if seen == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_cache(open_images(root), side=8, evaluation_size=8, progress=stop)
    assert [folder.name.startswith(".building-") for folder in cache.iterdir()] == [True]
    assert list_caches() == []
    asked: list[int] = []
    locate = ImageSet.locate

    def note(images: ImageSet, row: int) -> str | bytes:
        asked.append(row)
        return locate(images, row)

    monkeypatch.setattr(ImageSet, "locate", note)
    disk = namedtuple("disk", "free")(0)  # what is to be written lies there already
    monkeypatch.setattr("labelwise.images.cache.shutil.disk_usage", lambda place: disk)
    done: list[int] = []
    found = build_cache(open_images(root), side=8, evaluation_size=8, progress=done.append)
    assert done == [4, 1, 1, 1]
    assert sorted(asked) == [4, 5, 6], "what is done already is never looked at again"
    assert [folder.name for folder in cache.iterdir()] == [found.folder.name] == [expected.folder.name]
    assert found.quarantined == expected.quarantined == [{"file": "1.png", "reason": "empty file"}]
    for one, other in zip(contents(found), contents(expected), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "damage",
    [
        lambda fresh: (fresh / "squares.npy").unlink(),
        lambda fresh: (fresh / "progress.json").write_text(""),
        lambda fresh: (fresh / "progress.json").write_text("[]"),
        lambda fresh: os.truncate(fresh / "squares.npy", 300),
        lambda fresh: np.save(fresh / "sizes.npy", np.zeros((3, 2), np.int32)),
        lambda fresh: (fresh / "progress.json").write_text('{"rows": 99, "quarantined": [], "intensity_range": null}'),
    ],
)  # fmt: skip
def test_a_stopped_build_that_is_damaged_begins_again(
    root: Path, photo: Photo, cache: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], Any]
) -> None:
    for seed in range(5):
        photo(root / f"{seed}.png", seed)
    with monkeypatch.context() as patch:
        patch.setattr("labelwise.images.cache._CHUNK", 2)
        patch.setattr("labelwise.images.cache._SAVE_SECONDS", 0.0)
        seen: list[int] = []

        def stop(count: int) -> None:
            seen.append(count)
            if sum(seen) == 5:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            build_cache(open_images(root), side=8, evaluation_size=8, progress=stop)
    [fresh] = cache.iterdir()
    assert json.loads((fresh / "progress.json").read_text())["rows"] == 4
    damage(fresh)
    found = build(root, 8, 8)
    shutil.rmtree(found.folder)
    for one, other in zip(contents(found), contents(build(root, 8, 8)), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("facts.json", "[]"),
        ("sizes.npy", np.zeros((1, 2), np.int32)),
        ("keys.npy", np.ones((2, 1), np.uint64)),
        ("shots.npy", np.array(5)),
        ("squares.npy", np.zeros((2, 24, 24), np.uint8)),
    ],
)
def test_a_cache_whose_files_do_not_fit_together_is_made_again(
    root: Path, photo: Photo, name: str, content: Any
) -> None:
    for seed in range(2):
        photo(root / f"{seed}.png", seed)
    before = build(root)
    expected = contents(before)
    if isinstance(content, str):
        (before.folder / name).write_text(content)
        assert list_caches()[0][2] == 0, "listed, though nobody knows how many"
    else:
        (before.folder / name).unlink()
        np.save(before.folder / name, content)
    for one, other in zip(contents(build(root)), expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_cache_that_is_deleted_while_it_is_built_is_said(root: Path, photo: Photo, cache: Path) -> None:
    for seed in range(3):
        photo(root / f"{seed}.png", seed)

    def delete(count: int) -> None:
        shutil.rmtree(cache, ignore_errors=True)

    with pytest.raises(ResourceError, match="this image cache was deleted while it was built; run the same"):
        build_cache(open_images(root), side=8, evaluation_size=8, progress=delete)
    assert build(root).readable.all()


def test_a_cache_among_the_images_is_refused(
    root: Path, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo(root / "a.png")
    monkeypatch.setenv("LABELWISE_CACHE", str(root / "sub" / "cache"))
    with pytest.raises(DataError, match="the image cache would lie inside the image folder"):
        build(root)
    assert [path.name for path in root.iterdir()] == ["a.png"]
    monkeypatch.setenv("LABELWISE_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(root.parent / "home"))
    assert cache_root() == root.parent / "home" / "labelwise", "an empty name is none"


@pytest.mark.parametrize("option", ["test", "labels"])
def test_a_cache_among_test_or_labeled_images_elsewhere_is_refused(
    root: Path, photo: Photo, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    photo(root / "test:" / "a.png")  # not all that begins so lies elsewhere
    elsewhere = root.with_name("elsewhere")
    photo(elsewhere / "cat" / "a.png")
    images = open_images(root, **{option: elsewhere})
    monkeypatch.setenv("LABELWISE_CACHE", str(elsewhere / "cache"))
    with pytest.raises(DataError, match=f"would lie inside the image folder {elsewhere}, which is never"):
        build_cache(images, side=8, evaluation_size=8)
    assert [path.name for path in elsewhere.iterdir()] == ["cat"]


def test_a_row_without_an_image_beside_a_test_folder_is_left_out(tmp_path: Path, photo: Photo) -> None:
    picture = photo(tmp_path / "exam/a.png", 5)
    features = datasets.Features({"img": datasets.Image()})
    datasets.Dataset.from_dict({"img": [picture, None]}, features=features).save_to_disk(tmp_path / "set")
    images = open_images(tmp_path / "set", test=tmp_path / "exam")
    cache = build_cache(images, side=8, evaluation_size=8)
    assert [each["file"] for each in cache.quarantined] == ["row/1"]


def test_large_squares_are_measured_a_few_at_a_time(
    root: Path, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(5):
        photo(root / f"{seed}.png", seed)
    squares = build(root).squares
    expected = channel_statistics(squares, np.arange(5))
    taken: list[int] = []

    class Spy:
        def __getitem__(self, rows: Any) -> Any:
            taken.append(np.size(rows))
            return squares[rows]

    monkeypatch.setattr("labelwise.images.cache._MEASURED", 2 * 24 * 24 * 3 + 1)
    np.testing.assert_allclose(channel_statistics(Spy(), np.arange(5)), expected)  # type: ignore[arg-type]
    assert taken[1:] == [2, 2, 1]


BUILDER = """
import sys
import time
from pathlib import Path
from labelwise.images import cache
from labelwise.images.source import open_images
cache._CHUNK, cache._SAVE_SECONDS = 4, 0.0
done, limit = 0, int(sys.argv[2])
def tell(count):
    global done
    done += count
    print(done, flush=True)
    if limit and done == limit:
        time.sleep(600)
found = cache.build_cache(open_images(Path(sys.argv[1])), side=48, evaluation_size=32, progress=tell)
print("built", found.folder.name)
"""


def start_builder(root: Path, pause_after: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILDER, str(root), str(pause_after)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, bufsize=1)


def test_a_killed_build_goes_on_to_the_same_cache(
    root: Path, photo: Photo, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(120):
        photo(root / f"{seed:03}.jpg", seed, (300, 200))
    monkeypatch.setenv("LABELWISE_CACHE", str(tmp_path / "whole"))
    expected = build(root, 48, 32)
    monkeypatch.setenv("LABELWISE_CACHE", str(cache))
    with start_builder(root, pause_after=30) as killed:
        assert killed.stdout is not None
        while int(killed.stdout.readline()) < 30:
            pass
        killed.kill()
        assert killed.wait() == -signal.SIGKILL
    with start_builder(root) as again:
        lines = again.communicate()[0].splitlines()
    assert again.returncode == 0
    assert int(lines[0]) >= 24
    assert lines[-2:] == ["120", f"built {expected.folder.name}"]
    for one, other in zip(contents(build(root, 48, 32)), contents(expected), strict=True):
        np.testing.assert_array_equal(one, other)


def test_two_processes_build_one_cache_once(root: Path, photo: Photo, cache: Path) -> None:
    for seed in range(60):
        photo(root / f"{seed:03}.jpg", seed, (300, 200))
    builders = [start_builder(root), start_builder(root)]
    outputs = [builder.communicate()[0].split() for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0]
    one_by_one = [output for output in outputs if output[0] != "60"]
    assert len(one_by_one) == 1  # the other waited, then found all of it done
    assert outputs[0][-1] == outputs[1][-1]
    assert [folder.name for folder in cache.iterdir()] == [outputs[0][-1]]


def test_a_build_abandoned_a_week_ago_is_deleted_and_a_fresh_one_kept(
    root: Path, photo: Photo, cache: Path
) -> None:
    photo(root / "a.png", 0)
    for name in (".building-old", ".building-new"):
        (cache / name).mkdir(parents=True)
        (cache / name / "squares.npy").write_bytes(b"x" * 100)
    week_ago = time.time() - 8 * 24 * 3600
    os.utime(cache / ".building-old", (week_ago, week_ago))
    built = build(root)
    assert {folder.name for folder in cache.iterdir()} == {".building-new", built.folder.name}


def test_mean_and_spread_are_those_of_the_chosen_squares(root: Path, photo: Photo) -> None:
    for seed in range(7):
        photo(root / f"{seed}.png", seed)
    cache = build(root)
    chosen = np.array([0, 1, 4])  # the others may be test images
    mean, std = channel_statistics(cache.squares, chosen)
    values = cache.squares[chosen].reshape(-1, 3).astype(np.float64) / 255
    assert mean == pytest.approx(values.mean(0))
    assert std == pytest.approx(values.std(0))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is told by /proc")
def test_measuring_squares_keeps_none_of_them_in_memory(tmp_path: Path) -> None:
    def mapped() -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssFile:"))

    squares = np.lib.format.open_memmap(tmp_path / "squares.npy", "w+", np.uint8, (1000, 64, 64, 3))  # 12 MB
    squares.flush()
    squares = np.load(tmp_path / "squares.npy", mmap_mode="r")
    before = mapped()
    channel_statistics(squares, np.arange(1000))
    assert mapped() - before < 8_000


def test_images_of_one_colour_have_a_spread_to_divide_by(root: Path) -> None:
    root.mkdir()
    Image.new("RGB", (8, 8), (51, 102, 255)).save(root / "a.png")
    cache = build(root)
    mean, std = channel_statistics(cache.squares, np.array([0]))
    assert mean == pytest.approx((0.2, 0.4, 1.0))
    assert min(std) > 0


def test_the_range_of_deep_images_is_kept_in_the_facts(root: Path, photo: Photo) -> None:
    photo(root / "a.png", 0)
    Image.fromarray(np.array([[300, 700]], np.uint16)).save(root / "b.png")
    cache = build(root)
    assert cache.intensity_range == (300, 700)
    facts = json.loads((cache.folder / "facts.json").read_text(encoding="utf-8"))
    assert facts["intensity_range"] == [300, 700]
    assert facts["images"] == 2


def test_one_broken_deep_image_among_hundreds_does_not_darken_the_others(root: Path) -> None:
    root.mkdir()
    for number in range(200):
        Image.fromarray(np.array([[300 + number, 4000]], np.uint16)).save(root / f"{number}.png")
    Image.fromarray(np.array([[0, 65535]], np.uint16)).save(root / "broken.png")
    assert build(root).intensity_range == (301, 4000)


def test_caches_are_listed_with_their_bytes_and_images(root: Path, photo: Photo, cache: Path) -> None:
    assert list_caches() == []
    photo(root / "a.png", 0)
    photo(root / "b.png", 1)
    small, large = build(root, 8, 8).folder, build(root, 64, 8).folder
    (cache / "something else").mkdir()
    found = {folder: (size, count) for folder, size, count in list_caches()}
    assert found.keys() == {small, large}
    for folder, (size, count) in found.items():
        assert size == sum((folder / name).stat().st_size for name in os.listdir(folder))
        assert count == 2
    assert found[large][0] - found[small][0] == pytest.approx(2 * 3 * (64**2 - 8**2), abs=50), (
        "checksums have fewer digits or more"
    )


def test_sampled_sizes_are_true_sizes(root: Path, photo: Photo) -> None:
    for seed in range(5):
        photo(root / f"{seed}.png", seed, (30 + seed, 20))
    (root / "2.png").write_bytes(b"")
    assert sample_sizes(open_images(root)).tolist() == [[20, 30], [20, 31], [20, 33], [20, 34]]
    assert sample_sizes(open_images(root), 2).tolist() == [[20, 30], [20, 34]]


def test_sampling_a_folder_of_unreadable_files_is_refused(root: Path) -> None:
    root.mkdir()
    (root / "a.png").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"none of its images can be read; `labelwise scan .*photos` says why"
    ):
        sample_sizes(open_images(root))


# Copies


def test_files_with_equal_pixels_are_grouped_whatever_their_format(root: Path, photo: Photo) -> None:
    for name in ("a.png", "b.bmp", "sub/c.tif"):
        photo(root / name, 0)
    photo(root / "d.png", 1)
    photo(root / "e.png", 0, (40, 31))
    for name in ("f.png", "g.png"):
        (root / name).write_bytes(b"")
    images = open_images(root)
    cache = build_cache(images, side=8, evaluation_size=8)
    assert exact_duplicates(images.names, cache.keys) == [["a.png", "b.bmp", "sub/c.tif"]]


def test_unreadable_images_are_no_copies_of_each_other() -> None:
    keys = np.array([0, 5, 0, 6, 5, 6, 7], np.uint64)
    assert exact_duplicates(list("abcdefg"), keys) == [["b", "e"], ["d", "f"]]
    assert exact_duplicates([], np.array([], np.uint64)) == []


def test_names_and_keys_of_unequal_number_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        exact_duplicates(["a"], np.array([1, 2], np.uint64))


def test_copies_get_keys_of_their_own_and_the_first_keeps_its_key() -> None:
    keys = np.array([5, 9, 5, 5, 9, 2**64 - 1, 2**64 - 1], np.uint64)
    before = keys.copy()
    found = unique_keys(keys)
    assert len(set(found.tolist())) == 7
    assert found[[0, 1, 5]].tolist() == keys[[0, 1, 5]].tolist()
    assert found.dtype == np.uint64
    assert np.array_equal(keys, before)
    assert np.array_equal(unique_keys(keys), found)


def test_keys_without_copies_stay_as_they_are() -> None:
    keys = np.array([3, 1, 2], np.uint64)
    assert np.array_equal(unique_keys(keys), keys)


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def replace_by_a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("squares.npy", cut),
        ("keys.npy", cut),
        ("facts.json", cut),
        ("keys.npy", lambda file: file.write_bytes(file.read_bytes()[:-8] + bytes(8))),  # an image less
        *((name, lambda file: flip(file, -1)) for name in ("squares.npy", "evaluations.npy", "sizes.npy", "shots.npy")),
        ("squares.npy", lambda file: flip(file, 12)),  # the header
        ("sizes.npy", replace_by_a_pipe),
        ("facts.json", replace_by_a_pipe),
        ("facts.json", lambda file: file.write_text("[" * 200_000)),
        ("facts.json", lambda file: file.write_text("null")),
        ("facts.json", lambda file: file.write_text(file.read_text().replace("null", "[0.0, 4.0]"))),
    ],
)  # fmt: skip
def test_a_damaged_cache_is_built_again_and_that_is_said(
    tmp_path: Path,
    photo: Callable[..., Image.Image],
    capsys: pytest.CaptureFixture[str],
    name: str,
    damage: Callable[[Path], Any],
) -> None:
    for seed in range(2):
        photo(tmp_path / "images" / f"{seed}.png", seed)
    images = open_images(tmp_path / "images")
    whole = build_cache(images, side=16, evaluation_size=16)
    expected = [np.array(array) for array in contents(whole)]
    damage(whole.folder / name)
    assert [folder for folder, _, _ in list_caches()] == [whole.folder]
    again = build_cache(images, side=16, evaluation_size=16)
    for one, other in zip(contents(again), expected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert again.intensity_range is None
    assert "this image cache is damaged; it is built again" in " ".join(capsys.readouterr().err.split())


def test_of_a_large_file_pieces_all_over_it_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "_PIECE", 4)
    monkeypatch.setattr(cache_module, "_PIECES", 10)
    file = tmp_path / "file"
    found = set()
    for data in (
        bytes(100),
        bytes(101),
        bytes(90) + b"x" + bytes(9),
        b"x" + bytes(99),
        bytes(9) + b"x" + bytes(90),
    ):
        file.write_bytes(data)
        found.add(cache_module._checksum(file))
    assert len(found) == 4, "the last one differs between two pieces"


def test_a_disk_that_fills_up_while_space_is_taken_is_told(
    tmp_path: Path, photo: Callable[..., Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    photo(tmp_path / "images" / "a.png")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ResourceError, match="the image cache needs"):
        build_cache(open_images(tmp_path / "images"), side=8, evaluation_size=8)


def test_a_file_where_a_cache_is_built_is_named(root: Path, photo: Photo, cache: Path) -> None:
    photo(root / "a.png", 0)
    built = build(root).folder
    built.rename(built.with_name("elsewhere"))
    (cache / f".building-{built.name}").touch()
    with pytest.raises(
        ResourceError, match=r"\.building-.*: a file, where a folder of the image cache belongs"
    ):
        build(root)
