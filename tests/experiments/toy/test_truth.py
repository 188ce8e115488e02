"""The toy's exact side: the tree, its mixture, and what is measured against it."""

import math

import numpy as np
import pytest
import torch

from edm2kit.experiments.toy.measures import MEASURES, Yardstick, sliced_wasserstein
from edm2kit.experiments.toy.mixture import Mixture
from edm2kit.experiments.toy.tree import CLASSES, NUM_BRANCHES, Components, components
from edm2kit.models.compilation import can_compile
from tests.support import golden

GOLDEN = golden.load("toy.npz")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", CLASSES)
def test_the_tree_grows_into_the_golden_components(name):
    grown = components(name)
    for key in ("phi", "mu", "Sigma"):
        golden.assert_close(torch.from_numpy(getattr(grown, key)), GOLDEN[f"{name}/{key}"].double(), 1e-6)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_density_and_score_are_golden(name, dtype):
    mixture, points, sigma = Mixture(components(name)), GOLDEN["points"].to(dtype), GOLDEN["sigma"].to(dtype)
    logp, score = mixture.logp_and_score(points, sigma)
    golden.assert_close(logp, GOLDEN[f"{name}/logp"].to(dtype), 1e-4)
    golden.assert_close(score, GOLDEN[f"{name}/score"].to(dtype), 1e-4)
    golden.assert_close(mixture.logp(points), GOLDEN[f"{name}/logp_sigma0"].to(dtype), 1e-4)


def test_the_score_is_the_gradient_of_the_log_density():
    mixture, x, sigma = Mixture(components("A")), GOLDEN["points"].double(), GOLDEN["sigma"].double()
    h = torch.tensor([1e-6, 0.0], dtype=torch.float64)
    slope = (mixture.logp(x + h, sigma) - mixture.logp(x - h, sigma)) / 2e-6
    torch.testing.assert_close(slope, mixture.score(x, sigma)[:, 0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_density_and_score_are_finite_however_far_away(dtype):
    far = torch.tensor([[1e3, -1e3], [-30.0, 0.0], [0.0, 0.0]], dtype=dtype)
    logp, score = Mixture(components("AB")).logp_and_score(far, 0.0)
    assert logp.isfinite().all()
    assert score.isfinite().all()


@pytest.mark.slow
@pytest.mark.skipif(not can_compile(), reason="no C++ compiler")
def test_compiled_blocks_give_the_same_numbers():
    x, sigma = torch.randn([1000, 2], generator=generator()), torch.rand(1000, generator=generator()) * 2
    plain = Mixture(components("A")).logp_and_score(x, sigma)
    for found, expected in zip(Mixture(components("A"), compiled=True).logp_and_score(x, sigma), plain, strict=True):
        golden.assert_close(found, expected, 1e-4)


def test_classes_make_up_the_whole_and_no_other_is_known():
    both = components("AB").branch_mass
    assert len(both) == 2 * NUM_BRANCHES
    assert both.sum() == pytest.approx(1)
    np.testing.assert_allclose(both[:NUM_BRANCHES] / both[:NUM_BRANCHES].sum(), components("A").branch_mass)
    with pytest.raises(ValueError, match="class 'C' is unknown"):
        components("C")


def test_samples_have_the_moments_of_the_mixture_and_its_noise():
    parts = components("A")
    x = Mixture(parts).sample(200_000, generator(), sigma=0.3).double()
    mean = torch.from_numpy(parts.phi @ parts.mu)
    second = torch.from_numpy(
        np.einsum("k,kij->ij", parts.phi, parts.Sigma + np.einsum("ki,kj->kij", parts.mu, parts.mu))
    )
    torch.testing.assert_close(x.mean(0), mean, atol=0.005, rtol=0)
    torch.testing.assert_close(torch.cov(x.T), second - mean.outer(mean) + 0.09 * torch.eye(2), atol=0.003, rtol=0)


def test_samples_come_in_the_branches_shares():
    mixture = Mixture(components("A"))
    got = torch.bincount(mixture.branch_of(mixture.sample(20_000, generator())), minlength=NUM_BRANCHES) / 20_000
    torch.testing.assert_close(got.double(), torch.from_numpy(mixture.parts.branch_mass), atol=0.012, rtol=0)


# ---- measures


@pytest.fixture(scope="module")
def truth():
    """Two round blobs of 3/4 and 1/4 of the mass, far apart: every measure has a closed form."""
    eye = np.eye(2) * 0.01
    return Mixture(
        Components(np.array([0.75, 0.25]), np.array([[0.0, 0.0], [5.0, 0.0]]), np.stack([eye, eye]), np.arange(2))
    )


def test_exact_samples_measure_as_exact(truth):
    found = Yardstick.of(truth, 20_000, seed=0).measure(truth.sample(20_000, generator(1)))
    assert list(found) == list(MEASURES)
    assert found["outside"] == pytest.approx(0.01, abs=0.003)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) + math.log(2 * math.pi * 0.01) + 1
    assert found["mean_log_density"] == pytest.approx(-entropy, abs=0.03)
    assert (found["lost_mass"], found["branches_held"]) == (0, 1)
    # half a percent of the mass on the wrong blob, 5 away
    assert found["sliced_wasserstein"] < 5 / math.sqrt(2) * math.sqrt(0.005)


def test_a_branch_with_less_than_half_its_mass_is_lost(truth):
    yardstick, x = Yardstick.of(truth, 1000, seed=0), torch.zeros(1000, 2)
    for in_second, lost in ((126, 0.0), (124, 0.25), (0, 0.25)):
        x[:, 0] = torch.where(torch.arange(1000) < in_second, 5.0, 0.0)
        found = yardstick.measure(x)
        assert found["lost_mass"] == pytest.approx(lost)
        assert found["branches_held"] == (1 if lost == 0 else 0.5)


def test_outliers_and_density_are_those_of_the_exact_density(truth):
    x = torch.tensor([[0.0, 0.0], [0.0, 3.0]]).repeat(50, 1)
    found = Yardstick.of(truth, 100, seed=0).measure(x)
    assert found["outside"] == 0.5
    assert found["mean_log_density"] == pytest.approx(math.log(0.75 / (2 * math.pi * 0.01)) - 3**2 / 0.01 / 4, rel=1e-5)


def test_a_shift_has_the_closed_form_distance():
    # over all directions the mean square of the projected shift d is |d|^2 / 2
    x = torch.randn([500, 2], generator=generator())
    assert sliced_wasserstein(x, x[torch.randperm(500, generator=generator())]) == 0
    assert sliced_wasserstein(x, x + torch.tensor([3.0, 4.0])) == pytest.approx(5 / math.sqrt(2), rel=1e-5)
    with pytest.raises(ValueError, match="expected equally many points"):
        sliced_wasserstein(x, x[:10])
