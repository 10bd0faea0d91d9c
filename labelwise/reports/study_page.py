"""What a study found, as a page, a figure, rows of CSV and lines of text; all of it from study.json alone."""

import csv
import io
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase

from labelwise.reports.html import get_template
from labelwise.reports.plots import INK, OTHER, STYLE, as_svg

_LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#B07A00", OTHER)
_WIDTH = 7.6
_BAR = 0.34  # height of a bar, inches


def cell_in_words(cell: dict[str, Any] | None) -> str:
    """An accuracy in per cent with its interval, "56.3 [54.1, 58.5]"; a dash where it was not reached."""
    if cell is None:
        return "\u2013"
    if cell["low"] is None:
        return f"{100 * cell['mean']:.1f}"
    return f"{100 * cell['mean']:.1f} [{100 * cell['low']:.1f}, {100 * cell['high']:.1f}]"


def difference_in_words(difference: dict[str, Any] | None) -> str:
    """A difference in points with its interval."""
    if difference is None:
        return "\u2013"
    if difference["low"] is None:
        return f"{100 * difference['mean']:+.1f}"
    return (
        f"{100 * difference['mean']:+.1f} [{100 * difference['low']:+.1f}, {100 * difference['high']:+.1f}]"
    )


def as_csv(document: dict[str, Any]) -> str:
    """One row for each cell of each table, accuracies from 0 to 1; the paper's tables as they are, without intervals."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["table", "row", "column", "mean", "low", "high", "seeds"])
    for table in document["tables"]:
        for row, column, cell in _cells(table):
            found = [cell["mean"], cell["low"], cell["high"], cell["n"]] if cell else [None] * 4
            writer.writerow([table["title"], row, column, *found])
        for row, column, percent in _cells(table["paper"]) if table["paper"] else ():
            writer.writerow([f"the paper, {table['paper']['source']}", row, column, percent / 100, None, None, None])  # fmt: skip
    return buffer.getvalue()


def _cells(table: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Row, column and cell."""
    for row, cells in zip(table["rows"], table["cells"], strict=True):
        for column, cell in zip(table["columns"], cells, strict=True):
            yield row, column, cell


def render(document: dict[str, Any], surroundings: dict[str, Any]) -> str:
    """Write the page of a study.

    Args:
        document: study.json.
        surroundings: environment.json.
    """
    template = get_template("study.html.jinja", cell=cell_in_words, difference=difference_in_words)
    colours = document["pictures"].get("histograms")
    return template.render(
        document=document,
        figures=[_as_markup(partial(_figure_of, table)) for table in document["tables"]],
        shortcut=_as_markup(partial(_histograms, colours)) if colours else "",
        surroundings=surroundings,
        command=surroundings["commands"][-1]["command"],
    )


def figure(document: dict[str, Any], kind: str) -> bytes:
    """All tables as one figure, "svg" or "png", black on white."""
    with mpl.rc_context({**STYLE, "savefig.facecolor": "white"}):
        heights = [_height(table) for table in document["tables"]]
        made = Figure(figsize=(_WIDTH, sum(heights)), layout="constrained")
        parts = made.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        for part, table in zip(parts, document["tables"], strict=True):
            part.suptitle(table["title"], x=0.01, ha="left", fontsize=10)
            _draw(part, table)
        buffer = io.BytesIO()
        made.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue().replace(INK.encode(), b"#1c2430") if kind == "svg" else buffer.getvalue()


def _as_markup(make: Callable[[], Figure]) -> Markup:
    """A figure for the page; it holds no text of the user's."""
    with mpl.rc_context(STYLE):
        return Markup(as_svg(make()))  # noqa: S704 - our own SVG


def _figure_of(table: dict[str, Any]) -> Figure:
    made = Figure(figsize=(_WIDTH, _height(table)), layout="constrained")
    _draw(made, table)
    return made


def _height(table: dict[str, Any]) -> float:
    """Inches that a table's picture takes."""
    if table["shape"] == "bars":
        return 1.1 + _BAR * len(table["rows"]) * len(table["columns"])
    return 4.6 if table["shape"] == "heat" else 3.4


def _draw(figure: FigureBase, table: dict[str, Any]) -> None:
    """Draw a table, and lines of the paper's beside ours."""
    if table["shape"] == "lines" and table["paper"]:
        ours, theirs = figure.subplots(1, 2)
        _lines(ours, table)
        paper = table["paper"]
        cells = [[{"mean": percent / 100, "low": None} for percent in row] for row in paper["cells"]]
        _lines(theirs, {**paper, "cells": cells})
        theirs.set_ylabel("")
        ours.set_title("here", loc="left", fontsize=10)
        theirs.set_title("the paper", loc="left", fontsize=10)
        return
    {"heat": _heat, "lines": _lines, "bars": _bars}[table["shape"]](figure.subplots(), table)


def _heat(axes: Axes, table: dict[str, Any]) -> None:
    """A square for each cell, its number in it; empty where it was not reached."""
    means = [[100 * cell["mean"] if cell else float("nan") for cell in row] for row in table["cells"]]
    axes.imshow(means, cmap="Blues", aspect="auto")
    known = [value for row in means for value in row if value == value]
    dark = min(known) + 0.6 * (max(known) - min(known)) if known else 0.0  # white ink from here on
    for y, row in enumerate(means):
        for x, value in enumerate(row):
            if value == value:
                axes.text(x, y, f"{value:.1f}", ha="center", va="center", color="white" if value > dark else "black", fontsize=10)  # fmt: skip
    axes.set_xticks(range(len(table["columns"])), table["columns"])
    axes.set_yticks(range(len(table["rows"])), table["rows"])
    axes.set_xlabel("second")
    axes.set_ylabel("first")
    axes.spines[:].set_visible(False)


def _lines(axes: Axes, table: dict[str, Any]) -> None:
    """A line for each row over the columns, with its band."""
    places = range(len(table["columns"]))
    for number, (name, cells) in enumerate(zip(table["rows"], table["cells"], strict=True)):
        color = _LINES[number % len(_LINES)]
        known = [(place, cell) for place, cell in zip(places, cells, strict=True) if cell]
        means = [100 * cell["mean"] for _, cell in known]
        axes.plot([place for place, _ in known], means, "o-", color=color, linewidth=2, markersize=5, label=name)  # fmt: skip
        banded = [(place, cell) for place, cell in known if cell["low"] is not None]
        if banded:
            low, high = ([100 * cell[end] for _, cell in banded] for end in ("low", "high"))
            axes.fill_between([place for place, _ in banded], low, high, color=color, alpha=0.14, linewidth=0)
    axes.set_xticks(places, [column.replace(" + ", "\n+ ") for column in table["columns"]], fontsize=9)
    axes.set_ylabel("accuracy, %")
    axes.grid(axis="y", color=INK, alpha=0.12)
    if len(table["rows"]) > 1:
        axes.legend(frameon=False, labelcolor="linecolor", fontsize=9)


_NUMBER = 12  # points of a bar that the number beside it takes


def _bars(axes: Axes, table: dict[str, Any]) -> None:
    """A bar for each cell with its interval, and a mark where the paper's number is."""
    names, place = [], 0
    for number, (row, cells) in enumerate(zip(table["rows"], table["cells"], strict=True)):
        for column, cell in enumerate(cells):
            color = _LINES[column % len(_LINES)]
            paper = table["paper"]["cells"][number][column] if table["paper"] else None
            if cell:
                mean = 100 * cell["mean"]
                axes.barh(place, mean, color=color, height=0.68)
                if cell["low"] is not None:
                    axes.plot([100 * cell["low"], 100 * cell["high"]], [place, place], color=INK, linewidth=1.4)  # fmt: skip
                else:
                    end = (
                        paper if paper is not None and 0 <= paper - mean < _NUMBER else mean
                    )  # else the diamond covers it
                    axes.text(end, place, f"  {mean:.1f}", va="center", fontsize=9)
            if paper is not None:
                axes.plot(paper, place, "D", color=INK, markersize=5, fillstyle="none")  # fmt: skip
            names.append(f"{row}, {table['columns'][column]}" if len(cells) > 1 else row)
            place += 1
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("%" + (f"; diamonds: the paper, {table['paper']['source']}" if table["paper"] else ""))
    axes.grid(axis="x", color=INK, alpha=0.12)


def _histograms(images: list[dict[str, Any]]) -> Figure:
    """Histograms of several crops of two images, without and with colour distortion."""
    made = Figure(figsize=(_WIDTH, 3.6), layout="constrained")
    panels = made.subplots(2, 2, squeeze=False, sharex=True)
    for row, kind in enumerate(("without", "with")):
        for column, image in enumerate(images):
            axes = panels[row, column]
            for shares in image[kind]:
                axes.plot([place / len(shares) for place in range(len(shares))], shares, color=_LINES[column], alpha=0.7)  # fmt: skip
            axes.set_yticks([])
            if not row:
                axes.set_title(f"crops of image {column + 1}", loc="left", fontsize=10)
            if not column:
                axes.set_ylabel(f"{kind}\ndistortion")
    for axes in panels[1]:
        axes.set_xlabel("intensity, all channels")
    return made
