"""A comparison dealt out to processes gives the numbers of one process, and loses nothing when one of them ends."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from labelwise.predictions import read_predictions
from labelwise.rundir import RunDirectory, read_jsonl

PRETRAIN = """
[pretrain]
backbone_args = {layers = [1, 1, 1, 1], channels = [8, 8, 16, 16]}
stem = "half"
image_size = 16
batch_size = 32
epochs = 1
precision = "fp32"
device = "cpu"
[finetune]
device = "cpu"
label_counts = [20, 60]
draws = 3
"""


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory, some_digits: Callable[[Path, int], Path]) -> Path:
    folder = tmp_path_factory.mktemp("dealing")
    some_digits(folder / "digits", 6)
    (folder / "recipe.toml").write_text(PRETRAIN)
    done = labelwise(
        folder, "pretrain", folder / "digits", "--recipe", folder / "recipe.toml", "--out", folder / "run"
    )
    words = words_of(done)
    assert done.returncode == 0, words
    return folder


def labelwise(folder: Path, *words: object) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "LABELWISE_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "NUMBA_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "labelwise", *map(str, words)], env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        text=True, start_new_session=True,
    )  # fmt: skip


def words_of(command: subprocess.Popen[str]) -> str:
    return command.communicate(timeout=200)[1]


def compare(folder: Path, run: Path, *more: object) -> subprocess.Popen[str]:
    return labelwise(folder, "finetune", "--run", run, "--recipe", folder / "recipe.toml", *more)


def results_of(run: Path) -> dict[tuple[str, int, int], tuple[float, str]]:
    rows = read_jsonl(RunDirectory(run).results)
    return {(row["method"], row["labels"], row["draw"]): (row["accuracy"], row["chosen"]) for row in rows}


def children_of(process: int) -> list[int]:
    """Those that train; `ps` cuts lines at COLUMNS, where that is set, so that a long path to Python hides what they are."""
    found = subprocess.run(
        ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(process)], capture_output=True, text=True
    )
    return [int(line.split()[0]) for line in found.stdout.splitlines() if "spawn_main" in line]


def wait_until(condition: Callable[[], object], seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


@pytest.fixture(scope="session")
def alone(pretrained: Path) -> Path:
    """The comparison by one process."""
    run = pretrained / "alone"
    shutil.copytree(pretrained / "run", run)
    command = compare(pretrained, run, "--steps", 3, "--scratch-steps", 4)
    words = words_of(command)
    assert command.wait(120) == 0, words
    return run


def test_two_processes_give_the_numbers_of_one(pretrained: Path, alone: Path) -> None:
    run = pretrained / "two"
    shutil.copytree(pretrained / "run", run)
    command = compare(pretrained, run, "--steps", 3, "--scratch-steps", 4, "--devices", 2)
    words = words_of(command)
    assert command.wait(120) == 0, words
    assert results_of(run) == results_of(alone)
    columns = ("method", "labels", "draw", "name", "prediction")
    first, second = (read_predictions(RunDirectory(each).predictions, columns) for each in (run, alone))
    assert sorted(zip(*first.values(), strict=True)) == sorted(zip(*second.values(), strict=True))
    assert words.count("run  ") == 1  # one of them speaks


@pytest.mark.usefixtures("only_long")
@pytest.mark.parametrize("how", ["Ctrl-C", "a process is killed", "the command is killed"])
def test_what_is_finished_is_kept_and_the_same_command_goes_on(pretrained: Path, how: str) -> None:
    run = pretrained / how.replace(" ", "-")
    shutil.copytree(pretrained / "run", run)
    words = ("--steps", 30, "--scratch-steps", 300, "--devices", 2)
    command = compare(pretrained, run, *words)

    def trained() -> set[tuple[str, int, int]]:
        return {job for job in results_of(run) if job[0] in ("simclr", "supervised")}

    wait_until(lambda: len(trained()) >= 2)
    children = children_of(command.pid)
    assert len(children) == 2, command.poll()
    if how == "Ctrl-C":
        os.killpg(command.pid, signal.SIGINT)
        assert command.wait(100) == 130
    elif how == "the command is killed":
        command.kill()
    else:
        os.kill(children[0], signal.SIGKILL)
        assert command.wait(60) == 1
    said = words_of(command)
    if how != "the command is killed":
        assert "finished classifiers are saved; the same command goes on" in said
        assert "Traceback" not in said
    wait_until(lambda: not any(Path(f"/proc/{child}").exists() for child in children), 20)
    kept = trained()
    again = compare(pretrained, run, *words)
    said = words_of(again)
    assert again.wait(200) == 0, said
    assert kept <= trained()
    assert len(trained()) == 12


def study(folder: Path, out: Path, *more: object) -> subprocess.Popen[str]:
    small = ("--most-images", 128, "--epochs", 1, "--seeds", 1, "--time-limit", "1h", "--device", "cpu")
    recipe = folder / "study.toml"
    recipe.write_text(PRETRAIN.split("[finetune]", maxsplit=1)[0].replace("epochs = 1\n", ""))
    return labelwise(
        folder, "study", "head", folder / "digits", "--recipe", recipe, "--out", out, *small, *more
    )


def trials_of(out: Path) -> dict[tuple[str, ...], dict[str, str]]:
    return {(*row["trial"], row["seed"]): row["answers"] for row in read_jsonl(out / "trials.jsonl")}


def test_trials_of_a_study_in_two_processes_are_those_of_one(pretrained: Path) -> None:
    one, two = pretrained / "study-one", pretrained / "study-two"
    command = study(pretrained, one)
    words = words_of(command)
    assert command.returncode == 0, words
    command = study(pretrained, two, "--devices", 2)
    wait_until(lambda: command.poll() is not None or len(trials_of(two)) >= 2)
    children = children_of(command.pid)
    assert len(children) == 2, command.poll()
    os.killpg(command.pid, signal.SIGINT)
    said = words_of(command)
    assert command.returncode == 130, said
    assert "Traceback" not in said
    wait_until(lambda: not any(Path(f"/proc/{child}").exists() for child in children), 20)
    assert 2 <= len(trials_of(two)) < len(trials_of(one))
    command = study(pretrained, two, "--devices", 3)
    wait_until(lambda: command.poll() is not None or len(children_of(command.pid)) == 3)
    os.kill(children_of(command.pid)[0], signal.SIGKILL)
    said = words_of(command)
    assert command.returncode == 1, said
    assert "a process that ran trials was ended; finished trials are kept" in " ".join(said.split())
    command = study(pretrained, two)  # and with one again
    words = words_of(command)
    assert command.returncode == 0, words
    assert trials_of(two) == trials_of(one)
    first, second = (json.loads((out / "study.json").read_text()) for out in (one, two))
    assert first == second


def test_nobody_waits_for_processes_that_still_prepare(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import time, pathlib\n"
        "def prepare(device):\n"
        "    pathlib.Path('begun').touch()\n"
        "    time.sleep(600)\n"
        "def work(opened): return opened\n"
    )
    (tmp_path / "command.py").write_text(
        "import torch, slow\n"
        "from labelwise.errors import Interrupted\n"
        "from labelwise.interruption import stop_between_steps\n"
        "from labelwise.stages.processes import Processes\n"
        "if __name__ == '__main__':\n"
        "    try:\n"
        "        with stop_between_steps() as stop, Processes(2, torch.device('cpu'), slow.prepare, '') as others:\n"
        "            others.run(slow.work, (), lambda: stop.check('stopped'))\n"
        "    except Interrupted: print('stopped')\n"
    )
    command = subprocess.Popen(
        [sys.executable, "command.py"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_until((tmp_path / "begun").exists)
    os.killpg(command.pid, signal.SIGINT)
    assert command.communicate(timeout=20)[0] == "stopped\n"
    assert command.returncode == 0
