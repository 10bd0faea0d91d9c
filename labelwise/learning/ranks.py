"""Several processes train one network, each on its share of every batch, as if they were one. The door of torch.distributed.

torchrun, or `--devices`, starts the processes, its ranks; each has a copy of the network. What they tell each other adds up
to the gradient of the whole batch: all projections are gathered for the loss, gradients are added up, and batch norm takes
its statistics over all ranks. The first rank alone writes and speaks.
"""

import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from labelwise.environment import processors
from labelwise.errors import LostRankError, UsageError, is_out_of_memory

T = TypeVar("T")

_PATIENT = timedelta(days=30)  # while the first rank reads images, which takes as long as it takes
_MEETING_SECONDS = 300.0
_LAUNCHER = os.getppid()  # gone when this changes


@dataclass(frozen=True)
class Ranks:
    """Which process this is, of how many.

    Attributes:
        number: From 0; the first one writes and speaks.
        count: Of all, W.
        local, local_count: The same on this machine.
        usual: For what passes in a step.
        patient: For what may take hours.
    """

    number: int = 0
    count: int = 1
    local: int = 0
    local_count: int = 1
    usual: ProcessGroup | None = None
    patient: ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Whether this one writes and speaks."""
        return self.number == 0

    def share(self, members: npt.NDArray[np.int64], part_size: int) -> npt.NDArray[np.int64]:
        """This rank's share of each part of a batch, (B,) -> (B / W,).

        Args:
            members: Images of the batch, the same on every rank, (B,).
            part_size: Images that go through the network at once, over all ranks; the ranks divide it.
        """
        if self.count == 1:
            return members
        parts = members.reshape(-1, self.count, part_size // self.count)
        return np.ascontiguousarray(parts[:, self.number]).reshape(-1)

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, of one shape, without gradient, (...) -> (W, ...)."""
        if self.count == 1:
            return tensor.detach()[None]
        found = torch.empty((self.count, *tensor.shape), dtype=tensor.dtype, device=tensor.device)
        _together(lambda: dist.all_gather(list(found.unbind(0)), tensor.detach().contiguous(), self.usual))
        return found

    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the ranks."""
        if self.count > 1:
            _together(lambda: dist.all_reduce(tensor, group=self.usual))

    def add_up_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace gradients by their sums over the ranks, all in one message."""
        if self.count == 1:
            return
        gradients = [each.grad for each in parameters if each.grad is not None]
        if not gradients:
            return
        flat = torch.cat([each.reshape(-1) for each in gradients])
        self.add_up(flat)
        for gradient, summed in zip(gradients, flat.split([each.numel() for each in gradients]), strict=True):
            gradient.copy_(summed.view(gradient.shape))

    def seed(self, number: int) -> int:
        """A seed of this rank's own; the first one's is the number itself."""
        return (number + self.number * 2_654_435_761) % 2**32 if self.count > 1 else number

    def tell(self, make: Callable[[], T]) -> T:
        """What the first rank makes, on all of them; others wait for as long as that takes.

        Args:
            make: Called on the first rank only.
        """
        if self.count == 1:
            return make()
        told: list[Any] = [make() if self.is_first else None]
        _together(lambda: dist.broadcast_object_list(told, 0, self.patient, torch.device("cpu")))
        found: T = told[0]
        return found

    def collect(self, value: T) -> list[T]:
        """What each rank has, on all of them."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        _together(lambda: dist.all_gather_object(found, value, self.usual))
        return found

    def largest(self, *numbers: int) -> tuple[int, ...]:
        """The largest of each number over the ranks."""
        if self.count == 1:
            return numbers
        found = torch.tensor(numbers)
        _together(lambda: dist.all_reduce(found, dist.ReduceOp.MAX, self.usual))
        return tuple(found.tolist())

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors by those of the first rank."""
        if self.count > 1:
            for tensor in tensors:
                whole = tensor.detach().contiguous()
                _together(lambda whole=whole: dist.broadcast(whole, 0, self.usual))  # type: ignore[misc]
                tensor.detach().copy_(whole)

    def launcher_is_gone(self) -> bool:
        """Whether nobody is left who could end this rank."""
        return self.count > 1 and os.getppid() != _LAUNCHER


ALONE = Ranks()


def is_rank() -> bool:
    """Whether torchrun, or `--devices`, started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def join(timeout: float) -> Iterator[Ranks]:
    """Meet the other ranks; alone where nobody started any.

    Args:
        timeout: Seconds after which a rank that does not answer is given up.

    Raises:
        LostRankError: They cannot be reached; and within the block, where one of them is lost.
    """
    if not is_rank():
        yield ALONE
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    meeting = timedelta(seconds=max(timeout, _MEETING_SECONDS))  # some start later than others
    _together(lambda: dist.init_process_group(backend, timeout=meeting))
    usual = _together(lambda: dist.new_group(backend=backend, timeout=timedelta(seconds=timeout)))
    patient = _together(lambda: dist.new_group(backend="gloo", timeout=_PATIENT))
    local, local_count = (int(os.environ[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    yield Ranks(dist.get_rank(), dist.get_world_size(), local, local_count, usual, patient)
    _together(lambda: dist.barrier(patient))  # so that nobody takes the first one's end for a loss
    dist.destroy_process_group()


def device_of(ranks: Ranks, device: torch.device) -> torch.device:
    """This rank's own device: the GPU of its number, or its share of the cores.

    Raises:
        UsageError: There are more ranks on this machine than GPUs, or the device knows none.
    """
    if ranks.count == 1:
        return device
    if device.type == "mps":
        raise UsageError("--device mps: an Apple GPU trains alone; use --device cpu for several processes.")
    if device.type == "cuda":
        if ranks.local_count > torch.cuda.device_count():
            raise UsageError(
                f"{ranks.local_count} processes on {socket.gethostname()}, which has {torch.cuda.device_count()} GPUs; start one for each."
            )
        torch.cuda.set_device(ranks.local)
        return torch.device("cuda", ranks.local)
    torch.set_num_threads(max(1, processors() // ranks.local_count))  # torchrun allows one
    return device


def lost(error: Exception, after: float = 0.0) -> LostRankError:
    """What to raise for an error of torch's that means that another rank is gone.

    Args:
        error: As it came.
        after: Seconds that were waited.
    """
    waited = f" for {after:.0f} s" if after > 1 else ""
    return LostRankError(
        f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}: another rank ended or does not answer{waited}; the same command "
        f"goes on from the last save ({str(error).strip().splitlines()[0][:200]})."
    )


def _together(do: Callable[[], Any]) -> Any:
    """Do what all ranks do at once.

    Raises:
        LostRankError: One of them does not.
    """
    clock = time.monotonic()
    try:
        return do()
    except RuntimeError as error:  # gloo's of lost connections are no more than that
        if is_out_of_memory(error):
            raise
        raise lost(error, time.monotonic() - clock) from error
