"""The benchmarks of the network compare what they say they compare: on a tiny network, both ways give one answer."""

import torch

from benchmarks import inference, networks, sampling, training_step
from edm2kit.models import full_architecture
from edm2kit.models.edm2 import freeze_

TINY = full_architecture(
    16, 3, 10, 0.5, {"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "channels_per_head": 8}
)


def test_ways_to_evaluate_agree(monkeypatch):
    monkeypatch.setattr(networks, "GUIDE", TINY)
    monkeypatch.setattr(inference, "JOBS", {"tiny": (TINY, 3, {})})
    with torch.no_grad():
        job = inference.make_job("tiny", half=True, compiled=False)
        assert list(job.contenders) == ["plain", "weights normalised at each call", "frozen", "frozen, bf16"]
        assert job.contenders["frozen"]().shape == (3, 3, 16, 16)
    assert job.errors["plain"] == 0
    assert 0 < job.errors["frozen"] < 1e-5
    assert 1e-4 < job.errors["frozen, bf16"] < 0.02
    assert job.notes["error_bf16"] < 1.2 * job.notes["error_autocast_bf16"]


def test_what_the_cpu_cannot_do_is_left_out_and_said(monkeypatch):
    monkeypatch.setattr(networks, "GUIDE", TINY)
    monkeypatch.setattr(inference, "JOBS", {"tiny": (TINY, 1, {})})
    monkeypatch.setattr(inference, "slow_precision", lambda dtype: "it cannot")
    with torch.no_grad():
        job = inference.make_job("tiny", half=False, compiled=False)
    assert "frozen, bf16" not in job.contenders
    assert job.notes["skipped"] == {"frozen, bf16": "it cannot"}


def test_ways_to_train_agree(monkeypatch):
    monkeypatch.setattr(training_step, "JOBS", {"tiny": (TINY, 4)})
    job = training_step.make_job("tiny")
    assert job.errors["training loop"] < 1e-5
    assert all(1e-4 < error < 0.05 for way, error in job.errors.items() if way != "training loop")
    assert job.notes["error_of_loss"] < 1e-5
    for step in job.contenders.values():
        step()


def test_slow_half_precision_is_left_out_of_training_and_sampling(monkeypatch):
    for module in (training_step, sampling):
        monkeypatch.setattr(module, "slow_precision", lambda dtype: "it cannot")
    monkeypatch.setattr(training_step, "JOBS", {"tiny": (TINY, 4)})
    for name in ("SMALL", "GUIDE"):
        monkeypatch.setattr(networks, name, TINY)
    monkeypatch.setattr(sampling, "_STEPS", 2)
    nets = [networks.random_network(TINY, seed).eval() for seed in (0, 1)]
    with torch.no_grad():
        sampled = sampling.pair_job(*nets)
    for job in (training_step.make_job("tiny"), sampled):
        assert [way for way in job.contenders if "bf16" in way] == []
        assert list(job.notes["skipped"].values()) == ["it cannot"]


def test_guided_images_agree(monkeypatch):
    monkeypatch.setattr(networks, "SMALL", TINY)
    monkeypatch.setattr(networks, "GUIDE", TINY)
    monkeypatch.setattr(sampling, "_STEPS", 4)
    with torch.no_grad():
        nets = [networks.random_network(TINY, seed).eval() for seed in (0, 1)]
        job = sampling.pair_job(*nets)
        assert 0 < job.errors["frozen"] < 1e-4
        assert all(1e-4 < job.errors[way] < 0.1 for way in job.errors if way not in ("plain", "frozen"))
        batched = sampling.batched_job(freeze_(nets[0]))
    assert batched.errors["one call"] < 1e-5
