"""One picture of what the methods do: a line per method, weights from left to right, the same seeds everywhere."""

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap

from PIL import Image, ImageDraw, ImageFont

_ZOOM = 2
_MARGIN = 8
_LABEL_WIDTH = 230
_LABEL_CHARS = 28
_CAPTION_HEIGHT = 18
_COLOURS = 255  # photographs in full colour make large PNG files


@dataclass(frozen=True)
class Strip:
    """Images of one method at one weight."""

    caption: str
    images: Sequence[Image.Image]


def draw_sheet(lines: Sequence[tuple[str, Sequence[Strip]]]) -> Image.Image:
    """(title, strips) of each method, one below the other; images of one size, enlarged, in 255 colours."""
    side = lines[0][1][0].images[0].width * _ZOOM
    strip_width = max(len(strip.images) for _, strips in lines for strip in strips) * side + _MARGIN
    columns = max(len(strips) for _, strips in lines)
    line_height = side + _CAPTION_HEIGHT + _MARGIN
    size = (_LABEL_WIDTH + columns * strip_width + _MARGIN, len(lines) * line_height + _MARGIN)
    sheet = Image.new("RGB", size, "white")
    pen, font, small = ImageDraw.Draw(sheet), ImageFont.load_default(size=15), ImageFont.load_default(size=13)
    for k, (title, strips) in enumerate(lines):
        top = _MARGIN + k * line_height
        middle = top + _CAPTION_HEIGHT + side // 2
        label = "\n".join(wrap(title, _LABEL_CHARS, break_on_hyphens=False))
        pen.multiline_text((_MARGIN, middle), label, "black", font, anchor="lm")
        for column, strip in enumerate(strips):
            left = _LABEL_WIDTH + column * strip_width
            pen.text((left, top), strip.caption, "black", small)
            for n, image in enumerate(strip.images):
                enlarged = image.convert("RGB").resize((side, side), Image.Resampling.NEAREST)
                sheet.paste(enlarged, (left + n * side, top + _CAPTION_HEIGHT))
    return sheet.quantize(_COLOURS, dither=Image.Dither.NONE)
