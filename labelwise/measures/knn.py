"""Accuracy of the nearest neighbours: what the features are worth, without training anything."""

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS = 20
_TEMPERATURE = 0.1  # weight of a vote: exp(similarity / 0.1); Wu et al. 2018 (arXiv 1805.01978) use 0.07
_CHUNK = 1024  # queries
_BLOCK = 2**26  # similarities, 256 MB


def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor | None = None, query_labels: Tensor | None = None
) -> float:
    """Share of queries whose label wins the vote of their 20 nearest neighbours by cosine similarity.

    Args:
        bank: Features, (N, F).
        bank_labels: Class indices, (N,).
        queries: Features, (M, F); without them the bank is asked about itself, leaving out the image
            that asks.
        query_labels: Class indices, (M,).

    Source: Wu et al. 2018 (arXiv 1805.01978), Sec. 3.4: votes weighted by similarity.
    """
    votes = neighbour_votes(bank, bank_labels, queries, classes=int(bank_labels.max()) + 1)
    truth = bank_labels if query_labels is None else query_labels
    return float((votes.argmax(dim=1) == truth).float().mean())


def neighbour_votes(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor | None = None,
    *,
    classes: int,
    neighbours: int = NEIGHBOURS,
    groups: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Votes for each class of the nearest neighbours by cosine similarity, (M, C), rows adding up to one.

    Args:
        bank, bank_labels, queries: See `knn_accuracy`.
        classes: Number of classes, C.
        neighbours: How many vote.
        groups: Of bank, (N,), and queries, (M,): images of one group do not vote for each other. A row where nobody may
            vote is zero.
    """
    if queries is None:
        queries, groups = bank, (torch.arange(len(bank)),) * 2
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    votes = torch.zeros(len(queries), classes)
    for start in range(0, len(queries), _CHUNK):
        similarity = queries[start : start + _CHUNK] @ bank.T  # (chunk, N)
        if groups is not None:
            similarity.masked_fill_(groups[1][start : start + _CHUNK, None] == groups[0], -torch.inf)
        near = similarity.topk(min(neighbours, len(bank)), dim=1)
        weights = (near.values / _TEMPERATURE).softmax(dim=1).masked_fill(near.values.isneginf(), 0)
        votes[start : start + _CHUNK].scatter_add_(1, bank_labels[near.indices], weights)
    return votes


def resembling(queries: Tensor, altered: Tensor, bank: Tensor) -> list[tuple[int, int, float, float]]:
    """Queries that are at least as similar to a row of a bank as to an altered copy of themselves, the closest first.

    Args:
        queries, altered: Features of images and of their altered copies, (M, F).
        bank: Features, (N, F).

    Returns:
        Query, the most similar row of the bank, the cosine similarity of these two, and that of query and copy.
    """
    queries, altered, bank = (F.normalize(each, dim=1) for each in (queries, altered, bank))
    own = (queries * altered).sum(dim=1)
    chunk = max(1, min(_CHUNK, _BLOCK // len(bank)))
    found = []
    for start in range(0, len(queries), chunk):
        best = (queries[start : start + chunk] @ bank.T).max(dim=1)
        found += list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    pairs = [
        (query, row, similarity, mine)
        for query, ((row, similarity), mine) in enumerate(zip(found, own.tolist(), strict=True))
    ]
    return sorted((pair for pair in pairs if pair[2] >= pair[3]), key=lambda pair: -pair[2])


def nearest_rows(features: Tensor, count: int) -> Tensor:
    """The rows most similar to each row by cosine similarity, itself left out, (N, min(count, N - 1))."""
    unit, found = F.normalize(features, dim=1), []
    chunk = max(1, min(_CHUNK, _BLOCK // len(unit)))
    for start in range(0, len(unit), chunk):
        similarity = unit[start : start + chunk] @ unit.T  # (chunk, N)
        similarity[:, start:].fill_diagonal_(-torch.inf)
        found.append(similarity.topk(min(count, len(unit) - 1), dim=1).indices)
    return torch.cat(found)


def nearest(features: Tensor, row: int, count: int) -> list[tuple[int, float]]:
    """Rows most similar to one row, itself left out, with their cosine similarities."""
    unit = F.normalize(features, dim=1)
    similarity = unit @ unit[row]  # (N,)
    similarity[row] = -torch.inf
    near = similarity.topk(min(count, len(features) - 1))
    return list(zip(near.indices.tolist(), near.values.tolist(), strict=True))
