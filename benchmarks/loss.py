"""NT-Xent at 16,384 images: extra memory of ours, its error; and at 4,096 its time against the whole matrix.

    python benchmarks/loss.py

Cost of the memory figure: bytes at the peak of forward and backward, above what lay there before, each in a
process of its own; the limit is 300 MB. Error: largest difference from float64, relative to the loss and to
the largest gradient; the limit is 1e-5. The whole matrix of 16,384 images, with its copies, takes more than 20 GB: where
it was tried the system ended the process.
"""

import argparse
import functools
import json
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from paired import compare, parser, show

from labelwise.learning.contrast import nt_xent
from labelwise.learning.memory import keep_freed_memory

BATCH, DENSE_BATCH, WIDTH, TEMPERATURE = 16_384, 4_096, 128, 0.2
MEMORY_LIMIT, ERROR_LIMIT = 300e6, 1e-5


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--side", help=argparse.SUPPRESS)
    options.add_argument("--batch", type=int, default=BATCH, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.side:
        print(json.dumps(measure(given.side, given.batch)))
        return
    extra = functools.partial(in_a_process, "ours", "bytes", BATCH)
    took, took_dense = (
        functools.partial(in_a_process, side, "seconds", DENSE_BATCH) for side in ("ours", "dense")
    )
    figures = [
        compare("extra memory, limit 300 MB", extra, lambda: MEMORY_LIMIT, 1.0, pairs=2, controls=1),
        compare("time at 4,096 against the whole matrix", took, took_dense, 1.0, pairs=2, controls=1),
        compare("error, limit 1e-5", error, lambda: ERROR_LIMIT, 1.0, pairs=1, controls=1),
    ]
    show(figures, given.json)


def projections() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(BATCH, WIDTH, generator=generator)
    return torch.cat([first, first + torch.randn(BATCH, WIDTH, generator=generator)])


def dense(z: torch.Tensor, temperature: float) -> torch.Tensor:
    z = F.normalize(z, dim=1)
    similarity = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(similarity, torch.arange(len(z)).roll(len(z) // 2))


def measure(side: str, batch: int) -> dict[str, float]:
    keep_freed_memory()
    both = projections()
    z = torch.cat([both[:batch], both[BATCH : BATCH + batch]])
    del both
    nt_xent(z[:512].clone().requires_grad_(), TEMPERATURE).backward()  # libraries loaded
    z.requires_grad_()
    done = threading.Event()
    before, peak = resident(), 0.0

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, resident())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    (nt_xent if side == "ours" else dense)(z, TEMPERATURE).backward()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    return {"bytes": peak - before, "seconds": seconds}


def resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def in_a_process(side: str, key: str, batch: int) -> float:
    command = [sys.executable, __file__, "--side", side, "--batch", str(batch)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)[key]


@functools.cache
def error() -> float:
    """Against float64, worked out in closed form a few rows at a time."""
    z = projections().requires_grad_()
    loss = nt_xent(z, TEMPERATURE)
    loss.backward()
    exact = projections().double().requires_grad_()
    unit = F.normalize(exact, dim=1)
    fixed = unit.detach()
    total, gradient = 0.0, torch.zeros_like(fixed)
    for rows in torch.arange(len(fixed)).split(512):
        part = fixed[rows].clone().requires_grad_()
        others = fixed.clone().requires_grad_()
        similarity = part @ others.T / TEMPERATURE
        similarity = similarity.index_put((torch.arange(len(rows)), rows), torch.tensor(-torch.inf).double())
        partner = (rows + BATCH) % (2 * BATCH)
        loss_of_rows = F.cross_entropy(similarity, partner, reduction="sum") / len(fixed)
        loss_of_rows.backward()
        gradient[rows] += part.grad
        gradient += others.grad
        total += loss_of_rows.item()
    unit.backward(gradient)
    of_loss = abs(loss.item() - total) / total
    of_gradient = ((z.grad - exact.grad).abs().max() / exact.grad.abs().max()).item()
    return max(of_loss, of_gradient)


if __name__ == "__main__":
    main()
