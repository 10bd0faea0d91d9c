"""What belongs together stays on one side of the split: copies, near-copies, bursts, and what a column says."""

import io
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps
from sklearn.datasets import load_sample_images

from labelwise import rundir
from labelwise.config import FinetuneSettings, PretrainSettings
from labelwise.errors import DataError, UsageError
from labelwise.images.cache import build_cache
from labelwise.images.decoding import shot
from labelwise.images.duplicates import connect
from labelwise.images.grouping import MOST_IN_A_SECOND, Groups, group_images
from labelwise.images.source import open_images
from labelwise.images.splits import lock_test, pool_indices
from labelwise.reports import html, markdown
from labelwise.stages.pretraining import pretrain
from labelwise.stages.repeating import finetune
from labelwise.stages.reporting import report
from labelwise.stages.scanning import scan
from labelwise.stages.verifying import verify

Photo = Callable[..., Image.Image]
TINY: dict[str, Any] = {
    "holdout": 0.25,
    "backbone": "resnet18",
    "backbone_args": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]},
    "image_size": 16,
    "cache_side": 32,
    "batch_size": 8,
    "epochs": 1,
    "precision": "fp32",
}
NOON = datetime(2024, 5, 1, 12)


def photographed(seconds: float | None, model: str | None = "A", kind: str = "JPEG", seed: int = 0) -> bytes:
    """A noise image as a camera would write it."""
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    exif = Image.Exif()
    if model is not None:
        exif[ExifTags.Base.Model] = model
    if seconds is not None:
        moment = (NOON + timedelta(seconds=seconds)).strftime("%Y:%m:%d %H:%M:%S")
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = moment
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, exif=exif)
    return file.getvalue()


def grouped(root: Path, **options: Any) -> tuple[list[set[str]], Groups]:
    """The groups of two images and more, by name."""
    images = open_images(root, **options)
    groups = group_images(images, build_cache(images, side=32, evaluation_size=32))
    found = [
        {images.names[row] for row in np.flatnonzero(groups.of == number)} for number in np.unique(groups.of)
    ]
    return [names for names in found if len(names) > 1], groups


def opened(file: Path) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Forty-eight real photographs in two classes."""
    root, number = tmp_path / "photographs", 0
    for picture in load_sample_images().images:  # 427 x 640
        for top in range(0, 357, 71):
            for left in range(0, 541, 106):
                tile = Image.fromarray(picture[top : top + 70, left : left + 100])
                if np.asarray(tile.convert("L")).std() > 12 and number < 48:
                    file = root / "ab"[number % 2] / f"{number:02}.png"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    tile.save(file)
                    number += 1
    return root


# What ties images


def test_a_photograph_says_which_camera_took_it_and_when() -> None:
    first, later, other = (shot(photographed(*facts)) for facts in ((0, "A"), (5, "A"), (0, "B")))
    assert first[0] == later[0] != other[0]
    assert later[1] - first[1] == 5
    assert first[1] == datetime(2024, 5, 1, 12, tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    "data",
    [
        photographed(None),
        photographed(0, None),
        photographed(None, None),
        b"",
        b"Exif",
        photographed(0)[:120],
    ],
    ids=["no time", "no camera", "neither", "nothing", "only a word", "cut off"],
)
def test_without_camera_or_time_nothing_is_known(data: bytes) -> None:
    assert shot(data) == (0, 0)


def test_formats_other_than_jpeg_carry_the_time_too() -> None:
    assert shot(photographed(3, kind="WEBP")) == shot(photographed(3, kind="PNG")) == shot(photographed(3))


def test_shots_of_one_camera_within_two_seconds_are_one_burst(tmp_path: Path) -> None:
    for number, (second, model) in enumerate([(0, "A"), (2, "A"), (4, "A"), (7, "A"), (1, "B"), (99, "A")]):
        (tmp_path / f"{number}.jpg").write_bytes(photographed(second, model, seed=number))
    found, groups = grouped(tmp_path)
    assert found == [{"0.jpg", "1.jpg", "2.jpg"}]
    assert groups.counts["shots of one burst"] == 3


def test_a_clock_that_stands_still_is_not_believed(tmp_path: Path) -> None:
    for number in range(MOST_IN_A_SECOND + 1):
        (tmp_path / f"{number:02}.jpg").write_bytes(photographed(0, seed=number))
    for number, second in enumerate([50, 51]):
        (tmp_path / f"burst-{number}.jpg").write_bytes(photographed(second, seed=100 + number))
    found, groups = grouped(tmp_path)
    assert found == [{"burst-0.jpg", "burst-1.jpg"}]
    assert groups.notes == ["51 images carry the same time of shooting as many others; it is not used"]


def test_copies_and_near_copies_are_tied(photographs: Path) -> None:
    first, second, *_ = sorted((photographs / "a").iterdir())
    (photographs / "a/copy.png").write_bytes(first.read_bytes())
    ImageOps.mirror(opened(second)).resize((60, 42)).save(photographs / "b/mirrored.jpg", quality=60)
    found, groups = grouped(photographs)
    assert found == [
        {f"a/{first.name}", "a/copy.png"},
        {f"a/{second.name}", "b/mirrored.jpg"},
    ]
    assert (groups.counts["exact copies"], groups.counts["near-copies"]) == (2, 2)


def test_near_copies_are_found_once_for_each_cache(
    photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = grouped(photographs)[0]
    monkeypatch.setattr("labelwise.images.grouping.find_near_copies", None)
    assert grouped(photographs)[0] == before


def test_where_all_images_look_alike_none_is_taken_for_a_near_copy(photographs: Path) -> None:
    still = opened(sorted((photographs / "a").iterdir())[0])
    for number in range(60):
        noise = np.random.default_rng(number).normal(0, 3, (70, 100, 3))
        pixels = np.clip(np.asarray(still) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(photographs / f"a/camera-{number:02}.png")
    found, groups = grouped(photographs)
    assert found == []
    assert "--group-column" in groups.notes[0]
    assert groups.notes[0].startswith("61 images look like near-copies of each other")


def test_tiny_images_are_not_compared(tmp_path: Path, photo: Photo) -> None:
    for number in range(3):
        photo(tmp_path / f"{number}.png", seed=number, size=(20, 20))
    opened(tmp_path / "0.png").save(tmp_path / "again.jpg", quality=95)
    assert grouped(tmp_path)[0] == []


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (
            "path,label,patient\n0.png,x,P1\n1.png,,P1\n2.png,y,P2\n3.png,y,\n4.png,,P2\n",
            [{"0.png", "1.png"}, {"2.png", "4.png"}],
        ),
        ("path,patient\n0.png,here\n1.png,there\n2.png,here\n", [{"0.png", "2.png"}]),
    ],
    ids=["with and without a label", "no label column"],
)
def test_a_group_column_ties_images(
    tmp_path: Path, photo: Photo, rows: str, expected: list[set[str]]
) -> None:
    for number in range(5):
        photo(tmp_path / f"photos/{number}.png", seed=number)
    table = tmp_path / "labels.csv"
    table.write_text(rows)
    found, groups = grouped(
        tmp_path / "photos", labels=table, labels_root=tmp_path / "photos", group_column="patient"
    )
    assert found == expected
    assert groups.counts["tied by the group column"] == sum(map(len, expected))


def test_a_group_column_that_is_not_there_is_refused_in_words(tmp_path: Path, photo: Photo) -> None:
    photo(tmp_path / "photos/0.png")
    table = tmp_path / "labels.csv"
    table.write_text("path,label\n0.png,x\n")
    with pytest.raises(DataError, match="no group column; looked for patient, found path, label"):
        open_images(tmp_path / "photos", labels=table, group_column="patient")
    with pytest.raises(UsageError, match="give --labels FILE too"):
        open_images(tmp_path / "photos", group_column="patient")


def test_an_image_in_two_groups_is_refused(tmp_path: Path, photo: Photo) -> None:
    photo(tmp_path / "photos/0.png")
    table = tmp_path / "photos" / "labels.csv"
    table.write_text("path,label,patient\n0.png,x,P1\n0.png,x,P2\n")
    with pytest.raises(DataError, match="in group 'P2' here and 'P1' before"):
        open_images(tmp_path / "photos", labels=table, group_column="patient")


def test_ties_over_others_count() -> None:
    assert connect(6, np.array([[0, 3], [3, 5], [1, 2]])).tolist() == [0, 1, 1, 0, 2, 0]


# What stays on one side


def test_planted_copies_never_lie_on_both_sides(tmp_path: Path, photographs: Path) -> None:
    """Twenty exact and twenty near copies across the user's own split: exact ones all found, of the others eighteen."""
    originals = sorted(photographs.glob("*/*.png"))[:40]
    root = tmp_path / "split"
    for number, file in enumerate(sorted(photographs.glob("*/*.png"))):
        target = root / "test" / file.parent.name / f"{number}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    for number, file in enumerate(originals):
        target = root / "train" / file.parent.name / f"copy-{number:02}"
        target.parent.mkdir(parents=True, exist_ok=True)
        image = opened(file)
        if number < 20:
            target.with_suffix(".png").write_bytes(file.read_bytes())
        elif number % 4 == 0:
            image.resize((64, 45)).save(target.with_suffix(".png"))
        elif number % 4 == 1:
            image.save(target.with_suffix(".jpg"), quality=40)
        elif number % 4 == 2:
            image.crop((5, 3, 100, 70)).save(target.with_suffix(".png"))
        else:
            ImageOps.mirror(image).save(target.with_suffix(".jpg"), quality=80)
    images = open_images(root)
    cache = build_cache(images, side=32, evaluation_size=32)
    groups = group_images(images, cache)
    lock = lock_test(images, cache.keys, cache.readable, None, 0, groups=groups.of)
    assert len(lock["excluded_duplicates"]) == 20
    assert len(lock["excluded_groups"]) >= 18
    left = {images.names[row] for row in pool_indices(images, cache.readable, lock)}
    assert left == {name for name in images.names if name.startswith("train/")} - {
        *lock["excluded_duplicates"],
        *lock["excluded_groups"],
    }


def test_a_run_keeps_patients_on_one_side_and_shows_near_copies(tmp_path: Path, photographs: Path) -> None:
    files = sorted(photographs.glob("*/*.png"))
    names = [file.relative_to(photographs).as_posix() for file in files]
    patient = {name: f"P{number // 4}" for number, name in enumerate(names)}
    twin = ImageOps.mirror(opened(files[0]))
    twin.save(photographs / "a/twin.jpg", quality=70)
    table = tmp_path / "patients.csv"
    table.write_text("path,label,patient\n" + "".join(f"{n},{n[0]},{patient[n]}\n" for n in names))
    run = pretrain(
        PretrainSettings(
            images=photographs,
            labels=table,
            labels_root=photographs,
            group_column="patient",
            out=tmp_path / "run",
            **TINY,
        )
    )
    lock = rundir.read_json(run.test_lock)
    tested = {patient[name] for name in lock["names"]}
    pool = set(names) - {*lock["names"], *lock["excluded_groups"]}
    assert lock["names"]
    assert tested.isdisjoint({patient[name] for name in pool})
    near = rundir.read_json(run.near_copies)["pairs"]
    assert [each["names"] for each in near] == [[names[0], "a/twin.jpg"]]

    document = report(
        finetune(FinetuneSettings(run=run.path, label_counts=(6,), draws=3, steps=2, scratch_steps=2))
    )
    page, text = html.render(document, run), markdown.render(document)
    assert (
        "Kept together, never on both sides of the split: 2 near-copies, 48 tied by the group column" in text
    )
    assert "Images that belong together" in page
    assert page.count('<div class="pairs">') == 1
    assert page.split('<div class="pairs">')[1].split("</div>")[0].count("<img") == 2
    assert document["test_groups"] == len(tested)
    assert any(f"belong to {len(tested)} groups" in limit for limit in document["limits"])
    orders = [rundir.read_json(file)["order"] for file in run.splits.glob("draw-*.json")]
    assert all(tested.isdisjoint({patient[name] for name in order}) for order in orders)
    assert verify(run)["classifiers"] == len(document["results"])


def patients(folder: Path, photographs: Path, *, split: bool = False) -> Path:
    """A table of patients of four images each; with a split that tears every patient."""
    names = [file.relative_to(photographs).as_posix() for file in sorted(photographs.glob("*/*.png"))]
    rows = [f"{n},P{i // 4},{'test' if i % 4 == 0 else 'train'}\n" for i, n in enumerate(names)]
    table = folder / "patients.csv"
    table.write_text("path,patient,split\n" + "".join(rows))
    if not split:
        table.write_text("path,patient\n" + "".join(row.rsplit(",", 1)[0] + "\n" for row in rows))
    return table


def test_patients_known_when_pretraining_are_kept_apart_without_the_table_too(
    tmp_path: Path, photographs: Path
) -> None:
    table = patients(tmp_path, photographs, split=True)
    images = open_images(photographs, labels=table, labels_root=photographs, group_column="patient")
    cache = build_cache(images, side=32, evaluation_size=32)
    first = lock_test(images, cache.keys, cache.readable, None, 0, groups=group_images(images, cache).of)
    assert len(first["excluded_groups"]) == 36
    later = open_images(photographs)
    of = group_images(later, cache).of
    again = lock_test(later, cache.keys, cache.readable, None, 0, groups=of, locked=first)
    assert again["excluded_groups"] == first["excluded_groups"]


def test_a_table_of_groups_alone_leaves_the_labels_of_the_folders(tmp_path: Path, photographs: Path) -> None:
    table = patients(tmp_path, photographs)
    images = open_images(photographs, labels=table, labels_root=photographs, group_column="patient")
    assert set(images.labels) == {"a", "b"}
    assert len(set(images.groups)) == 12


def test_one_camera_among_others_unties_only_its_own_pictures(photographs: Path) -> None:
    first, second, *_ = sorted((photographs / "a").iterdir())
    ImageOps.mirror(opened(second)).save(photographs / "b/mirrored.jpg", quality=95)
    for number in range(30):
        noise = np.random.default_rng(number).normal(0, 3, (70, 100, 3))
        pixels = np.clip(np.asarray(opened(first)) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(photographs / f"a/camera-{number:02}.png")
    found, groups = grouped(photographs)
    assert found == [{f"a/{second.name}", "b/mirrored.jpg"}]
    assert groups.notes[0].startswith("31 images look like")


def test_a_long_burst_is_one_burst(tmp_path: Path) -> None:
    for number in range(61):
        (tmp_path / f"{number:02}.jpg").write_bytes(photographed(2 * number, seed=number))
    found, _ = grouped(tmp_path)
    assert [len(names) for names in found] == [61]


def test_empty_cells_of_a_table_are_no_group(tmp_path: Path, photo: Photo) -> None:
    for number in range(4):
        photo(tmp_path / f"{number}.png", seed=number)
    table = datasets.Dataset.from_dict(
        {"image": [str(tmp_path / f"{n}.png") for n in range(4)], "site": ["", "x", "x", ""]}
    ).cast_column("image", datasets.Image())
    table.save_to_disk(str(tmp_path / "table"))
    images = open_images(tmp_path / "table", group_column="site")
    assert images.groups == [None, "x", "x", None]


def test_labels_that_come_later_keep_the_groups_of_pretraining(tmp_path: Path, photographs: Path) -> None:
    table = patients(tmp_path, photographs)
    names = [line.split(",")[0] for line in table.read_text().splitlines()[1:]]
    run = pretrain(
        PretrainSettings(images=photographs, labels=table, labels_root=photographs, group_column="patient", out=tmp_path / "run", **TINY)
    )  # fmt: skip
    later = tmp_path / "later.csv"
    later.write_text("path,label\n" + "".join(f"{name},{name[0]}\n" for name in names))
    settings = FinetuneSettings(
        run=run.path, labels=later, labels_root=photographs, methods=("pixels",), label_counts=("all",)
    )
    document = report(finetune(settings))
    assert document["test_groups"] == len(
        {place // 4 for place, name in enumerate(names) if name in rundir.read_json(run.test_lock)["names"]}
    )


def test_groups_that_come_after_pretraining_are_told(
    tmp_path: Path, photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = pretrain(PretrainSettings(images=photographs, out=tmp_path / "run", **TINY))
    settings = FinetuneSettings(run=run.path, methods=("pixels",), label_counts=(6,), draws=1)
    before = report(finetune(settings))
    assert before["test_groups"] is None
    table = patients(tmp_path, photographs)
    grouped_settings = settings.model_copy(
        update={"labels": table, "labels_root": photographs, "group_column": "patient"}
    )
    document = report(finetune(grouped_settings))
    assert "were pretrained on" in document["results"][0]["test_method"]
    assert "belong with test images were pretrained on" in capsys.readouterr().err
    assert document["test_groups"] is not None
    again = report(finetune(settings))  # as in the last comparison
    assert again["test_groups"] == document["test_groups"]


def test_a_table_of_groups_alone_serves_a_comparison_too(tmp_path: Path, photographs: Path) -> None:
    table = patients(tmp_path, photographs)
    run = pretrain(
        PretrainSettings(images=photographs, labels=table, labels_root=photographs, group_column="patient", out=tmp_path / "run", **TINY)
    )  # fmt: skip
    document = report(finetune(FinetuneSettings(run=run.path, methods=("pixels",), label_counts=("all",))))
    assert document["test_groups"] == len(rundir.read_json(run.test_lock)["names"]) // 4


def test_a_damaged_search_is_made_again(photographs: Path) -> None:
    before = grouped(photographs)[0]
    images = open_images(photographs)
    folder = build_cache(images, side=32, evaluation_size=32).folder
    for file in folder.glob("near-copies-*"):
        file.write_bytes(file.read_bytes()[:40])
    assert grouped(photographs)[0] == before


def test_pictures_that_carry_two_labels_are_counted_with_an_example(tmp_path: Path, photo: Photo) -> None:
    for seed in range(3):
        photo(tmp_path / "skirt" / f"{seed}.png", seed)
        photo(tmp_path / "coat" / f"{seed}.png", seed + 10)
    shutil.copy(tmp_path / "coat" / "0.png", tmp_path / "coat" / "again.png")

    def said() -> list[str]:
        notes = scan(tmp_path)["notes"], grouped(tmp_path)[1].notes
        return [note for each in notes for note in each if "two labels" in note]

    assert said() == []
    shutil.copytree(tmp_path / "skirt", tmp_path / "skirt copy")
    assert said() == 2 * [
        "3 images carry two labels, e.g. skirt/0.png (skirt) and skirt copy/0.png (skirt copy) are the same picture"
    ]
