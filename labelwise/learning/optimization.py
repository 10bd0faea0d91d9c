"""Optimizers, learning rates and schedules."""

import math
from collections.abc import Iterable

import torch
from timm.optim.lars import Lars
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

# Rate at batch 256 and weight decay of each optimizer.
#   lars: 0.075 sqrt(batch), 1e-6: Chen et al. 2020 (arXiv 2002.05709), Sec. 2.3 and App. B.1
#   sgd: 0.03 at batch 256 doubled for short runs, 5e-4: dkobak/simclr-cifar10
#   adamw: measured on CIFAR-10, recipes/LOG.md
DEFAULTS = {"lars": (1.2, 1e-6), "sgd": (0.06, 5e-4), "adamw": (2e-3, 1e-4)}
REFERENCE_BATCH = 256


class Diverged(Exception):
    """The loss or its gradient is not a finite number any more."""


def scaled_rate(rate: float, batch_size: int, rule: str) -> float:
    """Scale a rate given for batch 256 to another batch size.

    Args:
        rate: Learning rate at batch 256.
        batch_size: Images per step, over all devices.
        rule: "sqrt" (better below batch 2,048 and for short runs), "linear" or "none".

    Source: Chen et al. 2020 (arXiv 2002.05709), App. B.1.
    """
    ratio = batch_size / REFERENCE_BATCH
    return rate * {"sqrt": math.sqrt(ratio), "linear": ratio, "none": 1.0}[rule]


def warmup_cosine(step: int, steps: int, warmup_steps: int) -> float:
    """Share of the peak rate at a step: linear warm-up, then cosine to zero, no restarts.

    Source: Chen et al. 2020 (arXiv 2002.05709), Sec. 2.3.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def create_optimizer(
    kind: str, groups: Iterable[tuple[nn.Module, float]], weight_decay: float
) -> torch.optim.Optimizer:
    """Build an optimizer over modules, each with its own peak rate.

    Biases and norms (tensors of fewer than two dimensions) get no weight decay and, under LARS, no
    layer-wise adaptation. timm's LARS adapts a group when it decays it or when told to always; so the
    decayed group is told to, lest `weight_decay=0` turn LARS into plain SGD.

    Args:
        kind: "lars", "sgd" or "adamw".
        groups: Modules and their peak learning rates.
        weight_decay: For weights of two dimensions and more.
    """
    parameters = []
    for module, rate in groups:
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        weights = [parameter for parameter in trained if parameter.ndim >= 2]
        others = [parameter for parameter in trained if parameter.ndim < 2]
        if weights:
            adapt = {"always_adapt": True} if kind == "lars" else {}
            parameters.append(
                {"params": weights, "lr": rate, "peak": rate, "weight_decay": weight_decay, **adapt}
            )
        if others:
            parameters.append({"params": others, "lr": rate, "peak": rate, "weight_decay": 0.0})
    if kind == "lars":
        lars: torch.optim.Optimizer = Lars(
            parameters, momentum=0.9, trust_coeff=0.001
        )  # SimCLR official code: eeta 0.001
        return lars
    if kind == "sgd":
        return torch.optim.SGD(parameters, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(parameters, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Set every group's rate to a share of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share


def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> float:
    """Take the optimizer's step, the gradients being there already; give the loss.

    Args:
        optimizer: At least one of its weights has a gradient.
        loss: float32, ().

    Raises:
        Diverged: The loss or a gradient is infinite or not a number; no weight was changed by it,
            though batch norm has seen the batch.
    """
    groups = optimizer.param_groups
    gradients = [each.grad for group in groups for each in group["params"] if each.grad is not None]
    # on a GPU, the one wait of a step
    found, length = torch.stack([loss.detach(), get_total_norm(gradients)]).tolist()
    if not math.isfinite(found):
        raise Diverged(f"the loss is {found}")
    if not math.isfinite(length):
        raise Diverged(f"the loss is {found:.3g} but its gradient is not finite")
    optimizer.step()
    return float(found)
