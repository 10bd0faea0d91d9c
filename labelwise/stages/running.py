"""`labelwise runs`: list, compare and remove run folders, and show what lies in the image cache."""

import shutil
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from labelwise import rundir, terminal
from labelwise.errors import UsageError
from labelwise.images.cache import list_caches
from labelwise.measures.statistics import FEWEST_DRAWS, by_group, interval_over_encoders, verdict
from labelwise.predictions import read_predictions
from labelwise.reports.text import points
from labelwise.rundir import RunDirectory
from labelwise.stages.reporting import PREDICTED, score

_MEGABYTE = 1e6


def list_runs(folder: Path) -> dict[str, Any]:
    """Describe the runs below a folder and the image caches.

    Returns:
        `runs`: name, path, state, images, backbone, epochs, seconds, bytes; `caches`: path, images, bytes.
    """
    begun = (path.parent for path in folder.glob("*/environment.json") if not path.parent.is_symlink())
    found = sorted(path for path in begun if RunDirectory(path).config.exists())  # a study has none
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


def compare_runs(paths: Sequence[Path]) -> dict[str, Any]:
    """Find the settings in which runs differ, and put their results side by side.

    Returns:
        `settings`: {key: [of each run]}; `results`: [{labels, arm, accuracies}] where all have some; `same_test`: whether
        all were tested on the same images; `over_encoders`: where nothing differs but the seed of pretraining, the gain at each
        number of labels, with an interval over encoders too; `not_over_encoders`: where the seed differs, why there is none.

    Raises:
        UsageError: One of them is no run, or there are less than two.
    """
    if len(paths) < 2:
        raise UsageError("name two runs or more.")
    runs = [rundir.open_run(path) for path in paths]
    tables = [tomllib.loads(run.config.read_text(encoding="utf-8")) for run in runs]
    flat = [
        {f"{table}.{key}": value for table, values in each.items() for key, value in values.items()}
        for each in tables
    ]
    keys = sorted(set().union(*flat))
    settings = {key: [each.get(key) for each in flat] for key in keys}
    settings = {key: values for key, values in settings.items() if any(each != values[0] for each in values)}
    arms = [_means(run) for run in runs]
    gains, reason = [], _why_not_over_encoders(runs, settings) if "pretrain.seed" in settings else ""
    if "pretrain.seed" in settings and not reason:
        gains = _over_encoders(runs)
    return {
        "runs": [str(run.path) for run in runs],
        "same_test": all(_tested(run) == _tested(runs[0]) for run in runs[1:]),
        "settings": settings,
        "results": [
            {"labels": labels, "arm": arm, "accuracies": [each[labels, arm] for each in arms]}
            for labels, arm in sorted(set.intersection(*(set(each) for each in arms)))
        ],
        "over_encoders": gains,
        "not_over_encoders": reason,
    }


def _tested(run: RunDirectory) -> set[tuple[str, str]] | str:
    """The images that were tested, with their labels; where none were yet, the hash of those that were locked."""
    columns = read_predictions(run.predictions, ("name", "label"))
    locked: str = rundir.read_json(run.test_lock)["sha256"]
    return set(zip(*columns.values(), strict=True)) or locked


def _why_not_over_encoders(runs: list[RunDirectory], settings: dict[str, list[Any]]) -> str:
    """Why runs of several seeds cannot be taken for several encoders of one comparison; empty where they can."""
    other = {key for key in settings if key.startswith("pretrain.")} - {
        "pretrain.seed",
        "pretrain.holdout_seed",
    }
    rows = [row for run in runs for row in rundir.read_jsonl(run.results)]
    if other:
        return f"they also differ in {', '.join(sorted(other))}"
    if len({rundir.read_json(run.data)["pool_sha256"] for run in runs}) > 1:
        return "they were pretrained on different images"
    if not all(run.results.exists() for run in runs):
        return "not all of them were compared; run `labelwise finetune` alike on each"
    if len({row["signature"] for row in rows}) > 1:
        return "they were compared with different labels, test images or settings"
    return (
        "they have no test set, and each tests its labels in turn"
        if any(row.get("folds") for row in rows)
        else ""
    )


def _over_encoders(runs: list[RunDirectory]) -> list[dict[str, Any]]:
    """Fine-tuned SimCLR minus from scratch at each number of labels, over encoders, draws and test images."""
    scores = [
        score(rundir.read_jsonl(run.results), read_predictions(run.predictions, PREDICTED)) for run in runs
    ]
    found = []
    for labels in sorted(set.intersection(*(set(each.right) for each in scores))):
        arms = [[each.right[labels].get(arm, {}) for arm in ("simclr", "supervised")] for each in scores]
        draws = sorted(set.intersection(*(set(arm) for pair in arms for arm in pair)))
        if draws:
            gains = [np.stack([simclr[draw] - scratch[draw] for draw in draws]) for simclr, scratch in arms]
            values = np.stack(
                [by_group(each, scores[0].test.groups_of(draws[0])) for each in gains]
            )  # (E, R, T)
            gain = interval_over_encoders(values)
            each_mean = values.mean(axis=(1, 2)).tolist()
            found.append({"labels": labels, **gain.to_json(), "verdict": verdict(gain), "of_each": each_mean})
    return found


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
                f"{entry['labels']:,} labels, {entry['arm']}",
                *(f"{value:.1%}" for value in entry["accuracies"]),
            ]
            for entry in document["results"]
        ]
        terminal.emit_table("", ["accuracy", *names], rows)
        if not document["same_test"]:
            terminal.emit("tested on different images: the accuracies do not say which run is better")
    for entry in document["over_encoders"]:
        each = ", ".join(f"{100 * mean:+.1f}" for mean in entry["of_each"])
        terminal.emit(
            f"gain over {len(names)} encoders with {entry['labels']:,} labels: {points(entry)} (each: {each}): {entry['verdict']}"
        )
    if any(entry["n"] < FEWEST_DRAWS for entry in document["over_encoders"]):
        terminal.emit(
            f"fewer than {FEWEST_DRAWS} encoders (--seed of pretrain) or label draws (--draws of finetune) claim nothing"
        )
    if document["not_over_encoders"]:
        terminal.emit(f"no gain over encoders: {document['not_over_encoders']}")


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
