"""What a study works on, and how large its trials are: decided before the first, stored, and kept when it goes on."""

import dataclasses
import math
import time
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch

from labelwise import terminal
from labelwise.config import PretrainSettings, StudySettings
from labelwise.errors import DataError, UsageError
from labelwise.images.cache import build_cache
from labelwise.images.duplicates import unique_keys
from labelwise.images.grouping import group_images
from labelwise.images.splits import draw_labels, hash_names, lock_test
from labelwise.measures.linear import one_of_each
from labelwise.measures.statistics import FEWEST_DRAWS
from labelwise.models.encoder import create_encoder
from labelwise.stages.methods import is_unbalanced
from labelwise.stages.planning import Plan, make_plan, specify_encoder, view_policy
from labelwise.stages.pooling import Pool, choose_sizes, keep_on_device, make_pool, open_sources
from labelwise.studies.trials import FOLDS, Material, Rows, Trial, features_of, linear_answers
from labelwise.views.pipeline import Views, make_views

MOST_SCORED = 2000  # labeled images that answers are about
FEWEST_IMAGES, FEWEST_EPOCHS = 256, 2  # of a trial; a smaller one would say nothing
_ENOUGH = 3  # times as much of both, before more than one seed is run
_STEPS_A_PASS = 8  # at least; small sets get small batches
_TRIALS_SHARE = 0.9  # of the time; the rest is for start and end
_PROBED = 1000  # images, to time the answers
_LONG = "8000h"  # that steps are timed, and no epochs chosen


@dataclass(frozen=True)
class Size:
    """How large the trials of a study are.

    Attributes:
        images: That a trial trains on.
        epochs: Of the usual trial.
        seeds: Times each trial is run.
        seconds: That all trials were estimated to take.
        available: Images there are, `most_images` at most.
    """

    images: int
    epochs: int
    seeds: int
    seconds: float
    available: int


@dataclass(frozen=True)
class Costs:
    """What things take, in seconds.

    Attributes:
        image: Of training on one image, once, both views.
        answer: Of the answers, for one scored image.
        views: More than the usual, for one image, by what makes the views.
    """

    image: float
    answer: float
    views: dict[Views, float]

    def of(self, trial: Trial, images: int, epochs: int, scored: int) -> float:
        """What a trial takes."""
        return (
            trial.cost * images * epochs * (self.image + self.views.get(trial.views, 0.0))
            + scored * self.answer
        )


@dataclass(frozen=True)
class Prepared:
    """All that is needed before the first trial.

    Attributes:
        facts: To be stored, and compared when the study goes on.
        tested: Test images, which stay untouched.
    """

    material: Material
    size: Size
    trials: list[Trial]
    costs: Costs
    facts: dict[str, Any]
    tested: int

    @property
    def jobs(self) -> list[tuple[Trial, int]]:
        """Trials and their seeds, seed by seed; what trains nothing is run often enough to be claimed."""
        return [
            (trial, seed)
            for seed in range(max(self.size.seeds, FEWEST_DRAWS))
            for trial in self.trials
            if seed < self.size.seeds or not trial.trains
        ]


def prepare(
    module: ModuleType,
    settings: StudySettings,
    usual: PretrainSettings,
    device: torch.device,
    deadline: float,
    before: dict[str, Any] | None,
    at_once: int = 1,
) -> Prepared:
    """Open the images and decide how large the trials are.

    Args:
        module: Of the study.
        settings, usual: Of the study, and of its usual training.
        device: Where.
        deadline: On the clock of `time.monotonic`.
        before: The facts of the study that goes on.
        at_once: Trials that run at the same time, on a GPU each.

    Raises:
        DataError: The images or labels cannot be used, or are others than before.
        UsageError: The time is too short for one trial.
    """
    images = open_sources(usual)
    image_size, side = choose_sizes(usual, images, device)
    with terminal.track("reading images", len(images.names)) as bar:
        cache = build_cache(images, side=side, evaluation_size=image_size, progress=bar.advance)
    with terminal.track("comparing images", len(images.names)) as bar:
        groups = group_images(images, cache, bar.advance)
    lock = lock_test(images, cache.keys, cache.readable, usual.holdout, usual.holdout_seed, groups=groups.of)
    whole = make_pool(images, cache, lock, usual)
    names = [f"{images.names[row]} {key} {label}" for row, key, label in zip(whole.rows, whole.keys.tolist(), whole.labels, strict=True)]  # fmt: skip
    spec = specify_encoder(usual, image_size, whole)
    members, scored = _scored_first(settings, whole, names, groups.of[whole.rows])
    timed = {"precision": before["precision"]} if before else {"time_limit": _LONG}
    plan = make_plan(usual.model_copy(update=timed), spec, whole, side, device)
    usual = usual.model_copy(update={"blur": plan.blur})
    trials: list[Trial] = module.plan(settings, usual, create_encoder(spec).features)

    def material_of(count: int, epochs: int) -> Material:
        chosen = np.sort(members[:count])
        rows = whole.rows[chosen]
        labels = [whole.labels[member] for member in chosen]
        pool = Pool(cache, rows, unique_keys(cache.keys[rows]), labels)
        places = np.flatnonzero(np.isin(chosen, scored))
        asked_about = _in_every_fold(settings, places, [str(labels[place]) for place in places], groups.of[rows[places]])  # fmt: skip
        batch = max(2, min(plan.batch_size, 2 ** int(math.log2(count / _STEPS_A_PASS))))
        sized = dataclasses.replace(plan, batch_size=batch)
        return Material(usual, sized, spec, pool, *asked_about, epochs, device)

    if before:
        known = {name: before[name] for name in ("layout", "reason", "micro_batch_size") if name in before}
        plan = dataclasses.replace(plan, **known)
        size, costs = Size(**before["size"]), Costs(before["image"], before["answer"], {})
    else:
        costs = _time(material_of(min(len(members), _PROBED), 1), plan, trials, module.ANSWERING)
        size = fit(trials, settings, len(members), len(scored), costs, deadline - time.monotonic(), getattr(module, "EPOCH_STEP", 1), at_once)  # fmt: skip
    facts = {
        "size": dataclasses.asdict(size),
        "image": costs.image,
        "answer": costs.answer,
        "precision": plan.precision,
        "layout": plan.layout,
        "reason": plan.reason,
        "micro_batch_size": plan.micro_batch_size,
        "images_sha256": hash_names([names[member] for member in members[: size.images]]),
    }
    if before and before["images_sha256"] != facts["images_sha256"]:
        raise DataError(
            f"{settings.images}: its images or labels changed since this study was begun; put them back, or choose another --out."
        )
    material = material_of(size.images, size.epochs)
    if at_once == 1:
        material = dataclasses.replace(material, pool=keep_on_device(material.pool, device))
    trials = [trial for trial in trials if trial.changed.get("batch_size", 0) <= size.images / 2]
    return Prepared(material, size, trials, costs, facts, len(lock["names"]))


def _scored_first(settings: StudySettings, pool: Pool, names: list[str], groups: Rows) -> tuple[Rows, Rows]:
    """The order in which images are taken when there is not time for all: labeled ones first, by class.

    Returns:
        Places in the pool, (M,), and of them those that are scored, (T,).

    Raises:
        DataError: There are too few labels.
    """
    labeled = np.flatnonzero([label is not None for label in pool.labels])
    labels = [str(pool.labels[member]) for member in labeled]
    _in_every_fold(settings, labeled, labels, groups[labeled])
    drawn = labeled[draw_labels([names[member] for member in labeled], labels, 0, 0)]
    scored, spare = np.split(drawn, [MOST_SCORED])
    unlabeled = np.setdiff1d(np.arange(len(names)), drawn)
    others = np.random.default_rng(0).permutation(np.concatenate([spare, unlabeled]))
    return np.concatenate([scored, others])[: settings.most_images], scored


def _in_every_fold(
    settings: StudySettings, places: Rows, labels: list[str], groups: Rows
) -> tuple[Rows, Rows, int, Rows, bool]:
    """Labeled images of the classes that every fold can have one of.

    Returns:
        Of `Material`: `scored`, `labels`, `classes`, `groups` and `balanced`.

    Raises:
        DataError: There are fewer than two such classes.
    """
    classes, indices = np.unique(np.array(labels, dtype=str), return_inverse=True)
    of_groups = one_of_each(groups, indices)[1] if labels else indices
    enough = np.flatnonzero(np.bincount(of_groups, minlength=len(classes)) >= FOLDS)
    if len(enough) < 2:
        raise DataError(
            f"{settings.images}: a study scores by labels, and needs two classes with {FOLDS} labeled images or groups each outside the "
            f"test set; {len(enough)} found: class folders, or --labels FILE."
        )
    kept = np.isin(indices, enough)
    found = np.searchsorted(enough, indices[kept])
    numbers, _ = one_of_each(groups[kept], found)
    return places[kept], found, len(enough), numbers, is_unbalanced(found, len(enough))


# --- how large


def _time(material: Material, plan: Plan, trials: list[Trial], answering: float) -> Costs:
    """Time an image's training, its answers, and each way of making views."""
    members = np.arange(min(len(material.pool.rows), 64))
    policy = view_policy(material.settings, plan, plan.image_size)

    def seconds_of(views: Views) -> float:
        squares, sizes = material.pool.squares(members, material.device)
        keys, normalization = material.pool.keys[members], material.spec.normalization
        views(policy, squares, sizes, keys, 0, 0, (0, 1), normalization)  # compiles and loads
        clock = time.perf_counter()
        views(policy, squares, sizes, keys, 0, 1, (0, 1), normalization)
        return (time.perf_counter() - clock) / len(members)

    usual = seconds_of(make_views)
    views = {trial.views: max(0.0, seconds_of(trial.views) - usual) for trial in trials}
    encoder = create_encoder(material.spec).to(material.device)
    for _ in range(2):  # the first time loads
        clock = time.perf_counter()
        linear_answers(material, features_of(material, encoder), 0)
        answers = time.perf_counter() - clock
    image = (plan.seconds_per_step or 0.0) / plan.batch_size
    return Costs(image, answering * answers / len(material.scored), views)


def fit(
    trials: list[Trial],
    settings: StudySettings,
    images: int,
    scored: int,
    costs: Costs,
    seconds: float,
    epoch_step: int = 1,
    at_once: int = 1,
) -> Size:
    """Choose images, epochs and seeds that fit: images and epochs shrink alike, and fewer seeds are run where even that is too much.

    Args:
        trials: Of one seed.
        settings: The most of each.
        images: There are, of which `scored` have labels that are used.
        costs: Of training and answers.
        seconds: There are.
        epoch_step: What epochs are a multiple of.
        at_once: Trials that run at the same time.

    Raises:
        UsageError: One trial of the smallest size does not fit.
    """
    time_left = _TRIALS_SHARE * seconds

    def sized(share: float, factor: int) -> tuple[int, int]:
        used = max(round(share * images), min(images, factor * FEWEST_IMAGES))
        epochs = max(round(share * settings.epochs), min(settings.epochs, factor * FEWEST_EPOCHS))
        return used, max(1, epochs // epoch_step) * epoch_step

    def needed(used: int, epochs: int) -> float:
        return sum(costs.of(trial, used, epochs, min(scored, used)) for trial in trials) / at_once

    def waited(used: int, epochs: int) -> float:
        """At the end for the longest trial, at most, while others have nothing to do any more (Graham's bound)."""
        longest = max(costs.of(trial, used, epochs, min(scored, used)) for trial in trials)
        return (1 - 1 / at_once) * longest

    for seeds in sorted({settings.seeds, min(3, settings.seeds), 1}, reverse=True):
        factor = _ENOUGH if seeds > 1 else 1
        for step in range(100):
            used, epochs = sized(0.95**step, factor)
            if (seconds := seeds * needed(used, epochs) + waited(used, epochs)) <= time_left:
                return Size(used, epochs, seeds, seconds, images)
    used, epochs = sized(0.0, 1)
    one = costs.of(trials[0], used, epochs, min(scored, used))
    if one > time_left:
        raise UsageError(
            f"--time-limit {settings.time_limit}: one trial of {used} images and {epochs} epochs takes about {terminal.duration(one)}, and "
            f"{terminal.duration(max(0.0, seconds))} are left after reading the images; allow more."
        )
    return Size(used, epochs, 1, needed(used, epochs), images)
