import math

import pytest
import torch

from edm2kit.denoiser import Denoiser
from edm2kit.guidance.combine import Guided
from edm2kit.guidance.interval import GuidanceInterval, guided_steps
from edm2kit.sampling.noise_levels import karras_sigmas
from edm2kit.sampling.solvers import edm_sampler
from edm2kit.torch_utils.rng import StackedGenerator
from tests.support.fakes import Constant, Counting, Following, Gaussian

SIGMAS = karras_sigmas(32, 0.002, 80, 7)
X = torch.randn([3, 1, 2, 2], generator=torch.Generator().manual_seed(0))
POS, NEG = Gaussian(0.2, 0.25), Gaussian(-0.3, 0.36)
GUIDED = Guided(POS, NEG, 2.1)


# the published intervals and the steps they mean, specs section 4
@pytest.mark.parametrize(
    ("interval", "steps"),
    [
        ((0.28, 2.90), range(15, 22)),  # EDM2-S, FID
        ((0.19, 1.61), range(17, 23)),  # EDM2-XXL, FID
        ((0.60, 5.00), range(13, 20)),  # both, FD-DINOv2
        ((0.0, math.inf), range(32)),
        ((0.0, 80.0), range(32)),
        ((0.0, 2.90), range(15, 32)),
        ((1.0, 1.0), range(18, 18)),
        ((100.0, math.inf), range(0)),
    ],
)
def test_rounded_ends_mean_the_nearest_noise_levels(interval, steps):
    assert list(guided_steps(SIGMAS, *interval)) == list(steps)
    assert list(guided_steps(SIGMAS.double(), *interval)) == list(steps)


def test_everywhere_is_ungated_bitwise():
    everywhere = GuidanceInterval(GUIDED, POS, 0.0, math.inf)
    assert torch.equal(edm_sampler(everywhere, X), edm_sampler(GUIDED, X))


def test_nowhere_is_unguided_bitwise_and_calls_no_negative():
    negative = Counting(NEG)
    nowhere = GuidanceInterval(Guided(POS, negative, 2.1), POS, 1.0, 1.0)
    assert torch.equal(edm_sampler(nowhere, X), edm_sampler(POS, X))
    assert negative.calls == []


def test_the_cost_is_two_more_evaluations_per_guided_step():
    positive, negative = Counting(POS), Counting(NEG)
    edm_sampler(GuidanceInterval(Guided(positive, negative, 2.0), positive, 0.19, 1.61), X)
    assert len(positive.calls) == 63
    assert len(positive.calls) + len(negative.calls) == 75  # EDM2-XXL


def per_evaluation(x, sigma, labels=None):
    """The mistake: comparing every evaluation's own noise level with the rounded ends."""
    return (EQUAL if 0.28 < float(sigma) <= 2.90 else Gaussian(0.2, 0.25))(x, sigma, labels)


EQUAL = Guided(Gaussian(0.2, 0.25), Gaussian(-0.3, 0.25), 2.1)


@pytest.mark.parametrize(("num_steps", "within"), [(32, 0.0025), (256, 0.0001)])
def test_c2_on_an_interval(num_steps, within):
    v, m1, m0, w, T = 0.25, 0.2, -0.3, 2.1, 80.0
    sigmas = karras_sigmas(num_steps, 0.002, T, 7, torch.float64)
    steps = guided_steps(sigmas, 0.28, 2.90)
    lo, hi = sigmas[steps.stop].item(), sigmas[steps.start].item()
    shift = (w - 1) * (m1 - m0) * (math.sqrt(v / (v + lo**2)) - math.sqrt(v / (v + hi**2)))
    start = torch.full([1, 1, 1, 1], m1 / T, dtype=torch.float64)
    gated = GuidanceInterval(EQUAL, Gaussian(m1, v), 0.28, 2.90)
    x = edm_sampler(gated, start, num_steps=num_steps, dtype=torch.float64)
    assert x.item() - m1 == pytest.approx(shift, rel=within)
    # negative control: this test would notice
    wrong = edm_sampler(per_evaluation, start, num_steps=num_steps, dtype=torch.float64)
    assert abs((wrong.item() - m1) / shift - 1) > 5 * within


def test_with_churn_the_nominal_level_decides():
    negative = Counting(NEG)
    gated = GuidanceInterval(Guided(POS, negative, 2.0), POS, 0.28, 2.90)
    edm_sampler(gated, X, S_churn=12, randn_like=torch.zeros_like)
    assert len(negative.calls) == 14


def test_a_call_outside_of_a_run_is_refused():
    gated = GuidanceInterval(GUIDED, POS, 0.28, 2.90)
    assert isinstance(gated, Denoiser)
    with pytest.raises(ValueError, match="whole steps"):
        gated(X, torch.tensor(1.0))


@pytest.mark.parametrize("interval", [(2.0, 1.0), (-1.0, 1.0), (math.nan, 1.0), (0.0, math.nan)])
def test_an_interval_that_runs_backwards_is_refused(interval):
    with pytest.raises(ValueError, match="expected 0 <= lo <= hi"):
        GuidanceInterval(GUIDED, POS, *interval)


def test_what_it_wraps_follows_the_run():
    inside, outside = Following(POS), Following(Constant(0.0))
    gated = GuidanceInterval(inside, outside, 0.5, 2.0).for_images(StackedGenerator("cpu", range(3)))
    for i in range(3):
        step = gated.for_step(i, torch.tensor([4.0, 2.0, 0.5, 0.0]))
        step(X, torch.tensor(1.0))
        step.after_step(X, i, None)
    assert inside.heard == [("for_images", 3), ("for_step", 1), ("call", 1), ("after_step", 1)]
    rest = [(what, i) for i in (0, 2) for what in ("for_step", "call", "after_step")]
    assert outside.heard == [("for_images", 3), *rest]
