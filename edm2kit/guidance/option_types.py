"""Option types: functions that read the text of an option, and raise ValueError saying what was expected."""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from edm2kit.torch_utils.files import sha256_of

_MAX_PIXELS = 1 << 24  # of one picture
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# what Pillow raises for damaged files
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, OverflowError, struct.error)


def number(low: float = -math.inf, high: float = math.inf) -> Callable[[str], float]:
    """A reader of numbers in [low, high]; "inf" is one of them if `low` is finite and `high` is not."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or (math.isinf(value) and math.isinf(low)):
            within = "" if (low, high) == (-math.inf, math.inf) else f" from {low:g} to {high:g}"
            raise ValueError(f"{text!r:.60} is not a number{within}")
        return value

    return parse


def count(low: int = 1) -> Callable[[str], int]:
    """A reader of whole numbers of at least `low`."""

    def parse(text: str) -> int:
        if not str(text).isdecimal() or int(text) < low:
            raise ValueError(f"{text!r:.60} is not a whole number of at least {low}")
        return int(text)

    return parse


def one_of(*words: str) -> Callable[[str], str]:
    """A reader of one of `words`."""

    def parse(text: str) -> str:
        if text not in words:
            raise ValueError(f"{text!r:.60} is not one of {', '.join(words)}")
        return text

    return parse


@dataclass(frozen=True)
class File:
    """A file, identified by its content. Its text is what a record of the images holds."""

    path: Path
    sha256: str

    def __str__(self) -> str:
        return f"{self.path.name} sha256:{self.sha256}"


def existing_file(text: str) -> File:
    """The file at the path `text`, hashed. Raises ValueError if there is none."""
    path = Path(text)
    if not path.is_file():
        raise ValueError(f"there is no file at {text}")
    return File(path, sha256_of(path))


def read_picture(path: Path, grey: bool = False) -> torch.Tensor:
    """The pixels of an image file in [-1, 1]: float32 [3, H, W], or [1, H, W] if `grey`.

    Raises ValueError if the file is not an image, is damaged, or has more than 16 Mi pixels.
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            if math.prod(image.size) > _MAX_PIXELS:
                raise ValueError(f"it has {image.width}x{image.height} pixels; make it as large as generated images")
            pixels = np.array(image.convert("L" if grey else "RGB"))
    except (*_BROKEN, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not an image, or a damaged one ({error})") from error
    return torch.from_numpy(pixels).reshape(*pixels.shape[:2], -1).permute(2, 0, 1).float() / 127.5 - 1
