"""Pretraining, comparing and reporting as a user meets them: real images, real training, real signals."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from labelwise import environment, rundir
from labelwise.annotations import Annotation, add_annotations, read_annotations
from labelwise.config import METHODS, FinetuneSettings, PretrainSettings, read_run_config
from labelwise.errors import (
    CheckpointError,
    DataError,
    Interrupted,
    LabelwiseError,
    ResourceError,
    UsageError,
)
from labelwise.images.cache import list_caches
from labelwise.images.splits import hash_names
from labelwise.learning.optimization import Diverged
from labelwise.models.weights import load_encoder, save_encoder
from labelwise.predictions import read_predictions, store_predictions
from labelwise.reports import html, markdown, model_card, text
from labelwise.reports.markdown import escape
from labelwise.reports.text import doubts_in_words, is_too_weak
from labelwise.rundir import RunDirectory
from labelwise.stages import benching, comparing, concluding, methods, pretraining
from labelwise.stages.beginning import read_plan
from labelwise.stages.demo import write_digits
from labelwise.stages.encoders import comparison_of
from labelwise.stages.guarding import Guard
from labelwise.stages.methods import Way
from labelwise.stages.pretraining import pretrain
from labelwise.stages.repeating import finetune
from labelwise.stages.reporting import report, show
from labelwise.stages.running import compare_runs, list_runs, remove_run, show_comparison
from labelwise.stages.scanning import scan
from labelwise.stages.verifying import verify

SMALL: dict[str, Any] = {
    "backbone": "resnet18",
    "backbone_args": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]},
    "stem": "half",
    "image_size": 16,
    "batch_size": 64,
    "epochs": 2,
    "precision": "fp32",
    "color": 0.0,
    "grayscale": 0.0,
}
FEW: dict[str, Any] = {"label_counts": (20,), "draws": 2, "steps": 2, "scratch_steps": 2}
EVERY_FILE = {
    "config.toml",
    "environment.json",
    "data.json",
    "splits/test.json",
    "splits/draw-0-0.json",
    "splits/draw-0-1.json",
    "metrics.jsonl",
    "views.png",
    "neighbours.json",
    "near_copies.json",
    "encoder.safetensors",
    "head.safetensors",
    "classifier.safetensors",
    "calibration.json",
    "familiar.safetensors",
    "classifier.json",
    "finetune/results.jsonl",
    "finetune/predictions.parquet",
    "finetune/label_check.json",
    "report.html",
    "report.md",
    "report.json",
    "model-card.md",
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """500 handwritten digits in class folders."""
    everything = tmp_path_factory.mktemp("digits") / "all"
    write_digits(everything)
    for number, file in enumerate(sorted(everything.glob("*/*.png"))):
        if number % 18 >= 5:
            file.unlink()
    return everything


@pytest.fixture(scope="module")
def finished(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run that was pretrained, compared and reported."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LABELWISE_CACHE", str(folder / "cache"))
        run = pretrain(PretrainSettings(images=digits, out=folder / "run", **SMALL))
        report(finetune(FinetuneSettings(run=run.path, **FEW)))
    return run


@pytest.fixture
def copy(finished: RunDirectory, tmp_path: Path) -> RunDirectory:
    """That run, to be changed."""
    return RunDirectory(Path(shutil.copytree(finished.path, tmp_path / "copy")))


def files_of(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def test_a_run_holds_exactly_the_files_of_the_contract(finished: RunDirectory) -> None:
    found = files_of(finished.path)
    checkpoints = {name for name in found if name.startswith("checkpoints/")}
    assert found - checkpoints == EVERY_FILE
    assert {name.split("/")[-1] for name in checkpoints} == {
        "state.safetensors",
        "state.json",
        "manifest.json",
    }


def test_report_json_has_the_keys_of_the_contract(finished: RunDirectory) -> None:
    document = json.loads(finished.report_json.read_text(encoding="utf-8"))
    for key in ("verdict", "summary", "labels_saved", "results", "data", "environment"):
        assert key in document
    entry = document["summary"][0]
    assert entry["labels"] == 20
    assert set(entry["arms"]) == {"simclr", "simclr_probe", "supervised", "random_probe", "pixels"}
    assert set(entry["arms"]["simclr"]) == {"mean", "low", "high", "n"}
    assert set(entry["gain"]) == {"mean", "low", "high"}
    assert {"arm", "against", "mean", "low", "high", "verdict"} <= set(entry["comparisons"][0])


def test_every_number_of_the_report_follows_from_the_stored_predictions(finished: RunDirectory) -> None:
    columns = read_predictions(finished.predictions)
    document = json.loads(finished.report_json.read_text(encoding="utf-8"))
    accuracies: dict[tuple[str, int], list[bool]] = {}
    for method, draw, label, predicted in zip(
        columns["method"], columns["draw"], columns["label"], columns["prediction"], strict=True
    ):
        accuracies.setdefault((method, draw), []).append(label == predicted)
    for method, arm in document["summary"][0]["arms"].items():
        means = [float(np.mean(accuracies[method, draw])) for draw in range(2)]
        assert arm["mean"] == pytest.approx(np.mean(means))
    gains = [
        np.mean(accuracies["simclr", draw]) - np.mean(accuracies["supervised", draw]) for draw in range(2)
    ]
    assert document["summary"][0]["gain"]["mean"] == pytest.approx(np.mean(gains))


def test_every_method_gets_the_same_labels_and_none_of_them_is_a_test_image(finished: RunDirectory) -> None:
    rows = rundir.read_jsonl(finished.results)
    test = set(rundir.read_json(finished.test_lock)["names"])
    for draw in range(2):
        assert len({row["draw_sha256"] for row in rows if row["draw"] == draw}) == 1
        order = rundir.read_json(finished.splits / f"draw-0-{draw}.json")["order"]
        assert rows[0]["labels_there"] == len(set(order)) == 400
        assert not test & set(order)
    assert {row["draw_sha256"] for row in rows if row["draw"] == 0} != {
        row["draw_sha256"] for row in rows if row["draw"] == 1
    }


def test_the_page_stands_alone(finished: RunDirectory) -> None:
    page = finished.report_html.read_text(encoding="utf-8")
    assert "<script" not in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    assert "From scratch" in page
    assert re.search(r"<dt>Pretraining, once</dt><dd>.+ for 2 epochs of 400 images without labels", page)


def test_the_model_card_says_what_the_classifier_is_and_that_it_was_not_tested_itself(
    finished: RunDirectory, tmp_path: Path
) -> None:
    card, facts = finished.model_card.read_text(), rundir.read_json(finished.classifier_json)
    document = rundir.read_json(finished.report_json)
    tuned = {**facts, "steps": 5, "way": "trunk rate 0.1"}
    assert f"fine-tuned on all {facts['labels']} labels" in model_card.render(document, tuned, 16)
    frozen = model_card.render(document, {**facts, "steps": 0, "way": "frozen"}, 16)
    assert f"with a linear probe trained on all {facts['labels']} labels" in frozen
    assert "fine-tuned" not in frozen.split("## Files")[0]
    assert ", ".join(facts["classes"]) in card
    assert f"has {facts['labels']} labels and was not tested itself" in card
    entry = document["summary"][0]
    assert f"| {entry['labels']} | {100 * entry['arms']['simclr']['mean']:.1f}" in card
    assert all(escape(limit) in card for limit in document["limits"])
    whole = {**document, "results": [{**row, "labels": facts["labels"]} for row in document["results"]]}
    assert "was trained once more" in model_card.render(whole, facts, 16)
    hostile = {**facts, "classes": ["<script>", "a|b"]}
    assert "&lt;script>, a\\|b" in model_card.render(document, hostile, 16)


@pytest.mark.parametrize(
    ("classes", "has_matrix", "is_upright", "words"),
    [
        (["no", "yes"], True, True, None),
        (["no", "perhaps"], True, False, None),
        ([f"<i>{number:02d}" for number in range(40)], False, False, "The 30 worst of 40 classes"),
    ],
)
def test_confusion_is_shown_as_long_as_it_can_be_read_and_the_worst_classes_always(
    finished: RunDirectory, classes: list[str], has_matrix: bool, is_upright: bool, words: str | None
) -> None:
    document = rundir.read_json(finished.report_json)
    right = np.diag(np.arange(1, len(classes) + 1))
    wrong = np.roll(np.diag(np.arange(len(classes), 0, -1)), 1, axis=1)
    page = html.render(
        {**document, "confusion": {**document["confusion"], "classes": classes, "counts": right + wrong}},
        finished,
    )
    assert ('class="confusion"' in page) == has_matrix
    assert ("writing-mode" not in page) == is_upright
    assert "<i>0" not in page
    worst = page[page.index("Classes, worst first") :]
    share = 100 / (len(classes) + 1)
    assert re.search(rf"<span>{classes[0].replace('<i>', '&lt;i&gt;')}</span>.*?{share:.1f}%", worst)
    assert worst.count('class="value"') == min(30, len(classes))
    assert words is None or words in worst


def test_the_saved_classifier_is_whole(finished: RunDirectory) -> None:
    facts = rundir.read_json(finished.classifier_json)
    assert facts["classes"] == [str(digit) for digit in range(10)]
    weights = load_file(finished.classifier)
    assert weights["linear.weight"].shape == (10, 16)


def test_every_method_has_as_many_ways_and_the_frozen_network_is_the_probe(copy: RunDirectory) -> None:
    bench = benching.set_up_bench(copy, FinetuneSettings(run=copy.path, **FEW))
    ways = {method: methods._ways(method, bench, 100) for method in METHODS}
    assert {len(each) for each in ways.values()} == {methods.TRIES}
    assert all(len({way.name for way in each}) == methods.TRIES for each in ways.values())
    frozen, probe = ways["simclr"][-1], ways["simclr_probe"][0]
    assert (frozen.name, probe.name) == ("frozen", "C = 3")
    found = [way.fit(bench.labeled[::4], bench.test, 0, 1.0) for way in (frozen, probe)]
    np.testing.assert_allclose(*found, atol=1e-5)


def test_the_same_finetune_command_again_trains_nothing_new(finished: RunDirectory) -> None:
    before = finished.results.read_bytes()
    finetune(FinetuneSettings(run=finished.path, methods=("simclr_probe",), **FEW))
    assert finished.results.read_bytes() == before


def test_other_settings_set_earlier_results_aside(copy: RunDirectory) -> None:
    before = copy.results.read_bytes()
    finetune(FinetuneSettings(run=copy.path, methods=("simclr_probe",), **{**FEW, "seed": 1}))
    aside = list(copy.results.parent.glob("*/results.jsonl"))
    assert [file.read_bytes() for file in aside] == [before]
    assert {row["seed"] for row in rundir.read_jsonl(copy.results)} == {1}
    finetune(FinetuneSettings(run=copy.path, methods=("simclr_probe",), **FEW))
    assert copy.results.read_bytes() == before, "the earlier settings again take their results up again"


def test_results_on_an_image_that_was_changed_since_are_set_aside(
    copy: RunDirectory, digits: Path, tmp_path: Path
) -> None:
    images = Path(shutil.copytree(digits, tmp_path / "images"))
    data = rundir.read_json(copy.data)
    rundir.write_json(copy.data, {**data, "sources": {**data["sources"], "images": str(images)}})
    settings = FinetuneSettings(run=copy.path, methods=("simclr_probe",), **FEW)
    before = copy.results.read_bytes()
    finetune(settings)
    assert copy.results.read_bytes() == before, "the same images elsewhere"
    image = images / rundir.read_json(copy.test_lock)["names"][0]
    Image.fromarray(255 - np.asarray(Image.open(image))).save(image)
    finetune(settings)
    assert [file.read_bytes() for file in copy.results.parent.glob("*/results.jsonl")] == [before]
    assert {row["method"] for row in rundir.read_jsonl(copy.results)} == {"simclr_probe"}


def test_all_labels_are_one_draw_without_an_interval(copy: RunDirectory) -> None:
    finetune(
        FinetuneSettings(run=copy.path, methods=("simclr_probe", "pixels"), label_counts=("all",), draws=3)
    )
    rows = rundir.read_jsonl(copy.results)
    assert {(row["method"], row["draw"]) for row in rows} == {("simclr_probe", 0), ("pixels", 0)}
    assert {row["labels"] for row in rows} == {rows[0]["labels_there"]}
    arms = report(copy)["summary"][0]["arms"]
    assert {(arm["low"], arm["high"], arm["n"]) for arm in arms.values()} == {(None, None, 1)}


def test_the_same_run_twice_gives_the_same_encoder(digits: Path, tmp_path: Path) -> None:
    one, two = (
        pretrain(PretrainSettings(images=digits, out=tmp_path / name, **SMALL)) for name in ("one", "two")
    )
    assert same_weights(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_resumed_run_equals_uninterrupted_run(digits: Path, tmp_path: Path, number: signal.Signals) -> None:
    settings = PretrainSettings(images=digits, out=tmp_path / "whole", **{**SMALL, "epochs": 12})
    whole = pretrain(settings)
    options = ["--backbone-args", json.dumps(SMALL["backbone_args"]), "--stem", "half", "--image-size", "16"]
    options += [
        "--batch-size",
        "64",
        "--epochs",
        "12",
        "--precision",
        "fp32",
        "--color",
        "0",
        "--grayscale",
        "0",
    ]
    command = [
        sys.executable,
        "-m",
        "labelwise",
        "pretrain",
        str(digits),
        "--out",
        str(tmp_path / "cut"),
        *options,
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "cut" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    _, words = process.communicate(timeout=120)
    assert process.returncode == 128 + number, words
    assert "the same command goes on" in words
    cut = RunDirectory(tmp_path / "cut")
    assert not cut.encoder.exists()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "going on after step" in done.stderr
    assert same_weights(whole, cut)
    assert steps(whole) == steps(cut)


@pytest.mark.slow
def test_a_kill_loses_no_more_than_the_steps_since_the_last_save(digits: Path, tmp_path: Path) -> None:
    settings = PretrainSettings(images=digits, out=tmp_path / "whole", **SMALL)
    whole = pretrain(settings)
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from labelwise.config import PretrainSettings\n"
        "from labelwise.stages import pretraining\n"
        "pretraining.SAVE_SECONDS = 0.0\n"
        "settings = PretrainSettings.resolve({})\n"
    ).replace(
        "PretrainSettings.resolve({})",
        f"PretrainSettings(images=Path({str(digits)!r}), out=Path({str(tmp_path / 'cut')!r}), **{SMALL!r})",
    )
    script += "pretraining.pretrain(settings)\n"
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "cut" / "checkpoints").glob("step-*"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.wait()
    cut = pretrain(settings.model_copy(update={"out": tmp_path / "cut"}))
    assert same_weights(whole, cut)
    assert steps(whole) == steps(cut)


def test_a_run_killed_right_after_its_last_save_is_finished_by_the_next_command(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = PretrainSettings(images=digits, out=tmp_path / "run", **{**SMALL, "epochs": 1})

    def fail(*_: Any) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(environment, "finish", fail)
        pretrain(settings)
    run = RunDirectory(tmp_path / "run")
    run.sound.mkdir()
    assert rundir.read_json(run.environment)["finished"] is None
    pretrain(settings)
    assert rundir.read_json(run.environment)["finished"] is not None
    assert not run.sound.exists()


def test_the_users_folder_is_left_as_it_was(digits: Path, finished: RunDirectory) -> None:
    assert all(re.fullmatch(r"\d/\d{4}\.png", name) for name in files_of(digits))


def test_more_images_go_on_with_the_same_test_lock(
    digits: Path, finished: RunDirectory, tmp_path: Path
) -> None:
    grown = tmp_path / "grown"
    shutil.copytree(digits, grown)
    rng = np.random.default_rng(0)
    for number in range(30):
        Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(grown / "3" / f"new-{number}.png")
    settings = {**SMALL, "epochs": 1}
    run = pretrain(PretrainSettings(images=grown, out=tmp_path / "run", init=str(finished.path), **settings))
    assert rundir.read_json(run.test_lock)["names"] == rundir.read_json(finished.test_lock)["names"]
    assert rundir.read_json(run.data)["pool"] == rundir.read_json(finished.data)["pool"] + 30


def test_going_on_from_a_run_takes_over_its_model(
    digits: Path, finished: RunDirectory, tmp_path: Path
) -> None:
    rest = {key: SMALL[key] for key in ("batch_size", "precision")}
    more = PretrainSettings(
        images=digits, out=tmp_path / "run", init=str(finished.path), epochs=1, holdout=0.25, **rest
    )
    run = pretrain(more)
    before, after = (read_run_config(each.config) for each in (finished, run))
    for key in ("backbone", "backbone_args", "stem", "image_size", "head", "projection_width"):
        assert after[key] == before[key]
    with pytest.raises(
        UsageError, match=r"holds a model with image_size = 16, not 24; leave that setting out"
    ):
        pretrain(more.model_copy(update={"out": tmp_path / "other", "image_size": 24}))


def test_what_ruins_the_weights_it_began_from_is_taken_back(
    digits: Path, finished: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = {key: SMALL[key] for key in ("batch_size", "precision")}
    more: dict[str, Any] = {
        "images": digits,
        "init": str(finished.path),
        "epochs": 4,
        "warmup_epochs": 0,
        **rest,
    }
    gentle = pretrain(PretrainSettings(out=tmp_path / "gentle", **more, learning_rate=1e-5))
    looks = [row for row in rundir.read_jsonl(gentle.metrics) if row["kind"] == "epoch"]
    assert [-1 < row["kept_neighbours"] <= 1 for row in looks] == [True] * 4
    assert "rolled_back" not in rundir.read_json(gentle.environment)

    rough = pretrain(PretrainSettings(out=tmp_path / "rough", **more, optimizer="sgd", learning_rate=1e5))
    back = rundir.read_json(rough.environment)["rolled_back"]
    assert (back["from"], back["to"]) == (1, 0)
    assert same_weights(rough, finished)
    assert load_file(rough.head).keys() == load_file(finished.head).keys()
    assert "Back to epoch 0, and training ends there" in " ".join(capsys.readouterr().err.split())
    assert len([row for row in rundir.read_jsonl(rough.metrics) if row["kind"] == "epoch"]) == 1
    assert not (rough.path / "sound").exists()
    document = report(finetune(FinetuneSettings(run=rough.path, **FEW)))
    assert any("taken back from epoch 1 to epoch 0" in limit for limit in document["limits"])


def test_a_run_that_is_taken_back_is_so_after_an_interruption_too(
    digits: Path, finished: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sound for two looks, ruined at the third; ended between rolling back and saving the encoder."""
    rest = {key: SMALL[key] for key in ("batch_size", "precision")}
    more: dict[str, Any] = {"images": digits, "init": str(finished.path), "epochs": 4, **rest}
    check, checked = Guard.check, []

    def ruined(guard: Guard, *figures: Any) -> tuple[float, str | None]:
        checked.append(check(guard, *figures))
        return checked[-1][0], "ruined" if len(checked) == 3 else None

    monkeypatch.setattr(Guard, "check", ruined)
    whole = pretrain(PretrainSettings(out=tmp_path / "whole", **more))
    assert rundir.read_json(whole.environment)["rolled_back"] == {"from": 3, "to": 2, "reason": "ruined"}

    def fail(*_: Any) -> None:
        raise RuntimeError("killed")

    checked.clear()
    monkeypatch.setattr(pretraining, "SAVE_SECONDS", 0.0)  # a checkpoint after every step
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(pretraining, "save_encoder", fail)
        pretrain(PretrainSettings(out=tmp_path / "cut", **more))
    del checked[2:]  # what is looked at again is the third
    cut = pretrain(PretrainSettings(out=tmp_path / "cut", **more))
    assert rundir.read_json(cut.environment)["rolled_back"]["to"] == 2
    assert same_weights(whole, cut)


def test_a_batch_in_passes_trains_on_the_same_loss(digits: Path, tmp_path: Path) -> None:
    losses = []
    for passes in (64, 16):
        settings = {**SMALL, "epochs": 1, "head": "linear", "micro_batch_size": passes}
        run = pretrain(PretrainSettings(images=digits, out=tmp_path / str(passes), **settings))
        assert rundir.read_json(run.environment)["plan"]["micro_batch_size"] == passes
        losses.append([row["loss"] for row in rundir.read_jsonl(run.metrics) if row["kind"] == "step"])
    assert losses[0] != losses[1]  # batch norm sees other groups
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


def test_passes_that_do_not_divide_the_batch_are_refused(digits: Path, tmp_path: Path) -> None:
    settings = PretrainSettings(images=digits, out=tmp_path / "run", **SMALL, micro_batch_size=24)
    with pytest.raises(UsageError, match="--micro-batch-size 24: does not divide --batch-size 64"):
        pretrain(settings)


def test_a_run_remembers_the_commit_of_its_checkout(finished: RunDirectory) -> None:
    checkout = Path(rundir.__file__).parent.parent
    commit = rundir.read_json(finished.environment)["commit"]
    if not (checkout / ".git").exists():
        assert commit is None
        return
    newest = subprocess.run(
        ["git", "log", "--format=%H", "-20"], cwd=checkout, capture_output=True, text=True, check=True
    )
    assert commit in newest.stdout.split()


def test_a_second_run_with_other_settings_gets_a_folder_of_its_own(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    quick = {**SMALL, "epochs": 1}
    first = pretrain(PretrainSettings(images=digits, **quick))
    second = pretrain(PretrainSettings(images=digits, **quick, seed=1))
    again = pretrain(PretrainSettings(images=digits, **quick))
    assert [first.path.name, second.path.name, again.path.name] == ["all", "all-2", "all"]
    assert Path("runs/latest").resolve() == again.path
    with pytest.raises(UsageError, match="holds a run with seed = 0, now 5"):
        pretrain(PretrainSettings(images=digits, out=first.path, **quick, seed=5))


def test_runs_can_be_listed_compared_and_removed(
    finished: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        shutil.copytree(finished.path, tmp_path / name)
    text = (tmp_path / "b" / "config.toml").read_text().replace("temperature = 0.2", "temperature = 0.5")
    (tmp_path / "b" / "config.toml").write_text(text)
    assert [(run["name"], run["state"]) for run in list_runs(tmp_path)["runs"]] == [
        ("a", "compared"),
        ("b", "compared"),
    ]
    found = compare_runs([tmp_path / "a", tmp_path / "b"])
    assert found["settings"] == {"pretrain.temperature": [0.2, 0.5]}
    assert len(found["results"][0]["accuracies"]) == 2
    assert len(set(found["results"][0]["accuracies"])) == 1
    assert found["same_test"]
    assert found["over_encoders"] == [], "they differ in more than the seed"
    store_predictions(
        RunDirectory(tmp_path / "b").predictions, "other", 0, 20,
        names=["another.png"], truth=["1"], groups=[0], predicted=["1"], probabilities=np.ones((1, 10), np.float32),
    )  # fmt: skip
    assert not compare_runs([tmp_path / "a", tmp_path / "b"])["same_test"]
    with pytest.raises(UsageError, match="name two runs or more"):
        compare_runs([tmp_path / "a"])
    chosen = rundir.read_json(tmp_path / "b" / "report.json")
    for entry in chosen["summary"]:
        entry |= {"series": "suggested", "suggested": 5}
    rundir.write_json(tmp_path / "b" / "report.json", chosen)
    assert not compare_runs([tmp_path / "a", tmp_path / "b"])["results"], "labels were chosen otherwise"
    rundir.write_json(tmp_path / "a" / "report.json", chosen)
    show_comparison(compare_runs([tmp_path / "a", tmp_path / "b"]))
    assert "20 labels (5 chosen by suggest), simclr" in capsys.readouterr().out
    remove_run(tmp_path / "a")
    assert [run["name"] for run in list_runs(tmp_path)["runs"]] == ["b"]
    (tmp_path / "mine").mkdir()
    with pytest.raises(UsageError, match="not a run folder"):
        remove_run(tmp_path / "mine")


def test_a_run_that_alone_has_labels_from_the_page_is_not_removed(
    finished: RunDirectory, tmp_path: Path
) -> None:
    run, later = (RunDirectory(Path(shutil.copytree(finished.path, tmp_path / name))) for name in ("a", "b"))
    answers = [
        Annotation("1.png", 1, "label", "cat", "test", "me", "now", None),
        Annotation("2.png", 2, "label", "dog", "suggested", "me", "now", None),
        Annotation("3.png", 3, "unsure", None, "suggested", "me", "now", None),
    ]
    add_annotations(run, answers)
    add_annotations(later, answers[:1])
    with pytest.raises(UsageError, match=r"holds 1 labels of `labelwise annotate` that no run beside it has"):
        remove_run(run.path)
    assert len(read_annotations(run)) == 3
    add_annotations(later, answers[1:2])
    remove_run(run.path)
    with pytest.raises(UsageError, match=r"holds 2 labels .*delete annotations\.jsonl in it first"):
        remove_run(later.path)
    later.annotations.unlink()
    remove_run(later.path)


def test_encoders_of_other_seeds_give_a_gain_over_all_of_them(
    finished: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished.path, tmp_path / "one [a]")
    settings = FinetuneSettings(run=tmp_path / "one [a]", **FEW)
    one = finetune(settings.model_copy(update={"pretrain_seeds": 3}))
    runs = [one, *(RunDirectory(tmp_path / f"one [a]-seed-{seed}") for seed in (1, 2))]
    assert len({rundir.read_json(run.test_lock)["sha256"] for run in runs}) == 1, (
        "the same images are held out"
    )
    before = {file: file.stat().st_mtime_ns for run in runs[1:] for file in (run.encoder, run.predictions)}
    finetune(settings.model_copy(update={"pretrain_seeds": 3}))
    assert before == {file: file.stat().st_mtime_ns for file in before}, "what is there is not done again"
    document = report(one)
    found = compare_runs([run.path for run in runs])
    assert document["over_encoders"] == {
        "runs": ["one [a]", "one [a]-seed-1", "one [a]-seed-2"],
        "gains": found["over_encoders"],
        "unfinished": [],
        "damaged": "",
    }
    show(document)
    assert "seeds gain over 3 encoders with 20 labels: " in " ".join(capsys.readouterr().out.split())
    assert "gain over 3 encoders with 20 labels: " in one.report_html.read_text()
    verify(one)
    assert "The table is of one of 3 encoders" in " ".join(document["limits"])
    assert "One encoder was compared" in " ".join(report(runs[1])["limits"]), "it has none beside it"
    assert found["settings"]["pretrain.seed"] == [0, 1, 2]
    gains = [rundir.read_json(run.report_json)["summary"][0]["gain"]["mean"] for run in runs]
    entry = found["over_encoders"][0]
    assert entry["of_each"] == pytest.approx(gains)
    assert entry["mean"] == pytest.approx(np.mean(gains))
    assert entry["n"] == min(3, FEW["draws"])
    show_comparison(found)
    show_comparison(compare_runs([run.path for run in runs[:2]]))
    words = " ".join(capsys.readouterr().out.split())
    assert "gain over 3 encoders with 20 labels: " in words
    assert (
        "fewer than 3 encoders (--seed of pretrain) or label draws (--draws of finetune) claim nothing"
        in words
    )
    finetune(FinetuneSettings(run=runs[1].path, **{**FEW, "steps": 3}))
    assert [report(one)["over_encoders"]["runs"]] == [["one [a]", "one [a]-seed-2"]], "the other differs now"
    found = compare_runs([run.path for run in runs])
    assert found["over_encoders"] == []
    assert found["not_over_encoders"] == "they were compared with different labels, test images or settings"
    show_comparison(found)
    assert "no gain over encoders: they were compared" in " ".join(capsys.readouterr().out.split())
    for run in runs[1:]:
        shutil.rmtree(run.results.parent)
    found = compare_runs([run.path for run in runs[1:]])
    assert found["same_test"], "what is locked is the same"
    assert found["not_over_encoders"].startswith("not all of them were compared")
    lock = rundir.read_json(runs[1].test_lock)
    rundir.write_json(runs[1].test_lock, {**lock, "sha256": "another"})
    assert not compare_runs([run.path for run in runs[1:]])["same_test"]


def test_what_no_encoder_has_a_part_in_is_lent_and_would_be_the_same(
    finished: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished.path, tmp_path / "one")
    trained: list[tuple[str, str]] = []
    run_method = comparing.run_method

    def spy(method: str, bench: Any, *rest: Any) -> Any:
        trained.append((bench.run.path.name, method))
        return run_method(method, bench, *rest)

    monkeypatch.setattr(comparing, "run_method", spy)
    one = finetune(FinetuneSettings(run=tmp_path / "one", **FEW, pretrain_seeds=2))
    more = FinetuneSettings(run=one.path, **{**FEW, "draws": 3})
    finetune(more.model_copy(update={"pretrain_seeds": 2}))
    ours = ("simclr", "simclr_probe")
    assert {method for name, method in trained if name == "one-seed-1"} == set(ours)
    assert {method for name, method in trained if name == "one"} == set(METHODS), "of the third draw"
    other = RunDirectory(tmp_path / "one-seed-1")

    def results(run: RunDirectory) -> dict[Any, Any]:
        keys, left_out = ("method", "labels", "draw"), ("seconds", "signature")
        rows = [row for row in rundir.read_jsonl(run.results) if row["method"] not in ours]
        return {
            tuple(row[key] for key in keys): {
                **{key: row[key] for key in row if key not in left_out},
                "compared on": comparison_of(row),
            }
            for row in rows
        }

    def predictions(run: RunDirectory) -> list[Any]:
        names = ("method", "labels", "draw", "name", "probabilities")
        rows = zip(*read_predictions(run.predictions, names).values(), strict=True)
        return sorted(row for row in rows if row[0] not in ours)

    lent = results(other), predictions(other)
    assert lent == (results(one), predictions(one))
    shutil.rmtree(other.results.parent)
    finetune(more.model_copy(update={"run": other.path}))
    assert lent == (results(other), predictions(other)), "trained here"


def test_an_encoder_that_is_not_compared_as_far_does_not_take_the_others_away(
    finished: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished.path, tmp_path / "one")
    settings = FinetuneSettings(run=tmp_path / "one", **FEW)
    one = finetune(settings.model_copy(update={"pretrain_seeds": 2}))
    before = report(one)["over_encoders"]["gains"]
    run_method = comparing.run_method

    def stops(method: str, *rest: Any) -> Any:
        if method == "simclr":
            raise Interrupted("stopped", 15)
        return run_method(method, *rest)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(comparing, "run_method", stops)
        finetune(settings.model_copy(update={"pretrain_seeds": 3}))
    document = report(one)
    assert document["over_encoders"]["gains"] == before
    assert document["over_encoders"]["unfinished"] == ["one-seed-2"]
    assert "Not compared as far as this one, and left out: one-seed-2." in " ".join(document["limits"])
    finetune(settings.model_copy(update={"pretrain_seeds": 3}))
    assert len(report(one)["over_encoders"]["runs"]) == 3
    config = tmp_path / "one-seed-1" / "config.toml"
    config.write_text("not TOML")
    document = report(one)
    assert document["over_encoders"]["runs"] == []
    assert "Others are left out: " in " ".join(document["limits"])
    assert str(config) in " ".join(document["limits"])


def test_other_encoders_are_of_this_run_however_its_labels_were_named(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flat = tmp_path / "photos"
    flat.mkdir()
    rows = ["file,label"]
    for number, file in enumerate(sorted(digits.glob("*/*.png"))[::2]):
        shutil.copy(file, flat / f"{number}.png")
        rows.append(f"{number}.png,{file.parent.name}")
    labels = tmp_path / "labels.csv"
    labels.write_text("\n".join(rows[:-20]) + "\n")
    monkeypatch.chdir(tmp_path)
    run = pretrain(PretrainSettings(images=Path("photos"), labels=Path("labels.csv"), **SMALL))
    newer = pretrain(PretrainSettings(images=Path("photos"), labels=Path("labels.csv"), **SMALL, seed=9))
    config = run.config.read_text()
    assert 'labels = "labels.csv"' in config
    assert 'similarity = "cosine"\n' in config
    run.config.write_text(config.replace('similarity = "cosine"\n', ""))  # as an earlier version wrote it
    labels.write_text("\n".join(rows) + "\n")  # some were labeled since
    settings = FinetuneSettings(run=run.path, **FEW)
    finetune(settings.model_copy(update={"pretrain_seeds": 2}))
    assert report(run)["over_encoders"]["runs"] == ["photos", "photos-seed-1"]
    assert Path("runs/latest").resolve() == newer.path, "as it was"
    shutil.copytree(run.path.with_name("photos-seed-1"), tmp_path / "runs" / "photos-seed-7")
    assert report(run)["over_encoders"]["runs"] == ["photos", "photos-seed-1"], "a seed counts once"
    trained = next(name for name in sorted(path.name for path in flat.iterdir()) if name not in rundir.read_json(run.test_lock)["names"])  # fmt: skip
    before = (flat / trained).read_bytes()
    Image.new("RGB", (8, 8), (9, 9, 9)).save(flat / trained)
    with pytest.raises(DataError, match="other encoders would not be its equals"):
        finetune(settings.model_copy(update={"pretrain_seeds": 3, "draws": 3}))
    assert not (tmp_path / "runs" / "photos-seed-2").exists(), "nothing was trained"
    assert len(rundir.read_jsonl(run.results)) == 10, "and nothing compared before it was found out"
    (flat / trained).write_bytes(before)
    finetune(settings.model_copy(update={"time_limit": "0.01s", "pretrain_seeds": 3}))
    assert "encoders are left; the same command goes on" in " ".join(capsys.readouterr().err.split())
    finetune(FinetuneSettings(run=newer.path, **FEW, time_limit="0.01s", pretrain_seeds=2))
    assert "encoder 2 takes about" in " ".join(capsys.readouterr().err.split())
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {
        "latest", "photos", "photos-2", "photos-seed-1", "photos-seed-7",
    }  # fmt: skip


def test_what_is_left_and_what_is_wrong_with_the_encoder_is_said(
    finished: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished.path, tmp_path / "run")
    run = RunDirectory(tmp_path / "run")
    finetune(
        FinetuneSettings(run=run.path, **{**FEW, "draws": 3, "label_counts": (20, 30)}, time_limit="0.01s")
    )
    assert re.search(r"time +about \d", capsys.readouterr().err)
    document = report(run)
    done, asked = len(document["results"]), 2 * 3 * len(METHODS)
    assert done < asked
    assert document["next"][0].startswith(f"{asked - done} of {asked} classifiers are left: ")
    assert document["limits"][0].startswith(f"{asked - done} of {asked} classifiers were not trained yet")
    trouble = rundir.read_json(run.environment)["trouble"]
    assert re.match(r"the loss \(.*\) is (hardly better|worse) than chance", trouble)
    assert f"But the encoder is hardly one yet: {trouble}." in document["verdict"]
    heading, lead = re.search(
        r"<h1>(.*?)</h1>\s*<p class=\"lead\">(.*?)</p>", run.report_html.read_text()
    ).groups()  # type: ignore[union-attr]
    assert f"{heading} {lead}" == document["verdict"], (
        "the first sentence is the headline, all of it is on the page"
    )
    assert heading.count(". ") == 0
    environment.note(run, trouble=None)
    document = report(run)
    assert "hardly one" not in document["verdict"]
    verify(run)


@pytest.mark.parametrize(
    ("low", "high", "words"), [(-0.2, -0.1, "pretraining hurts at few labels"), (-0.1, 0.1, "is not clear"), (0.1, 0.2, "")]
)  # fmt: skip
def test_advice_fits_the_verdict(low: float, high: float, words: str, finished: RunDirectory) -> None:
    gain = {"mean": (low + high) / 2, "low": low, "high": high}
    computed = {"summary": [{"gain": gain, "comparisons": []}], "results": [], "folds": 0}
    said = concluding.next_steps(finished, computed, None, {}, {}, has_classifier=False)
    assert [words in each for each in said] == [True] * bool(words)
    check = {
        "checked": 30,
        "doubted": 10,
        "unlabeled": 5,
        "classes": [{"name": "x", "labels": 9, "agreed": 0.4}],
    }
    more = concluding.next_steps(finished, computed, check, {}, {}, has_classifier=False)
    suggested = f"labelwise annotate --run {finished.path}: a page to label images on, those that matter most"
    assert more == [*said, "class x has 9 labels and 40% of them fit: label more of it first", suggested]
    weak = {**check, "doubted": 11}
    assert concluding.next_steps(finished, computed, weak, {}, {}, has_classifier=False) == [*said, suggested]
    nothing_left = {**weak, "unlabeled": 0}
    assert concluding.next_steps(finished, computed, nothing_left, {}, {}, has_classifier=False) == said


def test_labels_are_not_judged_by_an_encoder_that_doubts_a_third_of_them() -> None:
    check = {"checked": 30, "doubted": 10, "suspects": [{"name": "a.png", "label": "x", "looks_like": "y", "has_other_copy": False}]}  # fmt: skip
    assert doubts_in_words(check).startswith("10 of 30 labels are worth a second look")
    assert doubts_in_words({**check, "doubted": 11}) == (
        "11 of 30 labels do not fit: the encoder is too weak to judge labels by"
    )
    assert not is_too_weak({**check, "doubted": 11, "copies": 1}), "copies with two labels are no opinion"
    assert not is_too_weak({"checked": 0, "doubted": 2, "copies": 2})


def test_runs_are_opened_by_the_name_they_are_listed_by_and_the_newest_one_left_is_the_latest(
    finished: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one").mkdir()  # the images, say
    for name in ("one", "two"):
        shutil.copytree(finished.path, tmp_path / "runs" / name)
        os.utime(
            tmp_path / "runs" / name / "encoder.safetensors", (len(name), {"one": 1e9, "two": 2e9}[name])
        )
    rundir.point_latest(RunDirectory(tmp_path / "runs" / "two"))
    assert rundir.open_run(Path("one")).path == tmp_path / "runs" / "one"
    with pytest.raises(UsageError, match="is a link to two; name that run itself"):
        remove_run(Path("latest"))
    shutil.copytree(finished.path, tmp_path / "runs" / "one-seed-1")
    remove_run(Path("two"))
    assert Path("runs/latest").readlink() == Path("one"), "one of its other encoders is newer"
    remove_run(Path("one-seed-1"))
    assert [each["name"] for each in list_runs(Path("runs"))["runs"]] == ["one"]
    assert remove_run(Path("one")) == tmp_path / "runs" / "one"
    assert not os.path.lexists("runs/latest")
    assert (tmp_path / "one").is_dir()


@pytest.mark.parametrize("deleted", [0, 1, 4])
def test_a_removal_that_is_killed_leaves_no_run_and_is_finished_by_the_next(
    finished: RunDirectory, tmp_path: Path, deleted: int
) -> None:
    for name in ("one", "two"):
        shutil.copytree(finished.path, tmp_path / name)
    child = os.fork()
    if not child:
        unlink, calls = os.unlink, iter(range(deleted + 1))

        def unlink_or_die(*words: Any, **more: Any) -> None:
            if words[0] != "owner.json" and next(calls) == deleted:
                os.kill(os.getpid(), signal.SIGKILL)
            unlink(*words, **more)

        os.unlink = unlink_or_die
        remove_run(tmp_path / "one")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [each["name"] for each in list_runs(tmp_path)["runs"]] == ["two"]
    assert len(list(tmp_path.iterdir())) == 2
    remove_run(tmp_path / "two")
    assert not list(tmp_path.iterdir())


def test_a_run_that_cannot_be_deleted_stays_whole_and_the_latest(
    finished: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = RunDirectory(Path(shutil.copytree(finished.path, tmp_path / "runs" / "one")))
    rundir.point_latest(run)
    before = files_of(run.path)

    def busy(*paths: object) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")  # of a folder that a disk is mounted at

    monkeypatch.setattr(Path, "rename", busy)
    with pytest.raises(ResourceError, match=r"one: cannot be deleted \(Device or resource busy\); if it is"):
        remove_run(run.path)
    assert files_of(run.path) == before
    assert sorted(os.listdir("runs")) == ["latest", "one"]


@pytest.mark.parametrize("option", ["test", "labels"])
def test_a_run_among_images_that_came_later_is_refused_before_anything_is_written(
    finished: RunDirectory, digits: Path, tmp_path: Path, option: str
) -> None:
    exam = Path(shutil.copytree(digits, tmp_path / "exam"))
    run = RunDirectory(Path(shutil.copytree(finished.path, exam / "run")))
    before = {file: (exam / file).read_bytes() for file in files_of(exam)}
    with pytest.raises(
        DataError, match=rf"run: lies inside the image folder {exam}, which is never written to"
    ):
        finetune(FinetuneSettings(run=run.path, **{option: exam}, **FEW))
    assert {file: (exam / file).read_bytes() for file in files_of(exam)} == before


def test_encoders_are_not_compared_without_a_test_set(digits: Path, tmp_path: Path) -> None:
    run = pretrain(PretrainSettings(images=digits, out=tmp_path / "run", **{**SMALL, "holdout": 0}))
    with pytest.raises(UsageError, match="has no test set, so encoders cannot be compared"):
        finetune(FinetuneSettings(run=run.path, **FEW, pretrain_seeds=3))
    assert not run.results.exists()


def test_encoders_are_not_compared_without_the_methods_that_the_gain_is_made_of(
    finished: RunDirectory,
) -> None:
    with pytest.raises(UsageError, match="needs --methods with simclr and supervised"):
        finetune(FinetuneSettings(run=finished.path, **FEW, methods=("simclr", "pixels"), pretrain_seeds=3))


def test_labels_given_on_the_page_of_another_encoder_are_not_written_over(
    finished: RunDirectory, tmp_path: Path
) -> None:
    run, other = (
        RunDirectory(Path(shutil.copytree(finished.path, tmp_path / name))) for name in ("one", "one-seed-1")
    )
    table = other.config.read_text()
    assert "\nseed = 0\n" in table
    other.config.write_text(table.replace("\nseed = 0\n", "\nseed = 1\n", 1))
    answer = Annotation("1.png", 1, "label", "cat", "test", "me", "now", None)
    add_annotations(other, [answer])
    with pytest.raises(UsageError, match=r"one-seed-1: lies where .* labels from a page of its own"):
        finetune(FinetuneSettings(run=run.path, **FEW, pretrain_seeds=2))
    assert read_annotations(other) == [answer]


def test_another_run_where_an_encoder_would_lie_is_met_before_anything_is_trained(
    finished: RunDirectory, digits: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished.path, tmp_path / "one")
    shutil.rmtree(tmp_path / "one" / "finetune")
    pretrain(PretrainSettings(images=digits, out=tmp_path / "one-seed-1", **{**SMALL, "epochs": 1}, seed=1))
    with pytest.raises(UsageError, match=r"one-seed-1: lies where .* they also differ in pretrain.epochs"):
        finetune(FinetuneSettings(run=tmp_path / "one", **FEW, pretrain_seeds=3))
    assert not (tmp_path / "one" / "finetune").exists()
    shutil.rmtree(tmp_path / "one-seed-1")
    (tmp_path / "one-seed-1" / "splits").mkdir(parents=True)
    for name in ("notes.txt", "splits/test.json"):
        (tmp_path / "one-seed-1" / name).write_text("mine")
    with pytest.raises(UsageError, match=r"one-seed-1: lies where .* Move it away"):
        finetune(FinetuneSettings(run=tmp_path / "one", **FEW, pretrain_seeds=3))
    assert (tmp_path / "one-seed-1" / "splits" / "test.json").read_text() == "mine"
    shutil.rmtree(tmp_path / "one-seed-1")
    (tmp_path / "one-seed-1").write_text("mine")
    with pytest.raises(UsageError, match=r"one-seed-1: lies where"):
        finetune(FinetuneSettings(run=tmp_path / "one", **FEW, pretrain_seeds=3))
    (tmp_path / "one-seed-1").unlink()
    pretrain(PretrainSettings(images=digits, out=tmp_path / "one-seed-1", **SMALL, seed=5))
    with pytest.raises(UsageError, match=r"one-seed-1: lies where .* it has another seed"):
        finetune(FinetuneSettings(run=tmp_path / "one", **FEW, pretrain_seeds=3))


def test_a_training_whose_weights_are_no_numbers_ends_in_one_sentence(digits: Path, tmp_path: Path) -> None:
    settings = PretrainSettings(
        images=digits,
        out=tmp_path / "run",
        **{**SMALL, "epochs": 1, "batch_size": 400, "learning_rate": 1e30},
    )
    with pytest.raises(LabelwiseError, match="the features are not numbers any more; lower --learning-rate"):
        pretrain(settings)
    more = settings.model_copy(update={"out": tmp_path / "more", "batch_size": 64})
    with pytest.raises(LabelwiseError, match=r"the loss is nan at step 1; lower --learning-rate\."):
        pretrain(more)
    assert not list((tmp_path / "more" / "checkpoints").glob("step-*"))
    assert not (tmp_path / "run" / "encoder.safetensors").exists()


def test_what_diverges_is_told_and_everything_else_is_trained(
    copy: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the second step on, as no classifier is finite then; precision, layout and time are as ever."""
    for counts in ((20,), (120,)):  # one way, and one that is chosen among three
        asked = {**FEW, "label_counts": counts, "scratch_rate": 1e30, "scratch_steps": 3}
        said = rf"2 classifiers diverge, first supervised with {counts[0]} labels, draw 0 \(.*\); the others are kept, `labelwise report` shows them\. "
        with pytest.raises(LabelwiseError, match=said + "Lower --scratch-rate"):
            finetune(FinetuneSettings(run=copy.path, **asked))
        kept = rundir.read_jsonl(copy.results)
        methods_left = {"simclr", "simclr_probe", "random_probe", "pixels"}
        assert {(row["method"], row["draw"]) for row in kept} == {
            (each, draw) for each in methods_left for draw in (0, 1)
        }
        document = report(copy)
        assert document["verdict"].startswith("No comparison with training from scratch yet.")
        assert any(
            limit.startswith("2 classifiers diverged and are missing, first supervised with ")
            for limit in document["limits"]
        )
        assert document["next"][0].startswith("some trainings diverge: ")
    assert len(report(finetune(FinetuneSettings(run=copy.path, **{**FEW, "seed": 1})))["results"]) == 10


def test_a_training_image_under_the_name_of_a_test_image_is_not_tested(
    copy: RunDirectory, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = Path(shutil.copytree(digits, tmp_path / "images"))
    data = rundir.read_json(copy.data)
    rundir.write_json(
        copy.data, {**data, "root": str(images), "sources": {**data["sources"], "images": str(images)}}
    )
    lock = rundir.read_json(copy.test_lock)
    for name in lock["names"][:3]:
        same_class = sorted(
            file
            for file in (images / name).parent.iterdir()
            if f"{file.parent.name}/{file.name}" not in lock["names"]
        )
        shutil.copy(same_class[0], images / name)
    document = report(finetune(FinetuneSettings(run=copy.path, **FEW)))
    assert document["tested"] == len(lock["names"]) - 3
    said = " ".join(capsys.readouterr().err.split())
    assert f"3 of {len(lock['names'])} locked test images have other pixels now and are left out" in said
    verify(copy)


def test_where_classes_differ_in_size_differences_are_of_the_mean_over_them(
    digits: Path, tmp_path: Path
) -> None:
    few = Path(shutil.copytree(digits, tmp_path / "images"))
    for name in "23456789":
        shutil.rmtree(few / name)
    for file in sorted((few / "1").iterdir())[:22]:
        file.unlink()
    run = pretrain(
        PretrainSettings(images=few, out=tmp_path / "run", holdout=0.3, **{**SMALL, "batch_size": 16})
    )
    document = report(finetune(FinetuneSettings(run=run.path, **{**FEW, "draws": 3})))
    (entry,) = document["summary"]
    arms = entry["macro"]
    assert document["by_class"]
    assert entry["gain"]["mean"] == pytest.approx(arms["simclr"]["mean"] - arms["supervised"]["mean"])
    assert 0.55 < document["guessing"] < 0.75, "of the larger class"
    assert (
        "Classes differ in size: these are differences of the mean over classes." in document["verdict"]
        or not entry["gain"]["low"]
    )
    assert ("supervised" in entry["guesses"]) is (arms["supervised"]["mean"] < 0.53)
    assert any(
        "every difference, the gain and labels saved are of the mean over classes" in limit
        for limit in document["limits"]
    )
    assert "gain, in points, mean over classes" in run.report_md.read_text()
    assert "test accuracy, %, mean over classes" in run.report_html.read_text()
    card = run.model_card.read_text()
    assert (
        "| labels | accuracy, %, mean over classes | gain over training from scratch, points, mean over classes |"
        in card
    )
    assert f"| 20 | {escape(text.with_interval(arms['simclr']))} |" in card
    shutil.copytree(run.path, tmp_path / "again")
    found = compare_runs([run.path, tmp_path / "again"])
    of_simclr = next(each for each in found["results"] if each["arm"] == "simclr")
    assert found["by_class"]
    assert of_simclr["accuracies"] == [arms["simclr"]["mean"]] * 2
    verify(run)


def test_a_class_without_a_test_image_is_named_and_no_mean_over_classes_decides(
    digits: Path, tmp_path: Path
) -> None:
    few = Path(shutil.copytree(digits, tmp_path / "images"))
    for name in "3456789":
        shutil.rmtree(few / name)
    for file in sorted((few / "2").iterdir())[2:]:
        file.unlink()
    (few / "2").rename(few / "<two>")
    run = pretrain(PretrainSettings(images=few, out=tmp_path / "run", **{**SMALL, "batch_size": 16}))
    document = report(finetune(FinetuneSettings(run=run.path, **{**FEW, "draws": 3})))
    (entry,) = document["summary"]
    assert entry["macro"]
    assert not document["by_class"], "a class has fewer than five test images: none"
    assert entry["gain"]["mean"] == pytest.approx(
        entry["arms"]["simclr"]["mean"] - entry["arms"]["supervised"]["mean"]
    )
    assert "Not one image of class <two> was tested." in document["verdict"]
    for page in (run.report_md, run.model_card):
        assert "Not one image of class &lt;two> was tested: " in page.read_text()
    verify(run)


def test_a_share_of_labels_is_of_the_images_they_are_drawn_from(copy: RunDirectory, tmp_path: Path) -> None:
    everything = tmp_path / "everything"
    write_digits(everything)
    for number, file in enumerate(sorted(everything.glob("*/*.png"))):
        if number % 18 != 5:
            file.unlink()
    asked: dict[str, Any] = {"run": copy.path, "test": everything, "methods": ("simclr_probe", "pixels")}
    report(finetune(FinetuneSettings(**asked, label_counts=(20,), draws=3)))
    document = report(finetune(FinetuneSettings(**asked, label_counts=(20, "all"), draws=3)))
    there = document["results"][0]["labels_there"]
    assert there == 500 > document["data"]["pool"], "what was held out is not the test set any more"
    assert [entry["fraction"] for entry in document["summary"]] == [20 / there, 1]
    assert text.table(document)[0][1:] == ["20 labels (4%)", "500 labels (100%)"]


def test_shares_that_are_the_same_number_of_labels_are_compared_once_and_it_is_said(
    copy: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = FinetuneSettings(run=copy.path, fraction=(0.1, 0.101), methods=("pixels",), draws=1)
    assert [entry["labels"] for entry in report(finetune(asked))["summary"]] == [40]
    said = " ".join(capsys.readouterr().err.split())
    assert "0.101 of 400 images: 40 labels are compared already; once is enough." in said


def test_what_test_images_leave_open_never_lies_beyond_all_of_them(finished: RunDirectory) -> None:
    document = rundir.read_json(finished.report_json)
    best = {**document["summary"][0]["arms"]["pixels"], "mean": 1.0}
    summary = [{**document["summary"][0], "arms": {"pixels": best}}]
    limits = concluding.limits_in_words(
        {**document, "summary": summary, "tested": 10}, document["data"], document["environment"], 10
    )
    said = "an accuracy of 100.0% may be 72.2% to 100.0%, with 30 more about half as wide."
    assert any(said in limit for limit in limits)


def test_a_column_of_different_draws_says_so(copy: RunDirectory) -> None:
    document = report(
        finetune(FinetuneSettings(run=copy.path, **{**FEW, "draws": 3, "methods": ("pixels",)}))
    )
    said = next(limit for limit in document["limits"] if "means over different draws" in limit)
    assert said.startswith("With 20 labels the numbers in one column are means over different draws (")
    assert "Pixels, logistic regression 3" in said
    assert "SimCLR, fine-tuned 2" in said


def test_a_run_with_other_encoders_is_verified_wherever_it_lies(
    finished: RunDirectory, tmp_path: Path
) -> None:
    shutil.copytree(finished.path, tmp_path / "here" / "one")
    one = finetune(FinetuneSettings(run=tmp_path / "here" / "one", **FEW, pretrain_seeds=2))
    report(one)
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    for folder in (tmp_path / "there").iterdir():
        folder.rename(folder.with_name(folder.name.replace("one", "two")))
    two = RunDirectory(tmp_path / "there" / "two")
    verify(two)
    other = RunDirectory(tmp_path / "there" / "two-seed-1")
    draw = rundir.read_json(other.splits / "draw-0-0.json")
    rundir.write_json(other.splits / "draw-0-0.json", {**draw, "order": draw["order"][::-1]})
    with pytest.raises(
        CheckpointError, match=r"two-seed-1: .* was trained on other labels than the first of"
    ):
        verify(two)
    shutil.rmtree(other.path)
    with pytest.raises(CheckpointError, match="and two-seed-1 is missing beside it"):
        verify(two)
    report(two)
    verify(two)


def test_where_every_training_diverges_there_is_no_classifier_to_keep(
    copy: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(methods, "TRUNK_RATES", (1e30,))
    monkeypatch.setattr(methods, "FEW_PER_CLASS", 10**6)  # nothing is chosen
    asked = {**FEW, "steps": 3, "methods": ("simclr_probe", "simclr")}
    with pytest.raises(LabelwiseError, match="2 classifiers diverge, first simclr with 20 labels, draw 0 "):
        finetune(FinetuneSettings(run=copy.path, **asked))
    assert "no classifier is kept, as its training diverges: " in " ".join(capsys.readouterr().err.split())
    assert not copy.model_card.exists() or not report(copy)["next"][-1].startswith("labelwise predict")
    assert {row["method"] for row in rundir.read_jsonl(copy.results)} == {"simclr_probe"}


def test_a_way_that_diverges_in_one_fold_is_not_chosen(copy: RunDirectory) -> None:
    bench = benching.set_up_bench(copy, FinetuneSettings(run=copy.path, **FEW))
    rows = bench.labeled[:: len(bench.labeled) // 100]
    begun: list[str] = []

    def way(name: str, *, wrong: bool, diverges_at: int | None = None) -> Way:
        def fit(train: Any, held: Any, *_: Any) -> Any:
            begun.append(name)
            if diverges_at is not None and begun.count(name) > diverges_at:
                raise Diverged("the loss is nan")
            return np.eye(len(bench.classes))[(bench.labels[held] + wrong) % len(bench.classes)]

        return Way(name, fit)

    ways = [
        way("never", wrong=False, diverges_at=0),
        way("half", wrong=False, diverges_at=1),
        way("wrong", wrong=True),
    ]
    assert methods._choose(bench, rows, 0, ways).name == "wrong"
    assert begun == ["never", "half", "half", "wrong", "wrong"]
    with pytest.raises(Diverged, match="every way to train it does, inside the labels"):
        methods._choose(bench, rows, 0, ways[:2])


def test_a_run_goes_on_however_its_label_file_is_spelt_and_a_study_is_no_run(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text("file,label\n" + "".join(f"{file.relative_to(digits)},{file.parent.name}\n" for file in sorted(digits.glob("*/*.png"))[::3]))  # fmt: skip
    monkeypatch.chdir(tmp_path)
    asked: dict[str, Any] = {"images": digits, "out": tmp_path / "run", **SMALL}
    run = pretrain(PretrainSettings(labels=Path("labels.csv"), **asked))
    record = rundir.read_json(run.environment)
    rundir.write_json(
        run.environment, {**record, "asked": {**record["asked"], "labels": "labels.csv"}}
    )  # as it once was
    assert pretrain(PretrainSettings(labels=labels, **asked)).path == run.path
    rundir.write_json(run.environment, {**record, "asked": {"name": "color", "pretrain": {}}})
    with pytest.raises(UsageError, match="holds a study, not a run"):
        pretrain(PretrainSettings(labels=labels, **asked))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.jsonl", "[]\n"),
        ("neighbours.json", '{"queries": [{}]}'),
        ("near_copies.json", "[" * 200_000),
        ("finetune/label_check.json", '{"signature": "x", "suspects": null}'),
        ("classifier.json", "null"),
    ],
)
def test_what_a_report_can_do_without_is_left_out_where_it_is_damaged(
    copy: RunDirectory, capsys: pytest.CaptureFixture[str], name: str, content: str
) -> None:
    before = rundir.read_json(copy.report_json)
    (copy.path / name).write_text(content)
    assert report(copy)["verdict"] == before["verdict"]
    assert f"{Path(name).name}" in capsys.readouterr().err


def test_a_plan_that_lacks_a_part_is_damaged(copy: RunDirectory) -> None:
    record = rundir.read_json(copy.environment)
    del record["plan"]["epochs"]
    rundir.write_json(copy.environment, record)
    with pytest.raises(CheckpointError, match=r"environment\.json: damaged .plan\.epochs: Field required"):
        read_plan(copy)


def test_one_damaged_run_does_not_hide_the_others(
    finished: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        shutil.copytree(finished.path, tmp_path / name)
    (tmp_path / "one" / "data.json").write_text("")
    assert [each["name"] for each in list_runs(tmp_path)["runs"]] == ["two"]
    assert "one is left out, it is damaged: " in " ".join(capsys.readouterr().err.split())


def test_a_run_from_before_a_setting_existed_goes_on(digits: Path, tmp_path: Path) -> None:
    settings = PretrainSettings(images=digits, out=tmp_path / "run", **{**SMALL, "epochs": 1})
    run = pretrain(settings)
    record = rundir.read_json(run.environment)
    del record["asked"]["holdout_seed"]
    rundir.write_json(run.environment, record)
    assert pretrain(settings).path == run.path
    with pytest.raises(UsageError, match="holds a run with holdout_seed = 0, now 3"):
        pretrain(settings.model_copy(update={"holdout_seed": 3}))


def test_bad_images_are_left_out_and_the_run_goes_on(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    shutil.copytree(digits, images)
    (images / "3" / "empty.png").write_bytes(b"")
    (images / "3" / "page.jpg").write_text("<html>not found</html>")
    run = pretrain(PretrainSettings(images=images, out=tmp_path / "run", **{**SMALL, "epochs": 1}))
    reasons = {entry["file"]: entry["reason"] for entry in rundir.read_json(run.data)["quarantined"]}
    assert reasons == {"3/empty.png": "empty file", "3/page.jpg": "not an image (HTML or XML)"}
    [(folder, _, _)] = list_caches()
    words = " ".join(capsys.readouterr().err.split())
    assert "2 unreadable images left out, e.g. 3/empty.png: empty file (all in data.json)." in words
    assert f"delete {folder}: then a new run reads them again." in words
    assert {entry["file"] for entry in scan(images)["quarantined"]} == set(reasons)


def test_what_cannot_be_trained_on_is_refused_in_words(digits: Path, tmp_path: Path) -> None:
    def refuse(words: str, kind: type[Exception], **settings: Any) -> None:
        with pytest.raises(kind, match=words):
            pretrain(PretrainSettings(**{"images": digits, "out": tmp_path / "run", **SMALL, **settings}))
        assert not (tmp_path / "run").exists()

    refuse("--batch-size 4096: larger than the", UsageError, batch_size=4096)
    refuse("timm has no such model; did you mean resnet18", UsageError, backbone="resnet81", backbone_args={})
    refuse("no such folder", DataError, images=tmp_path / "nowhere")
    refuse("lies inside the image folder", UsageError, out=digits / "runs")
    (tmp_path / "few").mkdir()
    for number in range(10):
        Image.new("RGB", (8, 8), (number * 20, 0, 0)).save(tmp_path / "few" / f"{number}.png")
    refuse("SimCLR needs at least 32", DataError, images=tmp_path / "few")


def test_one_class_or_no_labels_is_refused_in_words(digits: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in digits.glob("*/*.png"):
        shutil.copy(file, flat / f"{file.parent.name}-{file.name}")
    run = pretrain(PretrainSettings(images=flat, out=tmp_path / "run", **{**SMALL, "epochs": 1}))
    with pytest.raises(DataError, match="no labels were found; comparing needs two classes or more"):
        finetune(FinetuneSettings(run=run.path, **FEW))
    labels = tmp_path / "labels.csv"
    names = sorted(os.listdir(flat))
    labels.write_text("file_name,label\n" + "".join(f"{name},{name[0]}\n" for name in names))
    document = report(finetune(FinetuneSettings(run=run.path, labels=labels, labels_root=flat, **FEW)))
    assert document["summary"][0]["labels"] == 20
    results = run.results.read_bytes()
    finetune(FinetuneSettings(run=run.path, **FEW))
    assert run.results.read_bytes() == results, "the labels of the last comparison are taken again"


def test_all_labels_and_a_ladder_can_be_asked_for(copy: RunDirectory, finished: RunDirectory) -> None:
    shutil.rmtree(copy.results.parent)
    finetune(FinetuneSettings(run=copy.path, methods=("pixels",), draws=1))
    counts = sorted(row["labels"] for row in rundir.read_jsonl(copy.results))
    pool = rundir.read_json(finished.data)["pool"]
    assert counts == [20, 50, 100, 250, pool]
    assert report(copy)["verdict"].startswith("No comparison with training from scratch yet.")


@pytest.mark.slow
def test_shuffled_labels_show_no_gain(digits: Path, finished: RunDirectory, tmp_path: Path) -> None:
    names = sorted(file.relative_to(digits).as_posix() for file in digits.glob("*/*.png"))
    labels = [name.split("/")[0] for name in names]
    np.random.default_rng(0).shuffle(labels)
    table = tmp_path / "shuffled.csv"
    table.write_text(
        "file_name,label\n" + "".join(f"{n},{label}\n" for n, label in zip(names, labels, strict=True))
    )
    run = pretrain(
        PretrainSettings(images=digits, labels=table, labels_root=digits, out=tmp_path / "run", **SMALL)
    )
    asked: dict[str, Any] = {"label_counts": (100,), "draws": 8, "steps": 20, "scratch_steps": 20}
    document = report(finetune(FinetuneSettings(run=run.path, **asked)))
    entry = document["summary"][0]
    gain = entry[
        "gain"
    ]  # an interval of 95 % misses zero once in twenty machines, one twice as wide hardly ever
    assert abs(gain["mean"]) < gain["high"] - gain["low"]
    assert all(abs(arm["mean"] - 0.1) < 0.08 for arm in entry["arms"].values())


def same_weights(one: RunDirectory, two: RunDirectory) -> bool:
    return all(
        torch.equal(first, load_file(getattr(two, name))[key])
        for name in ("encoder", "head")
        for key, first in load_file(getattr(one, name)).items()
    )


def steps(run: RunDirectory) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in rundir.read_jsonl(run.metrics) if row["kind"] == "step"]


# --- verify


def test_a_report_follows_from_its_predictions(finished: RunDirectory) -> None:
    assert verify(finished) == {"classifiers": 10, "predictions": 1000, "draws": 2}


def test_a_run_that_is_worked_on_is_neither_reported_nor_verified(copy: RunDirectory) -> None:
    before = copy.report_json.read_bytes()
    holder = f"""
from pathlib import Path
from labelwise.ownership import hold
from labelwise.rundir import RunDirectory
with hold(RunDirectory(Path({str(copy.path)!r}))):
    print("held", flush=True)
    input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        for command in (report, verify):
            with pytest.raises(UsageError, match=f"process {other.pid} on .* is working on it"):
                command(copy)
        other.communicate("\n")
    assert copy.report_json.read_bytes() == before


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("report.json", '"mean": 0.', '"mean": 0.9', "report.json: summary is not what the predictions give"),
        ("report.json", '"verdict": "', '"verdict": "Surely: ', "report.json: verdict"),
        ("finetune/results.jsonl", '"accuracy": ', '"accuracy": 1', "its predictions say"),
        ("finetune/results.jsonl", '"draw_sha256": "', '"draw_sha256": "0', "was trained on other labels"),
        ("splits/draw-0-0.json", '"order": [', '"order": ["more.png", ', "was trained on other labels"),
        ("splits/test.json", '"names": [', '"names": ["more.png", ', "test.json: its names"),
        ("report.json", '"test_uses": ', '"test_uses": 1', "report.json: test_uses"),
        ("report.json", '"pool": ', '"pool": 1', "report.json: data"),
        ("report.json", "One encoder was compared", "Encoders were compared", "report.json: limits"),
        ("report.json", '"next": [', '"next": ["publish", ', "report.json: next"),
        ("report.json", '"checked": ', '"checked": 1', "report.json: label_check"),
        ("report.json", '"torch": "', '"torch": "9', "report.json: environment"),
        ("report.md", "| From scratch | ", "| From scratch | 1", "report.md: is not what report.json"),
        ("report.html", "</h1>", " Surely.</h1>", "report.html: is not what report.json"),
        ("model-card.md", "tells 10 classes apart", "tells 11 classes apart", "model-card.md: is not what"),
    ],
)
def test_a_changed_number_is_found(copy: RunDirectory, file: str, old: str, new: str, words: str) -> None:
    before = (copy.path / file).read_text()
    assert old in before
    (copy.path / file).write_text(before.replace(old, new, 1))
    with pytest.raises(CheckpointError, match=re.escape(words)):
        verify(copy)


def test_accuracies_of_classes_that_were_changed_everywhere_are_found(copy: RunDirectory) -> None:
    rows = rundir.read_jsonl(copy.results)
    rows[0]["per_class"]["3"] += 0.01
    rundir.rewrite_jsonl(copy.results, rows)
    report(copy)
    with pytest.raises(CheckpointError, match="draw 0: per_class is not what its predictions say"):
        verify(copy)
    del rows[0]["per_class"], rows[0]["macro_accuracy"]
    rundir.rewrite_jsonl(copy.results, rows)
    report(copy)
    with pytest.raises(CheckpointError, match="draw 0: macro_accuracy is None, its predictions say 0"):
        verify(copy)


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ("prediction", "the prediction is not the most probable class of "),
        ("probabilities", "the probabilities do not add up to 1 of "),
    ],
)
def test_a_changed_prediction_is_found_that_changes_no_accuracy(
    copy: RunDirectory, column: str, words: str
) -> None:
    table = pq.read_table(copy.predictions)
    values, right = table.to_pydict(), table["label"].to_pylist()
    wrong = next(row for row, each in enumerate(values["prediction"]) if each != right[row])
    if column == "prediction":
        values[column][wrong] = next(
            each for each in "0123456789" if each not in (right[wrong], values[column][wrong])
        )
    else:
        values[column][wrong] = [2 * each for each in values[column][wrong]]
    pq.write_table(pa.table(values, schema=table.schema), copy.predictions)
    report(copy)
    with pytest.raises(CheckpointError, match=words + re.escape(values["name"][wrong])):
        verify(copy)


def test_a_result_without_predictions_is_named_and_trained_again(
    copy: RunDirectory, finished: RunDirectory
) -> None:
    copy.predictions.unlink()
    with pytest.raises(CheckpointError, match=r"has no predictions .* run `labelwise finetune` again"):
        report(copy)
    finetune(FinetuneSettings(run=copy.path, **FEW))
    report(copy)
    assert verify(copy) == verify(finished)


def test_a_report_that_finds_the_disk_full_stays_as_it_was(
    copy: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = (copy.report_json, copy.report_md, copy.report_html, copy.model_card)
    before = [file.read_bytes() for file in files]

    def full(path: Path) -> None:
        if "report.html" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(rundir, "flush", full)
    with pytest.raises(OSError, match="No space left on device"):
        report(copy, label_cost=3.0)
    assert [file.read_bytes() for file in files] == before


@pytest.mark.parametrize("moved", [1, 2, 3])
def test_what_a_report_killed_between_its_files_leaves_is_found_and_mended_by_the_next(
    copy: RunDirectory, monkeypatch: pytest.MonkeyPatch, moved: int
) -> None:
    files = (copy.report_json, copy.report_md, copy.report_html, copy.model_card)
    for file in files:
        file.write_text("an earlier one")
    replace, calls = os.replace, iter(range(4))

    def killed(source: Path, target: Path) -> None:
        if next(calls) == moved:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            report(copy)
    assert [file.read_text() != "an earlier one" for file in files] == [number < moved for number in range(4)]
    with pytest.raises(CheckpointError, match=r"is not what report\.json and the run's files say"):
        verify(copy)
    report(copy)
    verify(copy)


def test_a_report_is_not_replaced_by_one_of_fewer_results_that_got_lost(
    copy: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    before, rows = copy.report_json.read_bytes(), copy.results.read_bytes()
    for kept in (b"", rows[: len(rows) // 2], rows[:-2]):
        copy.results.write_bytes(kept)
        with pytest.raises(
            CheckpointError, match=r"results\.jsonl: lacks [\d,]+ classifiers whose predictions"
        ):
            report(copy)
        assert copy.report_json.read_bytes() == before
    copy.report_json.unlink()
    capsys.readouterr()
    report(copy)
    assert "lacks 1 classifiers whose predictions are there" in " ".join(capsys.readouterr().err.split())


def test_results_of_another_encoder_are_found_and_set_aside(
    copy: RunDirectory, finished: RunDirectory
) -> None:
    encoder, spec = load_encoder(copy.path)
    with torch.no_grad():
        next(encoder.parameters()).mul_(1.5)
    save_encoder(copy.encoder, encoder, spec)
    with pytest.raises(CheckpointError, match=r"encoder\.safetensors or head\.safetensors: is not the one"):
        verify(copy)
    other = {**FEW, "methods": ("simclr_probe",)}
    report(finetune(FinetuneSettings(run=copy.path, **other)))
    verify(copy)
    shutil.copy(finished.encoder, copy.encoder)
    finetune(FinetuneSettings(run=copy.path, **other))
    assert copy.results.read_bytes() == finished.results.read_bytes(), "those of the first encoder are back"


def test_predictions_without_a_result_are_found(copy: RunDirectory) -> None:
    rows = rundir.read_jsonl(copy.results)
    rundir.rewrite_jsonl(copy.results, rows[1:])
    copy.report_json.unlink()
    report(copy)
    with pytest.raises(CheckpointError, match="draw 0: has predictions and no result"):
        verify(copy)


def test_draws_of_earlier_settings_can_still_be_verified(
    copy: RunDirectory, digits: Path, tmp_path: Path
) -> None:
    shutil.rmtree(copy.results.parent)
    probe: dict[str, Any] = {"run": copy.path, "methods": ("simclr_probe",)}
    names = sorted(file.relative_to(digits).as_posix() for file in digits.glob("*/*.png"))
    tables = [tmp_path / "all.csv", tmp_path / "half.csv"]
    for table, every in zip(tables, (1, 2), strict=True):
        table.write_text("file_name,label\n" + "".join(f"{n},{n[0]}\n" for n in names[::every]))
    first, second = ({**probe, "labels": table, "labels_root": digits} for table in tables)
    finetune(FinetuneSettings(**first, label_counts=(20, 40), draws=3))
    finetune(FinetuneSettings(**second, label_counts=(20, 40), draws=3))
    report(finetune(FinetuneSettings(**first, label_counts=(20,), draws=2)))
    assert verify(copy)["classifiers"] == 6


def test_labels_saved_reach_to_all_labels(copy: RunDirectory, finished: RunDirectory) -> None:
    shutil.rmtree(copy.results.parent)
    asked: dict[str, Any] = {"draws": 3, "methods": ("simclr", "supervised"), "steps": 2, "scratch_steps": 2}
    document = report(finetune(FinetuneSettings(run=copy.path, label_counts=(20, 50, "all"), **asked)))
    saved = document["labels_saved"]
    pool = rundir.read_json(finished.data)["pool"]
    assert [(entry["labels"], entry["fewest"], entry["most"]) for entry in saved] == [
        (20, 20, pool),
        (50, 20, pool),
    ]
    assert any("a smooth curve" in limit for limit in document["limits"])
    assert "labels with pretraining match" in copy.report_md.read_text()
    assert "Labels saved" in copy.report_html.read_text()
    report(copy, label_cost=0.4)
    assert all("at 0.4 a label" in page.read_text() for page in (copy.report_html, copy.report_md))
    assert rundir.read_json(copy.report_json)["label_cost"] == 0.4


def test_a_test_image_among_the_labels_is_found(copy: RunDirectory) -> None:
    lock = rundir.read_json(copy.test_lock)
    leaked = rundir.read_json(copy.splits / "draw-0-1.json")["order"][0]
    names = sorted([*lock["names"], leaked])
    rundir.write_json(copy.test_lock, lock | {"names": names, "sha256": hash_names(names)})
    with pytest.raises(CheckpointError, match=f"1 of its labels are test images, as {re.escape(leaked)}"):
        verify(copy)


# --- labels that look wrong


def test_labels_that_look_wrong_are_listed_with_pictures(
    copy: RunDirectory, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "is_too_weak", lambda check: False)  # this small encoder is
    test = rundir.read_json(copy.test_lock)["names"]
    rest = sorted({file.relative_to(digits).as_posix() for file in digits.glob("*/*.png")} - set(test))
    labeled = np.random.default_rng(0).choice(rest, 100, replace=False).tolist()
    lines = [f"{name},{name[0]}" for name in (*test, *labeled)]
    table = tmp_path / "labels.csv"
    table.write_text("\n".join(["file_name,label", *lines]))
    asked: dict[str, Any] = {"methods": ("simclr_probe",), "labels": table, "labels_root": digits, **FEW}
    check = report(finetune(FinetuneSettings(run=copy.path, **asked)))["label_check"]
    assert check["checked"] == 100
    assert sum(entry["labels"] for entry in check["classes"]) == 100
    assert check["classes"] == sorted(check["classes"], key=lambda entry: (entry["agreed"], entry["labels"]))
    assert check["unlabeled"] == len(rest) - 100
    assert check["doubted"] >= len(check["suspects"])
    assert all(entry["label"] != entry["looks_like"] for entry in check["suspects"])
    assert not set(test) & {entry["name"] for entry in check["suspects"]}
    first = check["suspects"][0]
    words = f"{first['label']}, looks like {first['looks_like']}"
    assert copy.report_html.read_text().count("data:image/png;base64") >= len(check["suspects"]) > 0
    for page in (copy.report_html, copy.report_md):
        assert "Labels to look at again" in page.read_text()
        assert words in page.read_text()
    assert "label more of it first" in json.dumps(rundir.read_json(copy.report_json)["next"])
    monkeypatch.undo()
    weak = report(copy)
    assert is_too_weak(weak["label_check"]) == (weak["label_check"]["suspects"] == [])
    assert "label more of it first" not in json.dumps(weak["next"])
    assert words not in copy.report_html.read_text(), "of a weak encoder nothing is listed"


def test_copies_with_different_labels_are_suspects_and_a_class_of_one_is_not_judged(
    digits: Path, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    shutil.copytree(digits, images)
    shutil.copy(images / "3" / min(os.listdir(images / "3")), images / "5" / "copy.png")
    (images / "only").mkdir()
    Image.new("L", (8, 8), 200).save(images / "only" / "one.png")
    settings = {**SMALL, "epochs": 1, "holdout": 0.1}
    run = pretrain(PretrainSettings(images=images, out=tmp_path / "run", **settings))
    check = report(finetune(FinetuneSettings(run=run.path, methods=("simclr_probe",), **FEW)))["label_check"]
    assert check["classes"][0] == {"name": "only", "labels": 1, "agreed": None}
    assert all(entry["agreed"] is not None for entry in check["classes"][1:])
    pair = [entry for entry in check["suspects"] if entry["has_other_copy"]]
    assert pair == check["suspects"][: len(pair)]
    assert "5/copy.png" in {entry["name"] for entry in pair}
    assert {(entry["label"], entry["looks_like"]) for entry in pair} == {("3", "5"), ("5", "3")}
    assert "3, an exact copy is labeled 5" in run.report_md.read_text()


def test_the_check_is_made_again_only_when_labels_or_settings_change(copy: RunDirectory) -> None:
    before = copy.label_check.read_bytes()
    copy.label_check.write_bytes(before + b"\n")
    finetune(FinetuneSettings(run=copy.path, methods=("simclr_probe",), **FEW))
    assert copy.label_check.read_bytes() == before + b"\n"
    finetune(FinetuneSettings(run=copy.path, methods=("simclr_probe",), **{**FEW, "seed": 1}))
    assert rundir.read_json(copy.label_check)["signature"] != json.loads(before)["signature"]


def test_a_report_leaves_out_what_has_no_result_and_what_diverged(copy: RunDirectory) -> None:
    whole = {entry["arm"] for entry in report(copy)["calibration"]}
    rows = rundir.read_jsonl(copy.results)
    rundir.rewrite_jsonl(copy.results, [row for row in rows if row["method"] != "pixels"])
    copy.report_json.unlink()
    assert {entry["arm"] for entry in report(copy)["calibration"]} == whole - {"pixels"}
    rundir.rewrite_jsonl(copy.results, rows)
    table = read_predictions(copy.predictions)
    chosen = [
        row for row, arm in enumerate(table["method"]) if (arm, table["draw"][row]) == ("supervised", 0)
    ]
    store_predictions(
        copy.predictions, "supervised", 0, 20,
        names=[table["name"][row] for row in chosen],
        truth=[table["label"][row] for row in chosen],
        groups=[table["group"][row] for row in chosen],
        predicted=[table["prediction"][row] for row in chosen],
        probabilities=np.full((len(chosen), 10), np.nan, dtype=np.float32),
    )  # fmt: skip
    assert {entry["arm"] for entry in report(copy)["calibration"]} == whole - {"supervised"}
    assert verify(copy)["classifiers"] == len(rows)


def test_a_model_card_and_a_label_check_never_outlive_the_results_they_belong_to(
    copy: RunDirectory, finished: RunDirectory
) -> None:
    report(finetune(FinetuneSettings(run=copy.path, methods=("pixels",), **{**FEW, "seed": 1})))
    assert not copy.model_card.exists()
    assert not copy.label_check.exists()
    report(finetune(FinetuneSettings(run=copy.path, **FEW)))
    assert copy.model_card.exists()
    assert copy.label_check.read_bytes() == finished.label_check.read_bytes()
    finetune(FinetuneSettings(run=copy.path, methods=("pixels",), **{**FEW, "label_counts": ("all",)}))
    report(copy)
    assert "Worst classes" not in copy.model_card.read_text(), "the confusion counted is that of pixels"


def test_the_report_of_an_earlier_version_is_named_so(copy: RunDirectory) -> None:
    document = rundir.read_json(copy.report_json)
    del document["calibration"]
    rundir.write_json(copy.report_json, document)
    with pytest.raises(CheckpointError, match="has no calibration, an earlier version wrote it"):
        verify(copy)


def test_a_name_cannot_become_markdown_of_its_own(finished: RunDirectory) -> None:
    document = rundir.read_json(finished.report_json)
    name = "a\n# b|c![x](https://d)`<script>"
    suspect = {"name": name, "label": name, "looks_like": "1", "doubt": 1.0, "has_other_copy": False}
    page = markdown.render({**document, "label_check": {**document["label_check"], "suspects": [suspect]}})
    assert "\n# b" not in page
    assert "<script>" not in page
    assert "a # b\\|c!\\[x\\](https://d)\\`&lt;script>: a # b" in page


# --- time


def test_a_time_limit_compares_what_fits_and_the_same_command_goes_on(
    copy: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr("labelwise.stages.comparing.time.monotonic", lambda: now)
    monkeypatch.setattr("labelwise.stages.methods.count_workers", lambda *_: 1)
    run_method = comparing.run_method

    def slow(method: str, *rest: Any) -> Any:
        nonlocal now
        now += {"simclr": 10, "supervised": 40}.get(method, 1)
        return run_method(method, *rest)

    monkeypatch.setattr(comparing, "run_method", slow)
    asked = {
        **FEW,
        "draws": 4,
        "seed": 3,
        "time_limit": "130s",
        "methods": ("pixels", "simclr", "supervised"),
    }
    finetune(FinetuneSettings(run=copy.path, **asked))
    done = [(row["method"], row["draw"]) for row in rundir.read_jsonl(copy.results)]
    # 4 probes, two draws of both in 104 s, simclr of the third and of the fourth; supervised would take 40 more
    trained = [
        ("simclr", 0),
        ("supervised", 0),
        ("simclr", 1),
        ("supervised", 1),
        ("simclr", 2),
        ("simclr", 3),
    ]
    assert done == [("pixels", draw) for draw in range(4)] + trained
    assert now <= 130
    words = " ".join(capsys.readouterr().err.split())
    assert "--time-limit 130s: 2 of 12 classifiers are left; the same command goes on." in words
    assert "training the classifier to keep" not in words
    assert report(copy)["summary"][0]["comparisons"][0]["n"] == 2
    finetune(FinetuneSettings(run=copy.path, **asked))
    assert len(rundir.read_jsonl(copy.results)) == 12
    assert "training the classifier to keep" in capsys.readouterr().err


def test_what_too_few_draws_found_is_told_beside_what_is_claimed() -> None:
    """A page that says only where pretraining helps would hide that it hurts with all labels, which are one draw."""
    pair = {"arm": "simclr", "against": "supervised"}
    claimed = {**pair, "mean": 0.084, "low": 0.065, "high": 0.104, "n": 5, "verdict": "helps"}
    arms: dict[str, Any] = {"simclr": {}, "supervised": {}}
    single = {**pair, "mean": -0.067, "low": None, "high": None, "n": 1, "verdict": "no difference shown"}
    summary: list[dict[str, Any]] = [
        {
            "labels": 100,
            "fraction": 0.01,
            "comparisons": [claimed],
            "arms": arms,
            "gain": claimed,
            "guesses": [],
        },
        {
            "labels": 9969,
            "fraction": 0.9969,
            "comparisons": [single],
            "arms": arms,
            "gain": single,
            "guesses": ["supervised"],
        },
    ]
    assert concluding.verdict_in_words(summary, 2_000, []) == (
        "Pretraining on your images helps: +8.4 \u00b1 1.9 points with 100 labels (1 % of the images). "
        "Too few label draws to claim anything: -6.7 points with 9,969 labels."
    )
    summary[0]["guesses"] = ["supervised"]
    assert concluding.verdict_in_words(summary, 2_000, []).endswith(
        "From scratch is hardly better than guessing with 100 labels: the gain may be that of a rate or steps that do not fit "
        "(--scratch-rate, --scratch-steps)."
    ), "only where a gain is claimed"
    words = concluding.verdict_in_words([{**summary[0], "macro": {}}], 2_000, [])
    assert "one has too few test images to count each alike: the large ones decide this." in words


def test_where_no_method_is_better_than_naming_one_class_it_is_said() -> None:
    pair = {"arm": "simclr", "against": "supervised", "mean": 0.0, "n": 5, "verdict": "no difference shown"}
    entry: dict[str, Any] = {
        "labels": 20,
        "fraction": None,
        "arms": {"simclr": {}, "supervised": {}},
        "guesses": ["simclr", "supervised"],
    }
    said = "With 20 labels no method is clearly better than always naming one class."
    for low, high in ((-0.1, 0.1), (None, None)):
        summary = [{**entry, "comparisons": [{**pair, "low": low, "high": high}]}]
        assert said in concluding.verdict_in_words(summary, 2_000, [])
    assert said in concluding.verdict_in_words([{**entry, "comparisons": []}], 2_000, [])
    learned = {**entry, "guesses": ["supervised"], "comparisons": []}
    assert said not in concluding.verdict_in_words([learned], 2_000, [])
    better = {**entry, "comparisons": [{**pair, "mean": 0.02, "low": 0.01, "high": 0.03, "verdict": "helps"}]}
    words = concluding.verdict_in_words([better], 2_000, [])
    assert said not in words, "it does not say both"
    assert "From scratch is hardly better than guessing" in words


@pytest.mark.parametrize("arm", ["simclr", "simclr_probe"])
def test_that_pixels_are_better_is_said_without_training_from_scratch_too(arm: str) -> None:
    found = {
        "arm": arm,
        "against": "pixels",
        "mean": -0.1,
        "low": -0.15,
        "high": -0.05,
        "n": 3,
        "verdict": "hurts",
    }
    summary: list[dict[str, Any]] = [
        {
            "labels": 20,
            "fraction": None,
            "arms": {arm: {}, "pixels": {}},
            "guesses": [],
            "comparisons": [found],
        }
    ]
    assert concluding.verdict_in_words(summary, 50, []) == (
        f"No comparison with training from scratch yet. Measured so far: pixels, {arm}. Plain pixels are better with 20 labels. "
        "Only 50 independent test images: they alone may decide this."
    )
    found["n"] = 2
    assert "Plain pixels" not in concluding.verdict_in_words(summary, 50, []), "two draws claim nothing"


def test_two_draws_claim_nothing_and_say_how_many_are_needed(finished: RunDirectory) -> None:
    document = rundir.read_json(finished.report_json)
    assert document["verdict"].startswith("2 label draws where 3 are needed, so nothing is claimed: ")
    assert all(entry["verdict"] == "no difference shown" for entry in document["summary"][0]["comparisons"])


@pytest.mark.parametrize("content", ["", "{}", "[]", "not JSON"])
def test_a_damaged_file_that_can_be_made_again_is_made_again(
    copy: RunDirectory, finished: RunDirectory, content: str
) -> None:
    for file in (copy.label_check, copy.classifier_json):
        file.write_text(content)
    document = report(copy)
    assert document["label_check"] is None
    assert "classifier trained on all labels" not in " ".join(document["next"])
    assert not copy.model_card.exists()
    report(finetune(FinetuneSettings(run=copy.path, **FEW)))
    assert copy.label_check.read_bytes() == finished.label_check.read_bytes()
    assert copy.classifier_json.read_bytes() == finished.classifier_json.read_bytes()


def test_a_label_check_of_an_earlier_version_is_made_again(
    copy: RunDirectory, finished: RunDirectory
) -> None:
    found = rundir.read_json(copy.label_check)
    del found["groups"]
    rundir.write_json(copy.label_check, found)
    assert report(copy)["label_check"] is None
    finetune(FinetuneSettings(run=copy.path, **FEW))
    assert copy.label_check.read_bytes() == finished.label_check.read_bytes()


def test_more_gpus_than_there_are_are_refused_before_the_run_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="--devices 2: this machine has 1 of kind cuda"):
        comparing.compare(FinetuneSettings(run=tmp_path / "none", device="cuda", devices="2"))


@pytest.mark.parametrize(
    ("costs", "devices", "steps"), [([10] * 6, 1, 60), ([10] * 6, 2, 30), ([100, 10], 2, 100), ([5], 8, 5)]
)
def test_the_time_announced_is_that_of_the_busiest_device(
    costs: list[int], devices: int, steps: float
) -> None:
    assert comparing.steps_in_a_row(costs, devices) == steps
