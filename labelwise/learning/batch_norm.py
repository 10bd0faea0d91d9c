"""Batch norm over the images of all ranks, on CPUs; on GPUs torch has its own."""

from typing import Any

import torch
from torch import Tensor, nn

from labelwise.learning.ranks import Ranks


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
