"""`labelwise verify`: whether a report follows from the stored predictions. Recomputes all of it; trains nothing."""

import json
import math
from typing import Any

import numpy as np

from labelwise import rundir, terminal
from labelwise.errors import CheckpointError
from labelwise.images.splits import hash_names
from labelwise.predictions import read_predictions
from labelwise.rundir import RunDirectory
from labelwise.stages.reporting import compute, score

_SHOWN = 5
_TOLERANCE = 1e-6  # other processors round otherwise


def verify(run: RunDirectory) -> dict[str, Any]:
    """Recompute every number of a report from its predictions, and check the draws they rest on.

    Returns:
        `classifiers`, `predictions`, `draws`: how many were checked.

    Raises:
        CheckpointError: Something does not follow from what is stored; the message names it.
    """
    if not run.report_json.exists():
        raise CheckpointError(f"{run.path}: has no report.json; run `labelwise report --run {run.path}`.")
    problems = [*_check_draws(run), *_check_results(run), *_check_report(run)]
    if problems:
        more = f"\nand {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise CheckpointError(
            f"{run.path}: the report does not follow from what is stored:\n"
            + "\n".join(problems[:_SHOWN])
            + more
        )
    return {
        "classifiers": len(rundir.read_jsonl(run.results)),
        "predictions": len(read_predictions(run.predictions, ("draw",))["draw"]),
        "draws": len(_draw_files(run)),
    }


def show(found: dict[str, Any]) -> None:
    """Say what was checked."""
    terminal.emit(
        f"verified   {found['classifiers']:,} classifiers: each accuracy is that of its predictions, {found['predictions']:,} in all"
    )
    terminal.emit(
        f"           label draws: {found['draws']:,}, as their hashes say, nested, and without a test image"
    )
    terminal.emit("           report.json: verdict, table, comparisons and labels saved as recomputed")


def _draw_files(run: RunDirectory) -> list[Any]:
    return sorted(run.splits.glob("draw-*.json"))


def _check_draws(run: RunDirectory) -> list[str]:
    """The locked test images and the label draws are those that were hashed, and have nothing in common."""
    lock = rundir.read_json(run.test_lock)
    problems = []
    if hash_names(lock["names"]) != lock["sha256"]:
        problems.append(f"{run.test_lock.name}: its names are not those that were hashed")
    for file in _draw_files(run):
        draw = rundir.read_json(file)
        for count, expected in draw["sha256"].items():
            if hash_names(draw["order"][: int(count)]) != expected:
                problems.append(f"{file.name}: its first {count} labels are not those that were hashed")
        shared = set(draw["order"]) & set(lock["names"])
        if shared:
            problems.append(f"{file.name}: {len(shared)} of its labels are test images, as {min(shared)}")
    return problems


def _check_results(run: RunDirectory) -> list[str]:
    """Every accuracy is that of the stored predictions, on the labels its draw names."""
    scores = score(
        read_predictions(run.predictions, ("method", "labels", "draw", "name", "label", "prediction"))
    )
    problems = []
    for row in rundir.read_jsonl(run.results):
        labels, method, draw = row["labels"], row["method"], row["draw"]
        which = f"{method}, {labels} labels, draw {draw}"
        right = scores.right.get(labels, {}).get(method, {}).get(draw)
        if right is None:
            problems.append(f"{which}: has no predictions")
            continue
        by_class = [right[scores.truth == each].mean() for each in np.unique(scores.truth)]
        macro = float(np.mean(by_class))
        for name, found in (
            ("accuracy", float(right.mean())),
            ("macro_accuracy", macro),
            ("n_test", len(right)),
        ):
            if not _is_same(found, row[name]):
                problems.append(f"{which}: {name} is {row[name]}, its predictions say {found}")
        file = run.splits / f"draw-{row['seed']}-{draw}.json"
        known = rundir.read_json(file)["sha256"] if file.exists() else {}
        if known.get(str(labels)) != row["draw_sha256"]:
            problems.append(f"{which}: was trained on other labels than {file.name} names")
    return problems


def _check_report(run: RunDirectory) -> list[str]:
    document = rundir.read_json(run.report_json)
    computed = json.loads(json.dumps(compute(run)))
    return [
        f"report.json: {key} is not what the predictions give"
        for key, value in computed.items()
        if not _is_same(value, document.get(key))
    ]


def _is_same(one: Any, two: Any) -> bool:
    """Whether two JSON values are the same, numbers to the last digits."""
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(_is_same(one[key], two[key]) for key in one)
    if isinstance(one, list) and isinstance(two, list):
        return len(one) == len(two) and all(map(_is_same, one, two))
    if isinstance(one, float | int) and isinstance(two, float | int):
        return math.isclose(one, two, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
    return bool(one == two)
