"""What is decided before the first step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from labelwise.config import PretrainSettings
from labelwise.errors import UsageError
from labelwise.images.cache import build_cache
from labelwise.images.duplicates import unique_keys
from labelwise.images.source import open_images
from labelwise.rundir import read_json
from labelwise.stages import pooling, pretraining
from labelwise.stages.planning import Plan, size_at
from labelwise.stages.pooling import Pool, batch_size_for, choose_sizes, copy_squares, keep_on_device
from labelwise.stages.pretraining import pretrain
from labelwise.views.draws import Policy


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
    monkeypatch.setattr(pooling, "_COPIED", at_a_time)
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
    monkeypatch.setattr(pooling, "copy_squares", lambda pool, device: torch.empty(1, device=meta))
    bytes_needed = 8 * 16 * 16 * 3
    for free, fits in ((4 * bytes_needed, True), (4 * bytes_needed - 4, False)):
        monkeypatch.setattr(pooling, "available_memory", lambda device, free=free: float(free))
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


def plan_with(initial_size: int, epochs: int = 10) -> Plan:
    numbers = {
        "batch_size": 8,
        "micro_batch_size": 8,
        "learning_rate": 1.0,
        "weight_decay": 0.0,
        "warmup_epochs": 1.0,
    }
    words = {"stem": "stock", "precision": "fp32", "layout": "channels_last", "reason": ""}
    sizes = {"image_size": 32, "initial_size": initial_size, "cache_side": 32, "blur": 0.0}
    return Plan(epochs=epochs, seconds_per_step=None, **numbers, **words, **sizes)  # type: ignore[arg-type]


def test_views_are_small_in_the_first_three_fifths_of_the_epochs() -> None:
    assert [size_at(plan_with(24), epoch) for epoch in range(10)] == [24] * 6 + [32] * 4
    assert {size_at(plan_with(32), epoch) for epoch in range(10)} == {32}
    assert size_at(plan_with(24, epochs=1), 0) == 32


def test_small_views_first_are_trained_on_and_go_into_the_estimate(
    tmp_path: Path, photo: Callable[..., Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(40):
        photo(tmp_path / "images" / f"{seed:02}.png", seed)
    trained: list[int] = []
    make_views = pretraining.make_views

    def note(policy: Policy, *rest: Any) -> torch.Tensor:
        trained.append(policy.size)
        return make_views(policy, *rest)

    monkeypatch.setattr(pretraining, "make_views", note)
    settings = PretrainSettings(
        images=tmp_path / "images",
        out=tmp_path / "run",
        backbone_args={"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]},
        image_size=32,
        initial_scale=0.5,
        epochs=5,
        batch_size=8,
        precision="fp32",
        holdout=0,
    )
    run = pretrain(settings)
    assert trained == [16] * 15 + [32] * 10  # five steps an epoch
    assert read_json(run.environment)["plan"]["initial_size"] == 16


def test_a_backbone_of_one_size_takes_no_smaller_views(
    tmp_path: Path, photo: Callable[..., Image.Image]
) -> None:
    for seed in range(40):
        photo(tmp_path / "images" / f"{seed:02}.png", seed)
    arguments = {"embed_dim": 16, "depth": 1, "num_heads": 1}
    settings = PretrainSettings(
        images=tmp_path / "images", out=tmp_path / "run", backbone="vit_tiny_patch16_224", backbone_args=arguments,
        image_size=32, initial_scale=0.5, epochs=1, batch_size=8, holdout=0,
    )  # fmt: skip
    with pytest.raises(
        UsageError, match=r"--initial-scale 0.5: vit_tiny_patch16_224 takes images of 32 px only, not 16"
    ):
        pretrain(settings)


def test_a_batch_nobody_asked_for_fits_the_images(tmp_path: Path) -> None:
    default = PretrainSettings(images=tmp_path)
    sizes = {32: 8, 240: 32, 255: 32, 256: 64, 1023: 128, 1024: 256, 5000: 256}
    assert {images: batch_size_for(default, images) for images in sizes} == sizes


def test_a_batch_of_a_recipe_gives_way_to_a_small_set_and_one_that_was_asked_for_does_not() -> None:
    given = {"images": Path()}
    of_recipe = PretrainSettings.resolve(given, {"batch_size": 128})
    assert "batch_size" not in of_recipe.given
    assert [batch_size_for(of_recipe, images) for images in (100, 127, 128, 511)] == [16, 16, 128, 128]
    asked = PretrainSettings.resolve({**given, "batch_size": 100}, {"batch_size": 128})
    assert batch_size_for(asked, 110) == 100
