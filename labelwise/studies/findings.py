"""What a study found: tables beside the paper's, paired comparisons, and one sentence of advice."""

from dataclasses import dataclass, field
from typing import Any

from labelwise.measures.statistics import FEWEST_DRAWS, HELPS, HURTS, UNCLEAR, Interval, verdict
from labelwise.reports import text
from labelwise.studies.trials import Name, Outcomes

CAPTION = (
    "The paper's numbers are of ResNet-50 trained on ImageNet's 1.28 million images for 100 epochs and more; these are of other images, "
    "another network and a short training: levels do not compare, orderings do."
)


@dataclass(frozen=True)
class Paper:
    """The paper's own table of the same.

    Attributes:
        source: Where it stands.
        rows, columns: Their names.
        cells: Per cent, (rows, columns).
    """

    source: str
    rows: list[str]
    columns: list[str]
    cells: list[list[float]]


@dataclass(frozen=True)
class Table:
    """Accuracies by row and column; a cell that was not reached is None.

    Attributes:
        title: What is in the cells.
        rows, columns: Their names.
        cells: One interval for each, (rows, columns).
        shape: Of its picture: "heat", "lines" where columns are steps of one thing, or "bars".
        paper: The paper's; None where it has none.
        note: What a reader should know.
    """

    title: str
    rows: list[str]
    columns: list[str]
    cells: list[list[Interval | None]]
    shape: str
    paper: Paper | None = None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """Encode for study.json."""
        cells = [[cell and cell.to_json() for cell in row] for row in self.cells]
        paper = None if self.paper is None else vars(self.paper)
        return {**vars(self), "cells": cells, "paper": paper}


@dataclass(frozen=True)
class Comparison:
    """A paired difference, and what the paper says of the same.

    Attributes:
        words: What is compared, "crop and color against crop alone".
        difference: None where one side was not reached.
        paper: In words; empty where it is silent.
    """

    words: str
    difference: Interval | None
    paper: str = ""

    @property
    def verdict(self) -> str:
        """By the rule of every comparison: a 95 % interval without zero, over three seeds or more."""
        return UNCLEAR if self.difference is None else verdict(self.difference)

    def to_json(self) -> dict[str, Any]:
        """Encode for study.json."""
        difference = None if self.difference is None else self.difference.to_json()
        return {"words": self.words, "difference": difference, "verdict": self.verdict, "paper": self.paper}


@dataclass(frozen=True)
class Findings:
    """All that a study says.

    Attributes:
        advice: One sentence.
        recipe: Settings of pretraining that follow from it, empty where none do.
        pictures: Numbers of further pictures, by name.
    """

    tables: list[Table]
    comparisons: list[Comparison]
    advice: str
    recipe: dict[str, Any]
    pictures: dict[str, Any] = field(default_factory=dict)


def compare(
    outcomes: Outcomes, words: str, first: tuple[Name, str], second: tuple[Name, str], paper: str = ""
) -> Comparison:
    """Compare two trials by what was asked of each."""
    return Comparison(words, outcomes.difference(first, second), paper)


def shown(comparison: Comparison) -> Interval | None:
    """The difference where its sign is shown, else None."""
    return comparison.difference if comparison.verdict in (HELPS, HURTS) else None


def points(difference: Interval) -> str:
    """A difference in words, "+11.0 points [+6.2, +15.8]"."""
    return text.points(difference.to_json())


def why_unclear(comparisons: list[Comparison]) -> str:
    """Why nothing can be advised, and what would help."""
    seeds = max((each.difference.n for each in comparisons if each.difference is not None), default=0)
    if not seeds:
        return "too little was reached to say anything; allow a longer --time-limit"
    if seeds < FEWEST_DRAWS:
        seen = "one seed" if seeds == 1 else f"{seeds} seeds"
        return f"{seen} can claim nothing; three can (--seeds, and a --time-limit they fit in)"
    return "no difference is shown by the intervals; a longer --time-limit or more --seeds may show one"
