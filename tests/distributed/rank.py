"""One rank: it runs every check that compares numbers of ranks, and writes what it found. Started by conftest.py."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from labelwise.errors import LabelwiseError
from labelwise.learning import contrast
from labelwise.learning.batch_norm import SharedBatchNorm, share_batch_norm
from labelwise.learning.checkpoint import check_alike, share_state
from labelwise.learning.contrast import nt_xent
from labelwise.learning.optimization import create_optimizer, set_rate
from labelwise.learning.precision import Precision
from labelwise.learning.ranks import ALONE, Ranks, join
from labelwise.learning.simclr import Learner
from labelwise.models.encoder import EncoderSpec, create_encoder
from labelwise.models.heads import create_head

BATCH, SIZE, STEPS, RATE = 16, 16, 20, 0.02
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "without batch norm": (
        "vit_tiny_patch16_224",
        {"depth": 1, "embed_dim": 24, "num_heads": 2, "patch_size": 8},
    ),
    "with batch norm": ("resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}),
    "with batch norm of timm's": ("test_efficientnet", {}),
}
STEMS = {"without batch norm": "stock", "with batch norm": "small", "with batch norm of timm's": "small"}
TEMPERATURE = 0.5
PLAIN = Precision("fp32", "contiguous", "")
CPU = torch.device("cpu")


def views_of(members: np.ndarray) -> Tensor:
    """Two views of each image, drawn from its number, (2B, 3, H, W)."""

    def view(member: int, number: int) -> Tensor:
        return torch.randn(
            3, SIZE, SIZE, generator=torch.Generator().manual_seed(1000 * number + int(member))
        )

    return torch.stack([view(member, number) for number in (0, 1) for member in members])


def learner_of(
    network: str,
    ranks: Ranks,
    optimizer: str = "sgd",
    part: int = BATCH,
    *,
    decoupled: bool = False,
    normalized: bool = True,
    numbers: torch.dtype = torch.float32,
) -> Learner:
    torch.manual_seed(0)
    backbone, arguments = NETWORKS[network]
    encoder = create_encoder(EncoderSpec(backbone, arguments, STEMS[network], SIZE, (0, 0, 0), (1, 1, 1)))
    head = create_head(
        "none" if network == "without batch norm" else "nonlinear", encoder.features, 2, None, 16
    )
    for module in (encoder, head):
        share_batch_norm(module, ranks)
        module.to(numbers)
    made = create_optimizer(optimizer, [(encoder, RATE), (head, RATE)], 1e-4)
    set_rate(made, 1.0)
    return Learner(encoder, head, made, PLAIN, CPU, TEMPERATURE, part, decoupled, normalized, ranks)


def gradients_of(learner: Learner) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": each.grad.clone()
        for name, module in learner.modules.items()
        for key, each in module.named_parameters()
        if each.grad is not None
    }


def state_of(learner: Learner) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": each.clone()
        for name, module in learner.modules.items()
        for key, each in module.state_dict().items()
    }


def first_step(network: str, ranks: Ranks, **more: Any) -> dict[str, Any]:
    """Loss and gradients of one step."""
    learner = learner_of(network, ranks, **more)
    loss = learner.step(
        lambda members: views_of(members).to(more.get("numbers", torch.float32)), np.arange(BATCH)
    )
    return {"loss": loss, "gradients": gradients_of(learner)}


def in_another_order(network: str) -> dict[str, Any]:
    """The same with the images of the batch in another order: what float32 itself leaves open."""
    learner = learner_of(network, ALONE)
    loss = learner.step(views_of, np.random.default_rng(0).permutation(BATCH))
    return {"loss": loss, "gradients": gradients_of(learner)}


def after_steps(
    network: str, ranks: Ranks, optimizer: str = "sgd", steps: int = STEPS, **more: Any
) -> dict[str, Tensor]:
    """Weights and running statistics after some steps, in float64: training multiplies what float32 leaves open."""
    learner = learner_of(network, ranks, optimizer, numbers=torch.float64, **more)
    for step in range(steps):
        learner.step(lambda members: views_of(members).double(), np.arange(step, step + BATCH))
    return state_of(learner)


def without_what_others_owe(network: str, ranks: Ranks) -> dict[str, Any]:
    """One step with a gathering that passes no gradient: as if what other ranks' images do to these were none of their business."""
    whole = contrast._Contrast.backward

    def own_anchors_only(ctx: Any, *gradients: Tensor) -> Any:
        z, _ = ctx.saved_tensors
        b, total = len(z) // 2 // ranks.count, len(z) // 2
        rows = torch.cat([torch.arange(b) + view * total + ranks.number * b for view in (0, 1)])
        with torch.enable_grad():
            own = z[rows].clone().requires_grad_()
            everybody = z.detach().clone()
            if ranks.count == 1:
                everybody = own
            similarity = own @ everybody.T / ctx.temperature
            similarity = similarity.masked_fill(torch.arange(len(z))[None] == rows[:, None], -torch.inf)
            positive = similarity[torch.arange(len(rows)), (rows + total) % len(z)]
            loss = (similarity.logsumexp(1) - positive).sum() / len(z)
        return torch.autograd.grad(loss, own)[0] * gradients[0], None, None, None

    contrast._Contrast.backward = staticmethod(own_anchors_only)
    try:
        return first_step(network, ranks)
    finally:
        contrast._Contrast.backward = whole


def batch_norm(
    ranks: Ranks, kind: Callable[..., nn.Module], shape: tuple[int, ...], **arguments: Any
) -> dict[str, Tensor]:
    """What a batch norm gives, its gradients and its averages, all images' in order, over three batches."""
    torch.manual_seed(0)
    norm: Any = kind(shape[1], **arguments)
    for each in norm.parameters():
        nn.init.normal_(each)
    if ranks.count > 1:
        norm = SharedBatchNorm(norm, ranks)
    images = (
        torch.randn(3, *shape, generator=torch.Generator().manual_seed(1)) * 3 + 100
    )  # far from 0: sums of squares would cancel
    pull = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    own = slice(ranks.number * shape[0] // ranks.count, (ranks.number + 1) * shape[0] // ranks.count)
    for batch in images:
        given = batch[own].clone().requires_grad_()
        found = norm(given)
        (found * pull[own]).sum().backward()
    ranks.add_up_gradients(norm.parameters())
    kept = dict(norm.state_dict())
    parts = {"found": found.detach(), "gradient": given.grad}
    if norm.track_running_stats:
        parts["evaluated"] = norm.eval()(images[0][own]).detach()
    return {
        **{name: ranks.gather(each).flatten(0, 1) for name, each in parts.items()},
        **{f"gradient of {name}": each.grad for name, each in norm.named_parameters()},
        **kept,
    }


def meetings(ranks: Ranks) -> dict[str, Any]:
    """What the ranks tell each other."""
    learner = learner_of("with batch norm", ranks, "adamw")
    learner.step(views_of, np.arange(BATCH))
    check_alike(ranks, learner.modules)
    weight = next(learner.encoder.parameters())
    odd = ranks.number == ranks.count - 1
    if odd and ranks.count > 1:
        with torch.no_grad():
            weight.view(-1)[3] += 1e-6
    try:
        check_alike(ranks, learner.modules)
        noticed = ""
    except LabelwiseError as error:
        noticed = str(error)
    other = learner_of("with batch norm", ranks, "adamw")
    if ranks.is_first:
        other = learner  # it has a state, the others' have none
    share_state(ranks, other.modules, other.optimizer)
    check_alike(ranks, other.modules)
    before = copy.deepcopy(state_of(other))
    other.step(views_of, np.arange(BATCH))  # with the same averages everywhere, or the weights part
    check_alike(ranks, other.modules)
    return {
        "noticed": noticed,
        "moved": any(not torch.equal(before[name], each) for name, each in state_of(other).items()),
        "told": ranks.tell(lambda: {"by": ranks.number, "what": [1, "two"]}),
        "seeds": [int(each) for each in ranks.gather(torch.tensor([ranks.seed(5)]))],
        "largest": ranks.largest(ranks.number, 7 - ranks.number, True),
        "shares": ranks.gather(torch.from_numpy(ranks.share(np.arange(BATCH) + 100, 8))).tolist(),
        "sum": float(sum(ranks.gather(torch.tensor([1.0 + ranks.number])))),
    }


def everything(ranks: Ranks) -> dict[str, Any]:
    found: dict[str, Any] = {"meetings": meetings(ranks)}
    for network in NETWORKS:
        found[f"step, {network}"] = first_step(network, ranks)
        found[f"step in parts, {network}"] = first_step(network, ranks, part=8)
        found[f"step in float64, {network}"] = first_step(network, ranks, numbers=torch.float64)
        found[f"weights, {network}"] = after_steps(network, ranks)
        found[f"no gradient gathered, {network}"] = without_what_others_owe(network, ranks)
    found["step, decoupled"] = first_step("with batch norm", ranks, decoupled=True, numbers=torch.float64)
    found["step, dot"] = first_step("with batch norm", ranks, normalized=False, numbers=torch.float64)
    if ranks.count == 1:
        found |= {f"step, other order, {network}": in_another_order(network) for network in NETWORKS}
    found["weights, lars"] = after_steps("with batch norm", ranks, "lars")
    found["weights, in parts"] = after_steps("without batch norm", ranks, part=8)
    # batch norm of eight images makes a step so steep that after twenty one billionth has become a thousandth
    found["weights, in parts with batch norm"] = after_steps("with batch norm", ranks, steps=4, part=8)
    found["loss"] = float(nt_xent(torch.ones(2 * BATCH // ranks.count, 4), 0.5, ranks=ranks))
    norms: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...], dict[str, Any]]] = {
        "two dimensions": (nn.BatchNorm2d, (8, 3, 5, 4), {}),
        "no dimensions": (nn.BatchNorm1d, (8, 6), {}),
        "without weights": (nn.BatchNorm2d, (8, 3, 2, 2), {"affine": False}),
        "mean of all": (nn.BatchNorm2d, (8, 3, 2, 2), {"momentum": None}),
        "without averages": (nn.BatchNorm2d, (8, 3, 2, 2), {"track_running_stats": False}),
    }
    for name, (kind, shape, arguments) in norms.items():
        found[f"norm, {name}"] = batch_norm(ranks, kind, shape, **arguments)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    with join(60) as ranks:
        torch.save(everything(ranks), Path(sys.argv[1]) / f"{ranks.number}.pt")
