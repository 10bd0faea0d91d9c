"""Tables, settings and splits that nobody thought of: read as they were meant, or refused in one sentence."""

import csv
import io
import string
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from labelwise import config
from labelwise.config import FinetuneSettings, PretrainSettings, read_recipe
from labelwise.errors import DataError, UsageError
from labelwise.images.labels import match_labels, read_label_table
from labelwise.images.source import ImageSet
from labelwise.images.splits import draw_labels, lock_test, pool_indices

QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}
CELL = (
    st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12)
    .map(str.strip)
    .filter(bool)
)
LABEL = CELL.filter(lambda text: not set(text) & set(",;|[]"))
PATH = st.builds(
    "{}/{}.jpg".format, CELL.map(lambda text: text.replace("/", "_").replace("\\", "_")), st.integers(0, 99)
)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "labels.csv"


def endure(
    what: str, trials: int, tally: Callable[..., None], test: Callable[..., None], **given_: Any
) -> None:
    """Run a property so many times."""
    settings(max_examples=trials, **QUIET)(given(**given_)(test))()
    tally(what, trials)


def test_a_table_is_read_as_it_was_written(place: Path, tally: Callable[..., None], is_long: bool) -> None:
    def holds(rows: list[tuple[str, str]], mark: str, encoding: str, end: str) -> None:
        text = io.StringIO(newline="")
        writer = csv.writer(text, delimiter=mark, lineterminator=end)
        writer.writerows([("file_name", "label"), *rows])
        place.write_bytes(text.getvalue().encode(encoding))
        found, _ = read_label_table(place)
        assert [(row.path, row.label) for row in found] == [
            (path, unicodedata.normalize("NFC", label)) for path, label in rows
        ]

    endure(
        "label tables written and read again", 5000 if is_long else 250, tally, holds,
        rows=st.lists(st.tuples(PATH, LABEL), min_size=1, max_size=8), mark=st.sampled_from(",;\t"),
        encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]), end=st.sampled_from(["\n", "\r\n"]),
    )  # fmt: skip


def test_a_table_of_rubbish_is_read_or_refused(
    place: Path, tally: Callable[..., None], is_long: bool
) -> None:
    def holds(data: bytes, suffix: str) -> None:
        file = place.with_suffix(suffix)
        file.write_bytes(data)
        try:
            rows, _ = read_label_table(file)
            match_labels(rows, file, ["a.jpg", "b/c.jpg"], place.parent, None)
        except DataError as error:
            assert str(file) in str(error)
            assert "\n" not in str(error).replace(str(file), "").split(";")[0][:40]

    line = st.text(string.printable + "\0\ufeff\u00e4", max_size=40)
    table = st.lists(line, max_size=6).map(lambda lines: "\n".join(["file_name,label", *lines]).encode())
    json_lines = (
        st.lists(line.map(lambda text: f'{{"file_name": "a.jpg", "label": {text!r}}}'), max_size=5)
        .map("\n".join)
        .map(str.encode)
    )
    endure(
        "label tables of rubbish, read or refused", 5000 if is_long else 250, tally, holds,
        data=st.one_of(st.binary(max_size=200), table, json_lines), suffix=st.sampled_from([".csv", ".tsv", ".jsonl"]),
    )  # fmt: skip


@pytest.mark.parametrize("path", ["../../etc/passwd", "/etc/passwd", "a/../../x.jpg", "http://169.254.169.254/x.jpg", "file:///etc/passwd", "C:\\x.jpg", "\\\\host\\share\\x.jpg"])  # fmt: skip
def test_a_path_that_leads_out_is_never_opened(
    place: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.write_text(f"file_name,label\n{path},cat\na.jpg,dog\n")
    rows, _ = read_label_table(place)
    with monkeypatch.context() as closed:
        for opener in ("builtins.open", "io.open", "os.open"):
            closed.setattr(opener, None)
        found = match_labels(rows, place, ["a.jpg"], place.parent, None)
    assert found.labels == {"a.jpg": "dog"}
    assert f"1 unknown: {path} (line 2)" in found.notes[0]


VALUE = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.lists(st.floats(), max_size=3),
    st.sampled_from([1e308, -1, 0, float("nan"), float("inf"), "nan", "1e9", "../x", "auto", 10**400]),
)  # fmt: skip


@pytest.mark.parametrize("kind", [PretrainSettings, FinetuneSettings])
def test_settings_are_taken_or_refused_by_name(
    kind: type[config.Settings], tally: Callable[..., None], is_long: bool
) -> None:
    names = sorted(kind.model_fields)

    def holds(asked: dict[str, Any]) -> None:
        try:
            kind.resolve({"images": Path("photos")} | asked if kind is PretrainSettings else asked, {})
        except UsageError as error:
            assert any(key in str(error) or key.replace("_", "-") in str(error) for key in asked)

    endure(
        "settings of rubbish, taken or refused", 5000 if is_long else 250, tally, holds,
        asked=st.dictionaries(st.sampled_from(names), VALUE, max_size=4),
    )  # fmt: skip


def test_a_recipe_of_rubbish_is_refused(tmp_path: Path, tally: Callable[..., None], is_long: bool) -> None:
    file = tmp_path / "recipe.toml"

    def holds(text: str) -> None:
        file.write_text(text, encoding="utf-8")
        try:
            PretrainSettings.resolve({"images": Path("photos")}, read_recipe(file, PretrainSettings))
        except UsageError as error:
            assert str(error)

    key = st.sampled_from(
        ["epochs", "epoch", "batch_size", "seed", "crop_scale", "backbone_args", "x", "out", "images"]
    )
    value = st.sampled_from(
        [
            "1",
            "-1",
            "nan",
            "inf",
            '"a"',
            "[1]",
            "[0.2, 1.0]",
            "{a = 1}",
            "true",
            "1e999",
            "9" * 400,
            "1979-05-27",
        ]
    )
    lines = st.lists(st.builds("{} = {}".format, key, value), max_size=4).map("\n".join)
    endure(
        "recipes of rubbish, taken or refused", 5000 if is_long else 250, tally, holds,
        text=st.one_of(st.text(max_size=60), lines.map("[pretrain]\n{}".format), lines.map("[pretrian]\n{}".format)),
    )  # fmt: skip


def test_label_draws_are_stratified_nested_and_know_no_order(
    tally: Callable[..., None], is_long: bool
) -> None:
    def holds(sizes: list[int], draw: int, shuffle: int) -> None:
        labels = [f"class {place}" for place, size in enumerate(sizes) for _ in range(size)]
        names = [f"{label}/{number}" for number, label in enumerate(labels)]
        order = draw_labels(names, labels, draw, 0)
        assert sorted(order) == list(range(len(names)))
        assert len({labels[row] for row in order[: len(sizes)]}) == len(sizes), "one of each class first"
        for count in range(len(sizes), len(names) + 1, 7):
            found = np.bincount([sizes.index(sizes[int(labels[row].split()[1])]) for row in order[:count]])
            assert found.sum() == count
            for place, size in enumerate(sizes):
                taken = sum(labels[row] == f"class {place}" for row in order[:count])
                assert 1 <= taken <= max(1, np.ceil(count * size / len(names)) + 1)
        other = np.random.default_rng(shuffle).permutation(len(names))
        again = draw_labels([names[row] for row in other], [labels[row] for row in other], draw, 0)
        assert [names[other[row]] for row in again] == [names[row] for row in order]

    endure(
        "label draws", 20_000 if is_long else 500, tally, holds,
        sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12), draw=st.integers(0, 99), shuffle=st.integers(0, 9),
    )  # fmt: skip


def test_a_test_lock_tears_no_group_apart(tally: Callable[..., None], is_long: bool) -> None:
    def holds(groups: list[int], share: float, seed: int, classes: int) -> None:
        count = len(groups)
        names = [f"{number:03}.png" for number in range(count)]
        labels: list[str | None] = [f"c{number % classes}" if classes else None for number in range(count)]
        images = ImageSet(Path("x"), names, labels, [None] * count, "flat folder", {}, [], [])
        keys, readable = np.arange(1, count + 1, dtype=np.uint64), np.ones(count, bool)
        try:
            lock = lock_test(images, keys, readable, share, seed, groups=np.array(groups))
        except UsageError as error:
            assert "--holdout" in str(error)
            return
        pool = pool_indices(images, readable, lock)
        tested = {groups[names.index(name)] for name in lock["names"]}
        assert not tested & {groups[row] for row in pool.tolist()}
        assert {*lock["names"], *lock["excluded_groups"], *(names[row] for row in pool)} == set(names)
        assert lock_test(images, keys, readable, share, seed, groups=np.array(groups)) == lock

    endure(
        "test locks over groups", 20_000 if is_long else 500, tally, holds,
        groups=st.lists(st.integers(0, 30), min_size=2, max_size=120), share=st.floats(0.01, 0.9),
        seed=st.integers(0, 99), classes=st.integers(0, 6),
    )  # fmt: skip
