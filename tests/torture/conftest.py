"""Fixtures of the torture tests, and the count of what was endured."""

import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import Server, Undisturbed, Work, state_of

from labelwise.rundir import RunDirectory

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


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("commands")
    folder.chmod(0o777)
    found = Server(
        folder, {"LABELWISE_CACHE": str(folder / "cache"), "NUMBA_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    )
    yield found
    found.end()


@pytest.fixture(autouse=True)
def no_network(server: Server) -> Iterator[None]:
    """Fail a test whose commands asked for the network, whatever became of that."""
    yield
    notes = server.network_asked_for.read_text(encoding="utf-8")
    server.network_asked_for.write_text("", encoding="utf-8")
    assert not notes


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory, some_digits: Callable[[Path, int], Path]) -> Path:
    """300 handwritten digits in class folders."""
    return some_digits(tmp_path_factory.mktemp("digits") / "digits", 6)


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
