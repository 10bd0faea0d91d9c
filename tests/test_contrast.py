"""NT-Xent against the paper's Algorithm 1 in loops, lightly and pytorch-metric-learning."""

import math
from collections.abc import Callable

import pytest
import torch
from lightly.loss import DCLLoss as LightlyDecoupledLoss
from lightly.loss import NTXentLoss as LightlyLoss
from pytorch_metric_learning.losses import NTXentLoss as MetricLearningLoss
from torch import Tensor

from labelwise.learning.contrast import chance_loss, nt_xent

Loss = Callable[[Tensor, float], Tensor]
CASES = [
    (2, 3, 0.07),
    (3, 5, 1.0),
    (4, 128, 0.1),
    (7, 16, 0.5),
    (16, 8, 0.2),
    (16, 64, 0.07),
]
TOLERANCE = 1e-6  # float32 against float64, relative to the loss and to the largest gradient


def random_projections(batch: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(batch, width, generator=generator)
    second = first + 3.0 * torch.randn(batch, width, generator=generator)
    return torch.cat([first, second])  # (2B, D), partners alike, but not so much that nothing is lost


def algorithm_1(projections: Tensor, temperature: float) -> Tensor:
    """Algorithm 1 of Chen et al. 2020 written as loops; the paper's 2k-1 and 2k are k and k + B here."""
    total = len(projections)
    batch = total // 2
    similarity = {}
    for i in range(total):
        for j in range(total):
            dot = (projections[i] * projections[j]).sum()
            lengths = projections[i].square().sum().sqrt() * projections[j].square().sum().sqrt()
            similarity[i, j] = dot / lengths

    def pair_loss(i: int, j: int) -> Tensor:
        others = [torch.exp(similarity[i, k] / temperature) for k in range(total) if k != i]
        return -torch.log(torch.exp(similarity[i, j] / temperature) / torch.stack(others).sum())

    pairs = [pair_loss(k, k + batch) + pair_loss(k + batch, k) for k in range(batch)]
    return torch.stack(pairs).sum() / (2 * batch)


def lightly_loss(projections: Tensor, temperature: float) -> Tensor:
    first, second = projections.chunk(2)
    return LightlyLoss(temperature=temperature)(first, second)


def metric_learning_loss(projections: Tensor, temperature: float) -> Tensor:
    labels = torch.arange(len(projections) // 2).repeat(2)
    return MetricLearningLoss(temperature=temperature)(projections, labels)


def value_and_gradient(loss: Loss, projections: Tensor, temperature: float) -> tuple[float, Tensor]:
    leaf = projections.clone().requires_grad_()
    value = loss(leaf, temperature)
    value.backward()
    assert leaf.grad is not None
    return value.item(), leaf.grad.double()


@pytest.mark.parametrize(("batch", "width", "temperature"), CASES)
@pytest.mark.parametrize("oracle", [algorithm_1, lightly_loss, metric_learning_loss])
def test_loss_and_gradient_equal_the_oracles(
    oracle: Loss, batch: int, width: int, temperature: float
) -> None:
    projections = random_projections(batch, width)
    value, gradient = value_and_gradient(nt_xent, projections, temperature)
    expected, expected_gradient = value_and_gradient(oracle, projections.double(), temperature)
    assert value == pytest.approx(expected, rel=TOLERANCE)
    scale = expected_gradient.abs().max()
    assert (gradient - expected_gradient).abs().max() / scale < TOLERANCE


@pytest.mark.parametrize(("batch", "width", "temperature"), [(4, 128, 100.0), (7, 16, 10.0), (16, 8, 5.0)])
def test_loss_of_inner_products_equals_that_of_rows_that_are_not_normalized(
    batch: int, width: int, temperature: float
) -> None:
    def of_inner_products(projections: Tensor, temperature: float) -> Tensor:
        similarity = projections @ projections.T / temperature
        similarity = similarity.masked_fill(torch.eye(len(projections), dtype=torch.bool), -torch.inf)
        partners = torch.arange(len(projections)).roll(len(projections) // 2)
        return torch.nn.functional.cross_entropy(similarity, partners)

    projections = random_projections(batch, width)
    value, gradient = value_and_gradient(
        lambda z, t: nt_xent(z, t, normalized=False), projections, temperature
    )
    expected, expected_gradient = value_and_gradient(of_inner_products, projections.double(), temperature)
    assert value == pytest.approx(expected, rel=TOLERANCE)
    assert (gradient - expected_gradient).abs().max() / expected_gradient.abs().max() < TOLERANCE


@pytest.mark.parametrize("batch", [1, 2, 8, 300])
@pytest.mark.parametrize("temperature", [0.07, 0.5, 1.0])
def test_loss_of_equal_rows_is_the_logarithm_of_all_other_views(batch: int, temperature: float) -> None:
    row = torch.tensor([0.3, -2.0, 5.0])
    loss = nt_xent(row.expand(2 * batch, 3), temperature).item()
    assert loss == pytest.approx(math.log(2 * batch - 1), rel=1e-5, abs=1e-5)
    assert chance_loss(batch) == pytest.approx(math.log(2 * batch - 1), abs=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_is_computed_in_float32(dtype: torch.dtype) -> None:
    halves = random_projections(16, 32).to(dtype)
    halves[3] *= 2000  # its squared length is beyond float16
    loss = nt_xent(halves, 0.05)
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert loss.item() == nt_xent(halves.float(), 0.05).item()
    _, gradient = value_and_gradient(nt_xent, halves, 0.05)
    assert torch.isfinite(gradient).all()


def test_autocast_does_not_lower_the_precision_of_the_loss() -> None:
    projections = random_projections(16, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = nt_xent(projections, 0.05)
    assert inside.dtype == torch.float32
    assert inside.item() == nt_xent(projections, 0.05).item()


def test_loss_and_gradient_are_finite_at_temperature_one_hundredth() -> None:
    projections = random_projections(8, 4)
    projections[0] = -projections[8]  # partners that point apart: similarity / temperature is -100
    value, gradient = value_and_gradient(nt_xent, projections, 0.01)
    expected, _ = value_and_gradient(algorithm_1, projections.double(), 0.01)
    assert value == pytest.approx(expected, rel=1e-5)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() > 0


def test_the_length_of_rows_does_not_matter() -> None:
    projections = random_projections(8, 16)
    lengths = torch.logspace(-3, 3, 16)[:, None]
    assert nt_xent(projections * lengths, 0.1).item() == pytest.approx(
        nt_xent(projections, 0.1).item(), rel=TOLERANCE
    )


def test_swapping_the_two_views_changes_nothing() -> None:
    projections = random_projections(8, 16)
    first, second = projections.chunk(2)
    swapped = nt_xent(torch.cat([second, first]), 0.1).item()
    assert swapped == pytest.approx(nt_xent(projections, 0.1).item(), rel=TOLERANCE)


def test_the_partner_of_a_view_is_the_same_place_in_the_other_half() -> None:
    batch = 6
    axes = torch.eye(batch)
    paired = nt_xent(torch.cat([axes, axes]), 0.1).item()
    others = 2 * batch - 2  # orthogonal views: exp(0) each, against exp(1 / 0.1) of the partner
    assert paired == pytest.approx(math.log1p(others * math.exp(-10.0)), rel=1e-2)
    neighbours = nt_xent(axes.repeat_interleave(2, dim=0), 0.1).item()
    assert neighbours == pytest.approx(10.0 + math.log1p(others * math.exp(-10.0)), rel=1e-5)


def dense_loss(projections: Tensor, temperature: float) -> Tensor:
    """The whole matrix of similarities at once."""
    z = torch.nn.functional.normalize(projections, dim=1)
    similarity = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    return torch.nn.functional.cross_entropy(similarity, torch.arange(len(z)).roll(len(z) // 2))


@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_tiles_give_what_the_whole_matrix_gives(temperature: float) -> None:
    projections = random_projections(1500, 32)  # 3,000 rows: two tiles and a part of one
    value, gradient = value_and_gradient(nt_xent, projections, temperature)
    expected, expected_gradient = value_and_gradient(dense_loss, projections.double(), temperature)
    assert value == pytest.approx(expected, rel=TOLERANCE)
    scale = expected_gradient.abs().max()
    assert (gradient - expected_gradient).abs().max() / scale < 2 * TOLERANCE


@pytest.mark.parametrize(("batch", "width", "temperature"), CASES)
def test_decoupled_loss_equals_lightlys(batch: int, width: int, temperature: float) -> None:
    def ours(projections: Tensor, temperature: float) -> Tensor:
        return nt_xent(projections, temperature, decoupled=True)

    def theirs(projections: Tensor, temperature: float) -> Tensor:
        return LightlyDecoupledLoss(temperature=temperature)(*projections.chunk(2))

    projections = random_projections(batch, width)
    value, gradient = value_and_gradient(ours, projections, temperature)
    expected, expected_gradient = value_and_gradient(theirs, projections.double(), temperature)
    assert value == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)
    scale = expected_gradient.abs().max()
    assert (gradient - expected_gradient).abs().max() / scale < TOLERANCE


def test_decoupled_loss_of_equal_rows_is_chance() -> None:
    loss = nt_xent(torch.ones(20, 4), 0.5, decoupled=True)
    assert loss.item() == pytest.approx(chance_loss(10, decoupled=True))
