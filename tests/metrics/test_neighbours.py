"""Nearest neighbours of many images: bounded memory, a progress bar, the same results in any blocks."""

import dataclasses

import numpy as np
import pytest
import torch

from edm2kit.metrics import neighbours
from edm2kit.metrics.neighbours import nearest_distances, nearest_indices, neighbourhood
from tests.support.memory import PeakBytes

N, M, FEATURES = 700, 600, 40
BLOCK, TILE = 1 << 13, 64


def rows(count, seed):
    return torch.from_numpy(np.random.default_rng(seed).normal(3, 1, (count, FEATURES)).astype(np.float32))


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(neighbours, "_BLOCK_ELEMENTS", BLOCK)
    monkeypatch.setattr(neighbours, "_TILE_ROWS", TILE)


def test_memory_is_that_of_the_features_and_a_few_blocks(small_blocks):
    real, generated = rows(N, 1), rows(M, 2)
    with PeakBytes() as memory:
        neighbourhood(real, generated)
    stated = 8 * FEATURES * (N + M) + 3 * 8 * BLOCK  # as the docstring says, with its blocks of 1 << 24 distances
    per_image = 200 * (N + M)  # results, radii and indices
    assert memory.peak <= stated + per_image
    assert stated + per_image < 8 * N * M / 3  # far from all distances at once
    assert 3 * 8 * (1 << 24) == 384 << 20


def test_memory_of_nearest_images_is_bounded_too(small_blocks):
    real, generated = rows(N, 1), rows(M, 2)
    for search in (lambda: nearest_distances(generated, real), lambda: nearest_indices(generated, real, 10)):
        with PeakBytes() as memory:
            search()
        assert memory.peak <= 8 * FEATURES * (N + M) + 3 * 8 * BLOCK + 300 * (N + M)


def test_blocks_do_not_change_a_result(small_blocks, monkeypatch):
    real, generated = rows(N, 1), rows(M, 2)
    found = neighbourhood(real, generated)
    monkeypatch.undo()
    whole = neighbourhood(real, generated)
    for field in dataclasses.fields(found):
        one, other = getattr(found, field.name), getattr(whole, field.name)
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert 0 < found.is_precise.double().mean() <= 1


def test_long_searches_show_a_progress_bar(small_blocks, capfd):
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
