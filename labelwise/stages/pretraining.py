"""`labelwise pretrain`: SimCLR on a folder of images, from files to an encoder. The loop is `_train`."""

import dataclasses
import functools
import shutil
import signal
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.distributed import DistError

from labelwise import environment, rundir, terminal
from labelwise.config import PretrainSettings, parse_duration
from labelwise.errors import (
    DataError,
    Interrupted,
    LabelwiseError,
    ResourceError,
    UsageError,
    is_out_of_memory,
)
from labelwise.images.cache import ImageCache, build_cache
from labelwise.images.grouping import Groups, group_images
from labelwise.images.source import ImageSet
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
    Diverged,
    set_rate,
    warmup_cosine,
)
from labelwise.learning.precision import Precision, choose_device, compute_deterministically
from labelwise.learning.ranks import Ranks, device_of, is_rank, join, lost
from labelwise.learning.simclr import Learner
from labelwise.measures import health
from labelwise.models.encoder import EncoderSpec, check_backbone
from labelwise.models.weights import save_encoder, save_module
from labelwise.ownership import beat, hold
from labelwise.rundir import RunDirectory
from labelwise.stages.beginning import find_run, lock_of, pool_hash, read_plan, write_start
from labelwise.stages.drifting import say_how_new
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
    announce,
    check_divisible,
    few_steps_in_words,
    inherit_model,
    is_run,
    make_learner,
    make_plan,
    size_at,
    specify_encoder,
    view_policy,
)
from labelwise.stages.pooling import Pool, choose_sizes, keep_on_device, make_pool, open_sources
from labelwise.stages.tracking import check_tracker, recording
from labelwise.views.pipeline import Normalization, make_views

SAVE_SECONDS = 120.0
_COURTESY_SECONDS = 1.5
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
    if settings.keep_decoded and not settings.stream:
        raise UsageError("--keep-decoded: is for --stream; without it all images are kept decoded.")
    device = device_of(ranks, choose_device(settings.device))
    if settings.deterministic:
        compute_deterministically()
    check_backbone(settings.backbone)
    ranks.tell(lambda: check_tracker(settings.tracker))
    torch.manual_seed(settings.seed)

    images = open_sources(settings)
    plan = ranks.tell(lambda: read_plan(run))
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
            write_start(run, settings, plan, device, images, cache, groups, lock, pool)
        if not run.near_copies.exists():
            save_near_copies(run, images, cache, groups.near, lock)
        announce(run, settings, plan, spec, pool, lock, images, groups, is_new, ranks)
        if is_new and is_run(settings.init):
            say_how_new(rundir.open_run(Path(str(settings.init))), images, pool, device)
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
        recording(run, settings.tracker if ranks.is_first else "none") as record,
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
                    record(line, durable=bool(asked or is_due))
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
                record(row)
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
    return groups, lock_of(run, settings, images, cache, groups)


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


def _rewind_metrics(run: RunDirectory, at: Position) -> list[float]:
    """Forget metrics of steps that will be done again; give the losses of the epoch that goes on."""
    rows = rundir.read_jsonl(run.metrics)
    kept = [
        row for row in rows if row["step"] < at.step or (row["kind"] == "epoch" and row["epoch"] < at.epoch)
    ]
    if len(kept) < len(rows):
        rundir.rewrite_jsonl(run.metrics, kept)
    return [row["loss"] for row in kept if row["kind"] == "step" and row["epoch"] == at.epoch]
