"""Gaussian blur with one width per image, as two batched matrix products."""

import torch
from torch import Tensor


def kernel_radius(size: int) -> int:
    """Half the kernel: the kernel is a tenth of the image's side, made odd.

    Source: Chen et al. 2020 (arXiv 2002.05709), App. A; official code `random_blur`.
    """
    return max(1, size // 10 // 2)


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur each image with its own width, reflecting at the borders.

    Args:
        images: (B, 3, H, H), square.
        sigma: Standard deviation in pixels, above 0, (B,).

    Returns:
        (B, 3, H, H).
    """
    size = images.shape[-1]
    matrix = _band(sigma, size, kernel_radius(size))  # (B, H, H)
    across = torch.matmul(images, matrix.mT[:, None])
    return torch.matmul(matrix[:, None], across)


def _band(sigma: Tensor, size: int, radius: int) -> Tensor:
    """Matrix that blurs a line of pixels, the reflected border folded in, (B, size, size)."""
    offsets = torch.arange(-radius, radius + 1, device=sigma.device, dtype=sigma.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)  # (B, 2 radius + 1)
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    target = torch.arange(size, device=sigma.device)[:, None]
    source = (target + offsets.long()).abs()
    source = torch.where(source >= size, 2 * (size - 1) - source, source)  # (size, 2 radius + 1)
    band = torch.zeros(len(sigma), size, size, device=sigma.device, dtype=sigma.dtype)
    return band.scatter_add_(
        2, source.expand(len(sigma), -1, -1), kernel[:, None].expand(-1, size, -1).contiguous()
    )
