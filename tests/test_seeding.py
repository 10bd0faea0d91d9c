"""The counter against SplitMix64 in Python's own integers, and its numbers against what chance allows."""

import itertools

import numpy as np
import pytest
from scipy import stats

from labelwise import seeding

WORD = 2**64 - 1
SURE = 1e-4  # the seeds are fixed, so a sound generator passes always
KEYS = np.random.default_rng(0).integers(0, 2**64, 2000, dtype=np.uint64)


def splitmix64(state: int) -> int:
    """One output of SplitMix64 (Steele et al. 2014, Fig. 16, with Stafford's variant 13), unbounded integers."""
    z = (state + 0x9E3779B97F4A7C15) & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def fold(*parts: int) -> int:
    key = 0
    for part in parts:
        key = splitmix64(key ^ splitmix64(part))
    return key


def test_hash_equals_splitmix64_in_python_integers() -> None:
    values = np.concatenate([KEYS, np.array([0, 1, 2**32, 2**63, WORD - 1, WORD], dtype=np.uint64)])
    assert seeding.hash64(values).tolist() == [splitmix64(int(value)) for value in values]


def test_hash_equals_a_published_sequence_of_splitmix64() -> None:
    published = [  # the first five numbers of seed 1234567, rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    states = [(1234567 + place * 0x9E3779B97F4A7C15) & WORD for place in range(5)]
    assert seeding.hash64(np.array(states, dtype=np.uint64)).tolist() == published


def test_hash_gives_no_two_integers_the_same_value() -> None:
    assert len(np.unique(seeding.hash64(np.arange(100_000, dtype=np.uint64)))) == 100_000


def test_combine_folds_integers_and_arrays_in_order() -> None:
    found = seeding.combine(7, KEYS[:5, None], np.arange(3, dtype=np.uint64)[None, :])
    assert found.tolist() == [[fold(7, int(key), column) for column in range(3)] for key in KEYS[:5]]
    assert int(seeding.combine(1, 2)) == fold(1, 2)
    assert int(seeding.combine(1, 2)) != int(seeding.combine(2, 1))
    assert int(seeding.combine(0)) != int(seeding.combine(0, 0))


def test_uniform_equals_the_counter_in_python_integers() -> None:
    found = seeding.uniform(5, 3, KEYS[:20], 1, 4)
    expected = [[(fold(5, 3, 1, int(key), column) >> 11) / 2**53 for column in range(4)] for key in KEYS[:20]]
    assert found.tolist() == expected


def test_uniform_numbers_are_uniform_from_zero_to_below_one() -> None:
    numbers = seeding.uniform(0, 0, KEYS, 0, 20)
    assert numbers.shape == (2000, 20)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert stats.kstest(numbers.ravel(), "uniform").pvalue > SURE
    assert min(stats.kstest(column, "uniform").pvalue for column in numbers.T) > SURE
    assert len(np.unique(numbers)) == numbers.size


def test_small_counters_give_uniform_numbers_too() -> None:
    numbers = [
        seeding.uniform(seed, epoch, np.arange(500, dtype=np.uint64), view, 2)
        for seed, epoch, view in itertools.product(range(4), range(5), range(2))
    ]
    every = np.stack(numbers)
    assert stats.kstest(every.ravel(), "uniform").pvalue > SURE
    assert len(np.unique(every)) == every.size  # no counter meets another's numbers


def test_uniform_numbers_of_neighbouring_counters_are_uncorrelated() -> None:
    keys = np.arange(20_000, dtype=np.uint64)
    counters = [
        (0, 0, keys, 0),
        (1, 0, keys, 0),
        (0, 1, keys, 0),
        (0, 0, keys, 1),
        (0, 0, keys + np.uint64(1), 0),
    ]
    numbers = np.concatenate([seeding.uniform(*counter, 3) for counter in counters], axis=1)  # (keys, 15)
    correlation = np.corrcoef(numbers, rowvar=False) - np.eye(15)
    assert np.abs(correlation).max() < 5 / np.sqrt(len(keys))


def test_more_numbers_leave_the_first_ones_as_they_are() -> None:
    few, many = seeding.uniform(1, 2, KEYS, 0, 5), seeding.uniform(1, 2, KEYS, 0, 9)
    assert np.array_equal(few, many[:, :5])


@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_permutation_holds_every_image_once(count: int) -> None:
    order = seeding.permutation(3, 4, count)
    assert sorted(order.tolist()) == list(range(count))


def test_permutation_depends_on_epoch_and_seed_alone() -> None:
    orders = {
        (seed, epoch): tuple(seeding.permutation(seed, epoch, 50)) for seed in range(4) for epoch in range(4)
    }
    assert len(set(orders.values())) == 16
    np.random.default_rng().random(10)  # what was drawn before is forgotten
    assert orders[2, 3] == tuple(seeding.permutation(2, 3, 50))


def test_every_place_in_the_order_is_equally_likely_for_every_image() -> None:
    counts = np.zeros((6, 6))
    for epoch in range(3000):
        counts[seeding.permutation(0, epoch, 6), np.arange(6)] += 1
    statistic = (np.square(counts - 500) / 500).sum() * 5 / 6  # (n - 1)^2 degrees of freedom
    assert stats.chi2.sf(statistic, 25) > SURE


PURPOSES = [  # seed and purpose, those of the package among them
    (0, "order", 0),
    (0, "order", 1),
    (1, "order", 0),
    (0, "monitor"),
    (0, "holdout", 3),
    (0, "holdout", "cat"),
    (0, "holdout", "dog"),
    (0, "labels", 0, "cat"),
    (0, "labels", 1, "cat"),
    (0, "labels", 0, "dog"),
    (1, "labels", 0, "cat"),
]


def test_generators_of_different_purposes_are_independent() -> None:
    numbers = np.stack([seeding.generator(*purpose).random(20_000) for purpose in PURPOSES])
    assert len(np.unique(numbers)) == numbers.size  # not even shifted against each other
    correlation = np.corrcoef(numbers) - np.eye(len(PURPOSES))
    assert np.abs(correlation).max() < 5 / np.sqrt(20_000)


def test_a_generator_starts_anew_for_the_same_purpose() -> None:
    first, second = (seeding.generator(4, "labels", 2, "cat").random(5) for _ in range(2))
    assert np.array_equal(first, second)
