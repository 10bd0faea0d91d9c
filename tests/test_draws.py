"""The drawn parameters against torchvision's own draws and the paper's distributions."""

import dataclasses
import functools
import itertools
from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import stats
from torchvision.transforms import ColorJitter, RandomResizedCrop

from labelwise.views.draws import Draws, Policy, draw_views

COUNT = 20_000
SURE = 1e-3  # smallest p-value to pass; the seeds are fixed, so a pass stays a pass
CONTINUOUS = ("angle", "shear", "factors", "gain", "shift")
POLICY = Policy(size=32, rotation=20.0, shear=10.0, intensity=0.4)

Keys = npt.NDArray[np.uint64]


def some_keys(count: int = COUNT) -> Keys:
    return np.random.default_rng(0).integers(0, 2**64, count, dtype=np.uint64)


def draw(
    policy: Policy, size: tuple[int, int] = (90, 120), seed: int = 0, epoch: int = 0, view: int = 0
) -> Draws:
    sizes = np.tile(np.array(size, dtype=np.int32), (COUNT, 1))
    return draw_views(policy, sizes, seed, epoch, some_keys(), view)


@functools.cache
def drawn(epoch: int = 0, view: int = 0) -> Draws:
    return draw(POLICY, epoch=epoch, view=view)


def rows_of(draws: Draws, rows: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[np.generic]]:
    return {field.name: getattr(draws, field.name)[rows] for field in dataclasses.fields(draws)}


def assert_equal(
    found: dict[str, npt.NDArray[np.generic]], expected: dict[str, npt.NDArray[np.generic]]
) -> None:
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def assert_uniform(values: npt.NDArray[np.float64], low: float, high: float) -> None:
    assert low <= values.min()
    assert values.max() <= high
    assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > SURE


def assert_happens(happened: npt.NDArray[np.bool_], chance: float) -> None:
    assert stats.binomtest(int(happened.sum()), len(happened), chance).pvalue > SURE


# Crops


def torchvision_boxes(
    height: int, width: int, count: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> npt.NDArray[np.int64]:
    image = torch.empty(1, height, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        boxes = [RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(count)]
    return np.array(boxes)


def box_facts(boxes: npt.NDArray[np.float64], height: int, width: int) -> dict[str, npt.NDArray[np.float64]]:
    top, left, tall, wide = boxes.T
    return {
        "top": top,
        "left": left,
        "height": tall,
        "width": wide,
        "area": tall * wide,
        "aspect": wide / tall,
        "vertical position": top / np.maximum(height - tall, 1),
        "horizontal position": left / np.maximum(width - wide, 1),
        "corner": top + left,
        "far corner": top + tall + left + wide,
    }


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [
        (90, 120, (0.08, 1.0), (3 / 4, 4 / 3)),
        (333, 250, (0.08, 1.0), (3 / 4, 4 / 3)),
        (32, 32, (0.08, 1.0), (3 / 4, 4 / 3)),
        # most attempts fail, and some images end at the centre
        pytest.param(40, 400, (0.08, 1.0), (3 / 4, 4 / 3), marks=pytest.mark.slow),
        pytest.param(200, 31, (0.2, 0.6), (0.5, 2.0), marks=pytest.mark.slow),
    ],
)
def test_boxes_are_distributed_as_torchvisions(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    policy = Policy(size=32, crop_scale=scale, crop_ratio=ratio)
    ours = box_facts(draw(policy, (height, width)).box, height, width)
    theirs = box_facts(torchvision_boxes(height, width, COUNT, scale, ratio), height, width)
    for name, values in ours.items():
        assert stats.ks_2samp(values, theirs[name]).pvalue > SURE, name


def test_area_and_aspect_are_drawn_as_the_paper_says() -> None:
    """Area uniform and aspect log-uniform, in an image so large that rounding is nothing and most boxes fit."""
    policy = Policy(size=32, crop_scale=(0.08, 0.5))
    top, left, height, width = draw(policy, (30_000, 30_000)).box.T
    assert_uniform(height * width / 30_000**2, 0.0799, 0.5001)
    assert_uniform(np.log(width / height), np.log(3 / 4) - 1e-3, np.log(4 / 3) + 1e-3)
    assert_uniform(top / (30_001 - height), 0, 1)
    assert_uniform(left / (30_001 - width), 0, 1)


@pytest.mark.parametrize(("height", "width"), [(90, 120), (17, 33), (8, 8)])
def test_boxes_are_whole_pixels_that_reach_every_edge(height: int, width: int) -> None:
    box = draw(Policy(size=32), (height, width)).box
    assert np.array_equal(box, np.rint(box))
    top, left, tall, wide = box.T
    assert (top.min(), left.min()) == (0, 0)
    assert ((top + tall).max(), (left + wide).max()) == (height, width)


@pytest.mark.parametrize(
    ("height", "width"), [(10, 100), (100, 10), (7, 900), (1, 5000), (4000, 3), (13, 50), (50, 13), (11, 30)]
)
def test_an_image_no_box_fits_in_gets_torchvisions_central_crop(height: int, width: int) -> None:
    policy = Policy(size=32, crop_scale=(0.95, 1.0))
    expected = torchvision_boxes(height, width, 1, policy.crop_scale, policy.crop_ratio)[0]
    found = draw_views(policy, np.array([[height, width]], dtype=np.int32), 0, 0, some_keys(1), 0).box
    assert found[0].tolist() == expected.tolist()


def test_boxes_stay_inside_images_of_every_shape() -> None:
    small = list(itertools.product(range(1, 41), range(1, 41)))
    long = [(1, 10_000), (10_000, 1), (2, 65_000), (65_000, 3), (1, 1), (999, 1000), (60_000, 60_000)]
    sizes = np.array((small + long) * 5, dtype=np.int32)
    for policy in (
        Policy(size=32),
        Policy(size=32, crop_scale=(0.9, 1.0)),
        Policy(size=32, crop_scale=(1e-6, 1e-5)),
    ):
        box = draw_views(policy, sizes, 0, 0, some_keys(len(sizes)), 0).box
        assert np.isfinite(box).all()
        assert (box[:, :2] >= 0).all()
        assert (box[:, 2:] >= 1).all()
        assert (box[:, :2] + box[:, 2:] <= sizes).all()


# Colour


@pytest.mark.parametrize("strength", [0.5, 1.0, 1.5])  # at 1.5 the lowest factor is 0, not -0.2
def test_factors_are_uniform_over_the_ranges_of_torchvisions_color_jitter(strength: float) -> None:
    theirs = ColorJitter(0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength)
    factors = draw(Policy(size=32, color_strength=strength)).factors
    for index, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        assert_uniform(factors[:, index], *getattr(theirs, name))


def test_the_four_operations_come_in_every_order_equally_often() -> None:
    counts = Counter(map(tuple, drawn().order.tolist()))
    assert set(counts) == set(itertools.permutations(range(4)))
    assert stats.chisquare(list(counts.values())).pvalue > SURE


def test_strength_zero_means_no_jitter() -> None:
    draws = draw(Policy(size=32, color=1.0, color_strength=0.0))
    assert not draws.jittered.any()
    assert np.array_equal(draws.factors, np.tile([1.0, 1.0, 1.0, 0.0], (COUNT, 1)))


# Chances and the rest


def test_the_papers_chances_of_each_operation() -> None:
    draws = draw(Policy(size=32))
    assert_happens(draws.flipped, 0.5)
    assert_happens(draws.jittered, 0.8)
    assert_happens(draws.gray, 0.2)
    assert_happens(draws.sigma > 0, 0.5)


@pytest.mark.parametrize("chance", [0.0, 0.3, 1.0])
def test_chances_follow_the_policy(chance: float) -> None:
    draws = draw(Policy(size=32, flip=chance, color=chance, grayscale=chance, blur=chance))
    for happened in (draws.flipped, draws.jittered, draws.gray, draws.sigma > 0):
        assert_happens(happened, chance)


def test_blur_is_uniform_between_a_tenth_and_two_pixels() -> None:
    sigma = drawn().sigma
    assert_uniform(sigma[sigma > 0], 0.1, 2.0)


def test_angle_shear_gain_and_shift_are_uniform_about_no_change() -> None:
    assert_uniform(drawn().angle, -20.0, 20.0)
    assert_uniform(drawn().shear[:, 0], -10.0, 10.0)
    assert_uniform(drawn().shear[:, 1], -10.0, 10.0)
    assert_uniform(drawn().gain, 0.6, 1.4)
    assert_uniform(drawn().shift, -0.2, 0.2)


def test_the_papers_policy_neither_turns_nor_shears_nor_changes_intensity() -> None:
    draws = draw(Policy(size=32))
    assert not draws.angle.any()
    assert not draws.shear.any()
    assert not draws.shift.any()
    assert (draws.gain == 1).all()


def test_the_parameters_of_a_view_are_independent_of_each_other() -> None:
    draws = drawn()
    facts = {
        "top": draws.box[:, 0],
        "left": draws.box[:, 1],
        "area": draws.box[:, 2] * draws.box[:, 3],
        "aspect": draws.box[:, 3] / draws.box[:, 2],
        "flipped": draws.flipped,
        "angle": draws.angle,
        "shear x": draws.shear[:, 0],
        "shear y": draws.shear[:, 1],
        "jittered": draws.jittered,
        "first operation": draws.order[:, 0] == 0,
        "last operation": draws.order[:, 3] == 3,
        "gray": draws.gray,
        "gain": draws.gain,
        "shift": draws.shift,
        "blurred": draws.sigma > 0,
    } | {f"factor {index}": draws.factors[:, index] for index in range(4)}
    chained = {"top", "left", "area", "aspect"}  # a large box has little room to move
    both_orders = {"first operation", "last operation"}
    correlation = np.corrcoef([values.astype(float) for values in facts.values()])
    dependent = {
        (one, other)
        for (i, one), (j, other) in itertools.combinations(enumerate(facts), 2)
        if not {one, other} <= chained and {one, other} != both_orders
        if abs(correlation[i, j]) > 5 / np.sqrt(COUNT)
    }
    assert dependent == set()


def test_the_blur_of_a_view_is_independent_of_what_else_happens_to_it() -> None:
    draws = draw(dataclasses.replace(POLICY, blur=1.0))
    others = np.column_stack(
        [draws.box, draws.angle, draws.shear, draws.factors, draws.gain, draws.shift, draws.gray]
    )
    p_values = [stats.pearsonr(column, draws.sigma).pvalue for column in others.T]
    assert min(p_values) > SURE / len(p_values)


# Who shares draws with whom


def all_continuous(draws: Draws) -> npt.NDArray[np.float64]:
    return np.column_stack([getattr(draws, name) for name in CONTINUOUS])


def test_no_two_images_and_no_two_views_share_a_draw() -> None:
    values = np.concatenate(
        [all_continuous(drawn(epoch, view)) for epoch in range(2) for view in range(2)]
    )  # (4 N, 9)
    for column in values.T:
        assert len(np.unique(column)) == len(values)  # a shared draw would be an equal number


@pytest.mark.parametrize(("epoch", "view"), [(0, 1), (1, 0)])
def test_two_views_and_two_epochs_of_an_image_are_unrelated(epoch: int, view: int) -> None:
    pairs = np.corrcoef(all_continuous(drawn()), all_continuous(drawn(epoch, view)), rowvar=False)[:9, 9:]
    assert np.abs(pairs).max() < 5 / np.sqrt(COUNT)
    for name in ("flipped", "jittered", "gray"):
        first, second = getattr(drawn(), name), getattr(drawn(epoch, view), name)
        assert stats.chi2_contingency(np.histogram2d(first, second, bins=2)[0]).pvalue > SURE
    assert (drawn().box != drawn(epoch, view).box).any(axis=1).mean() > 0.99


def test_neighbouring_images_are_unrelated() -> None:
    values = all_continuous(drawn())
    pairs = np.corrcoef(values[:-1], values[1:], rowvar=False)[:9, 9:]
    assert np.abs(pairs).max() < 5 / np.sqrt(COUNT)


@pytest.mark.parametrize("changed", [{"seed": 1}, {"epoch": 1}, {"view": 1}])
def test_seed_epoch_and_view_each_change_the_draw(changed: dict[str, int]) -> None:
    assert (all_continuous(draw(POLICY, **changed)) != all_continuous(drawn())).all()


def test_a_draw_depends_on_nothing_but_its_counter_and_size() -> None:
    rng = np.random.default_rng(1)
    sizes = rng.integers(20, 500, (200, 2)).astype(np.int32)
    keys = some_keys(200)
    batch = draw_views(POLICY, sizes, 3, 5, keys, 1)
    for rows in (rng.permutation(200), np.arange(17), np.array([42]), np.array([7, 7, 3])):
        other = draw_views(POLICY, sizes[rows], 3, 5, keys[rows], 1)
        assert_equal(rows_of(other, np.arange(len(rows))), rows_of(batch, rows))


def test_the_size_of_an_image_changes_nothing_but_its_box() -> None:
    first, second = (rows_of(draw(POLICY, size), np.arange(COUNT)) for size in ((90, 120), (500, 60)))
    assert not np.array_equal(first.pop("box"), second.pop("box"))
    assert_equal(first, second)


def test_a_draw_does_not_touch_the_global_generators() -> None:
    before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    draw_views(POLICY, np.array([[9, 9]], dtype=np.int32), 0, 0, some_keys(1), 0)
    assert np.array_equal(before[0], np.random.get_state()[1])  # noqa: NPY002
    assert torch.equal(before[1], torch.get_rng_state())


def test_every_parameter_has_one_row_per_image() -> None:
    draws = draw_views(POLICY, np.full((3, 2), 50, dtype=np.int32), 0, 0, some_keys(3), 0)
    shapes = {name: values.shape for name, values in rows_of(draws, np.arange(3)).items()}
    assert shapes == {
        "box": (3, 4),
        "flipped": (3,),
        "angle": (3,),
        "shear": (3, 2),
        "jittered": (3,),
        "order": (3, 4),
        "factors": (3, 4),
        "gray": (3,),
        "gain": (3,),
        "shift": (3,),
        "sigma": (3,),
    }
