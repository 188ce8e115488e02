"""One pass over all pairs of images: every pair comes once, and all metrics that need pairs share it."""

import numpy as np
import pytest
import torch

from edm2kit.metrics import kernel_distance, moments, neighbours, pairs
from edm2kit.metrics.kernel_distance import kid
from edm2kit.metrics.label_agreement import CosineNeighbours
from edm2kit.metrics.memorization import _mann_whitney_u
from edm2kit.metrics.moments import FeatureStatistics, row_products
from edm2kit.metrics.pairs import PairVisitor, scaled_rows, visit_pairs
from edm2kit.metrics.registry import METRICS, pair_visitors
from edm2kit.metrics.score import Sample

SHARED = ["precision", "recall", "density", "coverage", "kid", "knn_agreement", "authpct"]


def rows(count, seed, features=12, shift=0.0):
    return torch.from_numpy(np.random.default_rng(seed).normal(shift, 1, (count, features)).astype(np.float32))


def sample(names, generated=None, real=None):
    generated, real = rows(90, 1) if generated is None else generated, rows(110, 2) if real is None else real
    statistics = FeatureStatistics(np.zeros(generated.shape[1]), np.eye(generated.shape[1]), None)
    labels, real_labels = torch.arange(len(generated)) % 3, torch.arange(len(real)) % 3
    return Sample(
        generated, statistics, real=real, labels=labels, real_labels=real_labels, pair_visitors=pair_visitors(names)
    )


class Collector(PairVisitor):
    """All products, in three matrices."""

    def __init__(self, needs_within=True):
        self.needs_within = needs_within

    def start(self, generated, real):
        m, n = len(generated), len(real)
        self.generated, self.real, self.crossed = torch.zeros(m, m), torch.zeros(n, n), torch.zeros(m, n)

    def within_generated(self, rows, columns, products):
        self.generated[rows, columns] += products

    def within_real(self, rows, columns, products):
        self.real[rows, columns] += products

    def across(self, rows, columns, products):
        assert self.generated.any() == self.needs_within  # pairs within the sets come first
        self.crossed[rows, columns] += products


@pytest.mark.parametrize("tile", [16, 2048])
def test_every_pair_comes_once(monkeypatch, tile):
    monkeypatch.setattr(pairs, "TILE_ROWS", tile)
    ours, theirs = scaled_rows(rows(50, 1), rows(37, 2))
    found, alone = Collector(), Collector(needs_within=False)
    visit_pairs(ours, theirs, [found])
    visit_pairs(ours, theirs, [alone])
    for collected in (found, alone):
        torch.testing.assert_close(collected.crossed, ours.scaled @ theirs.scaled.T)
    assert not alone.real.any()
    for matrix, points in ((found.generated, ours), (found.real, theirs)):
        places = torch.arange(len(points)) // tile
        is_shown = places[:, None] <= places[None]  # the tiles on and above the diagonal
        torch.testing.assert_close(matrix, (points.scaled @ points.scaled.T) * is_shown)


@pytest.mark.parametrize("count", [1, 7, 300])
def test_products_are_those_of_float32_or_better(count):
    x, y = rows(count, 1, 200), rows(300, 2, 200)
    bound = 200 * torch.finfo(torch.float32).eps / 2 * x.double().norm(dim=1)[:, None] * y.double().norm(dim=1)
    assert ((row_products(x, y).double() - x.double() @ y.double().T).abs() <= bound).all()
    # parts of larger tensors, too
    assert torch.equal(
        row_products(x[:, :100], y[:, :100]), row_products(x[:, :100].contiguous(), y[:, :100].contiguous())
    )


def test_float32_with_the_errors_of_bfloat16_is_not_used(monkeypatch):
    assert moments.product_dtype(torch.device("cpu")) == torch.float32
    monkeypatch.setattr(moments, "row_products", lambda x, y: (x.bfloat16() @ y.bfloat16().T).float())
    assert moments.product_dtype(torch.device("cpu")) == torch.float64


def test_without_onednn_products_are_the_same_but_for_rounding(monkeypatch):
    x, y = rows(30, 1), rows(20, 2)
    fast = row_products(x, y)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    torch.testing.assert_close(row_products(x, y), fast)


def test_metrics_share_one_pass_and_have_the_same_bits_alone(monkeypatch):
    calls = []
    original = pairs.scaled_rows

    def counted(*sets):
        calls.append(sets)
        return original(*sets)

    monkeypatch.setattr("edm2kit.metrics.score.scaled_rows", counted)
    together = sample(SHARED)
    found = {name: METRICS[name].compute(together) for name in SHARED}
    assert len(calls) == 1
    for name in SHARED:
        alone = METRICS[name].compute(sample([name]))
        assert alone.value == found[name].value
        assert torch.equal(alone.influence, found[name].influence)
    assert len(calls) == 1 + len(SHARED)


def test_a_metric_that_cannot_be_computed_leaves_the_others_alone():
    few = sample(SHARED, rows(4, 1))
    assert np.isfinite(METRICS["kid"].compute(few).value)
    assert 0 <= METRICS["knn_agreement"].compute(few).value <= 1
    with pytest.raises(ValueError, match="expected more images"):
        METRICS["recall"].compute(few)


def plain_kid(x, y, picks):
    values = []
    for pick_x, pick_y in picks:
        a, b = x[pick_x], y[pick_y]
        own = [((u @ u.T / x.shape[1] + 1) ** 3) for u in (a, b)]
        total = sum((kernel.sum() - np.trace(kernel)) / (len(a) * (len(a) - 1)) for kernel in own)
        values.append(total - 2 * np.mean((a @ b.T / x.shape[1] + 1) ** 3))
    return np.mean(values)


@pytest.mark.parametrize(("shift", "apart"), [(0.0, 0.3), (5.0, 0.3), (1.0, 0.0)])
@pytest.mark.parametrize("tile", [48, 2048])
@pytest.mark.parametrize("subsets", [8, 100])  # of 50: all pairs of 200 and 180 images are 14 times as many as of one
def test_kid_of_subsets_and_of_all_pairs_is_its_definition(monkeypatch, shift, apart, tile, subsets):
    monkeypatch.setattr(kernel_distance, "_SUBSETS", subsets)
    monkeypatch.setattr(kernel_distance, "_SUBSET_SIZE", 50)
    monkeypatch.setattr(pairs, "TILE_ROWS", tile)
    x, y = rows(200, 1, shift=shift), rows(180, 2, shift=shift + apart)
    found = sample(["kid"], x, y)
    score = kid(found)
    assert bool(found._visited) == (subsets == 100)
    rng = np.random.default_rng(0)
    picks = [(rng.choice(200, 50, replace=False), rng.choice(180, 50, replace=False)) for _ in range(subsets)]
    # sets that are alike have a distance of a thousandth of the kernel
    assert score.value == pytest.approx(plain_kid(x.double().numpy(), y.double().numpy(), picks), rel=1e-6)


def plain_nearest(generated, real, count):
    """By all differences of unit rows in float64; of equal ones, the first. In the order of their numbers."""
    ours, theirs = (torch.nn.functional.normalize(x.double(), dim=1) for x in (generated, real))
    squared = (ours[:, None] - theirs[None]).square().sum(dim=2)
    return squared.sort(dim=1, stable=True).indices[:, :count].sort(dim=1).values


def cosine_search(generated, real, count=10):
    search = CosineNeighbours(count)
    visit_pairs(*scaled_rows(generated, real), [search])
    return search.found().sort(dim=1).values


@pytest.mark.parametrize("shift", [0.0, 3.0, 1e4])
@pytest.mark.parametrize("tile", [48, 2048])
def test_the_nearest_by_cosine_are_those_of_float64(monkeypatch, shift, tile):
    monkeypatch.setattr(pairs, "TILE_ROWS", tile)
    generated, real = rows(70, 1, shift=shift), rows(150, 2, shift=shift)
    assert torch.equal(cosine_search(generated, real), plain_nearest(generated, real, 10))


def test_the_nearest_by_cosine_of_rows_that_float32_cannot_tell_apart():
    centres = rows(5, 1).double().repeat_interleave(40, dim=0)
    generated, real = (centres + 1e-7 * rows(200, seed).double() for seed in (2, 3))
    assert torch.equal(cosine_search(generated, real), plain_nearest(generated, real, 10))
    # rows of very different lengths, copies, and rows of zeros
    lengths = 2.0 ** (3 * (torch.arange(200) % 7) - 9)
    real = torch.cat([real * lengths[:, None], real[:20], torch.zeros(30, 12, dtype=torch.float64)])
    generated = torch.cat([generated, torch.zeros(2, 12, dtype=torch.float64)])
    assert torch.equal(cosine_search(generated, real), plain_nearest(generated, real, 10))
    assert cosine_search(generated, real[:10]).tolist() == [list(range(10))] * len(generated)


@pytest.mark.parametrize("columns", [3, 255, 256, 300, 2048])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_least_are_found_by_groups(columns, transposed):
    values = torch.from_numpy(np.random.default_rng(0).permutation(40 * columns).astype(np.float32))
    values = values.view(columns, 40).T if transposed else values.view(40, columns)
    kept = min(8, columns)
    least, where = neighbours._least(values, kept)
    assert torch.equal(least, values.sort(dim=1).values[:, :kept])
    assert torch.equal(values.gather(1, where), least)
    equal, where = neighbours._least(torch.ones(3, columns), kept)
    assert equal.tolist() == [[1.0] * kept] * 3
    assert all(len(set(row)) == kept for row in where.tolist())


def test_the_mann_whitney_u_counts_pairs_and_half_of_equal_ones():
    from scipy.stats import mannwhitneyu

    x, y = (torch.from_numpy(np.random.default_rng(seed).integers(0, 9, 40)).double() for seed in range(2))
    assert _mann_whitney_u(x, y) == mannwhitneyu(x.numpy(), y.numpy(), alternative="less").statistic
