"""Guidance by a loss at batch 1 fits where plain sampling fits at batch 4, whatever the rule."""

import gc

import pytest
import torch

from edm2kit.denoiser import after_step, for_images, for_step
from edm2kit.guidance.registry import METHODS, Choice, Parts, guide
from edm2kit.models.edm2 import Precond
from edm2kit.torch_utils.rng import StackedGenerator
from edm2kit.training.config import preset_path, read_yaml
from tests.support.memory import PeakBytes

SIGMAS = torch.tensor([5.0, 2.0, 1.0, 0.0])


def network(resolution, **architecture):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Precond(resolution, 3, 0, **architecture).eval().requires_grad_(False)
    net.unet.out_gain.fill_(1)
    return net


def peak_of_a_step(denoiser, batch, resolution):
    """The most bytes that one step of a solver holds beyond the network itself."""
    gc.collect()
    x = torch.randn([batch, 3, resolution, resolution])
    with torch.no_grad(), PeakBytes() as memory:
        step = for_step(for_images(denoiser, StackedGenerator("cpu", range(batch))), 1, SIGMAS)
        after_step(step, x + 0 * step(x, SIGMAS[1]), 1, SIGMAS)
    return memory.peak


def by_a_loss(net, rule, **more):
    defaults = {option.keyword: option.default for option in METHODS["loss"].options}
    options = {**defaults, "loss_kind": "colour", "loss_colour": (0.5, 0.0, -0.5), "loss_rule": rule, **more}
    return guide(Choice("loss", 2.0, options=options), Parts(net))


@pytest.fixture(scope="module")
def net():
    return network(32, model_channels=16, channels_per_head=16, num_blocks=2)


@pytest.fixture(scope="module")
def plain(net):
    return peak_of_a_step(net, 4, 32)


# the pushes differ in what they do with one gradient
@pytest.mark.parametrize("rule", ["score", "dps", "tfg"])
def test_one_guided_image_fits_where_four_are_sampled(net, plain, rule):
    assert 0.1 * plain < peak_of_a_step(by_a_loss(net, rule), 1, 32) < plain


def test_many_random_versions_of_an_image_fit_too():
    # eighty images of 3 channels: of a network with 16 they would be more than all of its activations
    net = network(32, model_channels=32, channels_per_head=16, num_blocks=2)
    guided = by_a_loss(net, "score", loss_augment=20, loss_average="4")
    assert peak_of_a_step(guided, 1, 32) < peak_of_a_step(net, 4, 32)


def test_without_recomputing_blocks_it_would_not_fit(net, plain):
    net.unet.recompute = False
    assert peak_of_a_step(by_a_loss(net, "score"), 1, 32) > plain
    net.unet.recompute = True


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["score", "tfg"])
def test_the_same_holds_for_a_published_network(rule, capsys):
    net = network(64, **read_yaml(preset_path("edm2-img64-xs"))["network"])
    plain, guided = peak_of_a_step(net, 4, 64), peak_of_a_step(by_a_loss(net, rule), 1, 64)
    with capsys.disabled():
        print(
            f"\nedm2-img64-xs, {rule}: {guided / 2**20:.0f} MiB guided at batch 1, {plain / 2**20:.0f} plain at batch 4"
        )
    assert guided < plain
