"""report.html: one page that opens anywhere, offline, without scripts."""

import base64
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from labelwise import rundir
from labelwise.reports import plots, text
from labelwise.rundir import RunDirectory

_PROBES = ("random_probe", "pixels")  # whose confidence nobody will use
_MOST_CLASSES = 30  # a confusion matrix beyond this cannot be read
_SIDE_BY_SIDE = 10  # of up to so many classes it leaves room for a neighbour
_UPRIGHT = 3  # letters of a class that fit over a column of the matrix


def render(document: dict[str, Any], run: RunDirectory) -> str:
    """Write the page of a run.

    Args:
        document: report.json.
        run: Where the curves, the view mosaic and the neighbours lie.
    """
    template = get_template(
        "report.html.jinja",
        percent=text.percent,
        count=lambda value: f"{value:,}",
        with_chosen=text.labels_in_words,
        together=text.together,
        doubts=text.doubts_in_words,
        suspicion=text.suspicion_in_words,
    )
    columns, rows = text.table(document)
    calibration = _calibration(document)
    metrics, confusion = rundir.read_metrics(run), document["confusion"]
    answer, *rest = re.split(r"(?<=\.) (?=[A-Z])", document["verdict"], maxsplit=1)
    return template.render(
        document=document,
        answer=answer.replace(" %", "\N{NO-BREAK SPACE}%"),
        rest=" ".join(rest),
        data_line=text.data_line(document["data"]),
        test_line=text.test_line(document),
        columns=columns,
        rows=_table_rows(document, rows),
        note=text.table_note(document),
        interval_of=text.interval_of(document),
        repeats=text.repeats_in_words(document["summary"]),
        saved=[text.saved_in_words(saved, document["label_cost"]) for saved in document["labels_saved"]],
        over_encoders=[text.over_encoders_in_words(gain) for gain in document["over_encoders"]["gains"]],
        accuracy_plot=_figure(plots.accuracy_against_labels(document) if document["summary"] else ""),
        curves=_figure(plots.learning_curves(metrics) if metrics else ""),
        confusion=_confusion(confusion),
        worst=text.worst_classes(confusion),
        of_whom=_of_whom(document),
        long_names=confusion is not None and any(len(name) > _UPRIGHT for name in confusion["classes"]),
        side_by_side=_SIDE_BY_SIDE,
        most_classes=_MOST_CLASSES,
        calibration=[
            text.calibration_in_words(each, document["arm_names"][each["arm"]]) for each in calibration
        ],
        reliability=_figure(
            plots.reliability_diagram(calibration, document["arm_names"]) if calibration else ""
        ),
        costs=text.costs(document, metrics),
        mosaic=_picture(run.views),
        suspects=text.worth_a_look(document["label_check"], _suspects(run))
        if document["label_check"]
        else [],
        check_note=text.check_note(document),
        queries=(rundir.read_derived(run.neighbours) or {"queries": []})["queries"],
        pairs=_pairs(run.near_copies),
        grouped=text.grouped_in_words(document["data"]),
        lookalikes=text.lookalikes_in_words(document),
        lookalike_pairs=_pairs(run.lookalikes),
        environment_rows=_environment_rows(document["environment"]),
    )


def get_template(name: str, **filters: Callable[[Any], str]) -> Template:
    """Open a page's template, in which all text is escaped, with filters of its own."""
    environment = Environment(
        loader=PackageLoader("labelwise.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    return environment.get_template(name)


def _table_rows(document: dict[str, Any], rows: list[list[str]]) -> list[dict[str, Any]]:
    """Rows of the table of methods, each with its method's colour; the gain has none."""
    colors = {name: plots.COLORS.get(arm, plots.OTHER) for arm, name in document["arm_names"].items()}
    table = []
    for name, *cells in rows:
        parts = [cell.partition(" [") for cell in cells]
        color = colors.get(name.removesuffix(text.MACRO), "")
        table.append(
            {
                "name": name,
                "color": color,
                "cells": [{"value": value, "interval": rest} for value, _, rest in parts],
            }
        )
    return table


def _confusion(confusion: dict[str, Any] | None) -> dict[str, Any] | None:
    """Row shares of the confusion matrix, with the shade of each cell."""
    if confusion is None or not confusion["classes"] or len(confusion["classes"]) > _MOST_CLASSES:
        return None
    rows = []
    for name, counts in zip(confusion["classes"], confusion["counts"], strict=True):
        total = max(1, sum(counts))
        rows.append(
            {
                "name": name,
                "cells": [
                    {"share": count / total, "shade": round((count / total) ** 0.7, 3)} for count in counts
                ],
            }
        )
    return {**confusion, "rows": rows}


def _suspects(run: RunDirectory) -> list[dict[str, Any]]:
    """The labels that look wrong and have a picture."""
    found = rundir.read_derived(run.label_check) or {"suspects": []}
    return [each for each in found["suspects"] if "thumbnail" in each]


def _pairs(file: Path) -> list[dict[str, Any]]:
    """The pairs of images that have pictures."""
    found = rundir.read_derived(file) or {"pairs": []}
    return [each for each in found["pairs"] if "thumbnails" in each]


def _figure(svg: str) -> Markup:
    """Leave a figure as it is: it holds no text of the user's."""
    return Markup(svg)  # noqa: S704 - our own SVG


def _calibration(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Calibration at the most labels of what somebody might use."""
    most = max((each["labels"] for each in document["calibration"]), default=0)
    return [each for each in document["calibration"] if each["labels"] == most and each["arm"] not in _PROBES]


def _of_whom(document: dict[str, Any]) -> str:
    """Whose predictions the confusion counts, in words."""
    confusion = document["confusion"]
    if confusion is None:
        return ""
    last = document["summary"][-1]
    return (
        f"{document['arm_names'][confusion['arm']]} with {text.labels_in_words(last)}, {text.together(last)}"
    )


def _environment_rows(environment: dict[str, Any]) -> list[tuple[str, str]]:
    names = (
        "labelwise",
        "python",
        "torch",
        "timm",
        "platform",
        "cpu",
        "cores",
        "device",
        "started",
        "finished",
    )
    rows = [(name, str(environment[name])) for name in names if environment.get(name)]
    precision = environment["precision"]
    return [
        *rows,
        ("precision", f"{precision['number']}, {precision['layout']}: {precision['reason']}"),
        ("time", f"{environment['seconds'] / 60:.1f} min in all"),
    ]


def _picture(file: Path) -> str:
    return base64.b64encode(file.read_bytes()).decode("ascii") if file.is_file() else ""
