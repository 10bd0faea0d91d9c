"""Where the numbers of a training go: metrics.jsonl and, where that was asked for, an event file for TensorBoard."""

import importlib.util
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from labelwise import rundir
from labelwise.errors import UsageError
from labelwise.rundir import RunDirectory

Record = Callable[..., None]


def check_tracker(tracker: str) -> None:
    """Make sure that a tracker can be written to.

    Raises:
        UsageError: The extra `labelwise[tensorboard]` is not installed.
    """
    if tracker == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise UsageError(
            "--tracker tensorboard needs one more package: pip install 'labelwise[tensorboard]'."
        )


@contextmanager
def recording(run: RunDirectory, tracker: str) -> Iterator[Record]:
    """Open what the rows of a training are written to.

    Yields:
        `record(row, durable=True)`: add a row to the metrics, see `rundir.append_jsonl`.
    """

    def record(row: dict[str, Any], *, durable: bool = True) -> None:
        rundir.append_jsonl(run.metrics, row, durable=durable)

    if tracker == "none":
        yield record
        return
    with _events(run) as show:

        def record_and_show(row: dict[str, Any], *, durable: bool = True) -> None:
            record(row, durable=durable)
            show(row)

        yield record_and_show


@contextmanager
def _events(run: RunDirectory) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Open an event file that begins with all rows of the metrics, in place of earlier ones, so no step is missing or there twice.

    torch's own writer does its work in a thread, which prints a traceback where the disk is full.
    """
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # noqa: PLC0415 - an extra
    from tensorboard.compat.proto.summary_pb2 import Summary  # noqa: PLC0415
    from tensorboard.summary.writer.record_writer import RecordWriter  # noqa: PLC0415

    shutil.rmtree(run.tensorboard, ignore_errors=True)
    run.tensorboard.mkdir()
    with (run.tensorboard / f"events.out.tfevents.{time.time():.0f}").open("wb") as file:
        writer = RecordWriter(file)

        def write(step: int, **what: Any) -> None:
            with rundir.naming(run.tensorboard):
                writer.write(Event(wall_time=time.time(), step=step, **what).SerializeToString())
                file.flush()

        def show(row: dict[str, Any]) -> None:
            group = "step" if row["kind"] == "step" else "epoch"
            values = [
                Summary.Value(tag=f"{group}/{name}", simple_value=value)
                for name, value in row.items()
                if name not in ("kind", "step", "epoch") and value is not None
            ]
            write(row["step"], summary=Summary(value=values))

        write(0, file_version="brain.Event:2")
        # a TensorBoard that looks on forgets what it read of an earlier file
        write(0, session_log=SessionLog(status=SessionLog.START))
        for row in rundir.read_jsonl(run.metrics):
            show(row)
        yield show
