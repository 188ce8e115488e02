"""The probe on distributions whose denoisers are known in closed form equals theory."""

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from edm2kit.denoiser import Denoiser
from edm2kit.experiments.tune.probe import predict, probe, summary
from edm2kit.experiments.tune.probe_report import write
from edm2kit.guidance.base import Parts
from edm2kit.guidance.registry import Choice, guide
from tests.support.fakes import Gaussian, Mixture

SIGMAS = (0.2, 0.6, 2.0)
MEANS, VARIANCE = (-0.6, 0.5), 0.04


def mixture(shift: float = 0.0, variance: float = VARIANCE) -> Mixture:
    """Two components per pixel of a 1x1x1 image; a shifted or wider one is a network that errs."""
    return Mixture(torch.tensor([[[[MEANS[0] + shift]]], [[[MEANS[1] + shift]]]]), variance)


def samples(num: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    means = torch.tensor(MEANS)[torch.randint(2, [num], generator=rng)]
    return (means + VARIANCE**0.5 * torch.randn(num, generator=rng)).reshape(num, 1, 1, 1)


def doubled(main: Denoiser, other: Denoiser) -> Denoiser:
    return guide(Choice("autoguidance", 2.0), Parts(main, other))


def theory(main: Denoiser, other: Denoiser, sigma: float) -> float:
    """w* by quadrature over the noisy image x, as E[x0 | x] is the exact denoiser's answer."""
    x = torch.linspace(-8 - 6 * sigma, 8 + 6 * sigma, 40001, dtype=torch.float64).reshape(-1, 1, 1, 1)
    spread = VARIANCE + sigma**2
    density = sum(torch.exp(-((x - mean) ** 2) / (2 * spread)) for mean in MEANS)
    level = torch.tensor(sigma, dtype=torch.float64)
    exact, D, D_n = (net(x, level) for net in (mixture(), main, other))
    return float((density * (exact - D_n) * (D - D_n)).sum() / (density * (D - D_n) ** 2).sum())


def test_weights_on_a_mixture_equal_theory_within_their_intervals():
    main, guides = mixture(0.03, 0.05), {"wide": mixture(0.1, 0.12), "shifted": mixture(-0.2, 0.05)}
    images = samples(20000)
    result = probe(
        main, {name: doubled(main, one) for name, one in guides.items()}, images, None, SIGMAS, batch_size=5000
    )
    away_from_one = 0
    for name, other in guides.items():
        for level in result.levels[name]:
            expected = theory(main, other, level.sigma)
            standard_error = (level.high - level.low) / (2 * 1.96)
            assert abs(level.weight - expected) < 4 * standard_error, (name, level.sigma)
            assert standard_error < 0.1
            away_from_one += abs(level.weight - 1) > 4 * standard_error
    assert away_from_one >= 4  # the agreement means something


def test_intervals_contain_the_truth_about_as_often_as_they_say():
    main, other = mixture(0.05, 0.06), mixture(0.2, 0.12)
    expected = theory(main, other, 0.6)
    images, inside = samples(12000), 0
    for k in range(60):
        level = probe(
            main, {"g": doubled(main, other)}, images[200 * k : 200 * (k + 1)], None, [0.6], batch_size=200, seed=k
        ).levels["g"][0]  # fmt: skip
        inside += level.low <= expected <= level.high
    assert 52 <= inside <= 60  # 57 expected


def test_for_an_exact_network_the_weight_is_one_and_losses_are_those_of_theory():
    main, other = Gaussian(0.1, 0.25), Gaussian(0.4, 0.5)
    rng = torch.Generator().manual_seed(1)
    images = 0.1 + 0.5 * torch.randn([4000, 1, 2, 2], generator=rng)
    result = probe(main, {"g": doubled(main, other)}, images, None, SIGMAS, batch_size=1000)
    for level in result.levels["g"]:
        assert level.low - 0.01 <= 1 <= level.high + 0.01
        # the posterior variance, times EDM's weight with sigma_data 0.5
        posterior = 0.25 * level.sigma**2 / (0.25 + level.sigma**2)
        weight = (level.sigma**2 + 0.25) / (level.sigma * 0.5) ** 2
        assert level.loss == pytest.approx(posterior * weight, rel=0.05)
        assert level.guide_loss > level.loss
        x_variance = 0.25 + level.sigma**2
        slope = 0.25 / x_variance - 0.5 / (0.5 + level.sigma**2)
        D_slope = 0.25 / x_variance
        offset = 0.1 * (1 - 0.25 / x_variance) - 0.4 * (1 - 0.5 / (0.5 + level.sigma**2))
        square = slope**2 * x_variance + (slope * 0.1 + offset) ** 2
        D_square = D_slope**2 * x_variance + 0.1**2
        product = slope * D_slope * x_variance + (slope * 0.1 + offset) * 0.1
        assert level.size == pytest.approx(math.sqrt(square / D_square), rel=0.05)
        assert level.cosine == pytest.approx(product / math.sqrt(square * D_square), abs=0.05)
    assert predict(result)[0].interval is None or result.levels["g"][0].gain < 0.01


def test_the_best_weight_minimises_the_error_of_the_guided_estimate():
    main, other = mixture(0.08, 0.05), mixture(0.3, 0.1)
    images = samples(500)

    @dataclass(frozen=True)
    class Recorded:
        """Keeps what the probe asked."""

        inner: Denoiser
        calls: list

        def __call__(self, x, sigma, condition=None):
            self.calls.append((x, sigma))
            return self.inner(x, sigma, condition)

    calls: list = []
    found = probe(Recorded(main, calls), {"g": doubled(main, other)}, images, None, [0.6], batch_size=500).levels["g"][
        0
    ]
    x, sigma = calls[0]

    def error(weight: float) -> float:
        D, D_n = main(x, sigma).double(), other(x, sigma).double()
        return float((D_n + weight * (D - D_n) - images).square().sum())

    assert error(found.weight) < min(error(found.weight - 0.01), error(found.weight + 0.01))
    assert found.gain == pytest.approx(1 - error(found.weight) / error(1.0), rel=1e-4)


def test_an_image_s_share_does_not_depend_on_the_batch_and_guides_are_compared():
    main = mixture(0.03)
    nets = {"a": doubled(main, mixture(0.2)), "b": doubled(main, mixture(0.2001)), "c": doubled(main, mixture(-0.2))}
    images = samples(60)
    one = probe(main, nets, images, None, SIGMAS, batch_size=60)
    other = probe(main, nets, images, None, SIGMAS, batch_size=7)
    for a, b in zip(one.levels["a"], other.levels["a"], strict=True):
        assert a.weight == pytest.approx(b.weight, rel=1e-6)
    assert min(one.angles["a", "b"]) > 0.999
    assert max(one.angles["a", "c"]) < 0
    assert [level.sigma for level in one.levels["a"]] == [2.0, 0.6, 0.2]


def test_the_prediction_names_the_better_guide_and_the_levels_where_it_helps():
    @dataclass(frozen=True)
    class Between:
        """A main network that errs toward the guide at middle levels only."""

        guide: Denoiser

        def __call__(self, x, sigma, condition=None):
            share = 0.3 if 0.3 < float(sigma) < 3 else 0.0
            return mixture()(x, sigma) + share * (self.guide(x, sigma) - mixture()(x, sigma))

    weak = mixture(0.4, 0.15)
    main = Between(weak)
    sigmas = np.geomspace(0.05, 20, 9).tolist()
    nets = {"other": doubled(main, Gaussian(0.0, 0.3)), "weak": doubled(main, weak)}
    result = probe(main, nets, samples(4000), None, sigmas, batch_size=2000)
    first = predict(result)[0]
    assert first.guide == "weak"
    lo, hi = first.interval
    assert 0.1 < lo < 0.4
    assert 2 < hi < 8
    inside = [level.weight for level in result.levels["weak"] if 0.3 < level.sigma < 3]
    assert inside == pytest.approx([1 / 0.7] * len(inside), rel=0.15)  # undoes the share
    text = summary(result)
    assert "Search weak first" in text
    assert "guidance reduces even the denoising error at noise levels" in text


def test_too_few_images_and_equal_networks_are_refused():
    main = mixture()
    with pytest.raises(ValueError, match="at least 2 images"):
        probe(main, {}, samples(1), None, SIGMAS)
    with pytest.raises(ValueError, match="g never differs from the main network"):
        probe(main, {"g": doubled(main, main)}, samples(4), None, SIGMAS)


def test_record_table_and_page_hold_every_level(tmp_path):
    main = mixture(0.03)
    result = probe(
        main, {"a": doubled(main, mixture(0.2)), "b": doubled(main, mixture(-0.1))}, samples(40), None, SIGMAS
    )
    written = write(result, predict(result), tmp_path, "edm2kit-tune probe", torch.device("cpu"))
    record = json.loads((tmp_path / "probe.json").read_text())
    assert len(record["levels"]) == 6
    assert {"commit", "hardware", "prediction", "angles"} <= set(record)
    lines = (tmp_path / "probe.csv").read_text().splitlines()
    assert lines[0].startswith("guide,sigma,weight,low,high,size,cosine,loss,guide_loss,gain")
    assert len(lines) == 7
    text = written.read_text()
    assert text.count("<svg") == 7  # three per guide, one for both
