"""`labelwise runs`: list, compare and remove run folders, and show what lies in the image cache."""

import shutil
import tomllib
from collections import defaultdict
from pathlib import Path
from typing import Any

from labelwise import rundir, terminal
from labelwise.errors import UsageError
from labelwise.images.cache import list_caches
from labelwise.predictions import read_predictions
from labelwise.rundir import RunDirectory

_MEGABYTE = 1e6


def list_runs(folder: Path) -> dict[str, Any]:
    """Describe the runs below a folder and the image caches.

    Returns:
        `runs`: name, path, state, images, backbone, epochs, seconds, bytes; `caches`: path, images, bytes.
    """
    found = sorted(path.parent for path in folder.glob("*/environment.json") if not path.parent.is_symlink())
    return {
        "runs": [_describe(RunDirectory(path.resolve())) for path in found],
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
    else:
        terminal.emit("no runs here; start one with `labelwise pretrain IMAGES`")
    for cache in document["caches"]:
        terminal.emit(
            f"image cache  {cache['path']}: {cache['images']:,} images, {cache['bytes'] / _MEGABYTE:,.0f} MB, safe to delete"
        )


def compare_runs(first: Path, second: Path) -> dict[str, Any]:
    """Find the settings in which two runs differ, and put their results side by side.

    Returns:
        `settings`: {key: [first, second]}; `results`: [{labels, arm, first, second}] where both have some;
        `same_test`: whether both were tested on the same images.

    Raises:
        UsageError: One of them is no run.
    """
    runs = [rundir.open_run(path) for path in (first, second)]
    tables = [tomllib.loads(run.config.read_text(encoding="utf-8")) for run in runs]
    flat = [
        {f"{table}.{key}": value for table, values in each.items() for key, value in values.items()}
        for each in tables
    ]
    keys = sorted(flat[0].keys() | flat[1].keys())
    arms = [_means(run) for run in runs]
    return {
        "runs": [str(run.path) for run in runs],
        "same_test": _have_same_test(*runs),
        "settings": {
            key: [each.get(key) for each in flat] for key in keys if flat[0].get(key) != flat[1].get(key)
        },
        "results": [
            {"labels": labels, "arm": arm, "first": arms[0][labels, arm], "second": arms[1][labels, arm]}
            for labels, arm in sorted(arms[0].keys() & arms[1].keys())
        ],
    }


def _have_same_test(first: RunDirectory, second: RunDirectory) -> bool:
    """Whether in the draws that both runs have the same images were tested, with the same labels."""
    tested: list[dict[int, set[tuple[str, str]]]] = []
    for run in (first, second):
        columns = read_predictions(run.predictions, ("draw", "name", "label"))
        images = defaultdict(set)
        for draw, name, label in zip(*columns.values(), strict=True):
            images[draw].add((name, label))
        tested.append(images)
    shared = tested[0].keys() & tested[1].keys()
    return all(tested[0][draw] == tested[1][draw] for draw in shared)


def show_comparison(document: dict[str, Any]) -> None:
    """Print what differs."""
    names = [Path(path).name for path in document["runs"]]
    if document["settings"]:
        rows = [
            [key, *("-" if value is None else str(value) for value in pair)]
            for key, pair in document["settings"].items()
        ]
        terminal.emit_table("", ["setting", *names], rows)
    else:
        terminal.emit("the settings are the same")
    if document["results"]:
        rows = [
            [f"{entry['labels']:,} labels, {entry['arm']}", f"{entry['first']:.1%}", f"{entry['second']:.1%}"]
            for entry in document["results"]
        ]
        terminal.emit_table("", ["accuracy", *names], rows)
        if not document["same_test"]:
            terminal.emit("tested on different images: the accuracies do not say which run is better")


def remove_run(path: Path) -> None:
    """Delete a run folder, and `runs/latest` if it named this run.

    Raises:
        UsageError: It is no run, or a link to one.
    """
    if path.is_symlink():
        raise UsageError(f"{path}: is a link to {path.resolve().name}; name that run itself.")
    run = rundir.open_run(path)
    if not run.environment.exists() or "asked" not in rundir.read_json(run.environment):
        raise UsageError(
            f"{path}: has no environment.json of ours, so it may not be a run; delete it yourself if you are sure."
        )
    link = run.path.parent / rundir.LATEST.name
    if link.is_symlink() and link.resolve() == run.path:
        link.unlink()
    shutil.rmtree(run.path)


def _describe(run: RunDirectory) -> dict[str, Any]:
    record, data = rundir.read_json(run.environment), rundir.read_json(run.data)
    state = "compared" if run.results.exists() else "pretrained" if run.encoder.exists() else "interrupted"
    return {
        "name": run.path.name,
        "path": str(run.path),
        "state": state,
        "images": data["pool"],
        "backbone": record["asked"]["backbone"],
        "epochs": record["plan"]["epochs"],
        "seconds": record["seconds"],
        "bytes": sum(file.stat().st_size for file in run.path.rglob("*") if file.is_file()),
    }


def _means(run: RunDirectory) -> dict[tuple[int, str], float]:
    """Mean accuracy of each arm at each number of labels, from report.json if there is one."""
    if not run.report_json.exists():
        return {}
    summary = rundir.read_json(run.report_json)["summary"]
    return {
        (entry["labels"], arm): value["mean"] for entry in summary for arm, value in entry["arms"].items()
    }
