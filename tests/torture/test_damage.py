"""A hundred kinds of damage to a checkpoint: each is noticed, and the one before is used, with the tensors it had."""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from labelwise.errors import CheckpointError
from labelwise.learning.checkpoint import Position, load_checkpoint, save_checkpoint
from labelwise.learning.optimization import create_optimizer
from labelwise.models.weights import load_module, save_module

NEWEST, BEFORE = "step-00000002", "step-00000001"
Damage = tuple[str, Callable[[Path], None]]


def learner(seed: int, width: int = 40) -> tuple[dict[str, nn.Module], torch.optim.Optimizer]:
    torch.manual_seed(seed)
    modules = {
        "encoder": nn.Sequential(nn.Linear(30, width), nn.BatchNorm1d(width)),
        "head": nn.Linear(width, 8),
    }
    return modules, create_optimizer("adamw", [(module, 0.1) for module in modules.values()], 0.01)


def train(modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer, step: int) -> None:
    views = torch.randn(16, 30, generator=torch.Generator().manual_seed(step))
    optimizer.zero_grad()
    modules["head"](modules["encoder"](views)).square().mean().backward()
    optimizer.step()


def state(modules: dict[str, nn.Module]) -> list[torch.Tensor]:
    return [value.clone() for module in modules.values() for value in module.state_dict().values()]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[torch.Tensor]]:
    """A folder of two checkpoints, and the state in the older one."""
    folder = tmp_path_factory.mktemp("saved")
    modules, optimizer = learner(0)
    train(modules, optimizer, 0)
    save_checkpoint(folder, Position(1, 0, 1), modules, optimizer)
    older = state(modules)
    train(modules, optimizer, 1)
    save_checkpoint(folder, Position(2, 0, 2), modules, optimizer)
    return folder, older


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def damages(checkpoint: Path) -> Iterator[Damage]:
    """A hundred, of three kinds of file."""
    chance = random.Random(0)
    for name in ("state.safetensors", "state.json", "manifest.json"):
        size = (checkpoint / name).stat().st_size
        for length in sorted(chance.sample(range(size - 1), 8)):
            yield (
                f"{name} cut to {length} bytes",
                lambda at, n=name, length=length: os.truncate(at / n, length),
            )
        bits = range(8 * size) if name != "manifest.json" else digest_bits(checkpoint)
        for bit in chance.sample(bits, 17):
            yield f"bit {bit} of {name} flipped", lambda at, n=name, bit=bit: flip(at / n, bit)
        yield f"{name} missing", lambda at, n=name: (at / n).unlink()
        yield f"{name} empty", lambda at, n=name: (at / n).write_bytes(b"")
        yield f"{name} is a folder", lambda at, n=name: ((at / n).unlink(), (at / n).mkdir())
        yield f"{name} longer", lambda at, n=name: (at / n).write_bytes((at / n).read_bytes() + b" x")
    for place in range(6):
        yield f"page {place} lost", lambda at, place=place: lose_a_page(at / "state.safetensors", place)
    yield "two files changed places", exchange
    yield "the other's tensors", lambda at: shutil.copy(at.with_name(BEFORE) / "state.safetensors", at)
    yield "the other's position", lambda at: shutil.copy(at.with_name(BEFORE) / "state.json", at)
    yield "the other's manifest", lambda at: shutil.copy(at.with_name(BEFORE) / "manifest.json", at)
    for number, text in enumerate(("[]", "null", '{"version": 2, "sha256": {}}', '{"version": 1, "sha256": {}}', '{"version": 1}', '{"version": 1, "sha256": {"state.json": 5, "state.safetensors": 5}}')):  # fmt: skip
        yield (
            f"manifest of another kind, {number}",
            lambda at, text=text: (at / "manifest.json").write_text(text),
        )


def digest_bits(checkpoint: Path) -> list[int]:
    """Bits of the manifest that mean something: those of the hashes."""
    text = (checkpoint / "manifest.json").read_text()
    starts = [text.index(digest) for digest in json.loads(text)["sha256"].values()]
    return [8 * (start + place) + bit for start in starts for place in range(64) for bit in range(8)]


def lose_a_page(file: Path, place: int) -> None:
    with file.open("rb+") as opened:
        opened.seek(min(512 * (4 + place), file.stat().st_size - 600))
        opened.write(b"\0" * 512)


def exchange(checkpoint: Path) -> None:
    one, other = (checkpoint / name for name in ("state.safetensors", "state.json"))
    contents = one.read_bytes(), other.read_bytes()
    one.write_bytes(contents[1])
    other.write_bytes(contents[0])


def test_damage_is_noticed_and_the_checkpoint_before_is_used(
    saved: tuple[Path, list[torch.Tensor]], tmp_path: Path, tally: Callable[..., None]
) -> None:
    folder, older = saved
    for number, (what, damage) in enumerate(damages(folder / NEWEST)):
        copy = Path(shutil.copytree(folder, tmp_path / f"{number}"))
        damage(copy / NEWEST)
        modules, optimizer = learner(1)
        assert load_checkpoint(copy, modules, optimizer) == Position(1, 0, 1), what
        assert all(map(torch.equal, state(modules), older)), what
        assert sorted(path.name for path in copy.iterdir()) == [f"damaged-{NEWEST}", BEFORE], what
        (copy / BEFORE / "state.json").write_text("")
        with pytest.raises(CheckpointError, match="no checkpoint in it is whole"):
            load_checkpoint(copy, *learner(1))
        tally("checkpoint damaged, noticed, the one before used")
    assert number + 1 >= 100


def test_a_bit_of_finished_weights_is_noticed(tmp_path: Path, tally: Callable[..., None]) -> None:
    modules, _ = learner(0)
    file = tmp_path / "encoder.safetensors"
    save_module(file, modules["encoder"], {"backbone": "none"})
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for bit in random.Random(0).sample(range(8 * header, 8 * len(whole)), 40):
        file.write_bytes(whole)
        flip(file, bit)
        with pytest.raises(CheckpointError, match="damaged"):
            load_module(file, learner(1)[0]["encoder"])
        tally("bit of finished weights flipped, noticed")
    file.write_bytes(whole)
    load_module(file, modules["encoder"])
