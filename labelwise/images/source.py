"""Which images there are, and what is known of each. With `labels`, the door of `datasets`."""

import errno
import glob
import itertools
import os
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets

from labelwise.errors import DataError, LabelwiseError, UsageError
from labelwise.images.labels import OUTSIDE, SPLITS, SUFFIXES, match_labels, read_label_table
from labelwise.images.shards import (
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    Shards,
    address_of,
    load_archives,
    load_tables,
    open_shards,
    reaching,
)
from labelwise.rundir import is_utf8

_IGNORED_FOLDERS = ("__MACOSX",)
_TOGETHER = 8  # rows of a table read at once; they may hold whole files


@dataclass(frozen=True)
class Files:
    """Images that are files below one folder, by name."""

    folder: Path
    count: int
    prefix: str = ""  # of their names in the set

    def path(self, name: str) -> str:
        """Whole path of the image that the set calls so, or from the folder one is in."""
        return os.path.join(self.folder, name.removeprefix(self.prefix))


@dataclass
class TableRows:
    """Images that are rows of a table, which `datasets` reads."""

    table: datasets.Dataset  # column `image`, not decoded
    _read: tuple[int, list[dict[str, Any] | None]] = (0, [])  # first row, and some from there on

    @property
    def count(self) -> int:
        """How many."""
        return len(self.table)

    @property
    def fingerprint(self) -> str:
        """Hash of what is in them."""
        return str(self.table._fingerprint)

    def locate(self, row: int) -> str | bytes:
        """As `ImageSet.locate`."""
        start, some = self._read
        if not start <= row < start + len(some):
            start = row - row % _TOGETHER  # rows are asked for in order, and one is as dear as some
            some = self.table[start : start + _TOGETHER]["image"]
            self._read = start, some  # at once, as several threads ask
        image = some[row - start] or {"bytes": None, "path": None}
        inside: bytes | None = image["bytes"]
        if inside is not None:
            return inside
        path: str | None = image["path"]
        if path is None:
            raise FileNotFoundError(errno.ENOENT, "no image in this row")
        return path


@dataclass(frozen=True)
class ImageSet:
    """Images by name, not yet decoded. Rows agree across all lists.

    Attributes:
        root: The folder the user gave.
        names: Unique; the path relative to `root`, with forward slashes.
        labels: Text, or None where unknown.
        splits: "train", "val", "test", or None where the user made no split.
        layout: How labels and splits were found, in words.
        ignored: Files that are not images, counted by suffix.
        notes: What a person should know.
        parts: Where they are, in order.
        groups: What may not be torn apart, such as the images of one patient; None where nothing is known.
        shards: Where all the images are, of which these are a sample; None where these are all.
    """

    root: Path
    names: list[str]
    labels: list[str | None]
    splits: list[str | None]
    layout: str
    ignored: dict[str, int]
    notes: list[str]
    parts: list[Files | TableRows] = field(repr=False)
    groups: list[str | None] = field(default_factory=list)
    shards: Shards | None = None

    def __post_init__(self) -> None:
        if not self.groups:
            object.__setattr__(self, "groups", [None] * len(self.names))

    def locate(self, row: int) -> str | bytes:
        """Whole path of one image's file, or its bytes where a table holds them.

        Raises:
            FileNotFoundError: The table holds neither.
        """
        name = self.names[row]
        for part in self.parts:
            if row < part.count:
                break
            row -= part.count
        found = part.path(name) if isinstance(part, Files) else part.locate(row)
        if isinstance(found, bytes) or found.startswith("/"):
            return found
        return os.path.join(Path.cwd(), found)

    def paths(self) -> Iterator[str | None]:
        """Path of each file, whole or from the folder one is in; None for rows of a table."""
        start = 0
        for part in self.parts:
            names = itertools.islice(self.names, start, start + part.count)
            yield from map(part.path, names) if isinstance(part, Files) else (None for _ in names)
            start += part.count


def open_images(
    root: Path,
    *,
    labels: Path | None = None,
    labels_root: Path | None = None,
    group_column: str | None = None,
    test: Path | None = None,
    stream: bool = False,
) -> ImageSet:
    """Find the images of a folder, with the labels and splits that its layout or a label file tells.

    Args:
        root: A folder of images at any depth, a folder of class folders, of `train/ val/ test/` folders,
            of Parquet files or tar archives, or one written by `datasets`' `save_to_disk`; or an address of such.
        labels: A CSV, TSV or JSONL file, or a folder of class folders.
        labels_root: Folder the label file's paths start from.
        group_column: Column of the label file, or of a table that `datasets` reads, whose images may not be torn apart.
        test: Folder of test images, inside `root` or elsewhere.
        stream: Take a sample of the shards in `root` only, and leave the others where they are.

    Raises:
        DataError: There are no images, or the labels cannot be matched to them.
    """
    has_file = labels is not None and not labels.is_dir()
    images = _open_sample(root) if stream else _open_folder(root, None if has_file else group_column)
    if group_column is not None and not has_file and (stream or images.layout != "dataset"):
        raise UsageError(
            f"--group-column {group_column}: is a column of a label file; give --labels FILE too."
        )
    if test is not None:
        images = _add_test(images, test)
    if labels is not None and labels.is_dir():
        images = _add_labeled_folder(images, labels)
    elif labels is not None:
        rows, note = read_label_table(labels, group_column)
        if stream and any(row.split == "test" for row in rows):
            raise DataError(
                f"--labels {labels}: has test rows, and of a stream only a sample is at hand to find them in; give the test images as --test FOLDER."
            )
        found = match_labels(rows, labels, images.names, images.root, labels_root)
        images = replace(
            images,
            labels=[
                found.labels.get(name, label if name.startswith(OUTSIDE[0]) or not found.labels else None)
                for name, label in zip(images.names, images.labels, strict=True)
            ],
            splits=[
                found.splits.get(name, split) for name, split in zip(images.names, images.splits, strict=True)
            ],
            layout=f"{images.layout}, labels from {labels.name}",
            notes=images.notes + ([note] if note else []) + found.notes,
            groups=[found.groups.get(name) for name in images.names],
        )
    return replace(images, notes=images.notes + _classes_alike(images.labels))


def _classes_alike(labels: list[str | None]) -> list[str]:
    """Notes on classes whose names differ in case or spaces only."""
    spelt: dict[str, set[str]] = defaultdict(set)
    for label in set(labels) - {None}:
        spelt["".join(str(label).casefold().split())].add(str(label))
    return [
        f"classes {' and '.join(map(repr, sorted(names)))} differ in case or spaces only; they count as different"
        for _, names in sorted(spelt.items())
        if len(names) > 1
    ]


def open_given(images: list[Path]) -> ImageSet:
    """Take what a command was given: one folder, files, `-` for a list of files on standard input, or `@FILE` for one in a file.

    Raises:
        DataError: As in `open_images` and `open_files`, or a list is empty or cannot be read.
    """
    if len(images) == 1 and images[0].is_dir():
        return open_images(images[0])
    is_list = len(images) == 1 and (str(images[0]) == "-" or str(images[0]).startswith("@"))
    if is_list and not images[0].exists():
        return _as_files(_read_list(str(images[0])))
    return open_files(images)


def open_files(files: list[Path]) -> ImageSet:
    """Take single files as images, by the names they were given; whether they can be read shows later.

    Raises:
        DataError: One is not there, or is a folder.
    """
    for file in files:
        if not file.is_file():
            kind = "a folder; give one folder, or files" if file.is_dir() else "no such file"
            raise DataError(f"{file}: {kind}.")
        if not is_utf8(str(file)):
            raise DataError(f"{file}: its name is not UTF-8; rename it.")
    return _as_files([str(file) for file in files])


def _as_files(names: list[str]) -> ImageSet:
    """Files by name, there or not."""
    none: list[str | None] = [None] * len(names)
    return ImageSet(Path(), names, none, none, "files", {}, [], [Files(Path(), len(names))])


def _read_list(given: str) -> list[str]:
    """Names of files, one a line, or between NULs as `find -print0` writes them; they start from the folder one is in.

    A name that is not UTF-8 gets its bytes in words, by which it will be found missing.
    """
    try:
        text = sys.stdin.buffer.read() if given == "-" else Path(given[1:]).read_bytes()
    except OSError as error:
        raise DataError(f"{given[1:]}: this list of images cannot be read ({error.strerror}).") from None
    lines = text.removeprefix(b"\xef\xbb\xbf").split(b"\0" if b"\0" in text else b"\n")
    names = [line.removesuffix(b"\r").decode("utf-8", "backslashreplace") for line in lines]
    names = [name for name in names if name]
    if not names:
        raise DataError(f"{'standard input' if given == '-' else given[1:]}: names no image.")
    return names


def _open_sample(root: Path) -> ImageSet:
    """The sample that stands for a stream, by the names that its images have in their shards."""
    shards, sample = open_shards(root)
    table = load_tables("parquet", data_files=glob.escape(str(sample)))["train"]
    names, labels = list(table["name"]), list(table["label"])
    images = table.select_columns("image").cast_column("image", datasets.Image(decode=False))
    none: list[str | None] = [None] * len(names)
    return ImageSet(
        root, names, labels, none, "dataset", {}, list(shards.notes), [TableRows(images)], shards=shards
    )


def _open_folder(root: Path, group_column: str | None = None) -> ImageSet:
    address = address_of(root)
    if address is not None:
        if not address.startswith("hf://datasets/"):
            raise UsageError(f"{address}: is read as a stream only: labelwise pretrain {address} --stream.")
        return _from_datasets(root, _load_from_hub(address.removeprefix("hf://datasets/")), group_column)
    if not root.exists():
        raise DataError(f"{root}: no such folder.")
    if not is_utf8(str(root.absolute())):
        raise DataError(f"{root}: its name, or that of a folder it lies in, is not UTF-8; rename it.")
    if not root.is_dir():
        raise DataError(f"{root}: a file, not a folder of images.")
    if (root / "dataset_info.json").exists() or (root / "dataset_dict.json").exists():
        with reaching(str(root)):
            return _from_datasets(root, datasets.load_from_disk(str(root)), group_column)
    names, ignored, notes = _walk(root)
    if not names:
        parquet = sorted(str(path) for path in root.rglob("*.parquet"))
        if parquet:
            files = _parquet_splits(root, parquet)
            with reaching(str(root)):
                return _from_datasets(
                    root, _one_or_all(load_tables("parquet", data_files=files)), group_column
                )
        if next(root.rglob("*.tar"), None) is not None:
            with reaching(str(root)):
                return _from_datasets(root, _one_or_all(load_archives(root)), group_column)
        found = ", ".join(
            f"{count} {suffix or 'without suffix'}" for suffix, count in Counter(ignored).most_common(5)
        )
        raise DataError(
            f"{root}: no images found; looked for {' '.join(SUFFIXES[:6])} ... in it and its folders, "
            f"found {found or 'nothing'}." + "".join(f" {note}." for note in notes)
        )
    labels, splits, layout, layout_notes = _read_layout(names)
    return ImageSet(
        root, names, labels, splits, layout, ignored, notes + layout_notes, [Files(root, len(names))]
    )


def _parquet_splits(root: Path, files: list[str]) -> dict[str, list[str]]:
    """Sort Parquet files by the split that a folder or the file's name tells; train where none does."""
    splits: dict[str, list[str]] = {}
    for file in files:
        words = re.split(r"[/_.-]", os.path.relpath(file, root).lower())
        split = next((SPLITS[word] for word in words if word in SPLITS), "train")
        splits.setdefault(split, []).append(glob.escape(file))
    return splits


def _walk(root: Path) -> tuple[list[str], dict[str, int], list[str]]:
    """List image files below a folder, folder by folder; links to folders, hidden and system folders are left out."""
    found: list[str] = []
    ignored: Counter[str] = Counter()
    odd_names = linked = 0
    for folder, folders, files in os.walk(root, followlinks=False):
        below = "" if Path(folder) == root else f"{os.path.relpath(folder, root)}/"
        linked += sum(os.path.islink(os.path.join(folder, name)) for name in folders)
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and name not in _IGNORED_FOLDERS
        )
        for name in files:
            path = os.path.join(folder, name)
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith(".") or suffix not in SUFFIXES or not os.path.isfile(path):
                ignored[suffix] += 1
            elif not is_utf8(path):
                odd_names += 1
            else:
                found.append(below + name)
    notes = []
    if odd_names:
        notes.append(f"{odd_names} files left out because their names are not UTF-8; rename them")
    if linked:
        notes.append(f"{linked} linked folders not followed")
    return sorted(found, key=lambda name: name.replace("/", "\0")), dict(ignored), notes


def _read_layout(names: list[str]) -> tuple[list[str | None], list[str | None], str, list[str]]:
    """Read labels and splits off the folders: the class is the first folder below root or split."""
    tops = {name.partition("/")[0] for name in names if "/" in name}
    split_tops = {top for top in tops if top.lower() in SPLITS}
    has_both = {"train", "test"} <= {SPLITS[top.lower()] for top in split_tops}
    is_split = bool(split_tops) and (split_tops == tops or has_both)
    splits: list[str | None] = []
    labels: list[str | None] = []
    loose = outside = 0
    for part in (name.split("/", 2) for name in names):
        inside = is_split and part[0] in split_tops and len(part) > 1
        outside += is_split and not inside
        below = part[1:] if inside else part
        splits.append(SPLITS[part[0].lower()] if inside else None)
        folder = below[0] if len(below) > 1 and (inside or not is_split) else None
        labels.append(folder and sys.intern(unicodedata.normalize("NFC", folder)))
        loose += labels[-1] is None
    has_classes = any(label is not None for label in labels)
    notes = []
    if outside:
        notes.append(f"{outside} images lie beside the split folders, without a label")
    if has_classes and loose > outside:
        notes.append(f"{loose - outside} images lie beside the class folders, without a label")
    layout = {
        (False, False): "flat folder",
        (False, True): "class folders",
        (True, False): "split folders",
        (True, True): "split folders of class folders",
    }
    return labels, splits, layout[is_split, has_classes], notes


def _from_datasets(
    root: Path, loaded: datasets.Dataset | datasets.DatasetDict, group_column: str | None
) -> ImageSet:
    """Read a table of images that the `datasets` library knows."""
    pieces = loaded if isinstance(loaded, datasets.DatasetDict) else {"": loaded}
    names: list[str] = []
    labels: list[str | None] = []
    splits: list[str | None] = []
    groups: list[str | None] = []
    tables = []
    for split, piece in pieces.items():
        image = next((name for name in IMAGE_COLUMNS if name in piece.column_names), None)
        if image is None:
            raise DataError(
                f"{root}: no image column; looked for {', '.join(IMAGE_COLUMNS)}, found {', '.join(piece.column_names)}."
            )
        label = next((name for name in LABEL_COLUMNS if name in piece.column_names), None)
        if group_column is not None and group_column not in piece.column_names:
            raise DataError(f"{root}: no group column {group_column}; found {', '.join(piece.column_names)}.")
        width = len(str(len(piece)))
        names += [f"{split or 'row'}/{row:0{width}d}" for row in range(len(piece))]
        splits += [SPLITS.get(str(split).lower())] * len(piece)
        labels += _label_texts(piece, label) if label else [None] * len(piece)
        values = _label_texts(piece, group_column) if group_column else [None] * len(piece)
        groups += [value.strip() or None if value else None for value in values]
        tables.append(
            piece.select_columns(image)
            .rename_columns({} if image == "image" else {image: "image"})
            .cast_column("image", datasets.Image(decode=False))
        )
    return ImageSet(
        root,
        names,
        labels,
        splits,
        "dataset",
        {},
        [],
        [TableRows(datasets.concatenate_datasets(tables))],
        groups,
    )


def _one_or_all(loaded: datasets.DatasetDict) -> datasets.Dataset | datasets.DatasetDict:
    """The table alone where files name no split."""
    return loaded["train"] if list(loaded) == ["train"] else loaded


def _load_from_hub(name: str) -> datasets.DatasetDict:
    """All splits of a data set of the Hugging Face hub, copied to this disk by `datasets`."""
    name, _, revision = name.partition("@")
    try:
        loaded: datasets.DatasetDict = load_tables(name, revision=revision or None)
    except (OSError, ValueError) as error:
        raise LabelwiseError(
            f"hf://{name}: cannot be loaded ({type(error).__name__}: {str(error)[:200]})."
        ) from None
    return loaded


def _label_texts(piece: datasets.Dataset, column: str) -> list[str | None]:
    feature = piece.features[column]
    values = piece[column]
    if isinstance(feature, datasets.ClassLabel):
        return [feature.int2str(value) if value is not None and value >= 0 else None for value in values]
    return [None if value is None else str(value) for value in values]


def _add_test(images: ImageSet, test: Path) -> ImageSet:
    """Mark a folder inside the root as test images, or append one that lies elsewhere."""
    if not test.is_dir():
        raise DataError(f"--test {test}: no such folder.")
    root, folder = images.root.resolve(), test.resolve()
    if folder != root and folder.is_relative_to(root) and images.shards is None:
        inside = folder.relative_to(root).as_posix() + "/"
        relative = _open_folder(test)
        known = dict(zip(relative.names, relative.labels, strict=True))
        marked = [name.startswith(inside) for name in images.names]
        if not any(marked):
            raise DataError(f"--test {test}: no images found in it.")
        labels = [
            known.get(name.removeprefix(inside)) if is_test else label
            for name, label, is_test in zip(images.names, images.labels, marked, strict=True)
        ]
        splits = [
            "test" if is_test else (None if split == "test" else split)
            for split, is_test in zip(images.splits, marked, strict=True)
        ]
        return replace(
            images, labels=labels, splits=splits, layout=f"{images.layout}, test images in {inside}"
        )
    return _append(images, _open_folder(test), "test", f"test images from {test}")


def _add_labeled_folder(images: ImageSet, labels: Path) -> ImageSet:
    """Add class folders that lie outside the pool; labeled images there are images of the set."""
    if labels.resolve() == images.root.resolve():
        return images
    labeled = _open_folder(labels)
    if labels.resolve().is_relative_to(images.root.resolve()):
        inside = labels.resolve().relative_to(images.root.resolve()).as_posix() + "/"
        known = {inside + name: label for name, label in zip(labeled.names, labeled.labels, strict=True)}
        return replace(images, labels=[known.get(name) for name in images.names])
    if not any(label is not None for label in labeled.labels):
        raise DataError(
            f"--labels {labels}: a folder without class folders in it; put each class into its own folder."
        )
    return _append(images, labeled, None, f"labeled images from {labels}")


def _append(images: ImageSet, more: ImageSet, split: str | None, words: str) -> ImageSet:
    prefix = OUTSIDE[0] if split == "test" else OUTSIDE[1]
    return replace(
        images,
        names=images.names + [prefix + name for name in more.names],
        labels=images.labels + more.labels,
        splits=images.splits + [split or own for own in more.splits],
        groups=images.groups + more.groups,
        layout=f"{images.layout}, {words}",
        notes=images.notes + more.notes,
        parts=images.parts
        + [replace(part, prefix=prefix) if isinstance(part, Files) else part for part in more.parts],
    )
