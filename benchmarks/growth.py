"""1,000 and 100,000 images: does an image cost the same, and does memory stay where it was?

    python benchmarks/growth.py CIFAR      # a folder of JPEG files; names are repeated until they are 100,000

Finds the files, builds the cache and makes two 32 px views of every image, each size in a process of its own,
after a warm-up on 64 images. Cost of the first figure: seconds per image; the bar, 1 / 1.15, lets the large set
cost 15 % more. Cost of the second: bytes of memory that the system cannot take back (anonymous and shared; pages of
the cache file are not counted), at the peak, above what the small set took; the limit is 200 MB.

    python benchmarks/growth.py CIFAR --files 1000000

Seconds and peak memory (VmHWM, all pages counted, children apart) of `labelwise scan`, and of `labelwise pretrain` until its first step is done.
"""

import argparse
import functools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from paired import compare, parser, show
from pipeline import NORMALIZATION

from labelwise.images.cache import build_cache
from labelwise.images.duplicates import unique_keys
from labelwise.images.source import open_images
from labelwise.seeding import permutation
from labelwise.views.draws import Policy
from labelwise.views.pipeline import make_views

SMALL, LARGE = 1_000, 100_000
LIMIT = 200e6


def main() -> None:
    options = parser(__doc__)
    options.add_argument("images", type=Path)
    options.add_argument("--count", type=int, help=argparse.SUPPRESS)
    options.add_argument(
        "--files", type=int, help="time and memory of the commands' start on so many files instead"
    )
    given = options.parse_args()
    if given.files:
        start_commands(given.images, given.files)
        return
    if given.count:
        print(json.dumps(measure(given.images, given.count)))
        return
    peaks: dict[int, list[float]] = {SMALL: [], LARGE: []}

    def seconds(count: int) -> float:
        found = in_a_process(given.images, count)
        peaks[count].append(found["bytes"])
        return found["seconds"]

    name = "seconds per image, 100,000 against 1,000 images"
    time_figure = compare(
        name,
        functools.partial(seconds, LARGE),
        functools.partial(seconds, SMALL),
        1 / 1.15,
        pairs=3,
        controls=1,
    )
    memory_figure = limit_figure("memory, limit 200 MB more", LIMIT, peaks[LARGE], peaks[SMALL])
    show([time_figure, memory_figure], given.json)


def limit_figure(name: str, limit: float, large: list[float], small: list[float]) -> dict[str, object]:
    """The limit over the bytes that the large set took beyond the small one; low and high: the most and the least."""
    extra = [max(one - other, 1.0) for one in (max(large), min(large)) for other in (min(small), max(small))]
    middle = max(statistics.median(large) - statistics.median(small), 1.0)
    ratios = {"ratio": limit / middle, "low": limit / max(extra), "high": limit / min(extra)}
    return {"name": name, **ratios, "control": 1.0, "bar": 1.0, "ours": middle, "theirs": limit}


def measure(source: Path, count: int) -> dict[str, float]:
    files = sorted(source.rglob("*.jpg"))
    with tempfile.TemporaryDirectory() as folder:
        go_over(link(files, Path(folder) / "warm", 64))
        images = link(files, Path(folder) / "images", count)
        done, peak = threading.Event(), 0.0

        def watch() -> None:
            nonlocal peak
            while not done.is_set():
                peak = max(peak, held_bytes())
                time.sleep(0.02)

        watcher = threading.Thread(target=watch)
        watcher.start()
        start = time.perf_counter()
        go_over(images)
        seconds = time.perf_counter() - start
        done.set()
        watcher.join()
    return {"seconds": seconds / count, "bytes": peak}


def link(files: list[Path], folder: Path, count: int) -> Path:
    """Link files into folders of 1,000."""
    for number in range(count):
        place = folder / f"{number // 1000:03}" / f"{number:06}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(files[number % len(files)].resolve())
    return folder


def go_over(folder: Path) -> None:
    """Decode everything once, then make views of everything."""
    images = open_images(folder)
    cache = build_cache(images, side=32, evaluation_size=32)
    keys = unique_keys(cache.keys)
    order = permutation(0, 0, len(keys))
    for start in range(0, len(order), 256):
        rows = np.asarray(order[start : start + 256])
        squares = torch.from_numpy(cache.squares[rows])
        policy = Policy(size=32, blur=0.0)
        make_views(policy, squares, cache.sizes[rows], keys[rows], 0, 0, (0, 1), NORMALIZATION)
    shutil.rmtree(cache.folder)


def held_bytes() -> float:
    """Memory that belongs to this process alone."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return sum(1024.0 * int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def start_commands(source: Path, count: int) -> None:
    """Print what `scan`, and `pretrain` to its first step, take on so many files, nothing cached."""
    pretrain = [
        "--backbone", "resnet18", "--image-size", "16", "--batch-size", "32", "--epochs", "1", "--precision", "fp32", "--device", "cpu",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        folder = link(sorted(source.rglob("*.jpg")), Path(place) / "images", count)
        run, environment = Path(place) / "run", {**os.environ, "LABELWISE_CACHE": f"{place}/cache"}
        for words in (["scan", folder], ["pretrain", folder, "--out", run, *pretrain]):
            start, peak = time.perf_counter(), 0.0
            command = subprocess.Popen(
                [sys.executable, "-m", "labelwise", *map(str, words)],
                env=environment,
                stdout=subprocess.DEVNULL,
            )
            status, metrics = Path(f"/proc/{command.pid}/status"), run / "metrics.jsonl"
            while command.poll() is None and not metrics.exists():
                lines = status.read_text(encoding="ascii").splitlines()
                peak = max(
                    [peak, *(1024.0 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))]
                )
                time.sleep(0.05)
            seconds = time.perf_counter() - start
            if command.poll() is None:
                command.send_signal(signal.SIGINT)
            command.wait()
            print(f"{words[0]}, {count:,} files: {seconds:.0f} s, {peak / 1e6:,.0f} MB")


def in_a_process(source: Path, count: int) -> dict[str, float]:
    command = [sys.executable, __file__, str(source), "--count", str(count)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


if __name__ == "__main__":
    main()
