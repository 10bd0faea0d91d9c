"""From cached squares to a batch of normalised views, in the paper's order."""

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from labelwise.views import blur, color, geometry
from labelwise.views.draws import Draws, Policy, draw_views
from labelwise.views.fused import render_views

Normalization = tuple[tuple[float, float, float], tuple[float, float, float]]
UNCHANGED: Normalization = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


class Views(Protocol):
    """How views of images are made: `make_views`, or something in its place."""

    def __call__(
        self,
        policy: Policy,
        squares: Tensor,
        sizes: npt.NDArray[np.int32],
        keys: npt.NDArray[np.uint64],
        seed: int,
        epoch: int,
        views: tuple[int, ...],
        normalization: Normalization,
    ) -> Tensor:
        """Give normalised views, (V B, 3, size, size)."""


def make_views(
    policy: Policy,
    squares: Tensor,
    sizes: npt.NDArray[np.int32],
    keys: npt.NDArray[np.uint64],
    seed: int,
    epoch: int,
    views: tuple[int, ...] = (0, 1),
    normalization: Normalization = UNCHANGED,
) -> Tensor:
    """Make views of each image: all first views, then all second views, in one batch.

    Args:
        policy: What may happen.
        squares: uint8, (B, S, S, 3), on the training device.
        sizes: True height and width, (B, 2).
        keys: Content keys, (B,).
        seed, epoch: The counter.
        views: Which views of each image; V of them.
        normalization: Mean and standard deviation per channel, in 0-1.

    Returns:
        Normalised, channels last in memory, (V B, 3, size, size).
    """
    drawn = [draw_views(policy, sizes, seed, epoch, keys, view) for view in views]
    merged = Draws(
        **{name: np.concatenate([getattr(each, name) for each in drawn]) for name in Draws.__slots__}
    )
    repeated = np.tile(sizes, (len(views), 1))
    if squares.device.type == "cpu":
        inverse = None
        if policy.rotation or policy.shear:
            inverse = geometry.inverse_affine(
                torch.from_numpy(repeated).double(),
                torch.from_numpy(merged.angle),
                torch.from_numpy(merged.shear),
            ).numpy()
        return render_views(squares.numpy(), repeated, merged, inverse, policy.size, *normalization)
    images = squares.permute(0, 3, 1, 2).float().div_(255).repeat(len(views), 1, 1, 1)  # (V B, 3, S, S)
    return normalize(apply_draws(policy, images, repeated, merged), normalization)


def apply_draws(policy: Policy, squares: Tensor, sizes: npt.NDArray[np.int32], draws: Draws) -> Tensor:
    """Carry out the drawn augmentations as batched tensor operations, on any device.

    Args:
        policy: Gives the size of the views and which operations can occur.
        squares: 0-1, (B, 3, S, S).
        sizes: True height and width, (B, 2).
        draws: One row per image.

    Returns:
        0-1, (B, 3, size, size).
    """
    device = squares.device

    def on_device(values: npt.NDArray[np.generic]) -> Tensor:
        tensor = torch.from_numpy(values)
        return (tensor.float() if tensor.is_floating_point() else tensor).to(device)

    shape = on_device(sizes.astype(np.float64))
    if policy.rotation or policy.shear:
        squares = geometry.rotate_and_shear(squares, shape, on_device(draws.angle), on_device(draws.shear))
    flipped = on_device(draws.flipped)
    images = geometry.crop_and_resize(squares, shape, on_device(draws.box), flipped, policy.size)
    images.clamp_(0, 1)
    if draws.jittered.any():
        rows = on_device(np.flatnonzero(draws.jittered))
        images = color.jitter(images, rows, on_device(draws.order), on_device(draws.factors))
    if draws.gray.any():
        images = color.drop_color(images, on_device(np.flatnonzero(draws.gray)))
    if policy.intensity:
        images = color.adjust_intensity(images, on_device(draws.gain), on_device(draws.shift))
    blurred = np.flatnonzero(draws.sigma)
    if len(blurred):
        rows = on_device(blurred)
        images[rows] = blur.gaussian_blur(images[rows], on_device(draws.sigma[blurred]))
    return images


def normalize(images: Tensor, normalization: Normalization) -> Tensor:
    """Subtract the mean and divide by the standard deviation of each channel, channels last in memory.

    Args:
        images: 0-1, (B, 3, H, W).
        normalization: Mean and standard deviation per channel, in 0-1.
    """
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in normalization)
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)
