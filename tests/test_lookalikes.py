"""Test images that resemble training images: copies planted behind the back of the search by pixels are found and counted out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from labelwise import rundir
from labelwise.config import FinetuneSettings, PretrainSettings
from labelwise.images.grouping import Groups
from labelwise.images.near_copies import NearCopies
from labelwise.measures import knn
from labelwise.measures.knn import resembling
from labelwise.predictions import read_predictions
from labelwise.stages import benching, pretraining
from labelwise.stages.checking import _crop_a_little
from labelwise.stages.pretraining import pretrain
from labelwise.stages.repeating import finetune
from labelwise.stages.reporting import report
from labelwise.stages.verifying import verify

ASKED: dict[str, Any] = {"methods": ("simclr", "supervised"), "label_counts": (8,), "draws": 3, "steps": 2, "scratch_steps": 2}  # fmt: skip
COPIED = ("train/a/3.jpg", "train/b/5.jpg")


def test_what_resembles_a_row_more_than_its_own_copy_is_that_of_loops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(knn, "_BLOCK", 50 * 7)  # chunks of seven
    rng = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(50, 8, generator=rng), torch.randn(200, 8, generator=rng)
    altered = queries + 1.2 * torch.randn(200, 8, generator=rng)
    expected = []
    for place, (query, copy) in enumerate(zip(queries, altered, strict=True)):
        scores = [float(torch.cosine_similarity(query, each, dim=0)) for each in bank]
        own = float(torch.cosine_similarity(query, copy, dim=0))
        if max(scores) >= own:
            expected.append((place, int(np.argmax(scores)), max(scores), own))
    expected.sort(key=lambda pair: -pair[2])
    found = resembling(queries, altered, bank)
    assert 20 < len(found) < 180
    assert [pair[:2] for pair in found] == [pair[:2] for pair in expected]
    assert np.array(found) == pytest.approx(np.array(expected), abs=1e-5)


def test_a_slight_crop_is_the_middle_at_the_same_size() -> None:
    ramp = np.broadcast_to(np.arange(40, dtype=np.uint8)[None, None, :, None] * 5, (3, 40, 40, 3))
    cropped = _crop_a_little(ramp)
    assert cropped.shape == ramp.shape
    expected = 5 * (
        2 + (np.arange(40) + 0.5) * 36 / 40 - 0.5
    )  # of the 36 pixels in the middle, two off at each end
    assert np.abs(cropped[1, 7, 3:-3, 2] - expected[3:-3]).max() < 1.5


def test_planted_copies_are_listed_first_and_the_gain_without_them_is_told(
    tmp_path: Path, photo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = tmp_path / "images"
    for number in range(30):
        for place, label in enumerate("ab"):
            photo(images / "train" / label / f"{number}.jpg", 100 * place + number, (64, 48))
    for number in range(8):
        for place, label in enumerate("ab"):
            photo(images / "test" / label / f"{number}.jpg", 1000 + 100 * place + number, (64, 48))
    for name in COPIED:
        source = Path(name)
        whole = photo(
            tmp_path / "again.png", 100 * "ab".index(source.parent.name) + int(source.stem), (64, 48)
        )
        whole.save(images / "test" / source.parent.name / "copy.jpg", quality=60)

    def everyone_alone(images: Any, *_: Any) -> Groups:
        return Groups(np.arange(len(images.names)), NearCopies.none(), {}, [])

    for stage in (pretraining, benching):
        monkeypatch.setattr(stage, "group_images", everyone_alone)
    backbone: dict[str, Any] = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}
    settings = PretrainSettings(
        images=images, out=tmp_path / "run", backbone_args=backbone, stem="half", image_size=32, batch_size=20, epochs=20, precision="fp32",
    )  # fmt: skip
    run = pretrain(settings)
    document = report(finetune(FinetuneSettings(run=run.path, **ASKED)))
    found = document["lookalikes"]
    assert found["tested"] == 18
    assert {tuple(pair["names"]) for pair in found["pairs"][:2]} == {
        (f"test/{Path(name).parent.name}/copy.jpg", name) for name in COPIED
    }
    assert len(found["pairs"]) < 18
    for pair in found["pairs"]:
        test, other = (Path(name).parent.name for name in pair["names"])
        assert pair["other_label"] is (test != other)
    other_labels = sum(pair["other_label"] for pair in found["pairs"])
    assert (f"{other_labels} of these pairs have two labels" in run.report_html.read_text()) is (
        other_labels > 0
    )
    alike = {pair["names"][0] for pair in found["pairs"]}
    predictions = read_predictions(run.predictions)
    right: dict[str, list[bool]] = {"simclr": [], "supervised": []}
    for name, method, label, predicted in zip(
        *(predictions[key] for key in ("name", "method", "label", "prediction")), strict=True
    ):
        if name not in alike:
            right[method].append(label == predicted)
    assert found["gains"][0]["mean"] == pytest.approx(np.mean(right["simclr"]) - np.mean(right["supervised"]))
    assert "Test images that resemble training images" in run.report_html.read_text()
    assert (
        f"{len(alike)} of 18 test images are, to the encoder, as like an image outside"
        in run.report_md.read_text()
    )
    assert verify(run)["classifiers"] == 6
    pictured = [pair for pair in rundir.read_json(run.lookalikes)["pairs"] if "thumbnails" in pair]
    assert len(pictured) == min(12, len(alike))
    before = run.lookalikes.read_bytes()
    run.lookalikes.write_bytes(before + b"\n")
    finetune(FinetuneSettings(run=run.path, **ASKED))
    assert run.lookalikes.read_bytes() == before + b"\n", "it is not made again"
    finetune(FinetuneSettings(run=run.path, **{**ASKED, "steps": 3}))
    assert rundir.read_json(run.lookalikes)["signature"] != found_signature(before)
    assert report(run)["lookalikes"]["pairs"] == found["pairs"]
    rundir.write_json(run.lookalikes, {**rundir.read_json(run.lookalikes), "signature": "of other results"})
    assert report(run)["lookalikes"] is None


def found_signature(file: bytes) -> str:
    """Of a file of JSON."""
    signature: str = json.loads(file)["signature"]
    return signature
