"""Near-copies: the same picture resized, recompressed, slightly cropped, brightened, mirrored or turned.

Each image becomes a short description that no mirroring or turning changes, from the absolute values of its
lowest cosine frequencies; images whose descriptions lie close are compared as small gray pictures, laid
on each other as well as a small shift and scaling allow. The same picture then agrees in its edges, two
pictures of the same kind of thing do not.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.fft import dct
from scipy.spatial import cKDTree

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]

SIDE = 32  # of the gray pictures that are compared
FLAT = 4.0  # standard deviation of 8-bit gray; below, there are no edges to compare
LEAST_AGREEMENT = 0.9  # correlation of the gray pictures
LEAST_EDGE_AGREEMENT = 0.8  # correlation of their gradients

_FREQUENCIES = 8
_DIRECTIONS = 16  # of the descriptions, that of most variance first; looked up in a tree
_NEIGHBOURS = (
    16  # looked at per image; more copies than that still form one group, from neighbour to neighbour
)
_FARTHEST = 0.45  # between descriptions, which have about unit length
_COARSE = 8  # side of the pictures by which it is decided whether, and how turned, to lay one on the other
_LIKELY = 0.8  # correlation of those
_BLURS = (2.0, 2.0, 2.0, 1.0, 1.0, 0.0, 0.0, 0.0)  # pixels, of each step of laying one on the other
_MOST_SCALING, _MOST_SHIFT = 0.12, 0.08  # of the side
_RIDGE = 1e-3
_SAMPLED = 10_000
_CHUNK = 1024
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601


@dataclass(frozen=True)
class NearCopies:
    """Pairs of images that show the same.

    Attributes:
        pairs: Rows of the two, the smaller first, (P, 2).
        agreement: Correlation of their gray pictures, (P,).
        edge_agreement: Correlation of their gradients, (P,).
    """

    pairs: Rows
    agreement: Floats
    edge_agreement: Floats

    @classmethod
    def none(cls) -> "NearCopies":
        """No pair at all."""
        nothing = np.empty(0, np.float32)
        return cls(np.empty((0, 2), np.int64), nothing, nothing)

    @classmethod
    def load(cls, file: Path) -> "NearCopies":
        """Read what `save` wrote."""
        with np.load(file) as stored:
            return cls(stored["pairs"], stored["agreement"], stored["edge_agreement"])

    def save(self, file: Path) -> None:
        """Write to a file."""
        with file.open("wb") as stream:
            np.savez(stream, pairs=self.pairs, agreement=self.agreement, edge_agreement=self.edge_agreement)


def find_near_copies(squares: Pixels, rows: Rows) -> NearCopies:
    """Find the pairs among some images; exact copies are pairs too.

    Args:
        squares: Whole images squeezed to squares, (N, S, S, 3).
        rows: Which to compare, (M,).
    """
    descriptions, comparable = _describe(squares, rows)
    rows = rows[comparable]
    found = _neighbours(descriptions[comparable])
    pairs, gray, edges = [], [], []
    for start in range(0, len(found), _CHUNK):
        chunk = rows[found[start : start + _CHUNK]]  # (C, 2)
        agreement, edge_agreement = compare(_gray(squares[chunk[:, 0]]), _gray(squares[chunk[:, 1]]))
        same = (agreement >= LEAST_AGREEMENT) & (edge_agreement >= LEAST_EDGE_AGREEMENT)
        pairs.append(chunk[same])
        gray.append(agreement[same])
        edges.append(edge_agreement[same])
    if not pairs:
        return NearCopies.none()
    return NearCopies(np.concatenate(pairs), np.concatenate(gray), np.concatenate(edges))


def compare(one: Floats, other: Floats) -> tuple[Floats, Floats]:
    """Correlation of gray pictures and of their gradients, over mirrorings, quarter turns and small crops.

    Args:
        one, other: (P, T, T).

    Returns:
        Both correlations, (P,); 0 where the pictures do not look alike before they are laid on each other.
    """
    coarse, other_coarse = _shrink(one, _COARSE), _shrink(other, _COARSE)
    likeness = np.stack([_correlation(coarse, _turn(other_coarse, number)) for number in range(8)])  # (8, P)
    best = likeness.argmax(axis=0)
    agreement, edges = np.zeros(len(one), np.float32), np.zeros(len(one), np.float32)
    for number in range(8):
        likely = (best == number) & (likeness[number] >= _LIKELY)
        if likely.any():
            agreement[likely], edges[likely] = _laid_on(one[likely], _turn(other[likely], number))
    return agreement, edges


def _gray(squares: Pixels) -> Floats:
    """Small gray pictures, each pixel the mean of those below it, (M, T, T) with T at most `SIDE`."""
    return _shrink(squares @ _LUMA, SIDE)


def _shrink(pictures: Floats, most: int) -> Floats:
    """Shrink pictures (M, S, S) to a side of at most so many pixels by their mean, (M, T, T)."""
    side = pictures.shape[1]
    target = min(side, most)
    edges = np.linspace(0, side, target + 1)
    pixel = np.arange(side)
    covered = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    share = (np.clip(covered, 0, 1) * target / side).astype(np.float32)  # (T, S)
    return np.asarray(share @ pictures @ share.T, dtype=np.float32)


def _describe(squares: Pixels, rows: Rows) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Descriptions, (M, 63), and which images are not flat, (M,)."""
    upper = np.triu_indices(_FREQUENCIES, 1)
    described, comparable = [np.empty((0, _FREQUENCIES**2 - 1), np.float32)], [np.empty(0, bool)]
    for start in range(0, len(rows), _CHUNK):
        gray = _gray(squares[rows[start : start + _CHUNK]])
        gray -= gray.mean(axis=(1, 2), keepdims=True)
        spread = gray.std(axis=(1, 2))
        size = np.abs(dct(dct(gray, axis=1, norm="ortho"), axis=2, norm="ortho"))
        size = size[:, :_FREQUENCIES, :_FREQUENCIES] / np.maximum(spread * gray.shape[1], 1e-6).reshape(
            -1, 1, 1
        )
        there, across = size[:, upper[0], upper[1]], size[:, upper[1], upper[0]]  # a quarter turn swaps them
        parts = [there + across, np.abs(there - across)]
        diagonal = np.diagonal(size, axis1=1, axis2=2)[:, 1:]
        described.append(np.concatenate([*(part / np.sqrt(2) for part in parts), diagonal], axis=1))
        comparable.append(spread >= FLAT)
    return np.concatenate(described).astype(np.float32), np.concatenate(comparable)


def _neighbours(descriptions: Floats) -> Rows:
    """Pairs whose descriptions lie close, each once, (P, 2)."""
    if len(descriptions) < 2:
        return np.empty((0, 2), np.int64)
    sample = descriptions[np.linspace(0, len(descriptions) - 1, min(_SAMPLED, len(descriptions))).astype(int)]
    directions = np.linalg.svd(sample - sample.mean(axis=0), full_matrices=False)[2][:_DIRECTIONS]
    reduced = descriptions @ directions.T
    neighbours = min(_NEIGHBOURS + 1, len(reduced))
    _, near = cKDTree(reduced).query(reduced, neighbours, distance_upper_bound=_FARTHEST, workers=-1)
    here = np.repeat(np.arange(len(reduced)), neighbours)
    pairs = np.stack([here, near.ravel()], axis=1)
    pairs = pairs[(pairs[:, 1] < len(reduced)) & (pairs[:, 0] != pairs[:, 1])]  # nothing found: len(reduced)
    pairs = np.unique(np.sort(pairs, axis=1), axis=0)
    apart = np.linalg.norm(descriptions[pairs[:, 0]] - descriptions[pairs[:, 1]], axis=1)
    return np.asarray(pairs[apart <= _FARTHEST], dtype=np.int64)


def _turn(pictures: Floats, number: int) -> Floats:
    """One of the eight ways to mirror and turn a square."""
    turned = np.rot90(pictures, number % 4, axes=(1, 2))
    return turned if number < 4 else turned[:, :, ::-1]


def _correlation(one: Floats, other: Floats, weight: Floats | None = None) -> Floats:
    """Correlation of pictures, (P, ...) each, pixel by pixel or weighed, (P,)."""
    one, other = one.reshape(len(one), -1), other.reshape(len(other), -1)
    weight = np.ones_like(one) if weight is None else weight.reshape(len(one), -1)
    total = weight.sum(axis=1, keepdims=True)
    one = one - (weight * one).sum(axis=1, keepdims=True) / total
    other = other - (weight * other).sum(axis=1, keepdims=True) / total
    both = (weight * one * other).sum(axis=1)
    spread = np.sqrt((weight * one**2).sum(axis=1) * (weight * other**2).sum(axis=1))
    return np.asarray(both / np.maximum(spread, 1e-6), dtype=np.float32)


def _laid_on(one: Floats, other: Floats) -> tuple[Floats, Floats]:
    """Scale and shift the second pictures onto the first, then correlate: gray and gradients, (P,) each.

    Gauss-Newton over scale and shift along each axis, contrast and brightness, first on blurred pictures.

    Source: Lucas and Kanade 1981, An Iterative Image Registration Technique.
    """
    count, side = len(one), one.shape[1]
    places = (np.arange(side) - (side - 1) / 2).astype(np.float32)  # from the centre, (T,)
    scaling, shift = np.zeros((count, 2), np.float32), np.zeros((count, 2), np.float32)  # rows, columns
    for sigma in _BLURS:
        blur = np.exp(-((places[:, None] - places) ** 2) / (2 * sigma**2)) if sigma else np.eye(side)
        blur = (blur / blur.sum(axis=1, keepdims=True)).astype(np.float32)
        target, moving = blur @ one @ blur.T, blur @ other @ blur.T
        moved, inside = _resample(moving, places, scaling, shift)
        down, across = np.gradient(moved, axis=(1, 2))
        columns = np.stack(
            [
                down * places[:, None],
                across * places[None, :],
                down,
                across,
                moved - moved.mean(axis=(1, 2), keepdims=True),
                np.ones_like(moved),
            ],
            axis=1,
        ).reshape(count, 6, -1)
        weighed = columns * inside.reshape(count, 1, -1)
        size = np.sqrt((weighed * columns).sum(axis=2)) + 1e-6  # (P, 6)
        normal = (weighed @ columns.transpose(0, 2, 1)) / (size[:, :, None] * size[:, None, :])
        residual = (target - moved).reshape(count, -1, 1)
        wanted = (weighed @ residual)[..., 0] / size
        ridge = _RIDGE * np.eye(6, dtype=np.float32)
        change = np.linalg.solve(normal + ridge, wanted[..., None])[..., 0] / size
        scaling = np.clip(scaling + change[:, :2], -_MOST_SCALING, _MOST_SCALING)
        shift = np.clip(shift + change[:, 2:4], -_MOST_SHIFT * side, _MOST_SHIFT * side)
    moved, inside = _resample(other, places, scaling, shift)
    edges = [np.stack([*np.gradient(each, axis=(1, 2))], axis=1) for each in (one, moved)]  # (P, 2, T, T)
    both = np.stack([inside, inside], axis=1)
    return _correlation(one, moved, inside), _correlation(edges[0], edges[1], both)


def _resample(pictures: Floats, places: Floats, scaling: Floats, shift: Floats) -> tuple[Floats, Floats]:
    """Pictures scaled about their centre and shifted, bilinear, (P, T, T), and 1 where that lies inside them."""
    middle = (len(places) - 1) / 2
    wanted = (1 + scaling)[:, :, None] * places + shift[:, :, None] + middle  # (P, 2, T)
    inside = ((wanted >= 0) & (wanted <= len(places) - 1)).astype(np.float32)
    clipped = np.clip(wanted, 0, len(places) - 1)
    weights = np.maximum(0, 1 - np.abs(clipped[..., None] - np.arange(len(places))))  # (P, 2, T, T)
    weights = weights.astype(np.float32)
    moved = weights[:, 0] @ pictures @ weights[:, 1].transpose(0, 2, 1)
    return moved, inside[:, 0, :, None] * inside[:, 1, None, :]
