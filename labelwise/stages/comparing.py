"""`labelwise finetune`: the same few labels for every method, many times over, and who wins.

For every number of labels and every random draw of that many: a linear probe on frozen features, the
whole network from the pretrained weights, the same network from random weights, random features and
plain pixels. Probes come first, so that a first verdict shows within a minute.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from labelwise import environment, rundir, seeding, terminal
from labelwise.config import FinetuneSettings, Method, read_run_config, to_toml
from labelwise.errors import DataError, Interrupted, UsageError
from labelwise.images.cache import ImageCache, build_cache
from labelwise.images.source import ImageSet, open_images
from labelwise.images.splits import draw_labels, hash_names, lock_test, pool_indices
from labelwise.interruption import StopRequest, stop_between_steps
from labelwise.learning.precision import Precision, choose_device
from labelwise.measures.linear import Probe, accuracy, fit_probe, macro_accuracy, stratified_folds
from labelwise.models.encoder import Encoder, EncoderSpec, create_encoder
from labelwise.models.features import extract_features
from labelwise.models.heads import keep_first_layer
from labelwise.models.weights import load_encoder, read_metadata, save_module
from labelwise.predictions import read_predictions, write_predictions
from labelwise.rundir import RunDirectory
from labelwise.stages.finetuning import (
    Classifier,
    Rows,
    Trial,
    class_weights,
    predict,
    strengthen,
    train_classifier,
)
from labelwise.views.draws import Policy

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]

FEW_PER_CLASS = 5  # up to here every method uses fixed defaults: folds of so few labels choose by chance
FOLDS = 2
UNBALANCED = 1.5  # largest class over smallest, from which on classes are weighed
LADDER = (2, 5, 10, 25, 50, 100)  # labels per class when nothing is asked

# Two tries per method, the first being the default at few labels. Measured on CIFAR-10, recipes/LOG.md.
PROBE_STRENGTHS = (0.01, 0.1)
TRUNK_RATES = (3e-4, 1e-3)
HEAD_RATE = 1e-3
SCRATCH_RATE = 2e-3
FINETUNE_DECAY = 1e-4
SCRATCH_DECAY = 0.05
STEPS = (100, 1000)  # fewest and most of `simclr`; in between, passes over the labels
PASSES = 15


@dataclasses.dataclass(frozen=True)
class Bench:
    """Everything the methods share."""

    run: RunDirectory
    settings: FinetuneSettings
    cache: ImageCache
    names: list[str]
    labels: Indices
    classes: list[str]
    labeled: Rows
    test: Rows
    pool: Rows
    spec: EncoderSpec
    policy: Policy
    precision: Precision
    device: torch.device
    balanced: bool

    @property
    def normalization(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Mean and standard deviation per channel."""
        return self.spec.mean, self.spec.std

    def is_few(self, rows: Rows) -> bool:
        """Whether these labels are too few to choose anything by cross-validation."""
        sizes = np.bincount(self.labels[rows], minlength=len(self.classes))
        return len(rows) <= FEW_PER_CLASS * len(self.classes) or int(sizes.min()) < FOLDS


def finetune(settings: FinetuneSettings) -> RunDirectory:
    """Train and compare classifiers on few labels; interrupted, the same call goes on.

    Raises:
        DataError: There are no labels, one class, or no test images.
        Interrupted: A signal came; every finished classifier is kept.
    """
    started = time.monotonic()
    run = rundir.open_run(settings.run)
    terminal.say(f"run        {run.path}")
    bench = _set_up(run, settings)
    counts = _label_counts(settings, bench)
    orders = _draw(bench, counts)
    jobs = [
        (method, count, draw)
        for method in _methods_in_order(settings.methods)
        for count in counts
        for draw in range(settings.draws)
    ]
    done = {
        (row["method"], row["labels"], row["draw"])
        for row in rundir.read_jsonl(run.results)
        if row["signature"] == _signature(settings)
    }
    _announce(bench, counts, len(jobs), len(done))

    features: dict[str, Floats] = {}
    with (
        stop_between_steps() as stop,
        terminal.track("comparing", len(jobs), done=len(done), unit="classifiers") as bar,
    ):
        for place, (method, count, draw) in enumerate(jobs):
            if (method, count, draw) in done:
                continue
            _stop_if_asked(stop, run)
            rows = bench.labeled[orders[draw][:count]]
            clock = time.monotonic()
            probabilities, chosen, tries = _run_method(method, bench, rows, draw, features)
            row = _score(
                bench, method, rows, draw, probabilities, chosen, tries, time.monotonic() - clock, counts
            )
            _store(bench, row, probabilities)
            bar.advance(1)
            if place + 1 == len(jobs) or jobs[place + 1][:2] != (method, count):
                bar.note(_line(bench, method, count))
    _refit(bench, features)
    _write_settings(run, settings)
    environment.finish(run, time.monotonic() - started)
    return run


# --- the methods


def _run_method(
    method: Method, bench: Bench, rows: Rows, draw: int, features: dict[str, Floats]
) -> tuple[Floats, str, int]:
    """Choose a trial inside the labels if there are enough, train on all of them, predict the test set.

    Returns:
        Class probabilities of the test images, (T, C); the trial that was chosen; how many were tried.
    """
    seed = int(seeding.combine(bench.settings.seed, draw, len(rows))) % 2**31
    trials, fit = _trials(method, bench, len(rows), features)
    chosen, tries = 0, 1
    if not bench.is_few(rows):
        chosen, tries = _choose(bench, rows, seed, len(trials), fit), len(trials)
    return fit(chosen, rows, bench.test, seed, 1.0), trials[chosen], tries


Fit = Callable[[int, Rows, Rows, int, float], Floats]


def _trials(method: Method, bench: Bench, count: int, features: dict[str, Floats]) -> tuple[list[str], Fit]:
    """Names of a method's trials, and a function that trains one and predicts.

    The function takes the trial's place, the rows to train on, the rows to predict, a seed, and the
    share of the steps to take.
    """
    if method in ("simclr_probe", "random_probe", "pixels"):
        matrix = _features(method, bench, features)

        def probe(place: int, rows: Rows, asked: Rows, seed: int, share: float) -> Floats:
            fitted = _fit_probe(bench, matrix, rows, PROBE_STRENGTHS[place])
            return _softmax(fitted.logits(matrix[asked]))

        return [f"C = {strength}" for strength in PROBE_STRENGTHS], probe

    if method == "simclr":
        return _simclr(bench, count, _features("simclr", bench, features))
    return _supervised(bench, count)


def _simclr(bench: Bench, count: int, matrix: Floats) -> tuple[list[str], Fit]:
    """Linear probe first, then the whole network from there."""
    steps = _steps(bench, count)
    trials = [
        _trial(
            bench, f"trunk rate {rate:g}", steps, rate, HEAD_RATE, FINETUNE_DECAY, strong=True, freeze=True
        )
        for rate in TRUNK_RATES
    ]

    def fit(place: int, rows: Rows, asked: Rows, seed: int, share: float) -> Floats:
        classifier = _pretrained_classifier(bench)
        classifier.start_from(_fit_probe(bench, matrix, rows, PROBE_STRENGTHS[0]))
        return _train_and_predict(bench, classifier, trials[place], rows, asked, seed, share)

    return [trial.name for trial in trials], fit


def _supervised(bench: Bench, count: int) -> tuple[list[str], Fit]:
    """The same network from random weights, with light or strong augmentation."""
    steps = bench.settings.scratch_steps or 2 * _steps(bench, count)
    trials = [
        _trial(
            bench,
            f"{'strong' if strong else 'light'} augmentation",
            steps,
            SCRATCH_RATE,
            SCRATCH_RATE,
            SCRATCH_DECAY,
            strong=strong,
            freeze=False,
        )
        for strong in (True, False)
    ]

    def fit(place: int, rows: Rows, asked: Rows, seed: int, share: float) -> Floats:
        torch.manual_seed(seed)
        encoder = create_encoder(bench.spec)
        classifier = Classifier(encoder, encoder.features, len(bench.classes)).to(bench.device)
        return _train_and_predict(bench, classifier, trials[place], rows, asked, seed, share)

    return [trial.name for trial in trials], fit


def _choose(bench: Bench, rows: Rows, seed: int, trials: int, fit: Fit) -> int:
    """Pick the trial with the best out-of-fold accuracy inside the labels; the first one on a tie."""
    truth = bench.labels[rows]
    scores = []
    for place in range(trials):
        predicted = np.empty(len(rows), dtype=np.int64)
        for train, held in stratified_folds(truth, FOLDS, seed):
            predicted[held] = fit(place, rows[train], rows[held], seed, 1 - 1 / FOLDS).argmax(axis=1)
        scores.append(macro_accuracy(predicted, truth) if bench.balanced else accuracy(predicted, truth))
    return int(np.argmax(scores))


def _train_and_predict(
    bench: Bench, classifier: Classifier, trial: Trial, rows: Rows, asked: Rows, seed: int, share: float
) -> Floats:
    trial = dataclasses.replace(trial, steps=max(1, round(trial.steps * share)))
    labels = bench.labels[rows]
    weights = class_weights(labels, len(bench.classes), balanced=bench.balanced).to(bench.device)
    train_classifier(
        classifier,
        trial,
        bench.cache,
        rows,
        labels,
        weights,
        bench.normalization,
        bench.precision,
        bench.device,
        seed,
    )
    return predict(classifier, bench.cache, asked, bench.normalization, bench.device)


def _trial(
    bench: Bench,
    name: str,
    steps: int,
    trunk: float,
    head: float,
    decay: float,
    *,
    strong: bool,
    freeze: bool,
) -> Trial:
    policy = strengthen(bench.policy, strong=strong, crop_scale=bench.settings.crop_scale)
    return Trial(name, steps, bench.settings.batch_size, trunk, head, decay, policy, freeze)


def _steps(bench: Bench, count: int) -> int:
    low, high = STEPS
    return bench.settings.steps or max(low, min(high, round(PASSES * count / bench.settings.batch_size)))


def _pretrained_classifier(bench: Bench) -> Classifier:
    network, width = _pretrained_network(bench)
    return Classifier(network, width, len(bench.classes)).to(bench.device)


def _pretrained_network(bench: Bench) -> tuple[torch.nn.Module, int]:
    """The encoder, with the first layer of its projection head when that has three (SimCLRv2)."""
    encoder, _ = load_encoder(bench.run.path)
    return keep_first_layer(encoder, bench.run.head, read_metadata(bench.run.head))


def _features(method: str, bench: Bench, known: dict[str, Floats]) -> Floats:
    """Features of every image, one row per cache row, computed once per kind."""
    kind = {"simclr_probe": "encoder", "simclr": "network", "random_probe": "random", "pixels": "pixels"}[
        method
    ]
    if kind in known:
        return known[kind]
    rows = np.arange(len(bench.names))
    if kind == "pixels":
        known[kind] = _small_pixels(bench.cache.evaluations)
        return known[kind]
    if kind == "random":
        torch.manual_seed(bench.settings.seed)
        network: torch.nn.Module = create_encoder(bench.spec)
    elif kind == "network":
        network, _ = _pretrained_network(bench)
    else:
        network, _ = load_encoder(bench.run.path)
    network = bench.precision.arrange(network).to(bench.device)
    if kind == "random":
        _settle_statistics(network, bench)
    known[kind] = extract_features(
        network, bench.cache.evaluations, rows, bench.normalization, bench.device
    ).numpy()
    if (
        kind == "encoder"
        and isinstance(network, Encoder)
        and "network" not in known
        and read_metadata(bench.run.head).get("layers") != "3"
    ):
        known["network"] = known[kind]
    return known[kind]


@torch.no_grad()
def _settle_statistics(network: torch.nn.Module, bench: Bench) -> None:
    """Let a random network's batch norms see the images once: else its features are badly scaled."""
    network.train()
    extracted = bench.pool[:: max(1, len(bench.pool) // 512)][:512]
    images = torch.from_numpy(bench.cache.evaluations[extracted]).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(value)[:, None, None] for value in bench.normalization)
    for _ in range(20):  # momentum 0.1: after 20 passes 88 % of the statistics are the images' own
        network(((images - mean) / std).to(bench.device))
    network.eval()


def _small_pixels(pixels: npt.NDArray[np.uint8], side: int = 32) -> Floats:
    """Pixels as features, images above 32 px averaged down to it, (N, 3 side^2)."""
    images = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2)
    chunks = [
        torch.nn.functional.adaptive_avg_pool2d(chunk.float() / 255, min(side, pixels.shape[1]))
        for chunk in images.split(1024)
    ]
    return torch.cat(chunks).flatten(1).numpy()


def _fit_probe(bench: Bench, matrix: Floats, rows: Rows, strength: float) -> Probe:
    return fit_probe(
        matrix[rows],
        bench.labels[rows],
        len(bench.classes),
        strength,
        balanced=bench.balanced,
        reference=matrix[bench.pool],
    )


def _softmax(logits: Floats) -> Floats:
    return torch.softmax(torch.from_numpy(logits.astype(np.float32)), dim=1).numpy()


# --- before and after


def _set_up(run: RunDirectory, settings: FinetuneSettings) -> Bench:
    """Open images, labels, test lock and encoder of a run."""
    _, spec = load_encoder(run.path)
    data = rundir.read_json(run.data)
    images = _open_images(data["sources"], settings)
    with terminal.track("reading images", len(images.names)) as bar:
        cache = build_cache(
            images, side=data["cache_side"], evaluation_size=spec.image_size, progress=bar.advance
        )
    lock = rundir.read_json(run.test_lock)
    if lock["names"] and settings.test is None:
        lock = lock_test(images, cache.keys, cache.readable, None, 0, locked=lock)
    elif "test" in images.splits:
        terminal.warn(
            "the test images came after pretraining: the encoder may have seen them, without labels."
        )
        lock = lock_test(images, cache.keys, cache.readable, None, 0)
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
    if not len(test):
        raise DataError(
            f"{run.path}: none of its {len(lock['names'])} test images has a label; label them, or give --test FOLDER."
        )
    pool = pool_indices(images, cache.readable, lock)
    labeled = pool[labels[pool] >= 0]
    missing = sorted(set(range(len(classes))) - set(labels[labeled].tolist()))
    if missing:
        raise DataError(
            f"{data['root']}: class {classes[missing[0]]!r} has no labeled image outside the test set; label one, or leave the class out."
        )
    plan = rundir.read_json(run.environment)["plan"]
    policy = _view_policy(read_run_config(run.config), plan)
    sizes = np.bincount(labels[labeled], minlength=len(classes))
    return Bench(
        run=run, settings=settings, cache=cache, names=images.names, labels=labels, classes=classes, labeled=labeled, test=test, pool=pool,
        spec=spec, policy=policy, precision=Precision(plan["precision"], plan["layout"], plan["reason"]), device=choose_device(settings.device),
        balanced=bool(sizes.max() >= UNBALANCED * sizes.min()),
    )  # fmt: skip


def _open_images(sources: dict[str, str | None], settings: FinetuneSettings) -> ImageSet:
    """Open the images pretraining saw, with the labels given now or then."""
    given = {"labels": settings.labels, "labels_root": settings.labels_root, "test": settings.test}
    paths = {
        name: path or (Path(known) if (known := sources[name]) else None) for name, path in given.items()
    }
    return open_images(Path(str(sources["images"])), **paths)


def _view_policy(config: dict[str, Any], plan: dict[str, Any]) -> Policy:
    names = {field.name for field in dataclasses.fields(Policy)} - {"size", "blur"}
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in config.items()
        if name in names
    }
    return Policy(size=plan["image_size"], blur=plan["blur"], **values)


def _label_counts(settings: FinetuneSettings, bench: Bench) -> list[int]:
    """Numbers of labels to try, ascending; each at least one per class, at most all there are."""
    there, classes = len(bench.labeled), len(bench.classes)
    if settings.fraction and settings.label_counts:
        raise UsageError("--fraction and --label-counts say the same thing twice; give one.")
    asked: list[tuple[str, int]]
    if settings.fraction:
        asked = [
            (f"{share:.3g} of {len(bench.pool):,} images", round(share * len(bench.pool)))
            for share in settings.fraction
        ]
    elif settings.label_counts:
        asked = [(str(count), there if count == "all" else int(count)) for count in settings.label_counts]
    else:
        asked = [(f"{each} per class", each * classes) for each in LADDER if each * classes < there] + [
            ("all", there)
        ]
    counts = set()
    for words, count in asked:
        if count < classes:
            terminal.warn(f"{words} is {count} labels for {classes} classes; using {classes}, one per class.")
        elif count > there:
            terminal.warn(f"{words} is {count:,} labels and {there:,} are there; using all of them.")
        counts.add(max(classes, min(there, count)))
    return sorted(counts)


def _draw(bench: Bench, counts: Sequence[int]) -> list[list[int]]:
    """Draw the label sets and write them down, nested and hashed."""
    names = [bench.names[row] for row in bench.labeled]
    labels = [bench.classes[bench.labels[row]] for row in bench.labeled]
    orders = draw_labels(names, labels, bench.settings.draws, bench.settings.seed)
    for draw, order in enumerate(orders):
        chosen = [names[index] for index in order[: counts[-1]]]
        sets = {str(count): hash_names(chosen[:count]) for count in counts}
        rundir.write_json(
            bench.run.splits / f"draw-{bench.settings.seed}-{draw}.json", {"order": chosen, "sha256": sets}
        )
    return orders


def _methods_in_order(methods: Sequence[Method]) -> list[Method]:
    """Cheap methods first."""
    order: list[Method] = ["simclr_probe", "pixels", "random_probe", "simclr", "supervised"]
    return [method for method in order if method in methods]


def _signature(settings: FinetuneSettings) -> str:
    """Hash of what decides a classifier besides method, labels and draw; rows of another one are not reused."""
    kept = settings.model_dump(
        mode="json",
        include={
            "seed",
            "batch_size",
            "crop_scale",
            "steps",
            "scratch_steps",
            "labels",
            "labels_root",
            "test",
        },
    )
    return hash_names([f"{key}={value}" for key, value in sorted(kept.items())])[:16]


def _score(
    bench: Bench,
    method: Method,
    rows: Rows,
    draw: int,
    probabilities: Floats,
    chosen: str,
    tries: int,
    seconds: float,
    counts: Sequence[int],
) -> dict[str, Any]:
    truth, predicted = bench.labels[bench.test], probabilities.argmax(axis=1)
    fractions = {round(share * len(bench.pool)): share for share in bench.settings.fraction or ()}
    return {
        "method": method,
        "fraction": fractions.get(len(rows)),
        "labels": len(rows),
        "draw": draw,
        "seed": bench.settings.seed,
        "n_test": len(truth),
        "accuracy": accuracy(predicted, truth),
        "macro_accuracy": macro_accuracy(predicted, truth),
        "per_class": {
            bench.classes[index]: float((predicted[truth == index] == index).mean())
            for index in np.unique(truth)
        },
        "balanced": not bench.balanced,
        "seconds": round(seconds, 2),
        "tries": tries,
        "chosen": chosen,
        "draw_sha256": hash_names([bench.names[row] for row in rows]),
        "signature": _signature(bench.settings),
    }


def _store(bench: Bench, row: dict[str, Any], probabilities: Floats) -> None:
    """Add predictions first, then the result: a result on disk always has its predictions."""
    path = bench.run.predictions
    columns = (
        read_predictions(path)
        if path.exists()
        else {
            name: [] for name in ("method", "labels", "draw", "name", "label", "prediction", "probabilities")
        }
    )
    same = [
        i
        for i, key in enumerate(zip(columns["method"], columns["labels"], columns["draw"], strict=True))
        if key == (row["method"], row["labels"], row["draw"])
    ]
    if same:
        gone = set(same)
        columns = {
            name: [value for i, value in enumerate(values) if i not in gone]
            for name, values in columns.items()
        }
    count = len(bench.test)
    columns["method"] += [row["method"]] * count
    columns["labels"] += [row["labels"]] * count
    columns["draw"] += [row["draw"]] * count
    columns["name"] += [bench.names[index] for index in bench.test]
    columns["label"] += [bench.classes[bench.labels[index]] for index in bench.test]
    columns["prediction"] += [bench.classes[index] for index in probabilities.argmax(axis=1)]
    columns["probabilities"] += [values.tolist() for values in probabilities]
    write_predictions(path, columns)
    key = ("method", "labels", "draw")
    others = [
        old
        for old in rundir.read_jsonl(bench.run.results)
        if [old[name] for name in key] != [row[name] for name in key]
    ]
    rundir.rewrite_jsonl(bench.run.results, [*others, row])


def _line(bench: Bench, method: str, count: int) -> str:
    """One method at one number of labels, in one line."""
    scores = [
        row["accuracy"]
        for row in rundir.read_jsonl(bench.run.results)
        if (row["method"], row["labels"]) == (method, count)
    ]
    spread = f" +/- {np.std(scores, ddof=1):.1%}" if len(scores) > 1 else ""
    return f"{count:>6,} labels  {method:<13} {np.mean(scores):.1%}{spread} over {len(scores)} draws"


def _announce(bench: Bench, counts: Sequence[int], jobs: int, done: int) -> None:
    terminal.say(
        f"classes    {len(bench.classes)}"
        + (", unbalanced: weighed by size, macro accuracy beside accuracy" if bench.balanced else "")
    )
    terminal.say(
        f"labels     {', '.join(f'{count:,}' for count in counts)} of {len(bench.labeled):,}, {bench.settings.draws} random draws each, written to {bench.run.splits}"
    )
    share = 1.96 * math.sqrt(0.25 / len(bench.test))
    terminal.say(
        f"test       {len(bench.test):,} images, never trained on; they alone leave up to +/-{share:.1%}"
    )
    if done:
        terminal.say(f"going on   {done} of {jobs} classifiers are there already")


def _stop_if_asked(stop: StopRequest, run: RunDirectory) -> None:
    if stop:
        raise Interrupted(
            f"finished classifiers are saved in {run.path}; the same command goes on.",
            stop.signal_number or 0,
        )


def _refit(bench: Bench, features: dict[str, Floats]) -> None:
    """Train `simclr` once more on every label outside the test set: the classifier to use."""
    if "simclr" not in bench.settings.methods:
        return
    rows = bench.labeled
    terminal.say(f"training the classifier to keep on all {len(rows):,} labels")
    matrix = _features("simclr", bench, features)
    classifier = _pretrained_classifier(bench)
    classifier.start_from(
        _fit_probe(bench, matrix, rows, PROBE_STRENGTHS[0] if bench.is_few(rows) else PROBE_STRENGTHS[1])
    )
    trial = _trial(
        bench,
        "",
        _steps(bench, len(rows)),
        TRUNK_RATES[0],
        HEAD_RATE,
        FINETUNE_DECAY,
        strong=True,
        freeze=True,
    )
    weights = class_weights(bench.labels[rows], len(bench.classes), balanced=bench.balanced).to(bench.device)
    train_classifier(
        classifier,
        trial,
        bench.cache,
        rows,
        bench.labels[rows],
        weights,
        bench.normalization,
        bench.precision,
        bench.device,
        bench.settings.seed,
    )
    save_module(bench.run.classifier, classifier, bench.spec.to_metadata())
    facts = {
        "classes": bench.classes,
        "labels": len(rows),
        "encoder": bench.spec.to_metadata(),
        "method": "simclr",
        "steps": trial.steps,
    }
    rundir.write_json(bench.run.classifier_json, facts)


def _write_settings(run: RunDirectory, settings: FinetuneSettings) -> None:
    resolved = settings.model_dump(mode="json", exclude={"run"}, exclude_none=True)
    rundir.write_text(run.config, to_toml({"pretrain": read_run_config(run.config), "finetune": resolved}))
