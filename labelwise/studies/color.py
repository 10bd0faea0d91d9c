"""What colour distortion does: the shortcut it closes, and how strong it should be (SimCLR, Sec. 3.2, Fig. 6 and Table 1)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from labelwise.config import PretrainSettings, StudySettings
from labelwise.measures.statistics import HELPS
from labelwise.stages.planning import view_policy
from labelwise.studies.findings import Comparison, Findings, Paper, Table, compare, points, shown, why_unclear
from labelwise.studies.trials import (
    Answers,
    Floats,
    Material,
    Name,
    Outcomes,
    Trial,
    accuracy_answers,
    settings_of,
)
from labelwise.views.alone import auto_augmented
from labelwise.views.mosaic import encode_thumbnail
from labelwise.views.pipeline import make_views

ANSWERING = 1.0
STRENGTHS = {"1/8": 0.125, "1/4": 0.25, "1/2": 0.5, "1": 1.0}
BLURRED, AUTO = "1 + blur", "AutoAugment"
PAPER: dict[str, list[float]] = {
    "SimCLR": [59.6, 61.0, 62.6, 63.2, 64.5, 61.1],
    "supervised": [77.0, 76.7, 76.5, 75.7, 75.4, 77.1],
}
WITHOUT: Name = ("histogram", "without")
WITH: Name = ("histogram", "with")
HISTOGRAMS = (
    Trial(WITHOUT, {"color": 0.0, "grayscale": 0.0, "blur": 0.0}, trains=False),
    Trial(WITH, {"color": 1.0, "color_strength": 1.0, "grayscale": 0.2, "blur": 0.0}, trains=False),
)
CANDIDATES = 100  # crops among which the other crop of an image is looked for
_BINS = 32  # of a channel
_SHOWN, _CROPS = 2, 5  # images, and crops of each, in the picture


def plan(study: StudySettings, usual: PretrainSettings, width: int) -> list[Trial]:
    """Trials of one seed, the most telling first."""
    trials = list(HISTOGRAMS)
    for method in PAPER:
        supervised = method == "supervised"
        trials += [
            Trial((method, name), {**_strength(value), "blur": 0.0}, supervised=supervised)
            for name, value in sorted(STRENGTHS.items(), key=lambda each: -each[1])
        ]
        trials.append(Trial((method, BLURRED), {**_strength(1.0), "blur": 0.5}, supervised=supervised))
        trials.append(Trial((method, AUTO), views=auto_augmented, supervised=supervised))
    return trials


def _strength(value: float) -> dict[str, Any]:
    """Settings of colour distortion as the paper has it, at a strength."""
    return {"color_strength": value, "color": 0.8, "grayscale": 0.2}


def answer(material: Material, trial: Trial, seed: int, before_step: Callable[[], None]) -> Answers:
    """Linear accuracy of the encoder, accuracy of supervised training, or whether a histogram finds the other crop."""
    if not trial.trains:
        return {"found": _histogram_finds(material, trial, seed)}
    return accuracy_answers(material, trial, seed, before_step)


def _histogram_finds(material: Material, trial: Trial, seed: int) -> Floats:
    """Whether, of up to a hundred crops, the one whose colours are most like those of an image's crop is of the same image, (T,)."""
    found = np.zeros(len(material.scored))
    order = np.random.default_rng(seed).permutation(len(found))
    for block in np.array_split(order, max(1, round(len(order) / CANDIDATES))):
        crops = _crops(material, trial, material.scored[block], seed, (0, 1))
        first, second = histograms(crops).reshape(2, len(block), -1)
        distance = np.abs(first[:, None] - second[None]).sum(axis=2)
        found[block] = distance.argmin(axis=1) == np.arange(len(block))
    return found


def histograms(images: Tensor) -> npt.NDArray[np.float64]:
    """Share of the pixels of each channel in 32 steps of intensity, (B, 3, H, W) in 0-1 -> (B, 96)."""
    steps = (images.cpu() * _BINS).long().clamp(0, _BINS - 1).flatten(2)  # (B, 3, P)
    counts = torch.zeros(*steps.shape[:2], _BINS).scatter_add_(2, steps, torch.ones(steps.shape))
    shares: npt.NDArray[np.float64] = (counts / steps.shape[2]).flatten(1).double().numpy()
    return shares


def _crops(
    material: Material, trial: Trial, members: npt.NDArray[np.int64], seed: int, views: tuple[int, ...]
) -> Tensor:
    """Views of some images of the pool as a trial makes them, 0-1, (V M, 3, S, S)."""
    settings, pool = settings_of(material, trial, seed), material.pool
    policy = view_policy(settings, material.plan, material.plan.image_size)
    squares, sizes = pool.squares(members, torch.device("cpu"))
    return make_views(dataclasses.replace(policy, blur=0.0), squares, sizes, pool.keys[members], seed, 0, views)  # fmt: skip


def describe(outcomes: Outcomes, material: Material, study: StudySettings) -> Findings:
    """How well colours alone find an image, accuracy by strength, and advice."""
    columns = [*STRENGTHS, BLURRED, AUTO]
    shortcut = Table(
        "How often the colour histogram alone finds the other crop of an image among about a hundred",
        ["without colour distortion", "with colour distortion, always on"],
        ["found"],
        [[outcomes.level(WITHOUT, "found")], [outcomes.level(WITH, "found")]],
        "bars",
        note="By chance about 1 %. Where colours give an image away, the network need not learn what is in it.",
    )
    strengths = Table(
        "Accuracy by strength of colour distortion",
        list(PAPER),
        columns,
        [[outcomes.level((method, column), "h") for column in columns] for method in PAPER],
        "lines",
        paper=Paper("Table 1", list(PAPER), columns, list(PAPER.values())),
        note="SimCLR: linear accuracy. Supervised: the same network trained from scratch on labels of the other fold, under the same augmentations.",
    )
    comparisons = [
        compare(outcomes, "histogram finds the other crop: without against with colour distortion", (WITHOUT, "found"), (WITH, "found"), "crops of one image share their colours (Fig. 6)"),
        *(
            compare(outcomes, f"{method}: strength 1 against 1/8", ((method, "1"), "h"), ((method, "1/8"), "h"), paper)
            for method, paper in (("SimCLR", "+3.6 points (Table 1)"), ("supervised", "-1.3 points (Table 1)"))
        ),
    ]  # fmt: skip
    advice, recipe = _advise(outcomes, comparisons[1])
    return Findings([strengths, shortcut], comparisons, advice, recipe, {"histograms": _pictures(material)})


def _advise(outcomes: Outcomes, strong: Comparison) -> tuple[str, dict[str, Any]]:
    """Whether strong colour distortion pays, and the strength to use: one of the ends, unless one between beats it."""
    ends = shown(strong)
    if ends is None:
        return f"On your images: {why_unclear([strong])}.", {}
    end, words = ("1", "matters") if ends.mean > 0 else ("1/8", "does harm")
    advice = f"On your images strong colour distortion {words}: {points(ends)} at strength 1 against 1/8"
    between = {
        name: compare(outcomes, "", (("SimCLR", name), "h"), (("SimCLR", end), "h"))
        for name in ("1/4", "1/2")
    }
    better = {
        name: each.difference for name, each in between.items() if each.verdict == HELPS and each.difference
    }
    if better:
        best = max(better, key=lambda name: better[name].mean)
        advice += f"; {best} is better still, {points(better[best])}"
    else:
        best = end
        advice += f"; none between is shown to be better than {end}"
    return f"{advice}: use {best}.", {"color_strength": STRENGTHS[best]}


def _pictures(material: Material) -> list[dict[str, Any]]:
    """Of two images: the picture, and histograms over all channels of some crops, without and with colour distortion."""
    members = material.scored[:: max(1, len(material.scored) // _SHOWN)][:_SHOWN]
    shown = []
    for member in members:
        one = np.repeat(member, 1)
        entry: dict[str, Any] = {"thumbnail": encode_thumbnail(material.pool.cache.evaluations[material.pool.rows[member]])}  # fmt: skip
        for trial in HISTOGRAMS:
            crops = _crops(material, trial, one, 0, tuple(range(_CROPS)))
            entry[trial.name[1]] = histograms(crops).reshape(_CROPS, 3, _BINS).mean(axis=1).round(4).tolist()
        shown.append(entry)
    return shown
