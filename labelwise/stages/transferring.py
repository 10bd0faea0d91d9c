"""`labelwise annotate --import` and `--export`: labels from other tools, and for them."""

import dataclasses
from functools import partial
from pathlib import Path

import numpy as np

from labelwise import rundir, terminal
from labelwise.annotations import Annotation, add_annotations, by_row, find_rows, read_annotations, served
from labelwise.config import FinetuneSettings
from labelwise.environment import now, this_user
from labelwise.errors import DataError
from labelwise.images.label_studio import write_label_studio
from labelwise.images.labels import OUTSIDE, SUFFIXES
from labelwise.images.source import ImageSet
from labelwise.models.weights import read_spec
from labelwise.rundir import RunDirectory
from labelwise.stages.benching import open_decoded, remember_sources
from labelwise.stages.targets import check_file, check_folder
from labelwise.tables import TEXT, open_table

_COLUMNS = ("file", "label", "split", "who", "at")


def import_labels(run: RunDirectory, source: Path, who: str | None = None) -> str:
    """Keep labels that somebody gave elsewhere as if they had been given on the page.

    Args:
        run: Pretrained.
        source: A label file or folder of class folders, as `--labels` takes it.
        who: Gave them; default: this user.

    Returns:
        What came of it, in words.

    Raises:
        DataError: It cannot be read, matches no image, or says of an image what the page was told otherwise.
        ResourceError: The run cannot be written to.
        UsageError: A page asks about the run now, which would not see them.
    """
    with served(run):
        return _import_labels(run, source, who)


def _import_labels(run: RunDirectory, source: Path, who: str | None) -> str:
    settings = FinetuneSettings.resolve({"run": run.path, "labels": source})
    images, cache = open_decoded(run, settings, read_spec(run.encoder), annotated=False)
    said = by_row(read_annotations(run), images.names, cache.keys)
    lock = rundir.read_json(run.test_lock)
    locked, locked_keys = set(lock["names"]), set(lock["keys"])
    rows = [row for row, name in enumerate(images.names) if not name.startswith(OUTSIDE)]
    rows += [row for row, name in enumerate(images.names) if name in locked]
    own = {int(cache.keys[row]): row for row in rows}
    copies = any(name.startswith(OUTSIDE[1]) for name in images.names)  # in a folder of class folders
    fresh, foreign = [], 0
    for there in np.flatnonzero(cache.readable).tolist():
        name, label, key = images.names[there], images.labels[there], int(cache.keys[there])
        if label is None or name.startswith(OUTSIDE[0]) or copies != name.startswith(OUTSIDE[1]):
            continue  # a label that it had before
        row = own.get(key) if copies else there
        if row is None:
            foreign += 1
            continue
        name, before = images.names[row], said.get(row)
        if before is None or before.label is None:
            part = "test" if key in locked_keys else "imported"
            file = name if before is None else before.file  # it may have been moved since
            said[row] = Annotation(file, key, "label", label, part, who or this_user(), now(), None)
            fresh.append(said[row])
        elif before.label != label:
            raise DataError(
                f"{source}: says {label!r} of {name}, and {before.label!r} was said before; nothing was taken. Keep one."
            )
    add_annotations(run, fresh)
    tests = sum(each.part == "test" for each in fresh)
    others = f"; {foreign:,} images are none of the run's" if foreign else ""
    return f"{len(fresh):,} labels taken from {source}, {tests:,} of them of test images{others}; kept in {run.annotations}"


def export_labels(run: RunDirectory, out: Path) -> str:
    """Write the labels that were given on the page.

    Args:
        run: With labels of the page.
        out: A .csv file; a .json file, which Label Studio imports; or a folder, where the images are copied into
            `test/CLASS` and `train/CLASS`. Not there yet.

    Returns:
        What was written, in words.

    Raises:
        DataError: There is nothing to write, or a class's name cannot be that of a folder.
        UsageError: It cannot be written there.
    """
    said = [each for each in read_annotations(run) if each.label is not None]
    if not said:
        raise DataError(f"{run.path}: no label was given on the page of `labelwise annotate` yet.")
    suffix = out.suffix.lower()
    if suffix in (".csv", ".json"):
        check_file(out, (out.suffix,), run)
    else:
        check_folder(out, run)
        _check_are_folders({str(each.label) for each in said})
    images, there = _locate(run, said)
    if suffix == ".csv":
        rundir.write_atomically(out, partial(_write_table, list(there.values())))
    elif suffix == ".json":
        pairs = [(each.file, str(each.label)) for each in there.values()]
        rundir.write_atomically(out, partial(write_label_studio, pairs))
    else:
        rundir.write_folder(out, partial(_copy_images, images, there))
    return f"{len(there):,} labels written to {out}"


def _locate(run: RunDirectory, said: list[Annotation]) -> tuple[ImageSet, dict[int, Annotation]]:
    """The images of a run, and answers by row, with the names that the images have now; says which images are gone.

    Raises:
        DataError: All are.
    """
    settings = remember_sources(run, FinetuneSettings.resolve({"run": run.path}))
    images, cache = open_decoded(run, settings, read_spec(run.encoder))
    rows = find_rows(said, images.names, cache.keys)
    gone = [each.file for each, row in zip(said, rows, strict=True) if row is None]
    if len(gone) == len(said):
        raise DataError(
            f"{images.root}: all labeled images are gone or have other pixels now, e.g. {gone[0]}."
        )
    if gone:
        terminal.warn(
            f"{len(gone):,} labeled images are gone or have other pixels now, and are left out, e.g. {gone[0]}."
        )
    there = by_row(said, images.names, cache.keys)
    return images, {row: dataclasses.replace(each, file=images.names[row]) for row, each in there.items()}


def _write_table(said: list[Annotation], fresh: Path) -> None:
    with open_table(fresh, ".csv", dict.fromkeys(_COLUMNS, TEXT)) as table:
        table.write(
            {
                "file": [each.file for each in said],
                "label": [str(each.label) for each in said],
                "split": [_split(each) for each in said],
                "who": [each.who for each in said],
                "at": [each.at for each in said],
            }
        )


def _split(said: Annotation) -> str:
    return "test" if said.part == "test" else "train"


def _check_are_folders(labels: set[str]) -> None:
    """Make sure that folders can have the names of classes.

    Raises:
        DataError: One cannot.
    """
    for label in labels:
        if label in (".", "..") or "/" in label or label.startswith("."):
            raise DataError(f"{label!r}: no name for a folder; export a .csv or .json file.")


def _copy_images(images: ImageSet, said: dict[int, Annotation], folder: Path) -> None:
    """Copy labeled images into class folders."""
    for row, each in said.items():
        contents = images.locate(row)
        data = contents if isinstance(contents, bytes) else Path(contents).read_bytes()
        is_file = each.file.lower().endswith(SUFFIXES)
        suffix = "" if is_file else ".png" if data.startswith(b"\x89PNG") else ".jpg"
        target = folder / _split(each) / str(each.label) / f"{each.file}{suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
