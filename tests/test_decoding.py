"""Bytes to RGB pixels: real files as cameras, scanners and web servers leave them."""

import base64
import io
import struct
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageDraw, UnidentifiedImageError

from labelwise.images import decoding
from labelwise.images.cache import build_cache
from labelwise.images.decoding import (
    UnreadableImage,
    content_key,
    decode_image,
    deep_range,
    evaluation_pixels,
    header_size,
    square_pixels,
)
from labelwise.images.source import open_images

ORIENTATION = 0x0112


def decoded(data: bytes, *arguments: Any) -> Image.Image:
    return decode_image(data, *arguments)[0]


def corners() -> npt.NDArray[np.uint8]:
    """An image that looks different in each of the eight orientations, (32, 48, 3)."""
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:16, :24], pixels[:16, 24:] = (200, 30, 30), (30, 200, 30)
    pixels[16:, :24], pixels[16:, 24:] = (30, 30, 200), (220, 220, 40)
    return pixels


def stored(upright: npt.NDArray[np.uint8], orientation: int) -> npt.NDArray[np.uint8]:
    """Pixels as a camera stores them, so that `orientation` turns them upright (EXIF 2.3, table of tag 274)."""
    swapped = upright.swapaxes(0, 1)
    return {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: swapped,
        6: swapped[::-1],
        7: swapped[::-1, ::-1],
        8: swapped[:, ::-1],
    }[orientation]


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation: int, kind: str) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    best = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    image = Image.fromarray(np.ascontiguousarray(stored(corners(), orientation)))
    return encoded(image, kind, exif=exif.tobytes() if kind != "TIFF" else exif, **best)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64))


def refusal(data: bytes) -> str:
    with warnings.catch_warnings(action="ignore"), pytest.raises(UnreadableImage) as caught:
        decoded(data)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_comes_out_upright(orientation: int, kind: str) -> None:
    found = np.asarray(decoded(turned(orientation, kind)), dtype=int)
    assert found.shape == (32, 48, 3)
    assert np.abs(found - corners()).mean() < (3 if kind == "JPEG" else 0.01)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_header_tells_the_upright_size(orientation: int, kind: str) -> None:
    assert header_size(turned(orientation, kind)) == (32, 48)


def test_a_deep_image_is_turned_upright_too() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    upright = np.arange(6, dtype=np.uint16).reshape(2, 3) * 10_000
    data = encoded(Image.fromarray(np.ascontiguousarray(upright.T[::-1])), "PNG", exif=exif.tobytes())
    found = np.asarray(decoded(data))
    assert found[..., 0].tolist() == [[0, 51, 102], [153, 204, 255]]


def test_a_damaged_exif_block_does_not_cost_the_image() -> None:
    data = encoded(Image.fromarray(corners()), "PNG", exif=b"Exif\0\0no such thing in here")
    assert np.array_equal(np.asarray(decoded(data)), corners())


def test_a_damaged_exif_block_does_not_hide_the_size() -> None:
    data = encoded(Image.fromarray(corners()), "PNG", exif=b"Exif\0\0no such thing in here")
    assert header_size(data) == (32, 48)


def test_a_damaged_exif_block_does_not_cost_a_deep_image() -> None:
    deep = Image.fromarray(np.array([[0, 1000]], np.uint16))
    data = encoded(deep, "PNG", exif=b"Exif\0\0no such thing in here")
    assert np.asarray(decoded(data))[0, :, 0].tolist() == [0, 255]


def test_cmyk_inks_become_their_colours() -> None:
    inks = np.zeros((16, 48, 4), np.uint8)
    inks[:, :16], inks[:, 16:32], inks[:, 32:] = (255, 0, 0, 0), (0, 255, 255, 0), (0, 0, 0, 255)
    data = encoded(Image.fromarray(inks, "CMYK"), "JPEG", quality=95, subsampling=0)
    found = np.asarray(decoded(data), dtype=int)
    for column, colour in ((8, (0, 255, 255)), (24, (255, 0, 0)), (40, (0, 0, 0))):
        assert np.abs(found[8, column] - colour).max() <= 6


def palette_image() -> Image.Image:
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 200, 100, 0, 0, 0, 0])
    image.putdata([0, 1, 2])
    return image


def test_a_palette_png_shows_its_palette() -> None:
    found = np.asarray(decoded(encoded(palette_image(), "PNG")))
    assert found[0].tolist() == [[10, 20, 30], [200, 100, 0], [0, 0, 0]]


def test_a_transparent_palette_colour_becomes_white() -> None:
    found = np.asarray(decoded(encoded(palette_image(), "PNG", transparency=0)))
    assert found[0].tolist() == [[255, 255, 255], [200, 100, 0], [0, 0, 0]]


def test_a_palette_with_shades_of_transparency_is_blended_with_white() -> None:
    found = np.asarray(decoded(encoded(palette_image(), "PNG", transparency=bytes([255, 0, 51]))))
    assert found[0].tolist() == [[10, 20, 30], [255, 255, 255], [204, 204, 204]]


def test_transparency_is_laid_on_white_and_hidden_colours_stay_hidden() -> None:
    pixels = np.array([[[255, 0, 0, 0], [0, 0, 0, 51], [0, 0, 255, 255]]], np.uint8)
    found = np.asarray(decoded(encoded(Image.fromarray(pixels, "RGBA"), "PNG")))
    assert found[0].tolist() == [[255, 255, 255], [204, 204, 204], [0, 0, 255]]


def test_a_transparent_colour_of_an_rgb_png_becomes_white() -> None:
    pixels = np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)
    found = np.asarray(decoded(encoded(Image.fromarray(pixels), "PNG", transparency=(1, 2, 3))))
    assert found[0].tolist() == [[255, 255, 255], [4, 5, 6]]


def test_gray_with_transparency_is_laid_on_white() -> None:
    pixels = np.array([[[100, 0], [0, 102], [100, 255]]], np.uint8)
    found = np.asarray(decoded(encoded(Image.fromarray(pixels, "LA"), "PNG")))
    assert found[0].tolist() == [[255] * 3, [153] * 3, [100] * 3]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
def test_one_bit_is_black_and_white(kind: str) -> None:
    image = Image.new("1", (2, 1))
    image.putdata([0, 255])
    assert np.asarray(decoded(encoded(image, kind)))[0].tolist() == [[0] * 3, [255] * 3]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_a_16_bit_image_is_scaled_and_not_white(kind: str) -> None:
    values = np.linspace(1000, 5000, 5).astype(np.uint16)[None]
    data = encoded(Image.fromarray(values), kind)
    assert deep_range(data) == (1000, 5000)
    assert np.asarray(decoded(data, (1000, 5000)))[0, :, 1].tolist() == [0, 64, 128, 191, 255]
    assert np.asarray(decoded(data, (1000, 9000)))[0, :, 1].tolist() == [0, 32, 64, 96, 128]
    assert np.asarray(decoded(data, (2000, 3000)))[0, :, 1].tolist() == [0, 0, 255, 255, 255]


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_images_of_a_set_share_one_range(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "scans"
    folder.mkdir()
    dim = np.linspace(1000, 2000, 256).astype(np.uint16).reshape(16, 16)
    bright = np.linspace(3000, 5000, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(dim).save(folder / f"a{suffix}")
    Image.fromarray(bright).save(folder / f"b{suffix}")
    cache = build_cache(open_images(folder), side=16, evaluation_size=16)
    assert cache.intensity_range == (1000, 5000)
    for row, values in enumerate((dim, bright)):
        expected = (values.astype(float) - 1000) / 4000 * 255
        assert np.abs(cache.squares[row, :, :, 0] - expected).max() <= 0.51


def test_eight_bit_images_have_no_range_of_their_own(tmp_path: Path) -> None:
    data = encoded(Image.fromarray(corners()), "PNG")
    assert deep_range(data) is None
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").write_bytes(data)
    assert build_cache(open_images(tmp_path / "photos"), side=8, evaluation_size=8).intensity_range is None


def test_a_float_tiff_is_scaled_and_not_black() -> None:
    values = np.array([[-1, -0.5, 0, 0.5, 1]], np.float32)
    data = encoded(Image.fromarray(values), "TIFF")
    assert deep_range(data) == (-1, 1)
    assert np.asarray(decoded(data))[0, :, 2].tolist() == [0, 64, 128, 191, 255]


def test_holes_of_a_float_tiff_do_not_spoil_its_range() -> None:
    data = encoded(Image.fromarray(np.array([[np.nan, 0, 2, np.inf, -np.inf]], np.float32)), "TIFF")
    assert deep_range(data) == (0, 2)
    assert np.asarray(decoded(data))[0, :, 0].tolist() == [0, 0, 255, 255, 0]


def test_a_float_tiff_of_holes_only_is_refused() -> None:
    empty = encoded(Image.fromarray(np.full((2, 2), np.nan, np.float32)), "TIFF")
    assert refusal(empty) == "no finite pixel"
    with pytest.raises(UnreadableImage, match="no finite pixel"):
        decode_image(empty, (0.0, 5.0), 32)  # among others that have a range


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP"])
def test_of_several_frames_the_first_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    found = np.asarray(decoded(data), dtype=int)
    assert np.abs(found - (255, 0, 0)).max() <= 4


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.5, 0.95])
def test_a_truncated_image_is_refused_and_never_half_gray(kind: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    reason = refusal(data[: int(len(data) * share)])
    assert reason.startswith(("truncated", "damaged", "not an image we can read"))
    if kind == "JPEG":
        assert reason == "truncated"


def test_an_empty_file_is_called_empty() -> None:
    assert refusal(b"") == "empty file"
    with pytest.raises(UnreadableImage, match=r"^empty file$"):
        header_size(b"")


@pytest.mark.parametrize(
    "page", [b"<!DOCTYPE html><p>404", b"\n <html><body>", b"<?xml version='1.0'?><svg/>", b"<svg></svg>"]
)
def test_a_web_page_named_jpg_is_called_one(page: bytes) -> None:
    assert refusal(page) == "not an image (HTML or XML)"


def test_text_archives_and_zeros_are_not_images() -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.jpg", b"x" * 100)
    for data in (b"hello, I am a caption", b"x", b"\0" * 4096, archive.getvalue()):
        assert refusal(data) == "not an image we can read"


def test_formats_that_run_other_programs_are_not_opened() -> None:
    data = encoded(Image.fromarray(corners()), "EPS")
    assert Image.open(io.BytesIO(data)).format == "EPS"
    assert refusal(data) == "not an image we can read"


def test_an_absurd_header_is_refused_before_memory_is_taken() -> None:
    assert refusal(png_header(20_000, 20_000)) == "too large: a decompression bomb by its header"
    words = "too large: 10500 x 10500 pixels; the limit is 64,000,000"
    assert refusal(png_header(10_500, 10_500)) == words
    for read in (header_size, deep_range):
        with warnings.catch_warnings(action="ignore"), pytest.raises(UnreadableImage, match=words):
            read(png_header(10_500, 10_500))


def test_heic_that_its_decoder_cannot_read_is_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "HAS_HEIF", True)
    data = struct.pack(">I", 24) + b"ftypheic" + b"\0\0\0\0mif1heic" + bytes(200)
    assert decoding._reason(data, UnidentifiedImageError()) == "damaged HEIC"


@pytest.mark.skipif(decoding.HAS_HEIF, reason="pi-heif is installed, so HEIC is read")
@pytest.mark.parametrize("brand", [b"heic", b"mif1", b"heix"])
def test_heic_without_the_extra_is_named_with_what_to_install(brand: bytes) -> None:
    data = struct.pack(">I", 24) + b"ftyp" + brand + b"\0\0\0\0mif1heic" + bytes(200)
    assert refusal(data) == "HEIC: pip install 'labelwise[heic]' reads it"


HEIC = (  # 48 x 32 pixels: red grows to the right, green downwards, blue to the left
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAX1tZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAA"
    "AAAAACJpbG9jAAAAAERAAAEAAQAAAAABoQABAAAAAAAAAEsAAAAjaWluZgAAAAAAAQAAABVpbmZlAgAAAAABAABodmMxAAAA"
    "AA5waXRtAAAAAAABAAAA/WlwcnAAAADdaXBjbwAAAHZodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGEABDAH//wNw"
    "AAADAJAAAAMAAAMAHroCQGEAAQAqQgEBA3AAAAMAkAAAAwAAAwAeoCCBBZbq5Ka5uAhoMCAAAAMDIAAAAwAhYgABAAZEAcFz"
    "wIkAAAATY29scm5jbHgAAQANAAaAAAAAFGlzcGUAAAAAAAAAQAAAAEAAAAAoY2xhcAAAADAAAAABAAAAIAAAAAH////wAAAA"
    "Av///+AAAAACAAAAEHBpeGkAAAAAAwgICAAAABhpcG1hAAAAAAAAAAEAAQWBAgMFhAAAAFNtZGF0AAAARygBr1jm+TodPuRY"
    "7REXMt6Df+FrtWt2NEjYLz4iS2bVTMTX09kLcdtCyHT1oPEc2RgGSCJROEZm/UbYlkXLin/nj6Dn0Jo+"
)


@pytest.mark.skipif(not decoding.HAS_HEIF, reason="pi-heif is not installed: pip install '.[heic]'")
def test_heic_is_read_with_the_extra() -> None:
    pixels = np.asarray(decode_image(base64.b64decode(HEIC))[0], dtype=float)
    assert pixels.shape == (32, 48, 3)
    y, x = np.mgrid[:32, :48]
    assert np.abs(pixels - np.stack([5 * x, 7 * y, 255 - 5 * x], axis=2)).mean() < 8


def test_reading_in_threads_leaves_the_warning_filters_alone() -> None:
    data = [encoded(palette_image().resize((side, side)), "PNG") for side in (8, 300)] * 200
    before = list(warnings.filters)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(decode_image, data))
        assert list(warnings.filters) == before
    finally:
        warnings.filters[:] = before


def structured(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(width).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BILINEAR)


@pytest.mark.parametrize(
    ("image_size", "size", "resized", "corner"),
    [
        ((400, 200), 32, (64, 32), (16, 0)),
        ((90, 160), 64, (64, 114), (0, 25)),
        ((96, 96), 96, (110, 110), (7, 7)),
        ((300, 200), 224, (384, 256), (80, 16)),
        ((200, 300), 224, (256, 384), (16, 80)),
        ((10, 20), 32, (32, 64), (0, 16)),
    ],
)
def test_the_evaluation_image_is_the_centre_at_the_right_scale(
    image_size: tuple[int, int], size: int, resized: tuple[int, int], corner: tuple[int, int]
) -> None:
    image = structured(*image_size)
    left, top = corner
    expected = np.asarray(image.resize(resized, Image.Resampling.BICUBIC))
    expected = expected[top : top + size, left : left + size]
    assert np.array_equal(evaluation_pixels(image, size), expected)


def test_an_image_of_the_right_size_is_shown_untouched() -> None:
    image = structured(64, 64)
    assert np.array_equal(evaluation_pixels(image, 64), np.asarray(image))
    assert np.array_equal(square_pixels(image, 64), np.asarray(image))


@pytest.mark.parametrize("image_size", [(400, 200), (200, 400), (333, 222)])
def test_a_disc_stays_round_for_evaluation(image_size: tuple[int, int]) -> None:
    image = Image.new("RGB", image_size)
    x, y = image_size[0] / 2, image_size[1] / 2
    ImageDraw.Draw(image).ellipse((x - 50, y - 50, x + 50, y + 50), fill="white")
    rows, columns = np.nonzero(evaluation_pixels(image, 64)[..., 0] > 127)
    assert abs(int(np.ptp(rows)) - int(np.ptp(columns))) <= 1
    assert np.ptp(rows) == pytest.approx(100 * 64 / min(image_size), abs=2)


def test_the_square_holds_the_whole_image() -> None:
    image = structured(400, 200)
    expected = np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC))
    assert np.array_equal(square_pixels(image, 64), expected)
    squeezed = square_pixels(Image.fromarray(corners()), 16).astype(int)
    for place, colour in (((0, 0), (200, 30, 30)), ((0, 15), (30, 200, 30)), ((15, 0), (30, 30, 200))):
        assert np.abs(squeezed[place] - colour).max() <= 3


def test_the_square_of_a_fine_pattern_is_gray_and_not_aliased() -> None:
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(square_pixels(Image.fromarray(stripes), 32)[4:-4, 4:-4].astype(int) - 127).max() <= 2


def test_equal_pixels_have_one_key_whatever_the_format() -> None:
    keys = {
        content_key(np.asarray(decoded(encoded(Image.fromarray(corners()), kind))))
        for kind in ("PNG", "BMP", "TIFF", "PPM")
    }
    assert len(keys) == 1
    assert keys.pop() == content_key(np.asfortranarray(corners()))


def test_one_changed_pixel_changes_the_key() -> None:
    changed = corners()
    changed[31, 47, 2] += 1
    assert content_key(changed) != content_key(corners())


def test_equal_bytes_in_another_shape_have_another_key() -> None:
    assert content_key(np.zeros((2, 8, 3), np.uint8)) != content_key(np.zeros((4, 4, 3), np.uint8))


# Large JPEGs


@pytest.mark.parametrize(("size", "expected"), [
    ((1023, 2000), (1023, 2000)), ((1024, 2000), (512, 1000)), ((2051, 2049), (513, 513)), ((4500, 4096), (563, 512)),
])  # fmt: skip
def test_a_large_jpeg_is_decoded_at_a_smaller_scale(size: tuple[int, int], expected: tuple[int, int]) -> None:
    data = encoded(Image.linear_gradient("L").resize(size).convert("RGB"), "JPEG")
    image, true_size = decode_image(data)
    assert image.size == expected
    assert true_size == size[::-1]
    assert header_size(data) == true_size


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_true_size_of_a_scaled_jpeg_is_that_of_the_upright_original(orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encoded(Image.new("RGB", (1500, 1100)), "JPEG", exif=exif)
    image, true_size = decode_image(data)
    assert true_size == header_size(data) == ((1500, 1100) if orientation in (6, 8) else (1100, 1500))
    assert image.size == ((550, 750) if orientation in (6, 8) else (750, 550))


def test_a_scaled_jpeg_looks_like_the_whole_one_made_smaller() -> None:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (16, 24, 3), np.uint8))
    data = encoded(coarse.resize((2400, 1600), Image.Resampling.BICUBIC), "JPEG", quality=95)
    scaled, _ = decode_image(data)
    whole, _ = decode_image(data, None, 10_000)
    assert (scaled.size, whole.size) == ((1200, 800), (2400, 1600))
    for make in (square_pixels, evaluation_pixels):
        difference = np.abs(make(scaled, 96).astype(int) - make(whole, 96).astype(int))
        assert difference.mean() < 1
        assert np.percentile(difference, 99) <= 4


def test_an_image_is_decoded_whole_where_all_of_it_is_needed() -> None:
    data = encoded(Image.new("RGB", (1200, 1200)), "JPEG")
    assert decode_image(data, None, 601)[0].size == (1200, 1200)
    assert decode_image(data, None, 600)[0].size == (600, 600)
    assert decode_image(encoded(Image.new("RGB", (1200, 1200)), "PNG"))[0].size == (1200, 1200)
