"""Studies: the augmentations they try one at a time, how large they are made, what they find, and that they go on."""

import csv
import html
import json
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from scipy import ndimage
from torchvision.transforms import AutoAugment, AutoAugmentPolicy

from labelwise import rundir, seeding
from labelwise.config import Augmentation, PretrainSettings, StudySettings, to_toml
from labelwise.errors import DataError, Interrupted, UsageError
from labelwise.images.source import open_images
from labelwise.measures.linear import fit_network, fit_probe
from labelwise.measures.statistics import HELPS, HURTS, UNCLEAR
from labelwise.stages.pretraining import pretrain
from labelwise.stages.reporting import report
from labelwise.stages.running import list_runs, remove_run, show_runs
from labelwise.studies import augmentations, batch, color, head, preparing, readout
from labelwise.studies.findings import compare, why_unclear
from labelwise.studies.preparing import Costs, Size, fit
from labelwise.studies.studying import STUDIES, study
from labelwise.studies.trials import Outcomes, Trial
from labelwise.views import color as colors
from labelwise.views.alone import ALONE, CUTOUT_SIDE, NOISE, OneBranch, WithAnother, augment, auto_augmented
from labelwise.views.draws import Policy
from labelwise.views.pipeline import UNCHANGED, make_views

TINY: dict[str, Any] = {
    "backbone": "resnet18",
    "backbone_args": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]},
    "stem": "half",
    "image_size": 16,
    "batch_size": 32,
    "precision": "fp32",
    "learning_rate": 8e-3,
}
SHORT: dict[str, Any] = {"most_images": 128, "epochs": 1, "seeds": 1}


@pytest.fixture
def images() -> torch.Tensor:
    """Six images of noise that is smooth, 0-1, (6, 3, 32, 32)."""
    coarse = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, 32, mode="bilinear", align_corners=False)


@pytest.fixture
def keys() -> np.ndarray:
    """Content keys of six images."""
    return np.arange(11, 17, dtype=np.uint64)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory, some_digits: Callable[[Path, int], Path]) -> Path:
    """300 handwritten digits in class folders."""
    return some_digits(tmp_path_factory.mktemp("digits") / "all", 6)


# --- one augmentation at a time


@pytest.mark.parametrize("name", ALONE)
def test_an_augmentation_depends_on_the_image_the_epoch_and_the_draw_alone(
    name: str, images: torch.Tensor, keys: np.ndarray
) -> None:
    before = images.clone()
    all_at_once = augment(name, images, keys, 3, 1, 0)
    assert torch.equal(images, before)
    assert all_at_once.shape == images.shape
    assert 0 <= float(all_at_once.min()) <= float(all_at_once.max()) <= 1
    one = augment(name, images[4:5], keys[4:5], 3, 1, 0)
    assert torch.allclose(one, all_at_once[4:5], atol=1e-6)
    if name != "sobel":  # nothing is drawn there
        for other in (augment(name, images, keys, 3, 2, 0), augment(name, images, keys, 3, 1, 1)):
            assert not torch.equal(other, all_at_once)


def test_a_cutout_blackens_one_square_of_half_the_side(keys: np.ndarray) -> None:
    corners = set()
    for epoch in range(40):
        black = augment("cutout", torch.ones(6, 3, 32, 32), keys, 0, epoch, 0)[:, 0] == 0
        for hole in black.numpy():
            rows, columns = np.nonzero(hole)
            side = round(CUTOUT_SIDE * 32)
            assert (np.ptp(rows) + 1, np.ptp(columns) + 1, hole.sum()) == (side, side, side**2)
            corners.add((rows.min(), columns.min()))
    assert {rows for rows, _ in corners} == set(range(17)), "it reaches both edges"


def test_sobel_is_the_size_of_the_gradient(images: torch.Tensor, keys: np.ndarray) -> None:
    gray = colors.luma(images)[:, 0].numpy()
    expected = [np.hypot(ndimage.sobel(each, 0), ndimage.sobel(each, 1)).clip(0, 1) for each in gray]
    found = augment("sobel", images, keys, 0, 0, 0)
    np.testing.assert_allclose(
        found[:, 0].numpy()[:, 1:-1, 1:-1], np.stack(expected)[:, 1:-1, 1:-1], atol=1e-5
    )
    assert torch.equal(found[:, 0], found[:, 2])


def test_noise_is_normal_and_rotation_takes_all_four_quarters(images: torch.Tensor, keys: np.ndarray) -> None:
    gray = torch.full((6, 3, 32, 32), 0.5)
    noise = torch.cat([augment("noise", gray, keys, 0, epoch, 0) for epoch in range(5)]) - 0.5
    assert float(noise.std()) == pytest.approx(NOISE, rel=0.02)
    assert float(noise.mean()) == pytest.approx(0, abs=0.002)
    quarters = set()
    for epoch in range(20):
        for before, after in zip(images, augment("rotate", images, keys, 0, epoch, 0), strict=True):
            turned = [
                quarter for quarter in range(4) if torch.equal(torch.rot90(before, quarter, (1, 2)), after)
            ]
            assert len(turned) == 1
            quarters.add(turned[0])
    assert quarters == {0, 1, 2, 3}


def squares_of(images: torch.Tensor) -> tuple[torch.Tensor, np.ndarray]:
    """As the cache holds them, with their true sizes."""
    return (255 * images).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous(), np.full((len(images), 2), 32, np.int32)  # fmt: skip


def test_in_one_branch_the_first_view_is_the_crop_that_the_second_is_made_of(
    images: torch.Tensor, keys: np.ndarray
) -> None:
    squares, sizes = squares_of(images)
    policy = Policy(size=24, crop_scale=(0.5, 1.0))
    plain = Policy(size=24, crop_scale=(0.5, 1.0), color=0, grayscale=0, blur=0)
    crop = make_views(plain, squares, sizes, keys, 5, 2, (0,))
    first, second = OneBranch(("color", "cutout"))(
        policy, squares, sizes, keys, 5, 2, (0, 1), UNCHANGED
    ).chunk(2)
    assert torch.allclose(first, crop, atol=1e-6)
    assert not torch.allclose(second, crop, atol=1e-2)
    colored = augment("color", crop.contiguous(), keys, 5, 2, 10)
    assert torch.allclose(second, augment("cutout", colored, keys, 5, 2, 11), atol=1e-6)
    both = OneBranch(("color",), symmetric=True)(policy, squares, sizes, keys, 5, 2, (0, 1), UNCHANGED).chunk(
        2
    )
    assert not any(torch.allclose(view, crop, atol=1e-2) for view in both)
    assert not torch.allclose(*both, atol=1e-2)


def test_another_augmentation_comes_to_half_of_the_views(images: torch.Tensor, keys: np.ndarray) -> None:
    squares, sizes = squares_of(images)
    policy = Policy(size=32, blur=0)
    changed = []
    for epoch in range(60):
        usual = make_views(policy, squares, sizes, keys, 0, epoch, (0, 1))
        made = WithAnother("noise")(policy, squares, sizes, keys, 0, epoch, (0, 1), UNCHANGED)
        changed += [not torch.allclose(*pair, atol=1e-6) for pair in zip(usual, made, strict=True)]
    assert np.mean(changed) == pytest.approx(0.5, abs=0.07)


def test_autoaugment_is_torchvisions_with_a_draw_of_each_image(
    images: torch.Tensor, keys: np.ndarray
) -> None:
    squares, sizes = squares_of(images)
    policy = Policy(size=32, crop_scale=(1, 1), crop_ratio=(1, 1), flip=0)
    made = auto_augmented(policy, squares, sizes, keys, 1, 0, (0, 1), UNCHANGED)
    alone = auto_augmented(policy, squares[2:3], sizes[2:3], keys[2:3], 1, 0, (1,), UNCHANGED)
    assert torch.equal(made[8:9], alone)
    oracle = AutoAugment(AutoAugmentPolicy.CIFAR10)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seeding.combine(1, 0, 101, keys)[2]) >> 1)
        expected = oracle(squares[2].permute(2, 0, 1))
    assert torch.equal((255 * alone[0]).round().to(torch.uint8), expected)


# --- how large a study is made

TRIALS = [Trial(("all",)), Trial(("half",), length=0.5), Trial(("none",), trains=False)]


def sized(seconds: float, images: int = 10_000, epoch_step: int = 1, **asked: Any) -> Size:
    settings = StudySettings(name="color", images=Path(), **{"epochs": 20, "seeds": 3, **asked})
    return fit(TRIALS, settings, images, 2_000, Costs(1e-3, 1e-3, {}), seconds, epoch_step)


def test_a_study_is_as_large_as_its_time_allows() -> None:
    whole = sized(10_000)
    assert (whole.images, whole.epochs, whole.seeds) == (10_000, 20, 3)
    assert whole.seconds == pytest.approx(3 * (1.5 * 10_000 * 20 * 1e-3 + 3 * 2_000 * 1e-3))
    some = sized(300)
    assert some.seeds == 3
    assert some.images / 10_000 == pytest.approx(some.epochs / 20, rel=0.1), "both shrink alike"
    assert 0.75 * 270 < some.seconds <= 270
    few = sized(8)
    assert few.seeds == 1
    assert few.seconds <= 7.2
    least = sized(1.5)
    assert (least.images, least.epochs, least.seeds) == (256, 2, 1)
    assert least.seconds > 1.35, "not all trials will be reached"
    with pytest.raises(
        UsageError, match="--time-limit 1h: one trial of 256 images and 2 epochs takes about 1 s"
    ):
        sized(0.5)


def test_seeds_are_kept_where_smaller_trials_fit() -> None:
    assert (sized(45, images=700).epochs, sized(45, images=700).seeds) == (10, 3)
    assert sized(40, seeds=5).seeds == 3
    assert sized(10_000, seeds=5).seeds == 5
    assert {sized(seconds, epoch_step=4).epochs % 4 for seconds in (8, 30, 300, 1000)} == {0}


def test_trials_at_once_are_larger_in_the_same_time() -> None:
    trials, settings = [Trial(("a",)), Trial(("b",))], StudySettings(name="color", images=Path())

    def at_once(count: int) -> Size:
        return fit(trials, settings, 10_000, 2_000, Costs(1e-3, 0, {}), 100, 1, count)

    assert at_once(2).images > 1.3 * at_once(1).images
    for count in (1, 2, 8):  # more than there are trials too
        size = at_once(count)
        assert size.images * size.epochs * 1e-3 <= size.seconds <= 90


def test_views_that_take_long_make_trials_smaller() -> None:
    slow = OneBranch(("noise",))
    trials = [Trial(("slow",), views=slow)]
    settings = StudySettings(name="color", images=Path())
    sizes = [
        fit(trials, settings, 10_000, 2_000, Costs(1e-3, 0, {slow: more}), 300).images for more in (0, 4e-3)
    ]
    assert sizes[1] < 0.6 * sizes[0]


# --- what is found


def answers(level: float, seed: int, images: int = 400) -> np.ndarray:
    """Of a classifier that is right in this share of the images, the easy ones first."""
    rng = np.random.default_rng([seed, round(1e4 * level)])
    return (rng.normal(np.linspace(1, -1, images), 0.5) > np.quantile(np.linspace(1, -1, images), 1 - level)).astype(float)  # fmt: skip


def outcomes_of(levels: dict[tuple[tuple[str, ...], str], float], seeds: int = 3) -> Outcomes:
    """Outcomes in which every trial has a known level."""
    found = Outcomes(np.arange(400))
    for (name, asked), level in levels.items():
        for seed in range(seeds):
            found.add(name, seed, {asked: answers(level, seed)})
    return found


def test_a_difference_is_claimed_from_three_seeds_on() -> None:
    levels = {(("a",), "h"): 0.6, (("b",), "h"): 0.4}
    for seeds, verdict in ((1, UNCLEAR), (2, UNCLEAR), (3, HELPS)):
        found = compare(outcomes_of(levels, seeds), "a against b", (("a",), "h"), (("b",), "h"))
        assert found.verdict == verdict
    other = compare(outcomes_of(levels), "b against a", (("b",), "h"), (("a",), "h"))
    assert other.verdict == HURTS
    missing = compare(outcomes_of(levels), "a against c", (("a",), "h"), (("c",), "h"))
    assert missing.difference is None
    assert missing.verdict == UNCLEAR
    assert "one seed can claim nothing" in why_unclear(
        [compare(outcomes_of(levels, 1), "", (("a",), "h"), (("b",), "h"))]
    )
    assert "too little was reached" in why_unclear([missing])


def described(module: Any, levels: dict[tuple[tuple[str, ...], str], float], **asked: Any) -> Any:
    """What a study makes of known levels."""

    class Pool:
        rows = np.arange(2000)

    class Stub:
        settings = PretrainSettings(images=Path(), blur=0.0)
        epochs = 20
        pool = Pool()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(color, "_pictures", lambda material: [])
        return module.describe(
            outcomes_of(levels), Stub(), StudySettings(name="color", images=Path(), **asked)
        )


def test_advice_follows_from_what_is_shown() -> None:
    full = {(("all",), "h"): 0.6}
    parts: dict[tuple[tuple[str, ...], str], float] = {
        (("without", name), "h"): 0.6 for name in augmentations.PARTS
    }
    parts[("without", "crop"), "h"] = 0.3
    parts[("without", "flip"), "h"] = 0.9
    found = described(augmentations, full | parts)
    assert re.match(
        r"On your images crop matters most: \+\d\d\.\d points \[.*\]; flip does harm", found.advice
    )
    assert found.recipe == {"flip": 0.0}
    assert described(augmentations, full | dict.fromkeys(parts, 0.6)).recipe == {}

    def strengths(*levels: float) -> Any:
        names = [("SimCLR", name) for name in color.STRENGTHS]
        return described(color, {(name, "h"): level for name, level in zip(names, levels, strict=True)})

    assert "strong colour distortion matters" in strengths(0.3, 0.5, 0.9, 0.6).advice
    assert strengths(0.3, 0.5, 0.9, 0.6).recipe == {"color_strength": 0.5}
    assert strengths(0.3, 0.5, 0.605, 0.6).recipe == {"color_strength": 1.0}, (
        "that 1/2 is better is not shown"
    )
    assert "none between is shown to be better than 1: use 1" in strengths(0.3, 0.5, 0.605, 0.6).advice
    assert strengths(0.9, 0.5, 0.5, 0.3).recipe == {"color_strength": 0.125}
    assert strengths(0.6, 0.6, 0.9, 0.6).recipe == {}

    heads = {(head.NONE, "h"): 0.3, (("linear", "128"), "h"): 0.5, (("nonlinear", "128"), "h"): 0.7}
    assert described(head, heads).recipe == {"head": "nonlinear"}
    assert described(head, heads | {(head.NONE, "h"): 0.9}).recipe == {"head": "none"}
    assert described(head, heads | {(("linear", "128"), "h"): 0.9}).recipe == {"head": "linear"}

    told = {((task,), asked): 0.9 if asked == "h" else 0.8 for task in readout.PAPER for asked in "hg"}
    found = described(readout, told | {((readout.ROTATION,), "g"): 0.3})
    assert "the head forgets rotation most" in found.advice

    sizes = {
        ((str(size), length, rule), "h"): level
        for size, level in ((64, 0.4), (512, 0.6))
        for rule in batch.RULES
        for length in batch.LENGTHS
    }
    found = described(batch, sizes | {(("64", "1/4", "sqrt"), "h"): 0.2})
    assert "longer training pays" in found.advice
    assert "batch 512 against 64" in found.advice
    assert found.recipe == {"batch_size": 512, "rate_scaling": "sqrt"}
    losses = {(("cosine", value), "h"): 0.5 for value in ("0.05", "0.1", "0.2", "0.5", "1")}
    losses |= {(("dot", value), "h"): 0.3 for value in ("10", "100")}
    found = described(batch, losses, temperature=True)
    assert found.recipe == {}
    assert "+7.2 points (Table 5)" in {each.paper for each in found.comparisons}
    found = described(
        batch, losses | {(("cosine", "0.5"), "h"): 0.9, (("dot", "10"), "h"): 0.7}, temperature=True
    )
    assert found.recipe == {"similarity": "cosine", "temperature": 0.5}
    assert "cosine similarity at temperature 0.5 is better than the usual loss: +" in found.advice


@pytest.mark.parametrize("temperature", [False, True])
@pytest.mark.parametrize("name", STUDIES)
def test_trials_have_names_of_their_own_and_the_table_asks_for_those(name: str, temperature: bool) -> None:
    usual = PretrainSettings(images=Path(), rotation=10, blur=0.5)
    settings = StudySettings(name=name, images=Path(), temperature=temperature)
    trials = STUDIES[name].plan(settings, usual, 64)
    names = [trial.name for trial in trials]
    assert len(set(names)) == len(names)
    asked = {"h", "g"} if name in ("head", "readout") else {"h"}
    levels = {(each, what): 0.5 for each in names for what in asked}
    levels |= {(each, "found"): 0.5 for each in names if each[0] == "histogram"}
    found = described(STUDIES[name], levels, temperature=temperature)
    assert all(cell is not None for table in found.tables for row in table.cells for cell in row)
    assert len(found.comparisons) >= 3
    assert all(each.difference is not None for each in found.comparisons)
    for table in found.tables:
        assert np.shape(table.cells) == (len(table.rows), len(table.columns))
        if table.paper is not None:
            assert np.shape(table.paper.cells) == (len(table.paper.rows), len(table.paper.columns))


def test_pairs_of_some_augmentations_are_all_that_is_tried() -> None:
    settings = StudySettings(name="augmentations", images=Path(), pairs=("color", "crop"))
    usual = PretrainSettings(images=Path())
    pairs = {trial.name[1:] for trial in augmentations.plan(settings, usual, 64)}
    assert pairs == {(first, second) for first in ("crop", "color") for second in ("crop", "color")}
    found = described(augmentations, {}, pairs=("crop", "color"))
    assert found.tables[0].rows == found.tables[0].columns == ["crop", "color"]
    assert [each.words for each in found.comparisons] == ["crop then color against crop alone"]
    assert found.advice.startswith("On your images: ")
    found = described(augmentations, {}, pairs=("crop",))
    assert (found.comparisons, found.recipe) == ([], {})
    assert found.advice.endswith("leave --pairs out.")
    assert settings.pairs == ("crop", "color"), "in one order, so that they are one study"
    assert get_args(Augmentation) == ALONE
    with pytest.raises(UsageError, match="pairs"):
        StudySettings.resolve({"name": "augmentations", "images": Path(), "pairs": ("sharpen",)}, {})


@pytest.mark.parametrize(
    ("option", "value", "of"),
    [
        ("symmetric", True, "augmentations"),
        ("pairs", ("crop",), "augmentations"),
        ("temperature", True, "batch"),
    ],
)
def test_an_option_of_another_study_is_refused(option: str, value: Any, of: str, digits: Path) -> None:
    settings = StudySettings(name="head", images=digits, **{option: value})
    with pytest.raises(UsageError, match=f"--{option} is for `labelwise study {of}`, not for head"):
        study(settings, TINY)


def test_a_small_network_learns_what_a_line_cannot() -> None:
    rng = np.random.default_rng(0)
    hidden = rng.uniform(-1, 1, (1200, 2))
    points = (hidden @ rng.normal(size=(2, 64))).astype(np.float32)
    labels = (hidden[:, 0] * hidden[:, 1] > 0).astype(np.int64)
    told = fit_network(points[:1000], labels[:1000], 0)
    assert (told(points[1000:]) == labels[1000:]).mean() > 0.9
    line = fit_probe(points[:1000], labels[:1000], 2, 3.0, balanced=False, reference=points)
    assert (line.logits(points[1000:]).argmax(axis=1) == labels[1000:]).mean() < 0.65


# --- the command


def run_study(images: Path, out: Path, name: str, **more: Any) -> dict[str, Any]:
    return study(StudySettings(name=name, images=images, out=out, **{**SHORT, **more}), TINY)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def done(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A study of the head that came to its end."""
    return run_study(digits, tmp_path_factory.mktemp("done") / "out", "head")


@pytest.mark.parametrize(
    "name", ["head", *(pytest.param(name, marks=pytest.mark.slow) for name in ("augmentations", "color", "readout", "batch"))]
)  # fmt: skip
def test_a_study_writes_its_table_its_figure_and_its_page(
    name: str, digits: Path, tmp_path: Path, done: dict[str, Any]
) -> None:
    document = done if name == "head" else run_study(digits, tmp_path / "out", name)
    out = Path(document["folder"])
    assert document["missing"] == 0
    kept = json.loads((out / "study.json").read_text())
    assert kept == {key: value for key, value in document.items() if key != "folder"}
    with (out / "study.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if not row["table"].startswith("the paper")]
    assert len(rows) == sum(len(row) for table in kept["tables"] for row in table["cells"])
    assert all(0 <= float(row["mean"]) <= 1 for row in rows if row["mean"])
    assert (out / "study.svg").read_text().startswith("<?xml")
    assert (out / "study.png").read_bytes().startswith(b"\x89PNG")
    page = html.unescape((out / "study.html").read_text())
    assert "<script" not in page
    assert document["caption"] in page
    assert name != "augmentations" or "The paper's protocol" in page
    assert not any("checkpoint" in path.name for path in out.iterdir())


def test_a_study_that_was_stopped_goes_on_and_ends_in_the_same_table(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: dict[str, Any]
) -> None:
    answer: Callable[..., Any] = head.answer
    names: list[tuple[str, ...]] = []

    def stops(material: Any, trial: Trial, *rest: Any) -> Any:
        if len(names) == 3:
            raise Interrupted("stopped", 15)
        names.append(trial.name)
        return answer(material, trial, *rest)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(head, "answer", stops)
        run_study(digits, tmp_path / "cut", "head")
    assert len(rundir.read_jsonl(tmp_path / "cut" / "trials.jsonl")) == 3
    cut = run_study(digits, tmp_path / "cut", "head")
    assert {**cut, "folder": ""} == {**done, "folder": ""}
    again = run_study(digits, Path(done["folder"]), "head")
    assert again == done
    assert len(rundir.read_jsonl(Path(done["folder"]) / "trials.jsonl")) == done["trials"]


@pytest.mark.slow
def test_a_signal_leaves_a_table_and_the_same_command_ends_it(digits: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(to_toml({"pretrain": TINY}))
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "labelwise",
        "study",
        "head",
        str(digits),
        "--out",
        str(out),
    ]
    command += ["--recipe", str(recipe), "--most-images", "128", "--epochs", "4", "--seeds", "1", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while len(rundir.read_jsonl(out / "trials.jsonl")) < 3:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    printed, words = process.communicate(timeout=60)
    assert process.returncode == 143, words
    assert not printed
    assert "the same command goes on" in words
    kept = json.loads((out / "study.json").read_text())
    assert 0 < kept["missing"] < kept["trials"]
    done = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert done["missing"] == 0
    assert done["tables"][0]["cells"][0][0] is not None


@pytest.mark.slow
def test_advice_is_a_recipe_of_pretrain(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "_advise", lambda comparisons: ("use a linear head", {"head": "linear"}))
    run_study(digits, tmp_path / "out", "head")
    command = [
        sys.executable,
        "-m",
        "labelwise",
        "pretrain",
        str(digits),
        "--out",
        str(tmp_path / "run"),
        "--epochs",
        "1",
    ]
    subprocess.run(
        [*command, "--recipe", str(tmp_path / "out" / "recipe.toml")], check=True, capture_output=True
    )
    config = tomllib.loads((tmp_path / "run" / "config.toml").read_text())["pretrain"]
    assert (config["head"], config["image_size"], config["backbone_args"]) == (
        "linear",
        16,
        TINY["backbone_args"],
    )


def test_time_that_runs_out_leaves_cells_empty_and_says_so(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        preparing, "fit", lambda *_: Size(128, 1, 1, 0.0, 128)
    )  # the plan believes that all fit
    document = run_study(digits, tmp_path / "out", "head", time_limit="0.01s")
    assert document["missing"] == document["trials"] == 7
    assert all(cell is None for table in document["tables"] for row in table["cells"] for cell in row)
    assert "too little was reached" in document["advice"]
    assert "7 of 7 trials are left; the same command goes on." in " ".join(capsys.readouterr().err.split())
    assert "too little was reached" in (tmp_path / "out" / "study.html").read_text()


def test_a_trial_that_diverges_leaves_its_cell_empty(digits: Path, tmp_path: Path) -> None:
    settings = StudySettings(name="head", images=digits, out=tmp_path / "out", **SHORT)
    document = study(settings, {**TINY, "learning_rate": 1e30})
    assert document["diverged"] == document["trials"] == 7
    assert document["missing"] == 0
    assert study(settings, {**TINY, "learning_rate": 1e30}) == document


def test_images_that_changed_are_not_studied_on(digits: Path, tmp_path: Path) -> None:
    images = Path(shutil.copytree(digits, tmp_path / "images"))
    run_study(images, tmp_path / "out", "head")
    file = min((images / "3").iterdir())
    file.rename(images / "5" / file.name)
    with pytest.raises(DataError, match="its images or labels changed since this study was begun"):
        run_study(images, tmp_path / "out", "head")


def test_a_class_with_one_image_is_trained_on_and_not_asked_about(digits: Path, tmp_path: Path) -> None:
    images = Path(shutil.copytree(digits, tmp_path / "images"))
    for file in sorted((images / "7").iterdir())[1:]:
        file.unlink()
    document = run_study(images, tmp_path / "out", "head", most_images=1000)
    assert document["images"]["classes"] == 9


def test_labels_that_mean_nothing_score_as_chance_does(digits: Path, tmp_path: Path) -> None:
    files = sorted(digits.glob("*/*.png"))
    for file, other in zip(files, np.random.default_rng(0).permutation(files), strict=True):
        target = tmp_path / "images" / other.parent.name / f"{file.parent.name}-{file.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    document = run_study(tmp_path / "images", tmp_path / "out", "head", most_images=1000)
    cells = [cell["mean"] for table in document["tables"] for row in table["cells"] for cell in row]
    assert np.mean(cells) == pytest.approx(0.1, abs=0.05)


def test_what_cannot_be_studied_is_refused_in_words(
    digits: Path, tmp_path: Path, done: dict[str, Any]
) -> None:
    unlabeled = tmp_path / "unlabeled"
    unlabeled.mkdir()
    for file in digits.glob("*/*.png"):
        shutil.copy(file, unlabeled / f"{file.parent.name}-{file.name}")
    with pytest.raises(DataError, match=r"needs two classes with 2 labeled images or groups each .* 0 found"):
        run_study(unlabeled, tmp_path / "out", "head")
    with pytest.raises(UsageError, match="one trial of 128 images and 1 epochs takes about"):
        run_study(digits, tmp_path / "out", "head", time_limit="0.01s")
    with pytest.raises(UsageError, match="name = 'heads'"):
        StudySettings.resolve({"name": "heads", "images": digits})
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="holds a study or run with epochs = 1, now 2"):
        run_study(digits, Path(done["folder"]), "head", epochs=2)
    with pytest.raises(UsageError, match="never written to"):
        run_study(digits, digits / "out", "head")


def test_test_images_are_neither_trained_on_nor_scored(digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits, tmp_path / "images" / "train")
    for file in sorted((tmp_path / "images" / "train").glob("*/*.png"))[::3]:
        target = tmp_path / "images" / "test" / file.parent.name / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        file.rename(target)
    seen: list[Any] = []
    answer = head.answer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "answer", lambda *given: seen.append(given[0]) or answer(*given))
        run_study(tmp_path / "images", tmp_path / "out", "head")
    splits = open_images(tmp_path / "images").splits
    material = seen[0]
    assert len(material.pool.rows) == len(material.scored) == 128
    assert {splits[row] for row in material.pool.rows} == {"train"}
    assert set(material.rows.tolist()) <= set(material.pool.rows.tolist())


def test_studies_are_listed_and_removed_like_runs(
    tmp_path: Path, done: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(done["folder"], tmp_path / "study-head")
    found = list_runs(tmp_path)
    assert found["runs"] == []
    assert [(each["name"], each["study"], each["missing"]) for each in found["studies"]] == [
        ("study-head", "head", 0)
    ]
    assert found["studies"][0]["bytes"] > 1000
    show_runs(found)
    assert re.search(r"study-head +head +(\d+) of \1 ", capsys.readouterr().out)
    remove_run(tmp_path / "study-head")
    assert list_runs(tmp_path)["studies"] == []


def test_the_report_of_a_run_on_the_same_images_tells_what_studies_beside_it_found(
    tmp_path: Path, digits: Path, done: dict[str, Any]
) -> None:
    shutil.copytree(done["folder"], tmp_path / "study head")
    other = {**done, "images": {**done["images"], "root": "/elsewhere"}}
    (tmp_path / "another").mkdir()
    rundir.write_json(tmp_path / "another" / "study.json", other)
    run = pretrain(PretrainSettings(images=digits, out=tmp_path / "run", epochs=1, **TINY))
    document = report(run)
    assert document["studies"] == [{"study": "head", "advice": done["advice"], "folder": "study head"}]
    page = run.report_html.read_text()
    assert '<a href="../study%20head/study.html">' in page
    assert html.escape(done["advice"]) in page or done["advice"] in page
    assert done["advice"] in run.report_md.read_text()
