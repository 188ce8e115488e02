"""The demo's data set: any number of small pictures of ten kinds. See `python scripts/draw_pictures.py --help`.

Each picture is one shape on a soft gradient, with an outline, shading from one light, and a shadow. Kind, position,
size, rotation and colours vary. Three things do not: the hue of the shape is opposite to that of the background, light
comes from above, and edges are crisp. A network of half a million weights learns this in minutes, but not perfectly, so
guidance has something to improve.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import numpy as np
from PIL import Image

from edm2kit.cli import click_types as cli
from edm2kit.torch_utils.dist import progress_bar

SIDE = 32
_BATCH = 256
_PIXEL = 2 / SIDE  # coordinates are [-1, 1] in x (right) and y (down); edges are ramps one pixel wide
_OUTLINE = 0.07
_SHADOW = (0.09, 0.13)
_GRAIN = 8 / 255  # full range of the uniform noise on every pixel, like film grain
_CHOICES = 9  # random numbers that determine a picture; then one per pixel and channel for the grain
_SLOTS = _CHOICES + SIDE * SIDE * 3


def uniforms(seed: int, indices: np.ndarray) -> np.ndarray:
    """Random numbers in [0, 1) that depend on (seed, index) alone, float32 [N, 3081].

    SplitMix64 (Steele et al. 2014) of a counter, so that no generator has to be set up per picture.
    """
    counter = np.asarray(indices, np.uint64)[:, None] * np.uint64(_SLOTS) + np.arange(_SLOTS, dtype=np.uint64)
    state = _mix(counter + _mix(np.array([seed], np.uint64)))
    return (state >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)


def _mix(state: np.ndarray) -> np.ndarray:
    state = state * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


# Signed distances to shapes of about unit radius, negative inside, in the units of x and y. Arrays [N, H, W].


def _box(x: np.ndarray, y: np.ndarray, half_x: float, half_y: float) -> np.ndarray:
    out_x, out_y = np.abs(x) - half_x, np.abs(y) - half_y
    outside = np.hypot(np.maximum(out_x, 0), np.maximum(out_y, 0))
    return outside + np.minimum(np.maximum(out_x, out_y), 0)


def disc(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) - 0.9


def ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(np.hypot(x, y) - 0.72) - 0.26


def square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _box(x, y, 0.8, 0.8)


def cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.minimum(_box(x, y, 0.95, 0.32), _box(x, y, 0.32, 0.95))


def triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _polygon(x, y, np.array([[0.0, -1.0], [0.87, 0.5], [-0.87, 0.5]], np.float32))


def star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    turn = np.arange(10) * np.pi / 5
    radius = np.where(np.arange(10) % 2 == 0, 1.05, 0.48)
    return _polygon(x, y, np.stack([radius * np.sin(turn), -radius * np.cos(turn)], axis=1).astype(np.float32))


def arrow(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    half = [[0.0, -1.0], [0.8, -0.1], [0.3, -0.1], [0.3, 0.95]]
    return _polygon(x, y, np.array([*half, *[[-px, py] for px, py in half[:0:-1]]], np.float32))


def moon(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.hypot(x + 0.1, y) - 0.95, 0.72 - np.hypot(x - 0.38, y))


def flower(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    petals = [np.hypot(x - 0.6 * np.sin(a), y + 0.6 * np.cos(a)) for a in np.arange(5) * 2 * np.pi / 5]
    return np.minimum.reduce([*petals, np.hypot(x, y)]) - 0.42


def _polygon(x: np.ndarray, y: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Signed distance to a closed polygon with corners float32 [K, 2] in order; inside by the number of crossings."""
    nearest = np.full_like(x, np.inf)
    inside = np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        ex, ey, px, py = bx - ax, by - ay, x - ax, y - ay
        along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, (px - ex * along) ** 2 + (py - ey * along) ** 2)
        crosses = ((y >= ay) != (y >= by)) & ((ex * py - ey * px > 0) == (ey > 0))
        inside ^= crosses
    return np.where(inside, -1, 1) * np.sqrt(nearest)


# Patterns on a shape, drawn in a second colour where they are positive. Arrays [N, H, W].


def no_pattern(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.full_like(x, -1.0)


def stripes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs((x + 0.2) % 0.8 - 0.4) - 0.2


def checks(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sin(x * np.pi / 0.4) * np.sin(y * np.pi / 0.4) * (0.4 / np.pi)


def eye(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return 0.32 - np.hypot(x, y)


# kind -> (signed distance, pattern)
Field = Callable[[np.ndarray, np.ndarray], np.ndarray]
KINDS: dict[str, tuple[Field, Field]] = {
    "disc": (disc, no_pattern),
    "ring": (ring, no_pattern),
    "triangle": (triangle, no_pattern),
    "cross": (cross, no_pattern),
    "star": (star, no_pattern),
    "moon": (moon, no_pattern),
    "arrow": (arrow, no_pattern),
    "flower": (flower, eye),
    "stripes": (square, stripes),
    "checks": (square, checks),
}
NAMES = tuple(KINDS)


def draw(seed: int, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pictures `indices` of the data set `seed`, and their kinds.

    Returns uint8 [N, 32, 32, 3] and int64 [N], indices into NAMES. Picture k has kind k modulo 10 and depends on `seed`
    and k alone.
    """
    indices = np.asarray(indices, np.int64)
    labels = indices % len(NAMES)
    images = np.empty((len(indices), SIDE, SIDE, 3), np.uint8)
    for label, (distance, pattern) in enumerate(KINDS.values()):
        rows = np.flatnonzero(labels == label)
        for start in range(0, len(rows), _BATCH):
            chosen = rows[start : start + _BATCH]
            images[chosen] = _render(uniforms(seed, indices[chosen]), distance, pattern)
    return images, labels


def _render(u: np.ndarray, distance: Field, pattern: Field) -> np.ndarray:
    """Pictures uint8 [N, 32, 32, 3] of one kind from `uniforms`, painted from the back to the front."""
    size, turn = 0.66 + 0.17 * u[:, 0], 0.6 * (u[:, 1] - 0.5)
    cx, cy = 0.22 * (u[:, 2] - 0.5), 0.22 * (u[:, 3] - 0.5)
    lean = _column(2 * np.pi * u[:, 4])
    colours = _colours(u)
    grain = u[:, _CHOICES:].reshape(len(u), SIDE, SIDE, 3) - 0.5
    axis = (np.arange(SIDE, dtype=np.float32) + 0.5) * _PIXEL - 1
    y, x = np.meshgrid(axis, axis, indexing="ij")

    def local(shift_x: float, shift_y: float) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates of all pixels in the frame of a shape that is moved by the shift."""
        px, py = x - _column(cx + shift_x), y - _column(cy + shift_y)
        cos, sin = _column(np.cos(turn) / size), _column(np.sin(turn) / size)
        return cos * px + sin * py, cos * py - sin * px

    edge = distance(*local(0, 0)) * _column(size)
    shadow = distance(*local(*_SHADOW)) * _column(size)
    second = pattern(*local(0, 0)) * _column(size)
    below_centre = y + 0.5 * x - _column(cy + 0.5 * cx)  # along the light

    ground = _blend(colours["far"], colours["near"], 0.5 + 0.35 * (np.cos(lean) * x + np.sin(lean) * y))
    ground = _blend(ground, 0.62 * ground, np.clip(0.5 - shadow / 0.12, 0, 1))
    body = _blend(colours["dark"], colours["light"], np.clip(0.5 - below_centre / 1.2, 0, 1))
    body = _blend(body, colours["second"], _cover(-second))
    body = _blend(body, colours["line"], _cover(-_OUTLINE - edge))
    image = _blend(ground, body, _cover(edge)) + _GRAIN * grain
    return np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8)


def _column(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32)[:, None, None]


def _cover(edge: np.ndarray) -> np.ndarray:
    """How much of each pixel is inside, from the signed distance to an edge."""
    return np.clip(0.5 - edge / _PIXEL, 0, 1)


def _blend(below: np.ndarray, above: np.ndarray, amount: np.ndarray) -> np.ndarray:
    return below + (above - below) * amount[..., None]


def _colours(u: np.ndarray) -> dict[str, np.ndarray]:
    """Colours of each picture by use, [N, 1, 1, 3]: around a hue, its neighbour and its opposite."""
    hue, night = u[:, 5], u[:, 6] < 0.35
    wide = 0.06 * (u[:, 7] - 0.5)
    value = np.where(night, 0.30 + 0.15 * u[:, 8], 0.80 + 0.15 * u[:, 8])
    return {
        "far": _rgb(hue, 0.45, value),
        "near": _rgb(hue + 0.09, 0.35, value - 0.12),
        "light": _rgb(hue + 0.5 + wide, 0.55, np.where(night, 1.0, 0.9)),
        "dark": _rgb(hue + 0.5 + wide, 0.85, np.where(night, 0.8, 0.6)),
        "second": _rgb(hue + 0.62 + wide, 0.25, np.where(night, 0.55, 1.0)),
        "line": _rgb(hue + 0.5 + wide, 0.6, np.where(night, 0.98, 0.22)),
    }


def _rgb(hue: np.ndarray, saturation: float, value: np.ndarray) -> np.ndarray:
    """HSV to RGB, all in [0, 1] (hue modulo 1), as float32 [N, 1, 1, 3]."""
    ramps = np.abs((hue[:, None] + np.array([0, 2 / 3, 1 / 3])) % 1 * 6 - 3) - 1
    colour = value[:, None] * (1 - saturation + saturation * np.clip(ramps, 0, 1))
    return colour.astype(np.float32)[:, None, None, :]


@click.command(cls=cli.Command)
@click.option(
    "--dest",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder to write; must not exist",
)
@click.option("--num", metavar="N", type=cli.Size(), default=10000, help="Number of pictures, equally many per kind")
@click.option("--seed", metavar="N", type=click.IntRange(min=0), default=0, help="Seed of the data set")
def main(dest: Path, num: int, seed: int) -> None:
    """Draw pictures into one folder per kind: DEST/disc/000000.png, DEST/ring/000001.png, ...

    \b
    python scripts/draw_pictures.py --dest pictures --num 20000
    """
    if dest.exists():
        raise ValueError(f"--dest {dest} already exists. Remove it, or choose another folder")
    partial = dest.with_name(f".{dest.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name in NAMES:
        (partial / name).mkdir(parents=True)
    progress = progress_bar(num)
    for start in range(0, num, 10 * _BATCH):
        indices = range(start, min(start + 10 * _BATCH, num))
        for index, image, label in zip(indices, *draw(seed, indices), strict=True):
            Image.fromarray(image).save(partial / NAMES[label] / f"{index:06d}.png")
            progress.update()
    partial.rename(dest)


if __name__ == "__main__":
    main()
