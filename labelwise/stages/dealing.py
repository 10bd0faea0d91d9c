"""`finetune --devices`: classifiers trained in several processes of this machine."""

from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Self

import torch

from labelwise import rundir
from labelwise.config import FinetuneSettings
from labelwise.errors import DataError
from labelwise.images.splits import hash_names
from labelwise.stages.alternatives import Alternative, add_alternative
from labelwise.stages.benching import set_up_bench
from labelwise.stages.classifier import Floats, Rows
from labelwise.stages.methods import STOPPED, Bench, run_method
from labelwise.stages.processes import Processes


@dataclass(frozen=True)
class _Work:
    """What a process needs to know, once; `contents` is a hash of what rows mean."""

    settings: FinetuneSettings
    contents: str


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
        same_run = settings.model_copy(update={"run": bench.run.path})  # runs/latest may become another
        set_up = partial(_set_up, _Work(same_run, _contents(bench)))
        ended = f"{bench.run.path}: a process that trained classifiers was ended; {STOPPED}"
        self._processes = Processes(count, bench.device, set_up, ended)
        self._alternatives = alternatives

    def run(self, method: str, rows: Rows, draw: int) -> tuple[Floats, str, int]:
        """As `run_method`, in whichever process is free; called by as many threads as there are processes.

        Raises:
            Diverged: As `run_method`.
            DataError: Images or labels changed since the command began.
            Interrupted: Somebody asked to stop.
            LabelwiseError: The process ended.
        """
        given = (method, rows, draw, self._alternatives.get(method))
        return self._processes.run(_train, given, lambda: self._bench.stop.check(STOPPED))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._processes.__exit__(kind, error, trace)


# --- in the processes


def _train(
    bench: Bench, method: str, rows: Rows, draw: int, alternative: Alternative | None
) -> tuple[Floats, str, int]:
    if alternative is not None and method not in bench.features:
        add_alternative(bench, method, alternative)
    return run_method(method, bench, rows, draw)


def _set_up(work: _Work, device: torch.device) -> Bench:
    settings = work.settings.model_copy(update={"device": str(device)})
    bench = set_up_bench(rundir.open_run(settings.run), settings)
    if _contents(bench) != work.contents:
        raise DataError(
            f"{bench.run.path}: its images or labels changed while classifiers were trained; run the same command again."
        )
    return bench


def _contents(bench: Bench) -> str:
    """Hash of what rows mean: names, pixels and labels."""
    each = zip(bench.names, bench.cache.keys.tolist(), bench.labels.tolist(), strict=True)
    return hash_names(f"{name} {key} {label}" for name, key, label in each)
