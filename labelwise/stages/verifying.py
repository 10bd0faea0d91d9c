"""`labelwise verify`: whether verdict, table, comparisons and labels saved follow from the stored predictions."""

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from labelwise import rundir, terminal
from labelwise.errors import CheckpointError
from labelwise.images.splits import hash_names
from labelwise.measures.statistics import macro_values
from labelwise.ownership import check_is_free
from labelwise.predictions import read_predictions
from labelwise.rundir import RunDirectory
from labelwise.stages.encoders import sign
from labelwise.stages.reporting import compute, over_encoders, read_lookalikes
from labelwise.stages.scoring import PREDICTED, Scores, classifier_of, score

_SHOWN = 5
_TOLERANCE = 1e-6  # other processors round otherwise
_SAMPLED = 0.05  # the intervals of labels saved are sampled, and other versions of numpy sample otherwise


def verify(run: RunDirectory) -> dict[str, Any]:
    """Recompute what a report rests on: the accuracies from the predictions, the rest from those; and check the draws.

    Returns:
        `classifiers`, `predictions`, `draws`: how many were checked.

    Raises:
        CheckpointError: Something does not follow from what is stored; the message names it.
        UsageError: Another command is working on the run.
    """
    check_is_free(run)
    if not run.report_json.exists():
        raise CheckpointError(f"{run.path}: has no report.json; run `labelwise report --run {run.path}`.")
    results, predictions = rundir.read_jsonl(run.results), read_predictions(run.predictions, PREDICTED)
    scores = score(results, predictions)
    pool = rundir.read_json(run.data)["pool"]
    computed = compute(
        results,
        predictions,
        scores,
        pool,
        read_lookalikes(run, results),
        over_encoders(run, scores),
        rundir.read_json(run.environment).get("trouble"),
    )
    problems = [
        *_check_encoder(run, results),
        *_check_draws(run, results, predictions),
        *_check_results(results, predictions, scores),
        *_check_report(run, computed),
    ]
    if problems:
        check_is_free(run)  # one may have begun meanwhile
        more = f"\nand {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise CheckpointError(
            f"{run.path}: the report does not follow from what is stored (if a comparison or another version of "
            f"Labelwise came after it, `labelwise report` comes first):\n"
            + "\n".join(problems[:_SHOWN])
            + more
        )
    draws = {(row["seed"], row["draw"]) for row in results}
    return {"classifiers": len(results), "predictions": len(predictions["name"]), "draws": len(draws)}


def show(found: dict[str, Any]) -> None:
    """Say what was checked."""
    terminal.emit(
        f"verified   {found['classifiers']:,} classifiers: each accuracy is that of its predictions, {found['predictions']:,} in all"
    )
    terminal.emit(
        f"           label draws: {found['draws']:,}, as their hashes say, nested, and without a test image"
    )
    terminal.emit(
        "           report.json: verdict, table, comparisons, labels saved and calibration as recomputed"
    )


def _check_encoder(run: RunDirectory, results: list[dict[str, Any]]) -> list[str]:
    """The encoder is the one that was compared, where it is still there and an earlier version did not compare it."""
    if not run.encoder.exists():
        return []
    signed = {row["signature"] for row in results if "-" in row["signature"]}
    other = [each for each in signed if each != sign(each.partition("-")[0], run)]
    return ["encoder.safetensors or head.safetensors: is not the one that was compared"] if other else []


def _check_draws(
    run: RunDirectory, results: list[dict[str, Any]], predictions: dict[str, list[Any]]
) -> list[str]:
    """Each classifier had the first labels of its draw, and no image that its draw tested or that was locked away."""
    lock = rundir.read_json(run.test_lock)
    problems = []
    tested = defaultdict(set)
    for name, draw in set(zip(predictions["name"], predictions["draw"], strict=True)):
        tested[draw].add(name)
    locked = set(lock["names"])
    if not locked & set().union(*tested.values()):
        locked = set()  # others were tested in its place, and these could be labeled
    if hash_names(lock["names"]) != lock["sha256"]:
        problems.append(f"{run.test_lock.name}: its names are not those that were hashed")
    orders: dict[Path, list[str]] = {}
    for row in results:
        file = run.splits / f"draw-{row['seed']}-{row['draw']}.json"
        if file not in orders:
            orders[file] = rundir.read_json(file)["order"] if file.exists() else []
            shared = set(orders[file]) & (tested[row["draw"]] | locked)
            if shared:
                problems.append(f"{file.name}: {len(shared)} of its labels are test images, as {min(shared)}")
        if hash_names(orders[file][: row["labels"]]) != row["draw_sha256"]:
            problems.append(f"{_name(row)}: was trained on other labels than the first of {file.name}")
    return problems


def _check_results(
    results: list[dict[str, Any]], predictions: dict[str, list[Any]], scores: Scores
) -> list[str]:
    """Every accuracy is that of the stored predictions, and none is left out."""
    problems = []
    for row in results:
        right = scores.right[row["labels"]][row["method"]][row["draw"]]
        found = {
            "accuracy": right.mean(),
            "macro_accuracy": macro_values(right[None], scores.test.truth_of(row["draw"])).mean(),
            "n_test": len(right),
        }
        problems += [
            f"{_name(row)}: {key} is {row[key]}, its predictions say {value:.6g}"
            for key, value in found.items()
            if not _is_same(float(value), row[key], _TOLERANCE)
        ]
    keys = zip(*(predictions[key] for key in ("method", "labels", "draw")), strict=True)
    left_out = set(keys) - set(map(classifier_of, results))
    return problems + [
        f"{method}, {labels} labels, draw {draw}: has predictions and no result"
        for method, labels, draw in sorted(left_out)
    ]


def _check_report(run: RunDirectory, computed: dict[str, Any]) -> list[str]:
    document = rundir.read_json(run.report_json)
    missing = sorted(computed.keys() - document.keys())
    if missing:
        return [
            f"report.json: has no {missing[0]}, an earlier version wrote it; `labelwise report` comes first"
        ]
    beside = f", those of {run.path.name}-seed-* beside it included"
    for each in (document, computed):  # a run and its siblings may have been moved
        each["over_encoders"] = each["over_encoders"]["gains"]
    return [
        f"report.json: {key} is not what the predictions give{beside if key == 'over_encoders' else ''}"
        for key, value in json.loads(json.dumps(computed)).items()
        if not _is_same(value, document[key], _SAMPLED if key == "labels_saved" else _TOLERANCE)
    ]


def _name(row: dict[str, Any]) -> str:
    return f"{row['method']}, {row['labels']} labels, draw {row['draw']}"


def _is_same(one: Any, two: Any, tolerance: float) -> bool:
    """Whether two JSON values are the same, numbers but for a relative tolerance."""
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(_is_same(one[key], two[key], tolerance) for key in one)
    if isinstance(one, list) and isinstance(two, list):
        return len(one) == len(two) and all(_is_same(a, b, tolerance) for a, b in zip(one, two, strict=True))
    if isinstance(one, float | int) and isinstance(two, float | int):
        return math.isclose(one, two, rel_tol=tolerance, abs_tol=_TOLERANCE)
    return bool(one == two)
