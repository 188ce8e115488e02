"""FID's Inception network, and the resize in front of it."""

import pytest
import torch

from edm2kit.metrics.detectors.inception import InceptionV3
from edm2kit.metrics.detectors.preprocess import resize_bilinear_tf1
from tests.support import golden, inception_recipe


@pytest.fixture(scope="module")
def net():
    net = InceptionV3()
    net.load_state_dict(inception_recipe.weights())
    return net


def relative(actual, expected):
    return float((actual - expected).norm() / expected.norm())


def test_has_the_published_names_and_shapes():
    assert {name: list(value.shape) for name, value in InceptionV3().state_dict().items()} == inception_recipe.shapes()


@pytest.mark.parametrize("size", ["64x64", "512x512"])
def test_golden_features(net, size):
    arrays = golden.load("inception_recipe.npz")
    features = net(arrays[f"images_{size}"])
    assert features.dtype == torch.float32
    assert relative(features, arrays[f"features_{size}"]) <= 1e-5


def test_grey_is_repeated_and_training_mode_changes_nothing(net):
    grey = golden.load("inception_recipe.npz")["images_64x64"][:1, :1]
    expected = net(grey.repeat(1, 3, 1, 1))
    assert torch.equal(net(grey), expected)
    net.train()
    assert torch.equal(net(grey), expected)
    assert net(grey[:0]).shape == (0, 2048)


@pytest.mark.parametrize(
    "images", [torch.zeros(1, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(1, 4, 8, 8).byte()]
)
def test_refuses_what_is_no_batch_of_images(net, images):
    with pytest.raises(ValueError, match="uint8 images"):
        net(images)


def test_resize_reads_from_unshifted_coordinates_and_clamps():
    row = torch.tensor([0.0, 10.0, 20.0])
    expected = torch.tensor([0.0, 5.0, 10.0, 15.0, 20.0, 20.0])  # coordinates 0, 0.5, 1, ..., 2.5
    resized = resize_bilinear_tf1(row.view(1, 1, 1, 3).repeat(1, 1, 3, 1), 6)
    torch.testing.assert_close(resized, expected.expand(1, 1, 6, 6))
    torch.testing.assert_close(resize_bilinear_tf1(resized.transpose(2, 3), 3)[0, 0, :, 0], row)


def test_resize_takes_images_that_are_not_square():
    ramp = torch.arange(4.0)[:, None] * 100 + torch.arange(8.0)
    resized = resize_bilinear_tf1(ramp[None, None], 16)[0, 0]
    torch.testing.assert_close(resized[:13, :15], torch.arange(13.0)[:, None] * 25 + torch.arange(15.0) * 0.5)
