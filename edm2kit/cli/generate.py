"""Draw images from a trained network, alone or guided by a second one."""

import contextlib
import math
import os
import shlex
import shutil
import sys
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import numpy as np

from edm2kit.cli import click_types as cli
from edm2kit.cli.generation import Generation, Request, prepare
from edm2kit.cli.generation_options import generation_options
from edm2kit.cli.image_folder import ImageFolder, contact_sheet, read_record, seed_ranges, to_image
from edm2kit.cli.npz import write_npz
from edm2kit.data.labels import RECORD
from edm2kit.torch_utils import dist
from edm2kit.torch_utils.files import atomic_write
from edm2kit.torch_utils.provenance import provenance
from edm2kit.torch_utils.records import differences

_MAX_GRID = 1024


@click.command(cls=cli.Command)
@generation_options
@click.option("--seeds", type=cli.IntRanges(), default="16-19", show_default=True, help="One image each: 0-63,100.")
@click.option("--outdir", type=click.Path(path_type=Path, file_okay=False), help="Folder for one PNG per seed.")
@click.option("--subdirs", is_flag=True, help="A folder for every thousand seeds.")
@click.option("--npz", type=click.Path(path_type=Path, dir_okay=False), help="One file of all images, not PNGs.")
@click.option("--grid", type=click.Path(path_type=Path, dir_okay=False), help="Contact sheet of all images, a PNG.")
@click.option("--batch", type=click.IntRange(min=1), default=32, show_default=True, help="Images at once, per process.")
@click.option("--overwrite", is_flag=True, help="Replace images that are there, and those of other settings.")
@click.option("--device", default="auto", show_default=True, help="auto, cuda, mps or cpu.")
def main(
    request: Request,
    seeds: tuple[int, ...],
    outdir: Path | None,
    subdirs: bool,
    npz: Path | None,
    grid: Path | None,
    batch: int,
    overwrite: bool,
    device: str,
) -> None:
    """Draw one image per seed.

    Image k depends on seed k alone, whatever --batch and the number of processes (torchrun). Images that are there,
    whole and made with the same settings are kept: a run that was cut off continues where it stopped.

    \b
    python generate.py --net main.safetensors --seeds 0-63 --outdir out
    python generate.py --net main.safetensors --gnet weaker.safetensors --guidance 2 --seeds 0-63 --outdir out
    torchrun --standalone --nproc-per-node 8 generate.py --net ... --seeds 0-49999 --outdir out --subdirs
    """
    _check_outputs(seeds, outdir, npz, grid)
    if subdirs and outdir is None:
        raise click.UsageError("--subdirs goes with --outdir")
    with dist.session(device) as where:
        generation = prepare(request, where)
        dist.print0(generation.summary)
        folder = ImageFolder(outdir if npz is None else _parts_of(npz), subdirs, generation.settings)
        if npz is not None and dist.on_rank0(_is_done, npz, seeds, folder.all_settings, overwrite):
            dist.print0(f"{npz} holds these images already")
            return
        _draw(generation, folder, seeds, batch, overwrite)
        if grid is not None:
            dist.on_rank0(_write_grid, grid, folder, seeds)
        if npz is not None:
            dist.on_rank0(_pack, npz, folder, seeds)


def _check_outputs(seeds: tuple[int, ...], outdir: Path | None, npz: Path | None, grid: Path | None) -> None:
    if (outdir is None) == (npz is None):
        raise click.UsageError("give one of --outdir (a PNG per seed) and --npz (one file)")
    if twice := [seed for seed, count in Counter(seeds).items() if count > 1]:
        raise click.UsageError(f"--seeds names {twice[0]} more than once")
    if grid is not None and len(seeds) > _MAX_GRID:
        raise click.UsageError(f"--grid shows at most {_MAX_GRID} images; --seeds names {len(seeds)}")


def _draw(generation: Generation, folder: ImageFolder, seeds: tuple[int, ...], batch: int, overwrite: bool) -> None:
    """Make the images that the folder lacks."""
    folder.claim(seeds, overwrite)
    missing = folder.missing(seeds)
    if len(missing) < len(seeds):
        dist.print0(f"{len(seeds) - len(missing)} of {len(seeds)} images are there already")
    if missing:
        run = {
            "seeds": seed_ranges(missing),
            "command": shlex.join(sys.argv),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "batch": batch,
            "processes": dist.world_size(),
            **provenance(generation.engine.device),
        }
        folder.note_run(run)
        # an error leaves the progress bar at once, so that its own line is the last one
        with contextlib.closing(generation.batches(missing, batch)) as batches:
            folder.save(batches)
    dist.barrier()


def _write_grid(path: Path, folder: ImageFolder, seeds: tuple[int, ...]) -> None:
    images = [to_image(pixels) for pixels, _ in folder.read(seeds)]
    with atomic_write(path) as file:
        contact_sheet(images, columns=math.ceil(math.sqrt(len(images)))).save(file, "PNG")


def _parts_of(npz: Path) -> Path:
    """Where the images of an unfinished .npz gather, so that a run that was cut off can continue."""
    return npz.with_name(f"{npz.name}.parts")


def _record_of(npz: Path) -> Path:
    return npz.with_name(f"{npz.name}.json")


def _is_done(npz: Path, seeds: tuple[int, ...], settings: dict[str, Any], overwrite: bool) -> bool:
    """Whether `npz` is what this run would make. Raises ValueError where it is something else that stays."""
    if overwrite or not npz.exists():
        return False
    record = read_record(_record_of(npz))
    if record is None:
        raise ValueError(f"{npz} exists, without the record {_record_of(npz).name}; --overwrite replaces it")
    if changed := differences(record["settings"], settings):
        raise ValueError(f"{npz} was made otherwise ({'; '.join(changed[:4])}); --overwrite replaces it")
    with np.load(npz) as arrays:
        if arrays["seeds"].tolist() != list(seeds):
            raise ValueError(f"{npz} holds other seeds; choose another file, or --overwrite to replace it")
    return True


def _pack(npz: Path, folder: ImageFolder, seeds: tuple[int, ...]) -> None:
    write_npz(npz, seeds, folder.read(seeds))
    os.replace(folder.path / RECORD, _record_of(npz))
    shutil.rmtree(folder.path)


if __name__ == "__main__":
    main()
