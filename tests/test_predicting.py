"""The kept classifier on new images: the same numbers as in the comparison, bad files left out by name, nothing overwritten."""

import csv
import dataclasses
import fcntl
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
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
from labelwise.errors import CheckpointError, DataError, Interrupted, LabelwiseError, UsageError
from labelwise.images.cache import build_cache
from labelwise.images.source import open_images
from labelwise.models.weights import read_metadata, save_module
from labelwise.rundir import RunDirectory
from labelwise.stages import calibrating, comparing, predicting
from labelwise.stages.benching import set_up_bench
from labelwise.stages.classifier import load_classifier, read_calibration
from labelwise.stages.classifier import predict as probabilities_of
from labelwise.stages.exporting import export
from labelwise.stages.oracle import Oracle
from labelwise.stages.predicting import predict, show
from labelwise.stages.repeating import finetune
from labelwise.tables import TEXTS, Parts, open_table


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


def test_several_devices_say_what_one_says(
    run: RunDirectory, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict(run, [digits], tmp_path / "one.csv")
    asked = Counter[int]()
    tell = Oracle.tell

    def noted(oracle: Oracle, names: list[str], pixels: Any) -> dict[str, Any]:
        asked[id(oracle.speaker)] += 1
        return tell(oracle, names, pixels)

    monkeypatch.setattr(Oracle, "tell", noted)
    monkeypatch.setattr("labelwise.images.cache._DECODED", (0, 8, 8))
    monkeypatch.setattr("labelwise.stages.predicting.choose_devices", lambda *_: [torch.device("cpu")] * 3)
    predict(run, [digits], tmp_path / "three.csv", devices="3")
    assert len(asked) == 3, "each by a network of its own"
    for one, other in zip(rows_of(tmp_path / "one.csv"), rows_of(tmp_path / "three.csv"), strict=True):
        assert (one["file"], one["label"]) == (other["file"], other["label"])
        assert float(one["confidence"]) == pytest.approx(float(other["confidence"]), abs=1e-5)


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


def test_an_interrupted_table_is_gone_on_with_and_ends_the_same(
    run: RunDirectory, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("labelwise.images.cache._DECODED", (0, 8, 8))
    shutil.copytree(digits, tmp_path / "new")
    (tmp_path / "new/0/broken.png").write_bytes(b"no image")
    expected = predict(run, [tmp_path / "new"], tmp_path / "whole.csv", probabilities=True)
    add, asked = Parts.add, list[int]()

    def add_and_be_asked_to_stop(self: Parts, done: int, *rest: Any) -> None:
        add(self, done, *rest)
        asked.append(done)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Parts, "add", add_and_be_asked_to_stop)
    with pytest.raises(Interrupted, match="of 91 images are done; the same command goes on") as interrupted:
        predict(run, [tmp_path / "new"], tmp_path / "out.csv", probabilities=True)
    assert 8 <= asked[-1] <= 48, "it ends soon, and keeps what was asked when the signal came"
    assert str(interrupted.value).startswith(f"{asked[-1]} of 91"), interrupted.value
    assert not (tmp_path / "out.csv").exists()
    monkeypatch.setattr(Parts, "add", lambda self, done, *rest: (asked.append(done), add(self, done, *rest)))
    document = predict(run, [tmp_path / "new"], tmp_path / "out.csv", probabilities=True)
    assert asked == [*range(8, 91, 8), 91]
    assert document == {**expected, "out": document["out"]}
    assert [entry["file"] for entry in document["left_out"]] == ["0/broken.png"]
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert {entry.name for entry in tmp_path.iterdir()} == {"new", "out.csv", "whole.csv"}


@pytest.mark.parametrize("changed", ["images", "classifier", "coverage"])
def test_what_was_begun_with_something_else_begins_anew(
    run: RunDirectory, digits: Path, tmp_path: Path, changed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    shutil.copytree(digits, tmp_path / "new")
    copy = RunDirectory(Path(shutil.copytree(run.path, tmp_path / "copy")))
    asked: dict[str, Any] = {}
    with monkeypatch.context() as patch:
        patch.setattr(predicting, "_finish", lambda *rest: (rest[0].save(), 1 / 0))
        with pytest.raises(ZeroDivisionError):
            predict(copy, [tmp_path / "new"], tmp_path / "out.csv")
    if changed == "images":
        shutil.copy(
            tmp_path / "new/3" / next(iter(os.listdir(tmp_path / "new/3"))), tmp_path / "new/3/copy.png"
        )
    elif changed == "classifier":
        state = load_file(copy.classifier)
        classifier, spec, _ = load_classifier(copy)
        classifier.load_state_dict(
            {name: value + 1 if name == "linear.bias" else value for name, value in state.items()}
        )
        save_module(copy.classifier, classifier, spec.to_metadata())
    else:
        asked = {"coverage": 0.8}
    predict(copy, [tmp_path / "new"], tmp_path / "out.csv", **asked)
    assert (
        "out.csv: was begun with another classifier, other images or options; it begins anew."
        in capsys.readouterr().err
    )
    predict(copy, [tmp_path / "new"], tmp_path / "whole.csv", **asked)
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_a_damaged_part_is_made_again(
    run: RunDirectory, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict(run, [digits], tmp_path / "whole.csv")
    with monkeypatch.context() as patch:
        patch.setattr(predicting, "_finish", lambda *rest: (rest[0].save(), 1 / 0))
        with pytest.raises(ZeroDivisionError):
            predict(run, [digits], tmp_path / "out.csv")
    (part,) = tmp_path.glob(".out.csv-partial/*.parquet")
    part.write_bytes(part.read_bytes()[:-20])
    predict(run, [digits], tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_two_commands_do_not_write_one_table(run: RunDirectory, digits: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.csv-partial").mkdir()
    held = os.open(tmp_path / ".out.csv-partial", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(UsageError, match="another command is writing it"):
        predict(run, [digits], tmp_path / "out.csv")
    os.close(held)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_table_whose_process_is_killed_again_and_again_equals_one_that_was_left_alone(
    run: RunDirectory, digits: Path, tmp_path: Path, number: signal.Signals
) -> None:
    (tmp_path / "new").mkdir()
    sources = sorted(digits.glob("*/*.png"))
    for each in range(12_000):
        (tmp_path / f"new/{each:05}.png").symlink_to(sources[each % len(sources)])
    (tmp_path / "new/00700.png").unlink()
    (tmp_path / "new/00700.png").write_bytes(b"no image")
    command = [sys.executable, "-m", "labelwise", "predict", str(tmp_path / "new"), "--run", str(run.path)]
    alone = subprocess.run([*command, "--out", str(tmp_path / "alone.csv")], capture_output=True, timeout=300)
    assert alone.returncode == 0, alone.stderr
    rng, kills, parts = np.random.default_rng(), 0, tmp_path / ".out.csv-partial"
    while not (tmp_path / "out.csv").exists():
        before = len(list(parts.glob("*.parquet")))
        process = subprocess.Popen([*command, "--out", str(tmp_path / "out.csv")], stderr=subprocess.PIPE)
        deadline = time.monotonic() + 120
        while (
            process.poll() is None
            and len(list(parts.glob("*.parquet"))) == before
            and time.monotonic() < deadline
        ):
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.5))
        if process.poll() is None:
            os.kill(process.pid, number)
            kills += 1
        _, errors = process.communicate(timeout=60)
        assert process.returncode in (0, -number, 130), errors
        assert kills < 20
    assert kills
    again = subprocess.run([*command, "--out", str(tmp_path / "out.csv")], capture_output=True, timeout=60)
    assert again.returncode == 2, "it is there already"
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "alone.csv").read_bytes()
    assert {entry.name for entry in tmp_path.iterdir()} - {"cache"} == {"new", "alone.csv", "out.csv"}


def test_the_command_prints_one_document(
    run: RunDirectory, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["predict", str(digits), "--run", str(run.path), "--out", str(tmp_path / "o.csv"), "--json"]
    app(command, standalone_mode=False)
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert document["out"] == str(tmp_path / "o.csv")
    assert document["images"] == len(rows_of(tmp_path / "o.csv"))


# --- how far it is to be believed


def test_the_kept_classifier_is_calibrated_on_labels_it_did_not_see(classified: RunDirectory) -> None:
    facts = read_calibration(classified)
    assert facts is not None
    labels = rundir.read_json(classified.classifier_json)["labels"]
    assert (facts["labels"], facts["scored"], facts["folds"]) == (labels, labels, 5)
    assert facts["scores"] == sorted(facts["scores"])
    assert len(facts["scores"]) == labels
    state, (classifier, _, _) = load_file(classified.classifier), load_classifier(classified)
    torch.testing.assert_close(classifier.linear.weight * facts["temperature"], state["linear.weight"])
    torch.testing.assert_close(classifier.linear.bias * facts["temperature"], state["linear.bias"])


def test_calibration_of_another_classifier_is_not_used_and_made_anew(
    run: RunDirectory, tmp_path: Path
) -> None:
    copy = RunDirectory(Path(shutil.copytree(run.path, tmp_path / "copy")))
    facts = rundir.read_json(copy.calibration)
    rundir.write_json(copy.calibration, {**facts, "classifier": "another", "temperature": 7.0})
    assert read_calibration(copy) is None
    again = {"methods": ("simclr",), "label_counts": ("all",), "steps": 20}
    before = copy.classifier.stat()
    finetune(FinetuneSettings(run=copy.path, **again))
    assert read_calibration(copy) == facts
    assert copy.classifier.stat() == before, "the classifier itself is not trained again"


def test_the_last_labels_of_a_class_are_never_left_out_of_training(run: RunDirectory) -> None:
    bench = set_up_bench(run, FinetuneSettings(run=run.path))
    labels = np.array([0] * 6 + [1] * 2 + [2] + [3] * 3)
    groups = np.array([0, 1, 2, 3, 4, 5, 6, 6, 7, 8, 9, 9])
    few = dataclasses.replace(bench, labels=labels, groups=groups, labeled=np.arange(len(labels)))
    folds = calibrating._cut(few)
    for train, held in folds:
        assert set(labels[train]) == {0, 1, 2, 3}
        assert not set(groups[train]) & set(groups[held])
        assert sorted([*train, *held]) == list(range(len(labels)))
    scored = np.concatenate([held for _, held in folds]).tolist()
    assert len(scored) == len(set(scored))
    assert not {6, 7, 8} & set(scored)
    assert {0, 1, 2, 3, 4, 5, 9, 10, 11} == set(scored)
    lonely = dataclasses.replace(bench, labels=np.arange(3), groups=np.arange(3), labeled=np.arange(3))
    assert calibrating._cut(lonely) == []


def test_what_was_never_scored_counts_as_unknown_and_a_group_counts_once(run: RunDirectory) -> None:
    bench = set_up_bench(run, FinetuneSettings(run=run.path))
    few = dataclasses.replace(
        bench, labels=np.array([0, 1, 1, 0]), groups=np.array([4, 5, 5, 6]), labeled=np.arange(4)
    )
    logits = np.log(np.array([[0.8, 0.2], [0.3, 0.7], [0.3, 0.7], [np.nan, np.nan]], np.float32))
    assert calibrating._nonconformity(few, logits, 1.0) == pytest.approx([0.2, 0.3, 1.0], abs=1e-6)


def test_a_set_holds_each_class_that_is_as_probable_as_the_right_one_usually_is(
    run: RunDirectory, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes, scores = load_classifier(run)[2], np.array(rundir.read_json(run.calibration)["scores"])
    for coverage in (0.9, 0.5):
        document = predict(run, [digits], tmp_path / f"{coverage}.csv", probabilities=True, coverage=coverage)
        limit = scores[math.ceil((len(scores) + 1) * coverage) - 1]
        rows = rows_of(tmp_path / f"{coverage}.csv")
        for row in rows:
            chances = {name: float(row[f"p_{name}"]) for name in classes}
            sure = {name for name, chance in chances.items() if 1 - chance <= limit - 2e-6}
            maybe = {name for name, chance in chances.items() if 1 - chance <= limit + 2e-6}
            found = row["set"].split("|") if row["set"] else []
            assert sure <= set(found) <= maybe
            assert found == sorted(found, key=lambda name: -chances[name])
            assert row["abstain"] == ("false" if len(found) == 1 else "true")
        assert document["abstained"] == sum(row["abstain"] == "true" for row in rows)
        assert document["sets"] == {
            "coverage": coverage,
            "labels": len(scores),
            "suggested": 0,
            "empty": sum(not row["set"] for row in rows),
        }
        predict(run, [digits], tmp_path / f"{coverage}.parquet", coverage=coverage)
        table = pq.read_table(tmp_path / f"{coverage}.parquet").to_pylist()
        assert ["|".join(row["set"]) for row in table] == [row["set"] for row in rows]
        assert [row["abstain"] for row in table] == [row["abstain"] == "true" for row in rows]
        show(document)
        assert (
            f"hold the right class of {coverage:.0%} of images like the {len(scores)} labels"
            in capsys.readouterr().out
        )


def test_the_time_of_a_classifier_that_is_trained_anew_is_told(
    classified: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    monkeypatch.setattr(comparing, "time_a_step", lambda bench: 1.0)
    monkeypatch.setattr(comparing, "_say_how_long", lambda seconds, settings: told.append(seconds))
    for name in ("of other settings", "none"):
        run = RunDirectory(Path(shutil.copytree(classified.path, tmp_path / name)))
        if name == "none":
            run.classifier.unlink()
        finetune(FinetuneSettings(run=run.path, methods=("simclr",), label_counts=(20,), steps=1, draws=1))
    assert told[0] == told[1] > 2


def test_sets_that_rest_on_suggested_labels_say_so(
    run: RunDirectory, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = RunDirectory(Path(shutil.copytree(run.path, tmp_path / "copy")))
    show(predict(copy, [digits], tmp_path / "random.csv"))
    assert "chosen by suggest" not in capsys.readouterr().out
    facts = rundir.read_json(copy.calibration)
    assert facts["suggested"] == 0
    rundir.write_json(copy.calibration, {**facts, "suggested": 30})
    show(predict(copy, [digits], tmp_path / "chosen.csv"))
    assert "30 labels were chosen by suggest: on images at random it may be" in capsys.readouterr().out


def test_fewer_than_fifty_labels_promise_no_sets(run: RunDirectory, digits: Path, tmp_path: Path) -> None:
    copy = RunDirectory(Path(shutil.copytree(run.path, tmp_path / "copy")))
    facts = rundir.read_json(copy.calibration)
    rundir.write_json(copy.calibration, {**facts, "scores": facts["scores"][:49]})
    document = predict(copy, [digits], tmp_path / "out.csv")
    rows = rows_of(tmp_path / "out.csv")
    assert "set" not in rows[0]
    assert document["sets"] is None
    assert document["abstained"] == sum(float(row["confidence"]) < 0.5 for row in rows) > 0
    with pytest.raises(
        UsageError,
        match=r"--coverage 0\.9: sets of classes rest on 50 labels or more, and .* on 49; label more",
    ):
        predict(copy, [digits], tmp_path / "sets.csv", coverage=0.9)
    rundir.write_json(copy.calibration, {**facts, "scores": facts["scores"][:60]})
    for coverage in (0.99, 1.5, 0.0):
        with pytest.raises(
            UsageError, match=r"above 0 and at most 0\.983, which is what 60 labels can promise"
        ):
            predict(copy, [digits], tmp_path / "sets.csv", coverage=coverage)
    copy.calibration.unlink()
    document = predict(copy, [digits], tmp_path / "old.csv")
    assert (document["calibrated_on"], document["sets"]) == (0, None)
    assert document["uncalibrated"].startswith("the classifier is of an earlier version, or diverges")


def test_names_of_classes_in_a_set_can_be_told_apart(tmp_path: Path) -> None:
    sets = [["=cmd|x", "a\\"], ["a\\", "=cmd|x"], ["-2", "b"], ["-2"], [], ["|", "\\|"]]
    for suffix in (".csv", ".parquet"):
        with open_table(tmp_path / f"out{suffix}", suffix, {"set": TEXTS}) as table:
            table.write({"set": sets})
    assert [row["set"] for row in pq.read_table(tmp_path / "out.parquet").to_pylist()] == sets
    for row, held in zip(rows_of(tmp_path / "out.csv"), sets, strict=True):
        assert not row["set"].startswith(("=", "-2|"))
        text = row["set"].removeprefix("'")
        assert [re.sub(r"\\(.)", r"\1", part) for part in re.findall(r"(?:[^|\\]|\\.)+", text)] == held


def test_images_of_another_kind_are_far_and_those_of_the_run_are_not(
    run: RunDirectory, tmp_path: Path, some_digits: Callable[[Path, int], Path], photo: Callable[..., Image.Image], capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    some_digits(tmp_path / "all", 1)
    learned = {path.name for path in Path(rundir.read_json(run.data)["root"]).rglob("*.png")}
    for path in (tmp_path / "all").rglob("*.png"):
        if path.name in learned:
            path.unlink()
    document = predict(run, [tmp_path / "all"], tmp_path / "own.csv")
    assert document["images"] > 1000
    assert 0 < document["far"] < 0.05 * document["images"]
    for number in range(40):
        photo(tmp_path / f"new/{number}.png", number, (64, 64))
    document = predict(run, [tmp_path / "new"], tmp_path / "foreign.csv")
    assert document["far"] >= 36
    assert document["far"] == sum(row["far"] == "true" for row in rows_of(tmp_path / "foreign.csv"))
    show(document)
    assert f"far       {document['far']} of 40 are less like the images of the run" in capsys.readouterr().out


@pytest.mark.parametrize("way", ["stdin", "file", "nul"])
def test_a_list_of_files_is_read_and_what_is_not_there_left_out_by_name(
    run: RunDirectory, digits: Path, tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [str(file) for file in sorted(digits.glob("3/*.png"))[:3]]
    names = [files[0], str(tmp_path / "gone.png"), files[1], str(digits), files[2], "b\udcff.png"]
    end = "\0" if way == "nul" else "\r\n"
    text = os.fsencode("\ufeff" + end.join(names) + end)
    given = "-"
    if way == "file":
        (tmp_path / "list.txt").write_bytes(text)
        given = f"@{tmp_path / 'list.txt'}"
    else:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    document = predict(run, [Path(given)], tmp_path / "out.csv")
    assert [row["file"] for row in rows_of(tmp_path / "out.csv")] == files
    left_out = {entry["file"]: entry["reason"] for entry in document["left_out"]}
    assert left_out == {
        names[1]: "cannot be read (No such file or directory)",
        names[3]: "not a regular file",
        "b\\xff.png": "cannot be read (No such file or directory)",
    }


def test_a_list_that_names_nothing_is_refused(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n\n")))
    with pytest.raises(DataError, match="standard input: names no image"):
        predict(run, [Path("-")], tmp_path / "out.csv")
    with pytest.raises(DataError, match=r"gone\.txt: this list of images cannot be read \(No such file"):
        predict(run, [Path("@gone.txt")], tmp_path / "out.csv")
