"""Read images in child processes: a file that crashes its decoder, hangs or eats memory costs itself and nothing else.

A child decodes a few files and answers. When it dies instead, each of them is tried alone, so that the one to blame is
known. A child ends by itself when a file takes too long, when nothing is asked of it for a while, and, once it has done what it
was asked, when its parent is gone. One that does not, because it is stopped or the system lets no signal through, is given up.

    parent -> child   {"job", "arguments", "seconds", "files": [[row, path or null], ...]}, then the bytes of each null
    child -> parent   [{"value", "pixels": bytes of them} or {"reason"}, ...], then the pixels of all, if there are any; or {"failed"}
"""

import atexit
import functools
import io
import json
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import accumulate
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn, Self

import numpy as np

from labelwise.environment import free_memory, processors
from labelwise.images import decoding
from labelwise.images.decoding import Pixels, Range, UnreadableImage, UnreadableNow

Contents = str | bytes  # where a file lies, or what is in it
File = tuple[int, Contents]  # row of the image
Place = tuple[str, int]  # a file and where its pixels begin
Answer = tuple[Any, bytes]  # what a job found, and pixels

_FEWEST, _MOST = 8, 64  # files a child is given at once; more the sooner it answers
_SOON, _LATE = 0.02, 0.1  # seconds
_SMALL = 2**20  # bytes of files that lie in a table
_AHEAD = 512  # files that are asked for before the first of them is waited for
_SECONDS = 60.0  # for one file; the largest that are let in take two
_SLACK_SECONDS = 30.0  # that a child may take beyond that before it is given up; it may have to start
_IDLE_SECONDS = 10.0  # so long a child waits for the next job, which saves starting one (0.3 s)
_MEMORY = 4 * 2**30  # bytes of address space beyond what a child starts with; the largest images take 2 GiB
_TAKES = (
    2**30
)  # bytes of memory that must be there for each; one image of 64 megapixels takes 0.8 GiB (measured 2026-11-26)
_NO_MEMORY = 77  # exit code of a child
_TOO_LARGE = "too large for the memory"
_idle: list["_Child"] = []  # alive, and nobody's
_lock = threading.Lock()


class Readers:
    """Children that all do one job, as many as there are processors for this process and memory for them.

    Args:
        job: Name of one of the jobs below.
        arguments: What it takes besides a file; JSON.
    """

    def __init__(self, job: str, **arguments: Any) -> None:
        self._request = {"job": job, "arguments": arguments}
        self._at_work: set[_Child] = set()
        self._count = int(max(1, min(processors(), free_memory() / _TAKES)))
        self._threads = ThreadPoolExecutor(self._count)
        self._together = _FEWEST
        self._is_closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:  # wait for no child
            with _lock:
                self._is_closed = True
                for child in self._at_work:
                    child.give_up()
        self._threads.shutdown(cancel_futures=True)

    def map(
        self, rows: Sequence[int], locate: Callable[[int], Contents]
    ) -> Iterator[Answer | UnreadableImage]:
        """Do the job on some files, in their order; what cannot be used comes as the reason why.

        Args:
            rows: Of the images.
            locate: Row to path or bytes; may raise OSError.

        Raises:
            OSError: What the job writes could not be written.
        """
        asked: deque[Future[list[Answer | UnreadableImage]]] = deque()
        each = max(_FEWEST, min(len(rows), _AHEAD) // (2 * self._count))  # so that no child stands idle
        start = done = 0
        while done < len(rows):
            while start < min(done + _AHEAD, len(rows)):
                some = rows[start : start + min(each, self._together)]
                asked.append(self._threads.submit(self._read, some, locate))
                start += len(some)
            answers = asked.popleft().result()
            done += len(answers)
            yield from answers

    def _read(self, rows: Sequence[int], locate: Callable[[int], Contents]) -> list[Answer | UnreadableImage]:
        found = [(row, _locate(row, locate)) for row in rows]
        there = [(row, contents) for row, contents in found if not isinstance(contents, UnreadableImage)]
        if not there:
            return [contents for _, contents in found if isinstance(contents, UnreadableImage)]
        began = time.monotonic()
        answers = iter(self._ask(_take(), there) or [self._ask_alone(each) for each in there])
        took = time.monotonic() - began
        inside = sum(len(contents) for _, contents in there if isinstance(contents, bytes))
        if took < _SOON and inside < _SMALL and len(rows) == self._together:
            self._together = min(_MOST, 2 * len(rows))
        elif took > _LATE:
            self._together = _FEWEST
        return [contents if isinstance(contents, UnreadableImage) else next(answers) for _, contents in found]

    def _ask_alone(self, file: File) -> Answer | UnreadableImage:
        """Ask about one file; if it takes a child too long, or one of its own dies over it, that is the file's doing."""
        child = _take()
        answers = self._ask(child, [file])
        if answers is None and child.process.wait() != -signal.SIGALRM:
            child = _Child()
            answers = self._ask(child, [file])
        return answers[0] if answers else UnreadableNow(child.how_it_ended())

    def _ask(self, child: "_Child", files: Sequence[File]) -> list[Answer | UnreadableImage] | None:
        """Ask a child; None when it dies over it."""
        with _lock:
            self._at_work.add(child)
            if self._is_closed:
                child.give_up()
        answers = None
        try:
            answers = child.ask(self._request, files)
        finally:
            with _lock:
                self._at_work.discard(child)
                is_kept = answers is not None and len(_idle) < self._count and not self._is_closed
                if is_kept:
                    _idle.append(child)
            if not is_kept:
                child.end()
        if self._is_closed:
            raise RuntimeError("closed while reading")
        return answers


class _Child:
    """One child process."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)  # ours, whatever they are
        one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from {__name__} import serve; serve({theirs.fileno()})"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True,
            env={**os.environ, "PYTHONPATH": paths, **one},
        )  # fmt: skip
        theirs.close()
        self.socket = ours
        self.connection = Connection(os.dup(ours.fileno()))
        self.is_late = False

    def ask(self, request: dict[str, Any], files: Sequence[File]) -> list[Answer | UnreadableImage] | None:
        """Hand over some files and wait for the answers; None when the child dies.

        Raises:
            OSError: What the job writes could not be written.
        """
        seconds = (
            min(len(files), _FEWEST) * _SECONDS + _SLACK_SECONDS
        )  # more are only asked for where files take a moment
        timer = threading.Timer(seconds, self._is_too_late)
        timer.daemon = True
        timer.start()
        named = [(row, contents if isinstance(contents, str) else None) for row, contents in files]
        try:
            self.connection.send_bytes(json.dumps({**request, "seconds": _SECONDS, "files": named}).encode())
            for _, contents in files:
                if isinstance(contents, bytes):
                    self.connection.send_bytes(contents)
            answers = json.loads(self.connection.recv_bytes())
            lengths = [answer["pixels"] for answer in answers if "pixels" in answer]
            pixels = memoryview(self.connection.recv_bytes() if any(lengths) else b"")
        except (EOFError, OSError):  # of the connection: there is nobody at its other end
            return None
        finally:
            timer.cancel()
        if isinstance(answers, dict):
            _raise_failure(answers["failed"])
        ends = iter(accumulate(lengths))
        return [
            (UnreadableNow if answer["now"] else UnreadableImage)(answer["reason"])
            if "reason" in answer
            else (answer["value"], bytes(pixels[(end := next(ends)) - answer["pixels"] : end]))
            for answer in answers
        ]

    def _is_too_late(self) -> None:
        self.is_late = True
        self.give_up()

    def give_up(self) -> None:
        """Kill it and wait for no answer, which one that hangs in the system would not even end by."""
        self.process.kill()
        with suppress(OSError):  # it ended in between
            self.socket.shutdown(socket.SHUT_RDWR)

    def end(self) -> None:
        """Let go of it, dead or alive."""
        self.connection.close()  # by which it ends, unless it is busy
        self.socket.close()
        for patience in (0.5, 5.0):  # the second only one that hangs in the system outlasts
            try:
                self.process.wait(patience)
            except subprocess.TimeoutExpired:
                self.process.kill()

    def how_it_ended(self) -> str:
        """Why a file cost a child its life, in a few words."""
        if self.is_late:
            return _takes_too_long()
        status = self.process.wait()
        if status == _NO_MEMORY:
            return _TOO_LARGE
        if status >= 0:
            raise RuntimeError(f"a reading process ended with exit code {status}")
        if -status == signal.SIGALRM:
            return _takes_too_long()
        if -status in (signal.SIGKILL, signal.SIGTERM):
            return "the system ended its reading (memory, most likely)"
        named = {each.value: each.name for each in signal.Signals}
        return f"crashes the decoder ({named.get(-status, f'signal {-status}')})"


def _take() -> _Child:
    """A child that is alive and idle, or a new one."""
    with _lock:
        dead = [child for child in _idle if child.process.poll() is not None]
        _idle[:] = [child for child in _idle if child not in dead]
        child = _idle.pop() if _idle else None
    for each in dead:
        each.end()
    _end_idle_at_exit()
    return child or _Child()


@functools.cache
def _end_idle_at_exit() -> None:
    def end() -> None:
        for child in _idle:
            child.end()

    atexit.register(end)


def _takes_too_long() -> str:
    return f"takes more than {_SECONDS:g} s to read"


def _locate(row: int, locate: Callable[[int], Contents]) -> Contents | UnreadableImage:
    try:
        return locate(row)
    except OSError as error:
        return UnreadableNow(_cannot_be_read(error))


def _cannot_be_read(error: OSError) -> str:
    return f"cannot be read ({error.strerror or error})"


def _raise_failure(failed: dict[str, Any]) -> NoReturn:
    """Raise what a child met that is not the file's doing."""
    if failed["errno"]:
        raise OSError(failed["errno"], os.strerror(failed["errno"]), failed["file"])
    raise RuntimeError(f"a reading process failed:\n{failed['traceback']}")


# --- in the child


def serve(descriptor: int) -> None:
    """Answer until nobody asks any more."""
    connection = Connection(descriptor)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # it ends with its parent
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # whatever it was to whoever started us
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    _limit_memory()
    warnings.simplefilter("ignore")
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)  # libraries print what they think of odd files
    try:
        while connection.poll(_IDLE_SECONDS):
            _serve_once(connection)
    except (EOFError, ConnectionError):
        return
    except MemoryError:
        os._exit(_NO_MEMORY)


def _serve_once(connection: Connection) -> None:
    """Take some files and answer."""
    request = json.loads(connection.recv_bytes())
    files = [(row, connection.recv_bytes() if path is None else path) for row, path in request["files"]]
    try:
        answers = [_answer(request, row, contents) for row, contents in files]
    except Exception as error:  # noqa: BLE001 - told to the parent, which raises it
        code = error.errno if isinstance(error, OSError) else None
        failed = {
            "errno": code,
            "file": getattr(error, "filename", None),
            "traceback": traceback.format_exc(),
        }
        connection.send_bytes(json.dumps({"failed": failed}).encode())
        return
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    connection.send_bytes(json.dumps([words for words, _ in answers]).encode())
    if pixels := b"".join(each for _, each in answers):
        connection.send_bytes(pixels)


def _answer(request: dict[str, Any], row: int, contents: Contents) -> tuple[dict[str, Any], bytes]:
    signal.setitimer(signal.ITIMER_REAL, request["seconds"])  # SIGALRM ends the process, wherever it hangs
    try:
        try:
            if isinstance(contents, bytes):
                data = contents
            elif stat.S_ISREG(os.stat(contents).st_mode):
                with open(contents, "rb", buffering=0) as file:
                    data = file.read()
            else:
                return {"reason": "not a regular file", "now": False}, b""
        except OSError as error:
            return {"reason": _cannot_be_read(error), "now": True}, b""
        value, pixels = JOBS[request["job"]](data, row, **request["arguments"])
    except UnreadableImage as error:
        return {"reason": str(error), "now": isinstance(error, UnreadableNow)}, b""
    except MemoryError:
        return {"reason": _TOO_LARGE, "now": True}, b""
    return {"value": value, "pixels": len(pixels)}, pixels


def _limit_memory() -> None:
    """Let a decoder that wants too much fail alone; on Linux, as macOS obeys no such limit."""
    used = Path("/proc/self/statm")
    if used.exists():
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = int(used.read_text(encoding="ascii").split()[0]) * resource.getpagesize() + _MEMORY
        if soft == resource.RLIM_INFINITY or most < soft:
            resource.setrlimit(
                resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard)
            )
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


# --- the jobs


def _size(data: bytes, row: int) -> Answer:
    """Height and width, from the header."""
    return decoding.header_size(data), b""


def _deep_range(data: bytes, row: int) -> Answer:
    """Lowest and highest intensity of a deep image, None of any other."""
    return decoding.deep_range(data), b""


def _center(data: bytes, row: int, *, size: int, intensity_range: Range | None, shortest: int) -> Answer:
    """Pixels for evaluation, (E, E, 3)."""
    image, _ = decoding.decode_image(data, intensity_range, shortest)
    return None, decoding.evaluation_image(image, size).tobytes()


def _picture(
    data: bytes,
    row: int,
    *,
    longest: int,
    small: int,
    intensity_range: Range | None,
    shortest: int,
    key_shortest: int,
) -> Answer:
    """Content key, media type and file of the whole image, for a browser; the file's metadata is not in it."""
    image, _ = decoding.decode_image(data, intensity_range, shortest)
    key = decoding.content_key(np.asarray(decoding.decode_image(data, intensity_range, key_shortest)[0]))
    image.thumbnail((longest, longest))
    form = "PNG" if max(image.size) <= small else "JPEG"
    buffer = io.BytesIO()
    image.save(buffer, form, **({} if form == "PNG" else {"quality": 90}))
    return (key, f"image/{form.lower()}"), buffer.getvalue()


def _square(data: bytes, row: int, *, side: int, intensity_range: Range | None, shortest: int) -> Answer:
    """Size and content key, and pixels of the square, (S, S, 3)."""
    image, size = decoding.decode_image(data, intensity_range, shortest)
    key = decoding.content_key(np.asarray(image))
    return (size, key), decoding.square_pixels(image, side).tobytes()


def _cache(
    data: bytes, row: int, *, squares: Place, evaluations: Place, side: int, evaluation_size: int,
    intensity_range: Range | None, shortest: int,
) -> Answer:  # fmt: skip
    """Size, content key and shot; pixels go into the files of a cache."""
    image, size = decoding.decode_image(data, intensity_range, shortest)
    _put(squares, row, decoding.square_pixels(image, side))
    _put(evaluations, row, decoding.evaluation_pixels(image, evaluation_size))
    return (size, decoding.content_key(np.asarray(image)), decoding.shot(data)), b""


def _put(place: Place, row: int, pixels: Pixels) -> None:
    path, offset = place
    with open(path, "rb+") as file:
        file.seek(offset + row * pixels.nbytes)
        file.write(pixels.tobytes())


def _examine(data: bytes, row: int) -> Answer:
    """Content key, height and width, largest standard deviation of a channel in the middle, and what `describe` says."""
    image, shape = decoding.decode_image(data)
    spread = float(decoding.evaluation_pixels(image, 32).std(axis=(0, 1)).max())
    return (decoding.content_key(np.asarray(image)), shape, spread, decoding.describe(data)), b""


JOBS: dict[str, Callable[..., Answer]] = {
    "size": _size,
    "deep range": _deep_range,
    "center": _center,
    "picture": _picture,
    "square": _square,
    "cache": _cache,
    "examine": _examine,
}
