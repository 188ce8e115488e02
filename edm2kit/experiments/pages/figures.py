"""Figures as SVG text, without a plotting library: curves and heat maps in the colours of the page, light or dark."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from edm2kit.torch_utils.files import atomic_write

STYLE = Path(__file__).with_name("style.css").read_text(encoding="utf-8").rstrip()
_WIDTH, _HEIGHT = 640, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 16, 16, 52
_LEGEND_LINE = 18
_COLOURS = 6
_DASHES = ("", "7 4", "2 3", "10 3 2 3")  # so that curves differ without colours, too
_CELL = 62


@dataclass(frozen=True)
class Curve:
    """Values `y` at `x`, both finite; `low` and `high` bound a shaded band; `joined` is False for points alone,
    `dots` for a line alone."""

    title: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    joined: bool = True
    dots: bool = True


@dataclass(frozen=True)
class Figure:
    """A figure for notebooks, which show it, and for files."""

    svg: str

    def __repr__(self) -> str:
        return f"Figure: {len(self.svg):,} characters of SVG; save(path) writes it to a file"

    def _repr_svg_(self) -> str:
        return standalone(self.svg)

    def save(self, path: str | Path) -> None:
        """Write the figure as an SVG file. Raises ValueError for another kind of file."""
        if Path(path).suffix.lower() != ".svg":
            raise ValueError(f"{path}: a figure is written as an SVG file; use a name that ends in .svg")
        with atomic_write(path, "w") as file:
            file.write(standalone(self.svg))


def line_chart(
    curves: Sequence[Curve],
    x_title: str,
    y_title: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    references: Sequence[tuple[float, str]] = (),
) -> str:
    """Curves as SVG; `references` are values of y with names, drawn as dotted lines. Raises ValueError without points.

    Example: `line_chart([Curve("guide", [1, 2], [5.0, 4.0])], "weight", "fd_lite0")`
    """
    xs = [x for curve in curves for x in curve.x]
    ys = [y for curve in curves for y in (*curve.y, *curve.low, *curve.high)] + [y for y, _ in references]
    if not xs:
        raise ValueError("a figure needs at least one point")
    entries = [curve.title for curve in curves] + [name for _, name in references]
    top = _TOP + _LEGEND_LINE * math.ceil(len(entries) / 2)
    height = _HEIGHT + top - _TOP
    to_x, x_ticks = _scale(xs, log_x, _LEFT, _WIDTH - _RIGHT, pad=0.02)
    to_y, y_ticks = _scale(ys, log_y, height - _BOTTOM, top, pad=0.06)
    parts = []
    for value in x_ticks:
        x = to_x(value)
        parts.append(f'<path class="gridline" d="M{x:.1f} {top}V{height - _BOTTOM}"/>')
        parts.append(_text(x, height - _BOTTOM + 18, f"{value:g}", "middle", "quiet"))
    for value in y_ticks:
        y = to_y(value)
        parts.append(f'<path class="gridline" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(_text(_LEFT - 8, y + 4, f"{value:g}", "end", "quiet"))
    for value, _ in references:
        parts.append(f'<path class="reference" d="M{_LEFT} {to_y(value):.1f}H{_WIDTH - _RIGHT}"/>')
    for k, curve in enumerate(curves):
        parts += _curve(curve, k, to_x, to_y)
    parts += _legend(curves, [name for _, name in references])
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, height - 10, x_title, "middle"))
    middle = (top + height - _BOTTOM) / 2
    parts.append(
        f'<text transform="translate(16 {middle:.1f}) rotate(-90)" text-anchor="middle">{escape(y_title)}</text>'
    )
    return _svg(_WIDTH, height, f"{y_title} against {x_title}: {', '.join(entries)}", parts)


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    row_title: str,
    column_title: str,
    smaller_is_better: bool = True,
) -> str:
    """Values [rows][columns] as a table of shaded cells, None where there is none; the best cell has a frame.

    Raises ValueError if all are None.
    """
    known = [value for line in values for value in line if value is not None]
    if not known:
        raise ValueError("a heat map needs at least one value")
    low, high = min(known), max(known)
    best = low if smaller_is_better else high
    left, top = 84, 26
    parts, frames = [], []
    for i, line in enumerate(values):
        parts.append(_text(left - 8, top + i * _CELL * 0.6 + 22, rows[i], "end", "quiet"))
        for j, value in enumerate(line):
            x, y = left + j * _CELL, top + i * _CELL * 0.6
            box = f'x="{x:.1f}" y="{y:.1f}" width="{_CELL}" height="{_CELL * 0.6:.1f}"'
            if value is None:
                parts.append(f'<rect class="gridline" {box}/>')
                continue
            share = 0.5 if high == low else (value - low) / (high - low)
            good = 1 - share if smaller_is_better else share
            parts.append(f'<rect {box} style="fill:var(--c0);fill-opacity:{0.06 + 0.5 * good:.2f}"/>')
            parts.append(_text(x + _CELL / 2, y + 23, f"{value:.4g}", "middle"))
            if value == best:
                frames.append(f'<rect class="best" {box}/>')
    bottom = top + len(rows) * _CELL * 0.6
    for j, name in enumerate(columns):
        parts.append(_text(left + (j + 0.5) * _CELL, bottom + 17, name, "middle", "quiet"))
    parts.append(_text(left + len(columns) * _CELL / 2, bottom + 38, column_title, "middle"))
    parts.append(_text(8, 14, row_title, "start"))
    width = max(left + len(columns) * _CELL + 10, 360)
    return _svg(
        width, int(bottom + 48), f"Values by {row_title} and {column_title}; the best is {best:.4g}", [*parts, *frames]
    )


def standalone(svg: str) -> str:
    """The figure as the content of an SVG file of its own."""
    start, _, rest = svg.partition(">")
    start = start.replace('style="', 'style="background:var(--ground);')
    return f"{start}><style>\n{STYLE}\n</style>{rest}"


def _svg(width: int, height: int, description: str, parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"'
    # as large as drawn, so that the text has one size in all figures
    return f'{head} style="max-width:{width}px" aria-label="{escape(description)}">{"".join(parts)}</svg>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{named}>{escape(text)}</text>'


def _curve(curve: Curve, k: int, to_x: Callable[[float], float], to_y: Callable[[float], float]) -> list[str]:
    colour = f"var(--c{k % _COLOURS})"
    x = [f"{to_x(value):.1f}" for value in curve.x]
    parts = []
    if curve.low:
        upper = [f"{a} {to_y(b):.1f}" for a, b in zip(x, curve.high, strict=True)]
        lower = [f"{a} {to_y(b):.1f}" for a, b in zip(x, curve.low, strict=True)]
        parts.append(f'<path class="band" style="fill:{colour}" d="M{"L".join([*upper, *reversed(lower)])}Z"/>')
    y = [f"{to_y(value):.1f}" for value in curve.y]
    if curve.joined:
        line = "L".join(f"{a} {b}" for a, b in zip(x, y, strict=True))
        dash = _DASHES[k % len(_DASHES)]
        parts.append(f'<path class="line" style="stroke:{colour};stroke-dasharray:{dash or "none"}" d="M{line}"/>')
    for a, b in zip(x, y, strict=True) if curve.dots else ():
        parts.append(f'<circle cx="{a}" cy="{b}" r="3" style="fill:{colour}"/>')
    return parts


def _legend(curves: Sequence[Curve], references: Sequence[str]) -> list[str]:
    parts = []
    for k, title in enumerate([*(curve.title for curve in curves), *references]):
        x, y = _LEFT + (k % 2) * 290, _TOP + (k // 2) * _LEGEND_LINE - 4
        if k < len(curves):
            style = f"stroke:var(--c{k % _COLOURS});stroke-dasharray:{_DASHES[k % len(_DASHES)] or 'none'}"
            parts.append(f'<path class="line" style="{style}" d="M{x} {y}h24"/>')
        else:
            parts.append(f'<path class="reference" d="M{x} {y}h24"/>')
        parts.append(_text(x + 30, y + 4, title, "start"))
    return parts


def _scale(
    values: Sequence[float], log: bool, start: float, end: float, pad: float
) -> tuple[Callable[[float], float], list[float]]:
    """From values to positions, and the values to label."""
    low, high = min(values), max(values)
    if log:
        low, high = math.log10(low), math.log10(high)
    if high - low < 1e-12:
        low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    low, high = low - pad * (high - low), high + pad * (high - low)

    def position(value: float) -> float:
        return start + ((math.log10(value) if log else value) - low) / (high - low) * (end - start)

    return position, _log_ticks(low, high) if log else _ticks(low, high)


def _ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * k for k in (1, 2, 5, 10) if power * k >= rough)
    first = math.ceil(low / step)
    return [round(k * step, 12) for k in range(first, math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    steps = (1, 2, 5) if high - low < 2.5 else (1,)
    found = [k * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for k in steps]
    inside = [value for value in found if low <= math.log10(value) <= high]
    if len(inside) < 2:
        return [float(f"{10**value:.2g}") for value in (low, (low + high) / 2, high)]
    return inside
