"""Trainings side by side: the same results as one by one, and nothing left behind."""

import math
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from labelwise import rundir
from labelwise.config import FinetuneSettings
from labelwise.learning.workers import count_workers, is_repeatable, side_by_side
from labelwise.models.encoder import EncoderSpec, create_encoder
from labelwise.predictions import read_predictions
from labelwise.rundir import RunDirectory
from labelwise.stages import comparing
from labelwise.stages.repeating import finetune

NARROW: dict[str, Any] = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}
CPU = torch.device("cpu")


@pytest.fixture
def threads() -> Any:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def encoder(**arguments: Any) -> nn.Module:
    spec = EncoderSpec("resnet18", {**NARROW, **arguments}, "half", 16, (0.5,) * 3, (0.25,) * 3)
    return create_encoder(spec)


def test_a_result_comes_when_it_is_done(threads: Any) -> None:
    threads(2)

    came = {job: threading.Event() for job in range(3)}
    waits_for = {2: 1, 0: 2}  # job 0 begins first and ends last

    def run(job: int) -> bool:
        return job not in waits_for or came[waits_for[job]].wait(20)

    order = []
    for job, result in side_by_side(run, range(3), 2):
        assert result
        order.append(job)
        came[job].set()
    assert order == [1, 2, 0]


def test_each_worker_has_its_share_of_the_cores_and_they_come_back(threads: Any) -> None:
    threads(4)
    assert {share for _, share in side_by_side(lambda _: torch.get_num_threads(), range(6), 2)} == {2}
    assert torch.get_num_threads() == 4


def test_when_a_job_fails_the_one_beside_it_is_kept_and_the_rest_is_not_begun(threads: Any) -> None:
    threads(2)
    begun, kept = [], []

    def run(number: int) -> int:
        begun.append(number)
        if number == 0:
            raise ValueError("job 0")
        time.sleep(0.2)
        return number

    with pytest.raises(ValueError, match="job 0"):
        for job, _ in side_by_side(run, range(200), 2):
            kept.append(job)
    assert len(begun) < 100
    assert set(kept) == set(begun) - {0}
    assert torch.get_num_threads() == 2


def test_nothing_goes_on_after_the_results_are_no_longer_wanted(threads: Any) -> None:
    threads(2)
    begun = []

    def run(number: int) -> None:
        begun.append(number)
        time.sleep(0.2 if number else 0)

    results = side_by_side(run, range(200), 2)
    next(results)
    results.close()
    assert len(begun) < 100
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("arguments", [{"drop_rate": 0.5}, {"drop_path_rate": 0.5}])
def test_a_network_that_draws_while_it_trains_is_trained_alone(
    threads: Any, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, float]
) -> None:
    threads(4)
    monkeypatch.setattr("labelwise.learning.workers.available_memory", lambda device: math.inf)
    images = torch.randn(8, 3, 16, 16)
    assert is_repeatable(encoder().train(), images)
    assert not is_repeatable(encoder(**arguments).train(), images)
    assert count_workers(encoder(), 16, 64, CPU) == 4
    assert count_workers(encoder(**arguments), 16, 64, CPU) == 1


def test_memory_decides_how_many_train_at_once(threads: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    threads(4)
    for memory, workers in ((1e6, 1), (1e12, 4), (math.inf, 4)):  # inf: macOS
        monkeypatch.setattr("labelwise.learning.workers.available_memory", lambda device, free=memory: free)
        assert count_workers(encoder(), 16, 64, CPU) == workers


@pytest.mark.slow
def test_side_by_side_gives_the_predictions_of_one_by_one(
    pretrained: RunDirectory, tmp_path: Path, threads: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    threads(1)
    for workers in (1, 2):
        monkeypatch.setattr("labelwise.stages.methods.count_workers", lambda *_, count=workers: count)
        run = RunDirectory(tmp_path / str(workers))
        shutil.copytree(pretrained.path, run.path)
        settings = {"label_counts": (60,), "draws": 3, "steps": 4, "scratch_steps": 4}
        finetune(FinetuneSettings(run=run.path, methods=("simclr", "supervised"), **settings))
        found.append(read_predictions(run.predictions))
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_signal_while_comparing_ends_it_soon_and_the_same_command_goes_on(
    pretrained: RunDirectory, tmp_path: Path
) -> None:
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(pretrained.path, run.path)
    options = ["--label-counts", "20", "--draws", "2", "--methods", "simclr_probe,supervised"]
    command = [sys.executable, "-m", "labelwise", "finetune", "--run", str(run.path), *options]
    subprocess.run([*command, "--scratch-steps", "2"], check=True, capture_output=True)  # compiles the views
    endless = [*command, "--scratch-steps", "1000000"]
    process = subprocess.Popen(endless, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 120
    while len(rundir.read_jsonl(run.results)) != 2:  # the earlier four are set aside, then probes come first
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(2)  # into the training from scratch
    process.send_signal(signal.SIGTERM)
    _, words = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, words
    assert "finished classifiers are saved; the same command goes on." in words
    again = subprocess.run([*endless[:-1], "3"], capture_output=True, text=True, check=True)
    assert "20 labels  supervised" in again.stderr


@pytest.mark.slow
def test_results_set_aside_by_an_interrupted_change_of_settings_are_taken_up_again(
    pretrained: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(pretrained.path, run.path)
    first = FinetuneSettings(run=run.path, label_counts=(20,), draws=2, methods=("simclr_probe", "pixels"))
    finetune(first)
    before = run.results.read_bytes()

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(comparing, "run_method", stop)
        with pytest.raises(KeyboardInterrupt):
            finetune(first.model_copy(update={"seed": 1}))
        assert not run.results.exists()
        with pytest.raises(KeyboardInterrupt):
            finetune(first.model_copy(update={"seed": 2}))
    finetune(first)
    assert run.results.read_bytes() == before


def test_whoever_asks_twice_does_not_wait_for_a_step(threads: Any) -> None:
    threads(2)
    release, ended = threading.Event(), threading.Event()

    def run(number: int) -> None:
        if number:
            release.wait(60)
            ended.set()

    results = side_by_side(run, range(2), 2)
    assert next(results) == (0, None)
    with pytest.raises(KeyboardInterrupt):
        results.throw(KeyboardInterrupt)
    assert not ended.is_set()
    release.set()
