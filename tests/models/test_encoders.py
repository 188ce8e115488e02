"""Pixels and latents against reference values."""

import pytest
import torch

from edm2kit.models.encoders import RGBEncoder, StabilityVAEEncoder, make_encoder
from tests.support import golden


def test_rgb_equals_reference_and_round_trips():
    arrays = golden.load("sampler.npz")
    decoded = RGBEncoder().decode(arrays["rgb_decode_in"].reshape(1, 1, 1, -1))
    assert torch.equal(decoded.flatten(), arrays["rgb_decode_out"])
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(RGBEncoder().decode(RGBEncoder().encode(pixels)), pixels)


def test_vae_latents_equal_reference():
    arrays = golden.load("vae_latents.npz")
    encoder = StabilityVAEEncoder()
    torch.testing.assert_close(encoder.scale.flatten(), arrays["scale"], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(encoder.bias.flatten(), arrays["bias"], atol=1e-6, rtol=1e-6)
    torch.manual_seed(int(arrays["randn_seed"]))
    torch.testing.assert_close(encoder.encode(arrays["raw_mean_std"]), arrays["final"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("encoder", [RGBEncoder(), StabilityVAEEncoder("folder", final_std=0.4)])
def test_spec_builds_the_same_encoder(encoder):
    again = make_encoder(encoder.spec())
    assert type(again) is type(encoder)
    assert again.spec() == encoder.spec()


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="uint8"):
        RGBEncoder().encode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="posterior mean and std"):
        StabilityVAEEncoder().encode(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"unknown encoder 'jpeg'.*rgb, vae"):
        make_encoder({"kind": "jpeg"})
    with pytest.raises(ValueError, match="takes no arguments"):
        make_encoder({"kind": "rgb", "strength": 3})


def test_rgb_pixels_are_the_latents_that_encode_makes():
    raw = torch.arange(256).reshape(1, 1, 16, 16).to(torch.uint8)
    encoder = RGBEncoder()
    assert torch.equal(encoder.pixels(encoder.encode(raw)), raw.float() / 127.5 - 1)
