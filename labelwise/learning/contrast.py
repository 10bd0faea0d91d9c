"""The contrastive loss of SimCLR, in tiles: its memory grows with the batch, not with its square."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from labelwise.learning.ranks import ALONE, Ranks

_TILE = 2**22  # similarities held at a time, 16 MiB of float32


def nt_xent(
    projections: Tensor,
    temperature: float,
    *,
    decoupled: bool = False,
    normalized: bool = True,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Contrast each image's two views against every other view in the batch (NT-Xent).

    Over several ranks each gives the projections of its own images and gets the loss of the whole batch, whose gradient with
    respect to them is exact: what other ranks' images owe to these is in it.

    Computed in float32 whatever the input type: exp(1 / temperature) overflows float16 below 0.09.

    Args:
        projections: All first views, then all second views in the same order, (2B, D), of a rank (2B / W, D); need not
            be normalized.
        temperature: Divides the similarities; smaller is sharper.
        decoupled: Leave the positive pair out of the denominator (DCL), which helps small batches.
        normalized: Similarities are cosines; else plain inner products, which the paper found worse (Table 5).
        ranks: Over which the batch is spread, evenly.

    Returns:
        Mean loss over the 2B views, a scalar; `chance_loss` when all rows agree. The official code
        returns the sum over the two directions, twice this value; we follow the paper.

    Source: Chen et al. 2020 (arXiv 2002.05709), Eq. 1 and Algorithm 1; decoupled: Yeh et al. 2022
    (arXiv 2110.06848), Eq. 6.
    """
    with torch.autocast(projections.device.type, enabled=False):
        z = projections.float()
        z = F.normalize(z, dim=1) if normalized else z  # (2B, D)
        loss: Tensor = _Contrast.apply(z, temperature, decoupled, ranks)
        return loss


def chance_loss(batch_size: int, *, decoupled: bool = False) -> float:
    """Loss of an encoder that tells no image from another: ln(2B - 1), or ln(2B - 2) when decoupled."""
    return math.log(2 * batch_size - (2 if decoupled else 1))


class _Contrast(torch.autograd.Function):
    """Mean of logsumexp over the others minus the similarity of the partner, for a rank's own rows z, (2b, D), b = B / W.

    The similarities are made a tile of own rows at a time, and once more in the backward pass. With
    p_ij = exp(s_ij - lse_i), the gradient of row i is sum_j (p_ij + p_ji) z_j - 2 z_partner(i), over
    2B times the temperature; s is symmetric, so one tile of similarities gives both p_ij and p_ji, and the ranks
    tell each other z and lse, no more.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, temperature: float, decoupled: bool, ranks: Ranks) -> Tensor:
        """Give the loss, a scalar."""
        z = _whole(ranks.gather(own))  # (2B, D)
        b = len(own) // 2
        lse = torch.empty(len(own), device=z.device)  # (2b,)
        for place, start, stop in _tiles(b, ranks):
            rows = slice(place, place + stop - start)
            lse[rows] = _similarities(z, start, stop, temperature, decoupled).logsumexp(dim=1)
        lse = _whole(ranks.gather(lse))  # (2B,)
        ctx.save_for_backward(z, lse)
        ctx.temperature, ctx.decoupled, ctx.ranks = temperature, decoupled, ranks
        positive = (z * z.roll(len(z) // 2, 0)).sum(dim=1) / temperature  # (2B,)
        return (lse - positive).double().mean().float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """Give the gradient of own rows, (2b, D)."""
        z, lse = ctx.saved_tensors
        B, ranks = len(z) // 2, ctx.ranks  # noqa: N806 - as in the paper
        b = B // ranks.count
        partners = z.roll(B, 0).view(2, ranks.count, b, -1)
        gradient = partners[:, ranks.number].reshape(2 * b, -1) * -2
        for place, start, stop in _tiles(b, ranks):
            similarity = _similarities(z, start, stop, ctx.temperature, ctx.decoupled)  # (T, 2B)
            weights = (similarity - lse[start:stop, None]).exp_()
            weights += similarity.sub_(lse).exp_()
            gradient[place : place + stop - start] += weights @ z
        return gradient * (gradients[0] / (ctx.temperature * len(z))), None, None, None


def _whole(gathered: Tensor) -> Tensor:
    """First views of all ranks, then second views, (W, 2b, ...) -> (2B, ...)."""
    whole: Tensor = gathered.unflatten(1, (2, -1)).transpose(0, 1).flatten(0, 2)
    return whole


def _tiles(b: int, ranks: Ranks) -> list[tuple[int, int, int]]:
    """Tiles of a rank's rows: where among its own they begin, and among all of them begin and end."""
    total = b * ranks.count
    tall = max(1, _TILE // (2 * total))
    return [
        (view * b + start, offset + start, offset + min(start + tall, b))
        for view in (0, 1)
        for offset in (view * total + ranks.number * b,)
        for start in range(0, b, tall)
    ]


def _similarities(z: Tensor, start: int, stop: int, temperature: float, decoupled: bool) -> Tensor:
    """Similarities of some rows to all, over the temperature, -inf where there is nothing to contrast, (T, 2B)."""
    similarity = z[start:stop] @ (z / temperature).T
    rows = torch.arange(stop - start, device=z.device)
    similarity[rows, rows + start] = -torch.inf  # itself
    if decoupled:
        similarity[rows, (rows + start + len(z) // 2) % len(z)] = -torch.inf  # the partner
    return similarity
