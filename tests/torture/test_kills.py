"""SIGKILL at any moment, and a process that ends at a chosen call: the same command goes on to the same tensors, bit by bit."""

import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Server, Undisturbed, Work, state_of, wait_for

from labelwise.rundir import RunDirectory, read_jsonl

SHORT, LONG = {"pretrain": 5, "finetune": 3}, {"pretrain": 30, "finetune": 20}


def test_runs_killed_at_random_moments_end_in_the_same_tensors(
    work: Work, undisturbed: Undisturbed, tally: Callable[..., None], is_long: bool
) -> None:
    expected = undisturbed.states
    seed = random.randrange(10**6)
    chance, clock = random.Random(seed), 0.0
    for stage, trials in (LONG if is_long else SHORT).items():
        for trial in range(trials):
            begun = time.monotonic()
            for attempt in range(10):
                run = RunDirectory(work.folder / f"{stage}-{trial}-{attempt}")
                if stage == "finetune":
                    shutil.copytree(undisturbed.pretrained, run.path)
                command = work.start(stage, run.path)
                if stage == "pretrain":
                    wait_for(lambda run=run: list(run.checkpoints.glob("step-*")), command)
                time.sleep(chance.uniform(0.0, clock or 1.5))
                command.kill()
                status = command.wait()
                assert status in (0, -signal.SIGKILL), command.words
                if status:
                    break
            else:
                pytest.fail(f"ended before it could be killed, ten times (seed {seed})")
            was_over, kept = run.encoder.exists(), {row["seconds"] for row in read_jsonl(run.results)}
            again = work.finish(stage, run.path)
            assert kept <= {row["seconds"] for row in read_jsonl(run.results)}, (
                "what was finished is not trained again"
            )
            if stage == "pretrain":
                if not was_over:
                    assert "going on after step" in again.words
                    assert "going on after step 0 " not in again.words
                clock = clock or (time.monotonic() - begun) / 3
            assert state_of(run) == expected[stage], f"seed {seed}, trial {trial} of {stage}"
            tally("SIGKILL at a random moment, continued to the same tensors")


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_stream_is_gone_on_with_where_it_was(
    server: Server,
    tmp_path: Path,
    digits: Path,
    write_shards: Callable[..., Path],
    tally: Callable[..., None],
    is_long: bool,
    kind: str,
) -> None:
    shards = write_shards(tmp_path / "shards", kind, sorted(digits.glob("*/*.png")), 7)
    work = Work(server, tmp_path, shards, ("--stream", "--shuffle-buffer", 90))
    calm = RunDirectory(tmp_path / "calm")
    work.finish("pretrain", calm.path)
    for trial in range(5 if is_long else 1):
        run = RunDirectory(tmp_path / f"killed-{trial}")
        command = work.start("pretrain", run.path)
        wait_for(lambda run=run: list(run.checkpoints.glob("step-*")), command)
        time.sleep(random.uniform(0, 1))
        command.kill()
        assert command.wait() in (0, -signal.SIGKILL), command.words
        work.finish("pretrain", run.path)
        assert state_of(run) == state_of(calm)
        tally("SIGKILL of a stream, continued to the same tensors")


FAULTS = [  # function, which call of it in pretrain, in finetune
    ("labelwise.rundir:write_atomically", 1, 1),
    ("labelwise.rundir:write_atomically", 3, 9),
    ("labelwise.rundir:append_jsonl", 4, None),
    ("os:fsync", 1, 2),
    ("os:fsync", 2, 3),
    ("os:fsync", 3, None),
    ("os:fsync", 15, 11),
    ("os:replace", 2, 4),
    ("labelwise.learning.checkpoint:save_file", 2, None),
    ("labelwise.learning.checkpoint:_is_whole", 2, None),
    ("shutil:rmtree", 1, None),
    ("labelwise.stages.pretraining:look", 1, None),
    ("labelwise.stages.pretraining:save_module", 1, None),
    ("labelwise.stages.pretraining:save_encoder", 1, None),
    ("labelwise.stages.comparing:store_predictions", None, 5),
    ("labelwise.stages.comparing:save_module", None, 1),
    ("labelwise.stages.comparing:check_labels", None, 1),
    ("labelwise.reports.html:render", None, 1),
]
CASES = [
    (stage, at, call, when)
    for at, *calls in FAULTS
    for stage, call in zip(("pretrain", "finetune"), calls, strict=True)
    if call is not None
    for when in ("before", "after")
]


def test_a_process_that_ends_at_any_point_loses_nothing(
    work: Work, undisturbed: Undisturbed, tally: Callable[..., None], is_long: bool
) -> None:
    expected = undisturbed.states
    seed = random.randrange(10**6)
    cases = CASES if is_long else random.Random(seed).sample(CASES, 6)
    for number, (stage, at, call, when) in enumerate(cases):
        run = RunDirectory(work.folder / f"{number}")
        if stage == "finetune":
            shutil.copytree(undisturbed.pretrained, run.path)
        command = work.start(stage, run.path, faults=[{"at": at, "call": call, "when": when, "exit": 137}])
        assert command.wait() == 137, f"{at} was not called {call} times in {stage}: {command.words}"
        work.finish(stage, run.path)
        assert state_of(run) == expected[stage], f"ended {when} call {call} of {at} in {stage}, seed {seed}"
        tally("process ended inside a save, a rename, a report, continued to the same tensors")
