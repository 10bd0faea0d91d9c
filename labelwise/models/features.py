"""Frozen features of images, computed in evaluation mode."""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from labelwise.views.pipeline import Normalization, normalize

SETTLING = 512  # images are enough to settle batch norm's statistics
_CHUNK = 256
_STREAMS = 4  # at most; each holds what a network computes of its images
_Given = TypeVar("_Given")
_Found = TypeVar("_Found")


def map_in_streams(
    works: Sequence[Callable[[_Given], _Found]], given: Generator[_Given, None, None], device: torch.device
) -> Iterator[_Found]:
    """Run a network over chunks of images in a few threads, which share torch's between them, and give what comes out in order.

    On a CPU two streams of one thread each did 15 % more than one of two beside which files were decoded (recipes/LOG.md): they do not
    wait for each other after every layer. Other devices get one each, beside which files are read.

    Args:
        works: What to do with a chunk, on each device that is used; all do the same, and release the interpreter while they compute.
        given: The chunks; a few more are taken than were given back. Closed in the end.
        device: Where the first of `works` computes.
    """
    threads, streams = torch.get_num_threads(), len(works)
    if device.type == "cpu" and streams == 1:
        most = min(_STREAMS, threads)
        streams = max(number for number in range(1, most + 1) if threads % number == 0)  # none is left over
    free: SimpleQueue[Callable[[_Given], _Found]] = SimpleQueue()
    for number in range(streams):
        free.put(works[number % len(works)])

    def run(chunk: _Given) -> _Found:
        work = free.get()
        try:
            return work(chunk)
        finally:
            free.put(work)

    pool = ThreadPoolExecutor(
        streams, initializer=torch.set_num_threads, initargs=(max(1, threads // streams),)
    )
    asked: deque[Future[_Found]] = deque()
    try:
        for each in given:
            asked.append(pool.submit(run, each))
            if len(asked) > streams:
                yield asked.popleft().result()
        while asked:
            yield asked.popleft().result()
    finally:
        given.close()
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


@torch.inference_mode()
def extract_features(
    encoder: nn.Module,
    pixels: npt.NDArray[np.uint8],
    rows: npt.NDArray[np.int64],
    normalization: Normalization,
    device: torch.device,
) -> Tensor:
    """Run images through a network and collect what comes out.

    Batch norm uses its running statistics, and the network is left in the mode it came in.

    Args:
        encoder: (B, 3, E, E) -> (B, F).
        pixels: uint8 evaluation images, (N, E, E, 3).
        rows: Which of them, (M,).
        normalization: Mean and standard deviation per channel.
        device: Where the network is.

    Returns:
        float32 on the CPU, (M, F).
    """
    was_training = encoder.training
    encoder.eval()
    collected = []
    for start in range(0, len(rows), _CHUNK):
        chunk = torch.from_numpy(pixels[rows[start : start + _CHUNK]]).to(device)  # (B, E, E, 3)
        images = normalize(chunk.permute(0, 3, 1, 2).float() / 255, normalization)
        collected.append(encoder(images).float().cpu())
    encoder.train(was_training)
    return torch.cat(collected)


@torch.no_grad()
def settle_statistics(
    network: nn.Module,
    pixels: npt.NDArray[np.uint8],
    rows: npt.NDArray[np.int64],
    normalization: Normalization,
    device: torch.device,
) -> None:
    """Let the batch norms of a network take their running statistics from some images: after few steps they still lag behind.

    Args:
        network: (B, 3, E, E) -> (B, F), left in evaluation mode.
        pixels: uint8 evaluation images, (N, E, E, 3).
        rows: Which of them; one batch of all is run.
        normalization: Mean and standard deviation per channel.
        device: Where the network is.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of what is seen
    images = torch.from_numpy(pixels[rows]).to(device).permute(0, 3, 1, 2).float() / 255
    network.train()
    network(normalize(images, normalization))
    network.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
