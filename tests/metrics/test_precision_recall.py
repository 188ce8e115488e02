"""Precision, recall, density and coverage, where they can be counted by hand or are known on average."""

import math

import pytest
import torch

from edm2kit.metrics import pairs
from edm2kit.metrics.precision_recall import neighbour_scores


def normal(count: int, features: int, seed: int) -> torch.Tensor:
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed))


def test_a_line_of_points_counted_by_hand():
    real, fake = torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.tensor([[0.5], [10.0]])
    # every real ball has radius 1: 0.5 lies in those of 0 and 1; both fake balls have radius 9.5
    scores = neighbour_scores(real, fake, 1, 1)
    assert scores == {"precision": 0.5, "recall": 1.0, "density": 1.0, "coverage": 0.5}


def test_the_edge_of_a_ball_belongs_to_it():
    real, fake = torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([[9.0], [20.0]])
    assert neighbour_scores(real, fake, 1, 1)["coverage"] == pytest.approx(1 / 3)  # that of 5 reaches from 1 to 9


def test_the_same_images_are_all_precise_recalled_and_covered():
    x = normal(50, 6, 0)
    scores = neighbour_scores(x, x)
    # a ball holds its centre and the k neighbours that made it
    assert scores == {"precision": 1.0, "recall": 1.0, "density": pytest.approx(6 / 5), "coverage": 1.0}


def test_images_far_off_are_nothing_of_it():
    x = normal(50, 6, 0)
    assert set(neighbour_scores(x, x + 100).values()) == {0.0}


def test_a_kind_that_is_missing_costs_recall_and_coverage_but_no_precision():
    kinds = [normal(100, 4, seed) + 50 * seed for seed in (0, 1)]
    scores = neighbour_scores(torch.cat(kinds), kinds[0])
    assert scores["precision"] == 1
    assert scores["recall"] == scores["coverage"] == 0.5
    assert scores["density"] > 1  # the fakes are twice as dense as they should be


def test_of_one_distribution_density_and_coverage_have_known_means():
    # Naeem et al. 2020, Section 3.2 (their lemma 1): E density = 1, E coverage = 1 - (N-1)...(N-k) / ((M+N-1)...)
    count, k, trials = 400, 5, 8
    expected = 1 - math.prod((count - i) / (2 * count - i) for i in range(1, k + 1))
    found = [
        neighbour_scores(normal(count, 8, 2 * seed), normal(count, 8, 2 * seed + 1), coverage_neighbours=k)
        for seed in range(trials)
    ]
    mean = {name: sum(scores[name] for scores in found) / trials for name in found[0]}
    assert mean["coverage"] == pytest.approx(expected, abs=0.01)
    assert mean["density"] == pytest.approx(1, abs=0.05)


def test_they_are_what_all_pairs_say_whatever_the_blocks_and_however_far_from_zero(monkeypatch):
    real, fake = 1000 + normal(70, 5, 0), 1000.3 + 0.8 * normal(60, 5, 1)
    across, among = torch.cdist(real.double(), fake.double()), torch.cdist(real.double(), real.double())
    radii = among.sort(dim=1).values
    fake_radii = torch.cdist(fake.double(), fake.double()).sort(dim=1).values
    inside = across <= radii[:, 5:6]
    expected = {
        "precision": (across <= radii[:, 3:4]).any(0).double().mean().item(),
        "recall": (across <= fake_radii[:, 3]).any(1).double().mean().item(),
        "density": inside.sum().item() / (5 * 60),
        "coverage": inside.any(1).double().mean().item(),
    }
    assert all(0 < value < 1.5 for value in expected.values())
    assert neighbour_scores(real, fake) == pytest.approx(expected)
    monkeypatch.setattr(pairs, "TILE_ROWS", 16)
    assert neighbour_scores(real, fake) == pytest.approx(expected)


def test_what_cannot_be_scored_is_refused():
    x = normal(6, 3, 0)
    with pytest.raises(ValueError, match="expected more images"):
        neighbour_scores(x, x[:5])
    with pytest.raises(ValueError, match=r"\[6, 3\] and \[6, 2\]"):
        neighbour_scores(x, x[:, :2])
    with pytest.raises(ValueError, match="not finite"):
        neighbour_scores(x, x / 0)
