"""`labelwise study NAME IMAGES`: run the trials of a study, and write what came out."""

import math
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from labelwise import environment, rundir, terminal
from labelwise.config import PretrainSettings, StudySettings, parse_duration, to_toml
from labelwise.errors import Interrupted, UsageError
from labelwise.images.shards import whole_path
from labelwise.interruption import stop_between_steps
from labelwise.learning.memory import keep_freed_memory
from labelwise.learning.optimization import Diverged
from labelwise.learning.precision import choose_device, count_devices, device_name
from labelwise.learning.workers import side_by_side
from labelwise.ownership import beat, hold
from labelwise.reports import study_page
from labelwise.rundir import RunDirectory
from labelwise.stages.beginning import with_whole_paths
from labelwise.stages.processes import Processes
from labelwise.studies import augmentations, batch, color, head, readout
from labelwise.studies.findings import CAPTION, Findings
from labelwise.studies.preparing import Prepared, prepare
from labelwise.studies.trials import FOLDS, Answers, Material, Name, Outcomes, Trial

STUDIES: dict[str, ModuleType] = {
    "augmentations": augmentations,
    "color": color,
    "head": head,
    "readout": readout,
    "batch": batch,
}
_SMALL: dict[str, Any] = {  # on a CPU, where no recipe names another network
    "backbone": "resnet18",
    "backbone_args": {"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 128], "stem_type": "deep", "stem_width": 8},
    "stem": "half",
    "learning_rate": 8e-3,
}  # fmt: skip
_DATA = ("images", "labels", "labels_root", "group_column")
_OF_THE_STUDY = (
    "init",
    "out",
    "epochs",
    "time_limit",
    "initial_scale",
    "seed",
    "devices",
    "rank_timeout",
    "tracker",
    "stream",
    "shuffle_buffer",
    "keep_decoded",
)  # a recipe's are not used
_ELSEWHERE = ("out", "devices")  # a study may go on with others
_LIMIT_SHARE = 0.95  # of the time, start and trials; the rest is for the last trial and what is written
_QUARTERS = 4  # an answer is a share of at most four versions of an image
_OF_ONE_STUDY = {"symmetric": "augmentations", "pairs": "augmentations", "temperature": "batch"}


def study(settings: StudySettings, pretraining: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run a study, or go on with it, and write its table, figure and page, after an interruption too.

    Args:
        settings: Which study, on what, for how long.
        pretraining: Settings of the usual training, as in a recipe's `[pretrain]`.

    Returns:
        study.json.

    Raises:
        DataError: The images or labels cannot be used.
        UsageError: The time is too short for one trial, or a setting does not fit.
        Interrupted: A signal came; finished trials are kept.
    """
    started = time.monotonic()
    deadline = started + _LIMIT_SHARE * parse_duration(settings.time_limit)
    device, devices = choose_device(settings.device), count_devices(settings.devices, settings.device)
    recipe = {key: value for key, value in (pretraining or {}).items() if key not in _OF_THE_STUDY}
    small = _SMALL if device.type == "cpu" and "backbone" not in recipe else {}
    usual = PretrainSettings.resolve({key: getattr(settings, key) for key in _DATA}, {**small, **recipe})
    for option, name in _OF_ONE_STUDY.items():
        if getattr(settings, option) and settings.name != name:
            raise UsageError(f"--{option} is for `labelwise study {name}`, not for {settings.name}.")
    module, asked = STUDIES[settings.name], _asked(settings, usual)
    run, is_new = _open(settings, asked)
    keep_freed_memory()
    before = None if is_new else rundir.read_json(run.environment)["plan"]
    at_once = 1 if device.type == "cpu" else devices  # processes on one CPU share it
    prepared = prepare(module, settings, usual, device, deadline, before, at_once)
    with hold(run, is_new=is_new):
        if is_new:
            how = {key: prepared.facts[key] for key in ("layout", "reason")}
            environment.start(
                run,
                device=device_name(device),
                asked=asked,
                plan=prepared.facts,
                precision={"number": prepared.facts["precision"], **how},
            )
        _announce(run, settings, prepared, is_new)
        outcomes, stopped = Outcomes(prepared.material.groups), None
        try:
            _run(run, _Asked(settings, usual, prepared.facts), prepared, outcomes, deadline, devices)
        except Interrupted as error:
            stopped = error
        environment.finish(run, time.monotonic() - started)
        found: Findings = module.describe(outcomes, prepared.material, settings)
        document = _document(settings, prepared, found, outcomes)
        _write(run, document, recipe)
    if stopped is not None:
        raise stopped
    if document["missing"]:
        terminal.warn(
            f"--time-limit {settings.time_limit}: {document['missing']} of {document['trials']} trials are left; the same command goes on."
        )
    return {**document, "folder": str(run.path)}


def _open(settings: StudySettings, asked: dict[str, Any]) -> tuple[RunDirectory, bool]:
    """Find the folder that this study was begun in, or name a new one."""
    base = settings.out or rundir.DEFAULT_RUNS / f"study-{settings.name}-{settings.images.resolve().name}"
    inputs = [path for path in (settings.images, settings.labels) if path is not None and path.is_dir()]
    number = 1
    while True:
        run = RunDirectory((base if number == 1 else Path(f"{base}-{number}")).absolute())
        rundir.check_output_folder(run.path, *inputs)
        if not run.environment.exists():
            return run, True
        before = rundir.read_json(run.environment)["asked"]
        if settings.out is not None and "pretrain" not in before:
            raise UsageError(f"{settings.out}: holds a run, not a study; choose another --out.")
        before = with_whole_paths(_with_defaults(before))
        if before == asked:
            return run, False
        if settings.out is not None:
            key = next(key for key in {**before, **asked} if before.get(key) != asked.get(key))
            raise UsageError(
                f"{settings.out}: holds a study or run with {key} = {before.get(key)!r}, now {asked.get(key)!r}; choose another --out."
            )
        number += 1


def _asked(settings: StudySettings, usual: PretrainSettings) -> dict[str, Any]:
    """What decides the trials of a study."""
    asked = settings.model_dump(mode="json", exclude=set(_ELSEWHERE))
    rest = usual.model_dump(mode="json", exclude={*_DATA, *_OF_THE_STUDY})
    return with_whole_paths({**asked, "pretrain": rest})


def _with_defaults(asked: dict[str, Any]) -> dict[str, Any]:
    """What was asked for, and the defaults of settings that were not there yet."""
    study = {
        name: field.default for name, field in StudySettings.model_fields.items() if name not in _ELSEWHERE
    }
    usual = PretrainSettings.model_fields.items()
    rest = {name: field.default for name, field in usual if name not in (*_DATA, *_OF_THE_STUDY)}
    return {**study, **asked, "pretrain": {**rest, **asked.get("pretrain", {})}}


def _announce(run: RunDirectory, settings: StudySettings, prepared: Prepared, is_new: bool) -> None:
    """Print the plan."""
    material, size, trials = prepared.material, prepared.size, len(prepared.trials)
    spec, seeds = material.spec, f"{size.seeds} seed{'s' if size.seeds > 1 else ''}"
    terminal.say(f"study      {settings.name}, {run.path}" + ("" if is_new else " (continued)"))
    terminal.say(
        f"images     {size.images:,} to train on, {len(material.scored):,} of them scored by their labels in {FOLDS} folds, "
        f"{material.classes} classes; {prepared.tested:,} test images stay untouched"
    )
    terminal.say(
        f"model      {spec.backbone}, {spec.stem} stem, {spec.image_size} px, batch {material.plan.batch_size}"
    )
    terminal.say(
        f"trials     {trials}, {size.epochs} epochs, {seeds}, about {terminal.duration(size.seconds)} in all"
    )
    if smaller := _made_smaller(settings, prepared):
        terminal.say(f"           to fit --time-limit {settings.time_limit}: {', '.join(smaller)}")


def _made_smaller(settings: StudySettings, prepared: Prepared) -> list[str]:
    """What the time was too short for, in words."""
    size = prepared.size
    words = {
        f"{size.images:,} of {size.available:,} images": size.images < size.available,
        f"{size.epochs} of {settings.epochs} epochs": size.epochs < settings.epochs,
        f"{size.seeds} of {settings.seeds} seeds": size.seeds < settings.seeds,
    }
    return [each for each, is_smaller in words.items() if is_smaller]


@dataclass(frozen=True)
class _Asked:
    """What another process needs to know to prepare the same trials."""

    settings: StudySettings
    usual: PretrainSettings
    facts: dict[str, Any]


def _run(
    run: RunDirectory, asked: _Asked, prepared: Prepared, outcomes: Outcomes, deadline: float, devices: int
) -> None:
    """Run what is not there yet, seed by seed, as long as there is time."""
    material, size = prepared.material, prepared.size
    file = run.path / "trials.jsonl"
    rows = rundir.read_jsonl(file)
    for row in rows:
        outcomes.add(tuple(row["trial"]), row["seed"], _decode(row["answers"]))
    done = {(tuple(row["trial"]), row["seed"]) for row in rows}
    waiting = [(trial, seed) for trial, seed in prepared.jobs if (trial.name, seed) not in done]
    words_at_end = f"finished trials are in {run.path}; the same command goes on."
    spent, estimated = 0.0, 0.0

    def before_step() -> None:
        stop.check(words_at_end)
        beat(run)

    def estimate(trial: Trial) -> float:
        return prepared.costs.of(trial, size.images, size.epochs, len(material.scored))

    def answer(job: tuple[Trial, int]) -> tuple[Answers, float, str] | None:
        """Answers, seconds, and what is to be said; None where there is no time."""
        trial, seed = job
        pace = spent / estimated if estimated else 1.0
        clock = time.monotonic()
        if clock + estimate(trial) * pace > deadline:
            return None
        try:
            if others is None:
                answers, took = _timed(asked.settings.name, material, trial, seed, before_step)
            else:
                answers, took = others.run(_answer, (trial.name, seed), before_step)
            words = ", ".join(f"{question} {values.mean():.1%}" for question, values in answers.items())
        except Diverged as error:
            answers, took = {}, time.monotonic() - clock
            words = f"diverged, its cell stays empty: {error}"
        return answers, took, words

    with (
        stop_between_steps() as stop,
        terminal.track("trials", len(prepared.jobs), done=len(done), unit="trials") as bar,
        _processes(run, asked, material.device, devices if waiting else 1) as others,
        closing(side_by_side(answer, waiting, devices)) as results,
    ):
        for (trial, seed), outcome in results:
            if outcome is None:
                continue
            answers, took, words = outcome
            spent += took
            estimated += estimate(trial)
            outcomes.add(trial.name, seed, answers)
            row = {"trial": list(trial.name), "seed": seed, "seconds": round(took, 2)}
            rundir.append_jsonl(file, {**row, "answers": _encode(answers)})
            bar.advance()
            bar.note(f"{' '.join(trial.name)}, seed {seed}: {words}")
            stop.check(words_at_end)


def _processes(
    run: RunDirectory, asked: _Asked, device: torch.device, devices: int
) -> Processes | nullcontext[None]:
    if devices == 1:
        return nullcontext()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what was timed here is theirs now
    ended = f"{run.path}: a process that ran trials was ended; finished trials are kept, and the same command goes on."
    return Processes(devices, device, partial(_prepare_again, asked), ended)


def _prepare_again(asked: _Asked, device: torch.device) -> tuple[str, Prepared]:
    """In another process: what the command prepared."""
    name = asked.settings.name
    return name, prepare(STUDIES[name], asked.settings, asked.usual, device, math.inf, asked.facts)


def _answer(opened: tuple[str, Prepared], name: Name, seed: int) -> tuple[Answers, float]:
    """In another process: run a trial, until it is done or the process is killed."""
    study_name, prepared = opened
    trial = next(each for each in prepared.trials if each.name == name)
    return _timed(study_name, prepared.material, trial, seed, lambda: None)


def _timed(
    study_name: str, material: Material, trial: Trial, seed: int, before_step: Callable[[], None]
) -> tuple[Answers, float]:
    """Run a trial: its answers, and seconds."""
    clock = time.monotonic()
    answers: Answers = STUDIES[study_name].answer(material, trial, seed, before_step)
    return answers, time.monotonic() - clock


def _encode(answers: Answers) -> dict[str, str]:
    """One digit for each scored image: quarters that were right."""
    return {
        asked: "".join(map(str, np.rint(_QUARTERS * values).astype(int).tolist()))
        for asked, values in answers.items()
    }


def _decode(answers: dict[str, str]) -> Answers:
    return {
        asked: np.array([int(digit) for digit in digits]) / _QUARTERS for asked, digits in answers.items()
    }


def _document(
    settings: StudySettings, prepared: Prepared, found: Findings, outcomes: Outcomes
) -> dict[str, Any]:
    """Put study.json together."""
    material, size = prepared.material, prepared.size
    trials = len(prepared.jobs)
    recipe = {key: list(value) if isinstance(value, tuple) else value for key, value in found.recipe.items()}
    return {
        "study": settings.name,
        "advice": found.advice,
        "recipe": recipe,
        "tables": [table.to_json() for table in found.tables],
        "comparisons": [comparison.to_json() for comparison in found.comparisons],
        "caption": CAPTION,
        "images": {
            "root": whole_path(settings.images),
            "trained_on": size.images,
            "scored": len(material.scored),
            "classes": material.classes,
            "size": material.spec.image_size,
        },
        "training": {
            "backbone": material.spec.backbone,
            "backbone_args": material.spec.backbone_args,
            "epochs": size.epochs,
            "batch_size": material.plan.batch_size,
            "seeds": size.seeds,
            "folds": FOLDS,
            "time_limit": settings.time_limit,
            "made_smaller": _made_smaller(settings, prepared),
        },
        "trials": trials,
        "missing": trials - outcomes.done,
        "diverged": outcomes.empty,
        "pictures": found.pictures,
    }


def _write(run: RunDirectory, document: dict[str, Any], recipe: dict[str, Any]) -> None:
    """Write study.json, study.csv, the figures, the page and the recipe."""
    rundir.write_json(run.path / "study.json", document)
    rundir.write_text(run.path / "study.csv", study_page.as_csv(document))
    for kind in ("svg", "png"):
        picture = study_page.figure(document, kind)
        rundir.write_atomically(run.path / f"study.{kind}", lambda fresh, picture=picture: fresh.write_bytes(picture))  # type: ignore[misc]  # fmt: skip
    rundir.write_text(run.path / "study.html", study_page.render(document, rundir.read_json(run.environment)))
    file = run.path / "recipe.toml"
    if document["recipe"]:
        words = f"# {document['advice']}\n#   labelwise pretrain IMAGES --recipe {file}\n"
        rundir.write_text(file, words + to_toml({"pretrain": {**recipe, **document["recipe"]}}))
    else:
        file.unlink(missing_ok=True)


def show(document: dict[str, Any]) -> None:
    """Print the tables, the comparisons and the advice."""
    for table in document["tables"]:
        rows = [[name, *map(study_page.cell_in_words, cells)] for name, cells in zip(table["rows"], table["cells"], strict=True)]  # fmt: skip
        terminal.emit_table(f"{table['title']}, %", ["", *table["columns"]], rows)
        if paper := table["paper"]:
            numbers = [[name, *(f"{each:g}" for each in cells)] for name, cells in zip(paper["rows"], paper["cells"], strict=True)]  # fmt: skip
            terminal.emit_table(f"the paper, {paper['source']}", ["", *paper["columns"]], numbers)
    compared = [
        [each["words"], study_page.difference_in_words(each["difference"]), each["verdict"], each["paper"]]
        for each in document["comparisons"]
    ]
    terminal.emit_table("Comparisons, points", ["first against second", "difference", "verdict", "the paper"], compared)  # fmt: skip
    terminal.emit(document["advice"], style="bold")
    terminal.emit(f"page       {document['folder']}/study.html; table study.csv, figure study.svg")
    if document["recipe"]:
        terminal.emit(f"next: labelwise pretrain IMAGES --recipe {document['folder']}/recipe.toml")
