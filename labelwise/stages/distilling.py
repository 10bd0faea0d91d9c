"""`labelwise distill`: what the kept classifier says of the images without a label teaches another one.

Labels, and faintly what the classifier says of the other images, are spread over the graph of nearest neighbours; a linear probe on the
frozen network then learns the most probable class of every image. Where there are labels enough its gain is measured inside them.

Source: Chen et al. 2020 (arXiv 2006.10029), Sec. 3, the distillation loss at the limit of low temperature, on the frozen network. With
soft targets, or training the whole network, it was no better (recipes/LOG.md).
"""

import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from labelwise import environment, rundir, terminal
from labelwise.config import FinetuneSettings, read_run_config
from labelwise.errors import DataError, Interrupted, LabelwiseError, UsageError
from labelwise.interruption import stop_between_steps
from labelwise.learning.optimization import Diverged
from labelwise.measures.linear import (
    Probe,
    accuracy,
    fit_probe,
    macro_accuracy,
    one_of_each,
    stratified_folds,
)
from labelwise.measures.spreading import spread
from labelwise.measures.statistics import (
    FEWEST_DRAWS,
    HELPS,
    HURTS,
    Folds,
    Interval,
    difference_on_images,
    verdict,
)
from labelwise.models.weights import read_metadata, save_module
from labelwise.ownership import beat, hold
from labelwise.reports import text
from labelwise.rundir import RunDirectory
from labelwise.stages.benching import MOST_FOLDS, remember_sources, set_up_bench
from labelwise.stages.classifier import Classifier, Floats, Rows, load_classifier, predict
from labelwise.stages.comparing import signature_of
from labelwise.stages.methods import (
    PROBE_STRENGTHS,
    Bench,
    fit_again,
    frozen_features,
    frozen_network,
    is_few,
)
from labelwise.stages.reporting import DISTILLED

_FAINT = 0.1  # what the classifier says of an image, against 1 of a label; 0, 0.03, 0.3 and 1 were no better. 2026-11-27, recipes/LOG.md
_AS_IT_WAS = "the classifier is as it was; the same command begins again."
_WHERE_IT_HELPED = "it helped where the encoder was good and hurt where it was weak (recipes/LOG.md)"


def distill(run: RunDirectory, *, force: bool = False) -> dict[str, Any]:
    """Put a classifier that learned from all images in place of the kept one, where that is shown to help inside the labels.

    Args:
        run: Compared, so that it holds a classifier.
        force: Do so as well where no difference is shown, or labels are too few to show one; not where it is shown to hurt.

    Returns:
        `distilled`: whether it was done; `reason`: why not, else None; `labels`; `images` that were learned from; `gain`: `mean`, `low`,
        `high` inside the labels, None where they are too few; `by_class`: whether that is of the mean over classes; `test`: see `_test`, None where nothing was done or can be tested; `run`.

    Raises:
        CheckpointError: The classifier is damaged.
        DataError: Every image has a label.
        UsageError: The run has no classifier, or it is distilled already, or is not that of these labels; or another command is working on the run.
        LabelwiseError: A training diverged.
        Interrupted: A signal came; the classifier is as it was.
    """
    started = time.monotonic()
    with hold(run):
        start, _, _ = load_classifier(run)
        settings = FinetuneSettings.resolve({"run": run.path}, read_run_config(run.config, FinetuneSettings))
        bench = set_up_bench(run, remember_sources(run, settings))
        kept = _kept(bench)
        try:
            with stop_between_steps() as bench.stop:
                gain = _estimate(bench, kept["way"])
                document = {
                    "distilled": False,
                    "reason": _why_not(gain, len(bench.labeled), force=force),
                    "labels": len(bench.labeled),
                    "images": len(bench.pool),
                    "gain": _bounds(gain) if gain is not None else None,
                    "by_class": bench.unbalanced,
                    "test": None,
                    "run": str(run.path),
                }
                if document["reason"] is not None:
                    return document
                terminal.say(f"learning   from {len(bench.pool):,} images, {len(bench.labeled):,} labeled")
                spec = bench.spec
                start.to(bench.device)
                chances = predict(start, bench.cache, bench.pool, spec.normalization, bench.device)
                student = _teach(bench, bench.pool, bench.labeled, chances)
                document |= {"distilled": True, "test": _test(bench, start, student)}
                bench.stop.check(_AS_IT_WAS)
                _keep(bench, kept, student, document)
        except Diverged as error:
            raise LabelwiseError(f"{run.path}: {error}, in a fold of the labels; {_AS_IT_WAS}") from None
        except Interrupted as error:
            raise Interrupted(_AS_IT_WAS, error.exit_code - 128) from None
        environment.finish(run, time.monotonic() - started)
    return document


def show(document: dict[str, Any]) -> None:
    """Print what was gained, or why nothing was done."""
    if document["gain"] is not None:
        of_classes = ", mean over classes," if document["by_class"] else ""
        terminal.emit(
            f"gain      {text.points(document['gain'])}{of_classes} in folds of the {document['labels']:,} labels, each image tested by one that had not seen it"
        )
    if not document["distilled"]:
        terminal.emit(f"kept      the classifier stays as it is: {document['reason']}")
        return
    terminal.emit(f"distilled {document['labels']:,} labels, {document['images']:,} images")
    if document["test"] is not None:
        terminal.emit(f"test      {text.distilled_in_words(document['test'])}")
    terminal.emit("believe   `predict` tells no calibrated confidence, no sets and nothing far of it")
    terminal.emit(
        f"back      labelwise finetune --run {document['run']} trains the classifier it came from again"
    )


def _kept(bench: Bench) -> dict[str, Any]:
    """What is known of the classifier to begin with: that of these labels, not distilled itself."""
    kept: dict[str, Any] = rundir.read_json(bench.run.classifier_json)
    signature = signature_of(bench)
    if kept["signature"] == signature + DISTILLED:
        raise UsageError(
            f"{bench.run.path}: its classifier is distilled already; `labelwise finetune` trains the one it came from again."
        )
    if kept["signature"] != signature:
        raise UsageError(
            f"{bench.run.path}: its classifier was trained with other labels, settings or another encoder; `labelwise finetune` trains it anew."
        )
    if len(bench.labeled) == len(bench.pool):
        raise DataError(
            f"{bench.images.root}: all {len(bench.pool):,} images that are not for testing have a label; nothing is left to distill from."
        )
    return kept


def _estimate(bench: Bench, way: str) -> Interval | None:
    """Gain over a classifier trained in the same way, in folds of the labels; None where they are too few for three.

    What is tested is in no graph: its class is not even guessed before.
    """
    labeled, truth = bench.labeled, bench.labels[bench.labeled]
    groups = bench.groups[labeled]
    smallest = int(np.bincount(one_of_each(groups, truth)[1], minlength=len(bench.classes)).min())
    count = min(MOST_FOLDS, smallest)
    if is_few(bench, labeled) or count < FEWEST_DRAWS:
        return None
    folds = stratified_folds(truth, count, bench.settings.seed, groups)
    before, after = dict[int, Any](), dict[int, Any]()
    with terminal.track("testing in folds", count, unit="folds") as bar:
        for fold, (train, held) in enumerate(folds):
            rows, asked = labeled[train], labeled[held]
            pool = bench.pool[~np.isin(bench.groups[bench.pool], groups[held])]
            chances = fit_again(bench, way, rows, np.concatenate([pool, asked]))
            student = _teach(bench, pool, rows, chances[: len(pool)])
            said = chances[len(pool) :], student.logits(frozen_features(bench, "network")[asked])
            before[fold], after[fold] = (
                (each.argmax(axis=1) == truth[held]).astype(np.float64) for each in said
            )
            bar.advance(1)
    tested = Folds(
        {fold: truth[held] for fold, (_, held) in enumerate(folds)},
        {fold: groups[held] for fold, (_, held) in enumerate(folds)},
        1 / (count - 1),
    )
    return (tested.macro_difference if bench.unbalanced else tested.difference)(after, before)


def _why_not(gain: Interval | None, labels: int, *, force: bool) -> str | None:
    """Why the classifier had better stay as it is; None where it had not."""
    found = verdict(gain) if gain is not None else None
    if found == HELPS:
        return None
    if found == HURTS:
        return "distilling hurts here"
    words = (
        "no gain is shown"
        if gain is not None
        else f"{labels:,} labels are too few to measure a gain inside them"
    )
    if force:
        terminal.warn(f"{words}; done all the same: {_WHERE_IT_HELPED}.")
        return None
    return f"{words}; --force distills all the same: {_WHERE_IT_HELPED}"


def _teach(bench: Bench, pool: Rows, rows: Rows, chances: Floats) -> Probe:
    """Fit a probe on all images of a pool, each with the class that labels and a classifier make most probable.

    Args:
        bench: Shared.
        pool: Rows, (N,).
        rows: Those of them whose label may be known.
        chances: What the classifier says of the pool, (N, C).

    Raises:
        Interrupted: Somebody asked to stop.
    """
    bench.stop.check(_AS_IT_WAS)
    beat(bench.run)
    features, classes = frozen_features(bench, "network")[pool], len(bench.classes)
    is_known = np.isin(pool, rows)
    known = bench.labels[pool[is_known]]
    start = _FAINT * chances
    start[is_known] = np.eye(classes)[known]
    targets = spread(features, start).argmax(axis=1)
    targets[is_known] = known
    return fit_probe(
        features, targets, classes, PROBE_STRENGTHS[0], balanced=bench.unbalanced, reference=features
    )


def _test(bench: Bench, start: Classifier, student: Probe) -> dict[str, Any] | None:
    """Accuracy `before` and `after` on the `n_test` test images, with the difference; each classifier sees them once.

    Nothing was chosen by them. With classes of unlike size all these are means over classes (`by_class`); `accuracy` is the plain one
    after. None where there are no test images.
    """
    if bench.folds:
        return None
    truth, by_class = bench.labels[bench.test], bench.unbalanced
    chances = predict(start, bench.cache, bench.test, bench.spec.normalization, bench.device)
    said = chances, student.logits(frozen_features(bench, "network")[bench.test])
    score = macro_accuracy if by_class else accuracy
    before, after = (each.argmax(axis=1) for each in said)
    difference = difference_on_images(
        (after == truth).astype(np.float64),
        (before == truth).astype(np.float64),
        truth,
        bench.groups[bench.test],
        by_class=by_class,
    )
    return {
        "before": score(before, truth),
        "after": score(after, truth),
        "accuracy": accuracy(after, truth),
        "by_class": by_class,
        "n_test": len(truth),
        **_bounds(difference),
    }


def _bounds(found: Interval) -> dict[str, float | None]:
    return {"mean": found.mean, "low": found.low, "high": found.high}


def _keep(bench: Bench, kept: dict[str, Any], student: Probe, document: dict[str, Any]) -> None:
    """Write the distilled classifier over the kept one, which `finetune` trains again."""
    network = frozen_network(bench, "network")
    classifier = Classifier(network, student.weight.shape[1], len(bench.classes)).to(bench.device)
    classifier.start_from(*student.folded())
    facts = {
        **{key: kept[key] for key in ("classes", "labels", "encoder", "steps", "way")},
        "method": "distilled",
        "signature": kept["signature"] + DISTILLED,
        "distilled": {key: document[key] for key in ("images", "gain", "test")},
    }
    rundir.write_together(
        {
            bench.run.classifier: partial(
                save_module, module=classifier, metadata=read_metadata(bench.run.classifier)
            ),
            bench.run.classifier_json: partial(
                Path.write_text, data=rundir.json_text(facts), encoding="utf-8"
            ),
        }
    )
    if document["test"] is not None:
        before = rundir.read_json(bench.run.environment).get("distilling_tested", 0)
        environment.note(bench.run, distilling_tested=before + 2)  # it, and the one it came from
