"""What `export` writes: loaded without us, it gives our numbers."""

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from labelwise import rundir
from labelwise.errors import UsageError
from labelwise.models.encoder import EncoderSpec, create_encoder
from labelwise.models.heads import create_head
from labelwise.models.outside import TOLERANCE, as_timm, write_onnx
from labelwise.models.weights import load_encoder, load_module
from labelwise.rundir import RunDirectory
from labelwise.stages.classifier import load_classifier
from labelwise.stages.exporting import export, show
from labelwise.stages.predicting import predict

STATISTICS = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
KINDS = {
    "resnet-small": ("resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}, "small", 32),
    "resnet-half": ("resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}, "half", 32),
    "resnet-deep": ("resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_type": "deep", "stem_width": 8}, "small", 32),
    "resnet-blur": ("resnetblur18", {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}, "half", 32),
    "resnet-stock": ("resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}, "stock", 64),
    "vit": ("vit_tiny_patch16_224", {"depth": 2, "embed_dim": 24, "num_heads": 2}, "small", 32),
    "convnext": ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 16, 16, 24]}, "small", 32),
    "efficientnet": ("efficientnet_b0", {}, "small", 32),
    "regnet": ("regnety_002", {}, "small", 32),
    "mobilenet": ("mobilenetv3_small_050", {}, "stock", 64),
}  # fmt: skip


def made(kind: str, *, layers: int = 2) -> tuple[EncoderSpec, nn.Module, nn.Linear]:
    """A network whose batch norms have seen something, and a last layer."""
    torch.manual_seed(0)
    name, arguments, stem, size = KINDS[kind]
    spec = EncoderSpec(name, arguments, stem, size, *STATISTICS)
    encoder = create_encoder(spec)
    head = create_head("nonlinear", encoder.features, layers, 12)
    network: nn.Module = encoder if layers == 2 else nn.Sequential(encoder, head[0])
    network.train()
    for _ in range(3):
        network(torch.randn(8, 3, size, size) * 2 + 1)
    return spec, network.eval(), nn.Linear(encoder.features if layers == 2 else 12, 5)


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_timm_built_by_the_printed_lines_scores_alike(
    kind: str, layers: int, tmp_path: Path
) -> None:
    spec, network, linear = made(kind, layers=layers)
    exported, arguments, lines, difference = as_timm(spec, network, linear)
    model = timm.create_model(spec.backbone, **json.loads(json.dumps(arguments)))
    for line in lines:
        exec(line, {"torch": torch, "model": model})
    model.load_state_dict(exported.state_dict())
    images = torch.randn(3, 3, spec.image_size, spec.image_size)
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(images), linear(network(images)), atol=1e-5, rtol=1e-5)
    assert difference <= TOLERANCE


def test_an_encoder_alone_is_a_model_without_classifier() -> None:
    spec, network, _ = made("resnet-small")
    exported, arguments, lines, _ = as_timm(spec, network, None)
    assert arguments["num_classes"] == 0
    assert lines == [
        'model.set_submodule("conv1", torch.nn.Conv2d(3, 64, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False))',
        'model.set_submodule("maxpool", torch.nn.Identity())',
    ] or lines[1:] == ['model.set_submodule("maxpool", torch.nn.Identity())']
    assert exported(torch.randn(2, 3, 32, 32)).shape == (2, network.features)


def test_a_classifier_that_timm_builds_otherwise_is_refused() -> None:
    spec = EncoderSpec("resnetv2_50", {"layers": [1, 1, 1, 1]}, "stock", 64, *STATISTICS)
    encoder = create_encoder(spec).eval()
    with pytest.raises(UsageError, match="no single linear classifier; use --format onnx"):
        as_timm(spec, encoder, nn.Linear(encoder.features, 3))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["resnet-small", "vit", "convnext"])
@pytest.mark.parametrize("layers", [2, 3])
def test_a_graph_gives_the_probabilities_of_pixels(kind: str, layers: int, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra labelwise[onnx] is not installed")
    spec, network, linear = made(kind, layers=layers)
    whole = nn.Sequential(network, linear)
    assert write_onnx(tmp_path / "m.onnx", whole, spec, classes=list("abcde"), facts={"a": "b"}) <= TOLERANCE
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    assert session.get_modelmeta().custom_metadata_map["a"] == "b"
    for count in (1, 2, 7):
        pixels = np.random.default_rng(count).integers(256, size=(count, spec.image_size, spec.image_size, 3), dtype=np.uint8)  # fmt: skip
        mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in STATISTICS)
        with torch.inference_mode():
            expected = whole((torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std)
        scores, probabilities = session.run(None, {"pixels": pixels})
        np.testing.assert_allclose(scores, expected, atol=1e-4)
        np.testing.assert_allclose(probabilities, expected.softmax(dim=1), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["timm", "onnx"])
def test_the_example_says_what_predict_says_without_us(
    classified: RunDirectory, form: str, tmp_path: Path, photo: Callable[..., Image.Image]
) -> None:
    if form == "onnx":
        pytest.importorskip("onnxruntime", reason="the extra labelwise[onnx] is not installed")
    names = {
        "a.png": (40, 30),
        "b.jpg": (700, 1100),
        "c.webp": (16, 16),
        "d.jpg": (2500, 1700),
        "e.png": (9, 70),
    }
    for seed, (name, size) in enumerate(names.items()):
        photo(tmp_path / "photos" / name, seed, size)
    turned = photo(tmp_path / "photos" / "f.jpg", 7, (60, 30))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "photos" / "f.jpg", exif=exif)
    document = export(classified, form, tmp_path / "out")
    assert document["difference"] <= TOLERANCE
    predict(classified, [tmp_path / "photos"], tmp_path / "out.csv")
    with (tmp_path / "out.csv").open() as table:
        expected = {row["file"]: (row["label"], float(row["confidence"])) for row in csv.DictReader(table)}
    moved = shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    hidden = "import sys; sys.modules['labelwise'] = None; sys.argv = sys.argv[1:]; exec(open('example.py').read())"
    files = [str(tmp_path / "photos" / name) for name in expected]
    done = subprocess.run([sys.executable, "-c", hidden, "example.py", *files], cwd=moved, capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {
        Path(line.split()[0]).name: (line.split()[1], float(line.split()[2]))
        for line in done.stdout.splitlines()
    }
    assert found.keys() == expected.keys()
    for name, (label, confidence) in expected.items():
        assert found[name][0] == label
        assert found[name][1] == pytest.approx(confidence, abs=1e-4), name


def test_weights_as_they_are_carry_what_it_takes(classified: RunDirectory, tmp_path: Path) -> None:
    document = export(classified, "safetensors", tmp_path / "out")
    classifier, spec, classes = load_classifier(classified)
    load_module(tmp_path / "out" / "model.safetensors", classifier)  # as it was
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(value, classifier.state_dict()[name])
    facts = json.loads((tmp_path / "out" / "preprocessing.json").read_text())
    assert (facts["classes"], facts["image_size"], facts["stem"]) == (classes, spec.image_size, "half")
    assert (document["classes"], document["difference"]) == (classes, None)
    temperature = json.loads(classified.calibration.read_text())["temperature"]
    assert f"divided by a temperature of {temperature:.3g}," in (tmp_path / "out" / "README.md").read_text()


def test_a_temperature_is_told_where_there_is_one(classified: RunDirectory, tmp_path: Path) -> None:
    run = RunDirectory(Path(shutil.copytree(classified.path, tmp_path / "run")))
    facts = rundir.read_json(run.calibration)
    for temperature, is_told in ((1.7, True), (1.0, False)):
        rundir.write_json(run.calibration, {**facts, "temperature": temperature})
        export(run, "safetensors", tmp_path / str(temperature))
        card = (tmp_path / str(temperature) / "README.md").read_text()
        assert ("divided by a temperature of 1.7," in card) == ("# Calibration" in card) == is_told


def test_a_run_without_labels_gives_its_encoder(
    pretrained: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = export(pretrained, "timm", tmp_path / "out")
    assert document["classes"] is None
    show(document)
    assert "encoder (no classifier yet: labelwise finetune)" in capsys.readouterr().out
    encoder, _ = load_encoder(pretrained.path)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == encoder.backbone.state_dict().keys()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "First weights: random." in card
    assert "how good it is, is not known" in card


def test_names_of_classes_run_nowhere(
    classified: RunDirectory, tmp_path: Path, rename_classes: Callable[..., None]
) -> None:
    names = ["'''", '"""', "{size}", "\n", "```", "__import__('os')", "é", "\\", "8", "9"]
    other = RunDirectory(tmp_path / "run")
    shutil.copytree(classified.path, other.path)
    rename_classes(other, names)
    export(other, "timm", tmp_path / "out")
    space: dict[str, object] = {"__name__": "imported"}
    program = (tmp_path / "out" / "example.py").read_text().replace('load_file("model', f'load_file("{tmp_path}/out/model')  # fmt: skip
    exec(program, space)
    assert space["classes"] == names


def test_nothing_is_written_over_or_into_images(classified: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match="is there already"):
        export(classified, "timm", tmp_path / "there")
    images = Path(json.loads(classified.data.read_text())["sources"]["images"])
    with pytest.raises(UsageError, match="never written to"):
        export(classified, "timm", images / "out")
    assert not list(tmp_path.glob(".*"))
