"""Whole images for a browser, decoded where a broken file does no harm."""

from labelwise.images import decoding
from labelwise.images.decoding import Range, UnreadableImage
from labelwise.images.readers import Readers
from labelwise.images.source import ImageSet

_LONGEST = 1600  # pixels of a side
_SMALL = 512  # pixels of a side up to which nothing may be lost


def read_picture(images: ImageSet, row: int, intensity_range: Range | None) -> tuple[str, bytes]:
    """Decode an image as training does, whole and upright, and write it as a browser reads it, without its metadata.

    Args:
        images: The set.
        row: Which of them.
        intensity_range: See `decode_image`.

    Returns:
        Media type, and the bytes of a PNG or JPEG file.

    Raises:
        UnreadableImage: It cannot be read.
    """
    arguments = {"longest": _LONGEST, "small": _SMALL, "shortest": max(_LONGEST, decoding.SHORTEST)}
    with Readers("picture", intensity_range=intensity_range, **arguments) as readers:
        answer = next(readers.map([row], images.locate))
    if isinstance(answer, UnreadableImage):
        raise answer
    return answer
