import pytest
import torch

from edm2kit.denoiser import for_images
from edm2kit.guidance.losses.augmentation import Augmentation, AugmentedLoss
from edm2kit.guidance.losses.gradient import slope, slope_at
from edm2kit.guidance.losses.score import LossGuided
from edm2kit.sampling.solvers import edm_sampler
from edm2kit.torch_utils.rng import StackedGenerator
from tests.support.fakes import Counting, Mixture

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randn([3, 3, 8, 8], generator=GENERATOR, dtype=torch.float64)
WEIGHTS = torch.randn([3, 8, 8], generator=GENERATOR, dtype=torch.float64)
MIXTURE = Mixture(torch.randn([3, 3, 8, 8], generator=GENERATOR), 0.2)
SIGMA = torch.tensor(0.7, dtype=torch.float64)


def source(seeds=(5, 6, 7)):
    return StackedGenerator("cpu", seeds)


def linear(images):
    return (images * WEIGHTS).sum((1, 2, 3))


def squares(images):
    return (images**2).sum((1, 2, 3))


def same(images, rng):
    return images


def shifted(images, rng):
    return images + rng.randn_like(images)


def turned(images, rng):
    return images * rng.randn([len(images), 1, 1, 1], dtype=images.dtype)


@pytest.mark.parametrize("count", [1, 3, 20])
def test_the_same_image_again_makes_the_count_irrelevant(count):
    # neither loss nor gradient knows how many there were
    augmented = for_images(AugmentedLoss(squares, count, same), source())
    torch.testing.assert_close(slope_at(augmented, IMAGES), slope_at(squares, IMAGES))


def test_the_gradient_is_the_mean_of_the_gradients():
    together = slope(MIXTURE, for_images(AugmentedLoss(linear, 5, turned), source()), IMAGES, SIGMA, None)
    rng = source()
    factors = [rng.randn([3, 1, 1, 1], dtype=torch.float64) for _ in range(5)]
    each = [slope(MIXTURE, lambda D, f=f: linear(D * f), IMAGES, SIGMA, None).gradient for f in factors]
    torch.testing.assert_close(together.gradient, torch.stack(each).mean(0), rtol=1e-12, atol=1e-12)
    assert (each[0] - each[1]).abs().max() > 0.1


def test_the_denoiser_is_called_once():
    counting = Counting(MIXTURE)
    guided = for_images(LossGuided(counting, AugmentedLoss(squares, 20), 0.1), source())
    edm_sampler(guided, IMAGES, num_steps=2)
    assert len(counting.calls) == 3


def test_draws_are_an_images_own_and_stay_the_same_through_a_step():
    sigmas = torch.tensor([2.0, 1.0, 0.0])
    following = for_images(AugmentedLoss(squares, 2), source())
    first, second = following.for_step(0, sigmas), following.for_step(1, sigmas)
    assert torch.equal(first(IMAGES), first(IMAGES))
    assert not torch.equal(first(IMAGES), second(IMAGES))
    alone = for_images(AugmentedLoss(squares, 2), source([6])).for_step(0, sigmas)
    torch.testing.assert_close(alone(IMAGES[1:2]), first(IMAGES)[1:2])


# ---- the transform


def test_nothing_to_change_changes_nothing():
    nothing = Augmentation(colour=False, translation=0.0, resize=(1.0, 1.0), cutout=0.0)
    torch.testing.assert_close(nothing(IMAGES, source()), IMAGES)


def test_a_square_of_half_the_side_is_cut_out():
    cut = Augmentation(colour=False, translation=0.0, resize=(1.0, 1.0), cutout=0.5)
    ones = torch.ones(64, 1, 16, 16)
    changed = cut(ones, StackedGenerator("cpu", range(64)))
    missing = (changed == 0).sum((1, 2, 3))
    assert missing.max() == 64  # 8 x 8, less where it reaches over the border
    assert missing.min() >= 16
    assert set(changed.unique().tolist()) <= {0.0, 1.0}


def test_images_move_by_an_eighth_at_most():
    moved = Augmentation(colour=False, translation=0.125, resize=(1.0, 1.0), cutout=0.0)
    row = torch.linspace(0, 1, 32).expand(200, 1, 32, 32)
    at = moved(row, StackedGenerator("cpu", range(200)))[:, 0, 16, 16] * 31 - 16
    assert 3.5 < at.abs().max() <= 4.001


def test_images_grow_and_shrink_by_a_fifth():
    resized = Augmentation(colour=False, translation=0.0, resize=(0.8, 1.2), cutout=0.0)
    ramp = torch.linspace(-1, 1, 33).expand(200, 1, 33, 33)
    changed = resized(ramp, StackedGenerator("cpu", range(200)))[:, 0, 16]
    slopes = (changed[:, 20] - changed[:, 12]) / (ramp[0, 0, 0, 20] - ramp[0, 0, 0, 12])
    assert 1 / 1.2 <= slopes.min() < 0.86
    assert 1.2 < slopes.max() <= 1 / 0.8


def test_colours_change_and_gradients_flow():
    recoloured = Augmentation(translation=0.0, resize=(1.0, 1.0), cutout=0.0)
    grey = torch.zeros(50, 3, 4, 4)
    levels = recoloured(grey, StackedGenerator("cpu", range(50))).mean((1, 2, 3))
    assert levels.min() < -0.4
    assert levels.max() > 0.4
    assert slope_at(for_images(AugmentedLoss(linear, 3), source()), IMAGES).gradient.abs().sum() > 0


def test_a_mean_over_nothing_is_refused():
    with pytest.raises(ValueError, match="expected at least 1"):
        AugmentedLoss(squares, 0)
