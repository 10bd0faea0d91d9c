"""File and class names that want to be markup, escapes or formulas, through everything that is printed and written."""

import csv
import json
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import find_browser
from commands import FINETUNE_RECIPE, RECIPE, Server

from labelwise.rundir import RunDirectory

STRIKE = "document.documentElement.dataset.struck=1"
HOSTILE = [
    f"<script>{STRIKE}<-script>",
    f"<img src=x onerror={STRIKE}>",
    f"<svg onload={STRIKE}>",
    f'"><script>{STRIKE}<-script>',
    f"' onmouseover='{STRIKE}",
    f'" autofocus onfocus="{STRIKE}',
    f"javascript:{STRIKE}",
    f"<a href=javascript:{STRIKE}>x<-a>",
    f"<iframe srcdoc='<script>{STRIKE}<-script>'>",
    f"<body onload={STRIKE}>",
    f"<style>@import'x'<-style><script>{STRIKE}<-script>",
    f"--><script>{STRIKE}<-script><!--",
    f"]]><script>{STRIKE}<-script>",
    f"{{{{ {STRIKE} }}}}",
    "{% include '/etc/passwd' %}",
    "${7*7}",
    "&lt;script&gt;",
    "=cmd|' -C calc'!A0",
    "+1+1",
    "-2+3",
    "@SUM(1)",
    "\t=1+1",
    "[red]bold[-red]",
    "[link=http:--evil.example]click[-link]",
    "\x1b[2J\x1b]0;title\x07",
    "\x1b]8;;http:--evil.example\x1b\\click",
    "a\nb",
    "a\r\nSet-Cookie: x=1",
    "![x](javascript:x)",
    "**bold** `code` # title",
    "\u202egnp.exe",
    "%s%n%x",
    "'; DROP TABLE images; --",
    "$(touch struck)",
    "`touch struck`",
]


class Tags(HTMLParser):
    """What a browser would make of a page, in so far as it could run something."""

    def __init__(self) -> None:
        super().__init__()
        self.bad: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "iframe", "object", "embed", "form", "base"):
            self.bad.append(tag)
        for name, value in attributes:
            is_link = name in ("href", "src", "action", "formaction", "xlink:href")
            if name.startswith("on") or (
                is_link and value and not value.startswith(("#", "data:image/", "https://"))
            ):
                self.bad.append(f"{tag} {name}={value}")


@pytest.fixture(scope="module")
def attacked(
    server: Server, digits: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A folder with a run whose files, classes and folder all have hostile names, and what was printed on the way."""
    folder = tmp_path_factory.mktemp("hostile")
    images = folder / HOSTILE[1].replace("/", "-")
    images.mkdir()
    rows = []
    for number, file in enumerate(sorted(digits.glob("*/*.png"))):
        hostile = HOSTILE[number % len(HOSTILE)].replace("/", "-")
        name = f"{number} {hostile}.png" if number >= len(HOSTILE) else f"{hostile}.png"
        shutil.copy(file, images / name)
        label = HOSTILE[int(file.parent.name) * 3]
        rows.append((name, "".join("!" if mark in ",;|" else mark for mark in label)))  # a list is refused
    broken = f"{HOSTILE[0]} broken.png"
    (images / broken).write_bytes(b"no image")
    labels = folder / "labels.jsonl"
    labels.write_text(
        "".join(json.dumps({"file_name": name, "label": label.strip()}) + "\n" for name, label in rows)
    )
    run, printed = RunDirectory(folder / "run"), {}
    for name, text in (("pretrain", RECIPE), ("finetune", FINETUNE_RECIPE)):
        (folder / f"{name}.toml").write_text(text)
    common = ("--image-size", "16", "--batch-size", "32", "--precision", "fp32")
    commands: dict[str, tuple[Any, ...]] = {
        "scan": ("scan", images, "--labels", labels),
        "pretrain": ("pretrain", images, "--labels", labels, "--out", run.path, "--backbone", "resnet18", "--epochs", "2", *common, "--recipe", folder / "pretrain.toml"),
        "finetune": ("finetune", "--run", run.path, "--label-counts", "40", "--draws", "3", "--recipe", folder / "finetune.toml"),
        "report": ("report", "--run", run.path),
        "verify": ("verify", run.path),
        "runs": ("runs", "list", folder),
        "suggest": ("suggest", "--run", run.path, "--budget", "300"),
        "predict": ("predict", images, "--run", run.path, "--out", folder / "found.csv", "--probabilities"),
    }  # fmt: skip
    for name, words in commands.items():
        command = server.start(*words, cwd=folder)
        assert command.wait() == 0, command.words
        printed[name] = command.printed + command.words
    return folder, printed


def test_nothing_reaches_the_terminal_as_an_escape(
    attacked: tuple[Path, dict[str, Any]], tally: Callable[..., None]
) -> None:
    folder, printed = attacked
    for name, text in printed.items():
        assert not set(text) & {"\x1b", "\x07", "\x08", "\x9b", "\u202e"}, name
    assert not list(folder.rglob("struck"))
    tally("hostile names through terminal, page, Markdown and tables", len(HOSTILE))


def test_the_page_holds_nothing_that_could_run(attacked: tuple[Path, dict[str, Any]]) -> None:
    run = RunDirectory(attacked[0] / "run")
    for file in (run.report_html, run.suggestions.with_suffix(".html")):
        page = file.read_text(encoding="utf-8")
        tags = Tags()
        tags.feed(page)
        assert not tags.bad
        assert "default-src 'none'" in page
        assert HOSTILE[0] not in page


def test_a_browser_runs_nothing_of_it(attacked: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    browser = find_browser()
    page = RunDirectory(attacked[0] / "run").report_html
    control = tmp_path / "control.html"
    control.write_text(f"<!doctype html><script>{STRIKE}</script>")
    found = {}
    for name, file in (("control", control), ("report", page)):
        ran = subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / name}", "--dump-dom", file.as_uri()],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        found[name] = 'data-struck="1"' in ran.stdout
        assert "</html>" in ran.stdout
    assert found == {"control": True, "report": False}


def test_no_cell_of_a_table_is_a_formula(attacked: tuple[Path, dict[str, Any]]) -> None:
    suggestions = RunDirectory(attacked[0] / "run").suggestions
    for table in (suggestions, attacked[0] / "found.csv"):
        with table.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
        for row in rows:
            for cell in row:
                assert not cell.startswith(("=", "+", "-", "@", "\t", "\r")), cell
    assert len(rows) > len(HOSTILE)
    files = {row[0] for row in rows[1:]}
    assert "./=cmd|' -C calc'!A0.png" in files


def test_markdown_shows_names_and_obeys_none(attacked: tuple[Path, dict[str, Any]]) -> None:
    run = RunDirectory(attacked[0] / "run")
    for file in (run.report_md, run.model_card):
        lines = file.read_text(encoding="utf-8").splitlines()
        text = "\n".join(line for line in lines if not line.startswith("    "))  # code is shown as it is
        assert "<script>" not in text.replace("\\<script", "")
        assert "<img src=x" not in text.replace("\\<img", "")
        assert "](javascript" not in text.replace("\\](javascript", "")
