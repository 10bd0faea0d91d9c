"""Images of a stream, decoded once: each process keeps those of its own lanes on the disk of its machine.

A shard is kept once all its images have been decoded, and is read from here from then on. What is kept of one that a process
was at work on when it ended is deleted by the next.
"""

import errno
import fcntl
import hashlib
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
from typing import IO, Self
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from labelwise import rundir
from labelwise.errors import ResourceError, UsageError
from labelwise.images import decoding
from labelwise.images.decoding import Range, UnreadableImage
from labelwise.images.readers import Answer
from labelwise.images.shards import Shards, alone_in

_VERSION = 1  # of what is kept
_FACTS = "facts.json"
_ADVICE = "free some, name another place in LABELWISE_CACHE, or leave out --keep-decoded"


@dataclass
class _Kept:
    """What is known of the images of a shard."""

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
    def load(cls, file: Path) -> Self:
        with file.open("rb") as stream, np.load(stream) as found:
            reasons = {int(row): tuple(said) for row, said in json.loads(str(found["reasons"])).items()}
            return cls(found["sizes"], found["keys"], found["checksums"], reasons)

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


@dataclass(frozen=True)
class _Begun:
    """A shard of which not all images are decoded yet; the lock on its file says that somebody is at work on it."""

    kept: _Kept
    path: Path
    file: IO[bytes]


class DecodedShards:
    """Squares of the images of shards, on this disk.

    Args:
        shards: All of them.
        own: Numbers of those that this process reads.
        processes: As many share this disk.
        side, intensity_range, shortest: See `Stream`.

    Raises:
        UsageError: It cannot be told whether the shards are what they were.
        ResourceError: There is no room for all of them, or no right to write.
    """

    def __init__(
        self, shards: Shards, own: Iterable[int], *, processes: int, side: int, intensity_range: Range | None, shortest: int
    ) -> None:  # fmt: skip
        if not shards.digest:
            raise UsageError(
                f"--keep-decoded: {shards.folder} tells neither size nor date of its files, so that files that changed could not be told from what was kept."
            )
        made = [_VERSION, decoding.HAS_HEIF, shards.digest, side, intensity_range, shortest]
        digest = hashlib.sha256(json.dumps(made).encode()).hexdigest()[:24]
        self.folder = rundir.cache_root() / f"stream-{digest}"
        self._shards, self._side, self._bytes = shards, side, 3 * side**2
        self._kept: dict[int, _Kept] = {}
        self._begun: dict[int, _Begun] = {}
        self._at_work = threading.Lock()  # a stream that is closed may still be reading ahead
        self._is_closed = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with alone_in(self.folder):
                self._delete_abandoned()
                if not (self.folder / _FACTS).exists():
                    rundir.write_json(self.folder / _FACTS, {"images": shards.images})
        except OSError as error:
            raise self._failure(error) from None
        missing = sum(shards.counts[number] for number in own if not self.has(number))
        needed, free = missing * self._bytes * processes, shutil.disk_usage(self.folder).free
        if needed > free:
            raise ResourceError(
                f"{self.folder}: decoded images need {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free; {_ADVICE}, or use a smaller --image-size."
            )

    def has(self, shard: int) -> bool:
        """Whether all images of a shard are here; one that is damaged is deleted."""
        if shard not in self._kept:
            pixels, facts = self._files(shard)
            try:
                kept = _Kept.load(facts)
                count = self._shards.counts[shard]
                if (
                    len(kept.keys) != count
                    or not kept.is_whole
                    or pixels.stat().st_size != count * self._bytes
                ):
                    raise ValueError(f"{facts}: not what was written")
            except FileNotFoundError:
                return False
            except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile):
                self._delete(shard)
                return False
            self._kept[shard] = kept
        return True

    def take(self, shard: int, row: int) -> tuple[str, Answer | UnreadableImage] | None:
        """Name of an image, empty where it can be used, and what `Readers("square")` answered about it; None where nothing is kept.

        Raises:
            ResourceError: What was kept is damaged, or was deleted.
        """
        with self._open():
            return self._take(shard, row)

    def _take(self, shard: int, row: int) -> tuple[str, Answer | UnreadableImage] | None:
        begun = self._begun.get(shard)
        kept = self._kept.get(shard) if begun is None else begun.kept
        if kept is None or not kept.knows(row):
            return None
        if row in kept.reasons:
            name, why = kept.reasons[row]
            return name, UnreadableImage(why)
        pixels = self._read(shard, row)
        if zlib.crc32(pixels) != kept.checksums[row]:
            self._delete(shard)
            raise ResourceError(
                f"{self.folder}: a decoded image is damaged; the same command goes on and decodes it again."
            )
        return "", ((kept.sizes[row].tolist(), int(kept.keys[row])), pixels)

    def keep(self, shard: int, row: int, name: str, answer: Answer | UnreadableImage) -> None:
        """Keep what `Readers("square")` answered about an image.

        Raises:
            ResourceError: The disk is full.
        """
        with self._open():
            self._keep(shard, row, name, answer)

    def _keep(self, shard: int, row: int, name: str, answer: Answer | UnreadableImage) -> None:
        if shard in self._kept:  # an image that came twice in the last batch that was missing
            return
        try:
            begun = self._begun.get(shard) or self._begin(shard)
            kept = begun.kept
            if isinstance(answer, UnreadableImage):
                kept.reasons[row] = name, str(answer)
            else:
                (size, key), pixels = answer
                os.pwrite(begun.file.fileno(), pixels, row * self._bytes)
                kept.sizes[row], kept.keys[row], kept.checksums[row] = size, key, zlib.crc32(pixels)
            if kept.is_whole:
                self._finish(shard, begun)
        except OSError as error:
            raise self._failure(error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        """Delete what is kept of shards that are not whole."""
        with self._at_work:
            self._is_closed = True
            for begun in self._begun.values():
                begun.path.unlink(missing_ok=True)
                begun.file.close()

    @contextmanager
    def _open(self) -> Iterator[None]:
        with self._at_work:
            if self._is_closed:
                raise ValueError("what is kept of the stream is closed")
            yield

    def _files(self, shard: int) -> tuple[Path, Path]:
        return self.folder / f"{shard:06}.pixels", self.folder / f"{shard:06}.npz"

    def _read(self, shard: int, row: int) -> bytes:
        begun = self._begun.get(shard)
        if begun is not None:
            return os.pread(begun.file.fileno(), self._bytes, row * self._bytes)
        try:
            with self._files(shard)[0].open("rb") as file:
                return os.pread(file.fileno(), self._bytes, row * self._bytes)
        except OSError as error:
            raise self._failure(error) from None

    def _begin(self, shard: int) -> _Begun:
        size = self._shards.counts[shard] * self._bytes
        path = self.folder / f".{shard:06}-{uuid.uuid4().hex}.pixels"
        with alone_in(self.folder):  # nobody takes it for abandoned before it is locked
            file = path.open("x+b")
            begun = self._begun[shard] = _Begun(_Kept.none(self._shards.counts[shard]), path, file)
            fcntl.flock(file, fcntl.LOCK_EX)
        os.ftruncate(file.fileno(), size)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        return begun

    def _finish(self, shard: int, begun: _Begun) -> None:
        pixels, facts = self._files(shard)
        rundir.flush(begun.path)
        with alone_in(self.folder):  # another run on the same images may have kept it by now: the same bytes
            begun.path.replace(pixels)
            rundir.write_atomically(facts, begun.kept.save)
        begun.file.close()
        del self._begun[shard]
        self._kept[shard] = begun.kept

    def _delete(self, shard: int) -> None:
        self._kept.pop(shard, None)
        for file in self._files(shard):
            with suppress(OSError):
                file.unlink(missing_ok=True)

    def _delete_abandoned(self) -> None:
        for file in self.folder.glob(".*.pixels"):
            with suppress(OSError), file.open("rb") as opened:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody is at work on it
                file.unlink()

    def _failure(self, error: OSError) -> ResourceError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return ResourceError(f"{self.folder}: no space is left for decoded images; {_ADVICE}.")
        if error.errno == errno.ENOENT:
            return ResourceError(
                f"{self.folder}: decoded images were deleted while they were in use; the same command goes on."
            )
        return ResourceError(
            f"{self.folder}: decoded images cannot be kept there ({error.strerror}); {_ADVICE}."
        )
