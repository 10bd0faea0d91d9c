"""Images of a stream, decoded once: each process keeps those of its own lanes on the disk of its machine.

A shard is kept once all its images have been decoded, and is read from here from then on. What a process has of others lies in a
folder of its own, which the next process deletes when it is gone. Several processes and runs may share what is kept.
"""

import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
import threading
import uuid
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from labelwise import rundir
from labelwise.errors import ResourceError, UsageError
from labelwise.images import decoding
from labelwise.images.decoding import Range, UnreadableImage, UnreadableNow
from labelwise.images.readers import Answer
from labelwise.images.shards import Shards, alone_in

_VERSION = 1  # of what is kept
_FACTS = "facts.json"
_AT_WORK = ".at-work-"
_ADVICE = "free some, name another place in LABELWISE_CACHE, or leave out --keep-decoded"


@dataclass(frozen=True)
class _Kept:
    """What is known of the images of a shard; a row has a key, or a reason, or is not known."""

    sizes: npt.NDArray[np.int32]
    keys: npt.NDArray[np.uint64]
    checksums: npt.NDArray[np.uint32]  # CRC-32 of the pixels
    reasons: dict[int, tuple[str, str]] = field(default_factory=dict)  # name and why it cannot be used

    @classmethod
    def none(cls, count: int) -> Self:
        """Nothing yet."""
        sizes, keys = np.zeros((count, 2), np.int32), np.zeros(count, np.uint64)
        return cls(sizes, keys, np.zeros(count, np.uint32))

    @classmethod
    def load(cls, content: bytes, count: int) -> Self:
        """Read what `save` wrote of a whole shard; raises anything where it is not that."""
        with np.load(io.BytesIO(content)) as found:
            reasons = {int(row): tuple(said) for row, said in json.loads(str(found["reasons"])).items()}
            kept = cls(found["sizes"], found["keys"], found["checksums"], reasons)
        if not (
            kept.sizes.shape == (count, 2)
            and kept.keys.shape == kept.checksums.shape == (count,)
            and kept.is_whole
        ):
            raise ValueError("of another shard")
        return kept

    def save(self, file: Path) -> None:
        with file.open("wb") as stream:
            np.savez(
                stream,
                sizes=self.sizes,
                keys=self.keys,
                checksums=self.checksums,
                reasons=np.array(json.dumps(self.reasons)),
            )

    def knows(self, row: int) -> bool:
        return bool(self.keys[row]) or row in self.reasons

    @property
    def is_whole(self) -> bool:
        return int(np.count_nonzero(self.keys)) + len(self.reasons) == len(self.keys)


class DecodedShards:
    """Squares of the images of shards, on this disk. A context manager; what is begun ends with it.

    Args:
        shards: All of them.
        own: Numbers of those that the processes on this machine read.
        side, intensity_range, shortest: See `Stream`.

    Raises:
        UsageError: It cannot be told whether the shards are what they were.
        ResourceError: There is no room for all of them, or no right to write.
    """

    def __init__(
        self, shards: Shards, own: Iterable[int], *, side: int, intensity_range: Range | None, shortest: int
    ) -> None:
        if not shards.digest:
            raise UsageError(
                f"--keep-decoded: {shards.folder} does not tell how old each of its files is, so that files that changed could not be told from what was kept."
            )
        made = [_VERSION, decoding.HAS_HEIF, shards.digest, side, intensity_range, shortest]
        digest = hashlib.sha256(json.dumps(made).encode()).hexdigest()[:24]
        self.folder = rundir.cache_root() / f"stream-{digest}"
        self._counts, self._bytes = shards.counts, 3 * side**2
        self._kept: dict[int, _Kept] = {}
        self._begun: dict[int, _Kept] = {}
        self._lock = threading.Lock()  # a stream that is closed may still be reading ahead
        self._work = self.folder / f"{_AT_WORK}{uuid.uuid4().hex}"
        self._mine: int | None = None  # descriptor of that folder, whose lock says that its process lives
        with self._in_words():
            self.folder.mkdir(parents=True, exist_ok=True)
            with alone_in(self.folder):
                self._delete_abandoned()
                self._work.mkdir()
                self._mine = os.open(self._work, os.O_RDONLY)
                fcntl.flock(self._mine, fcntl.LOCK_EX)
                if not (self.folder / _FACTS).exists():
                    rundir.write_json(self._work / _FACTS, {"images": shards.images})
                    (self._work / _FACTS).replace(self.folder / _FACTS)
        missing = sum(self._counts[number] for number in own if not self._files(number)[1].exists())
        needed, free = missing * self._bytes, shutil.disk_usage(self.folder).free
        if needed > free:
            self.__exit__()
            raise ResourceError(
                f"{self.folder}: decoded images need {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free; {_ADVICE}, or use a smaller --image-size."
            )

    def has(self, shard: int) -> bool:
        """Whether all images of a shard are here; one that is damaged is deleted.

        Raises:
            ResourceError: It cannot be read.
        """
        with self._open():
            if shard in self._kept:
                return True
            pixels, facts = self._files(shard)
            if not facts.exists():
                return False
            content, size = facts.read_bytes(), pixels.stat().st_size
            try:
                kept = _Kept.load(content, self._counts[shard])
            except Exception:  # noqa: BLE001 - whatever reading damaged bytes may raise
                kept = None
            if kept is None or size != self._counts[shard] * self._bytes:
                self._delete(shard)
                return False
            self._kept[shard] = kept
            if self._begun.pop(shard, None) is not None:  # another run was faster
                self._path(shard).unlink()
            return True

    def take(self, shard: int, row: int) -> tuple[str, Answer | UnreadableImage] | None:
        """Name of an image, empty where it can be used, and what `Readers("square")` answered about it; None where nothing is kept.

        Raises:
            ResourceError: What was kept is damaged, or was deleted.
        """
        with self._open():
            kept = self._kept.get(shard) or self._begun.get(shard)
            if kept is None or not kept.knows(row):
                return None
            if row in kept.reasons:
                name, why = kept.reasons[row]
                return name, UnreadableImage(why)
            path = self._files(shard)[0] if shard in self._kept else self._path(shard)
            with path.open("rb") as file:
                pixels = os.pread(file.fileno(), self._bytes, row * self._bytes)
            if zlib.crc32(pixels) != kept.checksums[row]:
                self._delete(shard)
                raise ResourceError(
                    f"{self.folder}: a decoded image is damaged; the same command goes on and decodes it again."
                )
            return "", ((kept.sizes[row].tolist(), int(kept.keys[row])), pixels)

    def keep(self, shard: int, row: int, name: str, answer: Answer | UnreadableImage) -> None:
        """Keep what `Readers("square")` answered about an image, unless it may answer otherwise another time.

        Raises:
            ResourceError: The disk is full.
        """
        with self._open():
            if shard in self._kept or isinstance(answer, UnreadableNow):
                return
            if shard not in self._begun:
                self._begin(shard)
            kept = self._begun[shard]
            if kept.knows(row):  # twice in one batch
                return
            if isinstance(answer, UnreadableImage):
                kept.reasons[row] = name, str(answer)
            else:
                (size, key), pixels = answer
                with self._path(shard).open("r+b") as file:
                    file.seek(row * self._bytes)
                    file.write(pixels)
                kept.sizes[row], kept.keys[row], kept.checksums[row] = size, key, zlib.crc32(pixels)
            if kept.is_whole:
                self._finish(shard, kept)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        """Delete what is not whole."""
        with self._lock:
            shutil.rmtree(self._work, ignore_errors=True)
            if self._mine is not None:
                os.close(self._mine)
            self._mine = None

    @contextmanager
    def _open(self) -> Iterator[None]:
        with self._lock, self._in_words():
            if self._mine is None:
                raise ValueError("what is kept of the stream is closed")
            yield

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                why = f"no space is left for decoded images; {_ADVICE}."
            elif error.errno == errno.ENOENT:
                why = "decoded images were deleted while they were in use; the same command goes on."
            else:
                why = f"decoded images cannot be kept there ({error.strerror}); name another place in LABELWISE_CACHE, or leave out --keep-decoded."
            raise ResourceError(f"{self.folder}: {why}") from None

    def _files(self, shard: int) -> tuple[Path, Path]:
        """Pixels of a shard, row after row, and what is known of them."""
        return self.folder / f"{shard:06}.pixels", self.folder / f"{shard:06}.npz"

    def _path(self, shard: int) -> Path:
        """Pixels of a shard that is begun."""
        return self._work / self._files(shard)[0].name

    def _begin(self, shard: int) -> None:
        size = self._counts[shard] * self._bytes
        with self._path(shard).open("xb") as file:
            os.ftruncate(file.fileno(), size)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
        self._begun[shard] = _Kept.none(self._counts[shard])

    def _finish(self, shard: int, kept: _Kept) -> None:
        begun = self._path(shard), self._work / self._files(shard)[1].name
        kept.save(begun[1])
        for file in begun:
            rundir.flush(file)
        with alone_in(self.folder):  # another run may have kept it by now: the same bytes
            for file, target in zip(begun, self._files(shard), strict=True):
                file.replace(target)
        self._kept[shard] = self._begun.pop(shard)

    def _delete(self, shard: int) -> None:
        self._kept.pop(shard, None)
        with alone_in(self.folder), suppress(OSError):
            for file in reversed(self._files(shard)):  # without facts there are no pixels
                file.unlink(missing_ok=True)

    def _delete_abandoned(self) -> None:
        for folder in self.folder.glob(f"{_AT_WORK}*"):
            with suppress(OSError):
                descriptor = os.open(folder, os.O_RDONLY)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder)
                finally:
                    os.close(descriptor)
