"""How the benchmarks compare: two sides in turns (A B B A), and the median of the ratios of the pairs."""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np

Measure = Callable[[], float]  # what one go costs: seconds per image, or bytes; smaller is better


def compare(name: str, ours: Measure, theirs: Measure, bar: float, pairs: int = 6) -> dict[str, object]:
    """Measure both sides in turns; ratios are theirs / ours, so that larger is better for us.

    Returns:
        `name`, `ratio` (median), `low` and `high` (95 % bootstrap interval), `control` (median ratio of
        our side to itself, 1.00 on a quiet machine), `bar`, and the medians `ours` and `theirs`.
    """
    ours(), theirs()  # both warm
    costs: list[tuple[float, float]] = []
    for pair in range(pairs):
        if pair % 2 == 0:
            mine = ours()
            costs.append((mine, theirs()))
        else:
            other = theirs()
            costs.append((ours(), other))
    control = statistics.median(ours() / ours() for _ in range(3))
    ratios = np.array([other / mine for mine, other in costs])
    draws = np.random.default_rng(0).choice(ratios, (10_000, pairs))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return {
        "name": name,
        "ratio": float(np.median(ratios)),
        "low": float(low),
        "high": float(high),
        "control": control,
        "bar": bar,
        "ours": statistics.median(mine for mine, _ in costs),
        "theirs": statistics.median(other for _, other in costs),
    }


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
