"""Labels as Label Studio exports and imports them: JSON, one choice for each image."""

import json
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

from labelwise.errors import DataError

# What `labelwise annotate --export` writes for: names of Label Studio's <Image> and <Choices>.
IMAGE, CHOICE = "image", "choice"
_LOCAL = "/data/local-files/?d="
_UPLOAD = re.compile(r"^/data/upload/\d+/[0-9a-f]{8}-")


def read_label_studio(file: Path) -> tuple[list[str], list[tuple[int, dict[str, Any]]], list[str]]:
    """Read an export, JSON or JSON-MIN, as a table with the columns `image` and `choice`.

    Several people's answers to one image are rows of their own. Answers that were cancelled do not count.

    Returns:
        Columns, number and cells of each row, and notes.

    Raises:
        DataError: It is no such export.
    """
    try:
        tasks = json.loads(file.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not JSON ({str(error) or 'nested too deep'}).") from None
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        raise DataError(f"{file}: not an export of Label Studio, which is a list of tasks.")
    rows = []
    for number, task in enumerate(tasks, start=1):
        whole = isinstance(task.get("data"), dict)
        path = _path(task["data"] if whole else task)
        small = task.get(CHOICE)  # of JSON-MIN, where several are in an object
        choices = _choices(task) if whole else [small.get("choices") if isinstance(small, dict) else small]
        rows += [(number, {IMAGE: path, CHOICE: choice}) for choice in choices]
    return [IMAGE, CHOICE], rows, []


def write_label_studio(labels: list[tuple[str, str]], file: Path) -> None:
    """Write tasks with annotations that Label Studio imports, for images that it serves from a local folder.

    Args:
        labels: Name and label of each image.
        file: Where.
    """
    tasks = [
        {
            "data": {IMAGE: _LOCAL + quote(name)},
            "annotations": [
                {
                    "result": [
                        {
                            "from_name": CHOICE,
                            "to_name": IMAGE,
                            "type": "choices",
                            "value": {"choices": [label]},
                        }
                    ]
                }
            ],
        }
        for name, label in labels
    ]
    file.write_text(json.dumps(tasks, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _path(data: dict[str, Any]) -> str | None:
    """Where an image lies, as it was before Label Studio took it in."""
    address = data.get(IMAGE)
    if not isinstance(address, str):
        return None
    if address.startswith(_LOCAL):
        return parse_qs(urlsplit(address).query, keep_blank_values=True)["d"][0]
    return os.path.basename(_UPLOAD.sub("", address)) if _UPLOAD.match(address) else address


def _choices(task: dict[str, Any]) -> list[Any]:
    """What each person chose; a list where somebody chose several, and None where somebody chose none."""
    found: list[Any] = []
    annotations = task.get("annotations")
    for said in annotations if isinstance(annotations, list) else []:
        results = [] if not isinstance(said, dict) or said.get("was_cancelled") else said.get("result") or []
        chosen = [
            each["value"]["choices"]
            for each in results
            if isinstance(each, dict)
            and isinstance(each.get("value"), dict)
            and isinstance(each["value"].get("choices"), list)
        ]
        found += [choices[0] if len(choices) == 1 else choices for choices in chosen]
    return found
