"""Real child processes that really crash, hang and run out of memory: one file pays, and all others are read."""

import errno
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from labelwise.images import decoding, readers
from labelwise.images.cache import build_cache
from labelwise.images.decoding import UnreadableImage
from labelwise.images.readers import Readers
from labelwise.images.source import open_images

# What a child runs before it serves: jobs that misbehave when the file says so.
MISBEHAVING = """
import os, signal, time
from labelwise.images import decoding, readers

def misbehave(data, row):
    if data.startswith(b"crash"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if data.startswith(b"hang"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
        while True: time.sleep(1)
    if data.startswith(b"stop"):
        os.kill(os.getpid(), signal.SIGSTOP)
    if data.startswith(b"kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    if data.startswith(b"bug"):
        raise ZeroDivisionError("a bug of ours")
    if data.startswith(b"full"):
        raise OSError(28, "No space left on device", "/somewhere/squares.npy")
    if data.startswith(b"bad"):
        raise decoding.UnreadableImage("bad")
    if data.startswith(b"memory"):
        bytearray(6 * 2**30)
    return [row, data.decode(), os.getpid()], bytes([row % 256]) * 3

readers.JOBS["misbehave"] = misbehave
"""


@pytest.fixture(autouse=True)
def _own_children(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(readers, "_idle", [])
    yield
    for child in readers._idle:
        child.end()


@pytest.fixture
def misbehaving(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Children that know one more job, and have a second for a file."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "misbehaving.py").write_text(
        MISBEHAVING + "\nfrom labelwise.images.readers import serve\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "modules")])
    monkeypatch.setattr(readers, "__name__", "misbehaving")
    monkeypatch.setattr(readers, "_SECONDS", 1.0)


def texts(answers: list[Any]) -> list[str]:
    return [str(each) if isinstance(each, UnreadableImage) else each[0][1] for each in answers]


def ask(files: list[bytes]) -> list[Any]:
    with Readers("misbehave") as children:
        return list(children.map(range(len(files)), files.__getitem__))


@pytest.mark.usefixtures("misbehaving")
def test_a_file_that_ends_its_reader_is_named_and_all_others_are_read() -> None:
    files = [f"file {number}".encode() for number in range(60)]
    files[3], files[17], files[18], files[40], files[59] = b"crash", b"hang", b"kill", b"bad", b"crash too"
    if sys.platform == "linux":  # macOS obeys no limit of memory
        files[33] = b"memory"
    expected = [data.decode() for data in files]
    expected[3] = expected[59] = "crashes the decoder (SIGSEGV)"
    expected[17] = "takes more than 1 s to read"
    if sys.platform == "linux":
        expected[33] = "too large for the memory"
    expected[18] = "the system ended its reading (memory, most likely)"
    answers = ask(files)
    assert texts(answers) == expected
    for row, answer in enumerate(answers):
        if not isinstance(answer, UnreadableImage):
            assert answer[0][0] == row
            assert answer[1] == bytes([row]) * 3
    assert len(readers._idle) <= (os.cpu_count() or 1), "those that read one file are gone"


@pytest.mark.usefixtures("misbehaving")
@pytest.mark.parametrize("size", [4, 2**22])
def test_a_reader_that_hears_no_alarm_is_given_up(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Stopped, as it would be in a read that the system does not come back from; before a file or while one is sent."""
    monkeypatch.setattr(readers, "_SECONDS", 0.1)
    monkeypatch.setattr(readers, "_SLACK_SECONDS", 0.5)
    assert texts(ask([b"stop".ljust(size)])) == ["takes more than 0.1 s to read"]
    children = [readers._Child() for _ in range(2)]
    for child in children:
        os.kill(child.process.pid, signal.SIGSTOP)
    readers._idle.extend(children)
    monkeypatch.setattr(readers, "processors", lambda: 1)
    assert texts(ask([b"stop".ljust(size)])) == ["takes more than 0.1 s to read"]
    children[0].end()
    assert [child.process.poll() for child in children] == [-signal.SIGKILL] * 2


@pytest.mark.usefixtures("misbehaving")
def test_children_are_used_again_and_are_not_many() -> None:
    pids = {answer[0][2] for _ in range(3) for answer in ask([b"x"] * 100)}
    assert len(pids) <= (os.cpu_count() or 1)
    assert os.getpid() not in pids


@pytest.mark.usefixtures("misbehaving")
@pytest.mark.parametrize(
    ("soon", "late", "count", "size", "first", "last"),
    [
        (math.inf, math.inf, 2000, 1, 8, 64),
        (0.0, math.inf, 1000, 1, 8, 8),
        (math.inf, math.inf, 600, 2**18, 8, 8),  # what lies in a table is held until it is read
        (0.0, 0.0, 1000, 1, 64, 8),
    ],
)
def test_a_child_is_given_more_files_the_sooner_it_answers(
    monkeypatch: pytest.MonkeyPatch, soon: float, late: float, count: int, size: int, first: int, last: int
) -> None:
    monkeypatch.setattr(readers, "_SOON", soon)
    monkeypatch.setattr(readers, "_LATE", late)
    monkeypatch.setattr(readers, "processors", lambda: 1)
    counts = []
    ask = readers._Child.ask

    def noted(child: Any, request: Any, files: Any) -> Any:
        counts.append(len(files))
        return ask(child, request, files)

    monkeypatch.setattr(readers._Child, "ask", noted)
    with Readers("misbehave") as children:
        children._together = first
        answers = list(children.map(range(count), lambda row: b"x" * size))
    assert len(answers) == sum(counts) == count
    assert (counts[0], counts[-2]) == (first, last)
    assert set(counts[:-1]) <= {8, 16, 32, 64}


@pytest.mark.usefixtures("misbehaving")
def test_many_files_at_once_have_the_time_of_eight(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    class Timer(threading.Timer):
        def __init__(self, seconds: float, call: Any) -> None:
            given.append(seconds)
            super().__init__(seconds, call)

    monkeypatch.setattr(readers.threading, "Timer", Timer)
    monkeypatch.setattr(readers, "_SLACK_SECONDS", 5.0)
    child = readers._Child()
    for count in (1, 8, 64):
        assert child.ask({"job": "misbehave", "arguments": {}}, [(row, b"x") for row in range(count)])
    child.end()
    assert given == [6.0, 13.0, 13.0]


@pytest.mark.usefixtures("misbehaving")
@pytest.mark.parametrize(("free", "most"), [(0.0, 1), (2.9 * 2**30, 2), (math.inf, 5)])
def test_there_are_no_more_children_than_memory_for_them(
    monkeypatch: pytest.MonkeyPatch, free: float, most: int
) -> None:
    monkeypatch.setattr(readers, "processors", lambda: 5)
    monkeypatch.setattr(readers, "free_memory", lambda: free)
    assert len({answer[0][2] for answer in ask([b"x"] * 200)}) == most


@pytest.mark.usefixtures("misbehaving")
def test_a_bug_of_ours_is_raised_and_not_blamed_on_the_file() -> None:
    with pytest.raises(RuntimeError, match="ZeroDivisionError: a bug of ours"):
        ask([b"x", b"bug"])


@pytest.mark.usefixtures("misbehaving")
def test_a_full_disk_is_raised_and_not_blamed_on_the_file() -> None:
    with pytest.raises(OSError, match="No space left on device") as caught:
        ask([b"x", b"full"])
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == "/somewhere/squares.npy"


@pytest.mark.usefixtures("misbehaving")
def test_a_reader_that_cannot_start_is_a_bug_and_not_a_bad_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "__name__", "no_such_module")
    with pytest.raises(RuntimeError, match="a reading process ended with exit code 1"):
        ask([b"x"])


@pytest.mark.usefixtures("misbehaving")
def test_leaving_early_waits_for_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell lets background jobs ignore it
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Readers("misbehave") as children:
        list(children.map(range(1), [b"x"].__getitem__))
        threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        monkeypatch.setattr(readers, "_SECONDS", 100.0)
        list(children.map(range(9), ([b"hang"] * 9).__getitem__))
    signal.signal(signal.SIGINT, before)
    assert time.monotonic() - started < 10


def test_a_reader_is_gone_when_its_parent_is(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    code = (
        "import time; from pathlib import Path; from labelwise.images import readers\n"
        "with readers.Readers('size') as children: list(children.map([0], lambda row: Path('a.png').read_bytes()))\n"
        "print(readers._idle[0].process.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=tmp_path)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert is_alive(child)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert ends(child, 5)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def ends(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_alive(pid)


def outcome(code: str, folder: Path) -> tuple[str, str]:
    """What a program of a few lines prints and complains of."""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, timeout=60)
    return ran.stdout, ran.stderr


def test_a_reader_is_gone_when_nobody_asks(tmp_path: Path) -> None:
    """Its parent sleeps on; the child waits a second, as it finds written in its module."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    impatient = "from labelwise.images import readers; readers._IDLE_SECONDS = 1.0; serve = readers.serve"
    (tmp_path / "impatient.py").write_text(impatient)
    code = (
        "import sys, time; from pathlib import Path; from labelwise.images import readers\n"
        "readers.__name__ = 'impatient'; sys.path.append('.')\n"
        "with readers.Readers('size') as children: list(children.map([0], lambda row: Path('a.png').read_bytes()))\n"
        "child = readers._idle[0].process; print('alive' if child.poll() is None else 'dead')\n"
        "child.wait(20); print(child.returncode)"
    )
    assert outcome(code, tmp_path) == ("alive\n0\n", "")


def test_modules_in_the_folder_one_stands_in_are_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("numpy", "PIL", "json", "labelwise"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    with Readers("size") as children:
        (answer,) = children.map([0], lambda row: str(tmp_path / "a.png"))
    assert answer == ([6, 8], b"")
    assert not (tmp_path / "ran").exists()


def test_what_cannot_be_opened_is_told_whoever_meets_it(tmp_path: Path) -> None:
    def locate(row: int) -> str:
        if row:
            raise PermissionError(errno.EACCES, "Permission denied")
        return str(tmp_path / "gone.png")

    with Readers("size") as children:
        answers = list(children.map(range(2), locate))
    assert list(map(str, answers)) == [
        "cannot be read (No such file or directory)",
        "cannot be read (Permission denied)",
    ]


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "0.png")
    (tmp_path / "1.png").symlink_to("/dev/zero")
    (tmp_path / "2.png").mkdir()
    with Readers("examine") as children:
        answers = list(children.map(range(3), lambda row: str(tmp_path / f"{row}.png")))
    assert list(map(str, answers)) == ["not a regular file"] * 3


def test_a_child_keeps_its_limits_and_heeds_no_signal_that_was_meant_for_its_parent(tmp_path: Path) -> None:
    """Started by somebody who ignores SIGALRM, among processes that are all told to end."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    code = (
        "import os, signal; from pathlib import Path; from labelwise.images import readers\n"
        "signal.signal(signal.SIGALRM, signal.SIG_IGN); signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])\n"
        "data = Path('a.png').read_bytes()\n"
        "with readers.Readers('size') as children: list(children.map([0], lambda row: data))\n"
        "child = readers._idle[0].process\n"
        "for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP): os.kill(child.pid, number)\n"
        "with readers.Readers('size') as children: print(list(children.map([0], lambda row: data)))\n"
        "print(child.poll()); os.kill(child.pid, signal.SIGALRM); print(child.wait(10))"
    )
    assert outcome(code, tmp_path) == ("[([8, 8], b'')]\nNone\n-14\n", "")


def test_pixels_are_those_of_decoding_here(tmp_path: Path, photo: Any) -> None:
    pictures = tmp_path / "photos"
    for seed in range(20):
        photo(pictures / f"{seed:02}.{'jpg' if seed % 2 else 'png'}", seed)
    images = open_images(pictures)
    cache = build_cache(images, side=16, evaluation_size=8)
    for row, name in enumerate(images.names):
        image, size = decoding.decode_image((pictures / name).read_bytes())
        np.testing.assert_array_equal(cache.squares[row], decoding.square_pixels(image, 16))
        np.testing.assert_array_equal(cache.evaluations[row], decoding.evaluation_pixels(image, 8))
        assert tuple(cache.sizes[row]) == size
        assert cache.keys[row] == decoding.content_key(np.asarray(image))
