"""From the bytes of a file to an image, and back."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from edm2kit.torch_utils.arrays import BROKEN

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N", "F")
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, struct.error)


def open_image(data: bytes, where: str) -> Image.Image:
    """The image in `data`, decoded, in the mode of the file; of an animation, the first picture.

    EXIF orientation is ignored, as by the tools that made the published data sets. Raises ValueError, beginning with
    `where` (the file as named to the user), for what is not a whole image.
    """
    image = open_header(data, where)
    try:
        image.load()
    except (*_BROKEN, Image.DecompressionBombError) as error:
        raise ValueError(f"{where}: the image is damaged or cut short: {error}") from error
    return image


def open_header(data: bytes, where: str) -> Image.Image:
    """Like open_image, but the pixels are not decoded yet: enough for size and mode."""
    try:
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{where}: is not an image, or cut short within its header") from error
    except (*_BROKEN, Image.DecompressionBombError) as error:
        raise ValueError(f"{where}: the image is damaged or cut short: {error}") from error


def is_grey(image: Image.Image) -> bool:
    """True for images of one channel, with or without transparency."""
    return image.mode in _GREY_MODES


def to_8bit(image: Image.Image, channels: int, where: str) -> Image.Image:
    """`image` as 8-bit grey (channels 1) or RGB (channels 3).

    Transparency is dropped, the colour below it kept, as by the tools that made the published data sets. Of 16 bits
    the upper 8 are kept. Palette, CMYK and other colours go through Pillow's conversion. Raises ValueError for pixels
    beyond 16 bits, which have no range of their own.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError(f"{where}: holds numbers beyond 16 bits; scale them to 8 or 16 bits first")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    mode = {1: "L", 3: "RGB"}[channels]
    return image if image.mode == mode else image.convert(mode)


def to_image(raw: np.ndarray) -> Image.Image:
    """uint8 [1 or 3, H, W] as a grey or RGB image."""
    return Image.fromarray(raw[0] if len(raw) == 1 else raw.transpose(1, 2, 0))


def encode_png(image: Image.Image) -> bytes:
    """`image`, 8-bit grey or RGB, as PNG without compression and row filters: its pixels lie there as they are.

    Written and, by raw_layout.py, read some twenty times as fast as Pillow can; photographs are a third larger than
    compressed.
    """
    pixels = np.asarray(image)
    height, width = pixels.shape[:2]
    rows = np.zeros([height, 1 + pixels[0].size], np.uint8)  # each begins with its filter: 0, none
    rows[:, 1:] = pixels.reshape(height, -1)
    data = rows.tobytes()
    stream = [b"\x78\x01"]
    for start, stop in png_blocks(*rows.shape):
        last = stop == len(data)
        stream.append(struct.pack("<B2H", last, stop - start, stop - start ^ 0xFFFF) + data[start:stop])
    stream.append(struct.pack(">L", zlib.adler32(data)))
    header = struct.pack(">2L5B", width, height, 8, 0 if pixels.ndim == 2 else 2, 0, 0, 0)
    chunks = [_chunk(b"IHDR", header), _chunk(b"IDAT", b"".join(stream)), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def png_blocks(height: int, row_bytes: int) -> list[tuple[int, int]]:
    """Start and stop, in the image's bytes, of the stretches that encode_png stores: whole rows, but for huge ones."""
    limit = 0xFFFF if row_bytes > 0xFFFF else 0xFFFF // row_bytes * row_bytes
    total = height * row_bytes
    return [(start, min(start + limit, total)) for start in range(0, total, limit)]


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(data, zlib.crc32(kind)))


def decode_array(data: bytes, where: str) -> np.ndarray:
    """What a training file holds, as an array [C, H, W]: uint8 pixels (C 1 or 3) or float32 raw latents.

    A .npy file (told by its first bytes) holds uint8, float16 or float32 [C, H, W]. Raises ValueError, beginning with
    `where`, for a damaged file and for pixels other than 8-bit grey and RGB.
    """
    if data.startswith(np.lib.format.MAGIC_PREFIX):
        return _decode_npy(data, where)
    image = open_image(data, where)
    if image.mode == "L":
        return np.array(image)[np.newaxis]
    if image.mode != "RGB":
        raise ValueError(
            f"{where}: its pixels are {image.mode}, not 8-bit grey or RGB; "
            "convert the images with scripts/dataset_tool.py convert"
        )
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _decode_npy(data: bytes, where: str) -> np.ndarray:
    try:
        values = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except BROKEN as error:
        raise ValueError(f"{where}: the .npy file is damaged or cut short: {error}") from error
    if values.ndim != 3 or values.dtype not in (np.uint8, np.float16, np.float32):
        raise ValueError(
            f"{where}: holds {values.dtype} {list(values.shape)}; expected pixels uint8 [C, H, W] or raw latents "
            "float16 or float32 [C, H, W]"
        )
    return values if values.dtype == np.uint8 else values.astype(np.float32, copy=False)
