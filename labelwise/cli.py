"""The commands. Each builds its settings, calls its stage and prints what comes back.

Stages are imported inside the commands: `labelwise --help` must not wait for torch.
"""

import errno
import math
import os
import signal
import sys
import traceback
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn, TypeVar

import typer

from labelwise import terminal
from labelwise.config import FinetuneSettings, PretrainSettings, Settings, StudySettings, read_recipe
from labelwise.errors import (
    DataError,
    Interrupted,
    LabelwiseError,
    ResourceError,
    UsageError,
    is_out_of_memory,
)
from labelwise.interruption import asking_to_end
from labelwise.options import parameters, parse, with_parameters
from labelwise.recipes import find_recipe, list_recipes

app = typer.Typer(name="labelwise", no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False)
runs_app = typer.Typer(help="List, compare and remove runs.", no_args_is_help=True)
app.add_typer(runs_app, name="runs")

S = TypeVar("S", bound=Settings)
Json = Annotated[bool, typer.Option("--json", help="print one JSON document on stdout")]
Sharing = Annotated[str, typer.Option("--devices", help="GPUs of this machine that share the images, or all")]
Recipe = Annotated[
    str | None,
    typer.Option("--recipe", help="recipe name or TOML file", rich_help_panel="Data", show_default=False),
]
Run = Annotated[Path, typer.Option("--run", help="run folder")]


def main() -> NoReturn:
    """Run the command line; every error a user can cause ends in one block and an exit code."""
    debug = "--debug" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--debug"]
    for number in asking_to_end():
        if number != signal.SIGINT:  # which raises KeyboardInterrupt by itself
            signal.signal(number, _terminated)
    try:
        if not _is_somewhere():
            raise UsageError("the folder you are in was deleted; go to another one.")
        app()
    except Interrupted as error:
        terminal.warn(f"stopped: {error}")
        sys.exit(error.exit_code)
    except LabelwiseError as error:
        if debug:
            traceback.print_exc()
        terminal.fail(str(error))
        sys.exit(error.exit_code)
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            terminal.fail(
                f"{str(error.filename)[:80]}...: a name too long for this system; choose a shorter one."
            )
            sys.exit(UsageError.exit_code)
        words = _resource_words(error)
        if debug or words is None:
            raise
        terminal.fail(words)
        sys.exit(ResourceError.exit_code)
    sys.exit(0)


@app.callback(invoke_without_command=True)
def root(
    show_version: Annotated[bool, typer.Option("--version", help="print versions and exit")] = False,
) -> None:
    """How far a few labels go: pretrain on your own images, fine-tune on 1 % of the labels, compare honestly.

    Add --debug to any command for a traceback.
    """
    if show_version:
        names = ("labelwise", "torch", "timm", "datasets")
        terminal.emit(", ".join(f"{name} {version(name)}" for name in names))
        raise typer.Exit


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="folder to create")] = Path("labelwise-demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="a minute instead of five; numbers mean less")
    ] = False,
) -> None:
    """The whole path on handwritten digits: no network, no GPU."""
    from labelwise.stages.demo import demo as run_demo

    run_demo(out, _run_as_typed, quick=quick)


@app.command()
def scan(
    images: Annotated[Path, typer.Argument(help="folder of images")],
    labels: Annotated[
        Path | None, typer.Option("--labels", help="label file or folder of class folders")
    ] = None,
    labels_root: Annotated[
        Path | None, typer.Option("--labels-root", help="folder the label file's paths start from")
    ] = None,
    json: Json = False,
) -> None:
    """Read every image once and say what is there."""
    from labelwise.stages.scanning import scan as run_scan
    from labelwise.stages.scanning import show

    document = run_scan(images, labels=labels, labels_root=labels_root)
    terminal.emit_json(document) if json else show(document)
    if document["unusable"]:
        raise DataError(document["unusable"])


def _pretrain(recipe: Recipe = None, json: Json = False, **given: Any) -> None:
    """Train an encoder on a folder of unlabeled images (SimCLR). The same command again goes on."""
    from labelwise.learning.precision import count_devices
    from labelwise.learning.ranks import is_rank
    from labelwise.reports.text import few_labels, has_few_labels
    from labelwise.rundir import read_json, read_jsonl
    from labelwise.stages.launching import launch
    from labelwise.stages.pretraining import pretrain

    settings = _resolve(PretrainSettings, recipe, given)
    if settings.devices != "1" and not is_rank():
        count = count_devices(settings.devices, settings.device)
        if count > 1:
            launch(count)
        settings = settings.model_copy(update={"devices": "1"})
    run = pretrain(settings)
    if terminal.is_muted():  # one of several processes, on a machine that may not have the run
        return
    if json:
        terminal.emit_json({"run": str(run.path), "encoder": str(run.encoder)})
    else:
        data = read_json(run.data)
        labels = "" if data["classes"] or read_jsonl(run.annotations) else " --labels FILE"
        if has_few_labels(data):
            terminal.emit(
                f"next: labelwise annotate --run {_shown(run.path)}: a page to label images on, those that matter most"
            )
        terminal.emit(f"next: labelwise finetune --run {_shown(run.path)}{labels} {few_labels(data)}")


def _finetune(recipe: Recipe = None, json: Json = False, **given: Any) -> None:
    """Fine-tune on few labels, compare with training from scratch, and say who wins."""
    from labelwise.stages.repeating import finetune
    from labelwise.stages.reporting import report, show

    document = report(finetune(_resolve(FinetuneSettings, recipe, given)))
    terminal.emit_json(document) if json else show(document)


def _study(recipe: Recipe = None, json: Json = False, **given: Any) -> None:
    """Try a finding of the paper on your own images: augmentations, color, head, readout or batch."""
    from labelwise.studies.studying import show
    from labelwise.studies.studying import study as run_study

    pretraining = read_recipe(find_recipe(recipe), PretrainSettings) if recipe else {}
    document = run_study(_resolve(StudySettings, recipe, given), pretraining)
    terminal.emit_json(document) if json else show(document)


app.command("pretrain")(with_parameters(_pretrain, parameters(PretrainSettings, arguments=("images",))))
app.command("finetune")(with_parameters(_finetune, parameters(FinetuneSettings)))
app.command("study")(with_parameters(_study, parameters(StudySettings, arguments=("name", "images"))))


@app.command()
def report(
    run: Run = Path("runs/latest"),
    label_cost: Annotated[
        float | None, typer.Option(min=0, help="cost of one label: tells labels saved in money")
    ] = None,
    json: Json = False,
) -> None:
    """Write report.html, report.md and report.json of a run, and print the table."""
    from labelwise.rundir import open_run
    from labelwise.stages.reporting import report as run_report
    from labelwise.stages.reporting import show

    if label_cost is not None and not math.isfinite(label_cost):
        raise UsageError(f"--label-cost {label_cost}: give a number.")
    document = run_report(open_run(run), label_cost)
    terminal.emit_json(document) if json else show(document)


@app.command()
def predict(
    images: Annotated[
        list[Path],
        typer.Argument(help="folder of images, image files, @FILE that lists them, or - for a list on stdin"),
    ],
    run: Run = Path("runs/latest"),
    out: Annotated[Path, typer.Option("--out", help=".csv or .parquet file to write")] = Path(
        "predictions.csv"
    ),
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="add a column with the probability of each class")
    ] = False,
    coverage: Annotated[
        float | None,
        typer.Option(
            "--coverage", help="share of images whose set holds the right class", show_default="0.9"
        ),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps")] = "auto",
    devices: Sharing = "1",
    json: Json = False,
) -> None:
    """Classify new images with the classifier that `finetune` kept. The same command again goes on."""
    from labelwise.rundir import open_run
    from labelwise.stages.predicting import predict as run_predict
    from labelwise.stages.predicting import show

    document = run_predict(
        open_run(run),
        images,
        out,
        probabilities=probabilities,
        coverage=coverage,
        device=device,
        devices=devices,
    )
    terminal.emit_json(document) if json else show(document)


@app.command()
def embed(
    images: Annotated[list[Path], typer.Argument(help="folder of images, or image files")],
    run: Run = Path("runs/latest"),
    out: Annotated[Path, typer.Option("--out", help=".parquet or .npz file to write")] = Path(
        "embeddings.parquet"
    ),
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps")] = "auto",
    devices: Sharing = "1",
    json: Json = False,
) -> None:
    """Write the features that the encoder of a run gives to images."""
    from labelwise.rundir import open_run
    from labelwise.stages.embedding import embed as run_embed
    from labelwise.stages.embedding import show

    document = run_embed(open_run(run), images, out, device, devices)
    terminal.emit_json(document) if json else show(document)


@app.command()
def neighbours(
    images: Annotated[list[Path], typer.Argument(help="image files, or a folder")],
    run: Run = Path("runs/latest"),
    count: Annotated[int, typer.Option("--count", min=1, help="how many for each")] = 10,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps")] = "auto",
    json: Json = False,
) -> None:
    """Find the images of a run that are most like others."""
    from labelwise.rundir import open_run
    from labelwise.stages.embedding import neighbours as run_neighbours
    from labelwise.stages.embedding import show_neighbours

    found = run_neighbours(open_run(run), images, count, device)
    terminal.emit_json(found) if json else show_neighbours(found)


@app.command()
def export(
    run: Run = Path("runs/latest"),
    form: Annotated[
        str, typer.Option("--format", help="timm, onnx (pip install 'labelwise\\[onnx]') or safetensors")
    ] = "timm",
    out: Annotated[
        Path | None,
        typer.Option("--out", help="folder to write; default <run name>-<format>", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """Write the classifier of a run, or its encoder, for other programs, with an example that uses it."""
    from labelwise.rundir import open_run
    from labelwise.stages.exporting import export as run_export
    from labelwise.stages.exporting import show

    if form not in ("timm", "onnx", "safetensors"):
        raise UsageError(f"--format {form}: choose timm, onnx or safetensors.")
    found = open_run(run)
    document = run_export(found, form, out or Path(f"{found.path.resolve().name}-{form}"))
    terminal.emit_json(document) if json else show(document)


@app.command()
def suggest(
    run: Run = Path("runs/latest"),
    budget: Annotated[int, typer.Option("--budget", min=1, help="how many images")] = 50,
    labels: Annotated[
        Path | None,
        typer.Option(
            "--labels", help="label file or folder of class folders; default that of the last comparison"
        ),
    ] = None,
    labels_root: Annotated[
        Path | None, typer.Option("--labels-root", help="folder the label file's paths start from")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help=".csv file to write; default suggestions.csv in the run")
    ] = None,
    json: Json = False,
) -> None:
    """Say which images to label next: typical ones, each of another kind than those that have a label."""
    from labelwise.rundir import open_run
    from labelwise.stages.suggesting import show
    from labelwise.stages.suggesting import suggest as run_suggest

    document = run_suggest(open_run(run), budget, out, labels=labels, labels_root=labels_root)
    terminal.emit_json(document) if json else show(document)


@app.command()
def annotate(
    run: Run = Path("runs/latest"),
    test_images: Annotated[
        int, typer.Option("--test-images", min=0, help="random test images to ask about first")
    ] = 100,
    budget: Annotated[
        int, typer.Option("--budget", min=0, help="images that `suggest` chose to ask about then")
    ] = 50,
    classes: Annotated[
        str | None,
        typer.Option("--classes", metavar="A,B", help="classes to choose from", show_default=False),
    ] = None,
    who: Annotated[
        str | None, typer.Option("--who", help="name kept with each answer; default you", show_default=False)
    ] = None,
    host: Annotated[str, typer.Option("--host", help="address to listen on")] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(
            "--port", min=0, max=65535, help="default 8707, or any that is free", show_default=False
        ),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(
            "--token", help="word that opens the page; needed where others reach --host", show_default=False
        ),
    ] = None,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="open the page")] = True,
    import_from: Annotated[
        Path | None,
        typer.Option(
            "--import",
            help="take labels from a CSV, Label Studio's JSON or class folders",
            show_default=False,
        ),
    ] = None,
    export_to: Annotated[
        Path | None,
        typer.Option(
            "--export", help="write labels: a .csv, Label Studio's .json, or a new folder", show_default=False
        ),
    ] = None,
) -> None:
    """Label images on a page in your browser: random test images first, then those that matter most."""
    from labelwise.rundir import open_run
    from labelwise.stages.annotating import annotate as run_annotate
    from labelwise.stages.transferring import export_labels, import_labels

    found = open_run(run)
    if import_from is not None:
        terminal.emit(import_labels(found, import_from, who))
    if export_to is not None:
        terminal.emit(export_labels(found, export_to))
    if import_from is not None or export_to is not None:
        return
    run_annotate(
        found,
        test_images=test_images,
        budget=budget,
        classes=tuple(name.strip() for name in classes.split(",")) if classes else (),
        who=who,
        host=host,
        port=port,
        token=token,
        browser=browser,
    )


@app.command()
def distill(
    run: Run = Path("runs/latest"),
    force: Annotated[
        bool, typer.Option("--force", help="also where labels are too few to show a gain, or show none")
    ] = False,
    json: Json = False,
) -> None:
    """Teach the kept classifier on all images, also those without a label, where that is shown to help."""
    from labelwise.rundir import open_run
    from labelwise.stages.distilling import distill as run_distill
    from labelwise.stages.distilling import show
    from labelwise.stages.reporting import report as run_report

    found = open_run(run)
    document = run_distill(found, force=force)
    if document["distilled"]:
        run_report(found)
    terminal.emit_json(document) if json else show(document)


@app.command()
def status(
    folder: Annotated[Path, typer.Argument(help="run folder, or folder of runs")] = Path("runs"),
    max_age: Annotated[
        float | None,
        typer.Option(
            "--max-age", min=1, help="fail where the work on a run has done no step for so many seconds"
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Say how far the work on a run is, and when it last did a step."""
    from labelwise.stages.watching import check, show
    from labelwise.stages.watching import status as run_status

    found = run_status(folder)
    terminal.emit_json(found) if json else show(found)
    if max_age is not None:
        check(found, max_age)


@app.command()
def verify(
    run: Annotated[Path, typer.Argument(help="run folder")] = Path("runs/latest"), json: Json = False
) -> None:
    """Recompute the report of a run from its stored predictions, and say whether it is the same."""
    from labelwise.rundir import open_run
    from labelwise.stages.verifying import show
    from labelwise.stages.verifying import verify as run_verify

    found = run_verify(open_run(run))
    terminal.emit_json(found) if json else show(found)


@app.command()
def recipes(json: Json = False) -> None:
    """List the recipes that ship."""
    found = list_recipes()
    if json:
        terminal.emit_json([{"name": name, "file": str(path), "about": about} for name, path, about in found])
    else:
        for name, _, about in found:
            terminal.emit(f"{name:<16} {about}")


@app.command()
def doctor(json: Json = False) -> None:
    """Say what this machine can do, and what to fix."""
    from labelwise.stages.doctoring import doctor as run_doctor

    checks = run_doctor()
    if json:
        terminal.emit_json(checks)
        return
    for check in checks["checks"]:
        terminal.emit(f"{'ok ' if check['ok'] else 'FIX'} {check['name']:<14} {check['value']}")
        if check["fix"]:
            terminal.emit(f"                   {check['fix']}")


@runs_app.command("list")
def runs_list(
    folder: Annotated[Path, typer.Argument(help="folder of runs")] = Path("runs"), json: Json = False
) -> None:
    """List runs and image caches, with their size on disk."""
    from labelwise.stages.running import list_runs, show_runs

    found = list_runs(folder)
    terminal.emit_json(found) if json else show_runs(found)


@runs_app.command("compare")
def runs_compare(
    runs: Annotated[list[Path], typer.Argument(help="run folders, two or more")],
    json: Json = False,
) -> None:
    """Say in which settings and results runs differ; where only --seed does, the gain over all of them."""
    from labelwise.stages.running import compare_runs, show_comparison

    document = compare_runs(runs)
    terminal.emit_json(document) if json else show_comparison(document)


@runs_app.command("remove")
def runs_remove(run: Annotated[Path, typer.Argument(help="folder of a run or a study")]) -> None:
    """Delete the folder of a run or a study."""
    from labelwise.stages.running import remove_run

    terminal.emit(f"removed {remove_run(run)}")


def _run_as_typed(words: list[str]) -> None:
    """Run one command in this process, as if it had been typed; leave when it was interrupted."""
    before, sys.argv = sys.argv, ["labelwise", *words]
    try:
        status = app(words, standalone_mode=False)
    finally:
        sys.argv = before
    if status:  # typer turns Ctrl-C into 130
        sys.exit(status)


_IN_THE_WAY = (
    errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EISDIR, errno.ENOTDIR, errno.ELOOP
)  # fmt: skip


def _resource_words(error: Exception) -> str | None:
    """What to say when memory or disk ran out; None for any other error."""
    number = error.errno if isinstance(error, OSError) else None
    place = getattr(error, "filename2", None) or getattr(error, "filename", None)
    if number in (errno.ENOSPC, errno.EDQUOT):
        folder = place if place is None or Path(str(place)).is_dir() else Path(str(place)).parent
        return f"{folder or 'disk'}: full; free some and run the same command again."
    if number == errno.EFBIG:
        return f"{place or 'a file'}: larger than this system allows; name another place for it."
    if number in _IN_THE_WAY:
        return f"{place or 'a file'}: cannot be used ({os.strerror(number)}); mend that and run the same command again."
    if is_out_of_memory(error):
        return "out of memory; use a smaller --batch-size or --image-size."
    return None


def _is_somewhere() -> bool:
    try:
        return bool(Path.cwd())
    except FileNotFoundError:
        return False


def _resolve(settings: type[S], recipe: str | None, given: dict[str, Any]) -> S:
    """Merge defaults, recipe and options into settings."""
    table = read_recipe(find_recipe(recipe), settings) if recipe else {}
    if recipe and not table and settings is not StudySettings:  # which takes its [pretrain] too
        terminal.warn(
            f"--recipe {recipe}: has nothing for this command, as it sets nothing under [{settings.table}]."
        )
    return settings.resolve(parse(settings, given), table)


def _shown(path: Path) -> str:
    """A path as short as it can be typed from here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)
