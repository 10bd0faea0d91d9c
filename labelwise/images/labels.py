"""Label files: read as text, matched to images by path or by unique base name."""

import csv
import io
import json
import math
import os
import unicodedata
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labelwise.errors import DataError
from labelwise.images.label_studio import read_label_studio
from labelwise.tables import FORMULA_SIGNS

SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".jp2",
    ".avif",
    ".heic",
    ".heif",
)
SPLITS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test", "testing": "test",
}  # fmt: skip
PATH_COLUMNS = ("file_name", "image_path", "image", "path", "filename", "file")
ID_COLUMNS = ("image_id", "id")  # file names without their suffix, where no column has whole ones
LABEL_COLUMNS = ("label", "class", "choice", "category", "tag")
OUTSIDE = ("test:", "labels:")  # before the name of an image that lies outside the image folder
_MARKED = tuple(f"'{sign}" for sign in FORMULA_SIGNS)
_LISTED = 5

Table = tuple[
    list[str], list[tuple[int, dict[str, Any]]], list[str]
]  # columns; line number and cells of each row; notes


@dataclass(frozen=True)
class LabelRow:
    """One row of a label file, and the line it stands on."""

    line: int
    path: str
    label: str | None
    split: str | None
    group: str | None = None


@dataclass(frozen=True)
class Matched:
    """What a label file says of the images, by image name, and notes that say the outcome."""

    labels: dict[str, str]
    splits: dict[str, str]
    groups: dict[str, str]
    notes: list[str]


def read_label_table(file: Path, group_column: str | None = None) -> tuple[list[LabelRow], str]:
    """Read a CSV, TSV or JSONL file, or Label Studio's JSON; every cell is text, so `001` and `NA` stay what they are.

    With a group column, rows without a label count too: unlabeled images have a patient or a site as well.
    Columns without a known name are found by what is in them, where only one can be meant.

    Returns:
        Its rows, and a note on what had to be guessed.

    Raises:
        DataError: The file cannot be read, lacks a column, or holds several labels in one cell.
    """
    if not file.exists():
        raise DataError(f"--labels {file}: no such file.")
    read = _READERS.get(file.suffix.lower(), _read_delimited)
    try:
        columns, rows, notes = read(file)
    except OSError as error:
        raise DataError(f"--labels {file}: cannot be read ({error.strerror}).") from None
    if any(name.lower().endswith(SUFFIXES) for name in columns):
        raise DataError(
            f"{file}: its first line names an image, not columns; put a line like file,label before it."
        )
    columns, rows = _with_known_names(columns, rows, group_column)
    if twice := sorted({name for name in columns if columns.count(name) > 1}):
        raise DataError(f"{file}: has the column {twice[0]!r} twice; rename one.")
    if group_column is not None:
        _column(file, columns, (group_column,), "group")

    def filled(name: str) -> list[str]:
        return [str(row[name]).strip() for _, row in rows if row.get(name)]

    path_columns: tuple[str, ...] = PATH_COLUMNS
    if not any(name in columns for name in PATH_COLUMNS):
        path_columns = tuple(name for name in columns if _are_files(filled(name)))
    known_columns = (*PATH_COLUMNS, *ID_COLUMNS)
    path_column = _column(file, columns, path_columns if len(path_columns) == 1 else known_columns, "path")
    label_columns = tuple(name for name in LABEL_COLUMNS if name in columns)
    notes += [f"labels from its column {label_columns[0]!r}, not {name!r}" for name in label_columns[1:]]
    if not label_columns and group_column is None:
        others = tuple(name for name in columns if name not in (path_column, "split"))
        label_columns = others if len(others) == 1 and _are_classes(filled(others[0])) else ()
    has_labels = group_column is None or bool(label_columns)
    label_column = _column(file, columns, label_columns or LABEL_COLUMNS, "label") if has_labels else None
    notes += [
        f"{what} from its column {name!r}"
        for what, name, known in (
            ("images", path_column, known_columns),
            ("labels", label_column, LABEL_COLUMNS),
        )
        if name is not None and name not in known
    ]
    result = []
    for line, row in rows:
        path, label = row.get(path_column), row.get(label_column) if label_column else None
        if isinstance(label, list) or holds_several(label):
            raise DataError(
                f"{file}, line {line}: several labels in one cell ({label}); Labelwise classifies with one label per image."
            )
        found, group = _text(label), _text(row.get(group_column)) if group_column else None
        said = _text(row.get("split"))
        split = SPLITS.get(said.lower()) if said is not None else None
        if said is not None and split is None:
            raise DataError(
                f"{file}, line {line}: split {said!r} is none of {', '.join(sorted(SPLITS))}; write one of them, or rename the column."
            )
        if path and (found or group or split):
            result.append(LabelRow(line, str(path), found, split, group))
    if not any(row.label or row.group for row in result):
        raise DataError(f"{file}: no labeled rows in it.")
    return result, f"{file.name}: {', '.join(notes)}" if notes else ""


def _with_known_names(
    columns: list[str], rows: list[tuple[int, dict[str, Any]]], group_column: str | None
) -> tuple[list[str], list[tuple[int, dict[str, Any]]]]:
    """Columns as we know them where only large letters differ, without those in which nothing stands."""
    known = {*PATH_COLUMNS, *ID_COLUMNS, *LABEL_COLUMNS, "split"}
    names = {
        name: name.lower() if name.lower() in known - set(columns) and name != group_column else name
        for name in columns
    }
    filled = {name for name in columns if any(_text(row.get(name)) is not None for _, row in rows)}
    kept = [names[name] for name in columns if name in filled or name == group_column or names[name] in known]
    return kept, [
        (line, {names[name]: cell for name, cell in row.items() if name in names}) for line, row in rows
    ]


def match_labels(
    rows: list[LabelRow], file: Path, names: list[str], root: Path, labels_root: Path | None
) -> Matched:
    """Find the image of each row: by its path relative to the label file, to `labels_root` or the
    images, then by base name where that is unique; with or without the file's suffix.

    Raises:
        DataError: Nothing matches, or rows of one image disagree.
    """
    whole: dict[str, str] = {}
    bare: dict[str, list[str]] = defaultdict(list)
    by_base: dict[str, list[str]] = defaultdict(list)
    for name in names:
        base = _normal(os.path.basename(name.removeprefix(OUTSIDE[0]).removeprefix(OUTSIDE[1])))
        by_base[base].append(name)
        if (stem := _stem(base)) != base:
            by_base[stem].append(name)
        if not name.startswith(OUTSIDE):
            path = _normal(os.path.normpath(root.resolve() / name))
            whole[path] = name
            bare[_stem(path)].append(name)
    by_path = {path: same[0] for path, same in bare.items() if len(same) == 1} | whole
    starts = [file.resolve().parent, *([labels_root.resolve()] if labels_root else []), root.resolve()]
    labels: dict[str, str] = {}
    splits: dict[str, str] = {}
    groups: dict[str, str] = {}
    matched: set[str] = set()
    unknown: list[str] = []
    ambiguous: list[str] = []
    by_name_alone = 0
    for row in rows:
        match = _find_path(row.path, starts, by_path)
        if match is None:
            same = by_base.get(_normal(os.path.basename(row.path.replace("\\", "/"))), [])
            if len(same) != 1:
                what = f"{row.path} (line {row.line}"
                ambiguous.append(f"{what}; {len(same)} images of that name)") if same else unknown.append(
                    f"{what})"
                )
                continue
            match, by_name_alone = same[0], by_name_alone + 1
        matched.add(match)
        said_of_it = (
            (row.label, labels, "labeled"),
            (row.group, groups, "in group"),
            (row.split, splits, "in split"),
        )
        for said, known, words in said_of_it:
            if said is not None and known.setdefault(match, said) != said:
                raise DataError(
                    f"{file}, line {row.line}: {row.path} is {words} {said!r} here and {known[match]!r} before; keep one."
                )
    if not matched:
        raise DataError(
            f"{file}: none of its {len(rows)} paths matches an image in {root}, e.g. {rows[0].path}; name their folder with --labels-root."
        )
    alone = f" ({by_name_alone} of them by file name alone)" if by_name_alone else ""
    count = len(rows) - len(unknown) - len(ambiguous)
    outcome = f"{len(rows)} rows: {count} matched{alone}, {len(unknown)} unknown{_list(unknown)}"
    outcome += f", {len(ambiguous)} ambiguous{_list(ambiguous)}" if ambiguous else ""
    return Matched(labels, splits, groups, [outcome])


def _list(found: list[str]) -> str:
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return f": {', '.join(found[:_LISTED])}{more}" if found else ""


def _text(cell: object) -> str | None:
    """The text of a cell; None where there is none."""
    if isinstance(cell, float) and math.isnan(cell):
        return None  # as pandas writes nothing
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)  # JSON's 1.0 is 1
    return _normal(str(cell).strip()) or None if cell is not None else None


def _find_path(path: str, starts: list[Path], by_path: dict[str, str]) -> str | None:
    places = (_normal(os.path.normpath(start / path.replace("\\", "/"))) for start in starts)
    return next((by_path[place] for place in places if place in by_path), None)


def _stem(path: str) -> str:
    """A path without the suffix of an image."""
    start, suffix = os.path.splitext(path)
    return start if suffix.lower() in SUFFIXES else path


def _normal(path: str) -> str:
    return unicodedata.normalize("NFC", path)


def _decode(file: Path, data: bytes) -> tuple[str, list[str]]:
    """Text of a table, and a note if what it is written in had to be guessed."""
    try:
        if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
            return data.decode("utf-16"), []
        return data.decode("utf-8-sig"), []
    except UnicodeDecodeError:
        pass
    try:
        return data.decode("cp1252"), ["read as Windows-1252, as it is not UTF-8"]
    except UnicodeDecodeError:
        raise DataError(f"{file}: not text in UTF-8, UTF-16 or Windows-1252.") from None


def _read_delimited(file: Path) -> Table:
    data = file.read_bytes()
    text, notes = _decode(file, data)
    lines = text.splitlines()
    if not lines or "\0" in text:
        raise DataError(f"{file}: {'not text: it has NUL bytes in it' if lines else 'empty'}.")
    header = lines[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count))
    rows: list[tuple[int, dict[str, Any]]] = []
    line = 1
    try:
        columns = [column.strip() for column in next(reader)]
        line = reader.line_num + 1
        for cells in reader:
            if len(cells) > len(columns):
                raise DataError(
                    f"{file}: not a table: line {line} has {len(cells)} cells and the header {len(columns)}."
                )
            if cells:
                rows.append((line, dict(zip(columns, map(_without_mark, cells), strict=False))))
            line = reader.line_num + 1
    except csv.Error as error:
        most = csv.field_size_limit()
        words = f"has a cell of more than {most:,} letters; is a quote left open?"
        words = words if "limit" in str(error) else f"cannot be read ({error})."
        raise DataError(f"{file}: not a table: line {line} {words}") from None
    return columns, rows, notes


def _read_jsonl(file: Path) -> Table:
    rows: list[tuple[int, dict[str, Any]]] = []
    try:
        lines = file.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise DataError(f"{file}: not text in UTF-8.") from None
    for line, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{file}: not JSON lines: line {line}: {error}.") from None
        except RecursionError:
            raise DataError(f"{file}: not JSON lines: line {line} is nested too deep.") from None
        except ValueError:  # Python's words on digits
            raise DataError(f"{file}: not JSON lines: line {line} has a number of too many digits.") from None
        if not isinstance(row, dict):
            raise DataError(f"{file}: not JSON lines: line {line} is not an object in braces.")
        rows.append((line, row))
    return list(dict.fromkeys(name for _, row in rows for name in row)), rows, []


_READERS: dict[str, Callable[[Path], Table]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": read_label_studio,
}


def _without_mark(cell: str) -> str:
    """A cell without the `'` that keeps a spreadsheet from computing what follows; our own tables have it."""
    return cell[1:] if cell.startswith(_MARKED) else cell


def _are_files(cells: list[str]) -> bool:
    """Whether all cells of a column end as image files do."""
    return bool(cells) and all(cell.lower().endswith(SUFFIXES) for cell in cells)


def _are_classes(cells: list[str]) -> bool:
    """Whether the cells of a column repeat as the names of classes do."""
    return bool(cells) and 2 * len(set(cells)) <= len(cells)


def _column(file: Path, columns: list[str], known: tuple[str, ...], what: str) -> str:
    found = next((name for name in known if name in columns), None)
    if found is None:
        raise DataError(
            f"{file}: no {what} column; looked for {', '.join(known)}, found {', '.join(columns) or 'nothing'}; rename the one that is it."
        )
    return found


def holds_several(label: object) -> bool:
    """Whether a cell looks like a list: `cat,dog`, `cat;dog`, `cat|dog` or `["cat", "dog"]`."""
    if not isinstance(label, str):
        return False
    text = label.strip()
    return (text.startswith("[") and text.endswith("]")) or any(mark in text for mark in (",", ";", "|"))
