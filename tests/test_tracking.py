"""Trackers: the numbers of metrics.jsonl again, nowhere a step missing or twice, and no weight another."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from labelwise import rundir
from labelwise.config import PretrainSettings
from labelwise.errors import UsageError
from labelwise.rundir import RunDirectory
from labelwise.stages import pretraining
from labelwise.stages.pretraining import pretrain
from labelwise.stages.tracking import check_tracker


def shown(run: RunDirectory) -> list[tuple[str, int, float]]:
    """What TensorBoard reads: tag, step and value of every number."""
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader", reason="the extra labelwise[tensorboard] is not installed")  # fmt: skip
    (file,) = run.tensorboard.iterdir()
    return [
        (value.tag, event.step, value.simple_value)
        for event in loader.RawEventFileLoader(str(file)).Load()
        for event in [loader.event_pb2.Event.FromString(event)]
        for value in event.summary.value
    ]


def logged(run: RunDirectory) -> list[tuple[str, int, Any]]:
    """The same from metrics.jsonl."""
    return [
        ("step/" + name if row["kind"] == "step" else "epoch/" + name, row["step"], pytest.approx(value))
        for row in rundir.read_jsonl(run.metrics)
        for name, value in row.items()
        if name not in ("kind", "step", "epoch") and value is not None
    ]


def test_the_numbers_of_the_metrics_are_shown_and_no_weight_is_another(
    pretrained: RunDirectory, small_network: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretraining, "SAVE_SECONDS", 0.0)
    save = pretraining.save_checkpoint

    def killed_at_step_2(folder: Path, at: Any, *rest: Any) -> None:
        if at.step == 2:
            raise RuntimeError("killed")
        save(folder, at, *rest)

    settings = PretrainSettings(
        images=pretrained.path.parent / "images",
        out=tmp_path / "run",
        tracker="tensorboard",
        **small_network,
    )
    run = RunDirectory(tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(pretraining, "save_checkpoint", killed_at_step_2)
        pretrain(settings)
    assert shown(run) == logged(run)
    assert max(step for _, step, _ in shown(run)) == 1  # which is not saved, and done again

    pretrain(settings)
    assert shown(run) == logged(run)
    assert {tag for tag, _, _ in shown(run)} >= {"step/loss", "step/learning_rate", "epoch/loss", "epoch/knn",
                                                 "epoch/effective_rank", "epoch/images_per_second"}  # fmt: skip
    for name in ("encoder", "head"):
        before, now = (load_file(getattr(each, name)) for each in (pretrained, run))
        assert all(torch.equal(before[key], now[key]) for key in before | now)


def test_a_run_goes_on_with_another_tracker_or_none(pretrained: RunDirectory) -> None:
    settings = PretrainSettings(images=pretrained.path.parent / "images", out=pretrained.path)
    before = rundir.read_json(pretrained.environment)["asked"]
    assert "tracker" not in before
    changed = {name: before[name] for name in before if name not in ("images", "out")}
    again = PretrainSettings(images=settings.images, out=settings.out, tracker="tensorboard", **changed)
    assert pretraining.find_run(again) == (pretrained, False)


def test_a_package_that_is_missing_is_named_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    check_tracker("none")
    with pytest.raises(UsageError, match=r"pip install 'labelwise\[tensorboard\]'"):
        pretrain(PretrainSettings(images=tmp_path / "images", out=tmp_path / "run", tracker="tensorboard"))
    assert not (tmp_path / "run").exists()
