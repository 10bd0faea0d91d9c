"""Features of images on disk, and the images of a run that are like others."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from labelwise.cli import app
from labelwise.errors import DataError, UsageError
from labelwise.images.cache import build_cache
from labelwise.images.source import open_images
from labelwise.models.features import extract_features
from labelwise.models.weights import load_encoder
from labelwise.rundir import RunDirectory, read_json
from labelwise.stages.embedding import embed, neighbours, show, show_neighbours


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory, some_digits: Callable[[Path, int], Path]) -> Path:
    return some_digits(tmp_path_factory.mktemp("new") / "digits", 20)


def test_features_are_those_of_the_encoder_in_either_file(
    pretrained: RunDirectory, digits: Path, tmp_path: Path
) -> None:
    for name in ("out.parquet", "out.npz"):
        document = embed(pretrained, [digits], tmp_path / name)
    images = open_images(digits)
    encoder, spec = load_encoder(pretrained.path)
    cache = build_cache(images, side=16, evaluation_size=spec.image_size)
    rows = np.arange(len(images.names))
    expected = extract_features(encoder, cache.evaluations, rows, spec.normalization, torch.device("cpu"))
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["file"].to_pylist() == images.names
    np.testing.assert_allclose(np.array(table["embedding"].to_pylist()), expected, atol=1e-5)
    assert pq.ParquetFile(tmp_path / "out.parquet").num_row_groups == 1
    arrays = np.load(tmp_path / "out.npz")
    assert arrays["files"].tolist() == images.names
    np.testing.assert_array_equal(arrays["embeddings"], np.array(table["embedding"].to_pylist(), np.float32))
    assert (document["images"], document["width"]) == expected.shape


def test_several_devices_give_the_same_features(
    pretrained: RunDirectory, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed(pretrained, [digits], tmp_path / "one.npz")
    monkeypatch.setattr("labelwise.images.cache._DECODED", (0, 8, 8))
    monkeypatch.setattr("labelwise.stages.embedding.choose_devices", lambda *_: [torch.device("cpu")] * 3)
    embed(pretrained, [digits], tmp_path / "three.npz", devices="3")
    one, three = np.load(tmp_path / "one.npz"), np.load(tmp_path / "three.npz")
    assert one["files"].tolist() == three["files"].tolist()
    np.testing.assert_allclose(one["embeddings"], three["embeddings"], atol=1e-5)


def test_what_cannot_be_read_is_left_out_by_name(
    pretrained: RunDirectory,
    tmp_path: Path,
    photo: Callable[..., Image.Image],
    capsys: pytest.CaptureFixture[str],
) -> None:
    photo(tmp_path / "photos" / "good.png")
    (tmp_path / "photos" / "bad.png").write_bytes(b"no image")
    document = embed(pretrained, [tmp_path / "photos"], tmp_path / "out.parquet")
    assert document["left_out"] == [{"file": "bad.png", "reason": "not an image we can read"}]
    assert pq.read_table(tmp_path / "out.parquet")["file"].to_pylist() == ["good.png"]
    show(document)
    assert "left out  bad.png: not an image we can read" in capsys.readouterr().out
    with pytest.raises(DataError, match="none of the 1 images can be read"):
        embed(pretrained, [tmp_path / "photos" / "bad.png"], tmp_path / "none.npz")
    assert not list(tmp_path.glob("*none*"))


def test_nothing_is_written_over_or_among_images(
    pretrained: RunDirectory, digits: Path, tmp_path: Path
) -> None:
    (tmp_path / "there.npz").touch()
    own = Path(read_json(pretrained.data)["sources"]["images"])
    for out, words in (
        (tmp_path / "there.npz", "is there already"),
        (tmp_path / "out.csv", r"name a \.parquet or a \.npz file"),
        (digits / "out.npz", "never written to"),
        (own / "out.npz", "never written to"),
    ):
        with pytest.raises(UsageError, match=words):
            embed(pretrained, [digits], out)


def test_an_image_of_the_run_is_its_own_neighbour_and_its_class_is_near(
    pretrained: RunDirectory, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    own = Path(read_json(pretrained.data)["sources"]["images"])
    asked = [own / name for name in open_images(own).names[::30]]
    shutil.copy(asked[0], tmp_path / "copy.png")
    found = neighbours(pretrained, [*asked, tmp_path / "copy.png"], count=5)
    assert [entry["file"] for entry in found] == [str(path) for path in (*asked, tmp_path / "copy.png")]
    for entry, path in zip(found, [*asked, asked[0]], strict=True):
        similar = [near["similarity"] for near in entry["neighbours"]]
        assert similar[0] == pytest.approx(1, abs=1e-5)
        assert similar == sorted(similar, reverse=True)
        own_row = next(
            near for near in entry["neighbours"] if near["file"] == path.relative_to(own).as_posix()
        )
        assert (own_row["label"], own_row["similarity"]) == (path.parent.name, pytest.approx(1, abs=1e-5))
    show_neighbours(found[:1])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(asked[0])
    assert len(lines) == 6


def test_the_commands_take_what_the_functions_do(
    pretrained: RunDirectory, digits: Path, tmp_path: Path
) -> None:
    file = next(digits.glob("*/*.png"))
    run = ["--run", str(pretrained.path)]
    assert not app(
        ["embed", str(digits), *run, "--out", str(tmp_path / "e.npz"), "--json"], standalone_mode=False
    )
    assert not app(["neighbours", str(file), *run, "--count", "2", "--json"], standalone_mode=False)
    assert (tmp_path / "e.npz").exists()
