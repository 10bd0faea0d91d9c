"""A long training killed every minute ends in the tensors of one that was left alone, in memory that does not grow."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Work, state_of

from labelwise.rundir import RunDirectory

SECONDS = 20 * 60.0  # of training that is killed
BETWEEN = 60.0
GROWTH = 32 * 2**20  # bytes, of the peak after a quarter of the time


def peak_memory(pid: int) -> int:
    """Most memory that a process has held, bytes; 0 when it has ended."""
    found = Path(f"/proc/{pid}/status").read_text(encoding="ascii").partition("VmHWM:")[2].split()
    return int(found[0]) * 1024 if found else 0


def test_a_training_killed_every_minute_ends_as_one_left_alone(
    work: Work, is_long: bool, tally: Callable[..., None]
) -> None:
    if not is_long:
        pytest.skip("takes an hour; --long")
    started = time.monotonic()
    work.finish("pretrain", work.folder / "pace", epochs=400, wait=SECONDS)
    epochs = round(400 * SECONDS / (time.monotonic() - started))
    alone, killed = RunDirectory(work.folder / "alone"), RunDirectory(work.folder / "killed")
    command, peaks = work.start("pretrain", alone.path, epochs=epochs), []
    while not command.is_over():
        peaks.append(peak_memory(command.pid) or peaks[-1])
        time.sleep(1)
    assert command.wait() == 0, command.words
    assert peaks[-1] - peaks[len(peaks) // 4] < GROWTH, "memory grows while it trains"
    kills = 0
    while True:
        command, deadline = work.start("pretrain", killed.path, epochs=epochs), time.monotonic() + BETWEEN
        while time.monotonic() < deadline and not command.is_over():
            time.sleep(0.2)
        if command.is_over():
            break
        command.kill()
        command.wait()
        kills += 1
        tally("SIGKILL once a minute in one training")
    assert command.wait() == 0, command.words
    assert kills >= 10
    assert state_of(killed) == state_of(alone)
