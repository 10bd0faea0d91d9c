"""The methods that are compared, each a way from a few labels to predictions of the test images.

Every method has three tries. At five labels a class or fewer it takes the first; above that it chooses
among them by the same folds inside the labels. Nothing here ever sees a test label.
"""

import copy
import dataclasses
import math
import threading
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from labelwise import seeding
from labelwise.config import FinetuneSettings
from labelwise.images.cache import ImageCache
from labelwise.images.source import ImageSet
from labelwise.interruption import StopRequest
from labelwise.learning.optimization import Diverged
from labelwise.learning.precision import Precision
from labelwise.learning.workers import count_workers
from labelwise.measures.linear import (
    Probe,
    accuracy,
    fit_probe,
    macro_accuracy,
    one_of_each,
    stratified_folds,
)
from labelwise.models.encoder import Encoder, EncoderSpec, create_encoder
from labelwise.models.features import SETTLING, extract_features, settle_statistics
from labelwise.models.heads import has_kept_layer, keep_first_layer
from labelwise.models.weights import load_encoder, read_metadata
from labelwise.ownership import beat
from labelwise.rundir import RunDirectory
from labelwise.stages.classifier import Classifier, Floats, Rows, predict
from labelwise.stages.finetuning import Trial, class_weights, strengthen, train_classifier
from labelwise.views.draws import Policy

FEW_PER_CLASS = 5  # up to here folds are so small that they choose by chance
FOLDS = 2
TRIES = 3  # of every method
UNBALANCED = 1.5

# The first of each is the default at few labels. Measured on CIFAR-10 and digits, recipes/LOG.md.
PROBE_STRENGTHS = (3.0, 30.0, 0.3)
TRUNK_RATES = (3e-4, 1e-3)  # and the frozen network
HEAD_RATE = 1e-3
SCRATCH_STEPS = 4  # times as many as `simclr`: from random weights it takes longer
FINETUNE_DECAY = 1e-4
SCRATCH_DECAY = 0.05
FEWEST_STEPS, MOST_STEPS = 100, 1000  # of `simclr`
PASSES = 15  # over the labels, between the two
PIXEL_SIDE = 32


STOPPED = "finished classifiers are saved; the same command goes on."


@dataclasses.dataclass
class Bench:
    """Everything the methods share.

    Attributes:
        groups: Number of the group of every image, (N,); a group is never split over folds.
        names, labels: Of every image of the set, (N,); label -1 where unknown.
        classes: Their names; a label is a place in this list.
        labeled, test, pool: Rows that have a label to learn from, that are tested, that were pretrained on.
        suggested: Of `labeled`, those that `labelwise suggest` chose: of each call those that none before named, in its order.
        folds: Into so many the labeled images are cut, where no others are there to test on; else 0.
        test_method: In words, where the test images come from.
        policy: Views of pretraining.
        unbalanced: The classes of the whole set differ in size; macro accuracy is what is chosen by.
        images: The set itself.
        features: Frozen features by kind, filled on first use; of other networks, before the methods start.
        references: Rows whose features set the scale for a probe, by kind; the pool where nothing is said.
        starts: Networks that are fine-tuned, by method, besides our own.
        cut: The folds of every repeat, filled on first use.
        stop: Whether somebody asked to stop.
        building: Held while weights are drawn, from a generator that all threads share.
    """

    run: RunDirectory
    settings: FinetuneSettings
    images: ImageSet
    cache: ImageCache
    groups: Rows
    names: list[str]
    labels: npt.NDArray[np.int64]
    classes: list[str]
    labeled: Rows
    suggested: list[Rows]
    test: Rows
    folds: int
    test_method: str
    pool: Rows
    spec: EncoderSpec
    policy: Policy
    precision: Precision
    device: torch.device
    unbalanced: bool
    features: dict[str, Floats] = dataclasses.field(default_factory=dict)
    references: dict[str, Rows] = dataclasses.field(default_factory=dict)
    starts: dict[str, "Start"] = dataclasses.field(default_factory=dict)
    cut: dict[int, list[Rows]] = dataclasses.field(default_factory=dict)
    stop: StopRequest = dataclasses.field(default_factory=StopRequest)
    building: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def before_step(self) -> None:
        """Stop if somebody asked for it; else give a sign of life."""
        self.stop.check(STOPPED)
        beat(self.run)


@dataclasses.dataclass(frozen=True)
class Start:
    """A network that others trained, on the CPU: every training begins with a copy of it."""

    network: Encoder
    spec: EncoderSpec


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to train a method: `fit(rows, asked, seed, share)` trains on rows and predicts others.

    `share` is the share of the steps to take: folds train on fewer labels for fewer steps. Raises `Diverged`.
    """

    name: str
    fit: Callable[[Rows, Rows, int, float], Floats]


def run_method(method: str, bench: Bench, rows: Rows, draw: int) -> tuple[Floats, str, int]:
    """Choose a way inside the labels if there are enough, train on all of them, predict the test images.

    Returns:
        Class probabilities of the rows of `tested_in`, (T, C); the way that was chosen; how many were tried.

    Raises:
        Diverged: The training that was chosen, or each there was to choose from.
    """
    seed = int(seeding.combine(bench.settings.seed, draw, len(rows))) % 2**31
    ways, asked = _ways(method, bench, len(rows)), tested_in(bench, draw)
    if is_few(bench, rows):
        ways = ways[:1]
    best = ways[0] if len(ways) == 1 else _choose(bench, rows, seed, ways)
    return best.fit(rows, asked, seed, 1.0), best.name, len(ways)


def tested_in(bench: Bench, draw: int) -> Rows:
    """Rows that the classifiers of a draw are tested on: the test images, or without any a fold of the labeled ones in turn."""
    if not bench.folds:
        return bench.test
    repeat, fold = divmod(draw, bench.folds)
    if repeat not in bench.cut:
        seed, rows = int(seeding.combine(bench.settings.seed, repeat)) % 2**31, bench.labeled
        cut = stratified_folds(bench.labels[rows], bench.folds, seed, bench.groups[rows])
        bench.cut[repeat] = [rows[held] for _, held in cut]
    return bench.cut[repeat][fold]


def is_trained(method: str, bench: Bench) -> bool:
    """Whether a method trains a network; the others only fit a probe."""
    return method in ("simclr", "supervised", *bench.starts)


def steps_of(method: str, bench: Bench, rows: Rows) -> int:
    """Optimizer steps that `run_method` takes, folds included; 1 for a probe."""
    if not is_trained(method, bench):
        return 1
    trials = (_scratch_trials if method == "supervised" else _finetuning_trials)(bench, len(rows))
    in_folds = 0 if is_few(bench, rows) else (FOLDS - 1) * sum(trial.steps for trial in trials)
    return trials[0].steps + in_folds  # a fold takes its share of the steps


def workers_for(method: str, bench: Bench) -> int:
    """How many classifiers of this method to train side by side."""
    if not is_trained(method, bench):
        return 1
    if method == "simclr":
        frozen_features(bench, "network")  # filled once, before threads ask for it
    network = create_encoder(_spec(method, bench))
    return count_workers(network, bench.spec.image_size, bench.settings.batch_size, bench.device)


def time_a_step(bench: Bench) -> float:
    """Seconds that one training step of the run's own network takes on all cores, once it is warm; side by side it takes less."""
    usual = _scratch_trials(bench, len(bench.labeled))[0]
    trial = dataclasses.replace(usual, steps=1, trunk_rate=0.0, head_rate=0.0)
    with bench.building:
        encoder = create_encoder(bench.spec)
    classifier = Classifier(encoder, encoder.features, len(bench.classes)).to(bench.device)
    for _ in range(2):  # the first one compiles and takes memory
        clock = time.monotonic()
        _train(bench, classifier, trial, bench.labeled, bench.settings.seed, bench.spec)
        classifier.linear.bias.sum().item()  # a GPU has done it then
    return time.monotonic() - clock


def refit(bench: Bench) -> tuple[Classifier, Trial]:
    """Train `simclr` once more, chosen as it was measured, on every label outside the test set: the one to keep.

    Raises:
        Diverged: As in `run_method`.
    """
    rows = bench.labeled
    trials = trials_to_keep(bench)
    trial = trials[0]
    if not is_few(bench, rows):
        best = _choose(
            bench, rows, bench.settings.seed, [_finetune("simclr", bench, each) for each in trials]
        )
        trial = next(each for each in trials if each.name == best.name)
    classifier = train_pretrained("simclr", bench, trial, rows, bench.settings.seed)
    predict(
        classifier, bench.cache, rows[:1], bench.spec.normalization, bench.device
    )  # it does say something
    return classifier, trial


def trials_to_keep(bench: Bench) -> list[Trial]:
    """The ways that `refit` chooses from."""
    return _finetuning_trials(bench, len(bench.labeled))


def train_pretrained(
    method: str, bench: Bench, trial: Trial, rows: Rows, seed: int, share: float = 1.0
) -> Classifier:
    """Fit a linear probe, then train the whole network from there, for a share of the steps, or not at all.

    Raises:
        Diverged: As in `train_classifier`.
    """
    classifier = _pretrained_classifier(method, bench, rows)
    _train(bench, classifier, trial, rows, seed, _spec(method, bench), share)
    return classifier


def fit_again(bench: Bench, way: str, rows: Rows, asked: Rows) -> Floats:
    """Class probabilities of the rows asked for, (M, C), by `simclr` trained on these labels in a way that was chosen before.

    Raises:
        Diverged: The training does.
    """
    trial = next(each for each in _finetuning_trials(bench, len(rows)) if each.name == way)
    return _finetune("simclr", bench, trial).fit(rows, asked, bench.settings.seed, 1.0)


def is_few(bench: Bench, rows: Rows) -> bool:
    """Whether these labels are too few to choose anything by cross-validation."""
    _, kept = one_of_each(bench.groups[rows], bench.labels[rows])
    sizes = np.bincount(kept, minlength=len(bench.classes))
    return len(rows) <= FEW_PER_CLASS * len(bench.classes) or int(sizes.min()) < FOLDS


def is_unbalanced(labels: npt.NDArray[np.int64], classes: int) -> bool:
    """Whether the largest class is so much larger than the smallest that classes are weighed."""
    sizes = np.bincount(labels, minlength=classes)
    return bool(sizes.max() >= UNBALANCED * sizes.min())


def _choose(bench: Bench, rows: Rows, seed: int, ways: list[Way]) -> Way:
    """Pick the way with the best out-of-fold accuracy; the first one on a tie; none that diverges in a fold.

    Raises:
        Diverged: All of them do.
    """
    truth = bench.labels[rows]
    score = macro_accuracy if bench.unbalanced else accuracy
    folds = stratified_folds(truth, FOLDS, seed, bench.groups[rows])
    scores = []
    for way in ways:
        predicted = np.empty(len(rows), dtype=np.int64)
        try:
            for train, held in folds:
                predicted[held] = way.fit(rows[train], rows[held], seed, 1 - 1 / FOLDS).argmax(axis=1)
            scores.append(score(predicted, truth))
        except Diverged:
            scores.append(-math.inf)
    if max(scores) == -math.inf:
        raise Diverged("every way to train it does, inside the labels")
    return ways[int(np.argmax(scores))]


def _ways(method: str, bench: Bench, count: int) -> list[Way]:
    if method == "supervised":
        return [_train_from_scratch(bench, trial) for trial in _scratch_trials(bench, count)]
    if is_trained(method, bench):
        return [_finetune(method, bench, trial) for trial in _finetuning_trials(bench, count)]
    kind = {"simclr_probe": "encoder", "random_probe": "random"}.get(method, method)
    return [_probe(bench, kind, strength) for strength in PROBE_STRENGTHS]


def _probe(bench: Bench, kind: str, strength: float) -> Way:
    """Logistic regression on frozen features."""

    def fit(rows: Rows, asked: Rows, seed: int, share: float) -> Floats:
        logits = _fit_probe(bench, kind, rows, strength).logits(frozen_features(bench, kind)[asked])
        return torch.softmax(torch.from_numpy(logits), dim=1).numpy()

    return Way(f"C = {strength:g}", fit)


def _finetune(method: str, bench: Bench, trial: Trial) -> Way:
    """Linear probe first, then the whole network from there, or not at all."""
    spec = _spec(method, bench)

    def fit(rows: Rows, asked: Rows, seed: int, share: float) -> Floats:
        classifier = train_pretrained(method, bench, trial, rows, seed, share)
        return predict(classifier, bench.cache, asked, spec.normalization, bench.device)

    return Way(trial.name, fit)


def _train_from_scratch(bench: Bench, trial: Trial) -> Way:
    """The same network from random weights."""

    def fit(rows: Rows, asked: Rows, seed: int, share: float) -> Floats:
        with bench.building:
            torch.manual_seed(seed)
            encoder = create_encoder(bench.spec)
            classifier = Classifier(encoder, encoder.features, len(bench.classes)).to(bench.device)
        _train(bench, classifier, trial, rows, seed, bench.spec, share)
        return predict(classifier, bench.cache, asked, bench.spec.normalization, bench.device)

    return Way(trial.name, fit)


def _finetuning_trials(bench: Bench, count: int) -> list[Trial]:
    settings = bench.settings
    policy = strengthen(bench.policy, strong=True, crop_scale=settings.crop_scale)
    trained = [
        Trial(
            name=f"trunk rate {rate:g}",
            steps=_steps(bench, count),
            batch_size=settings.batch_size,
            trunk_rate=rate,
            head_rate=HEAD_RATE,
            weight_decay=FINETUNE_DECAY,
            policy=policy,
        )
        for rate in TRUNK_RATES
    ]
    return [*trained, dataclasses.replace(trained[0], name="frozen", steps=0)]  # as the linear probe left it


def _scratch_trials(bench: Bench, count: int) -> list[Trial]:
    settings = bench.settings
    return [
        Trial(
            name=f"{'strong' if strong else 'light'} augmentation, rate {rate:.2g}",
            steps=settings.scratch_steps or SCRATCH_STEPS * _steps(bench, count),
            batch_size=settings.batch_size,
            trunk_rate=rate,
            head_rate=rate,
            weight_decay=SCRATCH_DECAY,
            policy=strengthen(bench.policy, strong=strong, crop_scale=settings.crop_scale),
        )
        for strong, rate in (
            (True, settings.scratch_rate),
            (False, settings.scratch_rate),
            (True, settings.scratch_rate / 3),
        )
    ]


def _steps(bench: Bench, count: int) -> int:
    passes = round(PASSES * count / bench.settings.batch_size)
    return bench.settings.steps or max(FEWEST_STEPS, min(MOST_STEPS, passes))


def _train(
    bench: Bench,
    classifier: Classifier,
    trial: Trial,
    rows: Rows,
    seed: int,
    spec: EncoderSpec,
    share: float = 1.0,
) -> None:
    labels = bench.labels[rows]
    with bench.building:
        torch.manual_seed(seed)  # dropout, stochastic depth
    train_classifier(
        classifier,
        dataclasses.replace(trial, steps=math.ceil(trial.steps * share)),
        bench.cache,
        rows,
        labels,
        class_weights(labels, len(bench.classes), balanced=is_unbalanced(labels, len(bench.classes))).to(
            bench.device
        ),
        spec.normalization,
        bench.precision,
        bench.device,
        seed,
        bench.before_step,
    )


def _spec(method: str, bench: Bench) -> EncoderSpec:
    """Of the network that a method trains."""
    return bench.starts[method].spec if method in bench.starts else bench.spec


def _pretrained_classifier(method: str, bench: Bench, rows: Rows) -> Classifier:
    """The pretrained network with a last layer that starts where a linear probe on these labels ended."""
    start = bench.starts.get(method)
    with bench.building:
        network, width = _pretrained_network(bench, start)
        classifier = Classifier(network, width, len(bench.classes)).to(bench.device)
    kind = "network" if start is None else method
    classifier.start_from(*_fit_probe(bench, kind, rows, PROBE_STRENGTHS[0]).folded())
    return classifier


def _pretrained_network(bench: Bench, start: Start | None = None) -> tuple[nn.Module, int]:
    """Our encoder, with the first layer of its projection head when that has three (SimCLRv2); or one of others."""
    if start is not None:
        return copy.deepcopy(start.network), start.network.features
    encoder, _ = load_encoder(bench.run.path)
    return keep_first_layer(encoder, bench.run.head, read_metadata(bench.run.head))


def _fit_probe(bench: Bench, kind: str, rows: Rows, strength: float) -> Probe:
    features, labels, classes = frozen_features(bench, kind), bench.labels[rows], len(bench.classes)
    return fit_probe(
        features[rows],
        labels,
        classes,
        strength,
        balanced=is_unbalanced(labels, classes),
        reference=features[bench.references.get(kind, bench.pool)],
    )


# --- frozen features


def frozen_features(bench: Bench, kind: str) -> Floats:
    """Features of every image of the set, (N, F), computed once per kind.

    Args:
        kind: `encoder`, `network` (with what is kept of the projection head), `random` or `pixels`.
    """
    if kind == "network" and not has_kept_layer(read_metadata(bench.run.head)):
        kind = "encoder"  # nothing of the head stays on it
    if kind not in bench.features:
        bench.features[kind] = _small_pixels(bench) if kind == "pixels" else _network_features(bench, kind)
    return bench.features[kind]


def frozen_network(bench: Bench, kind: str) -> nn.Module:
    """The network of a kind of features, but `pixels`, where and how it computes them."""
    if kind == "random":
        torch.manual_seed(bench.settings.seed)
        network: nn.Module = create_encoder(bench.spec)
    elif kind == "network":
        network, _ = _pretrained_network(bench)
    else:
        network, _ = load_encoder(bench.run.path)
    network = bench.precision.arrange(network).to(bench.device)
    if kind == "random":
        rows = bench.pool[:: max(1, len(bench.pool) // SETTLING)][:SETTLING]
        settle_statistics(network, bench.cache.evaluations, rows, bench.spec.normalization, bench.device)
    return network


def _network_features(bench: Bench, kind: str) -> Floats:
    rows, normalization = np.arange(len(bench.names)), bench.spec.normalization
    network = frozen_network(bench, kind)
    return extract_features(network, bench.cache.evaluations, rows, normalization, bench.device).numpy()


def _small_pixels(bench: Bench) -> Floats:
    """Pixels as features, averaged down to 32 px where they are larger, (N, 3 * 32^2)."""
    side = min(PIXEL_SIDE, bench.spec.image_size)
    chunks = []
    for start in range(0, len(bench.names), 1024):
        pixels = torch.from_numpy(np.array(bench.cache.evaluations[start : start + 1024])).permute(0, 3, 1, 2)
        chunks.append(nn.functional.adaptive_avg_pool2d(pixels.float() / 255, side).flatten(1))
    return torch.cat(chunks).numpy()
