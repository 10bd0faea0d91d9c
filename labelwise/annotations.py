"""What people said of images on the page of `labelwise annotate`: annotations.jsonl, a line for each answer, none of which is changed, and classes.json, the classes in the order shown."""

import dataclasses
import errno
import fcntl
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


def read_annotations(run: RunDirectory) -> list[Annotation]:
    """The last answer to each image, in the order they were given; undone ones are left out.

    An image is known by its name and its pixels: another one may have its name later.

    Raises:
        CheckpointError: The file is damaged.
    """
    names = [field.name for field in dataclasses.fields(Annotation)]
    last: dict[tuple[str, int], Annotation] = {}
    for row in rundir.read_jsonl(run.annotations):
        said = Annotation(**{name: row[name] for name in names})
        last.pop((said.file, said.key), None)
        if said.answer != UNDO:
            last[said.file, said.key] = said
    return list(last.values())


def find_rows(
    said: Sequence[Annotation], names: Sequence[str], keys: npt.NDArray[np.uint64]
) -> list[int | None]:
    """Row of the image that each answer is about, found by its pixels, wherever it lies now; None where it is gone.

    Args:
        said: Answers.
        names: Of the images.
        keys: Of their pixels, (N,).
    """
    if not said:  # most runs have none, and may have a million images
        return []
    row_of = {name: row for row, name in enumerate(names)}
    by_key = dict(zip(keys.tolist(), range(len(names)), strict=True))
    found = []
    for each in said:
        row = row_of.get(each.file)
        found.append(row if row is not None and int(keys[row]) == each.key else by_key.get(each.key))
    return found


def by_row(
    said: Sequence[Annotation], names: Sequence[str], keys: npt.NDArray[np.uint64]
) -> dict[int, Annotation]:
    """The last answer to each image that is there, by its row; arguments as of `find_rows`."""
    rows = find_rows(said, names, keys)
    return {row: each for each, row in zip(said, rows, strict=True) if row is not None}


def read_classes(run: RunDirectory) -> list[str]:
    """The classes that the page showed last, in its order, so that each keeps its key from start to start."""
    kept = rundir.read_derived(run.classes)
    return list(kept["classes"]) if kept is not None else []


def keep_classes(run: RunDirectory, classes: Iterable[str]) -> None:
    """Write down which classes the page shows, if they are others than before.

    Raises:
        CheckpointError: The run is gone.
    """
    _check_is_there(run)
    shown = list(classes)
    if shown != read_classes(run):
        rundir.write_json(run.classes, {"classes": shown})


def add_annotations(run: RunDirectory, said: Iterable[Annotation]) -> None:
    """Put answers on the disk, all before this returns; the run is `served`, which makes the file.

    Raises:
        CheckpointError: The run is gone.
    """
    _check_is_there(run)
    rundir.append_jsonl(run.annotations, *map(dataclasses.asdict, said))


def _check_is_there(run: RunDirectory) -> None:
    if not run.config.exists():
        raise CheckpointError(f"{run.path}: this run is gone; nothing was kept.")


@contextmanager
def served(run: RunDirectory) -> Iterator[None]:
    """Let one page at a time ask about a run; two would not see each other's answers.

    Raises:
        ResourceError: The run cannot be written to.
        UsageError: Another page asks already.
    """
    try:  # a file that nothing replaces: file systems over a network know no lock of a folder
        file = run.annotations.open("ab")
    except OSError as error:
        raise ResourceError(
            f"{run.annotations}: cannot be written ({error.strerror}); copy the run to a place that can be, and name the copy with --run."
        ) from None
    with file:
        rundir.flush(run.path)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno == errno.EWOULDBLOCK:  # other errors: a file system without locks
                raise UsageError(
                    f"{run.path}: another `labelwise annotate` asks about it already; several people can open its address."
                ) from None
        yield
