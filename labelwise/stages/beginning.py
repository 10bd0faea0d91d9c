"""Which run the settings of a pretraining belong to, and what is written of a new one before its first step."""

import dataclasses
import itertools
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from labelwise import environment, rundir, terminal
from labelwise.config import PretrainSettings, to_toml
from labelwise.errors import CheckpointError, UsageError
from labelwise.images.cache import ImageCache
from labelwise.images.grouping import Groups
from labelwise.images.shards import whole_path
from labelwise.images.source import ImageSet
from labelwise.images.splits import OWN_TEST_SPLIT, hash_names, lock_test
from labelwise.learning.optimization import DEFAULTS
from labelwise.learning.precision import device_name
from labelwise.rundir import RunDirectory
from labelwise.stages.planning import Plan, is_run
from labelwise.stages.pooling import Pool

_OF_THE_MACHINE = ("devices", "rank_timeout", "tracker", "keep_decoded")  # a run goes on with others


def find_run(settings: PretrainSettings) -> tuple[RunDirectory, bool]:
    """Find the run these settings belong to, or name a new one."""
    asked = _asked(settings)
    folders = (settings.images, settings.labels, settings.test)
    inputs = [folder for folder in folders if folder is not None and folder.is_dir()]
    if settings.out is not None:
        run = RunDirectory(settings.out.absolute())
        rundir.check_output_folder(run.path, *inputs)
        if not run.environment.exists():
            return run, True
        before = with_whole_paths(rundir.read_json(run.environment)["asked"])
        if "pretrain" in before:
            raise UsageError(f"{settings.out}: holds a study, not a run; choose another --out.")
        changed = [key for key in asked if asked[key] != before.get(key, _default(key))]
        if changed:
            key = changed[0]
            raise UsageError(
                f"{settings.out}: holds a run with {key} = {before.get(key, _default(key))!r}, now {asked[key]!r}; "
                f"choose another --out, or `labelwise runs remove {settings.out}`."
            )
        return run, False
    stem = re.sub(r"[^\w.-]+", "-", settings.images.resolve().name) or "images"
    stem = "latest-images" if stem == rundir.LATEST.name else stem  # runs/latest is a link of ours
    number = 1
    while True:
        run = RunDirectory((rundir.DEFAULT_RUNS / (stem if number == 1 else f"{stem}-{number}")).absolute())
        rundir.check_output_folder(run.path, *inputs)
        if not run.environment.exists():
            return run, True
        before = with_whole_paths(rundir.read_json(run.environment)["asked"])
        if all(asked[key] == before.get(key, _default(key)) for key in asked):
            return run, False
        number += 1


def _asked(settings: PretrainSettings) -> dict[str, Any]:
    """What decides which run the settings belong to; one folder is one folder however it is spelt."""
    return with_whole_paths(settings.model_dump(mode="json", exclude={"out", *_OF_THE_MACHINE}))


def with_whole_paths(asked: dict[str, Any]) -> dict[str, Any]:
    """Settings with paths as they are however they were spelt, for comparing."""
    paths = {name: asked.get(name) for name in ("images", "labels", "labels_root", "test")}
    return {**asked, **{name: whole_path(Path(path)) for name, path in paths.items() if path}}


def _default(key: str) -> Any:
    """What a setting was before it was one."""
    return PretrainSettings.model_fields[key].default


def lock_of(
    run: RunDirectory, settings: PretrainSettings, images: ImageSet, cache: ImageCache, groups: Groups
) -> dict[str, Any]:
    """Lock the test images, or take the lock this run (or the one it goes on from) already has."""
    if run.environment.exists():  # what was trained on by this lock goes on so
        lock: dict[str, Any] = rundir.read_json(run.test_lock)
        return {
            "excluded_groups": [],
            "excluded_groups_keys": [],
            "earlier_keys": [],
            **lock,
        }  # earlier versions knew no groups
    earlier = run.test_lock
    if not earlier.exists() and is_run(settings.init):
        earlier = rundir.open_run(Path(str(settings.init))).test_lock
    locked = rundir.read_json(earlier) if earlier.exists() else None
    share, seed = settings.holdout, settings.holdout_seed
    lock = lock_test(images, cache.keys, cache.readable, share, seed, groups=groups.of, locked=locked)
    test = set(lock["names"])
    if (
        lock["method"] == OWN_TEST_SPLIT
        and any(images.labels)
        and not any(label for name, label in zip(images.names, images.labels, strict=True) if name in test)
    ):
        terminal.warn(
            "none of your test images has a label, so nothing can be compared on them before you label some or give --test FOLDER."
        )
    return lock


def read_plan(run: RunDirectory) -> Plan | None:
    """Read what was decided before step 0; None where nothing was yet.

    Raises:
        CheckpointError: A part of it is missing.
    """
    if not run.environment.exists():
        return None
    try:
        return TypeAdapter(Plan).validate_python(rundir.read_json(run.environment)["plan"])
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(
            f"{run.environment}: damaged (plan.{first['loc'][0]}: {first['msg']}); put it back from a copy."
        ) from None


def write_start(
    run: RunDirectory,
    settings: PretrainSettings,
    plan: Plan,
    device: torch.device,
    images: ImageSet,
    cache: ImageCache,
    groups: Groups,
    lock: dict[str, Any],
    pool: Pool,
) -> None:
    """Write what is known before step 0: lock, data, settings, and last of all the environment."""
    rundir.write_json(run.test_lock, lock)
    if is_run(settings.init):
        rundir.take_over_labels(run, rundir.open_run(Path(str(settings.init))))
    counts = Counter(label for label in images.labels if label is not None)
    sources = {
        name: whole_path(path) if path else None
        for name, path in (
            ("images", settings.images),
            ("labels", settings.labels),
            ("labels_root", settings.labels_root),
            ("test", settings.test),
        )
    }
    data = {
        "root": whole_path(settings.images),
        "sources": {**sources, "group_column": settings.group_column, "stream": settings.stream},
        "layout": images.layout,
        "images": len(images.names),
        "readable": int(cache.readable.sum()),
        "pool": len(pool.rows),
        "pool_sha256": pool_hash(images, pool),
        "pretrained_on": pool.count,
        "test": len(lock["names"]),
        "test_method": lock["method"],
        "excluded_duplicates": len(lock["excluded_duplicates"]),
        "excluded_groups": len(lock["excluded_groups"]),
        "grouped": groups.counts,
        "quarantined": cache.quarantined,
        "classes": dict(sorted(counts.items())),
        "image_size": plan.image_size,
        "cache_side": plan.cache_side,
        "intensity_range": cache.intensity_range,
        "fingerprint": cache.folder.name,
        "notes": images.notes + groups.notes,
    }
    rundir.write_json(run.data, data)
    resolved = settings.model_dump(
        mode="json", exclude={"images", "out", "time_limit", *_OF_THE_MACHINE}, exclude_none=True
    )
    if is_run(settings.init):
        resolved["init"] = str(
            rundir.open_run(Path(str(settings.init))).path
        )  # runs/latest is soon another one
    chosen = dataclasses.asdict(plan)
    resolved |= {
        key: chosen[key]
        for key in (
            "image_size",
            "cache_side",
            "stem",
            "epochs",
            "precision",
            "batch_size",
            "weight_decay",
            "warmup_epochs",
            "blur",
        )
    }
    if plan.micro_batch_size < plan.batch_size:
        resolved["micro_batch_size"] = plan.micro_batch_size
    resolved["learning_rate"] = settings.learning_rate or DEFAULTS[settings.optimizer][0]
    rundir.write_text(run.config, to_toml({"pretrain": resolved}))
    environment.start(
        run,
        device=device_name(device),
        asked=_asked(settings),
        plan=chosen,
        precision={"number": plan.precision, "layout": plan.layout, "reason": plan.reason},
    )


def pool_hash(images: ImageSet, pool: Pool) -> str:
    """Hash of names and content of the images that are trained on."""
    names = (f"{images.names[row]} {key}" for row, key in zip(pool.rows, pool.keys, strict=True))
    shards = zip(pool.shards.files, pool.shards.counts, strict=True) if pool.shards else ()
    return hash_names(itertools.chain(names, (f"{Path(file).name} {count}" for file, count in shards)))
