"""What pretraining will do, decided before its first step: sizes, pool, model, precision, epochs."""

import dataclasses
import math
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from labelwise import rundir, terminal
from labelwise.config import PretrainSettings, parse_duration, read_run_config
from labelwise.errors import UsageError
from labelwise.images.cache import channel_statistics
from labelwise.images.grouping import Groups
from labelwise.images.source import ImageSet
from labelwise.images.streaming import choose_lanes
from labelwise.learning.batch_norm import share_batch_norm
from labelwise.learning.large_batch import largest_part, step_bytes
from labelwise.learning.memory import TRAINING_SHARE, available_memory
from labelwise.learning.optimization import (
    DEFAULTS,
    Diverged,
    create_optimizer,
    scaled_rate,
    set_rate,
)
from labelwise.learning.precision import Precision, calibrate, seconds_of
from labelwise.learning.ranks import ALONE, Ranks
from labelwise.learning.simclr import Learner
from labelwise.models.encoder import (
    Encoder,
    EncoderSpec,
    choose_stem,
    create_encoder,
    pretrained_spec,
    synchronize_batch_norm,
    takes_size,
)
from labelwise.models.heads import create_head
from labelwise.models.weights import load_encoder, load_module
from labelwise.rundir import RunDirectory
from labelwise.stages.pooling import Pool, batch_size_for, small_batch
from labelwise.views.draws import Policy
from labelwise.views.pipeline import make_views

_MODEL = (  # settings that the weights of a run fix
    "backbone",
    "backbone_args",
    "stem",
    "image_size",
    "head",
    "head_layers",
    "head_width",
    "projection_width",
)
_PROBED = 16  # images whose activations are weighed to find the micro-batch
_TWICE_FORWARD = 4 / 3  # a step in parts runs forward, forward, backward; backward costs two forwards
INITIAL_SHARE = 0.6  # of the epochs are trained at the initial scale; measured 2026-11-25, recipes/LOG.md
FEW_STEPS = 100
_LIMIT_SHARE = 0.93  # of a time limit goes to steps; the rest to monitoring, start and end


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything decided before step 0; stored, and reused when the run is continued."""

    image_size: int
    initial_size: int
    cache_side: int
    stem: str
    epochs: int
    precision: str
    layout: str
    reason: str
    batch_size: int
    micro_batch_size: int
    learning_rate: float
    weight_decay: float
    warmup_epochs: float
    blur: float
    seconds_per_step: float | None
    lanes: int = 0  # of a stream


def size_at(plan: Plan, epoch: int) -> int:
    """Side of the views in an epoch, pixels: smaller ones first, where that was asked for."""
    return plan.initial_size if epoch < _initial_epochs(plan) else plan.image_size


def _initial_epochs(plan: Plan) -> int:
    return math.floor(INITIAL_SHARE * plan.epochs + 1e-9)  # the last epoch is never among them


def view_policy(settings: PretrainSettings, plan: Plan, size: int) -> Policy:
    """Put the settings of views of a size together."""
    return Policy(
        size=size,
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


def inherit_model(settings: PretrainSettings) -> PretrainSettings:
    """Take backbone, head and view size from the run that `--init` names, if it names one.

    Raises:
        UsageError: No run is there, or a setting asks for another model than it holds.
    """
    if not is_run(settings.init):
        return settings
    table = read_run_config(rundir.open_run(Path(str(settings.init))).config)
    before = PretrainSettings(images=settings.images, **{key: table[key] for key in _MODEL if key in table})
    for key in _MODEL:
        asked, held = getattr(settings, key), getattr(before, key)
        if key in settings.model_fields_set and asked not in (held, "auto", None):
            raise UsageError(
                f"--init {settings.init}: holds a model with {key} = {held!r}, not {asked!r}; leave that setting out."
            )
    return settings.model_copy(update={key: getattr(before, key) for key in _MODEL})


def few_steps_in_words(steps: int) -> str:
    """What is said of a training that hardly is one."""
    return f"{steps:,} step{'s' if steps > 1 else ''} teach{'' if steps > 1 else 'es'} little"


def specify_encoder(settings: PretrainSettings, size: int, pool: Pool) -> EncoderSpec:
    """Decide backbone, stem and normalisation."""
    if is_run(settings.init):
        return load_encoder(rundir.open_run(Path(str(settings.init))).path)[1]
    if settings.init == "pretrained":
        mean, std = pretrained_spec(settings.backbone).normalization
    else:
        mean, std = channel_statistics(pool.cache.squares, pool.rows)
    stem, reason = choose_stem(settings.backbone, settings.backbone_args, size, settings.stem)
    if reason:
        terminal.say(f"{stem} stem: {reason}")
    return EncoderSpec(settings.backbone, settings.backbone_args, stem, size, mean, std)


def _build_model(
    settings: PretrainSettings, spec: EncoderSpec, device: torch.device
) -> tuple[Encoder, nn.Module]:
    encoder = create_encoder(spec, pretrained=settings.init == "pretrained")
    head = create_head(
        settings.head, encoder.features, settings.head_layers, settings.head_width, settings.projection_width
    )
    if is_run(settings.init):
        before = rundir.open_run(Path(str(settings.init)))
        load_module(before.encoder, encoder.backbone)
        load_module(before.head, head)
    return encoder.to(device), head.to(device)


def make_learner(
    settings: PretrainSettings,
    plan: Plan,
    spec: EncoderSpec,
    precision: Precision,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> Learner:
    """Build encoder, head and optimizer, the same for the same seed; over several ranks their batch norms are one."""
    torch.manual_seed(settings.seed)
    encoder, head = _build_model(settings, spec, device)
    if ranks.count > 1:
        for module in (encoder, head):
            if device.type == "cuda":
                synchronize_batch_norm(module)
            else:
                share_batch_norm(module, ranks)
    precision.arrange(encoder)
    parts = [(encoder, plan.learning_rate), (head, plan.learning_rate)]
    optimizer = create_optimizer(settings.optimizer, parts, plan.weight_decay)
    return Learner(
        encoder,
        head,
        optimizer,
        precision,
        device,
        settings.temperature,
        plan.micro_batch_size,
        decoupled=settings.loss == "dcl",
        normalized=settings.similarity == "cosine",
        ranks=ranks,
    )


def is_run(init: str | None) -> bool:
    """Whether `--init` names a run to go on from."""
    return init is not None and init != "pretrained"


def make_plan(
    settings: PretrainSettings,
    spec: EncoderSpec,
    pool: Pool,
    side: int,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> Plan:
    """Decide what was left open; time some steps for the precision and the epochs.

    Over several ranks one of them does, alone, so what they tell each other is not in the time.
    """
    default_rate, default_decay = DEFAULTS[settings.optimizer]
    batch_size = batch_size_for(settings, pool.count)
    if "batch_size" not in settings.model_fields_set:
        batch_size = batch_size // ranks.count * ranks.count
    plan = Plan(
        image_size=spec.image_size,
        initial_size=_initial_size(settings, spec),
        cache_side=side,
        stem=spec.stem,
        epochs=settings.epochs,
        precision="fp32",
        layout="channels_last",
        reason="",
        batch_size=batch_size,
        micro_batch_size=batch_size,
        learning_rate=scaled_rate(settings.learning_rate or default_rate, batch_size, settings.rate_scaling),
        weight_decay=default_decay if settings.weight_decay is None else settings.weight_decay,
        warmup_epochs=min(10.0, settings.epochs / 10)
        if settings.warmup_epochs is None
        else settings.warmup_epochs,
        blur=(0.5 if spec.image_size > 64 else 0.0) if settings.blur is None else settings.blur,
        seconds_per_step=None,
    )
    check_divisible(plan, ranks)
    plan = dataclasses.replace(
        plan, micro_batch_size=_fit_micro_batch(settings, plan, spec, pool, device, ranks)
    )
    check_divisible(plan, ranks)
    if pool.shards is not None:
        lanes = choose_lanes(pool.shards, plan.micro_batch_size, ranks.count)
        plan = dataclasses.replace(plan, lanes=lanes)
    if settings.precision != "auto" and settings.time_limit is None:
        return dataclasses.replace(
            plan, precision=settings.precision, reason=f"--precision {settings.precision}"
        )
    terminal.say("timing some steps")
    trial = _TrialStep(settings, plan, spec, pool, device, plan.micro_batch_size // ranks.count)
    precision, seconds = calibrate(trial, device, settings.precision)
    if not seconds:
        trial(precision)
        seconds[f"{precision.number} {precision.layout}"] = seconds_of(trial, precision, device)
    one = seconds[f"{precision.number} {precision.layout}"]
    if plan.initial_size != plan.image_size:
        trial.size = plan.initial_size
        trial(precision)
        one = (1 - INITIAL_SHARE) * one + INITIAL_SHARE * seconds_of(trial, precision, device)
    parts = batch_size // plan.micro_batch_size
    per_step = one * parts * (1 if parts == 1 else _TWICE_FORWARD)
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
    per_epoch = per_step * (pool.count // batch_size)
    epochs = int(limit / per_epoch)
    if epochs < 1:
        raise UsageError(
            f"--time-limit {settings.time_limit}: one epoch takes about {terminal.duration(per_epoch)}; allow more, or use a smaller --backbone or --image-size."
        )
    warmup = min(10.0, epochs / 10) if settings.warmup_epochs is None else settings.warmup_epochs
    return dataclasses.replace(plan, epochs=epochs, warmup_epochs=warmup)


def check_divisible(plan: Plan, ranks: Ranks) -> None:
    """Make sure that each rank gets as many images of a batch, and of its parts, as the others.

    Raises:
        UsageError: It does not.
    """
    if plan.batch_size < 2 * ranks.count and ranks.count > 1:
        raise UsageError(
            f"batch_size = {plan.batch_size}: too small for {ranks.count} devices or processes; each needs two images."
        )
    if plan.lanes % ranks.count:
        raise UsageError(
            f"the stream of this run has {plan.lanes} lanes, which {ranks.count} devices or processes cannot share evenly; use fewer, or start a new run."
        )
    for name, size in (("batch_size", plan.batch_size), ("micro_batch_size", plan.micro_batch_size)):
        if size % ranks.count:
            numbers = ", ".join(str(each) for each in range(1, min(size, 64) + 1) if size % each == 0)
            raise UsageError(
                f"{name} = {size}: {ranks.count} devices or processes cannot share it evenly; use so many: {numbers}; or start a new run with "
                f"another --{name.replace('_', '-')}."
            )


def _initial_size(settings: PretrainSettings, spec: EncoderSpec) -> int:
    """Side of the first epochs' views, a multiple of 4.

    Raises:
        UsageError: The backbone takes images of one size only.
    """
    size = max(8, round(settings.initial_scale * spec.image_size / 4) * 4)
    if settings.initial_scale == 1 or size >= spec.image_size:
        return spec.image_size
    if not takes_size(spec, size):
        raise UsageError(
            f"--initial-scale {settings.initial_scale:g}: {spec.backbone} takes images of {spec.image_size} px only, not {size}; leave it out."
        )
    return size


def _fit_micro_batch(
    settings: PretrainSettings, plan: Plan, spec: EncoderSpec, pool: Pool, device: torch.device, ranks: Ranks
) -> int:
    """Images that go through the network at once, over all ranks: as asked, else the whole batch if it fits into memory."""
    if settings.micro_batch_size is not None:
        if plan.batch_size % settings.micro_batch_size:
            raise UsageError(
                f"--micro-batch-size {settings.micro_batch_size}: does not divide --batch-size {plan.batch_size}."
            )
        return settings.micro_batch_size
    trial = _TrialStep(settings, plan, spec, pool, device, plan.batch_size)
    learner = trial.learner_for(Precision("fp32", "channels_last", ""))
    probed = np.arange(min(_PROBED, plan.batch_size))
    needed = step_bytes(learner.project, trial.make_views(probed), learner.modules.values())
    available = TRAINING_SHARE * available_memory(device)
    if device.type == "cpu":  # they share it
        available /= ranks.local_count
    return ranks.count * largest_part(plan.batch_size // ranks.count, needed / len(probed), available)


class _TrialStep:
    """One real training step on throw-away weights, for timing; of one micro-batch, or one rank's part of it."""

    def __init__(
        self,
        settings: PretrainSettings,
        plan: Plan,
        spec: EncoderSpec,
        pool: Pool,
        device: torch.device,
        images: int,
    ) -> None:
        self.settings, self.plan, self.spec, self.pool, self.device = settings, plan, spec, pool, device
        self.members = np.arange(images) % len(pool.rows)
        self.size = plan.image_size
        self.learner: Learner | None = None

    def __call__(self, precision: Precision) -> float:
        try:
            return self.learner_for(precision).step(self.make_views, self.members)
        except Diverged:
            return math.nan

    def learner_for(self, precision: Precision) -> Learner:
        """What takes the steps, its rate at 0."""
        if self.learner is None or self.learner.precision != precision:
            settings = self.settings.model_copy(update={"init": None})
            self.learner = make_learner(settings, self.plan, self.spec, precision, self.device)
            set_rate(self.learner.optimizer, 0.0)
        return self.learner

    def make_views(self, members: npt.NDArray[np.int64]) -> Tensor:
        """Views as the training makes them, (2B, 3, H, W)."""
        squares, sizes = self.pool.squares(members, self.device)
        policy = view_policy(self.settings, self.plan, self.size)
        keys, normalization = self.pool.keys[members], self.spec.normalization
        return make_views(policy, squares, sizes, keys, self.settings.seed, 0, (0, 1), normalization)


def announce(
    run: RunDirectory,
    settings: PretrainSettings,
    plan: Plan,
    spec: EncoderSpec,
    pool: Pool,
    lock: dict[str, Any],
    images: ImageSet,
    groups: Groups,
    is_new: bool,
    ranks: Ranks = ALONE,
) -> None:
    """Print the plan."""
    steps = plan.epochs * (pool.count // plan.batch_size)
    hours = (
        "" if plan.seconds_per_step is None else f", about {terminal.duration(steps * plan.seconds_per_step)}"
    )
    if pool.shards is not None and hours:
        hours += " if reading and decoding keep up"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    terminal.say(f"run        {run.path}" + ("" if is_new else " (continued)"))
    terminal.say(
        f"images     {pool.count:,} to train on, {len(lock['names']):,} test images locked away ({lock['method']})"
    )
    if pool.shards is not None:
        terminal.say(
            f"stream     {len(pool.shards.files):,} {pool.shards.kind} shards in {plan.lanes} lanes, {settings.shuffle_buffer:,} images shuffled "
            f"at a time; {len(images.names):,} kept as a sample, in which test images and their near-copies are looked for"
        )
        if settings.keep_decoded:
            size = 3 * plan.cache_side**2 * pool.shards.images
            terminal.say(
                f"decoded    {size / 2**30:.1f} GiB of images in all; each process keeps its own in {rundir.cache_root()}"
            )
    if pool.cache.quarantined:
        first = pool.cache.quarantined[0]
        terminal.warn(
            f"{len(pool.cache.quarantined)} unreadable images left out, e.g. {first['file']}: {first['reason']} (all in data.json). "
            f"Where the disk, the network or rights were to blame, mend that and delete {pool.cache.folder}: then a new run reads them again."
        )
    tied = ", ".join(f"{count:,} {what}" for what, count in groups.counts.items() if count)
    if tied:
        left_out = len(lock["excluded_duplicates"]) + len(lock["excluded_groups"])
        terminal.say(f"groups     {tied}: never on both sides; {left_out:,} left out of training for that")
    for note in images.notes + groups.notes:
        terminal.say(f"note       {note}")
    terminal.say(
        f"model      {spec.backbone}, {plan.stem} stem, {plan.image_size} px views from {plan.cache_side} px squares"
        + (
            f", {plan.initial_size} px in the first {_initial_epochs(plan)} epochs"
            if plan.initial_size != plan.image_size
            else ""
        )
    )
    parts = plan.batch_size // plan.micro_batch_size
    passes = f" in {parts} passes of {plan.micro_batch_size} (batch norm sees one pass)" if parts > 1 else ""
    terminal.say(f"training   {plan.epochs} epochs, batch {plan.batch_size}{passes}, {steps:,} steps{hours}")
    if ranks.count > 1:
        machines = ranks.count // ranks.local_count
        terminal.say(
            f"ranks      {ranks.count} processes"
            + (f" on {machines} machines" if machines > 1 else "")
            + f", {plan.micro_batch_size // ranks.count} images each at a time; loss, gradient and batch norm are those of the whole batch"
        )
    if batch_size_for(settings, pool.count) < settings.batch_size:
        terminal.say(f"           batch {settings.batch_size} is too large for so few images")
    elif (better := small_batch(pool.count)) < plan.batch_size and pool.count // plan.batch_size < 4:
        terminal.say(
            f"           an epoch is {pool.count // plan.batch_size} steps; --batch-size {better} makes it four or more"
        )
    if steps < FEW_STEPS:
        more = "more --epochs" if settings.time_limit is None else "a longer --time-limit"
        terminal.warn(f"{few_steps_in_words(steps)}; use {more}.")
    terminal.say(
        f"precision  {plan.precision}, {plan.layout.replace('_', ' ')}"
        + (f" ({plan.reason})" if plan.reason else "")
    )
    terminal.say(f"memory     {peak / 2**30:.1f} GiB so far")
