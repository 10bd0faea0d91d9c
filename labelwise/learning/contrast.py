"""The contrastive loss of SimCLR."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def nt_xent(projections: Tensor, temperature: float) -> Tensor:
    """Contrast each image's two views against every other view in the batch (NT-Xent).

    Computed in float32 whatever the input type: exp(1 / temperature) overflows float16 below 0.09.

    Args:
        projections: All first views, then all second views in the same order, (2B, D); need not be
            normalized.
        temperature: Divides the cosine similarities; smaller is sharper.

    Returns:
        Mean loss over the 2B views, a scalar; ln(2B - 1) when all rows agree. The official code
        returns the sum over the two directions, twice this value; we follow the paper.

    Source: Chen et al. 2020 (arXiv 2002.05709), Eq. 1 and Algorithm 1.
    """
    with torch.autocast(projections.device.type, enabled=False):
        z = F.normalize(projections.float(), dim=1)  # (2B, D), unit rows
        similarity = z @ z.T / temperature  # (2B, 2B)
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        partner = torch.arange(len(z), device=z.device).roll(len(z) // 2)  # view i pairs with i +/- B
        return F.cross_entropy(similarity.masked_fill(itself, -torch.inf), partner)


def chance_loss(batch_size: int) -> float:
    """Loss of an encoder that tells no image from another: ln(2B - 1)."""
    return math.log(2 * batch_size - 1)
