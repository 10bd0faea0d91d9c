"""Numbers as people read them: in the terminal, in Markdown, in HTML."""

from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

from labelwise.rundir import MIXED, RANDOM, SUGGESTED
from labelwise.terminal import duration

MACRO = ", mean over classes"
_OVER_SEEDS = "over training seeds and test images"
_UNEQUAL = 0.002  # of the two sides of an interval


def draw_in_words(entry: dict[str, Any]) -> str:
    """What is repeated at a number of labels: a random draw of them, or the training alone where `suggest` chose them."""
    return "training" if entry.get("series") == SUGGESTED else "draw"


def repeats_in_words(entries: Iterable[dict[str, Any]], many: str = "s") -> str:
    """`draws`, `trainings`, or `draws or trainings`; of one each without the s."""
    return " or ".join(f"{what}{many}" for what in sorted(set(map(draw_in_words, entries))))


def labels_in_words(entry: dict[str, Any], *notes: str) -> str:
    """`32 labels (2 % of the images; 12 chosen by suggest)`: how many, notes, and how many of them were not drawn at random."""
    chosen = _chosen(entry)
    return _with_notes(entry, *notes, f"{chosen} by suggest" if chosen else "")


def _chosen(entry: dict[str, Any]) -> str:
    """`12 chosen`; empty where all labels were drawn at random."""
    series = entry.get("series", RANDOM)
    if series == SUGGESTED:
        return f"{'all' if entry['suggested'] == entry['labels'] else format(entry['suggested'], ',')} chosen"
    return "some chosen" if series == MIXED else ""


def _with_notes(entry: dict[str, Any], *notes: str) -> str:
    said = "; ".join(filter(None, notes))
    return f"{entry['labels']:,} labels" + (f" ({said})" if said else "")


def interval_of(document: dict[str, Any]) -> str:
    """What the intervals of a report let be drawn again."""
    series = {entry["series"] for entry in document["summary"]}
    if SUGGESTED not in series:
        return _over_draws(document)
    return (
        f"{_over_draws(document)} ({_OVER_SEEDS} where suggest chose the labels)"
        if RANDOM in series
        else _OVER_SEEDS
    )


def _over_draws(document: dict[str, Any]) -> str:
    return (
        "over draws, each tested on a fold of the labels"
        if document["folds"]
        else "over draws and test images"
    )


def table_note(document: dict[str, Any]) -> str:
    """What stands under the table of methods."""
    series = {entry["series"] for entry in document["summary"]}
    some = ", some of labels chosen by suggest" if MIXED in series else ""
    uneven = any(len({arm["n"] for arm in entry["arms"].values()}) > 1 for entry in document["summary"])
    means = (
        [f"random label draws{some} [95 % interval {_over_draws(document)}]"] if series != {SUGGESTED} else []
    )
    if SUGGESTED in series:
        means.append(
            f"trainings on the same labels, chosen by suggest [95 % interval {_OVER_SEEDS}, not over other labels]"
        )
    return (
        f"Accuracy in %, mean over {', or over '.join(means)}. "
        f"Gain: fine-tuned SimCLR minus from scratch{MACRO if document['by_class'] else ''}, "
        f"same {'draws' if series != {SUGGESTED} else 'labels'}."
        + (
            " Trainings are missing: a mean is over those that are there, the gain over those that both have."
            if uneven
            else ""
        )
    )


def check_note(document: dict[str, Any]) -> str:
    """What stands under the labels that look wrong."""
    judged, warning = (
        (
            "",
            "Here every label is also tested: labels that are mended after this list favour the encoder that made it.",
        )
        if document["folds"]
        else (
            " outside the test set",
            "Test labels are left alone: to mend only those that a model doubts would favour that model.",
        )
    )
    return (
        f"Each label{judged} is compared with what the ten most similar images, and a linear probe that was not "
        "told this label, say of it; images that belong together (copies, bursts, group column) are not asked about each other, and "
        "a class whose labels are one image or group cannot be judged. The weaker the encoder, the more of these labels "
        f"are right after all. {warning}"
    )


def measured(document: dict[str, Any]) -> tuple[str, str]:
    """Under which key of a summary's entry the accuracies are that differences are of, and words for these."""
    return ("macro", MACRO) if document["by_class"] else ("arms", "")


def percent(value: float) -> str:
    """An accuracy in percent, one decimal."""
    return f"{100 * value:.1f}"


def with_interval(entry: dict[str, Any]) -> str:
    """`81.2 [78.0, 84.4]`, or the mean alone when there is no interval."""
    if entry["low"] is None:
        return percent(entry["mean"])
    return f"{percent(entry['mean'])} [{percent(entry['low'])}, {percent(entry['high'])}]"


def points(entry: dict[str, Any]) -> str:
    """A difference: `+9.8 points [4.1, 15.5]`."""
    mean = f"{100 * entry['mean']:+.1f} points"
    return mean if entry["low"] is None else f"{mean} [{100 * entry['low']:+.1f}, {100 * entry['high']:+.1f}]"


def gain_in_words(entry: dict[str, Any]) -> str:
    """A difference for a sentence: `+9.8 \u00b1 5.7 points`, or with its bounds where they are not as far from it."""
    if entry["low"] is None:
        return f"{100 * entry['mean']:+.1f} points"
    if abs(entry["high"] + entry["low"] - 2 * entry["mean"]) > _UNEQUAL:
        return points(entry)
    return f"{100 * entry['mean']:+.1f} \u00b1 {50 * (entry['high'] - entry['low']):.1f} points"


def distilled_in_words(test: dict[str, Any]) -> str:
    """What distilling changed: `97.1 % of 449 test images right, 94.0 % by the classifier it came from: +3.1 points [+1.4, +5.0]`..."""
    of_classes = ", mean over classes" if test["by_class"] else ""
    return (
        f"{percent(test['after'])} % of {test['n_test']:,} test images right{of_classes}, {percent(test['before'])} % by the classifier it came from: "
        f"{points(test)}; they were used once for each, and chose nothing"
    )


def over_encoders_in_words(gain: dict[str, Any]) -> str:
    """`gain over 3 encoders with 13 labels: +15.2 points [+9.1, +21.3] (each: +15.9, +14.1, +15.6): helps`.

    Fewer than three encoders or draws claim nothing, and say so.
    """
    each = ", ".join(f"{100 * mean:+.1f}" for mean in gain["of_each"])
    over = f"gain over {len(gain['of_each'])} encoders with {labels_in_words(gain)}{MACRO if gain['by_class'] else ''}"
    return f"{over}: {points(gain)} (each: {each}): {gain['verdict'] if gain['claims'] else 'nothing is claimed'}"


def saved_in_words(saved: dict[str, Any], label_cost: float | None) -> str:
    """`13 labels with pretraining match 62 without [40, more than 135]`, and what the difference costs.

    Where the interval holds everything that was measured, it says that nothing is known.
    """

    def money(labels: float) -> str:
        return f"{(label_cost or 0) * (labels - saved['labels']):,.2f}"

    def words(key: str, value: Callable[[float], str], less: str) -> str:
        labels = saved[key]
        if labels is None:
            return f"more than {value(saved['most'])}"
        return value(labels) if labels else f"{less} than {value(saved['fewest'])}"

    is_unknown = saved["low"] == 0 and saved["high"] is None
    is_beyond = saved["matches"] is None and saved["most"] < saved["labels"]  # not measured at as many
    if is_unknown or is_beyond:
        return f"{saved['labels']:,} labels: how many without pretraining match them cannot be told from these numbers"
    matches, low, high = (words(key, "{:,.0f}".format, "fewer") for key in ("matches", "low", "high"))
    said = f"{saved['labels']:,} labels with pretraining match {matches} without [{low}, {high}]"
    if label_cost is None or (saved["high"] is None and saved["most"] <= saved["labels"]):
        return said  # in money: more than nothing, or than less
    matches, low, high = (words(key, money, "less") for key in ("matches", "low", "high"))
    return f"{said}; at {label_cost:g} a label that saves {matches} [{low}, {high}]"


def doubts_in_words(check: dict[str, Any]) -> str:
    """`12 of 1,348 labels are worth a second look, first of all 3/0123.png (3, looks like 8)`; of a weak encoder, that it is one."""
    if is_too_weak(check):
        return f"{check['doubted']:,} of {check['checked']:,} labels do not fit: the encoder is too weak to judge labels by"
    doubted = f"{check['doubted']:,} of {check['checked']:,} labels are worth a second look"
    if not check["suspects"]:
        return doubted
    first = check["suspects"][0]
    return f"{doubted}, first of all {first['name']} ({suspicion_in_words(first)})"


def is_too_weak(check: dict[str, Any]) -> bool:
    """Whether the encoder doubts so many labels that it is the encoder that had better be."""
    by_encoder = check["doubted"] - check.get("copies", 0)
    return bool(check["checked"] and by_encoder > check["checked"] / 3)


def worth_a_look(check: dict[str, Any], suspects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Suspects to show: of a weak encoder only exact copies with two labels."""
    return [each for each in suspects if each["has_other_copy"]] if is_too_weak(check) else suspects


def suspicion_in_words(suspect: dict[str, Any]) -> str:
    """`cat, looks like dog`."""
    why = "an exact copy is labeled" if suspect["has_other_copy"] else "looks like"
    return f"{suspect['label']}, {why} {suspect['looks_like']}"


def calibration_in_words(entry: dict[str, Any], name: str) -> str:
    """`From scratch: 93.1 % sure, 71.0 % right; calibration error 22.1 points`."""
    return (
        f"{name}: {percent(entry['confidence'])} % sure, {percent(entry['accuracy'])} % right; "
        f"calibration error {percent(entry['error'])} points"
    )


def worst_classes(confusion: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Classes by accuracy of the best-placed method at the most labels, worst first."""
    if confusion is None:
        return []
    classes = []
    for place, (name, counts) in enumerate(zip(confusion["classes"], confusion["counts"], strict=True)):
        if sum(counts):
            classes.append({"name": name, "accuracy": counts[place] / sum(counts)})
    return sorted(classes, key=lambda entry: float(entry["accuracy"]))


def costs(document: dict[str, Any], metrics: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What pretraining took, and what training one classifier took with each method at the most labels.

    Args:
        document: report.json.
        metrics: metrics.jsonl.
    """

    def words(seconds: float) -> str:
        return duration(seconds) if seconds >= 1 else "under a second"

    epochs = [row["seconds"] for row in metrics if row["kind"] == "epoch"]
    pool, results = pretrained_on(document["data"]), document["results"]
    rows = [
        (
            "Pretraining, once",
            f"{words(sum(epochs))} for {len(epochs)} epochs of {pool:,} images without labels",
        )
    ]
    for arm, name in document["arm_names"].items():
        most = max(row["labels"] for row in results if row["method"] == arm)
        seconds = [row["seconds"] for row in results if (row["method"], row["labels"]) == (arm, most)]
        rows.append((name, f"{words(median(seconds))} a classifier with {most:,} labels"))
    return rows


def few_labels(data: dict[str, Any]) -> str:
    """The option of `finetune` to begin with: 1 % of the images, or five a class where that is more."""
    few = 5 * len(data["classes"]) or 25
    return "--fraction 0.01" if few <= data["pool"] / 100 else f"--label-counts {few}"


def has_few_labels(data: dict[str, Any]) -> bool:
    """Whether less than a tenth of the images have a label."""
    return bool(sum(data["classes"].values()) < data["images"] / 10)


def pretrained_on(data: dict[str, Any]) -> int:
    """Images that the encoder was trained on: of a stream more than the sample that labels come from."""
    images: int = data.get("pretrained_on", data["pool"])
    return images


def data_line(data: dict[str, Any]) -> str:
    """What was trained on."""
    seen = pretrained_on(data)
    streamed = f" (a sample; the encoder saw a stream of {seen:,})" if seen != data["pool"] else ""
    classes = f", {len(data['classes'])} classes" if data["classes"] else ""
    bad = f", {len(data['quarantined'])} unreadable" if data["quarantined"] else ""
    return f"{data['images']:,} images{streamed}{classes}{bad}; {data['pool']:,} to train on"


def grouped_in_words(data: dict[str, Any]) -> str:
    """What was kept on one side of the split, and what was left out of training for that; empty where nothing was."""
    tied = [f"{count:,} {what}" for what, count in data.get("grouped", {}).items() if count]
    if not tied:
        return ""
    left_out = data["excluded_duplicates"] + data["excluded_groups"]
    words = f"{left_out:,} {'image was' if left_out == 1 else 'images were'} left out of training because a test image belongs with them."
    return (
        f"Kept together, never on both sides of the split: {', '.join(tied)}. "
        f"{words if left_out else 'No image had to leave training for that.'}"
    )


def lookalikes_in_words(document: dict[str, Any]) -> str:
    """`3 of 372 test images are ...`, and the gain without them; empty where none are."""
    found = document["lookalikes"]
    if not found or not found["pairs"]:
        return ""
    count = len(found["pairs"])
    words = (
        f"{count:,} of {found['tested']:,} test images {'is' if count == 1 else 'are'}, to the encoder, as like an image outside the "
        f"test set as like a slight crop of {'itself' if count == 1 else 'themselves'}: the same thing once more, or what it cannot tell apart."
    )
    other = sum(pair.get("other_label", False) for pair in found["pairs"])
    if other:
        of_it = "It has another label" if count == 1 else f"{other:,} of these pairs have two labels"
        words += f" {of_it}, which speaks for the latter."
    entries = {entry["labels"]: entry for entry in document["summary"]}
    without = [
        f"{points(each)} with {labels_in_words(entry)} (with {'it' if count == 1 else 'them'} {100 * entry['gain']['mean']:+.1f})"
        for each, entry in ((each, entries[each["labels"]]) for each in found["gains"])
    ]
    return (
        f"{words} Without {'it' if count == 1 else 'them'} the gain is {', '.join(without)}."
        if without
        else words
    )


def test_line(document: dict[str, Any]) -> str:
    """What was tested on."""
    data, results = document["data"], document["results"]
    if not results:
        held_out = f"{data['test']:,} images ({data['test_method']}), never trained on"
        return held_out if data["test"] else "none held out: the labels are tested in turn"
    return f"{document['tested']:,} images ({results[0]['test_method']})"


def _gain_row(document: dict[str, Any]) -> list[list[str]]:
    """The row of gains, if there are any."""
    gains = [entry["gain"] for entry in document["summary"]]
    name = f"gain, in points{MACRO if document['by_class'] else ''}"
    return (
        [[name, *(points(gain).replace(" points", "") if gain else "" for gain in gains)]]
        if any(gains)
        else []
    )


def table(document: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The table of methods: columns are numbers of labels, rows are methods, the gain last."""
    summary, names = document["summary"], document["arm_names"]
    columns = ["method", *(column_name(entry) for entry in summary)]
    rows = [
        [name, *(with_interval(entry["arms"][arm]) if arm in entry["arms"] else "" for entry in summary)]
        for arm, name in names.items()
    ]
    gains = _gain_row(document)
    rows += [] if document["by_class"] else gains
    for arm, name in names.items():
        if any("macro" in entry for entry in summary):
            rows.append(
                [
                    f"{name}{MACRO}",
                    *(
                        with_interval(entry["macro"][arm]) if arm in entry.get("macro", {}) else ""
                        for entry in summary
                    ),
                ]
            )
    rows += gains if document["by_class"] else []  # below the rows it is the difference of
    return columns, rows


def column_name(entry: dict[str, Any]) -> str:
    """`10 labels (1%)`, `32 labels (2%; 12 chosen)`."""
    share = f"{100 * entry['fraction']:.3g}%" if entry["fraction"] is not None else ""
    return _with_notes(entry, share, _chosen(entry))


def together(entry: dict[str, Any]) -> str:
    """`all draws together`."""
    return f"all {repeats_in_words([entry])} together"
