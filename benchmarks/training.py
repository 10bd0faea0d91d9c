"""Files to gradients: ours against lightly, as documented and tuned by us, and against a resident batch.

    python benchmarks/training.py CIFAR CLOTHING [--only 96 --rival tuned --pairs 10]

Same encoder (narrow ResNet at 32 px with batch 256, ResNet-18 at 96 px with batch 64), head, temperature,
operations and resolution. "Documented": float32, one forward per view, SGD, 8 workers, as in lightly's
examples/pytorch/simclr.py. "Tuned": bfloat16 where the processor has it, channels last, both views in one forward,
fused AdamW, best number of workers; ours takes the same number type and layout. Each measurement is a process of its own. Cost: seconds per image, after as many warm-up steps as
workers need to fill their queues. "Resident": the same step on views that lie ready; its ratio is the share of
that speed we keep.
"""

import functools
import json
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
from paired import compare_all, parser, show
from pipeline import NORMALIZATION, link_some
from torch.utils.data import DataLoader, RandomSampler

from labelwise.images.cache import build_cache
from labelwise.images.source import open_images
from labelwise.learning.memory import keep_freed_memory
from labelwise.learning.optimization import create_optimizer
from labelwise.learning.precision import Precision, has_fast_bf16
from labelwise.learning.simclr import Learner
from labelwise.models.encoder import EncoderSpec, create_encoder
from labelwise.models.heads import create_head
from labelwise.views.draws import Policy
from labelwise.views.pipeline import make_views

NARROW = {"layers": [1, 1, 1, 1], "channels": [32, 64, 128, 256]}
CASES = {
    32: {"arguments": NARROW, "stem": "small", "side": 32, "blur": 0.0, "batch": 256, "bars": {"documented": 2.6, "tuned": 1.1, "resident": 0.93}},
    96: {"arguments": {}, "stem": "stock", "side": 120, "blur": 0.5, "batch": 64, "bars": {"documented": 2.3, "tuned": 1.2, "resident": 0.93}},
}  # fmt: skip
RIVALS = ("documented", "tuned", "resident")
WARM, STEPS = 4, 6
AHEAD = 2  # batches a worker prepares ahead, torch's default
TEMPERATURE = 0.2


def main() -> None:
    options = parser(__doc__)
    options.add_argument("cifar", type=Path)
    options.add_argument("photographs", type=Path)
    options.add_argument("--pairs", type=int, default=3)
    options.add_argument("--only", type=int, choices=CASES, action="append", help="this size only")
    options.add_argument("--rival", choices=RIVALS, action="append", help="against this one only")
    options.add_argument("--side", help="measure one side only, in this process")
    options.add_argument("--size", type=int)
    given = options.parse_args()
    if given.side:
        folder = given.cifar if given.size == 32 else given.photographs
        print(json.dumps(SIDES[given.side](folder, given.size)))
        return
    figures = []
    for size in given.only or CASES:
        case = CASES[size]
        with tempfile.TemporaryDirectory() as folder:
            count = case["batch"] * (WARM + STEPS)
            images = link_some(given.cifar if size == 32 else given.photographs, Path(folder), count)
            measure = functools.partial(in_a_process, images, size)
            ours = functools.partial(measure, "ours")
            rivals = {}
            for rival in given.rival or RIVALS:
                side = rival if rival != "tuned" else min(("tuned-0", "tuned-1", "tuned-2"), key=measure)
                rivals[f"{size} px against {side}"] = (functools.partial(measure, side), case["bars"][rival])
            figures += compare_all(ours, rivals, given.pairs, controls=2)
    show(figures, given.json)


def in_a_process(folder: Path, size: int, side: str) -> float:
    command = [sys.executable, __file__, str(folder), str(folder), "--side", side, "--size", str(size)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def best_precision() -> Precision:
    """bfloat16 where the processor computes in it, and channels last."""
    return Precision("bf16" if has_fast_bf16(torch.device("cpu")) else "fp32", "channels_last", "")


def build(size: int):
    torch.manual_seed(0)
    spec = EncoderSpec("resnet18", CASES[size]["arguments"], CASES[size]["stem"], size, *NORMALIZATION)
    encoder = create_encoder(spec)
    return encoder, create_head("nonlinear", encoder.features)


def ours(folder: Path, size: int, resident: bool = False) -> float:
    keep_freed_memory()
    case = CASES[size]
    images = open_images(folder)
    cache = build_cache(images, side=case["side"], evaluation_size=size)
    policy = Policy(size=size, blur=case["blur"])
    encoder, head = build(size)
    precision = best_precision()
    precision.arrange(encoder)
    optimizer = create_optimizer("adamw", [(encoder, 1e-3), (head, 1e-3)], 1e-4)
    learner = Learner(
        encoder, head, optimizer, precision, torch.device("cpu"), TEMPERATURE, case["batch"], False
    )

    def make(rows):
        squares = torch.from_numpy(cache.squares[rows])
        return make_views(policy, squares, cache.sizes[rows], cache.keys[rows], 0, 0, (0, 1), NORMALIZATION)

    order = np.random.default_rng(0).permutation(len(images.names)).reshape(-1, case["batch"])
    lying_ready = make(order[0])
    started = 0.0
    for step, rows in enumerate(order):
        if step == WARM:
            started = time.perf_counter()
        learner.step((lambda rows: lying_ready) if resident else make, rows)
    return (time.perf_counter() - started) / (STEPS * case["batch"])


def lightly(folder: Path, size: int, workers: int, tuned: bool) -> float:
    case = CASES[size]
    dataset = LightlyDataset(str(folder), SimCLRTransform(input_size=size, gaussian_blur=case["blur"]))
    steps = WARM + STEPS + AHEAD * workers  # workers that ran out of images would leave the last steps alone
    sampler = RandomSampler(dataset, replacement=True, num_samples=steps * case["batch"])
    loader = DataLoader(
        dataset,
        case["batch"],
        sampler=sampler,
        num_workers=workers,
        prefetch_factor=AHEAD if workers else None,
    )
    encoder, head = build(size)
    criterion = NTXentLoss(temperature=TEMPERATURE)
    parameters = [*encoder.parameters(), *head.parameters()]
    if tuned:
        encoder.to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    else:
        optimizer = torch.optim.SGD(parameters, lr=0.06)
    started = 0.0
    for step, (views, _, _) in enumerate(loader):
        if step == WARM:
            started = time.perf_counter()
        if tuned:
            both = torch.cat(views).contiguous(memory_format=torch.channels_last)
            with best_precision().autocast(torch.device("cpu")):
                projections = head(encoder(both)).float()
            loss = criterion(*projections.chunk(2))
        else:
            loss = criterion(head(encoder(views[0])), head(encoder(views[1])))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == WARM + STEPS - 1:
            break
    return (time.perf_counter() - started) / (STEPS * case["batch"])


SIDES = {
    "ours": ours,
    "resident": functools.partial(ours, resident=True),
    "documented": functools.partial(lightly, workers=8, tuned=False),
    "tuned-0": functools.partial(lightly, workers=0, tuned=True),
    "tuned-1": functools.partial(lightly, workers=1, tuned=True),
    "tuned-2": functools.partial(lightly, workers=2, tuned=True),
}

if __name__ == "__main__":
    main()
