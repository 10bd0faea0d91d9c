"""Processes of this machine, one for each device, that do what they are asked; the command that starts them alone writes."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.queues import Queue
from types import TracebackType
from typing import Any, Self, TypeVar

import torch

from labelwise import terminal
from labelwise.environment import processors
from labelwise.errors import LabelwiseError

Result = TypeVar("Result")
SetUp = Callable[[torch.device], Any]

_ASKED_SECONDS = 0.2  # how often it is asked whether to stop
_FOR_THE_COMMAND = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}  # it decides, and tells the others


class Processes:
    """Processes that each open once what they need, and then work on it.

    Args:
        count: Processes.
        kind: Of device; each has its own GPU, and on a CPU its share of the cores.
        set_up: Device to what work is done on; can be pickled.
        ended: What to say when one was ended from outside.
    """

    def __init__(self, count: int, kind: torch.device, set_up: SetUp, ended: str) -> None:
        there = multiprocessing.get_context("spawn")
        self._ended = ended
        devices: Queue[str] = there.Queue()
        for number in range(count):
            devices.put(f"cuda:{number}" if kind.type == "cuda" else kind.type)
        given = (set_up, max(1, processors() // count), devices)
        self._pool = ProcessPoolExecutor(count, there, _begin, given)

    def run(
        self, work: Callable[..., Result], given: tuple[Any, ...], while_waiting: Callable[[], None]
    ) -> Result:
        """Work in whichever process is free; called by as many threads as there are processes.

        Args:
            work: Takes what `set_up` made, and what is given; can be pickled.
            given: To work on.
            while_waiting: Called again and again; what it raises ends the waiting.

        Raises:
            LabelwiseError: A process was ended.
            Exception: What `set_up`, `work` and `while_waiting` raise.
        """
        before = signal.pthread_sigmask(
            signal.SIG_BLOCK, _FOR_THE_COMMAND
        )  # a process that starts here keeps that
        try:
            found: Future[Result] = self._pool.submit(_work, work, given)
        except BrokenProcessPool:
            raise LabelwiseError(self._ended) from None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        while True:
            try:
                return found.result(_ASKED_SECONDS)
            except TimeoutError:
                while_waiting()
            except BrokenProcessPool:
                raise LabelwiseError(self._ended) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:  # they write nothing, so nothing is lost, and nobody waits for what they do
            for each in multiprocessing.active_children():
                each.kill()
        self._pool.shutdown(cancel_futures=True)


# --- in the processes


@dataclass
class _Place:
    """Where this process works, and on what, once that is open."""

    device: torch.device
    set_up: SetUp
    opened: Any = None


_places: list[_Place] = []  # one


def _begin(set_up: SetUp, threads: int, devices: "Queue[str]") -> None:
    terminal.mute()
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_the_command, daemon=True).start()
    _places.append(_Place(torch.device(devices.get()), set_up))


def _end_with_the_command() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(work: Callable[..., Result], given: tuple[Any, ...]) -> Result:
    (place,) = _places
    if place.opened is None:
        if place.device.type == "cuda":
            torch.cuda.set_device(place.device)
        place.opened = place.set_up(place.device)
    return work(place.opened, *given)
