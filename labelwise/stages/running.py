"""`labelwise runs`: list, compare and remove run folders, and show what lies in the image cache."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from labelwise import rundir, terminal
from labelwise.annotations import read_annotations
from labelwise.errors import CheckpointError, UsageError
from labelwise.images.cache import list_caches
from labelwise.measures.statistics import FEWEST_DRAWS
from labelwise.ownership import hold
from labelwise.predictions import read_predictions
from labelwise.reports.text import MACRO, labels_in_words, over_encoders_in_words, pretrained_on
from labelwise.rundir import RANDOM, RunDirectory
from labelwise.stages.encoders import (
    SEED,
    differing_settings,
    gains_over_encoders,
    why_not_over_encoders,
)
from labelwise.stages.scoring import read_scores

_MEGABYTE = 1e6
_KEYS = ("labels", "series", "suggested", "arm")  # of accuracies that can be compared


def list_runs(folder: Path) -> dict[str, Any]:
    """Describe the runs below a folder and the image caches.

    Returns:
        `runs`: name, path, state, images, backbone, epochs, seconds, bytes; `studies`: name, path, study, trials, missing, seconds,
        bytes; `caches`: path, images, bytes.

    Raises:
        UsageError: There is no such folder.
    """
    if folder != rundir.DEFAULT_RUNS and not folder.is_dir():
        raise UsageError(f"{folder}: no such folder.")
    begun = (path.parent for path in folder.glob("[!.]*/environment.json") if not path.parent.is_symlink())
    found = [RunDirectory(path.resolve()) for path in sorted(begun)]
    return {
        "runs": _described(_describe, [run for run in found if run.config.exists()]),
        "studies": _described(_describe_study, [run for run in found if (run.path / "study.json").exists()]),
        "caches": [
            {"path": str(path), "images": images, "bytes": size} for path, size, images in list_caches()
        ],
    }


def show_runs(document: dict[str, Any]) -> None:
    """Print runs and caches."""
    if document["runs"]:
        rows = [
            [run["name"], run["state"], f"{run['images']:,}", run["backbone"], f"{run['epochs']}",
             terminal.duration(run["seconds"]), f"{run['bytes'] / _MEGABYTE:,.0f} MB"]
            for run in document["runs"]
        ]  # fmt: skip
        terminal.emit_table("", ["run", "state", "images", "backbone", "epochs", "time", "disk"], rows)
    elif not document["studies"]:
        terminal.emit("no runs here; start one with `labelwise pretrain IMAGES`")
    if document["studies"]:
        rows = [
            [study["name"], study["study"], f"{study['trials'] - study['missing']} of {study['trials']}",
             terminal.duration(study["seconds"]), f"{study['bytes'] / _MEGABYTE:,.0f} MB"]
            for study in document["studies"]
        ]  # fmt: skip
        terminal.emit_table("", ["study", "finding", "trials", "time", "disk"], rows)
    for cache in document["caches"]:
        terminal.emit(
            f"image cache  {cache['path']}: {cache['images']:,} images, {cache['bytes'] / _MEGABYTE:,.0f} MB, safe to delete"
        )


def compare_runs(paths: Sequence[Path]) -> dict[str, Any]:
    """Find the settings in which runs differ, and put their results side by side.

    Returns:
        `settings`: {key: [of each run]}; `results`: [{labels, series, suggested, arm,
        accuracies}] where all have some of labels chosen alike; `by_class`: whether these are
        means over classes, as the gains of all runs are; `same_test`: whether
        all were tested on the same images; `over_encoders`: where nothing differs but the seed of pretraining, the gain at each
        number of labels, with an interval over encoders too; `not_over_encoders`: where the seed differs, why there is none.

    Raises:
        UsageError: One of them is no run, or there are less than two.
    """
    if len(paths) < 2:
        raise UsageError("name two runs or more.")
    runs = [rundir.open_run(path) for path in paths]
    settings = differing_settings(runs)
    reports = [rundir.read_json(run.report_json) if run.report_json.exists() else {} for run in runs]
    by_class = all(document.get("by_class", False) for document in reports)
    arms = [_means(document.get("summary", []), "macro" if by_class else "arms") for document in reports]
    reason = why_not_over_encoders(runs) if SEED in settings else ""
    gains = gains_over_encoders([read_scores(run) for run in runs]) if SEED in settings and not reason else []
    return {
        "runs": [str(run.path) for run in runs],
        "same_test": all(_tested(run) == _tested(runs[0]) for run in runs[1:]),
        "settings": settings,
        "by_class": by_class,
        "results": [
            {**dict(zip(_KEYS, column, strict=True)), "accuracies": [each[column] for each in arms]}
            for column in sorted(set.intersection(*(set(each) for each in arms)))
        ],
        "over_encoders": gains,
        "not_over_encoders": reason,
    }


def _tested(run: RunDirectory) -> set[tuple[str, str]] | str:
    """The images that were tested, with their labels; where none were yet, the hash of those that were locked."""
    columns = read_predictions(run.predictions, ("name", "label"))
    locked: str = rundir.read_json(run.test_lock)["sha256"]
    return set(zip(*columns.values(), strict=True)) or locked


def show_comparison(document: dict[str, Any]) -> None:
    """Print what differs."""
    names = [Path(path).name for path in document["runs"]]
    if document["settings"]:
        rows = [
            [key, *("-" if value is None else str(value) for value in values)]
            for key, values in document["settings"].items()
        ]
        terminal.emit_table("", ["setting", *names], rows)
    else:
        terminal.emit("the settings are the same")
    if document["results"]:
        rows = [
            [
                f"{labels_in_words(entry)}, {entry['arm']}",
                *(f"{value:.1%}" for value in entry["accuracies"]),
            ]
            for entry in document["results"]
        ]
        terminal.emit_table("", [f"accuracy{MACRO if document['by_class'] else ''}", *names], rows)
        if not document["same_test"]:
            terminal.emit("tested on different images: the accuracies do not say which run is better")
    for entry in document["over_encoders"]:
        terminal.emit(over_encoders_in_words(entry))
    if not all(entry["claims"] for entry in document["over_encoders"]):
        terminal.emit(
            f"fewer than {FEWEST_DRAWS} encoders (--seed of pretrain) or label draws (--draws of finetune) claim nothing"
        )
    if document["not_over_encoders"]:
        terminal.emit(f"no gain over encoders: {document['not_over_encoders']}")


def remove_run(path: Path) -> Path:
    """Delete the folder of a run or a study, and `runs/latest` if it named this run; give where it was.

    Raises:
        UsageError: It is neither, or a link to one, or a command is working on it, or it alone holds labels from the page.
    """
    path = rundir.as_listed(path)
    rundir.finish_deleting(path.parent)
    if path.is_symlink():
        raise UsageError(f"{path}: is a link to {path.resolve().name}; name that run itself.")
    run = RunDirectory(path.resolve())
    if not run.environment.exists() or "asked" not in rundir.read_json(run.environment):
        rundir.open_run(path)
        raise UsageError(
            f"{path}: has no environment.json of ours, so it may not be a run; delete it yourself if you are sure."
        )
    link = run.path.parent / rundir.LATEST.name
    was_latest = link.is_symlink() and link.resolve() == run.path
    with hold(run):
        _check_answers_are_elsewhere(run)
        rundir.delete(run.path)
    if was_latest:
        link.unlink()
    folders = {each.parent for each in run.path.parent.glob("[!.]*/encoder.safetensors")}
    names = {folder.name for folder in folders}
    left = [RunDirectory(each) for each in folders if each.name.rpartition("-seed-")[0] not in names]
    if was_latest and left:
        rundir.point_latest(max(left, key=lambda other: other.encoder.stat().st_mtime))
    return run.path


def _check_answers_are_elsewhere(run: RunDirectory) -> None:
    """Refuse to delete labels given on the page of `labelwise annotate` that no run beside this one has."""
    others = [RunDirectory(file.parent) for file in run.path.parent.glob("[!.]*/annotations.jsonl")]
    kept = {
        (each.key, each.label)
        for other in others
        if other.path.resolve() != run.path
        for each in read_annotations(other)
    }
    said = read_annotations(run)
    alone = sum(each.label is not None and (each.key, each.label) not in kept for each in said)
    if alone:
        raise UsageError(
            f"{run.path}: holds {alone:,} labels of `labelwise annotate` that no run beside it has; `labelwise annotate --run {run.path} "
            f"--export labels.csv` keeps them. To lose them with the run, delete {run.annotations.name} in it first."
        )


def _described(
    describe: Callable[[RunDirectory], dict[str, Any]], runs: list[RunDirectory]
) -> list[dict[str, Any]]:
    """Describe each; one that is damaged is named and left out."""
    found = []
    for run in runs:
        try:
            found.append(describe(run))
        except (CheckpointError, KeyError, TypeError, AttributeError, OSError) as error:
            terminal.warn(f"{run.path.name} is left out, it is damaged: {error}")
    return found


def _describe(run: RunDirectory) -> dict[str, Any]:
    record, data = rundir.read_json(run.environment), rundir.read_json(run.data)
    state = "compared" if run.results.exists() else "pretrained" if run.encoder.exists() else "interrupted"
    return {
        "name": run.path.name,
        "path": str(run.path),
        "state": state,
        "images": pretrained_on(data),
        "backbone": record["asked"]["backbone"],
        "epochs": record["plan"]["epochs"],
        "seconds": record["seconds"],
        "bytes": rundir.folder_bytes(run.path),
    }


def _describe_study(run: RunDirectory) -> dict[str, Any]:
    record, found = rundir.read_json(run.environment), rundir.read_json(run.path / "study.json")
    return {
        "name": run.path.name,
        "path": str(run.path),
        **{key: found[key] for key in ("study", "trials", "missing")},
        "seconds": record["seconds"],
        "bytes": rundir.folder_bytes(run.path),
    }


def _means(summary: list[dict[str, Any]], key: str) -> dict[tuple[int, str, int, str], float]:
    """Mean accuracy at each of `_KEYS`, of the images or over classes; earlier versions noted no series."""
    return {
        (entry["labels"], entry.get("series", RANDOM), entry.get("suggested", 0), arm): value["mean"]
        for entry in summary
        for arm, value in entry[key].items()
    }
