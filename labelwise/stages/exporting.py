"""`labelwise export`: the classifier of a run, or its encoder, for programs that do not know us."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from labelwise import rundir, terminal
from labelwise.config import read_run_config
from labelwise.images.decoding import evaluation_short_side, shortest_for
from labelwise.models.encoder import EncoderSpec, licence_of_weights
from labelwise.models.outside import as_timm, write_onnx
from labelwise.models.weights import load_encoder, save_module
from labelwise.reports.text import pretrained_on
from labelwise.rundir import RunDirectory
from labelwise.stages.classifier import load_classifier, read_calibration
from labelwise.stages.planning import is_run
from labelwise.stages.targets import check_folder

_OPEN = """import sys

import numpy as np
from PIL import Image, ImageOps


def pixels(path):  # uint8 (1, {size}, {size}, 3)
    image = Image.open(path)
    image.draft(None, ({shortest}, {shortest}))
    image.load()
    image = ImageOps.exif_transpose(image).convert("RGB")
    scale = {short} / min(image.size)
    width, height = (max({short}, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC) if (width, height) != image.size else image
    left, top = (width - {size}) // 2, (height - {size}) // 2
    return np.array(image.crop((left, top, left + {size}, top + {size})))[None]
"""
_TIMM = """import timm
import torch
from safetensors.torch import load_file

model = timm.create_model("{backbone}", **{arguments})
{lines}model.load_state_dict(load_file("model.safetensors"))
model.eval()
mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in ({mean}, {std}))


def run(path):
    images = torch.from_numpy(pixels(path)).permute(0, 3, 1, 2) / 255
    with torch.inference_mode():
        return model((images - mean) / std){outputs}[0].tolist()
"""
_ONNX = """import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")


def run(path):
    return session.run(["{output}"], {{"pixels": pixels(path)}})[0][0].tolist()
"""
_SAY_CLASS = """

classes = {classes}
if __name__ == "__main__":
    for path in sys.argv[1:]:
        chances = run(path)
        best = max(range(len(classes)), key=chances.__getitem__)
        print(path, classes[best], round(chances[best], 6))
"""
_SAY_FEATURES = """

if __name__ == "__main__":
    for path in sys.argv[1:]:
        print(path, *(round(value, 6) for value in run(path)))
"""


def export(run: RunDirectory, form: str, out: Path) -> dict[str, Any]:
    """Write a folder that holds the model of a run, an example that uses it, and its card.

    Args:
        run: Compared, whose classifier it is then; or pretrained only, whose encoder it is.
        form: "timm", "onnx" or "safetensors".
        out: A folder that is not there yet.

    Returns:
        `out`, `format`, `classes` (None for an encoder), `files`, and the largest `difference` of an output to ours on random
        images (None where the weights are ours as they are).

    Raises:
        CheckpointError: The run is not pretrained, or damaged.
        UsageError: The folder is there, or the backbone does not fit the format.
    """
    check_folder(out, run)
    own: nn.Module
    if run.classifier.exists():
        classifier, spec, classes = load_classifier(run)
        network, linear, own = classifier.network, classifier.linear, classifier
    else:
        encoder, spec = load_encoder(run.path)
        network, linear, own, classes = encoder, None, encoder.backbone, None
    facts = {**spec.to_metadata(), "classes": json.dumps(classes, ensure_ascii=False)}
    whole = network if linear is None else nn.Sequential(network, linear)
    sizes = {
        "size": spec.image_size,
        "short": evaluation_short_side(spec.image_size),
        "shortest": shortest_for(rundir.read_json(run.data)["cache_side"], spec.image_size),
    }
    say = _SAY_FEATURES if classes is None else _SAY_CLASS.replace("{classes}", repr(classes))
    difference: float | None = None

    def fill(folder: Path) -> str:
        nonlocal difference
        if form == "safetensors":
            save_module(folder / "model.safetensors", own, facts)
            return ""
        if form == "onnx":
            difference = write_onnx(folder / "model.onnx", whole, spec, classes=classes, facts=facts)
            return _OPEN.format(**sizes) + "\n\n" + _ONNX.format(output="features" if classes is None else "probabilities") + say  # fmt: skip
        model, arguments, lines, difference = as_timm(spec, network, linear)
        save_module(folder / "model.safetensors", model, facts)
        built = _TIMM.format(
            backbone=spec.backbone,
            arguments=repr(arguments),
            lines="".join(f"{line}\n" for line in lines),
            mean=list(spec.mean),
            std=list(spec.std),
            outputs="" if classes is None else ".softmax(dim=1)",
        )
        return _OPEN.format(**sizes) + "\n\n" + built + say

    rundir.write_folder(out, lambda folder: _write(folder, run, spec, classes, form, fill))
    return {
        "out": str(out),
        "format": form,
        "classes": classes,
        "files": sorted(file.name for file in out.iterdir()),
        "difference": difference,
    }


def show(document: dict[str, Any]) -> None:
    """Print what was written, and how to use it."""
    classes = document["classes"]
    what = (
        "encoder (no classifier yet: labelwise finetune)"
        if classes is None
        else f"classifier of {len(classes)} classes"
    )
    terminal.emit(f"written   {document['out']}: {', '.join(document['files'])}")
    terminal.emit(f"model     {what}, as {document['format']}")
    if document["difference"] is not None:
        terminal.emit(
            f"checked   outputs differ from ours by at most {document['difference']:.1e} on random images"
        )
    if "example.py" in document["files"]:
        terminal.emit(f"use       cd {document['out']} && python example.py PHOTO.jpg")


def _write(
    folder: Path,
    run: RunDirectory,
    spec: EncoderSpec,
    classes: list[str] | None,
    form: str,
    fill: Callable[[Path], str],
) -> None:
    """Fill a folder with the model, its example, what its input must be like, and its card."""
    example = fill(folder)
    if example:
        rundir.write_text(folder / "example.py", example)
    facts = {
        "architecture": spec.backbone,
        "stem": spec.stem,
        "image_size": spec.image_size,
        "short_side": evaluation_short_side(spec.image_size),
        "interpolation": "bicubic",
        "mean": spec.mean,
        "std": spec.std,
        "classes": classes,
    }
    rundir.write_json(folder / "preprocessing.json", facts)
    rundir.write_text(folder / "README.md", _card(run, form, example))


def _card(run: RunDirectory, form: str, example: str) -> str:
    """The card of the classifier, behind how to load it, what it was made of and under which licences."""
    data = rundir.read_json(run.data)
    own = run.model_card.read_text(encoding="utf-8") if run.model_card.exists() else "No comparison was made with this run: how good it is, is not known.\n"  # fmt: skip
    packages = {"timm": "timm torch safetensors pillow", "onnx": "onnxruntime numpy pillow"}.get(
        form, "labelwise"
    )
    use = f"`pip install {packages}`, then `python example.py PHOTO.jpg`:\n\n```python\n{example}```\n" if example else "Its keys and header are those of Labelwise.\n"  # fmt: skip
    return "\n".join([
        "# Use", "", use,
        "Images with transparency are laid on white by Labelwise, images deeper than 8 bits are scaled to the range of the set, and of very long ones "
        "(8 : 1 and more) the ends are cut off first; the example does none of that.", "",
        "# Data and licences", "",
        f"- Trained on {pretrained_on(data):,} images; SHA-256 of their names and pixels: `{data['pool_sha256']}`. Their licence is for you to know.",
        *(f"- {line}" for line in _licences(run)), "",
        *_calibrated(run),
        own,
    ])  # fmt: skip


def _calibrated(run: RunDirectory) -> list[str]:
    """That a temperature is in the weights, where it is."""
    facts = read_calibration(run) if run.classifier.exists() else None
    if facts is None or facts["temperature"] == 1:  # too few labels for one
        return []
    words = f"its scores are divided by a temperature of {facts['temperature']:.3g}, in the weights of its last layer"
    return [
        "# Calibration",
        "",
        f"Fitted on {facts['scored']:,} labels that were held out in turn: {words}.",
        "",
    ]


def _licences(run: RunDirectory) -> list[str]:
    """Where the first weights came from, run by run."""
    table = read_run_config(run.config)
    init = table.get("init")
    if init == "pretrained":
        return [f"First weights: timm's {table['backbone']}, {licence_of_weights(table['backbone'])}."]
    if not is_run(init):
        return ["First weights: random."]
    before = RunDirectory(Path(str(init)))
    if not before.config.exists() or before.path.resolve() == run.path.resolve():
        return [
            f"First weights: those of the run {init}, which is not there any more; its licences are not known."
        ]
    images = rundir.read_json(before.data)
    return [
        f"First weights: those of a run on {pretrained_on(images):,} other images (`{images['pool_sha256'][:16]}`):",
        *_licences(before),
    ]
