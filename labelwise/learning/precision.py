"""Which number type and memory layout are fastest here: measured, never assumed.

bfloat16 made a narrow ResNet four times faster on one processor and is tens of times slower on others
(recipes/LOG.md), so `calibrate` times a few real steps and keeps the fastest whose loss agrees.
"""

import os
import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from labelwise.errors import UsageError

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
AGREEMENT = 0.05  # largest relative difference of the loss from float32's, in one step
_TIMED_STEPS = 2


@dataclass(frozen=True)
class Precision:
    """How the encoder computes.

    Attributes:
        number: "fp32" or "bf16" (autocast; weights stay float32).
        layout: "channels_last" or "contiguous".
        reason: Why, in words.
    """

    number: str
    layout: str
    reason: str

    def autocast(self, device: torch.device) -> AbstractContextManager[None]:
        """Context in which the forward pass runs."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.number == "bf16")

    def arrange(self, module: nn.Module) -> nn.Module:
        """Put a module's weights into the layout."""
        arranged: nn.Module = module.to(memory_format=LAYOUTS[self.layout])
        return arranged


def choose_device(wish: str) -> torch.device:
    """Pick the device to train on.

    Raises:
        UsageError: The wished device is not there.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if wish == "auto":
        return torch.device(next(name for name in ("cuda", "mps", "cpu") if there[name]))
    if not there.get(wish.split(":", maxsplit=1)[0], False):
        names = ", ".join(name for name, is_there in there.items() if is_there)
        raise UsageError(f"--device {wish}: not available on this machine; available: {names}.")
    return torch.device(wish)


def count_devices(devices: str, device: str) -> int:
    """How many processes `--devices` asks for: `all` is one for each GPU.

    Raises:
        UsageError: There are not as many GPUs, or it is no number.
    """
    if devices != "all" and not (devices.isdecimal() and int(devices) >= 1):
        raise UsageError(f"--devices {devices}: give a number, or all.")
    kind = choose_device(device).type
    there = torch.cuda.device_count() if kind == "cuda" else 1
    asked = there if devices == "all" else int(devices)
    if asked > there and kind != "cpu":
        raise UsageError(f"--devices {devices}: this machine has {there} of kind {kind}.")
    return asked


def choose_devices(devices: str, device: str) -> list[torch.device]:
    """Pick the devices that images are shared among.

    Args:
        devices: A number, or `all`.
        device: Of which kind.

    Raises:
        UsageError: They are not there, or it is no such number.
    """
    kind, count = choose_device(device), count_devices(devices, device)
    if kind.type == "cpu" and count > 1:
        raise UsageError(f"--devices {devices}: is for GPUs; on a CPU all its cores are used by themselves.")
    return [kind] if count == 1 else [torch.device(kind.type, number) for number in range(count)]


def compute_deterministically() -> None:
    """Let torch choose, in this process, only kernels that give the same bits each time; one that has none raises.

    Source: torch documentation, notes on reproducibility.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA's first matrix product runs
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def device_name(device: torch.device) -> str:
    """The device as people know it: the model of a GPU, else its kind."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def calibrate(
    step: Callable[[Precision], float], device: torch.device, wish: str
) -> tuple[Precision, dict[str, float]]:
    """Time the candidates on real steps and keep the fastest whose loss agrees with float32.

    Args:
        step: Runs one training step on throw-away weights and returns its loss, nan where it diverges.
        device: Where.
        wish: "auto", or "fp32" / "bf16" to fix the number type; the layout is then channels last.

    Returns:
        The verdict, and seconds per step of each candidate that was timed.
    """
    if wish != "auto":
        return Precision(wish, "channels_last", f"--precision {wish}"), {}
    candidates = [("fp32", "channels_last"), ("fp32", "contiguous")]
    has_bf16 = has_fast_bf16(device)
    if has_bf16:
        candidates.append(("bf16", "channels_last"))
    seconds: dict[str, float] = {}
    losses: dict[str, float] = {}
    for number, layout in candidates:
        name = f"{number} {layout}"
        trial = Precision(number, layout, "")
        losses[name] = step(trial)  # also warms up
        seconds[name] = min(seconds_of(step, trial, device) for _ in range(_TIMED_STEPS))
    reference = losses["fp32 channels_last"]
    agreeing = [name for name in seconds if abs(losses[name] - reference) <= AGREEMENT * abs(reference)]
    if not agreeing:
        return Precision("fp32", "channels_last", "the steps that were timed diverged"), seconds
    best = min(agreeing, key=lambda name: seconds[name])
    number, layout = best.split()
    others = ", ".join(f"{name} {value * 1e3:.0f} ms" for name, value in seconds.items() if name != best)
    skipped = "" if has_bf16 else "; bf16 not tried: this processor has no bf16 arithmetic"
    reason = f"fastest: {seconds[best] * 1e3:.0f} ms a step against {others}{skipped}"
    return Precision(number, layout, reason), seconds


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the hardware computes in bfloat16; emulated bfloat16 is not worth a trial step."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "mps":
        return False
    flags = Path("/proc/cpuinfo")
    if platform.system() != "Linux" or not flags.exists():
        return False
    words = flags.read_text(encoding="utf-8", errors="replace").split()
    return any(word in words for word in ("avx512_bf16", "amx_bf16", "bf16"))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds_of(step: Callable[[Precision], float], precision: Precision, device: torch.device) -> float:
    """How long a step takes."""
    synchronize(device)
    start = time.perf_counter()
    step(precision)
    synchronize(device)
    return time.perf_counter() - start


def arrange_images(images: Tensor, precision: Precision) -> Tensor:
    """Put a batch of images into the layout, (B, 3, H, W)."""
    return images.contiguous(memory_format=LAYOUTS[precision.layout])
