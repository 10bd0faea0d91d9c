"""A lost terminal, SIGTERM, Ctrl-C and a second Ctrl-C in every phase: out within ten seconds, nobody left behind, and the same command goes on."""

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Server, Undisturbed, Work, state_of

from labelwise.rundir import RunDirectory

PHASES = {  # stage, function that is running when the signal comes, which call of it
    "cache": ("pretrain", "labelwise.images.cache:_forget_pages", 1),
    "first step": ("pretrain", "labelwise.stages.pretraining:make_views", 1),
    "step": ("pretrain", "labelwise.stages.pretraining:make_views", 12),
    "evaluation": ("pretrain", "labelwise.stages.pretraining:look", 2),
    "save": ("pretrain", "labelwise.learning.checkpoint:save_file", 2),
    "comparison": ("finetune", "labelwise.stages.comparing:store_predictions", 4),
    "report": ("finetune", "labelwise.reports.html:render", 1),
}
SIGNALS = {
    "SIGHUP": [signal.SIGHUP],
    "SIGTERM": [signal.SIGTERM],
    "SIGINT": [signal.SIGINT],
    "SIGINT twice": [signal.SIGINT] * 2,
}


def readers_of(cache: Path) -> list[int]:
    """Children that read images for a command with this cache."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words, surroundings = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
        except OSError:
            continue
        if b"labelwise.images.readers" in words and f"LABELWISE_CACHE={cache}\0".encode() in surroundings:
            found.append(int(process.name))
    return found


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_ends_a_command_soon_and_the_next_one_goes_on(
    work: Work, undisturbed: Undisturbed, phase: str, name: str, tally: Callable[..., None]
) -> None:
    stage, at, call = PHASES[phase]
    run = RunDirectory(work.folder / "run")
    if stage == "finetune":
        shutil.copytree(undisturbed.pretrained, run.path)
    cache = work.folder / "cache"  # its own, so that it is built
    if phase != "cache":
        shutil.copytree(work.server.environment["LABELWISE_CACHE"], cache)
    more = {"environment": {"LABELWISE_CACHE": str(cache)}}
    fault = {"at": at, "call": call, "when": "before", "signal": SIGNALS[name]}
    started = time.monotonic()
    command = work.start(stage, run.path, faults=[fault], **more)
    assert command.wait() == 128 + SIGNALS[name][0], command.words
    assert time.monotonic() - started < 60
    assert "Traceback" not in command.words
    deadline = time.monotonic() + 5
    while (left := readers_of(cache)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left, "a reader outlived its command"
    work.finish(stage, run.path, **more)
    assert state_of(run) == undisturbed.states[stage]
    tally("signal in a phase, out in time, continued to the same tensors")


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_ends_a_scan(server: Server, digits: Path, name: str, tally: Callable[..., None]) -> None:
    fault = {
        "at": "labelwise.stages.scanning:_oddities",
        "call": 20,
        "when": "before",
        "signal": SIGNALS[name],
    }
    command = server.start("scan", digits, faults=[fault])
    assert command.wait(10) == 128 + SIGNALS[name][0]
    assert "Traceback" not in command.words
    assert command.printed == ""
    tally("signal in a phase, out in time, continued to the same tensors")


def test_a_second_signal_does_not_wait_for_a_step_that_hangs(work: Work, tally: Callable[..., None]) -> None:
    fault = {"at": "labelwise.stages.pretraining:make_views", "call": 3, "when": "before", "hang": 100}
    command = work.start("pretrain", work.folder / "run", faults=[fault])
    deadline = time.monotonic() + 60
    while "hanging" not in command.words and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(command.pid, signal.SIGINT)
    time.sleep(0.5)
    os.kill(command.pid, signal.SIGINT)
    assert command.wait(5) == 130
    tally("second Ctrl-C while a step hangs")
