"""How the benchmarks compare: two sides in turns (A B B A), and the median of the ratios of the pairs."""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np

Measure = Callable[[], float]  # what one go costs: seconds per image, or bytes; smaller is better


def compare(
    name: str, ours: Measure, theirs: Measure, bar: float, pairs: int = 6, controls: int = 3
) -> dict[str, object]:
    """Measure both sides in turns; ratios are theirs / ours, so that larger is better for us.

    Returns:
        `name`, `ratio` (median), `low` and `high` (95 % bootstrap interval), `control` (median ratio of
        our side to itself, 1.00 on a quiet machine), `bar`, and the medians `ours` and `theirs`.
    """
    return compare_all(ours, {name: (theirs, bar)}, pairs, controls)[0]


def compare_all(
    ours: Measure, rivals: dict[str, tuple[Measure, float]], pairs: int = 6, controls: int = 3
) -> list[dict[str, object]]:
    """Measure our side and several others in rounds, every second round backwards; a figure for each rival."""
    sides = {"": ours} | {name: measure for name, (measure, _) in rivals.items()}
    for measure in sides.values():
        measure()  # warm
    rounds: list[dict[str, float]] = []
    for number in range(pairs):
        order = list(sides) if number % 2 == 0 else list(sides)[::-1]
        rounds.append({name: sides[name]() for name in order})
    control = statistics.median(ours() / ours() for _ in range(controls))
    figures = []
    for name, (_, bar) in rivals.items():
        ratios = np.array([each[name] / each[""] for each in rounds])
        draws = np.random.default_rng(0).choice(ratios, (10_000, pairs))
        low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
        figures.append(
            {
                "name": name,
                "ratio": float(np.median(ratios)),
                "low": float(low),
                "high": float(high),
                "control": control,
                "bar": bar,
                "ours": statistics.median(each[""] for each in rounds),
                "theirs": statistics.median(each[name] for each in rounds),
            }
        )
    return figures


def seconds(run: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options every benchmark has."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--json", action="store_true", help="print one JSON document")
    return made


def show(figures: list[dict[str, object]], as_json: bool) -> None:
    """Print the figures."""
    if as_json:
        print(json.dumps({"figures": figures}, indent=2))
        return
    for figure in figures:
        words = "{name}: {ratio:.2f} [{low:.2f}, {high:.2f}], bar {bar}, control {control:.2f}; ours {ours:.3g}, theirs {theirs:.3g}"
        print(words.format(**figure), flush=True)
