"""Settings: declared once, merged in order, refused in words, written as TOML that comes back."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main

from labelwise import cli
from labelwise.config import (
    METHODS,
    FinetuneSettings,
    PretrainSettings,
    Settings,
    read_recipe,
    read_run_config,
    to_toml,
)
from labelwise.errors import CheckpointError, UsageError
from labelwise.options import parse
from labelwise.recipes import find_recipe, list_recipes

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.toml"))

# Every option: what is typed, and what it means. None of them is the default.
TYPED: dict[type[Settings], dict[str, tuple[str | None, Any]]] = {
    PretrainSettings: {
        "images": ("a b/ä", Path("a b/ä")),
        "out": ("runs/x", Path("runs/x")),
        "stream": (None, True),
        "shuffle_buffer": ("500", 500),
        "keep_decoded": (None, True),
        "labels": ("labels.csv", Path("labels.csv")),
        "labels_root": ("photos", Path("photos")),
        "group_column": ("patient id", "patient id"),
        "test": ("test", Path("test")),
        "holdout": ("0", 0.0),
        "holdout_seed": ("4", 4),
        "backbone": ("resnet50", "resnet50"),
        "backbone_args": (
            '{"layers": [1, 2], "drop_rate": 0.1, "act layer": "silu", "x": {"y": true}}',
            {"layers": [1, 2], "drop_rate": 0.1, "act layer": "silu", "x": {"y": True}},
        ),
        "stem": ("half", "half"),
        "init": ('C:\\a "b"', 'C:\\a "b"'),
        "head": ("linear", "linear"),
        "head_layers": ("3", 3),
        "head_width": ("64", 64),
        "projection_width": ("32", 32),
        "image_size": ("48", 48),
        "cache_side": ("64", 64),
        "initial_scale": ("0.75", 0.75),
        "crop_scale": ("0.2,0.9", (0.2, 0.9)),
        "crop_ratio": ("0.5, 2", (0.5, 2.0)),
        "flip": ("0", 0.0),
        "color_strength": ("0.5", 0.5),
        "color": ("0.1", 0.1),
        "grayscale": ("1", 1.0),
        "blur": ("0.5", 0.5),
        "rotation": ("20", 20.0),
        "shear": ("10", 10.0),
        "intensity": ("0.4", 0.4),
        "epochs": ("7", 7),
        "batch_size": ("32", 32),
        "temperature": ("0.07", 0.07),
        "similarity": ("dot", "dot"),
        "micro_batch_size": ("64", 64),
        "loss": ("dcl", "dcl"),
        "optimizer": ("lars", "lars"),
        "learning_rate": ("1e-4", 1e-4),
        "rate_scaling": ("linear", "linear"),
        "weight_decay": ("1e-6", 1e-6),
        "warmup_epochs": ("2.5", 2.5),
        "time_limit": ("1h30m", "1h30m"),
        "precision": ("fp32", "fp32"),
        "device": ("cpu", "cpu"),
        "devices": ("2", "2"),
        "rank_timeout": ("90s", "90s"),
        "tracker": ("tensorboard", "tensorboard"),
        "deterministic": (None, True),
        "seed": ("3", 3),
    },
    FinetuneSettings: {
        "run": ("runs/x", Path("runs/x")),
        "fraction": ("0.01,0.1", (0.01, 0.1)),
        "label_counts": ("25, 50,all", (25, 50, "all")),
        "draws": ("2", 2),
        "labels": ("labels.csv", Path("labels.csv")),
        "labels_root": ("photos", Path("photos")),
        "group_column": ("patient id", "patient id"),
        "test": ("test", Path("test")),
        "methods": ("simclr,pixels", ("simclr", "pixels")),
        "batch_size": ("32", 32),
        "crop_scale": ("0.5,1", (0.5, 1.0)),
        "steps": ("100", 100),
        "scratch_steps": ("300", 300),
        "scratch_rate": ("0.005", 0.005),
        "pretrain_seeds": ("3", 3),
        "time_limit": ("30m", "30m"),
        "device": ("cpu", "cpu"),
        "devices": ("all", "all"),
        "seed": ("3", 3),
    },
}
BOTH = pytest.mark.parametrize("settings", [PretrainSettings, FinetuneSettings])
EVERY_FIELD = pytest.mark.parametrize(
    ("settings", "name"),
    [(settings, name) for settings in (PretrainSettings, FinetuneSettings) for name in settings.model_fields],
    ids=lambda value: value if isinstance(value, str) else value.table,
)


def _command(settings: type[Settings]):
    return typer.main.get_command(cli.app).commands[settings.table]


def _needed(settings: type[Settings]) -> dict[str, Any]:
    return {"images": Path("photos")} if settings is PretrainSettings else {}


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


# --- precedence


def test_an_option_wins_over_a_recipe_and_a_recipe_over_the_default(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[pretrain]\nepochs = 20\nbackbone = "resnet50"\n[finetune]\ndraws = 9\n')
    table = read_recipe(recipe, PretrainSettings)
    found = PretrainSettings.resolve({"images": Path("x"), "epochs": 3, "seed": None}, table)
    assert (found.epochs, found.backbone, found.temperature) == (3, "resnet50", 0.2)
    assert PretrainSettings.resolve({"images": Path("x")}).epochs == 100
    assert FinetuneSettings.resolve({}, read_recipe(recipe, FinetuneSettings)).draws == 9


def test_an_option_that_is_zero_still_wins() -> None:
    found = PretrainSettings.resolve({"images": Path("x"), "flip": 0.0, "holdout": 0.0}, {"flip": 1.0})
    assert (found.flip, found.holdout) == (0.0, 0.0)


# --- one name everywhere


@BOTH
def test_every_setting_is_in_the_table_of_this_test(settings: type[Settings]) -> None:
    assert TYPED[settings].keys() == settings.model_fields.keys()


@EVERY_FIELD
def test_every_setting_can_be_given_on_the_command_line(settings: type[Settings], name: str) -> None:
    typed, expected = TYPED[settings][name]
    words = ["photos"] if settings is PretrainSettings and name != "images" else []
    words += [typed] if name == "images" else [_option(name), *([typed] if typed is not None else [])]
    given = dict(_command(settings).make_context(settings.table, words).params)
    del given["recipe"], given["json"]
    found = settings.resolve(parse(settings, given))
    assert getattr(found, name) == expected
    assert found.model_fields_set == {name, *_needed(settings)}


@BOTH
def test_every_option_is_a_setting_of_the_same_name(settings: type[Settings]) -> None:
    options = {parameter.name: parameter.opts for parameter in _command(settings).params}
    assert options.pop("recipe") == ["--recipe"]
    assert options.pop("json") == ["--json"]
    arguments = {"images": ["images"]} if settings is PretrainSettings else {}
    expected = {name: [_option(name)] for name in settings.model_fields} | arguments
    assert {name: words for name, words in options.items() if name != "help"} == expected


@BOTH
def test_help_shows_every_option_with_words_and_default(
    settings: type[Settings], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "220")
    monkeypatch.setattr("sys.argv", ["labelwise", settings.table, "--help"])
    with pytest.raises(SystemExit) as ended:
        cli.app()
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, field in settings.model_fields.items():
        if name != "images":
            assert re.search(rf"{_option(name)}(?![\w-])", shown), name
        assert field.description, name
        assert field.description in shown, name
    expected = "(default 256)" if settings is PretrainSettings else f"(default {','.join(METHODS)})"
    assert expected in shown
    for panel in ("Data", "Training"):
        assert f" {panel} ─" in shown


# --- refusals


def test_an_unknown_key_of_a_recipe_is_named_with_a_suggestion(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text("[pretrain]\nepoch = 20\n")
    with pytest.raises(UsageError) as caught:
        read_recipe(recipe, PretrainSettings)
    assert str(caught.value) == f"{recipe}: [pretrain] has no setting 'epoch'; did you mean 'epochs'?"


def test_an_unknown_table_of_a_recipe_is_named_with_a_suggestion(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text("[pretrian]\nepochs = 20\n")
    with pytest.raises(
        UsageError, match=r"no command reads the table \[pretrian\]; did you mean 'pretrain'\?"
    ):
        read_recipe(recipe, PretrainSettings)


def test_a_key_outside_of_any_table_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text("epochs = 20\n")
    with pytest.raises(UsageError, match=r"no command reads the table \[epochs\]; known: pretrain, finetune"):
        read_recipe(recipe, PretrainSettings)


@pytest.mark.parametrize("text", ["pretrain = 5\n", "[[pretrain]]\nepochs = 3\n"])
def test_a_table_that_is_no_table_is_refused(tmp_path: Path, text: str) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(text)
    with pytest.raises(UsageError, match="pretrain"):
        read_recipe(recipe, PretrainSettings)


@pytest.mark.parametrize("content", [b"epochs: 20\n", b"\xff\xfe\x00", b"[pretrain"])
def test_a_file_that_is_no_toml_is_refused(tmp_path: Path, content: bytes) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_bytes(content)
    with pytest.raises(UsageError, match=r"mine\.toml: not a TOML file"):
        read_recipe(recipe, PretrainSettings)


def test_a_recipe_that_is_not_there_suggests_one_that_is() -> None:
    with pytest.raises(UsageError, match=r"--recipe digit: no such file or recipe; did you mean 'digits'\?"):
        find_recipe("digit")
    with pytest.raises(UsageError, match=r"these ship: .*digits"):
        find_recipe("qqqq")


@pytest.mark.parametrize(
    ("settings", "name", "value", "words"),
    [
        (PretrainSettings, "epochs", 0, "epochs = 0: input should be greater than or equal to 1."),
        (PretrainSettings, "batch_size", 1, "batch_size = 1: input should be greater than or equal to 2."),
        (PretrainSettings, "temperature", 0.0, "temperature = 0.0: input should be greater than 0."),
        (PretrainSettings, "holdout", 1.0, "holdout = 1.0: input should be less than 1."),
        (PretrainSettings, "flip", 1.5, "flip = 1.5: input should be less than or equal to 1."),
        (PretrainSettings, "blur", "2", "blur = '2': input should be less than or equal to 1."),
        (PretrainSettings, "image_size", 4, "image_size = 4: input should be greater than or equal to 8."),
        (PretrainSettings, "head_layers", 4, "head_layers = 4: input should be 2 or 3."),
        (PretrainSettings, "stem", "tiny", "stem = 'tiny': input should be 'auto', 'small', 'half' or 'stock'."),
        (PretrainSettings, "learning_rate", float("inf"), "learning_rate = inf: input should be a finite number."),
        (PretrainSettings, "backbone_args", [1], "backbone_args = [1]: input should be a valid dictionary."),
        (FinetuneSettings, "draws", 101, "draws = 101: input should be less than or equal to 100."),
        (FinetuneSettings, "methods", ("simclrr",), "methods = 'simclrr': 'simclrr' is no method; known: simclr_probe, simclr"),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_named_with_the_range(
    settings: type[Settings], name: str, value: object, words: str
) -> None:
    with pytest.raises(UsageError) as caught:
        settings.resolve({**_needed(settings), name: value})
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize(
    ("settings", "name", "value"),
    [
        (PretrainSettings, "crop_scale", (5.0, -1.0)),
        (PretrainSettings, "crop_scale", (0.9, 0.2)),
        (PretrainSettings, "crop_scale", (0.0, 1.0)),
        (PretrainSettings, "crop_ratio", (0.0, 1.0)),
        (FinetuneSettings, "crop_scale", (-1.0, 2.0)),
        (FinetuneSettings, "fraction", (2.0,)),
        (FinetuneSettings, "fraction", (-0.1,)),
        (FinetuneSettings, "label_counts", (-3,)),
    ],
)
def test_a_range_or_share_that_cannot_be_is_refused(
    settings: type[Settings], name: str, value: tuple[float, ...]
) -> None:
    with pytest.raises(UsageError, match=name):
        settings.resolve({**_needed(settings), name: value})


def test_every_wrong_value_is_named_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        PretrainSettings.resolve({"images": Path("x"), "epochs": 0, "seed": -1, "epoch": 3})
    words = str(caught.value)
    assert words.count("\n") == 2
    assert "pretrain has no setting 'epoch'; did you mean 'epochs'?" in words


def test_text_that_is_no_json_is_refused_with_the_option() -> None:
    with pytest.raises(UsageError, match=r"--backbone-args \{layers: 1\}: not JSON"):
        parse(PretrainSettings, {"backbone_args": "{layers: 1}"})


# --- TOML


@EVERY_FIELD
def test_every_setting_comes_back_from_toml(settings: type[Settings], name: str) -> None:
    made = settings.resolve({**_needed(settings), name: TYPED[settings][name][1]})
    table = made.model_dump(mode="json", exclude_none=True)
    loaded = tomllib.loads(to_toml({settings.table: table}))[settings.table]
    assert loaded == table
    assert settings.resolve({}, loaded) == made


@pytest.mark.parametrize(
    "text", ['a "b"', "a\\b", "a\nb\tc", "ä 图 \U0001f600", "\x1b[31m", "\u2028\x85", "", "\x7f"], ids=ascii
)
def test_any_text_comes_back_from_toml(text: str) -> None:
    tables = {"pretrain": {"init": text, "backbone_args": {text or "x": [text]}}}
    assert tomllib.loads(to_toml(tables)) == tables


def test_arguments_that_are_null_do_not_spoil_the_file() -> None:
    made = PretrainSettings.resolve({"images": Path("x"), "backbone_args": {"act_layer": None, "depth": 2}})
    written = to_toml({"pretrain": made.model_dump(mode="json", exclude_none=True)})
    assert tomllib.loads(written)["pretrain"]["backbone_args"]["depth"] == 2


def test_numbers_keep_their_kind_and_digits_in_toml() -> None:
    table = {"a": 1e-6, "b": 5e-324, "c": 4 / 3, "d": 10**15, "e": 1.0, "f": True, "g": [0.08, 1.0]}
    loaded = tomllib.loads(to_toml({"t": table}))["t"]
    assert loaded == table
    assert [type(value) for value in loaded.values()] == [type(value) for value in table.values()]


def test_the_config_of_a_run_is_itself_a_recipe(tmp_path: Path) -> None:
    made = PretrainSettings(images=Path("x"), epochs=7, crop_scale=(0.2, 1.0))
    file = tmp_path / "config.toml"
    file.write_text(to_toml({"pretrain": made.model_dump(mode="json", exclude_none=True), "finetune": {}}))
    assert PretrainSettings.resolve({}, read_recipe(file, PretrainSettings)) == made
    assert read_run_config(file)["epochs"] == 7


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epochs = " + "[" * 20_000, "nested too deep"),
        ("epochs = " + "1" * 5_000, "a number of too many digits"),
        ("backbone_args = {a = " + "[" * 300 + "]" * 300 + "}", "nested deeper than 8"),
        ('out = "a\\u0000b"', "no path holds a NUL"),
    ],
)
def test_what_no_person_writes_into_a_recipe_is_refused(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(f"[pretrain]\n{text}\n")
    with pytest.raises(UsageError, match=words) as caught:
        PretrainSettings.resolve({"images": Path("x")}, read_recipe(file, PretrainSettings))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "value", ['{"a": ' + "[" * 3000 + "]" * 3000 + "}", '{"a": NaN}', '{"a": ' + "1" * 5000 + "}"]
)
def test_what_no_person_writes_into_json_is_refused(value: str) -> None:
    with pytest.raises(UsageError, match="nested too deep, or holds a number that is none") as caught:
        parse(PretrainSettings, {"backbone_args": value})
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "content", [b"", b"[pretrain", b"[finetune]\n", b"pretrain = 5", b"a = " + b"[" * 20_000, b"\xff"]
)
def test_a_damaged_config_of_a_run_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.toml").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.toml: damaged .*put it back from a copy"):
        read_run_config(tmp_path / "config.toml")


# --- recipes that ship


def test_there_are_recipes() -> None:
    assert RECIPES
    assert [name for name, _, _ in list_recipes()] == [file.stem for file in RECIPES]
    assert all(about for _, _, about in list_recipes())


@BOTH
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_loads_for_its_commands(recipe: Path, settings: type[Settings]) -> None:
    table = read_recipe(recipe, settings)
    assert settings.resolve(_needed(settings), table).model_fields_set == {*table, *_needed(settings)}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_says_something_and_what_it_is_for(recipe: Path) -> None:
    assert read_recipe(recipe, PretrainSettings) or read_recipe(recipe, FinetuneSettings)
    assert recipe.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_is_found_by_name_and_by_path(recipe: Path) -> None:
    assert find_recipe(recipe.stem).read_text() == recipe.read_text()
    assert find_recipe(str(recipe)) == recipe


def test_a_path_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(UsageError, match=r"images = .*: a name that is not UTF-8; rename it"):
        PretrainSettings.resolve({"images": Path("caf\udce9")})
