"""No test images: the labels are tested in turn, in folds; the interval against loops and simulated studies, and a whole run."""

import math
import shutil
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from labelwise import rundir
from labelwise.config import FinetuneSettings, PretrainSettings
from labelwise.errors import CheckpointError, DataError
from labelwise.measures.linear import macro_accuracy, stratified_folds
from labelwise.measures.statistics import HELPS, UNCLEAR, Folds, resampled_interval, verdict
from labelwise.predictions import read_predictions
from labelwise.rundir import RunDirectory
from labelwise.stages.demo import write_digits
from labelwise.stages.pretraining import pretrain
from labelwise.stages.repeating import finetune
from labelwise.stages.reporting import report
from labelwise.stages.verifying import verify

Floats = npt.NDArray[np.float64]
FEATURES = 12
LABELS = 60


# --- the interval


def test_the_interval_is_students_with_the_variance_of_nadeau_and_bengio() -> None:
    rng = np.random.default_rng(0)
    splits = [(rng.random(12) < share).astype(float) for share in (0.2, 0.9, 0.5, 0.7, 0.4)]
    means = [sum(values) / len(values) for values in splits]
    mean = sum(means) / 5
    variance = sum((each - mean) ** 2 for each in means) / 4
    half = stats.t.ppf(0.975, 4) * math.sqrt((1 / 5 + 12 / 48) * variance)
    found = resampled_interval(splits, 12 / 48)
    assert (found.mean, found.low, found.high) == pytest.approx((mean, mean - half, mean + half))
    assert found.n == 5


def test_splits_that_agree_by_chance_leave_what_their_images_leave_open() -> None:
    splits = [np.array([1.0, 1.0, 0.0, 0.0])] * 5
    found = resampled_interval(splits, 0.25)
    assert found.low is not None
    assert found.mean - found.low == pytest.approx(stats.t.ppf(0.975, 4) * math.sqrt(0.45 * (1 / 3) / 4))
    assert resampled_interval(splits[:1], 0.25).low is None


def test_folds_give_means_over_draws_and_pair_what_both_have() -> None:
    rng = np.random.default_rng(1)
    truth = {draw: rng.integers(0, 3, 20) for draw in range(5)}
    groups = {draw: 20 * draw + np.arange(20) for draw in range(5)}
    test = Folds(truth, groups, 0.25)
    first, second = ({draw: (rng.random(20) < 0.6).astype(float) for draw in range(5)} for _ in range(2))
    del second[3]
    assert test.accuracy(first).mean == pytest.approx(np.mean([first[draw].mean() for draw in range(5)]))
    macro = np.mean(
        [
            macro_accuracy(np.where(first[draw] > 0, truth[draw], truth[draw] + 1), truth[draw])
            for draw in range(5)
        ]
    )
    assert test.macro(first).mean == pytest.approx(macro)
    found = test.difference(first, second)
    assert found is not None
    assert found.n == 4
    assert found.mean == pytest.approx(
        np.mean([first[draw].mean() - second[draw].mean() for draw in (0, 1, 2, 4)])
    )
    assert test.difference({0: first[0]}, {1: second[1]}) is None


def test_what_is_all_right_keeps_a_width_and_a_rare_class_has_no_macro_interval() -> None:
    truth = {draw: np.array([0] * 9 + [1] * (draw == 0)) for draw in range(5)}
    groups = {draw: 20 * draw + np.arange(len(truth[draw])) for draw in range(5)}
    test = Folds(truth, groups, 0.25)
    right = {draw: np.ones(len(truth[draw])) for draw in range(5)}
    found = test.accuracy(right)
    assert found.low is not None
    assert found.low < 0.95  # 46 images: Wilson's interval ends at 0.923
    assert (found.mean, found.high) == (1.0, 1.0)
    assert test.macro(right).low is None


def test_a_group_counts_once() -> None:
    """Ten copies of each image leave the interval where it was, not at a third of its width."""
    rng = np.random.default_rng(2)
    right = {draw: (rng.random(12) < 0.5).astype(float) for draw in range(5)}
    one = Folds({}, {draw: 12 * draw + np.arange(12) for draw in range(5)}, 0.25)
    many = Folds({}, {draw: np.repeat(12 * draw + np.arange(12), 10) for draw in range(5)}, 0.25)
    copied = {draw: np.repeat(values, 10) for draw, values in right.items()}
    assert many.accuracy(copied).to_json() == pytest.approx(one.accuracy(right).to_json())


# --- simulated studies


def study(rng: np.random.Generator, count: int, parts: list[slice], repeats: int) -> list[dict[int, Floats]]:
    """60 images of two classes, tested in five folds by the nearest of two means of `count` others; one method per part."""
    labels = np.repeat([0, 1], LABELS // 2)
    features = signal(labels) + rng.normal(size=(LABELS, FEATURES))
    right: list[dict[int, Floats]] = [{} for _ in parts]
    for repeat in range(repeats):
        folds = stratified_folds(labels, 5, int(rng.integers(2**31)))
        for fold, (train, held) in enumerate(folds):
            chosen = np.concatenate(
                [rng.permutation(train[labels[train] == each])[: math.ceil(count / 2)] for each in (0, 1)]
            )
            for part, answers in zip(parts, right, strict=True):
                weight, bias = centroids(features[chosen][:, part], labels[chosen])
                answers[5 * repeat + fold] = (
                    (features[held][:, part] @ weight + bias > 0) == labels[held]
                ).astype(float)
    return right


def signal(labels: npt.NDArray[np.int64]) -> Floats:
    """Where the images of each class lie."""
    return np.where(labels[:, None] > 0, 0.3, -0.3) * np.ones(FEATURES)


def centroids(features: Floats, labels: npt.NDArray[np.int64]) -> tuple[Floats, float]:
    """The classifier that takes the nearer mean."""
    low, high = features[labels == 0].mean(axis=0), features[labels == 1].mean(axis=0)
    return high - low, float(low @ low - high @ high) / 2


def expected(rng: np.random.Generator, count: int) -> float:
    """Accuracy on all images there could be, over label sets of this size."""
    labels = np.repeat([0, 1], math.ceil(count / 2))
    shares = []
    for _ in range(2000):
        weight, bias = centroids(signal(labels) + rng.normal(size=(len(labels), FEATURES)), labels)
        sides = (signal(np.array([0, 1])) @ weight + bias) / np.linalg.norm(weight)
        shares.append((stats.norm.cdf(-sides[0]) + stats.norm.cdf(sides[1])) / 2)
    return float(np.mean(shares))


def everyone(right: dict[int, Floats]) -> Folds:
    """Every repeat tests the same 60 images."""
    return Folds({}, {draw: 12 * (draw % 5) + np.arange(12) for draw in right}, 0.25)


@pytest.mark.statistics
@pytest.mark.parametrize(("count", "repeats", "widest"), [(48, 1, 8), (10, 1, 8), (48, 4, 6)])
def test_intervals_over_folds_hold_the_truth(count: int, repeats: int, widest: float) -> None:
    rng = np.random.default_rng(count + repeats)
    truth, holding, narrow, widths, means = expected(rng, count), [], [], [], []
    for _ in range(200):
        (right,) = study(rng, count, [slice(None)], repeats)
        found = everyone(right).accuracy(right)
        holding.append(found.low < truth < found.high)
        widths.append(found.high - found.low)
        means.append(found.mean)
        scores = np.array([values.mean() for values in right.values()])
        half = stats.t.ppf(0.975, len(scores) - 1) * scores.std(ddof=1) / math.sqrt(len(scores))
        narrow.append(abs(scores.mean() - truth) < half)
    assert np.mean(holding) >= 0.93
    assert np.mean(narrow) < np.mean(holding), "without the correction it holds less often"
    assert 3.9 < np.mean(widths) / np.std(means) < widest  # the best there could be: 3.92 standard deviations


@pytest.mark.statistics
@pytest.mark.parametrize(("count", "repeats"), [(48, 1), (10, 1), (48, 4)])
def test_equal_methods_over_folds_are_seldom_said_to_differ(count: int, repeats: int) -> None:
    """Two methods that see one half of the features each."""
    rng = np.random.default_rng(count + repeats)
    said = []
    for _ in range(200):
        first, second = study(rng, count, [slice(0, 6), slice(6, 12)], repeats)
        said.append(verdict(everyone(first).difference(first, second)) != UNCLEAR)
    assert np.mean(said) <= 0.065


@pytest.mark.statistics
def test_a_true_difference_over_folds_is_seen_with_more_repeats() -> None:
    """Twelve features against three: about 13 points."""
    rng = np.random.default_rng(3)
    seen = {}
    for repeats in (1, 4):
        said = []
        for _ in range(100):
            first, second = study(rng, 48, [slice(None), slice(0, 3)], repeats)
            said.append(verdict(everyone(first).difference(first, second)) == HELPS)
        seen[repeats] = np.mean(said)
    assert seen[4] > seen[1]
    assert seen[4] > 0.2


# --- a run

SETTINGS = PretrainSettings(
    images=Path("images"), backbone_args={"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}, stem="half", image_size=16,
    batch_size=64, epochs=1, precision="fp32", holdout=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A small encoder that nothing was held out from."""
    folder = tmp_path_factory.mktemp("folds")
    write_digits(folder / "images")
    for number, file in enumerate(sorted((folder / "images").glob("*/*.png"))):
        if number % 9:
            file.unlink()
    settings = SETTINGS.model_copy(update={"images": folder / "images", "out": folder / "run"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LABELWISE_CACHE", str(folder / "cache"))
        return pretrain(settings)


ASKED: dict[str, Any] = {"methods": ("pixels", "simclr", "supervised"), "steps": 2, "scratch_steps": 2}


def test_every_label_is_tested_once_in_five_draws_and_never_by_who_had_it(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune(FinetuneSettings(run=run.path, label_counts=(20, "all"), **ASKED))
    results, predictions = rundir.read_jsonl(run.results), read_predictions(run.predictions)
    labeled = len(list((run.path.parent / "images").glob("*/*.png")))
    most = max(row["labels"] for row in results)
    assert 0.75 * labeled < most < 0.85 * labeled
    assert Counter((row["method"], row["labels"]) for row in results) == {
        (method, labels): 5 for method in ASKED["methods"] for labels in (20, most)
    }
    tested = defaultdict(list)
    for method, labels, draw, name in zip(
        *(predictions[key] for key in ("method", "labels", "draw", "name")), strict=True
    ):
        tested[method, labels, draw].append(name)
    for method in ASKED["methods"]:
        for labels in (20, most):
            names = [name for draw in range(5) for name in tested[method, labels, draw]]
            assert len(names) == len(set(names)) == labeled
            for draw in range(5):
                order = rundir.read_json(run.splits / f"draw-0-{draw}.json")["order"]
                assert set(order) | set(tested[method, labels, draw]) == set(names)
                assert not set(order) & set(tested[method, labels, draw])
                classes = {Path(name).parent.name for name in order[:10]}
                assert len(classes) == 10, "a small label set still has every class"
    document = report(run)
    assert document["tested"] == labeled
    assert document["labels_saved"] == []
    assert f"{labeled} images (no test set: 5-fold cross-validation" in run.report_html.read_text()
    assert "What the encoder saw of the tested images, without labels" in run.report_md.read_text()
    assert not any("The test set was used" in limit for limit in document["limits"])
    entry = next(each for each in document["summary"] if each["labels"] == most)
    scores = [row["accuracy"] for row in results if (row["method"], row["labels"]) == ("pixels", most)]
    assert entry["arms"]["pixels"]["mean"] == pytest.approx(np.mean(scores))
    assert entry["arms"]["pixels"]["n"] == 5
    assert verify(run)["predictions"] == 6 * labeled
    assert "labeled ones in turn: no test set, 5 folds" in " ".join(capsys.readouterr().err.split())


def test_verify_finds_a_label_that_its_own_draw_tested(run: RunDirectory) -> None:
    finetune(FinetuneSettings(run=run.path, label_counts=(20,), **ASKED))
    report(run)
    file = run.splits / "draw-0-1.json"
    before = rundir.read_json(file)
    predictions = read_predictions(run.predictions)
    name = next(
        name for name, draw in zip(predictions["name"], predictions["draw"], strict=True) if draw == 1
    )
    rundir.write_json(file, {**before, "order": [*before["order"][:-1], name]})
    with pytest.raises(CheckpointError, match=r"draw-0-1\.json: 1 of its labels are test images, as "):
        verify(run)
    rundir.write_json(file, before)
    verify(run)


def test_more_draws_are_more_repeats_and_keep_the_first(run: RunDirectory) -> None:
    asked = {**ASKED, "methods": ("pixels",), "label_counts": (30,)}
    finetune(FinetuneSettings(run=run.path, draws=5, **asked))
    before = [row for row in rundir.read_jsonl(run.results) if row["labels"] == 30]
    finetune(FinetuneSettings(run=run.path, draws=8, **asked))
    after = [row for row in rundir.read_jsonl(run.results) if row["labels"] == 30]
    assert [row for row in after if row["draw"] < 5] == before
    assert [row["draw"] for row in after] == list(range(8))
    report(run)
    verify(run)


def test_a_class_with_one_label_cannot_be_tested_in_turn(run: RunDirectory, tmp_path: Path) -> None:
    files = sorted((run.path.parent / "images").glob("*/*.png"))
    kept = [file for file in files if file.parent.name != "7"] + [
        file for file in files if file.parent.name == "7"
    ][:1]
    lines = [f"{file.relative_to(run.path.parent / 'images')},{file.parent.name}" for file in kept]
    (tmp_path / "labels.csv").write_text("file,label\n" + "\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"each class needs two labeled images or groups; '7' has 1"):
        finetune(FinetuneSettings(run=run.path, labels=tmp_path / "labels.csv", label_counts=(20,), **ASKED))


def test_labels_that_came_later_and_miss_the_locked_images_are_tested_in_turn(
    run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat, classes = tmp_path / "flat", {}
    flat.mkdir()
    for file in sorted((run.path.parent / "images").glob("*/*.png")):
        name = f"{file.parent.name}-{file.name}"
        (flat / name).write_bytes(file.read_bytes())
        classes[name] = file.parent.name
    later = pretrain(SETTINGS.model_copy(update={"images": flat, "out": tmp_path / "run", "holdout": None}))
    locked = set(rundir.read_json(later.test_lock)["names"])
    assert locked
    lines = [f"{name},{label}" for name, label in classes.items() if name not in locked]
    (tmp_path / "labels.csv").write_text("file,label\n" + "\n".join(lines) + "\n")
    finetune(FinetuneSettings(run=later.path, labels=tmp_path / "labels.csv", label_counts=(20,), **ASKED))
    assert f"none of the {len(locked)} locked test images has a label" in " ".join(
        capsys.readouterr().err.split()
    )
    tested = set(read_predictions(later.predictions)["name"])
    assert tested == classes.keys() - locked
    report(later)
    verify(later)


def test_groups_stay_whole_and_what_can_be_had_does_not_hang_on_the_draws(
    run: RunDirectory, tmp_path: Path
) -> None:
    """Patients of 1 to 7 images; class 9 is that of two of them."""
    images = run.path.parent / "images"
    files = [file for file in sorted(images.glob("*/*.png")) if file.parent.name in "123"]
    kept = files + sorted(images.glob("9/*.png"))[:6]
    sizes, number, patient = [1, 7, 2, 5, 3], 0, {}
    for label in ("1", "2", "3"):
        mine = [file for file in files if file.parent.name == label]
        while mine:
            for file in mine[: sizes[number % 5]]:
                patient[file.relative_to(images).as_posix()] = f"p{number}"
            mine, number = mine[sizes[number % 5] :], number + 1
    for place, file in enumerate(kept[len(files) :]):
        patient[file.relative_to(images).as_posix()] = f"rare-{place % 2}"
    lines = [f"{name},{Path(name).parent.name},{who}" for name, who in patient.items()]
    (tmp_path / "labels.csv").write_text("file,label,patient\n" + "\n".join(lines) + "\n")
    copy = RunDirectory(Path(shutil.copytree(run.path, tmp_path / "run")))
    asked = {
        **ASKED,
        "methods": ("pixels",),
        "label_counts": ("all",),
        "labels": tmp_path / "labels.csv",
        "group_column": "patient",
    }
    for draws in (4, 9):
        finetune(FinetuneSettings(run=copy.path, draws=draws, **asked))
        results = rundir.read_jsonl(copy.results)
        assert len({row["labels"] for row in results}) == 1
        assert [row["draw"] for row in results] == list(range(draws))
    assert {row["folds"] for row in results} == {2}, "class 9 has two patients"
    predictions = read_predictions(copy.predictions)
    for draw in range(9):
        tested = {
            name for name, each in zip(predictions["name"], predictions["draw"], strict=True) if each == draw
        }
        order = rundir.read_json(copy.splits / f"draw-0-{draw}.json")["order"]
        assert set(order) | tested == patient.keys()
        assert not {patient[name] for name in order} & {patient[name] for name in tested}
    document = report(copy)
    assert document["test_groups"] == len(set(patient.values()))
    assert f"labeled images, in {document['test_groups']} groups that stay whole" in " ".join(
        document["limits"]
    )
    verify(copy)


def test_a_test_folder_that_comes_later_takes_the_place_of_the_folds(
    run: RunDirectory, tmp_path: Path
) -> None:
    copy = RunDirectory(Path(shutil.copytree(run.path, tmp_path / "run")))
    asked = {**ASKED, "methods": ("pixels",), "label_counts": (20,)}
    finetune(FinetuneSettings(run=copy.path, **asked))
    write_digits(tmp_path / "more")
    (tmp_path / "unlabeled").mkdir()
    for number, file in enumerate(sorted((tmp_path / "more").glob("*/*.png"))):
        if number % 9 != 4:
            file.unlink()
        elif number % 5 == 0:
            (tmp_path / "unlabeled" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(DataError, match=r"none of its \d+ test images has a label"):
        finetune(FinetuneSettings(run=copy.path, test=tmp_path / "unlabeled", **asked))
    finetune(FinetuneSettings(run=copy.path, test=tmp_path / "more", **asked))
    document = report(copy)
    assert document["folds"] == 0
    assert any("The test set was used 5 times" in limit for limit in document["limits"])
    verify(copy)


def test_a_test_split_that_comes_later_is_not_taken_for_the_folds(run: RunDirectory, tmp_path: Path) -> None:
    """The last labels in order of their names become the test split: the rows are the same, and the comparison is not."""
    images = run.path.parent / "images"
    names = sorted(file.relative_to(images).as_posix() for file in images.glob("*/*.png"))
    copy = RunDirectory(Path(shutil.copytree(run.path, tmp_path / "run")))
    asked = {**ASKED, "methods": ("pixels",), "label_counts": (20,), "labels": tmp_path / "labels.csv"}
    for tested in (0, 15):
        lines = [
            f"{name},{int(Path(name).parent.name) % 2},{'test' if place >= len(names) - tested else 'train'}"
            for place, name in enumerate(names)
        ]
        (tmp_path / "labels.csv").write_text("file,label,split\n" + "\n".join(lines) + "\n")
        finetune(FinetuneSettings(run=copy.path, **asked))
        document = report(copy)
        assert document["folds"] == (0 if tested else 5)
        assert document["tested"] == (tested or len(names))
        verify(copy)
