"""Which labels look wrong: found after a comparison, for a person to look at; nothing is changed by it."""

from collections import defaultdict
from typing import Any

import numpy as np

from labelwise import rundir, terminal
from labelwise.measures.label_check import class_support, doubt, judged_classes
from labelwise.stages.methods import Bench, frozen_features
from labelwise.stages.reporting import SUSPECTS
from labelwise.views.mosaic import encode_thumbnail


def check_labels(bench: Bench, signature: str) -> None:
    """Write how well each label outside the test set fits its image, least fitting first, the first ones with pictures.

    What belongs together is not heard about each other. Exact copies count once; those with different labels come before all others. Test labels are not judged: to mend only
    those that a model doubts would favour that model.

    Args:
        bench: What was compared on.
        signature: Of settings and labels; what was written with the same is kept.
    """
    file = bench.run.label_check
    before = rundir.read_derived(file)
    if before is not None and before["signature"] == signature and "groups" in before:
        return
    file.unlink(missing_ok=True)
    suspects = _contradicting_copies(bench)
    _, first = np.unique(bench.cache.keys[bench.labeled], return_index=True)
    rows = bench.labeled[np.sort(first)]
    judged = judged_classes(bench.labels[rows], bench.groups[rows])
    rows = rows[np.isin(bench.labels[rows], judged)]
    agreed: dict[int, float] = {}
    if len(judged) > 1:
        terminal.say(f"looking for wrong labels among {len(rows):,}")
        features = frozen_features(bench, "encoder")
        labels = np.searchsorted(judged, bench.labels[rows])
        support = class_support(
            features[rows],
            labels,
            len(judged),
            groups=bench.groups[rows],
            balanced=bench.unbalanced,
            reference=features[bench.pool],
            seed=bench.settings.seed,
        )
        margin, other = doubt(support, labels)
        agreed = {
            int(each): float((margin[labels == place] <= 0).mean()) for place, each in enumerate(judged)
        }
        known = {suspect["name"] for suspect in suspects}
        suspects += [
            _suspect(bench, rows[place], judged[other[place]], round(float(margin[place]), 3))
            for place in np.argsort(-margin, kind="stable").tolist()
            if margin[place] > 0 and bench.names[rows[place]] not in known
        ]
    for suspect in suspects[:SUSPECTS]:
        row = bench.names.index(suspect["name"])
        suspect["thumbnail"] = encode_thumbnail(bench.cache.evaluations[row])
    found = {
        "signature": signature,
        "checked": len(rows) if agreed else 0,
        "groups": len(np.unique(bench.groups[rows])) if agreed else 0,
        "unlabeled": len(bench.pool) - len(bench.labeled),
        "doubted": len(suspects),
        "suspects": suspects,
        "classes": _classes(bench, agreed),
    }
    rundir.write_json(file, found)


def _suspect(bench: Bench, row: int, looks_like: int, margin: float | None) -> dict[str, Any]:
    """A label that looks wrong; without a margin because an exact copy has another label."""
    return {
        "name": bench.names[row],
        "label": bench.classes[bench.labels[row]],
        "looks_like": bench.classes[looks_like],
        "doubt": margin,
        "has_other_copy": margin is None,
    }


def _contradicting_copies(bench: Bench) -> list[dict[str, Any]]:
    """Labeled images of which an exact copy has another label."""
    groups: dict[int, list[int]] = defaultdict(list)
    for row in bench.labeled.tolist():
        groups[int(bench.cache.keys[row])].append(row)
    found = []
    for rows in groups.values():
        for row in rows:
            others = [bench.labels[copy] for copy in rows if bench.labels[copy] != bench.labels[row]]
            found += [_suspect(bench, row, others[0], None)] if others else []
    return found


def _classes(bench: Bench, agreed: dict[int, float]) -> list[dict[str, Any]]:
    """Each class with its labels and the share of them that look right, those that cannot be judged and the lowest first."""
    sizes = np.bincount(bench.labels[bench.labeled], minlength=len(bench.classes))
    found = [
        {"name": name, "labels": int(sizes[place]), "agreed": agreed.get(place)}
        for place, name in enumerate(bench.classes)
    ]
    return sorted(found, key=lambda entry: (entry["agreed"] or 0.0, entry["labels"]))
