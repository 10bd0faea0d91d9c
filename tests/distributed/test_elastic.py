"""Real jobs: ranks killed, stopped and counted anew; the same weights at the end."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import HERE, free_port
from safetensors.numpy import load_file

from labelwise.errors import LostRankError, UsageError
from labelwise.learning.precision import choose_devices, count_devices
from labelwise.rundir import RunDirectory, read_json, read_jsonl

EPOCHS = 6
RECIPE = """
[pretrain]
backbone = "vit_tiny_patch16_224"
backbone_args = {depth = 1, embed_dim = 24, num_heads = 2, patch_size = 8}
stem = "stock"
head = "none"
image_size = 16
batch_size = 32
precision = "fp32"
optimizer = "sgd"
learning_rate = 0.05
device = "cpu"
"""
WITH_BATCH_NORM = (
    RECIPE[: RECIPE.index("backbone")]
    + """backbone = "resnet18"
backbone_args = {layers = [1, 1, 1, 1], channels = [8, 8, 8, 8]}
stem = "small"
"""
    + RECIPE[RECIPE.index("image_size") :]
).replace("0.05", "0.0005")
WITH_ADAMW = RECIPE.replace('"sgd"', '"adamw"').replace("0.05", "0.001")


@dataclass
class Job:
    """A command in a session of its own."""

    process: subprocess.Popen[str]
    log: Path

    @property
    def words(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait(self, seconds: float = 150) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {seconds} s: {self.words}")

    def ranks(self) -> list[int]:
        """Processes of the ranks, in order."""
        found = {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdecimal():
                with contextlib.suppress(OSError):
                    environment = (folder / "environ").read_bytes().split(b"\0")
                    words = (folder / "cmdline").read_bytes()
                    of_job = f"JOB={self.log}".encode() in environment
                    rank = next((each for each in environment if each.startswith(b"RANK=")), None)
                    if of_job and rank and b"pretrain" in words:
                        found[int(rank.partition(b"=")[2])] = int(folder.name)
        return [found[rank] for rank in sorted(found)]


@dataclass
class Workplace:
    """Starts jobs on some digits; ends what is left of them."""

    folder: Path
    images: Path
    jobs: list[Job]
    recipe: str = RECIPE

    def start(
        self, run: Path, *more: object, before: tuple[object, ...] = (), save_seconds: float = 0.0
    ) -> Job:
        recipe = self.folder / "recipe.toml"
        recipe.write_text(self.recipe)
        log = self.folder / f"{len(self.jobs)}.log"
        words = ("pretrain", self.images, "--recipe", recipe, "--epochs", EPOCHS, "--out", run, *more)
        start = before or (sys.executable, "-m", "labelwise")
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                filter(None, (str(HERE / "often"), os.environ.get("PYTHONPATH", "")))
            ),
            "SAVE_SECONDS": str(save_seconds),
            "LABELWISE_CACHE": str(self.folder / "cache"),
            "OMP_NUM_THREADS": "1",
            "NUMBA_NUM_THREADS": "1",
            "JOB": str(log),
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # docs/scale.md
        }
        with log.open("w") as output:
            process = subprocess.Popen(
                [str(word) for word in (*start, *words)], env=environment, stdout=output, stderr=output,
                stdin=subprocess.DEVNULL, text=True, start_new_session=True, cwd=self.folder,
            )  # fmt: skip
        self.jobs.append(Job(process, log))
        return self.jobs[-1]

    def finish(self, run: Path, *more: object) -> Job:
        job = self.start(run, *more)
        assert job.wait() == 0, job.words
        return job

    def end(self) -> None:
        for job in self.jobs:
            for process in (*job.ranks(), job.process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            job.process.wait()


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory, some_digits: Callable[[Path, int], Path]) -> Path:
    return some_digits(tmp_path_factory.mktemp("digits") / "digits", 6)


@pytest.fixture
def place(tmp_path: Path, digits: Path) -> Iterator[Workplace]:
    found = Workplace(tmp_path, digits, [])
    yield found
    found.end()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> dict[str, np.ndarray]:
    """Weights that one process reaches."""
    place = Workplace(tmp_path_factory.mktemp("alone"), digits, [])
    place.finish(place.folder / "run")
    return load_file(place.folder / "run" / "encoder.safetensors")


def steps_done(run: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        return sum(row["kind"] == "step" for row in read_jsonl(RunDirectory(run).metrics))
    return 0


def wait_until(condition: Callable[[], object], job: Job, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline and job.process.poll() is None:
        time.sleep(0.01)
    assert condition(), job.words


def farthest(run: Path, expected: dict[str, np.ndarray]) -> float:
    found = load_file(run / "encoder.safetensors")
    assert found.keys() == expected.keys()
    return max(float(np.abs(found[name] - expected[name]).max()) for name in found)


def test_two_processes_on_one_machine_end_as_one_does(
    place: Workplace, undisturbed: dict[str, np.ndarray]
) -> None:
    job = place.finish(place.folder / "run", "--devices", 2)
    assert farthest(place.folder / "run", undisturbed) < 1e-5
    assert "ranks      2 processes, 16 images each at a time" in job.words
    assert job.words.count("encoder saved") == 1  # one of them speaks
    steps = [
        row["step"] for row in read_jsonl(RunDirectory(place.folder / "run").metrics) if row["kind"] == "step"
    ]
    assert steps == list(range(len(steps)))  # and one of them writes
    asked = read_json(RunDirectory(place.folder / "run").environment)["asked"]
    assert "devices" not in asked  # the same command without it goes on with this run


def test_two_processes_write_one_file_for_tensorboard(place: Workplace) -> None:
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader", reason="the extra labelwise[tensorboard] is not installed")  # fmt: skip
    run = RunDirectory(place.folder / "run")
    place.finish(run.path, "--devices", 2, "--tracker", "tensorboard")
    (file,) = run.tensorboard.iterdir()
    events = list(loader.LegacyEventFileLoader(str(file)).Load())
    assert [event.step for event in events[2:]] == [row["step"] for row in read_jsonl(run.metrics)]


def test_any_rank_killed_at_random_moments(
    place: Workplace,
    undisturbed: dict[str, np.ndarray],
    tell: Callable[[str], None],
    request: pytest.FixtureRequest,
) -> None:
    is_long = request.config.getoption("--long")
    seed = random.randrange(10**6)
    chance = random.Random(seed)
    for trial in range(10 if is_long else 1):
        run = place.folder / f"run-{trial}"
        job = place.start(run, "--devices", 2)
        moment = chance.randrange(2, 30)
        wait_until(lambda run=run, moment=moment: steps_done(run) >= moment, job)
        victim = chance.randrange(2)
        os.kill(job.ranks()[victim], signal.SIGKILL)
        killed = time.monotonic()
        wait_until(lambda job=job: "start again from the last save" in job.words, job, 30)
        assert time.monotonic() - killed < 30
        assert job.wait() == 0, job.words
        assert "going on after step" in job.words, f"seed {seed}"
        distance = farthest(run, undisturbed)
        tell(f"rank {victim} killed after step {moment}: farthest weight {distance:.1e}")
        assert distance < 1e-5, f"seed {seed}, trial {trial}"


def go_on(place: Workplace, run: Path, *more: object, between: int = 1) -> None:
    """Train as two ranks, then as so many, then as two again."""
    for devices, until in ((2, 8), (between, 20)):
        job = place.start(run, "--devices", devices, *more)
        wait_until(lambda until=until: steps_done(run) >= until, job)
        job.process.send_signal(signal.SIGTERM)
        assert job.wait(40) == 128 + signal.SIGTERM, job.words
        assert "stopped: saved step" in job.words
        assert not job.ranks()
    job = place.finish(run, "--devices", 2, *more)
    assert "going on after step" in job.words


def test_two_ranks_go_on_as_one_and_back(place: Workplace, undisturbed: dict[str, np.ndarray]) -> None:
    go_on(place, place.folder / "run")
    assert farthest(place.folder / "run", undisturbed) < 1e-5


@pytest.mark.usefixtures("only_long")
@pytest.mark.parametrize(
    ("name", "recipe", "devices", "most"),
    [
        (
            "batch norm",
            WITH_BATCH_NORM,
            2,
            1e-6,
        ),  # in float32 one process parts from two within ten steps: not compared
        ("AdamW", WITH_ADAMW, 1, 2e-4),
        ("--init RUN", RECIPE, 1, 1e-5),
    ],
)
def test_they_do_whatever_they_train(
    place: Workplace, name: str, recipe: str, devices: int, most: float, tell: Callable[[str], None]
) -> None:
    """Two ranks, so many, two again; compared with so many that are not interrupted. The bounds were measured on 2026-11-26."""
    place.recipe = recipe
    alone, run = place.folder / "alone", place.folder / "run"
    more: tuple[object, ...] = ()
    if name == "--init RUN":
        place.finish(place.folder / "before", "--seed", 1)
        more = ("--init", place.folder / "before")
    place.finish(alone, "--devices", devices, *more)
    go_on(place, run, *more, between=devices)
    distance = farthest(run, load_file(alone / "encoder.safetensors"))
    tell(f"{name}, 2 ranks, {devices}, 2 again: farthest weight {distance:.1e}")
    assert distance < most


def test_a_stream_is_dealt_to_ranks_and_back_and_ends_as_it_does_alone(
    tmp_path: Path, digits: Path, write_shards: Callable[..., Path]
) -> None:
    shards = write_shards(tmp_path / "shards", "tar", sorted(digits.glob("*/*.png")), 4)
    place = Workplace(tmp_path, shards, [])
    options = (
        "--stream",
        "--shuffle-buffer",
        60,
        "--test",
        digits / "0",
    )  # whose images are in the shards too
    try:
        place.finish(tmp_path / "alone", "--batch-size", 64, *options)
        run = tmp_path / "run"
        for devices, until in ((2, 6), (1, 14)):
            job = place.start(run, "--batch-size", 64, *options, "--keep-decoded", "--devices", devices)
            wait_until(lambda until=until: steps_done(run) >= until, job)
            os.kill(job.ranks()[-1] if devices > 1 else job.process.pid, signal.SIGKILL)
            if devices > 1:
                wait_until(lambda job=job: "start again from the last save" in job.words, job, 30)
                job.process.send_signal(signal.SIGTERM)
            job.wait(60)
        job = place.finish(run, "--batch-size", 64, *options, "--keep-decoded", "--devices", 2)
        assert "going on after step" in job.words
        assert farthest(run, load_file(tmp_path / "alone" / "encoder.safetensors")) < 1e-5
        assert len(list((tmp_path / "cache").glob("stream-*/*.npz"))) == 4
        assert not list((tmp_path / "cache").glob("stream-*/.*")), "what killed ranks were at work on is gone"
    finally:
        place.end()


def test_ctrl_c_saves_once_and_leaves(place: Workplace) -> None:
    run = place.folder / "run"
    job = place.start(run, "--devices", 2, save_seconds=1000)
    wait_until(lambda: steps_done(run) >= 5, job)
    os.killpg(job.process.pid, signal.SIGINT)  # a terminal sends it to all of them
    assert job.wait(40) == 128 + signal.SIGINT, job.words
    assert job.words.count("stopped: saved step") == 1
    assert list((run / "checkpoints").glob("step-*"))
    assert not job.ranks()


def test_ranks_whose_launcher_is_killed_save_and_end(place: Workplace) -> None:
    run = place.folder / "run"
    job = place.start(run, "--devices", 2, save_seconds=1000)
    wait_until(lambda: steps_done(run) >= 5, job)
    job.process.kill()
    deadline = time.monotonic() + 30
    while job.ranks() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not job.ranks()
    assert list((run / "checkpoints").glob("step-*"))


def test_a_wrong_setting_is_told_once_and_not_tried_again(place: Workplace) -> None:
    job = place.start(place.folder / "run", "--devices", 3)
    assert job.wait() == UsageError.exit_code, job.words
    assert job.words.count("error: batch_size = 32: 3 devices or processes cannot share it evenly") == 1
    assert "start again" not in job.words
    assert "Traceback" not in job.words


@pytest.mark.usefixtures("only_long")  # as test_two_machines_under_torchrun, by --devices
def test_a_rank_that_does_not_answer_is_given_up(
    place: Workplace, undisturbed: dict[str, np.ndarray]
) -> None:
    run = place.folder / "run"
    job = place.start(run, "--devices", 2, "--rank-timeout", "3s")
    wait_until(lambda: steps_done(run) >= 5, job)
    os.kill(job.ranks()[1], signal.SIGSTOP)
    wait_until(lambda: "does not answer" in job.words, job, 30)
    wait_until(lambda: "start again from the last save" in job.words, job, 60)
    assert job.wait() == 0, job.words
    assert farthest(run, undisturbed) < 1e-5


def test_two_machines_under_torchrun(place: Workplace, undisturbed: dict[str, np.ndarray]) -> None:
    run, port = place.folder / "run", free_port("127.0.0.1")
    jobs = []
    for address in ("127.0.0.1", "127.0.0.2"):
        before = (
            sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1, "--rdzv-backend", "c10d",
            "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "job", "--local-addr", address, "--max-restarts", 2,
            "-m", "labelwise",
        )  # fmt: skip
        jobs.append(place.start(run, "--rank-timeout", "5s", before=before))
    wait_until(lambda: steps_done(run) >= 5, jobs[0])
    stopped = next(
        process
        for job in jobs
        for process in job.ranks()
        if b"RANK=1" in Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    )
    os.kill(stopped, signal.SIGSTOP)
    wait_until(lambda: any("does not answer" in job.words for job in jobs), jobs[0], 60)
    for job in jobs:
        assert job.wait() == 0, job.words
    assert farthest(run, undisturbed) < 1e-5


def test_what_devices_asks_for() -> None:
    assert count_devices("all", "cpu") == 1
    assert count_devices("3", "cpu") == 3


def test_which_devices_share_images(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_devices("all", "cpu") == choose_devices("1", "cpu") == [torch.device("cpu")]
    with pytest.raises(UsageError, match="--devices 2: is for GPUs; on a CPU all its cores are used"):
        choose_devices("2", "cpu")
    with pytest.raises(UsageError, match="--devices some: give a number, or all"):
        choose_devices("some", "cpu")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert choose_devices("1", "auto") == [torch.device("cuda")]
    assert choose_devices("all", "auto") == [torch.device("cuda", number) for number in range(3)]
    assert choose_devices("2", "cuda") == [torch.device("cuda", number) for number in range(2)]
    with pytest.raises(UsageError, match="--devices 4: this machine has 3 of kind cuda"):
        choose_devices("4", "cuda")


def test_python_is_told_to_start_processes_itself(tmp_path: Path) -> None:
    from labelwise.config import PretrainSettings
    from labelwise.stages.pretraining import pretrain

    with pytest.raises(UsageError, match="torchrun"):
        pretrain(PretrainSettings.resolve({"images": tmp_path, "devices": "2"}))
    assert LostRankError.exit_code not in (0, 1, 2, 3, 4, 5)
