"""What happens to each image: every random parameter of a view, drawn per image by counter."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from labelwise import seeding

Floats = npt.NDArray[np.float64]

CROP_ATTEMPTS = 10  # torchvision RandomResizedCrop.get_params; then the largest centred crop
BLUR_SIGMA = (0.1, 2.0)  # SimCLR, App. A


@dataclass(frozen=True)
class Policy:
    """Which augmentations a view may receive, and how strong.

    Attributes:
        size: Side of the view in pixels.
        crop_scale: Range of the crop's share of the image area.
        crop_ratio: Range of the crop's aspect, width / height.
        flip: Chance of a horizontal flip.
        color: Chance of colour jitter.
        color_strength: The paper's s: brightness, contrast, saturation 0.8 s, hue 0.2 s.
        grayscale: Chance of dropping colour.
        blur: Chance of Gaussian blur.
        rotation: Largest rotation either way, degrees.
        shear: Largest shear either way along each axis, degrees.
        intensity: x: gain is drawn from 1 +/- x and shift from +/- x / 2.

    Source: Chen et al. 2020 (arXiv 2002.05709), Sec. 3 and App. A, for all but the last three.
    """

    size: int
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    color: float = 0.8
    color_strength: float = 1.0
    grayscale: float = 0.2
    blur: float = 0.5
    rotation: float = 0.0
    shear: float = 0.0
    intensity: float = 0.0


@dataclass(frozen=True, slots=True)
class Draws:
    """The parameters of one view of each of B images; every array has B rows.

    Attributes:
        box: Top, left, height, width of the crop in original pixels, whole numbers, (B, 4).
        flipped: Mirror left and right, (B,).
        angle: Rotation, degrees, counter-clockwise, (B,).
        shear: Shear along x and y, degrees, (B, 2).
        jittered: Apply the four colour operations, (B,).
        order: Order of brightness 0, contrast 1, saturation 2, hue 3, (B, 4).
        factors: Their factors; hue in turns, (B, 4).
        gray: Drop colour, (B,).
        gain, shift: Intensity becomes gain * x + shift, (B,).
        sigma: Blur in pixels of the view, 0 for none, (B,).
    """

    box: Floats
    flipped: npt.NDArray[np.bool_]
    angle: Floats
    shear: Floats
    jittered: npt.NDArray[np.bool_]
    order: npt.NDArray[np.int64]
    factors: Floats
    gray: npt.NDArray[np.bool_]
    gain: Floats
    shift: Floats
    sigma: Floats


def draw_views(
    policy: Policy,
    sizes: npt.NDArray[np.int32],
    seed: int,
    epoch: int,
    keys: npt.NDArray[np.uint64],
    view: int,
) -> Draws:
    """Draw one view of each image.

    Args:
        policy: What may happen.
        sizes: True height and width of each image, (B, 2).
        seed, epoch, keys, view: The counter; see `seeding.uniform`. `keys` is (B,).
    """
    count = 2 * CROP_ATTEMPTS + 20
    numbers = seeding.uniform(seed, epoch, keys, view, count)  # (B, count)
    crop, rest = numbers[:, : 2 * CROP_ATTEMPTS + 2], numbers[:, 2 * CROP_ATTEMPTS + 2 :]
    spread = 2.0 * rest - 1.0  # uniform in [-1, 1)
    strength = policy.color_strength
    ranges = np.array([0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength])
    factors = spread[:, 4:8] * ranges  # (B, 4)
    low = np.maximum(0.0, 1.0 - ranges[:3])  # a factor is never negative, as in torchvision
    factors[:, :3] = low + rest[:, 4:7] * (1.0 + ranges[:3] - low)
    sigma = BLUR_SIGMA[0] + rest[:, 14] * (BLUR_SIGMA[1] - BLUR_SIGMA[0])
    return Draws(
        box=_crop_boxes(policy, sizes, crop),
        flipped=rest[:, 0] < policy.flip,
        angle=spread[:, 1] * policy.rotation,
        shear=spread[:, 2:4] * policy.shear,
        jittered=(rest[:, 8] < policy.color) & (strength > 0),
        order=np.argsort(rest[:, 9:13], axis=1),
        factors=factors,
        gray=rest[:, 13] < policy.grayscale,
        gain=1.0 + spread[:, 15] * policy.intensity,
        shift=spread[:, 16] * policy.intensity / 2,
        sigma=np.where(numbers[:, -1] < policy.blur, sigma, 0.0),
    )


def _crop_boxes(policy: Policy, sizes: npt.NDArray[np.int32], numbers: Floats) -> Floats:
    """Draw crop boxes as torchvision's RandomResizedCrop does, vectorised, (B, 4)."""
    height, width = sizes[:, :1].astype(np.float64), sizes[:, 1:].astype(np.float64)  # (B, 1)
    low, high = policy.crop_scale
    area = height * width * (low + numbers[:, :CROP_ATTEMPTS] * (high - low))  # (B, attempts)
    log_low, log_high = np.log(policy.crop_ratio)
    aspect = np.exp(log_low + numbers[:, CROP_ATTEMPTS:-2] * (log_high - log_low))
    box_width, box_height = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (box_width > 0) & (box_width <= width) & (box_height > 0) & (box_height <= height)
    first = fits.argmax(axis=1)[:, None]
    drawn = fits.any(axis=1, keepdims=True)
    aspect_limited = np.clip(width / height, *policy.crop_ratio)
    fallback_width = np.where(width / height > aspect_limited, np.rint(height * aspect_limited), width)
    fallback_height = np.where(width / height < aspect_limited, np.rint(width / aspect_limited), height)
    w = np.where(drawn, np.take_along_axis(box_width, first, axis=1), fallback_width)
    h = np.where(drawn, np.take_along_axis(box_height, first, axis=1), fallback_height)
    top = np.where(drawn, np.floor(numbers[:, -2:-1] * (height - h + 1)), np.floor((height - h) / 2))
    left = np.where(drawn, np.floor(numbers[:, -1:] * (width - w + 1)), np.floor((width - w) / 2))
    return np.concatenate([top, left, h, w], axis=1)
