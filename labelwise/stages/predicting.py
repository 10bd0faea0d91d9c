"""`labelwise predict`: what the kept classifier says of images, one row each, however many there are."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from labelwise import rundir, terminal
from labelwise.errors import DataError, LabelwiseError
from labelwise.images.cache import read_evaluations
from labelwise.images.source import ImageSet, open_given
from labelwise.interruption import stop_between_steps
from labelwise.learning.optimization import Diverged
from labelwise.learning.precision import choose_device
from labelwise.models.features import extract_features
from labelwise.predictions import open_table
from labelwise.rundir import RunDirectory
from labelwise.stages.finetuning import chances_of, load_classifier
from labelwise.stages.reporting import kept_classifier
from labelwise.stages.targets import check_file

COLUMNS = ("file", "label", "confidence", "second_label", "second_confidence")
WORDS = frozenset({"file", "label", "second_label"})
_LISTED = 5


def predict(
    run: RunDirectory, images: list[Path], out: Path, *, probabilities: bool = False, device: str = "auto"
) -> dict[str, Any]:
    """Classify images with the classifier of a run and write a table; images that cannot be read are left out by name.

    Args:
        run: Compared, so that it holds a classifier.
        images: A folder, or files.
        out: A .csv or .parquet file that is not there yet.
        probabilities: Add a column per class, `p_CLASS`.
        device: Where.

    Returns:
        `out`, `images` (rows written), `labels` (how many of each), `left_out` (file and reason), `expected` (mean `accuracy`
        with the most `labels` that were compared, `n_test`, and `trained_on`; None where the classifier is an older one; of a distilled
        one its own, None where it was not tested).

    Raises:
        CheckpointError: The run has no classifier, or it is damaged.
        DataError: There are no images.
        UsageError: The table cannot be written there.
    """
    data = rundir.read_json(run.data)
    check_file(out, (".csv", ".parquet"), run, images)
    classifier, spec, classes = load_classifier(run)
    results = rundir.read_jsonl(run.results)
    kept = kept_classifier(run, results)
    if kept is None:
        terminal.warn(
            f"the classifier of {run.path} was trained before its last comparison; `labelwise finetune` trains it anew."
        )
    place = choose_device(device)
    classifier.to(place)
    found = open_given(images)
    deep = data["intensity_range"]
    names = [*COLUMNS, *(f"p_{name}" for name in classes if probabilities)]
    left_out: list[dict[str, str]] = []
    labels: Counter[str] = Counter()
    rows = np.arange(len(found.names))

    def write(fresh: Path) -> None:
        unread = 0
        with (
            stop_between_steps() as stop,
            open_table(fresh, out.suffix, names, WORDS) as table,
            terminal.track("predicting", len(rows)) as bar,
        ):
            for chunk, pixels in read_evaluations(found, rows, spec.image_size, deep, left_out):
                stop.check(f"{out} was not written; the same command begins again.")
                logits = extract_features(
                    classifier, pixels, np.arange(len(chunk)), spec.normalization, place
                )
                try:
                    chances = chances_of(logits)
                except Diverged as error:
                    raise LabelwiseError(
                        f"{run.classifier}: {error}; train another with `labelwise finetune`."
                    ) from None
                columns = _columns(found, chunk, chances, classes)
                columns |= {f"p_{name}": chances[:, i].tolist() for i, name in enumerate(classes)}
                table.write({name: columns[name] for name in names})
                labels.update(columns["label"])
                bar.advance(len(chunk) + len(left_out) - unread)
                unread = len(left_out)
        if not labels:
            first = left_out[0]
            raise DataError(
                f"none of the {len(rows)} images can be read, e.g. {first['file']}: {first['reason']}."
            )

    rundir.write_atomically(out, write)
    return {
        "out": str(out),
        "images": sum(labels.values()),
        "labels": dict(labels.most_common()),
        "left_out": left_out,
        "expected": _expected(results, kept) if kept is not None else None,
    }


def show(document: dict[str, Any]) -> None:
    """Print what was predicted."""
    shares = ", ".join(f"{label} {count:,}" for label, count in list(document["labels"].items())[:12])
    more = " ..." if len(document["labels"]) > 12 else ""
    terminal.emit(f"{document['images']:,} images: {shares}{more}")
    for entry in document["left_out"][:_LISTED]:
        terminal.emit(f"left out  {entry['file']}: {entry['reason']}")
    if len(document["left_out"]) > _LISTED:
        terminal.emit(f"          and {len(document['left_out']) - _LISTED:,} more; --json lists all")
    expected = document["expected"]
    if expected is not None:
        fewer = expected["labels"] < expected["trained_on"]
        more = f"; this one learned from {expected['trained_on']:,}" if fewer else ""
        terminal.emit(
            f"expect    {expected['accuracy']:.1%} right where images are like the {expected['n_test']:,} test images: so it was "
            f"with {expected['labels']:,} labels{more}"
        )
    terminal.emit(f"written   {document['out']}")


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


def _columns(
    images: ImageSet, rows: npt.NDArray[np.int64], chances: npt.NDArray[np.float32], classes: list[str]
) -> dict[str, list[Any]]:
    """The first columns of a table: file, and the two classes that are most probable."""
    first, second = np.argsort(-chances, axis=1, kind="stable")[:, :2].T
    place = np.arange(len(rows))
    return {
        "file": [images.names[row] for row in rows.tolist()],
        "label": [classes[index] for index in first],
        "confidence": chances[place, first].tolist(),
        "second_label": [classes[index] for index in second],
        "second_confidence": chances[place, second].tolist(),
    }
