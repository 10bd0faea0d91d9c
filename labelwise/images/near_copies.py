"""Near-copies: the same picture resized, recompressed, slightly cropped, brightened, mirrored or turned.

Each image becomes a short description that no mirroring or turning changes, from the absolute values of its
lowest cosine frequencies; images whose descriptions lie close are compared as small gray pictures, laid
on each other as well as a small shift and scaling allow. The same picture then agrees in its edges, two
pictures of the same kind of thing do not.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.fft import dct

from labelwise.images.duplicates import connect, count_before

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]

# Measured on CIFAR-10 and photographs of clothes, 2026-11-26: recipes/LOG.md.
SIDE = 32  # of the gray pictures that are compared
FLAT = 4.0  # standard deviation of 8-bit gray; below, there are no edges to compare
LEAST_AGREEMENT = 0.9  # correlation of the gray pictures
LEAST_EDGE_AGREEMENT = 0.75  # of their edges
LEAST_FINE_AGREEMENT = 0.82  # of their edges at more pixels
LEAST_BLURRED_AGREEMENT = 0.93  # of their edges where images have more pixels and squares do not

_FREQUENCIES = 8
_LEAST_ALIKE = 0.92  # of what mirroring and turning do not change
_LEAST_LIKELY = 0.85  # agreement of low frequencies, before the pictures are laid on each other
_BLURS = (1.5, 1.5, 1.0, 1.0, 0.5, 0.0, 0.0)  # pixels, of each step of that
_MOST_SCALING, _MOST_SHIFT = 0.12, 0.08  # of the side
_FINE = (48, 64, 96)  # sides of the pictures that are looked at closer: the largest that both have
_FINE_BLURS = (1.0, 0.5, 0.0, 0.0)
_NOISE = 3.0  # gray levels a pixel: gradients that compression makes
_RIDGE = 1e-3
_BLOCK = 2048
_LOOKED_AT = 1 << 16
_CHUNK = 1024
_DESCRIBED_BYTES = 1 << 26
_NEAREST = 8  # candidates of an image that are compared at once
_FEW_IMAGES, _MOST_CANDIDATES = 1000, 50  # candidates per image; where there are more, all images look alike
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601


@dataclass(frozen=True)
class NearCopies:
    """Pairs of images that show the same.

    Attributes:
        pairs: Rows of the two, as many as it takes to tie all copies of a picture together, (P, 2).
        agreement: Correlation of their edges, (P,).
        is_whole: False where so many images look alike that the search was ended before it had seen all.
    """

    pairs: Rows
    agreement: Floats
    is_whole: bool = True

    @classmethod
    def none(cls) -> "NearCopies":
        """No pair at all."""
        return cls(np.empty((0, 2), np.int64), np.empty(0, np.float32))

    @classmethod
    def load(cls, file: Path) -> "NearCopies":
        """Read what `save` wrote."""
        with file.open("rb") as stream, np.load(stream) as stored:
            return cls(stored["pairs"], stored["agreement"], bool(stored["is_whole"]))

    def save(self, file: Path) -> None:
        """Write to a file."""
        with file.open("wb") as stream:
            np.savez(stream, pairs=self.pairs, agreement=self.agreement, is_whole=np.array(self.is_whole))


def find_near_copies(
    squares: Pixels, sides: Rows, rows: Rows, progress: Callable[[int], None] = lambda count: None
) -> NearCopies:
    """Find which images show the same; images already tied over others are not compared again.

    Takes a matrix product over all pairs, and 1.5 KB an image. Photographs squeezed to small squares lose what tells different
    ones apart, so that more agreement is asked of them.

    Args:
        squares: Whole images squeezed to squares, (N, S, S, 3).
        sides: How many pixels the shorter side of each image really has, (N,).
        rows: Which to compare, (M,).
        progress: Called with the number of images just done.
    """
    if not len(rows):
        return NearCopies.none()
    gray, low = _describe(squares, rows)
    candidates, is_whole = _candidates(low, progress)
    pairs, found = _compare(rows, gray, candidates, squares, sides)
    return NearCopies(rows[pairs], found, is_whole)


def _candidates(low: Floats, progress: Callable[[int], None]) -> tuple[Rows, bool]:
    """Pairs whose low frequencies agree, most alike first: one, other, how to turn the other, (P, 3); and whether these are all."""
    even = _even(low)
    found: list[npt.NDArray[np.int32]] = [np.empty((0, 3), np.int32)]
    likeness = [np.empty(0, np.float32)]
    most_pairs = _MOST_CANDIDATES * (_FEW_IMAGES + len(low))
    for first, second in _blocks(len(low)):
        alike = even[first : first + _BLOCK] @ even[second : second + _BLOCK].T >= _LEAST_ALIKE
        ones, others = np.nonzero(np.triu(alike, 1) if first == second else alike)
        for start in range(0, len(ones), _LOOKED_AT):
            one, other = (each[start : start + _LOOKED_AT] for each in (ones + first, others + second))
            ways = _likeness(low[one], low[other])  # (P, 8)
            best = ways.argmax(axis=1)
            most = ways[np.arange(len(one)), best]
            likely = most >= _LEAST_LIKELY
            found.append(np.stack([one, other, best], axis=1)[likely].astype(np.int32))
            likeness.append(most[likely])
        if first == second:
            progress(len(low[first : first + _BLOCK]))
        is_last = first == second and second + _BLOCK >= len(low)
        if sum(map(len, found)) > most_pairs and not is_last:
            return _most_alike(found, likeness), False
    return _most_alike(found, likeness), True


def _blocks(count: int) -> Iterator[tuple[int, int]]:
    """Starts of all pairs of blocks of images, the later one of a pair first."""
    for first in range(0, count, _BLOCK):
        for second in range(0, first + 1, _BLOCK):
            yield first, second


def _most_alike(found: list[npt.NDArray[np.int32]], likeness: list[Floats]) -> Rows:
    """Pairs in one array, most alike first."""
    order = np.argsort(-np.concatenate(likeness), kind="stable")
    return np.concatenate(found)[order].astype(np.int64)


def _compare(rows: Rows, gray: Pixels, candidates: Rows, squares: Pixels, sides: Rows) -> tuple[Rows, Floats]:
    """Lay candidates on each other, of each image those it is most like; pairs that agree, (P, 2), and how well, (P,).

    Pairs that are tied over others by then are left out; what is left is gone over again while that ties more, and
    once at least: where a picture has many like it, its copy need not be among the first.
    """
    group, passes = np.arange(len(gray)), 0
    pairs, agreements = [np.empty((0, 2), np.int64)], [np.empty(0, np.float32)]
    while len(candidates):
        chosen = (count_before(candidates[:, 0]) < _NEAREST) | (count_before(candidates[:, 1]) < _NEAREST)
        nearest, tied = candidates[chosen], len(pairs)
        for start in range(0, len(nearest), _CHUNK):
            chunk = nearest[start : start + _CHUNK]
            chunk = chunk[group[chunk[:, 0]] != group[chunk[:, 1]]]
            if not len(chunk):
                continue
            one = gray[chunk[:, 0]].astype(np.float32)
            other = _turn(gray[chunk[:, 1]].astype(np.float32), chunk[:, 2])
            change = lay_on(one, other)
            found, edges = agreement(one, other, change)
            same = (found >= LEAST_AGREEMENT) & (edges >= LEAST_EDGE_AGREEMENT)
            has_more = sides[rows[chunk[:, :2]]].min(axis=1) >= _FINE[0]
            fine = np.flatnonzero(same & has_more)
            if squares.shape[1] < _FINE[0]:
                same &= ~has_more | (edges >= LEAST_BLURRED_AGREEMENT)
            elif len(fine):
                pair, turns = rows[chunk[fine, :2]], chunk[fine, 2]
                same[fine], edges[fine] = _look_closer(squares, sides, pair, turns, change[fine])
            if same.any():
                pairs.append(chunk[same, :2])
                agreements.append(edges[same])
                group = connect(len(gray), np.concatenate(pairs))
        if len(pairs) == tied and passes:
            break
        passes += 1
        candidates = candidates[~chosen]
        candidates = candidates[group[candidates[:, 0]] != group[candidates[:, 1]]]
    return np.concatenate(pairs), np.concatenate(agreements)


def _look_closer(
    squares: Pixels, sides: Rows, pairs: Rows, turns: Rows, change: Floats
) -> tuple[npt.NDArray[np.bool_], Floats]:
    """Whether pairs agree at more pixels too, and how well: photographs of like things on one table differ there.

    Args:
        squares, sides: Of all images; how many pixels a side each really has.
        pairs: Rows of the two, (P, 2); all have pixels enough.
        turns, change: How the other is turned, and laid on the one.
    """
    same, agreements = np.zeros(len(pairs), bool), np.zeros(len(pairs), np.float32)
    pixels = np.minimum(sides[pairs].min(axis=1), squares.shape[1])
    side = np.array(_FINE)[np.searchsorted(_FINE, pixels, side="right") - 1]
    some = _at_once(squares)
    for size in np.unique(side).tolist():
        places = np.flatnonzero(side == size)
        for start in range(0, len(places), some):
            part = places[start : start + some]
            one, other = (_shrink(squares[rows] @ _LUMA, size) for rows in pairs[part].T)
            other = _turn(other, turns[part])
            found, edges = agreement(one, other, lay_on(one, other, change[part], _FINE_BLURS))
            same[part] = (found >= LEAST_AGREEMENT) & (edges >= LEAST_FINE_AGREEMENT)
            agreements[part] = edges
    return same, agreements


def _at_once(squares: Pixels) -> int:
    """How many squares to turn gray at once, so that memory stays bounded."""
    return max(1, _DESCRIBED_BYTES // int(16 * squares.shape[1] ** 2))


def _describe(squares: Pixels, rows: Rows) -> tuple[Pixels, Floats]:
    """Small gray pictures, (M, T, T), and their lowest cosine frequencies at unit length, 0 for flat ones, (M, 8, 8)."""
    side = min(squares.shape[1], SIDE)
    gray = np.empty((len(rows), side, side), np.uint8)
    low = np.empty((len(rows), _FREQUENCIES, _FREQUENCIES), np.float32)
    some = _at_once(squares)
    for start in range(0, len(rows), some):
        pictures = _shrink(squares[rows[start : start + some]] @ _LUMA, SIDE)
        gray[start : start + some] = pictures.round()
        spread = pictures.std(axis=(1, 2), keepdims=True)
        found = dct(dct(pictures, axis=1, norm="ortho"), axis=2, norm="ortho")[
            :, :_FREQUENCIES, :_FREQUENCIES
        ]
        found[:, 0, 0] = 0
        length = np.sqrt((found**2).sum(axis=(1, 2), keepdims=True))
        low[start : start + some] = np.where(spread >= FLAT, found / np.maximum(length, 1e-6), 0)
    return gray, low


def _even(low: Floats) -> Floats:
    """What no mirroring or quarter turn changes of low frequencies, at unit length, (M, 64)."""
    size = np.abs(low)  # mirroring changes signs
    swapped = size.transpose(0, 2, 1)  # a quarter turn swaps rows and columns
    upper = np.triu(np.ones(size.shape[1:], bool), 1)
    parts = np.where(upper, size + swapped, np.abs(size - swapped)) / np.sqrt(2)
    diagonal = np.eye(size.shape[1], dtype=bool)
    return np.where(diagonal, size, parts).reshape(len(low), -1).astype(np.float32)


def _likeness(one: Floats, other: Floats) -> Floats:
    """Agreement of low frequencies for each of the eight ways to mirror and turn the other, (P, 8)."""
    index = np.arange(_FREQUENCIES)
    rows, columns = ((-1.0) ** index)[:, None], ((-1.0) ** index)[None, :]
    signs = np.stack([rows**down * columns**across for across in (0, 1) for down in (0, 1)])
    signs = signs.reshape(4, -1).T.astype(np.float32)
    plain, swapped = one * other, one * other.transpose(0, 2, 1)
    return np.concatenate([each.reshape(len(one), -1) @ signs for each in (plain, swapped)], axis=1)


def _turn(pictures: Floats, numbers: Rows) -> Floats:
    """Mirror and turn squares, each its own way: 4 swaps rows and columns, then 1 mirrors rows and 2 columns, (P, T, T)."""
    turned = pictures.copy()
    swapped, rows, columns = ((numbers & bit) != 0 for bit in (4, 1, 2))
    turned[swapped] = turned[swapped].transpose(0, 2, 1)
    turned[rows] = turned[rows, ::-1]
    turned[columns] = turned[columns][:, :, ::-1]
    return turned


def _shrink(pictures: Floats, most: int) -> Floats:
    """Shrink pictures (M, S, S) to a side of at most so many pixels by their mean, (M, T, T)."""
    side = pictures.shape[1]
    target = min(side, most)
    edges = np.linspace(0, side, target + 1)
    pixel = np.arange(side)
    covered = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    share = (np.clip(covered, 0, 1) * target / side).astype(np.float32)  # (T, S)
    return np.asarray(share @ pictures @ share.T, dtype=np.float32)


def _correlation(one: Floats, other: Floats, weight: Floats) -> Floats:
    """Weighed correlation of pictures, (P, ...) each, (P,)."""
    one, other = one.reshape(len(one), -1), other.reshape(len(other), -1)
    weight = weight.reshape(len(one), -1)
    total = weight.sum(axis=1, keepdims=True)
    one = one - (weight * one).sum(axis=1, keepdims=True) / total
    other = other - (weight * other).sum(axis=1, keepdims=True) / total
    both = (weight * one * other).sum(axis=1)
    spread = np.sqrt((weight * one**2).sum(axis=1) * (weight * other**2).sum(axis=1))
    return np.asarray(both / np.maximum(spread, 1e-6), dtype=np.float32)


def lay_on(
    one: Floats, other: Floats, start: Floats | None = None, blurs: tuple[float, ...] = _BLURS
) -> Floats:
    """Find the scale and shift that lays the second pictures on the first, at half their size.

    Args:
        one, other: Gray pictures, (P, T, T).
        start: Where to begin.
        blurs: Of each step, pixels.

    Returns:
        Scaling of rows and columns, shift of rows and columns as shares of the side, (P, 4).

    Gauss-Newton over scale and shift along each axis, contrast and brightness, first on blurred pictures.

    Source: Lucas and Kanade 1981, An Iterative Image Registration Technique.
    """
    count = len(one)
    target, moving = _shrink(one, one.shape[1] // 2), _shrink(other, one.shape[1] // 2)
    places = _places(target.shape[1])
    change = np.zeros((count, 4), np.float32) if start is None else start
    limits = np.array([_MOST_SCALING] * 2 + [_MOST_SHIFT] * 2, np.float32)
    units = np.array([1, 1, len(places), len(places)], np.float32)
    for sigma in blurs:
        blur = np.exp(-((places[:, None] - places) ** 2) / (2 * sigma**2)) if sigma else np.eye(len(places))
        blur = (blur / blur.sum(axis=1, keepdims=True)).astype(np.float32)
        moved, inside = _resample(blur @ moving @ blur.T, change)
        down, across = np.gradient(moved, axis=(1, 2))
        level = moved - moved.mean(axis=(1, 2), keepdims=True)
        columns = np.stack(
            [down * places[:, None], across * places, down, across, level, np.ones_like(moved)], axis=1
        ).reshape(count, 6, -1)
        weighed = columns * inside.reshape(count, 1, -1)
        size = np.sqrt((weighed * columns).sum(axis=2)) + 1e-6  # (P, 6)
        normal = (weighed @ columns.transpose(0, 2, 1)) / (size[:, :, None] * size[:, None, :])
        residual = (blur @ target @ blur.T - moved).reshape(count, -1, 1)
        wanted = (weighed @ residual)[..., 0] / size
        ridge = _RIDGE * np.eye(6, dtype=np.float32)
        step = np.linalg.solve(normal + ridge, wanted[..., None])[..., 0] / size
        change = np.clip(change + step[:, :4] / units, -limits, limits)
    return change


def agreement(one: Floats, other: Floats, change: Floats) -> tuple[Floats, Floats]:
    """Correlation of pictures laid on each other, and of their edges, (P,) each."""
    moved, inside = _resample(other, change)
    both = np.stack([inside, inside], axis=1)
    return _correlation(one, moved, inside), _correlation(_edges(one), _edges(moved), both)


def _edges(pictures: Floats) -> Floats:
    """Gradients, strong ones held down so that a frame around a picture does not outweigh it, (P, 2, T, T)."""
    gradient = np.stack([*np.gradient(pictures, axis=(1, 2))], axis=1)
    strength = np.sqrt((gradient**2).sum(axis=1, keepdims=True))
    usual = strength.mean(axis=(2, 3), keepdims=True) + _NOISE
    return np.asarray(gradient / (strength + usual), dtype=np.float32)


def _places(side: int) -> Floats:
    """Pixels from the centre, (T,)."""
    return (np.arange(side) - (side - 1) / 2).astype(np.float32)


def _resample(pictures: Floats, change: Floats) -> tuple[Floats, Floats]:
    """Pictures scaled about their centre and shifted, bilinear, (P, T, T), and 1 where that lies inside them.

    Args:
        pictures: (P, T, T).
        change: See `lay_on`, (P, 4).
    """
    side = pictures.shape[1]
    scaling, shift = change[:, :2, None], side * change[:, 2:, None]
    wanted = (1 + scaling) * _places(side) + shift + (side - 1) / 2  # (P, 2, T)
    inside = ((wanted >= 0) & (wanted <= side - 1)).astype(np.float32)
    clipped = np.clip(wanted, 0, side - 1)
    weights = np.maximum(
        0, 1 - np.abs(clipped[..., None] - np.arange(side, dtype=np.float32))
    )  # (P, 2, T, T)
    moved = weights[:, 0] @ pictures @ weights[:, 1].transpose(0, 2, 1)
    return moved, inside[:, 0, :, None] * inside[:, 1, None, :]
