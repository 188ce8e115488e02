"""One self-contained HTML page per result: text, tables, figures, and images beside each other under a slider.

The page loads nothing from elsewhere, so it opens from a file, follows the reader's dark or light setting, and can be
used by keyboard.
"""

import base64
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image

from edm2kit.experiments.pages.figures import STYLE
from edm2kit.torch_utils.files import atomic_write

_TEMPLATE = Path(__file__).with_name("template.html")
_PNG_PIXELS = 1 << 18  # larger images are stored as JPEG


@dataclass(frozen=True)
class SliderStop:
    """What the slider shows at one weight: its label, the images as one sheet, and a sentence on them."""

    label: str
    sheet: Image.Image
    note: str = ""


@dataclass(frozen=True)
class SliderGroup:
    """One way to guide at several weights, beside the unguided images of the same seeds; `start` is the first stop.

    Without `unguided`, the stops stand alone.
    """

    title: str
    unguided: Image.Image | None
    stops: Sequence[SliderStop]
    start: int = 0


def heading(text: str) -> str:
    """A section heading."""
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str) -> str:
    """A paragraph of plain text; what stands between backticks is a command or a name."""
    return f"<p>{_inline(text)}</p>"


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def command(text: str) -> str:
    """A command line to copy."""
    return f'<pre tabindex="0"><code>{escape(text)}</code></pre>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], align: str = "") -> str:
    """A table of plain text and `commands`; `align` has a letter per column, l (left, the default) or r (right)."""
    kinds = ["" if letter == "l" else ' class="right"' for letter in align or "l" * len(head)]
    top = "".join(f'<th scope="col"{kind}>{escape(cell)}</th>' for kind, cell in zip(kinds, head, strict=True))
    lines = []
    for row in rows:
        cells = "".join(f"<td{kind}>{_inline(cell)}</td>" for kind, cell in zip(kinds, row, strict=True))
        lines.append(f"<tr>{cells}</tr>")
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def figure(svg: str, caption: str) -> str:
    """A figure from `edm2kit.experiments.pages.figures` with its caption."""
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def picture(image: Image.Image, caption: str) -> str:
    """An image with its caption."""
    source = f'<img class="plain" src="{image_data(image)}" alt="{escape(caption)}">'
    return f"<figure>{source}<figcaption>{escape(caption)}</figcaption></figure>"


def weight_slider(groups: Sequence[SliderGroup], name: str = "Weight", pick: str = "Method") -> str:
    """Unguided images on the left, guided ones of the same seeds on the right, and a slider over their weight.

    `name` is what the slider changes, and `pick` what a group is.
    """
    data = [
        {
            "title": group.title,
            "start": group.start,
            "unguided": None if group.unguided is None else image_data(group.unguided),
            "stops": [
                {"label": stop.label, "image": image_data(stop.sheet), "note": stop.note} for stop in group.stops
            ],
        }
        for group in groups
    ]
    packed = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # "<!--<script>" would hide the rest
    unguided, kind = "", ' class="alone"'
    if any(group.unguided is not None for group in groups):
        kind = ""
        unguided = (
            "<figure><figcaption>Unguided, the same seeds</figcaption>"
            '<img class="unguided" alt="Unguided images"></figure>\n'
        )
    return f"""<div class="slider">
<script type="application/json">{packed}</script>
<div class="controls">
<label class="picklabel">{escape(pick)}</label><select class="pick" aria-label="{escape(pick)}"></select>
<span>{escape(name)}</span><input class="weight" type="range" min="0" step="1" aria-label="{escape(name)}">
<output class="shown"></output>
</div>
<p class="note" aria-live="polite"></p>
<div class="sides">
{unguided}<figure{kind}><figcaption class="guidedcaption"></figcaption><img class="guided" alt=""></figure>
</div>
</div>"""


def write_page(path: Path, title: str, blocks: Sequence[str], about: str) -> None:
    """Write the page: `blocks` are HTML from the functions above, `about` is the small print. Raises OSError."""
    body = "\n".join([f"<h1>{escape(title)}</h1>", *blocks])
    parts = {"title": escape(title), "style": STYLE, "body": body, "about": escape(about)}
    # in one pass: what the parts contain is not searched for marks
    html = re.sub(r"%%(\w+)%%", lambda mark: parts[mark[1]], _TEMPLATE.read_text(encoding="utf-8"))
    with atomic_write(path, "w") as file:
        file.write(html)


def image_data(image: Image.Image) -> str:
    """An image as a data: address; small ones without loss."""
    buffer = io.BytesIO()
    if image.width * image.height <= _PNG_PIXELS:
        image.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        image.convert("RGB").save(buffer, "JPEG", quality=90)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
