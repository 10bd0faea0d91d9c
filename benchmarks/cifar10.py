"""From 10,000 CIFAR-10 images to a verdict: what the recipe `cifar10-cpu` is worth.

    python benchmarks/cifar10.py cifar10.zip --work /tmp/cifar-bench            # the first 10,000 images
    python benchmarks/cifar10.py cifar10.zip --work /tmp/cifar-bench --part 1   # another 10,000
    python benchmarks/cifar10.py cifar10.zip --work /tmp/cifar-bench --time-limit 20m   # an option of pretrain

Takes a subset, runs the real commands (an option it does not know goes to `labelwise pretrain`), and prints the
accuracy of 20 nearest neighbours (pool as bank, test images as queries), the table of methods, and the time that
pretraining took.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from labelwise import rundir
from labelwise.images.cache import build_cache
from labelwise.images.source import open_images
from labelwise.images.splits import pool_indices
from labelwise.measures.knn import knn_accuracy
from labelwise.models.features import extract_features
from labelwise.models.weights import load_encoder

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="cifar10.zip, or a folder with train/CLASS and test/CLASS")
    parser.add_argument("--work", type=Path, required=True, help="folder for images and runs")
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--label-counts", default="100,1000")
    parser.add_argument("--json", action="store_true")
    given, more = parser.parse_known_args()

    images, run = given.work / f"images-{given.part}", given.work / f"run-{given.part}"
    if not images.exists():
        counts = ["--train", "10000", "--test", "2000", "--part", str(given.part)]
        call(str(ROOT / "data" / "subset.py"), str(given.source), str(images), *counts)
    started = time.monotonic()
    pretraining = ["--recipe", "cifar10-cpu", "--out", str(run), *more]
    call("-m", "labelwise", "pretrain", str(images), *pretraining)
    seconds = time.monotonic() - started
    neighbours = test_knn(run)
    comparison = ["--run", str(run), "--recipe", "cifar10-cpu", "--label-counts", given.label_counts]
    call("-m", "labelwise", "finetune", *comparison)
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    figures = {"pretrain_seconds": round(seconds), "knn": neighbours, "summary": report["summary"]}
    if given.json:
        print(json.dumps(figures, indent=2))
    else:
        print(f"pretraining {seconds / 60:.1f} min, nearest neighbours {neighbours:.4f}")


def call(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True, stdout=sys.stderr)


def test_knn(path: Path) -> float:
    """Accuracy of the test images' 20 nearest neighbours in the pool."""
    run = rundir.open_run(path)
    encoder, spec = load_encoder(run.path)
    data = rundir.read_json(run.data)
    images = open_images(Path(data["root"]))
    cache = build_cache(images, side=data["cache_side"], evaluation_size=spec.image_size)
    lock = rundir.read_json(run.test_lock)
    classes = sorted({str(label) for label in images.labels})
    labels = torch.tensor([classes.index(str(label)) for label in images.labels])
    place = {name: row for row, name in enumerate(images.names)}
    test = np.array([place[name] for name in lock["names"]])
    pool = pool_indices(images, cache.readable, lock)
    normalization = (spec.mean, spec.std)
    device = torch.device("cpu")
    bank, queries = (
        extract_features(encoder, cache.evaluations, rows, normalization, device) for rows in (pool, test)
    )
    return knn_accuracy(bank, labels[pool], queries, labels[test])


if __name__ == "__main__":
    main()
