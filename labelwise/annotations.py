"""annotations.jsonl: what people said of images on the page of `labelwise annotate`; a line for each answer, and none is changed."""

import dataclasses
import errno
import fcntl
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from labelwise import rundir
from labelwise.errors import CheckpointError, ResourceError, UsageError
from labelwise.rundir import RunDirectory

UNDO = "undo"


@dataclass(frozen=True)
class Annotation:
    """One answer.

    Attributes:
        file: Name of the image in its set.
        key: Of its pixels at that time.
        answer: "label", "unsure", "skip" (for now), or "undo" of the answer before.
        label: The class; None where the answer is another.
        part: "test", "suggested" or "imported".
        who: Said it.
        at: When, UTC.
        seconds: How long the image was looked at; None where the answer came from a file.
    """

    file: str
    key: int
    answer: str
    label: str | None
    part: str
    who: str
    at: str
    seconds: float | None


def read_annotations(run: RunDirectory) -> dict[str, Annotation]:
    """The last answer to each image, by its name, in the order they were given; undone ones are left out.

    Raises:
        CheckpointError: The file is damaged.
    """
    names = [field.name for field in dataclasses.fields(Annotation)]
    last: dict[str, Annotation] = {}
    for row in rundir.read_jsonl(run.annotations):
        said = Annotation(**{name: row[name] for name in names})
        last.pop(said.file, None)
        if said.answer != UNDO:
            last[said.file] = said
    return last


def named_classes(run: RunDirectory) -> list[str]:
    """Every class that an answer named, in the order they were first named, so that each keeps its place from start to start."""
    named = (row["label"] for row in rundir.read_jsonl(run.annotations))
    return list(dict.fromkeys(label for label in named if label is not None))


def find_rows(
    said: Iterable[Annotation], names: Sequence[str], keys: npt.NDArray[np.uint64]
) -> dict[str, int]:
    """Row of the image that each answer is about, by the name it had then: found by its pixels, wherever it lies now.

    Args:
        said: Answers; those whose images are gone or have other pixels now are left out.
        names: Of the images.
        keys: Of their pixels, (N,).
    """
    said = list(said)
    if not said:  # most runs have none, and may have a million images
        return {}
    row_of = {name: row for row, name in enumerate(names)}
    by_key = dict(zip(keys.tolist(), range(len(names)), strict=True))
    found = {}
    for each in said:
        row = row_of.get(each.file)
        if row is None or int(keys[row]) != each.key:
            row = by_key.get(each.key)
        if row is not None:
            found[each.file] = row
    return found


def add_annotations(run: RunDirectory, said: Iterable[Annotation]) -> None:
    """Put answers on the disk, all before this returns.

    Raises:
        CheckpointError: The run is gone.
    """
    if not run.config.exists():
        raise CheckpointError(f"{run.path}: this run is gone; nothing was kept.")
    is_new = not run.annotations.exists()
    rundir.append_jsonl(run.annotations, *map(dataclasses.asdict, said))
    if is_new:
        rundir.flush(run.path)


@contextmanager
def served(run: RunDirectory) -> Iterator[None]:
    """Let one page at a time ask about a run; two would not see each other's answers.

    Raises:
        ResourceError: The run cannot be written to.
        UsageError: Another page asks already.
    """
    try:
        file = os.open(run.annotations, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ResourceError(
            f"{run.annotations}: cannot be written ({error.strerror}); copy the run to a place that can be, and name the copy with --run."
        ) from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno == errno.EWOULDBLOCK:  # other errors: a file system without locks
            os.close(file)
            raise UsageError(
                f"{run.path}: another `labelwise annotate` asks about it already; several people can open its address."
            ) from None
    try:
        yield
    finally:
        os.close(file)
