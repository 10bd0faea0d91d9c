"""Which images to label next: never one that is tested, labeled or a copy of such; the first of many are the answer for few."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from labelwise import rundir
from labelwise.cli import app
from labelwise.config import to_toml
from labelwise.errors import DataError, UsageError
from labelwise.rundir import RunDirectory
from labelwise.stages import suggesting
from labelwise.stages.reporting import report
from labelwise.stages.suggesting import ENOUGH, show, suggest

HOSTILE = ("=1+1.png", "-2.png", "@x.png", "<b>&.png", '"q".png')


@pytest.fixture(scope="module")
def unlabeled(
    tmp_path_factory: pytest.TempPathFactory,
    some_digits: Callable[[Path, int], Path],
    small_network: dict[str, Any],
    pretrain_there: Callable[..., RunDirectory],
) -> RunDirectory:
    """An encoder of one epoch, of digits in one flat folder: some with strange names, each third one there twice."""
    folder = tmp_path_factory.mktemp("suggesting")
    files = sorted(some_digits(folder / "digits", 12).glob("*/*.png"))
    (folder / "images").mkdir()
    names = [*HOSTILE, *(file.name for file in files[len(HOSTILE) :])]
    for number, (name, file) in enumerate(zip(names, files, strict=True)):
        shutil.copy(file, folder / "images" / name)
        if number % 3 == 0:
            shutil.copy(file, folder / "images" / f"copy-{number}.png")
        if number % 8 == 7:
            (folder / "test").mkdir(exist_ok=True)
            shutil.copy(file, folder / "test" / file.name)
    return pretrain_there(folder, test=folder / "test", **small_network)


def files_of(document: dict[str, Any]) -> list[str]:
    return [each["file"] for each in document["suggestions"]]


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def give_labels(run: RunDirectory, names: list[str]) -> Path:
    """Let the run remember a label file of these images, as after a comparison."""
    file = run.path.parent / "labels.csv"
    with file.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows(
            [["file", "label"], *([name, str(row % 2)] for row, name in enumerate(names))]
        )
    remember(run, file)
    return file


def remember(run: RunDirectory, file: Path) -> None:
    pretraining = run.config.read_text().split("[finetune]")[0]
    run.config.write_text(pretraining + to_toml({"finetune": {"labels": str(file)}}))


def pixels_of(run: RunDirectory, name: str) -> bytes:
    return (Path(rundir.read_json(run.data)["root"]) / name).read_bytes()


def test_no_image_is_suggested_that_is_tested_or_twice_there(run: RunDirectory) -> None:
    found = files_of(suggest(run, 1000))
    lock = rundir.read_json(run.test_lock)
    tested = {file.read_bytes() for file in Path(rundir.read_json(run.data)["sources"]["test"]).iterdir()}
    assert lock["excluded_duplicates"]
    suggested = [pixels_of(run, name) for name in found]
    assert len(set(suggested)) == len(suggested)
    assert tested.isdisjoint(suggested)
    everything = {file.read_bytes() for file in Path(rundir.read_json(run.data)["root"]).iterdir()}
    assert len(suggested) == len(everything) - len(tested)


def test_no_image_is_suggested_that_has_a_label_or_is_a_copy_of_one(run: RunDirectory) -> None:
    free = files_of(suggest(run, 1000))
    pixels = {pixels_of(run, name) for name in free}
    folder = Path(rundir.read_json(run.data)["root"])
    labeled = [file.name for file in folder.glob("copy-*") if file.read_bytes() in pixels]
    assert set(labeled).isdisjoint(free), "another of each two is suggested"
    give_labels(run, [*labeled, rundir.read_json(run.test_lock)["excluded_duplicates"][0]])
    document = suggest(run, 1000)
    assert document["labels"] == len(labeled) > 0
    known = {pixels_of(run, name) for name in labeled}
    assert known.isdisjoint(pixels_of(run, name) for name in files_of(document))
    assert len(files_of(document)) == len(free) - len(known)


@pytest.mark.parametrize("labels", [0, 15])
def test_the_first_of_more_are_the_answer_for_fewer(run: RunDirectory, labels: int) -> None:
    if labels:
        give_labels(run, files_of(suggest(run, labels)))
    most = suggest(run, 50)["suggestions"]
    assert suggest(run, 20)["suggestions"] == most[:20]
    assert [each["rank"] for each in most] == list(range(1, 51))


def test_what_a_classifier_doubts_comes_first_once_it_knows_enough(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suggesting, "SURE", 0.0)
    names = files_of(suggest(run, 2 * ENOUGH))
    give_labels(run, names[1:])
    assert all(each["why"].startswith(("typical of", "like no")) for each in suggest(run, 30)["suggestions"])
    give_labels(run, names)
    suggestions = suggest(run, 30)["suggestions"]
    assert suggest(run, 10)["suggestions"] == suggestions[:10]
    shares = [[int(share) for share in re.findall(r"\((\d+)%\)", each["why"])] for each in suggestions]
    assert all(first + second in (99, 100, 101) for first, second in shares)
    assert shares == sorted(shares)
    assert {row["cluster"] for row in rows_of(run.suggestions)} == {""}


@pytest.mark.parametrize(("wrong", "doubts"), [(0, True), (2, True), (9, False)])
def test_a_classifier_that_is_wrong_too_often_is_not_asked(wrong: int, doubts: bool) -> None:
    rng = np.random.default_rng(0)
    truth = np.arange(120) % 2
    features = rng.normal(size=(120, 8)).astype(np.float32) + 6 * truth[:, None].astype(np.float32)
    labels = [str(1 - each) if row < wrong else str(each) for row, each in enumerate(truth)]
    known = [label if row < 2 * ENOUGH else None for row, label in enumerate(labels)]
    chosen = suggesting._choose(features, known, 5)
    assert [why.endswith("?") for _, why, _ in chosen] == [doubts] * 5
    assert all(place >= 2 * ENOUGH for place, _, _ in chosen)


def test_labels_written_beside_the_suggestions_count_the_next_time(run: RunDirectory, tmp_path: Path) -> None:
    everything = suggest(run, 1000)
    rows = rows_of(Path(everything["out"]))
    hostile = {f"./{name}" for name in HOSTILE if name[0] in "=-@"}
    assert hostile & {row["file"] for row in rows}, "escaped as in every table"
    assert list(rows[0]) == ["rank", "file", "why", "cluster"]
    labeled = [row for row in rows if row["file"].startswith("./") or row in rows[:10]]
    with (tmp_path / "mine.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, [*rows[0], "label"])
        writer.writeheader()
        writer.writerows({**row, "label": str(number % 2)} for number, row in enumerate(labeled))
    remember(run, tmp_path / "mine.csv")
    document = suggest(run, 1000)
    names = {row["file"].removeprefix("./") for row in labeled}
    assert document["labels"] == len(names)
    assert names.isdisjoint(files_of(document))
    assert document["next"] == (
        f"labelwise annotate --run {run.path}, a page that asks about them; or add them to {tmp_path / 'mine.csv'}; then labelwise finetune --run {run.path} --labels {tmp_path / 'mine.csv'}."
    )


def test_labels_given_since_the_last_comparison_count(run: RunDirectory, tmp_path: Path) -> None:
    names = files_of(suggest(run, 30))
    file = give_labels(run, names[:10]).rename(tmp_path / "earlier.csv")
    remember(run, file)
    later = give_labels(run, names[:20])
    remember(run, file)
    assert suggest(run, 5)["labels"] == 10
    before = run.config.read_text()
    document = suggest(run, 5, labels=later)
    assert document["labels"] == 20
    assert f"finetune --run {run.path} --labels {later}" in document["next"]
    assert run.config.read_text() == before


def test_what_was_suggested_is_remembered_once_and_in_order(run: RunDirectory, tmp_path: Path) -> None:
    for budget, out in ((5, None), (5, tmp_path / "again.csv"), (7, None)):
        suggest(run, budget, out)
    found = rundir.read_jsonl(run.suggested)
    assert [each["budget"] for each in found] == [5, 7]
    assert found[1]["files"] == files_of(suggest(run, 7))
    assert found[0]["files"] == found[1]["files"][:5]
    assert {each["as_if_unlabeled"] for each in found} == {False}


def test_a_table_that_somebody_wrote_labels_into_is_not_written_over(run: RunDirectory) -> None:
    suggest(run, 5)
    suggest(run, 6)
    table = run.suggestions.read_text().replace("cluster", "cluster,label")
    run.suggestions.write_text(table)
    with pytest.raises(UsageError, match=r"suggestions\.csv: holds more than `labelwise suggest` wrote"):
        suggest(run, 5)
    assert run.suggestions.read_text() == table


def test_a_table_elsewhere_has_its_page_beside_it_and_harms_nothing(
    run: RunDirectory, tmp_path: Path
) -> None:
    images = Path(rundir.read_json(run.data)["root"])
    suggest(run, 5, tmp_path / "mine.csv")
    assert len(rows_of(tmp_path / "mine.csv")) == 5
    assert (tmp_path / "mine.html").exists()
    assert not run.suggestions.exists()
    (tmp_path / "page.html").write_text("mine")
    for target, words in (
        (tmp_path / "mine.csv", "is there already"),
        (tmp_path / "page.csv", "is there already"),
        (tmp_path / "mine.parquet", r"name a \.csv file"),
        (images / "mine.csv", "lies inside the image folder"),
    ):
        with pytest.raises(UsageError, match=words):
            suggest(run, 5, target)
    assert (tmp_path / "page.html").read_text() == "mine"


def test_the_page_shows_each_image_and_runs_nothing(run: RunDirectory) -> None:
    document = suggest(run, 1000)
    page = Path(document["page"]).read_text()
    assert "default-src 'none'" in page
    assert page.count("<img ") == len(document["suggestions"])
    assert "<script" not in page
    assert "<b>&" not in page
    if "<b>&.png" in files_of(document):
        assert "&lt;b&gt;&amp;.png" in page


def test_a_set_with_all_labels_is_taken_as_if_it_had_none_and_that_is_said(
    pretrained: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDirectory(Path(shutil.copytree(pretrained.path, tmp_path / "run")))
    document = suggest(run, 10)
    assert document["as_if_unlabeled"]
    assert document["labels"] == 0
    assert len(document["suggestions"]) == 10
    show(document)
    shown = capsys.readouterr().out
    assert "every image has a label already: chosen as if none had, for study" in shown
    assert "labelwise finetune --run" in shown
    assert "drawn at random" not in shown, "there is no curve yet"


def test_what_more_labels_bring_is_read_off_the_curve(run: RunDirectory) -> None:
    give_labels(run, files_of(suggest(run, 40)))
    row = {
        "fraction": None, "seed": 0, "n_test": 100, "labels_there": 40, "balanced": True, "seconds": 1.0,
        "draw_sha256": "", "signature": "", "method": "simclr",
    }  # fmt: skip
    curve = [(10, 0, 0.4), (10, 1, 0.6), (40, 0, 0.7)]
    rundir.rewrite_jsonl(
        run.results,
        [{**row, "labels": count, "draw": draw, "accuracy": score} for count, draw, score in curve],
    )
    document = suggest(run, 40)
    expected = document["expected"]
    assert expected["before"] == pytest.approx(0.7)
    assert expected["after"] == pytest.approx(0.8)  # ten points for each doubling
    (words,) = (note for note in document["notes"] if "points" in note)
    assert words == (
        "40 more labels: about +10.0 points, 80.0% instead of 70.0%, read off the curve of the last comparison (drawn on beyond its end "
        "at 40, which is rather too much): labels drawn at random; chosen ones may do better or worse"
    )


def test_where_few_labels_are_there_annotate_is_the_next_step(
    run: RunDirectory,
    pretrained: RunDirectory,
    small_network: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "small.toml").write_text(to_toml({"pretrain": small_network}))
    for each, is_named in ((run, True), (pretrained, False)):
        sources = rundir.read_json(each.data)["sources"]
        test = ["--test", sources["test"]] if sources["test"] else []
        recipe = ["--recipe", str(tmp_path / "small.toml"), "--out", str(each.path)]
        app(["pretrain", sources["images"], *test, *recipe], standalone_mode=False)  # it is there
        *first, last = (line for line in capsys.readouterr().out.splitlines() if line.startswith("next: "))
        words = f"labelwise annotate --run {each.path}: a page to label images on, those that matter most"
        assert first == ([f"next: {words}"] if is_named else [])
        assert last.startswith(f"next: labelwise finetune --run {each.path} ")
    assert (
        report(run)["next"][0]
        == f"labelwise annotate --run {run.path}: a page to label images on, those that matter most"
    )


def test_where_nothing_is_left_to_label_that_is_said(run: RunDirectory) -> None:
    give_labels(run, files_of(suggest(run, 1000)))
    with pytest.raises(DataError, match="no image is left to label"):
        suggest(run, 5)


def test_the_command_prints_one_document(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    app(["suggest", "--run", str(run.path), "--budget", "7", "--json"], standalone_mode=False)
    document = json.loads(capsys.readouterr().out)
    assert [row["file"].removeprefix("./") for row in rows_of(run.suggestions)] == files_of(document)
    assert len(files_of(document)) == 7
    assert any("test images have no label" in note for note in document["notes"])
