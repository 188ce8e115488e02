import math

import pytest
import torch

from edm2kit.conditions import ClassLabels, FloatVectors, TextPrompts
from edm2kit.denoiser import for_images, for_step
from edm2kit.guidance.network_call import NetworkCall, Perturbed
from edm2kit.guidance.own_network.icg import RandomCondition
from edm2kit.guidance.registry import Choice, Parts, guide
from edm2kit.sampling.solvers import edm_sampler
from edm2kit.torch_utils.rng import StackedGenerator
from tests.support.fakes import Constant, Counting, Flat, Mixture

N, K = 4000, 5
GIVEN = torch.nn.functional.one_hot(torch.arange(N) % K, K).float()
SIGMAS = torch.tensor([5.0, 1.0, 0.0])


def labels_of(change, given=GIVEN, seeds=range(N)):
    change = for_step(for_images(change, StackedGenerator("cpu", seeds)), 0, SIGMAS)
    return change(NetworkCall(torch.zeros(len(given), 1, 1, 1), torch.tensor(1.0), given)).condition


def test_any_class_is_drawn_all_equally_likely():
    # as published: the image's own class is one of them
    drawn = labels_of(RandomCondition("class"))
    assert torch.equal(drawn.sum(dim=1), torch.ones(N))
    counts = GIVEN.T @ drawn  # given class, drawn class
    assert ((counts - N / K / K).abs() < 5 * math.sqrt(N / K / K)).all()


def test_without_its_own_class_guidance_is_k_over_k_minus_1_times_as_strong():
    values = torch.arange(K).float().square()

    def of_class(x, sigma, condition=None):
        return (condition @ values).reshape(-1, 1, 1, 1).expand_as(x)

    x, strengths = torch.zeros(N, 1, 1, 1), []
    for own in ("yes", "no"):
        guided = guide(Choice("icg", 2.0, options={"icg_own": own}), Parts(Flat(of_class, label_dim=K)))
        step = for_step(for_images(guided, StackedGenerator("cpu", range(N))), 0, SIGMAS)
        change = step(x, torch.tensor(1.0), GIVEN) - of_class(x, None, GIVEN)
        strengths.append((GIVEN.T @ change.flatten())[-1].item())  # all other classes have lower values
    assert strengths[1] / strengths[0] == pytest.approx(K / (K - 1), rel=0.1)


def test_another_class_is_drawn_all_equally_likely():
    drawn = labels_of(RandomCondition("class", include_own=False))
    assert drawn.dtype == torch.float32
    assert torch.equal(drawn.sum(dim=1), torch.ones(N))
    assert (drawn * GIVEN).sum() == 0
    counts = GIVEN.T @ drawn  # given class, drawn class
    expected = N / K / (K - 1) * (1 - torch.eye(K))
    assert ((counts - expected).abs() < 5 * math.sqrt(N / K / (K - 1))).all()


def test_gaussian_labels_are_as_large_as_one_hot_ones():
    drawn = labels_of(RandomCondition("gaussian"))
    assert drawn.square().mean().sqrt().item() == pytest.approx(GIVEN.square().mean().sqrt().item(), rel=0.02)
    assert drawn.mean().item() == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("include_own", [True, False])
def test_a_single_class_or_prompt_is_refused_because_nothing_would_change(include_own):
    one = torch.ones(3, 1)
    prompts = TextPrompts(("a fox",), {"net": {"embeds": torch.zeros(2, 4)}}, torch.zeros(3, dtype=torch.int64))
    for given in (one, ClassLabels(one), prompts):
        with pytest.raises(ValueError, match="at least two"):
            labels_of(RandomCondition("class", include_own), given, range(3))
    pool = torch.arange(8.0)[:, None]  # a vector of one number is not a class
    drawn = labels_of(RandomCondition("class", include_own), FloatVectors(one, pool), range(3))
    assert drawn.values.shape == (3, 1)


def test_predictor_and_corrector_meet_the_same_label_and_the_next_step_another():
    counting = Counting(Constant(0.0))
    denoiser = for_images(Perturbed(counting, RandomCondition()), StackedGenerator("cpu", range(N)))
    edm_sampler(denoiser, torch.zeros(N, 1, 1, 1), GIVEN, num_steps=3)
    first, corrector, second, _, _ = (labels for _, labels in counting.calls)
    assert torch.equal(first, corrector)
    assert not torch.equal(first, second)


def test_the_mean_over_classes_is_not_the_unconditional_answer_but_nears_it_at_high_noise():
    # specs section 9: E[D_neg] weights components by their share, the unconditional answer by their likelihood at x
    generator = torch.Generator().manual_seed(0)
    mixture = Mixture(torch.randn([K, 1, 2, 2], generator=generator, dtype=torch.float64), 0.05)
    gaps = []
    for sigma in (1.0, 10.0, 100.0, 1000.0):
        x = mixture.means[:1] + sigma * torch.randn([1, 1, 2, 2], generator=generator, dtype=torch.float64)
        level = torch.tensor(sigma, dtype=torch.float64)
        each = mixture(x.expand(K, -1, -1, -1), level, torch.eye(K, dtype=torch.float64))
        gaps.append((each.mean(dim=0) - mixture(x, level)[0]).abs().max().item())
    assert gaps[0] > 0.1
    assert gaps[2] / gaps[3] == pytest.approx(10, rel=0.9)


@pytest.mark.parametrize(("labels", "wrong"), [(None, "the images have none"), (GIVEN, "no generators were given")])
def test_what_it_cannot_do_is_refused(labels, wrong):
    with pytest.raises(ValueError, match=wrong):
        RandomCondition()(NetworkCall(torch.zeros(N, 1, 1, 1), torch.tensor(1.0), labels))


def test_gaussian_numbers_in_place_of_text_are_refused_before_work():
    net = Flat(Constant(0.0), label_dim=8)
    object.__setattr__(net, "takes_text", True)
    guide(Choice("icg", 2.0), Parts(net))
    with pytest.raises(ValueError, match="this network takes text; use --icg-kind class"):
        guide(Choice("icg", 2.0, options={"icg_kind": "gaussian"}), Parts(net))
    with pytest.raises(ValueError, match="and this network takes text"):
        guide(Choice("cads", 2.0), Parts(net))


def test_a_network_without_classes_is_refused():
    with pytest.raises(ValueError, match="this one has no classes"):
        guide(Choice("icg", 2.0), Parts(Flat(Constant(0.0))))
