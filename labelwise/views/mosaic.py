"""A picture of what the augmentations do: each row an image and its views."""

import base64
import io

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

_GAP = 4


def draw_mosaic(originals: Tensor, views: Tensor, tile: int = 96) -> Image.Image:
    """Lay out images and their views, one image a row, the original first.

    Args:
        originals: uint8, (R, S, S, 3).
        views: 0-1, (R, V, 3, H, W).
        tile: Side of a tile, pixels.
    """
    rows, columns = views.shape[:2]
    step = tile + _GAP
    canvas = Image.new("RGB", ((columns + 1) * step + 2 * _GAP, rows * step + _GAP), "white")
    shades = (views * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2).cpu().numpy()
    for row in range(rows):
        tiles = [originals[row].cpu().numpy(), *shades[row]]
        for column, pixels in enumerate(tiles):
            left = _GAP + column * step + (_GAP if column else 0)
            canvas.paste(_tile(pixels, tile), (left, _GAP + row * step))
    return canvas


def _tile(pixels: npt.NDArray[np.uint8], side: int) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(pixels))
    filter_ = Image.Resampling.NEAREST if image.width * 2 <= side else Image.Resampling.LANCZOS
    return image.resize((side, side), filter_)


def encode_thumbnail(pixels: npt.NDArray[np.uint8], side: int = 96) -> str:
    """Make a small PNG of an image, as base64 text; nothing of the file's metadata survives.

    Args:
        pixels: uint8, (E, E, 3).
        side: Largest side of the thumbnail, pixels.
    """
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
