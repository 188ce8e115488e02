"""Contact sheets of generated images: --grid."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from edm2kit.cli.output_kinds import sheet_notes
from edm2kit.data.image_files import IMAGE_EXTENSIONS, labelled_sheet
from edm2kit.models.encoders import to_image
from edm2kit.torch_utils.files import atomic_write

MAX_IMAGES = 1024


def parse_weights(text: str) -> tuple[float, ...]:
    """Guidance weights in a text such as "1,1.5,2". Raises ValueError if one is not a finite number or comes twice."""
    try:
        weights = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{text!r:.60} is not a list of guidance weights; write for example 1,1.5,2") from None
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"{text!r:.60} has a weight that is not finite")
    if len(set(weights)) < len(weights):
        raise ValueError(f"{text!r:.60} names a weight more than once")
    return weights


def check_names(npz: Path | None, grid: Path | None) -> None:
    """Raise ValueError if --npz and --grid name one file, or one with the suffix of another kind."""
    if npz is not None and grid is not None and npz.resolve() == grid.resolve():
        raise ValueError(f"--npz and --grid both name {grid}; give different files")
    others = {*IMAGE_EXTENSIONS, ".npz", ".npy", ".zip", ".json", ".safetensors"}
    for path, kind in ((npz, ".npz"), (grid, ".png")):
        if path is not None and path.suffix.lower() in others - {kind}:
            raise ValueError(f"{path} would hold a {kind} file under another suffix; end its name in {kind}")


def grid_title(summary: str, seeds: str) -> str:
    """What a sheet shows, in a line, from the summary of a generation and its seeds as text."""
    told = dict(line.split(":", 1) for line in summary.splitlines() if ":" in line)
    parts = [told[name].strip() for name in ("Guidance", "Sampler") if name in told]
    if "Guidance" not in told:
        parts.insert(0, "no guidance")
    return ", ".join([*parts, f"seeds {seeds}"])


def write_grid(
    path: Path,
    pixels: Iterable[np.ndarray],
    title: str,
    columns: int | None = None,
    column_titles: Sequence[str] = (),
) -> None:
    """Write images, each uint8 [C, H, W], to a PNG row by row, by default in about as many columns as rows.

    Small images are enlarged (see `labelled_sheet`). Raises ValueError if there are more than `MAX_IMAGES`.
    """
    images = [to_image(array) for array in pixels]
    if len(images) > MAX_IMAGES:
        raise ValueError(f"--grid shows at most {MAX_IMAGES} images; there are {len(images)}")
    sheet = labelled_sheet(
        images, columns or math.ceil(math.sqrt(len(images))), title=title, column_titles=column_titles
    )
    with atomic_write(path) as file:
        sheet.save(file, "PNG", pnginfo=sheet_notes())
