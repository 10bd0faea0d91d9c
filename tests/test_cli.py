"""The command line: exit codes, words, streams, and what a terminal must never see."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from labelwise import cli, rundir, terminal
from labelwise.rundir import RunDirectory

HEAVY = ("torch", "timm", "datasets", "sklearn", "matplotlib", "pyarrow", "scipy")


class Ran(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Ran]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work in an empty folder, with a cache and a terminal of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LABELWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def labelwise(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command in this process."""

    def run(*words: str) -> Ran:
        monkeypatch.setattr(sys, "argv", ["labelwise", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Ran(ended.value.code, *capsys.readouterr())

    return run


def _process(*words: str, **more: str) -> Ran:
    """Run a command in a process of its own."""
    ran = subprocess.run(
        [sys.executable, "-m", "labelwise", *words],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, **more},
    )
    return Ran(ran.returncode, ran.stdout, ran.stderr)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """40 random PNGs in one folder."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(40):
        pixels = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return folder


# --- start


def test_help_does_not_wait_for_torch() -> None:
    program = f"import sys, labelwise, labelwise.cli; print([n for n in {HEAVY!r} if n in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_version_names_what_matters(labelwise: Command) -> None:
    code, out, err = labelwise("--version")
    assert (code, err) == (0, "")
    assert [part.split()[0] for part in out.strip().split(", ")] == ["labelwise", "torch", "timm", "datasets"]


def test_help_names_every_command(labelwise: Command) -> None:
    code, out, err = labelwise("--help")
    assert (code, err) == (0, "")
    for name in (
        "demo",
        "scan",
        "pretrain",
        "finetune",
        "study",
        "report",
        "verify",
        "recipes",
        "doctor",
        "runs",
    ):
        assert f" {name} " in out
    assert "Add --debug to any command for a traceback." in out


# --- exit codes and words


def test_a_missing_folder_ends_with_3(labelwise: Command) -> None:
    assert labelwise("scan", "nowhere") == Ran(3, "", "error: nowhere: no such folder.\n")


def test_a_folder_without_images_ends_with_3_and_says_what_was_there(
    labelwise: Command, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    code, out, err = labelwise("scan", "empty")
    assert (code, out) == (3, "")
    assert err.startswith("error: empty: no images found; looked for .jpg .jpeg .png")
    assert err.endswith("found nothing.\n")
    (tmp_path / "empty" / "notes.txt").write_text("x")
    assert labelwise("pretrain", "empty").err.endswith("found 1 .txt.\n")


def test_a_file_in_place_of_a_folder_ends_with_3(labelwise: Command, photos: Path) -> None:
    code, _, err = labelwise("scan", str(photos / "00.png"))
    assert (code, err) == (3, f"error: {photos / '00.png'}: a file, not a folder of images.\n")


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (("pretrain", "x", "--epoch", "5"), "--epochs"),
        (("finetune", "--label-count", "5"), "--label-counts"),
        (("scan", "x", "--lables", "y"), "--labels"),
        (("recipez",), "recipes"),
    ],
)
def test_a_misspelt_word_ends_with_2_and_a_suggestion(
    labelwise: Command, words: tuple[str, ...], meant: str
) -> None:
    code, out, err = labelwise(*words)
    assert (code, out) == (2, "")
    assert meant in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--epochs", "0"), "error: epochs = 0: input should be greater than or equal to 1.\n"),
        (("--head", "none", "--flip", "7"), "error: flip = 7.0: input should be less than or equal to 1.\n"),
        (("--recipe", "digit"), "error: --recipe digit: no such file or recipe; did you mean 'digits'?\n"),
        (("--device", "tpu"), "error: --device tpu: not available on this machine; available: "),
        (("--batch-size", "64"), "error: --batch-size 64: larger than the 32 images to train on"),
        (("--batch-size", "16", "--backbone", "resnet19"), "timm has no such model; did you mean resnet18"),
        (("--batch-size", "16", "--backbone", "resnet18.no_such_tag"), "resnet18.no_such_tag"),
        (("--batch-size", "16", "--stem", "half", "--backbone", "vgg11"), "error: --stem half: vgg11 has no"),
        (("--init", "nowhere", "--batch-size", "16"), "nowhere: no run found here"),
    ],
)  # fmt: skip
def test_a_wrong_setting_ends_with_2_and_leaves_nothing_behind(
    labelwise: Command, photos: Path, words: tuple[str, ...], expected: str
) -> None:
    before = sorted(photos.parent.rglob("*"))
    code, out, err = labelwise("pretrain", str(photos), *words)
    assert expected in err
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    left = [path for path in sorted(photos.parent.rglob("*")) if path not in before]
    assert [path for path in left if "cache" not in path.parts] == []


def test_a_recipe_that_has_nothing_for_a_command_is_told(
    labelwise: Command, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "other.toml").write_text("[finetune]\ndraws = 2\n")
    (tmp_path / "both.toml").write_text("[finetune]\ndraws = 2\n[pretrain]\nepochs = 1\n")
    for name in ("other", "both"):
        _, _, err = labelwise(
            "pretrain", str(photos), "--recipe", str(tmp_path / f"{name}.toml"), "--batch-size", "64"
        )
        words = "other.toml: has nothing for this command, as it sets nothing under [pretrain]."
        assert (words in " ".join(err.split())) == (name == "other")


def test_an_output_folder_among_the_images_ends_with_2(labelwise: Command, photos: Path) -> None:
    code, _, err = labelwise("pretrain", str(photos), "--out", str(photos / "run"))
    assert code == 2
    assert "lies inside the image folder" in err
    assert not (photos / "run").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("pretrain", "photos", "--out", "x" * 5000),
        ("predict", "photos", "--run", "run", "--out", "x" * 300 + ".csv"),
        ("demo", "--out", "/dev/null"),
        *(
            [("demo", "--out", "/proc/x"), ("pretrain", "photos", "--out", "/proc/x")]
            if sys.platform == "linux"
            else []
        ),
    ],
)
def test_a_place_that_cannot_be_written_to_ends_with_2(
    labelwise: Command, photos: Path, words: tuple[str, ...], pretrained: RunDirectory, tmp_path: Path
) -> None:
    shutil.copytree(pretrained.path, tmp_path / "run")
    ran = labelwise(*words)
    assert (ran.code, ran.out) == (2, "")
    assert len(ran.err.strip().splitlines()) == 1
    assert "cannot be written to" in ran.err or "a name too long for this system" in ran.err


@pytest.mark.parametrize("cost", ["nan", "inf", "-1", "much"])
def test_a_cost_that_is_none_is_refused(labelwise: Command, cost: str) -> None:
    code, _, err = labelwise("report", "--label-cost", cost)
    assert code == 2
    assert "--label-cost" in err


@pytest.mark.parametrize("words", [("finetune",), ("report",), ("finetune", "--run", "runs/x")])
def test_no_run_ends_with_2_and_says_how_to_start_one(labelwise: Command, words: tuple[str, ...]) -> None:
    code, out, err = labelwise(*words)
    assert (code, out) == (2, "")
    assert "no run found here; start one with `labelwise pretrain IMAGES`, or name one with --run DIR." in err


def test_a_damaged_run_ends_with_4(labelwise: Command, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text("[pretrain")
    (tmp_path / "run" / "environment.json").write_text("{")
    code, _, err = labelwise("report", "--run", "run")
    assert code == 4
    assert err.startswith("error: ")
    assert "Traceback" not in err


def test_debug_shows_the_traceback_wherever_it_stands(labelwise: Command) -> None:
    for words in (("scan", "nowhere", "--debug"), ("--debug", "scan", "nowhere")):
        code, out, err = labelwise(*words)
        assert (code, out) == (3, "")
        assert "Traceback (most recent call last):" in err
        assert err.endswith("error: nowhere: no such folder.\n")


@pytest.mark.slow
def test_exit_codes_of_real_processes(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    expected = {
        ("scan", "nowhere"): 3,
        ("scan", "empty"): 3,
        ("scan", str(photos), "--lables", "x"): 2,
        ("pretrain", str(photos), "--backbone", "resnet19", "--batch-size", "16"): 2,
        ("finetune",): 2,
        ("scan", str(photos)): 0,
    }
    for words, code in expected.items():
        ran = _process(*words)
        assert ran.code == code, (words, ran)
        assert "Traceback" not in ran.err
        assert bool(ran.out) == (code == 0)
        assert bool(ran.err) == (code != 0)


# --- one JSON document on stdout


@pytest.mark.parametrize(
    ("words", "kind", "keys"),
    [
        (("scan", "photos"), dict, {"images", "quarantined", "notes", "duplicates", "layout", "estimate"}),
        (("recipes",), list, None),
        (("doctor",), dict, {"checks"}),
        (("runs", "list"), dict, {"runs", "studies", "caches"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
@pytest.mark.usefixtures("photos")
def test_json_is_one_document_on_stdout(
    labelwise: Command, words: tuple[str, ...], kind: type, keys: set[str] | None
) -> None:
    code, out, err = labelwise(*words, "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert isinstance(document, kind)
    if keys is not None:
        assert keys <= document.keys()


def test_json_of_a_scan_says_what_is_there(labelwise: Command, photos: Path) -> None:
    (photos / "copy.png").write_bytes((photos / "03.png").read_bytes())
    (photos / "broken.jpg").write_bytes(b"not a photo")
    document = json.loads(labelwise("scan", "photos", "--json").out)
    assert document["images"] == 42
    assert [entry["file"] for entry in document["quarantined"]] == ["broken.jpg"]
    assert [sorted(group) for group in document["duplicates"]] == [["03.png", "copy.png"]]
    assert "2 exact copies, in groups: 1" in labelwise("scan", "photos").out, "counted as by pretrain"
    assert document["layout"] == "flat folder"


def test_a_scan_names_odd_files_and_says_when_nothing_can_be_learned(
    labelwise: Command, tmp_path: Path
) -> None:
    folder = tmp_path / "few"
    folder.mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 65535, (40, 40), dtype=np.uint16)).save(folder / "deep.png")
    Image.new("RGB", (40, 40), "red").save(folder / "flat.png")
    Image.fromarray(rng.integers(0, 255, (9, 90), dtype=np.uint8)).save(folder / "strip.png")
    frames = [Image.fromarray(rng.integers(0, 255, (40, 40), dtype=np.uint8)) for _ in range(2)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    code, out, err = labelwise("scan", "few", "--json")
    document = json.loads(out)
    assert {(entry["file"], entry["what"].split(",")[0]) for entry in document["odd"]} == {
        ("deep.png", "deeper than 8 bits"),
        ("flat.png", "one flat colour"),
        ("strip.png", "smaller than 16 px"),
        ("strip.png", "more than 4 times as long as wide"),
        ("moving.gif", "several images in one file"),
    }
    assert document["formats"] == {"PNG": 3, "GIF": 1}
    assert code == 3
    assert err == "error: few: 4 different images can be read; SimCLR needs at least 32.\n"
    code, out, err = labelwise("scan", "few")
    assert (code, err) == (3, f"error: {document['unusable']}\n")
    assert "odd          1 one flat colour, e.g. flat.png\n" in out


def test_plain_output_of_the_listing_commands(labelwise: Command) -> None:
    code, out, _ = labelwise("recipes")
    assert code == 0
    assert any(line.startswith("digits ") for line in out.splitlines())
    assert labelwise("runs", "list") == Ran(
        0, "no runs here; start one with `labelwise pretrain IMAGES`\n", ""
    )
    code, out, _ = labelwise("doctor")
    assert code == 0
    assert all(line.startswith(("ok  ", "FIX ", "    ")) for line in out.splitlines())


# --- pipes


def _into_a_closed_pipe(*words: str) -> Ran:
    """Run a command whose reader has gone away, as after `| head -1`."""
    read, write = os.pipe()
    os.close(read)
    try:
        ran = subprocess.run(
            [sys.executable, "-m", "labelwise", *words], stdout=write, stderr=subprocess.PIPE, text=True
        )
    finally:
        os.close(write)
    return Ran(ran.returncode, "", ran.stderr)


@pytest.mark.parametrize("words", [("recipes",), ("recipes", "--json"), ("--version",), ("--help",)], ids=str)
def test_a_closed_pipe_is_no_crash(words: tuple[str, ...]) -> None:
    assert _into_a_closed_pipe(*words) == Ran(1, "", "")


@pytest.mark.parametrize("more", [(), ("--json",)], ids=str)
def test_a_scan_into_a_closed_pipe_is_no_crash(photos: Path, more: tuple[str, ...]) -> None:
    assert _into_a_closed_pipe("scan", str(photos), *more) == Ran(1, "", "")


def test_a_scan_into_head_shows_its_first_line(photos: Path) -> None:
    line = f"'{sys.executable}' -m labelwise scan '{photos}' | head -1"
    ran = subprocess.run(line, shell=True, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "images       40 (flat folder): 40 PNG\n", "")


# --- text of the user's


ODD = (
    "[red]x.png",
    "[/red].png",
    "a[b]\x1b[31mc.png",
    ":smile:.png",
    "ä 图.png",
    "b\x07l.png",
    "new\nline.png",
)


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_an_odd_file_name_is_shown_literally(labelwise: Command, tmp_path: Path, name: str) -> None:
    file = tmp_path / "[bold]odd" / name
    file.parent.mkdir(parents=True)
    file.write_bytes(b"not a photo")
    code, out, err = labelwise("scan", "[bold]odd")
    assert (code, err) == (3, "error: [bold]odd: 0 different images can be read; SimCLR needs at least 32.\n")
    literal = name.replace("\x1b", "\\x1b").replace("\n", "\\n").replace("\x07", "\\x07")
    assert f"\n             {literal}: not an image we can read\n" in out
    assert "\x1b" not in out
    assert "\x07" not in out
    document = json.loads(labelwise("scan", "[bold]odd", "--json").out)
    assert [entry["file"] for entry in document["quarantined"]] == [name]


def test_an_error_shows_odd_names_literally(labelwise: Command) -> None:
    assert labelwise("scan", "[red]no\x1b[2Jwhere").err == "error: [red]no\\x1b[2Jwhere: no such folder.\n"


def test_a_file_name_that_is_not_utf8_is_left_out_and_said(labelwise: Command, photos: Path) -> None:
    with open(os.fsencode(photos) + b"/caf\xe9.png", "wb") as file:
        file.write(b"x")
    code, out, err = labelwise("scan", "photos")
    assert (code, err) == (0, "")
    assert "images       40" in out
    assert "1 files left out because their names are not UTF-8; rename them" in out


def test_a_folder_whose_name_is_not_utf8_is_no_crash(labelwise: Command, photos: Path) -> None:
    odd = os.fsdecode(os.fsencode(photos.parent) + b"/caf\xe9")
    photos.rename(odd)
    code, out, err = labelwise("scan", odd)
    assert "Traceback" not in err
    assert code == 0 or (code == 3 and err.startswith("error: ")), (code, out, err)


# --- colour


@pytest.mark.parametrize(("no_color", "is_red"), [(None, True), ("1", False)])
def test_no_color_is_respected(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], no_color: str | None, is_red: bool
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    if no_color:
        monkeypatch.setenv("NO_COLOR", no_color)
    terminal.fail("no such folder")
    shown = capsys.readouterr().err
    assert "no such folder" in shown
    assert ("31m" in shown) is is_red  # 31 is red


def test_off_a_terminal_there_is_no_escape_and_no_line_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    path = "a long/path/" * 60
    terminal.fail(path)
    terminal.emit(path)
    assert capsys.readouterr() == (f"{path}\n", f"error: {path}\n")


def test_a_table_off_a_terminal_cuts_no_cell(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.emit_table("", ["run", "[size]"], [["r" * 90, "1,000"], ["[b]x", "7"]])
    out = capsys.readouterr().out
    assert "r" * 90 in out
    assert "[b]x" in out
    assert "[size]" in out
    assert "…" not in out


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (45.4, "45 s"),
        (89, "89 s"),
        (90, "2 min"),
        (720, "12 min"),
        (5399, "1 h 30 min"),
        (12000, "3 h 20 min"),
    ],
)
def test_durations_are_written_as_people_say_them(seconds: float, words: str) -> None:
    assert terminal.duration(seconds) == words


def test_memory_that_torch_cannot_get_is_told_as_such() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8)
    assert cli._resource_words(caught.value) == "out of memory; use a smaller --batch-size or --image-size."


@pytest.mark.parametrize(
    ("line", "code"), [("--version >&-", 0), ("--version 2>&-", 0), ("report --run nowhere >&-", 2)]
)
def test_a_closed_stream_changes_no_exit_code(line: str, code: int) -> None:
    ran = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m labelwise {line}"], capture_output=True, text=True
    )
    assert ran.returncode == code
    assert "Traceback" not in ran.stderr
    assert ("labelwise" in ran.stdout) == ("2>&-" in line)


def test_a_full_disk_is_told_with_its_place_whoever_found_it(tmp_path: Path) -> None:
    file = tmp_path / "runs" / "report.json"
    file.parent.mkdir()
    for found in (
        OSError(errno.ENOSPC, "No space left on device"),
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError(errno.ENOSPC, "No space left on device", str(file)),
    ):
        with pytest.raises(OSError, match="No space left on device") as caught, rundir.naming(file.parent):
            raise found
        words = cli._resource_words(caught.value)
        assert words == f"{file.parent}: full; free some and run the same command again."


def test_a_deleted_folder_to_stand_in_is_told(
    labelwise: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert labelwise("recipes") == (2, "", "error: the folder you are in was deleted; go to another one.\n")


def test_a_folder_of_runs_that_is_not_there_ends_with_2(labelwise: Command) -> None:
    assert labelwise("runs", "list", "nonexist") == (2, "", "error: nonexist: no such folder.\n")
    assert labelwise("runs", "list").code == 0


@pytest.mark.parametrize("option", [("--seed", "99999999999999999999"), ("--time-limit", "9999999999h")])
def test_huge_settings_are_refused(labelwise: Command, photos: Path, option: tuple[str, str]) -> None:
    ran = labelwise("pretrain", str(photos), *option)
    assert ran.code == 2
    assert option[1] in ran.err
