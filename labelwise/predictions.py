"""predictions.parquet: every test prediction behind the report; and the tables that `predict` and `embed` write."""

import csv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from labelwise import rundir
from labelwise.errors import CheckpointError

_SCHEMA = pa.schema(
    [
        ("method", pa.string()),
        ("labels", pa.int64()),
        ("draw", pa.int64()),
        ("name", pa.string()),
        ("label", pa.string()),
        ("group", pa.int64()),
        ("prediction", pa.string()),
        ("probabilities", pa.list_(pa.float32())),
    ]
)
_KEY = ("method", "labels", "draw")  # of a classifier
_ROWS = 8192  # of a group in a Parquet file
COLUMNS = tuple(_SCHEMA.names)
CONFIDENCE = "confidence"


def store_predictions(
    path: Path,
    method: str,
    draw: int,
    labels: int,
    *,
    names: list[str],
    truth: list[str],
    groups: list[int],
    predicted: list[str],
    probabilities: npt.NDArray[np.float32],
) -> None:
    """Put one classifier's predictions into the file, in place of earlier ones of the same three.

    The file is sorted by these three, so that it is the same whichever classifier is done first.

    Args:
        path: predictions.parquet.
        method, draw, labels: Which classifier; `labels` is how many it learned from.
        names, truth, predicted: Of T test images.
        groups: Number of each one's group; images of one number belong together.
        probabilities: In the order of the classes' names, (T, C).
    """
    count = len(names)
    columns = {
        "method": [method] * count,
        "labels": [labels] * count,
        "draw": [draw] * count,
        "name": names,
        "label": truth,
        "group": groups,
        "prediction": predicted,
        "probabilities": list(probabilities),
    }
    table = pa.table(columns, schema=_SCHEMA)
    if path.exists():
        before = _read(path)
        same = pc.and_(
            pc.and_(pc.equal(before["method"], method), pc.equal(before["labels"], labels)),
            pc.equal(before["draw"], draw),
        )
        table = pa.concat_tables([before.filter(pc.invert(same)), table])
        table = table.sort_by([(key, "ascending") for key in _KEY])
    rundir.write_atomically(path, lambda fresh: pq.write_table(table, fresh))


def copy_predictions(source: Path, target: Path, keys: set[tuple[str, int, int]]) -> None:
    """Add the predictions of some classifiers to another file, in place of any that it has of these.

    Args:
        source, target: predictions.parquet; the target may not be there yet.
        keys: Method, number of labels and draw of each.

    Raises:
        CheckpointError: One of the files is damaged.
    """
    table = _of_classifiers(_read(source), keys, kept=True)
    if target.exists():
        table = pa.concat_tables([_of_classifiers(_read(target), keys, kept=False), table])
    table = table.sort_by([(key, "ascending") for key in _KEY])
    rundir.write_atomically(target, lambda fresh: pq.write_table(table, fresh))


def keep_predictions(path: Path, keys: set[tuple[str, int, int]]) -> None:
    """Drop the predictions of all classifiers but these.

    Args:
        path: predictions.parquet.
        keys: Method, number of labels and draw of each.

    Raises:
        CheckpointError: The file is damaged.
    """
    if path.exists():
        table = _of_classifiers(_read(path), keys, kept=True)
        rundir.write_atomically(path, lambda fresh: pq.write_table(table, fresh))


def _of_classifiers(table: pa.Table, keys: set[tuple[str, int, int]], *, kept: bool) -> pa.Table:
    """The rows of these classifiers, or all others."""
    rows = zip(*(table[name].to_pylist() for name in _KEY), strict=True)
    return table.filter(pa.array([(row in keys) is kept for row in rows], pa.bool_()))


def read_predictions(path: Path, names: Sequence[str] = COLUMNS) -> dict[str, list[Any]]:
    """Read columns as lists; empty ones when nothing was predicted yet.

    Args:
        path: predictions.parquet.
        names: Of columns that are stored, or `CONFIDENCE`: the probability of the predicted class.

    Raises:
        CheckpointError: The file is damaged.
    """
    if not path.exists():
        return {name: [] for name in names}
    stored = ["probabilities" if name == CONFIDENCE else name for name in names]
    table = _read(path, sorted(set(stored)))
    return {
        name: _largest(table[kept]) if name == CONFIDENCE else table[kept].to_pylist()
        for name, kept in zip(names, stored, strict=True)
    }


def read_probabilities(path: Path) -> npt.NDArray[np.float32]:
    """The probabilities of every row, (N, C).

    Raises:
        CheckpointError: The file is damaged, or rows have probabilities of different classes.
    """
    table = _read(path, ["probabilities"])
    values = pc.list_flatten(table["probabilities"]).to_numpy()
    if len(pc.unique(pc.list_value_length(table["probabilities"]))) > 1:
        raise CheckpointError(f"{path}: its rows have different numbers of probabilities.")
    return np.asarray(values.reshape(len(table), -1))


def _largest(lists: pa.ChunkedArray) -> list[float]:
    """The largest number of each list."""
    largest: list[float] = []
    for chunk in lists.chunks:
        largest += np.maximum.reduceat(chunk.values.to_numpy(), chunk.offsets.to_numpy()[:-1]).tolist()
    return largest


def _read(path: Path, names: list[str] | None = None) -> pa.Table:
    try:
        if not path.is_file():
            raise OSError("not a file")
        return pq.read_table(path, columns=names, schema=_SCHEMA)
    except (OSError, pa.ArrowException) as error:
        raise CheckpointError(
            f"{path}: damaged ({error}); delete {path.parent} and run `labelwise finetune` again."
        ) from None


class Table(Protocol):
    """A table that rows are added to."""

    def write(self, columns: dict[str, list[Any]]) -> None:
        """Add rows, given by column."""


@contextmanager
def open_table(path: Path, suffix: str, names: list[str], words: frozenset[str]) -> Iterator[Table]:
    """Begin a table.

    Args:
        path: The file; what is there is replaced.
        suffix: ".csv" or ".parquet".
        names: Of the columns.
        words: Those that hold text; the others hold numbers. In a CSV, one that begins like a formula gets `'` before it, a
            file `./`; Parquet has them as they are.
    """
    if suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(names)
            yield _Csv(writer, words)
        return
    schema = pa.schema([(name, pa.string() if name in words else pa.float32()) for name in names])
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

    def __init__(self, writer: Any, words: frozenset[str]) -> None:
        self._writer, self._words = writer, words

    def write(self, columns: dict[str, list[Any]]) -> None:
        """Add rows; numbers with six digits after the point, texts so that no spreadsheet takes them for a formula."""
        cells = [
            [_no_formula(cell, "./" if name == "file" else "'") for cell in column]
            if name in self._words
            else [f"{number:.6f}" for number in column]
            for name, column in columns.items()
        ]
        self._writer.writerows(zip(*cells, strict=True))


def _no_formula(text: str, before: str) -> str:
    """A text with a mark before it if a spreadsheet would compute it; `./` leaves a path the same path."""
    if not text.startswith(("=", "+", "-", "@", "\t", "\r")) or _is_number(text):
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

    def write(self, columns: dict[str, list[Any]]) -> None:
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
