"""Whether images are like those of an earlier run."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from labelwise import rundir
from labelwise.config import PretrainSettings
from labelwise.models.familiar import load_familiar, save_familiar
from labelwise.models.weights import read_hash
from labelwise.rundir import RunDirectory
from labelwise.stages.pretraining import pretrain


@pytest.fixture
def images(classified: RunDirectory, tmp_path: Path) -> Path:
    return Path(shutil.copytree(rundir.read_json(classified.data)["root"], tmp_path / "images"))


def start(run: RunDirectory, images: Path, small_network: dict[str, Any]) -> RunDirectory:
    settings = {
        key: value
        for key, value in small_network.items()
        if key in ("image_size", "batch_size", "epochs", "precision")
    }
    return pretrain(
        PretrainSettings(images=images, init=str(run.path), out=images.parent / "next", **settings)
    )


def test_images_like_the_earlier_ones_are_as_they_should_be(
    classified: RunDirectory, images: Path, small_network: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    start(classified, images, small_network)
    said = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert re.search(
        r"new [0-2]\.\d% of 240 images are less like those of run than 99% of these are, which is as it should be",
        said,
    )


def test_images_of_another_kind_are_named(
    classified: RunDirectory, images: Path, small_network: dict[str, Any], photo: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for number in range(60):
        photo(images / f"new-{number}.png", seed=number)
    start(classified, images, small_network)
    said = re.sub(r"\s+", " ", capsys.readouterr().err)
    found = re.search(r"your images differ from those that run was made with: (\d+)% of 300 images", said)
    assert found
    assert 15 <= int(found[1]) <= 25
    assert re.search(r"\(1% would be usual\), e\.g\. [^ ]+, [^ ]+, [^ ]+\. What", said)


def test_where_the_classifier_was_distilled_since_that_is_said(
    classified: RunDirectory,
    images: Path,
    tmp_path: Path,
    small_network: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = RunDirectory(Path(shutil.copytree(classified.path, tmp_path / "before")))
    familiar = load_familiar(before.familiar, read_hash(before.classifier))
    assert familiar is not None
    save_familiar(before.familiar, familiar, "another")
    start(before, images, small_network)
    words = " ".join(capsys.readouterr().err.split())
    assert "how many are new to before is not known: its classifier is distilled" in words


def test_labels_and_suggestions_come_along(
    classified: RunDirectory, images: Path, tmp_path: Path, small_network: dict[str, Any]
) -> None:
    before = RunDirectory(Path(shutil.copytree(classified.path, tmp_path / "before")))
    row = {
        "file": "0/0000.png",
        "key": 1,
        "answer": "label",
        "label": "0",
        "part": "test",
        "who": "me",
        "at": "now",
        "seconds": None,
    }
    rundir.append_jsonl(before.annotations, row)
    rundir.append_jsonl(
        before.suggested, {"at": "now", "budget": 1, "files": ["0/0000.png"], "as_if_unlabeled": False}
    )
    after = start(before, images, small_network)
    assert rundir.read_jsonl(after.annotations) == rundir.read_jsonl(before.annotations)
    assert rundir.read_jsonl(after.suggested) == rundir.read_jsonl(before.suggested)
