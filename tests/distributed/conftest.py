"""Groups of real processes that talk over gloo, at loopback addresses; and what tests measured."""

import functools
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Outcome = dict[str, Any]
HERE = Path(__file__).parent
_measured: list[str] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.distributed)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _measured:
        terminalreporter.section("what was measured")
        for line in _measured:
            terminalreporter.write_line(line)


@pytest.fixture
def tell() -> Callable[[str], None]:
    """Keep a line to be shown at the end."""
    return _measured.append


@pytest.fixture
def only_long(request: pytest.FixtureRequest) -> None:
    """Skips what takes half a minute and more, unless `--long` was given."""
    if not request.config.getoption("--long"):
        pytest.skip("in the long form only: pytest -m distributed --long")


def free_port(address: str = "127.0.0.1") -> int:
    with socket.socket() as found:
        found.bind((address, 0))
        port: int = found.getsockname()[1]
        return port


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[Outcome]]:
    """What each of so many ranks found (rank.py), for a number of ranks."""

    @functools.cache
    def found(count: int) -> list[Outcome]:
        folder = tmp_path_factory.mktemp(f"ranks-{count}")
        shared = {
            "TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": 1,
        }  # fmt: skip
        processes: list[subprocess.Popen[str]] = []
        for number in range(count):
            own = {**shared, "RANK": number, "LOCAL_RANK": number}
            environment = {**os.environ, **{name: str(value) for name, value in own.items()}}
            command = [sys.executable, str(HERE / "rank.py"), str(folder)]
            processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
        said = [process.communicate(timeout=300)[1] for process in processes]
        if any(process.returncode for process in processes):
            pytest.fail("a rank failed:\n" + "\n".join(said))
        return [torch.load(folder / f"{number}.pt", weights_only=True) for number in range(count)]

    return found
