"""From the bytes of a file to RGB pixels, the same way everywhere.

Pillow's own `convert("RGB")` turns 16-bit images white and float images black; here they are scaled by
a range that belongs to the whole set. Transparency is laid on white. EXIF orientation is obeyed.
"""

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

# Pillow opens 40 more, some of which run other programs (EPS) or parse rare formats.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
LARGEST_PIXELS = 64_000_000
SHORTEST = 512  # pixels that a short side keeps when a JPEG is decoded at a smaller scale
_EXIF_WITHIN = 1 << 16  # bytes from the start or the end of a file
_LONGEST = 8  # times the short side: what evaluation looks at of a very long image
_DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")

Pixels = npt.NDArray[np.uint8]
Range = tuple[float, float]

ImageFile.LOAD_TRUNCATED_IMAGES = False  # half-gray images must not train silently


def _register_heif() -> bool:
    """Teach Pillow HEIC, when the extra `labelwise[heic]` is installed."""
    try:
        import pi_heif  # noqa: PLC0415
    except ImportError:
        return False
    pi_heif.register_heif_opener()
    return True


HAS_HEIF = _register_heif()


class UnreadableImage(Exception):
    """The bytes are not an image we can use; the message is the reason, in a few words."""


class UnreadableNow(UnreadableImage):
    """They may be one another time, or to another machine."""


def decode_image(
    data: bytes, intensity_range: Range | None = None, shortest: int = SHORTEST
) -> tuple[Image.Image, tuple[int, int]]:
    """Decode a file into an upright RGB image.

    A large JPEG is decoded at the smallest of the scales 1/2, 1/4, 1/8 that leaves its short side at
    `shortest` or more, which saves most of the time that a photograph takes.

    Args:
        data: The whole file.
        intensity_range: Lowest and highest intensity of the set, for images deeper than 8 bits.
        shortest: Pixels of the short side that are needed.

    Returns:
        The image, and the true height and width of the upright original.

    Raises:
        UnreadableImage: It cannot be decoded whole.
    """
    with _reasons(data):
        image = _open(data)
        original = image.size
        if min(original) >= 2 * shortest:
            image.draft(None, (shortest, shortest))  # only JPEG has scales; others ignore this
        is_scaled = image.size != original
        image.load()
        if image.mode in _DEEP_MODES:
            own = _own_range(image)  # refuses an image without a number in it
            image = _shallow(image, intensity_range or own)
        if is_scaled and _orientation(image) in (5, 6, 7, 8):
            original = original[::-1]
        image = _upright(image)
        if _has_alpha(image):
            image = _on_white(image)
        elif image.mode != "RGB":
            image = image.convert("RGB")
        width, height = original if is_scaled else image.size
        return image, (height, width)


def deep_range(data: bytes) -> Range | None:
    """Lowest and highest intensity of an image deeper than 8 bits; None for any other.

    Raises:
        UnreadableImage: It cannot be decoded whole.
    """
    with _reasons(data):
        image = _open(data)
        if image.mode not in _DEEP_MODES:
            return None
        image.load()
        return _own_range(image)


def describe(data: bytes) -> tuple[str, bool, bool]:
    """Format, whether it is deeper than 8 bits, and whether it holds more images than the first.

    Raises:
        UnreadableImage: There is no image header.
    """
    with _reasons(data):
        image = _open(data)
        is_deep = image.mode in _DEEP_MODES
        try:
            is_animated = bool(getattr(image, "is_animated", False))
        except Exception:  # noqa: BLE001 - what comes after the first image is not used
            is_animated = False
        return str(image.format), is_deep, is_animated


def header_size(data: bytes) -> tuple[int, int]:
    """Height and width after EXIF rotation, from the header alone.

    Raises:
        UnreadableImage: There is no image header.
    """
    with _reasons(data):
        image = _open(data)
        # Pillow has turned a TIFF's size already
        turned = image.format != "TIFF" and _orientation(image) in (5, 6, 7, 8)
        width, height = image.size
        return (width, height) if turned else (height, width)


def shot(data: bytes) -> tuple[int, int]:
    """Which camera took a photograph and when, from its EXIF block; 0, 0 where it does not say.

    Returns:
        A hash of maker, model and serial number, and seconds since 1970 by the camera's own clock.
    """
    ends = data[:_EXIF_WITHIN] + data[-_EXIF_WITHIN:]
    if not any(mark in ends for mark in (b"Exif", b"eXIf", b"EXIF")):  # JPEG and HEIC, PNG, WebP
        return 0, 0
    try:
        exif = _open(data).getexif()
        details = exif.get_ifd(ExifTags.IFD.Exif)
        taken = datetime.strptime(str(details[ExifTags.Base.DateTimeOriginal])[:19], "%Y:%m:%d %H:%M:%S")
        camera = (
            exif.get(ExifTags.Base.Make),
            exif[ExifTags.Base.Model],
            details.get(ExifTags.Base.BodySerialNumber),
        )
    except Exception:  # noqa: BLE001 - a damaged EXIF block says nothing, whatever is wrong with it
        return 0, 0
    digest = hashlib.sha256(repr(camera).encode()).digest()
    return int.from_bytes(digest[:7], "big"), int(taken.replace(tzinfo=UTC).timestamp())


def square_pixels(image: Image.Image, side: int) -> Pixels:
    """Squeeze the whole image into a square, antialiased: what views are cut from, (S, S, 3)."""
    if image.size != (side, side):
        image = image.resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(image)


def evaluation_pixels(image: Image.Image, size: int) -> Pixels:
    """Pixels of `evaluation_image`, (E, E, 3)."""
    return np.asarray(evaluation_image(image, size))


def evaluation_image(image: Image.Image, size: int) -> Image.Image:
    """Show the middle of the image undistorted: what features and predictions are made from.

    Short side to `size` (up to 64 px) or `size` / 0.875, then the centre square.

    Source: official SimCLR code, data.py `get_preprocess_fn` (0.875; no crop margin for small images).
    """
    short = evaluation_short_side(size)
    width, height = image.size
    most = _LONGEST * min(width, height)
    if (
        max(width, height) > most
    ):  # the ends of a strip are not looked at; enlarging them could fill the memory
        left, top = max(0, (width - most) // 2), max(0, (height - most) // 2)
        image = image.crop((left, top, width - left, height - top))
        width, height = image.size
    scale = short / min(width, height)
    target = (max(short, round(width * scale)), max(short, round(height * scale)))
    if target != image.size:
        image = image.resize(target, Image.Resampling.BICUBIC)
    left, top = (target[0] - size) // 2, (target[1] - size) // 2
    if image.size != (size, size):
        image = image.crop((left, top, left + size, top + size))
    return image


def evaluation_short_side(size: int) -> int:
    """Short side that an image is resized to before its centre is cut out."""
    return size if size <= 64 else round(size / 0.875)


def shortest_for(side: int, evaluation_size: int) -> int:
    """Short side that a JPEG is decoded with at least, so that squares and evaluation images of these sides lose nothing."""
    return max(SHORTEST, side, evaluation_short_side(evaluation_size))


def content_key(pixels: Pixels) -> int:
    """First 8 bytes of the SHA-256 of an image's shape and pixels; never 0."""
    digest = hashlib.sha256(str(pixels.shape).encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return int.from_bytes(digest.digest()[:8], "little") or 1


def _open(data: bytes) -> Image.Image:
    if not data:
        raise UnreadableImage("empty file")
    formats = (*FORMATS, "HEIF") if HAS_HEIF else FORMATS
    image = Image.open(io.BytesIO(data), formats=formats)
    if image.width * image.height > LARGEST_PIXELS:
        raise UnreadableImage(
            f"too large: {image.width} x {image.height} pixels; the limit is {LARGEST_PIXELS:,}"
        )
    return image


@contextmanager
def _reasons(data: bytes) -> Iterator[None]:
    """Turn whatever Pillow raises into a reason; it raises ValueError, SyntaxError, struct.error and more."""
    try:
        yield
    except UnreadableImage:
        raise
    except MemoryError:
        raise UnreadableNow("too large for the memory") from None
    except Exception as error:  # noqa: BLE001 - one bad file must never stop a run
        raise UnreadableImage(_reason(data, error)) from None


def _reason(data: bytes, error: Exception) -> str:
    start = data[:512].lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<svg")):
        return "not an image (HTML or XML)"
    if data[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypmsf1", b"ftyphevc"):
        return "damaged HEIC" if HAS_HEIF else "HEIC: pip install 'labelwise[heic]' reads it"
    if isinstance(error, Image.DecompressionBombError):
        return "too large: a decompression bomb by its header"
    if isinstance(error, UnidentifiedImageError):
        return "not an image we can read"
    if "truncated" in str(error).lower() or "incomplete" in str(error).lower():
        return "truncated"
    return f"damaged ({type(error).__name__}: {str(error)[:80]})"


def _upright(image: Image.Image) -> Image.Image:
    if image.format == "JPEG" and not image.info.keys() & {"exif", "xmp"}:
        return image
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # noqa: BLE001 - a damaged EXIF block does not make the pixels wrong
        return image


def _orientation(image: Image.Image) -> int | None:
    """EXIF orientation, 1 to 8; None where there is none or the block is damaged."""
    try:
        orientation: int | None = image.getexif().get(0x0112)
    except Exception:  # noqa: BLE001 - a damaged EXIF block does not make the pixels wrong
        return None
    return orientation


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _on_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    canvas = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(canvas, image).convert("RGB")


def _own_range(image: Image.Image) -> Range:
    values = np.asarray(image)
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise UnreadableImage("no finite pixel")
    return float(finite.min()), float(finite.max())


def _shallow(image: Image.Image, intensity_range: Range) -> Image.Image:
    """Scale a deep image to 8 bits by a range, clipping what lies outside it."""
    low, high = intensity_range
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), nan=low, posinf=high, neginf=low)
    scaled = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
    orientation = _orientation(image)
    result = Image.fromarray((scaled * 255).round().astype(np.uint8))
    if orientation:
        result.getexif()[0x0112] = orientation
    return result
