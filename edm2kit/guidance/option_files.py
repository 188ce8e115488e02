"""Files that a guidance method works with, told apart by what is in them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from edm2kit.torch_utils.files import sha256_of


@dataclass(frozen=True)
class File:
    """A file as it was when it was named; its text is what a record of the images keeps."""

    path: Path
    sha256: str

    def __str__(self) -> str:
        return f"{self.path.name} sha256:{self.sha256}"


def existing_file(text: str) -> File:
    """The file called `text`; ValueError where there is none."""
    path = Path(text)
    if not path.is_file():
        raise ValueError(f"no file at {text}")
    return File(path, sha256_of(path))


def read_picture(path: Path, grey: bool = False) -> torch.Tensor:
    """The pixels of an image file, from -1 to 1: float32 [3,H,W], or [1,H,W] for `grey`.

    Raises ValueError where the file is no whole image.
    """
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("L" if grey else "RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not an image, or a damaged one ({error})") from error
    return torch.from_numpy(pixels).reshape(*pixels.shape[:2], -1).permute(2, 0, 1).float() / 127.5 - 1
