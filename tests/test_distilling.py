"""The kept classifier taught on all images: only where that is shown or asked for, without a test image, and with a way back."""

import csv
import dataclasses
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from labelwise import rundir
from labelwise.cli import app
from labelwise.config import FinetuneSettings, PretrainSettings
from labelwise.errors import DataError, Interrupted, UsageError
from labelwise.measures.statistics import Interval
from labelwise.reports.text import distilled_in_words
from labelwise.rundir import RunDirectory
from labelwise.stages import distilling
from labelwise.stages.benching import remember_sources, set_up_bench
from labelwise.stages.classifier import load_classifier
from labelwise.stages.classifier import predict as probabilities_of
from labelwise.stages.distilling import distill, show
from labelwise.stages.predicting import predict
from labelwise.stages.predicting import show as show_predicted
from labelwise.stages.pretraining import pretrain
from labelwise.stages.repeating import finetune
from labelwise.stages.reporting import report
from labelwise.stages.reporting import show as show_report
from labelwise.stages.verifying import verify

FEW, ENOUGH = 4, 8  # labels of each class


def with_labels(source: RunDirectory, folder: Path, each: int) -> RunDirectory:
    """A copy with a classifier of so many labels of each class, and the test images'."""
    run = RunDirectory(Path(shutil.copytree(source.path, folder / "run")))
    root, tested = Path(rundir.read_json(run.data)["root"]), rundir.read_json(run.test_lock)["names"]
    names = sorted(str(file.relative_to(root)) for file in root.glob("*/*.png"))
    free = [name for name in names if name not in tested]
    chosen = [name for digit in "0123456789" for name in [n for n in free if n.startswith(digit)][:each]]
    file = folder / "labels.csv"
    with file.open("w", encoding="utf-8", newline="") as stream:
        rows = [[str(root / name), name.partition("/")[0]] for name in chosen + tested]
        csv.writer(stream).writerows([["file", "label"], *rows])
    return finetune(
        FinetuneSettings(run=run.path, labels=file, methods=("simclr",), label_counts=("all",), steps=2)
    )


@pytest.fixture(scope="module")
def few(pretrained: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return with_labels_in_cache(pretrained, tmp_path_factory.mktemp("few"), FEW)


@pytest.fixture(scope="module")
def enough(pretrained: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return with_labels_in_cache(pretrained, tmp_path_factory.mktemp("enough"), ENOUGH)


def with_labels_in_cache(pretrained: RunDirectory, folder: Path, each: int) -> RunDirectory:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LABELWISE_CACHE", str(pretrained.path.parent / "cache"))
        return with_labels(pretrained, folder, each)


@pytest.fixture
def copied(
    pretrained: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[RunDirectory], RunDirectory]:
    """Copies to write to, with the cache that is there."""
    monkeypatch.setenv("LABELWISE_CACHE", str(pretrained.path.parent / "cache"))
    return lambda run: RunDirectory(Path(shutil.copytree(run.path, tmp_path / "copy")))


def contents(run: RunDirectory) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in run.path.rglob("*") if file.is_file()}


def is_same(one: RunDirectory, two: RunDirectory) -> bool:
    """Whether two runs keep the same weights; the order in the header of such a file is by chance."""
    first, second = load_file(one.classifier), load_file(two.classifier)
    return all(first[key].equal(second[key]) for key in first.keys() | second.keys())


def gained(mean: float) -> Interval:
    return Interval(mean, mean - 0.05, mean + 0.05, 5)


def test_too_few_labels_leave_everything_as_it_is(
    few: RunDirectory, copied: Callable[[RunDirectory], RunDirectory], capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(few)
    before = contents(run)
    document = distill(run)
    assert not document["distilled"]
    assert document["gain"] is None
    assert contents(run) == before
    show(document)
    shown = capsys.readouterr().out
    assert "the classifier stays as it is: 40 labels are too few to measure a gain inside them" in shown
    assert "--force distills all the same" in shown


def test_predict_uses_the_distilled_classifier_and_expects_what_it_reached(
    few: RunDirectory,
    copied: Callable[[RunDirectory], RunDirectory],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = copied(few)
    start = rundir.read_json(run.classifier_json)
    document = distill(run, force=True)
    assert "too few to measure a gain inside them; done all the same" in " ".join(
        capsys.readouterr().err.split()
    )
    bench = set_up_bench(run, remember_sources(run, FinetuneSettings(run=run.path)))
    classifier, spec, _ = load_classifier(run)
    chances = probabilities_of(classifier, bench.cache, bench.test, spec.normalization, bench.device)
    right = chances.argmax(axis=1) == bench.labels[bench.test]
    test = document["test"]
    assert test["after"] == test["accuracy"] == pytest.approx(right.mean())
    assert test["mean"] == pytest.approx(test["after"] - test["before"])
    assert test["low"] < test["mean"] < test["high"]
    (row,) = rundir.read_jsonl(run.results)
    assert test["before"] == pytest.approx(row["accuracy"], abs=0.05), "trained once more, with another seed"

    facts = rundir.read_json(run.classifier_json)
    assert facts["method"] == "distilled"
    assert {key: facts[key] for key in ("steps", "way", "classes")} == {
        key: start[key] for key in ("steps", "way", "classes")
    }
    assert facts["signature"] != start["signature"], "what is bound to the other one does not count for it"
    found = predict(run, [Path(rundir.read_json(run.data)["root"]) / "3"], tmp_path / "out.csv")
    assert found["expected"] == {
        "accuracy": test["after"],
        "labels": 10 * FEW,
        "trained_on": 10 * FEW,
        "n_test": len(bench.test),
    }
    show_predicted(found)
    words = " ".join(capsys.readouterr().out.split())
    assert "confidence is not calibrated: the classifier is distilled, so there are no sets" in words
    assert "labels are too few" not in words
    with pytest.raises(UsageError, match="this classifier was not calibrated; `labelwise finetune"):
        predict(run, [Path(rundir.read_json(run.data)["root"]) / "3"], tmp_path / "sets.csv", coverage=0.9)


def test_report_and_model_card_tell_of_it_and_follow_from_what_is_stored(
    few: RunDirectory, copied: Callable[[RunDirectory], RunDirectory], capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(few)
    uses = report(run)["test_uses"]
    assert "distilled" not in run.model_card.read_text()
    test = distill(run, force=True)["test"]
    document = report(run)
    assert document["test_uses"] == uses + 2
    verify(run)
    show_report(document)
    words = f"{100 * test['after']:.1f} % of {test['n_test']} test images right, {100 * test['before']:.1f} % by the classifier it came from"
    assert words in " ".join(capsys.readouterr().out.split())
    card = run.model_card.read_text()
    assert f"The classifier that is kept was distilled from one of these: {words}" in card
    assert "Every row is a classifier made as this one's start was" in card
    finetune(FinetuneSettings(run=run.path, methods=("simclr",), label_counts=("all",), steps=2))
    again = report(run)
    assert (again["distilled"], again["test_uses"]) == (None, uses + 2), "what was seen stays seen"


def test_finetune_is_the_way_back(
    few: RunDirectory, copied: Callable[[RunDirectory], RunDirectory], capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(few)
    document = distill(run, force=True)
    assert not is_same(run, few)
    show(document)
    assert f"labelwise finetune --run {run.path}" in capsys.readouterr().out
    with pytest.raises(UsageError, match="its classifier is distilled already; `labelwise finetune`"):
        distill(run, force=True)
    finetune(FinetuneSettings(run=run.path, methods=("simclr",), label_counts=("all",), steps=2))
    assert is_same(run, few)
    assert rundir.read_json(run.classifier_json) == rundir.read_json(few.classifier_json)


@pytest.mark.parametrize(
    ("gain", "force", "done", "words"),
    [
        (gained(0.1), False, True, ""),
        (gained(0.01), False, False, "no gain is shown; --force distills all the same"),
        (gained(0.01), True, True, ""),
        (gained(-0.1), False, False, "distilling hurts here"),
        (gained(-0.1), True, False, "distilling hurts here"),
    ],
)
def test_it_is_done_where_it_is_shown_to_help_and_never_where_it_hurts(
    few: RunDirectory,
    copied: Callable[[RunDirectory], RunDirectory],
    monkeypatch: pytest.MonkeyPatch,
    gain: Interval,
    force: bool,
    done: bool,
    words: str,
) -> None:
    run = copied(few)
    before = contents(run)
    monkeypatch.setattr(distilling, "_estimate", lambda *_: gain)
    document = distill(run, force=force)
    assert document["distilled"] == done
    assert document["gain"]["mean"] == gain.mean
    assert (contents(run) == before) != done
    assert words in (document["reason"] or "")


def test_the_gain_is_measured_on_labels_that_no_graph_and_no_training_held(
    enough: RunDirectory, copied: Callable[[RunDirectory], RunDirectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copied(enough)
    teach, seen = distilling._teach, []

    def spy(bench: Any, pool: Any, rows: Any, chances: Any) -> Any:
        seen.append((bench, pool, rows))
        return teach(bench, pool, rows, chances)

    monkeypatch.setattr(distilling, "_teach", spy)
    monkeypatch.setattr(distilling, "_why_not", lambda *_, **__: "not now")
    gain = distill(run)["gain"]
    assert -1 <= gain["low"] < gain["mean"] < gain["high"] <= 1
    assert len(seen) == 5
    tested = []
    for bench, pool, rows in seen:
        held = np.setdiff1d(bench.labeled, rows)
        assert not set(bench.groups[held]) & set(bench.groups[pool])
        assert set(rows) <= set(pool)
        assert not set(bench.test) & set(pool)
        tested += held.tolist()
    assert sorted(tested) == sorted(seen[0][0].labeled.tolist())


def test_where_every_image_has_a_label_nothing_is_left_to_distill_from(
    classified: RunDirectory, copied: Callable[[RunDirectory], RunDirectory]
) -> None:
    run = copied(classified)
    before = contents(run)
    with pytest.raises(DataError, match="have a label; nothing is left to distill from"):
        distill(run, force=True)
    assert contents(run) == before


def test_a_classifier_of_other_labels_is_not_distilled_with_these(
    few: RunDirectory, copied: Callable[[RunDirectory], RunDirectory], tmp_path: Path
) -> None:
    run = copied(few)
    labels = few.path.parent / "labels.csv"
    text, changed = labels.read_text(), tmp_path / "labels.csv"
    changed.write_text(text.replace(",3\n", ",4\n", 1))
    run.config.write_text(run.config.read_text().replace(str(labels), str(changed)))
    with pytest.raises(UsageError, match="its classifier was trained with other labels"):
        distill(run, force=True)


def test_without_a_classifier_it_says_what_makes_one(
    pretrained: RunDirectory, copied: Callable[[RunDirectory], RunDirectory]
) -> None:
    with pytest.raises(UsageError, match="has no classifier yet; `labelwise finetune"):
        distill(copied(pretrained))


def test_a_signal_leaves_the_classifier_as_it_was(
    few: RunDirectory, copied: Callable[[RunDirectory], RunDirectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copied(few)
    before, measure = contents(run), distilling._test

    def interrupted(*given: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return measure(*given)

    monkeypatch.setattr(distilling, "_test", interrupted)
    with pytest.raises(Interrupted, match="the classifier is as it was") as caught:
        distill(run, force=True)
    assert caught.value.exit_code == 128 + signal.SIGTERM
    assert contents(run) == before


def test_a_disk_that_is_full_leaves_the_classifier_as_it_was(
    few: RunDirectory, copied: Callable[[RunDirectory], RunDirectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copied(few)
    before = contents(run)

    def fill(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", str(run.path))

    monkeypatch.setattr(distilling, "_test", lambda *_: monkeypatch.setattr(Path, "write_text", fill))
    with pytest.raises(OSError, match="No space left"):
        distill(run, force=True)
    monkeypatch.undo()
    assert contents(run) == before


def test_a_teacher_that_knows_the_classes_teaches_them(
    few: RunDirectory, copied: Callable[[RunDirectory], RunDirectory]
) -> None:
    run = copied(few)
    bench = set_up_bench(run, remember_sources(run, FinetuneSettings(run=run.path)))
    truth = np.array([bench.classes.index(bench.names[row].partition("/")[0]) for row in bench.pool])
    apart = np.eye(10, dtype=np.float32)[truth]
    noise = np.random.default_rng(0).normal(size=apart.shape)
    features = np.zeros((len(bench.names), 10), np.float32)
    features[bench.pool] = apart + 0.1 * noise
    bench = dataclasses.replace(bench, features={"encoder": features, "network": features})
    wrong = np.full_like(apart, 0.1)  # says nothing; the labels and the graph must
    student = distilling._teach(bench, bench.pool, bench.labeled, wrong)
    assert (student.logits(features[bench.pool]).argmax(axis=1) == truth).mean() == 1


def test_with_classes_of_unlike_size_the_mean_over_classes_is_told(
    few: RunDirectory, copied: Callable[[RunDirectory], RunDirectory]
) -> None:
    run = copied(few)
    bench = set_up_bench(run, remember_sources(run, FinetuneSettings(run=run.path)))
    bench = dataclasses.replace(bench, test=bench.test[9:], unbalanced=True)
    start, _, _ = load_classifier(run)
    chances = probabilities_of(start, bench.cache, bench.pool, bench.spec.normalization, bench.device)
    student = distilling._teach(bench, bench.pool, bench.labeled, chances)
    test = distilling._test(bench, start, student)
    assert test is not None
    truth = bench.labels[bench.test]
    right = student.logits(bench.features["encoder"][bench.test]).argmax(axis=1) == truth
    assert test["after"] == pytest.approx(np.mean([right[truth == each].mean() for each in set(truth)]))
    assert test["accuracy"] == pytest.approx(right.mean())
    assert "test images right, mean over classes, " in distilled_in_words(test)


def test_the_command_prints_one_document_and_writes_the_report(
    few: RunDirectory, copied: Callable[[RunDirectory], RunDirectory], capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(few)
    app(["distill", "--run", str(run.path), "--force", "--json"], standalone_mode=False)
    document = json.loads(capsys.readouterr().out)
    assert document["distilled"]
    assert document["images"] > document["labels"] == 10 * FEW
    assert rundir.read_json(run.report_json)["distilled"]["test"] == document["test"]


@pytest.mark.slow
def test_without_test_images_none_are_used(
    tmp_path: Path, some_digits: Callable[[Path, int], Path], small_network: dict[str, Any]
) -> None:
    images = some_digits(tmp_path / "images", 12)
    pretrain(PretrainSettings(images=images, out=tmp_path / "first", holdout=0, **small_network))
    run = with_labels(RunDirectory(tmp_path / "first"), tmp_path, FEW)
    assert distill(run, force=True)["test"] is None
    report(run)
    verify(run)
    assert "distilled from one of these: it was not tested itself" in run.model_card.read_text()
    assert predict(run, [images], tmp_path / "out.csv")["expected"] is None
