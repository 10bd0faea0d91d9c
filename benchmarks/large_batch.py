"""Batch 2,048 in passes of 128: memory and time of the exact gradient on a small device.

    python benchmarks/large_batch.py

The narrow ResNet at 32 px, bfloat16 where the processor has it. Memory: peak of a process that takes steps of batch 2,048 in passes of
128, against one that takes plain steps of 128; the bar is 1 / 1.3. Time: a step in passes against the same
step in one piece; the bar is 1 / 1.45. Each measurement is a process of its own.
"""

import argparse
import functools
import json
import resource
import statistics
import subprocess
import sys
import time

import numpy as np
import torch
from paired import compare_all, parser, show
from training import best_precision

from labelwise.learning.memory import keep_freed_memory
from labelwise.learning.optimization import create_optimizer
from labelwise.learning.simclr import Learner
from labelwise.models.encoder import EncoderSpec, create_encoder
from labelwise.models.heads import create_head
from labelwise.views.draws import Policy
from labelwise.views.pipeline import make_views

NORMALIZATION = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
BATCH, PART = 2048, 128
NARROW = {"layers": [1, 1, 1, 1], "channels": [32, 64, 128, 256]}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    options.add_argument("--part", type=int, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.batch:
        print(json.dumps(measure(given.batch, given.part)))
        return
    peaks: dict[tuple[int, int], list[float]] = {}

    def seconds(batch: int, part: int) -> float:
        found = in_a_process(batch, part)
        peaks.setdefault((batch, part), []).append(found["bytes"])
        return found["seconds"]

    cut, whole, small = ((BATCH, PART), (BATCH, BATCH), (PART, PART))
    rivals = {"a step of 2,048 in passes of 128 against one piece": (functools.partial(seconds, *whole), 1 / 1.45),
              "a step of 128 (for its memory)": (functools.partial(seconds, *small), 0.0)}  # fmt: skip
    step_figure = compare_all(functools.partial(seconds, *cut), rivals, pairs=3, controls=1)[0]
    memory = sorted(few / many for few, many in zip(peaks[small], peaks[cut], strict=False))
    memory_figure = {
        "name": "peak memory against steps of 128", "ratio": statistics.median(memory), "low": memory[0], "high": memory[-1],
        "control": 1.0, "bar": 1 / 1.3, "ours": statistics.median(peaks[cut]), "theirs": statistics.median(peaks[small]),
    }  # fmt: skip
    show([memory_figure, step_figure], given.json)


def measure(batch: int, part: int) -> dict[str, float]:
    keep_freed_memory()
    torch.manual_seed(0)
    encoder = create_encoder(EncoderSpec("resnet18", NARROW, "small", 32, *NORMALIZATION))
    head = create_head("nonlinear", encoder.features)
    precision = best_precision()
    precision.arrange(encoder)
    optimizer = create_optimizer("adamw", [(encoder, 1e-3), (head, 1e-3)], 1e-4)
    learner = Learner(encoder, head, optimizer, precision, torch.device("cpu"), 0.2, part, False)
    squares = np.random.default_rng(0).integers(0, 255, (2048, 32, 32, 3), dtype=np.uint8)
    sizes, keys = np.full((2048, 2), 32, np.int32), np.arange(1, 2049, dtype=np.uint64)

    def make(rows):
        chosen = torch.from_numpy(squares[rows])
        return make_views(
            Policy(size=32, blur=0.0), chosen, sizes[rows], keys[rows], 0, 0, (0, 1), NORMALIZATION
        )

    members = np.arange(batch)
    learner.step(make, members)
    start = time.perf_counter()
    learner.step(make, members)
    seconds = time.perf_counter() - start
    return {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0, "seconds": seconds}


def in_a_process(batch: int, part: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--batch", str(batch), "--part", str(part)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


if __name__ == "__main__":
    main()
