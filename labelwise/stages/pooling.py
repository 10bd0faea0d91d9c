"""The images that pretraining may use: found, of what size, how many at a time, and where they lie."""

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from labelwise.config import SMALLEST_POOL, PretrainSettings
from labelwise.errors import DataError, UsageError
from labelwise.images.cache import ImageCache, sample_sizes
from labelwise.images.duplicates import unique_keys
from labelwise.images.labels import OUTSIDE
from labelwise.images.shards import Shards
from labelwise.images.source import ImageSet, open_images
from labelwise.images.splits import pool_indices
from labelwise.learning.memory import available_memory

CACHE_MARGIN = 1.25  # cached squares are this much larger than a view, so that a crop keeps some detail
_RESIDENT_SHARE = 0.25  # of a GPU's free memory may hold the decoded images
_COPIED = 4096  # squares copied to a GPU at a time


@dataclasses.dataclass(frozen=True)
class Pool:
    """The images that may be trained on; row r of the pool is row `rows[r]` of the cache.

    Attributes:
        resident: The squares of the pool on the training device, uint8 (N, S, S, 3), where they fit there.
        shards: What is trained on in their stead, where they are a sample of a stream.
        streamed: Images of the stream that may be trained on.
    """

    cache: ImageCache
    rows: npt.NDArray[np.int64]
    keys: npt.NDArray[np.uint64]
    labels: list[str | None]
    resident: Tensor | None = None
    shards: Shards | None = None
    streamed: int = 0

    @property
    def count(self) -> int:
        """Images of an epoch."""
        return len(self.rows) if self.shards is None else self.streamed

    def squares(
        self, members: npt.NDArray[np.int64], device: torch.device
    ) -> tuple[Tensor, npt.NDArray[np.int32]]:
        """Cached squares, uint8 (B, S, S, 3), and true sizes, (B, 2)."""
        rows = self.rows[members]
        if self.resident is not None and self.resident.device.type == device.type:
            squares = self.resident[torch.from_numpy(members).to(device)]
        else:
            squares = torch.from_numpy(self.cache.squares[rows]).to(device)
        return squares, self.cache.sizes[rows]


def choose_sizes(settings: PretrainSettings, images: ImageSet, device: torch.device) -> tuple[int, int]:
    """Choose the side of a view and of the cached squares, pixels."""
    shortest = int(np.median(sample_sizes(images).min(axis=1)))
    most = 96 if device.type == "cpu" else 224
    size = settings.image_size or max(32, min(most, round(shortest / 32) * 32))
    side = max(size, min(math.ceil(CACHE_MARGIN * size / 8) * 8, max(size, shortest)))
    if settings.cache_side is not None and settings.cache_side < size:
        raise UsageError(
            f"--cache-side {settings.cache_side}: smaller than a view of {size} px; use at least {size}, better {side}."
        )
    return size, settings.cache_side or side


def open_sources(settings: PretrainSettings) -> ImageSet:
    """Find the images, with labels, groups and test split, that the settings name."""
    return open_images(
        settings.images,
        labels=settings.labels,
        labels_root=settings.labels_root,
        group_column=settings.group_column,
        test=settings.test,
        stream=settings.stream,
    )


def make_pool(images: ImageSet, cache: ImageCache, lock: dict[str, Any], settings: PretrainSettings) -> Pool:
    """Take the images that may be trained on.

    Raises:
        DataError: They are too few.
        UsageError: The batch is larger than they are.
    """
    rows = pool_indices(images, cache.readable, lock)
    if len(rows) < SMALLEST_POOL:
        raise DataError(
            f"{settings.images}: {len(rows)} images to train on; SimCLR needs at least {SMALLEST_POOL}."
        )
    labels = [images.labels[row] for row in rows]
    pool = Pool(cache, rows, unique_keys(cache.keys[rows]), labels, shards=images.shards)
    if images.shards is not None:
        inside = sum(not name.startswith(OUTSIDE) for name in images.names)
        own = sum(not images.names[row].startswith(OUTSIDE) for row in rows)
        pool = dataclasses.replace(pool, streamed=images.shards.images - (inside - own))
    if settings.batch_size > pool.count and "batch_size" in settings.given:
        raise UsageError(
            f"--batch-size {settings.batch_size}: larger than the {pool.count} images to train on; use at most "
            f"{pool.count}, better {small_batch(pool.count)}."
        )
    return pool


def batch_size_for(settings: PretrainSettings, images: int) -> int:
    """The batch that was asked for; that of a recipe where so many images are there; by default one with four steps an epoch or more."""
    if "batch_size" in settings.model_fields_set and settings.batch_size <= images:
        return settings.batch_size
    return min(settings.batch_size, max(small_batch(images), settings.micro_batch_size or 0))


def small_batch(images: int) -> int:
    """The largest power of two of which so many images are four batches or more."""
    return int(2 ** int(math.log2(images / 4)))


def keep_on_device(pool: Pool, device: torch.device) -> Pool:
    """Copy the pool's squares to a GPU once, if that takes at most a quarter of its free memory.

    The CPU needs no copy: the system keeps the cache's pages in memory.
    """
    shape = (len(pool.rows), *pool.cache.squares.shape[1:])
    if (
        pool.shards is not None
        or device.type != "cuda"
        or math.prod(shape) > _RESIDENT_SHARE * available_memory(device)
    ):
        return pool
    return dataclasses.replace(pool, resident=copy_squares(pool, device))


def copy_squares(pool: Pool, device: torch.device) -> Tensor:
    """Squares of the pool on a device, copied some at a time, uint8 (N, S, S, 3)."""
    squares = torch.empty((len(pool.rows), *pool.cache.squares.shape[1:]), dtype=torch.uint8, device=device)
    for members in np.array_split(np.arange(len(pool.rows)), math.ceil(len(pool.rows) / _COPIED)):
        squares[members[0] : members[-1] + 1] = torch.from_numpy(pool.cache.squares[pool.rows[members]])
    return squares
