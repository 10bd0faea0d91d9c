"""Independent trainings side by side: small networks fill the cores of a CPU better that way than one by one."""

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

import torch
from torch import Tensor, nn

from labelwise.learning.large_batch import step_bytes
from labelwise.learning.memory import TRAINING_SHARE, available_memory

Job = TypeVar("Job")
Result = TypeVar("Result")

_PROBED = 8  # images whose activations are weighed
_STATES = 4  # weight, gradient, and two moments of AdamW


def side_by_side(
    run: Callable[[Job], Result], jobs: Iterable[Job], workers: int
) -> Generator[tuple[Job, Result]]:
    """Run jobs in as many threads, each with its share of the cores; give each and its result once it is done.

    When one fails, those that have not begun are dropped, and the error is raised after the results of
    those that were being run.

    PyTorch lets go of Python's lock inside its operations, so threads are enough. What a job draws from
    PyTorch's global generator would depend on the others: see `is_repeatable`.
    """
    if workers == 1:
        yield from ((job, run(job)) for job in jobs)
        return
    cores = torch.get_num_threads()
    share = max(1, cores // workers)
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(share,))
    error: BaseException | None = None
    is_urgent = False
    try:
        begun = {pool.submit(run, job): job for job in jobs}
        for future in as_completed(begun):
            if future.cancelled():
                continue
            failure = future.exception()
            if failure is None:
                yield begun[future], future.result()
            elif error is None:
                error = failure
                for other in begun:
                    other.cancel()
    except KeyboardInterrupt:  # asked twice: whoever leaves now does not wait for a step
        is_urgent = True
        raise
    finally:
        pool.shutdown(wait=not is_urgent, cancel_futures=True)
        torch.set_num_threads(cores)  # the number of some libraries is everybody's
    if error is not None:
        raise error


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
    step = step_bytes(network, images, [network]) * batch_size / _PROBED
    weights = sum(each.nbytes for each in network.parameters())
    each = step + _STATES * weights
    return int(max(1.0, min(torch.get_num_threads(), TRAINING_SHARE * available_memory(device) / each)))


@torch.no_grad()
def is_repeatable(network: nn.Module, images: Tensor) -> bool:
    """Whether the network draws nothing while it trains: no dropout, no stochastic depth."""
    before = torch.get_rng_state()
    network(images)
    return torch.equal(before, torch.get_rng_state())
