"""Which augmentations matter: pairs of them in one branch, and the whole pipeline without one (SimCLR, Sec. 3.1, Fig. 5)."""

from typing import Any

from labelwise.config import PretrainSettings, StudySettings
from labelwise.measures.statistics import HELPS, HURTS
from labelwise.studies.findings import Comparison, Findings, Table, compare, points, why_unclear
from labelwise.studies.trials import Material, Name, Outcomes, Trial, accuracy_answers
from labelwise.views.alone import ALONE, OneBranch

ANSWERING = 1.0
FULL: Name = ("all",)
PARTS: dict[str, dict[str, Any]] = {  # what may be left out, and the settings that do so
    "crop": {"crop_scale": (1.0, 1.0)},
    "flip": {"flip": 0.0},
    "color jitter": {"color": 0.0},
    "grayscale": {"grayscale": 0.0},
    "jitter and grayscale": {"color": 0.0, "grayscale": 0.0},
    "blur": {"blur": 0.0},
    "rotation": {"rotation": 0.0},
    "shear": {"shear": 0.0},
    "intensity": {"intensity": 0.0},
}


def plan(study: StudySettings, usual: PretrainSettings, width: int) -> list[Trial]:
    """Trials of one seed, the most telling first; where some pairs are asked for, those alone."""
    parts = [Trial(FULL), *(Trial(("without", name), PARTS[name]) for name in _used(usual))]
    pairs = [
        Trial(
            ("pair", first, second),
            views=OneBranch((first,) if first == second else (first, second), study.symmetric),
        )
        for first in study.pairs or ALONE
        for second in study.pairs or ALONE
    ]
    return [*([] if study.pairs else parts), *sorted(pairs, key=_rank)]


def _used(usual: PretrainSettings) -> list[str]:
    """Parts of the pipeline that are on."""
    return [name for name, off in PARTS.items() if all(getattr(usual, key) != off[key] for key in off)]


def _rank(trial: Trial) -> tuple[bool, bool, bool]:
    """Crop and color first, then the other singles, then pairs with crop, then the rest."""
    _, first, second = trial.name
    return {first, second} not in ({"crop"}, {"crop", "color"}), first != second, "crop" not in (first, second)  # fmt: skip


answer = accuracy_answers


def describe(outcomes: Outcomes, material: Material, study: StudySettings) -> Findings:
    """The heat map, what leaving out costs, and advice."""
    alone = study.pairs or ALONE
    pairs = Table(
        "Linear accuracy after one or two augmentations, first (row) then second (column); diagonal: one",
        list(alone),
        list(alone),
        [[outcomes.level(("pair", first, second), "h") for second in alone] for first in alone],
        "heat",
        note=(
            "Both branches get them, drawn apart."
            if study.symmetric
            else "The paper's protocol: every image is cropped first, and the augmentations go to one branch only, which costs accuracy."
        )
        + " In the paper's Figure 5 (a picture, its numbers are not repeated here) crop with color stands out, and none alone suffices.",
    )
    worth = {
        name: compare(
            outcomes, f"all augmentations against all but {name}", (FULL, "h"), (("without", name), "h")
        )
        for name in ([] if study.pairs else _used(material.settings))
    }
    left_out = Table(
        "Linear accuracy of the whole pipeline, and without one part",
        ["all", *(f"without {name}" for name in worth)],
        ["accuracy"],
        [[outcomes.level(name, "h")] for name in (FULL, *(("without", part) for part in worth))],
        "bars",
    )
    stands_out = compare(
        outcomes,
        "crop then color against crop alone",
        (("pair", "crop", "color"), "h"),
        (("pair", "crop", "crop"), "h"),
        "better (Sec. 3.1)",
    )
    comparisons = [*([stands_out] if {"crop", "color"} <= set(alone) else []), *worth.values()]
    if study.pairs:
        return Findings([pairs], comparisons, _say(comparisons), {})
    return Findings([left_out, pairs], comparisons, *_advise(worth))


def _say(comparisons: list[Comparison]) -> str:
    """What pairs alone tell."""
    if not comparisons:
        return "Advice comes from all augmentations, or from crop and color: leave --pairs out."
    (color,) = comparisons
    if color.difference is None or color.verdict not in (HELPS, HURTS):
        return f"On your images: {why_unclear(comparisons)}."
    return f"On your images color after the crop {color.verdict}: {points(color.difference)} against the crop alone."


def _advise(worth: dict[str, Comparison]) -> tuple[str, dict[str, Any]]:
    """What matters most, and what had better be left out."""
    differences = {name: each.difference for name, each in worth.items() if each.difference is not None}
    helping = {name: each for name, each in differences.items() if worth[name].verdict == HELPS}
    harmful = {name: each for name, each in differences.items() if worth[name].verdict == HURTS}
    parts = []
    recipe: dict[str, Any] = {}
    if helping:
        name = max(helping, key=lambda name: helping[name].mean)
        parts.append(f"{name} matters most: {points(helping[name])}")
    if harmful:
        name = min(harmful, key=lambda name: harmful[name].mean)
        parts.append(f"{name} does harm ({points(harmful[name])}): leave it out")
        recipe = dict(PARTS[name])
    if not parts:
        return f"On your images: {why_unclear(list(worth.values()))}.", {}
    return f"On your images {'; '.join(parts)}.", recipe
