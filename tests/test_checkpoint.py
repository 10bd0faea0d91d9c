"""Resume state: exact, never more than two, and never read when damaged."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from labelwise.errors import CheckpointError
from labelwise.learning.checkpoint import Position, load_checkpoint, save_checkpoint
from labelwise.learning.optimization import create_optimizer, set_rate

KINDS = ["adamw", "sgd", "lars"]


def _learner(kind: str, seed: int, layout: torch.memory_format = torch.contiguous_format):
    torch.manual_seed(seed)
    encoder = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten()
    )
    head = nn.Sequential(nn.Linear(144, 16, bias=False), nn.BatchNorm1d(16))
    encoder.to(memory_format=layout)
    optimizer = create_optimizer(kind, [(encoder, 0.02), (head, 0.01)], 1e-3)
    return {"encoder": encoder, "head": head}, optimizer


def _step(modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer, number: int) -> float:
    set_rate(optimizer, 1.0 - 0.1 * number)
    images = torch.randn(6, 3, 10, 10, generator=torch.Generator().manual_seed(number))
    loss = modules["head"](modules["encoder"](images)).sigmoid().pow(2).sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def _train_and_save(folder: Path, kind: str, steps: int, layout=torch.contiguous_format):
    modules, optimizer = _learner(kind, 0, layout)
    for number in range(steps):
        _step(modules, optimizer, number)
        save_checkpoint(folder, Position(number + 1, 0, number + 1), modules, optimizer)
    return modules, optimizer


def _state(modules: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    return {f"{name}/{key}": value for name in modules for key, value in modules[name].state_dict().items()}


def _assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.mark.parametrize("kind", KINDS)
def test_load_gives_back_what_was_saved(tmp_path: Path, kind: str) -> None:
    modules, optimizer = _train_and_save(tmp_path, kind, 3)
    fresh, fresh_optimizer = _learner(kind, seed=1)
    assert load_checkpoint(tmp_path, fresh, fresh_optimizer) == Position(3, 0, 3)
    _assert_equal(_state(modules), _state(fresh))
    before, after = optimizer.state_dict(), fresh_optimizer.state_dict()
    assert before["state"].keys() == after["state"].keys()
    for index, values in before["state"].items():
        _assert_equal(
            {key: torch.as_tensor(value) for key, value in values.items()},
            {key: torch.as_tensor(value) for key, value in after["state"][index].items()},
        )
    for ours, theirs in zip(before["param_groups"], after["param_groups"], strict=True):
        assert {key: ours[key] for key in ("lr", "peak", "weight_decay", "params")} == {
            key: theirs[key] for key in ("lr", "peak", "weight_decay", "params")
        }


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_after_loading_equal_steps_without(
    tmp_path: Path, kind: str, layout: torch.memory_format
) -> None:
    modules, optimizer = _train_and_save(tmp_path, kind, 3, layout)
    fresh, fresh_optimizer = _learner(kind, 1, layout)
    load_checkpoint(tmp_path, fresh, fresh_optimizer)
    for number in (3, 4):
        assert _step(modules, optimizer, number) == _step(fresh, fresh_optimizer, number)
    _assert_equal(_state(modules), _state(fresh))


def test_a_module_without_weights_can_be_saved(tmp_path: Path) -> None:
    modules, optimizer = _learner("adamw", 0)
    modules["nothing"] = nn.Sequential()  # the head of --head none
    save_checkpoint(tmp_path, Position(1, 0, 1), modules, optimizer)
    assert load_checkpoint(tmp_path, modules, optimizer) == Position(1, 0, 1)


def test_only_the_newest_two_are_kept(tmp_path: Path) -> None:
    _train_and_save(tmp_path, "sgd", 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_the_manifest_names_every_other_file(tmp_path: Path) -> None:
    _train_and_save(tmp_path, "sgd", 1)
    folder = tmp_path / "step-00000001"
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert {*manifest["sha256"], "manifest.json"} == {path.name for path in folder.iterdir()}


def test_without_a_checkpoint_there_is_nothing_to_go_on_from(tmp_path: Path) -> None:
    modules, optimizer = _learner("adamw", 0)
    before = {key: value.clone() for key, value in _state(modules).items()}
    assert load_checkpoint(tmp_path / "checkpoints", modules, optimizer) is None
    _assert_equal(before, _state(modules))


def _flip_a_byte(checkpoint: Path) -> None:
    file = checkpoint / "state.safetensors"
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)


def _change_the_json(checkpoint: Path) -> None:
    file = checkpoint / "state.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"step": 3', '"step": 9'), encoding="utf-8")


def _truncate(checkpoint: Path) -> None:
    os.truncate(checkpoint / "state.safetensors", 100)


def _empty_the_json(checkpoint: Path) -> None:
    os.truncate(checkpoint / "state.json", 0)


def _remove_the_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


def _tear_the_manifest(checkpoint: Path) -> None:
    os.truncate(checkpoint / "manifest.json", 20)


def _remove_the_tensors(checkpoint: Path) -> None:
    (checkpoint / "state.safetensors").unlink()


DAMAGES = [
    _flip_a_byte,
    _change_the_json,
    _truncate,
    _empty_the_json,
    _remove_the_manifest,
    _tear_the_manifest,
    _remove_the_tensors,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.strip("_"))
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage
) -> None:
    modules, optimizer = _train_and_save(tmp_path, "adamw", 2)
    second = {key: value.clone() for key, value in _state(modules).items()}
    _step(modules, optimizer, 2)
    save_checkpoint(tmp_path, Position(3, 0, 3), modules, optimizer)
    damage(tmp_path / "step-00000003")
    fresh, fresh_optimizer = _learner("adamw", 1)
    assert load_checkpoint(tmp_path, fresh, fresh_optimizer) == Position(2, 0, 2)
    _assert_equal(second, _state(fresh))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged-step-00000003", "step-00000002"]
    words = capsys.readouterr().err
    assert "step-00000003: damaged; set aside." in words


def test_a_checkpoint_of_another_model_is_set_aside(tmp_path: Path) -> None:
    modules, optimizer = _train_and_save(tmp_path, "adamw", steps=1)
    other = {name: nn.Linear(2, 3) for name in modules}
    save_checkpoint(
        tmp_path, Position(9, 0, 9), other, torch.optim.AdamW(other[next(iter(other))].parameters())
    )
    assert load_checkpoint(tmp_path, modules, optimizer) == Position(1, 0, 1)
    assert (tmp_path / "damaged-step-00000009").is_dir()


def test_pipes_and_files_among_checkpoints_are_not_waited_for(tmp_path: Path) -> None:
    modules, optimizer = _train_and_save(tmp_path / "checkpoints", "adamw", steps=1)
    for name in ("state.json", "manifest.json"):
        [checkpoint] = (tmp_path / "checkpoints").glob("step-*")
        copy = Path(shutil.copytree(checkpoint, tmp_path / name / checkpoint.name))
        (copy / name).unlink()
        os.mkfifo(copy / name)
        with pytest.raises(CheckpointError, match="no checkpoint in it is whole"):
            load_checkpoint(tmp_path / name, modules, optimizer)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file: a file, where the folder of checkpoints belongs"):
        load_checkpoint(tmp_path / "file", modules, optimizer)


def test_when_all_are_damaged_it_is_said_and_nothing_starts_anew_in_silence(tmp_path: Path) -> None:
    modules, optimizer = _train_and_save(tmp_path, "sgd", 2)
    for checkpoint in tmp_path.iterdir():
        _flip_a_byte(checkpoint)
    with pytest.raises(CheckpointError, match="no checkpoint in it is whole"):
        load_checkpoint(tmp_path, modules, optimizer)


def test_the_same_step_damaged_twice_is_set_aside_twice(tmp_path: Path) -> None:
    modules, optimizer = _train_and_save(tmp_path, "sgd", 2)
    for _ in range(2):
        _flip_a_byte(tmp_path / "step-00000002")
        assert load_checkpoint(tmp_path, modules, optimizer) == Position(1, 0, 1)
        save_checkpoint(tmp_path, Position(2, 0, 2), modules, optimizer)


def test_of_damaged_checkpoints_the_newest_is_kept_once_a_whole_one_is_saved(tmp_path: Path) -> None:
    modules, optimizer = _train_and_save(tmp_path, "sgd", 2)
    for checkpoint in tmp_path.iterdir():
        _flip_a_byte(checkpoint)
    with pytest.raises(CheckpointError, match="no checkpoint in it is whole"):
        load_checkpoint(tmp_path, modules, optimizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "damaged-step-00000001",
        "damaged-step-00000002",
    ]
    save_checkpoint(tmp_path, Position(1, 0, 1), modules, optimizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged-step-00000002", "step-00000001"]


def test_a_half_written_checkpoint_is_never_read(tmp_path: Path) -> None:
    modules, optimizer = _train_and_save(tmp_path, "sgd", 1)
    (tmp_path / f".step-00000002-{os.getpid()}").mkdir()
    assert load_checkpoint(tmp_path, modules, optimizer) == Position(1, 0, 1)


def test_a_save_killed_half_way_does_not_stop_the_next_one(tmp_path: Path) -> None:
    modules, optimizer = _train_and_save(tmp_path, "sgd", 1)
    left_over = tmp_path / f".step-00000002-{os.getpid()}"  # in a container the next process has the same id
    left_over.mkdir()
    (left_over / "state.safetensors").write_bytes(b"half")
    save_checkpoint(tmp_path, Position(2, 0, 2), modules, optimizer)
    assert load_checkpoint(tmp_path, modules, optimizer) == Position(2, 0, 2)
