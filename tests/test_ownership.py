"""Real processes that want the same run folder, with locks and without."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from labelwise.errors import ResourceError, UsageError
from labelwise.ownership import check_is_free, hold
from labelwise.rundir import RunDirectory, write_json

HOLDER = """
import sys, time
from pathlib import Path
from labelwise.ownership import hold
from labelwise.rundir import RunDirectory
sys.argv = ["/usr/bin/labelwise", "pretrain", "my photos", sys.argv[1]]
with hold(RunDirectory(Path(sys.argv[3]))):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)


def start(run: RunDirectory) -> subprocess.Popen[str]:
    other = subprocess.Popen([sys.executable, "-c", HOLDER, str(run.path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    other.stdout.close()
    return other


def test_a_second_command_is_told_who_works_on_the_run(run: RunDirectory) -> None:
    other = start(run)
    words = rf"`labelwise pretrain 'my photos' .*run` \(process {other.pid} on {socket.gethostname()}, since 20.*\) is working on it"
    with pytest.raises(UsageError, match=words) as caught, hold(run):
        pass
    assert caught.value.exit_code == 2
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    assert run.owner.exists(), "it had no time to clear up"
    with hold(run):
        assert json.loads(run.owner.read_text())["pid"] == os.getpid()
    with hold(run):  # given back
        pass
    assert list(run.path.iterdir()) == []


def told_while_another_lives(run: RunDirectory) -> int:
    """Look at a run while another process holds it and after that was killed; give its number."""
    other = start(run)
    with pytest.raises(UsageError, match=rf"process {other.pid} on .* is working on it"):
        check_is_free(run)
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    check_is_free(run)
    return other.pid


def test_whoever_only_reads_is_told_too_and_leaves_no_trace(run: RunDirectory) -> None:
    check_is_free(run)
    killed = told_while_another_lives(run)
    assert json.loads(run.owner.read_text())["pid"] == killed


@pytest.mark.usefixtures("without_locks")
def test_without_locks_whoever_only_reads_goes_by_the_record(run: RunDirectory) -> None:
    told_while_another_lives(run)


def test_a_run_that_may_only_be_read_is_not_held(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: int) -> int:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(os, "open", refuse)
    words = r"owner\.json: cannot be written \(Read-only file system\); copy the run"
    with pytest.raises(ResourceError, match=words), hold(run):
        pass


def test_a_folder_is_given_back_after_an_error(run: RunDirectory) -> None:
    with pytest.raises(ZeroDivisionError), hold(run):
        raise ZeroDivisionError
    with hold(run):
        pass


def test_an_owner_that_cannot_be_read_yet_keeps_others_out_all_the_same(run: RunDirectory) -> None:
    with hold(run):
        os.truncate(run.owner, 0)
        with pytest.raises(UsageError, match="another labelwise command is working on it"), hold(run):
            pass
        assert run.owner.exists()


@pytest.mark.usefixtures("without_locks")
def test_without_locks_a_living_process_keeps_others_out_and_a_dead_one_does_not(run: RunDirectory) -> None:
    other = start(run)
    with (
        pytest.raises(UsageError, match=rf"process {other.pid} .*, or delete .*owner\.json if it is over"),
        hold(run),
    ):
        pass
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    with hold(run):
        assert json.loads(run.owner.read_text())["pid"] == os.getpid()
    assert not run.owner.exists()


@pytest.mark.usefixtures("without_locks")
@pytest.mark.parametrize(
    ("changed", "is_taken_over"),
    [({"boot": "an earlier one"}, True), ({"host": "elsewhere"}, False), ({"pid": 1}, False)],
    ids=["before the machine started", "on another machine", "still running"],
)
def test_without_locks_only_what_is_surely_over_is_taken_over(
    run: RunDirectory, changed: dict[str, Any], is_taken_over: bool
) -> None:
    with hold(run):
        owner = json.loads(run.owner.read_text())
    write_json(run.owner, owner | changed)
    if is_taken_over:
        with hold(run):
            assert json.loads(run.owner.read_text())["boot"] == owner["boot"]
        return
    with pytest.raises(UsageError, match="is working on it"), hold(run):
        pass
    assert run.owner.exists()


@pytest.mark.usefixtures("without_locks")
def test_in_a_container_that_starts_again_the_same_number_is_another_process(run: RunDirectory) -> None:
    with hold(run):
        owner = json.loads(run.owner.read_text())
    write_json(run.owner, owner | {"since": "long ago"})
    with hold(run):
        assert json.loads(run.owner.read_text())["since"] != "long ago"


def test_a_run_that_another_command_began_meanwhile_is_not_begun_again(run: RunDirectory) -> None:
    run.path.mkdir()
    with hold(run, is_new=True):
        pass
    run.environment.write_text("{}")
    with (
        pytest.raises(UsageError, match="another command began a run there just now"),
        hold(run, is_new=True),
    ):
        pass
    with hold(run):
        pass


def test_a_lock_that_is_free_is_ours_whatever_is_written(run: RunDirectory) -> None:
    """A container that was killed leaves the record of a host that will never be again."""
    with hold(run):
        owner = json.loads(run.owner.read_text())
    write_json(run.owner, owner | {"host": "0a1b2c3d4e5f"})
    with hold(run):
        assert json.loads(run.owner.read_text())["host"] == socket.gethostname()


@pytest.mark.usefixtures("without_locks")
def test_of_two_that_take_over_at_once_the_later_one_is_it(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def another(seconds: float) -> None:
        write_json(
            run.owner, {"host": "elsewhere", "boot": None, "pid": 7, "command": "labelwise", "since": "now"}
        )

    monkeypatch.setattr("labelwise.ownership.time.sleep", another)
    with pytest.raises(UsageError, match="process 7 on elsewhere"), hold(run):
        pass
    assert json.loads(run.owner.read_text())["pid"] == 7, "it is not ours to delete"


def test_what_a_kill_left_of_a_runs_files_is_deleted_and_nothing_else(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    left = [".data.json-ab12_xyz", ".report.html-abcdefgh", "splits/.draw-3-0.json-abcdefgh", "finetune/.results.jsonl-abcdefgh"]  # fmt: skip
    others = [
        ".notes.txt-abcdefgh",
        ".owner.json-abcdefgh",
        ".data.json-mine",
        "data.json",
        "finetune/x-abcdefgh",
    ]
    for name in (*left, *others):
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).touch()
    with hold(run):
        found = {file.relative_to(run.path).as_posix() for file in run.path.rglob("*") if file.is_file()}
    assert found == {*others, "owner.json"}
