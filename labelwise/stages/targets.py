"""Where a command may write what a user asked for: nowhere that holds anything, and never among images."""

import os
from collections.abc import Iterable
from pathlib import Path

from labelwise import rundir
from labelwise.config import FinetuneSettings, read_run_config
from labelwise.errors import UsageError
from labelwise.rundir import RunDirectory


def check_file(out: Path, suffixes: tuple[str, ...], run: RunDirectory, images: Iterable[Path] = ()) -> None:
    """Refuse to write over anything, or into a folder of images, those of the run included.

    Args:
        suffixes: What the file's name may end with.
        images: Folders, or files, besides those of the run.

    Raises:
        UsageError: The file cannot be written there.
    """
    if out.suffix not in suffixes:
        raise UsageError(f"--out {out}: name a {' or a '.join(suffixes)} file.")
    if out.exists():
        raise UsageError(f"--out {out}: is there already; remove it, or name another file.")
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: there is no folder {out.parent}.")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise UsageError(f"--out {out}: {out.parent} cannot be written to.")
    for folder in (*images, *_folders(run)):
        if folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
            raise UsageError(
                f"--out {out}: lies inside the image folder {folder}, which is never written to."
            )


def check_folder(out: Path, run: RunDirectory) -> None:
    """Refuse a folder that is there, or that touches the images of the run.

    Raises:
        UsageError: It is there, touches them, or cannot be written.
    """
    if out.exists():
        raise UsageError(f"--out {out}: is there already; remove it, or name another folder.")
    rundir.check_output_folder(out, *(folder for folder in _folders(run) if folder.is_dir()))


def _folders(run: RunDirectory) -> list[Path]:
    """Where the images of a run lie, those that its last comparison was given included."""
    sources = rundir.read_json(run.data)["sources"]
    compared = read_run_config(run.config, FinetuneSettings)
    others = (each.get(name) for each in (sources, compared) for name in ("labels", "test"))
    return [Path(folder) for folder in (sources["images"], *others) if folder]
