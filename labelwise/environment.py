"""environment.json: where, with what and by which commands a run was made."""

import getpass
import math
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from labelwise import rundir
from labelwise.rundir import RunDirectory

_PACKAGES = ("torch", "torchvision", "timm", "datasets", "scikit-learn", "numpy", "pillow")
_CGROUPS = Path("/sys/fs/cgroup")


def start(run: RunDirectory, **facts: Any) -> None:
    """Write the environment of a run that is about to start, with whatever else must be remembered."""
    rundir.write_json(
        run.environment,
        {
            "labelwise": version("labelwise"),
            "commit": _commit(),
            "python": platform.python_version(),
            **{name: version(name) for name in _PACKAGES},
            "platform": platform.platform(),
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "started": now(),
            "finished": None,
            "seconds": 0.0,
            "commands": [],
            **facts,
        },
    )


def note(run: RunDirectory, **facts: Any) -> None:
    """Remember more of a run."""
    rundir.write_json(run.environment, {**rundir.read_json(run.environment), **facts})


def finish(run: RunDirectory, seconds: float) -> None:
    """Note that the command that is running has done its work on this run.

    Args:
        seconds: How long it took.
    """
    record = rundir.read_json(run.environment)
    command = {"command": command_line(), "finished": now(), "seconds": round(seconds, 1)}
    record["commands"].append(command)
    record["finished"] = command["finished"]
    record["seconds"] = round(record["seconds"] + seconds, 1)
    rundir.write_json(run.environment, record)


def this_user() -> str:
    """Name of who runs this; its number where it has none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def command_line() -> str:
    """The command the user typed, or how we were called from Python."""
    name = os.path.basename(sys.argv[0])
    words = shlex.join(["labelwise", *sys.argv[1:]]) if name in ("labelwise", "__main__.py") else "Python"
    return words.encode("utf-8", "backslashreplace").decode("utf-8")


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory() -> float:
    """Bytes of memory that this machine, or this container, has left; infinite where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return math.inf
    words = meminfo.read_text(encoding="ascii").split()
    there = 1024.0 * int(words[words.index("MemAvailable:") + 1])
    return min(there, container_limit() - _container_use())


def container_limit() -> float:
    """Bytes that a container may use in all; infinite outside one."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # version 2 and 1 of cgroups
        try:
            return float((_CGROUPS / name).read_text(encoding="ascii"))
        except (OSError, ValueError):  # another version, or "max"
            continue
    return math.inf


def _container_use() -> float:
    """Bytes of its limit that a container cannot get back; pages of files can be dropped at any time."""
    for use, statistics in (
        ("memory.current", "memory.stat"),
        ("memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        try:
            used = float((_CGROUPS / use).read_text(encoding="ascii"))
            words = (_CGROUPS / statistics).read_text(encoding="ascii").split()
        except (OSError, ValueError):
            continue
        pages = dict(zip(words[::2], words[1::2], strict=False))
        return used - float(pages.get("inactive_file", 0)) - float(pages.get("active_file", 0))
    return 0.0


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _commit() -> str | None:
    """The commit this code was checked out at; None where it was installed."""
    checkout = Path(__file__).parent.parent
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git here, or not ours to read
        return None
    return found.stdout.strip()


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
