"""A disk that is full at the start or at a save, read-only or broken: exit code 5, what was saved stays, and it goes on."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import Undisturbed, Work, state_of, wait_for

from labelwise.rundir import RunDirectory


@pytest.mark.parametrize("call", [1, 2, 7])
@pytest.mark.parametrize(
    "at", ["labelwise.learning.checkpoint:save_file", "labelwise.learning.checkpoint:flush"]
)
def test_a_save_that_finds_the_disk_full_costs_nothing(
    work: Work, undisturbed: Undisturbed, at: str, call: int, tally: Callable[..., None]
) -> None:
    run = RunDirectory(work.folder / "run")
    command = work.start(
        "pretrain", run.path, faults=[{"at": at, "call": call, "when": "before", "raise": "ENOSPC"}]
    )
    assert command.wait() == 5, command.words
    assert "full; free some and run the same command again." in " ".join(command.words.split())
    assert not list(run.checkpoints.glob(".step-*")), "the half of it that fills the disk is gone"
    work.finish("pretrain", run.path)
    assert state_of(run) == undisturbed.states["pretrain"]
    tally("disk full at a save, continued to the same tensors")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a file system here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fill(place: Path, leave: int) -> Path:
    """Use up a file system but for some bytes."""
    file = place / "filler"
    with file.open("wb") as filler:
        while (free := os.statvfs(place).f_bavail * os.statvfs(place).f_frsize) > leave:
            try:
                filler.write(b"x" * min(4096, free - leave))
                filler.flush()
            except OSError:
                break
    return file


def test_a_disk_that_is_too_small_is_told_before_the_first_step(
    work: Work, small_disk: Path, tally: Callable[..., None]
) -> None:
    filler = fill(small_disk, 300_000)
    command = work.start("pretrain", small_disk / "run")
    assert command.wait() == 5, command.words
    assert "checkpoints need up to" in command.words
    assert not RunDirectory(small_disk / "run").checkpoints.exists()
    filler.unlink()
    work.finish("pretrain", small_disk / "run")
    tally("disk too small, told before the first step")


def test_a_disk_that_fills_while_training_is_survived(
    work: Work, small_disk: Path, undisturbed: Undisturbed, tally: Callable[..., None]
) -> None:
    run = RunDirectory(small_disk / "run")
    command = work.start("pretrain", run.path)
    wait_for(lambda: list(run.checkpoints.glob("step-*")), command)
    filler = fill(small_disk, 0)
    assert command.wait() == 5, command.words
    assert "full; free some and run the same command again." in " ".join(command.words.split())
    filler.unlink()
    again = work.finish("pretrain", run.path)
    assert "going on after step" in again.words
    assert state_of(run) == undisturbed.states["pretrain"]
    tally("disk filled while training, continued to the same tensors")


@pytest.mark.parametrize("error", ["EROFS", "EIO", "EACCES"])
def test_a_save_that_fails_is_never_called_saved(
    work: Work, undisturbed: Undisturbed, error: str, tally: Callable[..., None]
) -> None:
    run = RunDirectory(work.folder / "run")
    fault = {"at": "labelwise.learning.checkpoint:flush", "call": 6, "when": "before", "raise": error}
    command = work.start("pretrain", run.path, faults=[fault])
    assert command.wait() == 5, command.words
    assert "mend that and run the same command again." in " ".join(command.words.split())
    assert "saved" not in command.words
    work.finish("pretrain", run.path)
    assert state_of(run) == undisturbed.states["pretrain"]
    tally("write refused by the system, continued to the same tensors")


def test_memory_that_runs_out_is_told_with_what_needs_less_and_nothing_is_lost(
    work: Work, undisturbed: Undisturbed, tally: Callable[..., None]
) -> None:
    run = RunDirectory(work.folder / "run")
    fault = {
        "at": "labelwise.stages.pretraining:make_views",
        "call": 9,
        "when": "before",
        "raise": "MemoryError",
    }
    command = work.start("pretrain", run.path, faults=[fault])
    assert command.wait() == 5, command.words
    words = " ".join(command.words.split())
    assert (
        "out of memory at step 8. Free some and run the same command again, which goes on from the last save"
        in words
    )
    assert (
        "else start anew with --micro-batch-size 16 (the same loss, slower), or a smaller --image-size."
        in words
    )
    again = work.finish("pretrain", run.path)
    assert "going on after step" in again.words
    assert state_of(run) == undisturbed.states["pretrain"]
    tally("memory ran out at a step, continued to the same tensors")
