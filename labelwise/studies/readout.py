"""What the features still know before and after the projection head (SimCLR, Sec. 4.2, Table 3)."""

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from labelwise import seeding
from labelwise.config import PretrainSettings, StudySettings
from labelwise.measures.linear import fit_network
from labelwise.measures.statistics import HELPS, HURTS
from labelwise.models.features import extract_features
from labelwise.studies.findings import Findings, Paper, Table, compare, points, why_unclear
from labelwise.studies.trials import Answers, Floats, Material, Name, Outcomes, Rows, Trial, pretrain_briefly
from labelwise.views import color
from labelwise.views.alone import WithAnother, augment

Pixels = npt.NDArray[np.uint8]

ANSWERING = 6.0
GRAY, ROTATION, NOISE, SOBEL = "color or gray", "rotation", "original or corrupted", "original or Sobel"
ADDED = {ROTATION: "rotate", NOISE: "noise", SOBEL: "sobel"}  # to the augmentations of pretraining
PAPER: dict[str, list[float]] = {  # h, g(h), chance
    GRAY: [99.3, 97.4, 80],
    ROTATION: [67.6, 25.6, 25],
    NOISE: [99.5, 59.6, 50],
    SOBEL: [96.6, 56.3, 50],
}
_GRAY_CHANCE = 0.2


def plan(study: StudySettings, usual: PretrainSettings, width: int) -> list[Trial]:
    """Trials of one seed: rotation first, where the paper's h and g(h) differ most."""
    head = {"head": "nonlinear", "projection_width": width}  # h and g(h) of one width, as in the paper
    return [
        *(Trial((task,), head, WithAnother(name)) for task, name in ADDED.items()),
        Trial((GRAY,), {**head, "color": 0.8, "grayscale": _GRAY_CHANCE}),
    ]


def answer(material: Material, trial: Trial, seed: int, before_step: Callable[[], None]) -> Answers:
    """Whether what was done to an image can be told from h, and from g(h) of the same width."""
    task = trial.name[0]
    learner = pretrain_briefly(material, trial, seed, before_step)
    behind = nn.Sequential(learner.encoder, learner.head)
    return {
        asked: _told(material, network, task, seed)
        for asked, network in (("h", learner.encoder), ("g", behind))
    }


def _told(material: Material, network: nn.Module, task: str, seed: int) -> Floats:
    """Share of an image's versions of which a small network, trained on those of other images, tells what was done, (T,)."""
    places, normalization = np.arange(len(material.scored)), material.spec.normalization
    features, done = [], []
    for pixels, what in _versions(material, task, seed):
        features.append(extract_features(network, pixels, places, normalization, material.device).numpy())
        done.append(what)
    seen, truth = np.stack(features, axis=1), np.stack(done, axis=1)  # (T, V, F), (T, V)
    right = np.zeros(len(truth))
    for train, held in material.folds(seed):
        told = fit_network(seen[train].reshape(-1, seen.shape[2]), truth[train].reshape(-1), seed)
        guessed = told(seen[held].reshape(-1, seen.shape[2])).reshape(truth[held].shape)
        right[held] = (guessed == truth[held]).mean(axis=1)
    return right


def _versions(material: Material, task: str, seed: int) -> Iterator[tuple[Pixels, Rows]]:
    """Versions of the scored images, uint8, (T, E, E, 3), each with what was done to every image, (T,)."""
    pixels = np.array(material.pool.cache.evaluations[material.rows])
    keys, count = material.pool.keys[material.scored], len(pixels)
    if task == ROTATION:
        for turn in range(4):
            yield np.ascontiguousarray(np.rot90(pixels, turn, axes=(1, 2))), np.full(count, turn)
        return
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    if task == GRAY:
        gray = seeding.uniform(seed, 0, keys, 0, 1)[:, 0] < _GRAY_CHANCE
        yield _as_pixels(color.drop_color(images, torch.from_numpy(np.flatnonzero(gray)))), gray.astype(np.int64)  # fmt: skip
        return
    yield pixels, np.zeros(count, dtype=np.int64)
    yield _as_pixels(augment(ADDED[task], images, keys, seed, 0, 0)), np.ones(count, dtype=np.int64)


def _as_pixels(images: Tensor) -> Pixels:
    """0-1, (T, 3, E, E), as they would be in a file."""
    return (255 * images).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def describe(outcomes: Outcomes, material: Material, study: StudySettings) -> Findings:
    """What can be told from h and from g(h), beside the paper's table, and advice."""
    table = Table(
        "What was done to an image, told by a small network",
        list(PAPER),
        ["h", "g(h)"],
        [[outcomes.level((task,), asked) for asked in ("h", "g")] for task in PAPER],
        "bars",
        paper=Paper("Table 3", list(PAPER), ["h", "g(h)", "chance"], list(PAPER.values())),
        note="Chance is 80, 25, 50 and 50 %. Rotation, noise and Sobel were added to the augmentations of pretraining, one a training, as the paper does.",
    )
    names: dict[str, Name] = {task: (task,) for task in PAPER}
    comparisons = [
        compare(outcomes, f"{task}: h against g(h)", (name, "h"), (name, "g"), f"{PAPER[task][0]} against {PAPER[task][1]}")
        for task, name in names.items()
    ]  # fmt: skip
    lost = {
        task: each.difference
        for task, each in zip(PAPER, comparisons, strict=True)
        if each.verdict == HELPS and each.difference is not None
    }
    if not lost:
        kept = any(each.verdict == HURTS for each in comparisons)
        why = "g(h) knows more than h, which the paper did not see" if kept else why_unclear(comparisons)
        return Findings([table], comparisons, f"On your images: {why}.", {})
    task = max(lost, key=lambda task: lost[task].mean)
    advice = f"On your images the head forgets {task} most: from h it is told better by {points(lost[task])}; use h, as Labelwise does."  # fmt: skip
    return Findings([table], comparisons, advice, {})
