"""What a user could have without pretraining: networks that others trained, with a linear probe or fine-tuned whole.

They are asked for by name (`--methods simclr,supervised,dinov2_probe`) or by a file that names weights of one's own.
timm fetches its weights once; weights that cannot be had are left out of the comparison, and it is said why.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from labelwise import terminal
from labelwise.config import ALTERNATIVES, OwnWeights, read_own_weights
from labelwise.errors import DataError, UsageError
from labelwise.images.cache import read_evaluations
from labelwise.models.encoder import EncoderSpec, create_encoder, keep_resolution, pretrained_spec
from labelwise.models.features import extract_features
from labelwise.models.weights import load_backbone
from labelwise.stages.classifier import Rows
from labelwise.stages.methods import Bench, Start

DINOV2 = "vit_small_patch14_dinov2.lvd142m"
_DINOV2_SIZE = 224  # timm's 518 takes six times as long
_CHUNK = 256
_REFERENCE = 2000  # images of the pool whose features set the scale of all


@dataclass(frozen=True)
class Alternative:
    """A network that others trained.

    Attributes:
        spec: How it is built, and the size, mean and spread of the images it takes.
        weights: A file; None for those that timm fetches.
        source: What was loaded and how, in words that change when either does.
        whole: It is fine-tuned, as our own encoder is; else it stays frozen, with a linear probe.
    """

    spec: EncoderSpec
    weights: Path | None
    source: str
    whole: bool = False


def find_alternatives(methods: tuple[str, ...], ours: EncoderSpec) -> dict[str, Alternative]:
    """The alternatives among the methods that were asked for, by name; files are replaced by what they name.

    Args:
        methods: Of the settings.
        ours: Of the run: ImageNet's is the same backbone, in its usual width. What is fine-tuned takes images of its size.

    Raises:
        UsageError: A file of own weights cannot be read.
    """
    makers: dict[str, Callable[[], Alternative]] = {}
    for method in methods:
        if method.endswith(".toml"):
            for name, own in read_own_weights(Path(method)).items():
                if name in makers:
                    raise UsageError(f"{method}: [{name}] is named in another file too.")
                makers[name] = partial(_own, own, ours)
        elif method == "imagenet":
            makers[method] = partial(_to_finetune, ours)
        elif method in ALTERNATIVES:
            known = (DINOV2, _DINOV2_SIZE) if method == "dinov2_probe" else (ours.backbone, None)
            makers[method] = partial(_of_timm, *known)
    found = {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except (DataError, UsageError) as error:
            terminal.warn(f"{name} is left out: {error}")
    return found


def add_alternative(bench: Bench, method: str, alternative: Alternative) -> None:
    """Compute the features that a probe needs: of the images that may be drawn or tested, and some of the pool.

    A network that is fine-tuned is kept too, as what each training starts from.

    Raises:
        DataError: The weights cannot be had or do not fit, or an image is gone.
    """
    network = create_encoder(alternative.spec, pretrained=alternative.weights is None)
    if alternative.weights is not None:
        load_backbone(alternative.weights, network)
    bench.precision.arrange(network).to(bench.device)
    reference = np.union1d(bench.labeled, bench.pool[:: max(1, len(bench.pool) // _REFERENCE)])
    rows = np.union1d(reference, bench.test)
    features = np.zeros((len(bench.names), network.features), dtype=np.float32)
    normalization = alternative.spec.normalization
    with terminal.track(f"features of {method}", len(rows)) as bar:
        for chunk, pixels in _evaluations(bench, rows, alternative.spec.image_size):
            everything = np.arange(len(chunk))
            found = extract_features(network, pixels, everything, normalization, bench.device)
            features[chunk] = found.numpy()
            bar.advance(len(chunk))
    if not np.isfinite(features).all():
        raise DataError("its features are not numbers.")
    bench.features[method], bench.references[method] = features, reference
    if alternative.whole:
        bench.starts[method] = Start(network.to("cpu"), alternative.spec)


def _evaluations(bench: Bench, rows: Rows, size: int) -> Iterable[tuple[Rows, npt.NDArray[np.uint8]]]:
    """Images of a size, in chunks of rows: from the cache where it holds that size, else from the files."""
    if size != bench.spec.image_size:
        return read_evaluations(bench.images, rows, size, bench.cache.intensity_range)
    chunks = np.split(rows, range(_CHUNK, len(rows), _CHUNK))
    return ((chunk, bench.cache.evaluations[chunk]) for chunk in chunks)


def _of_timm(backbone: str, image_size: int | None) -> Alternative:
    """Weights that timm fetches."""
    return Alternative(pretrained_spec(backbone, image_size), None, f"timm {backbone}")


def _to_finetune(ours: EncoderSpec) -> Alternative:
    """The weights that timm has of our backbone, to be fine-tuned on images of our size."""
    spec = keep_resolution(pretrained_spec(ours.backbone, ours.image_size))
    return Alternative(
        spec, None, f"timm {ours.backbone}, {spec.image_size} px, {spec.stem} stem", whole=True
    )


def _own(own: OwnWeights, ours: EncoderSpec) -> Alternative:
    """Weights of the user's own; what their file does not say is as in timm's."""
    if own.finetune and own.image_size not in (None, ours.image_size):
        raise UsageError(
            f"image_size = {own.image_size}: with finetune = true it takes the images of this run, {ours.image_size} px."
        )
    size = ours.image_size if own.finetune else own.image_size
    if size and own.mean and own.std:
        spec = EncoderSpec(own.backbone, own.backbone_args, "stock", size, own.mean, own.std)
    else:
        usual = pretrained_spec(own.backbone, size)
        mean, std = own.mean or usual.mean, own.std or usual.std
        spec = replace(usual, backbone_args=own.backbone_args, mean=mean, std=std)
    if own.finetune:
        spec = keep_resolution(spec)
    try:
        with own.weights.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{own.weights}: cannot be read ({error.strerror or error}).") from None
    how = f"{spec} fine-tuned" if own.finetune else f"{spec}"
    made = hashlib.sha256(f"{digest} {how}".encode()).hexdigest()
    return Alternative(spec, own.weights, f"{own.weights.name} {made[:16]}", own.finetune)
