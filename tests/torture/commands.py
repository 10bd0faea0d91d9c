"""Commands that can be killed at a chosen moment, and what is left of them."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from labelwise.rundir import RunDirectory, read_jsonl

CLOCKS = {"seconds", "images_per_second"}


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

    def is_over(self) -> bool:
        if self.status is None:
            self.status = self.server.ask({"wait": self.pid, "seconds": 0.01})["status"]
        return self.status is not None

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
        self.network_asked_for = folder / "network"
        self.network_asked_for.touch()
        self.network_asked_for.chmod(0o666)  # some commands are another user's
        paths = (str(Path(__file__).with_name("offline")), os.environ.get("PYTHONPATH", ""))
        offline = {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "NETWORK_ASKED_FOR": str(self.network_asked_for),
        }
        self.folder, self.environment, self.count = folder, {**environment, **offline}, 0
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fork_server.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **self.environment},
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
        *words: object,
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


PRETRAIN = (
    "--backbone", "resnet18", "--image-size", "16", "--batch-size", "32", "--precision", "fp32", "--recipe",
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
    options: tuple[object, ...] = ()  # of pretrain, besides

    def start(self, stage: str, run: Path, *, epochs: int = 6, **more: Any) -> Command:
        recipe = self.folder / f"{stage}.toml"
        if not recipe.exists():  # a command that was started just before may be reading it
            recipe.write_text(RECIPE if stage == "pretrain" else FINETUNE_RECIPE)
        often = {"labelwise.stages.pretraining:SAVE_SECONDS": 0.0}  # so that there is something to go on from
        if stage == "pretrain":
            words = (self.images, "--out", run, "--epochs", epochs, *PRETRAIN, recipe, *self.options)
            return self.server.start("pretrain", *words, set=often, **more)
        return self.server.start("finetune", "--run", run, *FINETUNE, recipe, **more)

    def finish(self, stage: str, run: Path, *, wait: float = 120, **more: Any) -> Command:
        command = self.start(stage, run, **more)
        assert command.wait(wait) == 0, command.words
        return command


@dataclass(frozen=True)
class Undisturbed:
    """Folders of a run after pretraining and after comparing, and what `state_of` each is."""

    pretrained: Path
    compared: Path
    states: dict[str, dict[str, Any]]


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


def wait_for(condition: Callable[[], Any], command: Command | None = None, seconds: float = 60) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert condition(), command.words if command else ""
