"""`labelwise pretrain`: SimCLR on a folder of images, from files to an encoder. The loop is `_train`."""

import dataclasses
import math
import re
import resource
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from labelwise import environment, rundir, seeding, terminal
from labelwise.config import PretrainSettings, parse_duration, to_toml
from labelwise.errors import DataError, Interrupted, LabelwiseError, UsageError
from labelwise.images.cache import ImageCache, build_cache, sample_sizes
from labelwise.images.duplicates import unique_keys
from labelwise.images.source import ImageSet, open_images
from labelwise.images.splits import lock_test, pool_indices
from labelwise.interruption import stop_between_steps
from labelwise.learning.checkpoint import Position, load_checkpoint, save_checkpoint
from labelwise.learning.contrast import chance_loss, nt_xent
from labelwise.learning.optimization import (
    DEFAULTS,
    create_optimizer,
    scaled_rate,
    set_rate,
    warmup_cosine,
)
from labelwise.learning.precision import Precision, arrange_images, calibrate, choose_device, synchronize
from labelwise.measures import health
from labelwise.measures.knn import knn_accuracy, nearest
from labelwise.models.encoder import (
    Encoder,
    EncoderSpec,
    check_backbone,
    choose_stem,
    create_encoder,
    pretrained_normalization,
)
from labelwise.models.features import extract_features
from labelwise.models.heads import create_head
from labelwise.models.weights import load_encoder, load_module, save_encoder, save_module
from labelwise.rundir import RunDirectory
from labelwise.views.draws import Policy
from labelwise.views.mosaic import draw_mosaic, encode_thumbnail
from labelwise.views.pipeline import Normalization, make_views, normalize

SMALLEST_POOL = 32
CACHE_MARGIN = 1.25  # cached squares are this much larger than a view, so that a crop keeps some detail
SAVE_SECONDS = 120.0
MONITORED = 2000  # images whose features are looked at while training
CHECKS = 10  # such looks per run
_LIMIT_SHARE = 0.93  # of a time limit goes to steps; the rest to monitoring, start and end


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything decided before step 0; stored, and reused when the run is continued."""

    image_size: int
    cache_side: int
    stem: str
    epochs: int
    precision: str
    layout: str
    reason: str
    batch_size: int
    learning_rate: float
    weight_decay: float
    warmup_epochs: float
    blur: float
    seconds_per_step: float | None


@dataclasses.dataclass(frozen=True)
class Pool:
    """The images that may be trained on; row r of the pool is row `rows[r]` of the cache."""

    cache: ImageCache
    rows: npt.NDArray[np.int64]
    keys: npt.NDArray[np.uint64]
    labels: list[str | None]

    def squares(
        self, members: npt.NDArray[np.int64], device: torch.device
    ) -> tuple[Tensor, npt.NDArray[np.int32]]:
        """Cached squares, uint8 (B, S, S, 3), and true sizes, (B, 2)."""
        rows = self.rows[members]
        return torch.from_numpy(self.cache.squares[rows]).to(device), self.cache.sizes[rows]


@dataclasses.dataclass(frozen=True)
class Learner:
    """What is trained, and how one step of it goes."""

    encoder: Encoder
    head: nn.Module
    optimizer: torch.optim.Optimizer
    precision: Precision
    device: torch.device
    temperature: float

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What a checkpoint holds besides the optimizer."""
        return {"encoder": self.encoder, "head": self.head}

    def step(self, views: Tensor) -> float:
        """Pull the two views of each image together, once; give the loss.

        Args:
            views: Normalised, row i and row B + i of the same image, (2B, 3, H, W).
        """
        views = arrange_images(views, self.precision)
        with self.precision.autocast(self.device):
            projections = self.head(self.encoder(views))  # (2B, D)
        loss = nt_xent(projections, self.temperature)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.item()


def pretrain(settings: PretrainSettings) -> RunDirectory:
    """Train an encoder on unlabeled images.

    The same call again goes on where an interrupted one stopped.

    Raises:
        DataError: The images cannot be used.
        UsageError: A setting does not fit the images or this machine.
        Interrupted: A signal came; the run is saved.
    """
    started = time.monotonic()
    run, is_new = _open_run(settings)
    device = choose_device(settings.device)
    check_backbone(settings.backbone)
    torch.manual_seed(settings.seed)

    images = open_images(
        settings.images, labels=settings.labels, labels_root=settings.labels_root, test=settings.test
    )
    size, side = _choose_sizes(settings, images, device)
    with terminal.track("reading images", len(images.names)) as bar:
        cache = build_cache(images, side=side, evaluation_size=size, progress=bar.advance)
    lock = _test_lock(run, settings, images, cache)
    pool = _make_pool(images, cache, lock, settings)
    spec, normalization = _specify_encoder(settings, size, cache)

    plan = _read_plan(run)
    if plan is None:
        plan = _make_plan(settings, spec, pool, normalization, side, device)
        _write_start(run, settings, plan, images, cache, lock, pool)
    spec = dataclasses.replace(spec, stem=plan.stem)
    _announce(run, plan, spec, pool, lock, images, is_new)
    _save_mosaic(run, view_policy(settings, plan), pool, settings.seed)

    learner = _make_learner(settings, plan, spec, Precision(plan.precision, plan.layout, plan.reason), device)
    _train(run, settings, plan, pool, normalization, learner)

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
    _save_neighbours(run, pool, learner.encoder, normalization, images, device)
    save_encoder(run.encoder, learner.encoder, spec)
    environment.finish(run, time.monotonic() - started)
    rundir.point_latest(run)
    terminal.say(f"encoder saved: {run.encoder}")
    return run


def _train(
    run: RunDirectory,
    settings: PretrainSettings,
    plan: Plan,
    pool: Pool,
    normalization: Normalization,
    learner: Learner,
) -> None:
    """Run SimCLR from wherever the run stands to its last epoch."""
    policy = view_policy(settings, plan)
    steps_per_epoch = len(pool.rows) // plan.batch_size
    steps = plan.epochs * steps_per_epoch
    warmup_steps = round(plan.warmup_epochs * steps_per_epoch)
    chance = chance_loss(plan.batch_size)
    look_every = max(1, plan.epochs // CHECKS)
    at = load_checkpoint(run.checkpoints, learner.modules, learner.optimizer) or Position(0, 0, 0)
    losses = _rewind_metrics(run, at)
    saved_at, said = time.monotonic(), ""
    figures: dict[str, float] = {}
    if at.step:
        terminal.say(f"going on after step {at.step:,} of {steps:,}")

    with (
        stop_between_steps() as stop,
        terminal.track("pretraining", steps * plan.batch_size, done=at.step * plan.batch_size) as bar,
    ):
        while at.epoch < plan.epochs:
            order = seeding.permutation(settings.seed, at.epoch, len(pool.rows))
            epoch_started, epoch_from = time.monotonic(), at.batch
            while at.batch < steps_per_epoch:
                members = order[at.batch * plan.batch_size : (at.batch + 1) * plan.batch_size]
                squares, sizes = pool.squares(members, learner.device)
                views = make_views(
                    policy, squares, sizes, pool.keys[members], settings.seed, at.epoch
                )  # (2B, 3, H, W)
                rate = warmup_cosine(at.step, steps, warmup_steps)
                set_rate(learner.optimizer, rate)
                torch.manual_seed(settings.seed * 1_000_003 + at.step)  # stochastic depth, dropout
                loss = learner.step(normalize(views, normalization))
                if not math.isfinite(loss):
                    raise LabelwiseError(
                        f"{run.path}: the loss is {loss} at step {at.step}; lower --learning-rate."
                    )

                losses.append(loss)
                rundir.append_jsonl(
                    run.metrics,
                    {
                        "kind": "step",
                        "step": at.step,
                        "epoch": at.epoch,
                        "loss": loss,
                        "learning_rate": rate * plan.learning_rate,
                    },
                )
                at = Position(at.step + 1, at.epoch, at.batch + 1)
                bar.advance(plan.batch_size, loss=loss, chance=chance, **figures)
                if stop or time.monotonic() - saved_at > SAVE_SECONDS:
                    save_checkpoint(run.checkpoints, at, learner.modules, learner.optimizer)
                    saved_at = time.monotonic()
                if stop:
                    raise Interrupted(
                        f"saved step {at.step:,} of {steps:,} in {run.path}; the same command goes on.",
                        stop.signal_number or 0,
                    )

            seconds = time.monotonic() - epoch_started
            row = {
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
            at = Position(at.step, at.epoch + 1, 0)
            if at.epoch % look_every == 0 or at.epoch == plan.epochs:
                look = _look(pool, learner.encoder, normalization, learner.device)
                figures = {name: value for name, value in look.items() if value is not None}
                row |= look
                trouble = health.diagnose(
                    float(np.mean(losses)),
                    chance,
                    figures["effective_rank"],
                    learner.encoder.features,
                    at.epoch / plan.epochs,
                )
                if trouble and not said:
                    bar.note(f"epoch {at.epoch}: {trouble}")
                    said = trouble
            rundir.append_jsonl(run.metrics, row)
            losses = []
            if time.monotonic() - saved_at > SAVE_SECONDS / 4 or at.epoch == plan.epochs:
                save_checkpoint(run.checkpoints, at, learner.modules, learner.optimizer)
                saved_at = time.monotonic()


def view_policy(settings: PretrainSettings, plan: Plan) -> Policy:
    """Put the settings of the views together."""
    return Policy(
        size=plan.image_size,
        crop_scale=settings.crop_scale,
        crop_ratio=settings.crop_ratio,
        flip=settings.flip,
        color=settings.color,
        color_strength=settings.color_strength,
        grayscale=settings.grayscale,
        blur=plan.blur,
        rotation=settings.rotation,
        shear=settings.shear,
        intensity=settings.intensity,
    )


# --- before the loop


def _open_run(settings: PretrainSettings) -> tuple[RunDirectory, bool]:
    """Find the run these settings belong to, or name a new one."""
    asked = settings.model_dump(mode="json", exclude={"out"})
    if settings.out is not None:
        run = RunDirectory(settings.out.absolute())
        rundir.check_output_folder(run.path, settings.images)
        if not run.environment.exists():
            return run, True
        before = rundir.read_json(run.environment)["asked"]
        changed = [key for key in asked if asked[key] != before.get(key)]
        if changed:
            key = changed[0]
            raise UsageError(
                f"{settings.out}: holds a run with {key} = {before.get(key)!r}, now {asked[key]!r}; "
                f"choose another --out, or `labelwise runs remove {settings.out}`."
            )
        return run, False
    stem = re.sub(r"[^\w.-]+", "-", settings.images.resolve().name) or "images"
    number = 1
    while True:
        run = RunDirectory((rundir.DEFAULT_RUNS / (stem if number == 1 else f"{stem}-{number}")).absolute())
        rundir.check_output_folder(run.path, settings.images)
        if not run.environment.exists():
            return run, True
        if rundir.read_json(run.environment)["asked"] == asked:
            return run, False
        number += 1


def _choose_sizes(settings: PretrainSettings, images: ImageSet, device: torch.device) -> tuple[int, int]:
    """Choose the side of a view and of the cached squares, pixels."""
    shortest = int(np.median(sample_sizes(images).min(axis=1)))
    most = 96 if device.type == "cpu" else 224
    size = settings.image_size or max(32, min(most, round(shortest / 32) * 32))
    side = max(size, min(math.ceil(CACHE_MARGIN * size / 8) * 8, max(size, shortest)))
    return size, settings.cache_side or side


def _test_lock(
    run: RunDirectory, settings: PretrainSettings, images: ImageSet, cache: ImageCache
) -> dict[str, Any]:
    """Lock the test images, or take the lock this run (or the one it goes on from) already has."""
    earlier = run.test_lock
    if not earlier.exists() and _is_run(settings.init):
        earlier = rundir.open_run(Path(str(settings.init))).test_lock
    locked = rundir.read_json(earlier) if earlier.exists() else None
    return lock_test(images, cache.keys, cache.readable, settings.holdout, settings.seed, locked=locked)


def _make_pool(images: ImageSet, cache: ImageCache, lock: dict[str, Any], settings: PretrainSettings) -> Pool:
    rows = pool_indices(images, cache.readable, lock)
    if len(rows) < SMALLEST_POOL:
        raise DataError(
            f"{settings.images}: {len(rows)} images to train on; SimCLR needs at least {SMALLEST_POOL}."
        )
    if settings.batch_size > len(rows):
        raise UsageError(
            f"--batch-size {settings.batch_size}: larger than the {len(rows)} images to train on; use at most "
            f"{len(rows)}, better {2 ** int(math.log2(len(rows) / 4))}."
        )
    return Pool(cache, rows, unique_keys(cache.keys[rows]), [images.labels[row] for row in rows])


def _specify_encoder(
    settings: PretrainSettings, size: int, cache: ImageCache
) -> tuple[EncoderSpec, Normalization]:
    if _is_run(settings.init):
        _, spec = load_encoder(Path(str(settings.init)))
        if (spec.backbone, spec.image_size) != (
            settings.backbone,
            size,
        ) and "backbone" in settings.model_fields_set:
            raise UsageError(
                f"--init {settings.init}: holds a {spec.backbone} at {spec.image_size} px; leave --backbone and --image-size out."
            )
        return spec, (spec.mean, spec.std)
    mean, std = cache.mean, cache.std
    if settings.init == "pretrained":
        mean, std = pretrained_normalization(settings.backbone)
    stem, reason = choose_stem(settings.backbone, settings.backbone_args, size, settings.stem)
    if reason:
        terminal.say(f"{stem} stem: {reason}")
    return EncoderSpec(settings.backbone, settings.backbone_args, stem, size, mean, std), (mean, std)


def _build_model(
    settings: PretrainSettings, spec: EncoderSpec, device: torch.device
) -> tuple[Encoder, nn.Module]:
    encoder = create_encoder(spec, pretrained=settings.init == "pretrained")
    head = create_head(
        settings.head, encoder.features, settings.head_layers, settings.head_width, settings.projection_width
    )
    if _is_run(settings.init):
        before = rundir.open_run(Path(str(settings.init)))
        load_module(before.encoder, encoder.backbone)
        load_module(before.head, head)
    return encoder.to(device), head.to(device)


def _make_learner(
    settings: PretrainSettings, plan: Plan, spec: EncoderSpec, precision: Precision, device: torch.device
) -> Learner:
    torch.manual_seed(settings.seed)
    encoder, head = _build_model(settings, spec, device)
    precision.arrange(encoder)
    parts = [(encoder, plan.learning_rate), (head, plan.learning_rate)]
    optimizer = create_optimizer(settings.optimizer, parts, plan.weight_decay)
    return Learner(encoder, head, optimizer, precision, device, settings.temperature)


def _is_run(init: str | None) -> bool:
    return init is not None and init != "pretrained"


def _read_plan(run: RunDirectory) -> Plan | None:
    return Plan(**rundir.read_json(run.environment)["plan"]) if run.environment.exists() else None


def _make_plan(
    settings: PretrainSettings,
    spec: EncoderSpec,
    pool: Pool,
    normalization: Normalization,
    side: int,
    device: torch.device,
) -> Plan:
    """Decide what was left open; time some steps for the precision and the epochs."""
    default_rate, default_decay = DEFAULTS[settings.optimizer]
    plan = Plan(
        image_size=spec.image_size,
        cache_side=side,
        stem=spec.stem,
        epochs=settings.epochs,
        precision="fp32",
        layout="channels_last",
        reason="",
        batch_size=settings.batch_size,
        learning_rate=scaled_rate(
            settings.learning_rate or default_rate, settings.batch_size, settings.rate_scaling
        ),
        weight_decay=default_decay if settings.weight_decay is None else settings.weight_decay,
        warmup_epochs=min(10.0, settings.epochs / 10)
        if settings.warmup_epochs is None
        else settings.warmup_epochs,
        blur=(0.5 if spec.image_size > 64 else 0.0) if settings.blur is None else settings.blur,
        seconds_per_step=None,
    )
    if settings.precision != "auto" and settings.time_limit is None:
        return dataclasses.replace(
            plan, precision=settings.precision, reason=f"--precision {settings.precision}"
        )
    terminal.say("timing some steps")
    trial = _TrialStep(settings, plan, spec, pool, normalization, device)
    precision, seconds = calibrate(trial, device, settings.precision)
    if not seconds:
        trial(precision)
        start = time.perf_counter()
        trial(precision)
        synchronize(device)
        seconds[f"{precision.number} {precision.layout}"] = time.perf_counter() - start
    per_step = seconds[f"{precision.number} {precision.layout}"]
    plan = dataclasses.replace(
        plan,
        precision=precision.number,
        layout=precision.layout,
        reason=precision.reason,
        seconds_per_step=per_step,
    )
    if settings.time_limit is None:
        return plan
    limit = parse_duration(settings.time_limit) * _LIMIT_SHARE
    epochs = int(limit / (per_step * (len(pool.rows) // settings.batch_size)))
    if epochs < 1:
        raise UsageError(
            f"--time-limit {settings.time_limit}: one epoch takes about {terminal.duration(limit / max(limit, 1e-9) * per_step * (len(pool.rows) // settings.batch_size))}; allow more, or use a smaller --backbone or --image-size."
        )
    warmup = min(10.0, epochs / 10) if settings.warmup_epochs is None else settings.warmup_epochs
    return dataclasses.replace(plan, epochs=epochs, warmup_epochs=warmup)


class _TrialStep:
    """One real training step on throw-away weights, for timing."""

    def __init__(
        self,
        settings: PretrainSettings,
        plan: Plan,
        spec: EncoderSpec,
        pool: Pool,
        normalization: Normalization,
        device: torch.device,
    ) -> None:
        self.settings, self.plan, self.spec, self.pool, self.normalization, self.device = (
            settings,
            plan,
            spec,
            pool,
            normalization,
            device,
        )
        self.learner: Learner | None = None

    def __call__(self, precision: Precision) -> float:
        if self.learner is None or self.learner.precision != precision:
            settings = self.settings.model_copy(update={"init": None})
            self.learner = _make_learner(settings, self.plan, self.spec, precision, self.device)
            set_rate(self.learner.optimizer, 0.0)
        members = np.arange(self.settings.batch_size)
        squares, sizes = self.pool.squares(members, self.device)
        policy = view_policy(self.settings, self.plan)
        views = make_views(policy, squares, sizes, self.pool.keys[members], self.settings.seed, 0)
        return self.learner.step(normalize(views, self.normalization))


def _write_start(
    run: RunDirectory,
    settings: PretrainSettings,
    plan: Plan,
    images: ImageSet,
    cache: ImageCache,
    lock: dict[str, Any],
    pool: Pool,
) -> None:
    """Write what is known before step 0: lock, data, settings, and last of all the environment."""
    rundir.write_json(run.test_lock, lock)
    counts = Counter(label for label in images.labels if label is not None)
    sources = {
        name: str(path.resolve()) if path else None
        for name, path in (
            ("images", settings.images),
            ("labels", settings.labels),
            ("labels_root", settings.labels_root),
            ("test", settings.test),
        )
    }
    data = {
        "root": str(settings.images.resolve()),
        "sources": sources,
        "layout": images.layout,
        "images": len(images.names),
        "readable": int(cache.readable.sum()),
        "pool": len(pool.rows),
        "test": len(lock["names"]),
        "test_method": lock["method"],
        "excluded_duplicates": len(lock["excluded_duplicates"]),
        "quarantined": cache.quarantined,
        "classes": dict(sorted(counts.items())),
        "image_size": plan.image_size,
        "cache_side": plan.cache_side,
        "intensity_range": cache.intensity_range,
        "fingerprint": cache.folder.name,
        "notes": images.notes,
    }
    rundir.write_json(run.data, data)
    resolved = settings.model_dump(mode="json", exclude={"images", "out", "time_limit"}, exclude_none=True)
    chosen = dataclasses.asdict(plan)
    resolved |= {
        key: chosen[key]
        for key in (
            "image_size",
            "cache_side",
            "stem",
            "epochs",
            "precision",
            "weight_decay",
            "warmup_epochs",
            "blur",
        )
    }
    resolved["learning_rate"] = settings.learning_rate or DEFAULTS[settings.optimizer][0]
    rundir.write_text(run.config, to_toml({"pretrain": resolved}))
    environment.start(
        run,
        asked=settings.model_dump(mode="json", exclude={"out"}),
        plan=chosen,
        precision={"number": plan.precision, "layout": plan.layout, "reason": plan.reason},
    )


def _announce(
    run: RunDirectory,
    plan: Plan,
    spec: EncoderSpec,
    pool: Pool,
    lock: dict[str, Any],
    images: ImageSet,
    is_new: bool,
) -> None:
    """Print the plan."""
    steps = plan.epochs * (len(pool.rows) // plan.batch_size)
    hours = (
        "" if plan.seconds_per_step is None else f", about {terminal.duration(steps * plan.seconds_per_step)}"
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    terminal.say(f"run        {run.path}" + ("" if is_new else " (continued)"))
    terminal.say(
        f"images     {len(pool.rows):,} to train on, {len(lock['names']):,} test images locked away ({lock['method']})"
    )
    if pool.cache.quarantined:
        first = pool.cache.quarantined[0]
        terminal.warn(
            f"{len(pool.cache.quarantined)} unreadable images left out, e.g. {first['file']}: {first['reason']} (all in data.json)"
        )
    for note in images.notes:
        terminal.say(f"note       {note}")
    terminal.say(
        f"model      {spec.backbone}, {plan.stem} stem, {plan.image_size} px views from {plan.cache_side} px squares"
    )
    terminal.say(f"training   {plan.epochs} epochs, batch {plan.batch_size}, {steps:,} steps{hours}")
    terminal.say(
        f"precision  {plan.precision}, {plan.layout.replace('_', ' ')}"
        + (f" ({plan.reason})" if plan.reason else "")
    )
    terminal.say(f"memory     {peak / 2**30:.1f} GiB so far")


def _save_mosaic(run: RunDirectory, policy: Policy, pool: Pool, seed: int, rows: int = 6) -> None:
    members = np.linspace(0, len(pool.rows) - 1, rows).astype(np.int64)
    squares, sizes = pool.squares(members, torch.device("cpu"))
    columns = tuple(range(8))
    views = make_views(policy, squares, sizes, pool.keys[members], seed, 0, columns)
    views = views.reshape(len(columns), rows, *views.shape[1:]).transpose(0, 1)  # (rows, V, 3, H, W)
    rundir.write_atomically(run.views, lambda fresh: draw_mosaic(squares, views).save(fresh, format="PNG"))
    terminal.say(f"views      {run.views} shows what the augmentations do")


# --- beside the loop


def _look(
    pool: Pool, encoder: Encoder, normalization: Normalization, device: torch.device
) -> dict[str, float | None]:
    """Effective rank of the features, and kNN accuracy within the pool where labels exist (monitoring only)."""
    members = _monitored(pool)
    features = extract_features(encoder, pool.cache.evaluations, pool.rows[members], normalization, device)
    labels = [pool.labels[member] for member in members]
    look: dict[str, float | None] = {"effective_rank": health.effective_rank(features), "knn": None}
    classes = sorted({label for label in labels if label is not None})
    if len(classes) > 1:
        known = [row for row, label in enumerate(labels) if label is not None]
        indices = torch.tensor([classes.index(str(labels[row])) for row in known])
        look["knn"] = knn_accuracy(features[known], indices)
    return look


def _monitored(pool: Pool) -> npt.NDArray[np.int64]:
    """A fixed random sample of the pool."""
    order = seeding.generator(0, "monitor").permutation(len(pool.rows))
    return np.sort(order[:MONITORED])


def _rewind_metrics(run: RunDirectory, at: Position) -> list[float]:
    """Forget metrics of steps that will be done again; give the losses of the epoch that goes on."""
    rows = rundir.read_jsonl(run.metrics)
    kept = [
        row for row in rows if row["step"] < at.step or (row["kind"] == "epoch" and row["epoch"] < at.epoch)
    ]
    if len(kept) < len(rows):
        rundir.rewrite_jsonl(run.metrics, kept)
    return [row["loss"] for row in kept if row["kind"] == "step" and row["epoch"] == at.epoch]


def _save_neighbours(
    run: RunDirectory,
    pool: Pool,
    encoder: Encoder,
    normalization: Normalization,
    images: ImageSet,
    device: torch.device,
    queries: int = 6,
) -> None:
    """Write the nearest images of a few, for a person to look at."""
    members = _monitored(pool)
    features = extract_features(encoder, pool.cache.evaluations, pool.rows[members], normalization, device)

    def card(member: int) -> dict[str, Any]:
        row = pool.rows[member]
        return {
            "name": images.names[row],
            "label": images.labels[row],
            "thumbnail": encode_thumbnail(pool.cache.evaluations[row]),
        }

    asked = np.linspace(0, len(members) - 1, queries).astype(int)
    cards = [
        {
            **card(members[query]),
            "neighbours": [
                {**card(members[near]), "similarity": similarity}
                for near, similarity in nearest(features, int(query), 6)
            ],
        }
        for query in asked
    ]
    rundir.write_json(run.neighbours, {"queries": cards})
