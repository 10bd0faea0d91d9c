"""`labelwise embed` and `labelwise neighbours`: what the encoder of a run sees in images, and which of the run's are most like one."""

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from labelwise import rundir, terminal
from labelwise.config import FinetuneSettings
from labelwise.errors import DataError
from labelwise.images.cache import read_evaluations
from labelwise.images.decoding import Pixels
from labelwise.images.source import open_given
from labelwise.interruption import stop_between_steps
from labelwise.learning.precision import choose_device, choose_devices
from labelwise.models.features import extract_features, map_in_streams
from labelwise.models.weights import load_encoder
from labelwise.rundir import RunDirectory
from labelwise.stages.benching import open_decoded, remember_sources
from labelwise.stages.targets import check_file
from labelwise.tables import open_embeddings

_LISTED = 5


def embed(
    run: RunDirectory, images: list[Path], out: Path, device: str = "auto", devices: str = "1"
) -> dict[str, Any]:
    """Write the features of images, h of the run's encoder as it was pretrained; those that cannot be read are left out by name.

    Args:
        run: Pretrained.
        images: A folder, or files.
        out: A .parquet file (columns `file`, `embedding`), or a .npz file (arrays `files` and `embeddings`, which are held in
            memory meanwhile), that is not there yet.
        device: Where.
        devices: How many of these share the images; a number, or `all`.

    Returns:
        `out`, `images` (rows written), `width` of a feature, `left_out` (file and reason).

    Raises:
        CheckpointError: The encoder is damaged.
        DataError: There are no images, or none can be read.
        UsageError: The file cannot be written there.
    """
    check_file(out, (".parquet", ".npz"), run, images)
    width, left_out, written = 0, list[dict[str, str]](), 0

    def write(fresh: Path) -> None:
        nonlocal width, written
        with stop_between_steps() as stop, open_embeddings(fresh, out.suffix) as table:
            for names, features in _features_of(run, images, choose_devices(devices, device), left_out):
                stop.check(f"{out} was not written; the same command begins again.")
                table(names, features.numpy())
                width, written = features.shape[1], written + len(names)

    rundir.write_atomically(out, write)
    return {"out": str(out), "images": written, "width": width, "left_out": left_out}


def neighbours(
    run: RunDirectory, images: list[Path], count: int = 10, device: str = "auto"
) -> list[dict[str, Any]]:
    """Find the images of a run that are most like others by cosine similarity of their features.

    Args:
        run: Pretrained; its images are decoded already.
        images: A folder, or files.
        count: How many for each.
        device: Where.

    Returns:
        For each of them `file` and `neighbours`: `file`, `label` and `similarity`, the most similar first. A file of the run is
        its own first neighbour.

    Raises:
        DataError: An image cannot be read.
    """
    encoder, spec = load_encoder(run.path)
    place = choose_device(device)
    settings = remember_sources(run, FinetuneSettings.resolve({"run": run.path}))
    known, cache = open_decoded(run, settings, spec)
    rows = np.flatnonzero(cache.readable)
    bank = F.normalize(
        extract_features(encoder.to(place), cache.evaluations, rows, spec.normalization, place), dim=1
    )
    left_out: list[dict[str, str]] = []
    found = []
    for names, features in _features_of(run, images, [place], left_out):
        nearest = (F.normalize(features, dim=1) @ bank.T).topk(min(count, len(rows)), dim=1)
        for name, values, places in zip(
            names, nearest.values.tolist(), nearest.indices.tolist(), strict=True
        ):
            near = [
                {"file": known.names[rows[at]], "label": known.labels[rows[at]], "similarity": value}
                for value, at in zip(values, places, strict=True)
            ]
            found.append({"file": name, "neighbours": near})
    for entry in left_out:
        terminal.warn(f"{entry['file']}: {entry['reason']}; left out.")
    return found


def show(document: dict[str, Any]) -> None:
    """Print what was embedded."""
    terminal.emit(f"{document['images']:,} images, {document['width']} numbers each")
    for entry in document["left_out"][:_LISTED]:
        terminal.emit(f"left out  {entry['file']}: {entry['reason']}")
    if len(document["left_out"]) > _LISTED:
        terminal.emit(f"          and {len(document['left_out']) - _LISTED:,} more; --json lists all")
    terminal.emit(f"written   {document['out']}")


def show_neighbours(found: list[dict[str, Any]]) -> None:
    """Print the images that are like each one."""
    for entry in found:
        terminal.emit(entry["file"])
        for near in entry["neighbours"]:
            terminal.emit(f"  {near['similarity']:.3f}  {near['label'] or '':<16} {near['file']}")


def _features_of(
    run: RunDirectory, images: list[Path], places: list[torch.device], left_out: list[dict[str, str]]
) -> Iterator[tuple[list[str], Tensor]]:
    """Names and features of images, (B, F), some at a time.

    Raises:
        DataError: There are none, or none can be read.
    """
    encoder, spec = load_encoder(run.path)
    encoders = [copy.deepcopy(encoder).to(place) for place in places]
    found = open_given(images)
    rows: npt.NDArray[np.int64] = np.arange(len(found.names))
    deep = rundir.read_json(run.data)["intensity_range"]

    def work(
        number: int, chunk: tuple[npt.NDArray[np.int64], Pixels]
    ) -> tuple[npt.NDArray[np.int64], Tensor]:
        some, pixels = chunk
        rows_of_it = np.arange(len(some))
        return some, extract_features(
            encoders[number], pixels, rows_of_it, spec.normalization, places[number]
        )

    with terminal.track("embedding", len(rows)) as bar:
        done = 0
        chunks = (
            each for each in read_evaluations(found, rows, spec.image_size, deep, left_out) if len(each[0])
        )
        for chunk, features in map_in_streams(
            [partial(work, number) for number in range(len(places))], chunks, places[0]
        ):
            if not torch.isfinite(features).all():
                raise DataError(
                    f"{run.encoder}: its features are not numbers; pretrain anew with a lower --learning-rate."
                )
            yield [found.names[row] for row in chunk.tolist()], features
            bar.advance(int(chunk[-1]) + 1 - done)
            done = int(chunk[-1]) + 1
    if len(left_out) == len(rows):
        first = left_out[0]
        raise DataError(
            f"none of the {len(rows)} images can be read, e.g. {first['file']}: {first['reason']}."
        )
