"""Decode once: every image as a square to cut views from and as an evaluation image, in memory maps.

A cache that was being built when its process ended is gone on with; two processes never build the same one.

The cache lies in `LABELWISE_CACHE`, or `labelwise` in `XDG_CACHE_HOME` or `~/.cache`. Its name is a hash
of the files (name, size, time) and the settings, so runs on the same images share it.
"""

import errno
import fcntl
import hashlib
import json
import mmap
import os
import shutil
import time
import tokenize
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from labelwise import terminal
from labelwise.errors import DataError, ResourceError
from labelwise.images import decoding
from labelwise.images.decoding import Pixels, Range, UnreadableImage
from labelwise.images.readers import Readers
from labelwise.images.source import Files, ImageSet, TableRows
from labelwise.rundir import cache_root, check_cache_outside, flush, folder_bytes, write_json

_VERSION = 6  # of what the files in a cache mean
_SAMPLED = 10_000  # images whose mean and spread stand for the set's
_CHUNK = 512
_MEASURED = 2**25  # bytes of squares that are measured together; sixteen times as much is held
_DECODED = 2**20, 16, 256  # pixels of images held at once and not kept; how many at least, at most
_SAVE_SECONDS = 5.0
_SQUARES, _EVALUATIONS = "squares.npy", "evaluations.npy"
_ABANDONED_SECONDS = 7 * 24 * 3600.0
_PIECE, _PIECES = 2**20, 1024  # bytes and number of what is checked of a file: all of it, up to 1 GiB (0.3 s)
_DAMAGE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    EOFError,
    RecursionError,
    SyntaxError,
    tokenize.TokenError,
)  # what reading a damaged cache may raise, numpy's readers of headers included
_FACTS = "facts.json"
_PROGRESS = "progress.json"  # in a cache that is being built: rows done, what was found in them


@dataclass(frozen=True)
class ImageCache:
    """Decoded images; row i is image i of the set, zeros where it could not be read.

    Attributes:
        folder: Where it lies.
        squares: The whole image squeezed to a square, uint8, (N, S, S, 3).
        evaluations: The centre, undistorted, uint8, (N, E, E, 3).
        sizes: True height and width after EXIF rotation, (N, 2).
        keys: Content key, equal for equal pixels; 0 where unreadable, (N,).
        shots: Camera and second of each photograph, 0 where unknown, (N, 2); see `decoding.shot`.
        readable: (N,).
        quarantined: Unreadable files with a reason each.
        intensity_range: Range that images deeper than 8 bits were scaled by, if there are any.
    """

    folder: Path
    squares: Pixels
    evaluations: Pixels
    sizes: npt.NDArray[np.int32]
    keys: npt.NDArray[np.uint64]
    shots: npt.NDArray[np.int64]
    readable: npt.NDArray[np.bool_]
    quarantined: list[dict[str, str]]
    intensity_range: Range | None


def list_caches() -> list[tuple[Path, int, int]]:
    """Folder, bytes and number of images of each cache."""
    found = []
    for facts in sorted(cache_root().glob(f"[!.]*/{_FACTS}")):
        size = folder_bytes(facts.parent)
        try:
            images = int(_parse(facts)["images"])  # of an earlier version too
        except _DAMAGE:
            images = 0  # damaged; it is made again when it is needed
        found.append((facts.parent, size, images))
    return found


def build_cache(
    images: ImageSet, *, side: int, evaluation_size: int, progress: Callable[[int], None] = lambda count: None
) -> ImageCache:
    """Decode every image once, or open the cache that already holds them.

    Args:
        images: What to decode.
        side: Side of the squares, S.
        evaluation_size: Side of the evaluation images, E.
        progress: Called with the number of images just done.

    Raises:
        DataError: No image can be read, or the cache would lie among them.
        ResourceError: The disk is full, or the cache cannot be written, or somebody deletes it.
    """
    for place in _folders(images):
        check_cache_outside(place)
    folder = cache_root() / fingerprint(images, side, evaluation_size)
    forms = _forms(len(images.names), side, evaluation_size)
    if not folder.exists():
        _remove_abandoned(cache_root())
        fresh = folder.with_name(f".building-{folder.name}")
        needed = len(images.names) * 3 * (side**2 + evaluation_size**2)
        needed -= _written(fresh)
        if not folder.exists():  # another process may have finished it by now
            _check_space(folder, needed)
        with _alone_in(fresh):
            if folder.exists():  # another process finished it while this one waited
                shutil.rmtree(fresh)
            else:
                try:
                    _fill(fresh, images, side, evaluation_size, progress)
                    fresh.rename(folder)
                except FileNotFoundError:  # of images is told by name
                    raise ResourceError(
                        f"{fresh}: this image cache was deleted while it was built; run the same command again."
                    ) from None
                return _open_cache(folder, forms)
    try:
        cache = _open_cache(folder, forms)
    except _DAMAGE:
        terminal.warn(f"{folder}: this image cache is damaged; it is built again.")
        try:
            shutil.rmtree(folder)  # damaged; the images are still there
        except FileNotFoundError:  # another process is mending it
            pass
        except OSError as error:
            raise ResourceError(
                f"{folder}: this image cache is damaged and cannot be deleted ({error.strerror}); name another place in LABELWISE_CACHE."
            ) from None
        return build_cache(images, side=side, evaluation_size=evaluation_size, progress=progress)
    progress(len(images.names))
    return cache


def read_evaluations(
    images: ImageSet,
    rows: npt.NDArray[np.int64],
    size: int,
    intensity_range: Range | None,
    left_out: list[dict[str, str]] | None = None,
) -> Iterator[tuple[npt.NDArray[np.int64], Pixels]]:
    """Decode images some at a time (`held_at_once`) for an evaluation at another size, without keeping them.

    Args:
        images: The set.
        rows: Which of them.
        size: Side of the evaluation images, E.
        intensity_range: See `ImageCache`.
        left_out: Takes the file and reason of each image that cannot be read; without it, all must be readable.

    Yields:
        Of each so many rows those that can be read, (B,), maybe none, and their centres, uint8, (B, E, E, 3).

    Raises:
        DataError: An image cannot be read.
    """
    shortest = max(decoding.SHORTEST, decoding.evaluation_short_side(size))
    arguments = {"size": size, "intensity_range": intensity_range, "shortest": shortest}
    kept: list[int] = []
    pixels: list[bytes] = []
    together = held_at_once(size)
    with Readers("center", **arguments) as readers:
        asked = rows.tolist()
        for number, (row, answer) in enumerate(zip(asked, readers.map(asked, images.locate), strict=True), 1):
            if not isinstance(answer, UnreadableImage):
                kept.append(row)
                pixels.append(answer[1])
            elif left_out is None:
                raise DataError(f"{images.names[row]}: could be read before, and now not: {answer}")
            else:
                left_out.append({"file": images.names[row], "reason": str(answer)})
            if number % together == 0 or number == len(asked):
                whole = np.frombuffer(bytearray().join(pixels), np.uint8)
                yield np.array(kept, np.int64), whole.reshape(-1, size, size, 3)
                kept, pixels = [], []


def held_at_once(size: int) -> int:
    """How many evaluation images of a side `read_evaluations` gives at once."""
    total, fewest, most = _DECODED
    return max(fewest, min(most, total // size**2))


def sample_sizes(images: ImageSet, count: int = 200) -> npt.NDArray[np.int64]:
    """Height and width of some images spread over the set, from their headers, (M, 2).

    Raises:
        DataError: None of them can be read.
    """
    rows = np.unique(np.linspace(0, len(images.names) - 1, count).astype(int)).tolist()
    with Readers("size") as readers:
        answers = readers.map(rows, images.locate)
        sizes = [answer[0] for answer in answers if not isinstance(answer, UnreadableImage)]
    if not sizes:
        raise DataError(
            f"{images.root}: none of its images can be read; `labelwise scan {images.root}` says why."
        )
    return np.array(sizes)


def channel_statistics(
    squares: Pixels, rows: npt.NDArray[np.int64]
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of each channel over some squares, in 0-1."""
    rows = rows[np.linspace(0, len(rows) - 1, min(_SAMPLED, len(rows))).astype(int)]
    total, squared, pixels = np.zeros(3), np.zeros(3), 0
    together = max(1, min(_CHUNK, _MEASURED // squares[0].size))
    for start in range(0, len(rows), together):
        values = squares[rows[start : start + together]].reshape(-1, 3) / 255.0
        total, squared, pixels = total + values.sum(0), squared + (values**2).sum(0), pixels + len(values)
        if isinstance(squares, np.memmap):
            _forget_pages(squares)
    means = total / pixels
    mean, std = means.tolist(), np.sqrt(np.maximum(squared / pixels - means**2, 1e-4)).tolist()
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Make a folder, or go on with it, while no other process does; wait for one that does.

    Raises:
        ResourceError: A file is in its place.
    """
    while True:
        try:
            folder.mkdir(exist_ok=True)
        except FileExistsError:
            raise ResourceError(
                f"{folder}: a file, where a folder of the image cache belongs; delete it."
            ) from None
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # another process has just finished it
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if folder.exists() and os.path.samestat(folder.stat(), os.fstat(descriptor)):
                yield
                return
        finally:
            os.close(descriptor)


def _remove_abandoned(root: Path) -> None:
    """Delete caches whose building stopped long ago and was never gone on with."""
    for folder in root.glob(".building-*"):
        try:
            age = time.time() - folder.stat().st_mtime
        except FileNotFoundError:  # another process has just finished it
            continue
        if age > _ABANDONED_SECONDS:
            with _alone_in(folder):
                shutil.rmtree(folder)


def _fill(
    folder: Path, images: ImageSet, side: int, evaluation_size: int, progress: Callable[[int], None]
) -> None:
    """Decode what is not decoded yet; `progress.json` says how far an earlier process came."""
    count = len(images.names)
    forms = _forms(count, side, evaluation_size)
    before = _read_progress(folder, forms)
    squares, evaluations, sizes, keys, shots = (
        _open_array(folder / name, *form, go_on=before is not None) for name, form in forms.items()
    )
    facts = before or {"rows": 0, "quarantined": [], "intensity_range": _set_range(images)}
    quarantined: list[dict[str, str]] = facts["quarantined"]
    progress(facts["rows"])
    arguments = {
        "squares": (str(squares.filename), squares.offset),
        "evaluations": (str(evaluations.filename), evaluations.offset),
        "side": side,
        "evaluation_size": evaluation_size,
        "intensity_range": facts["intensity_range"],
        "shortest": decoding.shortest_for(side, evaluation_size),
    }
    saved_at = time.monotonic()
    with Readers("cache", **arguments) as readers:
        for start in range(facts["rows"], count, _CHUNK):
            rows = range(start, min(start + _CHUNK, count))
            for row, answer in zip(rows, readers.map(rows, images.locate), strict=True):
                if isinstance(answer, UnreadableImage):
                    squares[row], evaluations[row], sizes[row], keys[row], shots[row] = 0, 0, 1, 0, 0
                    quarantined.append({"file": images.names[row], "reason": str(answer)})
                else:
                    (sizes[row], keys[row], shots[row]), _ = answer
                progress(1)
            facts["rows"] = rows.stop
            is_last = rows.stop == count
            if is_last or time.monotonic() - saved_at > _SAVE_SECONDS:
                for array in (squares, evaluations, sizes, keys, shots):
                    array.flush()
                    flush(Path(str(array.filename)))  # what the readers wrote into it
                if not is_last:
                    _write_facts(folder / _PROGRESS, facts)
                saved_at = time.monotonic()
            for array in (squares, evaluations):
                _forget_pages(array)
    if len(quarantined) == count:
        shutil.rmtree(folder)
        raise DataError(
            f"{images.root}: none of its {count} images can be read, e.g. {quarantined[0]['file']}: {quarantined[0]['reason']}."
        )
    (folder / _PROGRESS).unlink(missing_ok=True)
    _write_facts(
        folder / _FACTS,
        {
            "images": count,
            "quarantined": quarantined,
            "intensity_range": facts["intensity_range"],
            "arrays": {name: _checksum(folder / name) for name in forms},
        },
    )


Form = tuple[type[np.generic], tuple[int, ...]]


def _forms(count: int, side: int, evaluation_size: int) -> dict[str, Form]:
    """Number type and shape of each array of a cache."""
    return {
        _SQUARES: (np.uint8, (count, side, side, 3)),
        _EVALUATIONS: (np.uint8, (count, evaluation_size, evaluation_size, 3)),
        "sizes.npy": (np.int32, (count, 2)),
        "keys.npy": (np.uint64, (count,)),
        "shots.npy": (np.int64, (count, 2)),
    }


def _load(path: Path, form: Form, *, mapped: bool = True) -> npt.NDArray[Any]:
    if not path.is_file():  # opening a pipe waits for its other end
        raise ValueError(f"{path}: not a file")
    array: npt.NDArray[Any] = np.load(path, mmap_mode="r" if mapped else None)
    if (array.dtype.type, array.shape) != form:
        raise ValueError(f"{array.dtype} {array.shape}, not {form}")
    return array


def _checksum(file: Path) -> int:
    """CRC-32 of a file's size and bytes; of a large one, of pieces all over it."""
    if not file.is_file():
        raise ValueError(f"{file}: not a file")
    size = file.stat().st_size
    found = zlib.crc32(str(size).encode())
    with file.open("rb") as opened:
        for start in range(0, size, max(_PIECE, size // _PIECES)):
            opened.seek(start)
            found = zlib.crc32(opened.read(_PIECE), found)
    return found


def _write_facts(path: Path, facts: dict[str, Any]) -> None:
    """Write what is known of a cache, with a checksum of its own."""
    write_json(path, {**facts, "crc32": zlib.crc32(json.dumps(facts).encode())})


def _parse(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path}: not a file")
    return json.loads(path.read_text(encoding="utf-8"))


def _read_facts(path: Path) -> dict[str, Any]:
    """Read what `_write_facts` wrote; raises one of `_DAMAGE` where it is anything else."""
    facts: dict[str, Any] = _parse(path)
    if facts.pop("crc32") != zlib.crc32(json.dumps(facts).encode()):
        raise ValueError(f"{path}: not what was written")
    return facts


def _open_array(
    path: Path, kind: type[np.generic], shape: tuple[int, ...], *, go_on: bool
) -> np.memmap[Any, Any]:
    """Open an array that an earlier process began, or make one whose disk space is taken at once."""
    if go_on:
        return np.lib.format.open_memmap(path, "r+")
    array = np.lib.format.open_memmap(path, "w+", kind, shape)
    if hasattr(os, "posix_fallocate"):  # a map into a full disk would end the process by SIGBUS
        with path.open("rb+") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            except OSError as error:
                if error.errno == errno.ENOSPC:
                    needed = path.stat().st_size
                    path.unlink()
                    raise _no_space(path.parent, needed) from None
    return array


def _read_progress(folder: Path, forms: dict[str, Form]) -> dict[str, Any] | None:
    """How far an earlier process came; None where none did, or what it left is damaged."""
    path = folder / _PROGRESS
    try:
        found = _read_facts(path)
        for name, form in forms.items():
            _load(folder / name, form)
    except _DAMAGE:
        path.unlink(missing_ok=True)
        return None
    return found


def _forget_pages(array: np.memmap[Any, Any]) -> None:
    """Let go of the memory behind what was written; the system keeps or writes it as it sees fit."""
    array._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]  # numpy's, not in its stubs


def _open_cache(folder: Path, forms: dict[str, Form]) -> ImageCache:
    facts = _read_facts(folder / _FACTS)
    if facts["arrays"] != {name: _checksum(folder / name) for name in forms}:
        raise ValueError(f"{folder}: not what was written")
    squares, evaluations, sizes, keys, shots = (
        _load(folder / name, form, mapped=name in (_SQUARES, _EVALUATIONS)) for name, form in forms.items()
    )
    return ImageCache(
        folder=folder,
        squares=squares,
        evaluations=evaluations,
        sizes=sizes,
        keys=keys,
        shots=shots,
        readable=keys != 0,
        quarantined=facts["quarantined"],
        intensity_range=tuple(facts["intensity_range"]) if facts["intensity_range"] else None,
    )


def _folders(images: ImageSet) -> list[Path]:
    """The image folder, and those outside it that test or labeled images came from."""
    return sorted({images.root} | {part.folder for part in images.parts if isinstance(part, Files)})


def fingerprint(images: ImageSet, side: int, evaluation_size: int) -> str:
    """Hash of what the files are and what is made of them."""
    tables = [part.fingerprint for part in images.parts if isinstance(part, TableRows)]
    digest = hashlib.sha256(
        f"{_VERSION} {decoding.HAS_HEIF} {side} {evaluation_size} {' '.join(tables)}".encode()
    )
    digest.update(str(images.root.resolve()).encode("utf-8", "surrogateescape"))
    for name, path in zip(images.names, images.paths(), strict=True):
        size = changed = 0
        with suppress(OSError, ValueError):
            if path:
                stat = os.stat(path)
                size, changed = stat.st_size, stat.st_mtime_ns
        digest.update(f"\0{name}\0{size}\0{changed}".encode())
    return digest.hexdigest()[:24]


def _written(fresh: Path) -> int:
    """Bytes on disk of a build that an earlier process began, or another is at work on."""
    written = 0
    for name in (_SQUARES, _EVALUATIONS):
        with suppress(FileNotFoundError, NotADirectoryError):
            written += (fresh / name).stat().st_blocks * 512
    return written


def _check_space(folder: Path, needed: int) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(
            f"{folder.parent}: cannot hold the image cache ({error.strerror}); name another place in LABELWISE_CACHE."
        ) from None
    if not os.access(folder.parent, os.W_OK | os.X_OK):
        raise ResourceError(
            f"{folder.parent}: the image cache cannot be written there; name another place in LABELWISE_CACHE."
        )
    if needed > shutil.disk_usage(folder.parent).free:
        raise _no_space(folder.parent, needed)


def _no_space(place: Path, needed: int) -> ResourceError:
    free = shutil.disk_usage(place).free
    return ResourceError(
        f"{place}: the image cache needs {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free; "
        f"free some, name another place in LABELWISE_CACHE, or use a smaller --image-size."
    )


def _set_range(images: ImageSet) -> Range | None:
    """Range of intensities of the images deeper than 8 bits, None when there are none.

    Of more than a hundred, the hundredth part that reaches furthest at each end is clipped: one broken file shall
    not turn all others dark.
    """
    deep_suffixes = (".png", ".tif", ".tiff", ".pgm", ".ppm", ".jp2")
    rows = [
        row
        for row, name in enumerate(images.names)
        if name.lower().endswith(deep_suffixes) or images.layout.startswith("dataset")
    ]
    with Readers("deep range") as readers:
        answers = readers.map(rows, images.locate)
        found = [answer[0] for answer in answers if not isinstance(answer, UnreadableImage)]
    ranges = [each for each in found if each is not None]
    if not ranges:
        return None
    lows, highs = np.array(ranges).T
    ends = np.quantile(lows, 0.01, method="lower"), np.quantile(highs, 0.99, method="higher")
    return float(ends[0]), float(ends[1])
