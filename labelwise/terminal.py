"""What people see: the only door to rich.

Results go to stdout (`emit*`), everything else to stderr. No text of the user's (file names, labels) is
ever read as markup. Off a terminal, progress is a plain line now and then instead of a bar.
"""

import errno
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TextIO

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

_LINE_SECONDS = 30.0
_LINE_SHARE = 0.05
_WIDE = 200  # width off a terminal, so that no column is cut
_muted = False


class Bar(Protocol):
    """Progress of one piece of work."""

    def advance(self, count: int = 1, **figures: float) -> None:
        """Note that `count` more units are done, and the figures to show beside them."""

    def note(self, text: str) -> None:
        """Say something without tearing the bar."""


def mute() -> None:
    """Print nothing from now on but errors: another process speaks."""
    global _muted  # noqa: PLW0603 - as streams are
    _muted = True


def is_muted() -> bool:
    """Whether another process speaks."""
    return _muted


def say(text: str) -> None:
    """Print one plain line to stderr."""
    _print(sys.stderr, Text(_clean(text)))


def warn(text: str) -> None:
    """Print one line to stderr that should not be missed."""
    _print(sys.stderr, Text.assemble(("warning: ", "bold yellow"), _clean(text)))


def fail(text: str) -> None:
    """Print an error to stderr."""
    _console(sys.stderr).print(Text.assemble(("error: ", "bold red"), _clean(text, keep_lines=True)))


def heading(text: str) -> None:
    """Print a line to stderr that starts something new."""
    _print(sys.stderr, Text(f"\n{_clean(text)}", style="bold"))


def emit(text: str, style: str = "") -> None:
    """Print a result to stdout."""
    _print(sys.stdout, Text(_clean(text), style=style))


def emit_json(value: Any) -> None:
    """Print one JSON document to stdout."""
    if _muted:
        return
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=True, allow_nan=False) + "\n")
    sys.stdout.flush()


def emit_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table to stdout: the first column to the left, the others to the right."""
    table = Table(
        title=_clean(title) if title else None, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False
    )
    for place, column in enumerate(columns):
        table.add_column(Text(_clean(column)), justify="left" if place == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_clean(cell)) for cell in row))
    _print(sys.stdout, table)


def duration(seconds: float) -> str:
    """Write seconds as people say them: 45 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min"


@contextmanager
def track(label: str, total: int, *, done: int = 0, unit: str = "images") -> Iterator[Bar]:
    """Show progress while the block runs.

    Args:
        label: What is being done.
        total: Units of work.
        done: Units that were done before.
        unit: Their name, plural.
    """
    if _muted or not sys.stderr.isatty():
        yield _Lines(label, total, done, unit)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_console(sys.stderr), transient=True) as progress:
        yield _Rich(progress, label, total, done, unit)


class _Rich:
    def __init__(self, progress: Progress, label: str, total: int, done: int, unit: str) -> None:
        self._progress, self._unit = progress, unit
        self._clock, self._count = time.monotonic(), 0
        self._task = progress.add_task(_clean(label), total=total, completed=done, figures="")

    def advance(self, count: int = 1, **figures: float) -> None:
        self._count += count
        rate = self._count / max(1e-9, time.monotonic() - self._clock)
        self._progress.update(self._task, advance=count, figures=_figures(figures, rate, self._unit))

    def note(self, text: str) -> None:
        self._progress.console.print(Text(_clean(text)))


class _Lines:
    def __init__(self, label: str, total: int, done: int, unit: str) -> None:
        self._label, self._total, self._done, self._unit = label, total, done, unit
        self._clock, self._count = time.monotonic(), 0
        self._line_at, self._line_done = self._clock, done

    def advance(self, count: int = 1, **figures: float) -> None:
        self._done += count
        self._count += count
        now = time.monotonic()
        if now - self._line_at < _LINE_SECONDS or self._done - self._line_done < _LINE_SHARE * self._total:
            return
        self._line_at, self._line_done = now, self._done
        rate = self._count / max(1e-9, now - self._clock)
        left = duration((self._total - self._done) / max(rate, 1e-9))
        say(
            f"{self._label}: {self._done:,} of {self._total:,}  {_figures(figures, rate, self._unit)}  {left} left"
        )

    def note(self, text: str) -> None:
        say(text)


def _figures(figures: dict[str, float], rate: float, unit: str) -> str:
    shown = [f"{name.replace('_', ' ')} {value:.3g}" for name, value in figures.items()]
    return "  ".join([*shown, f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.1f} {unit}/s"])


class _WhileItLasts:
    """Standard error; when whoever read it is gone, work goes on unseen."""

    def write(self, text: str) -> int:
        return self._unless_gone(sys.stderr.write, text) or len(text)

    def flush(self) -> None:
        self._unless_gone(sys.stderr.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)

    def _unless_gone(self, do: Callable[..., Any], *arguments: str) -> Any:
        try:
            return do(*arguments)
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EPIPE):  # of a terminal, of a pipe
                raise


def _console(stream: TextIO) -> Console:
    wide = None if stream.isatty() else _WIDE
    file: Any = _WhileItLasts() if stream is sys.stderr else stream
    return Console(
        file=file, highlight=False, markup=False, emoji=False, soft_wrap=not stream.isatty(), width=wide
    )


def _print(stream: TextIO, what: Text | Table) -> None:
    if not _muted:
        _console(stream).print(what)


def _clean(text: str, *, keep_lines: bool = False) -> str:
    """Escape what would break a terminal: control characters and bytes that are not text."""
    kept = "\n" if keep_lines else ""
    shown = "".join(
        char if char.isprintable() or char in kept else char.encode("unicode_escape").decode()
        for char in text
    )
    encoding = sys.stderr.encoding or "utf-8"
    return shown.encode(encoding, "backslashreplace").decode(encoding)
