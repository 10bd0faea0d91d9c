"""What the numbers say, in words: the verdict, what they do not say, what to do next."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from labelwise.measures.statistics import (
    FEWEST_DRAWS,
    FEWEST_PER_CLASS,
    HELPS,
    HURTS,
    UNCLEAR,
    left_open_by_images,
)
from labelwise.reports import text
from labelwise.rundir import MIXED, RANDOM, SUGGESTED, RunDirectory
from labelwise.stages.scoring import ARMS, OURS, Result, classifier_of, counts_of_all_labels

FEW_TEST_IMAGES = 100  # an accuracy is known to about ten points then (Wilson 1927)


def verdict_in_words(
    summary: list[dict[str, Any]],
    tested: int,
    over_encoders: list[dict[str, Any]],
    *,
    by_class: bool = False,
    untested: Sequence[str] = (),
) -> str:
    """The answer in words, for every number of labels: fine-tuned SimCLR against training from scratch.

    Args:
        summary: An entry for each number of labels.
        tested: Independent test images.
        over_encoders: See `gains_over_encoders`.
        by_class: Differences are of the mean over classes.
        untested: Classes without a test image.
    """
    said: dict[str, list[str]] = {HELPS: [], UNCLEAR: [], HURTS: []}
    few: list[tuple[dict[str, Any], str]] = []
    guesses: list[str] = []
    for entry in summary:
        best = _ours_against(entry, "supervised")
        if best is None:
            continue
        is_first = entry["fraction"] is not None and not any(said.values())
        with_labels = text.labels_in_words(
            entry, f"{100 * entry['fraction']:.3g} % of the images" if is_first else ""
        )
        if best["low"] is None or best["n"] < FEWEST_DRAWS:
            words = f"{100 * best['mean']:+.1f} points with {text.labels_in_words(entry)}"
            few.append(({**best, "series": entry.get("series")}, words))
            continue
        if best["verdict"] == HELPS and "supervised" in entry["guesses"]:
            guesses.append(f"{entry['labels']:,}")
        said[best["verdict"]].append(f"{text.gain_in_words(best)} with {with_labels}")
    claims = any(said.values())
    against_others = [*_against_pixels_in_words(summary), *_against_others(summary)]
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
        sentences.append(_of_few_draws(few, tested, claims=claims or bool(against_others)))
    if not sentences:
        done = {arm for entry in summary for arm in entry["arms"]}
        measured = f"Measured so far: {', '.join(sorted(done))}." if done else "Run `labelwise finetune`."
        sentences.append(f"No comparison with training from scratch yet. {measured}")
    sentences += _over_encoders_in_words(over_encoders)
    sentences += against_others
    claims = claims or bool(against_others)
    if claims and any(entry.get("series") == SUGGESTED for entry in summary):
        sentences.append(
            "Labels chosen by suggest are the same in each training: those intervals are over training seeds and test images, not over other labels."
        )
    if by_class and claims:
        sentences.append("Classes differ in size: these are differences of the mean over classes.")
    elif any("macro" in entry for entry in summary) and claims:
        sentences.append(
            "Classes differ in size, and one has too few test images to count each alike: the large ones decide this."
        )
    if untested:
        sentences.append(f"Not one image of {_classes(untested)} was tested.")
    nothing = [
        f"{entry['labels']:,}"
        for entry in summary
        if len(entry["guesses"]) == len(entry["arms"])
        and all(each["verdict"] == UNCLEAR for each in entry["comparisons"])
    ]
    if nothing:
        sentences.append(
            f"With {', '.join(nothing)} labels no method is clearly better than always naming one class."
        )
    if guesses:
        sentences.append(
            f"From scratch is hardly better than guessing with {', '.join(guesses)} labels: the gain may be that of a rate or steps that do "
            "not fit (--scratch-rate, --scratch-steps)."
        )
    if tested < FEW_TEST_IMAGES and claims:
        sentences.append(f"Only {tested} independent test images: they alone may decide this.")
    return " ".join(sentences)


def _ours_against(entry: dict[str, Any], other: str) -> dict[str, Any] | None:
    """SimCLR's comparison with another method: fine-tuned, or where that was not measured, its linear probe."""
    found = {c["arm"]: c for c in entry["comparisons"] if c["against"] == other}
    return found.get("simclr") or found.get("simclr_probe")


def _of_few_draws(few: list[tuple[dict[str, Any], str]], tested: int, *, claims: bool) -> str:
    """Differences that claim nothing, and why."""
    found = ", ".join(words for _, words in few)
    single, several = (_repeats([best for best, _ in few], many) for many in ("", "s"))
    if claims:
        return f"Too few {several} to claim anything: {found}."
    most = max(best["n"] for best, _ in few)
    one = "One test image or group, no interval" if tested == 1 else f"One {single}, no interval"
    why = one if tested == 1 or most == 1 else f"{most} {several} where {FEWEST_DRAWS} are needed"
    return f"{why}, so nothing is claimed: {found}."


def _repeats(entries: list[dict[str, Any]], many: str) -> str:
    """`label draws or trainings`."""
    return text.repeats_in_words(entries, many).replace("draw", "label draw")


def _classes(names: Sequence[str]) -> str:
    """`class 2`, or `classes 2, 3`."""
    return f"class{'es' if len(names) > 1 else ''} {', '.join(names)}"


def _over_encoders_in_words(gains: list[dict[str, Any]]) -> list[str]:
    """The gain where encoders are drawn again too, once there are enough of them."""
    said: dict[str, list[str]] = defaultdict(list)
    for gain in gains:
        if gain["claims"]:
            said[gain["verdict"]].append(f"{text.gain_in_words(gain)} with {text.labels_in_words(gain)}")
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
            if c["against"] not in OURS and c["low"] is not None and c["n"] >= FEWEST_DRAWS
        ]
        if rivals:
            best = min(rivals, key=lambda c: float(c["mean"]))  # that where ours leads least
            words = f"{text.gain_in_words(best)} with {text.labels_in_words(entry)}"
            said[best["against"], best["verdict"]].append(words)
    findings = {HELPS: "it is better", UNCLEAR: "no difference is shown", HURTS: "it is worse"}
    return [
        f"Against {ARMS.get(arm, arm)}: {findings[finding]}, {', '.join(words)}."
        for (arm, finding), words in said.items()
    ]


def _against_pixels_in_words(summary: list[dict[str, Any]]) -> list[str]:
    """Numbers of labels at which SimCLR does not beat plain pixels."""
    said = []
    for finding, words in (
        (HURTS, "Plain pixels are better"),
        (UNCLEAR, "No difference to plain pixels is shown"),
    ):
        found = [f"{entry['labels']:,}" for entry in summary if _against_pixels(entry) == finding]
        if found:
            said.append(f"{words} with {', '.join(found)} labels.")
    return said


def _against_pixels(entry: dict[str, Any]) -> str | None:
    """Whether SimCLR beats logistic regression on pixels; None where that was measured too rarely to say."""
    found = _ours_against(entry, "pixels")
    claims = found is not None and found["low"] is not None and found["n"] >= FEWEST_DRAWS
    return found["verdict"] if found is not None and claims else None


def limits_in_words(
    computed: dict[str, Any],
    data: dict[str, Any],
    surroundings: dict[str, Any],
    test_uses: int,
) -> list[str]:
    """What these numbers do not say, in plain sentences."""
    summary, results = computed["summary"], computed["results"]
    found = []
    series = {entry["series"] for entry in summary}
    left, wanted = _left_to_compare(surroundings, results)
    diverged = [
        f"{each['method']} with {each['labels']:,} labels, draw {each['draw']}"
        for each in surroundings.get("diverged", [])
    ]
    if results and left:
        found.append(f"{left:,} of {wanted:,} classifiers were not trained yet.")
    if diverged:
        found.append(f"{len(diverged):,} classifiers diverged and are missing, first {diverged[0]}.")
    for entry in summary:
        draws = {arm: each["n"] for arm, each in entry["arms"].items()}
        if len(set(draws.values())) > 1:
            each = ", ".join(f"{ARMS.get(arm, arm)} {n}" for arm, n in draws.items())
            found.append(
                f"With {text.labels_in_words(entry)} the numbers in one column are means over different {text.draw_in_words(entry)}s ({each}); "
                "the gain is over those that both have."
            )
    if computed["by_class"]:
        found.append(
            "Classes differ in size, so every difference, the gain and labels saved are of the mean over classes, in which each counts alike."
        )
    if computed["untested"]:
        found.append(
            f"Not one image of {_classes(computed['untested'])} was tested: how well it is told from the others is not known, and a mean over "
            "classes leaves it out."
        )
    if any("macro" in entry for entry in summary) and not computed["by_class"]:
        found.append(
            f"Classes differ in size, and one has fewer than {FEWEST_PER_CLASS} independent test images: differences are of plain accuracy, in which "
            "large classes count most."
        )
    if results:
        naming = (
            "" if not computed["by_class"] else ", with a mean over classes of one divided by their number"
        )
        found.append(
            f"Always naming the most frequent class would be right in {computed['guessing']:.1%} of the test images{naming}."
        )
    if results:
        tested, groups = computed["tested"], computed["test_groups"]
        best = max(arm["mean"] for entry in summary for arm in entry["arms"].values())
        folds, most = computed["folds"], max(row["draw"] for row in results) + 1
        if folds:
            tied = f", in {groups:,} groups that stay whole (copies, bursts, group column)" if groups else ""
            found.append(
                f"No test set: {tested:,} labeled images{tied} were tested in turn, in {folds} folds. The training sets of the draws overlap, "
                "and the intervals count that in only roughly (Nadeau and Bengio 2003); they speak of this set of labels"
                + (f", and more draws (--draws {4 * folds}) make them narrower." if most < 4 * folds else ".")
            )
        if folds and "the encoder saw none of them" not in results[0]["test_method"]:
            found.append(
                "What the encoder saw of the tested images, without labels, training from scratch did not: on new images its lead may be "
                "smaller. Label images that were held out (splits/test.json names them, if there are any), or give --test FOLDER, to know."
            )
        if not folds and groups is None:
            low, high = left_open_by_images(best, tested)
            found.append(
                f"{tested:,} test images: from the images alone, an accuracy of {best:.1%} may be {low:.1%} to {high:.1%}, with {3 * tested:,} "
                "more about half as wide. Intervals in the table count that in."
            )
        elif not folds:
            found.append(
                f"{tested:,} test images belong to {groups:,} groups (copies, bursts, group column); intervals let whole groups "
                "be drawn again, so a few large groups make them wide, and more groups make them narrower, not more images of these."
            )
        everything = counts_of_all_labels(results)
        single = [
            entry
            for entry in summary
            if entry["labels"] not in everything and 1 in {arm["n"] for arm in entry["arms"].values()}
        ]
        if single:
            found.append(
                f"With one {_repeats(single, '')} there is no interval, and no verdict can be more than 'no difference shown'."
            )
        if everything:
            found.append(
                f"All labels {'that were not chosen ' if SUGGESTED in series else ''}are one draw: there is no interval there, no verdict, and in labels saved no spread of its own."
            )
        found += _limits_of_chosen(series)
        if computed["labels_saved"]:
            found.append(
                "Labels saved are read off a smooth curve through the measured numbers of labels. Where those are far apart, more than "
                "four times, the true curve may run elsewhere and the saving be smaller than its interval says."
            )
        macros = [arm for entry in summary for arm in entry.get("macro", {}).values()]
        if any(arm["n"] > 1 and arm["low"] is None for arm in macros):
            found.append(
                f"A class has fewer than {FEWEST_PER_CLASS} independent test images: too few for an interval of the mean over classes."
            )
        if not folds:
            found.append(
                f"The test set was used {test_uses:,} times, once per trained classifier; Labelwise chose nothing on it."
            )
    found.append(_limit_of_encoders(computed))
    found.append(
        f"SimCLR also used {text.pretrained_on(data):,} images without their labels and the time to train on them; training from scratch did not."
    )
    init = surroundings["asked"]["init"]
    if init == "pretrained" and any(row["method"] == "imagenet" for row in results):
        found.append(
            "The encoder started from ImageNet weights: what SimCLR added to them is its lead over ImageNet weights fine-tuned, not the gain."
        )
    elif init:
        asked = "; `--methods simclr,supervised,imagenet` tells" if init == "pretrained" else ""
        found.append(
            f"The encoder started from {init}: how much of the gain is that start's was not measured{asked}."
        )
    if back := surroundings.get("rolled_back"):
        found.append(
            f"Training was taken back from epoch {back['from']} to epoch {back['to']} and ended there: {back['reason']}."
        )
    return found


def _limits_of_chosen(series: set[str]) -> list[str]:
    """What labels that `suggest` chose do not say."""
    if MIXED in series:
        return [
            "Some of the labels were chosen by suggest, not drawn at random: here they are trained on and tested in turn like the others, and "
            "accuracy on such a choice is not that on all images. Label test images that were held out, or give --test FOLDER, to know that."
        ]
    if SUGGESTED not in series:
        return []
    beside = (
        "Labels saved are of labels drawn at random alone."
        if RANDOM in series
        else "Labels saved are not told, as those are of labels drawn at random."
    )
    return [
        "Labels chosen by suggest are a series of their own: all others and the first ones that it named, the same in each training. How much other "
        "choices would change is not in their intervals, and the encoder that is compared chose them: its lead over training from scratch may be "
        f"larger than with labels drawn at random. {beside}"
    ]


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


def _left_to_compare(surroundings: dict[str, Any], results: list[Result]) -> tuple[int, int]:
    """How many classifiers of the last comparison that was asked for are missing, and how many there shall be."""
    comparison = surroundings.get("comparison", {"methods": [], "draws": {}})
    asked = {
        (method, int(labels), draw)
        for method in comparison["methods"]
        for labels, draws in comparison["draws"].items()
        for draw in range(draws)
    }
    diverged = set(map(classifier_of, surroundings.get("diverged", [])))
    return len(asked - diverged - set(map(classifier_of, results))), len(asked)


def next_steps(
    run: RunDirectory,
    computed: dict[str, Any],
    check: dict[str, Any] | None,
    surroundings: dict[str, Any],
    data: dict[str, Any],
    *,
    has_classifier: bool,
) -> list[str]:
    """What to do next, the most useful first."""
    summary = computed["summary"]
    where = (
        f"--run {run.path.relative_to(Path.cwd())}"
        if run.path.is_relative_to(Path.cwd())
        else f"--run {run.path}"
    )
    which = f"labelwise annotate {where}: a page to label images on, those that matter most"
    if not summary:
        first = [which] if text.has_few_labels(data) else []
        return [*first, f"labelwise finetune {where} {text.few_labels(data)}"]
    steps = []
    gain = summary[0]["gain"]
    left, asked = _left_to_compare(surroundings, computed["results"])
    if left:
        steps.append(f"{left:,} of {asked:,} classifiers are left: give the same finetune command again")
    if surroundings.get("diverged"):
        steps.append("some trainings diverge: lower --scratch-rate, or leave their method out with --methods")
    if gain and gain["high"] is not None and gain["high"] < 0:
        steps.append(
            "pretraining hurts at few labels: pretrain longer (--epochs), or with other augmentations"
        )
    elif gain and gain["low"] is not None and gain["low"] <= 0 and _against_pixels(summary[0]) != HURTS:
        steps.append(
            f"the few-label gain is not clear: pretrain longer (--epochs), or take more {text.repeats_in_words(summary[:1])} (--draws {4 * computed['folds'] or 10})"
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
    if check and check["unlabeled"]:
        steps.append(which)
    if has_classifier:
        steps.append(
            f"labelwise predict NEW_IMAGES {where}: what the classifier trained on all labels says of them"
        )
    return steps
