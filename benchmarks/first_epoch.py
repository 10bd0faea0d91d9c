"""The first pass over files never seen before: ours decodes, writes the cache and makes views; lightly's is its first epoch.

    python benchmarks/first_epoch.py CIFAR CLOTHING      # folders of class folders of JPEG files

32 px without blur, 96 and 224 px with it; no model. Ours: find the files, build the cache anew, make two views of
each image. lightly: the first pass of a new DataLoader with its best number of workers, starting them included.
Cost: seconds per image. The files themselves may lie in the system's page cache, for both.
"""

import shutil
import tempfile
from pathlib import Path

import torch
from lightly.data import LightlyDataset
from lightly.transforms import SimCLRTransform
from paired import compare, parser, seconds, show
from pipeline import CASES, NORMALIZATION, link_some
from torch.utils.data import DataLoader

from labelwise.images.cache import build_cache
from labelwise.images.source import open_images
from labelwise.learning.memory import keep_freed_memory
from labelwise.seeding import permutation
from labelwise.views.draws import Policy
from labelwise.views.pipeline import make_views


def main() -> None:
    options = parser(__doc__)
    options.add_argument("cifar", type=Path)
    options.add_argument("photographs", type=Path)
    given = options.parse_args()
    keep_freed_memory()
    figures = []
    for name, size, side, blur, batch, _, count in CASES:
        with tempfile.TemporaryDirectory() as folder:
            images = link_some(given.cifar if size == 32 else given.photographs, Path(folder), count)
            rivals = {workers: lightly_first(images, size, blur, batch, workers) for workers in (0, 1, 2)}
            best = min(rivals, key=lambda workers: (rivals[workers](), rivals[workers]())[1])
            ours = our_first(images, size, side, blur, batch)
            figures.append(compare(f"{name}, lightly with {best} workers", ours, rivals[best], 1.0))
    show(figures, given.json)


def our_first(folder: Path, size: int, side: int, blur: float, batch: int):
    count = sum(1 for _ in folder.rglob("*.jpg"))
    policy = Policy(size=size, blur=blur)

    def go() -> None:
        images = open_images(folder)
        cache = build_cache(images, side=side, evaluation_size=size)
        for rows in torch.from_numpy(permutation(0, 0, count)).split(batch):
            squares = torch.from_numpy(cache.squares[rows.numpy()])
            members = rows.numpy()
            make_views(
                policy, squares, cache.sizes[members], cache.keys[members], 0, 0, (0, 1), NORMALIZATION
            )
        shutil.rmtree(cache.folder)

    return lambda: seconds(go) / count


def lightly_first(folder: Path, size: int, blur: float, batch: int, workers: int):
    dataset = LightlyDataset(str(folder), SimCLRTransform(input_size=size, gaussian_blur=blur))

    def go() -> None:
        for _views in DataLoader(dataset, batch_size=batch, shuffle=True, num_workers=workers):
            pass

    return lambda: seconds(go) / len(dataset)


if __name__ == "__main__":
    main()
