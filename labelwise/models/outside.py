"""The same model for programs that do not know us: as timm builds it, or with its preprocessing in one ONNX graph."""

import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from labelwise.errors import UsageError
from labelwise.models.encoder import Encoder, EncoderSpec, change_stem, timm_arguments

TOLERANCE = 1e-4  # largest difference of a score between a model and what was made of it
_TRIED = 4  # images
_OPSET = 18


def as_timm(spec: EncoderSpec, network: nn.Module, linear: nn.Linear | None) -> tuple[nn.Module, dict[str, Any], list[str], float]:  # fmt: skip
    """Rebuild a classifier, or an encoder, as a model of timm.

    Args:
        spec: Of the encoder.
        network: An encoder, or one with the first layer of its head behind it, in evaluation mode.
        linear: The last layer; None for an encoder alone.

    Returns:
        The model, arguments of `timm.create_model`, lines of Python that change what it builds, and the largest difference
        of an output on random images.

    Raises:
        UsageError: timm's model of that name ends in another way.
    """
    encoder, kept = (network, None) if isinstance(network, Encoder) else (network[0], network[1])  # type: ignore[index]
    arguments = {**timm_arguments(spec), "num_classes": linear.out_features if linear is not None else 0}
    plain, model = (timm.create_model(spec.backbone, **arguments) for _ in range(2))
    change_stem(model, spec.stem)
    if linear is not None:
        name = model.pretrained_cfg.get("classifier")
        if not isinstance(name, str) or not isinstance(model.get_submodule(name), nn.Linear):
            raise UsageError(
                f"{spec.backbone}: its model in timm has no single linear classifier; use --format onnx."
            )
        model.set_submodule(name, linear if kept is None else nn.Sequential(_fold(kept), nn.ReLU(), linear))
    elif kept is not None:
        raise UsageError("an encoder alone is exported as it is, without a layer of its head.")
    model.load_state_dict(encoder.backbone.state_dict(), strict=False)  # the classifier is there already
    model.eval()
    whole = network if linear is None else nn.Sequential(network, linear)
    images = torch.randn(
        _TRIED, 3, spec.image_size, spec.image_size, generator=torch.Generator().manual_seed(0)
    )
    with torch.inference_mode():
        difference = float((model(images) - whole(images)).abs().max())
    if not difference <= TOLERANCE:
        raise UsageError(
            f"{spec.backbone}: as a model of timm its scores differ by {difference:.2g}; use --format onnx."
        )
    return model, arguments, _lines(plain, model), difference


def _fold(layer: nn.Module) -> nn.Linear:
    """A linear layer that does what one without bias and the batch norm behind it do."""
    linear, norm = layer[0], layer[1]  # type: ignore[index]
    folded = nn.Linear(linear.in_features, linear.out_features)
    with torch.no_grad():
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        folded.weight.copy_(linear.weight * scale[:, None])
        folded.bias.copy_(norm.bias - norm.running_mean * scale)
    return folded


def _lines(plain: nn.Module, model: nn.Module) -> list[str]:
    """What turns one model into another with other layers in a few places."""
    lines = []
    others = dict(model.named_modules())
    changed: list[str] = []
    for name, layer in plain.named_modules():
        if any(name.startswith(f"{above}.") for above in changed):
            continue
        other = others[name]
        if type(layer) is not type(other) or (not list(layer.children()) and repr(layer) != repr(other)):
            changed.append(name)
            parts = [f"torch.nn.{part}" for part in other] if isinstance(other, nn.Sequential) else []
            text = f"torch.nn.Sequential({', '.join(parts)})" if parts else f"torch.nn.{other}"
            lines.append(f'model.set_submodule("{name}", {text})')
    return lines


class _FromPixels(nn.Module):
    """Pixels to scores and probabilities, or to features: what a server wants."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, spec: EncoderSpec, *, has_classes: bool) -> None:
        super().__init__()
        self.network, self.has_classes = network, has_classes
        for name, values in (("mean", spec.mean), ("std", spec.std)):
            self.register_buffer(name, torch.tensor(values).reshape(1, 3, 1, 1))

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Uint8 (B, H, W, 3) -> scores (B, C) and probabilities (B, C), or features (B, F)."""
        images = pixels.to(torch.float32).permute(0, 3, 1, 2) / 255
        outputs: Tensor = self.network((images - self.mean) / self.std)
        return (outputs, outputs.softmax(dim=1)) if self.has_classes else (outputs,)


def write_onnx(
    path: Path, network: nn.Module, spec: EncoderSpec, *, classes: list[str] | None, facts: dict[str, str]
) -> float:
    """Write one graph from pixels to probabilities, for batches of any size, and run it beside the network.

    Args:
        network: Normalised images to scores, or to features, in evaluation mode.
        classes: In the order of the scores; None for features.
        facts: Texts that go into the file.

    Returns:
        The largest difference of an output on random images, over batches of 1 and more; relative to the largest output where
        that is above 1.

    Raises:
        UsageError: The extra `labelwise[onnx]` is not installed, or the graph does something else than the network.
    """
    try:
        import onnx  # noqa: PLC0415 - an extra
        import onnxruntime  # noqa: PLC0415
    except ImportError:
        raise UsageError("ONNX needs more packages: pip install 'labelwise[onnx]'.") from None
    whole = _FromPixels(network, spec, has_classes=classes is not None).eval()
    drawn = torch.Generator().manual_seed(0)
    pixels = torch.randint(
        256, (_TRIED, spec.image_size, spec.image_size, 3), dtype=torch.uint8, generator=drawn
    )
    outputs = ["scores", "probabilities"] if classes is not None else ["features"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            whole, (pixels,), input_names=["pixels"], output_names=outputs, opset_version=_OPSET,
            dynamic_shapes={"pixels": {0: torch.export.Dim("batch")}}, dynamo=True, verbose=False,
        )  # fmt: skip
    model = program.model_proto  # type: ignore[union-attr]
    onnx.helper.set_model_props(model, facts)
    onnx.save(model, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    farthest = 0.0
    for count in (1, _TRIED - 1, _TRIED):
        found = session.run(None, {"pixels": pixels[:count].numpy()})
        with torch.inference_mode():
            expected = whole(pixels[:count])
        for one, other in zip(found, expected, strict=True):
            largest = max(1.0, float(other.abs().max()))  # noise makes scores of hundreds
            farthest = max(farthest, float((torch.from_numpy(one) - other).abs().max()) / largest)
    if not farthest <= TOLERANCE:
        raise UsageError(
            f"{spec.backbone}: as an ONNX graph its outputs differ by {farthest:.2g}; use --format timm."
        )
    return farthest
