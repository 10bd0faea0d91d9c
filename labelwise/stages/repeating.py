"""`labelwise finetune --pretrain-seeds`: the same comparison with encoders of other seeds, so that its gain speaks for those too."""

import math
import time

from labelwise import rundir, terminal
from labelwise.config import FinetuneSettings, PretrainSettings, parse_duration, read_run_config
from labelwise.errors import CheckpointError, DataError, UsageError
from labelwise.images.cache import build_cache
from labelwise.measures.statistics import FEWEST_DRAWS
from labelwise.ownership import hold
from labelwise.predictions import copy_predictions
from labelwise.rundir import RunDirectory
from labelwise.stages.beginning import find_run, pool_hash
from labelwise.stages.comparing import compare, set_aside
from labelwise.stages.encoders import ENCODER_METHODS, comparison_of, sibling, sign, why_not_alike
from labelwise.stages.pooling import make_pool, open_sources
from labelwise.stages.pretraining import pretrain
from labelwise.stages.reporting import report
from labelwise.stages.scoring import classifier_of


def finetune(settings: FinetuneSettings) -> RunDirectory:
    """Train and compare classifiers on few labels.

    With `pretrain_seeds`, then pretrain with other seeds, in folders beside the run, and compare each alike. What no encoder of ours has a part in (from scratch, pixels, networks of others) is trained once and taken over.
    The same call again goes on.

    Raises:
        DataError: As `compare`; or images changed since the run was pretrained.
        UsageError: As `compare`; or the gain is not measured, there is no test set, or another run lies where an encoder would.
    """
    started = time.monotonic()
    limit = parse_duration(settings.time_limit) if settings.time_limit else math.inf
    run = rundir.open_run(settings.run)
    others = _other_seeds(run, settings.pretrain_seeds)
    if others:
        _check(run, settings, others)
        if min(settings.pretrain_seeds, settings.draws) < FEWEST_DRAWS:
            terminal.warn(f"fewer than {FEWEST_DRAWS} encoders or draws claim nothing.")
    compare(settings)
    if not others:
        return run
    report(run)  # is there whatever becomes of the others
    if any(row.get("folds") for row in rundir.read_jsonl(run.results)):
        terminal.warn("--pretrain-seeds is not done: the labels are tested in turn, not on a test set.")
        return run
    for number, (other, how) in enumerate(others, start=2):
        terminal.say(f"encoder    {number} of {settings.pretrain_seeds}, seed {how.seed}, {other.path}")
        needed = _seconds(run) - _seconds(other)
        if not other.encoder.exists():
            if time.monotonic() - started + needed > limit:
                terminal.warn(
                    f"--time-limit {settings.time_limit}: encoder {number} takes about {terminal.duration(needed)} to pretrain; "
                    "allow more, and the same command goes on."
                )
                break
            if not other.environment.exists():
                rundir.write_json(
                    other.test_lock, rundir.read_json(run.test_lock)
                )  # whatever was labeled since
            pretrain(how, becomes_latest=False)
        if reason := why_not_alike([run, other]):
            raise DataError(
                f"{other.path}: does not go with {run.path}: {reason}. `labelwise runs remove {other.path}`."
            )
        left = limit - (time.monotonic() - started)
        if left <= 0:
            terminal.warn(f"--time-limit {settings.time_limit}: encoders are left; the same command goes on.")
            break
        _compare_alike(run, other, left)
    return run


def _other_seeds(run: RunDirectory, encoders: int) -> list[tuple[RunDirectory, PretrainSettings]]:
    """Where the other encoders lie, and the settings of this run as they were decided, with another seed."""
    table = read_run_config(run.config)
    sources = {name: value for name, value in rundir.read_json(run.data)["sources"].items() if value}
    others = []
    for number in range(1, encoders):
        seed = (table["seed"] + number) % 2**32
        other = sibling(run, seed)
        others.append(
            (other, PretrainSettings.resolve({**table, **sources, "seed": seed, "out": other.path}))
        )
    return others


def _check(
    run: RunDirectory, settings: FinetuneSettings, others: list[tuple[RunDirectory, PretrainSettings]]
) -> None:
    """Refuse what would be found out hours later."""
    if not {"simclr", "supervised"} <= set(settings.methods):
        raise UsageError(
            "--pretrain-seeds needs --methods with simclr and supervised: it is their difference it tells."
        )
    before = read_run_config(run.config, FinetuneSettings)
    later = {"test": settings.test, "labels": settings.labels, **before}
    if not rundir.read_json(run.test_lock)["names"] and not later["test"] and not later["labels"]:
        raise UsageError(
            f"{run.path}: has no test set, so encoders cannot be compared on the same images; give --test FOLDER, or leave --pretrain-seeds out."
        )
    for other, how in others:
        _check_place(run, other, how)
    if not all(other.encoder.exists() for other, _ in others):
        _check_images(run, others[0][1])


def _check_place(run: RunDirectory, other: RunDirectory, how: PretrainSettings) -> None:
    """Refuse a place for another encoder where something else lies."""
    reason = ""
    try:
        rundir.check_output_folder(other.path)
        if other.path.exists() and not other.path.is_dir():
            reason = "it is a file"
        elif other.encoder.exists():
            reason = why_not_alike([run, other])
        else:
            find_run(how)
        if other.config.exists() and read_run_config(other.config)["seed"] != how.seed:
            reason = "it has another seed"
        ours, theirs = (set(map(str, rundir.read_jsonl(each.annotations))) for each in (run, other))
        if theirs - ours:
            reason = "it has labels from a page of its own, in place of which this run's would be put"
    except (UsageError, CheckpointError) as error:
        reason = str(error).split(":", 1)[-1].strip()
    if reason:
        raise UsageError(
            f"{other.path}: lies where another encoder of {run.path.name} would, and does not go with it: {reason}. Move it away."
        )


def _check_images(run: RunDirectory, how: PretrainSettings) -> None:
    """Refuse to pretrain on images that are not those of this run any more."""
    data, lock = rundir.read_json(run.data), {"excluded_groups": [], **rundir.read_json(run.test_lock)}
    images = open_sources(how)
    cache = build_cache(images, side=data["cache_side"], evaluation_size=data["image_size"])
    if pool_hash(images, make_pool(images, cache, lock, how)) != data["pool_sha256"]:
        raise DataError(
            f"{data['root']}: its images changed since {run.path} was pretrained, so other encoders would not be its equals. "
            "Put it back as it was, or pretrain anew."
        )


def _compare_alike(run: RunDirectory, other: RunDirectory, left: float) -> None:
    """Give another encoder, pretrained, the comparison that this run has had, in the seconds that are left."""
    with hold(other):
        _lend(run, other)
        rundir.take_over_labels(other, run)
    table = read_run_config(run.config, FinetuneSettings)
    given = {} if math.isinf(left) else {"time_limit": f"{left:.0f}s"}
    compare(FinetuneSettings.resolve({"run": other.path, **given}, table))
    report(other)


def _lend(run: RunDirectory, other: RunDirectory) -> None:
    """Give another encoder's run the results that no encoder of ours has a part in, predictions first."""
    rows = rundir.read_jsonl(run.results)
    if not rows:
        return
    signature = sign(comparison_of(rows[0]), other)
    set_aside(other, signature)
    there = rundir.read_jsonl(other.results)
    known = set(map(classifier_of, there))
    lent = {
        classifier_of(row): {**row, "signature": signature}
        for row in rows
        if row["method"] not in ENCODER_METHODS
    }
    missing = {key: row for key, row in lent.items() if key not in known}
    if missing:
        copy_predictions(run.predictions, other.predictions, set(missing))
        rundir.rewrite_jsonl(other.results, [*there, *missing.values()])


def _seconds(run: RunDirectory) -> float:
    """How long the epochs of pretraining that are done took."""
    return float(sum(row["seconds"] for row in rundir.read_metrics(run) if row["kind"] == "epoch"))
