"""Guidance, solvers and generated images on a GPU are those of a CPU, for the same noise."""

import dataclasses

import pytest
import torch

from edm2kit.denoiser import after_step, for_images, for_step
from edm2kit.guidance import RULES, Choice, guide, step_generators
from edm2kit.guidance.classifier.noise_classifier import ClassifierHeader, NoiseClassifier, save_classifier
from edm2kit.guidance.option_types import existing_file
from edm2kit.models.compilation import graph_
from edm2kit.models.edm2 import freeze_
from edm2kit.sampling.engine import Engine
from edm2kit.sampling.solvers import SOLVERS, WITHOUT_CHURN, Churn, Sampler, edm_sampler
from tests.guidance.test_universal import CASES
from tests.support import golden
from tests.support.guidance_checks import SIGMAS, Nets
from tests.support.same_noise import FromCPU

STEPS = 4


@pytest.fixture(autouse=True)
def same_noise(monkeypatch):
    monkeypatch.setattr(step_generators, "StackedGenerator", FromCPU)


def nets_on(device) -> Nets:
    arrays = golden.load("network_cond.npz")
    net = golden.network("cond", golden.part(arrays, "state/"))
    gnet = golden.network("cond", golden.part(golden.load("sampler.npz"), "gstate/"))
    torch.manual_seed(0)
    uncond = type(net)(**{**golden.architecture("cond"), "label_dim": 0}).eval()
    next(parameter for name, parameter in uncond.named_parameters() if name.endswith("out_gain")).data.fill_(1)
    made = [network.requires_grad_(False).to(device) for network in (net, gnet, uncond)]
    return Nets(*made, arrays["x"].to(device), arrays["labels"].to(device))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    path = tmp_path_factory.mktemp("classifier") / "classifier.safetensors"
    architecture = {"img_resolution": 16, "img_channels": 3, "num_classes": 4, "width": 8, "levels": 2}
    torch.manual_seed(0)
    save_classifier(path, NoiseClassifier(**architecture), ClassifierHeader(architecture, 0))
    return existing_file(str(path))


def steps(denoiser, nets: Nets, device) -> torch.Tensor:
    """D, and what a step makes of x at its end, for steps that start at given places: rounding is not amplified."""
    followed, results = for_images(denoiser, FromCPU(device, [0, 1, 2])), []
    sigmas = SIGMAS.to(device)
    with torch.no_grad():
        for i, sigma in enumerate(sigmas[:-1]):
            step = for_step(followed, i, sigmas)
            D = step(nets.x * sigma, sigma, nets.labels)
            results += [D, after_step(step, D, i, sigmas)]
    return torch.stack(results).cpu()


def sampled(denoiser, nets: Nets, device, **settings) -> torch.Tensor:
    followed = for_images(denoiser, FromCPU(device, [0, 1, 2]))
    sampler = Sampler(STEPS, **settings)
    return sampler(followed, nets.x, nets.labels, FromCPU(device, [3, 4, 5]).randn_like).cpu()


@pytest.mark.parametrize("case", [case for case in CASES if case.method != "none"], ids=str)
def test_steps_of_every_method_and_rule_are_those_of_a_cpu(case, classifier, device):
    if case.options.get("classifier_file") == "file":
        case = dataclasses.replace(case, options={"classifier_file": classifier, "classifier_class": None})
    images = []
    for place in (torch.device("cpu"), device):
        nets = nets_on(place)
        images.append(steps(guide(case.choice(2.0), case.parts(nets)), nets, place))
    assert images[0].isfinite().all()
    torch.testing.assert_close(images[1], images[0], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("S_churn", [0.0, 5.0])
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_gives_the_images_of_a_cpu(solver, S_churn, device):
    if S_churn and solver in WITHOUT_CHURN:
        pytest.skip("this solver adds no noise")
    settings, images = {"solver": solver, "churn": Churn(S_churn=S_churn)}, []
    for place in (torch.device("cpu"), device):
        nets = nets_on(place)
        images.append(sampled(nets.net, nets, place, **settings))
    # what rounding of the noise does to the same images on a CPU: erk amplifies it a hundred times more than others
    nets = nets_on(torch.device("cpu"))
    rounded = dataclasses.replace(nets, x=nets.x * (1 + 1e-6 * torch.randn(nets.x.shape)))
    amplified = (sampled(nets.net, rounded, torch.device("cpu"), **settings) - images[0]).abs().max().item()
    torch.testing.assert_close(images[1], images[0], atol=max(4 * amplified, 2e-4), rtol=0)


@pytest.mark.parametrize("rule", RULES)
def test_no_rule_makes_the_host_wait(rule, device):
    nets = nets_on(device)
    denoiser = guide(Choice("autoguidance", 2.0, rule=rule), dataclasses.replace(CASES[0], gnet="weak").parts(nets))
    sampled_once = edm_sampler(denoiser, nets.x, nets.labels, num_steps=STEPS)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = edm_sampler(denoiser, nets.x, nets.labels, num_steps=STEPS)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(again, sampled_once)


@pytest.mark.parametrize("graphed", [False, True])
def test_an_image_depends_on_its_seed_alone(graphed, device):
    nets = nets_on(device)
    net = freeze_(nets.net)
    net = graph_(net, device) if graphed else net

    def decode(x):
        return (x * 127.5 + 128).clip(0, 255).to(torch.uint8)

    engine = Engine(net, decode, Sampler(STEPS), (3, 16, 16), 4, device)
    together = engine.generate([0, 1, 2, 3])
    for k in range(4):
        alone = engine.generate([k])
        assert torch.equal(alone.classes, together.classes[k : k + 1])
        torch.testing.assert_close(alone.latents, together.latents[k : k + 1], atol=1e-4, rtol=1e-4)
    assert torch.equal(engine.generate([0, 1, 2, 3]).latents, together.latents)
