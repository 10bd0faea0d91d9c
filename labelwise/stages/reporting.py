"""`labelwise report`: from stored results to a verdict, a table and a page. Reads no model."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from labelwise import rundir, terminal
from labelwise.measures.statistics import (
    HELPS,
    HURTS,
    UNCLEAR,
    interval,
    paired_difference,
    test_set_margin,
    verdict,
)
from labelwise.predictions import read_predictions
from labelwise.reports import html, markdown, text
from labelwise.rundir import RunDirectory

ARMS = {
    "simclr": "SimCLR, fine-tuned",
    "simclr_probe": "SimCLR, linear probe",
    "supervised": "From scratch",
    "random_probe": "Random features, probe",
    "pixels": "Pixels, logistic regression",
}
_COMPARED = (
    ("simclr", "supervised"),
    ("simclr_probe", "supervised"),
    ("simclr", "simclr_probe"),
    ("simclr", "pixels"),
)

Result = dict[str, Any]


def report(run: RunDirectory) -> dict[str, Any]:
    """Write report.json, report.md and report.html of a run, and return the document.

    Raises:
        CheckpointError: A file of the run is damaged.
    """
    results = rundir.read_jsonl(run.results)
    data, surroundings = rundir.read_json(run.data), rundir.read_json(run.environment)
    summary = _summarize(results)
    predictions = read_predictions(run.predictions)
    document = {
        "verdict": _verdict(summary, data["pool"]),
        "summary": summary,
        "labels_saved": [],
        "results": results,
        "data": data,
        "environment": surroundings,
        "arm_names": {arm: ARMS.get(arm, arm) for arm in _arms(summary)},
        "confusion": _confusion(summary, predictions),
        "test_uses": len(results),
        "limits": _limits(summary, results, data),
        "next": _next_steps(run, summary),
        "run": str(run.path),
    }
    rundir.write_json(run.report_json, document)
    rundir.write_text(run.report_md, markdown.render(document))
    rundir.write_text(run.report_html, html.render(document, run))
    return document


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
        terminal.emit(text.TABLE_NOTE)
        terminal.emit("")
    for step in document["next"]:
        terminal.emit(f"next   {step}")
    terminal.emit(f"page   {Path(document['run']) / 'report.html'}")


def _summarize(results: list[Result]) -> list[dict[str, Any]]:
    """One entry per number of labels, ascending: every method's mean, the gain, the comparisons."""
    accuracies: dict[int, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    macros: dict[int, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    fractions: dict[int, float] = {}
    for row in results:
        accuracies[row["labels"]][row["method"]][row["draw"]] = row["accuracy"]
        macros[row["labels"]][row["method"]][row["draw"]] = row["macro_accuracy"]
        if row["fraction"] is not None:
            fractions[row["labels"]] = row["fraction"]
    is_balanced = all(row["balanced"] for row in results)
    summary = []
    for labels, arms in sorted(accuracies.items()):
        comparisons = []
        for arm, against in _COMPARED:
            difference = paired_difference(arms.get(arm, {}), arms.get(against, {}))
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
            "arms": {arm: interval(list(draws.values())).to_json() for arm, draws in arms.items()},
            "gain": gain,
            "comparisons": comparisons,
        }
        if not is_balanced:
            entry["macro"] = {
                arm: interval(list(draws.values())).to_json() for arm, draws in macros[labels].items()
            }
        summary.append(entry)
    return summary


def _verdict(summary: list[dict[str, Any]], pool: int) -> str:
    """The answer in words, for every number of labels: fine-tuned SimCLR against training from scratch."""
    said: dict[str, list[str]] = {HELPS: [], UNCLEAR: [], HURTS: []}
    for entry in summary:
        best = next(
            (c for c in entry["comparisons"] if c["arm"] == "simclr" and c["against"] == "supervised"), None
        )
        best = best or next((c for c in entry["comparisons"] if c["against"] == "supervised"), None)
        if best is None:
            continue
        share = f" ({entry['labels'] / pool:.0%} of the images)" if pool and not any(said.values()) else ""
        said[best["verdict"]].append(f"{text.gain_in_words(best)} with {entry['labels']:,} labels{share}")
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
    plain = [
        f"{entry['labels']:,}"
        for entry in summary
        if _verdict_of(entry, "simclr", "pixels") in (UNCLEAR, HURTS)
    ]
    if plain:
        sentences.append(f"Plain pixels do as well or better with {', '.join(plain)} labels.")
    return " ".join(sentences)


def _verdict_of(entry: dict[str, Any], arm: str, against: str) -> str | None:
    found = (c["verdict"] for c in entry["comparisons"] if (c["arm"], c["against"]) == (arm, against))
    return next(found, None)


def _arms(summary: list[dict[str, Any]]) -> list[str]:
    there = {arm for entry in summary for arm in entry["arms"]}
    return [arm for arm in ARMS if arm in there]


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


def _limits(summary: list[dict[str, Any]], results: list[Result], data: dict[str, Any]) -> list[str]:
    """What these numbers do not say, in plain sentences."""
    limits = []
    if results:
        tested = results[0]["n_test"]
        best = max(arm["mean"] for entry in summary for arm in entry["arms"].values())
        limits.append(
            f"{tested:,} test images: from the images alone, an accuracy of {best:.0%} is known to "
            f"\u00b1{100 * test_set_margin(best, tested):.1f} points. The intervals in the table are over label draws on these same images."
        )
        draws = {arm["n"] for entry in summary for arm in entry["arms"].values()}
        if 1 in draws:
            limits.append(
                "With one label draw there is no interval, and no verdict can be more than 'no difference shown'."
            )
        if any(entry["labels"] >= data["pool"] for entry in summary):
            limits.append(
                "With all labels every draw is the same set: the intervals there show only the noise of training."
            )
        limits.append(
            f"The test set was used {len(results):,} times, once per method, number of labels and draw; nothing was chosen on it."
        )
    limits.append(
        "One encoder was pretrained: how much another seed of pretraining would change is not in the intervals."
    )
    limits.append(
        f"SimCLR also used {data['pool']:,} images without their labels and the time to train on them; training from scratch did not."
    )
    if data["excluded_duplicates"]:
        limits.append(f"{data['excluded_duplicates']} copies of test images were kept out of training.")
    return limits


def _next_steps(run: RunDirectory, summary: list[dict[str, Any]]) -> list[str]:
    where = (
        f"--run {run.path.relative_to(Path.cwd())}"
        if run.path.is_relative_to(Path.cwd())
        else f"--run {run.path}"
    )
    if not summary:
        return [f"labelwise finetune {where} --fraction 0.01"]
    steps = []
    gain = summary[0]["gain"]
    if gain and gain["low"] is not None and gain["low"] <= 0:
        steps.append(
            "the few-label gain is not clear: pretrain longer (--epochs), or take more draws (--draws 10)"
        )
    if run.classifier.exists():
        steps.append(f"the classifier trained on all labels is {run.classifier}")
    return steps
