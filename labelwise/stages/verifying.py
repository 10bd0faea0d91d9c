"""`labelwise verify`: whether everything a report says follows from the stored predictions and the run's other files."""

import json
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from labelwise import rundir, terminal
from labelwise.errors import CheckpointError
from labelwise.images.splits import hash_names
from labelwise.measures.statistics import macro_values
from labelwise.ownership import check_is_free
from labelwise.predictions import read_predictions, read_probabilities
from labelwise.rundir import RANDOM, SUGGESTED, RunDirectory
from labelwise.stages.encoders import sign
from labelwise.stages.reporting import compose, pages
from labelwise.stages.scoring import PREDICTED, Scores, score, without_result

_SHOWN = 5
_TOLERANCE = 1e-6  # other processors round otherwise
_ROUNDED = 1e-4  # sums of probabilities, which are stored with 24 bits
_LATER = (
    "finished",
    "seconds",
    "commands",
    "comparison",
)  # of environment.json: a command after the report changes them
_FIGURE = re.compile(r"<svg.*?</svg>", re.DOTALL)
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
    document = rundir.read_json(run.report_json)
    for entry in document["summary"]:
        entry.setdefault("series", RANDOM)  # an earlier version knew no other
    _check_encoders_are_there(run, document)
    results, predictions = rundir.read_jsonl(run.results), read_predictions(run.predictions, PREDICTED)
    scores = score(results, predictions)
    fresh = json.loads(json.dumps(compose(run, results, predictions, scores, document.get("label_cost"))))
    problems = [*_check_classifiers(run, results, predictions, scores), *_check_report(run, document, fresh)]
    for name in fresh["over_encoders"]["runs"][1:]:
        other = RunDirectory(run.path.with_name(name))
        theirs = rundir.read_jsonl(other.results), read_predictions(other.predictions, PREDICTED)
        problems += [f"{name}: {each}" for each in _check_classifiers(other, *theirs, score(*theirs))]
    if not problems:
        problems = _check_pages(run, document)
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
        "           report.json as recomputed; page, Markdown and model card as report.json, but for the figures"
    )


def _check_encoders_are_there(run: RunDirectory, document: dict[str, Any]) -> None:
    """Raise where encoders of other seeds, that the report counts in, are not beside the run."""
    there = document.get("over_encoders", {}).get("runs", [])
    names = [name.removeprefix(there[0]) for name in there[1:]]
    missing = [
        run.path.name + name for name in names if not run.path.with_name(run.path.name + name).exists()
    ]
    if missing:
        raise CheckpointError(
            f"{run.path}: its report is of several encoders, and {', '.join(missing)} is missing beside it; put that there, or "
            f"make the report of this encoder alone: `labelwise report --run {run.path}`."
        )


def _check_classifiers(
    run: RunDirectory, results: list[dict[str, Any]], predictions: dict[str, list[Any]], scores: Scores
) -> list[str]:
    return [
        *_check_encoder(run, results),
        *_check_draws(run, results, predictions),
        *_check_results(results, predictions, scores),
        *_check_predictions(run, predictions, scores.untested),
    ]


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
    return problems + _check_series(run, results, orders)


def _check_series(
    run: RunDirectory, results: list[dict[str, Any]], orders: dict[Path, list[str]]
) -> list[str]:
    """Chosen labels are ones that `suggest` named, with the same others in each draw, and no part of a random draw."""
    named = {
        name
        for line in rundir.read_jsonl(run.suggested)
        if not line["as_if_unlabeled"]
        for name in line["files"]
    }
    chosen, others, problems = set[str](), set[frozenset[str]](), []
    for row in results:
        if row.get("series") == SUGGESTED:
            order, first = orders[run.splits / f"draw-{row['seed']}-{row['draw']}.json"], row["labels"]
            mine = set(order[first - row["suggested"] : first])
            others.add(frozenset(order[: first - row["suggested"]]))
            chosen |= mine
            if not mine <= named:
                problems.append(
                    f"{_name(row)}: {min(mine - named)} was not suggested, as {run.suggested.name} says"
                )
    if len(others) > 1:
        problems.append("labels chosen by suggest: not the same others are beside them in every draw")
    for row in results:
        if row.get("series", RANDOM) == RANDOM and chosen:
            drawn = orders[run.splits / f"draw-{row['seed']}-{row['draw']}.json"][: row["labels"]]
            if chosen & set(drawn):
                problems.append(
                    f"{_name(row)}: drawn at random, with {min(chosen & set(drawn))} that suggest chose"
                )
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
            f"{_name(row)}: {key} is {row.get(key)}, its predictions say {value:.6g}"
            for key, value in found.items()
            if not _is_same(float(value), row.get(key), _TOLERANCE)
        ]
        truth = scores.test.truth_of(row["draw"])
        of_each = {scores.classes[each]: float(right[truth == each].mean()) for each in np.unique(truth)}
        if not _is_same(of_each, row.get("per_class"), _TOLERANCE):
            problems.append(f"{_name(row)}: per_class is not what its predictions say")
    return problems + [
        f"{method}, {labels} labels, draw {draw}: has predictions and no result"
        for method, labels, draw in sorted(without_result(results, predictions))
    ]


def _check_predictions(
    run: RunDirectory, predictions: dict[str, list[Any]], untested: list[str]
) -> list[str]:
    """Every prediction is the most probable class, and probabilities are some."""
    if not predictions["name"]:
        return []
    probabilities = read_probabilities(run.predictions)
    classes = np.array(sorted({*predictions["label"], *untested}))
    if probabilities.shape[1] < len(classes):
        return [f"{run.predictions.name}: has probabilities of fewer classes than {', '.join(classes)}"]
    predicted, rows = np.array(predictions["prediction"]), np.arange(len(probabilities))
    is_most = np.ones(len(rows), dtype=bool)
    if probabilities.shape[1] == len(classes):  # an earlier version did not note classes without a test image
        place = np.searchsorted(classes, predicted).clip(0, len(classes) - 1)
        most = probabilities.max(axis=1) - _TOLERANCE
        is_most = (classes[place] == predicted) & (probabilities[rows, place] >= most)
    is_one = np.isclose(probabilities.sum(axis=1), 1, rtol=0, atol=_ROUNDED)
    is_one &= (probabilities >= 0).all(axis=1)
    is_lost = np.isnan(probabilities).all(axis=1)  # what diverged under an earlier version is sure of nothing
    return [
        f"{predictions['method'][row]}, {predictions['labels'][row]} labels, draw {predictions['draw'][row]}: {what} of {predictions['name'][row]}"
        for right, what in (
            (is_most, "the prediction is not the most probable class"),
            (is_one, "the probabilities do not add up to 1"),
        )
        for row in np.flatnonzero(~right & ~is_lost)
    ]


def _check_report(run: RunDirectory, document: dict[str, Any], fresh: dict[str, Any]) -> list[str]:
    missing = sorted(fresh.keys() - document.keys())
    if missing:
        return [
            f"report.json: has no {missing[0]}, an earlier version wrote it; `labelwise report` comes first"
        ]
    stored, recomputed = (
        _wherever(document, Path(document["run"]), fresh["studies"]),
        _wherever(fresh, run.path, document["studies"]),
    )
    beside = f", those of {run.path.name}-seed-* beside it included"
    return [
        f"report.json: {key} is not what the predictions give{beside if key == 'over_encoders' else ''}"
        for key, value in recomputed.items()
        if not _is_same(value, stored[key], _SAMPLED if key == "labels_saved" else _TOLERANCE)
    ]


def _wherever(document: dict[str, Any], path: Path, studies: list[dict[str, Any]]) -> dict[str, Any]:
    """A report without the place and time it was made at.

    Args:
        document: report.json.
        path: Of its run, then.
        studies: That are known; others, which lie beside the run, are left out.
    """
    folders = {each["folder"] for each in studies}
    over = {**document["over_encoders"], "runs": document["over_encoders"]["runs"][1:]}
    told = {"limits": document["limits"], "next": document["next"], "over_encoders": over}
    places = [str(path), *(str(Path(*path.parts[start:])) for start in range(1, len(path.parts))), "."]

    def of_any_run(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: of_any_run(each) for key, each in value.items()}
        if isinstance(value, list):
            return [of_any_run(each) for each in value]
        if isinstance(value, str):
            for place in places:
                value = value.replace(f"--run {place}", "--run").replace(f"{place}-seed-", "-seed-")
        return value

    return {
        **{key: value for key, value in document.items() if key != "run"},
        **of_any_run(told),
        "studies": [each for each in document["studies"] if each["folder"] in folders],
        "environment": {key: value for key, value in document["environment"].items() if key not in _LATER},
    }


def _check_pages(run: RunDirectory, document: dict[str, Any]) -> list[str]:
    """What people read is what report.json says; figures, which other versions of matplotlib draw otherwise, are not compared."""
    expected = pages(run, document)
    if run.model_card.exists():
        expected.setdefault(run.model_card, "")  # of a classifier that is not there
    return [
        f"{file.name}: is not what report.json and the run's files say; `labelwise report` writes it again"
        for file, words in expected.items()
        if _without_figures(_read(file)) != _without_figures(words)
    ]


def _read(file: Path) -> str:
    return file.read_bytes().decode("utf-8", "replace") if file.is_file() else ""


def _without_figures(page: str) -> str:
    """A page with each figure's place only."""
    return _FIGURE.sub("<svg/>", page)


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
