"""The tests that every guidance method must pass, over the whole registry (U1 to U7), and a pinned value of each."""

import re
from dataclasses import dataclass, field

import pytest
import torch

from edm2kit.denoiser import for_images, for_step
from edm2kit.guidance.combine import DerivedNegative, Evaluation
from edm2kit.guidance.registry import METHODS, Choice, Parts, guide
from edm2kit.models.edm2 import Precond
from edm2kit.sampling.noise_levels import karras_sigmas
from edm2kit.sampling.solvers import edm_sampler
from edm2kit.torch_utils.rng import StackedGenerator
from tests.support import golden
from tests.support.fakes import Constant, CountingNetwork, Flat

# methods that are no difference of two answers have tests of their own
NEGATIVES = [name for name, method in METHODS.items() if method.negative is not None]
SIGMAS = torch.tensor([5.0, 1.0, 0.2, 0.0])


@dataclass(frozen=True)
class Nets:
    net: Precond
    gnet: Precond
    uncond: Precond
    x: torch.Tensor
    labels: torch.Tensor


@pytest.fixture(scope="module")
def nets() -> Nets:
    arrays = golden.load("network_cond.npz")
    net = golden.network("cond", golden.part(arrays, "state/"))
    gnet = golden.network("cond", golden.part(golden.load("sampler.npz"), "gstate/"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        uncond = Precond(**{**golden.architecture("cond"), "label_dim": 0}).eval()
    uncond.unet.out_gain.data.fill_(1)
    return Nets(
        net.requires_grad_(False),
        gnet.requires_grad_(False),
        uncond.requires_grad_(False),
        arrays["x"],
        arrays["labels"],
    )


def parts_of(name, nets, net=None) -> Parts:
    method = METHODS[name]
    return Parts(
        net or nets.net, nets.gnet if method.needs_gnet else None, nets.uncond if method.takes_uncond else None
    )


def in_step(denoiser, seeds=(0, 1, 2)):
    """`denoiser` in the middle of a run over images with these seeds."""
    return for_step(for_images(denoiser, StackedGenerator("cpu", seeds)), 1, SIGMAS)


def evaluate(name, weight, nets, parts=None, labels=None, **options):
    guided = guide(Choice(name, weight, options=options), parts or parts_of(name, nets))
    return in_step(guided)(nets.x, torch.tensor(1.0), nets.labels if labels is None else labels)


# what makes the negative equal to the positive
@dataclass(frozen=True)
class Neutral:
    options: dict = field(default_factory=dict)
    net: object = None
    no_labels: bool = False


NEUTRAL = {
    "autoguidance": Neutral(),
    "cfg": Neutral(no_labels=True),
    "cfg-plus-autoguidance": Neutral({"cfg_plus_autoguidance_share": 1.0}),
    "truncation": Neutral(net=lambda x, sigma, labels=None: x),
    "pag": Neutral({"pag_blocks": ()}),
    "seg": Neutral({"seg_sigma": 0.1}),
    "sag": Neutral(net=Flat(Constant(0.3))),
    "icg": Neutral({"icg_kind": "class"}, net=Flat(Constant(0.3), label_dim=4)),
    "tsg": Neutral({"tsg_scale": 0.0}),
    "windows": Neutral({"windows_size": 16}),
    "dropout": Neutral({"dropout_rate": 0.0}),
    "input-noise": Neutral({"input_noise_delta": 0.0}),
}


@pytest.mark.parametrize("name", NEGATIVES)
def test_u1_weight_1_is_off_bitwise_and_calls_no_negative(name, nets):
    counting = CountingNetwork(nets.net)
    denoiser = for_images(guide(Choice(name, 1.0), parts_of(name, nets, counting)), StackedGenerator("cpu", range(3)))
    sampled = edm_sampler(denoiser, nets.x, nets.labels, num_steps=3)
    assert torch.equal(sampled, edm_sampler(nets.net, nets.x, nets.labels, num_steps=3))
    assert counting.images == [3] * 5


@pytest.mark.parametrize("name", NEGATIVES)
def test_u2_an_equal_negative_makes_the_weight_irrelevant(name, nets):
    neutral = NEUTRAL[name]
    net = neutral.net or nets.net
    parts = Parts(net, net if METHODS[name].needs_gnet else None)
    labels = torch.zeros_like(nets.labels) if neutral.no_labels else nets.labels
    plain = net(nets.x, torch.tensor(1.0), labels)
    for weight in (-1.0, 0.0, 3.0):
        D = evaluate(name, weight, nets, parts, labels, **neutral.options)
        torch.testing.assert_close(D, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NEGATIVES)
def test_u3_weight_0_is_the_negative(name, nets):
    method, parts = METHODS[name], parts_of(name, nets)
    negative = method.negative(parts, **{option.keyword: option.default for option in method.options})
    negative, sigma = in_step(negative), torch.tensor(1.0)
    if isinstance(negative, DerivedNegative):
        reads = negative.reads
        D, maps = (
            nets.net(nets.x, sigma, nets.labels, return_attention=reads)
            if reads
            else (nets.net(nets.x, sigma, nets.labels), {})
        )
        D_neg = negative.derive(D, maps, Evaluation(nets.x, sigma, nets.labels))
    else:
        D_neg = negative(nets.x, sigma, nets.labels)
    torch.testing.assert_close(evaluate(name, 0.0, nets), D_neg, atol=1e-5, rtol=1e-5)  # in one batch, or in two


@pytest.mark.parametrize("name", NEGATIVES)
def test_u4_the_answer_is_affine_in_the_weight(name, nets):
    D = [evaluate(name, weight, nets) for weight in (0.5, 2.0, 3.5)]
    torch.testing.assert_close(D[0] - 2 * D[1] + D[2], torch.zeros_like(D[0]), atol=2e-5, rtol=0)
    assert (D[1] - D[0]).abs().max() > 1e-4


@pytest.mark.parametrize("name", NEGATIVES)
def test_u5_an_image_does_not_depend_on_its_batch(name, nets):
    denoiser = guide(Choice(name, 2.0), parts_of(name, nets))

    sigmas = karras_sigmas(3, 0.1, 80.0, 7.0)

    # evaluation by evaluation: over whole trajectories a random network would magnify rounding without bound
    def answers(rows):
        followed = for_images(denoiser, StackedGenerator("cpu", rows))
        return [for_step(followed, i, sigmas)(nets.x[rows] * s, s, nets.labels[rows]) for i, s in enumerate(sigmas[:3])]

    whole = answers([0, 1, 2])
    for rows in ([0], [2, 1]):
        for D, expected in zip(answers(rows), whole, strict=True):
            torch.testing.assert_close(D, expected[rows], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NEGATIVES)
def test_u6_an_evaluation_costs_what_is_stated(name, nets):
    counting = [CountingNetwork(net) for net in (nets.net, nets.gnet, nets.uncond)]
    method = METHODS[name]
    parts = Parts(counting[0], counting[1] if method.needs_gnet else None, counting[2] if method.takes_uncond else None)
    denoiser = for_images(guide(Choice(name, 2.0), parts), StackedGenerator("cpu", range(3)))
    edm_sampler(denoiser, nets.x, nets.labels, num_steps=3)
    costs = method.evaluations.split(" or ")
    stated = costs[0 if method.takes_gnet else -1]  # without the guide network; with the unconditional one
    for network, word in zip(counting, ("main", "guide", "unconditional"), strict=True):
        (times,) = re.findall(rf"(\d+) {word}", stated) or ["0"]
        assert sum(network.images) == int(times) * 5 * 3, word


@pytest.mark.parametrize("name", ["pag", "seg"])
def test_u7_no_blocks_is_unperturbed_bitwise(name, nets):
    keyword = f"{name}_blocks"
    options = {option.keyword: option.default for option in METHODS[name].options} | {keyword: ()}
    negative = METHODS[name].negative(Parts(nets.net), **options)
    plain = nets.net(nets.x, torch.tensor(1.0), nets.labels)
    assert torch.equal(negative(nets.x, torch.tensor(1.0), nets.labels), plain)
    with pytest.raises(ValueError, match=r"'dec\.8x8_in1' is not .*; available: enc\.8x8_block0, dec\.8x8_in0"):
        evaluate(name, 0.0, nets, **{keyword: ("dec.8x8_in1",)})


# made by this code; what any of these methods answers must not change unnoticed
PINNED = {
    "autoguidance": [-0.0518171, 0.8180327, 0.1527351],
    "cfg": [-0.005511739, 0.5396271, 0.8399166],
    "cfg-plus-autoguidance": [-0.04362627, 0.8003178, 0.412371],
    "truncation": [-0.09322222, 1.352241, -2.224031],
    "pag": [-0.004006665, 0.5151248, 0.6322109],
    "seg": [-0.008510504, 0.5161609, 0.6701782],
    "sag": [-0.01007668, 0.573779, 0.6104353],
    "icg": [-0.0136283, 0.5382223, 0.667915],
    "tsg": [-0.004440649, 0.5164438, 0.7146304],
    "windows": [-0.008547747, 0.5383838, 0.6685704],
    "dropout": [-0.009078891, 0.5238252, 0.6123187],
    "input-noise": [-0.002641278, 0.6394369, 0.7536359],
}


@pytest.mark.parametrize("name", NEGATIVES)
def test_pinned_values(name, nets):
    D = evaluate(name, 2.0, nets)
    measured = [D.mean().item(), D.std().item(), D[1, 2, 3, 4].item()]
    assert measured == pytest.approx(PINNED[name], rel=1e-4, abs=1e-5)
