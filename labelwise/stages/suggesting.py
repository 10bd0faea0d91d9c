"""`labelwise suggest`: which images to label next, from the features of a run's own encoder."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from labelwise import environment, rundir, terminal
from labelwise.annotations import find_rows, read_annotations
from labelwise.config import FinetuneSettings
from labelwise.errors import DataError, UsageError
from labelwise.images.splits import pool_indices
from labelwise.learning.precision import choose_device
from labelwise.measures.label_savings import expected_accuracy
from labelwise.measures.linear import Probe, fit_probe, stratified_folds
from labelwise.measures.typicality import Choice, choose_doubtful, choose_typical
from labelwise.models.features import extract_features
from labelwise.models.weights import load_encoder
from labelwise.ownership import hold
from labelwise.reports import contact_sheet
from labelwise.rundir import MIXED, RANDOM, SUGGESTED, RunDirectory
from labelwise.stages.benching import open_separated, remember_sources
from labelwise.stages.encoders import ENCODER_METHODS
from labelwise.stages.methods import FOLDS, PROBE_STRENGTHS, is_unbalanced
from labelwise.stages.targets import check_file
from labelwise.tables import TEXT, open_table
from labelwise.views.mosaic import encode_thumbnail

COLUMNS = ("rank", "file", "why", "cluster")
# From so many labels a class, and right in so many, a classifier's doubt says more than clusters do. Measured 2026-11-26, recipes/LOG.md.
ENOUGH = 20
SURE = 0.9
_LISTED = 5
_PICTURED = 500


def suggest(
    run: RunDirectory,
    budget: int,
    out: Path | None = None,
    *,
    labels: Path | None = None,
    labels_root: Path | None = None,
) -> dict[str, Any]:
    """Choose images to label next, and write them as a table and as a page of pictures; the run remembers which.

    Test images, what belongs with them and what has a label or belongs with what has one are never chosen, nor two that belong
    together. The first of more are the answer for fewer. Where everything has a label, images are chosen as if nothing had.

    Args:
        run: Pretrained, compared or not.
        budget: How many.
        out: A .csv file that is not there yet; default `suggestions.csv` in the run. The page lies beside it.
        labels, labels_root: As in `finetune`; default those of the last comparison, else those of pretraining.

    Returns:
        `suggestions` (rank, file, why, cluster), `out`, `page`, `labels` (images that have one), `as_if_unlabeled`, `expected` (see
        `_expect`), and in words `summary`, `notes`, `next`.

    Raises:
        DataError: No image is left to label.
        UsageError: Another command is working on the run, or the table cannot be written there.
    """
    _check_target(run, out)
    with hold(run):
        given = {"run": run.path, "labels": labels, "labels_root": labels_root}
        settings = remember_sources(run, FinetuneSettings.resolve(given))
        encoder, spec = load_encoder(run.path)
        images, cache, groups, lock, _ = open_separated(run, settings, spec)
        pool = pool_indices(images, cache.readable, lock)
        said = [each for each in read_annotations(run) if each.answer == "unsure"]
        unsure = [row for row in find_rows(said, images.names, cache.keys) if row is not None]
        pool = pool[~np.isin(pool, unsure)]
        has_label = np.array([images.labels[row] is not None for row in pool])
        as_if_unlabeled = bool(has_label.all())
        labeled = has_label & (not as_if_unlabeled)
        rows, labeled_rows = _one_of_each_group(pool, groups.of, labeled)
        if labeled_rows.all():
            raise DataError(
                f"{images.root}: no image is left to label: all that are not for testing have a label, or belong with one that has."
            )
        terminal.say(f"embedding  {len(rows):,} images")
        device = choose_device("auto")
        features = extract_features(
            encoder.to(device), cache.evaluations, rows, spec.normalization, device
        ).numpy()
        terminal.say(f"choosing   {budget:,} of {np.sum(~labeled_rows):,} images without a label")
        known = [
            images.labels[row] if has else None for row, has in zip(rows.tolist(), labeled_rows, strict=True)
        ]
        suggestions = _choose(features, known, budget)

        label_of = dict(zip(images.names, images.labels, strict=True))
        document = _describe(
            run,
            out or run.suggestions,
            [
                {"rank": rank, "file": images.names[rows[place]], "why": why, "cluster": cluster}
                for rank, (place, why, cluster) in enumerate(suggestions, start=1)
            ],
            budget=budget,
            left=int(np.sum(~labeled_rows)),
            labels=int(labeled.sum()),
            as_if_unlabeled=as_if_unlabeled,
            untested=sum(label_of[name] is None for name in lock["names"]),
            label_file=settings.labels or rundir.read_json(run.data)["sources"]["labels"],
        )
        thumbnails = [
            encode_thumbnail(cache.evaluations[rows[place]]) for place, *_ in suggestions[:_PICTURED]
        ]
        page = contact_sheet.render(document, thumbnails)
        _remember(run, document, budget)  # first: what is on the page is never taken for a random label
        rundir.write_together(
            {
                Path(document["out"]): partial(_write_table, document["suggestions"]),
                Path(document["page"]): partial(Path.write_text, data=page, encoding="utf-8"),
            }
        )
    return document


def show(document: dict[str, Any]) -> None:
    """Print what was chosen, and what to do with it."""
    terminal.emit(document["summary"])
    for each in document["suggestions"][:_LISTED]:
        terminal.emit(f"{each['rank']:>8}  {each['file']}: {each['why']}")
    if len(document["suggestions"]) > _LISTED:
        terminal.emit(f"          and {len(document['suggestions']) - _LISTED:,} more")
    for note in document["notes"]:
        terminal.emit(f"note      {note}")
    terminal.emit(f"written   {document['out']}")
    terminal.emit(f"page      {document['page']}")
    terminal.emit(f"next      {document['next']}")


def _check_target(run: RunDirectory, out: Path | None) -> None:
    """Refuse to write over anything but an earlier table of ours."""
    if out is None:
        if run.suggestions.exists() and not _is_ours(run.suggestions):
            raise UsageError(
                f"{run.suggestions}: holds more than `labelwise suggest` wrote, labels it may be; move it away, or name another file with --out."
            )
        return
    check_file(out, (".csv",), run)
    check_file(out.with_suffix(".html"), (".html",), run)


def _is_ours(file: Path) -> bool:
    """Whether a table has our columns, and no labels beside them."""
    with file.open("rb") as stream:
        return stream.readline().strip() == ",".join(COLUMNS).encode()


def _one_of_each_group(
    pool: npt.NDArray[np.int64], groups: npt.NDArray[np.int64], labeled: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """One row of each group of the pool, one with a label where there is one, and which have a label."""
    order = np.argsort(~labeled, kind="stable")
    _, first = np.unique(groups[pool[order]], return_index=True)
    kept = np.sort(order[first])
    return pool[kept], labeled[kept]


def _choose(
    features: npt.NDArray[np.float32], labels: list[str | None], budget: int
) -> list[tuple[int, str, int | None]]:
    """Place, reason and cluster of each choice: typical images, or those that a linear probe doubts where it knows enough.

    Args:
        features: (N, F).
        labels: Of each image, (N,).
        budget: How many.
    """
    labeled = np.array([label is not None for label in labels])
    classes = sorted({label for label in labels if label is not None})
    known = np.array([classes.index(label) for label in labels if label is not None], dtype=np.int64)
    probe = _probe_that_knows(features, np.flatnonzero(labeled), known, len(classes))
    if probe is None:
        typical = choose_typical(features, labeled, budget)
        return [(choice.row, _why_typical(choice), choice.cluster) for choice in typical]
    chances = torch.softmax(torch.from_numpy(probe.logits(features)), dim=1).numpy()
    doubtful = choose_doubtful(chances, labeled, budget).tolist()
    return [(place, _why_doubtful(chances[place], classes), None) for place in doubtful]


def _probe_that_knows(
    features: npt.NDArray[np.float32],
    rows: npt.NDArray[np.int64],
    labels: npt.NDArray[np.int64],
    classes: int,
) -> Probe | None:
    """A linear probe on the labels of these rows; None where they are few, or it is wrong on too many that it did not see."""
    if classes < 2 or len(rows) < ENOUGH * classes or np.bincount(labels).min() < FOLDS:
        return None

    def fit(some: npt.NDArray[np.int64]) -> Probe:
        balanced = is_unbalanced(labels[some], classes)
        return fit_probe(
            features[rows[some]],
            labels[some],
            classes,
            PROBE_STRENGTHS[0],
            balanced=balanced,
            reference=features,
        )

    right = [
        fit(train).logits(features[rows[held]]).argmax(axis=1) == labels[held]
        for train, held in stratified_folds(labels, FOLDS, 0)
    ]
    return fit(np.arange(len(rows))) if np.concatenate(right).mean() >= SURE else None


def _why_typical(choice: Choice) -> str:
    if choice.size == 1:
        return "like no other image"
    known = (
        f"{choice.labeled:,} of them labeled or chosen before" if choice.labeled else "none of them labeled"
    )
    return f"typical of {choice.size:,} images that are alike, {known}"


def _why_doubtful(chances: npt.NDArray[np.float32], classes: list[str]) -> str:
    first, second = np.argsort(-chances, kind="stable")[:2]
    return f"{classes[first]} ({chances[first]:.0%}) or {classes[second]} ({chances[second]:.0%})?"


def _remember(run: RunDirectory, document: dict[str, Any], budget: int) -> None:
    """Add what was chosen to the history of the run, unless it is there."""
    files = [each["file"] for each in document["suggestions"]]
    line = {"budget": budget, "files": files, "as_if_unlabeled": document["as_if_unlabeled"]}
    before = [{key: each[key] for key in line} for each in rundir.read_jsonl(run.suggested)]
    if line not in before:
        rundir.append_jsonl(run.suggested, {"at": environment.now(), **line})


def _write_table(suggestions: list[dict[str, Any]], fresh: Path) -> None:
    with open_table(fresh, ".csv", dict.fromkeys(COLUMNS, TEXT)) as table:
        table.write(
            {
                name: ["" if each[name] is None else str(each[name]) for each in suggestions]
                for name in COLUMNS
            }
        )


def _describe(
    run: RunDirectory,
    out: Path,
    suggestions: list[dict[str, Any]],
    *,
    budget: int,
    left: int,
    labels: int,
    as_if_unlabeled: bool,
    untested: int,
    label_file: Path | str | None,
) -> dict[str, Any]:
    """What was chosen and what it means.

    Args:
        run, out, suggestions, budget: What was asked and found.
        left: Images that could be chosen.
        labels, as_if_unlabeled: See `suggest`.
        untested: Test images without a label.
        label_file: Where labels are, if that was said.
    """
    number = len(suggestions)
    expected = _expect(run, labels, number)
    notes = []
    if as_if_unlabeled:
        notes.append("every image has a label already: chosen as if none had, for study")
    if number < budget:
        notes.append(f"{budget:,} were asked for and no more than {number:,} are left")
    if untested:
        notes.append(
            f"{untested:,} test images have no label; label some of those that {run.test_lock} names too: what is suggested is never tested on"
        )
    if expected is not None:
        notes.append(_expected_in_words(expected))
    ask = "" if as_if_unlabeled else f"labelwise annotate --run {run.path}, a page that asks about them; or "
    write = f"add them to {label_file}" if label_file else "write a CSV with the columns file,label"
    all_labels = (
        " FILE holds the earlier labels too, but for those from the page."
        if labels and not label_file
        else ""
    )
    return {
        "suggestions": suggestions,
        "out": str(out),
        "page": str(out.with_suffix(".html")),
        "labels": labels,
        "as_if_unlabeled": as_if_unlabeled,
        "expected": expected,
        "summary": f"{number:,} of {left:,} images to label next, the first ones matter most",
        "notes": notes,
        "next": f"{ask}{write}; then labelwise finetune --run {run.path} --labels {label_file or 'FILE'}.{all_labels}",
    }


def _expect(run: RunDirectory, labels: int, more: int) -> dict[str, Any] | None:
    """What so many more labels bring, if they were drawn at random: read off the curve of the run's last comparison.

    Where no labels were drawn at random it is the curve of those chosen before.

    Returns:
        `method`, `labels`, `more`, accuracy `before` (None where the curve begins later) and `after`, the `most` labels of the
        curve, and its `series`; None without a curve that reaches so far down.
    """
    everything = rundir.read_jsonl(run.results)
    series = [row.get("series", RANDOM) for row in everything]
    of_curve = RANDOM if RANDOM in series else SUGGESTED if SUGGESTED in series else MIXED
    results = [row for row, each in zip(everything, series, strict=True) if each == of_curve]
    for method in ENCODER_METHODS:
        rows = [row for row in results if row["method"] == method]
        counts = {row["labels"] for row in rows}
        curve = {
            count: float(np.mean([row["accuracy"] for row in rows if row["labels"] == count]))
            for count in counts
        }
        after = expected_accuracy(curve, labels + more)
        if after is not None:
            before = expected_accuracy(curve, labels)
            return {
                "method": method,
                "labels": labels,
                "more": more,
                "before": before,
                "after": after,
                "most": max(counts),
                "series": of_curve,
            }
    return None


def _expected_in_words(expected: dict[str, Any]) -> str:
    total = expected["labels"] + expected["more"]
    beyond = (
        f" (drawn on beyond its end at {expected['most']:,}, which is rather too much)"
        if total > expected["most"]
        else ""
    )
    luck = (
        "labels drawn at random; chosen ones may do better or worse"
        if expected["series"] == RANDOM
        else "a curve with labels that `suggest` chose"
    )
    if expected["before"] is None:
        return f"the curve of the last comparison has {expected['after']:.1%} right with {total:,} labels{beyond}: {luck}"
    points = 100 * (expected["after"] - expected["before"])
    return (
        f"{expected['more']:,} more labels: about {points:+.1f} points, {expected['after']:.1%} instead of {expected['before']:.1%}, "
        f"read off the curve of the last comparison{beyond}: {luck}"
    )
