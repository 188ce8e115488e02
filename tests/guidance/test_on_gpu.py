"""Guidance and solvers on a stand-in for a GPU: devices and dtypes never mix, and no step makes the host wait."""

import dataclasses

import pytest
import torch

from edm2kit.guidance import RULES, Choice, Parts, guide
from edm2kit.guidance.classifier.noise_classifier import ClassifierHeader, NoiseClassifier, save_classifier
from edm2kit.guidance.losses.gradient_step import StepStart, norm_slope
from edm2kit.guidance.option_types import existing_file
from edm2kit.guidance.reuse import Reuse
from edm2kit.guidance.weight_schedule import SCHEDULES
from edm2kit.models.edm2 import Precond, freeze_
from edm2kit.sampling.engine import Engine
from edm2kit.sampling.solvers import SOLVERS, WITHOUT_CHURN, Churn, Sampler
from tests.guidance.test_universal import CASES
from tests.support.fake_gpu import DEVICE, FakeGPU
from tests.support.guidance_checks import Nets

SIZE = 8
ARCHITECTURE = {
    "img_resolution": SIZE,
    "img_channels": 3,
    "model_channels": 8,
    "channel_mult": [1],
    "num_blocks": 1,
    "attn_resolutions": [SIZE],
    "channels_per_head": 8,
}


@pytest.fixture(scope="module")
def nets() -> Nets:
    """Networks on the device, as generate.py uses them."""
    with DEVICE:
        made = [freeze_(Precond(**ARCHITECTURE, label_dim=dim)) for dim in (4, 4, 0)]
    return Nets(*made, torch.empty(0), torch.empty(0))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    path = tmp_path_factory.mktemp("classifier") / "classifier.safetensors"
    architecture = {"img_resolution": SIZE, "img_channels": 3, "num_classes": 4, "width": 8, "levels": 2}
    save_classifier(path, NoiseClassifier(**architecture), ClassifierHeader(architecture, 0))
    return existing_file(str(path))


def decode(x):
    return (x * 127.5 + 128).clip(0, 255).to(torch.uint8)


def waits_of(denoiser, sampler: Sampler) -> list[str]:
    """What the host waits for while it generates two images, which must mix no devices."""
    with FakeGPU() as gpu:
        Engine(denoiser, decode, sampler, (3, SIZE, SIZE), 4, DEVICE).generate([0, 1])
    assert gpu.mixed == []
    return gpu.waits


def simple(x, sigma, condition=None):
    return x / (1 + sigma)


@pytest.mark.parametrize("S_churn", [0.0, 5.0])
@pytest.mark.parametrize("solver", SOLVERS)
def test_no_solver_waits_in_a_step(solver, S_churn):
    if S_churn and solver in WITHOUT_CHURN:
        with pytest.raises(ValueError, match="churn"):
            Sampler(5, solver=solver, churn=Churn(S_churn=S_churn))
        return
    # whether the images are finite is asked once
    assert len(waits_of(simple, Sampler(5, solver=solver, churn=Churn(S_churn=S_churn)))) == 1


@pytest.mark.parametrize("case", [case for case in CASES if case.method != "none" and case.rule == "linear"], ids=str)
def test_no_method_waits_in_a_step(case, nets, classifier):
    if case.options.get("classifier_file") == "file":
        case = dataclasses.replace(case, options={"classifier_file": classifier, "classifier_class": None})
    denoiser = guide(case.choice(2.0, interval=(0.1, 90.0)), case.parts(nets))
    if case.method == "classifier":
        waits_of(denoiser, Sampler(1))  # the classifier moves to the device once
    assert len(waits_of(denoiser, Sampler(2, solver="euler"))) == 1


@pytest.mark.parametrize("rule", RULES)
def test_no_rule_waits_in_a_step(rule):
    # a rule only sees what networks answer
    parts = Parts(simple, lambda x, sigma, condition=None: x / (2 + sigma))
    denoiser = guide(Choice("autoguidance", 2.0, rule=rule), parts)
    assert len(waits_of(denoiser, Sampler(4, solver="heun"))) == 1


def test_negatives_that_are_reused_wait_only_to_see_whether_all_images_have_stopped():
    parts = Parts(simple, lambda x, sigma, condition=None: x / (2 + sigma))
    for reuse, waits in ((Reuse(every=2, once=True), 1), (Reuse(stop=0.5), 4)):
        denoiser = guide(Choice("autoguidance", 2.0, reuse=reuse), parts)
        assert len(waits_of(denoiser, Sampler(4, solver="euler"))) == waits


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_schedule_waits_in_a_step(schedule):
    parts = Parts(simple, lambda x, sigma, condition=None: x / (2 + sigma))
    denoiser = guide(Choice("autoguidance", 1.5, schedule=schedule), parts)
    assert len(waits_of(denoiser, Sampler(4, solver="euler"))) == 1


def test_a_loss_that_is_no_square_is_refused_on_a_cpu():
    # on a GPU, where looking at the loss would wait, its slope is NaN and the engine refuses the image
    x = torch.ones(1, 3, 4, 4)
    with pytest.raises(ValueError, match="the loss is negative"):
        norm_slope(StepStart(x, torch.ones(1), x, torch.tensor([-1.0]), x))
