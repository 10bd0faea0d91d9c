"""One step of SimCLR."""

import dataclasses

import torch
from torch import Tensor, nn

from labelwise.learning.contrast import nt_xent
from labelwise.learning.precision import Precision, arrange_images
from labelwise.models.encoder import Encoder


@dataclasses.dataclass(frozen=True)
class Learner:
    """What is trained, and how one step of it goes."""

    encoder: Encoder
    head: nn.Module
    optimizer: torch.optim.Optimizer
    precision: Precision
    device: torch.device
    temperature: float

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What a checkpoint holds besides the optimizer."""
        return {"encoder": self.encoder, "head": self.head}

    def step(self, views: Tensor) -> float:
        """Pull the two views of each image together, once; give the loss.

        Args:
            views: Normalised, row i and row B + i of the same image, (2B, 3, H, W).
        """
        views = arrange_images(views, self.precision)
        with self.precision.autocast(self.device):
            projections = self.head(self.encoder(views))  # (2B, D)
        loss = nt_xent(projections, self.temperature)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.item()
