"""Every augmentation against torchvision, applied to each image on its own."""

import dataclasses
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision.transforms import InterpolationMode

from labelwise.views import blur, color, geometry
from labelwise.views.draws import Draws, Policy, draw_views
from labelwise.views.pipeline import apply_draws, make_views, normalize

ROUNDING = 2e-6  # of 0-1, where only colours are computed; a shade of 255 is 4e-3
RESAMPLING = 1e-5  # where positions are computed too
FACTORS = [0.0, 0.2, 0.95, 1.0, 1.3, 1.8]  # of brightness, contrast, saturation: 1 +/- 0.8 and 0
TURNS = [-0.5, -0.2, -0.01, 0.0, 0.13, 0.2]
TORCHVISION = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
EVERYTHING = Policy(size=24, rotation=20.0, shear=10.0, intensity=0.4, grayscale=0.3)
Change = Callable[[Tensor, Tensor], Tensor]


@functools.cache
def photographs(count: int, side: int) -> Tensor:
    """Patches of scikit-learn's two photographs as the cache holds them, uint8, (count, S, S, 3)."""
    pictures = load_sample_images().images  # 427 x 640
    rng = np.random.default_rng(0)
    squares = []
    for place in range(count):
        top, left = rng.integers(0, 427 - 2 * side), rng.integers(0, 640 - 2 * side)
        patch = pictures[place % 2][top : top + 2 * side, left : left + 2 * side]
        squares.append(np.asarray(Image.fromarray(patch).resize((side, side))))
    return torch.from_numpy(np.stack(squares))


@functools.cache
def six_images(side: int = 32) -> Tensor:
    """Two photographs, two of noise, two of pure colours and grays (hue undefined), 0-1, (6, 3, S, S)."""
    photos = photographs(2, side).permute(0, 3, 1, 2).float() / 255
    generator = torch.Generator().manual_seed(1)
    noise = torch.rand(2, 3, side, side, generator=generator)
    pure = torch.randint(0, 3, (2, 3, side, side), generator=generator) / 2
    return torch.cat([photos, noise, pure])


def square_sizes(images: Tensor) -> Tensor:
    """True sizes of images that were square to begin with, (B, 2)."""
    return torch.tensor([list(images.shape[-2:])] * len(images), dtype=torch.float32)


def no_flips(images: Tensor) -> Tensor:
    return torch.zeros(len(images), dtype=torch.bool)


def assert_close(found: Tensor, expected: Tensor | Sequence[Tensor], tolerance: float) -> None:
    expected = expected if isinstance(expected, Tensor) else torch.stack(list(expected))
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


# Colour


@pytest.mark.parametrize(
    ("ours", "theirs", "factors"),
    [
        (color.adjust_brightness, TF.adjust_brightness, FACTORS),
        (color.adjust_contrast, TF.adjust_contrast, FACTORS),
        (color.adjust_saturation, TF.adjust_saturation, FACTORS),
        (color.adjust_hue, TF.adjust_hue, TURNS),
    ],
)
def test_color_operation_equals_torchvisions(
    ours: Change, theirs: Callable[[Tensor, float], Tensor], factors: list[float]
) -> None:
    images = six_images()
    for shift in range(len(factors)):  # every image meets every factor
        shifted = factors[shift:] + factors[:shift]
        found = ours(images.clone(), torch.tensor(shifted))
        assert_close(
            found, [theirs(image, factor) for image, factor in zip(images, shifted, strict=True)], ROUNDING
        )


def test_grayscale_equals_torchvisions_and_leaves_the_other_images() -> None:
    images = six_images()
    found = color.drop_color(images, torch.tensor([1, 2, 5]))
    for place, image in enumerate(images):
        expected = TF.rgb_to_grayscale(image, num_output_channels=3) if place in (1, 2, 5) else image
        assert_close(found[place], expected, ROUNDING)
    assert torch.equal(images, six_images.__wrapped__())  # the input is not changed


def test_jitter_applies_torchvisions_operations_in_each_images_own_order() -> None:
    images = six_images()
    orders = [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2), (2, 0, 3, 1), (1, 2, 3, 0), (3, 0, 2, 1)]
    rng = np.random.default_rng(3)
    factors = np.concatenate([rng.uniform(0.2, 1.8, (6, 3)), rng.uniform(-0.2, 0.2, (6, 1))], axis=1)
    rows = [0, 2, 3, 5]
    found = color.jitter(images, torch.tensor(rows), torch.tensor(orders), torch.from_numpy(factors).float())
    for place, image in enumerate(images):
        expected = image
        for operation in orders[place] if place in rows else []:
            expected = TORCHVISION[operation](expected, float(factors[place, operation]))
        assert_close(found[place], expected, 2 * ROUNDING)
    assert torch.equal(images, six_images.__wrapped__())  # the input is not changed


def test_intensity_is_scaled_shifted_and_clipped_per_image() -> None:
    images = six_images()
    gains, shifts = [0.6, 1.0, 1.4, 1.2, 0.8, 1.0], [0.2, -0.2, 0.1, -0.1, 0.0, 0.15]
    found = color.adjust_intensity(images, torch.tensor(gains), torch.tensor(shifts))
    expected = [
        np.clip(gain * image.double().numpy() + shift, 0, 1)
        for image, gain, shift in zip(images, gains, shifts, strict=True)
    ]
    assert_close(found, torch.from_numpy(np.stack(expected)).float(), ROUNDING)


# Crop, flip, resize


BOXES = [  # top, left, height, width in 32 x 32
    (0, 0, 32, 32),
    (3, 5, 20, 27),
    (31, 0, 1, 32),
    (0, 25, 9, 7),
    (10, 10, 1, 1),
    (7, 2, 25, 15),
]


def crop_by_torchvision(image: Tensor, box: Sequence[int], size: int) -> Tensor:
    top, left, height, width = (int(number) for number in box)
    bilinear = InterpolationMode.BILINEAR
    return TF.resized_crop(image, top, left, height, width, [size, size], bilinear, antialias=True)


@pytest.mark.parametrize("size", [8, 24, 32, 50])
@pytest.mark.parametrize("turn", range(len(BOXES)))
def test_crop_and_resize_equals_torchvisions_shrinking_and_enlarging(size: int, turn: int) -> None:
    images = six_images()
    boxes = BOXES[turn:] + BOXES[:turn]  # every image meets every box
    found = geometry.crop_and_resize(
        images, square_sizes(images), torch.tensor(boxes).float(), no_flips(images), size
    )
    expected = [crop_by_torchvision(image, box, size) for image, box in zip(images, boxes, strict=True)]
    assert_close(found, expected, RESAMPLING)


def test_flip_equals_torchvisions_on_the_crop_of_each_chosen_image() -> None:
    images = six_images()
    flipped = [True, False, True, True, False, True]
    found = geometry.crop_and_resize(
        images, square_sizes(images), torch.tensor(BOXES).float(), torch.tensor(flipped), 24
    )
    for place, image in enumerate(images):
        expected = crop_by_torchvision(image, BOXES[place], 24)
        expected = TF.horizontal_flip(expected) if flipped[place] else expected
        assert_close(found[place], expected, RESAMPLING)


def test_a_box_of_a_squeezed_image_lands_on_the_scaled_box_of_the_square() -> None:
    squares = six_images()
    sizes = [(64, 128), (128, 64), (16, 8), (96, 32), (48, 400), (56, 72)]  # true height and width
    scaled = [(4, 4, 10, 10), (0, 3, 32, 5), (6, 8, 12, 20), (1, 2, 30, 30), (20, 8, 10, 24), (4, 8, 20, 12)]
    boxes = [
        (top * height / 32, left * width / 32, tall * height / 32, wide * width / 32)
        for (height, width), (top, left, tall, wide) in zip(sizes, scaled, strict=True)
    ]
    found = geometry.crop_and_resize(
        squares, torch.tensor(sizes).float(), torch.tensor(boxes), no_flips(squares), 20
    )
    expected = [crop_by_torchvision(square, box, 20) for square, box in zip(squares, scaled, strict=True)]
    assert_close(found, expected, RESAMPLING)


@pytest.mark.parametrize(("first", "length"), [(5, 6), (3, 11), (17, 4), (9, 23)])
def test_a_box_on_the_borders_of_pixels_takes_none_of_their_neighbours(first: int, length: int) -> None:
    """Whatever 1 / 3, 1 / 41, 1 / 47 ... round to: the box is that of an image m times as large."""
    times = torch.arange(1, 401).float()
    square = six_images()[2:3].expand(400, -1, -1, -1)  # noise
    box = times[:, None] * torch.tensor([first, first, length, length])
    found = geometry.crop_and_resize(
        square, 32 * times[:, None].expand(-1, 2), box, torch.zeros(400, dtype=torch.bool), 24
    )
    expected = crop_by_torchvision(square[0], (first, first, length, length), 24)
    assert_close(found, expected.expand(400, -1, -1, -1), 2e-5)


def test_the_whole_of_an_image_of_any_size_is_the_whole_square() -> None:
    rng = np.random.default_rng(4)
    sizes = torch.from_numpy(rng.integers(1, 6000, (600, 2))).float()
    square = six_images()[:1].expand(600, -1, -1, -1)
    boxes = torch.cat([torch.zeros(600, 2), sizes], dim=1)
    found = geometry.crop_and_resize(square, sizes, boxes, torch.zeros(600, dtype=torch.bool), 24)
    assert_close(found, crop_by_torchvision(square, (0, 0, 32, 32), 24), 2e-5)


def test_a_box_between_the_pixels_of_the_square_equals_pillows_resize() -> None:
    squares = six_images()
    sizes = [(45, 77), (500, 333), (20, 51), (33, 31), (1000, 90), (640, 427)]
    boxes = [
        (3, 11, 31, 40),
        (101, 7, 300, 290),
        (1, 2, 13, 47),
        (5, 1, 20, 30),
        (77, 5, 901, 80),
        (50, 60, 70, 80),
    ]
    found = geometry.crop_and_resize(
        squares, torch.tensor(sizes).float(), torch.tensor(boxes).float(), no_flips(squares), 24
    )
    for place, (height, width) in enumerate(sizes):
        top, left, tall, wide = boxes[place]
        rows = np.array([top, top + tall]) * 32 / height
        columns = np.array([left, left + wide]) * 32 / width
        first_row, first_column = int(rows[0]), int(columns[0])
        touched = squares[
            place, :, first_row : int(np.ceil(rows[1])), first_column : int(np.ceil(columns[1]))
        ]
        box = (columns[0] - first_column, rows[0] - first_row, columns[1] - first_column, rows[1] - first_row)
        for channel in range(3):
            plane = Image.fromarray(touched[channel].numpy())  # mode F: 32-bit floating point
            resized = np.asarray(plane.resize((24, 24), Image.Resampling.BILINEAR, box=box))
            assert_close(found[place, channel], torch.from_numpy(resized.copy()), 2e-5)


# Rotation and shear


def test_rotation_and_shear_equal_torchvisions_affine() -> None:
    images = six_images()
    angles = [0.0, 20.0, -35.0, 90.0, 5.0, -170.0]
    shears = [(0.0, 0.0), (0.0, 0.0), (10.0, 0.0), (0.0, -15.0), (-12.0, 8.0), (20.0, 10.0)]
    found = geometry.rotate_and_shear(
        images, square_sizes(images), torch.tensor(angles), torch.tensor(shears)
    )
    expected = [
        TF.affine(image, -angle, [0, 0], 1.0, list(shear), interpolation=InterpolationMode.BILINEAR)
        for image, angle, shear in zip(images, angles, shears, strict=True)
    ]
    assert_close(found, expected, 2e-5)


def test_a_positive_angle_turns_counter_clockwise() -> None:
    image = torch.zeros(1, 3, 9, 9)
    image[..., 0, 4] = 1.0  # top centre
    turned = geometry.rotate_and_shear(image, square_sizes(image), torch.tensor([90.0]), torch.zeros(1, 2))
    assert turned[0, 0].argmax() == 4 * 9  # left centre
    torch.testing.assert_close(turned.sum(), torch.tensor(3.0), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(64, 192), (160, 64)])
def test_a_squeezed_image_is_turned_and_sheared_in_its_own_shape(height: int, width: int) -> None:
    rows = torch.arange(height)[:, None] / height
    columns = torch.arange(width)[None, :] / width
    waves = [torch.sin(7 * rows + 2) * torch.cos(5 * columns), torch.cos(9 * rows * columns), rows + columns]
    original = torch.stack(waves) / 2 + 0.5  # smooth, so that squeezing loses little, (3, H, W)
    square = TF.resize(original, [64, 64], antialias=True)
    found = geometry.rotate_and_shear(
        square[None],
        torch.tensor([[height, width]]).float(),
        torch.tensor([25.0]),
        torch.tensor([[12.0, -6.0]]),
    )[0]
    turned = TF.affine(original, -25.0, [0, 0], 1.0, [12.0, -6.0], interpolation=InterpolationMode.BILINEAR)
    expected = TF.resize(turned, [64, 64], antialias=True)
    assert (found - expected).abs().median() < 2e-3
    assert (
        found - expected
    ).abs().mean() < 2e-2  # the edge against black is blunt in one, sharp in the other


# Blur


@pytest.mark.parametrize("size", [8, 32, 64, 96])
def test_blur_equals_torchvisions_with_the_same_kernel(size: int) -> None:
    images = six_images(size)
    sigmas = [0.1, 0.3, 0.7, 1.1, 1.6, 2.0]
    kernel = 2 * blur.kernel_radius(size) + 1
    found = blur.gaussian_blur(images, torch.tensor(sigmas))
    expected = [
        TF.gaussian_blur(image, [kernel, kernel], [sigma, sigma])
        for image, sigma in zip(images, sigmas, strict=True)
    ]
    assert_close(found, expected, ROUNDING)


@pytest.mark.parametrize(("size", "kernel"), [(8, 3), (32, 3), (64, 7), (96, 9), (160, 17), (224, 23)])
def test_the_kernel_is_a_tenth_of_the_side_made_odd(size: int, kernel: int) -> None:
    assert 2 * blur.kernel_radius(size) + 1 == kernel  # int(size // 10 / 2) * 2 + 1 in the official code


# The whole pipeline


def batch_of_squares(count: int) -> tuple[Tensor, npt.NDArray[np.int32], npt.NDArray[np.uint64]]:
    rng = np.random.default_rng(5)
    sizes = rng.integers(20, 400, (count, 2)).astype(np.int32)
    sizes[0] = (7, 900)
    keys = rng.integers(0, 2**63, count).astype(np.uint64)
    return photographs(count, 40), sizes, keys


def test_views_of_a_batch_equal_views_made_image_by_image() -> None:
    squares, sizes, keys = batch_of_squares(12)
    together = make_views(EVERYTHING, squares, sizes, keys, seed=3, epoch=2)
    assert together.shape == (24, 3, 24, 24)
    for place in range(12):
        one = slice(place, place + 1)
        alone = make_views(EVERYTHING, squares[one], sizes[one], keys[one], seed=3, epoch=2)
        assert_close(together[[place, 12 + place]], alone, RESAMPLING)


def test_first_views_come_before_second_views() -> None:
    squares, sizes, keys = batch_of_squares(5)
    both = make_views(EVERYTHING, squares, sizes, keys, seed=3, epoch=2)
    first = make_views(EVERYTHING, squares, sizes, keys, seed=3, epoch=2, views=(0,))
    second = make_views(EVERYTHING, squares, sizes, keys, seed=3, epoch=2, views=(1,))
    assert_close(both, torch.cat([first, second]), RESAMPLING)
    assert (first - second).abs().amax(dim=(1, 2, 3)).min() > 0.05  # no image has two equal views


def view_by_torchvision(square: Tensor, draws: Draws, row: int, size: int) -> Tensor:
    """One view in the paper's order: crop, flip, colour, gray, then blur; the image was S x S."""
    view = crop_by_torchvision(square, draws.box[row], size)
    view = TF.horizontal_flip(view) if draws.flipped[row] else view
    if draws.jittered[row]:
        for operation in draws.order[row]:
            view = TORCHVISION[operation](view, float(draws.factors[row, operation]))
    view = TF.rgb_to_grayscale(view, num_output_channels=3) if draws.gray[row] else view
    if draws.sigma[row] > 0:
        kernel = 2 * blur.kernel_radius(size) + 1
        view = TF.gaussian_blur(view, [kernel, kernel], [float(draws.sigma[row])] * 2)
    return view


def test_views_equal_torchvisions_in_the_papers_order() -> None:
    squares, _, keys = batch_of_squares(32)
    sizes = np.full((32, 2), 40, dtype=np.int32)
    policy = Policy(size=32)
    found = make_views(policy, squares, sizes, keys, seed=0, epoch=0, views=(1,))
    draws = draw_views(policy, sizes, 0, 0, keys, 1)
    for happened in (draws.flipped, draws.jittered, draws.gray, draws.sigma > 0):
        assert 0 < happened.sum() < 32
    images = squares.permute(0, 3, 1, 2).float() / 255
    expected = [view_by_torchvision(images[row], draws, row, 32) for row in range(32)]
    assert_close(found, expected, 2e-5)


def test_intensity_and_rotation_happen_in_place_of_colour() -> None:
    squares, _, keys = batch_of_squares(8)
    sizes = np.full((8, 2), 40, dtype=np.int32)
    policy = Policy(size=40, color=0.0, grayscale=0.0, rotation=20.0, shear=10.0, intensity=0.4)
    draws = draw_views(policy, sizes, 0, 0, keys, 0)
    images = squares.permute(0, 3, 1, 2).float() / 255
    expected = []
    for row, image in enumerate(images):
        turned = TF.affine(
            image, -draws.angle[row], [0, 0], 1.0, list(draws.shear[row]), InterpolationMode.BILINEAR
        )
        view = crop_by_torchvision(turned, draws.box[row], 40)
        view = TF.horizontal_flip(view) if draws.flipped[row] else view
        view = (float(draws.gain[row]) * view + float(draws.shift[row])).clamp(0, 1)
        if draws.sigma[row] > 0:
            view = TF.gaussian_blur(view, [5, 5], [float(draws.sigma[row])] * 2)
        expected.append(view)
    assert_close(apply_draws(policy, images, sizes, draws), expected, 5e-5)


def test_views_stay_between_black_and_white() -> None:
    squares, sizes, keys = batch_of_squares(64)
    views = make_views(EVERYTHING, squares, sizes, keys, seed=1, epoch=0)
    assert views.isfinite().all()
    assert views.min() >= 0
    assert views.max() <= 1 + 1e-6  # the blur's weights add up to 1 within rounding


def test_making_views_leaves_the_squares_unchanged() -> None:
    squares, sizes, keys = batch_of_squares(6)
    before = squares.clone()
    make_views(EVERYTHING, squares, sizes, keys, seed=1, epoch=0)
    assert torch.equal(squares, before)


def test_normalize_equals_torchvisions_with_channels_last_in_memory() -> None:
    images = six_images()
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    found = normalize(images, (mean, std))
    assert_close(found, TF.normalize(images, list(mean), list(std)), ROUNDING)
    assert found.shape == images.shape
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("side", "size"), [(32, 32), (40, 32), (48, 96), (120, 96), (200, 33)])
def test_the_compiled_chain_equals_the_chain_of_tensor_operations(side: int, size: int) -> None:
    squares = photographs(24, side)
    rng = np.random.default_rng(side)
    sizes = rng.integers(20, 600, (24, 2)).astype(np.int32)
    keys = rng.integers(0, 2**63, 24).astype(np.uint64)
    for policy in (Policy(size=size), dataclasses.replace(EVERYTHING, size=size)):
        found = make_views(policy, squares, sizes, keys, seed=0, epoch=0, views=(0,))
        draws = draw_views(policy, sizes, 0, 0, keys, 0)
        expected = apply_draws(policy, squares.permute(0, 3, 1, 2).float() / 255, sizes, draws)
        assert_close(found, expected, 1e-4)  # a hue turns sharply where a pixel is nearly gray
        assert (found - expected).abs().mean() < 1e-6


def test_the_number_of_threads_changes_nothing() -> None:
    squares, sizes, keys = batch_of_squares(12)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(make_views(EVERYTHING, squares, sizes, keys, seed=3, epoch=2))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_views_come_normalised_with_channels_last_in_memory() -> None:
    squares, sizes, keys = batch_of_squares(6)
    normalization = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    plain = make_views(EVERYTHING, squares, sizes, keys, seed=3, epoch=2)
    found = make_views(EVERYTHING, squares, sizes, keys, 3, 2, (0, 1), normalization)
    assert_close(found, normalize(plain, normalization), 5e-6)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(60_000, 3), (3, 60_000), (1, 1)])
def test_a_view_of_a_strip_is_finite(shape: tuple[int, int]) -> None:
    squares = photographs(1, 32)
    for seed in range(50):
        views = make_views(
            Policy(size=32),
            squares,
            np.array([shape], np.int32),
            np.array([1], np.uint64),
            seed=seed,
            epoch=0,
        )
        assert views.isfinite().all()


def test_nothing_is_written_before_the_first_view_is_made(tmp_path: Path) -> None:
    program = """
import os
os.environ.pop("NUMBA_CACHE_DIR", None)
from labelwise.views import fused
print(os.path.exists(os.environ["LABELWISE_CACHE"]))
fused._keep_compiled()
print(os.listdir(os.environ["LABELWISE_CACHE"]), fused._render._cache.cache_path.startswith(os.environ["LABELWISE_CACHE"]))
"""
    place = {**os.environ, "LABELWISE_CACHE": str(tmp_path / "cache")}
    ran = subprocess.run(
        [sys.executable, "-c", program], env=place, capture_output=True, text=True, check=True
    )
    assert ran.stdout.splitlines() == ["False", "['compiled'] True"]
