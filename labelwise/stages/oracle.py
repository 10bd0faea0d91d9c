"""The kept classifier as it is asked about images: its classes, how sure it is, which sets it promises, and what it does not know."""

import copy
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from labelwise import terminal
from labelwise.errors import CheckpointError, LabelwiseError, UsageError
from labelwise.learning.optimization import Diverged
from labelwise.measures.calibration import quantile_of_next
from labelwise.models.encoder import EncoderSpec
from labelwise.models.familiar import Familiar, load_familiar
from labelwise.models.features import extract_features
from labelwise.models.weights import read_hash
from labelwise.rundir import RunDirectory
from labelwise.stages.classifier import Classifier, chances_of, load_classifier
from labelwise.tables import FLAG, NUMBER, TEXT, TEXTS, Columns

COVERAGE = 0.9
FEWEST_FOR_SETS = 50  # labels, independent of each other
DOUBTFUL = 0.5  # confidence below which a classifier without sets abstains
_ROUNDED = 5e-7  # scores are kept with six digits


@dataclass(frozen=True)
class Promise:
    """What the sets of classes promise.

    Attributes:
        coverage: Share of images whose set holds the right class.
        labels: Independent ones that it rests on.
        limit: A class is in a set where 1 minus its probability is not above it.
    """

    coverage: float
    labels: int
    limit: float


class _Speaker(nn.Module):
    """Images to the scores of a classifier, and behind them how far they lie: (B, 3, H, W) -> (B, C + 1)."""

    def __init__(self, classifier: Classifier, familiar: Familiar | None) -> None:
        super().__init__()
        self.classifier, self.familiar = classifier, familiar

    def forward(self, images: Tensor) -> Tensor:
        features = self.classifier.network(images)
        scores = self.classifier.linear(features)
        distances = scores.new_zeros(len(scores)) if self.familiar is None else self.familiar(features)
        return torch.cat([scores, distances[:, None]], dim=1)


@dataclass(frozen=True)
class Oracle:
    """A classifier, and all it takes to ask it and to believe it."""

    speaker: _Speaker
    spec: EncoderSpec
    classes: list[str]
    promise: Promise | None
    place: torch.device
    source: Path

    def on(self, place: torch.device) -> "Oracle":
        """The same on another device; what it says of an image does not depend on which."""
        return replace(self, speaker=copy.deepcopy(self.speaker).to(place), place=place)

    def columns(self, *, probabilities: bool) -> Columns:
        """Of the table."""
        return {
            **{"file": TEXT, "label": TEXT, "confidence": NUMBER, "second_label": TEXT, "second_confidence": NUMBER},
            **({"set": TEXTS} if self.promise is not None else {}),
            "abstain": FLAG,
            **({"far": FLAG} if self.speaker.familiar is not None else {}),
            **{f"p_{name}": NUMBER for name in self.classes if probabilities},
        }  # fmt: skip

    def tell(self, names: list[str], pixels: npt.NDArray[np.uint8]) -> dict[str, Any]:
        """All there is to say of images, by column.

        Raises:
            LabelwiseError: The classifier says no numbers.
        """
        rows = np.arange(len(names))
        said = extract_features(self.speaker, pixels, rows, self.spec.normalization, self.place)
        try:
            chances = chances_of(said[:, :-1])  # (B, C)
        except Diverged as error:
            raise LabelwiseError(
                f"{self.source}: {error}; train another with `labelwise finetune`."
            ) from None
        order = np.argsort(-chances, axis=1, kind="stable")
        first, second = order[:, :2].T
        named = np.array(self.classes, object)
        sets, familiar = None, self.speaker.familiar
        if self.promise is not None:
            is_in = 1 - np.take_along_axis(chances, order, axis=1) <= self.promise.limit + _ROUNDED
            sets = [named[each[held]].tolist() for each, held in zip(order, is_in, strict=True)]
        return {
            "file": names,
            "label": named[first].tolist(),
            "confidence": chances[rows, first],
            "second_label": named[second].tolist(),
            "second_confidence": chances[rows, second],
            "set": sets,
            "abstain": [len(each) != 1 for each in sets] if sets is not None else chances[rows, first] < DOUBTFUL,
            "far": (said[:, -1] > familiar.limit.cpu()).numpy() if familiar is not None else None,
            **{f"p_{name}": chances[:, index] for index, name in enumerate(self.classes)},
        }  # fmt: skip


def make_promise(
    run: RunDirectory, calibration: dict[str, Any] | None, coverage: float | None
) -> Promise | None:
    """What sets of classes are to promise; None where the labels are too few, and none were asked for.

    Raises:
        UsageError: They are too few for what was asked for.
    """
    scores = np.array(calibration["scores"] if calibration else [])
    if len(scores) < FEWEST_FOR_SETS:
        if coverage is None:
            return None
        why = f"calibrated on {len(scores)}; label more, then" if calibration else "not calibrated;"
        raise UsageError(
            f"--coverage {coverage:g}: sets of classes rest on {FEWEST_FOR_SETS} labels or more, and this classifier was {why} "
            f"`labelwise finetune --run {run.path}`."
        )
    share = COVERAGE if coverage is None else coverage
    limit = quantile_of_next(scores, share)
    if not 0 < share < 1 or math.isinf(limit):
        most = len(scores) / (len(scores) + 1)
        raise UsageError(
            f"--coverage {share:g}: give a number above 0 and at most {math.floor(1000 * most) / 1000:g}, which is what {len(scores):,} labels can promise."
        )
    return Promise(share, len(scores), limit)


def load_oracle(run: RunDirectory, promise: Promise | None, place: torch.device) -> Oracle:
    """Load the classifier of a run, and what tells what is far from its images."""
    classifier, spec, classes = load_classifier(run)
    familiar = None
    if run.familiar.exists():
        try:
            familiar = load_familiar(run.familiar, read_hash(run.classifier))
        except CheckpointError as error:
            terminal.warn(f"what is far is not told: {error}")
    if familiar is not None and familiar.limit.isinf():  # too few images to tell
        familiar = None
    speaker = _Speaker(classifier, familiar).to(place).eval()
    return Oracle(speaker, spec, classes, promise, place, run.classifier)
