"""predictions.parquet: every test prediction behind the report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
