"""Start labelwise commands by forking a process that has imported everything and run nothing.

Reads one JSON request a line and answers each with one JSON line:

    {"start": [words], "cwd", "environment", "unset": [names], "out", "err", "faults": [...],
     "set": {"module:name": value}, "user": uid, "closed": is nobody reading} -> {"pid"}
    {"wait": pid, "seconds"} -> {"status"}: exit code, -signal, or null when it still runs

A fault is {"at": "module:function", "call": n, "when": "before" | "after", and "exit": code, "signal": [numbers], "hang":
seconds or "raise": the name of an errno or of an exception}: what happens at the n-th call of a function, counted from 1.
"""

import builtins
import contextlib
import errno as errors
import functools
import importlib
import json
import os
import signal
import sys
import time
import traceback
from typing import Any, NoReturn

import labelwise.cli
import labelwise.stages.comparing
import labelwise.stages.predicting
import labelwise.stages.pretraining
import labelwise.stages.repeating
import labelwise.stages.reporting
import labelwise.stages.scanning


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            sys.stdout.flush()
            pid = os.fork()
            if not pid:
                run(request)
            with contextlib.suppress(PermissionError, ProcessLookupError):
                os.setpgid(pid, pid)  # before anybody can want to kill the group
            answer: dict[str, Any] = {"pid": pid}
        else:
            answer = {"status": wait(request["wait"], request["seconds"])}
        print(json.dumps(answer), flush=True)


def wait(pid: int, seconds: float) -> int | None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def run(request: dict[str, Any]) -> NoReturn:
    """Be the command."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for descriptor, place in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
        opened = os.open(place, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(opened, descriptor)
        os.close(opened)
    if request.get("closed"):
        for descriptor in (1, 2):  # a pipe whose reader has gone away
            read, write = os.pipe()
            os.dup2(write, descriptor)
            os.close(read)
            os.close(write)
    os.chdir(request["cwd"])
    os.environ.update(request["environment"])
    for name in request.get("unset", ()):
        os.environ.pop(name, None)
    for place, value in request.get("set", {}).items():
        module, name = place.split(":")
        setattr(importlib.import_module(module), name, value)
    for fault in request.get("faults", ()):
        arm(fault)
    if request.get("user"):
        os.setgroups([])
        os.setgid(request["user"])
        os.setuid(request["user"])
    sys.argv = ["labelwise", *request["start"]]
    code: Any = 0
    try:
        labelwise.cli.main()
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        code = code or 1
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def arm(fault: dict[str, Any]) -> None:
    """Let a function fail at one of its calls."""
    place, name = fault["at"].split(":")
    module = importlib.import_module(place)
    original, calls = getattr(module, name), 0

    @functools.wraps(original)
    def faulty(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != fault["call"]:
            return original(*arguments, **named)
        if fault["when"] == "after":
            result = original(*arguments, **named)
            strike(fault)
            return result
        strike(fault)
        return original(*arguments, **named)

    setattr(module, name, faulty)


def strike(fault: dict[str, Any]) -> None:
    if "exit" in fault:
        os._exit(fault["exit"])
    if "raise" in fault:
        number = getattr(errors, fault["raise"], None)
        raise OSError(number, os.strerror(number)) if number else getattr(builtins, fault["raise"])
    if "hang" in fault:
        print("hanging", file=sys.stderr, flush=True)
        time.sleep(fault["hang"])
    for number in fault.get("signal", ()):
        os.kill(os.getpid(), number)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the tests' own Ctrl-C is theirs
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
