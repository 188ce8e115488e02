"""Parameters and multiply-adds: the published table, sums over layers, and every way to name a network."""

import re

import pytest
import torch
from click.testing import CliRunner

from edm2kit.cli import flops as count_flops
from edm2kit.models import Precond, full_architecture
from edm2kit.models.cost import evaluation_cost
from edm2kit.training.config import config_from_dict, preset_path, read_yaml
from tests.support import tiny
from tests.support.fakes import tiny_snapshot

# published parameters (M) and multiply-adds per evaluation (G) on 4x64x64 latents with 1000 classes
PUBLISHED = {
    "xxs": (31.3, 11.3),
    "xs": (124.7, 45.0),
    "s": (280.2, 100.8),
    "m": (497.8, 179.0),
    "l": (777.5, 279.3),
    "xl": (1119.3, 402.0),
    "xxl": (1523.2, 546.9),
}


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(count_flops.main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("size", PUBLISHED)
def test_cost_of_the_published_networks(size):
    path = preset_path(f"edm2-img512-{size}")
    cost = evaluation_cost(full_architecture(64, 4, 1000, 0.5, config_from_dict(read_yaml(path), size).network))
    parameters, multiply_adds = PUBLISHED[size]
    assert cost.parameters / 1e6 == pytest.approx(parameters, rel=0.005)
    assert cost.multiply_adds / 1e9 == pytest.approx(multiply_adds, rel=0.005)


def test_cost_of_a_network_counted_by_hand():
    network = {
        "model_channels": 8,
        "channel_mult": [1],
        "num_blocks": 1,
        "attn_resolutions": [],
        "channels_per_head": 4,
    }
    cost = evaluation_cost(full_architecture(4, 3, 5, 0.5, network))
    pixels = 4 * 4
    expected = {
        "unet.emb_noise": 8 * 8,
        "unet.emb_label": 5 * 8,
        "unet.enc.4x4_conv": 9 * 4 * 8 * pixels,
        "unet.enc.4x4_block0.conv_res0": 9 * 8 * 8 * pixels,
        "unet.dec.4x4_block1.conv_skip": 16 * 8 * pixels,
        "unet.dec.4x4_in0.attn_qkv": 8 * 24 * pixels,
        "unet.dec.4x4_in0.attention": 2 * pixels * pixels * 8,  # q k^T and the weighted sum of v
        "unet.out_conv": 9 * 8 * 3 * pixels,
        "logvar_linear": 0,
    }
    found = {layer.name: layer.multiply_adds for layer in cost.layers}
    assert {name: found[name] for name in expected} == expected
    assert cost.multiply_adds == sum(found.values())
    net = Precond(4, 3, 5, **network)
    assert cost.parameters == sum(p.numel() for p in net.parameters())
    gains = sum(p.numel() for name, p in net.named_parameters() if name.endswith("gain"))
    assert cost.parameters == sum(layer.parameters for layer in cost.layers) + gains


def test_counting_allocates_nothing_and_uses_no_random_numbers():
    state = torch.random.get_rng_state()
    evaluation_cost(full_architecture(64, 4, 0, 0.5, {"model_channels": 4096}))  # a hundred billion parameters
    assert torch.equal(torch.random.get_rng_state(), state)


def test_presets_are_compared_and_one_is_shown_by_layer(tmp_path):
    both = invoke("edm2-img512-xs", "edm2-img512-s")
    assert re.search(r"edm2-img512-xs +124\.7 +45\.0\n", both)
    assert re.search(r"edm2-img512-s +280\.2 +100\.8\n", both)
    config = tiny.write_config(tmp_path / "mine.yaml")
    one = invoke(config, "--resolution", 8, "--image-channels", 3, "--classes", 4)
    assert "3x8x8, 4 classes" in one
    assert re.search(r"unet\.enc\.8x8_conv +8x4x3x3 +288 +0\.018\n", one)
    assert one.splitlines()[-1].startswith("total")


def test_a_snapshot_knows_its_own_shape(tmp_path):
    path = tiny_snapshot(tmp_path / "net.safetensors", label_dim=7)
    assert "3x8x8, 7 classes" in invoke(path, "--classes", 3)


def test_an_unknown_name_is_answered_with_the_nearest():
    result = CliRunner().invoke(count_flops.main, ["edm2-img512-xxxl"])
    assert result.exit_code == 1
    assert "did you mean 'edm2-img512-xxl'" in result.output
