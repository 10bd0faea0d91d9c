"""Which labels a comparison learns from: random draws of those that were not chosen, then all of these and what `suggest` chose."""

from collections.abc import Collection
from typing import Any

import numpy as np

from labelwise import rundir, terminal
from labelwise.config import MOST_DRAWS, FinetuneSettings
from labelwise.errors import UsageError
from labelwise.images.splits import draw_labels, hash_names
from labelwise.rundir import MIXED, RANDOM, SUGGESTED
from labelwise.stages.classifier import Rows
from labelwise.stages.methods import Bench, tested_in

Job = tuple[str, int, int]  # method, number of labels, draw
LADDER = (2, 5, 10, 25, 50, 100)  # labels per class when nothing is asked
_FURTHER = 1.5  # times as many chosen labels as at the number before, when nothing is asked


def split_labels(bench: Bench) -> tuple[Rows, Rows]:
    """Labeled rows that are drawn at random, and those that `suggest` chose, in its order; in folds all are drawn."""
    chosen = _chosen(bench)
    if bench.folds:
        return bench.labeled, chosen[:0]
    return np.setdiff1d(bench.labeled, chosen), chosen


def series_of(bench: Bench, rows: Rows) -> dict[str, Any]:
    """What a result says of how its labels were chosen: the series, how many `suggest` chose, and of how many labels it is."""
    base, chosen = split_labels(bench)
    count = int(np.isin(rows, _chosen(bench)).sum())
    if bench.folds and bench.suggested:
        return {"series": MIXED, "suggested": count, "labels_there": len(bench.labeled)}
    if count:
        return {"series": SUGGESTED, "suggested": count, "labels_there": len(base) + len(chosen)}
    return {"series": RANDOM, "suggested": 0, "labels_there": len(base)}


def draws_of(bench: Bench, count: int) -> int:
    """How many classifiers of a method learn from so many labels: all that are drawn at random are one draw."""
    return 1 if count == len(split_labels(bench)[0]) else bench.settings.draws


def label_counts(settings: FinetuneSettings, bench: Bench) -> dict[int, float]:
    """Numbers of labels to try, ascending, each with its share of the images outside the test set, as it was asked for if it was.

    Each holds every class, and is at most all there are.
    """
    there, fewest, pool = len(bench.labeled), _fewest(bench), len(bench.pool)
    if bench.folds:  # the same whatever the number of draws
        there -= max(len(tested_in(bench, draw)) for draw in range(MOST_DRAWS))
    if settings.fraction and settings.label_counts:
        raise UsageError("--fraction and --label-counts say the same thing twice; give one.")
    asked: list[tuple[str, int, float | None]]
    if settings.fraction:
        asked = [
            (f"{share:.3g} of {pool:,} images", round(share * pool), share) for share in settings.fraction
        ]
    elif settings.label_counts:
        asked = [
            (str(count), there if count == "all" else int(count), None) for count in settings.label_counts
        ]
    else:
        asked = [(words, count, None) for words, count in _ladder(bench, there, fewest)]
    counts: dict[int, float] = {}
    for words, count, share in asked:
        if count < fewest:
            why = (
                f"for {fewest} classes; using {fewest}, one per class"
                if fewest == len(bench.classes)
                else f"and not every class is among those; using {fewest:,}"
            )
            terminal.warn(f"{words} is {count:,} labels {why}.")
        elif count > there:
            terminal.warn(f"{words} is {count:,} labels and {there:,} can be had; using all of them.")
        used = max(fewest, min(there, count))
        if used in counts:
            terminal.warn(f"{words}: {used:,} labels are compared already; once is enough.")
            continue
        counts[used] = share if share is not None and used == count else used / pool
    return dict(sorted(counts.items()))


def draw_orders(bench: Bench, asked: Collection[int], finished: Collection[Job]) -> list[list[int]]:
    """Draw the label sets, asked for now or trained on before, and write them down, nested and hashed.

    Returns:
        For each draw, places in `bench.labeled`: a random order, then what `suggest` chose in its own, the same in every draw.
    """
    counts = sorted({*asked, *(count for _, count, _ in finished)})
    draws = max([bench.settings.draws, *(draw + 1 for _, _, draw in finished)])
    names = [bench.names[row] for row in bench.labeled]
    labels = [bench.classes[bench.labels[row]] for row in bench.labeled]
    base, chosen = split_labels(bench)
    last = np.searchsorted(bench.labeled, chosen).tolist()
    orders = []
    for draw in range(draws):
        is_free = np.isin(bench.labeled, base) & ~np.isin(bench.labeled, tested_in(bench, draw))
        free = np.flatnonzero(is_free).tolist()
        drawn = draw_labels(
            [names[each] for each in free], [labels[each] for each in free], draw, bench.settings.seed
        )
        order = [*(free[each] for each in drawn), *last]
        orders.append(order)
        file = bench.run.splits / f"draw-{bench.settings.seed}-{draw}.json"
        ordered = [names[index] for index in order]
        before = rundir.read_json(file) if file.exists() else {"order": [], "sha256": {}}
        known = before["sha256"] if before["order"] == ordered else {}
        hashes = known | {str(count): hash_names(ordered[:count]) for count in counts}
        rundir.write_json(file, {"order": ordered, "sha256": hashes})
    return orders


def announce_labels(bench: Bench, counts: Collection[int]) -> None:
    """Say how many labels are tried, and which are drawn and which chosen."""
    (base, chosen), draws = split_labels(bench), bench.settings.draws
    random, longer = ([f"{n:,}" for n in counts if (n > len(base)) == more] for more in (False, True))
    if random:
        terminal.say(
            f"labels     {', '.join(random)} of {len(base):,}, {draws} random draws each, written to {bench.run.splits}"
        )
    if len(base) in counts:
        terminal.say(f"           all {len(base):,} labels are one draw: no interval there")
    if longer:
        first = f"all {len(base):,} others and the first" if len(base) else "the first"
        terminal.say(
            f"suggested  {', '.join(longer)}: {first} of {len(chosen):,} that `suggest` chose, the same in {draws} trainings each"
        )
    if len(chosen) and not _has_random_draws(bench):
        what = "the others lack a class" if len(base) else "it chose all labels"
        terminal.say(f"           no random draws beside them: {what}")
    if bench.folds and bench.suggested:
        terminal.say(
            f"           {len(_chosen(bench)):,} that `suggest` chose are drawn and tested like the others, as there is no test set"
        )


def _chosen(bench: Bench) -> Rows:
    """Labeled rows that `suggest` chose, in its order."""
    return np.concatenate([np.empty(0, dtype=np.int64), *bench.suggested])


def _has_random_draws(bench: Bench) -> bool:
    """Whether the labels that are drawn at random hold every class."""
    return len(np.unique(bench.labels[split_labels(bench)[0]])) == len(bench.classes)


def _fewest(bench: Bench) -> int:
    """The smallest number of labels that holds every class: one of each, or where those cannot be drawn, the first that do."""
    if _has_random_draws(bench):
        return len(bench.classes)
    _, first = np.unique(bench.labels[np.concatenate(split_labels(bench))], return_index=True)
    return int(first.max()) + 1


def _ladder(bench: Bench, there: int, fewest: int) -> list[tuple[str, int]]:
    """Numbers of labels when nothing is asked, in words too.

    So many per class of what is drawn at random, and all of it; then where the calls of `suggest` ended, each time half as many
    chosen ones more at least.
    """
    base, chosen = split_labels(bench)
    classes, drawn = len(bench.classes), there - len(chosen)
    counts = []
    if _has_random_draws(bench):
        counts = [(f"{each} per class", each * classes) for each in LADDER if each * classes < drawn]
        counts.append(("all", drawn))
    ends = np.cumsum([len(rows) for rows in bench.suggested if len(chosen)]).tolist()
    kept: list[int] = []
    for end in sorted({*ends, *([] if counts else [fewest - len(base)])}, reverse=True):
        if len(base) + end >= fewest and (not kept or end * _FURTHER <= kept[-1]):
            kept.append(end)
    return counts + [(f"{end} suggested", drawn + end) for end in reversed(kept)]
