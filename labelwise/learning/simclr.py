"""One step of SimCLR."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from labelwise.learning.contrast import nt_xent
from labelwise.learning.large_batch import Rows, backward_in_parts
from labelwise.learning.optimization import update
from labelwise.learning.precision import Precision, arrange_images
from labelwise.learning.ranks import ALONE, Ranks
from labelwise.models.encoder import Encoder


@dataclasses.dataclass(frozen=True)
class Learner:
    """What is trained, and how one step of it goes.

    Attributes:
        micro_batch_size: Images that go through the network at once, over all ranks.
    """

    encoder: Encoder
    head: nn.Module
    optimizer: torch.optim.Optimizer
    precision: Precision
    device: torch.device
    temperature: float
    micro_batch_size: int
    decoupled: bool
    normalized: bool = True
    ranks: Ranks = ALONE

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What a checkpoint holds besides the optimizer."""
        return {"encoder": self.encoder, "head": self.head}

    def project(self, views: Tensor) -> Tensor:
        """Run views through encoder and head, (2B, 3, H, W) -> (2B, D)."""
        views = arrange_images(views, self.precision)
        with self.precision.autocast(self.device):
            projections: Tensor = self.head(self.encoder(views))
        return projections

    def step(self, make_views: Callable[[Rows], Tensor], members: Rows) -> float:
        """Pull the two views of each image together, once; give the loss.

        Args:
            make_views: Images to their normalised views, row i and row B + i of the same image, (2B, 3, H, W).
            members: Images of the batch, over all ranks, (B,).

        Raises:
            Diverged: As in `update`.
            LostRankError: Another rank ended.
        """
        self.optimizer.zero_grad(set_to_none=True)
        part_size = min(self.micro_batch_size, len(members))
        own = self.ranks.share(members, part_size)
        if part_size < len(members):
            modules, size = self.modules.values(), part_size // self.ranks.count
            loss = backward_in_parts(self.project, make_views, own, size, self.loss_of, modules)
        else:
            loss = self.loss_of(self.project(make_views(own)))
            loss.backward()
        self.ranks.add_up_gradients(each for module in self.modules.values() for each in module.parameters())
        return update(self.optimizer, loss)

    def loss_of(self, projections: Tensor) -> Tensor:
        """Contrast the projections of a batch, of this rank's share of it (2B / W, D), -> scalar."""
        return nt_xent(
            projections,
            self.temperature,
            decoupled=self.decoupled,
            normalized=self.normalized,
            ranks=self.ranks,
        )
