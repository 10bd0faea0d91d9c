"""Train one classifier on few labels: from the run's encoder, or from random weights.

The supervised baseline is this same code, started from random weights, with a rate of its own, more
steps, and the choice between light and strong augmentation.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from labelwise import seeding
from labelwise.images.cache import ImageCache
from labelwise.learning.optimization import create_optimizer, set_rate, update, warmup_cosine
from labelwise.learning.precision import Precision, arrange_images
from labelwise.stages.classifier import Classifier, Rows
from labelwise.views.draws import Policy
from labelwise.views.pipeline import Normalization, Views, make_views

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
