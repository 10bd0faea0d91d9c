"""`--devices`: the same command in several processes of this machine, started and watched by torch's elastic launcher."""

import logging
import signal
import sys
import tempfile
import uuid
from typing import NoReturn

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from labelwise import terminal
from labelwise.errors import CheckpointError, DataError, LostRankError, ResourceError, UsageError
from labelwise.interruption import asking_to_end

_RESTARTS = 3
_SAID = (UsageError.exit_code, DataError.exit_code, CheckpointError.exit_code, ResourceError.exit_code)


def launch(count: int) -> NoReturn:
    """Run this command as so many ranks, and leave with their exit code.

    One that is killed takes the others with it, and all are started again from the last save, at most three times. What would
    only fail again is not.

    Raises:
        LostRankError: They were lost too often.
    """
    words = ["-P", "-m", "labelwise", *sys.argv[1:], *(["--debug"] if "--debug" in sys.orig_argv else [])]
    signals = ",".join(each.name for each in (*asking_to_end(), signal.SIGQUIT))  # nohup's stays ignored
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks say what went wrong
    for attempt in range(_RESTARTS + 1):
        with tempfile.TemporaryDirectory(prefix="labelwise-ranks-") as folder:
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=count,
                run_id=uuid.uuid4().hex,
                rdzv_backend="c10d",
                rdzv_endpoint="127.0.0.1:0",
                local_addr="127.0.0.1",
                max_restarts=0,
                logs_specs=DefaultLogsSpecs(log_dir=folder),
                signals_to_handle=signals,
            )
            try:
                elastic_launch(config, sys.executable)(*words)
            except SignalException as error:
                sys.exit(128 + error.sigval)
            except ChildFailedError as error:
                how = _why(*(failure.exitcode for failure in error.failures.values()))
            else:
                sys.exit(0)
        if attempt < _RESTARTS:
            terminal.warn(
                f"a process was lost{how}; all {count} start again from the last save, {attempt + 1} of {_RESTARTS}."
            )
    raise LostRankError(
        f"a process was lost {_RESTARTS + 1} times{how}; what was saved last is there, and the same command goes on."
    )


def _why(*codes: int) -> str:
    """How a process was lost, in words; leaves where it is no loss.

    Args:
        codes: Of the ranks that did not end well; one that torch ended has that of its SIGTERM.
    """
    ended = (-signal.SIGTERM, 128 + signal.SIGTERM)
    killed = [-code for code in codes if code < 0 and code not in ended]
    said = sorted(code for code in codes if code in _SAID or (code > 128 and code not in ended))
    if said:
        sys.exit(said[0])
    if killed:
        return f" ({signal.Signals(killed[0]).name})"
    if LostRankError.exit_code not in codes:  # each was asked to end, or failed by itself and said so
        sys.exit(next((code for code in codes if code not in ended), 128 + signal.SIGTERM))
    return ""
