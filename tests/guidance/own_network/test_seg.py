import math

import pytest
import torch

from edm2kit.guidance.attention_blocks import attend
from edm2kit.guidance.network_call import NetworkCall
from edm2kit.guidance.own_network.blur import blur, kernel_size
from edm2kit.guidance.own_network.seg import BlurredQueries, QueryBlur

GENERATOR = torch.Generator().manual_seed(0)
Q, K, V = (torch.randn([2, 3, 64, 8], generator=GENERATOR) for _ in range(3))
SQUARE = (32, 32)  # an image whose map has 8x8 tokens


@pytest.mark.parametrize(("sigma", "size"), [(0.1, 1), (1 / 6, 1), (0.5, 3), (1, 7), (2, 13), (10, 61)])
def test_kernel_sizes_as_published(sigma, size):
    assert kernel_size(sigma) == size


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0])
def test_blurred_queries_are_blurred_logits(sigma):
    kernel = min(kernel_size(sigma), 9)  # 8 pixels: no more than 9 taps
    logits = (Q @ K.transpose(2, 3)) / math.sqrt(8)  # [n, heads, queries, keys]
    maps = logits.transpose(2, 3).reshape(6, 64, 8, 8)
    blurred = blur(maps, sigma, kernel).reshape(2, 3, 64, 64).transpose(2, 3)
    torch.testing.assert_close(BlurredQueries(sigma, SQUARE)(Q, K, V), blurred.softmax(dim=3) @ V, atol=2e-6, rtol=1e-5)


def test_an_infinite_blur_is_the_mean_and_the_same_everywhere():
    out = BlurredQueries(math.inf, SQUARE)(Q, K, V)
    torch.testing.assert_close(out, out[:, :, :1].expand_as(out))
    expected = ((Q.mean(2, keepdim=True) @ K.transpose(2, 3)) / math.sqrt(8)).softmax(3) @ V
    torch.testing.assert_close(out[:, :, :1], expected, atol=2e-6, rtol=1e-5)
    # a very wide blur is not the mean: its kernel ends at 9 taps
    wide = BlurredQueries(1e6, SQUARE)(Q, K, V)
    assert (wide - out).norm() > 0.05 * (attend(Q, K, V) - out).norm()


@pytest.mark.parametrize("sigma", [0.0, 0.1, 1 / 6])
def test_a_blur_narrower_than_a_pixel_is_none_bitwise(sigma):
    assert torch.equal(BlurredQueries(sigma, SQUARE)(Q, K, V), attend(Q, K, V))


def test_equal_queries_stay_as_they_are():
    q = Q[:, :, :1].expand_as(Q).contiguous()
    torch.testing.assert_close(BlurredQueries(2.0, SQUARE)(q, K, V), attend(q, K, V))


@pytest.mark.parametrize(("image", "grid"), [((128, 32), (16, 4)), ((32, 128), (4, 16)), ((15, 27), (5, 9))])
def test_maps_have_the_shape_of_the_image(image, grid):
    # 16x4 tokens are as many as 8x8
    rows, columns = grid
    q, k, v = (torch.randn([2, 3, rows * columns, 8], generator=GENERATOR) for _ in range(3))
    call = QueryBlur(("block",), 0.5)(NetworkCall(torch.zeros(2, 3, *image), torch.tensor(1.0), None))
    maps = q.transpose(2, 3).reshape(6, 8, rows, columns)
    blurred = blur(maps, 0.5, 3).reshape(2, 3, 8, rows * columns).transpose(2, 3)
    torch.testing.assert_close(call.edits["attention"]["block"](q, k, v), attend(blurred, k, v))


def test_a_map_of_another_shape_than_the_image_is_refused():
    with pytest.raises(ValueError, match="48 tokens is not a smaller version of 32x32 pixels"):
        BlurredQueries(1.0, SQUARE)(*(t[:, :, :48] for t in (Q, K, V)))


def test_a_blur_that_reaches_too_far_is_refused():
    with pytest.raises(ValueError, match="17 taps on 8x8"):
        blur(torch.zeros(1, 1, 8, 8), 3.0, 17)
