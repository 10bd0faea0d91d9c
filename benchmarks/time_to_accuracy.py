"""How soon the accuracy is there that lightly's SimCLR reaches in 10 epochs on 10,000 images.

    python benchmarks/time_to_accuracy.py CIFAR [--seeds 2] [--rival tuned]

CIFAR: a folder with `train` and `test` of class folders; `data/subset.py` makes one of 10,000 and 2,000 images.
Same encoder (narrow ResNet, stem of stride 2, 32 px), same batch of 256, same images. Accuracy: 20 nearest neighbours,
training images as bank, test images as queries. "Documented": lightly's examples/pytorch/simclr.py as it is (SGD 0.06,
temperature 0.5, default transform, float32, 8 workers). "Tuned": the strengths of the views, temperature, optimizer, rate and
schedule of our recipe, the machine's best number type, channels last, both views in one forward, best number of workers.
Ours: the recipe `cifar10-cpu` with `--initial-scale 0.75`, from files, cache included; against each rival one run per seed, of a
length fixed beforehand: one that ends within the rival's time divided by the bar where both run as fast as in RESULTS.md.
Cost: seconds of training up to the first look (twice an epoch, not counted) whose accuracy is at least the rival's after its last
epoch; where no look is, the run counts as never arriving: ratio 0.
"""

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from lightly.data import LightlyDataset
from lightly.loss import NTXentLoss
from lightly.transforms import SimCLRTransform
from paired import parser, show
from torch.utils.data import DataLoader
from training import best_precision

from labelwise.config import PretrainSettings, read_recipe
from labelwise.images.cache import build_cache, channel_statistics
from labelwise.images.source import ImageSet, open_images
from labelwise.learning.memory import keep_freed_memory
from labelwise.learning.optimization import create_optimizer, set_rate, warmup_cosine
from labelwise.learning.precision import Precision
from labelwise.learning.simclr import Learner
from labelwise.measures.knn import knn_accuracy
from labelwise.models.encoder import Encoder, EncoderSpec, create_encoder
from labelwise.models.features import extract_features
from labelwise.models.heads import create_head
from labelwise.recipes import find_recipe
from labelwise.seeding import permutation
from labelwise.stages.planning import INITIAL_SHARE
from labelwise.views.draws import Policy
from labelwise.views.pipeline import make_views

CPU = torch.device("cpu")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
BATCH, THEIR_EPOCHS, LOOKS = 256, 10, 2  # looks an epoch
INITIAL_SCALE = 0.75
RIVALS = {"documented": (3.0, 5), "tuned": (1.5, 14)}  # the bar, and our epochs against it


def main() -> None:
    options = parser(__doc__)
    options.add_argument("images", type=Path)
    options.add_argument("--seeds", type=int, default=2)
    options.add_argument("--rival", choices=RIVALS, action="append", help="against this one only")
    options.add_argument("--side", help="run one side only, in this process")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--epochs", type=int, default=THEIR_EPOCHS)
    options.add_argument("--workers", type=int, default=8)
    given = options.parse_args()
    if given.side:
        run = ours if given.side == "ours" else functools.partial(theirs, given.side, given.workers)
        print(json.dumps(run(given.images, given.epochs, given.seed)))
        return
    figures = []
    for rival in given.rival or RIVALS:
        bar, epochs = RIVALS[rival]
        workers = 8 if rival == "documented" else fastest_workers(given.images)
        pairs = []
        for seed in range(given.seeds):
            sides = [(rival, THEIR_EPOCHS), ("ours", epochs)]
            found = {
                side: in_a_process(given.images, side, seed, length, workers)
                for side, length in (sides if seed % 2 == 0 else sides[::-1])
            }
            pairs.append((found["ours"], found[rival]))
            print(f"{rival}, seed {seed}: {found}", file=sys.stderr, flush=True)
        figures.append(figure(rival, bar, pairs))
    show(figures, given.json)


def figure(rival: str, bar: float, pairs: list[tuple[list, list]]) -> dict[str, object]:
    """Ratios of their seconds at the end to ours at the first look that is as good."""
    arrivals = [next((s for s, accuracy in mine if accuracy >= other[-1][1]), math.inf) for mine, other in pairs]  # fmt: skip
    ends = [other[-1][0] for _, other in pairs]
    ratios = np.array(ends) / np.array(arrivals)
    draws = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return {
        "name": f"time to lightly's accuracy after {THEIR_EPOCHS} epochs, {rival}, {len(pairs)} seeds",
        "ratio": float(np.median(ratios)), "low": float(low), "high": float(high),
        "control": 1.0, "bar": bar,
        "ours": float(np.median(arrivals)), "theirs": float(np.median(ends)),
    }  # fmt: skip


def in_a_process(images: Path, side: str, seed: int, epochs: int, workers: int) -> list[list[float]]:
    command = [sys.executable, __file__, str(images), "--side", side, "--seed", str(seed)]
    command += ["--epochs", str(epochs), "--workers", str(workers)]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "LABELWISE_CACHE": cache}
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    return json.loads(done.stdout)


def build(seed: int) -> tuple[Encoder, torch.nn.Module]:
    torch.manual_seed(seed)
    arguments = {"layers": [1, 1, 1, 1], "channels": [32, 64, 128, 256]}
    encoder = create_encoder(EncoderSpec("resnet18", arguments, "half", 32, *IMAGENET))
    return encoder, create_head("nonlinear", encoder.features)


def recipe(folder: Path) -> PretrainSettings:
    """Our settings."""
    return PretrainSettings.resolve(
        {"images": folder}, read_recipe(find_recipe("cifar10-cpu"), PretrainSettings)
    )


def ours(folder: Path, epochs: int, seed: int) -> list[list[float]]:
    """Seconds and accuracy at every look."""
    settings = recipe(folder)
    keep_freed_memory()
    looker = Looker(folder)
    encoder, head = build(seed)
    precision = best_precision()
    make_views(Policy(size=32, blur=0.0), torch.zeros(2, 32, 32, 3, dtype=torch.uint8), np.full((2, 2), 32, np.int32), np.arange(2, dtype=np.uint64), 0, 0)  # fmt: skip  # compiled
    started = time.perf_counter()
    images = open_images(folder)
    cache = build_cache(images, side=32, evaluation_size=32)
    pool = np.array([row for row, split in enumerate(images.splits) if split != "test"])
    normalization = channel_statistics(cache.squares, pool)
    precision.arrange(encoder)
    parts = [(module, settings.learning_rate) for module in (encoder, head)]
    optimizer = create_optimizer(settings.optimizer, parts, 1e-4)
    learner = Learner(encoder, head, optimizer, precision, CPU, settings.temperature, BATCH, False)
    policy = Policy(size=32, blur=0.0, crop_scale=settings.crop_scale, color_strength=settings.color_strength)
    small = dataclasses.replace(policy, size=round(INITIAL_SCALE * 32 / 4) * 4)
    per_epoch = len(pool) // BATCH
    found, step, looking = [], 0, 0.0
    for epoch in range(epochs):

        def make(rows, epoch=epoch):
            squares = torch.from_numpy(cache.squares[rows])
            now = small if epoch < math.floor(INITIAL_SHARE * epochs + 1e-9) else policy
            return make_views(
                now, squares, cache.sizes[rows], cache.keys[rows], seed, epoch, (0, 1), normalization
            )

        order = pool[permutation(seed, epoch, len(pool))]
        for batch in range(per_epoch):
            set_rate(optimizer, warmup_cosine(step, epochs * per_epoch, epochs * per_epoch // 10))
            learner.step(make, order[batch * BATCH : (batch + 1) * BATCH])
            step += 1
            if (batch + 1) % (per_epoch // LOOKS) == 0:
                now = time.perf_counter()
                found.append([now - started - looking, looker.accuracy(encoder, normalization)])
                looking += time.perf_counter() - now
    return found


def theirs(side: str, workers: int, folder: Path, epochs: int, seed: int) -> list[list[float]]:
    """Seconds and accuracy after the last epoch."""
    encoder, head = build(seed)
    looker = Looker(folder)
    parameters = [*encoder.parameters(), *head.parameters()]
    precision = best_precision()
    settings = recipe(folder)
    started = time.perf_counter()
    if side == "tuned":
        transform = SimCLRTransform(
            input_size=32,
            cj_strength=settings.color_strength,
            min_scale=settings.crop_scale[0],
            gaussian_blur=0.0,
        )
        criterion = NTXentLoss(temperature=settings.temperature)
        precision.arrange(encoder)
        optimizer = create_optimizer(
            settings.optimizer, [(each, settings.learning_rate) for each in (encoder, head)], 1e-4
        )
    else:
        transform, criterion = SimCLRTransform(input_size=32), NTXentLoss()
        optimizer = torch.optim.SGD(parameters, lr=0.06)
    dataset = LightlyDataset(str(folder / "train"), transform=transform)
    loader = DataLoader(dataset, BATCH, shuffle=True, drop_last=True, num_workers=workers)
    step, steps = 0, epochs * len(loader)
    for _ in range(epochs):
        for views, _, _ in loader:
            if side == "tuned":
                set_rate(optimizer, warmup_cosine(step, steps, steps // 10))
                loss = tuned_loss(encoder, head, criterion, precision, views)
            else:
                loss = criterion(head(encoder(views[0])), head(encoder(views[1])))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    return [[time.perf_counter() - started, looker.accuracy(encoder, IMAGENET)]]


def tuned_loss(encoder, head, criterion, precision: Precision, views) -> torch.Tensor:
    """lightly's loss with both views in one forward, in the number type and layout that are best here."""
    both = torch.cat(views).contiguous(memory_format=torch.channels_last)
    with precision.autocast(CPU):
        projections = head(encoder(both)).float()
    return criterion(*projections.chunk(2))


def fastest_workers(folder: Path) -> int:
    """Number of workers with which the tuned rival's epoch is shortest."""
    return min((0, 1, 2), key=lambda workers: in_a_process(folder, "tuned", 0, 1, workers)[-1][0])


class Looker:
    """Accuracy of nearest neighbours, on images decoded before any clock runs."""

    def __init__(self, folder: Path) -> None:
        self.images: ImageSet = open_images(folder)
        self.cache = build_cache(self.images, side=40, evaluation_size=32)  # not the cache that `ours` builds
        classes = sorted({str(label) for label in self.images.labels})
        self.labels = torch.tensor([classes.index(str(label)) for label in self.images.labels])
        is_test = np.array([split == "test" for split in self.images.splits])
        self.bank, self.queries = np.flatnonzero(~is_test), np.flatnonzero(is_test)

    def accuracy(self, encoder: Encoder, normalization) -> float:
        bank, queries = (
            extract_features(encoder, self.cache.evaluations, rows, normalization, CPU)
            for rows in (self.bank, self.queries)
        )
        return knn_accuracy(bank, self.labels[self.bank], queries, self.labels[self.queries])


if __name__ == "__main__":
    main()
