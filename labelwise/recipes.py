"""Recipes that ship: TOML files, in the wheel or in the source tree."""

import difflib
from pathlib import Path

from labelwise.errors import UsageError

_SHIPPED = Path(__file__).parent / "shipped_recipes"
_SOURCE = Path(__file__).parent.parent / "recipes"


def list_recipes() -> list[tuple[str, Path, str]]:
    """Name, file and first line of each recipe, by name."""
    folder = _SHIPPED if _SHIPPED.is_dir() else _SOURCE
    return [(file.stem, file, _first_line(file)) for file in sorted(folder.glob("*.toml"))]


def find_recipe(name: str) -> Path:
    """Find a recipe by its path, or by the name of one that ships.

    Raises:
        UsageError: There is none.
    """
    path = Path(name)
    try:
        if path.is_file():
            return path
    except OSError as error:
        raise UsageError(f"--recipe {name}: cannot be read ({error.strerror}).") from None
    shipped = {stem: file for stem, file, _ in list_recipes()}
    if name in shipped:
        return shipped[name]
    close = difflib.get_close_matches(name, shipped, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"these ship: {', '.join(shipped)}."
    raise UsageError(f"--recipe {name}: no such file or recipe; {hint}")


def _first_line(file: Path) -> str:
    with file.open(encoding="utf-8") as lines:
        return lines.readline().lstrip("# ").strip()
