"""Signs that pretraining is or is not learning; none of them needs a label."""

import math

import torch
from torch import Tensor

from labelwise.measures.knn import nearest_rows

STUCK = 0.05  # a loss within 5 % of chance after a third of the run has learned nothing
COLLAPSED = 0.02  # effective rank below 2 % of the feature width
# Of an encoder that began from other weights. Measured (recipes/LOG.md): three sound trainings from ImageNet weights kept 0.10 to
# 0.12 of the neighbours above chance while their accuracy rose, an untrained network 0.003; effective rank rose.
SHRUNK = 0.25  # of the effective rank at the start
LOST = 0.03  # of the nearest neighbours at the start, above chance
_NEIGHBOURS = 10


def effective_rank(features: Tensor) -> float:
    """Number of directions the features really use: exp of the entropy of their singular values.

    Args:
        features: (N, F).

    Returns:
        From 1 (collapsed to a line) to min(N, F).

    Source: Roy and Vetterli 2007 (EUSIPCO); used on SSL features by Garrido et al. 2023 (RankMe,
    arXiv 2210.02885), Eq. 1.
    """
    values = torch.linalg.svdvals(features.float() - features.float().mean(dim=0))
    share = values / values.sum().clamp(min=1e-12) + 1e-7
    return float(torch.exp(-(share * share.log()).sum()))


def kept_neighbours(before: Tensor, after: Tensor) -> float:
    """Share of each image's ten nearest neighbours (cosine similarity) that are among its ten nearest still, above chance.

    Args:
        before, after: Features of the same images, (N, F).

    Returns:
        1 where all are, about 0 where as many are as by chance; the mean over images.
    """
    first, second = (nearest_rows(features, _NEIGHBOURS) for features in (before, after))
    kept = float((first[:, :, None] == second[:, None, :]).any(dim=2).float().mean())
    chance = first.shape[1] / (len(before) - 1)
    return (kept - chance) / max(1e-9, 1 - chance)


def diagnose_start(rank: float, start_rank: float, kept: float) -> str | None:
    """Say in words what training has done to an encoder that began from other weights, or nothing where it is sound.

    Args:
        rank, start_rank: Effective rank of the features, now and at the start.
        kept: See `kept_neighbours`.
    """
    if rank < SHRUNK * start_rank:
        return f"the features use {rank:.1f} directions, {start_rank:.1f} at the start: collapse"
    if kept < LOST:
        return f"of the nearest neighbours that images had at the start {max(0.0, kept):.1%} are left beyond chance: what the weights knew is lost"
    return None


def diagnose(loss: float, chance: float, rank: float, width: int, progress: float) -> str | None:
    """Say in words what looks wrong, or nothing.

    Args:
        loss: Mean loss of the epoch.
        chance: ln(2B - 1).
        rank: Effective rank of the features.
        width: Their width, F.
        progress: Share of the run that is done.
    """
    if not math.isfinite(loss):
        return "the loss is not a number; lower --learning-rate"
    if progress > 1 / 3 and loss > (1 - STUCK) * chance:
        than = "worse" if loss > chance else "hardly better"
        return f"the loss ({loss:.2f}) is {than} than chance ({chance:.2f}): give it more --epochs, or another --learning-rate"
    if rank < max(2.0, COLLAPSED * width):
        return f"the features use only {rank:.1f} of {width} directions: collapse; lower --learning-rate"
    return None
