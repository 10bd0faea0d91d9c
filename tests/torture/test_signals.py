"""A lost terminal, SIGTERM, Ctrl-C and a second Ctrl-C in every phase: out soon, nobody left behind, and the same command goes on."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Server, Undisturbed, Work, state_of, wait_for

from labelwise.rundir import RunDirectory

PHASES = {  # stage, function that is running when the signal comes, which call of it
    "cache": ("pretrain", "labelwise.images.cache:_forget_pages", 1),
    "first step": ("pretrain", "labelwise.stages.pretraining:make_views", 1),
    "step": ("pretrain", "labelwise.stages.pretraining:make_views", 12),
    "evaluation": ("pretrain", "labelwise.stages.pretraining:look", 2),
    "last evaluation": ("pretrain", "labelwise.stages.pretraining:look", 6),
    "save": ("pretrain", "labelwise.learning.checkpoint:save_file", 2),
    "comparison": ("finetune", "labelwise.stages.comparing:store_predictions", 4),
    "report": ("finetune", "labelwise.reports.html:render", 1),
}
SIGNALS = {
    "SIGHUP": [signal.SIGHUP],
    "SIGHUP twice": [signal.SIGHUP] * 2,  # of the shell and of the system, when a terminal closes
    "SIGTERM, then SIGHUP": [signal.SIGTERM, signal.SIGHUP],
    "SIGTERM": [signal.SIGTERM],
    "SIGINT": [signal.SIGINT],
    "SIGINT twice": [signal.SIGINT] * 2,
}
ALONE = ("cache", "report")  # phases in which the first signal ends the command
CASES = [
    (phase, name)
    for phase in PHASES
    for name, sent in SIGNALS.items()
    if phase not in ALONE or len(sent) == 1
]


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


def test_a_signal_ends_a_command_and_the_next_one_goes_on(
    work: Work, undisturbed: Undisturbed, tally: Callable[..., None], is_long: bool
) -> None:
    seed = random.randrange(10**6)
    for number, (phase, name) in enumerate(CASES if is_long else random.Random(seed).sample(CASES, 8)):
        case = f"{name} in {phase}, seed {seed}"
        stage, at, call = PHASES[phase]
        run, cache = RunDirectory(work.folder / f"{number}"), work.folder / f"{number}-cache"
        if stage == "finetune":
            shutil.copytree(undisturbed.pretrained, run.path)
        if phase != "cache":
            shutil.copytree(work.server.environment["LABELWISE_CACHE"], cache)
        more = {"environment": {"LABELWISE_CACHE": str(cache)}}
        fault = {"at": at, "call": call, "when": "before", "signal": SIGNALS[name]}
        command = work.start(stage, run.path, faults=[fault], **more)
        assert command.wait(60) == 128 + SIGNALS[name][0], f"{case}: {command.words}"
        assert "Traceback" not in command.words, case
        if phase not in ALONE and name != "SIGINT twice":
            assert "the same command goes on." in " ".join(command.words.split()), case
        wait_for(lambda cache=cache: not readers_of(cache), command, 20)  # type: ignore[misc]
        work.finish(stage, run.path, **more)
        assert state_of(run) == undisturbed.states[stage], case
        tally("signal in a phase, out in time, continued to the same tensors")


@pytest.mark.parametrize("name", ["SIGHUP", "SIGTERM", "SIGINT"])
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
    tally("signal in a scan, out in time")


def test_a_second_signal_does_not_wait_for_a_step_that_hangs(work: Work, tally: Callable[..., None]) -> None:
    fault = {"at": "labelwise.stages.pretraining:make_views", "call": 3, "when": "before", "hang": 100}
    command = work.start("pretrain", work.folder / "run", faults=[fault])
    wait_for(lambda: "hanging" in command.words, command)
    os.kill(command.pid, signal.SIGINT)
    time.sleep(0.5)
    os.kill(command.pid, signal.SIGINT)
    assert command.wait(5) == 130
    tally("second Ctrl-C while a step hangs")
