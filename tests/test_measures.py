"""Nearest neighbours, effective rank, health words and the linear probe, against loops and scikit-learn."""

import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score

from labelwise.measures import knn
from labelwise.measures.health import diagnose, diagnose_start, effective_rank, kept_neighbours
from labelwise.measures.knn import knn_accuracy, nearest, nearest_rows
from labelwise.measures.linear import accuracy, fit_probe, macro_accuracy, stratified_folds

CHANCE = math.log(2 * 256 - 1)

# --- nearest neighbours


def _clusters(count: int, classes: int, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping clusters, so that votes are split and some go wrong."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, width))
    labels = rng.integers(0, classes, count)
    features = centres[labels] + 1.5 * rng.normal(size=(count, width))
    return torch.from_numpy(features).float(), torch.from_numpy(labels)


def _cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def _vote(query: list[float], bank: list[tuple[list[float], int]]) -> int:
    """Wu et al. 2018, Sec. 3.4: the 20 nearest by cosine vote with exp(similarity / 0.1)."""
    near = sorted(((_cosine(query, row), label) for row, label in bank), reverse=True)[:20]
    votes: dict[int, float] = defaultdict(float)
    for similarity, label in near:
        votes[label] += math.exp(similarity / 0.1)
    return max(votes, key=lambda label: votes[label])


def test_knn_of_the_bank_itself_equals_plain_loops() -> None:
    features, labels = _clusters(120, 4, 6, seed=0)
    rows = list(zip(features.tolist(), labels.tolist(), strict=True))
    right = [_vote(row, rows[:index] + rows[index + 1 :]) == label for index, (row, label) in enumerate(rows)]
    assert 0.3 < np.mean(right) < 0.99  # the case is neither trivial nor hopeless
    assert knn_accuracy(features, labels) == pytest.approx(np.mean(right))


def test_knn_of_queries_equals_plain_loops() -> None:
    bank, bank_labels = _clusters(90, 3, 5, seed=1)
    queries, query_labels = _clusters(70, 3, 5, seed=2)
    rows = list(zip(bank.tolist(), bank_labels.tolist(), strict=True))
    right = [
        _vote(row, rows) == label for row, label in zip(queries.tolist(), query_labels.tolist(), strict=True)
    ]
    assert 0.3 < np.mean(right) < 0.99
    assert knn_accuracy(bank, bank_labels, queries, query_labels) == pytest.approx(np.mean(right))


def test_knn_over_several_chunks_leaves_out_the_right_image() -> None:
    angles = torch.linspace(0, 2 * math.pi, 2101)[:-1]
    features = torch.stack([angles.cos(), angles.sin()], dim=1)  # (2100, 2)
    labels = torch.arange(2100)  # the one right neighbour is the image itself
    assert knn_accuracy(features, labels) == 0.0
    assert knn_accuracy(features, labels, features, labels) == pytest.approx(1.0, abs=0.01)


def test_near_votes_weigh_more_than_many_far_ones() -> None:
    bank = torch.tensor([[1.0, 0.0]] + [[0.0, 1.0]] * 19)
    labels = torch.tensor([0] + [1] * 19)
    assert knn_accuracy(bank, labels, torch.tensor([[1.0, 0.01]]), torch.tensor([0])) == 1.0


def test_knn_looks_at_direction_not_at_length() -> None:
    features, labels = _clusters(120, 4, 6, seed=0)
    stretched = features * torch.rand(120, 1, generator=torch.manual_seed(0)).add(0.1)
    assert knn_accuracy(stretched, labels) == pytest.approx(knn_accuracy(features, labels))


def test_a_query_of_an_unknown_class_is_wrong_not_an_error() -> None:
    bank, labels = _clusters(30, 2, 4, seed=3)
    assert knn_accuracy(bank, labels, bank[:5], torch.full((5,), 9)) == 0.0


def test_nearest_sorts_by_cosine_and_leaves_out_the_row_itself() -> None:
    features, _ = _clusters(25, 3, 4, seed=4)
    rows = features.tolist()
    expected = sorted(
        ((_cosine(rows[7], row), index) for index, row in enumerate(rows) if index != 7), reverse=True
    )
    found = nearest(features, 7, 6)
    assert [index for index, _ in found] == [index for _, index in expected[:6]]
    assert [similarity for _, similarity in found] == pytest.approx(
        [similarity for similarity, _ in expected[:6]], abs=1e-6
    )


def test_nearest_gives_fewer_when_there_are_fewer() -> None:
    assert len(nearest(torch.randn(4, 3, generator=torch.manual_seed(0)), 0, 10)) == 3


# --- effective rank


def test_features_that_use_every_direction_alike_have_full_rank() -> None:
    features = torch.cat([torch.eye(16), -torch.eye(16)])  # mean zero, all singular values equal
    assert effective_rank(features) == pytest.approx(16, rel=1e-4)


def test_features_on_a_line_have_rank_one() -> None:
    line = torch.linspace(-1, 1, 50)[:, None] * torch.randn(1, 32, generator=torch.manual_seed(0))
    assert effective_rank(line + 5.0) == pytest.approx(1, abs=1e-2)


def test_features_in_a_plane_have_rank_two() -> None:
    plane = torch.zeros(40, 8)
    plane[:20, 0], plane[20:, 0] = 1, -1
    plane[::2, 3], plane[1::2, 3] = 1, -1
    assert effective_rank(plane) == pytest.approx(2, abs=1e-3)


def test_collapsed_features_have_rank_one() -> None:
    assert effective_rank(torch.full((30, 64), 3.0)) == pytest.approx(1, abs=1e-2)


def test_effective_rank_equals_the_entropy_of_numpys_singular_values() -> None:
    features = np.random.default_rng(0).normal(size=(60, 10)) * np.arange(1, 11)
    values = np.linalg.svd(features - features.mean(axis=0), compute_uv=False)
    share = values / values.sum()
    expected = math.exp(-float((share * np.log(share)).sum()))
    assert effective_rank(torch.from_numpy(features)) == pytest.approx(expected, rel=1e-3)


def test_effective_rank_does_not_depend_on_scale_or_shift() -> None:
    features = torch.randn(50, 12, generator=torch.manual_seed(1))
    assert effective_rank(100 * features + 7) == pytest.approx(effective_rank(features), rel=1e-3)


# --- health


def test_a_loss_that_is_not_a_number_is_named() -> None:
    assert diagnose(math.nan, CHANCE, 50, 128, 0.1) == "the loss is not a number; lower --learning-rate"
    assert "not a number" in str(diagnose(math.inf, CHANCE, 50, 128, 0.9))


def test_a_loss_at_chance_is_named_after_a_third_of_the_run() -> None:
    words = diagnose(0.99 * CHANCE, CHANCE, 50, 128, 0.4)
    assert words is not None
    assert "the loss (6.17) is hardly better than chance (6.24): give it more --epochs" in words
    assert "the loss (6.30) is worse than chance (6.24)" in str(diagnose(6.3, CHANCE, 50, 128, 0.4))
    assert diagnose(0.99 * CHANCE, CHANCE, 50, 128, 0.3) is None


def test_collapse_is_named_with_the_directions_that_are_left() -> None:
    words = diagnose(4.0, CHANCE, 1.3, 128, 0.1)
    assert words == "the features use only 1.3 of 128 directions: collapse; lower --learning-rate"
    assert "of 2048" in str(diagnose(4.0, CHANCE, 20, 2048, 0.1))  # 1 % of a wide encoder


def test_a_healthy_run_is_left_in_peace() -> None:
    assert diagnose(4.0, CHANCE, 40, 128, 1.0) is None
    assert diagnose(6.3, CHANCE, 5, 128, 0.1) is None


def test_nearest_rows_are_those_that_one_row_at_a_time_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    features, _ = _clusters(50, 4, 8, seed=1)
    monkeypatch.setattr(knn, "_BLOCK", 16 * 50)
    rows = nearest_rows(features, 5)
    assert [[near for near, _ in nearest(features, row, 5)] for row in range(50)] == rows.tolist()
    assert nearest_rows(features[:3], 5).shape == (3, 2)


def test_neighbours_are_kept_by_rotation_and_scale_and_lost_by_chance() -> None:
    features, _ = _clusters(400, 4, 8, seed=0)
    turned = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0]
    assert kept_neighbours(features, 3 * features @ turned) > 0.999
    others, _ = _clusters(400, 4, 8, seed=5)
    assert kept_neighbours(features, others) == pytest.approx(0, abs=0.02)
    half = torch.cat([features[:, :4], others[:, 4:]], dim=1)
    assert 0.05 < kept_neighbours(features, half) < 0.5


def test_what_a_start_knew_is_missed_when_it_is_gone() -> None:
    assert diagnose_start(40.0, 60.0, 0.5) is None
    words = diagnose_start(10.0, 60.0, 0.5)
    assert words == "the features use 10.0 directions, 60.0 at the start: collapse"
    assert "2.0% are left beyond chance: what the weights knew is lost" in str(
        diagnose_start(40.0, 60.0, 0.02)
    )
    assert diagnose_start(40.0, 60.0, 0.1) is None


# --- linear probe


def _labeled(count: int, classes: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    features, labels = _clusters(count, classes, width, seed)
    return features.numpy() * np.arange(1, width + 1, dtype=np.float32) + 3, labels.numpy()


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("width", [6, 400])  # fewer features than rows, and many more
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_probe_equals_scikit_learn_on_the_same_scaled_features(
    classes: int, width: int, balanced: bool
) -> None:
    features, labels = _labeled(80, classes, width)
    reference, _ = _labeled(300, classes, width, seed=5)
    probe = fit_probe(features, labels, classes, 10.0, balanced=balanced, reference=reference)
    model = LogisticRegression(C=10.0, tol=1e-9, max_iter=2000, class_weight="balanced" if balanced else None)
    model.fit(((features - probe.mean) / probe.scale).astype(np.float64), labels)
    unseen, _ = _labeled(50, classes, width, seed=6)
    logits = probe.logits(unseen)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert logits.shape == (50, classes)
    expected = model.predict_proba((unseen - probe.mean) / probe.scale)
    assert shares == pytest.approx(expected, abs=5e-3)
    clear = np.ptp(np.sort(expected)[:, -2:], axis=1) > 1e-2  # no tie between the first two
    assert clear.mean() > 0.8
    assert (logits.argmax(axis=1) == expected.argmax(axis=1))[clear].all()


def test_features_are_standardised_by_the_reference_to_rows_of_about_unit_length() -> None:
    features, labels = _labeled(40, 3, 8)
    reference, _ = _labeled(500, 3, 8, seed=5)
    probe = fit_probe(features, labels, 3, 1.0, balanced=False, reference=reference)
    scaled = (reference - probe.mean) / probe.scale
    assert scaled.mean(axis=0) == pytest.approx(np.zeros(8), abs=1e-4)
    assert (scaled**2).sum(axis=1).mean() == pytest.approx(1, rel=0.1)


def test_a_feature_that_hardly_moves_is_not_blown_up() -> None:
    features, labels = _labeled(40, 3, 8)
    reference, _ = _labeled(500, 3, 8, seed=5)
    reference[:, 2] = 1.0
    reference[0, 2] += 1e-5
    probe = fit_probe(features, labels, 3, 1.0, balanced=False, reference=reference)
    assert np.abs((reference[:, 2] - probe.mean[2]) / probe.scale[2]).max() < 1e-2


@pytest.mark.parametrize("classes", [2, 4])
def test_a_folded_probe_gives_the_same_logits_on_raw_features(classes: int) -> None:
    features, labels = _labeled(80, classes, 6)
    probe = fit_probe(features, labels, classes, 1.0, balanced=False, reference=features)
    weight, bias = probe.folded()
    assert (weight.shape, bias.shape) == ((classes, 6), (classes,))
    assert features @ weight.T + bias == pytest.approx(probe.logits(features), abs=1e-4)


def test_balanced_weights_let_a_rare_class_be_seen() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], [95, 5])
    features = (rng.normal(size=(100, 2)) + labels[:, None]).astype(np.float32)
    rare = labels == 1
    found = {
        balanced: fit_probe(features, labels, 2, 1.0, balanced=balanced, reference=features)
        .logits(features)
        .argmax(axis=1)[rare]
        .mean()
        for balanced in (False, True)
    }
    assert found[True] >= 0.6
    assert found[False] <= 0.2


def test_larger_strength_regularises_less() -> None:
    features, labels = _labeled(80, 3, 6)
    weak, strong = (
        fit_probe(features, labels, 3, strength, balanced=False, reference=features)
        for strength in (100.0, 0.01)
    )
    assert np.abs(weak.weight).mean() > 5 * np.abs(strong.weight).mean()


def test_accuracies_by_hand() -> None:
    truth = np.array([0, 0, 0, 0, 1, 1, 3, 3])
    predicted = np.array([0, 0, 0, 1, 1, 0, 3, 2])
    assert accuracy(predicted, truth) == 5 / 8
    assert macro_accuracy(predicted, truth) == pytest.approx((3 / 4 + 1 / 2 + 1 / 2) / 3)
    assert accuracy(predicted, truth) == accuracy_score(truth, predicted)
    seen = predicted != 2  # scikit-learn warns of a class that is only predicted
    assert macro_accuracy(predicted[seen], truth[seen]) == pytest.approx(
        balanced_accuracy_score(truth[seen], predicted[seen])
    )


def test_folds_hold_every_row_once_and_every_class_alike() -> None:
    labels = np.repeat([0, 1, 2], [30, 15, 6])
    folds = stratified_folds(labels, 3, seed=0)
    assert len(folds) == 3
    assert sorted(np.concatenate([held for _, held in folds])) == list(range(51))
    for train, held in folds:
        assert not set(train) & set(held)
        assert len(train) + len(held) == 51
        assert np.bincount(labels[held]).tolist() == [10, 5, 2]


def test_folds_depend_on_the_seed_alone() -> None:
    labels = np.repeat([0, 1], 20)
    first, again, other = (stratified_folds(labels, 4, seed)[0][1].tolist() for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_folds_tear_no_group_apart_and_hold_every_class() -> None:
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(90) % 3)
    groups = rng.integers(0, 30, 90)
    for train, held in stratified_folds(labels, 3, 0, groups):
        assert set(groups[train]).isdisjoint(groups[held])
        assert sorted([*train, *held]) == list(range(90))
        assert set(labels[train]) == {0, 1, 2}


def test_groups_of_one_image_change_no_fold() -> None:
    labels = np.arange(40) % 4
    plain = stratified_folds(labels, 4, 0)
    numbered = stratified_folds(labels, 4, 0, np.random.default_rng(0).permutation(40) + 7)
    assert [held.tolist() for _, held in plain] == [held.tolist() for _, held in numbered]
