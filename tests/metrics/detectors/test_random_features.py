"""fd_random: the same network everywhere, and a distance that grows with every kind of damage."""

import hashlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from edm2kit.experiments.demo.pictures import draw
from edm2kit.metrics.detectors.random_features import WEIGHTS_SHA256, RandomFeatures, random_weights
from edm2kit.metrics.frechet import frechet_distance

COUNT = 500


def test_weights_are_the_same_bits_everywhere():
    weights = random_weights()
    digest = hashlib.sha256(b"".join(weight.numpy().astype("<f4").tobytes() for weight in weights))
    assert digest.hexdigest() == WEIGHTS_SHA256
    for stage, weight in enumerate(weights):
        assert torch.equal(weight, RandomFeatures().state_dict()[f"stage{stage}"])


def test_weights_are_drawn_with_the_variance_of_he():
    for weight in random_weights()[1:]:
        assert float(weight.std()) == pytest.approx((2 / weight[0].numel()) ** 0.5, rel=0.02)
        assert float(weight.abs().max()) <= (6 / weight[0].numel()) ** 0.5


@pytest.mark.parametrize("size", [(32, 32), (1, 1), (5, 9), (64, 64), (65, 40), (200, 300)], ids=str)
def test_takes_images_of_any_size_and_grey_ones(size):
    net, images = RandomFeatures(), torch.randint(0, 256, (2, 1, *size), dtype=torch.uint8)
    features = net(images)
    assert features.shape == (2, RandomFeatures.num_features)
    assert features.dtype == torch.float32
    assert features.isfinite().all()
    assert torch.equal(features, net(images.repeat(1, 3, 1, 1)))
    assert net(images[:0]).shape == (0, RandomFeatures.num_features)


def pictures(seed, count=COUNT):
    return torch.from_numpy(draw(seed, np.arange(count))[0]).permute(0, 3, 1, 2)


def moments(images):
    features = torch.cat([RandomFeatures()(part) for part in images.split(250)]).double().numpy()
    return features.mean(axis=0), np.cov(features, rowvar=False)


@pytest.fixture(scope="module")
def reference():
    return moments(pictures(0, 1000))


@pytest.fixture(scope="module")
def real_distances(reference):
    return [frechet_distance(*moments(pictures(seed)), *reference) for seed in (1, 2)]


def blurred(images, amount):
    kernel = torch.tensor([amount, 1, amount]) / (1 + 2 * amount)
    kernel = (kernel[:, None] * kernel).expand(3, 1, 3, 3)
    return F.conv2d(F.pad(images.float(), (1, 1, 1, 1), mode="replicate"), kernel, groups=3).round().byte()


def noisy(images, std):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + std * noise).round().clamp(0, 255).byte()


def without_kinds(images, lost):
    kept = images[torch.arange(len(images)) % 10 >= lost]
    return torch.cat([kept, kept])[: len(images)]


def repeated(images, times):
    return images[: len(images) // times].repeat(times, 1, 1, 1)


def paler(images, amount):
    return ((images.float() - 128) * (1 - amount) + 128).round().byte()


def shuffled(images, block):
    """Blocks of the image change places, each of which stays what it was."""
    tiles = F.unfold(images.float(), block, stride=block)
    order = torch.randperm(tiles.shape[2], generator=torch.Generator().manual_seed(0))
    return F.fold(tiles[:, :, order], images.shape[2:], block, stride=block).byte()


@pytest.mark.parametrize(
    ("damage", "steps"),
    [
        (blurred, (0.03, 0.1, 0.3)),
        (noisy, (3, 6, 12)),
        (without_kinds, (1, 3, 6)),
        (repeated, (3, 10, 30)),
        (paler, (0.05, 0.1, 0.2)),
        (shuffled, (16, 8, 4)),
    ],
)
def test_distance_grows_with_damage(damage, steps, reference, real_distances):
    values = [frechet_distance(*moments(damage(pictures(1), step)), *reference) for step in steps]
    assert sorted(values) == values
    assert values[0] > max(real_distances)
    assert values[1] > 1.1 * max(real_distances)
