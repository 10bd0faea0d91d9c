"""Figures of the report as SVG text; ink takes the page's own colour, so they work on light and dark."""

import io
import math
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from labelwise.reports import text
from labelwise.rundir import SUGGESTED

# Okabe and Ito 2008: told apart with any colour vision.
COLORS = {
    "simclr": "#0072B2",
    "simclr_probe": "#56B4E9",
    "supervised": "#D55E00",
    "random_probe": "#8C8C8C",
    "pixels": "#CC79A7",
    "imagenet": "#6B4A00",
    "imagenet_probe": "#B07A00",
    "dinov2_probe": "#009E73",
}
OTHER = "#6A51A3"  # networks of the user's own
INK = "#123456"  # stands for the page's text colour; replaced in the SVG
LINES: dict[bool, Any] = {  # of labels drawn at random, and of those that `suggest` chose
    False: {"marker": "o", "linestyle": "-", "linewidth": 2, "markersize": 5},
    True: {
        "marker": "s",
        "linestyle": (0, (2, 1.5)),
        "linewidth": 2,
        "markersize": 6,
        "markerfacecolor": "none",
    },
}
STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def accuracy_against_labels(document: dict[str, Any]) -> str:
    """Accuracy of every method at every number of labels, each line named at its end; chosen labels have lines of their own."""
    key, words = text.measured(document)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 4.2))
        axes = figure.add_subplot()
        ends: list[tuple[float, str, str]] = []
        counts = [entry["labels"] for entry in document["summary"]]
        is_chosen = [entry["series"] == SUGGESTED for entry in document["summary"]]
        for arm, name in document["arm_names"].items():
            color = COLORS.get(arm, OTHER)
            for chosen in (False, True):
                found = [
                    (entry["labels"], entry[key][arm])
                    for entry, is_one in zip(document["summary"], is_chosen, strict=True)
                    if arm in entry[key] and is_one == chosen
                ]
                _draw_line(axes, found, color, LINES[chosen])
            last = next(entry for entry in reversed(document["summary"]) if arm in entry[key])
            ends.append((100 * last[key][arm]["mean"], name, color))
        if any(is_chosen):
            for chosen, which in ((False, "labels drawn at random"), (True, "labels chosen by suggest")):
                if chosen in is_chosen:
                    axes.plot([], [], color=INK, label=which, **LINES[chosen])
            axes.legend(frameon=False, loc="lower right")
        axes.set_xscale("log")
        axes.set_xticks(counts, [f"{count:,}" for count in counts])
        axes.minorticks_off()
        axes.set_xlabel("labels, logarithmic scale")
        axes.set_ylabel(f"test accuracy, %{words}")
        axes.grid(axis="y", color=INK, alpha=0.12)
        axes.margins(x=0.04)
        _label_ends(axes, ends)
        return as_svg(figure)


def _draw_line(axes: Axes, found: list[tuple[int, dict[str, Any]]], color: str, line: dict[str, Any]) -> None:
    """One method's accuracies, by number of labels, with the band of their intervals."""
    axes.plot([x for x, _ in found], [100 * each["mean"] for _, each in found], color=color, **line)
    banded = [(x, each) for x, each in found if each["low"] is not None]
    if banded:
        axes.fill_between(
            [x for x, _ in banded],
            [100 * each["low"] for _, each in banded],
            [100 * each["high"] for _, each in banded],
            color=color,
            alpha=0.14,
            linewidth=0,
        )


def reliability_diagram(entries: list[dict[str, Any]], names: dict[str, str]) -> str:
    """Accuracy against confidence of some methods, ten groups of predictions each; the diagonal is calibrated."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 3.8))
        axes = figure.add_subplot()
        axes.plot([0, 100], [0, 100], color=INK, linewidth=1, linestyle=(0, (4, 3)))
        for entry in entries:
            sure = [100 * group["confidence"] for group in entry["groups"]]
            right = [100 * group["accuracy"] for group in entry["groups"]]
            color = COLORS.get(entry["arm"], OTHER)
            name = names[entry["arm"]]
            axes.plot(sure, right, "o-", color=color, linewidth=2, markersize=5, label=name, clip_on=False)
        axes.set_xlabel("confidence, %")
        axes.set_ylabel("right, %")
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 100)
        axes.set_aspect("equal")
        axes.grid(color=INK, alpha=0.12)
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.02, 1), labelcolor="linecolor")
        return as_svg(figure)


def learning_curves(metrics: list[dict[str, Any]]) -> str:
    """Loss beside chance, and kNN accuracy where labels exist, over the epochs."""
    with mpl.rc_context(STYLE):
        epochs = [row for row in metrics if row["kind"] == "epoch" and row["loss"] is not None]
        seen = [row for row in epochs if row["knn"] is not None]
        figure = Figure(figsize=(7.6, 3.1))
        panels = figure.subplots(1, 2 if seen else 1, squeeze=False)[0]
        loss = panels[0]
        loss.plot(
            [row["epoch"] + 1 for row in epochs],
            [row["loss"] for row in epochs],
            color=COLORS["simclr"],
            linewidth=2,
        )
        if epochs:
            loss.axhline(epochs[0]["chance"], color=INK, linewidth=1, linestyle=(0, (4, 3)))
            loss.annotate(
                "chance",
                (epochs[-1]["epoch"] + 1, epochs[0]["chance"]),
                xytext=(0, -12),
                textcoords="offset points",
                ha="right",
            )
        loss.set_title("Contrastive loss", loc="left", fontsize=11)
        loss.set_xlabel("epoch")
        if seen:
            panels[1].plot(
                [row["epoch"] + 1 for row in seen],
                [100 * row["knn"] for row in seen],
                "o-",
                color=COLORS["simclr"],
                linewidth=2,
                markersize=4,
            )
            panels[1].set_title("Nearest-neighbour accuracy in the pool, %", loc="left", fontsize=11)
            panels[1].set_xlabel("epoch")
        for panel in panels:
            panel.grid(axis="y", color=INK, alpha=0.12)
        figure.tight_layout(w_pad=3)
        return as_svg(figure)


def _label_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Name each line at its right end, pushed apart so that names do not touch."""
    low, high = axes.get_ylim()
    gap = (high - low) * 0.062
    placed = -math.inf
    for value, name, color in sorted(ends):
        placed = max(value, placed + gap)
        axes.annotate(
            name,
            (1.015, placed),
            xycoords=("axes fraction", "data"),
            color=color,
            va="center",
            fontweight="bold",
            fontsize=10,
        )


def as_svg(figure: Figure) -> str:
    """A figure as SVG text whose ink is the page's."""
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None, "Creator": None}
    )
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")
