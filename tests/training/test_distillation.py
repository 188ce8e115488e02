"""The loss of a student: what its teacher says to the same noisy images, step by step where that matters."""

import copy

import pytest
import torch

from edm2kit.guidance.combine import Guided
from edm2kit.guidance.interval import GuidanceInterval, guided_steps
from edm2kit.models.edm2 import Precond
from edm2kit.sampling.noise_levels import karras_sigmas
from edm2kit.torch_utils.rng import StackedGenerator
from edm2kit.training.distillation import DistillationLoss
from tests.support.fakes import Counting, Gaussian, Jittered, column

SIGMAS = karras_sigmas(8, 0.06, 80, 7)
POS, NEG = Gaussian(0.2, 0.25), Gaussian(0.1, 0.36)
IMAGES = 0.5 * torch.randn(24, 3, 4, 4, generator=torch.Generator().manual_seed(0))


class Student(torch.nn.Module):
    """A denoiser in a network's place."""

    def __init__(self, denoiser):
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x, sigma, labels=None, return_logvar=False):
        return self.denoiser(x, sigma, labels), torch.zeros(len(x), 1, 1, 1)


def draws(seeds, images=IMAGES, P_mean=-0.4, P_std=1.0):
    """The noise levels and noisy images that the loss makes."""
    rng = StackedGenerator("cpu", seeds)
    sigma = (rng.randn([len(images), 1, 1, 1]) * P_std + P_mean).exp()
    return sigma.flatten(), images + sigma * rng.randn_like(images)


def terms(teacher, student=POS, seeds=range(24), images=IMAGES, **settings):
    loss = DistillationLoss(teacher, SIGMAS, **settings)
    return loss.terms(Student(student), images, None, StackedGenerator("cpu", seeds))


@pytest.mark.parametrize("levels", [{}, {"P_mean": 0.3, "P_std": 1.4}])
def test_it_is_the_weighted_square_of_what_guidance_adds(levels):
    # D_student - D_teacher of a student that is the positive network: (w - 1) (D_neg - D_pos), in closed form
    loss, sigma = terms(Guided(POS, NEG, 2.5), **levels)
    expected_sigma, x = draws(range(24), **levels)
    assert torch.equal(sigma, expected_sigma)
    s = column(sigma, x)
    weight = (s**2 + 0.25) / (s * 0.5) ** 2
    torch.testing.assert_close(loss, weight * (1.5 * (NEG(x, sigma) - POS(x, sigma))) ** 2, rtol=2e-4, atol=1e-7)
    assert loss.min() >= 0


def tiny_net(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Precond(4, 3, 2, model_channels=4, channel_mult=[1, 2], num_blocks=1, channels_per_head=4)
    net.unet.out_gain.data.fill_(1)
    return net


def test_at_weight_1_there_is_exactly_nothing_to_learn():
    net, guide = tiny_net(), tiny_net(1)
    student, labels = copy.deepcopy(net).train(), torch.eye(2).repeat(12, 1)
    for weight, nothing in ((1.0, True), (2.0, False)):
        loss = DistillationLoss(Guided(net.eval(), guide.eval(), weight), SIGMAS)
        student.zero_grad()
        found = loss.terms(student, IMAGES, labels, StackedGenerator("cpu", range(24))).loss
        found.sum().backward()
        gradients = [p.grad for p in student.parameters()]
        assert (found.abs().max() == 0) == nothing
        assert all(g is not None for g in gradients)  # as DDP expects
        assert all(g.abs().max() == 0 for g in gradients) == nothing
        assert student.logvar_linear.weight.grad.abs().max() == 0


def test_an_image_s_noise_and_target_depend_on_its_seed_alone():
    teacher = Guided(Jittered(POS), NEG, 2.0)
    whole = terms(teacher)
    part = terms(teacher, seeds=[7, 3], images=IMAGES[[7, 3]])
    assert torch.equal(part.sigma, whole.sigma[[7, 3]])
    torch.testing.assert_close(part.loss, whole.loss[[7, 3]])


def test_a_noise_level_belongs_to_the_step_that_passes_it():
    loss = DistillationLoss(POS, SIGMAS)
    assert loss.steps_of(SIGMAS[:-1]) == list(range(8))
    assert loss.steps_of(SIGMAS[:-1] * 0.999) == list(range(8))
    assert loss.steps_of(SIGMAS[:-1] * 1.001) == [0, 0, 1, 2, 3, 4, 5, 6]
    assert loss.steps_of(torch.tensor([1000.0, 1e-6])) == [0, 7]


def test_an_interval_is_learnt_where_it_guides_in_one_batch_each():
    pos, neg = Counting(POS), Counting(NEG)
    guided = GuidanceInterval(Guided(pos, neg, 2.0), pos, 0.25, 5.0)
    loss, sigma = terms(guided)
    inside = guided_steps(SIGMAS, 0.25, 5.0)
    learns = [step in inside for step in DistillationLoss(POS, SIGMAS).steps_of(sigma)]
    assert 4 <= sum(learns) <= 20
    assert [row.max() > 0 for row in loss] == learns
    assert (len(pos.calls), len(neg.calls)) == (2, 1)
    terms(Guided(pos, neg, 2.0))
    assert len(neg.calls) == 2  # steps that make no difference are one batch
