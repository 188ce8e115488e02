"""Training files whose numbers lie in them as they are: a batch of them is copied into place, nothing is decoded.

PNG files as edm2kit.data.image_files.encode_png writes them, and .npy files.
"""

import io
from dataclasses import dataclass

import numpy as np
import torch

from edm2kit.data.image_files import decode_array, encode_png, png_blocks, to_image

_PNG_START = 48  # bytes before the first pixels: signature, IHDR, name and length of IDAT, a header of zlib's
_BLOCK_HEADER = 5
_PNG_END = 20  # checksum of the pixels, of IDAT, and IEND


@dataclass(frozen=True)
class Layout:
    """Where the numbers lie in files that are all of one kind and size.

    They begin with `start`. Positions count from there: `blocks`, (first, stop), hold rows of `row_bytes` bytes that
    begin with `margin` zeros, and `between`, (first, bytes), is what lies between blocks. `dtype` and `shape`, without
    the number of files, say what the rows are: [C, H, W], or [H, W, C] where `channels_last`.
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
        """What N files hold, cut in two after `start`, and which of them are laid out so.

        uint8 [N, len(start)], uint8 [N, ...] -> raw [N, C, H, W] with the values of decode_array, and bool [N]. In
        memory, raw may be part of `rests`, or have its channels last.
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
    """The layout of a training file, or None where it has none and needs decoding; ValueError where it is damaged."""
    return _npy_layout(data) if data.startswith(np.lib.format.MAGIC_PREFIX) else _png_layout(data)


def _npy_layout(data: bytes) -> Layout | None:
    decode_array(data, "")  # refuses what is no training file
    values = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    start, stored = data[: len(data) - values.nbytes], data[len(data) - values.nbytes :]
    if values.tobytes() != stored or b"'fortran_order': False" not in start:
        return None
    blocks = ((0, len(stored)),)
    return Layout(len(data), start, blocks, (), len(stored), 0, values.dtype, values.shape, channels_last=False)


def _png_layout(data: bytes) -> Layout | None:
    raw = decode_array(data, "")
    channels, height, width = raw.shape
    row_bytes = 1 + width * channels
    if encode_png(to_image(raw)) != data or row_bytes > 0xFFFF:
        return None
    pieces = png_blocks(height, row_bytes)
    blocks = tuple((first + k * _BLOCK_HEADER, stop + k * _BLOCK_HEADER) for k, (first, stop) in enumerate(pieces))
    rest = data[_PNG_START:]
    between = tuple((stop, rest[stop : stop + _BLOCK_HEADER]) for _, stop in blocks[:-1])
    assert blocks[-1][1] + _PNG_END == len(rest)
    shape = (height, width, channels)
    return Layout(len(data), data[:_PNG_START], blocks, between, row_bytes, 1, raw.dtype, shape, channels_last=True)
