"""Randomness by counter: a draw is a hash of what it is for, never of what was drawn before.

Order is a function of (seed, epoch); an augmentation is a function of (seed, epoch, image content
key, view). So a continued run, another number of workers or another device draws the same numbers.
All hashing happens on the CPU, in NumPy, vectorised over the batch.
"""

import numpy as np
import numpy.typing as npt

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # SplitMix64 increment, Steele et al. 2014 (OOPSLA), Fig. 16


def hash64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Scramble each 64-bit integer into an independent-looking one.

    Source: SplitMix64 finaliser, Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
    generators", Fig. 16 (variant 13 of Stafford).
    """
    with np.errstate(over="ignore"):
        mixed = values + _GOLDEN
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))


def combine(*parts: int | npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Fold integers, or arrays of them that broadcast, into one 64-bit key each."""
    key = np.zeros((), dtype=np.uint64)
    for part in parts:
        value = np.asarray(part, dtype=np.uint64)
        key = hash64(key ^ hash64(value))
    return key


def uniform(
    seed: int, epoch: int, keys: npt.NDArray[np.uint64], view: int, count: int
) -> npt.NDArray[np.float64]:
    """Draw numbers in [0, 1) that depend only on the four arguments.

    Args:
        seed: The run's seed.
        epoch: Counts from 0.
        keys: Content key of each image, (B,).
        view: Which view of the image, 0 or 1.
        count: Numbers to draw per image.

    Returns:
        Independent uniform numbers, (B, count).
    """
    columns = np.arange(count, dtype=np.uint64)[None, :]
    bits = combine(seed, epoch, view, keys[:, None], columns)  # (B, count)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def generator(seed: int, *purpose: int | str) -> np.random.Generator:
    """Give a NumPy generator for one named purpose, independent of every other purpose."""
    words = [int.from_bytes(part.encode(), "little") if isinstance(part, str) else part for part in purpose]
    return np.random.default_rng([seed, *words])


def permutation(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    """Order of `count` images in one epoch, (count,)."""
    return generator(seed, "order", epoch).permutation(count)
