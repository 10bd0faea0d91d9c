"""What is decided before the first step."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from labelwise.config import PretrainSettings
from labelwise.errors import UsageError
from labelwise.images.cache import build_cache
from labelwise.images.duplicates import unique_keys
from labelwise.images.source import open_images
from labelwise.stages import planning
from labelwise.stages.planning import Pool, choose_sizes, copy_squares, keep_on_device


@pytest.fixture
def pool(tmp_path: Path, photo: Callable[..., Image.Image]) -> Pool:
    for seed in range(11):
        photo(tmp_path / f"{seed:02}.png", seed)
    images = open_images(tmp_path)
    cache = build_cache(images, side=16, evaluation_size=16)
    rows = np.array([0, 2, 3, 5, 6, 7, 9, 10])
    return Pool(cache, rows, unique_keys(cache.keys[rows]), [None] * len(rows))


@pytest.mark.parametrize("at_a_time", [1, 3, 8, 100])
def test_squares_copied_to_a_device_are_those_of_the_cache(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, at_a_time: int
) -> None:
    monkeypatch.setattr(planning, "_COPIED", at_a_time)
    device = torch.device("cpu")
    resident = Pool(pool.cache, pool.rows, pool.keys, pool.labels, copy_squares(pool, device))
    members = np.array([7, 0, 4])
    for found, expected in zip(resident.squares(members, device), pool.squares(members, device), strict=True):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(resident.squares(members, device)[0][0], pool.cache.squares[10])


def test_a_cpu_reads_the_cache_itself(pool: Pool) -> None:
    assert keep_on_device(pool, torch.device("cpu")) is pool


def test_a_gpu_holds_the_squares_that_fit(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    meta = torch.device("meta")  # stands for a GPU: it has shapes, and no memory
    monkeypatch.setattr(planning, "copy_squares", lambda pool, device: torch.empty(1, device=meta))
    bytes_needed = 8 * 16 * 16 * 3
    for free, fits in ((4 * bytes_needed, True), (4 * bytes_needed - 4, False)):
        monkeypatch.setattr(planning, "available_memory", lambda device, free=free: float(free))
        kept = keep_on_device(pool, torch.device("cuda"))
        assert (kept.resident is not None) == fits


def test_resident_squares_are_used_however_the_gpu_is_named(pool: Pool) -> None:
    resident = torch.empty((8, 16, 16, 3), dtype=torch.uint8, device=torch.device("meta", 0))
    kept = Pool(pool.cache, pool.rows, pool.keys, pool.labels, resident)
    squares, _ = kept.squares(np.array([1, 2]), torch.device("meta"))  # as "cuda" is "cuda:0"
    assert squares.device == resident.device


def test_squares_smaller_than_a_view_are_refused(tmp_path: Path, photo: Callable[..., Image.Image]) -> None:
    photo(tmp_path / "a.png", size=(100, 90))
    settings = PretrainSettings(images=tmp_path, image_size=64, cache_side=48)
    with pytest.raises(UsageError, match=r"--cache-side 48: smaller than a view of 64 px; use at least 64"):
        choose_sizes(settings, open_images(tmp_path), torch.device("cpu"))
