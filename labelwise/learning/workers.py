"""Independent trainings side by side: small networks fill the cores of a CPU better that way than one by one."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor, nn

from labelwise.learning.large_batch import activation_bytes
from labelwise.learning.memory import available_memory

Job = TypeVar("Job")
Result = TypeVar("Result")

_PROBED = 8  # images whose activations are weighed
_WORKING = 2.0  # a step needs about twice what it keeps
_MEMORY_SHARE = 0.5  # of what is free goes to all trainings together


def side_by_side(run: Callable[[Job], Result], jobs: Iterable[Job], workers: int) -> Iterator[Result]:
    """Run jobs in as many threads, each with its share of the cores, and give their results in order.

    PyTorch lets go of Python's lock inside its operations, so threads are enough. What a job draws from
    PyTorch's global generator would depend on the others: see `is_repeatable`.
    """
    if workers == 1:
        yield from map(run, jobs)
        return
    cores = torch.get_num_threads()
    share = max(1, cores // workers)
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(share,)) as pool:
            yield from pool.map(run, jobs)
    finally:
        torch.set_num_threads(cores)  # the number of some libraries is everybody's


def count_workers(network: nn.Module, size: int, batch_size: int, device: torch.device) -> int:
    """How many trainings of a network to run side by side: one for each core, if memory allows.

    One only on a GPU, and where the network draws random numbers while it trains.

    Args:
        network: (B, 3, H, H) -> (B, F); its running statistics are disturbed.
        size: Side of an image, H.
        batch_size: Images per step.
        device: Where.
    """
    images = torch.linspace(-2, 2, _PROBED * 3 * size * size).view(_PROBED, 3, size, size)
    if device.type != "cpu" or not is_repeatable(network.train(), images):
        return 1
    kept = activation_bytes(network, images, [network]) * batch_size / _PROBED
    fitting = int(_MEMORY_SHARE * available_memory(device) / (_WORKING * kept))
    return max(1, min(torch.get_num_threads(), fitting))


@torch.no_grad()
def is_repeatable(network: nn.Module, images: Tensor) -> bool:
    """Whether the network draws nothing while it trains: no dropout, no stochastic depth."""
    before = torch.get_rng_state()
    network(images)
    return torch.equal(before, torch.get_rng_state())
