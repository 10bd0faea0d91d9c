"""model-card.md: what the kept classifier is, what it was made of, how good it is and how that is known."""

import json
from pathlib import Path
from typing import Any

from labelwise.reports import text
from labelwise.reports.markdown import escape, write_table

_WORST = 5  # classes that are named


def render(document: dict[str, Any], classifier: dict[str, Any], short_side: int) -> str:
    """Write the card of a run's classifier.

    Args:
        document: report.json.
        classifier: classifier.json.
        short_side: To which an image is resized before its middle is cut out, pixels.
    """
    data, surroundings, summary = document["data"], document["environment"], document["summary"]
    spec = {key: json.loads(value) for key, value in classifier["encoder"].items()}
    key, words = text.measured(document)
    name = escape(Path(data["root"]).name)
    made = "'s start" if classifier.get("distilled") else ""
    lines = [
        f"# Image classifier: {name}",
        "",
        f"A {spec['backbone']} that tells {len(classifier['classes'])} classes apart. It was pretrained with SimCLR on "
        f"{text.pretrained_on(data):,} images without their labels and {_trained(classifier)} all {classifier['labels']:,} labels"
        f"{'' if document['folds'] else ' outside the test set'}. Made with Labelwise.",
        "",
        "## Files",
        "",
        "- `classifier.safetensors`: the weights, network and last layer; no pickle.",
        "- `labelwise predict IMAGES --run THIS_FOLDER` uses it.",
        "- `classifier.json`: the classes, in the order of the outputs, and what it takes to build the network.",
        f"- Input: RGB, short side to {short_side} px, of that the middle {spec['image_size']} "
        f"x {spec['image_size']} px, values 0-1, mean {_rounded(spec['mean'])}, "
        f"standard deviation {_rounded(spec['std'])}.",
        "",
        "## Classes",
        "",
        ", ".join(escape(each) for each in classifier["classes"]),
        "",
        "## How good it is",
        "",
        f"Measured on {text.test_line(document)}. Every row is a classifier made as this one{made} was, from so many labels drawn "
        f"at random{', or where it says so chosen by suggest' if any('suggested' in entry for entry in summary) else ''}.",
        "",
        *write_table(
            ["labels", f"accuracy, %{words}", f"gain over training from scratch, points{words}"],
            _rows(summary, key),
        ),
        "",
        _of_itself(document, classifier),
        "",
    ]
    counted = document["confusion"] if document["confusion"]["arm"] == "simclr" else None
    worst = [each for each in text.worst_classes(counted) if each["accuracy"] < 1][:_WORST]
    if worst:
        named = ", ".join(f"{escape(each['name'])} ({text.percent(each['accuracy'])} %)" for each in worst)
        lines += [f"Worst classes, at the most labels measured: {named}.", ""]
    sure = [each for each in document["calibration"] if each["arm"] == "simclr"]
    if sure:
        words = text.calibration_in_words(sure[-1], f"With {sure[-1]['labels']:,} labels")
        lines += [f"{words}.", ""]
    lines += [
        "## What these numbers do not say",
        "",
        *(f"- {escape(limit)}" for limit in document["limits"]),
        "- How it does on images from elsewhere: another camera, place or time was not tested.",
        "",
        "## How it was made",
        "",
        f"Labelwise {surroundings['labelwise']}, torch {surroundings['torch']}, timm {surroundings['timm']}; "
        f"{_steps(classifier)}. Every setting is in `config.toml`, every command "
        "in `report.md`.",
        "",
    ]
    return "\n".join(lines)


def _trained(classifier: dict[str, Any]) -> str:
    """How labels were learned from; cross-validation may find the network best as it is."""
    if distilled := classifier.get("distilled"):
        return (
            f"left as it was (frozen), with a linear probe distilled from another classifier on {distilled['images']:,} images: each has the "
            "class that its neighbours, the labels among them, make most probable. The labels:"
        )
    if classifier["steps"]:
        return "fine-tuned on"
    return "left as it was (frozen), with a linear probe trained on"


def _steps(classifier: dict[str, Any]) -> str:
    """What was trained with labels."""
    if classifier.get("distilled"):
        return f"the classifier it was distilled from: {_steps({**classifier, 'distilled': None})}"
    if classifier["steps"]:
        return f"{classifier['steps']:,} steps of fine-tuning, {classifier['way']}"
    return "no steps of fine-tuning, a linear probe on the frozen network"


def _rows(summary: list[dict[str, Any]], key: str) -> list[list[str]]:
    """Labels, accuracy and gain; key: as of `text.measured`."""
    return [
        [
            text.labels_in_words(entry).replace(" labels", ""),
            text.with_interval(entry[key]["simclr"]),
            text.points(entry["gain"]).replace(" points", "") if entry["gain"] else "",
        ]
        for entry in summary
        if "simclr" in entry["arms"]
    ]


def _of_itself(document: dict[str, Any], classifier: dict[str, Any]) -> str:
    """What is known of the very classifier that is kept."""
    if distilled := classifier.get("distilled"):
        measured = (
            text.distilled_in_words(distilled["test"]) if distilled["test"] else "it was not tested itself"
        )
        return f"The classifier that is kept was distilled from one of these: {measured}."
    most = max((row["labels"] for row in document["results"] if row["method"] == "simclr"), default=0)
    if document["folds"]:
        return (
            f"The classifier that is kept has all {classifier['labels']:,} labels; those that were measured had {most:,} of them at most, "
            "and were tested on others."
        )
    if most == classifier["labels"]:
        return "The last row is of as many labels as the classifier that is kept; that one was trained once more."
    return (
        f"The classifier that is kept has {classifier['labels']:,} labels and was not tested itself: "
        "`--label-counts all`, beside the settings of the last `labelwise finetune`, measures one like it."
    )


def _rounded(values: list[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)
