"""Weights on disk: safetensors with everything needed to build the model again in the header."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from labelwise import rundir
from labelwise.errors import CheckpointError, DataError
from labelwise.models.encoder import Encoder, EncoderSpec, create_encoder

_HASH = "sha256"  # name in the header


def save_encoder(path: Path, encoder: Encoder, spec: EncoderSpec) -> None:
    """Write the backbone; its keys are timm's own, its header is the spec."""
    save_module(path, encoder.backbone, spec.to_metadata())


def load_encoder(path: str | Path) -> tuple[Encoder, EncoderSpec]:
    """Build the encoder that `encoder.safetensors` holds, in evaluation mode.

    Args:
        path: The file, or the run folder it lies in.

    Raises:
        CheckpointError: The file is missing, damaged or not ours.
    """
    file = Path(path)
    file = file / "encoder.safetensors" if file.is_dir() else file
    spec = read_spec(file)
    encoder = create_encoder(spec)
    load_module(file, encoder.backbone)
    return encoder.eval(), spec


def read_spec(path: Path) -> EncoderSpec:
    """Read from the header of a file of weights which encoder it is of.

    Raises:
        CheckpointError: The file is missing, damaged or not ours.
    """
    try:
        return EncoderSpec.from_metadata(read_metadata(path))
    except (KeyError, ValueError, TypeError, RecursionError):
        raise CheckpointError(
            f"{path}: not an encoder of Labelwise (its header names no backbone)."
        ) from None


def load_backbone(path: Path, encoder: Encoder) -> None:
    """Load a backbone that others trained, strictly; what belongs to a classifier or a head is left.

    Args:
        path: safetensors, or a state dict of torch without any code; keys are timm's, behind a prefix or not.
        encoder: Whose backbone is loaded.

    Raises:
        DataError: The file cannot be read, or lacks a weight.
    """
    held = _read_state(path)
    wanted = encoder.backbone.state_dict()
    first = next(iter(wanted))
    prefixes = [key.removesuffix(first) for key in held if key.endswith(first)]
    fitting = [prefix for prefix in prefixes if all(prefix + key in held for key in wanted)]
    if not fitting:
        raise DataError(f"{path}: these are not the weights of this backbone; it lacks {first} or others.")
    try:
        encoder.backbone.load_state_dict({key: held[fitting[0] + key] for key in wanted})
    except RuntimeError as error:
        raise DataError(
            f"{path}: these are not the weights of this backbone at this image size: {error}"
        ) from None


def _read_state(path: Path) -> dict[str, Any]:
    """A state dict, from a file that may hold other things beside it."""
    held: dict[str, Any]
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        held = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise DataError(f"{path}: no weights can be read: {error}") from None
    except Exception as error:  # noqa: BLE001 - torch's unpickler raises whatever a strange file makes it
        raise DataError(f"{path}: no weights can be read ({type(error).__name__}).") from None
    if isinstance(held, dict):
        held = next((held[key] for key in ("state_dict", "model") if key in held), held)
    if not isinstance(held, dict) or not all(isinstance(key, str) for key in held):
        raise DataError(f"{path}: holds no weights by name.")
    return held


def save_module(path: Path, module: nn.Module, metadata: dict[str, str]) -> None:
    """Write a module's state with a text header and a hash of what is in it, in one step."""
    state = {key: value.detach().cpu().contiguous().clone() for key, value in module.state_dict().items()}
    header = {**metadata, _HASH: _hash(state, metadata)}
    rundir.write_atomically(path, lambda fresh: save_file(state, fresh, header))


def load_module(path: Path, module: nn.Module) -> None:
    """Load a module's state, strictly.

    Raises:
        CheckpointError: The file is missing, damaged or holds another module.
    """
    try:
        state = load_file(path)
        module.load_state_dict(state)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be loaded: {error}") from None
    header = _read_header(path)
    written = header.pop(_HASH, None)  # earlier versions wrote none
    if written is not None and written != _hash(state, header):  # safetensors notices no flipped bit
        raise CheckpointError(f"{path}: damaged: it is not what was written; make it again.")


def _hash(state: dict[str, Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for key, value in sorted(state.items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_metadata(path: Path) -> dict[str, str]:
    """Read the text header of a safetensors file, but for our own hash.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    return {key: value for key, value in _read_header(path).items() if key != _HASH}


def read_hash(path: Path) -> str:
    """Hash of what a module's file holds, as its header says; an earlier version wrote none.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    return _read_header(path).get(_HASH, "")


def _read_header(path: Path) -> dict[str, str]:
    """Read the text header of a safetensors file.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: missing; pretraining has not finished. Run `labelwise pretrain` again."
        ) from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None
