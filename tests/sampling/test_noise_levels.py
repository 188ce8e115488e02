"""Noise levels against Equation 5 of EDM, published tables and an exhaustive search."""

import itertools
import math

import pytest
import torch

from edm2kit.sampling.noise_levels import (
    AYS,
    ays_sigmas,
    euler_deviations,
    gits_sigmas,
    karras_sigmas,
    listed_sigmas,
    parse_levels,
)
from edm2kit.sampling.solvers import Sampler
from tests.support.fakes import Mixture


def test_the_schedule_is_equation_5_of_edm():
    sigmas = karras_sigmas(32, 0.002, 80, 7, torch.float64)
    for i in (0, 1, 15, 22, 31):
        expected = (80 ** (1 / 7) + i / 31 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        assert sigmas[i].item() == pytest.approx(expected, rel=1e-12)
    assert len(sigmas) == 33
    assert sigmas[-1] == 0
    assert bool((sigmas.diff() < 0).all())


def test_one_step_goes_from_the_top_to_zero():
    assert karras_sigmas(1, 0.002, 80, 7, torch.float64).tolist() == pytest.approx([80, 0])


def test_float32_is_float64_rounded():
    exact = karras_sigmas(18, 0.01, 20, 5, torch.float64)
    assert torch.equal(karras_sigmas(18, 0.01, 20, 5), exact.float())


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ((0, 0.002, 80, 7), "steps is 0"),
        ((8, 0, 80, 7), "sigma_min is 0"),
        ((8, 80, 0.002, 7), "sigma_max 0.002"),
        ((8, 0.002, math.inf, 7), "sigma_max inf"),
        ((8, math.nan, 80, 7), "sigma_min is nan"),
        ((8, 0.002, 80, 0), "rho is 0"),
        ((8, 0.002, 80, math.nan), "rho is nan"),
    ],
)
def test_a_schedule_that_does_not_fall_is_refused(settings, wrong):
    with pytest.raises(ValueError, match=wrong):
        karras_sigmas(*settings)


# ---- published tables


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("ays-sd15", "StableDiffusionSigmas"),
        ("ays-sdxl", "StableDiffusionXLSigmas"),
        ("ays-svd", "StableDiffusionVideoSigmas"),
    ],
)
def test_the_tables_are_those_of_diffusers(name, theirs):
    tables = pytest.importorskip("diffusers.schedulers").AysSchedules
    sigmas = ays_sigmas(name, 10, AYS[name][-1], AYS[name][0], torch.float64)
    assert sigmas.tolist() == pytest.approx(tables[theirs])


def test_other_numbers_of_steps_interpolate_log_sigma():
    first, last = AYS["ays-sd15"][0], AYS["ays-sd15"][-1]
    sigmas = ays_sigmas("ays-sd15", 19, last, first, torch.float64)
    assert sigmas[:-1:2].tolist() == pytest.approx(AYS["ays-sd15"])
    assert sigmas[1].item() == pytest.approx(math.sqrt(14.615 * 6.475))


def test_tables_are_stretched_to_the_ends_of_the_run():
    sigmas = ays_sigmas("ays-svd", 10, 0.002, 80, torch.float64)
    assert (sigmas[0].item(), sigmas[-2].item(), sigmas[-1].item()) == pytest.approx((80, 0.002, 0))
    assert ays_sigmas("ays-svd", 1, 0.002, 80).tolist() == pytest.approx([80, 0])


def test_listed_levels():
    assert listed_sigmas([3, 1, 0.5]).tolist() == [3, 1, 0.5, 0]
    for levels in ([], [1, 2], [1, 1], [1, 0], [math.inf, 1], [math.nan]):
        with pytest.raises(ValueError, match="do not fall"):
            listed_sigmas(levels)
    assert parse_levels("ays-svd") == "ays-svd"
    assert parse_levels("3,1,0.5") == (3, 1, 0.5)
    with pytest.raises(ValueError, match="is not a list of noise levels, nor one of karras, ays-sd15"):
        parse_levels("karas")


# ---- GITS


NOISE = torch.randn([16, 1, 1, 2], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TEACHER = karras_sigmas(16, 0.002, 80, 7, torch.float64)
MIXTURE = Mixture(torch.tensor([[-1.0, 0.5], [1.0, 0.0]]).reshape(2, 1, 1, 2), 0.05)


def deviations():
    return euler_deviations(MIXTURE, NOISE, None, TEACHER)


def total_cost(chosen, coefficient):
    """The cost of a choice of levels by its definition, the teacher's trajectory included."""
    x, points = NOISE * TEACHER[0], []
    for sigma, following in itertools.pairwise(TEACHER):
        slope = (x - MIXTURE(x, sigma)) / sigma
        points.append((x, slope))
        x = x + (following - sigma) * slope
    total = 0.0
    for k, (i, j) in enumerate(itertools.pairwise(chosen)):
        off = points[i][0] + (TEACHER[j] - TEACHER[i]) * points[i][1] - points[j][0]
        total += coefficient**k * off.flatten(1).norm(dim=1).mean().item()
    return total


@pytest.mark.parametrize("coefficient", [1.0, 1.15])
@pytest.mark.parametrize("num_steps", [2, 4, 5])
def test_the_levels_of_gits_are_the_cheapest_of_all(num_steps, coefficient):
    sigmas = gits_sigmas(deviations(), num_steps, TEACHER, coefficient)
    everything = [(0, *inner, 15) for inner in itertools.combinations(range(1, 15), num_steps - 2)]
    best = min(everything, key=lambda chosen: total_cost(chosen, coefficient))
    assert sigmas.tolist() == [*TEACHER[list(best)].tolist(), 0.0]


def test_gits_may_choose_every_level_but_not_more():
    assert torch.equal(gits_sigmas(deviations(), 16, TEACHER), TEACHER)
    for num_steps in (1, 17):
        with pytest.raises(ValueError, match="GITS expected 2 to 16"):
            gits_sigmas(deviations(), num_steps, TEACHER)


def test_euler_with_the_levels_of_gits_ends_nearer_to_the_exact_solution():
    levels = gits_sigmas(deviations(), 6, TEACHER)[:-1].tolist()
    fitted = Sampler(6, solver="euler", dtype=torch.float64, levels=tuple(levels))
    plain = Sampler(6, solver="euler", dtype=torch.float64)
    exact = Sampler(500, dtype=torch.float64)(MIXTURE, NOISE)
    off = [(sampler(MIXTURE, NOISE) - exact).square().mean().item() for sampler in (fitted, plain)]
    assert off[0] < 0.8 * off[1]


# ---- a sampler with levels


def test_a_sampler_takes_levels_by_name_and_as_a_list():
    assert torch.equal(Sampler(6, levels="ays-svd").sigmas(), ays_sigmas("ays-svd", 6, 0.002, 80))
    assert Sampler(3, levels=(3.0, 1.0, 0.5)).sigmas().tolist() == [3, 1, 0.5, 0]
    with pytest.raises(ValueError, match="3 noise levels for 4 steps"):
        Sampler(4, levels=(3.0, 1.0, 0.5))
    with pytest.raises(ValueError, match="'karas' are unknown; expected one of karras, ays-sd15"):
        Sampler(levels="karas")
    with pytest.raises(ValueError, match="depend on the denoiser"):
        Sampler(levels="gits").sigmas()
    with pytest.raises(ValueError, match="take 2 to 60 steps"):
        Sampler(1, levels="gits")
