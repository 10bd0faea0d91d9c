"""Several encoders of one comparison, which differ in the seed of pretraining alone: the gain over all of them."""

import glob
from typing import Any

import numpy as np

from labelwise import rundir
from labelwise.config import FinetuneSettings, PretrainSettings, read_run_config
from labelwise.images.splits import hash_names
from labelwise.measures.statistics import FEWEST_DRAWS, by_group, interval_over_encoders, verdict
from labelwise.models.weights import read_hash
from labelwise.rundir import RANDOM, RunDirectory
from labelwise.stages.scoring import Result, Scores, classifier_of

ENCODER_METHODS = ("simclr", "simclr_probe")  # whose results are an encoder's own
SEED = "pretrain.seed"
_FREE = {SEED, "pretrain.holdout_seed"}
_SOURCES = {
    "pretrain.labels",
    "pretrain.labels_root",
    "pretrain.test",
    "pretrain.group_column",
}  # as they were typed


def sibling(run: RunDirectory, seed: int) -> RunDirectory:
    """Where the run with another seed of pretraining lies: beside this one."""
    return RunDirectory(run.path.with_name(f"{run.path.name}-seed-{seed}"))


def sign(comparison: str, run: RunDirectory) -> str:
    """Signature of results: what they were compared on, and the encoder and head that they begin from."""
    return f"{comparison}-{hash_names([read_hash(run.encoder), read_hash(run.head)])[:8]}"


def comparison_of(result: Result) -> str:
    """What a result was compared on, whatever its encoder."""
    comparison: str = result["signature"].partition("-")[0]
    return comparison


def find_siblings(run: RunDirectory) -> tuple[list[RunDirectory], list[RunDirectory]]:
    """Runs beside this one that are the same comparison with encoders of other seeds: those that are done, and the others.

    Raises:
        CheckpointError: A file of one of them is damaged.
    """
    folders = sorted(run.path.parent.glob(f"{glob.escape(run.path.name)}-seed-*"))
    there = [other for other in map(RunDirectory, folders) if other.config.exists() and other.data.exists()]
    alike = [
        other
        for other in there
        if not why_not_alike([run, other])
        and other.path == sibling(run, read_run_config(other.config)["seed"]).path
    ]
    asked = _compared(run)
    done = [other for other in alike if not why_not_over_encoders([run, other]) and asked <= _compared(other)]
    return done, [other for other in alike if other not in done]


def _compared(run: RunDirectory) -> set[tuple[str, int, int]]:
    """Which classifiers the gain rests on are there."""
    rows = rundir.read_jsonl(run.results)
    return {classifier_of(row) for row in rows if row["method"] in ("simclr", "supervised")}


def differing_settings(runs: list[RunDirectory]) -> dict[str, list[Any]]:
    """Settings in which runs differ, as `table.key`, each with the values of all; one that was not there yet had its default."""
    flat = [
        _flat(PretrainSettings, read_run_config(run.config))
        | _flat(FinetuneSettings, read_run_config(run.config, FinetuneSettings))
        for run in runs
    ]
    settings = {key: [each.get(key) for each in flat] for key in sorted(set().union(*flat))}
    return {key: values for key, values in settings.items() if any(each != values[0] for each in values)}


def _flat(settings: type[PretrainSettings] | type[FinetuneSettings], table: dict[str, Any]) -> dict[str, Any]:
    fields = settings.model_fields.items()
    known = {name: field.get_default(call_default_factory=True) for name, field in fields} if table else {}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in known.items()}
    return {f"{settings.table}.{key}": value for key, value in {**plain, **table}.items()}


def why_not_alike(runs: list[RunDirectory]) -> str:
    """Why runs are not the same pretraining but for the seed; empty where they are."""
    settings = differing_settings(runs)
    other = [key for key in settings if key.startswith("pretrain.") and key not in _FREE | _SOURCES]
    if other:
        return f"they also differ in {', '.join(other)}"
    if len(set(settings.get(SEED, ()))) < len(runs):
        return "two of them have the same seed of pretraining"
    if len({rundir.read_json(run.data)["pool_sha256"] for run in runs}) > 1:
        return "they were pretrained on different images"
    return ""


def why_not_over_encoders(runs: list[RunDirectory]) -> str:
    """Why runs cannot be taken for several encoders of one comparison; empty where they can."""
    if reason := why_not_alike(runs):
        return reason
    if not all(run.results.exists() for run in runs):
        return "not all of them were compared; run `labelwise finetune` alike on each"
    rows = [row for run in runs for row in rundir.read_jsonl(run.results)]
    if len({comparison_of(row) for row in rows}) > 1:
        return "they were compared with different labels, test images or settings"
    folds = any(row.get("folds") for row in rows)
    return "they have no test set, and each tests its labels in turn" if folds else ""


def gains_over_encoders(scores: list[Scores]) -> list[Result]:
    """Fine-tuned SimCLR minus from scratch at each number of labels, over encoders, draws and test images.

    Args:
        scores: Of each encoder's run.

    Returns:
        For each number of labels `labels`, `mean`, `low`, `high`, `n`, `verdict`, `claims`: whether there are enough encoders
        and draws for one, `by_class`: whether it is of the mean over classes, and `of_each` encoder the mean.
    """
    found = []
    for labels in sorted(set.intersection(*(set(each.right) for each in scores))):
        arms = [[each.right[labels].get(arm, {}) for arm in ("simclr", "supervised")] for each in scores]
        draws = sorted(set.intersection(*(set(arm) for pair in arms for arm in pair)))
        if draws:
            pairs = [tuple(map(scores[0].counted, pair)) for pair in arms]
            gains = [np.stack([simclr[draw] - scratch[draw] for draw in draws]) for simclr, scratch in pairs]
            values = np.stack(
                [by_group(each, scores[0].test.groups_of(draws[0])) for each in gains]
            )  # (E, R, T)
            plain = np.mean([arm[0][draw] - arm[1][draw] for arm in arms for draw in draws], axis=0)
            gain = scores[0].left_open(interval_over_encoders(values), plain)
            each_mean = values.mean(axis=(1, 2)).tolist()
            claims = gain.low is not None and gain.n >= FEWEST_DRAWS
            chosen = {} if scores[0].series[labels]["series"] == RANDOM else scores[0].series[labels]
            entry = {"labels": labels, **chosen, **gain.to_json(), "verdict": verdict(gain), "claims": claims}
            entry["by_class"] = scores[0].by_class
            found.append({**entry, "of_each": each_mean})
    return found
