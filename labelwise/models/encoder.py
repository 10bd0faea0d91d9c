"""The encoder f(.): any timm backbone, with a stem that suits small images. The door of timm."""

import difflib
import json
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
from torch import Tensor, nn

from labelwise.errors import DataError, UsageError, is_out_of_memory

SMALL_IMAGE = 96  # below this a stock stem throws most of the picture away (SimCLR, App. B.9, at 32 px)


@dataclass(frozen=True)
class EncoderSpec:
    """What is needed to build the same encoder again.

    Attributes:
        backbone: A timm model name.
        backbone_args: Arguments passed to timm.
        stem: "small", "half" or "stock".
        image_size: Side of the images it takes, pixels.
        mean, std: Normalisation per channel, images in 0-1.
    """

    backbone: str
    backbone_args: dict[str, Any]
    stem: str
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def normalization(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Mean and standard deviation per channel."""
        return self.mean, self.std

    def to_metadata(self) -> dict[str, str]:
        """Encode for a safetensors header, which holds text only."""
        return {name: json.dumps(getattr(self, name)) for name in self.__dataclass_fields__}

    @classmethod
    def from_metadata(cls, metadata: dict[str, str]) -> "EncoderSpec":
        """Decode what `to_metadata` wrote."""
        values = {name: json.loads(metadata[name]) for name in cls.__dataclass_fields__}
        return cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})


class Encoder(nn.Module):
    """A timm backbone without its classifier: (B, 3, H, W) -> (B, F)."""

    def __init__(self, backbone: nn.Module, features: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.features = features

    def forward(self, images: Tensor) -> Tensor:
        """Give the pooled features of normalised images."""
        features: Tensor = self.backbone(images)
        return features


def create_encoder(spec: EncoderSpec, *, pretrained: bool = False) -> Encoder:
    """Build an encoder from random weights, or from timm's.

    Raises:
        UsageError: The backbone is unknown, or timm refuses its arguments.
        DataError: timm's weights cannot be loaded (no network, or none exist).
    """
    check_backbone(spec.backbone)
    arguments = timm_arguments(spec)
    try:
        backbone = timm.create_model(spec.backbone, pretrained=pretrained, num_classes=0, **arguments)
        change_stem(backbone, spec.stem)
        return Encoder(backbone, _feature_width(backbone, spec.image_size))
    except Exception as error:  # networks raise whatever their arguments make of them, the hub's library too
        if is_out_of_memory(error):
            raise
        if pretrained and not isinstance(error, TypeError | ValueError | AssertionError):
            raise DataError(
                f"backbone '{spec.backbone}': timm's weights could not be loaded: {error}"
            ) from None
        raise UsageError(
            f"backbone '{spec.backbone}' with {arguments}: timm refuses this: {type(error).__name__}: {error}"
        ) from None


def timm_arguments(spec: EncoderSpec) -> dict[str, Any]:
    """Arguments that timm builds the backbone with, before its stem is changed."""
    return {**_size_arguments(spec), **spec.backbone_args}


def change_stem(backbone: nn.Module, stem: str) -> None:
    """Put the stem of a spec into a model that timm has built."""
    if stem == "small":
        _make_stem_small(backbone)
    elif stem == "half":
        backbone.maxpool = nn.Identity()


def synchronize_batch_norm(module: nn.Module) -> None:
    """Let every batch norm within a module take its statistics over all ranks' images; on GPUs."""
    timm.layers.convert_sync_batchnorm(module)


def check_backbone(backbone: str) -> None:
    """Make sure timm has a model of this name.

    Raises:
        UsageError: It has not; the message names similar ones.
    """
    if not timm.is_model(backbone.split(".", maxsplit=1)[0]):
        close = difflib.get_close_matches(backbone, timm.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() lists all."
        raise UsageError(f"backbone '{backbone}': timm has no such model; {hint}")


def choose_stem(backbone: str, backbone_args: dict[str, Any], image_size: int, wish: str) -> tuple[str, str]:
    """Decide between the small-image stem and the stock one.

    Returns:
        "small", "half" or "stock", and the reason in words; empty when there is nothing to say.

    Raises:
        UsageError: The small or half stem was asked for and is not known for this backbone.
    """
    if wish == "half" and not _has_pooling(backbone, backbone_args):
        raise UsageError(
            f"--stem half: {backbone} has no pooling in its stem to leave out; use --stem small or stock."
        )
    known = _has_known_stem(backbone, backbone_args)
    if wish == "small" and not known:
        raise UsageError(f"--stem small: no small-image stem is known for {backbone}; use --stem stock.")
    if wish != "auto":
        return wish, ""
    if image_size >= SMALL_IMAGE:
        return "stock", ""
    if known:
        return "small", f"images of {image_size} px lose too much in a stock stem"
    return "stock", (
        f"no small-image stem is known for {backbone}: at {image_size} px it may learn little; "
        f"a resnet, efficientnet, regnet, convnext or vit has one, or use a larger --image-size"
    )


def keep_resolution(spec: EncoderSpec) -> EncoderSpec:
    """The same encoder without the pooling of its stem where images are small and it has one; that changes no weights."""
    small = spec.image_size < SMALL_IMAGE and _has_pooling(spec.backbone, spec.backbone_args)
    return replace(spec, stem="half") if small else spec


def _has_known_stem(backbone: str, backbone_args: dict[str, Any]) -> bool:
    if not timm.is_model(backbone.split(".", maxsplit=1)[0]):
        return True  # create_encoder says what is wrong
    if _takes_patch_size(backbone):
        return "patch_size" not in backbone_args
    return _stem_convolution(_outline(backbone, backbone_args)) is not None


def _has_pooling(backbone: str, backbone_args: dict[str, Any]) -> bool:
    if not timm.is_model(backbone.split(".", maxsplit=1)[0]):
        return True  # create_encoder says what is wrong
    pooling = getattr(_outline(backbone, backbone_args), "maxpool", None)
    return isinstance(pooling, nn.Module) and not list(pooling.parameters())  # convolutions are there in some


def _outline(backbone: str, backbone_args: dict[str, Any]) -> nn.Module:
    """The model without memory for its weights.

    Raises:
        UsageError: timm refuses the arguments.
    """
    try:
        with torch.device("meta"):
            model: nn.Module = timm.create_model(backbone, num_classes=0, **backbone_args)
    except Exception as error:  # as in `create_encoder`
        if is_out_of_memory(error):
            raise
        raise UsageError(f"backbone '{backbone}' with {backbone_args}: timm refuses this: {error}") from None
    return model


def _takes_patch_size(backbone: str) -> bool:
    return backbone.startswith(("vit_", "deit", "convnext"))


def _size_arguments(spec: EncoderSpec) -> dict[str, Any]:
    """Arguments by which a transformer learns its image size and, for a small stem, its patch size."""
    arguments: dict[str, Any] = {}
    if spec.backbone.startswith(("vit_", "deit", "beit", "eva", "swin")):
        arguments["img_size"] = spec.image_size
    if spec.stem == "small" and _takes_patch_size(spec.backbone):
        arguments["patch_size"] = 1 if spec.backbone.startswith("convnext") else max(2, spec.image_size // 8)
    return arguments


def _stem_convolution(backbone: nn.Module) -> nn.Conv2d | None:
    """First convolution of the families whose small-image stem is known: resnet, efficientnet, regnet."""
    for path in ("conv1.0", "conv1", "conv_stem", "stem.conv"):
        try:
            module = backbone.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(module, nn.Conv2d) and module.stride == (2, 2):
            return module
    return None


def _make_stem_small(backbone: nn.Module) -> None:
    """Make the first convolution 3 x 3 with stride 1 and drop the pooling after it.

    Source: Chen et al. 2020 (arXiv 2002.05709), App. B.9.
    """
    old = _stem_convolution(backbone)
    if old is None:
        return  # a patch size does it
    path = next(name for name, module in backbone.named_modules() if module is old)
    parent = backbone.get_submodule(path.rpartition(".")[0])
    new = nn.Conv2d(old.in_channels, old.out_channels, 3, stride=1, padding=1, bias=old.bias is not None)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    setattr(parent, path.rpartition(".")[2], new)
    if isinstance(getattr(backbone, "maxpool", None), nn.Module):
        backbone.maxpool = nn.Identity()


@torch.no_grad()
def takes_size(spec: EncoderSpec, image_size: int) -> bool:
    """Whether the encoder of a spec, built for one size, takes images of another."""
    encoder = create_encoder(spec).eval()
    try:
        encoder(torch.zeros(1, 3, image_size, image_size))
    except (AssertionError, RuntimeError, ValueError):
        return False
    return True


@torch.no_grad()
def _feature_width(backbone: nn.Module, image_size: int) -> int:
    """Feature width as the backbone really gives it; timm's `num_features` is not always that."""
    backbone.eval()
    width = backbone(torch.zeros(1, 3, image_size, image_size)).shape[1]
    backbone.train()
    return int(width)


def licence_of_weights(backbone: str) -> str:
    """Licence of timm's weights of a backbone, as timm states it, and where they come from."""
    config = timm.get_pretrained_cfg(backbone)
    licence = getattr(config, "license", None) or "licence not stated by timm"
    place = getattr(config, "hf_hub_id", None) or getattr(config, "url", None)
    return f"{licence} ({place})" if place else str(licence)


def pretrained_spec(backbone: str, image_size: int | None = None) -> EncoderSpec:
    """Spec of timm's own weights of a backbone, with the mean and standard deviation they were trained with.

    Args:
        backbone: A timm model name.
        image_size: Other than the one they were trained at.

    Raises:
        UsageError: timm has no weights for it.
    """
    try:
        config = timm.get_pretrained_cfg(backbone)
    except RuntimeError:
        config = None
    if config is None or not config.has_weights:
        raise UsageError(f"timm has no weights for {backbone}; choose another backbone.")
    return EncoderSpec(
        backbone,
        {},
        "stock",
        image_size or config.input_size[-1],
        tuple(config.mean),
        tuple(config.std),
    )
