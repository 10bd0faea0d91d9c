"""The kept classifier on new images: the same numbers as in the comparison, bad files left out by name, nothing overwritten."""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from labelwise import rundir
from labelwise.cli import app
from labelwise.config import FinetuneSettings, read_run_config, to_toml
from labelwise.errors import CheckpointError, DataError, LabelwiseError, UsageError
from labelwise.images.cache import build_cache
from labelwise.images.source import open_images
from labelwise.models.weights import read_metadata, save_module
from labelwise.rundir import RunDirectory
from labelwise.stages import comparing
from labelwise.stages.exporting import export
from labelwise.stages.finetuning import predict as probabilities_of
from labelwise.stages.predicting import load_classifier, predict, show
from labelwise.stages.repeating import finetune


@pytest.fixture(scope="module")
def run(classified: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run with a classifier of a few steps."""
    return RunDirectory(Path(shutil.copytree(classified.path, tmp_path_factory.mktemp("predicting") / "run")))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory, some_digits: Callable[[Path, int], Path]) -> Path:
    """Ninety digits in class folders, a ninth of which no training has seen."""
    return some_digits(tmp_path_factory.mktemp("new") / "digits", 20)


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_every_image_gets_what_the_classifier_says_of_it(
    run: RunDirectory, digits: Path, tmp_path: Path
) -> None:
    document = predict(run, [digits], tmp_path / "out.csv", probabilities=True)
    images = open_images(digits)
    classifier, spec, classes = load_classifier(run)
    cache = build_cache(images, side=16, evaluation_size=spec.image_size)
    expected = probabilities_of(
        classifier, cache, np.arange(len(images.names)), spec.normalization, torch.device("cpu")
    )
    rows = rows_of(tmp_path / "out.csv")
    assert [row["file"] for row in rows] == images.names
    found = np.array([[float(row[f"p_{name}"]) for name in classes] for row in rows])
    np.testing.assert_allclose(found, expected, atol=2e-6)
    order = np.argsort(-expected, axis=1)
    assert [row["label"] for row in rows] == [classes[index] for index in order[:, 0]]
    assert [row["second_label"] for row in rows] == [classes[index] for index in order[:, 1]]
    np.testing.assert_allclose([float(row["confidence"]) for row in rows], expected.max(axis=1), atol=2e-6)
    assert document["images"] == len(rows) == sum(document["labels"].values())
    assert document["left_out"] == []


def test_both_formats_say_the_same(run: RunDirectory, digits: Path, tmp_path: Path) -> None:
    for name in ("out.csv", "out.parquet"):
        predict(run, [digits], tmp_path / name)
    table = pq.read_table(tmp_path / "out.parquet").to_pylist()
    rows = rows_of(tmp_path / "out.csv")
    assert [row["label"] for row in table] == [row["label"] for row in rows]
    assert list(table[0]) == list(rows[0])
    np.testing.assert_allclose(
        [row["confidence"] for row in table], [float(row["confidence"]) for row in rows], atol=1e-6
    )


def test_single_files_keep_the_names_they_were_given(
    run: RunDirectory, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(digits)
    files = sorted(Path().glob("3/*.png"))[:2]
    predict(run, files, tmp_path / "out.csv")
    assert [row["file"] for row in rows_of(tmp_path / "out.csv")] == [str(file) for file in files]


def test_what_cannot_be_read_is_left_out_by_name(run: RunDirectory, digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits, tmp_path / "new")
    (tmp_path / "new/0/broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (tmp_path / "new/0/empty.png").write_bytes(b"")
    document = predict(run, [tmp_path / "new"], tmp_path / "out.csv")
    assert [entry["file"] for entry in document["left_out"]] == ["0/broken.png", "0/empty.png"]
    assert document["left_out"][1]["reason"] == "empty file"
    names = {row["file"] for row in rows_of(tmp_path / "out.csv")}
    assert names == set(open_images(digits).names)


def test_nothing_readable_writes_nothing(run: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new/a.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"none of the 1 images can be read, e\.g\. a\.png"):
        predict(run, [tmp_path / "new"], tmp_path / "out.csv")
    assert {entry.name for entry in tmp_path.iterdir()} == {"new"}


def test_a_table_is_not_written_among_test_images_that_came_later(
    run: RunDirectory, digits: Path, tmp_path: Path
) -> None:
    (tmp_path / "exam").mkdir()
    copy = RunDirectory(Path(shutil.copytree(run.path, tmp_path / "copy")))
    pretraining = read_run_config(copy.config)
    known = to_toml({"pretrain": pretraining, "finetune": {"test": str(tmp_path / "exam")}})
    rundir.write_text(copy.config, known)
    with pytest.raises(UsageError, match="lies inside the image folder"):
        predict(copy, [digits], tmp_path / "exam" / "out.csv")


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("there.csv", "is there already"),
        ("out.txt", r"name a \.csv or a \.parquet file"),
        ("nowhere/out.csv", "there is no folder"),
        ("digits/out.csv", "lies inside the image folder"),
    ],
)
def test_a_table_is_never_written_where_it_would_do_harm(
    run: RunDirectory, digits: Path, tmp_path: Path, target: str, words: str
) -> None:
    (tmp_path / "there.csv").write_text("mine")
    (tmp_path / "digits").symlink_to(digits)
    before = sorted(digits.rglob("*"))
    with pytest.raises(UsageError, match=words):
        predict(run, [digits], tmp_path / target)
    assert (tmp_path / "there.csv").read_text() == "mine"
    assert sorted(digits.rglob("*")) == before


def test_a_table_is_not_written_among_the_images_of_the_run(
    run: RunDirectory, digits: Path, tmp_path: Path
) -> None:
    target = Path(rundir.read_json(run.data)["root"]) / "1" / "p.csv"
    with pytest.raises(UsageError, match="lies inside the image folder"):
        predict(run, [digits], target)
    assert not target.exists()


def test_files_that_are_not_there_are_named(run: RunDirectory, digits: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for images, words in (
        ([tmp_path / "gone.png"], "gone.png: no such file"),
        ([digits, digits / "0"], "a folder; give one folder, or files"),
        ([tmp_path / "empty"], "no images found"),
    ):
        with pytest.raises(DataError, match=words):
            predict(run, images, tmp_path / "out.csv")


def test_a_run_without_a_classifier_says_what_makes_one(
    pretrained: RunDirectory, digits: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"has no classifier yet; `labelwise finetune --run"):
        predict(pretrained, [digits], tmp_path / "out.csv")


def test_what_the_classifier_needs_of_its_images_is_read_where_damage_is_noticed(
    run: RunDirectory, digits: Path, tmp_path: Path
) -> None:
    copy = RunDirectory(Path(shutil.copytree(run.path, tmp_path / "copy")))
    facts = rundir.read_json(copy.classifier_json)
    rundir.write_json(copy.classifier_json, {**facts, "encoder": {**facts["encoder"], "mean": "[0, 0, 0]"}})
    assert load_classifier(copy)[1] == load_classifier(run)[1]
    rundir.write_json(copy.classifier_json, {**facts, "encoder": {**facts["encoder"], "mean": "[0, 0"}})
    with pytest.raises(CheckpointError, match="has no classifier yet"):
        predict(copy, [digits], tmp_path / "out.csv")


def test_new_weights_are_never_read_with_the_classes_of_the_ones_before(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = RunDirectory(Path(shutil.copytree(run.path, tmp_path / "copy")))

    def save_and_be_killed(*arguments: Any) -> None:
        save_module(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(comparing, "save_module", save_and_be_killed)
    with pytest.raises(KeyboardInterrupt):
        finetune(FinetuneSettings(run=copy.path, methods=("simclr",), label_counts=("all",), steps=1, seed=1))
    with pytest.raises(UsageError, match="has no classifier yet"):
        load_classifier(copy)


def test_a_damaged_classifier_is_named(run: RunDirectory, digits: Path, tmp_path: Path) -> None:
    copy = RunDirectory(Path(shutil.copytree(run.path, tmp_path / "copy")))
    copy.classifier.write_bytes(copy.classifier.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"classifier\.safetensors: damaged"):
        predict(copy, [digits], tmp_path / "out.csv")


def test_a_classifier_that_says_no_numbers_is_named(run: RunDirectory, digits: Path, tmp_path: Path) -> None:
    state, metadata = load_file(run.classifier), read_metadata(run.classifier)
    broken = RunDirectory(Path(shutil.copytree(run.path, tmp_path / "broken")))
    save_file(
        {key: value * math.nan if key == "linear.weight" else value for key, value in state.items()},
        broken.classifier,
        metadata,
    )
    with pytest.raises(
        LabelwiseError, match=r"what it predicts is not finite; train another with `labelwise finetune`\."
    ):
        predict(broken, [digits], tmp_path / "found.csv")
    assert not (tmp_path / "found.csv").exists()


def test_deep_images_are_scaled_as_the_pretraining_images_were(run: RunDirectory, tmp_path: Path) -> None:
    copy = RunDirectory(Path(shutil.copytree(run.path, tmp_path / "copy")))
    facts = rundir.read_json(copy.data)
    rundir.write_json(copy.data, {**facts, "intensity_range": [0.0, 60000.0]})
    ramp = np.linspace(0, 30000, 400).reshape(20, 20)
    (tmp_path / "new").mkdir()
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "new/deep.png")
    Image.fromarray((ramp / 60000 * 255).round().astype(np.uint8)).save(tmp_path / "new/shallow.png")
    predict(copy, [tmp_path / "new"], tmp_path / "out.csv", probabilities=True)
    deep, shallow = rows_of(tmp_path / "out.csv")
    for key in deep.keys() - {"file"}:
        assert deep[key] == shallow[key]


def test_how_good_the_classifier_is_is_told(
    run: RunDirectory, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = rundir.read_jsonl(run.results)
    expected = predict(run, [digits], tmp_path / "out.csv")["expected"]
    assert expected == {
        "accuracy": row["accuracy"], "labels": row["labels"], "n_test": row["n_test"], "trained_on": row["labels"],
    }  # fmt: skip
    copy = RunDirectory(Path(shutil.copytree(run.path, tmp_path / "copy")))
    facts = rundir.read_json(copy.classifier_json)
    others = [
        {**row, "draw": draw, "labels": 30, "accuracy": share} for draw, share in enumerate((0.25, 0.5))
    ]
    fewer = {**row, "labels": 20, "accuracy": 1.0}
    rundir.rewrite_jsonl(copy.results, [fewer, *others, {**row, "method": "pixels", "labels": 99}])
    document = predict(copy, [digits], tmp_path / "fewer.csv")
    assert document["expected"] == {
        "accuracy": 0.375,
        "labels": 30,
        "n_test": row["n_test"],
        "trained_on": row["labels"],
    }
    show(document)
    assert (
        f"expect    37.5% right where images are like the {row['n_test']} test images: so it was with 30 labels; this one learned from {row['labels']}\n"
        in capsys.readouterr().out
    )
    rundir.write_json(copy.classifier_json, {**facts, "signature": "of other labels"})
    assert predict(copy, [digits], tmp_path / "copy.csv")["expected"] is None


def test_classes_of_other_weights_are_refused(run: RunDirectory, digits: Path, tmp_path: Path) -> None:
    copy = RunDirectory(Path(shutil.copytree(run.path, tmp_path / "copy")))
    facts = rundir.read_json(copy.classifier_json)
    rundir.write_json(copy.classifier_json, {**facts, "classes": facts["classes"][::-1]})
    for command in (
        lambda: predict(copy, [digits], tmp_path / "out.csv"),
        lambda: export(copy, "timm", tmp_path / "out"),
    ):
        with pytest.raises(
            CheckpointError,
            match=r"classifier\.json: its classes are not those that classifier\.safetensors was trained on",
        ):
            command()


def test_a_table_holds_no_formula(
    run: RunDirectory, digits: Path, tmp_path: Path, rename_classes: Callable[..., None]
) -> None:
    (tmp_path / "new").mkdir()
    for name in ("=1+1.png", "-rf.png", "@x.png", "plain.png"):
        shutil.copy(next(digits.glob("*/*.png")), tmp_path / "new" / name)
    copy = RunDirectory(Path(shutil.copytree(run.path, tmp_path / "copy")))
    classes = rundir.read_json(copy.classifier_json)["classes"]
    rename_classes(copy, [f"={name}" for name in classes])
    predict(copy, [tmp_path / "new"], tmp_path / "out.csv")
    rows = rows_of(tmp_path / "out.csv")
    assert [row["file"] for row in rows] == ["./-rf.png", "./=1+1.png", "./@x.png", "plain.png"]
    assert all(row["label"].startswith("'=") and row["second_label"].startswith("'=") for row in rows)
    rename_classes(copy, [f"-{name}" for name in classes])
    predict(copy, [tmp_path / "new"], tmp_path / "numbers.csv")
    assert all(row["label"].startswith("-") for row in rows_of(tmp_path / "numbers.csv")), (
        "a number is no formula"
    )
    predict(copy, [tmp_path / "new"], tmp_path / "out.parquet")
    table = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["file"] for row in table] == ["-rf.png", "=1+1.png", "@x.png", "plain.png"]


@pytest.mark.slow
def test_an_interrupted_table_is_not_left_half_written(
    run: RunDirectory, digits: Path, tmp_path: Path
) -> None:
    (tmp_path / "new").mkdir()
    source = next(digits.glob("*/*.png"))
    for number in range(6_000):
        (tmp_path / f"new/{number:05}.png").symlink_to(source)
    command = [sys.executable, "-m", "labelwise", "predict", str(tmp_path / "new"), "--run", str(run.path)]
    process = subprocess.Popen([*command, "--out", str(tmp_path / "out.csv")], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while (
        not any(part.stat().st_size > 5000 for part in tmp_path.glob(".out.csv-*"))
        and time.monotonic() < deadline
    ):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"was not written" in errors
    assert {entry.name for entry in tmp_path.iterdir()} - {"cache"} == {"new"}


def test_the_command_prints_one_document(
    run: RunDirectory, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["predict", str(digits), "--run", str(run.path), "--out", str(tmp_path / "o.csv"), "--json"]
    app(command, standalone_mode=False)
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert document["out"] == str(tmp_path / "o.csv")
    assert document["images"] == len(rows_of(tmp_path / "o.csv"))
