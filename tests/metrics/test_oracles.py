"""Every metric against an independent plain implementation of its published definition."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from torch import nn

from edm2kit.metrics.frechet_variants import FD_VALIDATION, fd_infinity, fdr
from edm2kit.metrics.inception_score import classifier_score, inception_score
from edm2kit.metrics.kernel_distance import cmmd, kid
from edm2kit.metrics.label_agreement import knn_agreement
from edm2kit.metrics.memorization import authpct, ct_score
from edm2kit.metrics.mind import mind
from edm2kit.metrics.moments import FeatureStatistics
from edm2kit.metrics.precision_recall import coverage, density, precision, recall
from edm2kit.metrics.registry import FDR, METRICS
from edm2kit.metrics.score import Sample, Score
from edm2kit.metrics.vendi import vendi


def normal(count, features=6, seed=0, scale=1.0, shift=0.0):
    rows = np.random.default_rng(seed).normal(shift, scale, (count, features))
    return torch.from_numpy(rows.astype(np.float32))


def statistics(rows):
    x = rows.double().numpy()
    return FeatureStatistics(x.mean(axis=0), np.cov(x, rowvar=False), "")


def sample(generated, real=None, **more):
    reference = None if real is None else statistics(real)
    return Sample(generated, statistics(generated), reference, real, **more)


def exact(value):
    return pytest.approx(value, rel=1e-6, abs=1e-9)


def plain_frechet(x, y):
    root = scipy.linalg.sqrtm(np.cov(x.T) @ np.cov(y.T)).real
    return np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * root)


def head(classes=1008, features=6, seed=0):
    layer = nn.Linear(features, classes)
    rng = np.random.default_rng(seed)
    layer.weight.data = torch.from_numpy(rng.normal(size=(classes, features)).astype(np.float32))
    layer.bias.data = torch.from_numpy(rng.normal(size=classes).astype(np.float32))
    return layer.requires_grad_(False)


def identity_head(classes):
    layer = nn.Linear(classes, classes)
    layer.weight.data = torch.eye(classes)
    return layer.requires_grad_(False)


def plain_inception_score(logits, split):
    """As the evaluator of ADM: softmax in each split of `split` images, the mean of exponentials."""
    values = []
    for start in range(0, len(logits), split):
        part = scipy.special.softmax(logits[start : start + split], axis=1)
        divergence = part * (np.log(part) - np.log(part.mean(axis=0, keepdims=True)))
        values.append(np.exp(np.mean(np.sum(divergence, axis=1))))
    return np.mean(values)


def test_inception_score_leaves_the_bias_out_and_averages_splits_of_5000():
    rows, classifier = normal(7000), head()
    weight, bias = classifier.weight.double().numpy(), classifier.bias.double().numpy()
    logits = rows.double().numpy() @ weight.T
    assert inception_score(sample(rows, head=classifier)).value == exact(plain_inception_score(logits, 5000))
    assert classifier_score(sample(rows, head=classifier)).value == exact(plain_inception_score(logits + bias, 5000))


def test_a_class_that_no_image_can_show_does_not_make_the_score_nan():
    sure = torch.full([4, 3], 0.0)
    sure[:2, 0] = sure[2:, 1] = 2000.0  # in float64, the other probabilities underflow
    assert classifier_score(sample(sure, head=identity_head(3))).value == exact(2.0)


def test_inception_score_in_closed_form():
    # images of K classes, each certain: the score is K
    rows = torch.eye(4).repeat(25, 1) * 1000
    assert inception_score(sample(rows, head=identity_head(4))).value == exact(4.0)


def plain_kid(x, y, picks):
    values = []
    for pick_x, pick_y in picks:
        a, b = x[pick_x], y[pick_y]
        m = len(a)
        total = 0.0
        for u, v in ((a, a), (b, b)):
            kernel = (u @ v.T / x.shape[1] + 1) ** 3
            total += (kernel.sum() - np.trace(kernel)) / (m * (m - 1))
        values.append(total - 2 * np.mean((a @ b.T / x.shape[1] + 1) ** 3))
    return np.mean(values)


def test_kid_is_the_mean_over_100_subsets_of_1000():
    x, y = normal(1200, seed=1), normal(1100, seed=2, shift=0.3)
    rng = np.random.default_rng(0)
    picks = [(rng.choice(1200, 1000, replace=False), rng.choice(1100, 1000, replace=False)) for _ in range(100)]
    assert kid(sample(x, y)).value == exact(plain_kid(x.double().numpy(), y.double().numpy(), picks))


def test_kid_of_all_images_has_its_closed_form_on_gaussians():
    # E k(x, y) for x ~ N(a, I), y ~ N(b, I), with t = x y / d: moments of a sum of products
    d, shift = 4, 0.5
    x, y = normal(6000, d, 1), normal(6000, d, 2, shift=shift)

    def expected(a, b):
        # t given x is normal with mean x b / d and variance |x|^2 / d^2; x has mean a
        grid = np.random.default_rng(3).normal(size=(2_000_000, d)) + a
        mean, variance = grid.sum(axis=1) * b / d + 1, (grid**2).sum(axis=1) / d**2
        return np.mean(mean**3 + 3 * mean * variance)

    exact_value = expected(0, 0) + expected(shift, shift) - 2 * expected(0, shift)
    score = kid(sample(x, y))
    spread = 3 * math.sqrt(float(score.influence.square().mean()) / len(score.influence) + score.extra_variance)
    assert abs(score.value - exact_value) < 2 * spread


def test_kid_refuses_a_single_image():
    with pytest.raises(ValueError, match="got 5 generated and 1 real ones"):
        kid(Sample(normal(5), statistics(normal(5)), real=normal(1)))


def test_cmmd_is_the_biased_mmd_of_unit_vectors_times_1000():
    x, y = normal(300, seed=1), normal(200, seed=2, shift=0.3)
    a, b = (v.double().numpy() / np.linalg.norm(v.double().numpy(), axis=1, keepdims=True) for v in (x, y))

    def kernel(u, v):
        squared = ((u[:, None] - v[None]) ** 2).sum(axis=2)
        return np.exp(-squared / (2 * 10**2)).mean()

    assert cmmd(sample(x, y)).value == exact(1000 * (kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)))
    assert cmmd(sample(x, x)).value == pytest.approx(0, abs=1e-9)


def test_mind_is_3d_times_the_mean_squared_difference_of_sorted_projections():
    x, y = normal(400, seed=1), normal(400, seed=2, scale=1.3, shift=0.2)
    directions = np.random.default_rng(0).standard_normal([6, 1000]).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=0)
    total = 0.0
    a, b = x.double().numpy(), y.double().numpy()
    for u in directions.astype(np.float64).T:
        total += np.mean((np.sort(a @ u) - np.sort(b @ u)) ** 2)
    assert mind(sample(x, y)).value == exact(3 * 6 * total / 1000)
    assert mind(sample(x, x)).value == 0


def test_mind_has_its_closed_form_on_gaussians():
    # 1-D: (difference of means)^2 + (difference of standard deviations)^2; a shift s of all features adds |s|^2 / d
    d, shift, scale = 6, 0.7, 1.5
    x, y = normal(20000, d, 1), normal(20000, d, 2, scale=scale, shift=shift)
    expected = 3 * d * (shift**2 + (scale - 1) ** 2)
    assert mind(sample(x, y)).value == pytest.approx(expected, rel=0.03)


def test_mind_reduces_the_larger_set():
    x, y = normal(300, seed=1), normal(500, seed=2)
    assert 0 < mind(sample(x, y)).value < 1
    assert len(mind(sample(x, y)).influence) == 300


def test_fd_infinity_is_the_intercept_of_15_distances():
    x, y = normal(600, 4, 1), normal(5000, 4, 2, shift=0.5)
    sizes = np.linspace(300, 600, 15).astype(int)
    order = np.random.default_rng(0).permutation(600)
    rows, real = x.double().numpy()[order], y.double().numpy()
    distances = [plain_frechet(rows[:size], real) for size in sizes]
    slope, intercept, *_ = scipy.stats.linregress(1 / sizes, distances)
    assert slope != 0
    assert fd_infinity(sample(x, y)).value == exact(intercept)


def test_vendi_is_the_exponential_of_the_entropy_of_all_similarities():
    x = normal(80, seed=1)
    unit = x.double().numpy() / np.linalg.norm(x.double().numpy(), axis=1, keepdims=True)
    values = np.linalg.eigvalsh(unit @ unit.T / len(x))
    values = values[values > 1e-12]
    assert vendi(sample(x)).value == exact(np.exp(-np.sum(values * np.log(values))))
    assert vendi(sample(torch.eye(6).repeat(10, 1))).value == exact(6.0)
    assert vendi(sample(torch.ones(10, 6))).value == exact(1.0)


def test_authpct_is_the_percentage_farther_from_a_real_image_than_that_is_from_another():
    x, y = normal(90, seed=1, scale=1.2), normal(110, seed=2)
    among, across = torch.cdist(y.double(), y.double()), torch.cdist(x.double(), y.double())
    among.fill_diagonal_(torch.inf)
    authentic = [float(among[across[k].argmin()].min()) < float(across[k].min()) for k in range(len(x))]
    assert 0 < np.mean(authentic) < 1
    assert authpct(sample(x, y)).value == exact(100 * np.mean(authentic))
    assert authpct(sample(y + 1e-4, y)).value == 0  # copies


def test_knn_agreement_is_the_share_that_ten_neighbours_vote_for():
    x, y = normal(80, seed=1), normal(120, seed=2)
    labels, real_labels = torch.arange(80) % 3, torch.arange(120) % 3
    unit_x, unit_y = (v.double().numpy() / np.linalg.norm(v.double().numpy(), axis=1, keepdims=True) for v in (x, y))
    agree = []
    for row, label in zip(unit_x, labels.tolist(), strict=True):
        nearest = np.argsort(-unit_y @ row)[:10]
        agree.append(np.bincount(real_labels.numpy()[nearest], minlength=3).argmax() == label)
    found = knn_agreement(sample(x, y, labels=labels, real_labels=real_labels))
    assert 0 < np.mean(agree) < 1
    assert found.value == exact(np.mean(agree))
    assert knn_agreement(sample(x, y, labels=labels, real_labels=real_labels + 1000)).value == 0
    with pytest.raises(ValueError, match="needs the classes"):
        knn_agreement(sample(x, y, real_labels=real_labels))


def plain_zu(generated, heldout, train):
    of_generated, of_heldout = (
        np.array([np.min(np.sum((train - row) ** 2, axis=1)) for row in rows]) for rows in (generated, heldout)
    )
    m, n = len(of_generated), len(of_heldout)
    u = np.sum(of_generated[:, None] > of_heldout[None])
    return (u - (m * n / 2 - 0.5)) / np.sqrt(m * n * (m + n + 1) / 12)


def test_ct_is_the_weighted_z_score_of_the_cells():
    # five far clusters are the cells, whatever k-means starts from
    def clustered(count, seed, scale=1.0):
        rows = normal(count, 5, seed, scale)
        return rows + 100 * torch.eye(5)[torch.arange(count) % 5]

    train, heldout, generated = clustered(200, 1), clustered(150, 2), clustered(250, 3, 0.8)
    expected = []
    for cell in range(5):
        parts = [rows.double().numpy()[np.arange(len(rows)) % 5 == cell] for rows in (generated, heldout, train)]
        expected.append(plain_zu(*parts))
    assert ct_score(sample(generated, train, heldout=heldout)).value == exact(np.mean(expected))
    copied = ct_score(sample(train + 1e-3, train, heldout=heldout)).value
    assert copied < -5
    assert abs(ct_score(sample(clustered(250, 4), train, heldout=heldout)).value) < 3


def test_ct_refuses_what_it_cannot_compare():
    with pytest.raises(ValueError, match="--heldout"):
        ct_score(sample(normal(50), normal(50)))
    with pytest.raises(ValueError, match="no cell with 20"):
        ct_score(sample(normal(10), normal(50, seed=1), heldout=normal(50, seed=2)))


def test_fdr_is_the_mean_of_distances_in_units_of_the_validation_set():
    scores = {"fid": Score(1.68, torch.zeros(3)), "fd_dinov2": Score(2 * 14.19, torch.zeros(3)), "x": Score(9.0)}
    assert fdr(scores).value == exact(1.5)
    assert set(FD_VALIDATION) == {"fid", "fd_dinov2"}
    with pytest.raises(ValueError, match="at least two"):
        fdr({"fid": Score(1.0)})


@pytest.mark.parametrize(
    ("metric", "count"),
    [(kid, 250), (cmmd, 250), (mind, 250), (vendi, 250), (inception_score, 250)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_influences_predict_the_spread_over_other_images(metric, count):
    real, classifier = normal(count, 4, 999, shift=0.4), head(20, 4)
    values, predicted = [], []
    for seed in range(60):
        score = metric(sample(normal(count, 4, seed), real, head=classifier))
        values.append(score.value)
        predicted.append(float(score.influence.square().mean()) / count)
    assert np.std(values, ddof=1) == pytest.approx(math.sqrt(np.mean(predicted)), rel=0.3)


def plain_radii(points, k):
    """The distance from each point to its k-th nearest other point."""
    return np.array([np.sort(np.linalg.norm(points - point, axis=1))[k] for point in points])


def test_precision_recall_density_and_coverage_are_shares_of_balls_around_real_and_generated_images():
    x, y = normal(150, seed=1, shift=0.6), normal(130, seed=2)
    found = sample(x, y)
    x, y = x.double().numpy(), y.double().numpy()
    apart = np.linalg.norm(y[:, None] - x[None], axis=2)  # [real, generated]
    in_real, in_generated = apart <= plain_radii(y, 3)[:, None], apart <= plain_radii(x, 3)[None]
    in_larger = apart <= plain_radii(y, 5)[:, None]
    # precision is about generated images, recall about real ones
    assert precision(found).value == exact(np.mean(in_real.any(axis=0)))
    assert recall(found).value == exact(np.mean(in_generated.any(axis=1)))
    assert density(found).value == exact(np.mean(in_larger.sum(axis=0)) / 5)
    assert coverage(found).value == exact(np.mean(in_larger.any(axis=1)))
    assert len({metric(found).value for metric in (precision, recall, density, coverage)}) == 4


_BALLS = test_precision_recall_density_and_coverage_are_shares_of_balls_around_real_and_generated_images

# the test that compares each metric with a plain implementation of its definition
ORACLES = {
    "precision": _BALLS,
    "recall": _BALLS,
    "density": _BALLS,
    "coverage": _BALLS,
    "kid": test_kid_is_the_mean_over_100_subsets_of_1000,
    "mmd": test_cmmd_is_the_biased_mmd_of_unit_vectors_times_1000,
    "mind": test_mind_is_3d_times_the_mean_squared_difference_of_sorted_projections,
    "fd_infinity": test_fd_infinity_is_the_intercept_of_15_distances,
    "knn_agreement": test_knn_agreement_is_the_share_that_ten_neighbours_vote_for,
    "vendi": test_vendi_is_the_exponential_of_the_entropy_of_all_similarities,
    "authpct": test_authpct_is_the_percentage_farther_from_a_real_image_than_that_is_from_another,
    "ct": test_ct_is_the_weighted_z_score_of_the_cells,
    "inception_score": test_inception_score_leaves_the_bias_out_and_averages_splits_of_5000,
    "classifier_score": test_inception_score_leaves_the_bias_out_and_averages_splits_of_5000,
}


def test_every_registered_metric_has_an_oracle():
    assert set(ORACLES) == set(METRICS)
    for name, test in ORACLES.items():
        assert METRICS[name].compute.__name__ in test.__code__.co_names, f"the test of {name} does not call it"
    assert FDR in test_fdr_is_the_mean_of_distances_in_units_of_the_validation_set.__code__.co_names
