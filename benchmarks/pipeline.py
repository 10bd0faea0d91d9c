"""Files to views, no model: ours, warm, against lightly's SimCLRTransform with its best number of workers.

    python benchmarks/pipeline.py CIFAR CLOTHING      # folders of class folders of JPEG files

Same images, same operations and chances, same batch, two normalised float32 views of each image; 32 px from
CIFAR (no blur), 96 and 224 px from photographs with blur. lightly decodes each file in each epoch, ours reads
the cache it made once. Cost: seconds per image over one pass.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from lightly.data import LightlyDataset
from lightly.transforms import SimCLRTransform
from paired import compare, parser, seconds, show
from torch.utils.data import DataLoader

from labelwise.images.cache import build_cache
from labelwise.images.source import open_images
from labelwise.learning.memory import keep_freed_memory
from labelwise.views.draws import Policy
from labelwise.views.pipeline import make_views

NORMALIZATION = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CASES = [("CIFAR, 32 px", 32, 32, 0.0, 256, 8.0, 2048), ("photographs, 96 px, blur", 96, 120, 0.5, 64, 4.0, 512),
         ("photographs, 224 px, blur", 224, 280, 0.5, 64, 4.0, 256)]  # fmt: skip


def main() -> None:
    options = parser(__doc__)
    options.add_argument("cifar", type=Path)
    options.add_argument("photographs", type=Path)
    given = options.parse_args()
    keep_freed_memory()
    figures = []
    for name, size, side, blur, batch, bar, count in CASES:
        with tempfile.TemporaryDirectory() as folder:
            images = link_some(given.cifar if size == 32 else given.photographs, Path(folder), count)
            ours = our_pass(images, size, side, blur, batch)
            workers = {number: lightly_pass(images, size, blur, batch, number) for number in (0, 1, 2)}
            best = min(workers, key=lambda number: (workers[number](), workers[number]())[1])
            figures.append(compare(f"{name}, lightly with {best} workers", ours, workers[best], bar))
    show(figures, given.json)


def link_some(source: Path, folder: Path, count: int) -> Path:
    """Link some of the files of a folder, evenly spread."""
    files = sorted(source.rglob("*.jpg"))
    for place in np.linspace(0, len(files) - 1, count).astype(int):
        target = folder / files[place].relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(files[place].resolve())
    return folder


def our_pass(folder: Path, size: int, side: int, blur: float, batch: int):
    images = open_images(folder)
    cache = build_cache(images, side=side, evaluation_size=size)
    policy = Policy(size=size, blur=blur)
    epoch = 0

    def go() -> None:
        nonlocal epoch
        epoch += 1
        order = np.random.default_rng(epoch).permutation(len(images.names))
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            squares = torch.from_numpy(cache.squares[rows])
            make_views(policy, squares, cache.sizes[rows], cache.keys[rows], 0, epoch, (0, 1), NORMALIZATION)

    return lambda: seconds(go) / len(images.names)


def lightly_pass(folder: Path, size: int, blur: float, batch: int, workers: int):
    transform = SimCLRTransform(input_size=size, gaussian_blur=blur)
    dataset = LightlyDataset(str(folder), transform=transform)
    loader = DataLoader(
        dataset, batch_size=batch, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )

    def go() -> None:
        for _views in loader:
            pass

    return lambda: seconds(go) / len(dataset)


if __name__ == "__main__":
    main()
