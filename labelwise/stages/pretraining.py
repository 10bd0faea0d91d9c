"""`labelwise pretrain`: SimCLR on a folder of images, from files to an encoder. The loop is `_train`."""

import dataclasses
import functools
import itertools
import re
import shutil
import signal
import socket
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import TypeAdapter, ValidationError
from torch.distributed import DistError

from labelwise import environment, rundir, terminal
from labelwise.config import PretrainSettings, parse_duration, to_toml
from labelwise.errors import (
    CheckpointError,
    DataError,
    Interrupted,
    LabelwiseError,
    ResourceError,
    UsageError,
    is_out_of_memory,
)
from labelwise.images.cache import ImageCache, build_cache
from labelwise.images.grouping import Groups, group_images
from labelwise.images.shards import whole_path
from labelwise.images.source import ImageSet
from labelwise.images.splits import OWN_TEST_SPLIT, hash_names, lock_test
from labelwise.images.streaming import Batch
from labelwise.interruption import stop_between_steps
from labelwise.learning.checkpoint import (
    Position,
    bytes_needed,
    check_alike,
    load_checkpoint,
    save_checkpoint,
    share_state,
)
from labelwise.learning.contrast import chance_loss
from labelwise.learning.memory import keep_freed_memory
from labelwise.learning.optimization import (
    DEFAULTS,
    Diverged,
    set_rate,
    warmup_cosine,
)
from labelwise.learning.precision import Precision, choose_device, compute_deterministically, device_name
from labelwise.learning.ranks import Ranks, device_of, is_rank, join, lost
from labelwise.learning.simclr import Learner
from labelwise.measures import health
from labelwise.models.encoder import EncoderSpec, check_backbone
from labelwise.models.weights import save_encoder, save_module
from labelwise.ownership import beat, hold
from labelwise.rundir import RunDirectory
from labelwise.stages.feeding import feed
from labelwise.stages.guarding import Guard
from labelwise.stages.monitoring import (
    look,
    monitored_features,
    save_mosaic,
    save_near_copies,
    save_neighbours,
)
from labelwise.stages.planning import (
    FEW_STEPS,
    Plan,
    Pool,
    announce,
    check_divisible,
    choose_sizes,
    few_steps_in_words,
    inherit_model,
    is_run,
    keep_on_device,
    make_learner,
    make_plan,
    make_pool,
    open_sources,
    size_at,
    specify_encoder,
    view_policy,
)
from labelwise.views.pipeline import Normalization, make_views

SAVE_SECONDS = 120.0
_COURTESY_SECONDS = 1.5
_OF_THE_MACHINE = ("devices", "rank_timeout")  # a run goes on with others
CHECKS = 10  # such looks per run


def pretrain(settings: PretrainSettings, *, becomes_latest: bool = True) -> RunDirectory:
    """Train an encoder on unlabeled images.

    The same call again goes on where an interrupted one stopped. In a process that torchrun started it trains together with
    the others, and only the first one writes and speaks.

    Args:
        settings: Which images, and how.
        becomes_latest: `runs/latest` names this run then.

    Raises:
        DataError: The images cannot be used.
        UsageError: A setting does not fit the images or this machine.
        Interrupted: A signal came; the run is saved.
        LostRankError: Another process ended, or does not answer; what was saved last is there.
    """
    if settings.devices != "1" and not is_rank():
        raise UsageError(
            "devices: only the command line starts other processes; from Python, run it under torchrun."
        )
    with join(parse_duration(settings.rank_timeout)) as ranks:
        if not ranks.is_first:
            terminal.mute()
        try:
            run = _pretrain(settings, ranks)
        except LabelwiseError:
            if not ranks.is_first:
                time.sleep(
                    _COURTESY_SECONDS
                )  # it may be the first one's error too, who then ends this process
            raise
        if becomes_latest and ranks.is_first:
            rundir.point_latest(run)
    return run


def _pretrain(settings: PretrainSettings, ranks: Ranks) -> RunDirectory:
    """Prepare, train, and write what came out."""
    started = time.monotonic()
    if ranks.is_first:
        settings = inherit_model(settings)
    settings = ranks.tell(lambda: settings)  # others may not have the run that it goes on from
    run, is_new = ranks.tell(lambda: find_run(settings))
    if ranks.is_first:
        rundir.finish_deleting(run.path.parent)
    if ranks.tell(run.encoder.exists):
        if ranks.is_first:
            if rundir.read_json(run.environment)["finished"] is None:  # killed right after saving the encoder
                _finish(run, time.monotonic() - started)
            terminal.say(f"{run.path}: is pretrained already, {run.encoder}")
        return run
    if settings.stream and settings.time_limit is not None:
        raise UsageError(
            "--time-limit: is for images that are decoded once; how long a stream takes to read is not known. Give --epochs."
        )
    device = device_of(ranks, choose_device(settings.device))
    if settings.deterministic:
        compute_deterministically()
    check_backbone(settings.backbone)
    torch.manual_seed(settings.seed)

    images = open_sources(settings)
    plan = ranks.tell(lambda: _read_plan(run))
    size, side = ranks.tell(
        lambda: (plan.image_size, plan.cache_side) if plan else choose_sizes(settings, images, device)
    )
    with terminal.track("reading images", len(images.names)) as bar:
        cache = build_cache(images, side=side, evaluation_size=size, progress=bar.advance)
    groups, lock = ranks.tell(lambda: _separate_test(run, settings, images, cache))
    pool = keep_on_device(make_pool(images, cache, lock, settings), device)
    keep_freed_memory()
    if ranks.count > 1:
        _check_pool(settings, ranks, pool_hash(images, pool))
    spec, plan = ranks.tell(lambda: _decide(run, settings, images, pool, plan, size, side, device, ranks))
    check_divisible(plan, ranks)
    spec = dataclasses.replace(spec, stem=plan.stem)
    precision = Precision(plan.precision, plan.layout, plan.reason)

    if not ranks.is_first:
        alike = settings.model_copy(update={"init": None})  # it gets its weights from the first one
        _train(
            run,
            settings,
            plan,
            pool,
            lock,
            spec.normalization,
            make_learner(alike, plan, spec, precision, device, ranks),
        )
        return run
    with hold(run, is_new=is_new):
        if is_new:
            _write_start(run, settings, plan, device, images, cache, groups, lock, pool)
        if not run.near_copies.exists():
            save_near_copies(run, images, cache, groups.near, lock)
        announce(run, settings, plan, spec, pool, lock, images, groups, is_new, ranks)
        save_mosaic(run, view_policy(settings, plan, plan.image_size), pool, settings.seed)

        learner = make_learner(settings, plan, spec, precision, device, ranks)
        folders = [run.checkpoints, *([run.sound] if settings.init else [])]
        needed = sum(bytes_needed(folder, learner.modules.values()) for folder in folders)
        rundir.check_space(run.path, needed, "checkpoints")
        _train(run, settings, plan, pool, lock, spec.normalization, learner)

        save_module(
            run.head,
            learner.head,
            {
                "kind": settings.head,
                "layers": str(settings.head_layers),
                "width": str(settings.head_width or ""),
                "output": str(settings.projection_width),
            },
        )
        save_neighbours(run, pool, learner.encoder, spec.normalization, images, device)
        save_encoder(run.encoder, learner.encoder, spec)
        _finish(run, time.monotonic() - started)
    terminal.say(f"encoder saved: {run.encoder}")
    return run


def _train(
    run: RunDirectory,
    settings: PretrainSettings,
    plan: Plan,
    pool: Pool,
    lock: dict[str, Any],
    normalization: Normalization,
    learner: Learner,
) -> None:
    """Run SimCLR from wherever the run stands to its last epoch; each rank does, and the first one writes."""
    ranks = learner.ranks
    steps_per_epoch = pool.count // plan.batch_size
    steps = plan.epochs * steps_per_epoch
    warmup_steps = round(plan.warmup_epochs * steps_per_epoch)
    chance = chance_loss(plan.batch_size, decoupled=learner.decoupled)
    look_every = max(1, plan.epochs // CHECKS)

    def features() -> torch.Tensor:
        return monitored_features(pool, learner.encoder, normalization, learner.device)

    start = features() if settings.init and ranks.is_first else None  # the learner still is at its start
    guard = Guard(run, learner, start) if start is not None else None
    at = ranks.tell(
        lambda: load_checkpoint(run.checkpoints, learner.modules, learner.optimizer) or Position(0, 0, 0)
    )
    share_state(ranks, learner.modules, learner.optimizer)
    losses = ranks.tell(lambda: _rewind_metrics(run, at))
    saved_at, said = time.monotonic(), ""
    figures: dict[str, float] = {}

    def make(members: npt.NDArray[np.int64], images: Pool | Batch, epoch: int) -> torch.Tensor:
        policy = view_policy(settings, plan, size_at(plan, epoch))
        squares, sizes = images.squares(members, learner.device)
        keys = images.keys[members]
        return make_views(policy, squares, sizes, keys, settings.seed, epoch, (0, 1), normalization)

    def is_overdue(seconds: float) -> bool:
        return ranks.is_first and time.monotonic() - saved_at > seconds

    def save() -> None:
        nonlocal saved_at
        check_alike(ranks, learner.modules)
        if ranks.is_first:
            save_checkpoint(run.checkpoints, at, learner.modules, learner.optimizer)
        saved_at = time.monotonic()

    def note_left_out(found: dict[str, str]) -> None:
        """Say which images a stream leaves out, on whichever rank; those of earlier starts are still noted."""
        everywhere = {name: reason for each in ranks.collect(found) for name, reason in each.items()}
        if everywhere and ranks.is_first:
            before = rundir.read_json(run.environment).get("left_out_of_stream", {})
            environment.note(run, left_out_of_stream=before | everywhere)
            if not before:
                name, reason = next(iter(everywhere.items()))
                bar.note(
                    f"left out of the stream: {name}: {reason} (all, or the first hundred, in environment.json)"
                )

    def examine(row: dict[str, Any]) -> str | None:
        """Look at the features, note what they say, and tell why training went wrong, where it did."""
        nonlocal said, figures
        now = features()
        if not torch.isfinite(now).all():
            raise LabelwiseError(
                f"{run.path}: after epoch {at.epoch} the features are not numbers any more; lower --learning-rate."
            )
        row |= look(pool, now)
        figures = {name: row[name] for name in ("effective_rank", "knn") if row[name] is not None}
        progress, width = at.epoch / plan.epochs, learner.encoder.features
        trouble = health.diagnose(row["loss"], chance, row["effective_rank"], width, progress)
        if trouble and not said:
            bar.note(f"epoch {at.epoch}: {trouble}")
            said = trouble
        if guard is not None:
            row["kept_neighbours"], lost = guard.check(now, row["effective_rank"])
            if lost:
                return lost
            guard.keep(at)
        if at.epoch == plan.epochs:
            few = few_steps_in_words(steps) if steps < FEW_STEPS and not settings.init else None
            environment.note(run, trouble=trouble or few)
        return None

    if at.step:
        terminal.say(f"going on after step {at.step:,} of {steps:,}")
    elif start is not None:
        seen = look(pool, start)
        rundir.append_jsonl(run.metrics, {"kind": "start", "step": 0, **seen})
        knn = "" if seen["knn"] is None else f", nearest neighbours right in {seen['knn']:.1%}"
        terminal.say(f"start      effective rank {seen['effective_rank']:.0f}{knn}, before any step")

    with (
        stop_between_steps() as stop,
        terminal.track("pretraining", steps * plan.batch_size, done=at.step * plan.batch_size) as bar,
        feed(pool, settings, plan, lock, ranks, at.step) as (draw, left_out),
    ):
        while at.epoch < plan.epochs:
            epoch_started, epoch_from = time.monotonic(), at.batch
            while at.batch < steps_per_epoch:
                drawn = draw(at)
                while drawn is None:  # a stream that is slow, or hangs
                    if stop and ranks.count == 1:
                        save()
                        stop.check(
                            f"saved step {at.step:,} of {steps:,} in {run.path}; the same command goes on."
                        )
                    if ranks.launcher_is_gone():
                        raise Interrupted(
                            f"{run.path}: the process that started this one is gone.", signal.SIGHUP
                        )
                    drawn = draw(at)
                images, members = drawn
                rate = warmup_cosine(at.step, steps, warmup_steps)
                set_rate(learner.optimizer, rate)
                torch.manual_seed(
                    ranks.seed(settings.seed * 1_000_003 + at.step)
                )  # stochastic depth, dropout
                try:
                    loss = learner.step(functools.partial(make, images=images, epoch=at.epoch), members)
                except Diverged as error:
                    advice = "lower --learning-rate" if at.step else "choose a larger --temperature"
                    raise LabelwiseError(f"{run.path}: {error} at step {at.step}; {advice}.") from None
                except (MemoryError, RuntimeError) as error:
                    if is_out_of_memory(error):
                        raise _no_memory(run, plan, at) from None
                    if isinstance(error, DistError):  # batch norm on GPUs talks by itself
                        raise lost(error) from error
                    raise

                losses.append(loss)
                if ranks.launcher_is_gone():
                    stop.ask(signal.SIGHUP)
                asked, is_due = ranks.largest(stop.signal_number or 0, int(is_overdue(SAVE_SECONDS)))
                line = {
                    "kind": "step",
                    "step": at.step,
                    "epoch": at.epoch,
                    "loss": loss,
                    "learning_rate": rate * plan.learning_rate,
                }
                if ranks.is_first:
                    rundir.append_jsonl(run.metrics, line, durable=bool(asked or is_due))
                at = Position(at.step + 1, at.epoch, at.batch + 1)
                bar.advance(plan.batch_size, loss=loss, chance=chance, **figures)
                if ranks.is_first:
                    beat(run)
                if asked or is_due:
                    save()
                if asked:
                    ranks.tell(lambda: None)  # that it is saved
                    raise Interrupted(
                        f"saved step {at.step:,} of {steps:,} in {run.path}; the same command goes on.",
                        asked,
                    )

            seconds = time.monotonic() - epoch_started
            row: dict[str, Any] = {
                "kind": "epoch",
                "epoch": at.epoch,
                "step": at.step,
                "loss": float(np.mean(losses)),
                "chance": chance,
                "effective_rank": None,
                "knn": None,
                "images_per_second": (steps_per_epoch - epoch_from) * plan.batch_size / seconds,
                "seconds": seconds,
            }
            note_left_out(left_out)
            at, losses = Position(at.step, at.epoch + 1, 0), []
            is_looked_at = at.epoch % look_every == 0 or at.epoch == plan.epochs
            wrong = ranks.tell(functools.partial(examine, row)) if is_looked_at else None
            if ranks.is_first:
                rundir.append_jsonl(run.metrics, row)
            if wrong:
                at = ranks.tell(functools.partial(_roll_back, run, guard, at, wrong, bar))
                share_state(ranks, learner.modules, learner.optimizer)
                break
            (is_due,) = ranks.largest(int(is_overdue(SAVE_SECONDS / 4)))
            if is_due or at.epoch == plan.epochs:
                save()
        stop.check(f"saved step {at.step:,} of {steps:,} in {run.path}; the same command goes on.")


def _roll_back(
    run: RunDirectory, guard: Guard | None, at: Position, lost: str, bar: terminal.Bar
) -> Position:
    """Go back to the last state that was sound, and say so."""
    assert guard is not None
    sound = guard.roll_back()
    bar.note(f"epoch {at.epoch}: {lost}. Back to epoch {sound.epoch}, and training ends there")
    environment.note(run, rolled_back={"from": at.epoch, "to": sound.epoch, "reason": lost})
    return sound


def _finish(run: RunDirectory, seconds: float) -> None:
    shutil.rmtree(run.sound, ignore_errors=True)
    environment.finish(run, seconds)


def _no_memory(run: RunDirectory, plan: Plan, at: Position) -> ResourceError:
    """What to do when memory runs out in a step; half a step is not saved."""
    part = plan.micro_batch_size // 2
    many = ", on as many devices as it was begun with or more" if is_rank() else ""
    less = f"start anew with --micro-batch-size {part} (the same loss, slower), or" if part >= 2 else "use"
    return ResourceError(
        f"{run.path}: out of memory at step {at.step:,}. Free some and run the same command again, which goes on from the "
        f"last save{many}; else {less} a smaller --image-size."
    )


# --- before the loop


def _separate_test(
    run: RunDirectory, settings: PretrainSettings, images: ImageSet, cache: ImageCache
) -> tuple[Groups, dict[str, Any]]:
    """Find the images that belong together, and lock the test images with all that belongs to them."""
    with terminal.track("comparing images", len(images.names)) as bar:
        groups = group_images(images, cache, bar.advance)
    return groups, _test_lock(run, settings, images, cache, groups)


def _check_pool(settings: PretrainSettings, ranks: Ranks, own: str) -> None:
    """Make sure that all ranks train on the same images.

    Raises:
        DataError: This one has others than the first.
    """
    if ranks.tell(lambda: own) != own:
        raise DataError(
            f"{settings.images}: on {socket.gethostname()} (rank {ranks.number}) its images are not those of rank 0; give every machine the same folder."
        )


def _decide(
    run: RunDirectory,
    settings: PretrainSettings,
    images: ImageSet,
    pool: Pool,
    plan: Plan | None,
    size: int,
    side: int,
    device: torch.device,
    ranks: Ranks,
) -> tuple[EncoderSpec, Plan]:
    """Specify the encoder, and make the plan of a new run.

    Raises:
        DataError: The images are not those that the run was started with.
    """
    spec = specify_encoder(settings, size, pool)
    if plan is None:
        plan = make_plan(settings, spec, pool, side, device, ranks)
    elif rundir.read_json(run.data)["pool_sha256"] != pool_hash(images, pool):
        raise DataError(
            f"{settings.images}: its images changed since {run.path} was started; put them back, or start a new run with another --out."
        )
    return spec, plan


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


def _test_lock(
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


def _read_plan(run: RunDirectory) -> Plan | None:
    if not run.environment.exists():
        return None
    try:
        return TypeAdapter(Plan).validate_python(rundir.read_json(run.environment)["plan"])
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(
            f"{run.environment}: damaged (plan.{first['loc'][0]}: {first['msg']}); put it back from a copy."
        ) from None


def _write_start(
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
        rundir.take_over_suggested(run, rundir.open_run(Path(str(settings.init))))
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


def _rewind_metrics(run: RunDirectory, at: Position) -> list[float]:
    """Forget metrics of steps that will be done again; give the losses of the epoch that goes on."""
    rows = rundir.read_jsonl(run.metrics)
    kept = [
        row for row in rows if row["step"] < at.step or (row["kind"] == "epoch" and row["epoch"] < at.epoch)
    ]
    if len(kept) < len(rows):
        rundir.rewrite_jsonl(run.metrics, kept)
    return [row["loss"] for row in kept if row["kind"] == "step" and row["epoch"] == at.epoch]
