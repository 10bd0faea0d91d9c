"""`--devices`: the same command in several processes of this machine, started and watched by torch's elastic launcher."""

import signal
import sys
import tempfile
import uuid
from typing import NoReturn

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from labelwise import terminal
from labelwise.errors import LabelwiseError, UsageError
from labelwise.learning.precision import choose_device
from labelwise.learning.ranks import LostRankError

_RESTARTS = 3


def count_devices(devices: str, device: str) -> int:
    """How many processes `--devices` asks for: `all` is one for each GPU.

    Raises:
        UsageError: There are not as many GPUs.
    """
    kind = choose_device(device).type
    there = torch.cuda.device_count() if kind == "cuda" else 1
    asked = there if devices == "all" else int(devices)
    if asked > there and kind != "cpu":
        raise UsageError(f"--devices {devices}: this machine has {there} of kind {kind}.")
    return asked


def launch(count: int) -> NoReturn:
    """Run this command as so many ranks, and leave with their exit code.

    One that is killed takes the others with it, and all are started again from the last save, at most three times. What would
    only fail again is not.

    Raises:
        LabelwiseError: They were lost too often.
    """
    words = ["-m", "labelwise", *sys.argv[1:]]
    for attempt in range(_RESTARTS + 1):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=tempfile.mkdtemp(prefix="labelwise-ranks-")),
        )
        try:
            elastic_launch(config, sys.executable)(*words)
        except SignalException as error:
            sys.exit(128 + error.sigval)
        except ChildFailedError as error:
            codes = {failure.exitcode for failure in error.failures.values()}
            own = codes - {LostRankError.exit_code, -signal.SIGTERM, 128 + signal.SIGTERM}
            killed = sorted(-code for code in own if code < 0)
            final = sorted(code for code in own if code > 0)
            if final:  # it has said why
                sys.exit(final[0])
            how = f" ({signal.Signals(killed[0]).name})" if killed else ""
            if attempt < _RESTARTS:
                terminal.warn(
                    f"a process was lost{how}; all {count} start again from the last save, {attempt + 1} of {_RESTARTS}."
                )
        else:
            sys.exit(0)
    raise LabelwiseError(
        f"a process was lost {_RESTARTS + 1} times{how}; what was saved last is there, and the same command goes on."
    )
