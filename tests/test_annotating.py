"""Labels from a page: what is asked and in which order, what is kept, and that nothing of it is lost."""

import csv
import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from browser import open_browser
from PIL import Image

from labelwise import rundir
from labelwise.annotations import add_annotations, read_annotations, served
from labelwise.cli import app
from labelwise.config import FinetuneSettings
from labelwise.errors import CheckpointError, DataError, ResourceError, UsageError
from labelwise.images.decoding import UnreadableImage
from labelwise.images.label_studio import write_label_studio
from labelwise.images.labels import read_label_table
from labelwise.images.pictures import read_picture
from labelwise.models.weights import read_spec
from labelwise.rundir import RunDirectory
from labelwise.stages.annotating import _announce, annotate, open_session
from labelwise.stages.asking import OutdatedError, Session, check_class, precision_in_words
from labelwise.stages.benching import open_decoded, set_up_bench
from labelwise.stages.repeating import finetune
from labelwise.stages.reporting import report
from labelwise.stages.suggesting import suggest
from labelwise.stages.transferring import export_labels, import_labels


@pytest.fixture(scope="module")
def unlabeled(
    tmp_path_factory: pytest.TempPathFactory,
    some_digits: Callable[[Path, int], Path],
    small_network: dict[str, Any],
    pretrain_there: Callable[..., RunDirectory],
) -> RunDirectory:
    """An encoder of one epoch, of digits in one flat folder; a name ends with what it shows."""
    folder = tmp_path_factory.mktemp("annotating")
    (folder / "images").mkdir()
    for file in sorted(some_digits(folder / "digits", 9).glob("*/*.png")):
        shutil.copy(file, folder / "images" / f"{file.stem}-{file.parent.name}.png")
    return pretrain_there(folder, **small_network)


def truth(state: dict[str, Any]) -> str:
    """What the image that is asked about shows."""
    return str(state["file"]).removesuffix(".png")[-1]


def start(run: RunDirectory, tests: int = 6, budget: int = 5, classes: tuple[str, ...] = ()) -> Session:
    return open_session(run, tests, budget, classes, "tester")[0]


def reply(session: Session, answer: str = "label", label: str | None = None) -> dict[str, Any]:
    """Answer what is asked now."""
    state = session.state({})
    given = {"number": state["number"], "key": state["key"], "answer": answer, "seconds": 1.25}
    return session.answer({**given, "label": label or (truth(state) if answer == "label" else None)})


def undo(session: Session) -> dict[str, Any]:
    return session.undo({"last": session.state({})["last"]})


def own_images(run: RunDirectory, tmp_path: Path) -> Path:
    """Give a run a copy of its images to change."""
    images = tmp_path / "images"
    shutil.copytree(rundir.read_json(run.data)["root"], images)
    data = rundir.read_json(run.data)
    data["sources"]["images"] = data["root"] = str(images)
    rundir.write_json(run.data, data)
    return images


def lines(run: RunDirectory) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.annotations.read_text(encoding="utf-8").splitlines()]


def test_test_images_come_first_and_nothing_sways_the_answer(run: RunDirectory) -> None:
    locked = set(rundir.read_json(run.test_lock)["names"])
    session = start(run)
    asked = []
    while (state := session.state({}))["number"] is not None:
        asked.append(state["file"])
        is_test = len(asked) <= 6
        assert (state["part"] == "test") is is_test is (state["file"] in locked)
        if is_test:
            assert state["guess"] is None
            assert state["neighbours"] == []
        elif len(asked) > 7:
            assert state["guess"]["by"] == "neighbours"
            assert len(state["neighbours"]) == min(5, len(asked) - 7)
            assert not {each["file"] for each in state["neighbours"]} & locked
        reply(session)
    with run.suggestions.open(newline="", encoding="utf-8") as file:
        suggested = [row["file"] for row in csv.DictReader(file)]
    assert asked[6:] == suggested
    assert [(row["file"], row["label"], row["part"]) for row in lines(run)] == [
        (name, name[-5], "test" if place < 6 else "suggested") for place, name in enumerate(asked)
    ]
    assert {row["who"] for row in lines(run)} == {"tester"}
    assert {row["seconds"] for row in lines(run)} == {1.2}


def test_the_sample_is_random_and_always_the_same(run: RunDirectory) -> None:
    locked = rundir.read_json(run.test_lock)["names"]
    session = start(run, tests=10_000, budget=0)
    asked = []
    while (state := session.state({}))["number"] is not None:
        asked.append(state["file"])
        reply(session)
    assert sorted(asked) == sorted(locked)
    assert asked != locked
    assert truth(start(run, tests=10_000, budget=0).state({}) | {"file": asked[0]}) == asked[0][-5]
    shutil.rmtree(run.path / "annotations.jsonl", ignore_errors=True)
    run.annotations.unlink()
    assert start(run, tests=3, budget=0).state({})["file"] == asked[0]


def test_an_answer_is_on_the_disk_before_the_next_image_shows(run: RunDirectory) -> None:
    session = start(run)
    for count in range(1, 5):
        reply(session)
        assert len(lines(run)) == count
    assert start(run).state({})["file"] == session.state({})["file"]


def test_undo_asks_again_also_after_a_new_start(run: RunDirectory) -> None:
    session = start(run)
    first = session.state({})["file"]
    reply(session, label="wrong")
    assert undo(session)["file"] == first
    reply(session)
    session = start(run)
    assert session.state({})["file"] != first
    assert undo(session)["file"] == first
    assert undo(session)["last"] is None
    assert [row["answer"] for row in lines(run)] == ["label", "undo", "label", "undo"]
    assert not read_annotations(run)


def test_what_is_skipped_comes_again_next_time_what_is_not_sure_does_not(run: RunDirectory) -> None:
    session = start(run, tests=3, budget=0)
    skipped, unsure, named = [
        (session.state({})["file"], reply(session, answer))[0] for answer in ("skip", "unsure", "label")
    ]
    assert session.state({})["number"] is None
    assert session.state({})["parts"][0] | {"words": ""} == {
        "part": "test", "of": 3, "labels": 1, "unsure": 1, "skipped": 1, "words": "",
    }  # fmt: skip
    again = start(run, tests=3, budget=0)
    assert again.state({})["file"] == skipped
    reply(again)
    assert again.state({})["number"] is None
    assert {said.file: said.label for said in read_annotations(run)} == {
        skipped: skipped[-5], unsure: None, named: named[-5],
    }  # fmt: skip


def test_answers_that_are_none_are_refused_and_nothing_is_kept(run: RunDirectory) -> None:
    session = start(run)
    key = session.state({})["key"]
    for given in (
        {},
        {"number": 0, "answer": "skip", "key": None},
        {"number": 1, "answer": "skip"},  # which is another image
        {"number": -1, "answer": "skip"},
        {"number": 10_000, "answer": "skip"},
        {"number": True, "answer": "skip"},
        {"number": "0", "answer": "skip"},
        {"number": 0, "answer": "maybe"},
        {"number": 0, "answer": "label"},
        {"number": 0, "answer": "label", "label": " "},
        {"number": 0, "answer": "label", "label": "x" * 101},
        {"number": 0, "answer": "label", "label": "a\nb"},
        {"number": 0, "answer": "label", "label": "cat,dog"},
        {"number": 0, "answer": "label", "label": ["cat"]},
    ):
        with pytest.raises(ValueError, match=r"^((number|answer|label): |Since a new start)"):
            session.answer({"key": key, **given})
    assert not run.annotations.exists()
    for seconds, kept in (
        (-1, None),
        (1e9, 86400.0),
        ("1", None),
        (None, None),
        (True, None),
        (float("nan"), None),
    ):
        session.answer({"number": 0, "key": key, "answer": "skip", "seconds": seconds})
        assert lines(run)[-1]["seconds"] == kept


def test_a_class_that_a_folder_has_can_be_chosen_whatever_its_name_is(run: RunDirectory) -> None:
    session = start(run)
    session._classes["black, white"] = None
    assert reply(session, label="black, white")["number"] == 1
    with pytest.raises(ValueError, match="several in one"):
        reply(session, label="black, red")


def test_what_is_not_sure_is_not_chosen_again(run: RunDirectory) -> None:
    session = start(run, tests=0, budget=4)
    unsure = [(session.state({})["file"], reply(session, "unsure"))[0] for _ in range(4)]
    session = start(run, tests=0, budget=4)
    fresh = set()
    while (state := session.state({}))["number"] is not None:
        fresh.add(state["file"])
        reply(session, "unsure")
    assert len(fresh) == 4
    assert not fresh & set(unsure)


def test_what_is_skipped_comes_again_before_others_are_chosen(run: RunDirectory) -> None:
    session = start(run, tests=0, budget=3)
    skipped = session.state({})["file"]
    reply(session, "skip")
    reply(session)
    reply(session)
    session = start(run, tests=0, budget=3)
    assert session.state({})["file"] == skipped
    assert reply(session)["number"] is None
    assert start(run, tests=0, budget=3).state({})["parts"][1]["labels"] == 0


def test_more_suggestions_than_the_budget_are_asked_in_turns(run: RunDirectory) -> None:
    suggest(run, 5)
    table = run.suggestions.read_bytes()
    counts = []
    for _ in range(2):
        reply(start(run, tests=0, budget=2))
        session = start(run, tests=0, budget=2)
        reply(session)
        assert session.state({})["number"] is None
        counts.append(session.labeled())
    assert counts == [2, 2]
    assert start(run, tests=0, budget=2).state({})["parts"][1]["of"] == 1
    assert run.suggestions.read_bytes() == table


def test_suggestions_that_were_changed_give_no_test_image_and_none_twice(run: RunDirectory) -> None:
    locked = rundir.read_json(run.test_lock)["names"]
    suggest(run, 3)
    rows = run.suggestions.read_text(encoding="utf-8").splitlines()
    run.suggestions.write_text("\n".join([*rows, rows[1], f"5,{locked[0]},why,", "6,gone.png"]))
    session = start(run, tests=10_000, budget=10)
    assert [each["of"] for each in session.state({})["parts"]] == [len(locked), 3]
    for nonsense in (b"rank;file;why\n1;a.png;b\n", b"rank,file,why\n1,\xff.png,b\n"):
        run.suggestions.write_bytes(nonsense)
        with pytest.raises(DataError, match=r"suggestions.csv: not as `labelwise suggest` wrote it"):
            start(run)


def test_neighbours_are_looked_for_in_all_classes(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("labelwise.stages.annotating._MOST_NEIGHBOURS", 8)
    names = sorted(path.name for path in Path(rundir.read_json(run.data)["root"]).iterdir())
    rows = [f"{name},{'first' if place < 60 else 'last'}" for place, name in enumerate(names[:120])]
    (tmp_path / "labels.csv").write_text("\n".join(["file,label", *rows]))
    run.config.write_text(f'{run.config.read_text()}\n[finetune]\nlabels = "{tmp_path / "labels.csv"}"\n')
    session = start(run, tests=0, budget=3)
    labels = [session._images.labels[row] for row in session._hints.rows]
    assert {"first", "last"} <= set(labels)


def test_a_class_that_only_test_images_have_is_said(run: RunDirectory) -> None:
    session = start(run, tests=2, budget=1)
    reply(session, label="rare")
    reply(session, label="common")
    assert session.state({})["untrained"] == ["rare", "common"]
    assert reply(session, label="common")["untrained"] == ["rare"]


def test_a_run_that_was_removed_does_not_come_back(run: RunDirectory) -> None:
    session = start(run)
    shutil.rmtree(run.path)
    with pytest.raises(CheckpointError, match="this run is gone; nothing was kept"):
        reply(session)
    assert not run.path.exists()


def test_a_line_torn_by_a_power_cut_is_asked_again(run: RunDirectory) -> None:
    session = start(run)
    reply(session)
    second = session.state({})["file"]
    reply(session)
    text = run.annotations.read_bytes()
    run.annotations.write_bytes(text[:-20])
    session = start(run)
    assert session.state({})["file"] == second
    reply(session)
    assert [row["file"] for row in lines(run)][1:] == [second]


def test_a_class_is_one_that_label_files_can_hold() -> None:
    assert check_class("  Zoe\u0308 ") == "Zo\u00eb"
    assert check_class("=1+1") == "=1+1"
    for name in ("", " ", "a;b", "a|b", '["a"]', "\u202e", "a\0", 7, None):
        with pytest.raises(ValueError, match=r"^label: "):
            check_class(name)


def test_a_class_keeps_its_place_from_start_to_start(run: RunDirectory) -> None:
    session = start(run, tests=6, budget=0)
    for label in ("pants", "shirt", "dress", "shirt"):
        reply(session, label=label)
    order = [each["name"] for each in session.state({})["classes"]]
    assert order == ["pants", "shirt", "dress"]
    undo(session)
    assert session.state({})["last"]["said"] == "dress"
    again = start(run, tests=6, budget=0)
    reply(again, label="pants")
    assert [each["name"] for each in again.state({})["classes"]] == order
    assert [
        each["name"] for each in start(run, tests=6, budget=0, classes=("dress",)).state({})["classes"]
    ] == ["dress", "pants", "shirt"]


def test_classes_keep_their_keys_whatever_comes_later(run: RunDirectory, tmp_path: Path) -> None:
    def shown(**more: Any) -> list[str]:
        return [each["name"] for each in start(run, **more).state({})["classes"]]

    assert shown(classes=("shrit", "dress")) == ["shrit", "dress"]
    session = start(run, classes=("shirt", "dress"))
    reply(session, label="pants")
    names = rundir.read_json(run.test_lock)["names"]
    (tmp_path / "labels.csv").write_text(f"file,label\n{names[0]},another\n")
    run.config.write_text(f'{run.config.read_text()}\n[finetune]\nlabels = "{tmp_path / "labels.csv"}"\n')
    assert shown() == ["shirt", "dress", "pants", "another"]
    assert shown(classes=("pants",)) == ["pants", "shirt", "dress", "another"], "asked for"


def test_a_class_that_was_mistyped_goes_when_it_is_taken_back(run: RunDirectory) -> None:
    session = start(run, classes=("shirt", "dress"))
    for label in ("shrit", "dress", "pnats"):
        reply(session, label=label)
    undo(session)
    assert [each["name"] for each in session.state({})["classes"]] == ["shirt", "dress", "shrit"]
    undo(session)
    assert [each["name"] for each in undo(session)["classes"]] == ["shirt", "dress"], "those named stay"
    reply(session, label="pnats")
    reply(session, label="coat")
    session.undo({"last": session.state({})["last"]})
    reply(session, label="pnats")
    undo(session)
    assert [each["name"] for each in start(run).state({})["classes"]] == ["shirt", "dress", "pnats"]


def test_a_class_is_spelled_as_its_folder_is(run: RunDirectory) -> None:
    session = start(run, classes=("shirt",))
    session._classes["cafe\u0301"] = None  # as macOS names folders
    reply(session, label="caf\u00e9")
    assert lines(run)[0]["label"] == "cafe\u0301"


def test_an_order_of_classes_that_is_damaged_is_made_anew(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    reply(start(run, classes=("a", "b")), label="b")
    for damage in ("{", "[]", '{"classes": [1]}'):
        run.classes.write_text(damage)
        assert [each["name"] for each in start(run).state({})["classes"]] == ["b"]
        assert "classes.json: damaged" in capsys.readouterr().err
    reply(start(run), label="c")
    assert rundir.read_json(run.classes) == {"classes": ["b", "c"]}


def test_an_import_is_refused_while_the_page_asks(run: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text(f"file,label\n{start(run).state({})['file']},x\n")
    with served(run), pytest.raises(UsageError, match="asks about it already"):
        import_labels(run, tmp_path / "labels.csv")
    assert not read_annotations(run)


def test_an_imported_label_of_a_test_image_that_was_moved_is_for_testing(
    run: RunDirectory, tmp_path: Path
) -> None:
    images = own_images(run, tmp_path)
    (images / rundir.read_json(run.test_lock)["names"][0]).rename(images / "elsewhere.png")
    (tmp_path / "labels.csv").write_text("file,label\nelsewhere.png,x\n")
    assert "1 of them of test images" in import_labels(run, tmp_path / "labels.csv")


def test_two_pages_are_asked_about_different_images(run: RunDirectory) -> None:
    session = start(run, tests=4, budget=0)
    one, other = session.state({"page": "one"}), session.state({"page": "other"})
    assert (one["number"], other["number"]) == (0, 1)
    assert session.state({"page": "one"})["number"] == 0, "loaded anew"

    def answer(page: str, state: dict[str, Any], label: str) -> dict[str, Any]:
        given = {"page": page, "number": state["number"], "key": state["key"], "answer": "label"}
        return session.answer({**given, "label": label, "seconds": 1})

    one = answer("one", one, "mine")
    assert one["number"] == 2
    other = answer("other", other, "yours")
    with pytest.raises(OutdatedError, match="It is answered already: yours"):
        answer("one", {"number": 1, "key": str(lines(run)[1]["key"])}, "late")
    assert one["last"]["said"] == "mine"
    undone = session.undo({"page": "one", "last": one["last"]})
    assert (undone["number"], undone["last"]) == (0, None)
    with pytest.raises(OutdatedError, match="another answer now"):
        session.undo({"page": "one", "last": one["last"]})
    assert [(each.label, each.answer) for each in read_annotations(run)] == [("yours", "label")]
    answer("one", undone, "mine")
    session.state({"page": "gone"})
    left = session.state({"page": "one"})
    while left["number"] is not None:
        left = answer("one", left, "mine")
    assert len(read_annotations(run)) == 4, "also what a page showed that was closed"


def test_a_label_that_was_imported_is_not_taken_back(run: RunDirectory, tmp_path: Path) -> None:
    first = start(run).state({})["file"]
    (tmp_path / "labels.csv").write_text(f"file,label\n{first},x\n")
    import_labels(run, tmp_path / "labels.csv")
    session = start(run)
    assert session.state({})["parts"][0]["labels"] == 1
    assert session.state({})["last"] is None
    assert undo(session)["parts"][0]["labels"] == 1


def test_an_image_that_has_the_name_of_another_takes_no_label_from_it(
    run: RunDirectory, tmp_path: Path
) -> None:
    images = own_images(run, tmp_path)
    session = start(run, tests=2, budget=0)
    first, second = [(session.state({})["file"], reply(session, label=label))[0] for label in "ab"]
    (images / first).rename(images / "elsewhere.png")
    (images / second).rename(images / first)
    session = start(run, tests=3, budget=0)
    assert session.state({})["parts"][0]["labels"] == 2
    export_labels(run, tmp_path / "two.csv")
    assert {row.path: row.label for row in read_label_table(tmp_path / "two.csv")[0]} == {
        "elsewhere.png": "a",
        first: "b",
    }
    Image.effect_noise((8, 8), 90).save(images / second)
    (tmp_path / "labels.csv").write_text(f"file,label\n{second},c\n")
    assert import_labels(run, tmp_path / "labels.csv").startswith("1 labels taken")
    wanted = {"elsewhere.png": "a", first: "b", second: "c"}

    def said(of: RunDirectory) -> dict[str, str | None]:
        opened, _ = open_decoded(of, FinetuneSettings(run=of.path), read_spec(of.encoder))
        labels = dict(zip(opened.names, opened.labels, strict=True))
        return {name: labels[name] for name in wanted}

    assert said(run) == wanted
    with pytest.raises(DataError, match=r"says 'c' of .*, and 'a' was said before"):
        (tmp_path / "labels.csv").write_text("file,label\nelsewhere.png,c\n")
        import_labels(run, tmp_path / "labels.csv")
    for out in ("labels.csv", "folder"):
        (tmp_path / "labels.csv").unlink(missing_ok=True)
        assert export_labels(run, tmp_path / out).startswith("3 labels written")
    assert {file.name: file.parent.name for file in (tmp_path / "folder").rglob("*.png")} == wanted
    export_labels(run, tmp_path / "again.csv")
    rows, _ = read_label_table(tmp_path / "again.csv")
    assert {row.path: row.label for row in rows} == wanted
    undone = start(run, tests=3, budget=0)
    assert undo(undone)["last"]["said"] == "a"
    assert said(run) == wanted | {first: None}


def test_a_start_that_is_refused_leaves_nothing(run: RunDirectory) -> None:
    with pytest.raises(UsageError, match="--classes: label: 1 to 100 letters"):
        annotate(run, classes=("a", ""), browser=False)
    assert not run.annotations.exists()
    with pytest.raises(DataError, match="every image that could be asked about has a label"):
        annotate(run, test_images=0, budget=0, classes=("a",), browser=False)
    assert not read_annotations(run)
    assert not run.classes.exists()


def test_a_run_that_cannot_be_written_is_said(run: RunDirectory) -> None:
    run.annotations.mkdir()
    with pytest.raises(ResourceError, match=r"cannot be written \(.*\); copy the run"), served(run):
        pass


def test_undo_asks_about_the_image_that_it_takes_back(run: RunDirectory) -> None:
    session = start(run, tests=4, budget=0)
    skipped = session.state({})["file"]
    reply(session, "skip")
    second = session.state({})["file"]
    reply(session)
    session = start(run, tests=4, budget=0)
    assert session.state({})["file"] == skipped
    assert undo(session)["file"] == second
    assert session.state({})["file"] == second, "also when the page is loaded anew"
    assert reply(session)["file"] == skipped


def test_a_picture_is_the_image_that_the_answer_will_be_kept_for(
    run: RunDirectory, tmp_path: Path, photo: Callable[..., Image.Image]
) -> None:
    images = own_images(run, tmp_path)
    photo(tmp_path / "photo.jpg", 1, (4000, 3000)).save(images / "large.jpg")  # training needs fewer pixels
    opened, cache = open_decoded(run, FinetuneSettings(run=run.path), read_spec(run.encoder))
    large, small = opened.names.index("large.jpg"), 0
    assert [read_picture(opened, row, cache)[0] for row in (large, small)] == ["image/jpeg", "image/png"]
    shutil.copy(images / opened.names[1], images / opened.names[small])
    with pytest.raises(UnreadableImage, match="another image is there now"):
        read_picture(opened, small, cache)


def test_classes_that_are_named_come_first(run: RunDirectory) -> None:
    assert [each["name"] for each in start(run, classes=("seven", "two")).state({})["classes"]] == [
        "seven",
        "two",
    ]


@pytest.mark.parametrize(
    ("labels", "planned", "there", "words"),
    [
        (0, 100, 1000, "100 more make an accuracy exact to \u00b110 points"),
        (25, 100, 1000, "an accuracy is exact to \u00b120 points, 75 more make it \u00b110"),
        (100, 100, 171, "an accuracy is exact to \u00b110 points, 71 more make it \u00b17"),
        (100, 100, 170, "an accuracy is exact to \u00b110 points"),
        (2000, 100, 5000, "an accuracy is exact to \u00b12 points"),
        (3, 3, 3, ""),
    ],
)
def test_it_says_how_many_more_make_which_precision(
    labels: int, planned: int, there: int, words: str
) -> None:
    assert precision_in_words(labels, planned, there) == words


def test_labels_of_the_page_are_taken_by_finetune(run: RunDirectory) -> None:
    session = start(run, tests=12, budget=30)
    while session.state({})["number"] is not None:
        reply(session)
    settings = FinetuneSettings(run=run.path, methods=("simclr_probe", "pixels"), label_counts=("all",))
    document = report(finetune(settings))
    assert {result["n_test"] for result in document["results"]} == {12}
    assert {result["labels_there"] for result in document["results"]} == {30}


def test_a_label_goes_where_the_image_goes_and_not_to_another_one(run: RunDirectory, tmp_path: Path) -> None:
    images = own_images(run, tmp_path)
    session = start(run, tests=3, budget=0)
    moved, overwritten, kept = [(session.state({})["file"], reply(session))[0] for _ in range(3)]
    (images / moved).rename(images / "elsewhere.png")
    Image.new("RGB", (8, 8), "red").save(images / overwritten)
    opened, _ = open_decoded(run, FinetuneSettings(run=run.path), read_spec(run.encoder))
    labels = dict(zip(opened.names, opened.labels, strict=True))
    assert labels["elsewhere.png"] == moved[-5]
    assert labels[overwritten] is None
    assert labels[kept] == kept[-5]


def test_what_was_moved_stays_answered_and_what_was_overwritten_is_asked_again(
    run: RunDirectory, tmp_path: Path
) -> None:
    images = own_images(run, tmp_path)
    session = start(run, tests=2, budget=2)
    moved, lost, overwritten, kept = [(session.state({})["file"], reply(session))[0] for _ in range(4)]
    (images / moved).rename(images / "elsewhere.png")
    for angle, name in enumerate((lost, overwritten)):
        Image.linear_gradient("L").resize((8, 8)).rotate(90 * angle).save(images / name)
    state = start(run, tests=1, budget=2).state({})
    assert state["file"] == overwritten
    assert [each["labels"] for each in state["parts"]] == [1, 1]
    assert state["neighbours"][0]["file"] == kept
    assert (
        start(run, tests=1_000, budget=0).state({})["parts"][0]["of"] == 39
    )  # what is lost is no test image now
    (images / "elsewhere.png").rename(images / "first.png")
    session = start(run, tests=1, budget=0)
    assert undo(session)["file"] == "first.png"
    assert start(run, tests=1, budget=0).state({})["file"] == "first.png"


def test_the_test_images_are_those_that_finetune_tests_on(run: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    for number in range(3):
        Image.effect_noise((8, 8), 90).save(tmp_path / "tests" / f"{number}.png")
    run.config.write_text(f'{run.config.read_text()}\n[finetune]\ntest = "{tmp_path / "tests"}"\n')
    session = start(run, tests=10, budget=0)
    asked = []
    while (state := session.state({}))["number"] is not None:
        asked.append(state["file"])
        reply(session)
    assert sorted(asked) == ["test:0.png", "test:1.png", "test:2.png"]


@pytest.mark.parametrize("why", ["moved", "suggested by an earlier version"])
def test_what_was_suggested_is_never_taken_for_a_random_label(
    run: RunDirectory, tmp_path: Path, why: str
) -> None:
    images = tmp_path / "images"
    shutil.copytree(rundir.read_json(run.data)["root"], images)
    data = rundir.read_json(run.data)
    data["sources"]["images"] = data["root"] = str(images)
    rundir.write_json(run.data, data)
    session = start(run, tests=12, budget=30)
    while session.state({})["number"] is not None:
        reply(session)
    asked = [line["file"] for line in lines(run) if line["part"] == "suggested"]
    wanted = set(asked)
    if why == "moved":
        (images / asked[0]).rename(images / "elsewhere.png")
        wanted = {*asked[1:], "elsewhere.png"}
    else:
        run.suggested.unlink()
    for _ in range(2):  # and it is written down once
        bench = set_up_bench(run, FinetuneSettings(run=run.path))
        assert {bench.names[row] for rows in bench.suggested for row in rows} == wanted
    assert len(rundir.read_jsonl(run.suggested)) == (2 if why == "moved" else 1)


def test_a_label_file_has_the_last_word(
    run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session = start(run, tests=2, budget=0)
    name = session.state({})["file"]
    reply(session, label="from the page")
    table = tmp_path / "labels.csv"
    table.write_text(f"file,label\n{name},from the file\n")
    settings = FinetuneSettings(run=run.path, labels=table)
    opened, _ = open_decoded(run, settings, read_spec(run.encoder))
    assert dict(zip(opened.names, opened.labels, strict=True))[name] == "from the file"
    assert f"1 images have another label than `labelwise annotate` was told, e.g. {name}" in re.sub(
        r"\s+", " ", capsys.readouterr().err
    )


@pytest.mark.parametrize("name", ["labels.csv", "labels.json", "folder"])
def test_what_is_exported_can_be_imported(
    run: RunDirectory, unlabeled: RunDirectory, tmp_path: Path, name: str
) -> None:
    session = start(run, tests=4, budget=4, classes=("=cmd()", "-7"))
    for label in ("=cmd()", "-7", None, None, None, None, None):
        reply(session, label=label)
    reply(session, "unsure")
    said = {each.file: each.label for each in read_annotations(run) if each.label}
    assert export_labels(run, tmp_path / name) == f"7 labels written to {tmp_path / name}"
    with pytest.raises(UsageError, match="is there already"):
        export_labels(run, tmp_path / name)
    other = RunDirectory(Path(shutil.copytree(unlabeled.path, tmp_path / "other")))
    words = import_labels(other, tmp_path / name, "somebody")
    assert words.startswith(f"7 labels taken from {tmp_path / name}, 4 of them of test images")
    taken = read_annotations(other)
    assert {each.file: each.label for each in taken} == said
    assert Counter(each.part for each in taken) == {"test": 4, "imported": 3}
    assert {each.who for each in taken} == {"somebody"}
    assert import_labels(other, tmp_path / name).startswith("0 labels taken")
    assert start(other, tests=4, budget=0).state({})["number"] is None


def test_copies_that_contradict_each_other_are_refused(run: RunDirectory, tmp_path: Path) -> None:
    root = Path(rundir.read_json(run.data)["root"])
    name = sorted(path.name for path in root.iterdir())[0]
    for folder, file in (("one", "a.png"), ("one", "b.png"), ("two", "c.png")):
        (tmp_path / "copies" / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, tmp_path / "copies" / folder / file)
    with pytest.raises(DataError, match=r"says 'two' of .*, and 'one' was said before; nothing was taken"):
        import_labels(run, tmp_path / "copies")
    assert not read_annotations(run)
    shutil.rmtree(tmp_path / "copies" / "two")
    assert import_labels(run, tmp_path / "copies").startswith("1 labels taken")


def test_an_import_takes_no_label_that_the_images_had(pretrained: RunDirectory, tmp_path: Path) -> None:
    run = RunDirectory(Path(shutil.copytree(pretrained.path, tmp_path / "run")))
    root = Path(rundir.read_json(run.data)["root"])
    (tmp_path / "copies" / "another").mkdir(parents=True)
    shutil.copy(next(root.rglob("*.png")), tmp_path / "copies" / "another")
    assert import_labels(run, tmp_path / "copies").startswith("1 labels taken")
    assert {each.label for each in read_annotations(run)} == {"another"}


def test_images_of_one_name_in_two_folders_are_both_exported(run: RunDirectory, tmp_path: Path) -> None:
    images = own_images(run, tmp_path)
    session = start(run, tests=3, budget=0)
    first, second, changed = [(session.state({})["file"], reply(session, label="x"))[0] for _ in range(3)]
    (images / "a").mkdir()
    (images / first).rename(images / "a" / "b.png")
    (images / second).rename(images / "a_b.png")
    said = [dataclasses.replace(each, file=name) for each, name in zip(read_annotations(run), ("a/b.png", "a_b.png", changed), strict=True)]  # fmt: skip
    run.annotations.unlink()
    add_annotations(run, said)
    Image.new("L", (8, 8), 9).save(images / changed)  # is another image now
    assert export_labels(run, tmp_path / "out").startswith("2 labels written")
    copies = sorted(path.read_bytes() for path in (tmp_path / "out" / "test" / "x").rglob("*.png"))
    assert copies == sorted((images / name).read_bytes() for name in ("a/b.png", "a_b.png"))


def test_an_import_that_contradicts_is_refused_whole(run: RunDirectory, tmp_path: Path) -> None:
    session = start(run, tests=3, budget=0)
    first = session.state({})["file"]
    reply(session)
    second = session.state({})["file"]
    table = tmp_path / "labels.csv"
    table.write_text(f"file,label\n{second},2\n{first},another\n")
    with pytest.raises(DataError, match=r"says 'another' of .* was said before; nothing was taken"):
        import_labels(run, table)
    assert [each.file for each in read_annotations(run)] == [first]


def test_nothing_to_export_is_said(run: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no label was given on the page"):
        export_labels(run, tmp_path / "labels.csv")


def test_a_class_that_is_no_folder_goes_into_a_table_only(run: RunDirectory, tmp_path: Path) -> None:
    session = start(run, tests=2, budget=0)
    reply(session, label="../up")
    with pytest.raises(DataError, match=r"'\.\./up': no name for a folder"):
        export_labels(run, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    export_labels(run, tmp_path / "labels.json")


def test_label_studios_own_exports_are_read(tmp_path: Path) -> None:
    def choice(*labels: str) -> dict[str, Any]:
        return {"result": [{"type": "choices", "value": {"choices": list(labels)}}]}

    whole = [
        {"id": 1, "data": {"image": "/data/local-files/?d=some%20folder/%C3%A4.png"}, "annotations": [choice("cat")]},
        {"id": 2, "data": {"image": "/data/upload/3/0a1b2c3d-dog-1.png"}, "annotations": [choice("dog")]},
        {"id": 3, "data": {"image": "bucket/x.png"}, "annotations": [{**choice("dog"), "was_cancelled": True}]},
        {"id": 4, "data": {"image": "y.png"}, "annotations": []},
    ]  # fmt: skip
    small = [{"image": "/data/local-files/?d=some%20folder/%C3%A4.png", "choice": "cat", "id": 1}, {"image": "/data/upload/3/0a1b2c3d-dog-1.png", "choice": "dog"}]  # fmt: skip
    for name, tasks in (("json", whole), ("min", small)):
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(tasks))
        rows, _ = read_label_table(file)
        assert [(row.path, row.label) for row in rows] == [
            ("some folder/\u00e4.png", "cat"),
            ("dog-1.png", "dog"),
        ]
    several = tmp_path / "several.json"
    several.write_text(json.dumps([{"data": {"image": "x.png"}, "annotations": [choice("cat", "dog")]}]))
    with pytest.raises(DataError, match="several labels in one cell"):
        read_label_table(several)
    several.write_text(json.dumps([{"image": "x.png", "choice": {"choices": ["cat", "dog"]}}]))
    with pytest.raises(DataError, match="several labels in one cell"):
        read_label_table(several)
    for odd in (7, [7], [{"result": [{"value": "cat"}]}]):
        several.write_text(json.dumps([{"data": {"image": "x.png"}, "annotations": odd}]))
        with pytest.raises(DataError, match="no labeled rows"):
            read_label_table(several)
    for nonsense in ("{}", "[1]", "nonsense", "[" * 100_000):
        several.write_text(nonsense)
        with pytest.raises(DataError, match=r"not JSON|not an export of Label Studio"):
            read_label_table(several)


def test_names_survive_label_studio(tmp_path: Path) -> None:
    labels = [("a b/\u00e4#?&%41.png", "1"), ("./x.png", "two words"), ("=1.png", "<b>")]
    write_label_studio(labels, tmp_path / "tasks.json")
    rows, _ = read_label_table(tmp_path / "tasks.json")
    assert [(row.path, row.label) for row in rows] == labels


def test_a_fully_labeled_set_has_nothing_to_ask(pretrained: RunDirectory, tmp_path: Path) -> None:
    run = RunDirectory(Path(shutil.copytree(pretrained.path, tmp_path / "run")))
    with pytest.raises(DataError, match="every image that could be asked about has a label"):
        start(run)


def test_the_address_that_is_printed_is_the_one_listened_on(capsys: pytest.CaptureFixture[str]) -> None:
    for host, name in (
        ("::1", "[::1]"),
        ("[::1]", "[::1]"),
        ("127.0.0.2", "127.0.0.2"),
        ("localhost", "localhost"),
    ):
        _announce(host, 7, "word", browser=False)
        assert capsys.readouterr().out.split() == ["page", f"http://{name}:7/?token=word"]


# --- the whole command


@contextmanager
def serving(run: RunDirectory, *words: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Start the command; gives the address that it prints."""
    command = [
        sys.executable, "-m", "labelwise", "annotate", "--run", str(run.path), "--no-browser", "--port", "0", *words,
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        try:
            said = []
            for line in process.stdout:
                said.append(line)
                if line.startswith("page"):
                    yield line.split()[1], process
                    break
            else:
                raise AssertionError("".join(said))
        finally:
            process.kill()


@pytest.mark.slow
def test_labels_from_a_real_browser_survive_a_kill(run: RunDirectory, tmp_path: Path) -> None:
    answered: dict[str, str] = {}

    def label(browser: Any, count: int) -> None:
        """Answer by the keyboard alone."""
        for _ in range(count):
            browser.wait(
                "!document.getElementById('main').hidden && document.getElementById('image').className !== 'loading'"
            )
            name = browser.value("document.getElementById('file').textContent")
            digit = name.removesuffix(".png")[-1]
            if browser.value(f"state.classes.some(each => each.name === '{digit}')"):
                browser.press(digit)
            else:
                browser.write(digit)
                browser.wait(f"document.getElementById('find').value === '{digit}'")
                browser.press("Enter")
            answered[name] = digit
            browser.wait(
                f"document.getElementById('main').hidden || document.getElementById('file').textContent !== '{name}'"
            )

    with open_browser() as browser:
        with serving(run, "--test-images", "6", "--budget", "24") as (address, process):
            browser.open(address)
            label(browser, 17)
            browser.wait("document.getElementById('image').className !== 'loading'")
            process.send_signal(signal.SIGKILL)
            process.wait()
            browser.press("?")
            browser.wait("!document.getElementById('trouble').hidden")
            assert "nothing that was answered is lost" in browser.value(
                "document.getElementById('trouble').textContent"
            )
        assert {each.file: each.label for each in read_annotations(run)} == answered
        with serving(run, "--test-images", "6", "--budget", "24") as (address, process):
            browser.open(address, 390, 800)
            label(browser, 6)
            assert browser.value("document.documentElement.scrollWidth <= innerWidth"), "wider than a phone"
            browser.press("Backspace")
            browser.wait(f"document.getElementById('file').textContent === '{list(answered)[-1]}'")
            label(browser, 8)
            browser.wait("!document.getElementById('done').hidden")
            process.send_signal(signal.SIGINT)
            rest = process.stdout.read() if process.stdout else ""
            assert process.wait(20) == 130
            assert "30 of the images that it asked about have a label" in rest.replace("\n", " ")
        assert not [each for each in browser.complaints() if "net::ERR_" not in each]
    assert {each.file: each.label for each in read_annotations(run)} == answered
    assert len(answered) == 30
    settings = FinetuneSettings(run=run.path, methods=("simclr_probe",), label_counts=("all",))
    assert {each["n_test"] for each in report(finetune(settings))["results"]} == {6}


@pytest.mark.slow
def test_the_page_keeps_what_was_meant(run: RunDirectory) -> None:
    def kept() -> list[str | None]:
        return [each.label for each in read_annotations(run)]

    shown = "document.getElementById('image').className !== 'loading'"
    words = ("--test-images", "8", "--budget", "0", "--classes", "caterpillar,cat")
    with open_browser() as browser, serving(run, *words) as (address, _):
        browser.open(address)
        browser.wait(f"state && {shown}")
        browser.write("cat")
        browser.press("Enter")
        browser.wait(f"state.number === 1 && {shown}")
        assert kept() == ["cat"]
        for key in ("1", "Enter", "Backspace"):  # a key that is held down
            browser.ask("Input.dispatchKeyEvent", type="keyDown", key=key, autoRepeat=True)
        browser.value("at('image').className = 'loading'")
        browser.press("1")
        assert browser.value("fetch('/').then(() => state.number)") == 1, "said of an image not there yet"
        browser.value("at('image').className = 'broken'")
        browser.press("1")
        assert browser.value("fetch('/').then(() => state.number)") == 1, "said of an image that is broken"
        place = browser.value("(({ x, y }) => ({ x: x + 9, y: y + 9 }))(at('skip').getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            browser.ask("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)
        browser.wait(f"state.number === 2 && {shown}")
        browser.press("Enter")
        assert browser.value("fetch('/').then(() => state.number)") == 2, "the button was pressed once more"
        browser.value(
            "state.guess = { label: 'a long name of a class '.repeat(4), by: 'neighbours', votes: 1, of: 1 }; renderHelp()"
        )
        assert browser.value(
            "document.querySelector('aside').scrollWidth <= document.querySelector('aside').clientWidth"
        )
        assert browser.value("document.querySelector('#guess kbd').offsetHeight") < 40, (
            "a key in several lines"
        )
        assert kept() == ["cat", None]


@pytest.mark.slow
def test_what_is_typed_into_the_field_stays_there(run: RunDirectory) -> None:
    words = ("--test-images", "5", "--budget", "0", "--classes", "3d-printer,coat")
    with open_browser() as browser, serving(run, *words) as (address, _):

        def wait_for(number: int) -> None:
            browser.wait(
                f"state && state.number === {number} && at('image').className !== 'loading' && !busy"
            )

        def click(name: str) -> None:
            place = browser.value(
                f"(({{ x, y }}) => ({{ x: x + 9, y: y + 9 }}))(at('{name}').getBoundingClientRect())"
            )
            for kind in ("mousePressed", "mouseReleased"):
                browser.ask("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

        browser.open(address)
        wait_for(0)
        click("find")
        browser.write("10")
        assert browser.value("at('find').value") == "10"
        browser.press("Enter")
        wait_for(1)
        browser.press("2")  # a class's key again
        wait_for(2)
        browser.write("x")
        browser.press("Backspace")
        browser.press("Backspace")  # one too many
        assert browser.value("at('find').value + state.number") == "2"
        browser.press("1")
        wait_for(3)
        click("find")
        browser.write("x")
        browser.press("Backspace")
        browser.write("3")
        assert browser.value("at('find').value + state.number") == "33", "the field was clicked"
        browser.press("Escape")
        assert [each.label for each in read_annotations(run)] == ["10", "coat", "3d-printer"]
        browser.wait("performance.now() - erasedAt > 1000")
        browser.press("Backspace")
        wait_for(2)
        browser.value(
            "const ask = fetch; fetch = async (...all) => { await new Promise(end => setTimeout(end, 500)); return ask(...all); }"
        )
        browser.press("1")
        browser.write("dress")
        browser.press("Enter")  # of an image that is not there yet
        browser.write("coat")  # for the next image already
        wait_for(3)
        assert browser.value("at('find').value") == "coat"
        browser.press("Escape")
        browser.value("fetch = ask")
        browser.write("a,b")
        browser.press("Enter")
        browser.wait("!at('trouble').hidden && !busy")
        browser.press("Backspace")
        browser.press("1")
        assert browser.value("at('find').value + state.number") == "a,13"
        browser.press("Escape")
        assert browser.value("at('trouble').hidden")
        browser.value("state.number = 1, state.key = '-'")  # as if the server had been started anew
        browser.press("1")
        browser.wait("!at('trouble').hidden && !busy")
        assert browser.value("at('trouble').textContent + state.number") == (
            "Since a new start another image has this number; here is what is asked now.3"
        )
        browser.press("1")
        wait_for(4)
        assert browser.value("at('trouble').hidden")
        browser.press(" ")
        browser.wait("!at('done').hidden")
        assert browser.value("at('over').textContent") == (
            "Nothing is left to ask; what was skipped (1) comes again at the next start."
        )
        assert browser.value("at('last-of-all').textContent").startswith("Undo takes back: skipped (")
        browser.press("Backspace")
        wait_for(4)
        for names, keys in (
            (["3", "cat", "10", "0"], ["3", "", "", "0"]),
            (["cat", "3", *"abcdefgh"], [*"123456789", ""]),
        ):
            browser.value(f"state.classes = {names}.map(name => ({{ name }}))")
            assert browser.value("state.classes.map((_, place) => keyOf(place))") == keys


@pytest.mark.slow
def test_two_people_share_the_work(run: RunDirectory) -> None:
    words = ("--test-images", "4", "--budget", "0", "--classes", "x,y")
    with open_browser() as one, open_browser() as other, serving(run, *words) as (address, _):
        for browser, number in ((one, 0), (other, 1)):
            browser.open(address)
            browser.wait(f"state && state.number === {number} && at('image').className !== 'loading'")
        one.press("1")
        one.wait("state.number === 2 && at('image').className !== 'loading'")
        other.press("2")
        other.wait("state.number === 3")
        one.open(address + "&again")
        one.wait("state && state.number === 2 && at('image').className !== 'loading'")
        one.press("Backspace")
        one.wait("state.number === 0 && !state.last")
        assert [each.label for each in read_annotations(run)] == ["y"]


@pytest.mark.slow
def test_a_second_page_on_one_run_is_refused(run: RunDirectory) -> None:
    words = ("--test-images", "2", "--budget", "0")
    with serving(run, *words) as (_, process):
        with (
            pytest.raises(AssertionError, match="another `labelwise annotate` asks about it already"),
            serving(run, *words),
        ):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    with serving(run, *words):
        pass


@pytest.mark.slow
def test_a_thousand_answers_at_once_are_kept_whole(run: RunDirectory) -> None:
    session, _, cache = open_session(run, 20, 0, (), "tester")
    rows = [session.row(number) for number in range(20)]
    keys = [str(cache.keys[row]) for row in rows if row is not None]
    with serving(run, "--test-images", "20", "--budget", "0") as (address, _):
        base, token = address.split("/?token=")

        def post(number: int) -> int:
            place = number % 25
            given = {"number": place, "key": (keys + [""] * 5)[place], "answer": "skip"}
            body = json.dumps({**given, "seconds": number})
            request = urllib.request.Request(
                f"{base}/answer",
                body.encode(),
                {"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
            )
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    json.loads(answer.read())
                    return int(answer.status)
            except urllib.error.HTTPError as error:
                return error.code

        with ThreadPoolExecutor(100) as pool:
            codes = list(pool.map(post, range(1000)))
    assert Counter(codes) == {200: 800, 400: 200}  # 20 to 24 are no images
    assert sorted(row["seconds"] for row in lines(run)) == [each for each in range(1000) if each % 25 < 20]
    last = {row["file"]: row["seconds"] for row in lines(run)}
    assert {each.file: each.seconds for each in read_annotations(run)} == last


def test_the_command_takes_and_gives_labels(run: RunDirectory, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    name = rundir.read_json(run.test_lock)["names"][0]
    (tmp_path / "labels.csv").write_text(f"file,label\n{name},{name[-5]}\n")
    words = ["annotate", "--run", str(run.path)]
    taken = CliRunner().invoke(app, [*words, "--import", str(tmp_path / "labels.csv"), "--who", "me"])
    assert "1 labels taken" in taken.output
    given = CliRunner().invoke(app, [*words, "--export", str(tmp_path / "out.csv")])
    assert "1 labels written" in given.output
    with (tmp_path / "out.csv").open(newline="") as file:
        assert [(row["file"], row["label"], row["split"], row["who"]) for row in csv.DictReader(file)] == [
            (name, name[-5], "test", "me")
        ]
