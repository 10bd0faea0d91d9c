"""The exact gradient of a batch that does not fit: gradient caching.

A contrastive loss ties every image to every other, so gradients cannot simply be added up over parts. But
the loss sees only projections, which are small: compute them all without a graph, take the gradient of the
loss with respect to them, then go through the parts once more and feed each its share of that gradient.
Views are made anew in each pass, so memory does not grow with the batch.

Batch norm takes its statistics over one part at a time. For a network without batch norm the result is the
gradient of the whole batch; with it, that of the same network with batch norm in groups of one part.

Source: Gao et al. 2021 (arXiv 2101.06983), Sec. 3.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Rows = npt.NDArray[np.int64]

_WORKING = 2.0  # what backward keeps, and as much for gradients of activations and buffers of convolutions


def backward_in_parts(
    project: Callable[[Tensor], Tensor],
    make_views: Callable[[Rows], Tensor],
    members: Rows,
    part_size: int,
    loss_of: Callable[[Tensor], Tensor],
    modules: Iterable[nn.Module],
) -> Tensor:
    """Add the gradient of a batch's loss to the parameters, part by part.

    Args:
        project: Views to projections, (2P, 3, H, W) -> (2P, D); the same in both passes for the same seed.
        make_views: Images to their views, all first views before all second ones.
        members: Images of the batch, (B,).
        part_size: Images per part, P; divides B.
        loss_of: Projections to the loss, (2B, D) -> scalar.
        modules: What `project` runs through; their batch norms count each image once.

    Returns:
        The loss.
    """
    parts = members.reshape(-1, part_size)  # (B / P, P)
    seeds = torch.randint(2**62, (len(parts),)).tolist()  # of dropout, the same in both passes
    pieces = []
    with torch.no_grad(), _without_running_statistics(modules):
        for seed, part in zip(seeds, parts, strict=True):
            torch.manual_seed(seed)
            pieces.append(project(make_views(part)).unflatten(0, (2, part_size)))  # (2, P, D)
    projections = torch.cat(pieces, dim=1).flatten(0, 1).requires_grad_()  # (2B, D)
    loss = loss_of(projections)
    (gradient,) = torch.autograd.grad(loss, projections)
    shares = gradient.unflatten(0, (2, len(members))).split(part_size, dim=1)
    for seed, part, share in zip(seeds, parts, shares, strict=True):
        torch.manual_seed(seed)
        project(make_views(part)).backward(share.flatten(0, 1))
    return loss.detach()


def step_bytes(project: Callable[[Tensor], Tensor], views: Tensor, modules: Iterable[nn.Module]) -> float:
    """Bytes that a training step on these views needs, besides the weights and what the optimizer keeps."""
    kept = {views.untyped_storage().data_ptr(): views.nbytes}
    weights = {each.data_ptr() for module in modules for each in (*module.parameters(), *module.buffers())}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        project(views)
    return _WORKING * sum(kept.values())


def largest_part(batch_size: int, bytes_per_image: float, available: float) -> int:
    """Largest divisor of the batch whose activations fit: the whole batch, where it does, else at least 2."""
    sizes = [size for size in range(batch_size, 1, -1) if batch_size % size == 0]
    return next((size for size in sizes if size * bytes_per_image <= available), sizes[-1])


@contextmanager
def _without_running_statistics(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Keep batch norm from following a pass that will be repeated."""
    norms = [
        each
        for module in modules
        for each in module.modules()
        if isinstance(each, _BatchNorm) and each.track_running_stats
    ]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
