"""Nearest neighbours of many images: bounded memory, a progress bar, the results of float64 in tiles of any size."""

import dataclasses

import numpy as np
import pytest
import torch

from edm2kit.metrics import memorization, moments, neighbours, pairs
from edm2kit.metrics import vendi as vendi_module
from edm2kit.metrics.memorization import ct_score
from edm2kit.metrics.moments import FeatureStatistics
from edm2kit.metrics.neighbours import nearest_distances, nearest_indices, neighbourhood
from edm2kit.metrics.score import Sample
from edm2kit.metrics.vendi import vendi
from tests.support.memory import PeakBytes

N, M, FEATURES = 800, 780, 40
TILE, PAIRS, EXACT = 96, 512, 1 << 10
TILE_BYTES = 8 * 4 * TILE**2 + 200 * PAIRS + 4 * 8 * EXACT  # a few tiles, and what is computed from their pairs


def rows(count, seed):
    return torch.from_numpy(np.random.default_rng(seed).normal(3, 1, (count, FEATURES)).astype(np.float32))


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(pairs, "TILE_ROWS", TILE)
    monkeypatch.setattr(neighbours, "_PAIRS", PAIRS)
    monkeypatch.setattr(pairs, "EXACT_ELEMENTS", EXACT)


def squared_distances(points, others):
    """In float64, from all differences."""
    return (points.double()[:, None] - others.double()[None]).square().sum(dim=2)


def plain_neighbourhood(real, generated):
    """The fields of a Neighbourhood from all distances."""
    across = squared_distances(generated, real)
    of_real, of_generated = (squared_distances(x, x).fill_diagonal_(torch.inf).sort().values for x in (real, generated))
    inside = across <= of_real[:, 4]
    return {
        "is_precise": (across <= of_real[:, 2]).any(dim=1),
        "is_recalled": (across <= of_generated[:, 2:3]).any(dim=0),
        "num_balls": inside.sum(dim=1),
        "is_covered": inside.any(dim=0),
        "squared_distance_to_real": across.amin(dim=1),
        "real_squared_distance": of_real[:, 0],
        "nearest_real": (across == across.amin(dim=1, keepdim=True)).long().argmax(dim=1),  # of several, the first
    }


def assert_as_from_all_distances(real, generated):
    found = neighbourhood(real, generated)
    expected = plain_neighbourhood(real, generated)
    assert set(expected) == {field.name for field in dataclasses.fields(found)}
    for name, value in expected.items():
        torch.testing.assert_close(getattr(found, name), value, rtol=1e-14, atol=0, msg=lambda text, n=name: n + text)


def test_memory_is_that_of_the_features_and_a_few_tiles(small_tiles):
    real, generated = rows(N, 1), rows(M, 2)
    with PeakBytes() as memory:
        neighbourhood(real, generated)
    stated = 4 * FEATURES * (N + M) + TILE_BYTES
    per_image = 300 * (N + M)  # candidates, radii and results
    assert memory.peak <= stated + per_image
    assert stated + per_image < 8 * N * M / 3  # far from all distances at once


def test_tiles_are_as_small_as_the_docstring_says():
    assert (8 * 4 * pairs.TILE_ROWS**2 + 100 * neighbours._PAIRS) <= 256 << 20
    assert "256 MiB" in neighbourhood.__doc__


def test_balls_that_contain_everything_need_no_more_memory(small_tiles):
    # all generated images in one place: every pair is inside a ball
    real, generated = rows(N, 1), 3 + rows(M, 2) * 1e-3
    with PeakBytes() as memory:
        found = neighbourhood(torch.cat([real, 3 + rows(8, 3) * 1e3]), generated)
    assert memory.peak <= 4 * FEATURES * (N + M) + 2 * TILE_BYTES + 300 * (N + M)
    assert found.num_balls.min() >= 8


def test_memory_of_nearest_images_is_bounded_too(small_tiles):
    real, generated = rows(N, 1), rows(M, 2)
    for search in (lambda: nearest_distances(generated, real), lambda: nearest_indices(generated, real, 10)):
        with PeakBytes() as memory:
            search()
        assert memory.peak <= 4 * FEATURES * (N + M) + TILE_BYTES + 600 * M


@pytest.mark.parametrize(("metric", "copies"), [(vendi, 1), (ct_score, 2)])
def test_no_metric_copies_all_features_in_float64(monkeypatch, metric, copies):
    for module in (moments, vendi_module, memorization):
        monkeypatch.setattr(module, "GRAM_ROWS", 256)
    count, features = 4000, 300
    generated, real, heldout = (
        torch.from_numpy(np.random.default_rng(seed).normal(size=(count, features)).astype(np.float32))
        for seed in range(3)
    )
    statistics = FeatureStatistics(np.zeros(features), np.eye(features), None)
    with PeakBytes() as memory:
        metric(Sample(generated, statistics, real=real, heldout=heldout))
    assert memory.peak < copies * 8 * count * features  # ct keeps 64 of 300 components of three sets


def test_tiles_do_not_change_a_bit(small_tiles, monkeypatch):
    real, generated = rows(N, 1), rows(M, 2)
    found, nearest = neighbourhood(real, generated), nearest_indices(generated, real, 10)
    monkeypatch.undo()
    complete = neighbourhood(real, generated)
    for field in dataclasses.fields(found):
        assert torch.equal(getattr(found, field.name), getattr(complete, field.name)), field.name
    assert torch.equal(nearest, nearest_indices(generated, real, 10))
    assert 0 < found.is_precise.double().mean() <= 1


def test_neighbours_are_those_of_float64():
    assert_as_from_all_distances(rows(200, 1), rows(150, 2))


def test_equal_distances_are_equal_however_many():
    # whole numbers: many distances are equal, and 0.1 of them is no float32
    whole = [torch.from_numpy(np.random.default_rng(k).integers(0, 3, (120, 6))).double() * 0.1 for k in range(2)]
    assert_as_from_all_distances(*whole)
    assert_as_from_all_distances(whole[0], torch.cat([whole[0], whole[1]]))


@pytest.mark.parametrize("step", [1e-3, 1e-5, 1e-7])
def test_distances_that_float32_cannot_tell_apart_are_compared_in_float64(small_tiles, step):
    # around each of 5 images, 40 that differ from it by less than the rounding errors of products in float32
    centres = rows(5, 1).double().repeat_interleave(40, dim=0)
    assert_as_from_all_distances(centres + step * rows(200, 2), centres + step * rows(200, 3))
    # far from zero, where float32 products are worth nothing at all
    assert_as_from_all_distances(1e4 + centres + step * rows(200, 2), 1e4 + centres + step * rows(200, 3))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_features_of_any_size_do(scale):
    assert_as_from_all_distances(rows(90, 1).double() * scale, rows(80, 2).double() * scale)
    outlier = torch.cat([rows(80, 2), rows(1, 3) * 1e6])
    assert_as_from_all_distances(rows(90, 1).double() * scale, outlier.double() * scale)


def test_float32_that_is_not_exact_is_not_used():
    former = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert_as_from_all_distances(rows(90, 1), rows(80, 2))
        ours, _ = pairs.scaled_rows(rows(90, 1), rows(80, 2))
    finally:
        torch.set_float32_matmul_precision(former)
    assert ours.scaled.dtype == torch.float64


def test_long_searches_show_a_progress_bar(small_tiles, capfd):
    neighbourhood(rows(N, 1), rows(M, 2))
    shown = capfd.readouterr().err
    assert "neighbours" in shown
    assert "tile" in shown


def test_the_inputs_are_not_changed():
    real, generated = rows(20, 1).double(), rows(20, 2).double()
    copies = real.clone(), generated.clone()
    neighbourhood(real, generated)
    assert torch.equal(real, copies[0])
    assert torch.equal(generated, copies[1])
