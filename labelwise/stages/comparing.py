"""`labelwise finetune`: the same few labels for every method, many times over, and who wins.

For every number of labels and every random draw of that many: a linear probe on frozen features, the
whole network from the pretrained weights, the same network from random weights, random features and
plain pixels. Probes come first, so that a first verdict shows within a minute.
"""

import json
import math
import time
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from labelwise import environment, rundir, terminal
from labelwise.config import FinetuneSettings, parse_duration, read_run_config, to_toml
from labelwise.errors import DataError, Interrupted, LabelwiseError, UsageError
from labelwise.images.splits import hash_names
from labelwise.interruption import stop_between_steps
from labelwise.learning.optimization import Diverged
from labelwise.learning.precision import count_devices
from labelwise.learning.workers import side_by_side
from labelwise.measures.linear import accuracy, macro_accuracy, one_of_each
from labelwise.measures.statistics import FEWEST_DRAWS
from labelwise.models.weights import save_module
from labelwise.ownership import hold
from labelwise.predictions import keep_predictions, read_predictions, store_predictions
from labelwise.reports import text
from labelwise.rundir import RunDirectory
from labelwise.stages.alternatives import Alternative, add_alternative, find_alternatives
from labelwise.stages.benching import remember_sources, set_up_bench
from labelwise.stages.calibrating import calibrate, steps_to_calibrate
from labelwise.stages.checking import check_labels, check_lookalikes
from labelwise.stages.classifier import Floats, Rows, read_calibration
from labelwise.stages.dealing import Dealer
from labelwise.stages.drawing import (
    Job,
    announce_labels,
    draw_orders,
    draws_of,
    label_counts,
    series_of,
)
from labelwise.stages.encoders import sign
from labelwise.stages.methods import (
    STOPPED,
    TRIES,
    Bench,
    is_trained,
    refit,
    run_method,
    steps_of,
    tested_in,
    time_a_step,
    workers_for,
)
from labelwise.stages.scoring import classifier_of

_LONG = 1800.0  # seconds


def compare(settings: FinetuneSettings) -> RunDirectory:
    """Train and compare classifiers on few labels; interrupted, the same call goes on.

    Raises:
        DataError: There are no labels, one class, or no test images.
        UsageError: Another command is working on this run, or a setting does not fit it.
        LabelwiseError: Trainings diverged; every other classifier is kept.
        Interrupted: A signal came; every finished classifier is kept.
    """
    started = time.monotonic()
    devices = count_devices(settings.devices, settings.device)
    run = rundir.open_run(settings.run)
    terminal.say(f"run        {run.path}")
    with hold(run):
        try:
            diverged = _compare(run, remember_sources(run, settings), devices)
        except Interrupted:
            environment.finish(run, time.monotonic() - started)
            raise
        environment.finish(run, time.monotonic() - started)
    if diverged:
        raise LabelwiseError(
            f"{run.path}: {len(diverged):,} classifiers diverge, first {diverged[0]}; the others are kept, `labelwise report` shows them. Lower "
            "--scratch-rate if it is supervised (which compares anew), else leave the method out with --methods."
        )
    return run


def _compare(run: RunDirectory, settings: FinetuneSettings, devices: int) -> list[str]:
    """Train whatever is not there yet, probes first, then draw by draw, and keep each result once it is done.

    Returns:
        Which trainings diverged, in words.
    """
    pace = _Pace(settings.time_limit)
    bench = set_up_bench(run, settings)
    counts = label_counts(settings, bench)
    alternatives = find_alternatives(settings.methods, bench.spec)
    finished = _finished(bench, alternatives)
    orders = draw_orders(bench, counts.keys(), finished)
    draws = {count: draws_of(bench, count) for count in counts}
    jobs = [
        (method, count, draw)
        for method in _methods_in_order(settings.methods, alternatives)
        for count in counts
        for draw in range(draws[count])
    ]
    jobs = _with_weights(bench, alternatives, jobs, finished)
    done = [job for job in jobs if job in finished]
    _announce(bench, list(counts), len(jobs), len(done))
    environment.note(
        run, comparison={"methods": sorted({method for method, _, _ in jobs}), "draws": draws}, diverged=[]
    )
    costs = {job: steps_of(job[0], bench, bench.labeled[orders[job[2]][: job[1]]]) for job in jobs}

    waiting_steps = [costs[job] for job in jobs if job not in finished and is_trained(job[0], bench)]
    if waiting_steps:
        steps = steps_in_a_row(waiting_steps, 1 if bench.device.type == "cpu" else devices)
        if "simclr" in settings.methods and not _is_kept(bench, signature_of(bench)):
            steps += steps_of("simclr", bench, bench.labeled) + steps_to_calibrate(
                bench
            )  # the one that is kept
        _say_how_long(steps * time_a_step(bench), settings)

    def train(job: Job) -> tuple[Floats, dict[str, Any]] | None:
        """Train one classifier, unless the time for it is over."""
        bench.stop.check(STOPPED)
        method, count, draw = job
        if not pace.has_time_for(method, costs[job]):
            return None
        clock = time.monotonic()
        try:
            rows = bench.labeled[orders[draw][:count]]
            if dealer and is_trained(method, bench):
                probabilities, chosen, tries = dealer.run(method, rows, draw)
            else:
                probabilities, chosen, tries = run_method(method, bench, rows, draw)
        except Diverged as error:
            diverged[job] = str(error)
            return None
        seconds = time.monotonic() - clock
        if is_trained(method, bench):  # the first probe also computes features
            pace.note(method, costs[job], seconds)
        source = alternatives[method].source if method in alternatives else None
        return probabilities, {
            "seconds": round(seconds, 2),
            "chosen": chosen,
            "tries": tries,
            "weights": source,
            "frozen": not is_trained(method, bench),
        }

    diverged: dict[Job, str] = {}
    already, late = sum(costs[job] for job in done), 0
    with (
        Dealer(bench, settings, alternatives, devices)
        if devices > 1 and waiting_steps
        else nullcontext() as dealer,
        stop_between_steps() as bench.stop,
        terminal.track("comparing", sum(costs.values()), done=already, unit="steps") as bar,
    ):
        for part in _in_turn(bench, jobs):
            waiting = [job for job in part if job not in finished]
            methods = {method for method, _, _ in waiting}
            workers = min([len(part), *(workers_for(method, bench) for method in methods)])
            if dealer and part and is_trained(part[0][0], bench):
                workers = devices
            left = Counter((method, count) for method, count, _ in waiting)
            with closing(side_by_side(train, waiting, workers)) as results:
                for job, outcome in results:
                    if outcome is None:
                        late += 1
                        continue
                    method, count, draw = job
                    rows = bench.labeled[orders[draw][:count]]
                    _store(bench, method, rows, draw, counts[count], *outcome)
                    bar.advance(costs[job])
                    left[method, count] -= 1
                    if not left[method, count]:
                        bar.note(_line(bench, method, count))
        late -= len(diverged)
        if "simclr" in settings.methods and not late:
            _keep_classifier(bench)
    if late:
        terminal.warn(
            f"--time-limit {settings.time_limit}: {late} of {len(jobs)} classifiers are left; the same command goes on."
            + (
                ""
                if run.classifier.exists() or "simclr" not in settings.methods
                else " None is kept for `predict` before all are there."
            )
        )
    if {"simclr", "simclr_probe"} & set(settings.methods):
        check_labels(bench, signature_of(bench))
        check_lookalikes(bench, signature_of(bench))
    _write_settings(run, settings)
    lost = [dict(zip(("method", "labels", "draw"), job, strict=True)) for job in sorted(diverged)]
    environment.note(run, diverged=lost)
    return [
        f"{method} with {count:,} labels, draw {draw} ({diverged[method, count, draw]})"
        for method, count, draw in sorted(diverged)
    ]


class _Pace:
    """How long each method takes a step, to tell whether another classifier fits into a time limit."""

    def __init__(self, time_limit: str | None) -> None:
        limit = parse_duration(time_limit) if time_limit else math.inf
        self.deadline = time.monotonic() + limit
        self.spent: dict[str, tuple[float, int]] = {}

    def note(self, method: str, steps: int, seconds: float) -> None:
        """Learn from a classifier that is done."""
        before = self.spent.get(method, (0.0, 0))
        self.spent[method] = before[0] + seconds, before[1] + steps

    def has_time_for(self, method: str, steps: int) -> bool:
        """Whether so many steps would be done in time; the first of a method only has to begin in time."""
        seconds, done = self.spent.get(method, (0.0, 1))
        return time.monotonic() + steps * seconds / done <= self.deadline


def _methods_in_order(methods: Sequence[str], alternatives: Collection[str]) -> list[str]:
    """Cheap methods first."""
    order = ["simclr_probe", "pixels", "random_probe", *alternatives, "simclr", "supervised"]
    return [method for method in order if method in methods or method in alternatives]


def _in_turn(bench: Bench, jobs: list[Job]) -> list[list[Job]]:
    """Probes, then what is trained, all of one draw before the next: whenever it is stopped, methods can be compared."""
    probes = [job for job in jobs if not is_trained(job[0], bench)]
    trained = sorted((job for job in jobs if is_trained(job[0], bench)), key=lambda job: (job[2], job[1]))
    return [part for part in (probes, trained) if part]


def _with_weights(
    bench: Bench, alternatives: dict[str, Alternative], jobs: list[Job], finished: Collection[Job]
) -> list[Job]:
    """Load the weights of others and compute their features, where they are still asked for; leave out what cannot be had."""
    for method, alternative in alternatives.items():
        if any(job[0] == method and job not in finished for job in jobs):
            try:
                add_alternative(bench, method, alternative)
            except (DataError, UsageError) as error:
                terminal.warn(f"{method} is left out: {error}")
                jobs = [job for job in jobs if job[0] != method]
    if not jobs:
        raise DataError(f"{bench.run.path}: no method is left to compare; name others with --methods.")
    return jobs


def _known(bench: Bench) -> Rows:
    """Rows that have a label and take part."""
    return bench.labeled if bench.folds else np.concatenate([bench.labeled, bench.test])


def signature_of(bench: Bench) -> str:
    """Hash of what decides a result besides method, number of labels and draw: settings, labels, pixels, groups, encoder."""
    deciding = {"seed", "batch_size", "crop_scale", "steps", "scratch_steps", "scratch_rate"}
    settings = bench.settings.model_dump(mode="json", include=deciding)
    rows = _known(bench)
    known = [f"{bench.names[row]}={bench.classes[bench.labels[row]]}={bench.cache.keys[row]}" for row in rows]
    group, _ = one_of_each(bench.groups[rows], bench.labels[rows])
    special = [] if len(np.unique(group)) == len(group) else [f"groups={group.tolist()}"]
    special += [f"folds={bench.folds}"] if bench.folds else []
    special += [f"suggested={bench.names[row]}" for each in bench.suggested for row in each]
    special += [f"tries={TRIES}"]
    deciders = [*(f"{key}={value}" for key, value in sorted(settings.items())), *known, *special]
    return sign(hash_names(deciders)[:16], bench.run)


def _finished(bench: Bench, alternatives: dict[str, Alternative]) -> set[Job]:
    """Results that are there already, with their predictions; those made with other settings, labels or another encoder are set aside.

    Those of other weights under a name that is used now are dropped.
    """
    rows = set_aside(bench.run, signature_of(bench))
    predictions = read_predictions(bench.run.predictions, ("method", "labels", "draw"))
    predicted = set(zip(*predictions.values(), strict=True))
    kept = [
        row
        for row in rows
        if row["method"] not in alternatives or row.get("weights") == alternatives[row["method"]].source
    ]
    if len(kept) < len(rows):
        other = ", ".join(sorted({row["method"] for row in rows if row not in kept}))
        terminal.warn(f"earlier results of {other} came from other weights and are dropped.")
        rundir.rewrite_jsonl(bench.run.results, kept)
        keep_predictions(bench.run.predictions, {classifier_of(row) for row in kept})
    return {classifier_of(row) for row in kept} & predicted


def set_aside(run: RunDirectory, signature: str) -> list[dict[str, Any]]:
    """Move results that were made with other settings, labels or another encoder aside, and those of these settings back; give these."""
    here, rows = run.results.parent, rundir.read_jsonl(run.results)
    if any(row["signature"] != signature for row in rows):
        aside = here / rows[0]["signature"]
        _move_results(run, here, aside)
        terminal.warn(
            f"earlier results were made with other settings or labels, or another encoder; they now lie in {aside}."
        )
        rows = []
    if not rows:
        _move_results(run, here / signature, here)  # of these settings, from before the others
        rows = rundir.read_jsonl(run.results)
    return rows


def _move_results(run: RunDirectory, source: Path, target: Path) -> None:
    """Move predictions, then the results that rest on them, from one folder to another, if there are any."""
    for file in (run.label_check.name, run.lookalikes.name, run.predictions.name, run.results.name):
        if (source / file).exists():
            target.mkdir(exist_ok=True)
            (source / file).replace(target / file)


def _store(
    bench: Bench,
    method: str,
    rows: Rows,
    draw: int,
    fraction: float,
    probabilities: Floats,
    facts: dict[str, Any],
) -> None:
    """Keep predictions first, then the result: a result on disk always has its predictions."""
    test, known = tested_in(bench, draw), _known(bench)
    numbers, _ = one_of_each(bench.groups[known], bench.labels[known])  # more unlabeled images change nothing
    group = dict(zip(known.tolist(), numbers.tolist(), strict=True))
    truth, predicted = bench.labels[test], probabilities.argmax(axis=1)
    store_predictions(
        bench.run.predictions,
        method,
        draw,
        len(rows),
        names=[bench.names[row] for row in test],
        truth=[bench.classes[label] for label in truth],
        groups=[group[row] for row in test.tolist()],
        predicted=[bench.classes[label] for label in predicted],
        probabilities=probabilities,
    )
    result = {
        "method": method,
        "fraction": fraction,
        "labels": len(rows),
        "draw": draw,
        "seed": bench.settings.seed,
        "n_test": len(truth),
        **series_of(bench, rows),
        "test_method": bench.test_method,
        "folds": bench.folds,
        "accuracy": accuracy(predicted, truth),
        "macro_accuracy": macro_accuracy(predicted, truth),
        "per_class": {
            bench.classes[index]: float((predicted[truth == index] == index).mean())
            for index in np.unique(truth)
        },
        "untested": [
            bench.classes[index]
            for index in np.setdiff1d(range(len(bench.classes)), bench.labels[bench.test])
        ],
        "balanced": not bench.unbalanced,
        **facts,
        "draw_sha256": hash_names([bench.names[row] for row in rows]),
        "signature": signature_of(bench),
    }
    others = [
        old for old in rundir.read_jsonl(bench.run.results) if classifier_of(old) != classifier_of(result)
    ]
    rundir.rewrite_jsonl(bench.run.results, [*others, result])


def _line(bench: Bench, method: str, count: int) -> str:
    """One method at one number of labels, in one line."""
    rows = [
        row
        for row in rundir.read_jsonl(bench.run.results)
        if (row["method"], row["labels"]) == (method, count)
    ]
    scores, what = [row["accuracy"] for row in rows], text.draw_in_words(rows[0])
    drawn = f" over {len(scores)} {what}s" if len(scores) > 1 else f", one {what}"
    spread = f", standard deviation {100 * np.std(scores, ddof=1):.1f} points" if len(scores) > 1 else ""
    return f"{count:>6,} labels  {method:<13} {np.mean(scores):.1%}{drawn}{spread}"


def _announce(bench: Bench, counts: Sequence[int], jobs: int, done: int) -> None:
    terminal.say(
        f"classes    {len(bench.classes)}"
        + (", unbalanced: weighed by size, macro accuracy beside accuracy" if bench.unbalanced else "")
    )
    announce_labels(bench, counts)
    test = np.unique(np.concatenate([tested_in(bench, draw) for draw in range(bench.settings.draws)]))
    tested, independent = len(test), len(np.unique(bench.groups[test]))
    share = 1.96 * math.sqrt(0.25 / independent)
    grouped = f" in {independent:,} groups" if independent < tested else ""
    turn = f", labeled ones in turn: no test set, {bench.folds} folds" if bench.folds else ""
    terminal.say(
        f"test       {tested:,} images{grouped}{turn}; they alone leave up to \u00b1{100 * share:.1f} points"
    )
    if bench.settings.draws < FEWEST_DRAWS:
        terminal.say(f"           fewer than {FEWEST_DRAWS} draws: nothing will be claimed (--draws 5)")
    if done:
        terminal.say(f"going on   {done} of {jobs} classifiers are there already")


def steps_in_a_row(costs: Sequence[int], devices: int) -> float:
    """Steps that the busiest of so many devices takes at least; processes on one CPU share it, so that they count as one."""
    return max(*costs, sum(costs) / devices)


def _say_how_long(seconds: float, settings: FinetuneSettings) -> None:
    if settings.time_limit is not None:
        limit = f"; --time-limit {settings.time_limit} compares what fits, draw by draw, each classifier that was begun to its end"
        limit = limit if seconds > parse_duration(settings.time_limit) else ""
    else:
        limit = "" if seconds < _LONG else "; --time-limit 30m compares what fits"
    terminal.say(f"time       about {terminal.duration(seconds)}{limit}")


def _keep_classifier(bench: Bench) -> None:
    """Save the classifier trained on every label outside the test set, what it takes to use it, and how far to believe it."""
    signature = signature_of(bench)
    is_there = _is_kept(bench, signature) or _train_to_keep(bench, signature)
    if is_there and read_calibration(bench.run) is None:
        calibrate(bench, signature)


def _is_kept(bench: Bench, signature: str) -> bool:
    """Whether the classifier to keep is there."""
    before = rundir.read_derived(bench.run.classifier_json)
    return before is not None and before["signature"] == signature and bench.run.classifier.exists()


def _train_to_keep(bench: Bench, signature: str) -> bool:
    """Train and save the classifier; False where its training diverges, which is said."""
    terminal.say(f"training the classifier to keep on all {len(bench.labeled):,} labels")
    try:
        classifier, trial = refit(bench)
    except Diverged as error:
        terminal.warn(f"no classifier is kept, as its training diverges: {error}.")
        return False
    bench.run.classifier_json.unlink(
        missing_ok=True
    )  # its classes are not those of the weights that come now
    header = {**bench.spec.to_metadata(), "classes": json.dumps(bench.classes, ensure_ascii=False)}
    save_module(bench.run.classifier, classifier, header)
    facts = {
        "classes": bench.classes,
        "labels": len(bench.labeled),
        "encoder": bench.spec.to_metadata(),
        "method": "simclr",
        "steps": trial.steps,
        "way": trial.name,
        "signature": signature,
    }
    rundir.write_json(bench.run.classifier_json, facts)
    return True


def _write_settings(run: RunDirectory, settings: FinetuneSettings) -> None:
    resolved = settings.model_dump(
        mode="json", exclude={"run", "time_limit", "pretrain_seeds"}, exclude_none=True
    )
    rundir.write_text(run.config, to_toml({"pretrain": read_run_config(run.config), "finetune": resolved}))
