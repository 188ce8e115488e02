"""Five reference optimizer steps: loss, schedule, forced normalisation, Adam and EMA together."""

import json

import pytest
import torch

from edm2kit.ema.power_function import PowerFunctionEMA
from edm2kit.models import normalize_weights_
from edm2kit.torch_utils.rng import StackedGenerator
from edm2kit.training.learning_rate import learning_rate
from edm2kit.training.loss import EDM2Loss
from tests.support import golden


@pytest.mark.parametrize("name", ["cond", "uncond"])
def test_five_training_steps_equal_reference(name):
    arrays = golden.load(f"training_{name}.npz")
    batch_size = int(arrays["batch_size"])
    net = golden.network(name, golden.part(arrays, "init/")).train()
    loss_fn = EDM2Loss(*(float(arrays[key]) for key in ("P_mean", "P_std", "sigma_data")))
    ema = PowerFunctionEMA(net, arrays["ema_stds"].tolist())
    adam = torch.optim.Adam(net.parameters(), betas=(0.9, 0.99), eps=1e-8)
    schedule = [float(arrays[key]) for key in ("ref_lr", "ref_batches", "rampup_nimg")]
    for i in range(len(arrays["seeds"])):
        torch.manual_seed(int(arrays["seeds"][i]))
        normalize_weights_(net)
        loss = loss_fn(net, arrays["images"][i], arrays["labels"][i])
        golden.assert_close(loss.detach(), arrays["loss"][i], 1e-5)
        adam.zero_grad()
        loss.sum().div(batch_size).backward()
        lr = learning_rate(i * batch_size, batch_size, *schedule)
        assert lr == pytest.approx(float(arrays["lr"][i]), rel=1e-6)
        adam.param_groups[0]["lr"] = lr
        adam.step()
        ema.update((i + 1) * batch_size, batch_size)
    for prefix, state in [("final/", net.state_dict()), *((f"ema-{k}/", v) for k, v in ema.state_dict().items())]:
        expected = golden.part(arrays, prefix)
        assert state.keys() == expected.keys()
        for key, value in state.items():
            golden.assert_close(value, expected[key], 6e-5)


def test_learning_rate_equals_reference():
    for row in json.loads((golden.DATA / "lr_schedule.json").read_text()):
        lr = learning_rate(
            row["cur_nimg"], row["batch_size"], row["ref_lr"], row["ref_batches"], row["rampup_Mimg"] * 1e6
        )
        assert lr == pytest.approx(row["lr"], rel=1e-6, abs=1e-12)


def test_noise_of_an_image_does_not_depend_on_its_batch():
    arrays = golden.load("training_cond.npz")
    net = golden.network("cond", golden.part(arrays, "init/"))
    images, labels, seeds = arrays["images"][0], arrays["labels"][0], [11, 12, 13, 14]
    with torch.no_grad():
        whole = EDM2Loss().terms(net, images, labels, StackedGenerator("cpu", seeds))
        last = EDM2Loss().terms(net, images[2:], labels[2:], StackedGenerator("cpu", seeds[2:]))
    assert torch.equal(whole.sigma[2:], last.sigma)
    torch.testing.assert_close(whole.loss[2:], last.loss, atol=1e-5, rtol=1e-5)
