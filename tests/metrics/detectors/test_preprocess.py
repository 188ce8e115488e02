"""Declared preprocessing: what it does to pixels, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from edm2kit.metrics.detectors.preprocess import RESIZES, Preprocessing, resize_bilinear_tf1

USUAL = {"size": 8, "resize": "bicubic", "value_range": [0, 1], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}


def images(count=2, height=12, width=16):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, height, width), np.uint8))


def test_pixels_are_resized_scaled_and_normalised_in_this_order():
    found = Preprocessing.from_mapping({**USUAL, "value_range": [-1, 1]})(images())
    resized = torch.nn.functional.interpolate(images().float(), (8, 8), mode="bicubic", antialias=True).double()
    for channel, (mean, std) in enumerate(zip(USUAL["mean"], USUAL["std"], strict=True)):
        expected = (resized[:, channel] / 255 * 2 - 1 - mean) / std
        torch.testing.assert_close(found[:, channel].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", RESIZES)
def test_every_resize_gives_the_declared_size_in_the_same_range(name):
    flat = torch.full((2, 1, 12, 16), 200, dtype=torch.uint8)
    found = Preprocessing.from_mapping({**USUAL, "resize": name, "mean": [0, 0, 0], "std": [1, 1, 1]})(flat)
    assert found.shape == (2, 3, 8, 8)
    torch.testing.assert_close(found, torch.full_like(found, 200 / 255))


def test_the_resizes_of_pillow_are_pillow():
    for name, kind in (("bicubic-pil", Image.Resampling.BICUBIC), ("bilinear-pil", Image.Resampling.BILINEAR)):
        pixels = images(1)[0].permute(1, 2, 0).numpy()
        expected = np.asarray(Image.fromarray(pixels).resize((8, 8), kind)).transpose(2, 0, 1)
        assert np.array_equal(RESIZES[name](images(1), 8)[0].numpy(), expected)


def test_the_resizes_differ():
    found = {name: resize(images(), 8) for name, resize in RESIZES.items()}
    assert torch.equal(found["bilinear-tf1"], resize_bilinear_tf1(images().float(), 8))
    values = list(found.values())
    assert not any(torch.equal(values[a], values[b]) for a in range(len(values)) for b in range(a))


def test_the_text_contains_every_value():
    text = str(Preprocessing.from_mapping(USUAL))
    assert text == "bicubic to 8x8, values from 0 to 1, mean [0.5, 0.4, 0.3], std [0.2, 0.3, 0.4]"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"size": "8"}, "size is '8'"),
        ({"size": 0}, "from 1 to 4096"),
        ({"size": True}, "size is True"),
        ({"resize": "cubic"}, "expected one of bicubic"),
        ({"resize": None}, "expected one of bicubic"),
        ({"value_range": [1, 0]}, "lower end first"),
        ({"value_range": 1}, "list of 2 numbers"),
        ({"mean": [0.5]}, "mean is .*list of 3 numbers"),
        ({"mean": [0, 0, float("nan")]}, "list of 3 numbers"),
        ({"std": [1, 1, 0]}, "positive"),
        ({"std": ["a", "b", "c"]}, "list of 3 numbers"),
        ({"crop": 8}, "expected exactly size, resize, value_range, mean, std"),
    ],
)
def test_wrong_declarations_are_refused(change, reason):
    with pytest.raises(ValueError, match=reason):
        Preprocessing.from_mapping({**USUAL, **change})


@pytest.mark.parametrize("content", [None, [], "bicubic", {}, {"size": 8}])
def test_incomplete_declarations_are_refused(content):
    with pytest.raises(ValueError, match="expected exactly size"):
        Preprocessing.from_mapping(content)
