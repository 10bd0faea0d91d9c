"""All augmentations of a view in one pass over the image, compiled for the processor.

`pipeline.apply_draws` is the same chain as batched tensor operations: it serves the other devices, and the
tests hold this one against it. Here each image goes through every operation while it lies in the cache of a
core, and resampling touches only the pixels under its filter: several times as fast (benchmarks/RESULTS.md).

Inside, an image is three planes (3, x, y): turned over its diagonal, so that both passes of the resampling
run along memory. Colour does not care, blur is symmetric, and the last pass turns it back.
"""

import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from labelwise.rundir import cache_root
from labelwise.views.blur import kernel_radius
from labelwise.views.color import LUMA
from labelwise.views.draws import Draws

_RED, _GREEN, _BLUE = (np.float32(weight) for weight in LUMA)
_BLOCK = 16  # rows that are turned over the diagonal together, a cache line of float32


_compiled = numba.njit(
    nogil=True,
    fastmath={"contract", "reassoc", "nsz", "arcp"},
    error_model="numpy",
)


@functools.cache
def _keep_compiled() -> None:
    """Let numba keep what it compiles: where its own variable says, else beside the decoded images.

    Not on import: whether that place may be written to is known once the images are.
    """
    if "NUMBA_CACHE_DIR" not in os.environ:
        folder = cache_root() / "compiled"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return
        if not os.access(folder, os.W_OK | os.X_OK):
            return
        numba.config.CACHE_DIR = str(folder)
    for function in globals().values():
        if isinstance(function, type(_render)):
            function.enable_caching()


def render_views(
    squares: npt.NDArray[np.uint8],
    sizes: npt.NDArray[np.int32],
    draws: Draws,
    inverse: npt.NDArray[np.float64] | None,
    size: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> Tensor:
    """Carry out the drawn augmentations and normalise, on the CPU.

    Args:
        squares: (B, S, S, 3).
        sizes: True height and width, (V B, 2).
        draws: One row per view; view i is of image i modulo B, (V B).
        inverse: Where each pixel comes from under rotation and shear, `geometry.inverse_affine`, (V B, 2, 2);
            None when nothing turns.
        size: Side of a view, H.
        mean, std: Per channel, in 0-1.

    Returns:
        Normalised, channels last in memory, (V B, 3, H, H).
    """
    _keep_compiled()
    count, side = len(draws.box), squares.shape[1]
    views = torch.empty(count, 3, size, size, memory_format=torch.channels_last)
    scale = side / sizes.astype(np.float64)  # (V B, 2)
    box = draws.box * np.concatenate([scale, scale], axis=1)  # (V B, 4), in pixels of the square
    arguments: tuple[Any, ...] = (
        squares,
        box,
        draws.flipped,
        np.zeros((0, 2, 2)) if inverse is None else inverse,
        draws.jittered,
        draws.order,
        draws.factors.astype(np.float32),
        draws.gray,
        draws.gain.astype(np.float32),
        draws.shift.astype(np.float32),
        draws.sigma.astype(np.float32),
        kernel_radius(size),
        np.array(mean, dtype=np.float32),
        (1 / np.array(std)).astype(np.float32),
        views.permute(0, 2, 3, 1).numpy(),
    )
    render: Callable[..., None] = _render
    threads = min(torch.get_num_threads(), count)
    if threads == 1:
        render(*arguments, 0, count)
        return views
    edges = np.linspace(0, count, threads + 1).astype(int).tolist()
    with ThreadPoolExecutor(threads) as pool:
        parts = [pool.submit(render, *arguments, a, b) for a, b in itertools.pairwise(edges)]
        for part in parts:
            part.result()
    return views


@_compiled
def _render(  # type: ignore[no-untyped-def]  # compiled
    squares, box, flipped, inverse, jittered, order, factors, gray, gain, shift, sigma, radius, mean, scale, views, start, stop
):  # fmt: skip
    """Make views start to stop."""
    count, side, size = squares.shape[0], squares.shape[1], views.shape[1]
    most = int(2 * np.ceil(max(1.0, side / size))) + 3
    first_row, rows, row_weights = _no_taps(size, most)
    first_column, columns, column_weights = _no_taps(size, most)
    strip = np.empty((_BLOCK, side * 3), np.float32)
    tall = np.empty((3, side, size + _BLOCK), np.float32)
    planes = np.empty((3, size, size), np.float32)
    spare = np.empty((size, size), np.float32)
    line = np.empty(size + 2 * radius, np.float32)
    kernel = np.empty(2 * radius + 1, np.float32)
    turned = np.empty((side, side, 3), np.float32)
    for view in range(start, stop):
        square = squares[view % count]
        _lay_taps(box[view, 0], box[view, 2], side, size, False, first_row, rows, row_weights)
        _lay_taps(
            box[view, 1], box[view, 3], side, size, flipped[view], first_column, columns, column_weights
        )
        if len(inverse):
            _turn(square, inverse[view], turned)
            _resample(
                turned,
                first_row,
                rows,
                row_weights,
                first_column,
                columns,
                column_weights,
                strip,
                tall,
                planes,
            )
        else:
            _resample(
                square,
                first_row,
                rows,
                row_weights,
                first_column,
                columns,
                column_weights,
                strip,
                tall,
                planes,
            )
        flat = planes.reshape(3, size * size)
        if jittered[view]:
            for turn in range(4):
                operation = order[view, turn]
                factor = factors[view, operation]
                if operation == 0:
                    _brighten(flat, factor)
                elif operation == 1:
                    _contrast(flat, factor)
                elif operation == 2:
                    _saturate(flat, factor)
                else:
                    _turn_hue(flat, factor)
        if gray[view]:
            _drop_color(flat)
        if gain[view] != 1.0 or shift[view] != 0.0:
            _change_intensity(flat, gain[view], shift[view])
        if sigma[view] > 0.0:
            _lay_kernel(sigma[view], radius, kernel)
            for channel in range(3):
                _blur(planes[channel], kernel, radius, line, spare)
        _write(planes, mean, scale, views[view])


@_compiled
def _no_taps(size, most):  # type: ignore[no-untyped-def]
    return np.empty(size, np.int64), np.empty(size, np.int64), np.empty((size, most), np.float32)


@_compiled
def _lay_taps(start, length, side, size, mirrored, first, count, weights):  # type: ignore[no-untyped-def]
    """Which source pixels make each output pixel, and with what weight; see `geometry._resampling`."""
    step = length / size
    support = max(step, 1.0)
    low = min(int(np.floor(start + 1e-4)), side - 1)
    high = max(int(np.ceil(start + length - 1e-4)), low + 1)
    for output in range(size):
        centre = start + (output + 0.5) * step
        a = max(low, 0, int(np.floor(centre - support - 0.5)))
        b = min(high, side, int(np.ceil(centre + support + 0.5)))
        place = size - 1 - output if mirrored else output
        total = 0.0
        used = 0
        begin = a
        for pixel in range(a, b):
            weight = 1.0 - abs(pixel + 0.5 - centre) / support
            if weight > 0.0:
                if used == 0:
                    begin = pixel
                weights[place, used] = weight
                total += weight
                used += 1
        for tap in range(used):
            weights[place, tap] /= total
        first[place] = begin
        count[place] = used


@_compiled
def _resample(  # type: ignore[no-untyped-def]
    source, first_row, rows, row_weights, first_column, columns, column_weights, strip, tall, planes
):
    """Resample a (S, S, 3) source of 0-255 into (3, x, y) planes of 0-1, down first, then across."""
    size = planes.shape[1]
    left, right = source.shape[1], 0
    for x in range(size):
        left = min(left, first_column[x])
        right = max(right, first_column[x] + columns[x])
    width = (right - left) * 3
    for top in range(0, size, _BLOCK):
        height = min(_BLOCK, size - top)
        for j in range(height):
            y = top + j
            line = strip[j]
            pixels = source[first_row[y]].reshape(-1)[left * 3 : right * 3]
            weight = row_weights[y, 0]
            for i in range(width):
                line[i] = weight * np.float32(pixels[i])
            for tap in range(1, rows[y]):
                pixels = source[first_row[y] + tap].reshape(-1)[left * 3 : right * 3]
                weight = row_weights[y, tap]
                for i in range(width):
                    line[i] += weight * np.float32(pixels[i])
        for x in range(right - left):
            for channel in range(3):
                for j in range(_BLOCK):
                    tall[channel, x, top + j] = strip[j, x * 3 + channel]
    shade = np.float32(1.0 / 255.0)
    for channel in range(3):
        for x in range(size):
            begin = first_column[x] - left
            target = planes[channel, x]
            column = tall[channel, begin]
            weight = column_weights[x, 0] * shade
            for y in range(size):
                target[y] = weight * column[y]
            for tap in range(1, columns[x]):
                column = tall[channel, begin + tap]
                weight = column_weights[x, tap] * shade
                for y in range(size):
                    target[y] += weight * column[y]
            for y in range(size):
                target[y] = min(max(target[y], np.float32(0)), np.float32(1))


@_compiled
def _turn(square, inverse, turned):  # type: ignore[no-untyped-def]
    """Rotate and shear, bilinear, black outside; see `geometry.rotate_and_shear`."""
    side = square.shape[0]
    for y in range(side):
        for x in range(side):
            u, v = (2 * x + 1) / side - 1, (2 * y + 1) / side - 1
            across = ((inverse[0, 0] * u + inverse[0, 1] * v + 1) * side - 1) / 2
            down = ((inverse[1, 0] * u + inverse[1, 1] * v + 1) * side - 1) / 2
            left, top = int(np.floor(across)), int(np.floor(down))
            right_share, bottom_share = np.float32(across - left), np.float32(down - top)
            for channel in range(3):
                value = np.float32(0)
                for dy in range(2):
                    for dx in range(2):
                        row, column = top + dy, left + dx
                        if 0 <= row < side and 0 <= column < side:
                            tall = bottom_share if dy else np.float32(1) - bottom_share
                            wide = right_share if dx else np.float32(1) - right_share
                            value += tall * wide * np.float32(square[row, column, channel])
                turned[y, x, channel] = value


@_compiled
def _brighten(planes, factor):  # type: ignore[no-untyped-def]
    for channel in range(3):
        plane = planes[channel]
        for i in range(plane.size):
            plane[i] = min(max(plane[i] * factor, np.float32(0)), np.float32(1))


@_compiled
def _contrast(planes, factor):  # type: ignore[no-untyped-def]
    red, green, blue = planes[0], planes[1], planes[2]
    total = 0.0
    for i in range(red.size):
        total += _RED * red[i] + _GREEN * green[i] + _BLUE * blue[i]
    rest = np.float32(total / red.size) * (np.float32(1) - factor)
    for channel in range(3):
        plane = planes[channel]
        for i in range(plane.size):
            plane[i] = min(max(plane[i] * factor + rest, np.float32(0)), np.float32(1))


@_compiled
def _saturate(planes, factor):  # type: ignore[no-untyped-def]
    red, green, blue = planes[0], planes[1], planes[2]
    for i in range(red.size):
        rest = (_RED * red[i] + _GREEN * green[i] + _BLUE * blue[i]) * (np.float32(1) - factor)
        red[i] = min(max(red[i] * factor + rest, np.float32(0)), np.float32(1))
        green[i] = min(max(green[i] * factor + rest, np.float32(0)), np.float32(1))
        blue[i] = min(max(blue[i] * factor + rest, np.float32(0)), np.float32(1))


@_compiled
def _turn_hue(planes, turns):  # type: ignore[no-untyped-def]
    """See `color.adjust_hue`; written without branches, so that it runs on whole vectors."""
    zero, one, two, four, six = np.float32(0), np.float32(1), np.float32(2), np.float32(4), np.float32(6)
    three, five, sixth = np.float32(3), np.float32(5), np.float32(1 / 6)
    red, green, blue = planes[0], planes[1], planes[2]
    shift = turns * six
    for i in range(red.size):
        r, g, b = red[i], green[i], blue[i]
        value = max(r, g, b)
        chroma = value - min(r, g, b)
        safe = chroma if chroma > zero else one
        hue = (
            (g - b) / safe if value == r else ((b - r) / safe + two if value == g else (r - g) / safe + four)
        )
        hue += shift
        k = five + hue
        k -= six * np.floor(k * sixth)
        red[i] = min(max(value - chroma * min(max(min(k, four - k), zero), one), zero), one)
        k = three + hue
        k -= six * np.floor(k * sixth)
        green[i] = min(max(value - chroma * min(max(min(k, four - k), zero), one), zero), one)
        k = one + hue
        k -= six * np.floor(k * sixth)
        blue[i] = min(max(value - chroma * min(max(min(k, four - k), zero), one), zero), one)


@_compiled
def _drop_color(planes):  # type: ignore[no-untyped-def]
    red, green, blue = planes[0], planes[1], planes[2]
    for i in range(red.size):
        brightness = _RED * red[i] + _GREEN * green[i] + _BLUE * blue[i]
        red[i] = brightness
        green[i] = brightness
        blue[i] = brightness


@_compiled
def _change_intensity(planes, gain, shift):  # type: ignore[no-untyped-def]
    for channel in range(3):
        plane = planes[channel]
        for i in range(plane.size):
            plane[i] = min(max(plane[i] * gain + shift, np.float32(0)), np.float32(1))


@_compiled
def _lay_kernel(sigma, radius, kernel):  # type: ignore[no-untyped-def]
    total = 0.0
    for tap in range(2 * radius + 1):
        kernel[tap] = np.exp(-0.5 * ((tap - radius) / sigma) ** 2)
        total += kernel[tap]
    for tap in range(2 * radius + 1):
        kernel[tap] /= total


@_compiled
def _blur(plane, kernel, radius, line, spare):  # type: ignore[no-untyped-def]
    """Blur a plane in place, reflecting at its borders, along memory first."""
    size = plane.shape[0]
    for row in range(size):
        source, target = plane[row], spare[row]
        for i in range(size):
            line[radius + i] = source[i]
        for i in range(radius):
            line[radius - 1 - i] = source[i + 1]
            line[radius + size + i] = source[size - 2 - i]
        weight = kernel[0]
        for i in range(size):
            target[i] = weight * line[i]
        for tap in range(1, 2 * radius + 1):
            weight = kernel[tap]
            for i in range(size):
                target[i] += weight * line[i + tap]
    for row in range(size):
        target = plane[row]
        for tap in range(2 * radius + 1):
            other = abs(row + tap - radius)
            other = 2 * (size - 1) - other if other >= size else other
            source, weight = spare[other], kernel[tap]
            if tap == 0:
                for i in range(size):
                    target[i] = weight * source[i]
            else:
                for i in range(size):
                    target[i] += weight * source[i]


@_compiled
def _write(planes, mean, scale, view):  # type: ignore[no-untyped-def]
    """Normalise (3, x, y) planes into (y, x, 3)."""
    size = planes.shape[1]
    for top in range(0, size, _BLOCK):
        for x in range(size):
            for channel in range(3):
                column = planes[channel, x]
                for y in range(top, min(top + _BLOCK, size)):
                    view[y, x, channel] = (column[y] - mean[channel]) * scale[channel]
