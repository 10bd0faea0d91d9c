"""Schedules against hand tables, optimizers against steps computed by hand."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from labelwise.learning.large_batch import Rows
from labelwise.learning.optimization import (
    DEFAULTS,
    Diverged,
    create_optimizer,
    scaled_rate,
    set_rate,
    warmup_cosine,
)
from labelwise.learning.precision import Precision
from labelwise.learning.simclr import Learner
from labelwise.models.encoder import Encoder

KINDS = ["lars", "sgd", "adamw"]
ETA = 0.001  # trust coefficient, official SimCLR code
MOMENTUM = 0.9


def small_network() -> nn.Sequential:
    """A convolution, a norm and a linear layer: weights of 4 and 2 dimensions, the rest of 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def give_gradients(network: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def give_no_gradients(network: nn.Module) -> None:
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)


def snapshot(network: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


# Schedule


@pytest.mark.parametrize(
    ("step", "share"),
    [
        (0, 0.25),
        (1, 0.5),
        (2, 0.75),
        (3, 1.0),
        (4, 1.0),  # the cosine begins at its top
        (5, 0.9330127),  # (1 + cos 30 degrees) / 2
        (6, 0.75),  # 60
        (7, 0.5),  # 90
        (8, 0.25),  # 120
        (9, 0.0669873),  # 150
        (10, 0.0),  # 180, after the last step
    ],
)
def test_warmup_and_cosine_equal_a_hand_table(step: int, share: float) -> None:
    assert warmup_cosine(step, steps=10, warmup_steps=4) == pytest.approx(share, abs=1e-7)


def test_without_warmup_the_first_step_has_the_peak_rate() -> None:
    assert [warmup_cosine(step, 4, 0) for step in range(5)] == pytest.approx(
        [1.0, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0.0]
    )


def test_a_run_that_only_warms_up_ends_at_the_peak_rate() -> None:
    assert [warmup_cosine(step, 5, 5) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_the_rate_stays_zero_after_the_end() -> None:
    assert [warmup_cosine(step, 10, 4) for step in (11, 16, 22, 1000)] == [0.0] * 4


def test_the_first_step_of_a_warmup_moves() -> None:
    assert warmup_cosine(0, 1000, 100) == pytest.approx(0.01)


# Rates


@pytest.mark.parametrize(
    ("rule", "batch_size", "factor"),
    [
        ("sqrt", 64, 0.5),
        ("sqrt", 256, 1.0),
        ("sqrt", 1024, 2.0),
        ("sqrt", 512, 1.41421356),
        ("linear", 64, 0.25),
        ("linear", 256, 1.0),
        ("linear", 1024, 4.0),
        ("none", 64, 1.0),
        ("none", 4096, 1.0),
    ],
)
def test_rates_scale_from_batch_256_by_rule(rule: str, batch_size: int, factor: float) -> None:
    assert scaled_rate(0.3, batch_size, rule) == pytest.approx(0.3 * factor)


@pytest.mark.parametrize("batch_size", [128, 256, 512, 4096])
def test_the_rate_of_lars_is_the_papers_at_every_batch(batch_size: int) -> None:
    rate, weight_decay = DEFAULTS["lars"]
    assert scaled_rate(rate, batch_size, "sqrt") == pytest.approx(0.075 * math.sqrt(batch_size))  # App. B.1
    assert weight_decay == 1e-6


def test_set_rate_gives_every_group_a_share_of_its_own_peak() -> None:
    body, head = small_network(), nn.Linear(2, 2)
    optimizer = create_optimizer("sgd", [(body, 0.4), (head, 0.02)], 1e-4)
    for share in (0.5, 0.0, 0.25):  # shares are of the peak, not of the last rate
        set_rate(optimizer, share)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
            [0.4 * share, 0.4 * share, 0.02 * share, 0.02 * share]
        )


# Optimizers


@pytest.mark.parametrize("kind", KINDS)
def test_two_modules_learn_at_their_own_rates(kind: str) -> None:
    body, head = small_network(), nn.Linear(2, 2)
    optimizer = create_optimizer(kind, [(body, 0.4), (head, 0.02)], 1e-4)
    rate_of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert [rate_of[id(p)] for p in body.parameters()] == [0.4] * 6
    assert [rate_of[id(p)] for p in head.parameters()] == [0.02] * 2
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 8  # each once


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_without_rate_stands_still_while_the_other_learns(kind: str) -> None:
    body, head = small_network(), nn.Linear(2, 2)
    optimizer = create_optimizer(kind, [(body, 0.0), (head, 0.1)], 0.1)
    before = snapshot(body), snapshot(head)
    give_gradients(body, 1)
    give_gradients(head, 2)
    optimizer.step()
    assert all(torch.equal(value, before[0][name]) for name, value in snapshot(body).items())
    assert not any(torch.equal(value, before[1][name]) for name, value in snapshot(head).items())


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_parameters_are_left_out(kind: str) -> None:
    network = small_network()
    network[0].requires_grad_(False)
    optimizer = create_optimizer(kind, [(network, 0.1)], 0.1)
    found = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert found == {id(p) for layer in (network[1], network[3]) for p in layer.parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_only_weights_of_two_dimensions_and_more_decay(kind: str) -> None:
    network = small_network()
    for parameter in network.parameters():
        nn.init.constant_(parameter, 0.5)
    optimizer = create_optimizer(kind, [(network, 0.1)], 0.2)
    give_no_gradients(network)  # so that decay is all that moves
    optimizer.step()
    for parameter in network.parameters():
        if parameter.ndim >= 2:
            assert (parameter < 0.5).all()
        else:
            assert (parameter == 0.5).all()


@pytest.mark.parametrize("weight_decay", [0.0, 1e-6, 0.05])
def test_lars_equals_its_steps_by_hand(weight_decay: float) -> None:
    """Local rate eta |w| / (|g| + decay |w|) on weights (You et al. 2017, arXiv 1708.03888, Eq. 6), 1 elsewhere."""
    network, rate = small_network(), 0.3
    optimizer = create_optimizer("lars", [(network, rate)], weight_decay)
    expected = {name: value.double().numpy() for name, value in snapshot(network).items()}
    velocity = {name: np.zeros_like(value) for name, value in expected.items()}
    for step in range(3):
        give_gradients(network, step)
        for name, parameter in network.named_parameters():
            w, g = expected[name], parameter.grad.double().numpy()
            decay = weight_decay if w.ndim >= 2 else 0.0
            lengths = math.sqrt((w**2).sum()), math.sqrt((g**2).sum())
            local = ETA * lengths[0] / (lengths[1] + decay * lengths[0]) if w.ndim >= 2 else 1.0
            velocity[name] = MOMENTUM * velocity[name] + local * (g + decay * w)
            expected[name] = w - rate * velocity[name]
        before = snapshot(network)
        optimizer.step()
        for name, parameter in network.named_parameters():
            moved = (parameter.detach() - before[name]).double().numpy()
            np.testing.assert_allclose(moved, -rate * velocity[name], rtol=1e-3, atol=1e-7)
            np.testing.assert_allclose(parameter.detach().numpy(), expected[name], rtol=1e-5, atol=1e-6)


def test_lars_adapts_the_rate_of_weights_to_their_length_even_without_decay() -> None:
    network = nn.Linear(5, 4)
    nn.init.constant_(network.weight, 2.0)
    optimizer = create_optimizer("lars", [(network, 1.0)], 0.0)
    for scale in (1.0, 1e6):  # the length of the gradient does not matter to weights
        before = snapshot(network)
        optimizer.state.clear()
        network.weight.grad = torch.ones_like(network.weight) * scale
        network.bias.grad = torch.ones_like(network.bias)
        optimizer.step()
        moved = (network.weight - before["weight"]).norm()
        assert moved.item() == pytest.approx(ETA * before["weight"].norm().item(), rel=1e-3)
        torch.testing.assert_close(
            before["bias"] - network.bias, torch.ones(4)
        )  # biases take the whole gradient


def test_sgd_equals_its_nesterov_steps_by_hand() -> None:
    network, rate, weight_decay = nn.Linear(3, 2), 0.1, 0.05
    optimizer = create_optimizer("sgd", [(network, rate)], weight_decay)
    expected = snapshot(network)
    velocity = {name: torch.zeros_like(value) for name, value in expected.items()}
    for step in range(3):
        give_gradients(network, step)
        for name, parameter in network.named_parameters():
            decay = weight_decay if name == "weight" else 0.0
            g = parameter.grad + decay * expected[name]
            velocity[name] = MOMENTUM * velocity[name] + g
            expected[name] = expected[name] - rate * (g + MOMENTUM * velocity[name])
        optimizer.step()
        for name, parameter in network.named_parameters():
            torch.testing.assert_close(parameter.detach(), expected[name])


def test_adamw_equals_its_first_step_by_hand() -> None:
    network, rate, weight_decay = nn.Linear(3, 2), 0.01, 0.5
    optimizer = create_optimizer("adamw", [(network, rate)], weight_decay)
    before = snapshot(network)
    give_gradients(network, 0)
    optimizer.step()
    for name, parameter in network.named_parameters():
        decay = weight_decay if name == "weight" else 0.0
        by_hand = (
            before[name] * (1 - rate * decay) - rate * parameter.grad.sign()
        )  # bias-corrected m / sqrt(v)
        torch.testing.assert_close(parameter.detach(), by_hand, atol=1e-6, rtol=1e-5)


# Divergence


@pytest.mark.parametrize("micro_batch_size", [8, 2], ids=["at once", "in passes"])
@pytest.mark.parametrize("scale", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_changes_no_weight(micro_batch_size: int, scale: float) -> None:
    network = Encoder(nn.Sequential(nn.Flatten(), nn.Linear(12, 4, bias=False)), 4)
    head = nn.Linear(4, 3)
    learner = Learner(
        network, head, create_optimizer("adamw", [(network, 0.1), (head, 0.1)], 0.0), Precision("fp32", "contiguous", ""),
        torch.device("cpu"), temperature=0.5, micro_batch_size=micro_batch_size, decoupled=False,
    )  # fmt: skip
    views = torch.randn(16, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    rows = np.arange(8)

    def make(members: Rows) -> Tensor:
        return views[np.concatenate([members, members + 8])]

    assert learner.step(make, rows) > 0
    before = snapshot(network)
    hook = head.weight.register_hook(lambda gradient: gradient * scale)
    with pytest.raises(Diverged, match="but its gradient is not finite"):
        learner.step(make, rows)
    hook.remove()
    assert all(torch.equal(value, before[name]) for name, value in snapshot(network).items())
    views *= math.nan
    with pytest.raises(Diverged, match="the loss is nan"):
        learner.step(make, rows)
    assert all(torch.equal(value, before[name]) for name, value in snapshot(network).items())
