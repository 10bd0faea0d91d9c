"""Machines set up oddly: no home, another alphabet, another clock, nobody who reads what is printed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Server, Undisturbed, Work, state_of

from labelwise.rundir import RunDirectory

ODD = {
    "another alphabet": {"LC_ALL": "POSIX", "LANG": "C"},
    "the other side of the date line": {"TZ": "Pacific/Apia"},
    "a dumb terminal": {"TERM": "dumb", "NO_COLOR": "1"},
    "two columns": {"COLUMNS": "2"},
    "no temporary folder": {"TMPDIR": "/nonexistent"},
    "a proxy that is not there": {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"},
}


@pytest.mark.parametrize("name", ODD)
def test_a_run_comes_out_the_same(
    work: Work, undisturbed: Undisturbed, name: str, tally: Callable[..., None]
) -> None:
    run = RunDirectory(Path(shutil.copytree(undisturbed.pretrained, work.folder / "run")))
    work.finish("finetune", run.path, environment=ODD[name])
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
def test_a_run_whose_reader_is_gone_ends_without_a_traceback_and_goes_on_when_it_is_asked(
    work: Work, undisturbed: Undisturbed, stage: str, tally: Callable[..., None]
) -> None:
    run = RunDirectory(work.folder / "run")
    if stage == "finetune":
        shutil.copytree(undisturbed.pretrained, run.path)
    assert work.start(stage, run.path, closed=True).wait() == 1
    work.finish(stage, run.path)
    assert state_of(run) == undisturbed.states[stage]
    tally("nobody reads what is printed, continued to the same tensors")


def test_one_json_document_comes_out_whatever_is_in_a_name(
    server: Server, tmp_path: Path, digits: Path
) -> None:
    images = Path(shutil.copytree(digits, tmp_path / "b\u00e4r \u56fe"))
    command = server.start("scan", images, "--json", environment={"LC_ALL": "POSIX"})
    assert command.wait() == 0, command.words
    assert json.loads(command.printed)["images"] == sum(1 for _ in images.rglob("*.png"))
