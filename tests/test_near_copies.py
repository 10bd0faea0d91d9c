"""Near-copies are found among real photographs, and different photographs are not taken for copies."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_images

from labelwise.images.decoding import square_pixels
from labelwise.images.duplicates import connect
from labelwise.images.near_copies import (
    LEAST_BLURRED_AGREEMENT,
    LEAST_EDGE_AGREEMENT,
    NearCopies,
    agreement,
    find_near_copies,
    lay_on,
)

Change = Callable[[Image.Image], Image.Image]


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    """Pieces of two photographs, no two of which overlap, but for those of plain sky."""
    tiles = []
    for picture in load_sample_images().images:  # 427 x 640
        tiles += [
            Image.fromarray(picture[top : top + 70, left : left + 100])
            for top in range(0, 357, 71)
            for left in range(0, 541, 106)
        ]
    return [tile for tile in tiles if np.asarray(tile.convert("L")).std() > 12]


def recompressed(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=50)
    return Image.open(file).convert("RGB")


def resized(image: Image.Image) -> Image.Image:
    return image.resize((image.width * 3 // 5, image.height * 3 // 5))


def cropped(image: Image.Image) -> Image.Image:
    """Five percent less of each side, off two edges."""
    return image.crop((image.width // 20, 0, image.width, image.height - image.height // 20))


def brightened(image: Image.Image) -> Image.Image:
    return ImageEnhance.Contrast(ImageEnhance.Brightness(image).enhance(1.15)).enhance(0.85)


def everything(image: Image.Image) -> Image.Image:
    return recompressed(resized(ImageOps.mirror(cropped(brightened(image)))))


def squares(images: list[Image.Image], side: int = 40) -> npt.NDArray[np.uint8]:
    return np.stack([square_pixels(image, side) for image in images])


def search(
    pictures: npt.NDArray[np.uint8], rows: npt.NDArray[np.int64], sides: npt.NDArray[np.int64] | None = None
) -> NearCopies:
    return find_near_copies(pictures, np.full(len(pictures), 40) if sides is None else sides, rows)


def pairs(found: NearCopies) -> set[tuple[int, int]]:
    return {(int(one), int(other)) for one, other in found.pairs}


@pytest.mark.parametrize("side", [32, 40, 120])
@pytest.mark.parametrize(
    "change",
    [recompressed, resized, cropped, brightened, ImageOps.mirror, ImageOps.flip, everything]
    + [lambda image, turn=turn: image.rotate(turn, expand=True) for turn in (90, 180, 270)],
)
def test_copies_are_found_whatever_was_done_to_them(
    photographs: list[Image.Image], change: Change, side: int
) -> None:
    copied = photographs[::3]
    count = len(photographs)
    images = photographs + [change(image) for image in copied]
    sides = np.array([min(image.size) for image in images])
    found = search(squares(images, side), np.arange(len(images)), sides)
    wanted = {(3 * place, count + place) for place in range(len(copied))}
    least = 0.75 if change in (cropped, everything) else 1.0  # fine texture, cut off and made smaller
    assert len(wanted & pairs(found)) >= least * len(wanted)
    assert pairs(found) <= wanted


def test_different_photographs_are_no_copies(photographs: list[Image.Image]) -> None:
    found = search(squares(photographs), np.arange(len(photographs)))
    assert pairs(found) == set()


def test_photographs_in_small_squares_have_to_agree_in_more(photographs: list[Image.Image]) -> None:
    """Different clothes on one table agree as well as this at 40 px, and not at 96."""
    like = squares([photographs[10]]) + np.random.default_rng(0).normal(0, 16, (2, 40, 40, 3))
    pictures = np.concatenate(
        [np.clip(like, 0, 255).astype(np.uint8), squares([photographs[20], resized(photographs[20])])]
    )
    small, large = (search(pictures, np.arange(4), np.full(4, side)) for side in (40, 200))
    assert pairs(small) == {(0, 1), (2, 3)}
    assert LEAST_EDGE_AGREEMENT < min(small.agreement) < LEAST_BLURRED_AGREEMENT
    assert pairs(large) == {(2, 3)}


def test_only_the_rows_asked_for_are_compared(photographs: list[Image.Image]) -> None:
    both = squares([photographs[0], photographs[1], photographs[0], photographs[0]])
    assert pairs(search(both, np.array([1, 2, 3]))) == {(2, 3)}


def test_flat_images_are_compared_with_nothing() -> None:
    flat = np.full((5, 32, 32, 3), 128, np.uint8)
    assert pairs(search(flat, np.arange(5))) == set()


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_images_are_no_error(photographs: list[Image.Image], count: int) -> None:
    assert pairs(search(squares(photographs[:2]), np.arange(count))) == set()


def test_more_copies_than_are_looked_at_still_hang_together(photographs: list[Image.Image]) -> None:
    noise = np.random.default_rng(0).normal(0, 2, (40, 40, 40, 3))
    copies = np.clip(squares([photographs[0]]) + noise, 0, 255).astype(np.uint8)
    found = search(np.concatenate([copies, squares(photographs[1:10])]), np.arange(49))
    reached = {0}
    for _ in range(40):
        reached |= {row for pair in pairs(found) if set(pair) & reached for row in pair}
    assert reached == set(range(40))


def test_agreement_falls_with_the_crop(photographs: list[Image.Image]) -> None:
    def edges(share: float) -> float:
        smaller = [
            image.crop((0, 0, round(image.width * (1 - share)), round(image.height * (1 - share))))
            for image in photographs
        ]
        gray = [squares(each, 32).mean(axis=3).astype(np.float32) for each in (photographs, smaller)]
        return float(np.median(agreement(*gray, lay_on(*gray))[1]))

    assert 1.0 >= edges(0.0) > 0.999
    assert edges(0.0) > edges(0.05) > edges(0.3)


def test_hundreds_of_pictures_of_one_thing_are_one_group(photographs: list[Image.Image]) -> None:
    noise = np.random.default_rng(0).normal(0, 2, (300, 40, 40, 3))
    found = search(np.clip(squares([photographs[10]]) + noise, 0, 255).astype(np.uint8), np.arange(300))
    assert len(set(connect(300, found.pairs).tolist())) == 1


def test_many_copies_of_several_kinds_hang_together(photographs: list[Image.Image]) -> None:
    """Twenty of each picture and twenty of it smaller: the nearest of each are its own kind."""
    rng = np.random.default_rng(0)

    def many(image: Image.Image) -> npt.NDArray[np.uint8]:
        return np.clip(squares([image]) + rng.normal(0, 1, (20, 40, 40, 3)), 0, 255).astype(np.uint8)

    found = search(np.concatenate([many(photographs[10]), many(cropped(photographs[10]))]), np.arange(40))
    assert len(set(connect(40, found.pairs).tolist())) == 1


def test_what_was_found_survives_a_file(photographs: list[Image.Image], tmp_path: Path) -> None:
    found = search(squares([*photographs[:4], recompressed(photographs[2])]), np.arange(5))
    found.save(tmp_path / "found.npz")
    again = NearCopies.load(tmp_path / "found.npz")
    assert pairs(again) == pairs(found) == {(2, 4)}
    np.testing.assert_array_equal(again.agreement, found.agreement)


def test_a_search_that_is_ended_early_says_so(
    photographs: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(0).normal(0, 2, (40, 40, 40, 3))
    alike = np.clip(squares([photographs[10]]) + noise, 0, 255).astype(np.uint8)
    assert search(alike, np.arange(40)).is_whole
    monkeypatch.setattr("labelwise.images.near_copies._BLOCK", 8)
    monkeypatch.setattr("labelwise.images.near_copies._FEW_IMAGES", 0)
    monkeypatch.setattr("labelwise.images.near_copies._MOST_CANDIDATES", 5)
    assert not search(alike, np.arange(40)).is_whole
