"""Encoders by real timm with random weights, heads, files of weights, frozen features."""

import json
import time
from collections import Counter
from collections.abc import Generator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from labelwise.errors import CheckpointError, UsageError
from labelwise.models.encoder import Encoder, EncoderSpec, choose_stem, create_encoder
from labelwise.models.features import extract_features, map_in_streams
from labelwise.models.heads import create_head, keep_first_layer
from labelwise.models.weights import load_encoder, load_module, read_metadata, save_encoder, save_module

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
NARROW = {"layers": [1, 1, 1, 1], "channels": [8, 16, 16, 24]}


def _spec(backbone: str = "resnet18", stem: str = "small", size: int = 32, **arguments) -> EncoderSpec:
    return EncoderSpec(backbone, arguments, stem, size, MEAN, STD)


def _images(size: int, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _run(encoder: Encoder, path: str, size: int) -> tuple[torch.Tensor, int]:
    """Features of two images, and the side of the grid that comes out of one module on the way."""
    seen: list[torch.Size] = []
    module = encoder.backbone.get_submodule(path)
    module.register_forward_hook(lambda module, given, output: seen.append(output.shape))
    features = encoder(_images(size))
    shape = seen[0]  # tokens (B, N, F) or a grid (B, F, H, W)
    return features, int(shape[1] ** 0.5) if len(shape) == 3 else shape[-1]


# --- encoders


@pytest.mark.parametrize(
    ("backbone", "stem", "size", "module", "side"),
    [
        ("resnet18", "small", 32, "maxpool", 32),
        ("resnet18", "half", 32, "maxpool", 16),
        ("resnet18", "stock", 32, "maxpool", 8),
        ("resnet18", "stock", 96, "maxpool", 24),
        ("resnet50", "small", 32, "maxpool", 32),
        ("resnet50", "half", 32, "maxpool", 16),
        ("resnet50", "stock", 96, "maxpool", 24),
        ("efficientnet_b0", "small", 32, "conv_stem", 32),
        ("efficientnet_b0", "stock", 96, "conv_stem", 48),
        ("regnety_002", "small", 32, "stem", 32),
        ("regnety_002", "stock", 96, "stem", 48),
        ("convnext_atto", "small", 32, "stem", 32),
        ("convnext_atto", "stock", 96, "stem", 24),
        ("vit_tiny_patch16_224", "small", 32, "patch_embed", 8),
        ("vit_tiny_patch16_224", "stock", 96, "patch_embed", 6),
        ("mobilenetv3_small_050", "small", 32, "conv_stem", 32),
        ("mobilenetv3_small_050", "stock", 96, "conv_stem", 48),
    ],
)
def test_the_stem_leaves_a_grid_of_the_right_size(
    backbone: str, stem: str, size: int, module: str, side: int
) -> None:
    encoder = create_encoder(_spec(backbone, stem, size))
    assert encoder.training
    features, found = _run(encoder, module, size)
    assert found == side
    assert features.shape == (2, encoder.features)
    assert features.isfinite().all()
    assert not torch.equal(features[0], features[1])


def test_the_small_stem_of_a_resnet_is_that_of_the_paper() -> None:
    backbone = create_encoder(_spec("resnet18", "small")).backbone
    assert (backbone.conv1.kernel_size, backbone.conv1.stride) == ((3, 3), (1, 1))  # SimCLR, App. B.9
    assert isinstance(backbone.maxpool, nn.Identity)


def test_arguments_of_the_backbone_reach_timm() -> None:
    encoder = create_encoder(_spec(**NARROW))
    assert encoder.features == 24
    assert encoder.backbone.conv1.out_channels == 64  # timm keeps the stem's own width
    assert len(encoder.backbone.layer1) == 1


def test_an_unknown_backbone_suggests_names() -> None:
    with pytest.raises(UsageError) as caught:
        create_encoder(_spec("resnet19"))
    words = str(caught.value)
    assert words.startswith("backbone 'resnet19': timm has no such model; did you mean ")
    assert "resnet18" in words


def test_a_backbone_like_no_other_says_where_the_list_is() -> None:
    with pytest.raises(UsageError, match=r"timm has no such model; timm\.list_models\(\) lists all\."):
        create_encoder(_spec("qqqqqqqq"))


def test_an_unknown_tag_of_a_known_backbone_is_an_error_of_the_user() -> None:
    with pytest.raises(UsageError, match=r"resnet18\.no_such_tag"):
        create_encoder(_spec("resnet18.no_such_tag"))
    with pytest.raises(UsageError, match=r"resnet18\.no_such_tag"):
        choose_stem("resnet18.no_such_tag", {}, 32, "auto")


def test_arguments_that_timm_refuses_are_named() -> None:
    with pytest.raises(UsageError, match=r"backbone 'resnet18' with .*no_such_argument.*timm refuses this"):
        create_encoder(_spec(no_such_argument=3))
    with pytest.raises(UsageError, match="timm refuses this"):
        choose_stem("resnet18", {"no_such_argument": 3}, 32, "auto")
    with pytest.raises(UsageError, match=r"'channels': 8.*timm refuses this: TypeError: "):
        create_encoder(_spec(channels=8))
    with pytest.raises(UsageError, match=r"'block': 'x'.*timm refuses this: AttributeError: "):
        create_encoder(_spec(block="x"))
    with pytest.raises(UsageError, match="timm refuses this"):
        choose_stem("resnet18", {"block": 1}, 32, "auto")
    with pytest.raises(UsageError, match=r"'in_chans': 1.*timm refuses this: RuntimeError: "):
        create_encoder(_spec(in_chans=1))


# --- choice of the stem


@pytest.mark.parametrize(
    "backbone",
    ["resnet18", "resnet50", "efficientnet_b0", "regnety_002", "convnext_atto", "vit_tiny_patch16_224"],
)
def test_small_images_get_a_small_stem_and_large_ones_the_stock_one(backbone: str) -> None:
    stem, reason = choose_stem(backbone, {}, 32, "auto")
    assert stem == "small"
    assert reason == "images of 32 px lose too much in a stock stem"
    assert choose_stem(backbone, {}, 95, "auto")[0] == "small"
    assert choose_stem(backbone, {}, 96, "auto") == ("stock", "")


def test_a_backbone_without_a_known_small_stem_keeps_its_own_and_it_is_said() -> None:
    stem, reason = choose_stem("densenet121", {}, 32, "auto")
    assert stem == "stock"
    assert "no small-image stem is known for densenet121: at 32 px it may learn little" in reason
    assert "use a larger --image-size" in reason
    assert choose_stem("densenet121", {}, 96, "auto") == ("stock", "")


def test_a_stem_that_was_asked_for_is_taken_without_comment() -> None:
    assert choose_stem("resnet18", {}, 224, "small") == ("small", "")
    assert choose_stem("resnet18", {}, 32, "stock") == ("stock", "")
    assert choose_stem("resnet18", {}, 32, "half") == ("half", "")


def test_a_stem_that_the_backbone_cannot_have_is_refused() -> None:
    with pytest.raises(UsageError, match="--stem small: no small-image stem is known for densenet121"):
        choose_stem("densenet121", {}, 32, "small")
    with pytest.raises(UsageError, match="--stem half: efficientnet_b0 has no pooling in its stem"):
        choose_stem("efficientnet_b0", {}, 32, "half")


# --- files of weights


def test_a_spec_survives_the_header_of_a_file() -> None:
    spec = EncoderSpec(
        "vit_tiny_patch16_224", {"depth": 2, "x": "ä", "y": [1.5, None]}, "half", 48, MEAN, STD
    )
    metadata = spec.to_metadata()
    assert all(isinstance(value, str) for value in metadata.values())
    assert EncoderSpec.from_metadata(metadata) == spec


@pytest.mark.parametrize(
    ("backbone", "stem", "arguments"),
    [
        ("resnet18", "small", NARROW),
        ("resnet18", "half", NARROW),
        ("vit_tiny_patch16_224", "small", {"depth": 1}),
    ],
)
def test_a_loaded_encoder_gives_the_same_features_to_the_bit(
    tmp_path: Path, backbone: str, stem: str, arguments: dict[str, object]
) -> None:
    spec = _spec(backbone, stem, 16, **arguments)
    encoder = create_encoder(spec)
    with torch.no_grad():
        encoder(_images(16, 8))  # moves the running statistics
        expected = encoder.eval()(_images(16))
        save_encoder(tmp_path / "encoder.safetensors", encoder, spec)
        for place in (tmp_path, tmp_path / "encoder.safetensors", str(tmp_path)):
            loaded, loaded_spec = load_encoder(place)
            assert not loaded.training
            assert loaded_spec == spec
            assert loaded.features == encoder.features
            assert torch.equal(loaded(_images(16)), expected)


def test_timm_loads_the_weights_as_they_are(tmp_path: Path) -> None:
    spec = _spec("resnet18", "stock", 96)
    encoder = create_encoder(spec)
    save_encoder(tmp_path / "encoder.safetensors", encoder, spec)
    model = timm.create_model("resnet18", num_classes=0)
    model.load_state_dict(load_file(tmp_path / "encoder.safetensors"))
    with torch.no_grad():
        assert torch.equal(model.eval()(_images(96)), encoder.eval()(_images(96)))


def test_a_missing_encoder_says_that_pretraining_is_not_done(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"encoder\.safetensors: missing; pretraining has not finished"):
        load_encoder(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not weights at all", b"\x10\x00\x00\x00\x00\x00\x00\x00{"])
def test_a_damaged_encoder_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "encoder.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"encoder\.safetensors: damaged"):
        load_encoder(tmp_path)


def test_weights_that_are_not_ours_are_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "encoder.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="not an encoder of Labelwise"):
        load_encoder(tmp_path)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    save_module(tmp_path / "head.safetensors", nn.Linear(3, 2), {})
    with pytest.raises(CheckpointError, match=r"head\.safetensors: cannot be loaded"):
        load_module(tmp_path / "head.safetensors", nn.Linear(4, 2))


# --- heads


def _kinds(layer: nn.Module) -> list[str]:
    return [type(part).__name__ for part in layer]


def test_without_a_head_the_loss_sees_the_features() -> None:
    features = torch.randn(4, 10)
    assert create_head("none", 10)(features) is features


def test_a_linear_head_has_one_layer() -> None:
    head = create_head("linear", 10, output=6)
    assert len(head) == 1
    assert head(torch.randn(4, 10)).shape == (4, 6)


@pytest.mark.parametrize("width", [None, 14])
@pytest.mark.parametrize("layers", [2, 3])
def test_a_nonlinear_head_has_the_layers_of_the_official_code(layers: int, width: int | None) -> None:
    head = create_head("nonlinear", 10, layers, width, output=6)
    assert len(head) == layers
    assert [_kinds(layer) for layer in head[:-1]] == [["Linear", "BatchNorm1d", "ReLU"]] * (layers - 1)
    assert _kinds(head[-1]) == ["Linear", "BatchNorm1d"]
    hidden = width or 10
    sizes = [(layer[0].in_features, layer[0].out_features) for layer in head]
    assert sizes == [(10, hidden), *[(hidden, hidden)] * (layers - 2), (hidden, 6)]
    assert head(torch.randn(4, 10)).shape == (4, 6)


@pytest.mark.parametrize(("kind", "layers"), [("linear", 1), ("nonlinear", 2), ("nonlinear", 3)])
def test_every_dense_layer_is_without_bias_and_followed_by_batch_norm(kind: str, layers: int) -> None:
    # Official code, model_util.projection_head: linear_layer(..., use_bias=False, use_bn=True)
    modules = [
        module
        for module in create_head(kind, 10, max(2, layers)).modules()
        if isinstance(module, nn.Linear | nn.BatchNorm1d)
    ]
    assert [type(module) for module in modules] == [nn.Linear, nn.BatchNorm1d] * layers
    assert all(module.bias is None for module in modules[::2])


def _saved_head(tmp_path: Path, layers: int, width: int | None) -> tuple[Encoder, nn.Module, dict[str, str]]:
    torch.manual_seed(0)
    encoder = Encoder(nn.Flatten(), 3 * 4 * 4)
    head = create_head("nonlinear", encoder.features, layers, width, 6)
    with torch.no_grad():
        head(2 * torch.randn(32, encoder.features) + 1)  # moves the running statistics
    metadata = {"kind": "nonlinear", "layers": str(layers), "width": str(width or ""), "output": "6"}
    save_module(tmp_path / "head.safetensors", head, metadata)
    assert read_metadata(tmp_path / "head.safetensors") == metadata
    return encoder, head, metadata


@pytest.mark.parametrize("width", [None, 14])
def test_fine_tuning_starts_from_the_first_of_three_layers(tmp_path: Path, width: int | None) -> None:
    encoder, head, metadata = _saved_head(tmp_path, 3, width)
    network, features = keep_first_layer(encoder, tmp_path / "head.safetensors", metadata)
    assert features == (width or 48)
    with torch.no_grad():
        expected = head.eval()[0](encoder(_images(4, 5)))
        assert torch.equal(network(_images(4, 5)), expected)
    assert expected.shape == (5, features)


def test_a_head_of_two_layers_is_thrown_away_whole(tmp_path: Path) -> None:
    encoder, _, metadata = _saved_head(tmp_path, 2, 14)
    network, features = keep_first_layer(encoder, tmp_path / "head.safetensors", metadata)
    assert network is encoder
    assert features == encoder.features


# --- frozen features


@pytest.mark.parametrize("training", [True, False])
def test_features_equal_a_direct_computation_and_leave_the_network_alone(training: bool) -> None:
    encoder = create_encoder(_spec(size=16, **NARROW)).train(training)
    with torch.no_grad():
        encoder.train()(_images(16, 8))
    encoder.train(training)
    pixels = np.random.default_rng(0).integers(0, 256, (300, 16, 16, 3), dtype=np.uint8)
    rows = np.random.default_rng(1).permutation(300)[:280]  # more than one chunk
    before = {key: value.clone() for key, value in encoder.state_dict().items()}

    found = extract_features(encoder, pixels, rows, (MEAN, STD), torch.device("cpu"))

    assert encoder.training is training
    assert all(module.training is training for module in encoder.modules())
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    assert (found.shape, found.dtype) == ((280, 24), torch.float32)
    scaled = (pixels[rows[:20]] / 255 - np.array(MEAN)) / np.array(STD)  # (20, 16, 16, 3)
    with torch.no_grad():
        expected = encoder.eval()(torch.from_numpy(scaled.transpose(0, 3, 1, 2)).float())
    assert found[:20].numpy() == pytest.approx(expected.numpy(), abs=1e-5)


def test_features_of_one_image_do_not_depend_on_its_neighbours() -> None:
    encoder = create_encoder(_spec(size=16, **NARROW))
    pixels = np.random.default_rng(0).integers(0, 256, (30, 16, 16, 3), dtype=np.uint8)
    together, alone = (
        extract_features(encoder, pixels, rows, (MEAN, STD), torch.device("cpu"))
        for rows in (np.arange(30), np.array([17]))
    )
    assert together[17].numpy() == pytest.approx(alone[0].numpy(), abs=1e-5)


def test_the_header_of_an_encoder_is_text_that_other_programs_can_read(tmp_path: Path) -> None:
    spec = _spec(**NARROW)
    save_encoder(tmp_path / "encoder.safetensors", create_encoder(spec), spec)
    header = {
        key: json.loads(value) for key, value in read_metadata(tmp_path / "encoder.safetensors").items()
    }
    assert header == {
        "backbone": "resnet18",
        "backbone_args": NARROW,
        "stem": "small",
        "image_size": 32,
        "mean": list(MEAN),
        "std": list(STD),
    }


def test_each_device_is_asked_about_one_chunk_at_a_time() -> None:
    at_work, most, shares = Counter[str](), Counter[str](), Counter[str]()

    def work(name: str, number: int) -> int:
        at_work[name] += 1
        most[name] = max(most[name], at_work[name])
        shares[name] += 1
        time.sleep(0.02 if name == "slow" else 0.002)
        at_work[name] -= 1
        return number

    works = [partial(work, "slow"), partial(work, "fast")]
    found = map_in_streams(works, (number for number in range(40)), torch.device("cpu"))
    assert list(found) == list(range(40))
    assert most == {"slow": 1, "fast": 1}
    assert shares["fast"] > shares["slow"] > 0


@pytest.mark.parametrize("threads", [1, 3])
def test_streams_give_what_comes_out_in_order_and_leave_torch_its_threads(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    taken: list[int] = []

    def slow_at_first(number: int) -> tuple[int, int]:
        time.sleep(0.05 if number == 0 else 0)
        return number, torch.get_num_threads()

    def given() -> Generator[int, None, None]:
        for number in range(20):
            taken.append(number)
            yield number

    try:
        found = map_in_streams([slow_at_first], given(), torch.device("cpu"))
        first = next(found)
        assert len(taken) <= threads + 1, "images that are not asked about yet are not held"
        assert [first, *found] == [(number, 1) for number in range(20)]
        assert torch.get_num_threads() == threads
        numbers = (number for number in range(5))
        with pytest.raises(ZeroDivisionError):
            list(map_in_streams([lambda number: 1 // number], numbers, torch.device("cpu")))
        assert list(numbers) == [], "closed, whatever still refers to it"
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
