"""Train one classifier on few labels: from the run's encoder, or from random weights.

The supervised baseline is this same code, started from random weights, with a rate of its own, more
steps, and the choice between light and strong augmentation.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labelwise import rundir, seeding
from labelwise.errors import CheckpointError, UsageError
from labelwise.images.cache import ImageCache
from labelwise.learning.optimization import Diverged, create_optimizer, set_rate, update, warmup_cosine
from labelwise.learning.precision import Precision, arrange_images
from labelwise.measures.linear import Probe
from labelwise.models.encoder import EncoderSpec, create_encoder
from labelwise.models.features import extract_features
from labelwise.models.heads import keep_first_layer
from labelwise.models.weights import load_module, read_hash, read_metadata, read_spec
from labelwise.rundir import RunDirectory
from labelwise.views.draws import Policy
from labelwise.views.pipeline import Normalization, Views, make_views

Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

WARMUP_SHARE = 0.05


@dataclass(frozen=True)
class Trial:
    """One way to train a classifier; a method may choose between a few of them inside the labels.

    Attributes:
        name: In words, for the report.
        steps: Optimizer steps.
        batch_size: Images per step; a smaller label set is repeated to fill it.
        trunk_rate, head_rate: Peak AdamW rates of the network and of the last layer.
        weight_decay: Of all weights.
        policy: Augmentation.
    """

    name: str
    steps: int
    batch_size: int
    trunk_rate: float
    head_rate: float
    weight_decay: float
    policy: Policy


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
    def start_from(self, probe: Probe) -> None:
        """Begin where the linear probe ended (Kumar et al. 2022, arXiv 2202.10054: LP-FT)."""
        weight, bias = probe.folded()
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


def train_classifier(
    classifier: Classifier,
    trial: Trial,
    cache: ImageCache,
    rows: Rows,
    labels: npt.NDArray[np.int64],
    class_weights: Tensor,
    normalization: Normalization,
    precision: Precision,
    device: torch.device,
    seed: int,
    before_step: Callable[[], None],
    views: Views = make_views,
) -> None:
    """Train a classifier in place; the last step is what counts, nothing is picked on the way.

    Args:
        classifier: On `device`.
        trial: How.
        cache: Holds the images.
        rows: Cache rows of the labeled images, (n,).
        labels: Their class indices, (n,).
        class_weights: Weight of each class in the loss, (C,).
        normalization: Mean and standard deviation per channel.
        precision: Number type and layout.
        device: Where.
        seed: Of order and augmentation.
        before_step: Called before each step; what it raises ends the training.
        views: What makes the augmented images.

    Raises:
        Diverged: As in `update`; the classifier is then half trained, and for nothing.
    """
    precision.arrange(classifier.network)
    optimizer = create_optimizer(
        "adamw",
        [(classifier.network, trial.trunk_rate), (classifier.linear, trial.head_rate)],
        trial.weight_decay,
    )
    sizes, keys = cache.sizes[rows], cache.keys[rows]
    targets = torch.from_numpy(labels).to(device)
    warmup_steps = max(1, round(WARMUP_SHARE * trial.steps))
    classifier.train()

    for step in range(trial.steps):
        before_step()
        members = _batch(step, len(rows), trial.batch_size, seed)
        draw_keys = seeding.combine(keys[members], np.arange(len(members), dtype=np.uint64))
        squares = torch.from_numpy(cache.squares[rows[members]]).to(device)  # (B, S, S, 3)
        images = views(trial.policy, squares, sizes[members], draw_keys, seed, step, (0,), normalization)
        images = arrange_images(images, precision)
        set_rate(optimizer, warmup_cosine(step, trial.steps, warmup_steps))
        with precision.autocast(device):
            logits = classifier(images)  # (B, C)
        loss = F.cross_entropy(logits.float(), targets[members], weight=class_weights)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        update(optimizer, loss)
    classifier.eval()


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


def class_weights(labels: npt.NDArray[np.int64], classes: int, *, balanced: bool) -> Tensor:
    """Weight of each class in the loss: inverse to its size when `balanced`, else 1, (C,)."""
    if not balanced:
        return torch.ones(classes)
    counts = np.bincount(labels, minlength=classes)
    return torch.from_numpy(len(labels) / (classes * np.maximum(counts, 1))).float()


def strengthen(policy: Policy, *, strong: bool, crop_scale: tuple[float, float]) -> Policy:
    """Make the training augmentation of classifiers from the views of pretraining.

    Light is crop and flip; strong keeps everything the views have, with a gentler crop.
    """
    policy = dataclasses.replace(policy, crop_scale=crop_scale)
    if strong:
        return policy
    return dataclasses.replace(
        policy, color=0.0, grayscale=0.0, blur=0.0, rotation=0.0, shear=0.0, intensity=0.0
    )


def _batch(step: int, count: int, batch_size: int, seed: int) -> Rows:
    """Members of one batch: whole shuffled passes over the labels, cut into batches, (B,).

    No label is left out by a short last batch, however few there are.
    """
    batch_size = min(batch_size, count * max(1, batch_size // count))
    first = step * batch_size
    passes = range(first // count, (first + batch_size - 1) // count + 1)
    order = np.concatenate([seeding.permutation(seed, number, count) for number in passes])
    start = first - passes[0] * count
    return order[start : start + batch_size]
