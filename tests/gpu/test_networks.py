"""Networks on a GPU give what they give on a CPU: eager, as CUDA graphs, compiled, and in half precision."""

import pytest
import torch

from benchmarks.trainers import images_for, make_trainer, preset_config
from edm2kit.models.compilation import compile_, graph_
from edm2kit.models.edm2 import Precond, freeze_
from edm2kit.training import loop
from tests.support import golden
from tests.support.same_noise import FromCPU

ARCHITECTURE = {
    "img_resolution": 16,
    "img_channels": 3,
    "label_dim": 4,
    "model_channels": 32,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [8],
    "channels_per_head": 32,
}

SMALL_NETWORK = {
    "model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8], "channels_per_head": 16
}  # fmt: skip


def network(**changes) -> Precond:
    torch.manual_seed(0)
    net = Precond(**{**ARCHITECTURE, **changes})
    for name, parameter in net.named_parameters():
        if name.endswith("gain"):
            parameter.data.fill_(1)
    return net.eval().requires_grad_(False)


def example(count: int, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(count))
    return x.to(device), torch.linspace(0.1, 3, count).to(device), torch.eye(4)[torch.arange(count) % 4].to(device)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", ["cond", "uncond"])
def test_golden_values_hold_in_float32(name, device):
    arrays = golden.load(f"network_{name}.npz")
    net = golden.network(name, golden.part(arrays, "state/")).to(device)
    labels = arrays["labels"].to(device) if "labels" in arrays else None
    with torch.no_grad():
        D, logvar = net(arrays["x"].to(device), arrays["sigma"].to(device), labels, return_logvar=True)
        frozen = freeze_(net)(arrays["x"].to(device), arrays["sigma"].to(device), labels)
    golden.assert_close(D.cpu(), arrays["D"], 1e-5)
    golden.assert_close(logvar.cpu(), arrays["logvar"], 1e-5)
    golden.assert_close(frozen.cpu(), arrays["D"], 1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "most"), [(torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)])
@pytest.mark.parametrize("frozen", [False, True])
def test_half_precision_is_close_to_float32(dtype, most, frozen, device):
    expected = network()(*example(8))
    net = network().to(device)
    net.compute_dtype = dtype
    net = freeze_(net) if frozen else net
    D = net(*example(8, device))
    assert D.dtype == torch.float32
    assert 0 < relative_error(D, expected) < most


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cuda_graphs_give_the_same_answers_for_every_batch_and_input(dtype, device):
    nets = [network().to(device), network().to(device)]
    for net in nets:
        net.compute_dtype = dtype
    plain, graphed = freeze_(nets[0]), graph_(freeze_(nets[1]), device)
    answers = []
    for count in (4, 1, 4, 3, 4):
        x, sigma, labels = example(count, device)
        x = x * (1 + len(answers))
        answers.append((graphed(x, sigma, labels), plain(x, sigma, labels)))
    for found, expected in answers:  # after all calls: none has been overwritten
        assert relative_error(found, expected) < (1e-6 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_network_agrees_with_eager_code(dtype, device):
    nets = [network().to(device), network().to(device)]
    for net in nets:
        net.compute_dtype = dtype
    plain, compiled = freeze_(nets[0]), compile_(freeze_(nets[1]))
    with torch.no_grad():
        found, expected = compiled(*example(4, device)), plain(*example(4, device))
    assert relative_error(found, expected) < (1e-5 if dtype == torch.float32 else 1e-2)


def gradients(net: Precond, device: torch.device) -> torch.Tensor:
    net.train().requires_grad_(True)
    (net(*example(8, device)) - 1).square().mean().backward()
    return torch.cat([p.grad.double().flatten().cpu() for p in net.parameters() if p.grad is not None])


@pytest.mark.parametrize("way", ["eager", "recompute", "compiled", "compiled, recompute"])
def test_gradients_are_those_of_a_cpu(way, device):
    expected = gradients(network(), torch.device("cpu"))
    net = network().to(device)
    if "recompute" in way:
        net.recompute_in_training_()
    if "compiled" in way:
        compile_(net)
    assert relative_error(gradients(net, device), expected) < 1e-5


def trained(precision: str, place: torch.device, compiled: bool = False) -> torch.Tensor:
    """How three steps move the weights, with the same noise, noise levels and images on every device."""
    config = preset_config(
        "edm2-img64-xs", precision=precision, batch_size=8, rampup_nimg=0, network=SMALL_NETWORK, label_dropout=0.2
    )
    torch.manual_seed(0)
    trainer = make_trainer(config, 16, 3, 4, torch.device("cpu"))
    start = {name: value.clone() for name, value in trainer.net.state_dict().items()}
    if place.type != "cpu":
        trainer = make_trainer(config, 16, 3, 4, place)
        trainer.net.load_state_dict(start)
    if compiled:
        compile_(trainer.net)
    batches = images_for(trainer, 8)
    for _ in range(3):
        trainer.step(batches, 1)
    return flat(trainer.net.state_dict()) - flat(start)


@pytest.mark.parametrize(
    ("precision", "compiled", "most"),
    [("fp32", False, 1e-2), ("fp32", True, 1e-2), ("fp16", False, 0.2), ("bf16", False, 0.5)],
)
def test_training_steps_move_weights_as_on_a_cpu(precision, compiled, most, device, monkeypatch):
    monkeypatch.setattr(loop, "StackedGenerator", FromCPU)
    expected = trained("fp32", torch.device("cpu"))
    error = relative_error(trained(precision, device, compiled), expected)
    print(precision, compiled, error)
    assert error < most


def flat(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.double().flatten().cpu() for value in state.values()])


@pytest.mark.parametrize("compiled", [False, True])
def test_no_training_step_makes_the_host_wait(compiled, device):
    config = preset_config("edm2-img64-xs", precision="fp16", batch_size=8, network=SMALL_NETWORK)
    trainer = make_trainer(config, 16, 3, 4, device)
    if compiled:
        compile_(trainer.net)
    batches = images_for(trainer, 8)
    trainer.step(batches, 1)
    trainer.step(batches, 1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step(batches, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
