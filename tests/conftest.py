"""Fixtures of all tests: a cache of one's own, and images to put into folders."""

import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from labelwise.rundir import RunDirectory

# Read once, on import, by the libraries that colour and wrap what the command prints.
for name in (
    "GITHUB_ACTIONS",
    "FORCE_COLOR",
    "PY_COLORS",
    "TTY_COMPATIBLE",
    "TERMINAL_WIDTH",
    "TYPER_USE_RICH",
):
    os.environ.pop(name, None)
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # tests compare bit by bit, which a GPU does not promise


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long", action="store_true", help="with -m torture: as many trials as docs/reliability.md tells of"
    )


@pytest.fixture(autouse=True, scope="session")
def compiled() -> Iterator[None]:
    """Let the processes that tests start share what numba compiled, which takes ten seconds each time."""
    if "NUMBA_CACHE_DIR" in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("NUMBA_CACHE_DIR", folder)
        yield


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder that the test's image caches lie in."""
    folder = tmp_path.with_name(f"{tmp_path.name}-cache")  # not among images that a test puts there
    monkeypatch.setenv("LABELWISE_CACHE", str(folder))
    return folder


@pytest.fixture
def photo() -> Callable[..., Image.Image]:
    """Write a random image with structure, of (width, height), and give it as it was before the file's format."""

    def write(path: Path, seed: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
        rng = np.random.default_rng(seed)
        coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
        image.paste(tuple(rng.integers(0, 256, 3).tolist()), (2, 3, 2 + size[0] // 3, 3 + size[1] // 4))
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        return image

    return write


def put_into_shards(folder: Path, kind: str, files: list[Path], count: int) -> Path:
    """Pack image files, with their folders' names for classes, into so many shards; the last is a shorter one."""
    folder.mkdir(parents=True)
    each = -(-len(files) // count)
    for number in range(count):
        part, name = files[number * each : (number + 1) * each], folder / f"shard-{number:03d}.{kind}"
        if kind == "parquet":
            rows = {
                "image": [{"bytes": file.read_bytes(), "path": None} for file in part],
                "label": [file.parent.name for file in part],
            }
            pa.parquet.write_table(pa.table(rows), name, row_group_size=10)
            continue
        with tarfile.open(name, "w") as archive:
            for place, file in enumerate(part):
                for suffix, content in (
                    (file.suffix, file.read_bytes()),
                    (".cls", file.parent.name.encode()),
                ):
                    member = tarfile.TarInfo(f"{number:03d}{place:05d}{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return folder


@pytest.fixture(scope="session")
def write_shards() -> Callable[..., Path]:
    """Pack image files into shards, see `put_into_shards`."""
    return put_into_shards


def write_some_digits(folder: Path, every: int) -> Path:
    """Write each so many-th of the handwritten digits into class folders."""
    from labelwise.stages.demo import write_digits

    write_digits(folder)
    for number, file in enumerate(sorted(folder.glob("*/*.png"))):
        if number % every:
            file.unlink()
    return folder


@pytest.fixture(scope="session")
def some_digits() -> Callable[[Path, int], Path]:
    """`write_some_digits`, for fixtures of other files."""
    return write_some_digits


@pytest.fixture(scope="session")
def small_network() -> dict[str, Any]:
    """Settings of an encoder that trains in a second."""
    return {
        "backbone": "resnet18",
        "backbone_args": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]},
        "stem": "half",
        "image_size": 16,
        "batch_size": 64,
        "epochs": 1,
        "precision": "fp32",
    }


@pytest.fixture(scope="session")
def rename_classes() -> Callable[["RunDirectory", list[str]], None]:
    """Give a classifier other names of classes, as one of an earlier version, whose weights do not tell them."""

    def rename(run: "RunDirectory", names: list[str]) -> None:
        with safe_open(run.classifier, framework="pt") as file:
            header = {
                key: value for key, value in file.metadata().items() if key not in ("classes", "sha256")
            }
        save_file(load_file(run.classifier), run.classifier, header)
        facts = json.loads(run.classifier_json.read_text(encoding="utf-8"))
        run.classifier_json.write_text(json.dumps({**facts, "classes": names}), encoding="utf-8")

    return rename


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory, small_network: dict[str, Any]) -> "RunDirectory":
    """A small encoder of some digits, pretrained for one epoch; to be copied, not written to."""
    folder = tmp_path_factory.mktemp("pretrained")
    write_some_digits(folder / "images", 6)
    return pretrain_in(folder, **small_network)


def pretrain_in(folder: Path, **settings: Any) -> "RunDirectory":
    """Pretrain on `images` in a folder, with the run and the cache of its own beside them."""
    from labelwise.config import PretrainSettings
    from labelwise.stages.pretraining import pretrain

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LABELWISE_CACHE", str(folder / "cache"))
        return pretrain(PretrainSettings(images=folder / "images", out=folder / "run", **settings))


@pytest.fixture(scope="session")
def pretrain_there() -> Callable[..., "RunDirectory"]:
    """`pretrain_in`, for fixtures of other files."""
    return pretrain_in


@pytest.fixture
def run(unlabeled: "RunDirectory", tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "RunDirectory":
    """A copy to write to of what a file's own `unlabeled` is, with the cache that is there."""
    from labelwise.rundir import RunDirectory

    monkeypatch.setenv("LABELWISE_CACHE", str(unlabeled.path.parent / "cache"))
    return RunDirectory(Path(shutil.copytree(unlabeled.path, tmp_path / "run")))


@pytest.fixture(scope="session")
def classified(pretrained: "RunDirectory", tmp_path_factory: pytest.TempPathFactory) -> "RunDirectory":
    """The same with a classifier of a few steps; to be copied, not written to."""
    from labelwise.config import FinetuneSettings
    from labelwise.stages.repeating import finetune

    folder = tmp_path_factory.mktemp("classified")
    shutil.copytree(pretrained.path, folder / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LABELWISE_CACHE", str(folder / "cache"))
        return finetune(
            FinetuneSettings(run=folder / "run", methods=("simclr",), label_counts=("all",), steps=20)
        )
