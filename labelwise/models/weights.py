"""Weights on disk: safetensors with everything needed to build the model again in the header."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from labelwise import rundir
from labelwise.errors import CheckpointError
from labelwise.models.encoder import Encoder, EncoderSpec, create_encoder


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
    metadata = read_metadata(file)
    try:
        spec = EncoderSpec.from_metadata(metadata)
    except (KeyError, ValueError):
        raise CheckpointError(
            f"{file}: not an encoder of Labelwise (its header names no backbone)."
        ) from None
    encoder = create_encoder(spec)
    load_module(file, encoder.backbone)
    return encoder.eval(), spec


def save_module(path: Path, module: nn.Module, metadata: dict[str, str]) -> None:
    """Write a module's state with a text header, in one step."""
    state = {key: value.detach().cpu().contiguous().clone() for key, value in module.state_dict().items()}
    rundir.write_atomically(path, lambda fresh: save_file(state, fresh, metadata))


def load_module(path: Path, module: nn.Module) -> None:
    """Load a module's state, strictly.

    Raises:
        CheckpointError: The file is missing, damaged or holds another module.
    """
    try:
        module.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be loaded: {error}") from None


def read_metadata(path: Path) -> dict[str, str]:
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
