"""Image and array files: bytes <-> images and arrays, and the layout of files that can be read without decoding."""

import bisect
import contextlib
import functools
import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from edm2kit.data.archive import png_is_intact, slow_parts
from edm2kit.models.encoders import to_image
from edm2kit.torch_utils.arrays import BROKEN, check_npy_size
from edm2kit.torch_utils.dist import one_line
from edm2kit.torch_utils.file_kinds import kind_of_file

IMAGE_EXTENSIONS = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
HEIF_EXTENSIONS = (".heic", ".heif", ".hif")  # of phones
HEIF_NEEDS = "need the package pillow-heif: pip install 'edm2kit[heic]'"
OTHER_TYPES = (".avif", ".jp2", ".jxl", ".tga", ".psd", ".exr", ".hdr", ".dng", ".cr2", ".nef", ".arw")
_MAX_PIXELS = 1 << 27  # of one image: 134 megapixels
# a small file with very many pixels is made to fill the memory; uniform areas compress to 1/1000
_SMALL_PIXELS, _PIXELS_PER_BYTE = 1 << 24, 100
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N", "F")
_BROKEN_IMAGE = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError),
    *(struct.error, Image.DecompressionBombError),
)
_PNG_START = 48  # bytes before the first pixels: signature, IHDR, length and name of IDAT, zlib header
_BLOCK_HEADER = 5
_SHEET_CELL, _SHEET_WIDTH = 128, 264  # pixels: the size that small images are enlarged to, and the least for a title
_SHEET_GAP, _SHEET_LINE = 4, 16
_PNG_END = 20  # Adler checksum of the pixels, CRC of IDAT, IEND


def open_image(data: bytes, where: str, as_stored: bool = False) -> Image.Image:
    """Decode an image file, in the mode of the file; of an animation, the first frame.

    The image is turned upright if its EXIF data say so, and its colours are converted to sRGB if it has another
    profile. `as_stored` does neither, as the tools that made the published data sets. Raises ValueError, starting with
    `where` (the file name shown to the user), if `data` is not a complete image.
    """
    image = open_header(data, where)
    try:
        if not png_is_intact(data):  # Pillow does not look at the checksums of pixels
            raise ValueError("the checksum of its pixels is wrong")
        with _without_pillow_warnings():
            image.load()
    except _BROKEN_IMAGE as error:
        raise ValueError(f"{where}: the image is damaged or cut short: {error}") from error
    return image if as_stored else to_srgb(upright(image))


@contextlib.contextmanager
def _without_pillow_warnings() -> Iterator[None]:
    """Damaged notes and the like: Pillow's warnings about them name lines of its own code, and no file."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def orientation(image: Image.Image) -> int:
    """How the pixels of an image are turned (EXIF, 1 to 8; 1 is upright, also if nothing is said)."""
    try:
        with _without_pillow_warnings():
            found = image.getexif().get(_ORIENTATION, 1)
    except _BROKEN_IMAGE:
        return 1  # damaged notes say nothing
    return found if found in _UPRIGHT else 1


def upright(image: Image.Image) -> Image.Image:
    """The image as its EXIF orientation says that it should be seen."""
    turn = _UPRIGHT.get(orientation(image))
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.info = {key: value for key, value in image.info.items() if key != "exif"}
    return turned


def has_other_profile(image: Image.Image) -> bool:
    """Whether an image has a colour profile other than sRGB that can be converted."""
    profile = image.info.get("icc_profile")
    return bool(profile) and image.mode in _SRGB_MODES and _to_srgb_transform(profile, image.mode) is not None


def to_srgb(image: Image.Image) -> Image.Image:
    """The image with its colours converted to sRGB, if it has another profile; grey stays grey.

    A profile that cannot be read is ignored, as in browsers. 16-bit images are left as they are.
    """
    if not has_other_profile(image):
        return image
    from PIL import ImageCms

    transform = _to_srgb_transform(image.info["icc_profile"], image.mode)
    try:
        converted = ImageCms.applyTransform(image.convert(_SRGB_MODES[image.mode]), transform)
    except ImageCms.PyCMSError:
        return image
    assert converted is not None  # not in place
    return converted.convert("L") if image.mode in ("L", "LA") else converted


# mode of an image -> the mode that its colours are converted in; transparency is dropped anyway
_SRGB_MODES = {"RGB": "RGB", "RGBA": "RGB", "P": "RGB", "L": "L", "LA": "L", "CMYK": "CMYK"}


@functools.lru_cache(maxsize=32)
def _to_srgb_transform(profile: bytes, mode: str) -> Any:
    """The transform from a colour profile to sRGB, or None if there is nothing to convert."""
    try:
        from PIL import ImageCms

        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return None
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.buildTransform(source, srgb, _SRGB_MODES[mode], "RGB")
    except (ImportError, OSError, ImageCms.PyCMSError):
        return None  # not a profile for this kind of image, or Pillow was built without colour management


def heif_is_readable() -> bool:
    """Whether HEIC photos can be read: the package pillow-heif is installed."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def open_header(data: bytes, where: str) -> Image.Image:
    """Like open_image, but without decoding the pixels, as stored: enough for size, mode and notes."""
    if found := slow_parts(data):
        raise ValueError(f"{where}: the image has {found}, which would take very long; save it again")
    formats: tuple[str, ...] = _FORMATS
    if data[4:8] == b"ftyp" and heif_is_readable():
        formats = (*_FORMATS, "HEIF")
    try:
        with _without_pillow_warnings():  # among them one about size; the limit below is this project's own
            image = Image.open(io.BytesIO(data), formats=formats)
    except Image.UnidentifiedImageError as error:
        kind = kind_of_file(data)
        reason = "is not an image, or is cut short within its header" if kind is None else f"is {kind}"
        raise ValueError(f"{where}: {reason}") from error
    except _BROKEN_IMAGE as error:
        raise ValueError(f"{where}: the image is damaged or cut short: {error}") from error
    width, height = image.size
    if width * height > min(_MAX_PIXELS, _PIXELS_PER_BYTE * len(data) + _SMALL_PIXELS):
        raise ValueError(
            f"{where}: claims {width}x{height} pixels in {len(data)} bytes, more than an image of this program's size; "
            "make it smaller first"
        )
    return image


def is_grey(image: Image.Image) -> bool:
    """True for images of one channel, with or without transparency."""
    return image.mode in _GREY_MODES


def to_8bit(image: Image.Image, channels: int, where: str) -> Image.Image:
    """Convert an image to 8-bit grey (channels 1) or RGB (channels 3).

    Transparency is dropped and the color below it kept, as in the tools that made the published data sets. 16-bit
    images keep their upper 8 bits. Palettes, CMYK and other modes use Pillow's conversion. Raises ValueError for
    values beyond 16 bits, whose range is unknown.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        sixteen_bits = image.mode != "F" and values.min() >= 0 and values.max() <= 0xFFFF
        if not sixteen_bits:
            kind = "floating-point numbers" if image.mode == "F" else "numbers beyond 16 bits"
            raise ValueError(f"{where}: contains {kind}; scale them to 8 or 16 bits first")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    mode = "L" if channels == 1 else "RGB"
    if image.mode == mode:
        return image
    with _without_pillow_warnings():
        try:
            return image.convert(mode)
        except ValueError as error:
            raise ValueError(
                f"{where}: its pixels are {image.mode}, which cannot become {mode}; save it as RGB"
            ) from error


def contact_sheet(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Images of one size side by side, row by row."""
    width, height = images[0].size
    sheet = Image.new(images[0].mode, (columns * width, -(-len(images) // columns) * height))
    for k, image in enumerate(images):
        sheet.paste(image, (k % columns * width, k // columns * height))
    return sheet


def labelled_sheet(
    images: Sequence[Image.Image],
    columns: int,
    *,
    title: str = "",
    column_titles: Sequence[str] = (),
    captions: Sequence[str] = (),
) -> Image.Image:
    """Images of one size, row by row, on white with a title, titles of columns above and a caption below each image.

    Images below 128 pixels are enlarged by the largest whole factor that keeps them within: pixels stay sharp squares.
    Text that is too wide is cut; the title takes as many lines as it needs.
    """
    factor = max(1, _SHEET_CELL // max(images[0].size))
    width, height = (factor * side for side in images[0].size)
    font = ImageFont.load_default(size=12)
    rows = -(-len(images) // columns)
    full_width = max(columns * (width + _SHEET_GAP) + _SHEET_GAP, _SHEET_WIDTH if title else 0)
    lines = _wrapped(one_line(title), full_width - 2 * _SHEET_GAP, font)
    top = len(lines) * _SHEET_LINE + (_SHEET_LINE if column_titles else 0) + _SHEET_GAP
    step = height + _SHEET_GAP + (_SHEET_LINE if captions else 0)
    sheet = Image.new(images[0].mode, (full_width, top + rows * step), "white")
    pen = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        pen.text((_SHEET_GAP, number * _SHEET_LINE), line, fill="black", font=font)
    for number, text in enumerate(column_titles):
        x = _SHEET_GAP + number * (width + _SHEET_GAP)
        pen.text((x, len(lines) * _SHEET_LINE), _cut(one_line(text), width, font), fill="black", font=font)
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        x, y = _SHEET_GAP + column * (width + _SHEET_GAP), top + row * step
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, y))
        if captions:
            pen.text((x, y + height + 1), _cut(one_line(captions[number]), width, font), fill="black", font=font)
    return sheet


def _cut(text: str, width: int, font: Any) -> str:
    """The text, or its start and an ellipsis if it is wider than `width` pixels."""
    if len(text) <= width and font.getlength(text) <= width:
        return text
    start = text[:width]  # no letter is narrower than a pixel
    count = bisect.bisect_right(range(len(start) + 1), width, key=lambda n: font.getlength(start[:n] + "\u2026")) - 1
    return start[: max(count, 0)] + "\u2026"


def _wrapped(text: str, width: int, font: Any) -> list[str]:
    """The text as lines of at most `width` pixels, broken between words."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return [_cut(line, width, font) for line in lines]


def stored_bytes(width: int, height: int, channels: int) -> int:
    """The size of the file that `encode_png` makes of an image."""
    rows = height * (1 + width * channels)
    return _PNG_START + rows + _BLOCK_HEADER * (len(_png_blocks(height, 1 + width * channels)) - 1) + _PNG_END


def encode_compact_png(image: Image.Image) -> bytes:
    """Encode an 8-bit grey or RGB image as a compressed PNG: smaller, but training has to decode it."""
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def encode_png(image: Image.Image) -> bytes:
    """Encode an 8-bit grey or RGB image as PNG without compression and row filters.

    The file contains the pixels as they are, so `find_layout` lets training read it without decoding, about 20 times
    as fast as Pillow. Photographs become a third larger than compressed ones.
    """
    pixels = np.asarray(image)
    height, width = pixels.shape[:2]
    rows = np.zeros([height, 1 + pixels[0].size], np.uint8)  # each row starts with its filter type: 0, none
    rows[:, 1:] = pixels.reshape(height, -1)
    data = rows.tobytes()
    stream = [b"\x78\x01"]
    for start, stop in _png_blocks(*rows.shape):
        last = stop == len(data)
        stream.append(struct.pack("<B2H", last, stop - start, stop - start ^ 0xFFFF) + data[start:stop])
    stream.append(struct.pack(">L", zlib.adler32(data)))
    header = struct.pack(">2L5B", width, height, 8, 0 if pixels.ndim == 2 else 2, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n"
    for kind, content in ((b"IHDR", header), (b"IDAT", b"".join(stream)), (b"IEND", b"")):
        checksum = zlib.crc32(content, zlib.crc32(kind))
        file += struct.pack(">L", len(content)) + kind + content + struct.pack(">L", checksum)
    return file


def _png_blocks(height: int, row_bytes: int) -> list[tuple[int, int]]:
    """Start and stop of the deflate blocks that encode_png stores: complete rows, unless a row exceeds a block."""
    limit = 0xFFFF if row_bytes > 0xFFFF else 0xFFFF // row_bytes * row_bytes
    total = height * row_bytes
    return [(start, min(start + limit, total)) for start in range(0, total, limit)]


# --store of dataset_tool.py convert -> how a picture becomes a file
STORES: dict[str, Callable[[Image.Image], bytes]] = {"plain": encode_png, "compact": encode_compact_png}


def encode_npy(array: np.ndarray) -> bytes:
    """The .npy file of an array."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def decode_array(data: bytes, where: str) -> np.ndarray:
    """Decode a training file to [C, H, W]: uint8 pixels (C is 1 or 3) or float32 raw latents.

    A .npy file (recognized by its first bytes) holds uint8, float16 or float32 [C, H, W]. Raises ValueError, starting
    with `where`, for a damaged file and for pixels other than 8-bit grey and RGB.
    """
    if data.startswith(np.lib.format.MAGIC_PREFIX):
        try:
            file = io.BytesIO(data)
            values = np.lib.format.read_array(file, allow_pickle=False)
            check_npy_size(len(data), file.tell())
        except BROKEN as error:
            raise ValueError(f"{where}: the .npy file is damaged or cut short: {one_line(str(error)):.300}") from error
        if values.ndim != 3 or 0 in values.shape or values.dtype not in (np.uint8, np.float16, np.float32):
            raise ValueError(
                f"{where}: contains {values.dtype} {list(values.shape)}; expected pixels uint8 [C, H, W] or raw "
                "latents float16 or float32 [C, H, W]"
            )
        return values if values.dtype == np.uint8 else values.astype(np.float32, copy=False)
    image = open_image(data, where)
    if image.mode == "L":
        return np.array(image)[np.newaxis]
    if image.mode != "RGB":
        raise ValueError(
            f"{where}: its pixels are {image.mode}, not 8-bit grey or RGB; "
            "convert the images with scripts/dataset_tool.py convert"
        )
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def check_item(raw: np.ndarray, where: str, hint: str) -> None:
    """Raise ValueError, starting with `where`, unless a network can be trained on items like `raw` [C, H, W]."""
    channels, height, width = raw.shape
    if raw.dtype == np.uint8:
        if height != width or height & (height - 1) or channels not in (1, 3):
            unit = "channel" if channels == 1 else "channels"
            raise ValueError(
                f"{where}: is {width}x{height} pixels of {channels} {unit}; training takes square grey or RGB images "
                f"whose side is a power of two: {hint}"
            )
    elif height != width or channels % 2:
        raise ValueError(
            f"{where}: contains {list(raw.shape)} numbers; raw latents are square and have an even number of channels "
            "(means, then standard deviations)"
        )


@dataclass(frozen=True)
class Layout:
    """Where the values are in training files that share one format and size, so that a batch needs no decoding.

    Every file starts with `start`. Positions count from its end: `blocks`, (first, stop), contain rows of `row_bytes`
    bytes that start with `margin` zeros, and `between`, (first, bytes), is what separates the blocks. `shape` is that
    of one item: [C, H, W], or [H, W, C] if `channels_last`.
    """

    num_bytes: int
    start: bytes
    blocks: tuple[tuple[int, int], ...]
    between: tuple[tuple[int, bytes], ...]
    row_bytes: int
    margin: int
    dtype: np.dtype
    shape: tuple[int, ...]
    channels_last: bool

    def values(self, starts: np.ndarray, rests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The arrays in N files, and which of the files really have this layout.

        `starts`, uint8 [N, len(start)], and `rests`, uint8 [N, ...], are the two parts of the files. Returns raw
        [N, C, H, W], equal to decode_array of each file, and bool [N]. The memory of raw may be part of `rests` and may
        have its channels last.
        """
        fitting = (starts == np.frombuffer(self.start, np.uint8)).all(axis=1)
        for first, content in self.between:
            fitting &= (rests[:, first : first + len(content)] == np.frombuffer(content, np.uint8)).all(axis=1)
        rows = [rests[:, first:stop].reshape(len(rests), -1, self.row_bytes) for first, stop in self.blocks]
        if self.margin:
            for part in rows:
                fitting &= ~part[:, :, : self.margin].any(axis=(1, 2))
            rows = [np.concatenate([part[:, :, self.margin :] for part in rows], axis=1)]
        values = rows[0].reshape(len(rests), -1).view(self.dtype).reshape(len(rests), *self.shape)
        if self.dtype == np.float16:
            values = torch.from_numpy(values).float().numpy()  # NumPy converts halves one by one
        return (values.transpose(0, 3, 1, 2) if self.channels_last else values), fitting


def find_layout(data: bytes) -> Layout | None:
    """The layout of a training file, or None if the file has to be decoded.

    PNG files written by encode_png and .npy files in C order have a layout. Raises ValueError for a damaged file.
    """
    raw = decode_array(data, "")
    if data.startswith(np.lib.format.MAGIC_PREFIX):
        values = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
        start, stored = data[: len(data) - values.nbytes], data[len(data) - values.nbytes :]
        if values.tobytes() != stored or b"'fortran_order': False" not in start:
            return None
        blocks: tuple[tuple[int, int], ...] = ((0, len(stored)),)
        return Layout(len(data), start, blocks, (), len(stored), 0, values.dtype, values.shape, channels_last=False)
    channels, height, width = raw.shape
    row_bytes = 1 + width * channels
    if encode_png(to_image(raw)) != data or row_bytes > 0xFFFF:
        return None
    pieces = _png_blocks(height, row_bytes)
    blocks = tuple((first + k * _BLOCK_HEADER, stop + k * _BLOCK_HEADER) for k, (first, stop) in enumerate(pieces))
    rest = data[_PNG_START:]
    between = tuple((stop, rest[stop : stop + _BLOCK_HEADER]) for _, stop in blocks[:-1])
    assert blocks[-1][1] + _PNG_END == len(rest)
    shape = (height, width, channels)
    return Layout(len(data), data[:_PNG_START], blocks, between, row_bytes, 1, raw.dtype, shape, channels_last=True)
