"""Contact sheets of generated images: --grid."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from edm2kit.data.image_files import contact_sheet
from edm2kit.models.encoders import to_image
from edm2kit.torch_utils.files import atomic_write

MAX_IMAGES = 1024
_TITLE_HEIGHT = 18


def parse_weights(text: str) -> tuple[float, ...]:
    """Guidance weights in a text such as "1,1.5,2". Raises ValueError if one is not a finite number or comes twice."""
    try:
        weights = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{text!r} is not a list of guidance weights; write for example 1,1.5,2") from None
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"{text!r} has a weight that is not finite")
    if len(set(weights)) < len(weights):
        raise ValueError(f"{text!r} names a weight more than once")
    return weights


def write_grid(
    path: Path, pixels: Iterable[np.ndarray], columns: int | None = None, titles: Sequence[str] = ()
) -> None:
    """Write images, each uint8 [C, H, W], to a PNG row by row, by default in about as many columns as rows.

    `titles` stand above the columns. Raises ValueError if there are more than `MAX_IMAGES`.
    """
    images = [to_image(array) for array in pixels]
    if len(images) > MAX_IMAGES:
        raise ValueError(f"--grid shows at most {MAX_IMAGES} images; there are {len(images)}")
    sheet = contact_sheet(images, columns or math.ceil(math.sqrt(len(images))))
    if titles:
        titled = Image.new("RGB", (sheet.width, sheet.height + _TITLE_HEIGHT), "white")
        titled.paste(sheet, (0, _TITLE_HEIGHT))
        pen, font = ImageDraw.Draw(titled), ImageFont.load_default(size=12)
        for number, title in enumerate(titles):
            pen.text((number * images[0].width + 2, 2), title, fill="black", font=font)
        sheet = titled
    with atomic_write(path) as file:
        sheet.save(file, "PNG")
