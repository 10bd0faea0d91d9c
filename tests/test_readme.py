"""What README.md tells people to type works as written, on fewer images, with a narrow network and for fewer steps."""

import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from labelwise.config import PretrainSettings
from labelwise.stages.demo import write_digits

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
NARROW = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}
SHORTER = {
    "pretrain": ["--epochs", "1", "--batch-size", "64", "--precision", "fp32", "--backbone-args", json.dumps(NARROW)],
    "finetune": ["--draws", "1", "--steps", "2", "--scratch-steps", "2"],
}  # fmt: skip


def commands() -> list[list[str]]:
    """The indented lines of README.md that call labelwise, without comments."""
    lines = re.findall(r"^    (labelwise [^\n]*)", README, flags=re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def labelwise(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "labelwise", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A working folder with `photos` in it: 360 digits in class folders."""
    write_digits(tmp_path / "photos")
    for number, file in enumerate(sorted((tmp_path / "photos").glob("*/*.png"))):
        if number % 5:
            file.unlink()
    return tmp_path


def test_readme_names_the_two_commands_of_the_set_up() -> None:
    assert "    pip install . && labelwise demo\n" in README
    assert "    pip install '.[test]' && pytest\n" in README


def test_every_file_readme_points_to_is_there() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (Path(__file__).parent.parent / target).exists(), target


@pytest.mark.slow
def test_every_readme_command_runs(photos: Path) -> None:
    found = commands()
    assert [command[1] for command in found] == ["scan", "pretrain", "finetune", "report"]
    for command in found:
        done = labelwise(photos, *command[1:], *SHORTER.get(command[1], []))
        assert done.returncode == 0, done.stderr
    assert (photos / "runs" / "latest" / "report.html").exists()


@pytest.mark.slow
def test_the_python_of_readme_runs(photos: Path) -> None:
    code = re.search(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert code is not None
    short = (
        code[1]
        .replace("epochs=100", f"epochs=1, batch_size=64, backbone_args={NARROW}")
        .replace("fraction=(0.01, 0.1)", "label_counts=(20,), draws=1, steps=2, scratch_steps=2")
    )
    assert short != code[1]
    done = subprocess.run(
        [sys.executable, "-c", short], cwd=photos, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "One label draw, no interval, so nothing is claimed" in done.stdout


@pytest.mark.slow
def test_the_quick_demo_runs_from_nothing_to_a_page(tmp_path: Path) -> None:
    done = labelwise(tmp_path, "demo", "--quick")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "labelwise-demo" / "runs" / "digits"
    assert (run / "report.html").exists()
    assert not (tmp_path / "runs").exists()
    for command in ("scan", "pretrain", "finetune", "report"):
        assert f"$ labelwise {command} " in done.stderr
    assert "SimCLR, fine-tuned" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_demo_and_not_only_its_command(tmp_path: Path, number: signal.Signals) -> None:
    script = (  # imports of large libraries swallow a signal: done before
        "import signal, sys, labelwise.stages.scanning\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs are deaf to it
        "from labelwise.__main__ import run\n"
        "sys.argv = ['labelwise', 'demo', '--quick']\n"
        "run()\n"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as demo:
        assert demo.stderr is not None
        while "$ labelwise scan" not in demo.stderr.readline():
            assert demo.poll() is None
        demo.send_signal(number)
        words = demo.stderr.read()
    assert demo.returncode == 128 + number, words
    assert "$ labelwise pretrain" not in words


@pytest.mark.parametrize(
    "file", ["compose.yaml", "docs/examples/slurm.sbatch", "docs/examples/kubernetes.yaml", "docs/scale.md"]
)
def test_examples_give_options_that_there_are(file: str) -> None:
    text = (Path(__file__).parent.parent / file).read_text(encoding="utf-8")
    found = re.findall(r"labelwise[ \",]+pretrain\b((?:[^\n`]|\\\n)*)", text)
    assert found
    known = {f"--{name.replace('_', '-')}" for name in PretrainSettings.model_fields}
    for words in found:
        assert set(re.findall(r"(?<![\w-])--[a-z-]+", words)) <= known
    if file.endswith(".yaml"):
        assert all(yaml.safe_load_all(text))
