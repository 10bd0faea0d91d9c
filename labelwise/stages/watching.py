"""`labelwise status`: how far the work on a run is, and when it last gave a sign of life."""

import time
from pathlib import Path
from typing import Any

from labelwise import rundir, terminal
from labelwise.errors import LabelwiseError, UsageError
from labelwise.ownership import read_owner
from labelwise.rundir import RunDirectory


def status(folder: Path) -> list[dict[str, Any]]:
    """Describe a run, or every run of a folder that somebody works on.

    Returns:
        Of each: `run`; `owner`, of the command that works on it (`command`, `host`, `pid`, `since`), or None; `silent`, seconds since it
        last did a step; `epoch` that pretraining reached, those `saved`, and all `epochs`; `classifiers`, trained so far; `encoder`, whether it is there.

    Raises:
        UsageError: There is no such folder.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; name a run, or a folder of runs.")
    run = RunDirectory(folder.absolute())
    if run.environment.exists():
        return [_describe(run)]
    owned = sorted(
        path.parent for path in folder.absolute().glob("*/owner.json") if not path.parent.is_symlink()
    )
    found = [_describe(RunDirectory(path)) for path in owned]
    return [each for each in found if each["owner"] is not None]


def check(found: list[dict[str, Any]], max_age: float) -> None:
    """Make sure that whoever works on a run does steps; for the health check of a container.

    Raises:
        LabelwiseError: One has done none for longer.
    """
    for each in found:
        if each["owner"] is not None and each["silent"] > max_age:
            raise LabelwiseError(
                f"{each['run']}: no step for {terminal.duration(each['silent'])} by `{each['owner']['command']}` "
                f"(process {each['owner']['pid']} on {each['owner']['host']}); it may be stuck."
            )


def show(found: list[dict[str, Any]]) -> None:
    """Print it."""
    for each in found:
        terminal.emit(f"run        {each['run']}")
        if each["epochs"] is not None:
            state = (
                "encoder saved"
                if each["encoder"]
                else f"epoch {each['epoch']:,} of {each['epochs']:,} reached, {each['saved']:,} saved"
            )
            terminal.emit(f"pretrain   {state}")
        if each["classifiers"]:
            terminal.emit(f"finetune   {each['classifiers']:,} classifiers trained")
        owner = each["owner"]
        terminal.emit(
            "working    nobody"
            if owner is None
            else f"working    `{owner['command']}`, process {owner['pid']} on {owner['host']} since {owner['since']}; last step "
            f"{terminal.duration(each['silent'])} ago"
        )
    if not found:
        terminal.emit("nobody works on a run here")


def _describe(run: RunDirectory) -> dict[str, Any]:
    owner = read_owner(run)
    silent = None
    if owner is not None:
        try:
            silent = max(0.0, time.time() - run.owner.stat().st_mtime)
        except FileNotFoundError:  # it ended this moment
            owner = None
    plan = rundir.read_json(run.environment).get("plan", {}) if run.environment.exists() else {}
    epochs = {row["epoch"] + 1: row["step"] for row in rundir.read_metrics(run) if row["kind"] == "epoch"}
    steps = [folder.name.removeprefix("step-") for folder in run.checkpoints.glob("step-*")]
    saved = max((int(step) for step in steps if step.isdecimal()), default=0)
    return {
        "run": str(run.path),
        "owner": owner,
        "silent": silent,
        "epoch": max(epochs, default=0),
        "saved": max((epoch for epoch, step in epochs.items() if step <= saved), default=0),
        "epochs": plan.get("epochs"),
        "classifiers": len(rundir.read_jsonl(run.results)),
        "encoder": run.encoder.exists(),
    }
