"""What is found in a folder: layouts, splits, and what is left out and said."""

import os
import random
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from labelwise.errors import DataError
from labelwise.images.decoding import decode_image
from labelwise.images.source import ImageSet, open_files, open_images

Photo = Callable[..., Image.Image]


@pytest.fixture(autouse=True)
def _own_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    return folder


def fill(root: Path, photo: Photo, *names: str) -> None:
    for seed, name in enumerate(names):
        photo(root / name, seed)


def by_name(images: ImageSet, values: list[str | None]) -> dict[str, str | None]:
    assert len(set(images.names)) == len(images.names) == sum(part.count for part in images.parts)
    return dict(zip(images.names, values, strict=True))


def test_a_flat_folder_has_no_labels_and_no_splits(root: Path, photo: Photo) -> None:
    fill(root, photo, "b.jpg", "a.png", "C.JPEG", "d.webp", "e.bmp", "f.tif", "g.gif")
    images = open_images(root)
    assert images.names == ["C.JPEG", "a.png", "b.jpg", "d.webp", "e.bmp", "f.tif", "g.gif"]
    assert images.labels == images.splits == [None] * 7
    assert (images.layout, images.ignored, images.notes) == ("flat folder", {}, [])


def test_class_folders_give_labels(root: Path, photo: Photo) -> None:
    fill(root, photo, "cat/1.png", "cat/2.png", "dog/1.png")
    images = open_images(root)
    assert by_name(images, images.labels) == {"cat/1.png": "cat", "cat/2.png": "cat", "dog/1.png": "dog"}
    assert images.splits == [None] * 3
    assert images.layout == "class folders"


def test_the_class_is_the_first_folder_however_deep_an_image_lies(root: Path, photo: Photo) -> None:
    fill(root, photo, "cat/2024/may/1.png", "cat/2.png", "dog/2024/may/1.png")
    assert open_images(root).labels == ["cat", "cat", "dog"]


@pytest.mark.parametrize("name", ["001", "NA", "null", "1.0", "nan", "True"])
def test_class_names_stay_text(root: Path, photo: Photo, name: str) -> None:
    fill(root, photo, f"{name}/1.png", "other/1.png")
    assert set(open_images(root).labels) == {name, "other"}


@pytest.mark.parametrize("validation", ["val", "valid", "validation"])
def test_split_folders_of_class_folders(root: Path, photo: Photo, validation: str) -> None:
    fill(root, photo, "train/cat/1.png", "train/dog/1.png", f"{validation}/cat/2.png", "test/dog/3.png")
    images = open_images(root)
    assert by_name(images, images.splits) == {
        "train/cat/1.png": "train",
        "train/dog/1.png": "train",
        f"{validation}/cat/2.png": "val",
        "test/dog/3.png": "test",
    }
    assert by_name(images, images.labels)["test/dog/3.png"] == "dog"
    assert set(images.labels) == {"cat", "dog"}
    assert images.layout == "split folders of class folders"


def test_split_folders_without_classes_have_no_labels(root: Path, photo: Photo) -> None:
    fill(root, photo, "Train/1.png", "Train/2.png", "Test/3.png")
    images = open_images(root)
    assert by_name(images, images.splits) == {
        "Train/1.png": "train",
        "Train/2.png": "train",
        "Test/3.png": "test",
    }
    assert images.labels == [None] * 3
    assert images.layout == "split folders"


def test_loose_images_beside_class_folders_are_kept_without_a_label_and_said(
    root: Path, photo: Photo
) -> None:
    fill(root, photo, "cat/1.png", "dog/1.png", "loose.png", "other.jpg")
    images = open_images(root)
    assert by_name(images, images.labels) == {
        "cat/1.png": "cat",
        "dog/1.png": "dog",
        "loose.png": None,
        "other.jpg": None,
    }
    assert images.notes == ["2 images lie beside the class folders, without a label"]


def test_hidden_and_system_files_are_left_out(root: Path, photo: Photo) -> None:
    fill(root, photo, "cat/1.png", "dog/1.png")
    fill(root, photo, "cat/.1.png", ".git/1.png", ".ipynb_checkpoints/1.png", "__MACOSX/cat/1.png")
    images = open_images(root)
    assert images.names == ["cat/1.png", "dog/1.png"]
    assert images.ignored == {".png": 1}


def test_files_that_are_not_images_are_counted_by_suffix(root: Path, photo: Photo) -> None:
    fill(root, photo, "a.png", "b.JPG")
    for name in ("notes.txt", "more.TXT", "Thumbs.db", "README", "archive.tar.gz"):
        (root / name).write_bytes(b"x")
    images = open_images(root)
    assert images.names == ["a.png", "b.JPG"]
    assert images.ignored == {".txt": 2, ".db": 1, "": 1, ".gz": 1}


def test_linked_folders_are_not_followed_and_said(root: Path, photo: Photo) -> None:
    fill(root, photo, "cat/1.png", "dog/1.png")
    fill(root.parent, photo, "elsewhere/1.png")
    (root / "linked").symlink_to(root.parent / "elsewhere")
    (root / "cat/loop").symlink_to(root)
    images = open_images(root)
    assert images.names == ["cat/1.png", "dog/1.png"]
    assert images.notes == ["2 linked folders not followed"]


def test_a_linked_image_is_an_image_and_a_dangling_link_is_not(root: Path, photo: Photo) -> None:
    fill(root, photo, "a.png")
    fill(root.parent, photo, "elsewhere/1.png")
    (root / "b.png").symlink_to(root.parent / "elsewhere/1.png")
    (root / "c.png").symlink_to(root / "gone.png")
    images = open_images(root)
    assert images.names == ["a.png", "b.png"]
    assert images.ignored == {".png": 1}


def test_a_pipe_and_a_folder_named_like_images_are_not_opened(root: Path, photo: Photo) -> None:
    fill(root, photo, "a.png")
    os.mkfifo(root / "pipe.png")
    (root / "folder.png").mkdir()
    assert open_images(root).names == ["a.png"]


def test_names_that_are_not_utf8_are_left_out_and_said(root: Path, photo: Photo) -> None:
    fill(root, photo, "a.png", "日本 🐈.png")
    (root / os.fsdecode(b"caf\xe9.png")).write_bytes((root / "a.png").read_bytes())
    images = open_images(root)
    assert images.names == ["a.png", "日本 🐈.png"]
    assert images.notes == ["1 files left out because their names are not UTF-8; rename them"]


def test_a_folder_of_names_that_are_not_utf8_says_so(root: Path, photo: Photo) -> None:
    photo(root / os.fsdecode(b"caf\xe9.png"))
    with pytest.raises(DataError, match="UTF-8"):
        open_images(root)


def test_the_order_does_not_depend_on_the_order_of_writing(tmp_path: Path) -> None:
    names = [f"{place}/{number}.png" for place in ("b", "a", "a b", "a.b", "B") for number in range(20)]
    found = []
    for attempt in range(2):
        random.Random(attempt).shuffle(names)
        root = tmp_path / f"photos{attempt}"
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(b"not read here")
        found.append(open_images(root))
    assert found[0].names == found[1].names
    assert found[0].labels == found[1].labels
    assert sorted(found[0].names) == sorted(names)


def bytes_of(images: ImageSet, row: int) -> bytes:
    found = images.locate(row)
    return found if isinstance(found, bytes) else Path(found).read_bytes()


def test_each_row_is_the_file_of_its_name(root: Path, photo: Photo, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(root, photo, "b/2.png", "a/1.jpg", "c/3.png")
    monkeypatch.chdir(root.parent)
    images = open_images(Path(root.name))
    places = [images.locate(row) for row in range(3)]
    monkeypatch.chdir("/")
    assert places == [str(root / name) for name in images.names], "whole, so that it holds from anywhere"


def test_an_empty_folder_is_refused_with_what_was_looked_for(root: Path) -> None:
    with pytest.raises(DataError) as caught:
        open_images(root)
    assert str(caught.value) == (
        f"{root}: no images found; looked for .jpg .jpeg .png .webp .bmp .gif ... in it and its folders, "
        "found nothing."
    )
    assert caught.value.exit_code == 3


def test_a_folder_without_images_is_refused_with_what_was_found(root: Path) -> None:
    for name in ("1.zip", "2.zip", "deep/3.zip", "LICENSE"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"x")
    with pytest.raises(DataError, match=r"found 3 \.zip, 1 without suffix\.$"):
        open_images(root)


def test_a_file_and_a_missing_folder_are_refused(root: Path, photo: Photo) -> None:
    fill(root, photo, "a.png")
    with pytest.raises(DataError, match=r"a\.png: a file, not a folder of images\.$"):
        open_images(root / "a.png")
    with pytest.raises(DataError, match=r"phtos: no such folder\.$"):
        open_images(root.parent / "phtos")


# What the `datasets` library knows


def piece(count: int, first_seed: int) -> tuple[datasets.Dataset, list[Image.Image]]:
    pictures = [
        Image.fromarray(
            np.random.default_rng(first_seed + number).integers(0, 256, (6, 9, 3), dtype=np.uint8)
        )
        for number in range(count)
    ]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["001", "NA", "cat"])}
    )
    columns = {"image": pictures, "label": [number % 3 for number in range(count)]}
    return datasets.Dataset.from_dict(columns, features=features), pictures


def shows(images: ImageSet, pictures: list[Image.Image]) -> bool:
    found = [np.asarray(decode_image(bytes_of(images, row))[0]) for row in range(len(images.names))]
    return all(np.array_equal(a, np.asarray(b)) for a, b in zip(found, pictures, strict=True))


def test_a_saved_dataset_is_read_with_its_class_names(root: Path) -> None:
    table, pictures = piece(12, 0)
    table.save_to_disk(root)
    images = open_images(root)
    assert images.names == [f"row/{number:02d}" for number in range(12)]
    assert images.labels == ["001", "NA", "cat"] * 4
    assert images.splits == [None] * 12
    assert images.layout == "dataset"
    assert shows(images, pictures)


def test_a_saved_dataset_keeps_its_splits(root: Path) -> None:
    train, train_pictures = piece(3, 0)
    test, test_pictures = piece(2, 10)
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(root)
    images = open_images(root)
    assert by_name(images, images.splits) == {
        "train/0": "train",
        "train/1": "train",
        "train/2": "train",
        "test/0": "test",
        "test/1": "test",
    }
    assert shows(images, train_pictures + test_pictures)


def test_a_class_of_minus_one_is_no_label(root: Path) -> None:
    table, _ = piece(2, 0)
    features = table.features
    datasets.Dataset.from_dict({"image": table["image"], "label": [-1, 2]}, features=features).save_to_disk(
        root
    )
    assert open_images(root).labels == [None, "cat"]


def test_a_saved_dataset_without_images_is_refused_with_its_columns(root: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).save_to_disk(root)
    with pytest.raises(DataError, match=r"no image column; looked for image, .*, found text, label\.$"):
        open_images(root)


def test_parquet_files_are_read_with_their_class_names(root: Path) -> None:
    table, pictures = piece(6, 0)
    table.select(range(4)).to_parquet(root / "part-0.parquet")
    table.select(range(4, 6)).to_parquet(root / "part-1.parquet")
    images = open_images(root)
    assert len(set(images.names)) == 6
    assert images.labels == ["001", "NA", "cat"] * 2
    assert shows(images, pictures)


def test_parquet_files_of_other_programs_are_read_too(root: Path) -> None:
    table, pictures = piece(3, 0)
    raw = [{"bytes": table.cast_column("image", datasets.Image(decode=False))[0]["image"]["bytes"]}]
    columns = {"img": pa.array(raw), "class": pa.array(["001"])}
    pyarrow.parquet.write_table(pa.table(columns), root / "data.parquet")
    images = open_images(root)
    assert images.labels == ["001"]
    assert shows(images, pictures[:1])


def test_rows_are_located_by_many_threads_at_once(root: Path) -> None:
    rows = [{"image": {"bytes": b"image %d" % number, "path": None}} for number in range(500)]
    table = datasets.Dataset.from_list(rows, features=datasets.Features({"image": datasets.Image()}))
    table.to_parquet(root / "data.parquet")
    images = open_images(root)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(images.locate, [*range(500)] * 4))
    assert found == [row["image"]["bytes"] for row in rows] * 4


def test_parquet_files_in_a_folder_with_brackets_are_found(tmp_path: Path) -> None:
    root = tmp_path / "photos [2024]"
    root.mkdir()
    table, pictures = piece(3, 0)
    table.to_parquet(root / "data.parquet")
    assert shows(open_images(root), pictures)


def test_test_images_in_parquet_files_stay_test_images(root: Path) -> None:
    for split, count, seed in (("train", 3, 0), ("test", 2, 10)):
        piece(count, seed)[0].to_parquet(root / f"{split}-00000-of-00001.parquet")
    images = open_images(root)
    assert images.splits.count("test") == 2


# --test


def test_a_test_folder_inside_the_images_is_marked(root: Path, photo: Photo) -> None:
    fill(root, photo, "cat/1.png", "dog/1.png", "exam/cat/2.png", "exam/dog/3.png", "examples/1.png")
    images = open_images(root, test=root / "exam")
    assert by_name(images, images.splits) == {
        "cat/1.png": None,
        "dog/1.png": None,
        "exam/cat/2.png": "test",
        "exam/dog/3.png": "test",
        "examples/1.png": None,
    }
    assert by_name(images, images.labels)["exam/cat/2.png"] == "cat"
    assert by_name(images, images.labels)["exam/dog/3.png"] == "dog"
    assert images.layout == "class folders, test images in exam/"


def test_a_test_folder_inside_a_flat_folder_makes_no_class(root: Path, photo: Photo) -> None:
    fill(root, photo, "1.png", "2.png", "exam/3.png")
    images = open_images(root, test=root / "exam")
    assert images.labels == [None] * 3
    assert by_name(images, images.splits)["exam/3.png"] == "test"


def test_a_test_folder_is_found_by_a_relative_path(
    root: Path, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(root, photo, "cat/1.png", "exam/cat/2.png")
    monkeypatch.chdir(root)
    assert by_name(open_images(root, test=Path("exam")), ["x"] * 2).keys() == {"cat/1.png", "exam/cat/2.png"}
    assert open_images(Path(), test=root / "exam").splits == [None, "test"]


def test_a_test_folder_elsewhere_is_appended(root: Path, photo: Photo) -> None:
    fill(root, photo, "1.png", "2.png")
    exam = root.parent / "exam"
    fill(exam, photo, "cat/1.png", "dog/2.png")
    images = open_images(root, test=exam)
    assert by_name(images, images.splits) == {
        "1.png": None,
        "2.png": None,
        "test:cat/1.png": "test",
        "test:dog/2.png": "test",
    }
    assert images.labels == [None, None, "cat", "dog"]
    assert bytes_of(images, 3) == (exam / "dog/2.png").read_bytes()
    assert f"test images from {exam}" in images.layout


def test_a_test_folder_that_is_missing_or_empty_is_refused(root: Path, photo: Photo) -> None:
    fill(root, photo, "cat/1.png")
    with pytest.raises(DataError, match=r"--test .*exam: no such folder\.$"):
        open_images(root, test=root / "exam")
    (root / "exam").mkdir()
    with pytest.raises(DataError, match="no images found"):
        open_images(root, test=root / "exam")


# --labels


def test_a_labels_folder_elsewhere_brings_its_images(root: Path, photo: Photo) -> None:
    fill(root, photo, "1.png", "2.png")
    labeled = root.parent / "labeled"
    fill(labeled, photo, "001/1.png", "NA/2.png")
    images = open_images(root, labels=labeled)
    assert by_name(images, images.labels) == {
        "1.png": None,
        "2.png": None,
        "labels:001/1.png": "001",
        "labels:NA/2.png": "NA",
    }
    assert images.splits == [None] * 4
    assert bytes_of(images, 2) == (labeled / "001/1.png").read_bytes()


def test_a_labels_folder_inside_the_images_counts_no_image_twice(root: Path, photo: Photo) -> None:
    fill(root, photo, "1.png", "2.png", "labeled/cat/3.png", "labeled/dog/4.png")
    images = open_images(root, labels=root / "labeled")
    assert len(images.names) == 4
    assert sorted(label for label in images.labels if label is not None) == ["cat", "dog"]


def test_a_labels_folder_that_is_the_images_changes_nothing(root: Path, photo: Photo) -> None:
    fill(root, photo, "cat/1.png", "dog/2.png")
    assert open_images(root, labels=root).labels == ["cat", "dog"]
    assert open_images(root, labels=root).names == ["cat/1.png", "dog/2.png"]


def test_a_labels_folder_without_class_folders_is_refused(root: Path, photo: Photo) -> None:
    fill(root, photo, "1.png")
    fill(root.parent, photo, "labeled/2.png")
    with pytest.raises(DataError, match="a folder without class folders in it; put each class into its own"):
        open_images(root, labels=root.parent / "labeled")


def test_classes_that_differ_in_case_or_spaces_only_are_told(tmp_path: Path) -> None:
    for number, label in enumerate(("Shoes", "shoes", "t shirt", "T-shirt", "tshirt")):
        (tmp_path / label).mkdir()
        Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / label / "1.png")
    assert open_images(tmp_path).notes == [
        "classes 'Shoes' and 'shoes' differ in case or spaces only; they count as different",
        "classes 't shirt' and 'tshirt' differ in case or spaces only; they count as different",
    ]


def test_a_label_file_takes_the_place_of_folder_names(root: Path, photo: Photo) -> None:
    fill(root, photo, "monday/1.png", "monday/2.png", "tuesday/3.png")
    (root.parent / "labels.csv").write_text("file_name,label\nmonday/1.png,001\ntuesday/3.png,NA\n")
    images = open_images(root, labels=root.parent / "labels.csv")
    assert images.labels == ["001", None, "NA"]
    assert images.layout == "class folders, labels from labels.csv"
    assert images.notes == ["2 rows: 2 matched, 0 unknown"]


def test_the_split_column_of_a_label_file_goes_to_the_image_of_its_row(root: Path, photo: Photo) -> None:
    fill(root, photo, "1.png", "2.png", "3.png", "4.png")
    (root.parent / "labels.csv").write_text(
        "file_name,label,split\n1.png,cat,test\n2.png,dog,train\n3.png,cat,Test\n4.png,dog,\n"
    )
    images = open_images(root, labels=root.parent / "labels.csv")
    assert images.splits == ["test", "train", "test", None]


def test_a_label_file_labels_test_images_that_lie_elsewhere(root: Path, photo: Photo) -> None:
    fill(root, photo, "1.png", "2.png")
    fill(root.parent / "exam", photo, "3.png", "deep/4.png")
    (root.parent / "labels.csv").write_text(
        "file_name,label\n1.png,cat\nexam/3.png,dog\nexam/deep/4.png,cat\n"
    )
    images = open_images(root, labels=root.parent / "labels.csv", test=root.parent / "exam")
    assert by_name(images, images.labels) == {
        "1.png": "cat",
        "2.png": None,
        "test:3.png": "dog",
        "test:deep/4.png": "cat",
    }


def test_a_stray_folder_or_file_beside_the_split_does_not_turn_it_into_classes(
    tmp_path: Path, photo: Photo
) -> None:
    for name in ("train/cat/a.png", "test/cat/b.png", "unlabeled/c.png", "preview.png"):
        photo(tmp_path / name)
    images = open_images(tmp_path)
    found = dict(zip(images.names, zip(images.splits, images.labels, strict=True), strict=True))
    assert found == {
        "train/cat/a.png": ("train", "cat"),
        "test/cat/b.png": ("test", "cat"),
        "unlabeled/c.png": (None, None),
        "preview.png": (None, None),
    }
    assert "2 images lie beside the split folders, without a label" in images.notes


def test_whole_paths_of_all_files_are_never_held_at_once(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.touch()
    files = [file] * 20_000
    tracemalloc.start()
    try:
        images = open_files(files)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert images.locate(19_999) == str(file)
    assert peak < 100 * len(files)  # of it 50 for each name
