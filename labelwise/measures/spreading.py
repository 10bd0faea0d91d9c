"""What a few labels say of all images: they are spread over the graph of nearest neighbours."""

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse

from labelwise.measures.knn import nearest_rows

Floats = npt.NDArray[np.float32]

NEIGHBOURS = 10
HANDED_ON = (
    0.9  # alpha; 0.5 was worse, 0.97 and 0.99 where features are weak. Measured 2026-11-27, recipes/LOG.md
)
_ROUNDS = 100  # what is left to be spread then is 0.9^100


def spread(features: Floats, start: Floats) -> Floats:
    """Spread what is known of each row over its nearest neighbours by cosine similarity, until it rests, (N, C).

    Args:
        features: (N, F).
        start: What is known of each row and class, (N, C); zero where nothing is.

    Source: Zhou et al. 2004 (NIPS 16), the iteration of Sec. 2: F <- alpha S F + (1 - alpha) Y, with S = D^-1/2 W D^-1/2. Here W_ij is 1
    where each of two rows is among the ten nearest of the other, and 1/2 where one is.
    """
    near = nearest_rows(torch.from_numpy(features), NEIGHBOURS).numpy()
    count, neighbours = near.shape
    ends = np.arange(0, near.size + 1, neighbours)
    named = sparse.csr_array((np.ones(near.size, np.float32), near.ravel(), ends), shape=(count, count))
    weights = (named + named.T) / 2
    root = np.sqrt(weights.sum(axis=1), dtype=np.float32)[
        :, None
    ]  # each row names others, so that none is zero
    found = start
    for _ in range(_ROUNDS):
        found = HANDED_ON * (weights @ (found / root)) / root + (1 - HANDED_ON) * start
    return np.asarray(found, dtype=np.float32)
