"""Draws docs/architecture.svg, the rooms of the package and their imports, from the source: see --help."""

import ast
from dataclasses import dataclass
from html import escape
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "architecture.svg"

WIDTH, HEIGHT = 940, 668
SEAMS = "denoiser, conditions"  # two files, one box
INK, QUIET, LINE = "#1f2933", "#52606d", "#7b8794"
COMPOSE, TRAIN, GUIDE, GROUND = "#dbe9fb", "#dff3e4", "#fdecd2", "#e9ebee"


@dataclass(frozen=True)
class Box:
    """A room: upper left corner, size, colour, and what is inside, one line each."""

    x: int
    y: int
    width: int
    height: int
    colour: str
    lines: tuple[str, ...]

    @property
    def bottom(self) -> int:
        return self.y + self.height

    @property
    def right(self) -> int:
        return self.x + self.width


# A room that is not listed here fails tests/docs/test_architecture.py, as does an arrow that would point upward.
BOXES = {
    "experiments": Box(20, 78, 900, 50, COMPOSE, ("2-D toy example, tables of the papers, comparison of methods",)),
    "cli": Box(
        20,
        168,
        900,
        50,
        COMPOSE,
        ("one module per command; options, what commands share; integrations into other libraries",),
    ),
    "training": Box(20, 264, 416, 50, TRAIN, ("loop, loss, learning rate, checkpoints, sharding",)),
    "data": Box(20, 354, 185, 64, TRAIN, ("images and latents,", "labels, batches in order")),
    "ema": Box(220, 354, 190, 64, TRAIN, ("power-function EMA:", "tracking, rebuilding")),
    "snapshots": Box(220, 446, 190, 50, TRAIN, ("weights and header in a file",)),
    "models": Box(20, 522, 390, 42, TRAIN, ("networks, encoders, VAE",)),
    "guidance": Box(
        450,
        264,
        180,
        300,
        GUIDE,
        (
            "D -> a better D",
            "",
            "second network:",
            "autoguidance, CFG",
            "own network:",
            "PAG, SEG, SAG, ICG, ...",
            "losses, classifiers",
            "rules: APG, rescale",
            "intervals, schedules",
        ),
    ),
    "sampling": Box(
        645, 264, 130, 300, GUIDE, ("D -> images", "", "noise levels", "solvers", "engine: seeds in,", "images out")
    ),
    "metrics": Box(
        790, 264, 130, 300, GUIDE, ("images -> numbers", "", "detectors", "Fréchet distance", "precision, recall")
    ),
    SEAMS: Box(230, 592, 545, 26, GROUND, ()),
    "torch_utils": Box(20, 634, 900, 26, GROUND, ()),
}
INLINE = {
    SEAMS: "the border: (x, sigma, condition) -> D, the clean image",
    "torch_utils": "processes, files, downloads, random numbers, safe pickles",
}
ENTRANCE = "train.py · generate.py · calculate_metrics.py · reconstruct_phema.py · scripts/ · edm2kit-* commands"


def room_of(parts: tuple[str, ...]) -> str:
    """The box that a module belongs to, from its dotted name without the leading package."""
    if parts[0] in SEAMS.split(", "):
        return SEAMS
    return {"integrations": "cli"}.get(parts[0], parts[0])  # what composes the rooms shares a box


def imports(root: Path = ROOT) -> set[tuple[str, str]]:
    """(importing room, imported room) for every import between rooms of edm2kit, those inside functions included."""
    package = root / "edm2kit"
    found = set()
    for file in package.rglob("*.py"):
        own = room_of(file.relative_to(package).with_suffix("").parts)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                top, *parts = name.split(".")
                if top == "edm2kit" and parts:
                    found.add((own, room_of(tuple(parts))))
    return {(own, other) for own, other in found if own != other and own != "__init__"}


def arrows(edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The imports that no chain of other imports implies; two rooms that import each other keep both arrows."""
    mutual = {edge for edge in edges if edge[::-1] in edges}
    one_way = edges - mutual
    return mutual | {edge for edge in one_way if not _implied(edge, one_way | {("experiments", "cli")})}


def _implied(edge: tuple[str, str], edges: set[tuple[str, str]]) -> bool:
    start, goal = edge
    waiting, seen = [room for own, room in edges if own == start and room != goal], set()
    while waiting:
        room = waiting.pop()
        if room == goal:
            return True
        if room not in seen:
            seen.add(room)
            waiting.extend(other for own, other in edges if own == room)
    return False


def svg(edges: set[tuple[str, str]]) -> str:
    """The picture of these imports. Raises KeyError for a room that BOXES does not place."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="Helvetica, Arial, sans-serif">',
        "<title>Rooms of edm2kit and their imports</title>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
        f'orient="auto-start-reverse"><path d="M0,0 L8,4 L0,8 Z" fill="{LINE}"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(WIDTH / 2, 34, ENTRANCE, 14, INK),
        _arrow(WIDTH / 2, 44, WIDTH / 2, BOXES["experiments"].y),
    ]
    parts += [line for own, other in sorted(arrows(edges)) if (line := _connection(own, other, edges))]
    parts += [_box(room, box) for room, box in BOXES.items()]
    return "\n".join([*parts, "</svg>", ""])


def _connection(own: str, other: str, edges: set[tuple[str, str]]) -> str:
    """A vertical arrow that passes beside the boxes between; one with two heads if the rooms import each other."""
    upper, lower = BOXES[own], BOXES[other]
    mutual = (other, own) in edges
    if mutual and upper.y > lower.y:
        return ""
    free = _shared_columns(upper, lower)
    between = [box for box in BOXES.values() if upper.bottom < box.y and box.bottom < lower.y]
    for box in between:
        free -= set(range(box.x - 4, box.right + 5))
    x = _middle_of_longest_run(sorted(free or _shared_columns(upper, lower)))
    return _arrow(x, upper.bottom, x, lower.y, both=mutual)


def _shared_columns(upper: Box, lower: Box) -> set[int]:
    return set(range(max(upper.x, lower.x), min(upper.right, lower.right) + 1))


def _middle_of_longest_run(columns: list[int]) -> float:
    longest: list[int] = []
    run: list[int] = []
    for column in columns:
        run = [*run, column] if run and column == run[-1] + 1 else [column]
        longest = max(longest, run, key=len)
    return (longest[0] + longest[-1]) / 2


def _arrow(x1: float, y1: float, x2: float, y2: float, both: bool = False) -> str:
    start = ' marker-start="url(#head)"' if both else ""
    return (
        f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{LINE}" stroke-width="1.4"{start} '
        'marker-end="url(#head)"/>'
    )


def _text(x: float, y: float, text: str, size: int, colour: str, weight: str = "normal") -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" font-weight="{weight}" fill="{colour}" '
        f'text-anchor="middle">{escape(text)}</text>'
    )


def _box(room: str, box: Box) -> str:
    middle = box.x + box.width / 2
    parts = [
        f'<rect x="{box.x}" y="{box.y}" width="{box.width}" height="{box.height}" rx="6" fill="{box.colour}" '
        f'stroke="{LINE}"/>'
    ]
    if room in INLINE:
        label = f'<tspan font-weight="bold">{escape(room)}</tspan> · {escape(INLINE[room])}'
        text = f'<text x="{middle:g}" y="{box.y + 18}" font-size="13" fill="{INK}" text-anchor="middle">{label}</text>'
        return "\n".join([*parts, text])
    tall = box.height > 100
    pitch = 24 if tall else 17
    top = box.y + 30 if tall else box.y + (box.height - 16 * len(box.lines)) / 2 + 4
    parts.append(_text(middle, top, room, 15, INK, "bold"))
    parts += [_text(middle, top + pitch * (k + 1), line, 12, QUIET) for k, line in enumerate(box.lines) if line]
    return "\n".join(parts)


@click.command()
@click.option(
    "--dest",
    type=click.Path(path_type=Path, dir_okay=False),
    default=PICTURE,
    show_default="docs/architecture.svg",
    help="File to write, an SVG.",
)
def main(dest: Path) -> None:
    """Draw the rooms of the package and who imports whom.

    An arrow means "imports". Arrows that follow from others are left out: cli also imports data, because it imports
    training, which does.
    """
    dest.write_text(svg(imports()), encoding="utf-8")


if __name__ == "__main__":
    main()
