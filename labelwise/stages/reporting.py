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
    FEWEST_DRAWS,
    FEWEST_PER_CLASS,
    HELPS,
    HURTS,
    UNCLEAR,
    Floats,
    Folds,
    TestSet,
    by_group,
    test_set_margin,
    verdict,
)
from labelwise.models.encoder import EncoderSpec
from labelwise.predictions import CONFIDENCE, read_predictions
from labelwise.reports import html, markdown, model_card, text
from labelwise.rundir import RunDirectory
from labelwise.stages.encoders import ENCODER_METHODS, find_siblings, gains_over_encoders
from labelwise.stages.scoring import PREDICTED, Result, Scores, classifier_of, read_scores, score

ARMS = {
    "simclr": "SimCLR, fine-tuned",
    "simclr_probe": "SimCLR, linear probe",
    "supervised": "From scratch",
    "random_probe": "Random features, probe",
    "pixels": "Pixels, logistic regression",
    "imagenet": "ImageNet weights, fine-tuned",
    "imagenet_probe": "ImageNet weights, linear probe",
    "dinov2_probe": "DINOv2, linear probe",
}
_OURS = ("simclr", "simclr_probe", "supervised", "random_probe", "pixels")  # all else others trained
_COMPARED = (
    ("simclr", "supervised"),
    ("simclr_probe", "supervised"),
    ("simclr", "simclr_probe"),
    ("simclr", "pixels"),
    ("simclr_probe", "random_probe"),
)

SUSPECTS = 24  # labels that look wrong which the report names
FEW_TEST_IMAGES = 100  # an accuracy is known to about ten points then (Wilson 1927)


def report(run: RunDirectory, label_cost: float | None = None) -> dict[str, Any]:
    """Write report.json, report.md and report.html of a run, and return the document.

    Args:
        run: Pretrained, compared or not.
        label_cost: Of one label, in any currency; labels saved are then also told in money.

    Raises:
        CheckpointError: A file of the run is damaged.
    """
    data, surroundings = rundir.read_json(run.data), rundir.read_json(run.environment)
    results, predictions = rundir.read_jsonl(run.results), read_predictions(run.predictions, PREDICTED)
    lookalikes = read_lookalikes(run, results)
    scores = score(results, predictions)
    over = over_encoders(run, scores)
    computed = compute(
        results, predictions, scores, data["pool"], lookalikes, over, surroundings.get("trouble")
    )
    summary, check = computed["summary"], _label_check(run, results)
    test_uses = _test_uses(run, computed["over_encoders"]["runs"][1:])
    classifier = kept_classifier(run, results)
    document = {
        **computed,
        "data": data,
        "environment": surroundings,
        "label_cost": label_cost,
        "label_check": check,
        "arm_names": _arm_names(summary, results),
        "studies": _studies(run, data["root"]),
        "test_uses": test_uses,
        "limits": _limits(computed, data, surroundings, test_uses),
        "next": _next_steps(run, computed, check, surroundings, data, has_classifier=classifier is not None),
        "run": str(run.path),
    }
    rundir.write_json(run.report_json, document)
    rundir.write_text(run.report_md, markdown.render(document))
    rundir.write_text(run.report_html, html.render(document, run))
    _write_model_card(run, document, classifier)
    return document


def compute(
    results: list[Result],
    predictions: dict[str, list[Any]],
    scores: Scores,
    pool: int,
    lookalikes: dict[str, Any] | None,
    over: dict[str, Any],
    trouble: str | None,
) -> dict[str, Any]:
    """The part of report.json that rests on results and predictions alone, and on what the arguments say.

    Args:
        results, predictions, scores: Of the run.
        pool: How many images were pretrained on.
        lookalikes: See `read_lookalikes`.
        over: See `over_encoders`.
        trouble: What was wrong with pretraining at its end, if anything was.
    """
    summary = _summarize(results, scores)
    tested = len(scores.names) if scores.groups is None else scores.groups
    return {
        "verdict": _verdict(summary, pool, tested, over["gains"])
        + (f" But the encoder is hardly one yet: {trouble}." if summary and trouble else ""),
        "summary": summary,
        "labels_saved": _labels_saved(results, scores),
        "results": results,
        "confusion": _confusion(summary, predictions),
        "calibration": _calibration(results, predictions),
        "folds": results[0].get("folds", 0) if results else 0,
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
    for step in document["next"]:
        terminal.emit(f"next   {step}")
    terminal.emit(f"page   {Path(document['run']) / 'report.html'}")


def _summarize(results: list[Result], scores: Scores) -> list[dict[str, Any]]:
    """One entry per number of labels, ascending: every method's mean, the gain, the comparisons."""
    fractions = {row["labels"]: row["fraction"] for row in results if row["fraction"] is not None}
    is_balanced = all(row["balanced"] for row in results)
    summary = []
    for labels, arms in sorted(scores.right.items()):
        comparisons = []
        others = [("simclr", arm) for arm in sorted(arms) if arm not in _OURS]
        for arm, against in (*_COMPARED, *others):
            difference = scores.test.difference(arms.get(arm, {}), arms.get(against, {}))
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
            "arms": {arm: scores.test.accuracy(draws).to_json() for arm, draws in arms.items()},
            "gain": gain,
            "comparisons": comparisons,
        }
        if not is_balanced:
            entry["macro"] = {arm: scores.test.macro(draws).to_json() for arm, draws in arms.items()}
        summary.append(entry)
    return summary


def _labels_saved(results: list[Result], scores: Scores) -> list[dict[str, Any]]:
    """How many labels training from scratch needs for what fine-tuned SimCLR reaches, at each number of labels."""
    arm, against, test = "simclr", "supervised", scores.test
    if isinstance(test, Folds):
        return []  # draws that are tested on different images have no common curve
    everything = _everything(results)

    def drawn_again(draws: dict[int, Floats]) -> dict[int, Floats]:
        return {draw: by_group(right[None], test.groups)[0] for draw, right in draws.items()}

    curves = {labels: drawn_again(arms[against]) for labels, arms in scores.right.items() if against in arms}
    draws = set().union(*curves.values())
    for labels in everything & curves.keys():  # all labels are the same in every draw
        curves[labels] = dict.fromkeys(draws, curves[labels][0])
    saved = []
    for labels, arms in sorted(scores.right.items()):
        found = (
            labels_saved(curves, labels, drawn_again(arms[arm]))
            if arm in arms and labels not in everything
            else None
        )
        if found is not None:
            saved.append({"arm": arm, "against": against, **found.to_json()})
    return saved


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
        difference = rest.difference(simclr, scratch)
        if difference is not None:
            found.append({"labels": labels, **difference.to_json()})
    return found


def _everything(results: list[Result]) -> set[int]:
    """The number of labels that was all there were, if it was measured."""
    return {row["labels"] for row in results if row["labels"] >= row["labels_there"]}


def _verdict(
    summary: list[dict[str, Any]], pool: int, tested: int, over_encoders: list[dict[str, Any]]
) -> str:
    """The answer in words, for every number of labels: fine-tuned SimCLR against training from scratch."""
    said: dict[str, list[str]] = {HELPS: [], UNCLEAR: [], HURTS: []}
    few: list[tuple[dict[str, Any], str]] = []
    for entry in summary:
        best = next(
            (c for c in entry["comparisons"] if c["arm"] == "simclr" and c["against"] == "supervised"), None
        )
        best = best or next((c for c in entry["comparisons"] if c["against"] == "supervised"), None)
        if best is None:
            continue
        fraction = entry["fraction"] or entry["labels"] / max(1, pool)
        share = "" if any(said.values()) else f" ({100 * fraction:.2g} % of the images)"
        if best["low"] is None or best["n"] < FEWEST_DRAWS:
            few.append((best, f"{100 * best['mean']:+.1f} points with {entry['labels']:,} labels"))
            continue
        said[best["verdict"]].append(f"{text.gain_in_words(best)} with {entry['labels']:,} labels{share}")
    if few and not any(said.values()):
        most = max(best["n"] for best, _ in few)
        one = "One test image or group, no interval" if tested == 1 else "One label draw, no interval"
        why = one if tested == 1 or most == 1 else f"{most} label draws where {FEWEST_DRAWS} are needed"
        return f"{why}, so nothing is claimed: {', '.join(words for _, words in few)}."
    if not any(said.values()):
        done = {arm for entry in summary for arm in entry["arms"]}
        return "No comparison with training from scratch yet." + (
            f" Measured so far: {', '.join(sorted(done))}." if done else " Run `labelwise finetune`."
        )
    sentences = []
    if said[HELPS]:
        sentences.append(f"Pretraining on your images helps: {', '.join(said[HELPS])}.")
    if said[HURTS]:
        sentences.append(
            f"{'It' if sentences else 'Pretraining on your images'} hurts: {', '.join(said[HURTS])}."
        )
    if said[UNCLEAR]:
        sentences.append(
            f"No difference{' is' if sentences else ' between pretraining and training from scratch is'} shown: {', '.join(said[UNCLEAR])}."
        )
    if few:
        sentences.append(f"Too few label draws to claim anything: {', '.join(words for _, words in few)}.")
    sentences += _over_encoders_in_words(over_encoders)
    for finding, words in (
        (HURTS, "Plain pixels are better"),
        (UNCLEAR, "No difference to plain pixels is shown"),
    ):
        found = [f"{entry['labels']:,}" for entry in summary if _against_pixels(entry) == finding]
        if found:
            sentences.append(f"{words} with {', '.join(found)} labels.")
    sentences += _against_others(summary)
    if tested < FEW_TEST_IMAGES:
        sentences.append(f"Only {tested} independent test images: they alone may decide this.")
    return " ".join(sentences)


def _over_encoders_in_words(gains: list[dict[str, Any]]) -> list[str]:
    """The gain where encoders are drawn again too, once there are enough of them."""
    said: dict[str, list[str]] = defaultdict(list)
    for gain in gains:
        if gain["claims"]:
            said[gain["verdict"]].append(f"{text.gain_in_words(gain)} with {gain['labels']:,} labels")
    findings = {HELPS: "it helps", UNCLEAR: "no difference is shown", HURTS: "it hurts"}
    found = "; ".join(f"{findings[finding]}, {', '.join(words)}" for finding, words in said.items())
    return [f"Over {len(gains[0]['of_each'])} encoders: {found}."] if found else []


def _against_others(summary: list[dict[str, Any]]) -> list[str]:
    """Fine-tuned SimCLR against the best of the networks that others trained, at every number of labels."""
    said: dict[tuple[str, str], list[str]] = defaultdict(list)
    for entry in summary:
        rivals = [
            c
            for c in entry["comparisons"]
            if c["against"] not in _OURS and c["low"] is not None and c["n"] >= FEWEST_DRAWS
        ]
        if rivals:
            best = min(rivals, key=lambda c: float(c["mean"]))  # that where ours leads least
            words = f"{text.gain_in_words(best)} with {entry['labels']:,} labels"
            said[best["against"], best["verdict"]].append(words)
    findings = {HELPS: "it is better", UNCLEAR: "no difference is shown", HURTS: "it is worse"}
    return [
        f"Against {ARMS.get(arm, arm)}: {findings[finding]}, {', '.join(words)}."
        for (arm, finding), words in said.items()
    ]


def _against_pixels(entry: dict[str, Any]) -> str | None:
    """Whether fine-tuned SimCLR beats logistic regression on pixels; None where that was not measured twice."""
    pairs = (c for c in entry["comparisons"] if (c["arm"], c["against"]) == ("simclr", "pixels"))
    found = next(pairs, None)
    return found["verdict"] if found is not None and found["low"] is not None else None


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
        if np.isfinite(confidence).all():  # a training that diverged is sure of nothing
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


def _limits(
    computed: dict[str, Any],
    data: dict[str, Any],
    surroundings: dict[str, Any],
    test_uses: int,
) -> list[str]:
    """What these numbers do not say, in plain sentences."""
    summary, results = computed["summary"], computed["results"]
    limits = []
    left, wanted = _left_to_compare(surroundings, results)
    if results and left:
        limits.append(
            f"{left:,} of {wanted:,} classifiers were not trained yet, so numbers in one column may be means over different draws."
        )
    if results:
        tested, groups = computed["tested"], computed["test_groups"]
        best = max(arm["mean"] for entry in summary for arm in entry["arms"].values())
        folds, most = computed["folds"], max(row["draw"] for row in results) + 1
        if folds:
            tied = f", in {groups:,} groups that stay whole (copies, bursts, group column)" if groups else ""
            limits.append(
                f"No test set: {tested:,} labeled images{tied} were tested in turn, in {folds} folds. The training sets of the draws overlap, "
                "and the intervals count that in only roughly (Nadeau and Bengio 2003); they speak of this set of labels"
                + (f", and more draws (--draws {4 * folds}) make them narrower." if most < 4 * folds else ".")
            )
        if folds and "the encoder saw none of them" not in results[0]["test_method"]:
            limits.append(
                "What the encoder saw of the tested images, without labels, training from scratch did not: on new images its lead may be "
                "smaller. Label images that were held out (splits/test.json names them, if there are any), or give --test FOLDER, to know."
            )
        if not folds and groups is None:
            limits.append(
                f"{tested:,} test images: from the images alone, an accuracy of {best:.0%} is known to "
                f"\u00b1{100 * test_set_margin(best, tested):.1f} points, with {3 * tested:,} more to half of that. "
                "Intervals in the table count that in."
            )
        elif not folds:
            limits.append(
                f"{tested:,} test images belong to {groups:,} groups (copies, bursts, group column); intervals let whole groups "
                "be drawn again, so a few large groups make them wide, and more groups make them narrower, not more images of these."
            )
        single = [entry for entry in summary if 1 in {arm["n"] for arm in entry["arms"].values()}]
        everything = _everything(results)
        if any(entry["labels"] not in everything for entry in single):
            limits.append(
                "With one label draw there is no interval, and no verdict can be more than 'no difference shown'."
            )
        if everything:
            limits.append(
                "All labels are one draw: there is no interval there, no verdict, and in labels saved no spread of its own."
            )
        if computed["labels_saved"]:
            limits.append(
                "Labels saved are read off a smooth curve through the measured numbers of labels. Where those are far apart, more than "
                "four times, the true curve may run elsewhere and the saving be smaller than its interval says."
            )
        macros = [arm for entry in summary for arm in entry.get("macro", {}).values()]
        if any(arm["n"] > 1 and arm["low"] is None for arm in macros):
            limits.append(
                f"A class has fewer than {FEWEST_PER_CLASS} independent test images: too few for an interval of the mean over classes."
            )
        if not folds:
            limits.append(
                f"The test set was used {test_uses:,} times, once per trained classifier; Labelwise chose nothing on it."
            )
    limits.append(_limit_of_encoders(computed))
    limits.append(
        f"SimCLR also used {data['pool']:,} images without their labels and the time to train on them; training from scratch did not."
    )
    init = surroundings["asked"]["init"]
    if init == "pretrained" and any(row["method"] == "imagenet" for row in results):
        limits.append(
            "The encoder started from ImageNet weights: what SimCLR added to them is its lead over ImageNet weights fine-tuned, not the gain."
        )
    elif init:
        asked = "; `--methods simclr,supervised,imagenet` tells" if init == "pretrained" else ""
        limits.append(
            f"The encoder started from {init}: how much of the gain is that start's was not measured{asked}."
        )
    if back := surroundings.get("rolled_back"):
        limits.append(
            f"Training was taken back from epoch {back['from']} to epoch {back['to']} and ended there: {back['reason']}."
        )
    return limits


def _limit_of_encoders(computed: dict[str, Any]) -> str:
    """What is not known of other seeds of pretraining."""
    over = computed["over_encoders"]
    left_out = (
        f" Not compared as far as this one, and left out: {', '.join(over['unfinished'])}."
        if over["unfinished"]
        else ""
    )
    if over["damaged"]:
        left_out = f" Others are left out: {over['damaged']}"
    if over["runs"]:
        few = not all(gain["claims"] for gain in over["gains"])
        claims = f"; fewer than {FEWEST_DRAWS} encoders or draws claim nothing" if few else ""
        return (
            f"The table is of one of {len(over['runs'])} encoders; only the gain over all of them lets the seed of pretraining be drawn "
            f"again{claims}.{left_out}"
        )
    how = "" if computed["folds"] else " (`labelwise finetune --pretrain-seeds 3` tells)"
    return f"One encoder was compared: how much another seed of pretraining would change is not in the intervals{how}.{left_out}"


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
    """What is known of the kept classifier, if it was trained as those that were compared."""
    facts = rundir.read_derived(run.classifier_json)
    compared = {row["signature"] for row in results if row["method"] == "simclr"}
    return facts if facts is not None and facts["signature"] in compared else None


def _left_to_compare(surroundings: dict[str, Any], results: list[Result]) -> tuple[int, int]:
    """How many classifiers of the last comparison that was asked for are missing, and how many there shall be."""
    comparison = surroundings.get("comparison", {"methods": [], "draws": {}})
    asked = {
        (method, int(labels), draw)
        for method in comparison["methods"]
        for labels, draws in comparison["draws"].items()
        for draw in range(draws)
    }
    return len(asked - set(map(classifier_of, results))), len(asked)


def _studies(run: RunDirectory, root: str) -> list[dict[str, Any]]:
    """What `labelwise study` found on the same images, in folders beside the run: `study`, `advice`, and the folder's name."""
    found = []
    for file in sorted(run.path.parent.glob("*/study.json")):
        try:
            study = rundir.read_json(file)
        except CheckpointError as error:
            terminal.warn(f"a study is left out: {error}")
            continue
        if study["images"]["root"] == root:
            found.append({"study": study["study"], "advice": study["advice"], "folder": file.parent.name})
    return found


def _write_model_card(run: RunDirectory, document: dict[str, Any], facts: dict[str, Any] | None) -> None:
    """Describe the kept classifier, if there is one; an earlier card goes."""
    if facts is not None:
        size = EncoderSpec.from_metadata(facts["encoder"]).image_size
        card = model_card.render(document, facts, evaluation_short_side(size))
        rundir.write_text(run.model_card, card)
    else:
        run.model_card.unlink(missing_ok=True)


def _next_steps(
    run: RunDirectory,
    computed: dict[str, Any],
    check: dict[str, Any] | None,
    surroundings: dict[str, Any],
    data: dict[str, Any],
    *,
    has_classifier: bool,
) -> list[str]:
    summary = computed["summary"]
    where = (
        f"--run {run.path.relative_to(Path.cwd())}"
        if run.path.is_relative_to(Path.cwd())
        else f"--run {run.path}"
    )
    if not summary:
        return [f"labelwise finetune {where} {text.few_labels(data)}"]
    steps = []
    gain = summary[0]["gain"]
    left, asked = _left_to_compare(surroundings, computed["results"])
    if left:
        steps.append(f"{left:,} of {asked:,} classifiers are left: give the same finetune command again")
    if gain and gain["high"] is not None and gain["high"] < 0:
        steps.append(
            "pretraining hurts at few labels: pretrain longer (--epochs), or with other augmentations"
        )
    elif gain and gain["low"] is not None and gain["low"] <= 0 and _against_pixels(summary[0]) != HURTS:
        steps.append(
            f"the few-label gain is not clear: pretrain longer (--epochs), or take more draws (--draws {4 * computed['folds'] or 10})"
        )
    if (
        check
        and check["unlabeled"]
        and not text.is_too_weak(check)
        and (weakest := check["classes"][0])["agreed"] != 1
    ):
        labels = f"{weakest['labels']:,} label{'s' if weakest['labels'] > 1 else ''}"
        fit = f" and {weakest['agreed']:.0%} of them fit" if weakest["agreed"] is not None else ""
        steps.append(f"class {weakest['name']} has {labels}{fit}: label more of it first")
    if has_classifier:
        steps.append(
            f"labelwise predict NEW_IMAGES {where}: what the classifier trained on all labels says of them"
        )
    return steps
