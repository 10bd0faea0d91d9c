"""Colour distortion: brightness, contrast, saturation, hue, grayscale, intensity.

Each operation takes images in 0-1, (B, 3, H, W), and one factor per image, (B,), and returns images
clipped to 0-1. Factors mean what they mean in torchvision's ColorJitter, which is the tests' oracle.

Source: Chen et al. 2020 (arXiv 2002.05709), App. A. Brightness is multiplicative, as in the official
code's second version and in torchvision; the paper's first version added.
"""

import torch
from torch import Tensor

LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601, as torchvision rounds it


def luma(images: Tensor) -> Tensor:
    """Brightness of each pixel, (B, 1, H, W)."""
    red, green, blue = images.split(1, dim=1)
    brightness: Tensor = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
    return brightness


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Scale every pixel."""
    return (images * _each(factor)).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Move every pixel away from the image's mean brightness, or towards it."""
    mean = luma(images).mean(dim=(1, 2, 3), keepdim=True)
    return torch.lerp(mean, images, _each(factor)).clamp_(0, 1)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Move every pixel away from its own gray, or towards it."""
    return torch.lerp(luma(images), images, _each(factor)).clamp_(0, 1)


def adjust_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of every pixel, keeping its value and saturation (HSV).

    Source: the closed form of HSV to RGB, f(n) = V - C max(0, min(k, 4 - k, 1)), k = (n + 6 H) mod 6.
    """
    red, green, blue = images.unbind(dim=1)  # (B, H, W)
    value = images.amax(dim=1)
    chroma = value - images.amin(dim=1)
    safe = torch.where(chroma > 0, chroma, torch.ones_like(chroma))
    hue = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    hue = hue + 6 * turns[:, None, None]
    offsets = torch.tensor([5.0, 3.0, 1.0], dtype=images.dtype, device=images.device)
    k = torch.remainder(hue[:, None] + offsets[:, None, None], 6)  # (B, 3, H, W)
    share = torch.minimum(k, 4 - k).clamp_(0, 1)
    return (value[:, None] - chroma[:, None] * share).clamp_(0, 1)


def jitter(images: Tensor, rows: Tensor, order: Tensor, factors: Tensor) -> Tensor:
    """Apply the four colour operations to the chosen images, each in its own order.

    Args:
        images: 0-1, (B, 3, H, W); not changed.
        rows: Which images, (M,).
        order: Order of brightness 0, contrast 1, saturation 2, hue 3, (B, 4).
        factors: Their factors, (B, 4).

    Returns:
        (B, 3, H, W).
    """
    operations = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    images = images.clone()
    for place in range(len(operations)):
        turn = order[rows, place]  # (M,)
        for index, operation in enumerate(operations):
            chosen = rows[turn == index]
            images[chosen] = operation(images[chosen], factors[chosen, index])
    return images


def drop_color(images: Tensor, rows: Tensor) -> Tensor:
    """Turn the chosen images gray, (B, 3, H, W)."""
    images = images.clone()
    images[rows] = luma(images[rows]).expand(-1, 3, -1, -1)
    return images


def adjust_intensity(images: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """Scale and shift every pixel, for images whose meaning is in their shape, not their light."""
    return (images * _each(gain) + _each(shift)).clamp_(0, 1)


def _each(factor: Tensor) -> Tensor:
    return factor[:, None, None, None]
