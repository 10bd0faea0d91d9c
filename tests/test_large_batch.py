"""A batch in parts against the same batch in one piece."""

import copy
import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from labelwise.learning.contrast import nt_xent
from labelwise.learning.large_batch import backward_in_parts, largest_part, step_bytes

BATCH = 24
MEMBERS = np.arange(BATCH)


def loss_of(projections: Tensor) -> Tensor:
    return nt_xent(projections, 0.2)


def make_views(members: npt.NDArray[np.int64]) -> Tensor:
    """Two views of each image, always the same for the same image, (2B, 3, 8, 8)."""
    both = [
        torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(2 * int(member) + view))
        for view in (0, 1)
        for member in members
    ]
    return torch.stack(both)


def network(norm: bool, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.BatchNorm2d(8) if norm else nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.Linear(72, 16),
    )


def gradients(module: nn.Module) -> Tensor:
    return torch.cat([each.grad.flatten() for each in module.parameters() if each.grad is not None])


def assert_same(
    found: Tensor, expected: Tensor, tolerance: float = 2e-6
) -> None:  # float32, summed in another order
    assert ((found - expected).abs().max() / expected.abs().max()).item() < tolerance


@pytest.mark.parametrize("part", [2, 6, 12])
def test_gradient_in_parts_equals_that_of_the_whole_batch_without_batch_norm(part: int) -> None:
    whole, cut = network(norm=False), network(norm=False)
    expected = loss_of(whole(make_views(MEMBERS)))
    expected.backward()
    loss = backward_in_parts(cut, make_views, MEMBERS, part, loss_of, [cut])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_same(gradients(cut), gradients(whole))


@pytest.mark.parametrize("part", [6, 12])
def test_gradient_in_parts_equals_that_of_batch_norm_in_groups_of_a_part(part: int) -> None:
    grouped, cut = network(norm=True), network(norm=True)
    pieces = [grouped(make_views(group)).unflatten(0, (2, part)) for group in MEMBERS.reshape(-1, part)]
    expected = loss_of(torch.cat(pieces, dim=1).flatten(0, 1))
    expected.backward()
    loss = backward_in_parts(cut, make_views, MEMBERS, part, loss_of, [cut])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_same(gradients(cut), gradients(grouped))
    for (name, found), (_, wanted) in zip(cut.named_buffers(), grouped.named_buffers(), strict=True):
        assert torch.allclose(found.float(), wanted.float()), name  # running statistics followed once
    whole = network(norm=True)
    loss_of(whole(make_views(MEMBERS))).backward()
    assert ((gradients(cut) - gradients(whole)).abs().max() / gradients(whole).abs().max()).item() > 1e-3


def test_both_passes_drop_the_same_units() -> None:
    seen: list[Tensor] = []
    model = network(norm=False, dropout=0.5)
    model[3].register_forward_hook(lambda module, given, result: seen.append(result.detach()))
    torch.manual_seed(5)
    backward_in_parts(model, make_views, MEMBERS, 6, loss_of, [model])
    for first, second in zip(seen[:4], seen[4:], strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(seen[0] == 0, seen[1] == 0)


def test_batch_norm_follows_again_after_a_failure() -> None:
    model = network(norm=True)

    def broken(members: npt.NDArray[np.int64]) -> Tensor:
        raise ValueError("no views")

    with pytest.raises(ValueError, match="no views"):
        backward_in_parts(model, broken, MEMBERS, 6, loss_of, [model])
    assert all(each.track_running_stats for each in model.modules() if isinstance(each, nn.BatchNorm2d))


def test_what_a_step_needs_grows_with_the_images_and_leaves_out_the_weights() -> None:
    model = network(norm=False)
    few, many = (step_bytes(model, make_views(MEMBERS[:count]), [model]) for count in (6, 24))
    assert few * 3.5 < many < few * 4.5
    heavy = nn.Sequential(copy.deepcopy(model), nn.Linear(16, 50_000))
    assert step_bytes(heavy, make_views(MEMBERS), [heavy]) < 2 * many


@pytest.mark.parametrize(
    ("available", "expected"), [(math.inf, 4096), (4096.0, 4096), (4095.0, 2048), (130.0, 128), (0.0, 2)]
)
def test_the_largest_part_that_fits_is_taken(available: float, expected: int) -> None:
    assert largest_part(4096, 1.0, available) == expected
