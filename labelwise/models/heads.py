"""The projection head g(.) that the loss sees and fine-tuning throws away."""

from itertools import pairwise
from pathlib import Path

from torch import nn

from labelwise.models.encoder import Encoder
from labelwise.models.weights import load_module


def create_head(
    kind: str, features: int, layers: int = 2, width: int | None = None, output: int = 128
) -> nn.Sequential:
    """Build a projection head.

    Args:
        kind: "none" (the loss sees the features), "linear" or "nonlinear".
        features: Width of the encoder's output, F.
        layers: Layers of a nonlinear head, 2 or 3.
        width: Hidden width; default F.
        output: Projection width, D.

    Returns:
        (B, F) -> (B, D); one child per layer, so that the first can be kept when fine-tuning.

    Source: Chen et al. 2020 (arXiv 2002.05709), Sec. 4.2; each dense layer is without bias and followed
    by batch norm, the last without ReLU, as in the official code (`projection_head`).
    """
    if kind == "none":
        return nn.Sequential()
    if kind == "linear":
        return nn.Sequential(_layer(features, output, last=True))
    widths = [features, *[width or features] * (layers - 1), output]
    return nn.Sequential(
        *(_layer(a, b, last=b_index == layers) for b_index, (a, b) in enumerate(pairwise(widths), 1))
    )


def _layer(inputs: int, outputs: int, *, last: bool) -> nn.Sequential:
    parts: list[nn.Module] = [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs)]
    if not last:
        parts.append(nn.ReLU(inplace=True))
    return nn.Sequential(*parts)


def has_kept_layer(metadata: dict[str, str]) -> bool:
    """Whether the head of this file header has three layers, the first of which fine-tuning keeps."""
    return metadata["kind"] == "nonlinear" and metadata["layers"] == "3"


def keep_first_layer(encoder: Encoder, head: Path, metadata: dict[str, str]) -> tuple[nn.Module, int]:
    """Put the first layer of a three-layer head on top of its encoder; leave any other encoder alone.

    Args:
        encoder: With its pretrained weights.
        head: The head's file.
        metadata: Its header.

    Returns:
        The network to fine-tune, and its feature width.

    Source: Chen et al. 2020 (arXiv 2006.10029), SimCLRv2: fine-tune from the first layer of the head.
    """
    if not has_kept_layer(metadata):
        return encoder, encoder.features
    width = int(metadata["width"] or encoder.features)
    full = create_head("nonlinear", encoder.features, 3, width, int(metadata["output"]))
    load_module(head, full)
    return nn.Sequential(encoder, full[0]).eval(), width
