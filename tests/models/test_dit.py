"""A diffusers transformer inside EDM2's preconditioning."""

import copy
import sys

import pytest
import torch

from edm2kit.conditions import ClassLabels
from edm2kit.models import NETWORKS, Edits, build_network, evaluation_cost, full_architecture
from edm2kit.training.log import activation_bytes
from edm2kit.training.loss import EDM2Loss

ARGUMENTS = {"kind": "dit", "num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8}


def random_dit(label_dim: int = 4):
    """A network in eval mode whose blocks all contribute (new ones start at zero), with an input and labels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = build_network(full_architecture(8, 3, label_dim, 0.5, ARGUMENTS), "dit")
        for parameter in net.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
        x = torch.randn(3, 3, 8, 8)
    return net.eval().requires_grad_(False), x, torch.eye(label_dim)[:3] if label_dim else None


def test_a_new_network_answers_zero_from_the_raw_network():
    net = build_network(full_architecture(8, 3, 4, 0.5, ARGUMENTS), "dit").eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(net(x, 0.5, torch.eye(4)[:2]), x / 2)  # c_skip at sigma = sigma_data


def test_labels_choose_rows_and_no_label_is_the_last_one():
    net, x, labels = random_dit()
    embedding = net.raw.blocks[0].norm1.emb.class_embedder
    assert torch.equal(embedding(labels), embedding.weight[:3])
    assert torch.equal(embedding(torch.zeros(2, 4)), embedding.weight[-1].expand(2, -1))
    plain = net(x, 1.0, labels)
    assert torch.equal(net(x, 1.0, ClassLabels(labels)), plain)
    assert torch.equal(net(x, 1.0, torch.zeros(3, 4)), net(x, 1.0))
    assert not torch.allclose(net(x, 1.0), plain, atol=1e-4)


def test_training_drops_no_labels_of_its_own():
    net, x, labels = random_dit()
    many, same = x[:1].expand(64, -1, -1, -1), labels[:1].expand(64, -1)
    D = net.train()(many, 1.0, same)
    torch.testing.assert_close(D, D[:1].expand_as(D))


def test_an_unconditional_network_ignores_labels():
    net, x, _ = random_dit(label_dim=0)
    assert torch.equal(net(x, 1.0, torch.ones(3, 7)), net(x, 1.0))


def test_noise_levels_matter():
    net, x, labels = random_dit()
    both = net(x[:2].clone(), torch.tensor([0.5, 5.0]), labels[:2])
    torch.testing.assert_close(both[1:], net(x[1:2], 5.0, labels[1:2]))
    raw = net.raw
    levels = [raw(x, torch.full([3], level), labels, Edits()) for level in (-1.0, 0.0, 0.01)]
    assert not torch.allclose(levels[0], levels[1], atol=1e-3)
    assert not torch.equal(levels[1], levels[2])


def test_attention_has_roles_and_can_be_changed_and_returned():
    net, x, labels = random_dit()
    roles = {name: (role.side, role.resolution, role.depth) for name, role in net.attention_roles.items()}
    assert roles == {"block0": ("encoder", 4, 0), "block1": ("middle", 4, 1), "block2": ("decoder", 4, 2)}
    softmax = torch.nn.functional.scaled_dot_product_attention
    plain = net(x, 1.0, labels)
    D, maps = net(x, 1.0, labels, return_attention=["block1"])
    torch.testing.assert_close(D, plain)
    assert {name: list(found.shape) for name, found in maps.items()} == {"block1": [3, 2, 16, 16]}
    torch.testing.assert_close(maps["block1"].sum(dim=3), torch.ones(3, 2, 16))
    assert torch.equal(net(x, 1.0, labels, attention={"block1": softmax}), plain)
    assert not torch.allclose(net(x, 1.0, labels, attention={"block1": lambda q, k, v: v}), plain, atol=1e-4)
    assert torch.equal(net(x, 1.0, labels), plain)  # an edit is for one call


@pytest.mark.parametrize("by_gradient", [False, True])
def test_a_skipped_block_passes_its_input_on(by_gradient):
    net, x, labels = random_dit()
    x.requires_grad_(by_gradient)  # then blocks are called as gradient checkpointing does
    without = copy.deepcopy(net)
    del without.raw.transformer.transformer_blocks[1]
    plain, skipped = net(x, 1.0, labels), without(x, 1.0, labels)
    D = net(x, 1.0, labels, skip={"block1": torch.tensor([True, False, True])})
    assert torch.equal(D[1], plain[1])  # an image that is not skipped stays as it is, bit for bit
    torch.testing.assert_close(D[[0, 2]], skipped[[0, 2]])
    assert not torch.allclose(D, plain, atol=1e-4)
    assert torch.equal(net(x, 1.0, labels), plain)


@pytest.mark.parametrize("edit", ["embedding", "dropout"])
def test_edits_it_does_not_support_are_refused(edit):
    net, x, labels = random_dit()
    assert edit not in net.supported_edits
    with pytest.raises(ValueError, match=f"a DiT network does not support the edit '{edit}'; it supports: attention"):
        net(x, 1.0, labels, **{edit: lambda *values: values[-1]})
    with pytest.raises(ValueError, match=r"no attention in a block called 'block3'.*block0, block1, block2"):
        net(x, 1.0, labels, return_attention=["block3"])


@pytest.mark.parametrize("training", [False, True])
def test_recomputing_changes_no_gradient(training):
    net, x, labels = random_dit()
    net.requires_grad_(training).train(training)
    for block in net.raw.blocks:
        block.attn1.to_out[1].p = 0.3  # dropout
    found = []
    for recompute in (False, True):
        net.raw.recompute = net.raw.recompute_in_training = recompute
        leaf = x.clone().requires_grad_()
        torch.manual_seed(1)
        loss = net(leaf, 1.0, labels).square().sum()
        weights = list(net.raw.parameters()) if training else []
        found.append(torch.autograd.grad(loss, [leaf, *weights]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near_float32_frozen_or_not(dtype):
    net, x, labels = random_dit()
    exact = net(x, 1.0, labels)
    net.compute_dtype = dtype
    frozen = NETWORKS["dit"].freeze_(copy.deepcopy(net))
    for rough in (net(x, 1.0, labels), frozen(x, 1.0, labels)):
        assert rough.dtype == torch.float32
        assert not torch.equal(rough, exact)
        assert (rough - exact).norm() / exact.norm() < 8 * torch.finfo(dtype).eps
    assert frozen.raw.blocks[0].attn1.to_q.weight.dtype == dtype


def test_the_loss_trains_every_weight():
    net, x, labels = random_dit()
    net.requires_grad_(True)
    EDM2Loss()(net, x, labels).sum().backward()
    assert [name for name, parameter in net.named_parameters() if parameter.grad is None] == []


def test_every_operation_belongs_to_a_layer():
    cost = evaluation_cost(full_architecture(8, 3, 4, 0.5, ARGUMENTS), "dit")
    by_name = {layer.name: layer for layer in cost.layers}
    query = by_name["dit.transformer.transformer_blocks.0.attn1.to_q"]
    assert (query.shape, query.multiply_adds) == ((16, 16), 16 * 16 * 16)  # 16 tokens, width 16
    assert by_name["dit.transformer.transformer_blocks.0.attn1.attention"].multiply_adds == 2 * 16 * 16 * 16


def test_memory_of_training_is_forecast_in_any_precision():
    with torch.device("meta"):
        net = build_network(full_architecture(8, 3, 4, 0.5, ARGUMENTS), "dit").train()
    full = activation_bytes(net, 64)
    assert activation_bytes(net, 64, recompute=True) < full
    net.compute_dtype = torch.float16
    assert activation_bytes(net, 64) < full


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"patch_size": 3}, "patch_size must divide the resolution 8; got 3"),
        ({"num_layers": 0}, "num_layers must be at least 1; got 0"),
        ({"num_attention_heads": 1, "attention_head_dim": 6}, "must be a multiple of 4 for position embeddings; got 6"),
    ],
)
def test_wrong_arguments_are_refused(change, reason):
    with pytest.raises(ValueError, match=reason):
        build_network(full_architecture(8, 3, 4, 0.5, {**ARGUMENTS, **change}), "dit")


def test_without_diffusers_the_reason_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"a network of kind 'dit' needs diffusers: pip install 'diffusers"):
        build_network(full_architecture(8, 3, 4, 0.5, ARGUMENTS), "dit")
