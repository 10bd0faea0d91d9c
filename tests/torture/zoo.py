"""Files that are called images: what is in them, and what should become of each."""

import gzip
import io
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

FINE = ""  # it can be read
SKIPPED = "skipped"  # it is not taken for an image at all
Animal = tuple[str, bytes, str]  # name, contents, FINE, SKIPPED or words of the reason


def picture(seed: int = 0, size: tuple[int, int] = (48, 36), mode: str = "RGB") -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_of(width: int, height: int, body: bytes, depth: int = 8, colour: int = 2) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def animals() -> Iterator[Animal]:
    jpeg, png, gif = encoded(picture(1), "JPEG"), encoded(picture(2), "PNG"), encoded(picture(3), "GIF")
    tiff, bmp, webp = encoded(picture(4), "TIFF"), encoded(picture(5), "BMP"), encoded(picture(6), "WEBP")
    rng = np.random.default_rng(7)
    deep = rng.integers(0, 4096, (36, 48), dtype=np.uint16)

    # nothing, or something else
    yield "empty.jpg", b"", "empty file"
    yield "one-byte.png", b"\xff", "not an image"
    yield "zeros.jpg", bytes(5000), "not an image"
    yield "noise.jpg", rng.bytes(5000), "not an image"
    yield "text.jpg", b"This is a note about a photograph.\n", "not an image"
    yield "page.jpg", b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "HTML or XML"
    yield (
        "drawing.png",
        b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>',
        "HTML or XML",
    )
    yield "program.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "not an image"
    yield "paper.jpg", b"%PDF-1.7\n1 0 obj << >> endobj\n", "not an image"
    yield "layers.png", b"8BPS\0\1" + bytes(40), "not an image"
    yield "packed.png", gzip.compress(png), "not an image"
    yield (
        "iphone.jpg",
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100),
        "HEIC" if not has_heif() else "damaged",
    )
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.png", png)
    yield "archive.png", archive.getvalue(), "not an image"

    # cut short
    for name, data in (
        ("jpg", jpeg),
        ("png", png),
        ("gif", gif),
        ("tif", tiff),
        ("bmp", bmp),
        ("webp", webp),
    ):
        yield f"half.{name}", data[: len(data) // 2], "a reason"
    yield "jpeg-less-10.jpg", jpeg[:-10], "truncated"
    yield "jpeg-header.jpg", jpeg[:20], "a reason"
    yield "png-without-end.png", png[:-12], FINE

    # damaged
    yield "bad-checksum.png", png[:45] + bytes([png[45] ^ 1]) + png[46:], "damaged"
    flipped = bytearray(jpeg)
    flipped[len(jpeg) // 2] ^= 64
    yield "flipped-bit.jpg", bytes(flipped), FINE
    yield "trailing-garbage.jpg", jpeg + b"garbage" * 100, FINE
    yield "twice.jpg", jpeg + jpeg, FINE
    yield "damaged-exif.jpg", encoded(picture(8), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), FINE
    yield (
        "endless-exif.jpg",
        encoded(picture(9), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(60)),
        FINE,
    )
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 2_000_000, zip=True)
    yield "long-comment.png", encoded(picture(10), "PNG", pnginfo=text), "damaged"
    yield "no-size.png", png_of(0, 0, zlib.compress(b"")), "a reason"

    # too large
    yield "claims-400-megapixels.png", png_of(20_000, 20_000, zlib.compress(b"\0")), "too large"
    yield "claims-4-gigapixels.png", png_of(65_000, 65_000, zlib.compress(b"\0")), "too large"
    yield "claims-60-megapixels.png", png_of(10_000, 6_000, zlib.compress(b"\0")), "truncated"
    yield (
        "black-100-megapixels.png",
        png_of(10_000, 10_000, zlib.compress(bytes(1251) * 10_000, 9), 1, 0),
        "too large",
    )
    yield "claims-110-megapixels.gif", b"GIF89a" + struct.pack("<HH", 10_500, 10_500) + bytes(53), "a reason"

    # kinds of pixels
    for mode in ("L", "LA", "1", "P", "RGBA"):
        yield f"mode-{mode}.png", encoded(picture(11, mode=mode), "PNG"), FINE
    clear = picture(12).convert("RGBA")
    clear.putalpha(0)
    yield "all-transparent.png", encoded(clear, "PNG"), FINE
    yield "palette-transparent.png", encoded(picture(13, mode="P"), "PNG", transparency=3), FINE
    yield "inks.jpg", encoded(picture(14, mode="CMYK"), "JPEG"), FINE
    yield "inks.tif", encoded(picture(15, mode="CMYK"), "TIFF"), FINE
    yield "16-bit.png", encoded(Image.fromarray(deep), "PNG"), FINE
    yield "16-bit.tif", encoded(Image.fromarray(deep), "TIFF"), FINE
    yield "float.tif", encoded(Image.fromarray(deep.astype(np.float32)), "TIFF"), FINE
    yield (
        "no-number.tif",
        encoded(Image.fromarray(np.full((36, 48), np.nan, np.float32)), "TIFF"),
        "no finite pixel",
    )
    holes = deep.astype(np.float32)
    holes[:9], holes[9:12] = np.nan, np.inf
    yield "holes.tif", encoded(Image.fromarray(holes), "TIFF"), FINE
    yield "gray.jpg", encoded(picture(16, mode="L"), "JPEG"), FINE
    yield "progressive.jpg", encoded(picture(17), "JPEG", progressive=True), FINE
    yield "packed.tif", encoded(picture(18), "TIFF", compression="tiff_lzw"), FINE
    yield "jpeg-2000.jp2", encoded(picture(19), "JPEG2000"), FINE
    yield "portable.ppm", encoded(picture(20), "PPM"), FINE

    # shapes, turns, moving pictures
    yield "one-pixel.png", encoded(picture(21, (1, 1)), "PNG"), FINE
    yield "strip.png", encoded(picture(22, (6000, 2)), "PNG"), FINE
    exif = Image.Exif()
    exif[0x0112] = 6
    yield "turned.jpg", encoded(picture(23), "JPEG", exif=exif.tobytes()), FINE
    for name, kind in (
        ("moving.gif", "GIF"),
        ("moving.png", "PNG"),
        ("moving.webp", "WEBP"),
        ("pages.tif", "TIFF"),
    ):
        yield name, encoded(picture(24), kind, save_all=True, append_images=[picture(25), picture(26)]), FINE

    # names
    yield "a-png.jpg", encoded(picture(27), "PNG"), FINE
    yield "LOUD.JPEG", encoded(picture(28), "JPEG"), FINE
    yield "no-suffix", encoded(picture(29), "JPEG"), SKIPPED
    yield ".hidden.jpg", encoded(picture(30), "JPEG"), SKIPPED
    yield "bär 图 🦊.png", encoded(picture(31), "PNG"), FINE
    yield f"{'long' * 59}.png", encoded(picture(32), "PNG"), FINE
    for place, name in enumerate(("new\nline.png", "esc\x1b[31m.png", "<img src=x onerror=alert(1)>.png", "=cmd|' !A0.png", "[-b][red].png", "-rf.png", '"quoted",.png')):  # fmt: skip
        yield name, encoded(picture(33 + place), "PNG"), FINE


def has_heif() -> bool:
    from labelwise.images.decoding import HAS_HEIF

    return HAS_HEIF


def write_zoo(folder: Path) -> dict[str, str]:
    """Put every animal into a folder, and what is no file beside it; give what should become of each."""
    folder.mkdir(parents=True)
    expected = {}
    for name, data, verdict in animals():
        (folder / name).write_bytes(data)
        expected[name] = verdict
    os.mkfifo(folder / "pipe.jpg")
    (folder / "folder.jpg").mkdir()
    (folder / "points-nowhere.jpg").symlink_to("gone.jpg")
    (folder / "around").symlink_to(".")
    (folder / "device.jpg").symlink_to("/dev/zero")
    with open(os.fsencode(folder) + b"/caf\xe9.png", "wb") as file:
        file.write(encoded(picture(50), "PNG"))
    return expected | dict.fromkeys(
        ("pipe.jpg", "folder.jpg", "points-nowhere.jpg", "around", "device.jpg"), SKIPPED
    )
