"""Forecasts against what really happens."""

import pytest
import torch

from edm2kit.models import Precond, full_architecture
from edm2kit.training.config import TrainConfig
from edm2kit.training.log import Forecast, Memory, activation_bytes, make_forecast, shares
from edm2kit.training.loss import EDM2Loss
from edm2kit.training.micro_batches import memory_advice
from tests.support import golden
from tests.support.memory import PeakBytes


def saved_bytes(net: Precond, count: int) -> int:
    """What autograd really keeps for one loss of `count` images, each storage once, weights not."""
    weights, saved = {p.data_ptr() for p in net.parameters()}, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    images, labels = torch.randn(count, 3, 16, 16), torch.eye(4)[torch.arange(count) % 4]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = EDM2Loss()(net, images, labels)
    assert loss.requires_grad
    return sum(storage.nbytes() for pointer, storage in saved.items() if pointer not in weights)


def test_activations_of_a_batch_are_foretold():
    net = golden.network("cond").train()
    with torch.device("meta"):
        meta = Precond(**golden.architecture("cond")).train()
    for count in (1, 8):
        assert activation_bytes(meta, count) == pytest.approx(saved_bytes(net, count), rel=0.02)


def test_activations_computed_again_are_foretold():
    net = golden.network("cond").train()
    net.unet.recompute_in_training = True
    with torch.device("meta"):
        meta = Precond(**golden.architecture("cond")).train()
    images, labels = torch.randn(8, 3, 16, 16), torch.eye(4)[torch.arange(8) % 4]
    with PeakBytes() as memory:
        EDM2Loss()(net, images, labels).sum().backward()
    # the peak is in the middle of the way back, where few gradients of weights are there yet
    assert activation_bytes(meta, 8, recompute=True) == pytest.approx(memory.peak, rel=0.1)


def test_xxl_needs_what_it_needs_without_being_built_and_fits_four_gpus_of_40_gb_by_shares():
    config = TrainConfig(duration_nimg=896 << 20, network={"model_channels": 448}, precision="fp16")
    architecture = full_architecture(64, 4, 1000, config.sigma_data, config.network)
    forecast = make_forecast(config, architecture, micro_batch=1, world_size=4)
    assert forecast.parameters / 1e6 == pytest.approx(1523.2, abs=0.1)
    assert forecast.steps == 896 * 512
    assert forecast.num_snapshots == 896 // 8 * 2
    assert forecast.memory.state == forecast.parameters * 4 * 6
    assert "1523.2 M" in "\n".join(forecast.lines())
    assert forecast.memory.total > 40e9
    shared = forecast.choices["--recompute true --shard true"]
    assert shared.total < 25e9
    assert shared.optimizer == pytest.approx(forecast.memory.optimizer / 4, rel=0.001)
    assert shared.averages == pytest.approx(forecast.memory.averages / 4, rel=0.001)


def small(world_size: int, **options: bool) -> Forecast:
    config = TrainConfig(network={"model_channels": 16, "channels_per_head": 16, "channel_mult": [1, 2]}, **options)
    architecture = full_architecture(16, 3, 4, config.sigma_data, config.network)
    return make_forecast(config, architecture, micro_batch=4, world_size=world_size)


def test_what_other_options_would_need_is_what_they_need():
    plain, lean = small(2), small(2, recompute=True, shard=True)
    assert plain.choices["--recompute true --shard true"] == lean.memory
    assert lean.choices["--recompute false --shard false"] == plain.memory
    assert len(plain.choices) == 3
    assert lean.memory.activations < plain.memory.activations / 2
    assert lean.memory.total < plain.memory.total
    whole = f"{lean.parameters * 4 * 4 / 1e9:.2f} GB of rank 0's memory"
    assert whole in lean.lines()[-1]
    assert "rank 0" not in plain.lines()[-1]


def test_one_process_has_nobody_to_share_with():
    assert list(small(1).choices) == ["--recompute true"]
    assert small(1, shard=True).memory == small(1).memory


def test_shares_go_largest_first_to_the_emptiest_rank():
    assert shares([1, 8, 4, 3, 2], 2) == [9, 9]
    assert shares([9, 3, 3, 2], 3) == [9, 5, 3]
    assert shares([5, 4, 3], 1) == [12]


def test_a_run_that_does_not_fit_its_gpu_gets_the_options_that_do():
    gb = 10**9
    memory, recomputed = (Memory(10 * gb, 10 * gb, 5 * gb, activations * gb) for activations in (32, 8))
    forecast = Forecast(1, 1, memory, {"--recompute true": recomputed}, 1, 1, 1, 1)
    assert memory_advice(forecast, 57 * gb, 64) is None
    assert memory_advice(forecast, 45 * gb, 64) == (
        "a process needs 57.0 GB or more, and its GPU has 45.0 GB free; use --batch-gpu 32 or --recompute true"
    )
    assert memory_advice(forecast, 27 * gb, 64).endswith("use --batch-gpu 4")
    assert "none of --batch-gpu" in memory_advice(forecast, 20 * gb, 64)
