import pytest
import torch

from edm2kit.guidance.combine import Evaluation
from edm2kit.guidance.own_network.sliding_window import SlidingWindows
from edm2kit.guidance.registry import Choice, Parts, guide
from tests.support.fakes import Flat, Gaussian

X = torch.randn([2, 1, 64, 64], generator=torch.Generator().manual_seed(0))
SIGMA = torch.tensor([0.5, 2.0])


def means(x, sigma, labels=None):
    """A denoiser that looks at the whole of what it is given."""
    return x.mean(dim=(1, 2, 3), keepdim=True).expand_as(x) * sigma.reshape(-1, 1, 1, 1)


class MadeFor64(Flat):
    img_resolution = 64


def test_the_published_windows():
    # specs section 12: crops of 40 at 0 and 24, and 1792 of 4096 pixels in more than one
    corners, size = SlidingWindows(Flat(means)).corners(64, 64)
    assert (corners, size) == ([(0, 0), (0, 24), (24, 0), (24, 24)], 40)
    D = torch.full_like(X, -5.0)
    changed = SlidingWindows(Flat(means)).derive(D, {}, Evaluation(X, SIGMA)) != D
    assert changed.flatten(1).sum(1).tolist() == [1792, 1792]


def test_overlaps_hold_the_mean_of_the_crops():
    D_neg = SlidingWindows(Flat(means)).derive(torch.zeros_like(X), {}, Evaluation(X, SIGMA))
    top = X[:, :, :40, :40].mean(dim=(1, 2, 3)) * SIGMA
    right = X[:, :, :40, 24:].mean(dim=(1, 2, 3)) * SIGMA
    torch.testing.assert_close(D_neg[:, 0, 0, 30], (top + right) / 2)


def test_combined_with_other_guidance_the_crops_count_everywhere():
    # as in the authors' code; a method at weight 1 is off and does not count
    net, at = Flat(means), Evaluation(X, SIGMA)
    D = torch.full_like(X, -5.0)
    assert (SlidingWindows(net).in_combination().derive(D, {}, at) != D).all()
    for others, masked in (((), True), ((("truncation", 1.0),), True), ((("truncation", 1.4),), False)):
        guided = guide(Choice("sliding-window", 1.2, also=others), Parts(net))
        assert guided.negatives[0].source.masked is masked
    alone = guide(Choice("sliding-window", 1.2), Parts(net))
    off = guide(Choice("sliding-window", 1.2, also=(("truncation", 1.0),)), Parts(net))
    assert torch.equal(off(X, SIGMA), alone(X, SIGMA))


def test_a_denoiser_of_single_pixels_is_left_alone():
    net = Flat(Gaussian(0.2, 0.25))
    guided = guide(Choice("sliding-window", 3.0), Parts(net))
    torch.testing.assert_close(guided(X, SIGMA), net(X, SIGMA))


def test_a_crop_as_large_as_the_image_changes_nothing():
    net = Flat(means)
    D = net(X, SIGMA)
    torch.testing.assert_close(SlidingWindows(net, 64).derive(D, {}, Evaluation(X, SIGMA)), D)


def test_every_crop_gets_its_image_s_noise_level_and_labels():
    def told(x, sigma, labels):
        return torch.zeros_like(x) + (labels.argmax(1) + 10 * sigma).reshape(-1, 1, 1, 1)

    D_neg = SlidingWindows(Flat(told)).derive(torch.zeros_like(X), {}, Evaluation(X, SIGMA, torch.eye(2)))
    assert D_neg[:, 0, 30, 30].tolist() == [5.0, 21.0]


@pytest.mark.parametrize("size", [36, 24, 72])
def test_crops_that_do_not_fit_are_refused(size):
    with pytest.raises(ValueError, match="expected a multiple of 8"):
        SlidingWindows(Flat(means), size).corners(64, 64)


@pytest.mark.parametrize(("height", "size"), [(64, 40), (32, 20), (128, 80), (8, 5)])
def test_the_usual_size_is_five_eighths(height, size):
    assert SlidingWindows(Flat(means)).corners(height, height)[1] == size


@pytest.mark.parametrize(("shape", "size", "second"), [((48, 32), 32, (16, 0)), ((32, 64), 32, (0, 32))])
def test_images_that_are_not_square(shape, size, second):
    # a network made for 64 pixels halves three times, whatever the size of the image
    corners, found = SlidingWindows(MadeFor64(means)).corners(*shape)
    assert (found, corners[0], corners[3]) == (size, (0, 0), second)
