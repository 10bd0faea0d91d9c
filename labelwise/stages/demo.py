"""`labelwise demo`: the whole path on scikit-learn's handwritten digits, each command shown before it runs."""

import contextlib
import io
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from labelwise import rundir, terminal
from labelwise.errors import UsageError
from labelwise.rundir import RunDirectory

_TEST_SHARE = 0.25  # 450 of 1,797 digits
_INK = 16  # scikit-learn's digits have 17 shades


def demo(out: Path, run_command: Callable[[list[str]], None], *, quick: bool = False) -> RunDirectory:
    """Make the images, then scan, pretrain, fine-tune and report as a user would.

    Args:
        out: Folder to create; an unfinished demo in it is continued.
        run_command: Runs the program with these words, in this process: torch is loaded once.
        quick: Few epochs, draws and methods, to see that everything runs.

    Raises:
        UsageError: `out` exists and is not a demo.
        LabelwiseError: One of the commands failed.
    """
    images, run = out / "images", out / "runs" / "digits"
    if out.resolve() == Path.cwd():  # its run would pass for one of the user's own in ./runs
        raise UsageError(f"{out}: is where you are; choose a folder of the demo's own with --out.")
    rundir.check_output_folder(run)
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
    short = ["--steps", "60"]  # and 240 from scratch; the default, 100 and 400 at least, takes longer
    few = [*finetune, "0.01", "--draws", "10", *short]
    more = [*finetune, "0.05,0.1", "--draws", "3", *short]
    if quick:
        pretrain += ["--epochs", "2", "--precision", "fp32"]
        few = [*finetune, "0.01,0.1", "--draws", "2", "--steps", "5", "--scratch-steps", "5"]
    comparisons = [few] if quick else [few, more]
    for command in (["scan", str(images)], pretrain, *comparisons, ["report", "--run", str(run)]):
        terminal.heading(f"$ labelwise {shlex.join(command)}")
        hidden = command[0] == "finetune"  # the report that follows prints the same table
        with contextlib.redirect_stdout(io.StringIO()) if hidden else contextlib.nullcontext():
            run_command(command)
    return RunDirectory(run.absolute())


def write_digits(folder: Path) -> None:
    """Write scikit-learn's 1,797 digits as PNG files of 8 x 8 pixels, one folder per class."""
    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        file = folder / str(label) / f"{number:04d}.png"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image * 255 / _INK).round().astype(np.uint8)).save(file)
