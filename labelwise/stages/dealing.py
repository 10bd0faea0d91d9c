"""`finetune --devices`: classifiers trained in several processes of this machine, one for each device; the command alone writes."""

import multiprocessing
import signal
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from types import TracebackType
from typing import Self

import torch

from labelwise import rundir, terminal
from labelwise.config import FinetuneSettings
from labelwise.environment import processors
from labelwise.errors import LabelwiseError
from labelwise.interruption import StopRequest
from labelwise.stages.alternatives import Alternative, add_alternative
from labelwise.stages.benching import set_up_bench
from labelwise.stages.finetuning import Floats, Rows
from labelwise.stages.methods import STOPPED, Bench, run_method

_ASKED_SECONDS = 0.2  # how often it is asked whether to stop


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
        threads = max(1, processors() // count)
        self._pool = ProcessPoolExecutor(
            count, there, _begin, (settings, alternatives, devices, threads, self._stopped)
        )

    def run(self, method: str, rows: Rows, draw: int) -> tuple[Floats, str, int]:
        """As `run_method`, in whichever process is free; called by as many threads as there are processes.

        Raises:
            Diverged: As `run_method`.
            Interrupted: Somebody asked to stop.
            LabelwiseError: The process ended.
        """
        found: Future[tuple[Floats, str, int]] = self._pool.submit(_run, method, rows, draw)
        while True:
            try:
                return found.result(_ASKED_SECONDS)
            except TimeoutError:
                self._bench.before_step()
            except BrokenProcessPool:
                raise LabelwiseError(
                    f"{self._bench.run.path}: a process that trained classifiers was ended; {STOPPED}"
                ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)


class _Told(StopRequest):
    """Stops this process between two steps when the command says so."""

    def __init__(self, stopped: Event) -> None:
        super().__init__()
        self._stopped = stopped

    def check(self, words: str) -> None:
        if self._stopped.is_set():
            raise RuntimeError(words)  # nobody waits for this any more


class _Place:
    """What this process works on."""

    bench: Bench
    alternatives: dict[str, Alternative]


def _begin(
    settings: FinetuneSettings,
    alternatives: dict[str, Alternative],
    devices: "Queue[str]",
    threads: int,
    stopped: Event,
) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the command gets them too, and decides
        signal.signal(number, signal.SIG_IGN)
    terminal.mute()
    torch.set_num_threads(threads)
    own = settings.model_copy(update={"device": devices.get()})
    _Place.bench = set_up_bench(rundir.open_run(settings.run), own)
    _Place.bench.stop = _Told(stopped)
    _Place.alternatives = alternatives


def _run(method: str, rows: Rows, draw: int) -> tuple[Floats, str, int]:
    bench = _Place.bench
    if method in _Place.alternatives and method not in bench.features:
        add_alternative(bench, method, _Place.alternatives[method])
    return run_method(method, bench, rows, draw)
