"""One picture of what the methods do: a line for each, the weights from left to right, always the same seeds."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_ZOOM = 2
_MARGIN = 8
_LABEL_WIDTH = 230
_WEIGHT_HEIGHT = 18
_COLOURS = 255


@dataclass(frozen=True)
class Strip:
    """Images of one method at one weight."""

    caption: str
    images: Sequence[Image.Image]


def draw_sheet(lines: Sequence[tuple[str, Sequence[Strip]]]) -> Image.Image:
    """(title, strips) of each method, below each other; all images of one size, enlarged, in few colours.

    Few colours, because photographs make large PNG files.
    """
    side = lines[0][1][0].images[0].width * _ZOOM
    longest = max(len(strip.images) for _, strips in lines for strip in strips)
    columns, strip_width = max(len(strips) for _, strips in lines), longest * side + _MARGIN
    height = side + _WEIGHT_HEIGHT + _MARGIN
    sheet = Image.new("RGB", (_LABEL_WIDTH + columns * strip_width + _MARGIN, len(lines) * height + _MARGIN), "white")
    pen, font, small = ImageDraw.Draw(sheet), ImageFont.load_default(size=15), ImageFont.load_default(size=13)
    for k, (title, strips) in enumerate(lines):
        top = _MARGIN + k * height
        middle = top + _WEIGHT_HEIGHT + side // 2
        pen.multiline_text((_MARGIN, middle), _wrapped(title), "black", font, anchor="lm")
        for column, strip in enumerate(strips):
            left = _LABEL_WIDTH + column * strip_width
            pen.text((left, top), strip.caption, "black", small)
            for n, image in enumerate(strip.images):
                enlarged = image.convert("RGB").resize((side, side), Image.Resampling.NEAREST)
                sheet.paste(enlarged, (left + n * side, top + _WEIGHT_HEIGHT))
    return sheet.quantize(_COLOURS, dither=Image.Dither.NONE)


def _wrapped(title: str, width: int = 28) -> str:
    words, lines = title.split(), [""]
    for word in words:
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += f"{word} "
    return "\n".join(line.strip() for line in lines if line)
