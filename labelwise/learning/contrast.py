"""The contrastive loss of SimCLR, in tiles: its memory grows with the batch, not with its square."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_TILE = 2**22  # similarities held at a time, 16 MiB of float32


def nt_xent(
    projections: Tensor, temperature: float, *, decoupled: bool = False, normalized: bool = True
) -> Tensor:
    """Contrast each image's two views against every other view in the batch (NT-Xent).

    Computed in float32 whatever the input type: exp(1 / temperature) overflows float16 below 0.09.

    Args:
        projections: All first views, then all second views in the same order, (2B, D); need not be
            normalized.
        temperature: Divides the similarities; smaller is sharper.
        decoupled: Leave the positive pair out of the denominator (DCL), which helps small batches.
        normalized: Similarities are cosines; else plain inner products, which the paper found worse (Table 5).

    Returns:
        Mean loss over the 2B views, a scalar; `chance_loss` when all rows agree. The official code
        returns the sum over the two directions, twice this value; we follow the paper.

    Source: Chen et al. 2020 (arXiv 2002.05709), Eq. 1 and Algorithm 1; decoupled: Yeh et al. 2022
    (arXiv 2110.06848), Eq. 6.
    """
    with torch.autocast(projections.device.type, enabled=False):
        z = projections.float()
        z = F.normalize(z, dim=1) if normalized else z  # (2B, D)
        loss: Tensor = _Contrast.apply(z, temperature, decoupled)
        return loss


def chance_loss(batch_size: int, *, decoupled: bool = False) -> float:
    """Loss of an encoder that tells no image from another: ln(2B - 1), or ln(2B - 2) when decoupled."""
    return math.log(2 * batch_size - (2 if decoupled else 1))


class _Contrast(torch.autograd.Function):
    """Mean of logsumexp over the others minus the similarity of the partner, for rows z, (2B, D).

    The similarities are made a tile of rows at a time, and once more in the backward pass. With
    p_ij = exp(s_ij - lse_i), the gradient of row i is sum_j (p_ij + p_ji) z_j - 2 z_partner(i), over
    2B times the temperature; s is symmetric, so one tile of similarities gives both p_ij and p_ji.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, temperature: float, decoupled: bool) -> Tensor:
        """Give the loss, a scalar."""
        lse = torch.empty(len(z), device=z.device)  # (2B,)
        for start, stop in _tiles(len(z)):
            lse[start:stop] = _similarities(z, start, stop, temperature, decoupled).logsumexp(dim=1)
        ctx.save_for_backward(z, lse)
        ctx.temperature, ctx.decoupled = temperature, decoupled
        positive = (z * z.roll(len(z) // 2, 0)).sum(dim=1) / temperature  # (2B,)
        return (lse - positive).double().mean().float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Give the gradient of z, (2B, D)."""
        z, lse = ctx.saved_tensors
        gradient = z.roll(len(z) // 2, 0) * -2
        for start, stop in _tiles(len(z)):
            similarity = _similarities(z, start, stop, ctx.temperature, ctx.decoupled)  # (T, 2B)
            weights = (similarity - lse[start:stop, None]).exp_()
            weights += similarity.sub_(lse).exp_()
            gradient[start:stop] += weights @ z
        return gradient * (gradients[0] / (ctx.temperature * len(z))), None, None


def _tiles(rows: int) -> list[tuple[int, int]]:
    tall = max(1, _TILE // rows)
    return [(start, min(start + tall, rows)) for start in range(0, rows, tall)]


def _similarities(z: Tensor, start: int, stop: int, temperature: float, decoupled: bool) -> Tensor:
    """Similarities of some rows to all, over the temperature, -inf where there is nothing to contrast, (T, 2B)."""
    similarity = z[start:stop] @ (z / temperature).T
    rows = torch.arange(stop - start, device=z.device)
    similarity[rows, rows + start] = -torch.inf  # itself
    if decoupled:
        similarity[rows, (rows + start + len(z) // 2) % len(z)] = -torch.inf  # the partner
    return similarity
