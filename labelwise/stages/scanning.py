"""`labelwise scan`: read every image once and say what is there, before anything is trained."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from labelwise import terminal
from labelwise.config import SMALLEST_POOL
from labelwise.images.decoding import UnreadableImage
from labelwise.images.duplicates import exact_duplicates, say_two_labels
from labelwise.images.readers import Readers
from labelwise.images.source import open_images

_TINY = 16  # pixels; below, little can be learned
_FLAT = 1.0  # standard deviation of 8-bit pixels; below, the image is one colour
_HUGE = 30_000_000  # pixels
_STRIP = 4  # evaluation looks at the middle square
_LISTED = 10


def scan(images: Path, *, labels: Path | None = None, labels_root: Path | None = None) -> dict[str, Any]:
    """Decode every image and describe the set; nothing is written.

    Returns:
        `images`, `quarantined`, `notes`, `duplicates`, `layout`, `estimate`, `classes`, `sizes`, `ignored`, `formats`
        (how many of each), `odd` (files that can be read and are not what one expects), `unusable` (why nothing can be
        learned from the set, or None).

    Raises:
        DataError: There are no images, or the labels do not fit.
    """
    found = open_images(images, labels=labels, labels_root=labels_root)
    count = len(found.names)
    keys, shapes = np.zeros(count, np.uint64), np.zeros((count, 2), np.int64)
    quarantined, odd = [], []
    formats: Counter[str] = Counter()
    with Readers("examine") as readers, terminal.track("scanning", count) as bar:
        for row, answer in enumerate(readers.map(range(count), found.locate)):
            if isinstance(answer, UnreadableImage):
                quarantined.append({"file": found.names[row], "reason": str(answer)})
            else:
                (keys[row], shapes[row], spread, (kind, is_deep, is_animated)), _ = answer
                formats[kind] += 1
                what = _oddities(shapes[row], spread, is_deep=is_deep, is_animated=is_animated)
                odd += [{"file": found.names[row], "what": each} for each in what]
            bar.advance(1)
    readable = keys != 0
    usable = len(np.unique(keys[readable]))
    return {
        "images": count,
        "quarantined": quarantined,
        "notes": found.notes + say_two_labels(found.names, keys, found.labels),
        "duplicates": exact_duplicates(found.names, keys),
        "layout": found.layout,
        "estimate": _estimate(shapes[readable]),
        "classes": dict(sorted(Counter(label for label in found.labels if label is not None).items())),
        "sizes": _sizes(shapes[readable]),
        "ignored": found.ignored,
        "formats": dict(formats.most_common()),
        "odd": odd,
        "unusable": None
        if usable >= SMALLEST_POOL
        else f"{images}: {usable} different images can be read; SimCLR needs at least {SMALLEST_POOL}.",
    }


def _oddities(shape: npt.NDArray[np.int64], spread: float, *, is_deep: bool, is_animated: bool) -> list[str]:
    """What is unusual about an image that can be read."""
    short, long = sorted(shape.tolist())
    found = {
        "one flat colour": spread < _FLAT,
        f"smaller than {_TINY} px": short < _TINY,
        f"larger than {_HUGE / 1e6:.0f} megapixels": short * long > _HUGE,
        f"more than {_STRIP} times as long as wide": long > _STRIP * short,
        "deeper than 8 bits, scaled by the range of all such images": is_deep,
        "several images in one file, the first is used": is_animated,
    }
    return [what for what, applies in found.items() if applies]


def show(document: dict[str, Any]) -> None:
    """Print what a scan found."""
    bad, copies = document["quarantined"], document["duplicates"]
    formats = ", ".join(f"{count:,} {kind}" for kind, count in document["formats"].items())
    terminal.emit(
        f"images       {document['images']:,} ({document['layout']}){': ' if formats else ''}{formats}"
    )
    if document["sizes"]:
        sizes = document["sizes"]
        terminal.emit(
            f"sizes        {sizes['smallest']} to {sizes['largest']} px on the short side, middle {sizes['median']}"
        )
    if document["classes"]:
        shown = ", ".join(f"{label} {count:,}" for label, count in list(document["classes"].items())[:12])
        terminal.emit(
            f"classes      {len(document['classes'])}: {shown}{' ...' if len(document['classes']) > 12 else ''}"
        )
    else:
        terminal.emit("classes      no labels found")
    terminal.emit(f"unreadable   {len(bad)}")
    for entry in bad[:_LISTED]:
        terminal.emit(f"             {entry['file']}: {entry['reason']}")
    if len(bad) > _LISTED:
        terminal.emit(f"             and {len(bad) - _LISTED:,} more; --json lists all")
    terminal.emit(f"duplicates   {sum(map(len, copies)):,} exact copies, in groups: {len(copies):,}")
    if document["ignored"]:
        shown = ", ".join(
            f"{count} {suffix or 'without suffix'}" for suffix, count in document["ignored"].items()
        )
        terminal.emit(f"not images   {shown}")
    for what, count in Counter(entry["what"] for entry in document["odd"]).most_common():
        first = next(entry["file"] for entry in document["odd"] if entry["what"] == what)
        terminal.emit(f"odd          {count:,} {what}, e.g. {first}")
    for note in document["notes"]:
        terminal.emit(f"note         {note}")
    estimate = document["estimate"]
    terminal.emit(
        f"estimate     {estimate['image_size']} px views, {estimate['cache_mb']:,} MB of image cache"
    )


def _estimate(shapes: npt.NDArray[np.int64]) -> dict[str, Any]:
    """View size a laptop would use, and the disk the cache would take."""
    if not len(shapes):
        return {"image_size": 0, "cache_mb": 0}
    size = max(32, min(96, round(float(np.median(shapes.min(axis=1))) / 32) * 32))
    return {"image_size": size, "cache_mb": round(len(shapes) * 3 * size**2 * 2.6 / 1e6)}


def _sizes(shapes: npt.NDArray[np.int64]) -> dict[str, int]:
    if not len(shapes):
        return {}
    short = shapes.min(axis=1)
    return {"smallest": int(short.min()), "median": int(np.median(short)), "largest": int(short.max())}
