"""Two and four ranks compute what one does: loss, gradients, weights, batch statistics."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rank import BATCH, NETWORKS
from torch import Tensor

from labelwise.learning.contrast import chance_loss

Outcomes = Callable[[int], list[dict[str, Any]]]

several = pytest.mark.parametrize("count", [2, 4])
network = pytest.mark.parametrize("network", NETWORKS)


def farthest(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """The largest difference between tensors, as a share of the largest number in each, or of 1."""
    assert first.keys() == second.keys()
    return max(
        ((first[name] - second[name]).abs().max() / first[name].abs().max().clamp(min=1)).item()
        for name in first
    )


@several
@network
def test_loss_and_gradients_of_a_step_are_those_of_one_process(
    outcomes: Outcomes, count: int, network: str
) -> None:
    (alone,), what = outcomes(1), f"step in float64, {network}"
    for each in outcomes(count):
        assert each[what]["loss"] == pytest.approx(alone[what]["loss"], abs=1e-6)
        assert farthest(alone[what]["gradients"], each[what]["gradients"]) < 1e-6


@several
@network
def test_in_float32_they_differ_as_a_batch_in_another_order_does(
    outcomes: Outcomes, count: int, network: str
) -> None:
    (alone,) = outcomes(1)
    usual = farthest(
        alone[f"step, {network}"]["gradients"], alone[f"step, other order, {network}"]["gradients"]
    )
    for each in outcomes(count):
        for what in (f"step, {network}", f"step in parts, {network}"):
            assert each[what]["loss"] == pytest.approx(alone[what]["loss"], abs=1e-6)
            assert farthest(alone[what]["gradients"], each[what]["gradients"]) < max(1e-6, 4 * usual)


@several
@pytest.mark.parametrize("loss", ["decoupled", "dot"])
def test_other_losses_too(outcomes: Outcomes, count: int, loss: str) -> None:
    (alone,), what = outcomes(1), f"step, {loss}"
    for each in outcomes(count):
        assert each[what]["loss"] == pytest.approx(alone[what]["loss"], rel=1e-6)
        assert (
            farthest(alone[what]["gradients"], each[what]["gradients"]) < 3e-6
        )  # gradients of the loss itself are float32


@several
@network
def test_weights_after_twenty_steps_of_sgd_are_those_of_one_process(
    outcomes: Outcomes, count: int, network: str
) -> None:
    (alone,) = outcomes(1)
    for each in outcomes(count):
        assert farthest(alone[f"weights, {network}"], each[f"weights, {network}"]) < 1e-5


@several
@pytest.mark.parametrize("how", ["lars", "in parts", "in parts with batch norm"])
def test_so_are_those_of_lars_and_of_batches_in_parts(outcomes: Outcomes, count: int, how: str) -> None:
    (alone,) = outcomes(1)
    for each in outcomes(count):
        assert farthest(alone[f"weights, {how}"], each[f"weights, {how}"]) < 1e-5


@several
def test_all_ranks_have_the_same_bits(outcomes: Outcomes, count: int) -> None:
    first, *others = outcomes(count)
    for other in others:
        for what in (name for name in first if name.startswith("weights")):
            assert all(torch.equal(first[what][name], other[what][name]) for name in first[what])


@several
@network
def test_gathering_without_gradient_would_be_noticed(outcomes: Outcomes, count: int, network: str) -> None:
    (alone,), what = outcomes(1), f"no gradient gathered, {network}"
    assert (
        farthest(alone[f"step, {network}"]["gradients"], alone[what]["gradients"]) < 1e-5
    )  # one process owes nobody
    for each in outcomes(count):
        largest = max(gradient.abs().max().item() for gradient in alone[what]["gradients"].values())
        assert farthest(alone[what]["gradients"], each[what]["gradients"]) > 0.05 * min(1, largest)


@several
@pytest.mark.parametrize(
    "kind", ["two dimensions", "no dimensions", "without weights", "mean of all", "without averages"]
)
def test_batch_norm_over_ranks_is_torchs_over_the_whole_batch(
    outcomes: Outcomes, count: int, kind: str
) -> None:
    (alone,), what = outcomes(1), f"norm, {kind}"
    for each in outcomes(count):
        assert farthest(alone[what], each[what]) < 2e-5  # numbers near 100, of which 24 bits are kept


@several
def test_chance_is_that_of_the_whole_batch(outcomes: Outcomes, count: int) -> None:
    for each in outcomes(count):
        assert each["loss"] == pytest.approx(chance_loss(BATCH), abs=1e-6)


@several
def test_ranks_hear_the_first_one_and_notice_one_whose_weights_differ(outcomes: Outcomes, count: int) -> None:
    for each in outcomes(count):
        said = each["meetings"]
        assert f"rank {count - 1} " in said["noticed"]
        assert said["told"] == {"by": 0, "what": [1, "two"]}
        assert said["seeds"][0] == 5
        assert (
            len({seed % 2**32 for seed in said["seeds"]}) == count
        )  # torch's generator on the CPU takes 32 bits
        assert said["largest"] == (count - 1, 7, 1)
        assert said["sum"] == count * (count + 1) / 2
        assert said["moved"]
    shares = outcomes(count)[0]["meetings"]["shares"]
    assert sorted(member for share in shares for member in share) == list(range(100, 100 + BATCH))
    assert all(
        {member // 8 for member in share} == {12, 13, 14} or len(share) == BATCH // count for share in shares
    )


def test_alone_nothing_is_asked_of_anybody(outcomes: Outcomes) -> None:
    (alone,) = outcomes(1)
    assert alone["meetings"]["noticed"] == ""
    assert alone["meetings"]["shares"] == [list(range(100, 100 + BATCH))]
