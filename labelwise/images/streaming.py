"""Batches out of shards that are read again in each pass: nothing but what is at work is ever in memory or on this disk.

The shards are dealt to lanes, and each batch takes as many images from every lane. A lane reads its shards one after the other,
in an order drawn anew for each pass, and shuffles its images in blocks. So which images a step trains on follows from its
number alone: a run goes on exactly, with more or fewer processes too, each of which reads its own lanes.
"""

import functools
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as TooSoon
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from labelwise import seeding
from labelwise.errors import DataError, UsageError
from labelwise.images.decoded import DecodedShards
from labelwise.images.decoding import Range, UnreadableImage
from labelwise.images.readers import Answer, Readers
from labelwise.images.shards import Record, Shards, read_shard

Rows = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]

MOST_LANES = 16
_FEWEST = 16  # images that each lane gives to a batch, at least
_UNEVEN = 1.25
_NAMED = 100  # images left out that are named


@dataclass(frozen=True)
class Batch:
    """Images of a batch, of this rank's share of it at least.

    Attributes:
        pixels: Squares, uint8 (n, S, S, 3).
        true_sizes: (n, 2).
        keys: Of each image of the whole batch, 0 where it is another rank's, (B,).
        places: In the first two, of each image of the whole batch, (B,).
    """

    pixels: Tensor
    true_sizes: npt.NDArray[np.int32]
    keys: Keys
    places: Rows

    def squares(self, members: Rows, device: torch.device) -> tuple[Tensor, npt.NDArray[np.int32]]:
        """Squares, uint8 (B, S, S, 3), and true sizes, (B, 2)."""
        places = self.places[members]
        return self.pixels[torch.from_numpy(places)].to(device), self.true_sizes[places]


def choose_lanes(shards: Shards, part_size: int, ranks: int) -> int:
    """The most lanes, but `MOST_LANES` or one for each rank, that share parts and ranks evenly and the shards nearly so.

    A lane with fewer images than another shows them more often, so where lanes differ by more than a quarter, fewer are
    taken, or those that differ least.

    Args:
        part_size: Images that go through the network at once, over all ranks.

    Raises:
        UsageError: There are fewer shards than ranks.
    """
    most = max(MOST_LANES, ranks)
    lanes = [
        count for count in range(ranks, most + 1, ranks)
        if part_size % count == 0 and count <= len(shards.files) and (count == ranks or part_size // count >= _FEWEST)
    ]  # fmt: skip
    if not lanes:
        raise UsageError(
            f"{len(shards.files)} shards cannot be dealt to {ranks} devices or processes; use fewer, or write more and smaller shards."
        )
    uneven = {count: _unevenness(shards, count) for count in lanes}
    even = [count for count in lanes if uneven[count] <= _UNEVEN]
    return even[-1] if even else min(lanes, key=uneven.__getitem__)


def _unevenness(shards: Shards, lanes: int) -> float:
    """Images of the fullest lane, in images of the emptiest."""
    sums = [sum(shards.counts[lane::lanes]) for lane in range(lanes)]
    return max(sums) / min(sums)


@dataclass(frozen=True)
class Place:
    """Where an image of a stream is: shard and row, and what was read there; None where it is kept decoded."""

    shard: int
    row: int
    record: Record | None

    @property
    def read(self) -> Record:
        """What was read there."""
        assert self.record is not None, f"row {self.row} of shard {self.shard} is neither read nor kept"
        return self.record


@dataclass(frozen=True)
class _Decoded:
    """What one lane gives to a batch."""

    pixels: npt.NDArray[np.uint8]
    sizes: npt.NDArray[np.int32]
    keys: Keys


def own_shards(shards: Shards, number: int, lanes: int) -> range:
    """Numbers of the shards that a lane reads."""
    return range(number, len(shards.files), lanes)


class Lane:
    """One of the sequences that batches are put together from, from one of its images on; it never ends.

    Args:
        number: From 0.
        lanes: Of all.
        block: Images that are shuffled among each other.
        start: Images that were taken before.
        kept: What was decoded before.
    """

    def __init__(
        self, shards: Shards, number: int, lanes: int, block: int, seed: int, start: int, kept: DecodedShards | None = None
    ) -> None:  # fmt: skip
        self._shards, self._number, self._seed, self._kept = shards, number, seed, kept
        self._own = own_shards(shards, number, lanes)
        self.total = sum(shards.counts[each] for each in self._own)
        self._size = min(block, self.total)
        self._done, self._place = divmod(start, self._size)
        self._images = self.read(self._done * self._size)
        self._next: list[Place] = []
        self._begin([next(self._images) for _ in range(self._size)])
        self._next = [next(self._images) for _ in range(self._place)]

    def take(self, count: int) -> list[Place]:
        """The next images; as many are read for the block after this one."""
        taken = []
        for _ in range(count):
            if self._place == self._size:
                self._done, self._place = self._done + 1, 0
                self._begin(self._next)
            taken.append(self._block[self._place])
            self._place += 1
            self._next.append(next(self._images))
        return taken

    def _begin(self, images: list[Place]) -> None:
        order = seeding.generator(self._seed, "block", self._number, self._done).permutation(self._size)
        self._block = [images[place] for place in order.tolist()]
        self._next = []

    def __str__(self) -> str:
        return f"{self._shards.files[self._own[0]]} and {len(self._own) - 1:,} shards more"

    def read(self, start: int = 0) -> Iterator[Place]:
        """Its images before they are shuffled, from one of them on, pass by pass."""
        passed, place = divmod(start, self.total)
        while True:
            for shard in (
                seeding.generator(self._seed, "shards", self._number, passed).permutation(self._own).tolist()
            ):
                count = self._shards.counts[shard]
                if place < count and self._kept is not None and self._kept.has(shard):
                    yield from (Place(shard, row, None) for row in range(place, count))
                elif place < count:
                    for row, record in enumerate(read_shard(self._shards, shard, place), place):
                        yield Place(shard, row, record)
                place = max(0, place - count)
            passed += 1


class Stream:
    """Batches in the order of steps, the next one read and decoded while the network is at work.

    Args:
        shards: Where the images are.
        lanes: See `choose_lanes`.
        own: Numbers of the lanes that this rank reads.
        batch_size: Over all ranks, B.
        part_size: Images that go through the network at once, over all ranks.
        buffer: Images that are shuffled among each other, over all lanes.
        seed: Of the order.
        side: Of the squares, S.
        intensity_range: See `ImageCache`.
        shortest: See `decoding.decode_image`.
        locked: Content keys of images that are not to be trained on.
        step: The first one.
        kept: Where images are kept once they are decoded, if they are.
    """

    def __init__(
        self, shards: Shards, *, lanes: int, own: range, batch_size: int, part_size: int, buffer: int, seed: int,
        side: int, intensity_range: Range | None, shortest: int, locked: frozenset[int], step: int, kept: DecodedShards | None = None,
    ) -> None:  # fmt: skip
        self.left_out: dict[str, str] = {}  # reasons by name, of the first ones
        self._shards, self._side, self._locked = shards, side, locked
        self._each = batch_size // lanes
        members = np.arange(batch_size).reshape(batch_size // part_size, lanes, part_size // lanes)
        self._members = members.transpose(1, 0, 2).reshape(lanes, self._each)[
            own.start : own.stop
        ]  # of each lane
        self._batch_size = batch_size
        self._begin = functools.partial(
            Lane,
            shards,
            lanes=lanes,
            block=max(1, buffer // lanes),
            seed=seed,
            start=step * self._each,
            kept=kept,
        )
        self._kept = kept
        self._own = own
        self._lanes: list[Lane] = []
        self._spare: dict[Lane, _Decoded] = {}
        self._readers = Readers("square", side=side, intensity_range=intensity_range, shortest=shortest)
        self._step = step
        self._coming: Future[Batch] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: Any) -> None:
        self._readers.__exit__(*raised)

    def draw(self, step: int, seconds: float) -> Batch | None:
        """The batch of a step; None where it is not there after so many seconds. Steps are asked for in their order.

        Raises:
            DataError: A shard is damaged, or none of a lane's images can be used.
            LabelwiseError: A shard cannot be read.
        """
        assert step == self._step
        if self._coming is None:
            self._coming = _ahead(self._read)
        try:
            batch = self._coming.result(seconds)
        except TooSoon:
            return None
        self._step += 1
        self._coming = _ahead(self._read)
        return batch

    def _read(self) -> Batch:
        if not self._lanes:
            self._lanes = [self._begin(number=number) for number in self._own]
        taken = [self._decode(lane.take(self._each)) for lane in self._lanes]
        taken = [
            found if found.keys.any() else self._find(lane)
            for found, lane in zip(taken, self._lanes, strict=True)
        ]
        for found in taken:
            missing, usable = np.flatnonzero(found.keys == 0), np.flatnonzero(found.keys)
            instead = np.resize(usable, len(missing))  # others of the same lane, once more
            for values in (found.pixels, found.sizes, found.keys):
                values[missing] = values[instead]
        members = self._members.reshape(-1)
        keys, places = np.zeros(self._batch_size, np.uint64), np.zeros(self._batch_size, np.int64)
        found_keys = np.concatenate([found.keys for found in taken])
        keys[members] = seeding.combine(
            found_keys, members.astype(np.uint64)
        )  # one image twice in a batch differs
        places[members] = np.arange(len(members))
        pixels, sizes = (
            np.concatenate([getattr(found, name) for found in taken]) for name in ("pixels", "sizes")
        )
        return Batch(torch.from_numpy(pixels), sizes, keys, places)

    def _decode(self, images: list[Place]) -> "_Decoded":
        """Decode images, or take what is kept of them; those that cannot be used have key 0."""
        pixels = np.zeros((self._each, self._side, self._side, 3), np.uint8)
        found = _Decoded(pixels, np.ones((self._each, 2), np.int32), np.zeros(self._each, np.uint64))
        for row, (name, answer) in enumerate(self._answers(images)):
            if isinstance(answer, UnreadableImage):
                self._leave_out(name, str(answer))
                continue
            (size, key), squares = answer
            if key not in self._locked:
                found.keys[row], found.sizes[row] = key, size
                found.pixels[row] = np.frombuffer(squares, np.uint8).reshape(self._side, self._side, 3)
        return found

    def _answers(self, images: list[Place]) -> Iterator[tuple[str, Answer | UnreadableImage]]:
        """Name of each image, empty where it is kept and can be used, and what is found in it."""
        kept = self._kept
        before = [None if kept is None else kept.take(image.shard, image.row) for image in images]
        missing = [image.read for image, known in zip(images, before, strict=True) if known is None]
        answers = self._readers.map(range(len(missing)), lambda number: missing[number].image)
        fresh = zip(missing, answers, strict=True)
        for image, known in zip(images, before, strict=True):
            if known is not None:
                yield known
                continue
            record, answer = next(fresh)
            if kept is not None:
                kept.keep(image.shard, image.row, record.name, answer)
            yield record.name, answer

    def _find(self, lane: Lane) -> "_Decoded":
        """The first images of a lane among which one can be used, for where none of those that it gave can.

        Raises:
            DataError: There is none.
        """
        if lane not in self._spare:
            every = lane.read()
            for start in range(0, lane.total, self._each):
                found = self._decode(list(itertools.islice(every, min(self._each, lane.total - start))))
                if found.keys.any():
                    self._spare[lane] = found
                    break
            else:
                why = (
                    f", e.g. {next(iter(self.left_out.values()))}"
                    if self.left_out
                    else ": they are test images"
                )
                raise DataError(f"{lane}: none of {lane.total:,} images can be used{why}.")
        return self._spare[lane]

    def _leave_out(self, name: str, reason: str) -> None:
        if len(self.left_out) < _NAMED:
            self.left_out.setdefault(name, reason)


def _ahead(work: Callable[[], Batch]) -> Future[Batch]:
    """Begin some work in a thread that keeps nobody from leaving: a network may hang."""
    coming: Future[Batch] = Future()

    def run() -> None:
        try:
            coming.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised to whoever asks for the result
            coming.set_exception(error)

    threading.Thread(target=run, name="stream", daemon=True).start()
    return coming
