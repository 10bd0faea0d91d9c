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

_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)
_BOOT = Path("/proc/sys/kernel/random/boot_id")  # Linux only


@contextmanager
def hold(run: RunDirectory) -> Iterator[None]:
    """Keep other commands from writing a run; its folder is created if it is not there.

    The system lets go of the folder when this process ends, however it ends. Where the file system has no
    locks, the file `owner.json` alone keeps others out; that of a process that is gone is taken over, unless it ran on
    another machine, where nobody here can look.

    Raises:
        UsageError: Another command holds it.
    """
    run.path.mkdir(parents=True, exist_ok=True)
    folder = os.open(run.path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _TAKEN:
                raise _refusal(run, _read_owner(run.owner)) from None
            _claim(run)
        else:
            run.owner.write_text(_owner(), encoding="utf-8")
        try:
            yield
        finally:
            run.owner.unlink(missing_ok=True)
    finally:
        os.close(folder)


def _claim(run: RunDirectory) -> None:
    """Write down that the run is ours, without a lock."""
    try:
        with run.owner.open("x", encoding="utf-8") as file:
            file.write(_owner())
    except FileExistsError:
        owner = _read_owner(run.owner)
        if owner is None or not _is_gone(owner):
            raise _refusal(run, owner, f", or delete {run.owner} if it is over") from None
        run.owner.unlink()
        _claim(run)


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


def _read_owner(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {name: found[name] for name in ("host", "boot", "pid", "command", "since")}
    except (OSError, ValueError, KeyError, TypeError):
        return None  # being written this moment


def _is_gone(owner: dict[str, Any]) -> bool:
    """Whether the process ran on this machine and runs no more."""
    if owner["host"] != socket.gethostname():
        return False
    if owner["boot"] != _boot():
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
