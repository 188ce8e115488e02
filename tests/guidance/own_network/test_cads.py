import math

import pytest
import torch

from edm2kit.conditions import ClassLabels, FloatVectors
from edm2kit.denoiser import for_images, for_step
from edm2kit.guidance.own_network.cads import AnnealedCondition
from edm2kit.guidance.registry import METHODS, Choice, Parts, guide
from edm2kit.torch_utils.rng import StackedGenerator
from tests.support import golden
from tests.support.fakes import Counting

LABELS = torch.eye(50, dtype=torch.float64)[[3, 7, 7, 49]]
SIGMAS = torch.linspace(80, 0, 21, dtype=torch.float64)
X = torch.zeros(4, 1, 2, 2)


def echo(x, sigma, condition=None):
    return x


def at_step(i, seeds=(0, 1, 2, 3), noise=0.25, rescale=1.0, net=echo):
    annealed = AnnealedCondition(net, noise, 0.6, 0.9, rescale)
    return for_step(for_images(annealed, StackedGenerator("cpu", seeds)), i, SIGMAS)


def authors(y, t, s, psi, n, tau1=0.6, tau2=0.9):
    """Their function, for the embedding of one label."""
    gamma = 1.0 if t <= tau1 else 0.0 if t >= tau2 else (tau2 - t) / (tau2 - tau1)
    y_hat = math.sqrt(gamma) * y + s * math.sqrt(1 - gamma) * n
    scaled = (y_hat - y_hat.mean()) / y_hat.std() * y.std() + y.mean()
    return psi * scaled + (1 - psi) * y_hat


@pytest.mark.parametrize("rescale", [1.0, 0.3])
@pytest.mark.parametrize("i", [0, 3, 5, 7, 12])
def test_the_authors_embedding(i, rescale):
    # labels of RMS 1 are an embedding of unit variance
    step = at_step(i, rescale=rescale)
    scale = math.sqrt(LABELS.shape[1])
    n = step.random.generators().randn(LABELS.shape).to(LABELS)
    ours = scale * (step.anneal(LABELS) if step.kept < 1 else LABELS)
    for k in range(4):
        theirs = authors(scale * LABELS[k], 1 - i / 20, 0.25, rescale, n[k])
        assert (ours[k] - theirs).abs().max() < 1e-6 * theirs.abs().max()


def test_the_share_of_the_condition_in_closed_form():
    assert [at_step(i).kept for i in (0, 2, 5, 8, 19)] == pytest.approx([0, 0, 0.5, 1, 1], abs=1e-12)


def test_late_steps_are_the_network_itself_bitwise():
    net = Counting(echo)
    at_step(12, net=net)(X, SIGMAS[12], LABELS)
    assert net.calls[0][1] is LABELS
    at_step(0, net=net)(X, SIGMAS[0], LABELS)
    assert not torch.equal(net.calls[1][1], LABELS)


def test_mean_and_spread_stay_and_images_have_noise_of_their_own():
    noisy = at_step(0).anneal(LABELS)
    torch.testing.assert_close(noisy.mean(dim=1), LABELS.mean(dim=1))
    torch.testing.assert_close(noisy.std(dim=1), LABELS.std(dim=1))
    assert not torch.equal(noisy[1], noisy[2])
    torch.testing.assert_close(at_step(0, seeds=(2,)).anneal(LABELS[2:3]), noisy[2:3])


def test_conditions_keep_their_kind():
    step = at_step(0)
    assert isinstance(step.anneal(ClassLabels(LABELS.float())), ClassLabels)
    assert isinstance(step.anneal(FloatVectors(LABELS.float())), FloatVectors)


def test_the_weight_multiplies_the_noise_and_it_goes_around_other_methods():
    net = golden.network("cond")
    assert guide(Choice("cads", 3.0), Parts(net)).noise == pytest.approx(0.5)
    around = guide(Choice("cfg", 2.0, also=(("cads", 2.0),)), Parts(net))
    assert isinstance(around, AnnealedCondition)
    assert around.net == guide(Choice("cfg", 2.0), Parts(net))


@pytest.mark.parametrize(
    ("weight", "options", "wrong"),
    [
        (2.0, {"cads_start": 0.9, "cads_end": 0.6}, "the start must be below the end"),
        (0.5, {}, "and w is 0.5; use at least 1"),
    ],
)
def test_wrong_settings_are_refused(weight, options, wrong):
    with pytest.raises(ValueError, match=wrong):
        guide(Choice("cads", weight, options=options), Parts(golden.network("cond")))


def test_images_without_a_condition_are_refused():
    with pytest.raises(ValueError, match="adds noise to the condition, and the images have none"):
        at_step(0)(X, SIGMAS[0], None)
    unconditional = type("Net", (), {"label_dim": 0})()
    with pytest.raises(ValueError, match="needs a conditional network"):
        guide(Choice("cads", 2.0), Parts(unconditional))
    assert METHODS["cads"].weight == 2.0


def test_a_condition_of_a_single_number_has_no_spread_to_restore():
    temperatures = torch.full([4, 1], 3.0)
    with pytest.raises(ValueError, match="a single number, without a spread"):
        at_step(0).anneal(FloatVectors(temperatures))
    net = type("Net", (), {"label_dim": 1})()
    with pytest.raises(ValueError, match="a single number, without a spread"):
        guide(Choice("cads", 2.0), Parts(net))
    assert isinstance(guide(Choice("cads", 2.0, options={"cads_rescale": 0}), Parts(net)), AnnealedCondition)
    step = at_step(5, rescale=0.0)  # half of the condition is kept
    n = step.random.generators().randn([4, 1])
    torch.testing.assert_close(step.anneal(temperatures), math.sqrt(0.5) * (temperatures + 0.25 * n))


def test_a_pinned_value():
    noisy = at_step(5).anneal(LABELS)
    assert [noisy[0, 3].item(), noisy[1, 0].item()] == pytest.approx(PINNED, rel=1e-5)


PINNED = [0.9687260420257555, -0.0376528688128759]
