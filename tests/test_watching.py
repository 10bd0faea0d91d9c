"""How far work is, and whether it still goes on."""

import json
import os
import socket
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from labelwise import environment, ownership, rundir
from labelwise.cli import app
from labelwise.errors import LabelwiseError, UsageError
from labelwise.ownership import beat, hold
from labelwise.rundir import RunDirectory
from labelwise.stages.watching import check, status


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run in its third of seven epochs."""
    found = RunDirectory(tmp_path / "runs" / "photos")
    how = {"layout": "contiguous", "reason": ""}
    environment.start(
        found, asked={}, plan={"epochs": 7, "precision": "fp32", **how}, precision={"number": "fp32", **how}
    )
    rundir.append_jsonl(found.metrics, {"kind": "start", "step": 0})
    for epoch in (0, 1):
        row = {
            "kind": "epoch",
            "step": 5 * epoch + 4,
            "epoch": epoch,
            "loss": 5.0,
            "chance": 6.2,
            "knn": None,
            "seconds": 1.0,
        }
        rundir.append_jsonl(found.metrics, row)
    return found


def test_nobody_works_on_a_run_that_waits(run: RunDirectory) -> None:
    (found,) = status(run.path)
    assert (found["owner"], found["epoch"], found["epochs"], found["encoder"]) == (None, 2, 7, False)
    assert found["saved"] == 0
    for name in ("step-00000004", ".step-00000009-1", "damaged-step-00000009"):
        (run.checkpoints / name).mkdir(parents=True)
    assert status(run.path)[0]["saved"] == 1
    assert "epoch 2 of 7 reached, 1 saved" in CliRunner().invoke(app, ["status", str(run.path)]).output
    check([found], 1)  # nobody is stuck
    assert status(run.path.parent) == []


def test_the_command_that_works_is_named_and_its_silence_counted(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hold(run):
        (found,) = status(run.path.parent)
        assert found["owner"]["pid"] == os.getpid()
        assert found["silent"] < 5
        check([found], 60)
        os.utime(run.owner, (time.time() - 700,) * 2)
        with pytest.raises(LabelwiseError, match=r"no step for 12 min .*may be stuck"):
            check(status(run.path), 600)
        monkeypatch.setattr(ownership, "_beaten_at", -1e9)
        beat(run)
        check(status(run.path), 600)


def test_the_command_line_fails_where_work_is_stuck(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hold(run):
        os.utime(run.owner, (time.time() - 700,) * 2)
        words = ["status", str(run.path), "--json"]
        told = CliRunner().invoke(app, words)
        assert json.loads(told.stdout)[0]["silent"] > 600
        assert isinstance(CliRunner().invoke(app, [*words, "--max-age", "600"]).exception, LabelwiseError)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        status(tmp_path / "nothing")


def test_what_a_killed_command_left_is_nobody(run: RunDirectory) -> None:
    with hold(run):
        record = run.owner.read_text()
    run.owner.write_text(record.replace(socket.gethostname(), "another-container"))
    os.utime(run.owner, (time.time() - 700,) * 2)
    assert status(run.path.parent) == []
    check(status(run.path), 600)
