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
from labelwise.errors import LabelwiseError, UsageError

T = TypeVar("T")

_PATIENT = timedelta(days=30)  # while the first rank reads images, which takes as long as it takes
_LAUNCHER = os.getppid()  # gone when this changes


class LostRankError(LabelwiseError):
    """Another rank ended, or stopped answering."""

    exit_code = 6


@dataclass(frozen=True)
class Ranks:
    """Which process this is, of how many.

    Attributes:
        number: From 0; the first one writes and speaks.
        count: Of all, W.
        local, local_count: The same on this machine.
        patient: For what may take hours.
    """

    number: int = 0
    count: int = 1
    local: int = 0
    local_count: int = 1
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
        _together(lambda: dist.all_gather(list(found.unbind(0)), tensor.detach().contiguous()))
        return found

    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the ranks."""
        if self.count > 1:
            _together(lambda: dist.all_reduce(tensor))

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

    def tell(self, make: Callable[[], T], *, patient: bool = False) -> T:
        """What the first rank makes, on all of them.

        Args:
            make: Called on the first rank only.
            patient: It may take longer than any step.
        """
        if self.count == 1:
            return make()
        told: list[Any] = [make() if self.is_first else None]
        _together(
            lambda: dist.broadcast_object_list(
                told, 0, self.patient if patient else None, torch.device("cpu")
            )
        )
        found: T = told[0]
        return found

    def largest(self, *numbers: int) -> tuple[int, ...]:
        """The largest of each number over the ranks."""
        if self.count == 1:
            return numbers
        found = torch.tensor(numbers)
        _together(lambda: dist.all_reduce(found, dist.ReduceOp.MAX))
        return tuple(found.tolist())

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors by those of the first rank."""
        if self.count > 1:
            for tensor in tensors:
                whole = tensor.detach().contiguous()
                _together(lambda whole=whole: dist.broadcast(whole, 0))  # type: ignore[misc]
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
    _together(lambda: dist.init_process_group(backend, timeout=timedelta(seconds=timeout)))
    patient = _together(lambda: dist.new_group(backend="gloo", timeout=_PATIENT))
    local, local_count = (int(os.environ[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    yield Ranks(dist.get_rank(), dist.get_world_size(), local, local_count, patient)
    _together(lambda: dist.barrier(patient))  # so that nobody takes the first one's end for a loss
    dist.destroy_process_group()


def device_of(ranks: Ranks, device: torch.device) -> torch.device:
    """This rank's own device: the GPU of its number, or its share of the cores.

    Raises:
        UsageError: There are more ranks on this machine than GPUs.
    """
    if ranks.count == 1:
        return device
    if device.type == "cuda":
        if ranks.local_count > torch.cuda.device_count():
            raise UsageError(
                f"{ranks.local_count} processes on {socket.gethostname()}, which has {torch.cuda.device_count()} GPUs; start one for each."
            )
        torch.cuda.set_device(ranks.local)
        return torch.device("cuda", ranks.local)
    torch.set_num_threads(max(1, processors() // ranks.local_count))  # torchrun allows one
    return device


# --- batch norm over all ranks


class SharedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm whose statistics are those of the batches of all ranks together, (B, C, ...) -> (B, C, ...).

    For the CPU, where torch has none; on GPUs there is its SyncBatchNorm. Every rank has as many images.

    Args:
        norm: Which it replaces, with its weights; of timm's, what it does after normalising is kept.
        ranks: Over which.
    """

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm, ranks: Ranks) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self.ranks = ranks
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.after = [name for name in ("drop", "act") if isinstance(getattr(norm, name, None), nn.Module)]
        for name in self.after:
            self.add_module(name, getattr(norm, name))

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 - torch's name
        pass

    def forward(self, images: Tensor) -> Tensor:
        """Normalise, and follow with the running averages while training."""
        if not self.training:
            found = super().forward(images)
        else:
            found, mean, variance, count = _Shared.apply(images, self.weight, self.bias, self.eps, self.ranks)
            if self.track_running_stats and self.running_mean is not None:
                self._follow(mean, variance * count / max(1, count - 1))
        for name in self.after:
            found = self.get_submodule(name)(found)
        return found

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        share = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
        for average, new in ((self.running_mean, mean), (self.running_var, variance)):
            assert average is not None
            average.lerp_(new, share)


class _Shared(torch.autograd.Function):
    """Normalisation by the mean and variance over the ranks' batches of one size.

    Gradients are of a sum over the ranks: with x the normalised input and m() the mean over all ranks' pixels,
    that of the input is weight / deviation times (g - m(g) - x m(g x)).

    Source: Ioffe and Szegedy 2015 (arXiv 1502.03167), Sec. 3.
    """

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, ranks: Ranks
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """Give the result, mean and variance, (C,), and the number of pixels of all ranks."""
        over, wide = [0, *range(2, images.ndim)], _widened(images)
        own_variance, own_mean = torch.var_mean(wide, over, correction=0)
        means, variances = ranks.gather(torch.stack([own_mean, own_variance])).unbind(1)  # (W, C) each
        mean = means.mean(0)
        variance = variances.mean(0) + (means - mean).square().mean(0)
        deviation = (variance + eps).sqrt()
        shape = [1, -1, *[1] * (images.ndim - 2)]
        x = (wide - mean.view(shape)) / deviation.view(shape)
        found = x if weight is None else x * weight.view(shape)
        found = found if bias is None else found + bias.view(shape)
        ctx.save_for_backward(x, weight, bias, deviation)
        ctx.ranks, ctx.over, ctx.shape = ranks, over, shape
        count = ranks.count * images.numel() // images.shape[1]
        ctx.count = count
        ctx.mark_non_differentiable(mean, variance)
        return found.to(images.dtype), mean, variance, count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        """Give the gradients of input, weight and bias."""
        x, weight, bias, deviation = ctx.saved_tensors
        g = _widened(gradients[0])
        own = torch.stack([g.sum(ctx.over), (g * x).sum(ctx.over)])  # (2, C)
        both = own.clone()
        ctx.ranks.add_up(both)
        mean_g, mean_gx = (each.view(ctx.shape) for each in both / ctx.count)
        scale = 1 / deviation if weight is None else weight / deviation
        found = (g - mean_g - x * mean_gx) * scale.view(ctx.shape)
        return (
            found.to(gradients[0].dtype),
            None if weight is None else own[1],
            None if bias is None else own[0],
            None,
            None,
        )


def _widened(numbers: Tensor) -> Tensor:
    """Float32 where it was less."""
    return numbers.to(torch.promote_types(numbers.dtype, torch.float32))


def share_batch_norm(module: nn.Module, ranks: Ranks) -> None:
    """Put `SharedBatchNorm` in the place of every batch norm within a module."""
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and not isinstance(child, SharedBatchNorm):
            setattr(module, name, SharedBatchNorm(child, ranks))
        else:
            share_batch_norm(child, ranks)


def _together(do: Callable[[], Any]) -> Any:
    """Do what all ranks do at once.

    Raises:
        LostRankError: One of them does not.
    """
    clock = time.monotonic()
    try:
        return do()
    except (RuntimeError, dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError) as error:
        waited = f" for {time.monotonic() - clock:.0f} s" if time.monotonic() - clock > 1 else ""
        raise LostRankError(
            f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}: another rank ended or does not answer{waited}; the same command "
            f"goes on from the last save ({str(error).strip().splitlines()[0][:200]})."
        ) from None
