"""How far the kept classifier is to be believed, learned from the labels it was trained on and never from the test set.

Each fold of the labels is scored by a classifier that was trained the same way on the other folds. From these scores come a temperature,
by which probabilities mean what they say, and the sets of classes that `predict` gives. Beside it: how far images of the pool lie.
"""

import warnings

import numpy as np
import torch

from labelwise import rundir, seeding, terminal
from labelwise.learning.optimization import Diverged
from labelwise.learning.workers import side_by_side
from labelwise.measures.calibration import calibration_error, fit_temperature, quantile_of_next
from labelwise.measures.linear import one_of_each, stratified_folds
from labelwise.models.familiar import Familiar, save_familiar
from labelwise.models.features import extract_features
from labelwise.models.weights import read_hash
from labelwise.stages.classifier import Floats, Rows, chances_of, load_classifier
from labelwise.stages.finetuning import Trial
from labelwise.stages.methods import Bench, train_pretrained, trials_to_keep, workers_for

FOLDS = 5
FEWEST_SCORED = 20  # labels for a temperature (measured 2026-11-27, recipes/LOG.md)
_MOST_SCORES = 10_000  # that are kept; a part of them, drawn at random, promises the same
_KNOWN = 2000  # images of the pool whose features are known, and as many that tell what is far
_NEARLY_ALL = 0.99


def steps_to_calibrate(bench: Bench) -> int:
    """Optimizer steps that `calibrate` takes."""
    return (FOLDS - 1) * trials_to_keep(bench)[0].steps  # each of the folds trains on the others


def calibrate(bench: Bench, signature: str) -> None:
    """Write calibration.json and familiar.safetensors for the classifier that the run has just kept.

    Where a training diverges in a fold, neither is written, which is said.
    """
    rows, run = bench.labeled, bench.run
    way = rundir.read_json(run.classifier_json)["way"]
    trial = next(each for each in trials_to_keep(bench) if each.name == way)
    folds = _cut(bench)
    terminal.say(f"calibrating it on labels out of fold: {len(folds)} more trainings")
    try:
        logits = _score_out_of_fold(bench, trial, folds)
    except Diverged as error:
        terminal.warn(
            f"its probabilities stay uncalibrated, as it diverges on a part of the labels: {error}."
        )
        return
    truth, is_scored = bench.labels[rows], ~np.isnan(logits[:, 0])
    temperature = 1.0
    if is_scored.sum() >= FEWEST_SCORED:
        temperature = fit_temperature(logits[is_scored].astype(float), truth[is_scored])
    classifier = read_hash(run.classifier)
    save_familiar(run.familiar, _learn_familiar(bench), classifier)
    facts = {
        "signature": signature,
        "classifier": classifier,
        "labels": len(rows),
        "scored": int(is_scored.sum()),
        "suggested": sum(map(len, bench.suggested)),
        "folds": len(folds),
        "way": f"each fold scored by the same training ({way}) on the others, groups kept whole",
        "temperature": temperature,
        "calibration_error": _errors(logits[is_scored], truth[is_scored], temperature),
        "scores": _nonconformity(bench, logits, temperature),
    }
    rundir.write_json(run.calibration, facts)


def _cut(bench: Bench) -> list[tuple[Rows, Rows]]:
    """Places among the labels to train on and to score, per fold; none where no class has two labels.

    What holds the last labels of a class is trained on in every fold, and never scored.
    """
    labels, groups = bench.labels[bench.labeled], bench.groups[bench.labeled]
    count = min(FOLDS, int(np.bincount(one_of_each(groups, labels)[1]).max()))
    if count < 2:
        return []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")
        folds = stratified_folds(labels, count, bench.settings.seed, groups)
    cut = []
    for train, held in folds:
        is_last = ~np.isin(labels[held], labels[train])
        stays = np.isin(groups[held], groups[held[is_last]])
        cut.append((np.sort(np.concatenate([train, held[stays]])), held[~stays]))
    return [(train, held) for train, held in cut if len(held)]


def _score_out_of_fold(bench: Bench, trial: Trial, folds: list[tuple[Rows, Rows]]) -> Floats:
    """Scores of each label by a classifier that did not learn from it, (n, C); NaN where there is none.

    Raises:
        Diverged: A training does.
    """
    rows = bench.labeled
    logits = np.full((len(rows), len(bench.classes)), np.nan, np.float32)

    def train(fold: int) -> Floats:
        learned, held = folds[fold]
        share = 1 - 1 / len(folds)
        classifier = train_pretrained("simclr", bench, trial, rows[learned], bench.settings.seed, share)
        found = extract_features(
            classifier, bench.cache.evaluations, rows[held], bench.spec.normalization, bench.device
        )
        chances_of(found)  # it does say something
        return found.numpy()

    for fold, found in side_by_side(train, range(len(folds)), workers_for("simclr", bench)):
        logits[folds[fold][1]] = found
    return logits


def _errors(logits: Floats, truth: Rows, temperature: float) -> dict[str, float]:
    """Calibration error out of fold, before and after."""
    errors = {}
    for name, divisor in (("before", 1.0), ("after", temperature)):
        chances = chances_of(torch.from_numpy(logits / divisor))
        right = chances.argmax(axis=1) == truth
        errors[name] = calibration_error(chances.max(axis=1), right.astype(float)) if len(truth) else 0.0
    return errors


def _nonconformity(bench: Bench, logits: Floats, temperature: float) -> list[float]:
    """1 minus the probability of the right class, in order: one of each group, so that they are independent of each other.

    Source: Sadinle et al. 2019 (arXiv 1609.00451): of all sets with this promise on average, the smallest.
    """
    rows = bench.labeled
    chances = chances_of(torch.from_numpy(np.nan_to_num(logits / temperature)))
    scores = 1 - chances[np.arange(len(rows)), bench.labels[rows]]
    scores[np.isnan(logits[:, 0])] = 1.0  # a classifier that did not learn from it does not know its class
    order = seeding.permutation(bench.settings.seed, 0, len(rows))
    _, first = np.unique(bench.groups[rows[order]], return_index=True)
    kept = scores[order[np.sort(first)[:_MOST_SCORES]]]
    return [round(each, 6) for each in np.sort(kept).tolist()]


def _learn_familiar(bench: Bench) -> Familiar:
    """Learn from images of the pool, labeled ones first, and tell by others of it what is farther than nearly all."""
    network = load_classifier(bench.run)[0].network.to(bench.device)
    order = bench.pool[seeding.permutation(bench.settings.seed, 1, len(bench.pool))]
    order = np.concatenate([order[bench.labels[order] >= 0], order[bench.labels[order] < 0]])
    half = min(_KNOWN, len(order) // 2)
    known, others = (
        extract_features(network, bench.cache.evaluations, rows, bench.spec.normalization, bench.device)
        for rows in (order[:half], order[-half:])
    )
    familiar = Familiar(known.shape[1])
    familiar.learn(known)
    familiar.limit.fill_(quantile_of_next(familiar(others).numpy(), _NEARLY_ALL))
    return familiar
