"""Labels that look wrong, test images that look like training images: found after a comparison, for a person to look at.

Nothing is changed by it.
"""

from collections import defaultdict
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from labelwise import rundir, terminal
from labelwise.images.grouping import SMALLEST
from labelwise.measures.knn import resembling
from labelwise.measures.label_check import class_support, doubt, judged_classes
from labelwise.models.features import extract_features
from labelwise.stages.methods import Bench, frozen_features, frozen_network
from labelwise.stages.reporting import SUSPECTS
from labelwise.views.mosaic import encode_thumbnail

_MARGIN = 0.05  # of a side, cropped at each end
_PICTURED = 12  # pairs
_CHUNK = 512


def check_labels(bench: Bench, signature: str) -> None:
    """Write how well each label outside the test set fits its image, least fitting first, the first ones with pictures.

    What belongs together is not heard about each other. Exact copies count once; those with different labels come before
    all others. Test labels are not judged: to mend only those that a model doubts would favour that model.

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
        "copies": sum(suspect["has_other_copy"] for suspect in suspects),
        "suspects": suspects,
        "classes": _classes(bench, agreed),
    }
    rundir.write_json(file, found)


def check_lookalikes(bench: Bench, signature: str) -> None:
    """Write which test images are as like another image, to the encoder, as they are like a slight crop of themselves.

    Those may be near-copies that the search by pixels missed, or the same scene once more. They stay in the test set: what an
    encoder finds alike is its own opinion. The report tells the gain without them.

    Args:
        bench: What was compared on; with folds, or images too small to tell, nothing is written.
        signature: As in `check_labels`.
    """
    file = bench.run.lookalikes
    before = rundir.read_derived(file)
    if before is not None and before["signature"] == signature:
        return
    file.unlink(missing_ok=True)
    rows = bench.test[bench.cache.sizes[bench.test].min(axis=1) >= SMALLEST]
    if bench.folds or not len(rows) or bench.spec.image_size < SMALLEST:
        return
    features, network = torch.from_numpy(frozen_features(bench, "encoder")), frozen_network(bench, "encoder")
    altered = []
    for chunk in np.split(rows, range(_CHUNK, len(rows), _CHUNK)):
        pixels, everything = _crop_a_little(bench.cache.evaluations[chunk]), np.arange(len(chunk))
        altered.append(extract_features(network, pixels, everything, bench.spec.normalization, bench.device))
    pairs: list[dict[str, Any]] = []
    for query, near, similarity, own in resembling(features[rows], torch.cat(altered), features[bench.pool]):
        both = (rows[query], bench.pool[near])
        pair = {
            "names": [bench.names[row] for row in both],
            "other_label": bool(0 <= bench.labels[both[1]] != bench.labels[both[0]]),
            "similarity": round(similarity, 3),
            "own": round(own, 3),
        }
        if len(pairs) < _PICTURED:
            pair["thumbnails"] = [encode_thumbnail(bench.cache.evaluations[row]) for row in both]
        pairs.append(pair)
    rundir.write_json(file, {"signature": signature, "tested": len(rows), "pairs": pairs})


def _crop_a_little(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The middle of images, nine tenths of each side, at their size again, uint8, (M, E, E, 3)."""
    size = pixels.shape[1]
    margin = max(1, round(_MARGIN * size))
    images = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).float()
    images = images[:, :, margin : size - margin, margin : size - margin]
    grown = F.interpolate(images, size=(size, size), mode="bicubic", antialias=True)
    cropped: npt.NDArray[np.uint8] = grown.clamp(0, 255).round().byte().permute(0, 2, 3, 1).numpy()
    return cropped


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
