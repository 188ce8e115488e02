import math

import pytest
import torch

from edm2kit.guidance.attention_blocks import attend
from edm2kit.guidance.own_network.blur import blur, kernel_size
from edm2kit.guidance.own_network.seg import BlurredQueries

GENERATOR = torch.Generator().manual_seed(0)
Q, K, V = (torch.randn([2, 3, 64, 8], generator=GENERATOR) for _ in range(3))


@pytest.mark.parametrize(("sigma", "size"), [(0.1, 1), (1 / 6, 1), (0.5, 3), (1, 7), (2, 13), (10, 61)])
def test_kernel_sizes_as_published(sigma, size):
    assert kernel_size(sigma) == size


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0])
def test_blurred_queries_are_blurred_logits(sigma):
    kernel = min(kernel_size(sigma), 9)  # 8 pixels: no more than 9 taps
    logits = (Q @ K.transpose(2, 3)) / math.sqrt(8)  # [n, heads, queries, keys]
    maps = logits.transpose(2, 3).reshape(6, 64, 8, 8)
    blurred = blur(maps, sigma, kernel).reshape(2, 3, 64, 64).transpose(2, 3)
    torch.testing.assert_close(BlurredQueries(sigma)(Q, K, V), blurred.softmax(dim=3) @ V, atol=2e-6, rtol=1e-5)


def test_an_infinite_blur_is_the_mean_and_the_same_everywhere():
    out = BlurredQueries(math.inf)(Q, K, V)
    torch.testing.assert_close(out, out[:, :, :1].expand_as(out))
    expected = ((Q.mean(2, keepdim=True) @ K.transpose(2, 3)) / math.sqrt(8)).softmax(3) @ V
    torch.testing.assert_close(out[:, :, :1], expected, atol=2e-6, rtol=1e-5)
    # a very wide blur is not the mean: its kernel ends at 9 taps
    wide = BlurredQueries(1e6)(Q, K, V)
    assert (wide - out).norm() > 0.05 * (attend(Q, K, V) - out).norm()


@pytest.mark.parametrize("sigma", [0.0, 0.1, 1 / 6])
def test_a_blur_narrower_than_a_pixel_is_none_bitwise(sigma):
    assert torch.equal(BlurredQueries(sigma)(Q, K, V), attend(Q, K, V))


def test_equal_queries_stay_as_they_are():
    q = Q[:, :, :1].expand_as(Q).contiguous()
    torch.testing.assert_close(BlurredQueries(2.0)(q, K, V), attend(q, K, V))


def test_a_map_that_is_not_square_is_refused():
    with pytest.raises(ValueError, match="48 tokens is not square"):
        BlurredQueries(1.0)(*(t[:, :, :48] for t in (Q, K, V)))


def test_a_blur_that_reaches_too_far_is_refused():
    with pytest.raises(ValueError, match="17 taps on 8x8"):
        blur(torch.zeros(1, 1, 8, 8), 3.0, 17)
