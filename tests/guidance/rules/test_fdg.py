import pytest
import torch

from edm2kit.guidance.combine import linear
from edm2kit.guidance.registry import RULES, Choice, Parts, guide
from edm2kit.guidance.rules.fdg import FrequencyDecoupling, low_frequencies
from tests.support.fakes import Constant
from tests.support.rule_spaces import NoiseSpace, Point, check_authors_step

POINT = Point(0.7)


def halved(image):
    """Blurred with 1 4 6 4 1 and halved, written as a sum over the taps."""
    return torch.nn.functional.avg_pool2d(blurred(image), 2)  # bilinear halving is the mean of 2x2


def enlarged(image):
    return blurred(torch.nn.functional.interpolate(image, scale_factor=2, mode="bilinear", align_corners=False))


def blurred(image):
    height, width = image.shape[2:]
    padded = torch.nn.functional.pad(image, (2, 2, 2, 2), mode="reflect")
    taps = [1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16]
    total = torch.zeros_like(image)
    for row in range(5):
        for column in range(5):
            total += taps[row] * taps[column] * padded[:, :, row : row + height, column : column + width]
    return total


@pytest.mark.parametrize(("w_low", "w_high"), [(5.0, 10.0), (1.5, 3.0)])
def test_the_authors_step_in_noise_predictions(w_low, w_high):
    def pyramid(e):
        coarse = halved(e)
        return coarse, e - enlarged(coarse)

    def authors(e, e_neg, point):
        levels = []
        for weight, level, level_neg in zip((w_low, w_high), pyramid(e), pyramid(e_neg), strict=True):
            levels.append(level_neg + weight * (level - level_neg))
        return levels[1] + enlarged(levels[0])

    rule = FrequencyDecoupling((w_low - 1) / (w_high - 1))
    check_authors_step(rule, authors, NoiseSpace(), weight=w_high)


def test_the_default_gives_the_published_pair_of_weights():
    share = RULES["fdg"].options[0].default
    assert 1 + share * (10 - 1) == pytest.approx(5.0, abs=1e-3)


def test_share_1_is_the_linear_rule():
    two = ([POINT.D_neg, POINT.x], [2.5, 0.5])
    torch.testing.assert_close(FrequencyDecoupling(1.0)(POINT.D, *two, POINT.at), linear(POINT.D, *two, POINT.at))


def test_a_flat_difference_has_low_frequencies_only():
    # 3 - 1 apart everywhere: 3 + (w - 1) share 2
    guided = guide(
        Choice("autoguidance", 4.0, options={"fdg_low_share": 0.5}, rule="fdg"), Parts(Constant(3.0), Constant(1.0))
    )
    D = guided(torch.zeros(1, 3, 8, 8), torch.tensor(1.0))
    torch.testing.assert_close(D, torch.full_like(D, 6.0))


def test_a_chessboard_has_high_frequencies_only():
    board = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2.0 - 1
    board = board.expand(1, 2, 16, 16)
    assert low_frequencies(board).abs().max() < 1e-6
    D = FrequencyDecoupling(0.0)(board, [0 * board], [3.0], POINT.at)
    torch.testing.assert_close(D, 3 * board)


@pytest.mark.parametrize("size", [(7, 8), (16, 9)])
def test_odd_sizes_work(size):
    flat = torch.full([1, 2, *size], 0.3)
    torch.testing.assert_close(low_frequencies(flat), flat)


def test_images_that_are_too_small_are_refused():
    with pytest.raises(ValueError, match="at least 5x5 pixels, and these have 4x8"):
        low_frequencies(torch.zeros(1, 1, 4, 8))
