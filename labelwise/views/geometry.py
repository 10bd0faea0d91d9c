"""Crop, flip, resize, rotate and shear: where each pixel of a view comes from."""

import torch
import torch.nn.functional as F
from torch import Tensor


def crop_and_resize(squares: Tensor, sizes: Tensor, box: Tensor, flipped: Tensor, size: int) -> Tensor:
    """Cut each image's box and resample it to a square, antialiased, as two batched matrix products.

    The images are squares that hold the whole image squeezed to S x S. A box in original pixels is
    mapped into the square, so its distribution is exact; where the square has the image's own size the
    result equals torchvision's `resized_crop(antialias=True)`.

    Args:
        squares: 0-1, (B, 3, S, S).
        sizes: True height and width, (B, 2).
        box: Top, left, height, width in original pixels, (B, 4).
        flipped: Mirror left and right, (B,).
        size: Side of the result.

    Returns:
        (B, 3, size, size).
    """
    side = squares.shape[-1]
    scale = side / sizes  # (B, 2)
    rows = _resampling(box[:, 0] * scale[:, 0], box[:, 2] * scale[:, 0], side, size)  # (B, size, S)
    columns = _resampling(box[:, 1] * scale[:, 1], box[:, 3] * scale[:, 1], side, size)
    columns = torch.where(flipped[:, None, None], columns.flip(1), columns)
    batch = len(squares)
    across = torch.bmm(squares.reshape(batch, 3 * side, side), columns.mT)  # (B, 3 S, size)
    return torch.matmul(rows[:, None], across.reshape(batch, 3, side, size))  # (B, 3, size, size)


def _resampling(start: Tensor, length: Tensor, side: int, size: int) -> Tensor:
    """Weights that resample [start, start + length) of S pixels to `size` pixels, (B, size, S).

    A triangle of one output pixel's width when shrinking, of one input pixel's when enlarging: the
    antialiased bilinear filter of Pillow and torchvision.
    """
    step = (length / size)[:, None, None]  # (B, 1, 1)
    support = step.clamp(min=1.0)
    output = torch.arange(size, device=start.device, dtype=start.dtype)[None, :, None]
    pixel = torch.arange(side, device=start.device, dtype=start.dtype)[None, None, :]
    centre = start[:, None, None] + (output + 0.5) * step  # (B, size, 1)
    weights = (1.0 - (pixel + 0.5 - centre).abs() / support).clamp(min=0.0)  # (B, size, S)
    first = (start + 1e-4).floor()[:, None, None]  # 1e-4: a whole start may come out a hair below
    last = (start + length - 1e-4).ceil()[:, None, None]
    weights = weights * ((pixel >= first) & (pixel < last))
    return weights / weights.sum(dim=2, keepdim=True)


def rotate_and_shear(squares: Tensor, sizes: Tensor, angle: Tensor, shear: Tensor) -> Tensor:
    """Turn and shear each image about its centre, in original coordinates; outside is black.

    Args:
        squares: 0-1, (B, 3, S, S).
        sizes: True height and width, (B, 2).
        angle: Degrees counter-clockwise, (B,).
        shear: Degrees along x and y, (B, 2).

    Returns:
        (B, 3, S, S). Where the square has the image's own size this equals torchvision's
        `affine(angle=-angle, interpolation=bilinear)`.
    """
    theta = F.pad(inverse_affine(sizes, angle, shear), (0, 1))  # (B, 2, 3), no shift
    grid = F.affine_grid(theta, list(squares.shape), align_corners=False)  # (B, S, S, 2)
    return F.grid_sample(squares, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def inverse_affine(sizes: Tensor, angle: Tensor, shear: Tensor) -> Tensor:
    """Matrix that leads from an output pixel back to where it comes from, in -1 to 1 coordinates, (B, 2, 2).

    Arguments as in `rotate_and_shear`.
    """
    turn = torch.deg2rad(-angle)
    skew_x, skew_y = torch.deg2rad(shear).unbind(dim=1)
    a = torch.cos(turn - skew_y) / torch.cos(skew_y)
    b = -torch.cos(turn - skew_y) * torch.tan(skew_x) / torch.cos(skew_y) - torch.sin(turn)
    c = torch.sin(turn - skew_y) / torch.cos(skew_y)
    d = -torch.sin(turn - skew_y) * torch.tan(skew_x) / torch.cos(skew_y) + torch.cos(turn)
    height, width = sizes.unbind(dim=1)
    return torch.stack([d, -b * height / width, -c * width / height, a], dim=1).reshape(-1, 2, 2)
