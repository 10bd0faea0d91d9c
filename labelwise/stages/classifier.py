"""The classifier that `finetune` trains and keeps, and what it says of images."""

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labelwise import rundir
from labelwise.errors import CheckpointError, UsageError
from labelwise.images.cache import ImageCache
from labelwise.learning.optimization import Diverged
from labelwise.models.encoder import EncoderSpec, create_encoder
from labelwise.models.features import extract_features
from labelwise.models.heads import keep_first_layer
from labelwise.models.weights import load_module, read_hash, read_metadata, read_spec
from labelwise.rundir import RunDirectory
from labelwise.views.pipeline import Normalization

Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class Classifier(nn.Module):
    """A network and a linear layer on its features: (B, 3, H, W) -> (B, C)."""

    def __init__(self, network: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.network = network
        self.linear = nn.Linear(width, classes)
        nn.init.zeros_(self.linear.weight)  # SimCLR, official code: `zero_init_logits_layer`
        nn.init.zeros_(self.linear.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Score normalised images."""
        logits: Tensor = self.linear(self.network(images))
        return logits

    @torch.no_grad()
    def start_from(self, weight: Floats, bias: Floats) -> None:
        """Begin where a linear probe ended, (C, F) and (C,) (Kumar et al. 2022, arXiv 2202.10054: LP-FT)."""
        self.linear.weight.copy_(torch.from_numpy(weight))
        self.linear.bias.copy_(torch.from_numpy(bias))

    @torch.no_grad()
    def cool(self, temperature: float) -> None:
        """Divide all scores by a temperature."""
        self.linear.weight.div_(temperature)
        self.linear.bias.div_(temperature)


def load_classifier(run: RunDirectory) -> tuple[Classifier, EncoderSpec, list[str]]:
    """Build the classifier that a run kept, calibrated and in evaluation mode, with its classes in the order of its outputs.

    Raises:
        UsageError: None was trained yet.
        CheckpointError: It is damaged, or its classes are those of other weights.
    """
    facts = rundir.read_derived(run.classifier_json)
    if facts is None or not run.classifier.exists():
        kind = CheckpointError if run.classifier_json.exists() else UsageError
        raise kind(
            f"{run.path}: has no classifier yet; `labelwise finetune --run {run.path}` trains one on your labels."
        )
    spec, classes = read_spec(run.classifier), list(facts["classes"])
    network, width = keep_first_layer(create_encoder(spec), run.head, read_metadata(run.head))
    classifier = Classifier(network, width, len(classes))
    load_module(run.classifier, classifier)
    learned = read_metadata(run.classifier).get("classes")  # earlier versions wrote none
    if learned is not None and learned != json.dumps(classes, ensure_ascii=False):
        raise CheckpointError(
            f"{run.classifier_json}: its classes are not those that {run.classifier.name} was trained on; put both back from one copy, or delete "
            f"them and run `labelwise finetune --run {run.path}` again."
        )
    calibration = read_calibration(run)
    if calibration is not None:
        classifier.cool(calibration["temperature"])
    return classifier.eval(), spec, classes


def read_calibration(run: RunDirectory) -> dict[str, Any] | None:
    """What is known of how far the kept classifier is to be believed; None where nothing is, or it is of another classifier."""
    facts = rundir.read_derived(run.calibration)
    return facts if facts is not None and facts["classifier"] == read_hash(run.classifier) else None


def predict(
    classifier: Classifier, cache: ImageCache, rows: Rows, normalization: Normalization, device: torch.device
) -> Floats:
    """Class probabilities of images, (M, C).

    Raises:
        Diverged: As in `chances_of`.
    """
    return chances_of(extract_features(classifier, cache.evaluations, rows, normalization, device))


def chances_of(logits: Tensor) -> Floats:
    """Class probabilities from what a classifier says, (M, C) -> (M, C).

    Raises:
        Diverged: They are not finite numbers.
    """
    if not logits.isfinite().all():
        raise Diverged("what it predicts is not finite")
    return F.softmax(logits, dim=1).numpy()
