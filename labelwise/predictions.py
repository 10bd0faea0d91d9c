"""predictions.parquet: every test prediction behind the report."""

from pathlib import Path
from typing import Any

import pyarrow as pa
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
        ("prediction", pa.string()),
        ("probabilities", pa.list_(pa.float32())),
    ]
)
COLUMNS = tuple(_SCHEMA.names)


def write_predictions(path: Path, columns: dict[str, list[Any]]) -> None:
    """Replace the file in one step.

    Args:
        path: predictions.parquet.
        columns: One list per column of `COLUMNS`, all of one length.
    """
    table = pa.table(columns, schema=_SCHEMA)
    rundir.write_atomically(path, lambda fresh: pq.write_table(table, fresh))


def read_predictions(path: Path) -> dict[str, list[Any]]:
    """Read all columns as lists; empty ones when nothing was predicted yet.

    Raises:
        CheckpointError: The file is damaged.
    """
    if not path.exists():
        return {name: [] for name in COLUMNS}
    try:
        columns: dict[str, list[Any]] = pq.read_table(path, schema=_SCHEMA).to_pydict()
    except (OSError, pa.ArrowException) as error:
        raise CheckpointError(
            f"{path}: damaged ({error}); delete {path.parent} and run `labelwise finetune` again."
        ) from None
    return columns
