"""The house: public names, names that would clash, docstrings, and imports that run downward."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import labelwise

HOUSE = Path(labelwise.__file__).parent
REPOSITORY = Path(__file__).parent.parent
MODULES = sorted(HOUSE.rglob("*.py"))


@pytest.mark.parametrize("name", labelwise.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    assert getattr(labelwise, name) is not None
    assert name in labelwise._HOMES or name in vars(labelwise)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'labelwise' has no attribute 'pretrian'"):
        _ = labelwise.pretrian


@pytest.mark.parametrize("package", sorted({file.parent for file in MODULES}), ids=lambda path: path.name)
def test_no_module_takes_the_name_of_something_its_package_gives_out(package: Path) -> None:
    """Importing `labelwise.report`, were it a module, would put it in place of the function."""
    names = {path.stem for path in package.iterdir() if path.suffix == ".py" or path.is_dir()}
    tree = ast.parse((package / "__init__.py").read_text(encoding="utf-8"))
    given = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    given |= set(labelwise.__all__) if package == HOUSE else set()
    assert not names & given


def test_no_module_anywhere_has_the_name_of_a_public_function() -> None:
    assert not {file.stem for file in MODULES} & set(labelwise.__all__)


@pytest.mark.parametrize("file", MODULES, ids=lambda file: file.relative_to(HOUSE).as_posix())
def test_every_module_says_what_it_is(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    if text.strip():  # an empty __init__.py only marks a folder
        words = ast.get_docstring(ast.parse(text))
        assert words
        assert words.splitlines()[0].rstrip().endswith((".", ":", ";"))


def test_imports_run_downward() -> None:
    tool = Path(sys.executable).parent / "lint-imports"
    if not tool.exists():
        pytest.skip(f"import-linter is not installed beside {sys.executable}")
    ran = subprocess.run([tool, "--no-cache"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "0 broken" in ran.stdout
