"""Labels that `suggest` chose are a series of their own: never drawn at random, never averaged with what is."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from labelwise import rundir
from labelwise.annotations import Annotation, add_annotations
from labelwise.cli import app
from labelwise.config import FinetuneSettings, PretrainSettings
from labelwise.errors import CheckpointError
from labelwise.measures.label_savings import labels_saved
from labelwise.reports import plots
from labelwise.rundir import RunDirectory
from labelwise.stages import comparing, concluding, drawing, reporting
from labelwise.stages.benching import set_up_bench
from labelwise.stages.methods import Bench
from labelwise.stages.pretraining import pretrain
from labelwise.stages.repeating import finetune
from labelwise.stages.reporting import report, show
from labelwise.stages.suggesting import suggest
from labelwise.stages.verifying import verify

ASKED: dict[str, Any] = {
    "methods": ("pixels", "simclr", "supervised"),
    "steps": 2,
    "scratch_steps": 2,
    "draws": 3,
}


@pytest.fixture(scope="module")
def unlabeled(
    tmp_path_factory: pytest.TempPathFactory,
    some_digits: Callable[[Path, int], Path],
    small_network: dict[str, Any],
    pretrain_there: Callable[..., RunDirectory],
) -> RunDirectory:
    """An encoder of one epoch, of 300 digits in one flat folder, a fifth of them locked away; names begin with the class."""
    folder = tmp_path_factory.mktemp("drawing")
    (folder / "images").mkdir()
    for file in some_digits(folder / "digits", 6).glob("*/*.png"):
        shutil.copy(file, folder / "images" / f"{file.parent.name}-{file.name}")
    return pretrain_there(folder, **small_network)


def names_of(run: RunDirectory, of_each: int, start: int = 0, classes: str = "0123456789") -> list[str]:
    """So many images of each class outside the test set."""
    locked = set(rundir.read_json(run.test_lock)["names"])
    free = sorted(
        file.name for file in Path(rundir.read_json(run.data)["root"]).iterdir() if file.name not in locked
    )
    return [
        name
        for each in classes
        for name in [name for name in free if name[0] == each][start : start + of_each]
    ]


def remember(run: RunDirectory, *calls: list[str], as_if_unlabeled: bool = False) -> None:
    """Write a history as `suggest` does."""
    for files in calls:
        line = {"at": "now", "budget": len(files), "files": files, "as_if_unlabeled": as_if_unlabeled}
        rundir.append_jsonl(run.suggested, line)


def label(run: RunDirectory, *names: str, tested: bool = True) -> FinetuneSettings:
    """Label these, and the test images, in a file."""
    file = run.path.with_name("labels.csv")
    named = [*names, *(rundir.read_json(run.test_lock)["names"] if tested else [])]
    with file.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([["file", "label"], *([name, name[0]] for name in named)])
    return FinetuneSettings(run=run.path, labels=file, **ASKED)


def bench_of(run: RunDirectory, *names: str, **asked: Any) -> Bench:
    return set_up_bench(run, label(run, *names).model_copy(update=asked))


def orders_of(bench: Bench) -> list[list[str]]:
    """The labels of each draw, by name."""
    counts = drawing.label_counts(bench.settings, bench)
    found = drawing.draw_orders(bench, counts, ())
    return [[bench.names[bench.labeled[place]] for place in order] for order in found]


def test_chosen_labels_come_last_in_their_own_order_and_all_others_are_drawn(run: RunDirectory) -> None:
    random, chosen = names_of(run, 4), names_of(run, 1, 4)[::-1]
    remember(run, chosen[:6], chosen)
    bench = bench_of(run, *random, *chosen)
    orders = orders_of(bench)
    for draw, order in enumerate(orders):
        assert order[40:] == chosen
        assert set(order[:40]) == set(random)
        assert {name[0] for name in order[:10]} == set("0123456789")
        assert rundir.read_json(run.splits / f"draw-0-{draw}.json")["order"] == order
    assert len({tuple(order[:20]) for order in orders}) == 3
    counts = list(drawing.label_counts(bench.settings, bench))
    assert counts == [20, 40, 46, 50], "the ladder, all that are drawn, and where each call ended"
    assert [drawing.draws_of(bench, count) for count in counts] == [3, 1, 3, 3]
    places = drawing.draw_orders(bench, counts, ())[0]
    series = [drawing.series_of(bench, bench.labeled[places[:count]]) for count in counts]
    assert [(each["series"], each["suggested"], each["labels_there"]) for each in series] == [
        ("random", 0, 40),
        ("random", 0, 40),
        ("suggested", 6, 50),
        ("suggested", 10, 50),
    ]


def test_numbers_that_are_asked_for_fall_into_either_series(run: RunDirectory) -> None:
    chosen = names_of(run, 1, 4)
    remember(run, chosen)
    bench = bench_of(run, *names_of(run, 4), *chosen, label_counts=(10, 45, "all"))
    assert list(drawing.label_counts(bench.settings, bench)) == [10, 45, 50]
    assert [drawing.draws_of(bench, count) for count in (10, 45, 50)] == [3, 3, 3]


def test_of_many_calls_those_are_compared_that_half_as_many_labels_lie_between(run: RunDirectory) -> None:
    chosen = names_of(run, 6)
    remember(run, *(chosen[place : place + 10] for place in range(0, 60, 10)))
    bench = bench_of(run, *chosen, *names_of(run, 2, 6))
    assert list(drawing.label_counts(bench.settings, bench)) == [20, 30, 40, 60, 80]


def test_what_has_no_label_or_was_chosen_as_if_nothing_had_changes_nothing(run: RunDirectory) -> None:
    random = names_of(run, 4)
    before = bench_of(run, *random)
    orders, signature = orders_of(before), comparing.signature_of(before)
    remember(run, random[:5], as_if_unlabeled=True)
    remember(run, names_of(run, 1, 6))
    bench = bench_of(run, *random)
    assert orders_of(bench) == orders
    assert comparing.signature_of(bench) == signature
    remember(run, random[:5])
    assert comparing.signature_of(bench_of(run, *random)) != signature


def test_where_classes_are_only_among_the_chosen_there_is_no_random_series(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    random, chosen = names_of(run, 2, classes="01234567"), names_of(run, 2, 4)
    remember(run, chosen)
    bench = bench_of(run, *random, *chosen, label_counts=(10, "all"))
    assert chosen.index("9-" + chosen[-2][2:]) == 18
    counts = list(drawing.label_counts(bench.settings, bench))
    assert counts == [16 + 19, 16 + 20]
    drawing.announce_labels(bench, counts)
    words = " ".join(capsys.readouterr().err.split())
    assert "10 is 10 labels and not every class is among those; using 35." in words
    assert (
        "suggested 35, 36: all 16 others and the first of 20 that `suggest` chose, the same in 3 trainings each no random draws beside "
        "them: the others lack a class"
    ) in words
    assert "random draws each" not in words
    bench.settings = bench.settings.model_copy(update={"label_counts": None})
    assert list(drawing.label_counts(bench.settings, bench)) == [36], "35 are hardly fewer"


def test_without_a_test_set_chosen_labels_are_tested_too_and_that_is_said(run: RunDirectory) -> None:
    chosen = names_of(run, 1, 4)
    remember(run, chosen)
    settings = label(run, *names_of(run, 3), *chosen, tested=False)
    finetune(settings.model_copy(update={"label_counts": (20,), "methods": ("pixels",), "draws": 5}))
    document = report(run)
    assert {row["series"] for row in document["results"]} == {"mixed"}
    assert document["summary"][0]["series"] == "mixed"
    assert any(limit.startswith("Some of the labels were chosen by suggest") for limit in document["limits"])
    assert "20 labels (8.33%; some chosen)" in run.report_html.read_text()
    verify(run)


def compare(run: RunDirectory, settings: FinetuneSettings, **asked: Any) -> dict[str, Any]:
    finetune(settings.model_copy(update=asked))
    return report(run)


def said(run: RunDirectory, document: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """All that people read, by where: lines broken as they may be."""
    capsys.readouterr()
    show(document)
    pages = {
        file.name: file.read_text(encoding="utf-8")
        for file in (run.report_html, run.report_md, run.model_card)
    }
    return {
        name: " ".join(words.split())
        for name, words in {**pages, "terminal": capsys.readouterr().out}.items()
    }


def test_only_chosen_labels_are_never_said_to_be_drawn(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = names_of(run, 2)
    remember(run, [name for name in chosen if chosen.index(name) % 2 == 0], chosen)
    document = compare(run, label(run, *chosen))
    assert [(each["labels"], each["series"], each["suggested"]) for each in document["summary"]] == [
        (10, "suggested", 10),
        (20, "suggested", 20),
    ]
    assert document["labels_saved"] == []
    gain = document["summary"][0]["comparisons"][0]
    assert gain["n"] == 3
    assert gain["low"] is not None
    for words in said(run, document, capsys).values():
        assert "all chosen" in words
        assert (
            "Labels saved are not told, as those are of labels drawn at random." in words or "next" in words
        )
        for wrong in (
            "random draws",
            "random label draws",
            "over draws",
            "label draw",
            "all draws",
            "same draws",
        ):
            assert wrong not in words
    assert "20 labels (8.33%; all chosen)" in run.report_md.read_text()
    assert "over training seeds and test images" in run.report_md.read_text()
    assert (
        "those intervals are over training seeds and test images, not over other labels."
        in document["verdict"]
    )
    svg = plots.accuracy_against_labels(document)
    assert svg.count("labels chosen by suggest") == 1, "in the legend"
    assert "labels drawn at random" not in svg
    assert "test accuracy, %<" in svg
    verify(run)


def test_both_series_stand_beside_each_other_and_are_never_mixed(
    run: RunDirectory, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = names_of(run, 1, 4)
    remember(run, chosen)
    curves = []
    monkeypatch.setattr(
        reporting, "labels_saved", lambda *of: curves.append(sorted(of[0])) or labels_saved(*of)
    )
    document = compare(run, label(run, *names_of(run, 4), *chosen), label_counts=(10, 20, 40, 50))
    assert [each["series"] for each in document["summary"]] == ["random", "random", "random", "suggested"]
    assert curves, "labels saved are of what is drawn at random"
    assert all(each == [10, 20, 40] for each in curves)
    found = said(run, document, capsys)
    for words in found.values():
        assert "(20.8%; 10 chosen)" in words or "50 (10 chosen by suggest)" in words
    note = (
        "mean over random label draws [95 % interval over draws and test images], or over trainings on the same labels, chosen by suggest "
        "[95 % interval over training seeds and test images, not over other labels]."
    )
    assert all(note in found[name] for name in ("report.html", "report.md", "terminal"))
    assert "All labels that were not chosen are one draw" in found["report.md"]
    svg = plots.accuracy_against_labels(document)
    assert svg.count("labels chosen by suggest") == svg.count("labels drawn at random") == 1
    results = rundir.read_jsonl(run.results)
    assert {row["series"] for row in results if row["labels"] <= 40} == {"random"}
    more = suggest(run, 10, labels=run.path.with_name("labels.csv"))["expected"]
    assert (more["series"], more["most"]) == ("random", 40)
    verify(run)
    rundir.rewrite_jsonl(run.results, [{**row, "series": "random"} for row in results])
    with pytest.raises(CheckpointError):
        verify(run)
    rundir.rewrite_jsonl(run.results, results)
    run.suggested.write_text("")
    with pytest.raises(CheckpointError, match=r"was not suggested, as suggested\.jsonl says"):
        verify(run)


def test_too_few_trainings_are_not_called_draws() -> None:
    pair = {"arm": "simclr", "against": "supervised", "mean": 0.1, "low": None, "high": None, "n": 1}
    entry: dict[str, Any] = {"labels": 12, "fraction": None, "guesses": [], "arms": {"simclr": {}}}
    entry["comparisons"] = [{**pair, "verdict": "no difference shown"}]
    chosen = {**entry, "labels": 24, "series": "suggested", "suggested": 12}
    assert concluding.verdict_in_words([chosen], 200, []) == (
        "One training, no interval, so nothing is claimed: +10.0 points with 24 labels (12 chosen by suggest)."
    )
    two = {**chosen, "comparisons": [{**chosen["comparisons"][0], "n": 2, "low": 0.0, "high": 0.2}]}
    assert concluding.verdict_in_words([two], 200, []).startswith("2 trainings where 3 are needed, ")
    both = concluding.verdict_in_words([entry, two], 200, [])
    assert both.startswith("2 label draws or trainings where 3 are needed, ")


def test_results_of_an_earlier_version_are_random(run: RunDirectory) -> None:
    document = compare(run, label(run, *names_of(run, 3)), label_counts=(20,))
    assert document["summary"][0]["series"] == "random"
    page = run.report_md.read_text()
    rows = [
        {key: row[key] for key in row if key not in ("series", "suggested")}
        for row in rundir.read_jsonl(run.results)
    ]
    rundir.rewrite_jsonl(run.results, rows)
    earlier = rundir.read_json(run.report_json)
    for entry in [*earlier["summary"], *earlier["results"]]:
        entry.pop("series")
        entry.pop("suggested", None)
    rundir.write_json(run.report_json, earlier)
    verify(run)
    report(run)
    assert run.report_md.read_text() == page


def test_a_run_that_goes_on_from_another_knows_what_was_suggested_there(
    run: RunDirectory, small_network: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    remember(run, names_of(run, 1))
    add_annotations(run, [Annotation(names_of(run, 1)[0], 1, "label", "0", "suggested", "me", "now", None)])
    images, out = Path(rundir.read_json(run.data)["root"]), run.path.with_name("second")
    network = {key: small_network[key] for key in ("batch_size", "epochs", "precision")}
    second = pretrain(PretrainSettings(images=images, init=str(run.path), out=out, **network))
    assert rundir.read_jsonl(second.suggested) == rundir.read_jsonl(run.suggested)
    asked = [f"--{key.replace('_', '-')}={value}" for key, value in network.items()]
    app(["pretrain", str(images), f"--init={run.path}", f"--out={out}", *asked], standalone_mode=False)
    words = capsys.readouterr().out
    assert f"next: labelwise finetune --run {out} --label-counts" in words, "its labels came along"


@pytest.mark.slow
def test_from_unlabeled_images_to_a_curve_of_chosen_labels(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    def labelwise(*words: str) -> dict[str, Any]:
        capsys.readouterr()
        app([*words, "--run", str(run.path), "--json"], standalone_mode=False)
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    short = ("--draws", "3", "--steps", "2", "--scratch-steps", "2", "--methods", "pixels,simclr,supervised")
    labels: list[str] = []
    document: dict[str, Any] = {}
    for budget in (30, 20):
        file = ("--labels", str(run.path.with_name("labels.csv"))) if labels else ()
        labels += [
            each["file"] for each in labelwise("suggest", "--budget", str(budget), *file)["suggestions"]
        ]
        file = ("--labels", str(label(run, *labels).labels))
        document = labelwise("finetune", *file, *short)
    assert len(set(labels)) == 50
    assert {each["series"] for each in document["summary"]} == {"suggested"}
    assert [each["labels"] for each in document["summary"]][-2:] == [30, 50]
    random = [name for name in names_of(run, 8) if name not in labels]
    counts = ("--label-counts", f"20,{len(random) + 30},all")
    document = labelwise("finetune", "--labels", str(label(run, *labels, *random).labels), *short, *counts)
    series = {each["labels"]: each["series"] for each in document["summary"]}
    assert series == {20: "random", len(random) + 30: "suggested", len(random) + 50: "suggested"}
    verify(run)
    document = labelwise("finetune", *short, *counts, "--pretrain-seeds", "2")
    gains = document["over_encoders"]["gains"]
    assert [each.get("suggested") for each in gains] == [None, 30, 50]
    assert "(50 chosen by suggest)" in run.report_md.read_text().split("gain over 2 encoders")[3]
    verify(run)
