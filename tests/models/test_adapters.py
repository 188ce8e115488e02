"""Networks of other projects as denoisers: one field, written in every parametrisation, gives the same images."""

import math

import numpy as np
import pytest
import torch

from edm2kit.denoiser import for_images
from edm2kit.guidance.base import Parts
from edm2kit.guidance.combine import Guided
from edm2kit.guidance.registry import METHODS, Choice, guide
from edm2kit.models.adapters import VP, Adapted, DiscreteVP, Flow, Rescaled
from edm2kit.sampling.solvers import SOLVERS, Sampler
from edm2kit.torch_utils.rng import StackedGenerator
from tests.support.fakes import Mixture

MEANS = torch.tensor([-1.0, 0.25, 1.5], dtype=torch.float64).reshape(3, 1, 1, 1).expand(3, 2, 4, 4)
VARIANCE = 0.09
ALPHAS = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)


def clean_image(x_t, a, s, labels):
    """E[x0 | x_t] of the mixture, from the marginal of x_t = a x0 + s n itself, nothing of the project's."""
    total = a**2 * VARIANCE + s**2
    log_p = -((x_t[:, None] - a[:, None] * MEANS) ** 2).flatten(2).sum(2) / (2 * total.flatten(1))
    if labels is not None:
        log_p = log_p + labels.to(x_t.dtype).log()
    m = torch.einsum("nk,kchw->nchw", log_p.softmax(1), MEANS.to(x_t.dtype))
    return m + a * VARIANCE / total * (x_t - a * m)


def column(t):
    return t.reshape(-1, 1, 1, 1)


def cosine(t):
    return torch.cos(math.pi / 2 * column(t)), torch.sin(math.pi / 2 * column(t))


def discrete(t):
    """(a, s) of steps that need not be whole: log(sigma) between them is a straight line."""
    sigma = np.sqrt((1 - ALPHAS.numpy()) / ALPHAS.numpy())
    sigma = torch.from_numpy(np.exp(np.interp(t.numpy(), np.arange(1000), np.log(sigma))))
    return column((1 + sigma**2).rsqrt()), column(sigma * (1 + sigma**2).rsqrt())


def epsilon_network(x_t, t, labels=None):
    a, s = discrete(t)
    return (x_t - a * clean_image(x_t, a, s, labels)) / s


def epsilon_and_variance_network(x_t, t, labels=None):
    return torch.cat([epsilon_network(x_t, t, labels), torch.full_like(x_t, math.nan)], dim=1)


def v_network(x_t, t, labels=None):
    a, s = cosine(t)
    x0 = clean_image(x_t, a, s, labels)
    return a * (x_t - a * x0) / s - s * x0


def x0_network(x_t, t, labels=None):
    return clean_image(x_t, *cosine(t), labels)


def flow_network(x_t, t, labels=None):
    t = column(t) / 1000
    x0 = clean_image(x_t, 1 - t, t, labels)
    return (x_t - (1 - t) * x0) / t - x0


COSINE = VP(lambda sigma: sigma.atan() * 2 / math.pi)
FIELDS = {
    "epsilon": Adapted(epsilon_network, DiscreteVP(ALPHAS), "epsilon", label_dim=3),
    "learned variance": Adapted(epsilon_and_variance_network, DiscreteVP(ALPHAS), "epsilon", label_dim=3),
    "v": Adapted(v_network, COSINE, "v", label_dim=3),
    "x0": Adapted(x0_network, COSINE, "x0", label_dim=3),
    "flow": Adapted(flow_network, Flow(time_scale=1000), "flow", label_dim=3),
}
LABELS = torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.3, 0.5]], dtype=torch.float64)
NOISE = torch.randn(2, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def sampler(solver, steps=8):
    return Sampler(steps, 0.03, 14.0, dtype=torch.float64, solver=solver)


@pytest.mark.parametrize("name", FIELDS)
def test_every_parametrisation_is_the_same_denoiser(name):
    for sigma in (0.03, 0.4, 3.0, 14.0):
        x = MEANS[:2] + sigma * NOISE
        D = FIELDS[name](x, torch.tensor(sigma, dtype=torch.float64), LABELS)
        torch.testing.assert_close(D, Mixture(MEANS, VARIANCE)(x, sigma, LABELS), atol=1e-9, rtol=0)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", FIELDS)
def test_every_parametrisation_gives_the_same_image_with_every_solver(name, solver):
    expected = sampler(solver)(Mixture(MEANS, VARIANCE), NOISE, LABELS, lambda x: NOISE)
    found = sampler(solver)(FIELDS[name], NOISE, LABELS, lambda x: NOISE)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", FIELDS)
def test_in_float32_the_images_agree_to_float32(name):
    single = Sampler(16, 0.03, 14.0)
    expected = single(Mixture(MEANS, VARIANCE), NOISE.float(), LABELS)
    field = FIELDS[name]
    in_float64 = Adapted(lambda x, t, c: field.network(x.double(), t.double(), c), field.schedule, field.prediction)
    assert (single(in_float64, NOISE.float(), LABELS) - expected).abs().max() < 2e-5


def test_a_flow_network_is_guided_by_an_epsilon_network_as_the_denoisers_are():
    weak = Mixture(MEANS, 0.25)
    wide = Adapted(lambda x, t, c: (x - discrete(t)[0] * weak(x / discrete(t)[0], discrete(t)[1] / discrete(t)[0], c))
                   / discrete(t)[1], DiscreteVP(ALPHAS), "epsilon")  # fmt: skip
    expected = sampler("heun")(Guided(Mixture(MEANS, VARIANCE), weak, 2.0), NOISE, LABELS)
    mixed = sampler("heun")(Guided(FIELDS["flow"], wide, 2.0), NOISE, LABELS)
    torch.testing.assert_close(mixed, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", ["icg", "truncation", "input-noise", "autoguidance"])
def test_methods_that_need_no_interior_guide_any_adapter(method):
    """Each is the method on the closed-form denoiser, to 1e-6."""
    images = []
    for net in (Mixture(MEANS, VARIANCE), FIELDS["flow"]):
        gnet = Mixture(MEANS, 0.25) if METHODS[method].needs_gnet else None
        one_hot = torch.eye(3, dtype=torch.float64)[:2] + 1e-3

        class Labelled:
            label_dim = 3

            def __call__(self, x, sigma, condition=None, net=net):
                return net(x, sigma, condition)

        guided = guide(Choice(method, 1.5), Parts(Labelled(), gnet))
        guided = for_images(guided, StackedGenerator("cpu", [1, 2]))
        images.append(sampler("euler")(guided, NOISE, one_hot))
    torch.testing.assert_close(images[1], images[0], atol=1e-6, rtol=0)


def test_at_its_own_steps_a_discrete_network_gets_whole_times():
    schedule = DiscreteVP(ALPHAS)
    a, s, t = schedule.at(schedule.sigmas)
    torch.testing.assert_close(t, torch.arange(1000, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(a.square(), ALPHAS, atol=1e-12, rtol=0)
    torch.testing.assert_close(s / a, schedule.sigmas, atol=1e-12, rtol=1e-12)
    halfway = (schedule.sigmas[7] * schedule.sigmas[8]).sqrt()[None]
    assert float(schedule.time(halfway)) == pytest.approx(7.5, abs=1e-9)


def test_outside_its_range_a_discrete_network_gets_its_first_or_last_time():
    schedule = DiscreteVP(ALPHAS)
    low, high = schedule.sigma_range
    assert schedule.time(torch.tensor([low / 2, high * 2], dtype=torch.float64)).tolist() == [0.0, 999.0]


def test_a_last_step_without_signal_is_finite():
    assert float(DiscreteVP(torch.tensor([0.9, 0.5, 0.0])).sigmas[-1]) == pytest.approx(2.0**12, rel=1e-6)


@pytest.mark.parametrize("values", [[0.5], [0.2, 0.5], [1.0, 0.5], [0.9, -0.1], [[0.9, 0.5]]])
def test_what_is_not_a_schedule_is_refused(values):
    with pytest.raises(ValueError, match="falls from below 1"):
        DiscreteVP(torch.tensor(values))


@pytest.mark.parametrize(
    ("prediction", "schedule", "reason"),
    [
        ("score", Flow(), "prediction 'score' is unknown; available: epsilon, v, x0, flow"),
        ("flow", COSINE, "belongs to the schedule Flow"),
        ("flow", DiscreteVP(ALPHAS), "belongs to the schedule Flow"),
        ("v", Flow(), "belongs to a variance-preserving schedule"),
    ],
)
def test_predictions_that_do_not_exist_or_do_not_fit_are_refused(prediction, schedule, reason):
    with pytest.raises(ValueError, match=reason):
        Adapted(flow_network, schedule, prediction)


def test_an_output_of_another_shape_is_refused():
    wrong = Adapted(lambda x, t, c: torch.cat([x, x, x], dim=1), Flow(), "flow")
    with pytest.raises(ValueError, match=r"returned \[2, 6, 4, 4\] for x \[2, 2, 4, 4\]"):
        wrong(NOISE, 1.0)


@pytest.mark.parametrize(("scale", "shift"), [(2.0, 0.0), (0.36, -0.12)])
def test_a_rescaled_denoiser_is_exact(scale, shift):
    """The mixture of y = scale x + shift, seen through x."""
    of_y = Mixture(scale * MEANS + shift, scale**2 * VARIANCE)
    for sigma in (0.1, 1.0, 10.0):
        x = MEANS[:2] + sigma * NOISE
        D = Rescaled(of_y, scale, shift)(x, torch.tensor(sigma, dtype=torch.float64), LABELS)
        torch.testing.assert_close(D, Mixture(MEANS, VARIANCE)(x, sigma, LABELS), atol=1e-9, rtol=0)


def test_a_scale_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="expected a number above 0"):
        Rescaled(Mixture(MEANS, VARIANCE), 0.0)
