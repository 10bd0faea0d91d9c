"""`labelwise predict`: what the kept classifier says of images and how far to believe it, one row each, however many there are."""

import hashlib
import json
from collections import Counter
from collections.abc import Generator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from labelwise import rundir, terminal
from labelwise.errors import DataError
from labelwise.images.cache import fingerprint, held_at_once, read_evaluations
from labelwise.images.decoding import Pixels
from labelwise.images.source import ImageSet, open_given
from labelwise.interruption import stop_between_steps
from labelwise.learning.precision import choose_devices
from labelwise.models.features import map_in_streams
from labelwise.models.weights import read_hash
from labelwise.rundir import RunDirectory
from labelwise.stages.classifier import read_calibration
from labelwise.stages.oracle import DOUBTFUL, Oracle, load_oracle, make_promise
from labelwise.stages.reporting import kept_classifier
from labelwise.stages.targets import check_file
from labelwise.tables import Columns, Parts, open_parts, open_table, remove_parts_of_whole

_LISTED = 5


class _Summary:
    """What a table says, counted part by part."""

    def __init__(self) -> None:
        self.labels: Counter[str] = Counter()
        self.abstained = self.far = self.empty = 0
        self.left_out: list[dict[str, str]] = []

    def add(self, part: dict[str, list[Any]], left_out: list[dict[str, str]]) -> None:
        """Count some rows, and those that have none."""
        self.labels.update(part["label"])
        self.abstained += sum(part["abstain"])
        self.far += sum(part.get("far", ()))
        self.empty += sum(not each for each in part.get("set", ()))
        self.left_out += left_out


def predict(
    run: RunDirectory,
    images: list[Path],
    out: Path,
    *,
    probabilities: bool = False,
    coverage: float | None = None,
    device: str = "auto",
    devices: str = "1",
) -> dict[str, Any]:
    """Classify images with the classifier of a run and write a table; images that cannot be read are left out by name.

    Interrupted or killed, the same call goes on.

    Args:
        run: Compared, so that it holds a classifier.
        images: What `open_given` takes.
        out: A .csv or .parquet file that is not there yet.
        probabilities: Add a column per class, `p_CLASS`.
        coverage: Share of images whose set shall hold the right class; default 0.9, where labels are enough for sets.
        device: Where.
        devices: How many of these share the images; a number, or `all`.

    Returns:
        `out`, `images` (rows written), `labels` (how many of each), `abstained`, `far` (None where it is not known), `sets`
        (`coverage`, `labels` that it rests on, how many `suggest` chose, and how many sets are `empty`; None without), `calibrated_on` (labels, 0 where
        confidence is not calibrated), `uncalibrated` (why not, else None), `left_out` (file and reason), `expected` (mean `accuracy` with the most `labels` that were
        compared, `n_test`, and `trained_on`; None where the classifier is an older one; of a
        distilled one its own, None where it was not tested).

    Raises:
        CheckpointError: The classifier is damaged.
        DataError: There are no images.
        UsageError: The run has no classifier, the table cannot be written there, or the labels are too few for the coverage asked for.
    """
    remove_parts_of_whole(out)
    check_file(out, (".csv", ".parquet"), run, images)
    deep = rundir.read_json(run.data)["intensity_range"]
    calibration = read_calibration(run)
    places = choose_devices(devices, device)
    oracle = load_oracle(run, make_promise(run, calibration, coverage), places[0])
    oracles = [oracle, *(oracle.on(place) for place in places[1:])]
    results = rundir.read_jsonl(run.results)
    kept = kept_classifier(run, results)
    if kept is None:
        terminal.warn(
            f"the classifier of {run.path} was trained before its last comparison; `labelwise finetune` trains it anew."
        )
    found = open_given(images)
    columns = oracle.columns(probabilities=probabilities)
    deciding = [
        *(version("labelwise"), fingerprint(found, 0, oracle.spec.image_size), read_hash(run.classifier)),
        *(oracle.classes, calibration, coverage, deep, list(columns), oracle.place.type),
    ]
    identity = hashlib.sha256(json.dumps(deciding).encode()).hexdigest()
    with open_parts(out, columns, identity) as parts:
        _fill(parts, oracles, found, deep, columns)
        summary = _finish(parts, out, columns)
    if not parts.rows:
        first = summary.left_out[0]
        raise DataError(
            f"none of the {parts.done} images can be read, e.g. {first['file']}: {first['reason']}."
        )
    sets, chosen = oracle.promise, calibration.get("suggested", 0) if calibration else 0
    uncalibrated = _why_uncalibrated(run, calibration)
    return {
        "out": str(out),
        "images": parts.rows,
        "labels": dict(summary.labels.most_common()),
        "abstained": summary.abstained,
        "far": summary.far if "far" in columns else None,
        "sets": {
            "coverage": sets.coverage,
            "labels": sets.labels,
            "suggested": chosen,
            "empty": summary.empty,
        }
        if sets
        else None,
        "calibrated_on": calibration["scored"] if calibration and not uncalibrated else 0,
        "uncalibrated": uncalibrated,
        "left_out": summary.left_out,
        "expected": _expected(results, kept) if kept is not None else None,
    }


def _why_uncalibrated(run: RunDirectory, calibration: dict[str, Any] | None) -> str | None:
    """Why probabilities are not calibrated, in words; None where they are."""
    if calibration is not None:
        return "labels are too few" if calibration["temperature"] == 1 else None
    if rundir.read_json(run.classifier_json).get("distilled"):
        return f"the classifier is distilled, so there are no sets and none is far; `labelwise finetune --run {run.path}` trains one that is not"
    return f"the classifier is of an earlier version, or diverges on a part of its labels; `labelwise finetune --run {run.path}` tries anew"


def _fill(
    parts: Parts, oracles: list[Oracle], images: ImageSet, deep: list[float] | None, columns: Columns
) -> None:
    """Ask the same oracle on each of some devices about all images that were not asked about yet.

    Raises:
        Interrupted: A signal came; all that is done is saved.
    """
    rows = np.arange(len(images.names))
    scale = (deep[0], deep[1]) if deep else None
    size = oracles[0].spec.image_size
    together = held_at_once(size)
    first = parts.done

    def chunks() -> Generator[tuple[list[str], Pixels, list[dict[str, str]]], None, None]:
        left_out: list[dict[str, str]] = []
        for chunk, pixels in read_evaluations(images, rows[first:], size, scale, left_out):
            yield [images.names[row] for row in chunk.tolist()], pixels, left_out.copy()
            left_out.clear()
            if stop:  # what is being asked is still kept
                return

    def ask(
        oracle: Oracle, chunk: tuple[list[str], Pixels, list[dict[str, str]]]
    ) -> tuple[dict[str, Any], list[dict[str, str]]]:
        names, pixels, left_out = chunk
        return oracle.tell(names, pixels) if names else {name: [] for name in columns}, left_out

    with stop_between_steps() as stop, terminal.track("predicting", len(rows), done=parts.done) as bar:
        for told, left_out in map_in_streams(
            [partial(ask, each) for each in oracles], chunks(), oracles[0].place
        ):
            done = min(parts.done + together, len(rows))
            bar.advance(done - parts.done)
            parts.add(done, {name: told[name] for name in columns}, left_out)
        if parts.done < len(rows):
            parts.save()
            stop.check(f"{parts.done:,} of {len(rows):,} images are done; the same command goes on.")


def _finish(parts: Parts, out: Path, columns: Columns) -> _Summary:
    """Write the table, where it has a row."""
    summary = _Summary()

    def write(fresh: Path) -> None:
        with open_table(fresh, out.suffix, columns) as table:
            for part, left_out in parts.read():
                table.write(part)
                summary.add(part, left_out)

    if parts.rows:
        parts.finish(out, write)
    else:
        for part, left_out in parts.read():
            summary.add(part, left_out)
    return summary


def show(document: dict[str, Any]) -> None:
    """Print what was predicted."""
    count = document["images"]
    shares = ", ".join(f"{label} {number:,}" for label, number in list(document["labels"].items())[:12])
    more = " ..." if len(document["labels"]) > 12 else ""
    terminal.emit(f"{count:,} images: {shares}{more}")
    for entry in document["left_out"][:_LISTED]:
        terminal.emit(f"left out  {entry['file']}: {entry['reason']}")
    if len(document["left_out"]) > _LISTED:
        terminal.emit(f"          and {len(document['left_out']) - _LISTED:,} more; --json lists all")
    for line in _doubts(document):
        terminal.emit(line)
    expected = document["expected"]
    if expected is not None:
        fewer = expected["labels"] < expected["trained_on"]
        more = f"; this one learned from {expected['trained_on']:,}" if fewer else ""
        terminal.emit(
            f"expect    {expected['accuracy']:.1%} right where images are like the {expected['n_test']:,} test images: so it was "
            f"with {expected['labels']:,} labels{more}"
        )
    terminal.emit(f"written   {document['out']}")


def _doubts(document: dict[str, Any]) -> list[str]:
    """How many images it does not decide on, and what that rests on."""
    count, sets = document["images"], document["sets"]
    if document["uncalibrated"]:
        lines = [f"confidence is not calibrated: {document['uncalibrated']}"]
    else:
        lines = [f"confidence calibrated on {document['calibrated_on']:,} labels that were held out in turn"]
    if sets is None:
        why = "" if document["uncalibrated"] else "; labels are too few for sets"
        lines.append(
            f"abstain   {document['abstained']:,} of {count:,}, where confidence is below {DOUBTFUL:.0%}{why}"
        )
    else:
        lines.append(
            f"sets      hold the right class of {sets['coverage']:.0%} of images like the {sets['labels']:,} labels that this rests on"
        )
        if sets["suggested"]:
            lines.append(
                f"          {sets['suggested']:,} labels were chosen by suggest: on images at random it may be another share"
            )
        empty = (
            f", {sets['empty']:,} of them none; a higher --coverage makes these fewer"
            if sets["empty"]
            else ""
        )
        lines.append(f"abstain   {document['abstained']:,} of {count:,}, whose set is not one class{empty}")
    if document["far"] is not None:
        lines.append(
            f"far       {document['far']:,} of {count:,} are less like the images of the run than 99 % of these are"
        )
    return lines  # fmt: skip


def _expected(results: list[dict[str, Any]], kept: dict[str, Any]) -> dict[str, Any] | None:
    """How good the comparison found classifiers of this kind, with the most labels that it tried; a distilled one is none of them."""
    if distilled := kept.get("distilled"):
        test, labels = distilled["test"], kept["labels"]
        known = {"labels": labels, "trained_on": labels}
        return test and {"accuracy": test["accuracy"], "n_test": test["n_test"], **known}
    rows = [row for row in results if row["method"] == "simclr"]
    most = max(row["labels"] for row in rows)
    scores = [row["accuracy"] for row in rows if row["labels"] == most]
    return {
        "accuracy": float(np.mean(scores)),
        "labels": most,
        "n_test": rows[0]["n_test"],
        "trained_on": kept["labels"],
    }
