"""Crops: the published ImageNet crop is bit-exact; the others keep the right part of the image."""

import numpy as np
import pytest
from PIL import Image

from edm2kit.data.crops import TRANSFORMS, center_crop, center_crop_dhariwal, center_crop_wide, keep
from tests.support.golden import DATA
from tests.support.pictures import picture


def test_dhariwal_crop_equals_the_reference_exactly():
    golden = np.load(DATA / "center_crop.npz")
    cropped = center_crop_dhariwal(Image.fromarray(golden["source"]), 64, 64)
    np.testing.assert_array_equal(np.asarray(cropped), golden["cropped64"])


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("size", [(100, 37), (37, 100), (16, 16), (5, 9), (1, 40), (64, 33)])
@pytest.mark.parametrize("transform", ["center-crop", "center-crop-dhariwal"])
def test_crops_have_the_size_and_mode_asked_for(transform, size, mode):
    result = TRANSFORMS[transform](picture(0, size, mode), 16, 16)
    assert (result.size, result.mode) == ((16, 16), mode)


def test_center_crop_takes_the_middle():
    image = Image.new("L", (30, 10), 0)
    image.paste(200, (10, 0, 20, 10))
    assert set(np.asarray(center_crop(image, 8, 8)).ravel()) == {200}
    assert set(np.asarray(center_crop(image.transpose(Image.Transpose.ROTATE_90), 8, 8)).ravel()) == {200}
    assert center_crop(picture(1, (8, 8)), 8, 8).tobytes() == picture(1, (8, 8)).tobytes()


@pytest.mark.parametrize("size", [(160, 90), (400, 90), (160, 400), (1, 1000), (1000, 1)])
def test_wide_crop_is_a_picture_between_black_bars(size):
    result = np.asarray(center_crop_wide(Image.new("RGB", size, (9, 90, 200)), 32, 18))
    assert result.shape == (32, 32, 3)
    assert (result[7:25] == (9, 90, 200)).all()
    assert not result[:7].any()
    assert not result[25:].any()


def test_wide_crop_of_a_sliver():
    assert center_crop_wide(picture(0, (1, 50)), 32, 8).size == (32, 32)


def test_wide_crop_cuts_what_is_beyond_the_shape():
    image = Image.new("L", (64, 64), 50)
    image.paste(200, (0, 14, 64, 50))  # the central 16:9 part
    assert set(np.asarray(center_crop_wide(image, 32, 18))[7:25].ravel()) == {200}


def test_keep_resizes_but_never_distorts():
    assert keep(picture(0, (8, 8)), 16, 16).size == (16, 16)
    assert keep(picture(0), 8, 8).tobytes() == picture(0).tobytes()
    with pytest.raises(ValueError, match=r"is 8x9 and would be distorted to 16x16; use --transform"):
        keep(picture(0, (8, 9)), 16, 16)
