"""The tables that commands write: CSV for spreadsheets, Parquet for programs; and parts of one that is not done yet."""

import csv
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from labelwise import rundir, terminal
from labelwise.errors import UsageError

TEXT, NUMBER, FLAG, TEXTS = pa.string(), pa.float32(), pa.bool_(), pa.list_(pa.string())
Columns = dict[str, pa.DataType]
FORMULA_SIGNS = ("=", "+", "-", "@", "\t", "\r")  # that a spreadsheet begins to compute at
_ROWS = 8192  # of a group in a Parquet file, and of a part
_SAVE_SECONDS = 5.0
_MANIFEST = "manifest.json"
_ENDS_AT, _LEFT_OUT = b"ends_at", b"left_out"  # in the header of a part


class Table(Protocol):
    """A table that rows are added to."""

    def write(self, columns: dict[str, Any]) -> None:
        """Add rows, given by column."""


@contextmanager
def open_table(path: Path, suffix: str, columns: Columns) -> Iterator[Table]:
    """Begin a table.

    Args:
        path: The file; what is there is replaced.
        suffix: ".csv" or ".parquet".
        columns: Name and kind of each. In a CSV, a text that begins like a formula gets `'` before it, a file `./`, and texts of one
            cell stand between `|`; Parquet has all as they are.
    """
    if suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            yield _Csv(writer, columns)
        return
    schema = pa.schema(list(columns.items()))
    with pq.ParquetWriter(path, schema) as parquet:
        table = _Parquet(parquet, schema)
        yield table
        table.flush()


@contextmanager
def open_embeddings(
    path: Path, suffix: str
) -> Iterator[Callable[[list[str], npt.NDArray[np.float32]], None]]:
    """Give what takes names and their features, (B, F), and writes them to a file.

    Args:
        path: Where.
        suffix: ".parquet", written some at a time; or ".npz", held until the end.
    """
    if suffix == ".npz":
        files: list[str] = []
        features: list[npt.NDArray[np.float32]] = []

        def keep(names: list[str], values: npt.NDArray[np.float32]) -> None:
            files.extend(names)
            features.append(values)

        yield keep
        if features:
            with path.open("wb") as file:
                np.savez(file, files=np.array(files), embeddings=np.concatenate(features))
        return
    table: _Parquet | None = None

    def write(names: list[str], values: npt.NDArray[np.float32]) -> None:
        nonlocal table
        if table is None:
            schema = pa.schema(
                [("file", pa.string()), ("embedding", pa.list_(pa.float32(), values.shape[1]))]
            )
            table = _Parquet(pq.ParquetWriter(path, schema), schema)
        table.write({"file": names, "embedding": list(values)})

    try:
        yield write
        if table is not None:
            table.flush()
    finally:
        if table is not None:
            table.close()


class _Csv:
    """Rows of a CSV file, one after the other."""

    def __init__(self, writer: Any, columns: Columns) -> None:
        self._writer, self._columns = writer, columns

    def write(self, columns: dict[str, Any]) -> None:
        """Add rows; numbers with six digits after the point."""
        cells = [_cells(name, kind, columns[name]) for name, kind in self._columns.items()]
        self._writer.writerows(zip(*cells, strict=True))


def _cells(name: str, kind: pa.DataType, values: Iterable[Any]) -> list[str]:
    if kind == NUMBER:
        return [f"{value:.6f}" for value in values]
    if kind == FLAG:
        return ["true" if value else "false" for value in values]
    if kind == TEXTS:
        values = [
            "|".join(each.replace("\\", "\\\\").replace("|", "\\|") for each in value) for value in values
        ]
    before = "./" if name == "file" else "'"
    return [_no_formula(value, before) for value in values]


def _no_formula(text: str, before: str) -> str:
    """A text with a mark before it if a spreadsheet would compute it; `./` leaves a path the same path."""
    if not text.startswith(FORMULA_SIGNS) or _is_number(text):
        return text
    return before + text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class _Parquet:
    """Rows of a Parquet file."""

    def __init__(self, writer: pq.ParquetWriter, schema: pa.Schema) -> None:
        self._writer, self._schema = writer, schema
        self._waiting: list[pa.Table] = []

    def write(self, columns: dict[str, Any]) -> None:
        """Add rows; some are kept back, so that the file has few groups of many rows."""
        self._waiting.append(pa.table(columns, schema=self._schema))
        if sum(map(len, self._waiting)) >= _ROWS:
            self.flush()

    def flush(self) -> None:
        """Write what was kept back."""
        if self._waiting:
            self._writer.write_table(pa.concat_tables(self._waiting))
            self._waiting = []

    def close(self) -> None:
        """End the file."""
        self._writer.close()


# --- a table that is made some at a time, and gone on with


class Parts:
    """Rows that are done, in files beside the table that they will be, each written in one step.

    Attributes:
        done: So many images were looked at, by this process and those before.
        rows: So many of them have a row.
    """

    def __init__(self, folder: Path, columns: Columns) -> None:
        self._folder, self._schema = folder, pa.schema(list(columns.items()))
        self._files: list[Path] = []
        self._waiting: list[pa.Table] = []
        self._left_out: list[dict[str, str]] = []
        self._saved_at = time.monotonic()
        self.done = self._saved = self.rows = 0
        while (file := self._name(self.done)).exists():
            try:
                known = pq.read_metadata(file)
                self.done = self._saved = int(known.metadata[_ENDS_AT])
            except (OSError, pa.ArrowException):  # damaged; its images are looked at again
                break
            self._files.append(file)
            self.rows += known.num_rows

    @property
    def are_there(self) -> bool:
        """Whether a file is."""
        return bool(self._files)

    def add(self, done: int, columns: dict[str, Any], left_out: list[dict[str, str]]) -> None:
        """Add the rows of some images, and those that have none; what was added since the last file is saved now and then."""
        self.done = done
        self._waiting.append(pa.table(columns, schema=self._schema))
        self.rows += len(self._waiting[-1])
        self._left_out += left_out
        is_late = time.monotonic() - self._saved_at > _SAVE_SECONDS
        if is_late or sum(map(len, self._waiting)) >= _ROWS:
            self.save()

    def save(self) -> None:
        """Write what was added since the last file."""
        if self.done > self._saved:
            header = {_ENDS_AT: str(self.done), _LEFT_OUT: json.dumps(self._left_out)}
            part = pa.concat_tables([self._schema.empty_table(), *self._waiting]).replace_schema_metadata(
                header
            )
            file = self._name(self._saved)
            rundir.write_atomically(file, lambda fresh: pq.write_table(part, fresh))
            self._files.append(file)
        self._waiting, self._left_out = [], []
        self._saved, self._saved_at = self.done, time.monotonic()

    def read(self) -> Iterator[tuple[dict[str, list[Any]], list[dict[str, str]]]]:
        """Rows by column and what was left out, in the order of the images, some at a time; what was added last is saved first."""
        self.save()
        for file in self._files:
            part = pq.read_table(file)
            yield part.to_pydict(), json.loads(part.schema.metadata[_LEFT_OUT])

    def finish(self, out: Path, write: Callable[[Path], object]) -> None:
        """Let `write` fill the table, and move it into place."""
        whole = self._folder / out.name
        rundir.write_atomically(whole, write)
        whole.replace(out)
        rundir.flush(out.parent)

    def _name(self, first: int) -> Path:
        return self._folder / f"{first:012}.parquet"


@contextmanager
def open_parts(out: Path, columns: Columns, identity: str) -> Iterator[Parts]:
    """Begin a table, or go on with one, in a hidden folder beside it; it goes when all is done, and stays when an error comes.

    Args:
        out: The table.
        columns: As in `open_table`.
        identity: Of all that decides the rows; parts of another one are removed, which is said.

    Raises:
        UsageError: Another process makes this table.
    """
    folder = _beside(out)
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"--out {out}: another command is writing it; name another file.") from None
        _begin(folder, out, identity)
        parts = Parts(folder, columns)
        if parts.done:
            terminal.say(f"going on   {parts.done:,} images are done already")
        try:
            yield parts
        except BaseException:
            if not parts.are_there:
                shutil.rmtree(folder)
            raise
        shutil.rmtree(folder)
    finally:
        os.close(descriptor)


def remove_parts_of_whole(out: Path) -> None:
    """Remove what a process left that was killed after the table was in place."""
    if out.exists() and (_beside(out) / _MANIFEST).exists():
        shutil.rmtree(_beside(out), ignore_errors=True)


def _beside(out: Path) -> Path:
    return out.with_name(f".{out.name}-partial")


def _begin(folder: Path, out: Path, identity: str) -> None:
    """Keep what a folder holds only if it is of this identity."""
    manifest = rundir.read_derived(folder / _MANIFEST)
    if manifest == {"identity": identity}:
        return
    for file in folder.iterdir():
        file.unlink()
    if manifest is not None:
        terminal.warn(f"{out}: was begun with another classifier, other images or options; it begins anew.")
    rundir.write_json(folder / _MANIFEST, {"identity": identity})
