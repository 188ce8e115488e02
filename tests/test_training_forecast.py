"""Forecasts against what really happens."""

import pytest
import torch

from tests import golden
from training.config import TrainConfig
from training.forecast import activation_bytes, make_forecast
from training.loss import EDM2Loss
from training.networks import Precond, full_architecture


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
        assert activation_bytes(meta, count) == pytest.approx(saved_bytes(net, count), rel=0.15)


def test_xxl_needs_what_it_needs_without_being_built():
    config = TrainConfig(duration_nimg=896 << 20, network={"model_channels": 448}, precision="fp16")
    architecture = full_architecture(64, 4, 1000, config.sigma_data, config.network)
    forecast = make_forecast(config, architecture, micro_batch=4)
    assert forecast.parameters / 1e6 == pytest.approx(1523.2, abs=0.1)
    assert forecast.steps == 896 * 512
    assert forecast.num_snapshots == 896 // 8 * 2
    assert forecast.state_bytes == forecast.parameters * 4 * 6
    assert "1523.2 M" in "\n".join(forecast.lines())
