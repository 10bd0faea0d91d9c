"""Every kind of bad file through every command that reads images: the verdict it should have, and a folder that stays as it was."""

import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from commands import PRETRAIN, RECIPE, Server, Work
from zoo import FINE, SKIPPED, write_zoo

from labelwise.rundir import RunDirectory, read_json, read_jsonl


def contents(folder: Path) -> dict[str, str]:
    """Name, kind, time and hash of everything in a folder."""
    found = {}
    for path in sorted(Path(os.fsdecode(entry)) for entry in map(os.fsencode, folder.rglob("*"))):
        facts = path.lstat()
        data = path.read_bytes() if path.is_file() and not path.is_symlink() and facts.st_size else b""
        found[str(path)] = f"{facts.st_mode} {facts.st_mtime_ns} {hashlib.sha256(data).hexdigest()}"
    return found


def check(found: dict[str, str], expected: dict[str, str], command: str) -> None:
    """Compare reasons by file name with what should become of each."""
    for name, verdict in expected.items():
        reason = found.pop(name, None)
        if verdict in (FINE, SKIPPED):
            assert reason is None, f"{command}: {name!r} was refused: {reason}"
        else:
            assert reason is not None, f"{command}: {name!r} was read"
            assert verdict in reason or verdict == "a reason", f"{command}: {name!r}: {reason}"
    assert not found, f"{command} refused other files"


def test_every_file_gets_the_verdict_it_should_have_from_every_command(
    server: Server, tmp_path: Path, digits: Path, tally: Callable[..., None]
) -> None:
    images = tmp_path / "images"
    shutil.copytree(digits, images)
    expected = write_zoo(images / "7" / "zoo")
    before = contents(images)
    work = Work(server, tmp_path, images)

    command = server.start("scan", images, "--json")
    assert command.wait() == 0, command.words
    scanned = json.loads(command.printed)
    check(by_name(scanned["quarantined"]), expected, "scan")

    run = RunDirectory(tmp_path / "run")
    work.finish("pretrain", run.path)
    check(by_name(read_json(run.data)["quarantined"]), expected, "pretrain")

    work.finish("finetune", run.path)
    unreadable = {name for name, verdict in expected.items() if verdict not in (FINE, SKIPPED)}
    used = {
        Path(name).name
        for file in run.splits.glob("*.json")
        for name in json.loads(file.read_text()).get("order", ())
    }
    assert not used & unreadable
    assert read_jsonl(run.results)

    table = tmp_path / "found.csv"
    command = server.start("predict", images, "--run", run.path, "--out", table, "--json")
    assert command.wait() == 0, command.words
    check(by_name(json.loads(command.printed)["left_out"]), expected, "predict")
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == scanned["images"] - len(scanned["quarantined"])
    assert not any(row["file"].startswith(("=", "-", "+", "@")) for row in rows)
    assert contents(images) == before, "the user's folder is never written to"
    for name in ("scan", "pretrain", "finetune", "predict"):
        tally(f"kinds of odd file through {name}, each with the verdict it should have", len(expected))
    assert len(expected) >= 61


def by_name(entries: list[dict[str, str]]) -> dict[str, str]:
    return {Path(entry["file"]).name: entry["reason"] for entry in entries}


def test_a_folder_that_may_only_be_read_is_enough(
    work: Work, public: Path, tally: Callable[..., None]
) -> None:
    """As somebody who owns nothing here and has no home."""
    images = Path(shutil.copytree(work.images, public / "read-only"))
    for path in (images, *images.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    hidden = next(images.rglob("*.png"))
    hidden.chmod(0)
    run, recipe = RunDirectory(public / "run"), public / "pretrain.toml"
    recipe.write_text(RECIPE)
    places = {
        "LABELWISE_CACHE": str(public / "cache"),
        "NUMBA_CACHE_DIR": str(public / "numba"),
        "HOME": "/nonexistent",
    }
    ran = subprocess.run(
        [sys.executable, "-m", "labelwise", "pretrain", images, "--out", run.path, "--epochs", "2", *PRETRAIN, recipe],
        env={**os.environ, **work.server.environment, **places}, cwd=public, capture_output=True, text=True,
        user=12345, group=12345, extra_groups=[],
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "Traceback" not in ran.stderr
    (entry,) = read_json(run.data)["quarantined"]
    assert entry == {"file": str(hidden.relative_to(images)), "reason": "cannot be read (Permission denied)"}
    tally("unknown user without a home, images read-only")
