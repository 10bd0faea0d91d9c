"""The scripts in data/, on a small archive and, where they are at hand, on the real sets.

The real sets are looked for in the folder that LABELWISE_TEST_DATA names.
"""

import os
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from labelwise import rundir
from labelwise.config import FinetuneSettings, PretrainSettings, read_recipe
from labelwise.recipes import find_recipe
from labelwise.stages.pretraining import pretrain
from labelwise.stages.repeating import finetune
from labelwise.stages.reporting import report

SCRIPT = Path(__file__).parent.parent / "data" / "subset.py"


def subset(source: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), str(source), str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def names(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*.jpg")}


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Twenty files of each of two classes to train on, ten to test on."""
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as file:
        for split, count in (("train", 20), ("test", 10)):
            for label in ("cat", "dog"):
                for number in range(count):
                    file.writestr(f"{split}/{label}/{number}.jpg", f"{split} {label} {number}")
    return path


def test_parts_have_the_same_number_of_each_class_and_share_no_image(archive: Path, tmp_path: Path) -> None:
    parts = []
    for part in ("0", "1"):
        out = tmp_path / part
        assert subset(archive, out, "--train", "10", "--test", "4", "--part", part).returncode == 0
        parts.append(names(out))
    assert Counter(name.rsplit("/", 1)[0] for name in parts[0]) == {
        "train/cat": 5, "train/dog": 5, "test/cat": 2, "test/dog": 2,
    }  # fmt: skip
    assert not parts[0] & parts[1]


def test_a_folder_gives_the_same_part_as_its_archive(archive: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path / "folder")
    for source, out in ((archive, "from-zip"), (tmp_path / "folder", "from-folder")):
        assert subset(source, tmp_path / out, "--train", "10", "--test", "4").returncode == 0
    assert names(tmp_path / "from-zip") == names(tmp_path / "from-folder")


def test_a_part_that_is_not_there_is_refused(archive: Path, tmp_path: Path) -> None:
    done = subset(archive, tmp_path / "out", "--train", "10", "--test", "4", "--part", "9")
    assert done.returncode == 1
    assert "20 images are too few for part 9 of 5 each" in done.stderr


@pytest.mark.slow
def test_a_little_of_cifar10_is_learned_from(tmp_path: Path) -> None:
    source = Path(os.environ.get("LABELWISE_TEST_DATA", "")) / "cifar10.zip"
    if not source.is_file():
        pytest.skip("cifar10.zip is not in the folder that LABELWISE_TEST_DATA names")
    assert subset(source, tmp_path / "cifar", "--train", "2000", "--test", "500").returncode == 0
    recipe = read_recipe(find_recipe("cifar10-cpu"), PretrainSettings)
    settings = PretrainSettings.resolve(
        {"images": tmp_path / "cifar", "out": tmp_path / "run", "epochs": 12}, recipe
    )
    run = pretrain(settings)
    losses = [row["loss"] for row in rundir.read_jsonl(run.metrics) if row["kind"] == "epoch"]
    assert losses[-1] < losses[0] - 0.3
    asked = FinetuneSettings(
        run=run.path, label_counts=(100,), draws=2, methods=("simclr_probe", "random_probe")
    )
    arms = report(finetune(asked))["summary"][0]["arms"]
    assert arms["simclr_probe"]["mean"] > arms["random_probe"]["mean"] + 0.03
    assert np.isfinite(arms["simclr_probe"]["mean"])
