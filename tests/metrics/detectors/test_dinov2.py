"""The DINOv2 transformer and its two ways to resize."""

import json

import numpy as np
import pytest
import torch

from edm2kit.metrics.detectors.dinov2 import DINOv2ViT
from edm2kit.metrics.detectors.preprocess import resize_bicubic, resize_bicubic_pil
from tests.support import golden
from tests.support.golden import assert_close


@pytest.fixture(scope="module")
def arrays():
    with np.load(golden.DATA / "dinov2_tiny.npz") as arrays:
        return dict(arrays)


def tiny(arrays, **changes):
    net = DINOv2ViT(**{**json.loads(str(arrays["config"])), **changes})
    state = {name: torch.from_numpy(value) for name, value in golden.part(arrays, "state/").items()}
    net.load_state_dict(state)
    return net


@pytest.mark.parametrize("resize_mode", ["torch", "pil"])
@pytest.mark.parametrize("images", ["64", "300", "noise"])
def test_golden_features(arrays, resize_mode, images):
    features = tiny(arrays, resize_mode=resize_mode)(torch.from_numpy(arrays[f"images_{images}"]))
    assert features.dtype == torch.float32
    assert_close(features, torch.from_numpy(arrays[f"features_{resize_mode}_{images}"]), 1e-4)


def test_only_pillow_clamps_the_overshoot(arrays):
    noise = torch.from_numpy(arrays["images_noise"])
    assert resize_bicubic(noise, 224).min() < 0
    clamped = resize_bicubic_pil(noise, 224)
    assert clamped.min() == 0
    assert torch.equal(clamped, clamped.round())


def test_defaults_are_those_of_the_published_vit_l_14():
    with torch.device("meta"):
        net = DINOv2ViT()
    assert sum(parameter.numel() for parameter in net.parameters()) == 304_368_640
    assert net.pos_embed.shape == (1, 1370, 1024)
    assert len(net.blocks) == 24


def test_grey_is_repeated_and_no_image_has_no_features(arrays):
    net, images = tiny(arrays), torch.from_numpy(arrays["images_64"])
    assert torch.equal(net(images[:, :1]), net(images[:, :1].repeat(1, 3, 1, 1)))
    assert net(images[:0]).shape == (0, 48)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"resize_mode": "lanczos"}, "use one of torch, pil"),
        ({"num_heads": 5}, "num_heads"),
        ({"patch_size": 15}, "15"),
    ],
)
def test_refuses(arrays, change, reason):
    with pytest.raises(ValueError, match=reason):
        DINOv2ViT(**{**json.loads(str(arrays["config"])), **change})
