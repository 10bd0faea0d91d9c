"""What a comparison rests on: the images of a run, its labels, test lock and groups, as pretraining left them or as given now."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch

from labelwise import environment, rundir, terminal
from labelwise.annotations import Annotation, find_rows, read_annotations
from labelwise.config import FinetuneSettings, read_run_config
from labelwise.errors import DataError
from labelwise.images.cache import ImageCache, build_cache
from labelwise.images.grouping import Groups, group_images
from labelwise.images.labels import OUTSIDE
from labelwise.images.source import ImageSet, open_images
from labelwise.images.splits import OWN_TEST_SPLIT, lock_test, pool_indices
from labelwise.learning.memory import keep_freed_memory
from labelwise.learning.precision import Precision, choose_device, has_fast_bf16
from labelwise.measures.linear import one_of_each
from labelwise.models.encoder import EncoderSpec
from labelwise.models.weights import load_encoder
from labelwise.rundir import RunDirectory
from labelwise.stages.classifier import Rows
from labelwise.stages.methods import (
    Bench,
    is_unbalanced,
)
from labelwise.views.draws import Policy

FEWEST_FOLDS, MOST_FOLDS = 2, 5  # where no test images are there


def set_up_bench(run: RunDirectory, settings: FinetuneSettings) -> Bench:
    """Open images, labels, test lock and encoder of a run."""
    _, spec = load_encoder(run.path)
    data = rundir.read_json(run.data)
    images, cache, groups, lock, test_method = open_separated(run, settings, spec)
    classes = sorted({label for label in images.labels if label is not None})
    if len(classes) < 2:
        found = f"only class {classes[0]!r} was found" if classes else "no labels were found"
        raise DataError(
            f"{data['root']}: {found}; comparing needs two classes or more: class folders, or --labels FILE."
        )
    labels = np.array([classes.index(label) if label is not None else -1 for label in images.labels])
    place = {name: row for row, name in enumerate(images.names)}
    test = np.array(
        [place[name] for name in lock["names"] if labels[place[name]] >= 0 and cache.readable[place[name]]],
        dtype=np.int64,
    )
    if 0 < len(test) < len(lock["names"]):
        terminal.say(
            f"test       {len(test):,} of {len(lock['names']):,} locked test images have a label; label the others for narrower intervals"
        )
    pool = pool_indices(images, cache.readable, lock)
    left_out = len(lock["excluded_duplicates"]) + len(lock["excluded_groups"])
    if left_out:
        terminal.say(
            f"groups     {left_out:,} left out, as a test image belongs with them or their pixels are others now"
        )
    labeled = pool[labels[pool] >= 0]
    missing = sorted(set(range(len(classes))) - set(labels[labeled].tolist()))
    if missing:
        raise DataError(
            f"{data['root']}: class {classes[missing[0]]!r} has no labeled image outside the test set; label one, or leave the class out."
        )
    folds = 0
    if not len(test):
        if settings.test is not None or lock["method"] == OWN_TEST_SPLIT:
            raise DataError(
                f"{run.path}: none of its {len(lock['names'])} test images has a label; label them, or give another --test FOLDER."
            )
        if lock["names"]:
            terminal.warn(
                f"none of the {len(lock['names']):,} locked test images has a label, so the labels are tested in turn; label some of "
                f"those that {run.test_lock} names, or give --test FOLDER, for images that the encoder has not seen."
            )
        test, folds = labeled, _count_folds(data["root"], labels[labeled], groups.of[labeled], classes)
        came_later = (
            settings.labels is not None and str(settings.labels.resolve()) != data["sources"]["labels"]
        )
        seen = sum(not (came_later and images.names[row].startswith(OUTSIDE)) for row in labeled)
        share = "all" if seen == len(labeled) else f"{seen:,}" if seen else "none"
        test_method = (
            f"no test set: {folds}-fold cross-validation; the encoder saw {share} of them, without labels"
        )
    keep_freed_memory()
    _remember_suggested(run, images, cache)
    plan = rundir.read_json(run.environment)["plan"]
    policy = _view_policy(read_run_config(run.config), plan)
    device = choose_device(settings.device)
    return Bench(
        run=run, settings=settings, images=images, cache=cache, groups=groups.of, names=images.names, labels=labels, classes=classes, labeled=labeled, suggested=_suggested(run, images.names, labeled), test=test, folds=folds, test_method=test_method, pool=pool,
        spec=spec, policy=policy, precision=_precision(plan, device), device=device,
        unbalanced=is_unbalanced(labels[labeled], len(classes)),
    )  # fmt: skip


def _remember_suggested(run: RunDirectory, images: ImageSet, cache: ImageCache) -> None:
    """Add what the page asked about as suggested to the history of `suggest`, where that names it otherwise, or not at all.

    The image was moved since, or an earlier version suggested it.
    """
    history = rundir.read_jsonl(run.suggested)
    named = {name for line in history if not line["as_if_unlabeled"] for name in line["files"]}
    said = _said_on_page(run, images, cache)
    asked = [images.names[row] for each, row in said if each.part == "suggested" and row is not None]
    files = [name for name in asked if name not in named]
    if files:
        line = {"budget": len(files), "files": files, "as_if_unlabeled": False}
        rundir.append_jsonl(run.suggested, {"at": environment.now(), **line})


def _suggested(run: RunDirectory, names: list[str], labeled: Rows) -> list[Rows]:
    """Labeled rows that each call of `labelwise suggest` named first, in its order."""
    place = {names[row]: row for row in labeled.tolist()}
    found = []
    for line in rundir.read_jsonl(run.suggested):
        rows = [] if line["as_if_unlabeled"] else [place.pop(name) for name in line["files"] if name in place]
        if rows:
            found.append(np.array(rows, dtype=np.int64))
    return found


def open_separated(
    run: RunDirectory, settings: FinetuneSettings, spec: EncoderSpec
) -> tuple[ImageSet, ImageCache, Groups, dict[str, Any], str]:
    """Open the images of a run, decoded and grouped, with the labels given now or then, and the lock that keeps test images apart.

    Returns:
        Images, cache, groups, lock, and in words where the test images come from.
    """
    images, cache = open_decoded(run, settings, spec)
    with terminal.track("comparing images", len(images.names)) as bar:
        groups = group_images(images, cache, bar.advance)
    for note in groups.notes:
        terminal.say(f"note       {note}")
    return images, cache, groups, *_test_lock(run, settings, images, cache, groups)


def open_decoded(
    run: RunDirectory, settings: FinetuneSettings, spec: EncoderSpec, *, annotated: bool = True
) -> tuple[ImageSet, ImageCache]:
    """Open the images of a run, with the labels given now or then and on the page of `annotate`, and what they were decoded to."""
    data = rundir.read_json(run.data)
    images = _open_images(data["sources"], settings)
    with terminal.track("reading images", len(images.names)) as bar:
        cache = build_cache(
            images, side=data["cache_side"], evaluation_size=spec.image_size, progress=bar.advance
        )
    return _with_annotations(run, images, cache) if annotated else images, cache


def _with_annotations(run: RunDirectory, images: ImageSet, cache: ImageCache) -> ImageSet:
    """Labels given on the page of `labelwise annotate`, for images that have no other."""
    said = _said_on_page(run, images, cache)
    if not said:
        return images
    labels = list(images.labels)
    gone, other = list[str](), list[str]()
    for each, row in said:
        if row is None:
            gone.append(each.file)
        elif images.labels[row] not in (None, each.label):
            other.append(each.file)
        else:
            labels[row] = each.label
    terminal.say(f"labels     {len(said) - len(gone) - len(other):,} from `labelwise annotate`")
    if gone:
        terminal.warn(
            f"{len(gone):,} labels of `labelwise annotate` are left out: their images are gone or have other pixels now, e.g. {gone[0]}."
        )
    if other:
        terminal.warn(
            f"{len(other):,} images have another label than `labelwise annotate` was told, e.g. {other[0]}; that one is not used."
        )
    return dataclasses.replace(images, labels=labels)


def _said_on_page(
    run: RunDirectory, images: ImageSet, cache: ImageCache
) -> list[tuple[Annotation, int | None]]:
    """Labels given on the page of `labelwise annotate`, each with its image: found by its pixels, wherever it lies now, or gone."""
    said = [each for each in read_annotations(run) if each.label is not None]
    return list(zip(said, find_rows(said, images.names, cache.keys), strict=True))


def _count_folds(root: str, labels: Rows, groups: Rows, classes: list[str]) -> int:
    """Into how many folds labels can be cut so that each class is in all of them.

    Raises:
        DataError: A class is in one group only.
    """
    sizes = np.bincount(one_of_each(groups, labels)[1], minlength=len(classes))
    smallest = int(sizes.argmin())
    if sizes[smallest] < FEWEST_FOLDS:
        raise DataError(
            f"{root}: there are no labeled test images, and to test the labels in turn each class needs two labeled images or groups; "
            f"{classes[smallest]!r} has {sizes[smallest]}. Label more of it, or give --test FOLDER."
        )
    return min(MOST_FOLDS, int(sizes[smallest]))


def remember_sources(run: RunDirectory, settings: FinetuneSettings) -> FinetuneSettings:
    """Take labels and test images that the last comparison of this run was given, where none are given now.

    Raises:
        DataError: The run lies among them, where nothing is ever written to.
    """
    before = read_run_config(run.config, FinetuneSettings)
    known: dict[str, Any] = {}
    for name in ("labels", "labels_root", "test"):
        given = getattr(settings, name)
        if given is not None:
            known[name] = given.absolute()
        elif name in before:
            known[name] = Path(before[name])
            terminal.say(f"{name:<10} {before[name]}, as in the last comparison")
    for name in ("labels", "test"):
        if name in known and known[name].is_dir() and run.path.is_relative_to(known[name].resolve()):
            raise DataError(
                f"{run.path}: lies inside the image folder {known[name]}, which is never written to; move the run elsewhere, or give another --{name}."
            )
    column = before.get("group_column")
    if column and settings.group_column is None:
        if settings.labels is None or str(settings.labels.absolute()) == before.get("labels"):
            known["group_column"] = column
            terminal.say(f"groups     by {column}, as in the last comparison")
        else:
            terminal.warn(
                f"--group-column {column} of the last comparison is not used with other labels; give it again."
            )
    return settings.model_copy(update=known)


def _precision(plan: dict[str, Any], device: torch.device) -> Precision:
    """What was chosen when pretraining, unless this device does not compute in it."""
    if plan["precision"] == "bf16" and not has_fast_bf16(device):
        terminal.say(
            f"precision  fp32: pretraining used bf16, which {device.type} here has no arithmetic for"
        )
        return Precision("fp32", plan["layout"], "no bf16 arithmetic here")
    return Precision(plan["precision"], plan["layout"], plan["reason"])


def _test_lock(
    run: RunDirectory, settings: FinetuneSettings, images: ImageSet, cache: ImageCache, groups: Groups
) -> tuple[dict[str, Any], str]:
    """The test images locked before pretraining, or those that came later, and in words which they are."""
    lock = rundir.read_json(run.test_lock)
    if lock["names"] and settings.test is None:
        later = {name for name, split in zip(images.names, images.splits, strict=True) if split == "test"}
        if later - set(lock["names"]):
            terminal.warn(
                "the test split of the labels came after pretraining and is not used; the images locked then are. "
                "To use it, pretrain with the same --labels."
            )
        now = lock_test(images, cache.keys, cache.readable, None, 0, groups=groups.of, locked=lock)
        lost = len(set(lock["names"]) & set(now["excluded_groups"]))
        if lost:
            terminal.warn(
                f"{lost:,} of {len(lock['names']):,} locked test images have other pixels now and are left out: whether the encoder was "
                "trained on what lies there cannot be told."
            )
        known = {*lock["names"], *lock.get("excluded_groups", ()), *lock.get("excluded_groups_keys", ())}
        seen = sum(
            not name.startswith(OUTSIDE) and name not in known and key not in known
            for name, key in zip(now["excluded_groups"], now["excluded_groups_keys"], strict=True)
        )
        if not seen:
            return now, f"{now['method']}, never trained on"
        words = f"{seen:,} images that belong with test images were pretrained on, without labels"
        terminal.warn(f"{words}; they get none. To keep them out, pretrain again.")
        return now, f"{now['method']}, never trained on; {words}"
    if "test" in images.splits:
        named = sum(
            split == "test" and not name.startswith(OUTSIDE[0])
            for name, split in zip(images.names, images.splits, strict=True)
        )
        if settings.test is not None and 0 < named < images.splits.count("test"):
            terminal.warn(
                f"{named:,} test images of your table or folders are tested too, beside those of --test."
            )
        lock = lock_test(images, cache.keys, cache.readable, None, 0, groups=groups.of)
        terminal.warn(
            "the test images came after pretraining: the encoder may have seen them, without labels."
        )
    return lock, f"{lock['method']}, given after pretraining: the encoder may have seen them, without labels"


def _open_images(sources: dict[str, str | None], settings: FinetuneSettings) -> ImageSet:
    """Open the images pretraining saw, with the labels given now or then."""
    given = {"labels": settings.labels, "labels_root": settings.labels_root, "test": settings.test}
    first: dict[str, Any] = {name: Path(str(sources[name])) if sources[name] else None for name in given}
    paths: dict[str, Any] = {name: path or first[name] for name, path in given.items()}
    root, column = Path(str(sources["images"])), sources.get("group_column")
    reopen = functools.partial(open_images, stream=bool(sources.get("stream")))
    if settings.group_column is not None or column is None or settings.labels is None:
        return reopen(root, group_column=settings.group_column or column, **paths)
    images = reopen(root, group_column=None, **paths)
    try:
        earlier = reopen(root, group_column=column, **first)
    except DataError as error:
        terminal.warn(
            f"groups by {column}, as in pretraining, cannot be read any more ({error}); intervals do without."
        )
        return images
    by_name = dict(zip(earlier.names, earlier.groups, strict=True))
    return dataclasses.replace(images, groups=[by_name.get(name) for name in images.names])


def _view_policy(config: dict[str, Any], plan: dict[str, Any]) -> Policy:
    names = {field.name for field in dataclasses.fields(Policy)} - {"size", "blur"}
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in config.items()
        if name in names
    }
    return Policy(size=plan["image_size"], blur=plan["blur"], **values)
