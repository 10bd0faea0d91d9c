"""Machines set up oddly: no home, another alphabet, another clock, nobody who reads what is printed."""

import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import (
    FINETUNE,
    FINETUNE_RECIPE,
    PRETRAIN,
    RECIPE,
    Server,
    Undisturbed,
    Work,
    state_of,
    wait_for,
)

from labelwise.rundir import RunDirectory

ODD = {
    "another alphabet": {"LC_ALL": "POSIX", "LANG": "C"},
    "the other side of the date line": {"TZ": "Pacific/Apia"},
    "no temporary folder": {"TMPDIR": "/nonexistent"},
}


@pytest.mark.parametrize("name", ODD)
def test_a_run_comes_out_the_same(
    work: Work, undisturbed: Undisturbed, name: str, tally: Callable[..., None]
) -> None:
    """In a process that starts there, as Python looks at its surroundings once."""
    run = RunDirectory(Path(shutil.copytree(undisturbed.pretrained, work.folder / "b\u00e4r \u56fe")))
    (work.folder / "finetune.toml").write_text(FINETUNE_RECIPE)
    words = ["finetune", "--run", run.path, *FINETUNE, work.folder / "finetune.toml", "--json"]
    ran = subprocess.run(
        [sys.executable, "-m", "labelwise", *words], env={**os.environ, **work.server.environment, **ODD[name]}, capture_output=True
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["run"] == str(run.path)
    assert state_of(run) == undisturbed.states["finetune"]
    tally("odd surroundings, the same results")


def test_without_a_home_it_is_said_what_to_name(work: Work, public: Path, tally: Callable[..., None]) -> None:
    words = ("LABELWISE_CACHE", "XDG_CACHE_HOME", "HOME")
    images = Path(shutil.copytree(work.images, public / "images"))
    command = Work(work.server, public, images).start("pretrain", public / "run", user=12345, unset=words)
    assert command.wait() == 2
    said = "this user has no home folder to keep the image cache in; name a place in LABELWISE_CACHE."
    assert said in " ".join(command.words.split())
    assert "Traceback" not in command.words
    tally("odd surroundings, one clear error")


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_run_goes_on_when_nobody_reads_what_it_prints(
    work: Work, undisturbed: Undisturbed, stage: str, tally: Callable[..., None]
) -> None:
    run = RunDirectory(work.folder / "run")
    if stage == "finetune":
        shutil.copytree(undisturbed.pretrained, run.path)
    work.start(stage, run.path, closed=True).wait()
    assert state_of(run) == undisturbed.states[stage]
    tally("nobody reads what is printed, the same results")


def test_a_run_outlives_its_terminal(
    work: Work, undisturbed: Undisturbed, tally: Callable[..., None]
) -> None:
    """As after `disown`, when the connection is lost: every write to the terminal fails from then on."""
    ours, theirs = pty.openpty()
    run, recipe = work.folder / "run", work.folder / "pretrain.toml"
    recipe.write_text(RECIPE)
    words = ["pretrain", work.images, "--out", run, "--epochs", "6", *PRETRAIN, recipe]
    process = subprocess.Popen(
        [sys.executable, "-m", "labelwise", *words], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=theirs,
        env={**os.environ, **work.server.environment}, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    wait_for((run / "environment.json").exists)
    os.close(ours)
    assert process.wait(120) == 0
    assert state_of(RunDirectory(run)) == undisturbed.states["pretrain"]
    tally("terminal lost, the same results")


UDP = "socket.socket(type=socket.SOCK_DGRAM)"
ASKING = {
    "a connection": "socket.socket().connect(('192.0.2.1', 9))",
    "a connection, by its error": "socket.socket().connect_ex(('192.0.2.1', 9))",
    "a datagram": f"{UDP}.sendto(b'', ('192.0.2.1', 9))",
    "a message": f"{UDP}.sendmsg([b''], [], 0, ('192.0.2.1', 9))",
    "a name": "socket.getaddrinfo('example.org', 80)",
}


@pytest.mark.parametrize("words", ASKING.values(), ids=ASKING)
def test_the_network_is_blocked_here(server: Server, tmp_path: Path, words: str) -> None:
    """In a process as those that read images are, which take over nothing but the environment and the paths."""
    notes = tmp_path / "network"
    paths = "import os, sys; os.environ['PYTHONPATH'] = os.pathsep.join(sys.path)"
    child = f"{paths}; import subprocess; sys.exit(subprocess.run([sys.executable, '-P', '-c', sys.argv[1]]).returncode)"
    ran = subprocess.run(
        [sys.executable, "-c", child, f"import socket; {words}"], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, **server.environment, "NETWORK_ASKED_FOR": str(notes)},
    )  # fmt: skip
    assert "the network is blocked" in ran.stderr
    assert "socket." in notes.read_text(encoding="utf-8")


def test_the_whole_demo_without_a_network(
    server: Server, tmp_path: Path, is_long: bool, tally: Callable[..., None]
) -> None:
    command = server.start("demo", *([] if is_long else ["--quick"]), "--out", tmp_path / "demo")
    assert command.wait(1800) == 0, command.words
    assert (tmp_path / "demo/runs/digits/report.html").stat().st_size
    tally("the whole demo without a network" if is_long else "the quick demo without a network")
