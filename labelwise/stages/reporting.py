"""`labelwise report`: from stored results to a verdict, a table and a page. Reads no model."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from labelwise import rundir, terminal
from labelwise.errors import CheckpointError
from labelwise.images.decoding import evaluation_short_side
from labelwise.measures.calibration import calibration_error, reliability
from labelwise.measures.label_savings import labels_saved
from labelwise.measures.statistics import (
    Floats,
    Folds,
    TestSet,
    by_group,
    verdict,
)
from labelwise.models.encoder import EncoderSpec
from labelwise.ownership import hold
from labelwise.predictions import CONFIDENCE, read_predictions
from labelwise.reports import html, markdown, model_card, text
from labelwise.rundir import RANDOM, RunDirectory
from labelwise.stages.concluding import limits_in_words, next_steps, verdict_in_words
from labelwise.stages.encoders import ENCODER_METHODS, find_siblings, gains_over_encoders
from labelwise.stages.scoring import (
    ARMS,
    OURS,
    PREDICTED,
    Result,
    Scores,
    classifier_of,
    counts_of_all_labels,
    read_scores,
    score,
    without_result,
)

_COMPARED = (
    ("simclr", "supervised"),
    ("simclr_probe", "supervised"),
    ("simclr", "simclr_probe"),
    ("simclr", "pixels"),
    ("simclr_probe", "pixels"),
    ("simclr_probe", "random_probe"),
)

DISTILLED = "-distilled"  # ends the signature of a classifier that came from the one with the rest of it
_HARDLY = 0.03  # better than naming one class, and still no more than that
_FEWEST_TESTED = 20  # independent test images, for labels saved
SUSPECTS = 24  # labels that look wrong which the report names


def report(run: RunDirectory, label_cost: float | None = None) -> dict[str, Any]:
    """Write report.json, report.md and report.html of a run, and return the document.

    Args:
        run: Pretrained, compared or not.
        label_cost: Of one label, in any currency; labels saved are then also told in money.

    Raises:
        CheckpointError: A file of the run is damaged.
        UsageError: Another command is working on the run.
    """
    with hold(run):
        results, predictions = rundir.read_jsonl(run.results), read_predictions(run.predictions, PREDICTED)
        _check_results(run, results, predictions)
        document = compose(run, results, predictions, score(results, predictions), label_cost)
        written = pages(run, document)
        rundir.write_texts({run.report_json: rundir.json_text(document), **written})
        if run.model_card not in written:
            run.model_card.unlink(missing_ok=True)  # an earlier one
    return document


def compose(
    run: RunDirectory,
    results: list[Result],
    predictions: dict[str, list[Any]],
    scores: Scores,
    label_cost: float | None,
) -> dict[str, Any]:
    """Everything that report.json holds, from what is stored.

    Args:
        run: Pretrained, compared or not.
        results, predictions, scores: Of the run.
        label_cost: As in `report`.
    """
    data, surroundings = rundir.read_json(run.data), rundir.read_json(run.environment)
    computed = _compute(
        results,
        predictions,
        scores,
        read_lookalikes(run, results),
        over_encoders(run, scores),
        surroundings.get("trouble"),
    )
    summary, check = computed["summary"], _label_check(run, results)
    kept = kept_classifier(run, results)
    distilled = kept and kept.get("distilled")
    test_uses = _test_uses(run, computed["over_encoders"]["runs"][1:]) + surroundings.get(
        "distilling_tested", 0
    )
    return {
        **computed,
        "data": data,
        "environment": surroundings,
        "label_cost": label_cost,
        "label_check": check,
        "arm_names": _arm_names(summary, results),
        "studies": _studies(run, data["root"]),
        "test_uses": test_uses,
        "distilled": distilled,
        "limits": limits_in_words(computed, data, surroundings, test_uses),
        "next": next_steps(run, computed, check, surroundings, data, has_classifier=kept is not None),
        "run": str(run.path),
    }


def pages(run: RunDirectory, document: dict[str, Any]) -> dict[Path, str]:
    """What people read of report.json, by file; a model card only where a classifier was kept."""
    found = {run.report_md: markdown.render(document), run.report_html: html.render(document, run)}
    if facts := kept_classifier(run, document["results"]):
        size = EncoderSpec.from_metadata(facts["encoder"]).image_size
        found[run.model_card] = model_card.render(document, facts, evaluation_short_side(size))
    return found


def _check_results(run: RunDirectory, results: list[Result], predictions: dict[str, list[Any]]) -> None:
    """Refuse to put a report of fewer results in place of one, when it is the results that got lost."""
    lost = without_result(results, predictions)
    if not lost:
        return
    reported = map(classifier_of, (rundir.read_derived(run.report_json) or {}).get("results", []))
    method, labels, draw = min(lost)
    words = f"lacks {len(lost):,} classifiers whose predictions are there, first {method} with {labels:,} labels, draw {draw}"
    if lost & set(reported):
        raise CheckpointError(
            f"{run.results}: {words}. The report has them and is left as it was. Put the file back from a copy, or train them "
            "again with `labelwise finetune`; to report without them, delete report.json."
        )
    terminal.warn(f"{run.results}: {words}; `labelwise finetune` trains them again.")


def _compute(
    results: list[Result],
    predictions: dict[str, list[Any]],
    scores: Scores,
    lookalikes: dict[str, Any] | None,
    over: dict[str, Any],
    trouble: str | None,
) -> dict[str, Any]:
    """The part of report.json that rests on results and predictions alone, and on what the arguments say.

    Args:
        results, predictions, scores: Of the run.
        lookalikes: See `read_lookalikes`.
        over: See `over_encoders`.
        trouble: What was wrong with pretraining at its end, if anything was.
    """
    summary = _summarize(results, scores)
    tested = len(scores.names) if scores.groups is None else scores.groups
    return {
        "verdict": verdict_in_words(
            summary, tested, over["gains"], by_class=scores.by_class, untested=scores.untested
        )
        + (f" But the encoder is hardly one yet: {trouble}." if summary and trouble else ""),
        "summary": summary,
        "labels_saved": _labels_saved(results, scores),
        "results": results,
        "confusion": _confusion(summary, predictions),
        "calibration": _calibration(results, predictions),
        "folds": results[0].get("folds", 0) if results else 0,
        "by_class": scores.by_class,
        "guessing": _guessing(scores)[0],
        "untested": scores.untested,
        "tested": len(scores.names),
        "test_groups": scores.groups,
        "lookalikes": lookalikes and {**lookalikes, "gains": _gains_without(scores, lookalikes)},
        "over_encoders": over,
    }


def over_encoders(run: RunDirectory, scores: Scores) -> dict[str, Any]:
    """The gain over this run's encoder and those of other seeds beside it, `--pretrain-seeds`.

    Returns:
        `runs`: names of their folders, none where there are no others; `gains`: as `gains_over_encoders`; `unfinished`: names of
        those that are not compared as far as this run; `damaged`: what cannot be read of them.
    """
    nothing: dict[str, Any] = {"runs": [], "gains": [], "unfinished": [], "damaged": ""}
    try:
        done, rest = find_siblings(run)
        gains = gains_over_encoders([scores, *map(read_scores, done)]) if done else []
    except CheckpointError as error:
        terminal.warn(f"encoders of other seeds are left out: {error}")
        return {**nothing, "damaged": str(error)}
    names = [each.path.name for each in (run, *done)] if gains else []
    return {**nothing, "runs": names, "gains": gains, "unfinished": [other.path.name for other in rest]}


def show(document: dict[str, Any]) -> None:
    """Print the screen a user would send a friend."""
    data = document["data"]
    terminal.emit("")
    terminal.emit(document["verdict"], style="bold")
    terminal.emit("")
    terminal.emit(f"data   {text.data_line(data)}")
    terminal.emit(f"test   {text.test_line(document)}")
    if document["summary"]:
        columns, rows = text.table(document)
        terminal.emit_table("", columns, rows)
        terminal.emit(text.table_note(document))
        terminal.emit("")
    for gain in document["over_encoders"]["gains"]:
        terminal.emit(f"seeds  {text.over_encoders_in_words(gain)}")
    for saved in document["labels_saved"]:
        terminal.emit(f"saved  {text.saved_in_words(saved, document['label_cost'])}")
    if document["label_check"]:
        terminal.emit(f"look   {text.doubts_in_words(document['label_check'])}")
    if document["lookalikes"] and (alike := len(document["lookalikes"]["pairs"])):
        tested = document["lookalikes"]["tested"]
        terminal.emit(
            f"alike  {alike:,} of {tested:,} test images resemble an image outside the test set, see the page"
        )
    if document["distilled"] and document["distilled"]["test"]:
        terminal.emit(f"used   distilled: {text.distilled_in_words(document['distilled']['test'])}")
    for step in document["next"]:
        terminal.emit(f"next   {step}")
    terminal.emit(f"page   {Path(document['run']) / 'report.html'}")


def _summarize(results: list[Result], scores: Scores) -> list[dict[str, Any]]:
    """One entry per number of labels, ascending: every method's mean, the gain, the comparisons."""
    fractions = {row["labels"]: row["fraction"] for row in results if row["fraction"] is not None}
    guessing, classes = _guessing(scores)
    is_balanced = all(row["balanced"] for row in results)
    summary = []
    for labels, arms in sorted(scores.right.items()):
        comparisons = []
        others = [("simclr", arm) for arm in sorted(arms) if arm not in OURS]
        for arm, against in (*_COMPARED, *others):
            difference = scores.difference(labels, arm, against)
            if difference is not None:
                comparisons.append(
                    {"arm": arm, "against": against, **difference.to_json(), "verdict": verdict(difference)}
                )
        gain = next(
            (
                {key: entry[key] for key in ("mean", "low", "high")}
                for entry in comparisons
                if (entry["arm"], entry["against"]) == ("simclr", "supervised")
            ),
            None,
        )
        entry: dict[str, Any] = {
            "fraction": fractions.get(labels),
            "labels": labels,
            **scores.series[labels],
            "arms": {arm: scores.test.accuracy(draws).to_json() for arm, draws in arms.items()},
            "gain": gain,
            "comparisons": comparisons,
        }
        if not is_balanced:
            entry["macro"] = {arm: scores.test.macro(draws).to_json() for arm, draws in arms.items()}
        chance = 1 / classes if scores.by_class else guessing
        least = min(
            chance + _HARDLY, 2 * chance, (1 + chance) / 2
        )  # many classes, or one that most images are of
        known = entry["macro" if scores.by_class else "arms"]
        entry["guesses"] = [arm for arm in arms if known[arm]["mean"] < least]
        summary.append(entry)
    return summary


def _labels_saved(results: list[Result], scores: Scores) -> list[dict[str, Any]]:
    """How many labels training from scratch needs for what fine-tuned SimCLR reaches, at each number of labels drawn at random."""
    arm, against, test = "simclr", "supervised", scores.test
    if isinstance(test, Folds):
        return []  # draws that are tested on different images have no common curve
    everything = counts_of_all_labels(results)

    if (len(scores.names) if scores.groups is None else scores.groups) < _FEWEST_TESTED:
        return []  # they may all agree by chance, and then the curve looks certain

    def drawn_again(draws: dict[int, Floats]) -> dict[int, Floats]:
        values = scores.counted(draws)
        return {draw: by_group(each[None], test.groups)[0] for draw, each in values.items()}

    random = {
        labels: arms for labels, arms in scores.right.items() if scores.series[labels]["series"] == RANDOM
    }
    curves = {labels: drawn_again(arms[against]) for labels, arms in random.items() if against in arms}
    draws = set().union(*curves.values())
    for labels in everything & curves.keys():  # all labels are the same in every draw
        curves[labels] = dict.fromkeys(draws, curves[labels][0])
    saved = []
    for labels, arms in sorted(random.items()):
        found = (
            labels_saved(curves, labels, drawn_again(arms[arm]))
            if arm in arms and labels not in everything
            else None
        )
        if found is not None:
            saved.append({"arm": arm, "against": against, **found.to_json()})
    return saved


def _guessing(scores: Scores) -> tuple[float, int]:
    """How often naming the most frequent class of the test images is right, and how many classes they have."""
    truth = [scores.test.truth_of(draw) for draw in _draws(scores)]
    if not truth:
        return 0.0, 0
    sizes = np.unique(np.concatenate(truth), return_counts=True)[1]
    return float(sizes.max() / sizes.sum()), len(sizes)


def _draws(scores: Scores) -> set[int]:
    return {draw for arms in scores.right.values() for draws in arms.values() for draw in draws}


def _gains_without(scores: Scores, lookalikes: dict[str, Any]) -> list[dict[str, Any]]:
    """Fine-tuned SimCLR minus from scratch on the test images that resemble no training image, at each number of labels."""
    test, alike = scores.test, {pair["names"][0] for pair in lookalikes["pairs"]}
    kept = np.array([name not in alike for name in scores.names], dtype=bool)
    if isinstance(test, Folds) or kept.all() or not kept.any():
        return []
    rest = TestSet(test.truth[kept], None if test.groups is None else test.groups[kept])
    found = []
    for labels, arms in sorted(scores.right.items()):
        simclr, scratch = (
            {draw: right[kept] for draw, right in arms.get(arm, {}).items()}
            for arm in ("simclr", "supervised")
        )
        difference = (rest.macro_difference if scores.by_class else rest.difference)(simclr, scratch)
        if difference is not None:
            found.append({"labels": labels, **difference.to_json()})
    return found


def _arm_names(summary: list[dict[str, Any]], results: list[Result]) -> dict[str, str]:
    """What each method is called, ours first, then those of the user's own files."""
    there = {arm for entry in summary for arm in entry["arms"]}
    trained = {row["method"] for row in results if not row.get("frozen", True)}
    own = sorted(there - ARMS.keys())
    return {arm: name for arm, name in ARMS.items() if arm in there} | {
        arm: f"{arm}, {'fine-tuned' if arm in trained else 'linear probe'}" for arm in own
    }


def _confusion(summary: list[dict[str, Any]], predictions: dict[str, list[Any]]) -> dict[str, Any] | None:
    """Confusion counts of the best-placed method at the most labels, all draws together."""
    if not summary:
        return None
    last = summary[-1]
    arm = (
        "simclr"
        if "simclr" in last["arms"]
        else max(last["arms"], key=lambda name: last["arms"][name]["mean"])
    )
    pairs = [
        (label, predicted)
        for method, labels, label, predicted in zip(
            predictions["method"],
            predictions["labels"],
            predictions["label"],
            predictions["prediction"],
            strict=True,
        )
        if (method, labels) == (arm, last["labels"])
    ]
    classes = sorted({name for pair in pairs for name in pair})
    place = {name: index for index, name in enumerate(classes)}
    counts = [[0] * len(classes) for _ in classes]
    for label, predicted in pairs:
        counts[place[label]][place[predicted]] += 1
    return {"arm": arm, "labels": last["labels"], "classes": classes, "counts": counts}


def _calibration(results: list[Result], predictions: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """How sure every method is at every number of labels, and how often right; all draws together."""
    arm, labels, draw, sure = (np.array(predictions[key]) for key in ("method", "labels", "draw", CONFIDENCE))
    right = (np.array(predictions["label"]) == np.array(predictions["prediction"])).astype(float)
    draws: dict[tuple[int, str], list[int]] = defaultdict(list)
    for row in results:
        draws[row["labels"], row["method"]].append(row["draw"])
    found = []
    for (count, name), done in sorted(draws.items()):
        chosen = (labels == count) & (arm == name) & np.isin(draw, done)
        confidence, hits = sure[chosen], right[chosen]
        if np.isfinite(confidence).all():  # one that diverged under an earlier version is sure of nothing
            found.append(
                {
                    "arm": name,
                    "labels": count,
                    "confidence": float(confidence.mean()),
                    "accuracy": float(hits.mean()),
                    "error": calibration_error(confidence, hits),
                    "groups": reliability(confidence, hits),
                }
            )
    return found


def _test_uses(run: RunDirectory, others: list[str]) -> int:
    """How many classifiers were tested on the test set, those of earlier settings and of other encoders beside this one included."""
    files = run.results.parent.rglob("results.jsonl")
    own = sum(not row.get("folds") for file in files for row in rundir.read_jsonl(file))
    results = [RunDirectory(run.path.with_name(name)).results for name in others]
    return own + sum(row["method"] in ENCODER_METHODS for file in results for row in rundir.read_jsonl(file))


def _label_check(run: RunDirectory, results: list[Result]) -> dict[str, Any] | None:
    """Which labels look wrong, without their pictures; None where too few labels were there to say."""
    found = _of_these_results(run.label_check, results)
    if found is None or "groups" not in found:  # of an earlier version
        return None
    suspects = text.worth_a_look(found, found["suspects"])
    return {**found, "suspects": _without_pictures(suspects[:SUSPECTS])}


def read_lookalikes(run: RunDirectory, results: list[Result]) -> dict[str, Any] | None:
    """Test images that resemble others, without their pictures: how many were `tested`, and the `pairs`."""
    found = _of_these_results(run.lookalikes, results)
    return found and {"tested": found["tested"], "pairs": _without_pictures(found["pairs"])}


def _of_these_results(file: Path, results: list[Result]) -> dict[str, Any] | None:
    """What was found after a comparison, if it was this one."""
    found = rundir.read_derived(file)
    return (
        found if found is not None and found["signature"] in {row["signature"] for row in results} else None
    )


def _without_pictures(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: each[key] for key in each if not key.startswith("thumbnail")} for each in entries]


def kept_classifier(run: RunDirectory, results: list[Result]) -> dict[str, Any] | None:
    """What is known of the kept classifier, if it was trained as those that were compared, or distilled from one that was."""
    facts = rundir.read_derived(run.classifier_json)
    compared = {row["signature"] for row in results if row["method"] == "simclr"}
    known = facts is not None and facts["signature"].removesuffix(DISTILLED) in compared
    return facts if known else None


def _studies(run: RunDirectory, root: str) -> list[dict[str, Any]]:
    """What `labelwise study` found on the same images, in folders beside the run: `study`, `advice`, and the folder's name."""
    found = []
    for file in sorted(run.path.parent.glob("[!.]*/study.json")):
        try:
            study = rundir.read_json(file)
        except CheckpointError as error:
            terminal.warn(f"a study is left out: {error}")
            continue
        if study["images"]["root"] == root:
            found.append({"study": study["study"], "advice": study["advice"], "folder": file.parent.name})
    return found
