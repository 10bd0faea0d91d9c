"""Which labels look wrong: found after a comparison, for a person to look at; nothing is changed by it."""

from typing import Any

import numpy as np
import numpy.typing as npt

from labelwise import rundir, terminal
from labelwise.measures.label_check import FEWEST_PER_CLASS, Floats, class_support, doubt
from labelwise.stages.finetuning import Rows
from labelwise.stages.methods import Bench, frozen_features
from labelwise.views.mosaic import encode_thumbnail

_SHOWN = 24  # suspects with a picture


def check_labels(bench: Bench, signature: str) -> None:
    """Write how well each label outside the test set fits its image, the least fitting with pictures.

    Test labels are not judged: to mend only those that a model doubts would favour that model.

    Args:
        bench: What was compared on.
        signature: Of settings and labels; what was written with the same is kept.
    """
    file = bench.run.label_check
    if file.exists() and rundir.read_json(file)["signature"] == signature:
        return
    file.unlink(missing_ok=True)
    rows = bench.labeled
    sizes = np.bincount(bench.labels[rows], minlength=len(bench.classes))
    judged = np.flatnonzero(sizes >= FEWEST_PER_CLASS)
    rows = rows[np.isin(bench.labels[rows], judged)]
    if len(judged) < 2:
        return
    terminal.say(f"looking for wrong labels among {len(rows):,}")
    features = frozen_features(bench, "encoder")
    labels = np.searchsorted(judged, bench.labels[rows])
    support = class_support(
        features[rows],
        labels,
        len(judged),
        balanced=bench.unbalanced,
        reference=features[bench.pool],
        seed=bench.settings.seed,
    )
    margin, other = doubt(support, labels)
    torn = _differently_labeled_copies(bench, rows)
    order = np.lexsort((-margin, ~torn))
    suspects = [place for place in order.tolist() if torn[place] or margin[place] > 0]
    rundir.write_json(
        file,
        {
            "signature": signature,
            "checked": len(rows),
            "doubted": len(suspects),
            "suspects": [
                {
                    "name": bench.names[rows[place]],
                    "label": bench.classes[judged[labels[place]]],
                    "looks_like": bench.classes[judged[other[place]]],
                    "doubt": round(float(margin[place]), 3),
                    "is_copy": bool(torn[place]),
                    "thumbnail": encode_thumbnail(bench.cache.evaluations[rows[place]]),
                }
                for place in suspects[:_SHOWN]
            ],
            "classes": _classes(bench, judged, labels, margin),
        },
    )


def _differently_labeled_copies(bench: Bench, rows: Rows) -> npt.NDArray[np.bool_]:
    """Which of these images have an exact copy among them under another label, (n,)."""
    _, group = np.unique(bench.cache.keys[rows], return_inverse=True)
    lowest, highest = (np.full(group.max() + 1, start) for start in (len(bench.classes), -1))
    np.minimum.at(lowest, group, bench.labels[rows])
    np.maximum.at(highest, group, bench.labels[rows])
    torn: npt.NDArray[np.bool_] = (lowest < highest)[group]
    return torn


def _classes(bench: Bench, judged: Rows, labels: Rows, margin: Floats) -> list[dict[str, Any]]:
    """Each class with its labels and the share of them that the check agrees with, lowest first."""
    found = [
        {
            "name": bench.classes[each],
            "labels": int((labels == place).sum()),
            "agreed": float((margin[labels == place] <= 0).mean()),
        }
        for place, each in enumerate(judged.tolist())
    ]
    return sorted(found, key=lambda entry: (entry["agreed"], entry["labels"]))
