"""Shards: files that hold many images each, Parquet tables or tar archives, here or far away.

They are read from start to end, again in each pass, and never kept whole. With `source`, the door of `datasets`, whose
file systems reach the Hugging Face hub and whatever fsspec does.
"""

import errno
import fcntl
import functools
import hashlib
import itertools
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.utils.file_utils import xopen
from fsspec.core import url_to_fs

from labelwise import rundir, terminal
from labelwise.errors import DataError, LabelwiseError, UsageError
from labelwise.images.labels import SPLITS, SUFFIXES

SAMPLED = 4096  # images of a stream that are kept: to test, to look at, to choose sizes by
_SAMPLED_SHARDS = 16
_TOGETHER = 64  # rows read and written at once
_BUFFER = (
    2**20
)  # bytes of a column read at once; else it is all of a group of rows, which may be a whole file
_MARKS = (
    "size",
    "mtime",
    "ETag",
    "etag",
    "LastModified",
    "last_modified",
    "Content-MD5",
    "Digest",
    "blob_id",
)  # as file systems name them
_KINDS = {".parquet": "parquet", ".tar": "tar"}
_ASKED_AT_ONCE = 16  # files of a web server
_PASSWORD = re.compile(r"[^/@]*:[^/@]*@")  # name:password@host
_URL = re.compile(r"([a-z][a-z0-9]+):/+(.+)")  # a path folds the two slashes of an address into one
IMAGE_COLUMNS = ("image", "img", "jpg", "png")
LABEL_COLUMNS = ("label", "labels", "class", "fine_label")


@dataclass(frozen=True)
class Shards:
    """Files of one kind, in the order of their names.

    Attributes:
        kind: "parquet" or "tar".
        files: Paths or addresses.
        counts: Images in each.
        notes: What a person should know.
        digest: Hash of what they are; empty where their place does not say of each how old it is.
    """

    kind: str
    files: tuple[str, ...]
    counts: tuple[int, ...]
    notes: tuple[str, ...] = ()
    digest: str = ""

    @functools.cached_property
    def folder(self) -> str:
        """The one that all lie in or below."""
        return os.path.commonprefix(self.files).rpartition("/")[0] + "/"  # noqa: RUF071 - addresses are no paths

    @property
    def images(self) -> int:
        """How many there are in all."""
        return sum(self.counts)


@dataclass(frozen=True)
class Record:
    """One image of a shard, not decoded; empty where its row holds none."""

    name: str
    image: bytes
    label: str | None


def address_of(path: Path) -> str | None:
    """The address that a path was typed as, `hf://NAME` or `s3://BUCKET/FOLDER`; None for a path of this machine.

    `hf://NAME` is a data set of the Hugging Face hub.

    Raises:
        UsageError: It holds a password, which a run would write down.
    """
    found = _URL.fullmatch(str(path))
    if found is None or found[1] == "file" or path.exists():
        return None
    scheme, rest = found.groups()
    if _PASSWORD.match(rest):
        raise UsageError(
            f"{scheme}://...@{rest.partition('@')[2]}: an address with a password, which the run would write down; set it in fsspec's "
            "configuration (~/.config/fsspec or FSSPEC_ variables), and leave it out here."
        )
    return f"hf://datasets/{rest.removeprefix('datasets/')}" if scheme == "hf" else f"{scheme}://{rest}"


def whole_path(path: Path) -> str:
    """A path as it is however it was spelt, or its address."""
    return address_of(path) or str(path.resolve())


def open_shards(root: Path) -> tuple[Shards, Path]:
    """Find and count the shards below a folder or an address, and keep a sample of their images on this disk.

    Returns:
        The shards, and a Parquet file with columns `name`, `image` and `label`: the first images of shards all over the set.

    Raises:
        DataError: There are no shards, or none holds an image.
        LabelwiseError: They cannot be reached.
        UsageError: The package that reads such addresses is not installed.
    """
    if address_of(root) is None:
        rundir.check_cache_outside(root)
    kind, splits = find_shards(root)
    if "train" not in splits:
        raise DataError(f"{root}: only shards of {' and '.join(splits)}; nothing to train on.")
    marks = splits["train"]
    others = [f"{len(files)} shards of {split}" for split, files in splits.items() if split != "train"]
    notes = (f"not read: {', '.join(others)}",) if others else ()
    digest = hashlib.sha256(json.dumps([kind, marks, SAMPLED]).encode()).hexdigest()[:24]
    folder = rundir.cache_root() / f"sample-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    sample, facts = folder / "sample.parquet", folder / "facts.json"
    with alone_in(folder):  # of several processes one counts and copies
        dated = digest if all(mark and json.loads(mark).keys() - {"size"} for mark in marks.values()) else ""
        is_known = all(marks.values())
        if is_known and (known := _read_facts(facts, sample)):
            return replace(known, digest=dated), sample
        counts = _count_all(kind, marks)
        filled = [(file, count) for file, count in zip(marks, counts, strict=True) if count]
        if not filled:
            raise DataError(f"{root}: {len(marks)} .{kind} shards, and no image in them.")
        names, counted = zip(*filled, strict=True)
        shards = Shards(kind, names, counted, notes, dated)
        rundir.write_atomically(sample, lambda fresh: _write_sample(shards, fresh))
        rows = pq.ParquetFile(sample).metadata.num_rows
        rundir.write_json(facts, {**asdict(shards), "images": rows, "sha256": _hash(sample)})
    return shards, sample


def read_shard(shards: Shards, number: int, start: int = 0) -> Iterator[Record]:
    """Read the images of a shard in their order, from one of them on.

    Raises:
        LabelwiseError: It cannot be read, or holds other images than when they were counted.
    """
    file, count = shards.files[number], shards.counts[number]
    read, name = start, file.removeprefix(shards.folder)
    with reaching(file):
        for inside, image, label in (_read_parquet if shards.kind == "parquet" else _read_tar)(file, start):
            yield Record(f"{name}/{inside}", image, label)
            read += 1
    if read != count:
        raise LabelwiseError(
            f"{file}: holds {read:,} images, and held {count:,} when the run was started; put it back, or start a new run."
        )


def find_shards(root: Path) -> tuple[str, dict[str, dict[str, str]]]:
    """Kind of the shards below a folder or an address, and of each split that their names tell the files with a mark each.

    A mark is another when the file is; it is empty where its place says neither how large nor how old it is.

    Raises:
        DataError: There are none, or of both kinds.
        LabelwiseError: They cannot be reached.
        UsageError: The package that reads such addresses is not installed.
    """
    address = address_of(root)
    if address is None and not root.is_dir():
        raise DataError(f"{root}: no such folder.")
    place = address or str(root.resolve())
    _check_name(place)
    try:
        system, below = url_to_fs(place)
    except (ImportError, ValueError) as error:
        raise UsageError(f"{place}: cannot be read: {error}.") from None
    with reaching(place):
        found = system.find(below, detail=True)
        if (
            address and address.startswith("hf://") and not _by_kind(found)
        ):  # the hub keeps such copies of its own
            below = f"{below}@~parquet"
            found = system.find(below, detail=True)
    by_kind = _by_kind(found)
    if not by_kind:
        raise DataError(f"{place}: no shards found; looked for .parquet and .tar in it and its folders.")
    if len(by_kind) > 1:
        raise DataError(f"{place}: holds .parquet and .tar shards; name a folder with one kind.")
    ((kind, files),) = by_kind.items()
    for file in files:
        _check_name(file)
    whole = {file: system.unstrip_protocol(file).removeprefix("file://") for file in sorted(files)}

    def mark(file: str) -> str:
        with reaching(whole[file]):
            return _mark(found[file], system)

    with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
        marks = dict(zip(whole, pool.map(mark, whole), strict=True))
    splits: dict[str, dict[str, str]] = {}
    for file, there in whole.items():
        words = re.split(r"[/_.-]", file.removeprefix(below).lower())
        split = next((SPLITS[word] for word in words if word in SPLITS), "train")
        splits.setdefault(split, {})[there] = marks[file]
    return kind, splits


def _check_name(place: str) -> None:
    if not rundir.is_utf8(place):
        raise DataError(f"{place}: its name is not UTF-8; rename it.")
    if "::" in place:
        raise DataError(
            f"{place}: '::' in a name chains addresses for fsspec; rename it, or link to it by another name."
        )


def _mark(facts: dict[str, Any], system: Any) -> str:
    """What a place says of a file that would be another if the file were."""
    if facts.get("size") is None:  # a web server is asked for each
        facts = {**facts, **system.info(facts["name"])}
    if facts.get("islink"):  # fsspec tells how large its target is, and how old the link
        facts = {**facts, "mtime": os.stat(facts["name"]).st_mtime}
    said = {name: facts.get(name) for name in _MARKS if facts.get(name) is not None}
    return json.dumps(said, default=str, sort_keys=True) if said else ""


def _read_facts(facts: Path, sample: Path) -> Shards | None:
    """What was found before, if the sample is there as it was written."""
    if (
        not sample.is_file()
        or (found := rundir.read_derived(facts)) is None
        or found["sha256"] != _hash(sample)
    ):
        return None
    return Shards(found["kind"], tuple(found["files"]), tuple(found["counts"]), tuple(found["notes"]))


def _hash(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """While no other process is; wait for one that is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def load_archives(root: Path) -> datasets.DatasetDict:
    """Copy the images of all tar archives below a folder into tables that `datasets` keeps, by split."""
    datasets.disable_progress_bars()
    _, splits = find_shards(root)
    tables = {}
    for split, files in splits.items():
        counted = list(
            zip(files, _count_all("tar", files), files.values(), strict=True)
        )  # datasets takes a list for shards
        tables[split] = datasets.Dataset.from_generator(_rows, gen_kwargs={"counted": counted})
    return datasets.DatasetDict(tables)


def _rows(counted: list[tuple[str, int, str]]) -> Iterator[dict[str, Any]]:
    """Every image of some archives; their marks tell `datasets` whether it has them already."""
    for file, count, _ in counted:
        for record in read_shard(Shards("tar", (file,), (count,)), 0):
            yield {"image": {"bytes": record.image, "path": record.name}, "label": record.label}


def _by_kind(found: dict[str, Any]) -> dict[str, list[str]]:
    by_kind: dict[str, list[str]] = {}
    for file, facts in found.items():
        kind = _KINDS.get(os.path.splitext(file)[1].lower())
        is_file = facts["type"] == "file" or facts.get("islink")
        if kind and is_file and not Path(file).name.startswith("."):
            by_kind.setdefault(kind, []).append(file)
    return by_kind


def _write_sample(shards: Shards, target: Path) -> None:
    """Copy the first images of shards all over the set."""
    few = np.unique(np.linspace(0, len(shards.files) - 1, _SAMPLED_SHARDS).astype(int)).tolist()
    each = -(-SAMPLED // len(few))
    seen: Counter[str] = Counter()  # an archive may hold a name more than once
    form = pa.schema([("name", pa.string()), ("image", pa.binary()), ("label", pa.string())])
    with pq.ParquetWriter(target, form) as writer, terminal.track("keeping a sample", len(few) * each) as bar:
        for number in few:
            records = read_shard(shards, number)
            for place in range(0, min(each, shards.counts[number]), _TOGETHER):
                rows = []
                for record in itertools.islice(records, min(_TOGETHER, each - place)):
                    seen[record.name] += 1
                    again = f" ({seen[record.name]})" if seen[record.name] > 1 else ""
                    rows.append(asdict(record) | {"name": record.name + again})
                writer.write_table(pa.Table.from_pylist(rows, form))
                bar.advance(len(rows))


def load_tables(name: str, **options: Any) -> Any:
    """`datasets.load_dataset`, silent, and without telling the hub."""
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    datasets.disable_progress_bars()
    return datasets.load_dataset(name, **options)


def _count_all(kind: str, files: Iterable[str]) -> list[int]:
    counts = []
    for file in files:
        with reaching(file):
            counts.append(_count(kind, file))
    return counts


def _count(kind: str, file: str) -> int:
    with xopen(file, "rb") as opened:
        if kind == "parquet":
            table = pq.ParquetFile(opened)
            _image_and_label(file, table.schema_arrow.names)
            return int(table.metadata.num_rows)
        with tarfile.open(fileobj=opened, mode="r:") as archive:
            count = sum(_is_image(member) for member in _members(archive))
        opened.seek(archive.offset)
        if (
            opened.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE
        ):  # tarfile takes anything for an end
            raise tarfile.ReadError(f"broken off at byte {archive.offset:,}")
        return count


def _read_parquet(file: str, start: int) -> Iterator[tuple[str, bytes, str | None]]:
    with xopen(file, "rb") as opened:
        table = pq.ParquetFile(opened, buffer_size=_BUFFER, pre_buffer=False)
        image, label = _image_and_label(file, table.schema_arrow.names)
        feature = _features(table.schema_arrow, label)[label] if label else None
        place = 0
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if place + rows <= start:
                place += rows
                continue
            for batch in table.iter_batches(_TOGETHER, [group], columns=[image, *([label] if label else [])]):
                columns = batch.to_pydict()
                for inside, value in zip(
                    columns[image], columns[label] if label else [None] * len(batch), strict=True
                ):
                    place += 1
                    if place > start:
                        yield str(place - 1), _bytes_in(inside), _label_text(feature, value)


def _image_and_label(file: str, names: list[str]) -> tuple[str, str | None]:
    image, label = (
        next((name for name in known if name in names), None) for known in (IMAGE_COLUMNS, LABEL_COLUMNS)
    )
    if image is None:
        raise DataError(f"{file}: no image column; looked for {', '.join(IMAGE_COLUMNS)}, found {', '.join(names)}.")  # fmt: skip
    return image, label


def _features(schema: pa.Schema, column: str) -> datasets.Features:
    """What `datasets` wrote into a file about a column."""
    return datasets.Features.from_arrow_schema(pa.schema([schema.field(column)], schema.metadata))


def _bytes_in(value: Any) -> bytes:
    """The file in a cell, bare or as `datasets` writes it; what it names elsewhere is not opened."""
    inside = value.get("bytes") if isinstance(value, dict) else value
    return inside if isinstance(inside, bytes) else b""


def _label_text(feature: Any, value: Any) -> str | None:
    if isinstance(feature, datasets.ClassLabel):
        value = feature.int2str(value) if value is not None and value >= 0 else None
    return None if value is None else str(value)


def _read_tar(file: str, start: int) -> Iterator[tuple[str, bytes, str | None]]:
    """Images of an archive, with the class that a `.cls` file of the same name tells, which lies beside it."""
    with (
        xopen(file, "rb") as opened,
        tarfile.open(fileobj=opened, mode="r|" if start == 0 else "r:", errors="replace") as archive,
    ):
        waiting: tuple[str, bytes] | None = None
        labels: dict[str, str] = {}
        place = 0
        for member in _members(archive):
            stem, suffix = os.path.splitext(member.name)
            if suffix == ".cls" and member.isreg():
                labels[stem] = _content(archive, member).decode("utf-8", "replace").strip()
            elif _is_image(member):
                place += 1
                if place <= start:
                    continue
                if waiting is not None:
                    yield *waiting, labels.pop(os.path.splitext(waiting[0])[0], None)
                waiting = member.name, _content(archive, member)
        if waiting is not None:
            yield *waiting, labels.pop(os.path.splitext(waiting[0])[0], None)


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Members of an archive, which would otherwise remember a kilobyte of each."""
    for member in archive:
        archive.members = []  # type: ignore[attr-defined]
        yield member


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    opened = archive.extractfile(member)
    return opened.read() if opened is not None else b""


def _is_image(member: tarfile.TarInfo) -> bool:
    return (
        member.isreg()
        and os.path.splitext(member.name)[1].lower() in SUFFIXES
        and not os.path.basename(member.name).startswith(".")
    )


@contextmanager
def reaching(place: str) -> Iterator[None]:
    """Say in words what keeps a shard, or a table that `datasets` copies, from being read."""
    try:
        yield
    except (LabelwiseError, MemoryError, AssertionError, AttributeError, LookupError, NameError, TypeError):
        raise  # our own words, or our own fault
    except datasets.exceptions.DatasetGenerationError as error:  # only tells that there was one
        with reaching(place):
            raise (error.__cause__ or error.__context__ or ValueError(error)) from None
    except (tarfile.TarError, pa.ArrowException) as error:
        raise DataError(f"{place}: damaged ({error}).") from None
    except Exception as error:  # each file system and its network library raise their own
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise LabelwiseError(
            f"{place}: cannot be read ({type(error).__name__}: {str(error)[:200]})."
        ) from None
