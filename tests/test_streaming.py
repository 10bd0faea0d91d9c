"""Shards, here or behind a server, and batches that are put together from them again and again."""

import errno
import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from labelwise.errors import DataError, LabelwiseError, ResourceError, UsageError
from labelwise.images.cache import list_caches
from labelwise.images.decoded import DecodedShards
from labelwise.images.decoding import UnreadableImage, UnreadableNow, content_key, decode_image
from labelwise.images.readers import Answer, Readers
from labelwise.images.shards import Record, Shards, address_of, open_shards, read_shard
from labelwise.images.source import open_images
from labelwise.images.streaming import Batch, Lane, Stream, choose_lanes

Photo = Callable[..., Image.Image]
COUNT = 50


@pytest.fixture(autouse=True)
def _own_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path.with_name("datasets"))


@pytest.fixture
def files(tmp_path: Path, photo: Photo) -> list[Path]:
    """Photographs in three class folders."""
    found = [tmp_path / "photos" / "abc"[number % 3] / f"{number:02d}.png" for number in range(COUNT)]
    for number, file in enumerate(found):
        photo(file, number, (20, 16))
    return found


@pytest.fixture(params=["tar", "parquet"])
def shards(
    request: pytest.FixtureRequest, tmp_path: Path, files: list[Path], write_shards: Callable[..., Path]
) -> Path:
    """The photographs in 4 shards of 13, 13, 13 and 11."""
    return write_shards(tmp_path / "shards", request.param, files, 4)


class _Ranges(http.server.SimpleHTTPRequestHandler):
    """Serves parts of files, as every storage does."""

    def do_GET(self) -> None:
        path, asked = Path(self.translate_path(self.path)), self.headers.get("Range")
        if path.is_dir() or asked is None:
            super().do_GET()
            return
        content = path.read_bytes()
        first, _, last = asked.removeprefix("bytes=").partition("-")
        part = content[int(first) : int(last) + 1 if last else None]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def do_HEAD(self) -> None:
        path = Path(self.translate_path(self.path))
        self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(path.stat().st_size if path.is_file() else 0))
        self.end_headers()

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def address(shards: Path) -> Iterator[str]:
    """Where a server gives out the shards."""
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(_Ranges, directory=shards)
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def keys_of(shards: Shards) -> list[int]:
    return [
        content_key(np.asarray(decode_image(record.image)[0]))
        for number in range(len(shards.files))
        for record in read_shard(shards, number)
    ]


# --- shards


def test_shards_hold_images_and_their_classes_in_order(shards: Path, files: list[Path]) -> None:
    found, _ = open_shards(shards)
    records = [record for number in range(4) for record in read_shard(found, number)]
    assert (found.counts, found.images, len(found.files)) == ((13, 13, 13, 11), COUNT, 4)
    assert [record.image for record in records] == [file.read_bytes() for file in files]
    assert [record.label for record in records] == [file.parent.name for file in files]
    assert records[13].name.startswith("shard-001.")
    assert [record.image for record in read_shard(found, 1, 9)] == [
        file.read_bytes() for file in files[22:26]
    ]


def test_the_sample_stands_for_the_set_without_reading_it_twice(
    shards: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = open_images(shards, stream=True)
    assert images.shards is not None
    assert images.shards.images == len(images.names) == COUNT
    assert images.labels == [file.parent.name for file in files]
    assert [images.locate(row) for row in range(COUNT)] == [file.read_bytes() for file in files]
    monkeypatch.setattr("labelwise.images.shards.read_shard", None)
    assert open_images(shards, stream=True).names == images.names


def test_a_shard_that_changed_is_another_set(shards: Path, photo: Photo, tmp_path: Path) -> None:
    before, _ = open_shards(shards)
    last = Path(before.files[-1])
    last.unlink()
    after, _ = open_shards(shards)
    assert after.images == 39
    assert after != before
    last.write_bytes(Path(before.files[0]).read_bytes())
    with pytest.raises(LabelwiseError, match="holds 13 images, and held 11 when the run was started"):
        list(read_shard(before, 3))


def test_other_images_of_the_same_size_are_another_set(
    tmp_path: Path, files: list[Path], write_shards: Callable[..., Path]
) -> None:
    root = write_shards(tmp_path / "set", "tar", files, 2)
    before = open_images(root, stream=True)
    sizes = [file.stat().st_size for file in sorted(root.iterdir())]
    shutil.rmtree(root)
    write_shards(root, "tar", files[::-1], 2)
    assert [file.stat().st_size for file in sorted(root.iterdir())] == sizes  # tar pads
    after = open_images(root, stream=True)
    assert [after.locate(row) for row in range(COUNT)] == [file.read_bytes() for file in files[::-1]]
    assert after.labels == before.labels[::-1]


def test_a_damaged_sample_is_made_again(shards: Path, cache: Path) -> None:
    names = open_images(shards, stream=True).names
    (sample,) = cache.glob("sample-*/sample.parquet")
    sample.write_bytes(sample.read_bytes()[:-100])
    assert open_images(shards, stream=True).names == names
    assert [count for _, _, count in list_caches()] == [COUNT]


def test_a_cache_among_the_shards_is_refused(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABELWISE_CACHE", str(shards / "cache"))
    with pytest.raises(DataError, match="never written to"):
        open_images(shards, stream=True)
    assert not (shards / "cache").exists()


def test_test_rows_of_a_table_are_refused_as_only_a_sample_is_there(shards: Path, tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    table.write_text("file,label,split\nshard-000.tar/00000000.png,a,test\n")
    with pytest.raises(DataError, match="give the test images as --test FOLDER"):
        open_images(shards, labels=table, stream=True)


def test_shards_behind_a_server_are_those_on_the_disk(address: str, shards: Path) -> None:
    there, here = open_shards(Path(address))[0], open_shards(shards)[0]
    assert address_of(Path(address)) == address.rstrip("/")
    assert there.counts == here.counts
    for number in range(4):
        assert list(read_shard(there, number, 5)) == list(read_shard(here, number, 5))


def test_a_shard_that_changed_behind_a_server_is_counted_again(address: str, shards: Path) -> None:
    assert open_shards(Path(address))[0].images == COUNT
    first, *_, last = sorted(shards.iterdir())
    last.write_bytes(first.read_bytes() + bytes(10_240) * (last.suffix == ".tar"))
    assert open_shards(Path(address))[0].images == COUNT + 2


def test_the_cache_may_have_any_name(shards: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABELWISE_CACHE", str(cache / "a[1]*"))
    assert len(open_images(shards, stream=True).names) == COUNT


def test_a_stream_knows_no_column_of_groups(shards: Path) -> None:
    with pytest.raises(UsageError, match="--group-column patient: is a column of a label file"):
        open_images(shards, stream=True, group_column="patient")


def test_a_server_that_is_gone_is_told(address: str) -> None:
    there, _ = open_shards(Path(address))
    gone = Shards(
        there.kind, tuple(file.replace("127.0.0.1", "127.0.0.2") for file in there.files), there.counts
    )
    with pytest.raises(LabelwiseError, match="cannot be read"):
        list(read_shard(gone, 0))


def test_archives_that_are_not_streamed_are_read_with_their_splits_and_classes(
    tmp_path: Path, files: list[Path], write_shards: Callable[..., Path]
) -> None:
    root = write_shards(tmp_path / "set" / "train", "tar", files[:30], 2).parent
    write_shards(root / "test", "tar", files[30:], 2)
    images = open_images(root)
    assert Counter(images.splits) == {"train": 30, "test": 20}
    assert sorted(map(str, images.labels)) == sorted(file.parent.name for file in files)
    assert sorted(images.locate(row) for row in range(COUNT)) == sorted(file.read_bytes() for file in files)
    streamed = open_images(root, stream=True)
    assert (len(streamed.names), streamed.notes) == (30, ["not read: 2 shards of test"])


def test_an_archive_may_hold_images_of_any_kind_and_other_files(tmp_path: Path, photo: Photo) -> None:
    for name in ("a/1.jpg", "a/2.png", "b/3.webp", "._4.jpg"):
        photo(tmp_path / "loose" / name)
    (tmp_path / "loose" / "notes.json").write_text("{}")
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set" / "all.tar", "w") as archive:
        archive.add(tmp_path / "loose", ".")
    found, _ = open_shards(tmp_path / "set")
    assert sorted(record.name for record in read_shard(found, 0)) == [f"all.tar/./{name}" for name in ("a/1.jpg", "a/2.png", "b/3.webp")]  # fmt: skip


@pytest.mark.parametrize("damage", ["cut in a header", "cut before a header", "header overwritten"])
def test_an_archive_that_breaks_off_is_refused_though_what_is_before_can_be_read(
    tmp_path: Path, files: list[Path], write_shards: Callable[..., Path], damage: str
) -> None:
    shard = write_shards(tmp_path / "shards", "tar", files, 1) / "shard-000.tar"
    with tarfile.open(shard) as archive:
        at = archive.getmembers()[20].offset
    content = shard.read_bytes()
    rest = {"cut in a header": b"0000", "header overwritten": b"Z" * 512 + content[at + 512 :]}.get(
        damage, b""
    )
    shard.write_bytes(content[:at] + rest)
    with pytest.raises(DataError, match=rf"damaged \(broken off at byte {at:,}\)"):
        open_shards(tmp_path / "shards")


def test_an_archive_of_many_files_takes_no_memory_for_each(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    member = tarfile.TarInfo("0.png").tobuf()
    (tmp_path / "set" / "all.tar").write_bytes(member * 10_000 + bytes(10_240))
    tracemalloc.start()
    found, _ = open_shards(tmp_path / "set")
    read = sum(1 for _ in read_shard(found, 0))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (read, most < 1e6) == (10_000, True)


def test_names_that_are_no_text_are_read_as_well_as_they_can_be(tmp_path: Path, photo: Photo) -> None:
    photo(tmp_path / "a.png")
    (tmp_path / "set").mkdir()
    with tarfile.open(
        tmp_path / "set" / "0.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1"
    ) as archive:
        archive.add(tmp_path / "a.png", "caf\xe9.png")
    assert open_images(tmp_path / "set", stream=True).names == ["0.tar/caf\ufffd.png"]
    Path(os.fsdecode(os.fsencode(tmp_path / "set") + b"/\xff.tar")).write_bytes(b"")
    with pytest.raises(DataError, match="its name is not UTF-8; rename it"):
        open_images(tmp_path / "set", stream=True)


def test_shards_may_be_links_as_they_are_in_the_cache_of_a_hub(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    for file in shards.iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)
    assert open_shards(tmp_path / "links")[0].images == COUNT


@pytest.mark.parametrize("name", ["a::b", "a/b::c.tar"])
def test_names_that_fsspec_would_take_apart_are_refused(
    tmp_path: Path, files: list[Path], write_shards: Callable[..., Path], name: str
) -> None:
    folder = write_shards(tmp_path / name.partition("/")[0], "tar", files, 2)
    if "/" in name:
        (folder / "shard-001.tar").rename(tmp_path / name)
    with pytest.raises(DataError, match="chains addresses for fsspec; rename it"):
        open_shards(folder)


def test_images_of_one_name_are_told_apart(
    tmp_path: Path, files: list[Path], write_shards: Callable[..., Path]
) -> None:
    for folder, part in (("a", files[:20]), ("b", files[20:40])):
        write_shards(tmp_path / "set" / folder, "tar", part, 1)
    with tarfile.open(tmp_path / "set" / "a" / "shard-000.tar", "a") as archive:
        archive.add(files[40], "00000000.png")
    names = open_images(tmp_path / "set", stream=True).names
    assert len(set(names)) == 41
    assert {"a/shard-000.tar/00000000.png", "a/shard-000.tar/00000000.png (2)", "b/shard-000.tar/00000000.png"} < set(names)  # fmt: skip


def test_classes_that_datasets_numbers_are_named(tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict(
        {"img": [{"bytes": b"x", "path": None}] * 3, "fine_label": [1, 0, -1]},
        datasets.Features({"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=["cat", "dog"])}),
    )
    (tmp_path / "set").mkdir()
    table.to_parquet(tmp_path / "set" / "0.parquet")
    found, _ = open_shards(tmp_path / "set")
    assert [record.label for record in read_shard(found, 0)] == ["dog", "cat", None]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ((), "no shards found; looked for .parquet and .tar"),
        (("a.tar", "b.parquet"), "holds .parquet and .tar shards"),
        (("test/a.tar", "val/b.tar"), "only shards of test and val; nothing to train on"),
        (("a.tar",), "a.tar: damaged"),
        (("a.parquet",), "a.parquet: damaged"),
    ],
)
def test_what_cannot_be_a_stream_is_refused_by_name(
    tmp_path: Path, names: tuple[str, ...], words: str
) -> None:
    for name in names:
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(b"nothing of the kind")
    (tmp_path / "set").mkdir(exist_ok=True)
    with pytest.raises(DataError, match=words):
        open_shards(tmp_path / "set")


@pytest.mark.parametrize("kind", ["tar", "parquet"])
@pytest.mark.parametrize("damage", ["middle", "end", "empty", "no table of images"])
def test_shards_that_cannot_be_copied_end_in_words(
    tmp_path: Path, files: list[Path], write_shards: Callable[..., Path], kind: str, damage: str
) -> None:
    root = write_shards(tmp_path / "set", kind, files, 1)
    shard = root / f"shard-000.{kind}"
    content = shard.read_bytes()
    if damage == "middle":
        shard.write_bytes(content[:5000] + b"Z" * 5000 + content[10_000:])
    elif damage == "end":
        shard.write_bytes(content[: len(content) * 2 // 3])
    elif kind == "tar":
        tarfile.open(shard, "w").close()
    else:
        value = pa.array([], pa.binary()) if damage == "empty" else [1, 2]
        pa.parquet.write_table(pa.table({"image": value}), shard)
    with pytest.raises(LabelwiseError, match=str(root)):
        open_images(root)


def test_a_table_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    pa.parquet.write_table(pa.table({"text": ["x"]}), tmp_path / "set" / "0.parquet")
    with pytest.raises(DataError, match="no image column; looked for image, img, jpg, png, found text"):
        open_shards(tmp_path / "set")


def test_a_row_without_an_image_costs_itself(tmp_path: Path, files: list[Path]) -> None:
    rows = [{"bytes": file.read_bytes(), "path": None} for file in files[:20]]
    rows[3] = {"bytes": None, "path": "/etc/passwd"}  # never opened
    (tmp_path / "set").mkdir()
    pa.parquet.write_table(pa.table({"image": rows}), tmp_path / "set" / "0.parquet")
    found, _ = open_shards(tmp_path / "set")
    assert [record.name for record in read_shard(found, 0) if not record.image] == ["0.parquet/3"]


def test_a_shard_may_be_one_group_of_rows_which_is_never_in_memory_whole(tmp_path: Path) -> None:
    rows = [np.random.default_rng(number).bytes(100_000) for number in range(400)]
    (tmp_path / "set").mkdir()
    form = pa.schema([("image", pa.binary())])
    name = tmp_path / "set" / "a[1]*.parquet"
    with pa.parquet.ParquetWriter(name, form, use_dictionary=False, write_batch_size=16) as file:
        file.write_table(pa.table({"image": pa.array([], pa.binary())}))  # a group without a row
        file.write_table(pa.table({"image": rows}))
    found, _ = open_shards(tmp_path / "set")
    tracemalloc.start()
    read = sum(record.image == row for record, row in zip(read_shard(found, 0), rows, strict=True))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (read, most < 25e6) == (400, True)


@pytest.mark.parametrize(
    ("column", "images"),
    [
        (pa.array([b"x", None, b"z"]).dictionary_encode(), [b"x", b"", b"z"]),
        (["/etc/passwd", "http://host/a.png", None], [b"", b"", b""]),
        ([[[1, 2]], [], None], [b"", b"", b""]),
        ([{"bytes": b"x", "path": "/etc/passwd", "width": 3}, {"bytes": None}, None], [b"x", b"", b""]),
    ],
)
def test_a_cell_is_a_file_or_none_and_what_it_names_is_not_opened(
    tmp_path: Path, column: object, images: list[bytes]
) -> None:
    (tmp_path / "set").mkdir()
    pa.parquet.write_table(
        pa.table({"image": column, "label": pa.array([2.5, None, 1.0])}), tmp_path / "set" / "0.parquet"
    )
    found, _ = open_shards(tmp_path / "set")
    assert [(record.image, record.label) for record in read_shard(found, 0)] == list(
        zip(images, ["2.5", None, "1.0"], strict=True)
    )
    assert [record.image for record in read_shard(found, 0, 2)] == images[2:]


def test_a_table_without_images_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for number in range(40):
        name = "image" if number != 20 else "text"  # which is not among those that the sample is taken from
        pa.parquet.write_table(pa.table({name: [b"x"]}), tmp_path / "set" / f"{number:02d}.parquet")
    with pytest.raises(DataError, match=r"20\.parquet: no image column"):
        open_shards(tmp_path / "set")


@pytest.mark.parametrize(
    ("typed", "address"),
    [
        ("hf://user/name", "hf://datasets/user/name"),
        ("hf://datasets/user/name", "hf://datasets/user/name"),
        ("s3://bucket/folder/", "s3://bucket/folder"),
        ("https://host:8080/a/b", "https://host:8080/a/b"),
        ("photos", None),
        ("/a/b", None),
        ("C:/photos", None),
    ],
)
def test_an_address_survives_being_a_path(typed: str, address: str | None) -> None:
    assert address_of(Path(typed)) == address


@pytest.mark.parametrize(
    "address", ["https://me:secret@host/shards", "sftp://me:secret@host:22/shards", "s3://:secret@bucket"]
)
def test_a_password_in_an_address_is_not_written_down(address: str) -> None:
    with pytest.raises(
        UsageError, match="an address with a password, which the run would write down"
    ) as found:
        address_of(Path(address))
    assert "secret" not in str(found.value)


def test_a_name_in_an_address_is_no_password() -> None:
    assert address_of(Path("sftp://me@host/shards")) == "sftp://me@host/shards"
    assert address_of(Path("https://host:8000/a@b:c@d")) == "https://host:8000/a@b:c@d"


def test_an_address_that_nothing_here_reads_is_told() -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        open_shards(Path("nonsense://bucket"))
    with pytest.raises(
        UsageError, match="is read as a stream only: labelwise pretrain s3://bucket/folder --stream"
    ):
        open_images(Path("s3://bucket/folder"))


class _Hub(_Ranges):
    """The data set `u/n` of a hub, as far as `datasets` asks for it."""

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        root = Path(self.directory)
        listed = path.partition("/api/datasets/u/n/tree/")[2].partition("/")[2]
        if "/tree/" in path:
            below = sorted(
                (root / listed).rglob("*") if "recursive=true" in query else (root / listed).iterdir()
            )
            self.answer([self.entry(file, root) for file in below])
        elif path in ("/api/datasets/u/n", f"/api/datasets/u/n/revision/{'a' * 40}"):
            names = [file.relative_to(root).as_posix() for file in root.rglob("*.*")]
            siblings = [{"rfilename": name} for name in names]
            self.answer({"id": "u/n", "sha": "a" * 40, "private": False, "gated": False, "tags": [], "siblings": siblings, "downloads": 0, "likes": 0})  # fmt: skip
        elif "/resolve/" in path and (root / path.split("/", 6)[6]).is_file():
            self.path = "/" + path.split("/", 6)[6]
            super().do_GET()
        else:
            self.server.others.append(path)  # type: ignore[attr-defined]
            self.send_error(404)

    def do_HEAD(self) -> None:
        found = Path(self.directory, *self.path.split("/")[6:])
        self.send_response(200 if found.is_file() else 404)
        if not found.is_file():
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", str(found.stat().st_size if found.is_file() else 0))
        self.end_headers()

    def entry(self, file: Path, root: Path) -> dict[str, object]:
        name = {"path": file.relative_to(root).as_posix(), "oid": "0" * 40}
        return (
            {"type": "directory", **name}
            if file.is_dir()
            else {"type": "file", "size": file.stat().st_size, **name}
        )

    def answer(self, content: object) -> None:
        text = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def end_headers(self) -> None:
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("ETag", f'"{Path(self.path).name}"')
        super().end_headers()


@pytest.mark.slow
def test_a_set_of_the_hub_is_streamed_or_copied_with_its_splits(
    tmp_path: Path, files: list[Path], write_shards: Callable[..., Path]
) -> None:
    for split, part in (("train", files[:30]), ("test", files[30:])):
        folder = write_shards(tmp_path / split, "parquet", part, 2)
        for number, file in enumerate(sorted(folder.iterdir())):
            (tmp_path / "hub" / "data").mkdir(parents=True, exist_ok=True)
            file.rename(tmp_path / "hub" / "data" / f"{split}-{number:05d}-of-00002.parquet")
    program = """
from collections import Counter
from pathlib import Path
from labelwise.images.source import open_images
streamed, copied = open_images(Path("hf://u/n"), stream=True), open_images(Path("hf://u/n"))
print(len(streamed.names), streamed.shards.counts, streamed.notes)
print(len(copied.names), sorted(Counter(copied.splits).items()), sorted(Counter(copied.labels)))
"""
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(_Hub, directory=tmp_path / "hub")
    ) as server:
        server.others = []  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        own = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "home"),
            "HF_DATASETS_CACHE": "",
        }
        environment = {name: value for name, value in {**os.environ, **own}.items() if value}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120
        )
        server.shutdown()
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "30 (15, 15) ['not read: 2 shards of test']",
        "50 [('test', 20), ('train', 30)] ['a', 'b', 'c']",
    ]
    assert not any("agent" in path or "telemetry" in path for path in server.others)  # type: ignore[attr-defined]


# --- batches


def made_of(counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> Shards:
    """Shards whose images are their numbers."""

    def read(shards: Shards, number: int, start: int = 0) -> Iterator[Record]:
        first = sum(counts[:number])
        for image in range(first + start, first + counts[number]):
            yield Record(str(image), b"", None)

    monkeypatch.setattr("labelwise.images.streaming.read_shard", read)
    return Shards("tar", tuple(f"{number}.tar" for number in range(len(counts))), counts)


@pytest.mark.parametrize("block", [1, 7, 20, 1000])
def test_a_lane_gives_every_image_once_in_each_pass(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = made_of((5, 100, 9, 100, 6), monkeypatch)  # those of the other lane never come
    lane, own = Lane(shards, 0, 2, block, 1, 0), {*range(5), *range(105, 114), *range(214, 220)}
    taken = [int(image.record.name) for image in lane.take(60) if image.record]
    assert Counter(taken) == dict.fromkeys(own, 3) if 20 % block == 0 or block > 20 else set(taken) == own
    passes = [taken[:20], taken[20:40], taken[40:]]
    assert passes[0] != passes[1] != passes[2]
    if block > 1:
        assert taken[:5] != sorted(taken[:5])


@pytest.mark.parametrize("block", [1, 7, 20])
def test_a_lane_begins_anywhere_as_if_it_had_come_there(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = made_of((5, 9, 6), monkeypatch)
    whole = Lane(shards, 0, 1, block, 1, 0).take(100)
    for start in range(70):
        assert Lane(shards, 0, 1, block, 1, start).take(30) == whole[start : start + 30]


def stream(
    shards: Shards, *, own: range = range(4), step: int = 0, locked: frozenset[int] = frozenset(), part: int = 16, kept: DecodedShards | None = None
) -> Stream:  # fmt: skip
    return Stream(
        shards, lanes=4, own=own, batch_size=16, part_size=part, buffer=20, seed=3, side=12, intensity_range=None,
        shortest=512, locked=locked, step=step, kept=kept,
    )  # fmt: skip


def batches(opened: Stream, steps: range) -> list[Batch]:
    with opened:
        found = [opened.draw(step, 60) for step in steps]
    assert None not in found
    return [batch for batch in found if batch is not None]


def test_a_stream_that_begins_at_a_step_brings_what_it_would_have_brought(shards: Path) -> None:
    found, _ = open_shards(shards)
    whole = batches(stream(found), range(9))
    late = batches(stream(found, step=5), range(5, 9))
    for one, other in zip(whole[5:], late, strict=True):
        assert torch.equal(one.pixels, other.pixels)
        assert (one.keys == other.keys).all()
        assert (one.places == other.places).all()


@pytest.mark.parametrize("part", [16, 8])
def test_ranks_that_read_their_lanes_have_the_batch_of_one(shards: Path, part: int) -> None:
    found, _ = open_shards(shards)
    (whole,) = batches(stream(found, part=part), range(1))
    parts = np.arange(16).reshape(-1, 2, part // 2)  # as Ranks.share deals them
    for rank in range(2):
        (half,) = batches(stream(found, own=range(2 * rank, 2 * rank + 2), part=part), range(1))
        members = parts[:, rank].reshape(-1)
        assert len(half.pixels) == 8
        assert (half.keys[members] == whole.keys[members]).all()
        for own, all_of_it in zip(half.squares(members, torch.device("cpu")), whole.squares(members, torch.device("cpu")), strict=True):  # fmt: skip
            assert (np.asarray(own) == np.asarray(all_of_it)).all()


def test_what_cannot_be_read_or_is_locked_is_replaced_and_named(
    tmp_path: Path, files: list[Path], write_shards: Callable[..., Path]
) -> None:
    files[5].write_bytes(b"no image")
    found, _ = open_shards(write_shards(tmp_path / "shards", "tar", files, 4))
    locked = content_key(np.asarray(decode_image(files[20].read_bytes())[0]))
    gone = np.array(decode_image(files[20].read_bytes())[0].resize((12, 12), Image.Resampling.BICUBIC))
    opened = stream(found, locked=frozenset({locked}))
    seen = torch.cat([batch.pixels for batch in batches(opened, range(8))])
    assert len(seen) == 8 * 16
    assert not (seen == torch.from_numpy(gone)).all(dim=(1, 2, 3)).any()
    assert opened.left_out == {"shard-000.tar/00000005.png": "not an image we can read"}
    assert all(
        len(set(batch.keys.tolist())) == 16 for batch in batches(stream(found), range(4))
    )  # draws differ


def test_a_stream_of_rubbish_ends_with_a_reason(tmp_path: Path, files: list[Path], write_shards: Callable[..., Path]) -> None:  # fmt: skip
    for file in files:
        file.write_bytes(b"no image")
    found, _ = open_shards(write_shards(tmp_path / "shards", "tar", files, 4))
    with (
        pytest.raises(DataError, match=r"none of 13 images can be used, e\.g\. not an image we can read"),
        stream(found) as opened,
    ):
        opened.draw(0, 60)


def test_test_images_alone_are_no_stream(shards: Path) -> None:
    found, _ = open_shards(shards)
    with (
        pytest.raises(DataError, match="none of 13 images can be used: they are test images"),
        stream(found, locked=frozenset(keys_of(found))) as opened,
    ):
        opened.draw(0, 60)


def test_a_batch_of_locked_images_takes_others_of_their_lane(shards: Path, files: list[Path]) -> None:
    found, _ = open_shards(shards)
    first = {
        content_key(np.asarray(decode_image(file.read_bytes())[0])) for file in files[:9]
    }  # of 13 in lane 0
    opened = stream(found, locked=frozenset(first), own=range(1))
    seen = {tuple(image.flatten().tolist()) for batch in batches(opened, range(20)) for image in batch.pixels}
    assert len(seen) == 4


def test_a_slow_stream_keeps_nobody_waiting(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = open_shards(shards)
    free = threading.Event()

    def wait(*_: object) -> Iterator[None]:
        free.wait(30)
        yield from ()

    monkeypatch.setattr("labelwise.images.streaming.read_shard", wait)
    with stream(found) as opened:
        assert opened.draw(0, 0.01) is None
        assert opened.draw(0, 0.01) is None
    free.set()


@pytest.mark.parametrize(
    ("files", "part", "ranks", "lanes"),
    [(8, 256, 1, 8), (100, 256, 1, 16), (3, 256, 1, 1), (1, 256, 1, 1), (100, 32, 1, 2), (100, 30, 1, 1), (100, 4096, 64, 64), (8, 256, 4, 8), (4, 8, 4, 4), (9, 256, 1, 2), (10, 256, 1, 2), (15, 64, 1, 2)],
)  # fmt: skip
def test_lanes_share_batch_and_ranks_evenly(files: int, part: int, ranks: int, lanes: int) -> None:
    assert choose_lanes(Shards("tar", ("x",) * files, (1,) * files), part, ranks) == lanes


def test_fewer_shards_than_ranks_are_refused() -> None:
    with pytest.raises(UsageError, match="3 shards cannot be dealt to 4 devices or processes"):
        choose_lanes(Shards("tar", ("x",) * 3, (1,) * 3), 256, 4)


# --- kept decoded


def kept_in(shards: Shards, own: range = range(4), *, side: int = 12) -> DecodedShards:
    return DecodedShards(shards, own, side=side, intensity_range=None, shortest=512)


def whole_ones(folder: Path) -> list[str]:
    """Names of what is kept of whole shards; nobody may be at work any more."""
    assert not list(folder.glob(".*"))
    return sorted(file.stem for file in folder.glob("*.npz"))


def kept_batches(shards: Shards, steps: range, own: range = range(4), step: int = 0) -> list[Batch]:
    with kept_in(shards, own) as kept:
        return batches(stream(shards, own=own, step=step, kept=kept), steps)


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(first.pixels, second.pixels)
        and (first.keys == second.keys).all()
        and (first.true_sizes == second.true_sizes).all()
        for first, second in zip(one, other, strict=True)
    )


@pytest.fixture
def no_more_reading(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From when it is called, a shard that is read or an image that is decoded ends the test."""

    def read(shards: Shards, number: int, start: int = 0) -> Iterator[Record]:
        raise AssertionError(f"shard {number} is read")
        yield

    return lambda: monkeypatch.setattr("labelwise.images.streaming.read_shard", read)


def test_what_is_kept_decoded_is_what_is_decoded_and_the_shards_are_not_read_again(
    shards: Path, no_more_reading: Callable[[], None]
) -> None:
    found, _ = open_shards(shards)
    plain = batches(stream(found), range(20))
    assert same(kept_batches(found, range(20)), plain)
    with kept_in(found) as kept:
        folder = kept.folder
    names = sorted(file.name for file in folder.iterdir())
    assert names == ["000000.npz", "000000.pixels", "000001.npz", "000001.pixels", "000002.npz", "000002.pixels", "000003.npz", "000003.pixels", "facts.json"]  # fmt: skip
    no_more_reading()
    assert same(kept_batches(found, range(20)), plain)
    assert same(kept_batches(found, range(13, 20), step=13), plain[13:])


def test_each_process_keeps_the_shards_of_its_own_lanes(
    shards: Path, no_more_reading: Callable[[], None]
) -> None:
    found, _ = open_shards(shards)
    whole = batches(stream(found), range(20))
    folder = kept_in(found).folder
    for number, own in enumerate((range(2), range(2, 4))):
        kept_batches(found, range(20), own)
        assert len(list(folder.glob("*.npz"))) == 2 * (number + 1)
    no_more_reading()
    assert same(kept_batches(found, range(20)), whole), "what two kept one goes on with"


def test_a_stream_that_begins_within_a_shard_keeps_it_in_its_next_pass(shards: Path) -> None:
    found, _ = open_shards(shards)
    whole = batches(stream(found), range(40))
    assert same(kept_batches(found, range(1, 2), step=1), whole[1:2])
    with kept_in(found) as kept:
        folder = kept.folder
    assert [file.name for file in folder.iterdir()] == ["facts.json"], "none is whole, and none is left"
    assert same(kept_batches(found, range(2, 30), step=2), whole[2:30])
    assert len(list(folder.glob("*.npz"))) == 4


def test_images_that_cannot_be_used_are_kept_as_such(
    tmp_path: Path, files: list[Path], write_shards: Callable[..., Path], no_more_reading: Callable[[], None]
) -> None:
    files[5].write_bytes(b"no image")
    found, _ = open_shards(write_shards(tmp_path / "shards", "tar", files, 4))
    locked = frozenset({content_key(np.asarray(decode_image(files[20].read_bytes())[0]))})
    plain = batches(stream(found, locked=locked), range(20))
    for _ in range(2):
        with kept_in(found) as kept:
            opened = stream(found, locked=locked, kept=kept)
            assert same(batches(opened, range(20)), plain)
        assert opened.left_out == {"shard-000.tar/00000005.png": "not an image we can read"}
        no_more_reading()


def test_what_a_killed_process_was_at_work_on_is_deleted_and_what_another_is_stays(shards: Path) -> None:
    found, _ = open_shards(shards)
    with kept_in(found) as kept:
        batches(stream(found, kept=kept), range(1))
        at_work = {*kept.folder.glob(".*/*")}
        assert len(at_work) == 4
        left = kept.folder / ".at-work-and-killed"
        left.mkdir()
        (left / "000001.pixels").write_bytes(b"some")
        with kept_in(found):
            assert not left.exists()
            assert {*kept.folder.glob(".*/*")} >= at_work
    assert whole_ones(kept.folder) == []


@pytest.mark.parametrize("lag", [1, 3])
def test_two_runs_at_once_keep_the_same(shards: Path, lag: int, no_more_reading: Callable[[], None]) -> None:
    found, _ = open_shards(shards)
    plain = batches(stream(found), range(20))
    with kept_in(found) as one, kept_in(found) as other, stream(found, kept=one) as slow:
        first = [slow.draw(step, 60) for step in range(lag)]
        fast = batches(stream(found, kept=other), range(20))
        rest = [slow.draw(step, 60) for step in range(lag, 20)]
    slow_ones = [batch for batch in first + rest if batch is not None]
    assert same(fast, plain)
    assert same(slow_ones, plain)
    assert whole_ones(one.folder) == ["000000", "000001", "000002", "000003"]
    no_more_reading()
    assert same(kept_batches(found, range(20)), plain)


def test_an_image_that_is_neither_read_nor_kept_ends_the_stream(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = open_shards(shards)
    monkeypatch.setattr(DecodedShards, "has", lambda *_: True)
    with (
        kept_in(found) as kept,
        stream(found, kept=kept) as opened,
        pytest.raises(AssertionError, match="is neither read nor kept"),
    ):
        opened.draw(0, 60)


def test_a_failure_that_may_pass_is_not_kept(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = open_shards(shards)
    plain = batches(stream(found), range(20))
    real, failed = Readers.map, [False]

    def fail_once(self: Readers, rows: Sequence[int], locate: Callable[[int], str | bytes]) -> Iterator[Answer | UnreadableImage]:  # fmt: skip
        for answer in real(self, rows, locate):
            yield answer if failed[0] else UnreadableNow("takes more than 60 s to read")
            failed[0] = True

    monkeypatch.setattr(Readers, "map", fail_once)
    with kept_in(found) as kept:
        opened = stream(found, kept=kept)
        assert not same(batches(opened, range(2)), plain[:2])
        assert list(opened.left_out.values()) == ["takes more than 60 s to read"]
    assert same(kept_batches(found, range(20)), plain)
    assert len(whole_ones(kept.folder)) == 4


def test_an_error_of_the_system_deletes_nothing(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = open_shards(shards)
    plain = kept_batches(found, range(20))
    with kept_in(found) as kept, monkeypatch.context() as patch:

        def fail(_: Path) -> bytes:
            raise OSError(errno.EMFILE, "Too many open files")

        patch.setattr(Path, "read_bytes", fail)
        with pytest.raises(
            ResourceError, match=r"cannot be kept there \(Too many open files\); name another"
        ):
            kept.has(1)
    assert len(whole_ones(kept.folder)) == 4
    assert same(kept_batches(found, range(20)), plain)


def test_a_run_takes_one_descriptor_however_many_shards_are_begun(
    tmp_path: Path, files: list[Path], write_shards: Callable[..., Path]
) -> None:
    found, _ = open_shards(write_shards(tmp_path / "shards", "tar", files, 25))
    with kept_in(found, range(25)) as kept:
        before = len(os.listdir("/proc/self/fd"))
        for shard in range(25):
            kept.keep(shard, 0, "name", (((1, 1), 5), bytes(3 * 12**2)))
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("damage", ["a pixel", "cut", "facts", "facts cut", "facts gone", "other facts"])
def test_what_was_kept_and_is_damaged_is_decoded_again(shards: Path, damage: str) -> None:
    found, _ = open_shards(shards)
    plain = kept_batches(found, range(20))
    folder = kept_in(found).folder
    pixels, facts = folder / "000002.pixels", folder / "000002.npz"
    if damage == "a pixel":
        content = bytearray(pixels.read_bytes())
        content[500] ^= 1
        pixels.write_bytes(content)
        with pytest.raises(ResourceError, match="a decoded image is damaged; the same command goes on"):
            kept_batches(found, range(20))
        assert not pixels.exists()
    elif damage == "cut":
        os.truncate(pixels, 100)
    elif damage == "facts cut":
        facts.write_bytes(facts.read_bytes()[:-30])
    elif damage == "facts":
        content = bytearray(facts.read_bytes())
        content[6] ^= 1  # a flag of the archive, at which zipfile raises what it likes
        content[content.index(b"PK\x01\x02") + 8] ^= 1
        facts.write_bytes(content)
    elif damage == "facts gone":
        facts.unlink()
    else:
        shutil.copy(folder / "000003.npz", facts)  # a shard of fewer images
    assert same(kept_batches(found, range(20)), plain)
    assert facts.exists()


def test_kept_images_that_are_deleted_under_a_run_end_it_in_words(shards: Path) -> None:
    found, _ = open_shards(shards)
    kept_batches(found, range(20))
    with kept_in(found) as kept, stream(found, kept=kept) as opened:
        opened.draw(0, 60)
        shutil.rmtree(kept.folder)
        with pytest.raises(ResourceError, match="deleted while they were in use; the same command goes on"):
            for step in range(1, 9):
                opened.draw(step, 60)


def test_without_room_for_what_is_kept_it_is_said_before(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = open_shards(shards)
    room = 25 * 3 * 12**2  # of 24 images in the first and the last shard
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, room))  # type: ignore[attr-defined]
    with pytest.raises(ResourceError, match=r"need 0\.0 GiB .* leave out --keep-decoded, or use a smaller"):
        kept_in(found)
    kept_batches(found, range(20), range(1))
    kept_batches(found, range(20), range(3, 4))
    with pytest.raises(ResourceError):
        kept_in(found)
    kept_batches(found, range(20), range(1, 2))
    kept_in(found)  # one shard is missing


def test_a_disk_that_is_full_while_images_are_kept_ends_in_words(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = open_shards(shards)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(ResourceError, match="no space is left for decoded images"):
        kept_batches(found, range(1))
    with kept_in(found) as kept:
        pass
    assert whole_ones(kept.folder) == []


def test_files_of_unknown_age_are_not_kept(address: str) -> None:
    found, _ = open_shards(Path(address))  # the server tells fsspec nothing but sizes
    with pytest.raises(UsageError, match="does not tell how old each of its files is"):
        kept_in(found)


def test_a_link_is_as_old_as_what_it_leads_to(shards: Path, tmp_path: Path) -> None:
    links = tmp_path / "links"
    links.mkdir()
    for file in shards.iterdir():
        (links / file.name).symlink_to(file)
    before = open_shards(links)[0].digest
    os.utime(next(shards.iterdir()), (1, 1))
    assert before != open_shards(links)[0].digest != ""


def test_other_files_or_sizes_are_kept_elsewhere(shards: Path, photo: Photo, files: list[Path]) -> None:
    found, _ = open_shards(shards)
    places = {kept_in(found).folder, kept_in(found, side=13).folder}
    os.utime(found.files[1], (1, 1))
    places.add(kept_in(open_shards(shards)[0]).folder)
    assert len(places) == 3
    assert {path for path, _, images in list_caches() if images == 50} >= places
