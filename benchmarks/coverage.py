"""Whether sets of classes hold what they promise, and confidence means what it says, on the test images of a run, over many label draws.

    python benchmarks/coverage.py RUN --labels 200 --draws 20              # frozen network: seconds a draw
    python benchmarks/coverage.py RUN --labels 200 --draws 3 --trained     # the whole network, as `finetune` trains it

Every draw is calibrated as the kept classifier is, on its own labels only. Means over draws and, in brackets, standard deviations.
"""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import torch

from labelwise.config import FinetuneSettings
from labelwise.images.splits import draw_labels
from labelwise.measures.calibration import calibration_error, fit_temperature, quantile_of_next
from labelwise.models.features import extract_features
from labelwise.rundir import open_run
from labelwise.stages.benching import remember_sources, set_up_bench
from labelwise.stages.calibrating import FEWEST_SCORED, _cut, _nonconformity, _score_out_of_fold
from labelwise.stages.classifier import chances_of
from labelwise.stages.methods import Bench, train_pretrained, trials_to_keep
from labelwise.stages.oracle import COVERAGE


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("run", type=Path)
    options.add_argument("--labels", type=int, default=200)
    options.add_argument("--draws", type=int, default=20)
    options.add_argument("--trained", action="store_true", help="train the whole network")
    given = options.parse_args()
    run = open_run(given.run)
    bench = set_up_bench(run, remember_sources(run, FinetuneSettings.resolve({"run": run.path})))
    names = [bench.names[row] for row in bench.labeled]
    labels = [bench.classes[bench.labels[row]] for row in bench.labeled]
    found: dict[str, list[float]] = {}
    for draw in range(given.draws):
        rows = bench.labeled[draw_labels(names, labels, draw, 0)[: given.labels]]
        few = dataclasses.replace(bench, labeled=rows, unbalanced=False)
        for name, value in measure(few, trained=given.trained).items():
            found.setdefault(name, []).append(value)
    for name, values in found.items():
        print(f"{name:<28} {np.mean(values):.3f} ({np.std(values, ddof=1):.3f})", flush=True)


def measure(bench: Bench, *, trained: bool) -> dict[str, float]:
    """Calibrate on the labels of a bench, and see on its test images what came of it."""
    trial = next(each for each in trials_to_keep(bench) if (each.steps > 0) is trained)
    rows, seed = bench.labeled, bench.settings.seed
    logits = _score_out_of_fold(bench, trial, _cut(bench))
    is_scored = ~np.isnan(logits[:, 0])
    temperature = 1.0
    if is_scored.sum() >= FEWEST_SCORED:
        temperature = fit_temperature(logits[is_scored].astype(float), bench.labels[rows][is_scored])
    limit = quantile_of_next(np.array(_nonconformity(bench, logits, temperature)), COVERAGE)
    classifier = train_pretrained("simclr", bench, trial, rows, seed)
    scores = extract_features(
        classifier, bench.cache.evaluations, bench.test, bench.spec.normalization, bench.device
    )
    truth, place = bench.labels[bench.test], np.arange(len(bench.test))
    raw, chances = chances_of(scores), chances_of(torch.div(scores, temperature))
    right = (chances.argmax(axis=1) == truth).astype(float)
    is_in = 1 - chances <= limit
    single = is_in.sum(axis=1) == 1
    return {
        "accuracy": float(right.mean()),
        "temperature": temperature,
        "calibration error, before": calibration_error(raw.max(axis=1), right),
        "calibration error, after": calibration_error(chances.max(axis=1), right),
        f"coverage of {COVERAGE:.0%} sets": float(is_in[place, truth].mean()),
        "classes in a set": float(is_in.sum(axis=1).mean()),
        "share of single classes": float(single.mean()),
        "right where single": float(right[single].mean()) if single.any() else np.nan,
    }


if __name__ == "__main__":
    main()
