"""Resume state on disk: tensors in safetensors, the rest in JSON, a manifest of SHA-256 written last.

A checkpoint is the folder `step-00000240`. It is filled under another name, flushed and renamed, so a
folder of that name is whole; its manifest says whether the bytes in it are still the ones written.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from labelwise import terminal
from labelwise.errors import CheckpointError, LabelwiseError, is_out_of_memory
from labelwise.learning.ranks import Ranks
from labelwise.rundir import flush, naming

KEPT = 2
_TENSORS_PER_WEIGHT = 3  # itself, and the two averages that AdamW keeps; other optimizers keep one
_VERSION = 1
_FILES = {"state.safetensors", "state.json"}
_ASIDE = "damaged-"


@dataclass(frozen=True)
class Position:
    """Where a run is: `step` steps are done, the next one is `batch` of `epoch` (all from 0)."""

    step: int
    epoch: int
    batch: int


def save_checkpoint(
    folder: Path, position: Position, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer
) -> None:
    """Write the resume state of a run, read it back, then delete all but the newest two, and the newest damaged one.

    Raises:
        OSError: It could not be written; earlier ones are as they were.
        CheckpointError: What is on the disk is not what was written.
    """
    name = f"step-{position.step:08d}"
    fresh, final = folder / f".{name}-{os.getpid()}", folder / name
    if final.exists():
        return
    for leftover in folder.glob(".step-*"):  # of a process that was killed while saving
        shutil.rmtree(leftover)
    try:
        fresh.mkdir(parents=True)
        with naming(folder):
            _write(fresh, position, *_flatten(modules, optimizer))
        fresh.rename(final)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)  # it may be what fills the disk
        raise
    flush(folder)
    for file in final.iterdir():
        _forget(file)
    if not _is_whole(final):
        aside = _set_aside(final)
        raise CheckpointError(
            f"{aside}: is not what was written, the disk may be failing; earlier ones are kept."
        )
    for old in [*_checkpoints(folder)[:-KEPT], *sorted(folder.glob(f"{_ASIDE}*"))[:-1]]:
        shutil.rmtree(old)


def bytes_needed(folder: Path, modules: Iterable[nn.Module]) -> int:
    """Disk space that checkpoints in a folder may still take: those kept, a new one, and the weights at the end."""
    weights: int = sum(each.nbytes for module in modules for each in module.state_dict().values())
    there = sum(file.stat().st_size for file in folder.glob("step-*/*"))
    return max(0, (KEPT + 1) * _TENSORS_PER_WEIGHT * weights - there) + weights


def load_checkpoint(
    folder: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer
) -> Position | None:
    """Restore the newest checkpoint that is whole; set a damaged one aside and take the one before.

    Returns:
        Where to go on, or None when there is nothing to go on from.

    Raises:
        CheckpointError: There are checkpoints, and each is damaged.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: a file, where the folder of checkpoints belongs; move it away.")
    candidates = _checkpoints(folder)
    for candidate in reversed(candidates):
        if not _is_whole(candidate):
            terminal.warn(f"{candidate}: damaged; set aside.")
            _set_aside(candidate)
            continue
        try:
            tensors = load_file(candidate / "state.safetensors")
            state = json.loads((candidate / "state.json").read_text(encoding="utf-8"))
            _unflatten(tensors, state["optimizer"], modules, optimizer)
            return Position(**state["position"])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            if is_out_of_memory(error):
                raise
            terminal.warn(f"{candidate}: not of this model ({str(error).splitlines()[0]}); set aside.")
            _set_aside(candidate)
    if candidates:
        raise CheckpointError(
            f"{folder}: no checkpoint in it is whole and of this model; the same command again starts from step 0."
        )
    return None


def share_state(ranks: Ranks, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> None:
    """Give every rank the weights and the optimizer's state of the first one, which alone reads them."""
    if ranks.count == 1:
        return
    tensors, rest = _flatten(modules, optimizer)
    forms, rest = ranks.tell(
        lambda: ({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}, rest)
    )
    if not ranks.is_first:
        tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in forms.items()}
    ranks.copy_first(tensors.values())
    if not ranks.is_first:
        _unflatten(tensors, rest, modules, optimizer)


def check_alike(ranks: Ranks, modules: dict[str, nn.Module]) -> None:
    """Make sure that all ranks have the same weights, bit by bit.

    Raises:
        LabelwiseError: They have not: memory or a link between them fails, or a kernel gives other bits each time.
    """
    if ranks.count == 1:
        return
    weights = [each for module in modules.values() for each in module.parameters()]
    sums = torch.stack([each.detach().view(torch.int32).sum(dtype=torch.int64) for each in weights]).cpu()
    gathered = ranks.gather(sums)  # (W, weights)
    if not (gathered == gathered[0]).all():
        odd = [rank for rank in range(ranks.count) if not torch.equal(gathered[rank], gathered[0])]
        raise LabelwiseError(
            f"the weights of rank {odd[0]} are not those of rank 0 any more; nothing was saved since, and the same command goes on from there."
        )


def _write(folder: Path, position: Position, tensors: dict[str, Tensor], rest: Any) -> None:
    """Write one checkpoint, its manifest last, all of it on the disk before this returns."""
    save_file(tensors, folder / "state.safetensors")
    (folder / "state.json").write_text(
        json.dumps({"position": vars(position), "optimizer": rest}), encoding="utf-8"
    )
    hashes = {file.name: _sha256(file) for file in sorted(folder.iterdir())}
    (folder / "manifest.json").write_text(
        json.dumps({"version": _VERSION, "sha256": hashes}), encoding="utf-8"
    )
    for path in (*folder.iterdir(), folder):
        flush(path)


def _forget(file: Path) -> None:
    """Let go of what memory holds of a file, so that it is read from the disk next; on Linux."""
    if hasattr(os, "posix_fadvise"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _set_aside(checkpoint: Path) -> Path:
    aside = checkpoint.with_name(f"{_ASIDE}{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    return checkpoint.rename(aside)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def _flatten(
    modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], Any]:
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        for key, value in module.state_dict().items():
            tensors[f"{name}/{key}"] = value.detach().cpu().contiguous().clone()
    state = optimizer.state_dict()
    plain: dict[str, dict[str, Any]] = {}
    for index, values in state["state"].items():
        plain[str(index)] = {}
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{key}"] = value.detach().cpu().contiguous().clone()
            else:
                plain[str(index)][key] = value
    return tensors, {"state": plain, "groups": state["param_groups"]}


def _unflatten(
    tensors: dict[str, Tensor], rest: Any, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer
) -> None:
    for name, module in modules.items():
        prefix = f"{name}/"
        module.load_state_dict(
            {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
        )
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in rest["state"].items()}
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            _, index, name = key.split("/", 2)
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": rest["groups"]})
    for parameter, values in optimizer.state.items():  # fused steps walk memory: same layout as the weight
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _is_whole(checkpoint: Path) -> bool:
    try:
        if not all((checkpoint / name).is_file() for name in {*_FILES, "manifest.json"}):
            return False  # opening a pipe would wait for its other end
        manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
        if manifest["version"] != _VERSION or set(manifest["sha256"]) != _FILES:
            return False
        return all(_sha256(checkpoint / name) == digest for name, digest in manifest["sha256"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
