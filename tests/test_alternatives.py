"""Networks that others trained beside our own: weights made on the spot, loaded strictly, left out with a reason."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from labelwise import rundir
from labelwise.config import FinetuneSettings, read_own_weights
from labelwise.errors import DataError, UsageError
from labelwise.images.cache import build_cache, read_evaluations
from labelwise.images.source import open_images
from labelwise.models.encoder import EncoderSpec, create_encoder, keep_resolution, pretrained_spec
from labelwise.models.weights import load_backbone, load_encoder
from labelwise.predictions import read_predictions
from labelwise.rundir import RunDirectory
from labelwise.stages.repeating import finetune
from labelwise.stages.reporting import report
from labelwise.stages.verifying import verify

NARROW: dict[str, Any] = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}
SPEC = EncoderSpec("resnet18", NARROW, "stock", 32, (0.5,) * 3, (0.25,) * 3)
FEW: dict[str, Any] = {"label_counts": (20,), "draws": 3, "steps": 2, "scratch_steps": 2}
TABLE = """
[mine]
backbone = "resnet18"
backbone_args = {layers = [1, 1, 1, 1], channels = [8, 8, 16, 16]}
weights = "mine.safetensors"
image_size = 32
mean = [0.5, 0.5, 0.5]
std = [0.25, 0.25, 0.25]
"""
WHOLE = TABLE.replace("image_size = 32", "image_size = 16\nfinetune = true")


@pytest.fixture
def run(pretrained: RunDirectory, tmp_path: Path) -> RunDirectory:
    return RunDirectory(Path(shutil.copytree(pretrained.path, tmp_path / "run")))


def weights(seed: int) -> dict[str, torch.Tensor]:
    """Of a network with a classifier, as timm gives it."""
    torch.manual_seed(seed)
    return dict(timm.create_model("resnet18", num_classes=7, **NARROW).state_dict())


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A file that names weights of one's own."""
    save_file(weights(0), tmp_path / "mine.safetensors")
    (tmp_path / "own.toml").write_text(TABLE)
    return tmp_path / "own.toml"


# --- weights


@pytest.mark.parametrize("prefix", ["", "module.", "backbone."])
@pytest.mark.parametrize("kind", ["safetensors", "pth", "checkpoint.pth"])
def test_weights_are_found_behind_a_prefix_and_in_a_checkpoint(
    tmp_path: Path, prefix: str, kind: str
) -> None:
    state = weights(3)
    file = tmp_path / f"weights.{kind}"
    held = {prefix + key: value for key, value in state.items()}
    if kind == "safetensors":
        save_file(held, file)
    else:
        torch.save({"epoch": 3, "state_dict": held} if kind == "checkpoint.pth" else held, file)
    encoder = create_encoder(SPEC)
    load_backbone(file, encoder)
    for key, value in encoder.backbone.state_dict().items():
        assert torch.equal(value, state[key])


class Code:
    """What a pickle may run when it is opened."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


def test_what_are_not_the_weights_is_refused_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    encoder = create_encoder(SPEC)
    state = weights(0)
    before = {key: value.clone() for key, value in encoder.backbone.state_dict().items()}
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "code.pth").write_bytes(pickle.dumps(Code()))
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"model": 3}, tmp_path / "number.pth")
    torch.save({1: torch.zeros(1)}, tmp_path / "keys.pth")
    save_file(
        {key: value for key, value in state.items() if "layer3" not in key}, tmp_path / "part.safetensors"
    )
    wide = timm.create_model("resnet18", num_classes=0, layers=[1, 1, 1, 1]).state_dict()
    save_file(dict(wide), tmp_path / "wide.safetensors")
    names = ["text.safetensors", "text.pth", "code.pth", "list.pth", "number.pth", "keys.pth", "part.safetensors", "wide.safetensors", "gone.pth"]  # fmt: skip
    for name in names:
        with pytest.raises(DataError, match=name):
            load_backbone(tmp_path / name, encoder)
    assert not (tmp_path / "ran").exists()
    for key, value in encoder.backbone.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_the_spec_of_timms_weights_is_what_they_were_trained_with() -> None:
    spec = pretrained_spec("resnet18")
    assert (spec.image_size, spec.stem, spec.mean) == (224, "stock", (0.485, 0.456, 0.406))
    assert pretrained_spec("resnet18", 96).image_size == 96
    with pytest.raises(UsageError, match="timm has no weights for resnet18d_no"):
        pretrained_spec("resnet18d_no")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[mine]\nbackbone = 3", "mine.backbone"),
        ("[mine]\nbackbone = 'resnet18'", "mine.weights: Field required"),
        ("[mine]\nbackbone = 'resnet18'\nweights = 'a'\nsize = 3", "mine.size"),
        ("[pixels]\nbackbone = 'resnet18'\nweights = 'a'", "that no method has"),
        ("['my net']\nbackbone = 'resnet18'\nweights = 'a'", "choose a name of small letters"),
        ("mine = 3", "mine"),
        ("[mine", "not a TOML file"),
        ("", "names no weights"),
        ("[encoder]\nbackbone = 'resnet18'\nweights = 'a'", "that no method has"),
        ("[mine]\nbackbone = 'resnet18'\nweights = 'a'\nstd = [0.2, 0, 0.2]", "mine.std.1"),
        ("[mine]\nbackbone = 'resnet18'\nweights = 'a'\nimage_size = 20000", "mine.image_size"),
    ],
)
def test_a_file_of_weights_that_is_not_understood_is_refused_in_words(
    tmp_path: Path, text: str, words: str
) -> None:
    (tmp_path / "own.toml").write_text(text)
    with pytest.raises(UsageError, match=words):
        read_own_weights(tmp_path / "own.toml")
    with pytest.raises(UsageError, match="no such file of weights"):
        read_own_weights(tmp_path / "nowhere.toml")


def test_images_decoded_for_others_are_those_of_the_cache(tmp_path: Path, photo: Any) -> None:
    for seed in range(5):
        photo(tmp_path / "photos" / f"{seed}.jpg", seed, (120, 90))
    images = open_images(tmp_path / "photos")
    cache = build_cache(images, side=40, evaluation_size=32)
    rows = np.array([4, 1, 2])
    chunks = list(read_evaluations(images, rows, 32, None))
    assert np.concatenate([chunk for chunk, _ in chunks]).tolist() == rows.tolist()
    np.testing.assert_array_equal(np.concatenate([pixels for _, pixels in chunks]), cache.evaluations[rows])
    (tmp_path / "photos" / "1.jpg").unlink()
    with pytest.raises(DataError, match=r"1\.jpg: could be read before, and now not"):
        list(read_evaluations(images, rows, 32, None))


# --- in a comparison


def test_own_weights_are_compared_and_the_verdict_names_them(
    run: RunDirectory, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {"methods": ("simclr_probe", "simclr", "supervised", str(own)), **FEW}
    document = report(finetune(FinetuneSettings(run=run.path, **asked)))
    entry = document["summary"][0]
    assert set(entry["arms"]) == {"simclr_probe", "simclr", "supervised", "mine"}
    assert document["arm_names"]["mine"] == "mine, linear probe"
    assert [c for c in entry["comparisons"] if (c["arm"], c["against"]) == ("simclr", "mine")]
    assert "Against mine: " in document["verdict"]
    assert "mine, linear probe" in run.report_html.read_text()
    rows = {row["method"]: row for row in rundir.read_jsonl(run.results)}
    assert rows["mine"]["weights"].startswith("mine.safetensors ")
    assert rows["simclr"]["weights"] is None
    before = rundir.read_jsonl(run.results)
    finetune(FinetuneSettings(run=run.path, **asked))
    assert rundir.read_jsonl(run.results) == before
    save_file(weights(1), own.parent / "mine.safetensors")
    finetune(FinetuneSettings(run=run.path, **{**asked, "draws": 2}))
    again = rundir.read_jsonl(run.results)
    assert [row for row in again if row["method"] != "mine"] == [
        row for row in before if row["method"] != "mine"
    ], "only what has other weights is trained again"
    found = [row for row in again if row["method"] == "mine"]
    assert [row["draw"] for row in found] == [0, 1], "the third draw was of other weights"
    assert rows["mine"]["weights"] not in {row["weights"] for row in found}
    assert "earlier results of mine came from other weights and are dropped" in " ".join(
        capsys.readouterr().err.split()
    )
    report(run)
    assert verify(run)["classifiers"] == 11
    own.write_text(TABLE.replace("image_size = 32", "image_size = 16"))
    finetune(FinetuneSettings(run=run.path, **asked))
    sources = {row["weights"] for row in rundir.read_jsonl(run.results) if row["method"] == "mine"}
    assert len(sources) == 1
    assert not sources & {row["weights"] for row in found}, "the same weights on images of another size"
    with pytest.raises(UsageError, match=r"\[mine\] is named in another file too"):
        finetune(FinetuneSettings(run=run.path, methods=(str(own), str(own)), **FEW))


def test_features_are_those_of_the_network_on_images_of_its_own_size(run: RunDirectory, own: Path) -> None:
    """The probe on a network that tells nothing is as good as chance; on pixels it is not."""
    blind = {key: torch.zeros_like(value) for key, value in weights(0).items()}
    save_file(blind, own.parent / "mine.safetensors")
    asked: dict[str, Any] = {"methods": ("pixels", str(own)), "label_counts": (100,), "draws": 3}
    arms = report(finetune(FinetuneSettings(run=run.path, **asked)))["summary"][0]["arms"]
    assert arms["mine"]["mean"] < 0.2
    assert arms["pixels"]["mean"] > 0.6


def test_weights_that_cannot_be_loaded_are_left_out_with_the_reason(
    run: RunDirectory, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    diverged = {key: value * torch.nan if "conv" in key else value for key, value in weights(0).items()}
    save_file(diverged, own.parent / "mine.safetensors")
    finetune(FinetuneSettings(run=run.path, methods=("pixels", str(own)), **FEW))
    assert "mine is left out: its features are not numbers." in " ".join(capsys.readouterr().err.split())
    save_file({"a": torch.zeros(1)}, own.parent / "mine.safetensors")
    finetune(FinetuneSettings(run=run.path, methods=("pixels", str(own)), **FEW))
    assert {row["method"] for row in rundir.read_jsonl(run.results)} == {"pixels"}
    words = " ".join(capsys.readouterr().err.split())
    assert "mine is left out:" in words
    assert "not the weights of this backbone" in words
    with pytest.raises(DataError, match="no method is left to compare"):
        finetune(FinetuneSettings(run=run.path, methods=(str(own),), **FEW))
    (own.parent / "mine.safetensors").unlink()
    (own.parent / "own.toml").write_text(
        TABLE + TABLE.replace("mine", "other").replace("resnet18", "resnet81")
    )
    finetune(FinetuneSettings(run=run.path, methods=("pixels", str(own)), **FEW))
    words = " ".join(capsys.readouterr().err.split())
    assert "mine.safetensors: cannot be read (No such file or directory)" in words
    assert "other is left out: " in words


def test_own_weights_are_fine_tuned_where_their_file_says_so(
    run: RunDirectory, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own.write_text(TABLE + "finetune = true\n")
    asked: dict[str, Any] = {"methods": ("supervised", "simclr", "pixels", str(own)), **FEW}
    finetune(FinetuneSettings(run=run.path, **asked))
    assert "image_size = 32: with finetune = true it takes the images of this run, 16 px" in " ".join(
        capsys.readouterr().err.split()
    )
    own.write_text(WHOLE)
    again = shutil.copytree(run.path, run.path.parent / "again")
    document = report(finetune(FinetuneSettings(run=run.path, **asked)))
    assert document["arm_names"]["mine"] == "mine, fine-tuned"
    assert "Against mine: " in document["verdict"]
    mine = [row for row in rundir.read_jsonl(run.results) if row["method"] == "mine"]
    assert len(mine) == 3
    for row in mine:
        assert row["chosen"].startswith(("trunk rate", "frozen"))
        assert not row["frozen"]
    finetune(FinetuneSettings(run=again, **{**asked, "draws": 1}))
    finetune(FinetuneSettings(run=again, **asked))
    assert read_predictions(RunDirectory(again).predictions) == read_predictions(run.predictions), (
        "each training begins with the weights as they were given"
    )


def test_our_own_weights_in_a_file_are_fine_tuned_as_simclr_is(run: RunDirectory, own: Path) -> None:
    encoder, spec = load_encoder(run.path)
    state = {key: value.contiguous() for key, value in encoder.backbone.state_dict().items()}
    save_file(state, own.parent / "mine.safetensors")
    mean, std = (f"{name} = {list(getattr(spec, name))}" for name in ("mean", "std"))
    own.write_text(WHOLE.replace("mean = [0.5, 0.5, 0.5]", mean).replace("std = [0.25, 0.25, 0.25]", std))
    finetune(FinetuneSettings(run=run.path, **{**FEW, "methods": ("simclr", str(own)), "steps": 20}))
    found = read_predictions(run.predictions)
    by_method = {
        name: [
            each
            for each, method in zip(found["probabilities"], found["method"], strict=True)
            if method == name
        ]
        for name in ("simclr", "mine")
    }
    assert len(by_method["mine"]) == 3 * 60
    np.testing.assert_allclose(by_method["mine"], by_method["simclr"], atol=1e-6)


def test_small_images_keep_their_resolution_where_that_changes_no_weights() -> None:
    for backbone, size, stem in (
        ("resnet18", 32, "half"),
        ("resnet18", 96, "stock"),
        ("vit_tiny_patch16_224", 32, "stock"),
        ("resnetrs50", 32, "stock"),
    ):
        spec = EncoderSpec(backbone, {}, "stock", size, (0.5,) * 3, (0.25,) * 3)
        assert keep_resolution(spec).stem == stem
        usual, kept = create_encoder(spec), create_encoder(keep_resolution(spec))
        assert {key: value.shape for key, value in usual.state_dict().items()} == {
            key: value.shape for key, value in kept.state_dict().items()
        }


def test_an_unknown_method_is_refused_and_the_known_are_named() -> None:
    with pytest.raises(
        UsageError, match=r"'dino' is no method; known: simclr_probe, .*dinov2_probe, or a \.toml"
    ):
        FinetuneSettings.resolve({"methods": ("simclr", "dino")})


def offline(folder: Path, model: str, state: dict[str, torch.Tensor]) -> dict[str, str]:
    """A place where the hub's library finds weights without a network."""
    place = folder / "hub" / f"models--timm--{model}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("1" * 40)
    (place / "snapshots" / ("1" * 40)).mkdir(parents=True)
    save_file(state, place / "snapshots" / ("1" * 40) / "model.safetensors")
    return {**os.environ, "HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "network", "model"),
    [
        ("imagenet_probe", "resnet18", "resnet18.a1_in1k"),
        ("imagenet", "resnet18", "resnet18.a1_in1k"),
        ("dinov2_probe", "vit_small_patch14_dinov2", "vit_small_patch14_dinov2.lvd142m"),
    ],
)
def test_timms_weights_are_taken_from_where_they_lie_and_missed_where_not(
    run: RunDirectory, tmp_path: Path, method: str, network: str, model: str
) -> None:
    torch.manual_seed(0)
    state = {key: value.contiguous() for key, value in timm.create_model(network).state_dict().items()}
    environment = offline(tmp_path / "hub", model, state)
    command = [sys.executable, "-m", "labelwise", "finetune", "--run", str(run.path), "--json"]
    command += ["--label-counts", "20", "--draws", "2", "--steps", "2", "--methods", f"pixels,{method}"]
    nowhere = {**environment, "HF_HOME": str(tmp_path / "empty")}
    without = subprocess.run(command, env=nowhere, capture_output=True, text=True)
    assert without.returncode == 0, without.stderr
    assert f"{method} is left out" in without.stderr
    assert set(json.loads(without.stdout)["summary"][0]["arms"]) == {"pixels"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert set(json.loads(found.stdout)["summary"][0]["arms"]) == {"pixels", method}
