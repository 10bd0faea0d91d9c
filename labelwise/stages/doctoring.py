"""`labelwise doctor`: what this machine can do, and what to fix."""

import os
import platform
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from labelwise.environment import container_limit
from labelwise.images.cache import list_caches
from labelwise.learning.precision import has_fast_bf16
from labelwise.rundir import DEFAULT_RUNS, cache_root

_GIB = 2**30
_LITTLE_MEMORY = 4 * _GIB
_LITTLE_DISK = 5 * _GIB
_LITTLE_SHARED_MEMORY = 2**28

Check = dict[str, Any]


def doctor() -> dict[str, Any]:
    """Look at versions, device, memory, disk and folders.

    Returns:
        `{"checks": [{"name", "ok", "value", "fix"}]}`; `fix` is empty when nothing is to be done.
    """
    return {
        "checks": [
            _versions(),
            _device(),
            _processor(),
            _memory(),
            _shared_memory(),
            _cache(),
            _runs(),
            _heic(),
        ]
    }


def _check(name: str, value: str, fix: str = "") -> Check:
    return {"name": name, "ok": not fix, "value": value, "fix": fix}


def _versions() -> Check:
    return _check(
        "versions", f"Python {platform.python_version()}, torch {torch.__version__}, {platform.platform()}"
    )


def _device() -> Check:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        value = ", ".join(f"{device.name} ({device.total_memory / _GIB:.0f} GiB)" for device in names)
        return _check("device", f"CUDA {torch.version.cuda}: {value}")
    if torch.backends.mps.is_available():
        return _check("device", "Apple GPU (MPS)")
    if shutil.which("nvidia-smi"):
        fix = "an NVIDIA driver is here but torch sees no GPU: in Docker add --gpus all; else install a CUDA build of torch"
        return _check("device", "CPU only", fix)
    return _check("device", "CPU only")


def _processor() -> Check:
    fast = (
        "bfloat16 in hardware"
        if has_fast_bf16(torch.device("cpu"))
        else "no bfloat16 in hardware, float32 is used"
    )
    return _check("processor", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()}; {fast}")


def _memory() -> Check:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return _check("memory", "unknown")
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    there = min(float(total), container_limit())
    value = f"{there / _GIB:.1f} GiB" + (" (limit of this container)" if there < total else "")
    return _check(
        "memory", value, "use a smaller --batch-size and --image-size" if there < _LITTLE_MEMORY else ""
    )


def _shared_memory() -> Check:
    folder = Path("/dev/shm")  # noqa: S108 - looked at, not written to
    if not folder.is_dir():
        return _check("shared memory", "not used here")
    size = shutil.disk_usage(folder).total
    fix = "start the container with --ipc=host or --shm-size=2g" if size < _LITTLE_SHARED_MEMORY else ""
    return _check("shared memory", f"{size / _GIB:.1f} GiB", fix)


def _cache() -> Check:
    root = cache_root()
    caches = list_caches()
    used = sum(size for _, size, _ in caches)
    place = _nearest_existing(root)
    if not _is_writable(place):
        return _check("image cache", str(root), "cannot be written; name another folder in LABELWISE_CACHE")
    free = shutil.disk_usage(place).free
    value = f"{root}: {len(caches)} sets, {used / _GIB:.2f} GiB; {free / _GIB:.0f} GiB free; safe to delete"
    return _check("image cache", value, "little disk is free; delete old sets" if free < _LITTLE_DISK else "")


def _runs() -> Check:
    folder = DEFAULT_RUNS.absolute()
    if not _is_writable(_nearest_existing(folder)):
        return _check("runs", str(folder), "cannot be written; give --out, or start from another folder")
    return _check("runs", f"{folder}")


def _heic() -> Check:
    there = find_spec("pi_heif") is not None
    return _check("HEIC photos", "read" if there else "not read; `pip install 'labelwise[heic]'` adds them")


def _nearest_existing(path: Path) -> Path:
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())


def _is_writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
