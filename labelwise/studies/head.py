"""What the projection head buys: none, linear or nonlinear, by the width of its output (SimCLR, Sec. 4.2, Fig. 8)."""

from collections.abc import Callable
from typing import Any

from torch import nn

from labelwise.config import PretrainSettings, StudySettings
from labelwise.studies.findings import Comparison, Findings, Table, compare, points, shown, why_unclear
from labelwise.studies.trials import (
    Answers,
    Material,
    Name,
    Outcomes,
    Trial,
    features_of,
    linear_answers,
    pretrain_briefly,
)

ANSWERING = 2.0
WIDTHS = (128, 32, 512)  # of the output, the usual one first
NONE: Name = ("none",)


def plan(study: StudySettings, usual: PretrainSettings, width: int) -> list[Trial]:
    """Trials of one seed, the most telling first."""
    none = Trial(NONE, {"head": "none"})
    with_head = [
        Trial((kind, str(width)), {"head": kind, "projection_width": width})
        for width in WIDTHS
        for kind in ("nonlinear", "linear")
    ]
    return [with_head[0], none, *with_head[1:]]


def answer(material: Material, trial: Trial, seed: int, before_step: Callable[[], None]) -> Answers:
    """Linear accuracy of the features before the head, h, and after it, g."""
    learner = pretrain_briefly(material, trial, seed, before_step)
    behind = nn.Sequential(learner.encoder, learner.head)
    return {
        "h": linear_answers(material, features_of(material, learner.encoder), seed),
        "g": linear_answers(material, features_of(material, behind), seed),
    }


def describe(outcomes: Outcomes, material: Material, study: StudySettings) -> Findings:
    """Accuracy from h and from g(h) by head and width, and advice."""
    widths = sorted(WIDTHS)
    tables = [
        Table(
            f"Linear accuracy from {where}",
            ["none", "linear", "nonlinear"],
            [f"{width} wide" for width in widths],
            [
                [outcomes.level(NONE, asked)] * len(widths),
                *(
                    [outcomes.level((kind, str(width)), asked) for width in widths]
                    for kind in ("linear", "nonlinear")
                ),
            ],
            "lines",
            note=note,
        )
        for where, asked, note in (
            (
                "h, the features before the head",
                "h",
                "Without a head there is one width, that of the features.",
            ),
            ("g(h), what the head gives", "g", ""),
        )
    ]
    best = ("nonlinear", str(WIDTHS[0]))
    comparisons = [
        compare(outcomes, "nonlinear head against none, from h", (best, "h"), (NONE, "h"), "better by more than 10 points (Sec. 4.2)"),
        compare(outcomes, "nonlinear head against linear, from h", (best, "h"), (("linear", best[1]), "h"), "better by about 3 points (Sec. 4.2)"),
        compare(outcomes, "h against g(h), nonlinear head", (best, "h"), (best, "g"), "better by more than 10 points (Sec. 4.2)"),
    ]  # fmt: skip
    advice, recipe = _advise(comparisons)
    return Findings(tables, comparisons, advice, recipe)


def _advise(comparisons: list[Comparison]) -> tuple[str, dict[str, Any]]:
    """Which head to train with, and where to take the features."""
    none, linear, before = (shown(each) for each in comparisons)
    parts = []
    if none is not None:
        parts.append(f"a nonlinear head is worth {points(none)} over none")
    if linear is not None:
        parts.append(f"a nonlinear head is worth {points(linear)} over a linear one")
    if before is not None:
        parts.append(f"features before the head are worth {points(before)} over those behind it")
    if not parts:
        return f"On your images: {why_unclear(comparisons)}.", {}
    recipe: dict[str, Any] = {}
    if linear is not None and linear.mean < 0:
        recipe = {"head": "linear"}
    elif none is not None:
        recipe = {"head": "nonlinear" if none.mean > 0 else "none"}
    return f"On your images {'; '.join(parts)}.", recipe
