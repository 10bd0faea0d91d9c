"""`finetune --devices`: classifiers trained in several processes of this machine, one for each device; the command alone writes."""

import multiprocessing
import os
import signal
import threading
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from types import TracebackType
from typing import Self

import torch

from labelwise import rundir, terminal
from labelwise.config import FinetuneSettings
from labelwise.environment import processors
from labelwise.errors import DataError, LabelwiseError
from labelwise.images.splits import hash_names
from labelwise.interruption import StopRequest
from labelwise.stages.alternatives import Alternative, add_alternative
from labelwise.stages.benching import set_up_bench
from labelwise.stages.finetuning import Floats, Rows
from labelwise.stages.methods import STOPPED, Bench, run_method

_ASKED_SECONDS = 0.2  # how often it is asked whether to stop
_FOR_THE_COMMAND = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}  # it decides, and tells the others


@dataclass(frozen=True)
class _Work:
    """What a process needs to know, once.

    Attributes:
        contents: Hash of what rows mean.
        threads: Of each process.
    """

    settings: FinetuneSettings
    alternatives: dict[str, Alternative]
    contents: str
    threads: int


class Dealer:
    """Deals trainings out to processes, each of which opens the run for itself.

    Args:
        bench: Of this process.
        settings: Labels and test images in it as they are remembered.
        alternatives: Weights of others.
        count: Processes.
    """

    def __init__(
        self, bench: Bench, settings: FinetuneSettings, alternatives: dict[str, Alternative], count: int
    ) -> None:
        self._bench = bench
        there = multiprocessing.get_context("spawn")
        self._stopped = there.Event()
        devices: Queue[str] = there.Queue()
        for number in range(count):
            devices.put(f"cuda:{number}" if bench.device.type == "cuda" else bench.device.type)
        same_run = settings.model_copy(update={"run": bench.run.path})  # runs/latest may become another
        work = _Work(same_run, alternatives, _contents(bench), max(1, processors() // count))
        self._pool = ProcessPoolExecutor(count, there, _begin, (work, devices, self._stopped))

    def run(self, method: str, rows: Rows, draw: int) -> tuple[Floats, str, int]:
        """As `run_method`, in whichever process is free; called by as many threads as there are processes.

        Raises:
            Diverged: As `run_method`.
            DataError: Images or labels changed since the command began.
            Interrupted: Somebody asked to stop.
            LabelwiseError: The process ended.
        """
        before = signal.pthread_sigmask(
            signal.SIG_BLOCK, _FOR_THE_COMMAND
        )  # a process that starts here keeps that
        try:
            found: Future[tuple[Floats, str, int]] = self._pool.submit(_run, method, rows, draw)
        except BrokenProcessPool:
            raise self._ended() from None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        while True:
            try:
                return found.result(_ASKED_SECONDS)
            except TimeoutError:
                self._bench.stop.check(STOPPED)
            except BrokenProcessPool:
                raise self._ended() from None

    def _ended(self) -> LabelwiseError:
        return LabelwiseError(
            f"{self._bench.run.path}: a process that trained classifiers was ended; {STOPPED}"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)


# --- in the processes


class _Told(StopRequest):
    """Stops this process between two steps when the command says so."""

    def __init__(self, stopped: Event) -> None:
        super().__init__()
        self._stopped = stopped

    def check(self, words: str) -> None:
        if self._stopped.is_set():
            raise RuntimeError(words)  # nobody waits for this any more


class _Place:
    """What this process works on, and where."""

    work: _Work
    device: str
    stop: _Told
    bench: Bench | None = None


def _begin(work: _Work, devices: "Queue[str]", stopped: Event) -> None:
    terminal.mute()
    torch.set_num_threads(work.threads)
    threading.Thread(target=_end_with_the_command, daemon=True).start()
    _Place.work, _Place.device, _Place.stop = work, devices.get(), _Told(stopped)


def _end_with_the_command() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run(method: str, rows: Rows, draw: int) -> tuple[Floats, str, int]:
    bench = _Place.bench or _set_up(_Place.work)
    if method in _Place.work.alternatives and method not in bench.features:
        add_alternative(bench, method, _Place.work.alternatives[method])
    return run_method(method, bench, rows, draw)


def _set_up(work: _Work) -> Bench:
    if _Place.device.startswith("cuda"):
        torch.cuda.set_device(_Place.device)
    settings = work.settings.model_copy(update={"device": _Place.device})
    bench = set_up_bench(rundir.open_run(settings.run), settings)
    if _contents(bench) != work.contents:
        raise DataError(
            f"{bench.run.path}: its images or labels changed while classifiers were trained; run the same command again."
        )
    bench.stop = _Place.stop
    _Place.bench = bench
    return bench


def _contents(bench: Bench) -> str:
    """Hash of what rows mean: names, pixels and labels."""
    each = zip(bench.names, bench.cache.keys.tolist(), bench.labels.tolist(), strict=True)
    return hash_names(f"{name} {key} {label}" for name, key, label in each)
