"""How far an image lies from those that a network was made with: beyond nearly all of them, what it says means little."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from labelwise.models.weights import load_module, read_metadata, save_module

_FLAT = (
    0.01  # share of the mean variance that every direction has at least; few images leave many without any
)


class Familiar(nn.Module):
    """The distance of features from the mean of some, in units of their spread in each direction; and what is far.

    Source: Mahalanobis distance, without classes: Kamoi and Kobayashi 2020 (arXiv 2003.00402), Sec. 4.
    """

    mean: Tensor
    white: Tensor
    limit: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("white", torch.eye(width))
        self.register_buffer("limit", torch.tensor(torch.inf))

    def learn(self, features: Tensor) -> None:
        """Take mean and spread from features, (N, F)."""
        mean = features.double().mean(dim=0)
        centred = features.double() - mean
        variances, directions = torch.linalg.eigh(centred.T @ centred / len(features))
        variances = variances.clamp(min=0) + _FLAT * variances.mean() + 1e-12
        self.mean.copy_(mean)
        self.white.copy_(directions / variances.sqrt())  # (F, F)

    def forward(self, features: Tensor) -> Tensor:
        """(B, F) -> (B,)."""
        distances: Tensor = ((features - self.mean) @ self.white).norm(dim=1)
        return distances


def save_familiar(path: Path, familiar: Familiar, classifier: str) -> None:
    """Write it with the hash of the classifier whose features it knows."""
    save_module(path, familiar, {"classifier": classifier, "width": json.dumps(len(familiar.mean))})


def load_familiar(path: Path, classifier: str) -> Familiar | None:
    """Read what `save_familiar` wrote; None where it is of another classifier.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    header = read_metadata(path)
    if header.get("classifier") != classifier:
        return None
    familiar = Familiar(json.loads(header["width"]))
    load_module(path, familiar)
    return familiar
