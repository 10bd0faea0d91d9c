"""One command at a time works on a run folder, and a second one is told which."""

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from labelwise.environment import command_line, now
from labelwise.errors import UsageError
from labelwise.rundir import RunDirectory

_BOOT = Path("/proc/sys/kernel/random/boot_id")  # Linux only


@contextmanager
def hold(run: RunDirectory, *, is_new: bool = False) -> Iterator[None]:
    """Keep other commands from writing a run; its folder is created if it is not there.

    The system lets go of the folder when this process ends, however it ends. Where the file system has no
    locks, the file `owner.json` alone keeps others out; that of a process that is gone is taken over, unless it ran on
    another machine, where nobody here can look.

    Args:
        run: Which.
        is_new: There was no run in the folder when this command looked; there shall be none now.

    Raises:
        UsageError: Another command holds it, or has begun a run there since.
    """
    run.path.mkdir(parents=True, exist_ok=True)
    folder, ours = os.open(run.path, os.O_RDONLY), _owner()
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno == errno.EWOULDBLOCK:
                raise _refusal(run, _read_owner(run.owner)) from None
            _claim(run, ours)
        else:
            run.owner.write_text(ours, encoding="utf-8")
        try:
            if is_new and run.environment.exists():
                raise UsageError(
                    f"{run.path}: another command began a run there just now; run this one again."
                )
            yield
        finally:
            if _read(run.owner) == ours:
                run.owner.unlink(missing_ok=True)
    finally:
        os.close(folder)


def _claim(run: RunDirectory, ours: str) -> None:
    """Write down that the run is ours, without a lock."""
    try:
        with run.owner.open("x", encoding="utf-8") as file:
            file.write(ours)
        return
    except FileExistsError:
        text, owner = _read(run.owner), _read_owner(run.owner)
    by_hand = f", or delete {run.owner} if it is over"
    if owner is None or not _is_gone(owner):
        raise _refusal(run, owner, by_hand)
    aside = run.owner.with_name(f".{run.owner.name}-{os.getpid()}")
    run.owner.rename(aside)
    if _read(aside) != text:  # another process took it over in between
        aside.rename(run.owner)
        raise _refusal(run, _read_owner(run.owner), by_hand)
    aside.unlink()
    _claim(run, ours)


def _owner() -> str:
    facts = {
        "host": socket.gethostname(),
        "boot": _boot(),
        "pid": os.getpid(),
        "command": command_line(),
        "since": now(),
    }
    return json.dumps(facts) + "\n"


def _boot() -> str | None:
    """What tells one start of this machine from the next."""
    return _BOOT.read_text(encoding="ascii").strip() if _BOOT.exists() else None


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.exists() else ""


def _read_owner(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(_read(file))
        return {name: found[name] for name in ("host", "boot", "pid", "command", "since")}
    except (OSError, ValueError, KeyError, TypeError):
        return None  # being written this moment


def _is_gone(owner: dict[str, Any]) -> bool:
    """Whether the process ran on this machine and runs no more."""
    if owner["host"] != socket.gethostname():
        return False
    if (
        owner["boot"] != _boot() or owner["pid"] == os.getpid()
    ):  # in a container the next process has the same number
        return True
    try:
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _refusal(run: RunDirectory, owner: dict[str, Any] | None, more: str = "") -> UsageError:
    who = "another labelwise command"
    if owner is not None:
        who = f"`{owner['command']}` (process {owner['pid']} on {owner['host']}, since {owner['since']})"
    return UsageError(
        f"{run.path}: {who} is working on it; wait until it is done{more}, or choose another --out."
    )
