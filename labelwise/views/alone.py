"""One augmentation at a time, and the views that are made of such: what studies train on, never a run.

Every function draws per image by counter, as all views do. Images are 0-1, (B, 3, S, S).
"""

import dataclasses

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import AutoAugment, AutoAugmentPolicy

from labelwise import seeding
from labelwise.views import color
from labelwise.views.draws import Policy, draw_views
from labelwise.views.pipeline import Normalization, apply_draws, make_views, normalize

Keys = npt.NDArray[np.uint64]

ALONE = ("crop", "cutout", "color", "sobel", "noise", "blur", "rotate")  # SimCLR, Fig. 5
CUTOUT_SIDE = 0.5  # of the image's
NOISE = 0.1  # standard deviation
_DRAW = 100  # counters of what is drawn here; views of a run have 0 and 1
_CIFAR_SIDE = 64  # pixels; up to here AutoAugment's policy for CIFAR-10, above it that for ImageNet


_NOTHING = Policy(size=0, crop_scale=(1, 1), crop_ratio=(1, 1), flip=0, color=0, grayscale=0, blur=0)
_POLICIES = {
    "crop": dataclasses.replace(_NOTHING, crop_scale=(0.08, 1), crop_ratio=(3 / 4, 4 / 3)),
    "color": dataclasses.replace(_NOTHING, color=0.8, grayscale=0.2),
    "blur": dataclasses.replace(_NOTHING, blur=1.0),
}


def augment(name: str, images: Tensor, keys: Keys, seed: int, epoch: int, draw: int) -> Tensor:
    """Apply one augmentation to every image.

    Args:
        name: Of `ALONE`. "crop" takes 8 % to 100 % of the area, "color" is jitter (chance 0.8) and dropping (0.2) at strength 1,
            "cutout" blackens a square, "sobel" gives the size of the gradient, "noise" is Gaussian, "rotate" turns by quarters.
        images: (B, 3, S, S); not changed.
        keys, seed, epoch: The counter, keys (B,).
        draw: Which draw of this image and epoch.

    Source: the augmentations of Chen et al. 2020 (arXiv 2002.05709), Fig. 4; what the paper leaves open is ours.
    """
    if name in _POLICIES:
        size = images.shape[-1]
        policy = dataclasses.replace(_POLICIES[name], size=size)
        sizes = np.full((len(images), 2), size, dtype=np.int32)
        return apply_draws(policy, images, sizes, draw_views(policy, sizes, seed, epoch, keys, _DRAW + draw))
    numbers = seeding.uniform(seed, epoch, keys, _DRAW + draw, 2)
    return {"cutout": _cut_out, "sobel": _sobel, "noise": _add_noise, "rotate": _rotate}[name](
        images, numbers
    )


def _cut_out(images: Tensor, numbers: npt.NDArray[np.float64]) -> Tensor:
    """A black square that lies within the image."""
    side = images.shape[-1]
    hole = round(CUTOUT_SIDE * side)
    corner = torch.from_numpy(np.floor(numbers * (side - hole + 1))).to(images.device)[
        :, :, None
    ]  # (B, 2, 1)
    inside = torch.arange(side, device=images.device)
    covered = (inside >= corner) & (inside < corner + hole)  # (B, 2, S)
    return images.masked_fill((covered[:, 0, :, None] & covered[:, 1, None, :])[:, None], 0.0)


def _sobel(images: Tensor, numbers: npt.NDArray[np.float64]) -> Tensor:
    """Size of the gradient of the brightness, in all three channels."""
    kernel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], device=images.device)
    padded = F.pad(color.luma(images), (1, 1, 1, 1), mode="replicate")
    gradient = F.conv2d(padded, torch.stack([kernel, kernel.T])[:, None])  # (B, 2, S, S)
    size: Tensor = gradient.norm(dim=1, keepdim=True).clamp(max=1.0)
    return size.expand(-1, 3, -1, -1).contiguous()


def _add_noise(images: Tensor, numbers: npt.NDArray[np.float64]) -> Tensor:
    """Gaussian noise, drawn on the CPU, image by image."""
    drawn = [
        np.random.default_rng(int(2**53 * number)).standard_normal(images.shape[1:], dtype=np.float32)
        for number in numbers[:, 0]
    ]
    return (images + NOISE * torch.from_numpy(np.stack(drawn)).to(images.device)).clamp(0, 1)


def _rotate(images: Tensor, numbers: npt.NDArray[np.float64]) -> Tensor:
    """No, one, two or three quarters of a turn."""
    quarters = np.floor(4 * numbers[:, 0]).astype(np.int64)
    turned = images.clone()
    for quarter in (1, 2, 3):
        rows = torch.from_numpy(np.flatnonzero(quarters == quarter)).to(images.device)
        turned[rows] = torch.rot90(images[rows], quarter, dims=(2, 3))
    return turned


def _crop_of(policy: Policy) -> Policy:
    """A policy's crop and flip, and nothing else."""
    kept = {name: getattr(policy, name) for name in ("size", "crop_scale", "crop_ratio", "flip")}
    return dataclasses.replace(_NOTHING, **kept)


@dataclasses.dataclass(frozen=True)
class OneBranch:
    """Views of which the first is one crop of an image, and the second that crop under one or two augmentations.

    Attributes:
        names: Augmentations, in order.
        symmetric: Both views get them, drawn apart.

    Source: the protocol of Chen et al. 2020 (arXiv 2002.05709), Sec. 3.1: images are always cropped first, and the augmentations
    go to one branch.
    """

    names: tuple[str, ...]
    symmetric: bool = False

    def __call__(
        self,
        policy: Policy,
        squares: Tensor,
        sizes: npt.NDArray[np.int32],
        keys: Keys,
        seed: int,
        epoch: int,
        views: tuple[int, ...],
        normalization: Normalization,
    ) -> Tensor:
        """See `pipeline.Views`; of the policy the crop, the flip and the size are used."""
        base = make_views(_crop_of(policy), squares, sizes, keys, seed, epoch, (0,)).contiguous()
        made = []
        for view in views:
            images = base
            if self.symmetric or view > 0:
                for place, name in enumerate(self.names):
                    images = augment(name, images, keys, seed, epoch, 10 * view + place)
            made.append(images)
        return normalize(torch.cat(made), normalization)


@dataclasses.dataclass(frozen=True)
class WithAnother:
    """The usual views, and in each, with a chance of one half, another augmentation.

    Attributes:
        name: Of `ALONE`.
    """

    name: str

    def __call__(
        self,
        policy: Policy,
        squares: Tensor,
        sizes: npt.NDArray[np.int32],
        keys: Keys,
        seed: int,
        epoch: int,
        views: tuple[int, ...],
        normalization: Normalization,
    ) -> Tensor:
        """See `pipeline.Views`."""
        made = []
        for view in views:
            images = make_views(policy, squares, sizes, keys, seed, epoch, (view,)).contiguous()
            chosen = seeding.uniform(seed, epoch, keys, _DRAW - 1 - view, 1)[:, 0] < 0.5
            rows = torch.from_numpy(np.flatnonzero(chosen)).to(images.device)
            if len(rows):
                images[rows] = augment(self.name, images[rows], keys[chosen], seed, epoch, 20 + view)
            made.append(images)
        return normalize(torch.cat(made), normalization)


def auto_augmented(
    policy: Policy,
    squares: Tensor,
    sizes: npt.NDArray[np.int32],
    keys: Keys,
    seed: int,
    epoch: int,
    views: tuple[int, ...],
    normalization: Normalization,
) -> Tensor:
    """Crop and flip of a policy, then AutoAugment in place of its colours; see `pipeline.Views`.

    Source: Cubuk et al. 2019 (arXiv 1805.09501), the policies found on CIFAR-10 and ImageNet, as torchvision has them.
    """
    small = policy.size <= _CIFAR_SIDE
    augmented = AutoAugment(AutoAugmentPolicy.CIFAR10 if small else AutoAugmentPolicy.IMAGENET)
    images = make_views(_crop_of(policy), squares, sizes, keys, seed, epoch, views)
    shades = (255 * images).round().to(torch.uint8).cpu()
    drawn = np.concatenate([seeding.combine(seed, epoch, _DRAW + view, keys) for view in views])
    with torch.random.fork_rng(devices=[]):
        made = []
        for image, number in zip(shades, drawn.tolist(), strict=True):
            torch.manual_seed(number >> 1)
            made.append(augmented(image))
    return normalize(torch.stack(made).to(images.device).float() / 255, normalization)
