"""`labelwise demo`: the whole path on scikit-learn's handwritten digits, each command shown before it runs."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from labelwise import terminal
from labelwise.errors import LabelwiseError, UsageError
from labelwise.rundir import RunDirectory

_TEST_SHARE = 0.25  # 450 of 1,797 digits
_INK = 16  # scikit-learn's digits have 17 shades


def demo(out: Path, *, quick: bool = False) -> RunDirectory:
    """Make the images, then scan, pretrain, fine-tune and report as a user would.

    Args:
        out: Folder to create; an unfinished demo in it is continued.
        quick: Few epochs, draws and methods, to see that everything runs.

    Raises:
        UsageError: `out` exists and is not a demo.
        LabelwiseError: One of the commands failed.
    """
    images, run = out / "images", out / "runs" / "digits"
    if out.resolve() == Path.cwd():  # its run would pass for one of the user's own in ./runs
        raise UsageError(f"{out}: is where you are; choose a folder of the demo's own with --out.")
    if out.exists() and any(out.iterdir()) and not (images / "0" / "0000.png").exists():
        raise UsageError(f"{out}: is not empty and not a demo; choose another --out.")
    write_digits(images)
    pretrain = [
        "pretrain",
        str(images),
        "--recipe",
        "digits",
        "--holdout",
        str(_TEST_SHARE),
        "--out",
        str(run),
    ]
    finetune = ["finetune", "--run", str(run), "--recipe", "digits", "--fraction"]
    few, more = [*finetune, "0.01", "--draws", "10"], [*finetune, "0.05,0.1", "--draws", "3"]
    if quick:
        pretrain += ["--epochs", "2", "--precision", "fp32"]
        few = [*finetune, "0.01,0.1", "--draws", "2", "--steps", "5", "--scratch-steps", "5"]
    comparisons = [few] if quick else [few, more]
    for command in (["scan", str(images)], pretrain, *comparisons, ["report", "--run", str(run)]):
        _run(command, quiet=command[0] == "finetune")
    return RunDirectory(run.absolute())


def write_digits(folder: Path) -> None:
    """Write scikit-learn's 1,797 digits as PNG files of 8 x 8 pixels, one folder per class."""
    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        file = folder / str(label) / f"{number:04d}.png"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image * 255 / _INK).round().astype(np.uint8)).save(file)


def _run(command: list[str], *, quiet: bool) -> None:
    """Print a command and run it in a process of its own, as a terminal would."""
    terminal.heading(f"$ labelwise {shlex.join(command)}")
    stdout = subprocess.DEVNULL if quiet else None  # the report that follows prints the same table
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    arguments = [sys.executable, "-m", "labelwise", *command]
    previous = signal.signal(
        signal.SIGINT, lambda number, frame: None
    )  # the command gets Ctrl-C too, and saves first
    try:
        status = subprocess.run(arguments, stdout=stdout, env=environment, check=False).returncode
    finally:
        signal.signal(signal.SIGINT, previous)
    if status < 0 or status in (130, 143):
        raise KeyboardInterrupt
    if status:
        raise LabelwiseError(
            f"demo: `labelwise {command[0]}` failed with exit code {status}; its message stands above."
        )
