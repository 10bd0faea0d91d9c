"""What the Dockerfile promises, without Docker: namespaces of Linux, a root that may only be read, process number 1, an unknown user."""

import os
import shutil
import signal
import site
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import PRETRAIN, RECIPE, Undisturbed, Work, state_of, wait_for

import labelwise
from labelwise.rundir import RunDirectory

USER = 31337  # in no list of users
_ROOM = """
set -e
mount -t tmpfs -o size=8m room "$ROOM"
cd "$ROOM"
mkdir dev proc tmp
mount --rbind /dev dev
mount -t proc proc proc
mount -t tmpfs -o size=16m,noexec,nosuid,nodev,mode=1777 tmp tmp
for place in bin sbin lib lib64; do [ -L /$place ] && cp -d /$place $place; done
bind() { mkdir -p ".$2"; mount --bind "$1" ".$2"; }
for place in $READ; do bind "$place" "$place"; mount -o remount,bind,ro ".$place"; done
bind "$IMAGES" /data; mount -o remount,bind,ro ./data
bind "$RUNS" /runs
bind "$CACHE" /cache
mount -o remount,ro .
exec /usr/sbin/chroot --userspec="$USER:$USER" --groups= . "$@"
"""


class Container:
    """Commands in a room of their own, as `docker run --read-only --tmpfs /tmp --user 31337:31337` would start them."""

    def __init__(self, folder: Path, images: Path) -> None:
        self.room, self.runs, self.cache = (folder / name for name in ("room", "runs", "cache"))
        for place in (self.room, self.runs, self.cache):
            place.mkdir()
            place.chmod(0o1777)  # as the Dockerfile does
        house = Path(labelwise.__file__).parent
        read = {Path("/usr"), Path("/bin"), Path("/lib"), Path("/lib64"), house, Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve(),
                *(Path(entry).resolve() for entry in site.getsitepackages())}  # fmt: skip
        parents = [place for place in read if not any(other in place.parents for other in read)]
        self.environment = {
            "ROOM": str(self.room), "RUNS": str(self.runs), "CACHE": str(self.cache), "IMAGES": str(images), "USER": str(USER),
            "READ": " ".join(str(place) for place in sorted(parents) if place.is_dir() and not place.is_symlink()),
        }  # fmt: skip
        self.inside = {
            "PATH": "/usr/bin:/bin", "PYTHONPATH": str(house.parent), "LABELWISE_CACHE": "/cache", "MPLCONFIGDIR": "/cache/matplotlib",
            "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", ""), "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1",
        }  # fmt: skip
        self.jobs: list[subprocess.Popen[str]] = []

    def command(self, *words: object) -> list[str]:
        variables = [f"{name}={value}" for name, value in self.inside.items()]
        return ["/usr/bin/env", "-i", *variables, sys.executable, "-m", "labelwise", *map(str, words)]

    def start(self, *words: object) -> subprocess.Popen[str]:
        namespaces = ["unshare", "-m", "-p", "-f", "--mount-proc", "--propagation", "private"]
        self.jobs.append(
            subprocess.Popen(
                [*namespaces, "bash", "-c", _ROOM, "room", *self.command(*words)],
                env={**os.environ, **self.environment}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
        )  # fmt: skip
        return self.jobs[-1]

    def beside(self, job: subprocess.Popen[str], *words: object) -> subprocess.CompletedProcess[str]:
        """Run a command where another one runs, as `docker exec` or a health check does."""
        enter = ["nsenter", "-t", str(first_process(job)), "-m", "-p", "-r", "-w", "-S", str(USER), "-G", str(USER)]  # fmt: skip
        return subprocess.run([*enter, *self.command(*words)], capture_output=True, text=True)


def first_process(job: subprocess.Popen[str]) -> int:
    """The number out here of the process that has number 1 in there."""
    return int(Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text())


@pytest.fixture
def container(tmp_path: Path, digits: Path) -> Iterator[Container]:
    if not all(shutil.which(tool) for tool in ("unshare", "nsenter", "chroot")):
        pytest.skip("no unshare, nsenter and chroot here")
    if os.geteuid() or subprocess.run(["unshare", "-m", "-p", "-f", "true"], capture_output=True).returncode:
        pytest.skip("only root can make namespaces, and not where that is not allowed")
    found = Container(tmp_path, digits)
    yield found
    for job in found.jobs:
        if job.poll() is None:
            os.kill(first_process(job), signal.SIGKILL)
            job.wait()
        assert job.stdout is not None
        job.stdout.close()


def test_a_container_that_is_stopped_has_saved_and_goes_on(
    container: Container, work: Work, undisturbed: Undisturbed, tally: Callable[..., None], is_long: bool
) -> None:
    """`docker stop` sends SIGTERM to process 1, which has no default action for it; one that is stuck is unhealthy."""
    if not is_long:
        pytest.skip("takes two minutes; --long")
    run = RunDirectory(container.runs / "digits")
    (container.runs / "recipe.toml").write_text(RECIPE)
    words = ("pretrain", "/data", "--out", "/runs/digits", "--epochs", 6, *PRETRAIN, "/runs/recipe.toml")
    job = container.start(*words)
    wait_for(lambda: job.poll() is not None or (run.metrics.exists() and len(run.metrics.read_bytes()) > 200))
    assert job.poll() is None, job.communicate()[0]
    one = first_process(job)
    os.kill(one, signal.SIGSTOP)
    healthy = container.beside(job, "status", "/runs", "--max-age", 600)
    time.sleep(1.5)  # it may have shown a sign of life just before
    stuck = container.beside(job, "status", "/runs", "--max-age", 1)
    os.kill(one, signal.SIGTERM)
    os.kill(one, signal.SIGCONT)
    said = job.communicate(timeout=120)[0]
    assert job.returncode == 128 + signal.SIGTERM, said
    assert "the same command goes on" in " ".join(said.split())
    assert (healthy.returncode, stuck.returncode) == (0, 1), (healthy.stderr, stuck.stderr)
    assert "process 1 on" in healthy.stdout
    assert "it may be stuck" in " ".join(stuck.stderr.split())

    job = container.start(*words)
    said = job.communicate(timeout=240)[0]
    assert job.returncode == 0, said
    assert "going on after step" in said
    assert state_of(run) == undisturbed.states["pretrain"]
    assert run.encoder.stat().st_uid == USER
    tally("a container stopped, continued to the same tensors")
