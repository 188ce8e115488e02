"""Bytes to images: every color mode becomes 8-bit grey or RGB, and all damage a ValueError that names the file."""

import io
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from edm2kit.data.image_files import decode_array, encode_png, is_grey, open_header, open_image, to_8bit
from tests.support.hostile_arrays import HOSTILE
from tests.support.pictures import encoded, npy, picture


def test_png_survives_writing_and_reading():
    for mode, shape in (("L", (1, 4, 6)), ("RGB", (3, 4, 6))):
        image = picture(0, (6, 4), mode)
        raw = decode_array(encode_png(image), "x")
        assert (raw.shape, raw.dtype) == (shape, np.uint8)
        np.testing.assert_array_equal(raw, np.asarray(image).reshape(4, 6, -1).transpose(2, 0, 1))
        assert raw.flags.c_contiguous
        assert raw.flags.writeable  # torch.from_numpy warns of others


def test_npy_holds_pixels_or_latents():
    latents = np.random.default_rng(0).standard_normal((8, 4, 4)).astype(np.float32)
    np.testing.assert_array_equal(decode_array(npy(latents), "x"), latents)
    half = decode_array(npy(latents.astype(np.float16)), "x")
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, latents, atol=2e-3)
    assert decode_array(npy(np.zeros((3, 4, 4), np.uint8)), "x").dtype == np.uint8
    np.testing.assert_array_equal(decode_array(npy(np.asfortranarray(latents)), "x"), latents)


@pytest.mark.parametrize(
    "array",
    [np.zeros((4, 4), np.uint8), np.zeros((3, 4, 4)), np.zeros((3, 4, 4), np.int64), np.zeros((0, 4, 4), np.float32)],
)
def test_other_arrays_are_refused(array):
    with pytest.raises(ValueError, match=rf"^some/x\.npy: contains {array.dtype} .*expected pixels uint8"):
        decode_array(npy(array), "some/x.npy")


def test_pickled_arrays_are_refused():
    with pytest.raises(ValueError, match=r"^x\.npy: the \.npy file is damaged"):
        decode_array(npy(np.array([{}], dtype=object)), "x.npy")


@pytest.mark.parametrize("case", [case for case in HOSTILE if case != "no array"])
def test_a_hostile_npy_is_refused_in_one_line(case):
    with pytest.raises(ValueError, match=r"^x\.npy: the \.npy file is damaged"):
        decode_array(HOSTILE[case][0], "x.npy")


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "bmp", "gif", "tiff", "ppm", "npy"])
def test_every_cut_is_a_value_error_with_the_name(kind):
    data = npy(np.zeros((3, 16, 16), np.uint8)) if kind == "npy" else encoded(picture(0, (16, 16)), kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about a cut TIFF before it raises
        for size in {0, 1, 10, *range(0, len(data) - 16, 29)}:  # the last 16 bytes of a PNG hold no pixels
            with pytest.raises(ValueError, match=r"^d/x: "):
                decode_array(data[:size], "d/x")


def test_noise_is_a_value_error_or_an_image():
    data = encoded(picture(0, (16, 16)))
    for seed in range(200):
        rng = np.random.default_rng(seed)
        broken = bytearray(data)
        broken[rng.integers(len(data))] = rng.integers(256)
        try:
            assert decode_array(bytes(broken), "d/x").dtype == np.uint8
        except ValueError as error:
            assert str(error).startswith("d/x: ")  # noqa: PT017 (an image is as good)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_to_8bit_of_every_png_mode(mode):
    image = open_image(encoded(picture(0).convert(mode)), "x")
    assert image.mode == mode
    assert is_grey(image) == (mode in ("1", "L", "LA"))
    assert to_8bit(image, 3, "x").mode == "RGB"
    assert to_8bit(image, 1, "x").mode == "L"


def test_to_8bit_keeps_the_upper_half_of_16_bits():
    values = np.array([[0, 255, 256, 65535, 32768]], np.uint16)
    image = open_image(encoded(Image.fromarray(values)), "x")
    assert is_grey(image)
    np.testing.assert_array_equal(np.asarray(to_8bit(image, 1, "x")), [[0, 0, 1, 255, 128]])
    assert to_8bit(image, 3, "x").getpixel((4, 0)) == (128, 128, 128)


def test_to_8bit_of_cmyk_and_transparent_colours():
    cmyk = open_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "jpeg"), "x")
    assert np.allclose(to_8bit(cmyk, 3, "x").getpixel((4, 4)), (255, 0, 0), atol=3)
    assert to_8bit(Image.new("RGBA", (1, 1), (10, 20, 30, 0)), 3, "x").getpixel((0, 0)) == (10, 20, 30)


def test_numbers_beyond_16_bits_are_refused():
    for values, kind in (
        (np.full((2, 2), 70000, np.int32), "numbers beyond 16 bits"),
        (np.zeros((2, 2), np.float32), "floating-point numbers"),
    ):
        image = open_image(encoded(Image.fromarray(values), "tiff"), "x")
        with pytest.raises(ValueError, match=f"^x: contains {kind}; scale them to 8 or 16 bits first"):
            to_8bit(image, 1, "x")


def test_training_takes_only_grey_and_rgb():
    for mode in ("P", "RGBA", "LA", "1"):
        with pytest.raises(ValueError, match=rf"^d/x: its pixels are {mode}, .*dataset_tool\.py convert"):
            decode_array(encoded(picture(0).convert(mode)), "d/x")


def test_a_header_is_read_without_the_pixels():
    data = encoded(picture(0, (16, 12)))
    assert open_header(data[:60], "x").size == (16, 12)


def test_exif_orientation_is_followed_unless_pixels_are_wanted_as_stored():
    image = picture(0, (6, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    image.save(file, format="png", exif=exif)
    assert open_image(file.getvalue(), "x").size == (4, 6)
    assert open_image(file.getvalue(), "x", as_stored=True).size == (6, 4)


def test_a_long_header_that_is_not_one_gives_a_short_message():
    data = b"\x93NUMPY\x01\x00\xff\x0f" + b"{'descr': '" + b"x" * 4084
    with pytest.raises(ValueError, match=r"^a\.npy: the \.npy file is damaged or cut short: ") as error:
        decode_array(data, "a.npy")
    assert len(str(error.value)) < 400


def test_a_jpeg_of_very_many_scans_is_refused_and_a_video_behind_it_is_not():
    file = io.BytesIO()
    picture(0, (64, 64)).save(file, "jpeg", progressive=True)
    data = file.getvalue()
    last_scan = data[data.rindex(b"\xff\xda") : -2]
    with pytest.raises(ValueError, match=r"x: the image has \d+ scans, which would take very long"):
        open_image(data[:-2] + last_scan * 2000 + data[-2:], "x")
    video = np.random.default_rng(0).integers(0, 256, 4 << 20, np.uint8).tobytes()  # as phones append it
    assert video.count(b"\xff\xda") > 30
    assert open_image(data + video, "x").size == (64, 64)


def test_a_png_of_very_many_chunks_is_refused_and_bytes_behind_it_are_not():
    data = encoded(picture())
    note = b"\0\0\0\0teXt" + zlib.crc32(b"teXt").to_bytes(4, "big")
    open_image(data[:33] + note * 50 + data[33:] + bytes(1 << 16), "x")
    with pytest.raises(
        ValueError, match="x: the image has very many chunks, which would take very long; save it again"
    ):
        open_image(data[:33] + note * 1000 + data[33:], "x")


@pytest.mark.parametrize(
    "start", [b"P6 # a\n8\n#b\n8 255\n", b"P6\r8\t8\n#\n255 ", b"P3\n8 8\n255\n", b"P4 8 8 ", b"P1\n8 8\n"]
)
def test_a_comment_without_end_is_refused_and_short_ones_are_read(start):
    pixels = b"1 " * 192 if start[1:2] in b"13" else bytes(192)
    assert open_image(start + pixels, "x").size == (8, 8)
    with pytest.raises(ValueError, match="x: the image has a header without end, which would take very long"):
        open_image(start[:2] + b"\n#" + b"x" * (1 << 16) + b"\n" + start[2:] + pixels, "x")


def test_no_flipped_bit_of_a_compressed_png_changes_its_pixels():
    ramp = np.add.outer(np.arange(16), np.arange(16))[..., None] * np.array([1, 2, 3])
    file = io.BytesIO()
    Image.fromarray(ramp.astype(np.uint8)).save(file, "png")
    data = file.getvalue()
    pixels, found = decode_array(data, "x"), 0
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            np.testing.assert_array_equal(decode_array(bytes(flipped), "x"), pixels)
        except ValueError:
            found += 1
    assert found > 6 * len(data)
