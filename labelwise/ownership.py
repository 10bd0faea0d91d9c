"""One command at a time works on a run folder, and a second one is told which."""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from labelwise.environment import command_line, now
from labelwise.errors import ResourceError, UsageError
from labelwise.rundir import RunDirectory, delete_half_written, write_text

_CONSENT_SECONDS = 0.3  # longer than a file takes to be seen by others
_BEAT_SECONDS = 5.0
_beaten_at = 0.0
_BOOT = Path("/proc/sys/kernel/random/boot_id")  # Linux only


@contextmanager
def hold(run: RunDirectory, *, is_new: bool = False) -> Iterator[None]:
    """Keep other commands from writing a run; its folder is created if it is not there.

    The system lets go of `owner.json`, which is locked, when this process ends, however it ends. On a file system
    without locks what is written in it keeps others out: that of a process that is gone is taken over, unless it ran on
    another machine, where nobody here can look.

    Args:
        run: Which.
        is_new: There was no run in the folder when this command looked; there shall be none now.

    Raises:
        UsageError: Another command holds it, or has begun a run there since.
        ResourceError: It cannot be written to.
    """
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        ours, file = _owner(), _lock(run)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        raise ResourceError(
            f"{error.filename}: cannot be written ({error.strerror}); copy the run to a place that can be, and name the copy with --run."
        ) from None
    try:
        if file is None:
            _claim(run, ours)
        else:
            os.truncate(file, 0)
            os.pwrite(file, ours.encode(), 0)
        if is_new and run.environment.exists():
            raise UsageError(f"{run.path}: another command began a run there just now; run this one again.")
        delete_half_written(run)
        yield
    finally:
        if _read(run.owner) == ours:
            run.owner.unlink(missing_ok=True)
        if file is not None:
            os.close(file)


def beat(run: RunDirectory) -> None:
    """Show that work on a run goes on: the time of its record is the last sign of life, exact to some seconds."""
    global _beaten_at  # noqa: PLW0603 - a process works on one run at a time
    if time.monotonic() - _beaten_at > _BEAT_SECONDS:
        _beaten_at = time.monotonic()
        with suppress(OSError):  # on a disk that fails the next save says so
            os.utime(run.owner)


def is_held(run: RunDirectory) -> bool:
    """Whether a command writes a run; nothing is written to tell."""
    try:
        file = os.open(run.owner, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:  # no command holds it, or one that was another user's alone to see
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        owner = _read_owner(run.owner)
        return error.errno == errno.EWOULDBLOCK or (owner is not None and not _is_gone(owner))
    finally:
        os.close(file)
    return False


def read_owner(run: RunDirectory) -> dict[str, Any] | None:
    """Who works on a run: `host`, `pid`, `command`, `since`; None where nobody does, or nobody has said so yet."""
    return _read_owner(run.owner) if is_held(run) else None


def check_is_free(run: RunDirectory) -> None:
    """Make sure that no other command writes a run.

    Raises:
        UsageError: One does.
    """
    if is_held(run):
        raise _refusal(run, _read_owner(run.owner))


def _lock(run: RunDirectory) -> int | None:
    """Lock the record, a file, as file systems over a network know no lock of a folder; None where there are no locks."""
    while True:
        file = os.open(run.owner, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if run.owner.exists() and os.path.samestat(os.fstat(file), run.owner.stat()):
                return file
            os.close(file)  # of a command that ended in between and deleted it
        except OSError as error:
            os.close(file)
            if error.errno == errno.EWOULDBLOCK:
                raise _refusal(run, _read_owner(run.owner)) from None
            return None


def _claim(run: RunDirectory, ours: str) -> None:
    """Write down that the run is ours, without a lock; of several who do at once the last one is it."""
    by_hand = f", or delete {run.owner} if it is over"
    before = _read_owner(run.owner)
    if before is not None and not _is_gone(before):
        raise _refusal(run, before, by_hand)
    write_text(run.owner, ours)
    time.sleep(_CONSENT_SECONDS)
    if _read(run.owner) != ours:
        raise _refusal(run, _read_owner(run.owner), by_hand)


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
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _read_owner(file: Path) -> dict[str, Any] | None:
    """What is written in a record; None where it is being written this moment, or a kill left it half written."""
    try:
        found = json.loads(_read(file))
        return {
            **{name: found[name] for name in ("host", "boot", "command", "since")},
            "pid": int(found["pid"]),
        }
    except (ValueError, KeyError, TypeError):
        return None


def _is_gone(owner: dict[str, Any]) -> bool:
    """Whether the process ran on this machine and runs no more."""
    if owner["host"] != socket.gethostname():
        return False
    # in a container the next process has the same number; two that live at once have hosts of their own
    if owner["boot"] != _boot() or owner["pid"] == os.getpid():
        return True
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _refusal(run: RunDirectory, owner: dict[str, Any] | None, more: str = "") -> UsageError:
    who = "another labelwise command"
    if owner is not None:
        who = f"`{owner['command']}` (process {owner['pid']} on {owner['host']}, since {owner['since']})"
    return UsageError(f"{run.path}: {who} is working on it; wait until it is done{more}.")
