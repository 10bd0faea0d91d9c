"""What the studies share: the images, a short training, what it learned by labels it never saw, and sums over trials.

A study is a list of trials and what to make of their answers. A trial is one short training of the usual network with something
changed; its answers say, image by image, whether a linear classifier on its features was right, trained on other images.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from labelwise import seeding
from labelwise.config import PretrainSettings
from labelwise.learning.optimization import DEFAULTS, Diverged, scaled_rate, set_rate, warmup_cosine
from labelwise.learning.precision import Precision
from labelwise.learning.simclr import Learner
from labelwise.measures.linear import fit_probe, stratified_folds
from labelwise.measures.statistics import Interval, accuracy_interval, paired_difference
from labelwise.models.encoder import EncoderSpec, create_encoder
from labelwise.models.features import SETTLING, extract_features, settle_statistics
from labelwise.stages import finetuning
from labelwise.stages.classifier import Classifier, predict
from labelwise.stages.finetuning import class_weights, train_classifier
from labelwise.stages.planning import Plan, make_learner, view_policy
from labelwise.stages.pooling import Pool
from labelwise.views.pipeline import Views, make_views

Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Features = npt.NDArray[np.float32]
Name = tuple[str, ...]  # of a trial: its place in the table
Answers = dict[str, Floats]  # by what was asked: for each scored image the share that was right, (T,)

FOLDS = 2
STRENGTH = 3.0  # scikit-learn's C, as the comparison's default
_SCRATCH_RATE = 3e-3  # of the supervised trainings, as in the comparison
_SCRATCH_DECAY = 0.05


@dataclass(frozen=True)
class Material:
    """What all trials of a study work on.

    Attributes:
        settings: Of the usual training; a trial changes some.
        plan: Of the usual training: batch, sizes and number type.
        spec: Of the encoder.
        pool: The images that are trained on, P of them; no test image is among them.
        scored: Places in the pool of the labeled images that answers are about, (T,).
        labels: Their classes, (T,).
        classes: How many.
        groups: Their groups, (T,); one is never on both sides of a fold.
        balanced: Classes differ in size, and are weighed.
        epochs: Of the usual training.
        device: Where.
    """

    settings: PretrainSettings
    plan: Plan
    spec: EncoderSpec
    pool: Pool
    scored: Rows
    labels: Rows
    classes: int
    groups: Rows
    balanced: bool
    epochs: int
    device: torch.device

    @property
    def rows(self) -> Rows:
        """Cache rows of the scored images, (T,)."""
        return self.pool.rows[self.scored]

    @property
    def precision(self) -> Precision:
        """Number type and layout of every trial."""
        return Precision(self.plan.precision, self.plan.layout, self.plan.reason)

    def folds(self, seed: int) -> list[tuple[Rows, Rows]]:
        """Places among the scored images to train on and to score, the same for all trials of a seed."""
        return stratified_folds(self.labels, FOLDS, seed, self.groups)


@dataclass(frozen=True)
class Trial:
    """One short training with something changed.

    Attributes:
        name: Its place in the table; `--json` and trials.jsonl name it so.
        changed: Settings that differ from the usual ones.
        views: What makes its views.
        length: Epochs, as a share of the usual.
        supervised: Trained on labels, from scratch, in place of SimCLR.
        trains: False where nothing is trained.
    """

    name: Name
    changed: dict[str, Any] = field(default_factory=dict)
    views: Views = make_views
    length: float = 1.0
    supervised: bool = False
    trains: bool = True

    @property
    def cost(self) -> float:
        """Of its training, in trainings of the usual one: supervised, two folds of one view each are as much as two views."""
        return self.length if self.trains else 0.0


def settings_of(material: Material, trial: Trial, seed: int) -> PretrainSettings:
    """The settings that a trial trains with."""
    return material.settings.model_copy(update={**trial.changed, "seed": seed})


def pretrain_briefly(material: Material, trial: Trial, seed: int, before_step: Callable[[], None]) -> Learner:
    """SimCLR as a trial wants it, from random weights.

    Args:
        before_step: Called before each step; what it raises ends the training.

    Raises:
        Diverged: As in `Learner.step`.
    """
    settings = settings_of(material, trial, seed)
    plan, pool, device = _plan_of(material, trial, settings), material.pool, material.device
    normalization = material.spec.normalization
    learner = make_learner(settings, plan, material.spec, material.precision, device)
    per_epoch = len(pool.rows) // plan.batch_size
    steps, warmup = plan.epochs * per_epoch, round(plan.warmup_epochs * per_epoch)
    policy = view_policy(settings, plan, plan.image_size)
    for step in range(steps):
        before_step()
        epoch, place = divmod(step, per_epoch)
        order = seeding.permutation(seed, epoch, len(pool.rows))

        def make(members: Rows, epoch: int = epoch) -> Tensor:
            squares, sizes = pool.squares(members, device)
            return trial.views(policy, squares, sizes, pool.keys[members], seed, epoch, (0, 1), normalization)

        set_rate(learner.optimizer, warmup_cosine(step, steps, warmup))
        torch.manual_seed(seed * 1_000_003 + step)  # stochastic depth, dropout
        try:
            learner.step(make, order[place * plan.batch_size : (place + 1) * plan.batch_size])
        except Diverged as error:
            raise Diverged(f"{error} at step {step} of {steps}") from None
    pixels, rows = pool.cache.evaluations, pool.rows[:: max(1, len(pool.rows) // SETTLING)][:SETTLING]
    behind = nn.Sequential(learner.encoder, learner.head)
    settle_statistics(behind, pixels, rows, normalization, device)
    return learner


def _plan_of(material: Material, trial: Trial, settings: PretrainSettings) -> Plan:
    """The plan of a trial: what it changes of the usual one."""
    batch = min(settings.batch_size if "batch_size" in trial.changed else material.plan.batch_size, len(material.pool.rows))  # fmt: skip
    rate = settings.learning_rate or DEFAULTS[settings.optimizer][0]
    epochs = max(1, round(trial.length * material.epochs))
    return dataclasses.replace(
        material.plan,
        batch_size=batch,
        micro_batch_size=math.gcd(batch, material.plan.micro_batch_size),
        learning_rate=scaled_rate(rate, batch, settings.rate_scaling),
        epochs=epochs,
        warmup_epochs=min(10.0, epochs / 10),
        blur=material.plan.blur if settings.blur is None else settings.blur,
    )


def features_of(material: Material, network: nn.Module) -> Features:
    """Features of the scored images, (T, F)."""
    pixels, normalization = material.pool.cache.evaluations, material.spec.normalization
    features: Features = extract_features(network, pixels, material.rows, normalization, material.device).numpy()  # fmt: skip
    return features


def linear_answers(material: Material, features: Features, seed: int) -> Floats:
    """Whether a linear classifier trained on the other fold names the class of each scored image, (T,)."""
    right = np.zeros(len(material.labels))
    for train, held in material.folds(seed):
        labels = material.labels[train]
        probe = fit_probe(features[train], labels, material.classes, STRENGTH, balanced=material.balanced, reference=features)  # fmt: skip
        right[held] = probe.logits(features[held]).argmax(axis=1) == material.labels[held]
    return right


def supervised_answers(
    material: Material, trial: Trial, seed: int, before_step: Callable[[], None]
) -> Floats:
    """Whether the network trained from scratch on the other fold names the class of each scored image, (T,).

    For each fold it takes as many steps as SimCLR does, each on one view of as many images.

    Raises:
        Diverged: As in `train_classifier`.
    """
    settings = settings_of(material, trial, seed)
    plan = _plan_of(material, trial, settings)
    steps = plan.epochs * (len(material.pool.rows) // plan.batch_size)
    how = finetuning.Trial(
        name="supervised",
        steps=steps,
        batch_size=plan.batch_size,
        trunk_rate=_SCRATCH_RATE,
        head_rate=_SCRATCH_RATE,
        weight_decay=_SCRATCH_DECAY,
        policy=view_policy(settings, plan, plan.image_size),
    )
    right = np.zeros(len(material.labels))
    for train, held in material.folds(seed):
        torch.manual_seed(seed)
        encoder = create_encoder(material.spec)
        classifier = Classifier(encoder, encoder.features, material.classes).to(material.device)
        labels = material.labels[train]
        train_classifier(
            classifier,
            how,
            material.pool.cache,
            material.rows[train],
            labels,
            class_weights(labels, material.classes, balanced=material.balanced).to(material.device),
            material.spec.normalization,
            material.precision,
            material.device,
            seed,
            before_step,
            trial.views,
        )
        chances = predict(classifier, material.pool.cache, material.rows[held], material.spec.normalization, material.device)  # fmt: skip
        right[held] = chances.argmax(axis=1) == material.labels[held]
    return right


def accuracy_answers(material: Material, trial: Trial, seed: int, before_step: Callable[[], None]) -> Answers:
    """Linear accuracy from the features of SimCLR, h, or the accuracy of supervised training, as the trial says."""
    if trial.supervised:
        return {"h": supervised_answers(material, trial, seed, before_step)}
    learner = pretrain_briefly(material, trial, seed, before_step)
    return {"h": linear_answers(material, features_of(material, learner.encoder), seed)}


class Outcomes:
    """The answers of all trials that are done, by trial and seed.

    Args:
        groups: Groups of the scored images, (T,).
    """

    def __init__(self, groups: Rows) -> None:
        self._answers: dict[tuple[Name, str], dict[int, Floats]] = defaultdict(dict)
        self._groups = groups
        self.done = 0  # trials
        self.empty = 0  # of them, those that diverged

    def add(self, name: Name, seed: int, answers: Answers) -> None:
        """Take the answers of a trial; none where it diverged."""
        self.done += 1
        self.empty += not answers
        for asked, right in answers.items():
            self._answers[name, asked][seed] = right

    def level(self, name: Name, asked: str) -> Interval | None:
        """Accuracy over seeds and images; None where no trial of that name is done."""
        found = self._answers.get((name, asked), {})
        ordered = [found[seed] for seed in sorted(found)]
        return accuracy_interval(np.stack(ordered), self._groups) if ordered else None

    def difference(self, first: tuple[Name, str], second: tuple[Name, str]) -> Interval | None:
        """First minus second, paired, over seeds and images; None where they share no seed."""
        one, other = (self._answers.get(each, {}) for each in (first, second))
        return paired_difference(one, other, self._groups)
