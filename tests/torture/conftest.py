"""Commands that can be killed at a chosen moment, and what is left of them."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from labelwise.rundir import RunDirectory, read_jsonl
from labelwise.stages.demo import write_digits

CLOCKS = {"seconds", "images_per_second"}
_tallies: Counter[str] = Counter()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.torture)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _tallies:
        terminalreporter.section("what was endured")
        for what, count in _tallies.items():
            terminalreporter.write_line(f"{count:>6,}  {what}")


@pytest.fixture
def tally() -> Callable[[str], None]:
    """Count a trial that was passed."""

    def count(what: str, trials: int = 1) -> None:
        _tallies[what] += trials

    return count


@pytest.fixture
def is_long(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--long"))


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user may write to, for commands of a user who is not known."""
    if os.geteuid():
        pytest.skip("only root can become another user")
    python = Path(sys.executable).resolve()
    if not all(parent.stat().st_mode & 0o001 for parent in python.parents):
        pytest.skip(f"other users may not run {python}")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


@dataclass
class Command:
    """A labelwise command that runs in a process group of its own."""

    server: "Server"
    pid: int
    err: Path
    out: Path
    status: int | None = None
    started: float = field(default_factory=time.monotonic)

    def wait(self, seconds: float = 120) -> int:
        """Its exit code, or minus the signal that ended it."""
        if self.status is None:
            self.status = self.server.ask({"wait": self.pid, "seconds": seconds})["status"]
        if self.status is None:
            self.kill()
            pytest.fail(f"still running after {seconds} s: {self.words}")
        return self.status

    def kill(self, number: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    @property
    def words(self) -> str:
        return self.err.read_text(encoding="utf-8", errors="replace")

    @property
    def printed(self) -> str:
        return self.out.read_text(encoding="utf-8", errors="replace")


class Server:
    """Forks commands; see fork_server.py."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment, self.count = folder, environment, 0
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fork_server.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment},
        )  # fmt: skip

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def start(
        self,
        *words: str | Path,
        cwd: Path | None = None,
        environment: dict[str, str] | None = None,
        **more: Any,
    ) -> Command:
        self.count += 1
        out, err = (self.folder / f"{self.count}.{name}" for name in ("out", "err"))
        for file in (out, err):
            file.touch()
            file.chmod(0o666)
        request = {
            "start": [str(word) for word in words], "cwd": str(cwd or self.folder), "out": str(out), "err": str(err),
            "environment": environment or {}, **more,
        }  # fmt: skip
        return Command(self, self.ask(request)["pid"], err, out)

    def end(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("commands")
    folder.chmod(0o777)
    found = Server(
        folder, {"LABELWISE_CACHE": str(folder / "cache"), "NUMBA_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    )
    yield found
    found.end()


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 handwritten digits in class folders."""
    everything = tmp_path_factory.mktemp("digits") / "digits"
    write_digits(everything)
    for number, file in enumerate(sorted(everything.glob("*/*.png"))):
        if number % 6:
            file.unlink()
    return everything


PRETRAIN = (
    "--backbone", "resnet18", "--image-size", "16", "--batch-size", "32", "--epochs", "6", "--precision", "fp32", "--recipe",
)  # fmt: skip
RECIPE = """
[pretrain]
backbone_args = {layers = [1, 1, 1, 1], channels = [8, 8, 16, 16]}
stem = "half"
"""
FINETUNE = ("--label-counts", "20,60", "--draws", "2", "--recipe")
FINETUNE_RECIPE = """
[finetune]
steps = 3
scratch_steps = 4
"""


@dataclass(frozen=True)
class Work:
    """One pretraining and one comparison on the digits, as commands."""

    server: Server
    folder: Path
    images: Path

    def start(self, stage: str, run: Path, **more: Any) -> Command:
        recipe = self.folder / f"{stage}.toml"
        recipe.write_text(RECIPE if stage == "pretrain" else FINETUNE_RECIPE)
        often = {
            "labelwise.stages.pretraining:SAVE_SECONDS": 0.02
        }  # so that there is something to go on from
        if stage == "pretrain":
            return self.server.start(
                "pretrain", self.images, "--out", run, *PRETRAIN, recipe, set=often, **more
            )
        return self.server.start("finetune", "--run", run, *FINETUNE, recipe, **more)

    def finish(self, stage: str, run: Path, **more: Any) -> Command:
        command = self.start(stage, run, **more)
        assert command.wait() == 0, command.words
        return command


@dataclass(frozen=True)
class Undisturbed:
    """Folders of a run after pretraining and after comparing, and what `state_of` each is."""

    pretrained: Path
    compared: Path
    states: dict[str, dict[str, Any]]


@pytest.fixture
def work(server: Server, tmp_path: Path, digits: Path) -> Work:
    return Work(server, tmp_path, digits)


@pytest.fixture(scope="session")
def undisturbed(server: Server, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """A run that nothing happened to, after each stage."""
    folder = tmp_path_factory.mktemp("undisturbed")
    work, states = Work(server, folder, digits), {}
    for stage in ("pretrain", "finetune"):
        run = RunDirectory(folder / stage)
        if stage == "finetune":
            shutil.copytree(folder / "pretrain", run.path)
        work.finish(stage, run.path)
        states[stage] = state_of(run)
    return Undisturbed(folder / "pretrain", folder / "finetune", states)


def state_of(run: RunDirectory) -> dict[str, Any]:
    """Every tensor, metric and result of a run, but for what a clock said."""
    newest = sorted(run.checkpoints.glob("step-*"))[-1]
    tensors = {}
    for file in (run.encoder, run.head, run.classifier, newest / "state.safetensors"):
        if file.exists():
            for name, tensor in sorted(load_file(file).items()):
                tensors[f"{file.name}:{name}"] = hashlib.sha256(tensor.tobytes()).hexdigest()
    return {
        "tensors": tensors,
        "metrics": [without_clocks(row) for row in read_jsonl(run.metrics)],
        "results": sorted(json.dumps(without_clocks(row), sort_keys=True) for row in read_jsonl(run.results)),
    }


def without_clocks(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in CLOCKS}
