"""The plain path against the golden values: what serves as an oracle must itself be right."""

import pytest
import torch

from benchmarks.plain import PlainNetwork, PlainTraining, guided_heun
from edm2kit.ema.power_function import std_to_exp
from edm2kit.guidance.combine import Guided
from edm2kit.sampling.solvers import edm_sampler
from edm2kit.training.learning_rate import learning_rate
from tests.support import golden
from tests.support.fakes import Gaussian


@pytest.mark.parametrize("name", ["cond", "uncond"])
def test_the_plain_network_equals_reference(name):
    arrays = golden.load(f"network_{name}.npz")
    net = PlainNetwork(golden.architecture(name), golden.part(arrays, "state/"))
    labels = arrays.get("labels")
    golden.assert_close(net(arrays["x"], arrays["sigma"], labels), arrays["D"], 1e-5)
    golden.assert_close(net.logvar(arrays["sigma"]), arrays["logvar"], 1e-5)
    golden.assert_close(net(arrays["x"], 1.7, labels), arrays["D_scalar_sigma"], 1e-5)
    if "D_no_label" in arrays:
        golden.assert_close(net(arrays["x"], arrays["sigma"]), arrays["D_no_label"], 1e-5)


@pytest.mark.parametrize("name", ["cond", "uncond"])
def test_plain_training_equals_reference(name):
    arrays = golden.load(f"training_{name}.npz")
    batch_size = int(arrays["batch_size"])
    exponents = tuple(std_to_exp(arrays["ema_stds"].numpy()).tolist())
    state = golden.part(arrays, "init/")
    loss = (float(arrays["P_mean"]), float(arrays["P_std"]))
    training = PlainTraining(golden.architecture(name), state, exponents, *loss)
    schedule = [float(arrays[key]) for key in ("ref_lr", "ref_batches", "rampup_nimg")]
    for i, seed in enumerate(arrays["seeds"].tolist()):
        torch.manual_seed(seed)
        lr = learning_rate(i * batch_size, batch_size, *schedule)
        loss = training.step(arrays["images"][i], arrays["labels"][i], lr)
        golden.assert_close(loss, arrays["loss"][i], 1e-5)
    for prefix, state in [("final/", training.state), *((f"ema-{k:.3f}/", a) for k, a in averages(arrays, training))]:
        expected = golden.part(arrays, prefix)
        assert state.keys() == expected.keys()
        for key, value in state.items():
            golden.assert_close(value.detach(), expected[key], 6e-5)


def averages(arrays, training):
    return zip(arrays["ema_stds"].tolist(), training.averages, strict=True)


def test_the_plain_sampler_is_the_project_s_own():
    noise = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    main, guide = Gaussian(0.3, 0.2), Gaussian(-0.1, 0.5)
    ours = edm_sampler(Guided(main, guide, 1.7), noise)
    torch.testing.assert_close(guided_heun(main, guide, 1.7, noise, None), ours, atol=1e-5, rtol=1e-5)
