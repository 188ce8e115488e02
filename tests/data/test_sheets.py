"""Sheets of images: enlarged by whole factors, in order, with text that stays in its place."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from edm2kit.data.image_files import labelled_sheet
from tests.support.pictures import cell, picture


@pytest.mark.parametrize(("size", "factor"), [(8, 16), (32, 4), (50, 2), (64, 2), (128, 1), (200, 1)])
def test_small_images_are_enlarged_by_whole_factors(size, factor):
    images = [picture(k, (size, size)) for k in range(5)]
    sheet = np.asarray(labelled_sheet(images, 2, captions=["a"] * 5, title="five images"))
    assert sheet.shape[1] >= 2 * size * factor
    for k, image in enumerate(images):
        assert np.array_equal(cell(sheet, 3, k // 2, k % 2, size, captions=True), np.asarray(image))


def test_without_text_there_is_none():
    sheet = np.asarray(labelled_sheet([Image.new("L", (16, 16), 128)], 1))
    assert sheet.shape == (4 + 128 + 4, 4 + 128 + 4)
    assert set(np.unique(sheet)) == {128, 255}


def dark_boxes(sheet: Image.Image) -> np.ndarray:
    return np.argwhere(np.asarray(sheet.convert("L")) < 100)


def test_text_is_beside_its_image_and_within_its_width():
    white = [Image.new("RGB", (64, 64), "white")] * 2
    for captions in (["cat", ""], ["a class with a very long name indeed, and more", ""]):
        y, x = dark_boxes(labelled_sheet(white, 2, captions=captions)).T
        assert y.min() >= 4 + 128
        assert x.min() >= 4
        assert x.max() <= 4 + 128
    y, x = dark_boxes(labelled_sheet(white, 2, column_titles=["", "weight 2"])).T
    assert y.max() < 4 + 16
    assert x.min() >= 4 + 128 + 4


def test_a_long_title_takes_more_lines_and_is_complete():
    white = [Image.new("RGB", (64, 64), "white")] * 2
    short, long = "32 steps", "autoguidance, weight 2.5 for sigma in (0.5, 80], 32 steps of heun, seeds 0-63 " * 2
    one, several = (labelled_sheet(white, 2, title=title) for title in (short, long))
    assert several.width == one.width
    assert (several.height - one.height) % 16 == 0
    lines = 1 + (several.height - one.height) // 16
    font = ImageFont.load_default(size=12)
    assert lines >= font.getlength(long) / one.width
    rows = sorted({int(y) // 16 for y, _ in dark_boxes(several)})
    assert rows == list(range(lines))


def test_a_caption_of_any_length_is_cut_at_once_to_the_same_width():
    def sheet(caption):
        return np.asarray(labelled_sheet([picture(0, (64, 64))], 1, captions=[caption]))

    np.testing.assert_array_equal(sheet("ab" * 40), sheet("ab" * 500_000))
    assert not np.array_equal(sheet("ab" * 40), sheet("ab"))
