"""The run folder: every path and file format of a run, in one place.

config.toml           resolved settings, itself a recipe
environment.json      versions, device, command, calibration verdict, times (UTC)
owner.json            which process works on the run, as long as one does
data.json             where the images are, fingerprint, counts, quarantine
splits/               test.json (locked) and draws-*.json (label draws)
metrics.jsonl         a line per logged step and per epoch
tensorboard/          the same for TensorBoard, where that was asked for
views.png             what the augmentations do to the first images
neighbours.json       nearest images of a few, with thumbnails
near_copies.json      pairs of images that show the same, the first ones with thumbnails
checkpoints/          resume state; manifest with SHA-256 written last
encoder.safetensors   backbone; head.safetensors: projection head
classifier.safetensors, classifier.json
calibration.json, familiar.safetensors   of that classifier: temperature, scores of labels out of fold; how far images of the pool lie
finetune/             results.jsonl, predictions.parquet, label_check.json (labels that look wrong, with thumbnails),
                      lookalikes.json (test images that resemble training images, the first ones with thumbnails)
report.html, report.md, report.json, model-card.md (of the classifier)
suggestions.csv, suggestions.html   which images to label next
annotations.jsonl     what people said of images on the page of `labelwise annotate`
classes.json          the classes on that page, in the order of their keys
suggested.jsonl       a line per call of suggest: what it chose, in order
"""

import errno
import fcntl
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from labelwise import terminal
from labelwise.errors import CheckpointError, DataError, ResourceError, UsageError
from labelwise.forms import check_form

DEFAULT_RUNS = Path("runs")
LATEST = DEFAULT_RUNS / "latest"
RANDOM, SUGGESTED, MIXED = (
    "random",
    "suggested",
    "mixed",
)  # how the labels of a result were chosen: its series
_LARGEST = 2.0**64  # content keys are smaller
_DOOMED = ".labelwise-deleting-"
_MADE_AGAIN = {"report.json": "report", "study.json": "study"}  # by which command
_BEFORE_STEP_0 = {
    "splits",
    "data.json",
    "config.toml",
    "owner.json",
    "suggested.jsonl",
    "annotations.jsonl",
    "classes.json",
}  # left by a run killed early


@dataclass(frozen=True)
class RunDirectory:
    """Name every file of one run. Creating one touches nothing on disk."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def owner(self) -> Path:
        return self.path / "owner.json"

    @property
    def data(self) -> Path:
        return self.path / "data.json"

    @property
    def test_lock(self) -> Path:
        return self.path / "splits" / "test.json"

    @property
    def splits(self) -> Path:
        return self.path / "splits"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def views(self) -> Path:
        return self.path / "views.png"

    @property
    def neighbours(self) -> Path:
        return self.path / "neighbours.json"

    @property
    def near_copies(self) -> Path:
        return self.path / "near_copies.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def sound(self) -> Path:
        return self.path / "sound"

    @property
    def encoder(self) -> Path:
        return self.path / "encoder.safetensors"

    @property
    def head(self) -> Path:
        return self.path / "head.safetensors"

    @property
    def classifier(self) -> Path:
        return self.path / "classifier.safetensors"

    @property
    def classifier_json(self) -> Path:
        return self.path / "classifier.json"

    @property
    def calibration(self) -> Path:
        return self.path / "calibration.json"

    @property
    def familiar(self) -> Path:
        return self.path / "familiar.safetensors"

    @property
    def results(self) -> Path:
        return self.path / "finetune" / "results.jsonl"

    @property
    def predictions(self) -> Path:
        return self.path / "finetune" / "predictions.parquet"

    @property
    def label_check(self) -> Path:
        return self.path / "finetune" / "label_check.json"

    @property
    def lookalikes(self) -> Path:
        return self.path / "finetune" / "lookalikes.json"

    @property
    def model_card(self) -> Path:
        return self.path / "model-card.md"

    @property
    def suggestions(self) -> Path:
        return self.path / "suggestions.csv"

    @property
    def annotations(self) -> Path:
        return self.path / "annotations.jsonl"

    @property
    def classes(self) -> Path:
        return self.path / "classes.json"

    @property
    def suggested(self) -> Path:
        return self.path / "suggested.jsonl"

    @property
    def report_json(self) -> Path:
        return self.path / "report.json"

    @property
    def report_md(self) -> Path:
        return self.path / "report.md"

    @property
    def report_html(self) -> Path:
        return self.path / "report.html"


def cache_root() -> Path:
    """Folder that holds decoded images and compiled code, of all runs.

    Raises:
        UsageError: Nothing says where it could be: this user has no home.
    """
    if os.environ.get("LABELWISE_CACHE"):
        return Path(os.environ["LABELWISE_CACHE"])
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "labelwise"
    try:
        return Path.home() / ".cache" / "labelwise"
    except RuntimeError:
        raise UsageError(
            "this user has no home folder to keep the image cache in; name a place in LABELWISE_CACHE."
        ) from None


def as_listed(path: Path) -> Path:
    """Where a run lies that is named as `runs list` does, by its folder in `runs/`; any other path as it is."""
    is_name = path == Path(path.name) and not (path / "environment.json").exists()
    return DEFAULT_RUNS / path if is_name and (DEFAULT_RUNS / path).exists() else path


def open_run(path: Path) -> RunDirectory:
    """Open a finished or interrupted run.

    Raises:
        UsageError: No run is there.
        CheckpointError: There is a folder where a file belongs that a command would replace.
    """
    path = as_listed(path)
    if not path.exists():
        hint = "start one with `labelwise pretrain IMAGES`, or name one with --run DIR"
        raise UsageError(f"{path}: no run found here; {hint}.")
    run = RunDirectory(path.resolve())
    if not run.config.exists():
        raise UsageError(f"{path}: not a run folder (no config.toml in it); name one with --run DIR.")
    replaced = (
        run.classifier,
        run.classifier_json,
        run.calibration,
        run.familiar,
        run.results,
        run.predictions,
        run.label_check,
        run.lookalikes,
    )
    for file in (*replaced, run.report_html, run.report_md, run.report_json, run.model_card):
        if file.is_dir():
            raise CheckpointError(f"{file}: a folder, where a file belongs; move it away.")
    return run


def take_over_labels(run: RunDirectory, earlier: RunDirectory) -> None:
    """Let a run have the labels of the page of an earlier one, and know what `suggest` chose there: those are no random ones here either."""
    for ours, theirs in ((run.suggested, earlier.suggested), (run.annotations, earlier.annotations)):
        if theirs.exists():
            rewrite_jsonl(ours, read_jsonl(theirs))
    if (classes := read_derived(earlier.classes)) is not None:
        write_json(run.classes, classes)


def point_latest(run: RunDirectory) -> None:
    """Let `runs/latest` name this run, when the run lies in `runs/`."""
    runs = DEFAULT_RUNS.resolve()
    if run.path.resolve().parent != runs:
        return
    link = runs / "latest"
    fresh = runs / f".latest-{os.getpid()}"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(run.path.name)
    os.replace(fresh, link)


def delete(path: Path) -> None:
    """Delete a folder: first its name, so that whatever a kill leaves of it is no run any more.

    Raises:
        ResourceError: It cannot be; it is as it was.
    """
    doomed = Path(tempfile.mkdtemp(prefix=_DOOMED, dir=path.parent))
    try:
        path.rename(doomed)
    except OSError as error:
        doomed.rmdir()
        raise ResourceError(
            f"{path}: cannot be deleted ({error.strerror}); if it is a disk of its own, delete what is in it."
        ) from None
    with suppress(FileNotFoundError):  # another command finishes it
        shutil.rmtree(doomed)


def finish_deleting(folder: Path) -> None:
    """Delete what a killed `delete` left in a folder."""
    for doomed in folder.glob(f"{_DOOMED}*"):
        shutil.rmtree(doomed, ignore_errors=True)


def is_utf8(name: str) -> bool:
    """Whether a name can be written down; names on disk may be any bytes."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def check_space(folder: Path, needed: int, what: str) -> None:
    """Make sure that so many bytes are free before they are needed.

    Raises:
        ResourceError: They are not.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ResourceError(
            f"{folder}: {what} need up to {needed / 2**20:,.0f} MiB here and {free / 2**20:,.0f} MiB are free; free some, or choose another --out."
        )


def folder_bytes(folder: Path) -> int:
    """Bytes of the files in a folder and below, of which a process at work may move some meanwhile."""
    total = 0
    for below, _, names in os.walk(folder):  # a folder that is gone by then is left out
        for name in names:
            with suppress(FileNotFoundError):
                total += os.stat(os.path.join(below, name)).st_size
    return total


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: fsync stops at the drive's own memory
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    finally:
        os.close(descriptor)


@contextmanager
def naming(folder: Path) -> Iterator[None]:
    """Let whoever finds a disk full or broken say where, which neither a write nor safetensors does."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(folder)
        raise
    except Exception as error:
        told = re.search(r"\(os error (\d+)\)", str(error))  # safetensors says it in words only
        if told is None:
            raise
        raise OSError(int(told[1]), os.strerror(int(told[1])), str(folder)) from None


def write_together(files: dict[Path, Callable[[Path], object]]) -> None:
    """Let each `write` fill a file beside its path, then move all into place; where one fails, all stay as they were."""
    fresh: dict[Path, Path] = {}
    try:
        for path, write in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
            os.close(handle)
            fresh[path] = Path(name)
            with naming(path.parent):
                write(fresh[path])
                flush(fresh[path])
            fresh[path].chmod(0o644)
        for path, filled in fresh.items():
            os.replace(filled, path)
        for folder in {path.parent for path in files}:
            flush(folder)
    finally:
        for filled in fresh.values():
            filled.unlink(missing_ok=True)


def delete_half_written(run: RunDirectory) -> None:
    """Delete what a kill inside `write_together` left beside the files of a run, which nobody else may be writing."""
    names = [name for name, what in vars(RunDirectory).items() if isinstance(what, property)]
    files = [getattr(run, name) for name in names if name != "owner"]  # that one others try to get
    for file in (*files, run.splits / "draw-*.json"):
        for left in file.parent.glob(f".{file.name}-????????"):
            left.unlink(missing_ok=True)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then move it into place, so `path` is never half written."""
    write_together({path: write})


def write_folder(path: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` put files into a folder beside `path`, then move it into place, so `path` is never half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}-begun")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        with naming(fresh):
            fill(fresh)
        fresh.replace(path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step."""
    write_texts({path: text})


def write_texts(texts: dict[Path, str]) -> None:
    """Replace several text files, all or none."""
    write_together(
        {path: partial(Path.write_text, data=text, encoding="utf-8") for path, text in texts.items()}
    )


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """What a JSON file of a run says."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path) -> Any:
    """Read a JSON file of a run.

    Raises:
        CheckpointError: It is missing or damaged.
    """
    try:
        return _parse(path, _read_bytes(path))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: missing; the run is incomplete. Run `labelwise pretrain` again."
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged ({error}); {_advice(path)}.") from None


def _read_bytes(path: Path) -> bytes:
    """Read a file, but no pipe, which would wait for its other end."""
    if path.exists() and not path.is_file():
        raise ValueError("not a file")
    return path.read_bytes()


def _parse(path: Path, text: bytes) -> Any:
    """Read what a file of a run, or a line of it, holds; ValueError where that is nothing such a file could hold."""
    try:
        value = json.loads(
            text.decode(),
            parse_constant=_refuse,
            parse_float=partial(_number, float),
            parse_int=partial(_number, int),
        )
    except RecursionError:
        raise ValueError("nested too deep") from None
    check_form(path.name, value)
    return value


def _number(kind: Callable[[str], float], word: str) -> float:
    value = kind(word)
    if not (abs(value) < _LARGEST if kind is int else math.isfinite(value)):
        raise ValueError(f"{word[:20]} is larger than any number of ours")
    return value


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no number")


def _advice(path: Path) -> str:
    """What to do about a damaged file, with the least loss."""
    if path.name in _MADE_AGAIN or (path.parent.name == "splits" and path.name != "test.json"):
        return f"delete it, `labelwise {_MADE_AGAIN.get(path.name, 'finetune')}` writes it again"
    run = path.parent.parent if path.parent.name == "splits" else path.parent
    words = "put it back from a copy, or start a new run with another --out"
    if (run / "encoder.safetensors").exists():
        words += f"; its encoder is kept by `labelwise pretrain IMAGES --init {run}`"
    return words


def append_jsonl(path: Path, *rows: dict[str, Any], durable: bool = True) -> None:
    """Add lines to a JSON-lines file; a line torn by a power cut before is cut off.

    Args:
        path: The file.
        rows: A line each.
        durable: Wait until they, and all lines before them, are on the disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path.parent), path.open("ab+") as file:
        end = file.seek(0, os.SEEK_END)
        if end and _last_byte(file) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.writelines(
            (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode() for row in rows
        )
        file.flush()
        if durable:
            os.fsync(file.fileno())


def _last_byte(file: BinaryIO) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)


def read_derived(path: Path) -> dict[str, Any] | None:
    """Read a JSON file that can be done without; None where it is missing, or damaged, which is said."""
    try:
        found: dict[str, Any] = _parse(path, _read_bytes(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        terminal.warn(f"{path}: damaged ({error}); left out.")
        return None
    return found


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a JSON-lines file; a last line torn by a power cut is dropped, any other is an error."""
    try:
        lines = _read_bytes(path).split(b"\n")
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged ({error}); move it away.") from None
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            rows.append(_parse(path, line))
        except ValueError as error:
            if number < len(lines):
                raise CheckpointError(
                    f"{path}, line {number}: damaged ({error}); delete that line."
                ) from None
    return rows


def read_metrics(run: RunDirectory) -> list[dict[str, Any]]:
    """Read metrics.jsonl for someone who can do without; empty where it is damaged, which is said."""
    try:
        return read_jsonl(run.metrics)
    except CheckpointError as error:
        terminal.warn(f"the metrics of training are left out: {error}")
        return []


def rewrite_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Replace a JSON-lines file in one step."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def check_cache_outside(folder: Path) -> None:
    """Refuse a cache that would lie among images.

    Raises:
        DataError: It would.
    """
    if cache_root().resolve().is_relative_to(folder.resolve()):
        raise DataError(
            f"{cache_root()}: the image cache would lie inside the image folder {folder}, which is never written to; "
            "name another place in LABELWISE_CACHE."
        )


def check_output_folder(path: Path, *inputs: Path | None) -> None:
    """Refuse an output folder that touches the user's images, or that holds anything but a run.

    Raises:
        UsageError: `path` lies in a folder of images, or one lies in it; neither is ever written to; or it holds files
            that are not ours.
    """
    out = path.resolve()
    for folder in (given.resolve() for given in inputs if given is not None):
        if out.is_relative_to(folder):
            raise UsageError(
                f"{path}: lies inside the image folder {folder}, which is never written to; choose another --out."
            )
        if folder.is_relative_to(out):
            raise UsageError(f"{path}: holds the images {folder}; choose another --out, a folder of its own.")
    there = next(parent for parent in (out, *out.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=there):  # rights do not tell: a disk is mounted to be read, or /proc
            pass
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise UsageError(f"{path}: cannot be written to ({error.strerror}); choose another --out.") from None
    if out.is_dir() and not (out / "environment.json").exists():
        names = {entry.name for entry in out.iterdir()} - _BEFORE_STEP_0
        begun = tuple(
            f".{name}-" for name in ("environment.json", *_BEFORE_STEP_0)
        )  # half written when it was killed
        foreign = {name for name in names if not name.startswith(begun)}
        if foreign:
            raise UsageError(
                f"{path}: not empty and not a run (it holds {sorted(foreign)[0]}); choose another --out."
            )
