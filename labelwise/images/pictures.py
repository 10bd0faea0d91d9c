"""Whole images for a browser, decoded where a broken file does no harm."""

from labelwise.images import decoding
from labelwise.images.cache import ImageCache
from labelwise.images.decoding import UnreadableImage
from labelwise.images.readers import Readers
from labelwise.images.source import ImageSet

_LONGEST = 1600  # pixels of a side
_SMALL = 512  # pixels of a side up to which nothing may be lost


def read_picture(images: ImageSet, row: int, cache: ImageCache) -> tuple[str, bytes]:
    """Decode an image as training does, whole and upright, and write it as a browser reads it, without its metadata.

    Args:
        images: The set.
        row: Which of them.
        cache: What the set was decoded to.

    Returns:
        Media type, and the bytes of a PNG or JPEG file.

    Raises:
        UnreadableImage: It cannot be read, or has other pixels than the cache has.
    """
    arguments = {
        "longest": _LONGEST,
        "small": _SMALL,
        "shortest": max(_LONGEST, decoding.SHORTEST),
        "key_shortest": decoding.shortest_for(cache.squares.shape[1], cache.evaluations.shape[1]),
        "intensity_range": cache.intensity_range,
    }
    with Readers("picture", **arguments) as readers:
        answer = next(readers.map([row], images.locate))
    if isinstance(answer, UnreadableImage):
        raise answer
    (key, kind), picture = answer
    if key != int(cache.keys[row]):
        raise UnreadableImage("another image is there now")
    return kind, picture
