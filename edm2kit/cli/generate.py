"""Generate images from a trained network, optionally guided by a second one."""

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
from edm2kit.cli.generation_options import SECTIONS, generation_options
from edm2kit.cli.image_folder import ImageFolder, read_record, seed_ranges
from edm2kit.cli.npz import write_npz
from edm2kit.data.image_files import contact_sheet, to_image
from edm2kit.data.labels import RECORD
from edm2kit.guidance.records import settings_differences
from edm2kit.torch_utils import dist
from edm2kit.torch_utils.files import atomic_write
from edm2kit.torch_utils.records import provenance

_MAX_GRID = 1024
_folder = click.Path(path_type=Path, file_okay=False)
_file = click.Path(path_type=Path, dir_okay=False)


@click.command(cls=cli.Command, sections=SECTIONS)
@cli.section(
    "Seeds and output",
    click.option("--seeds", type=cli.IntRanges(), default="16-19", help="Generate one image per seed: 0-63,100"),
    click.option("--outdir", metavar="DIR", type=_folder, help="Folder for a PNG per seed"),
)
@generation_options
@cli.section(
    "Seeds and output",
    click.option("--batch", metavar="N", type=cli.AtLeast(int, 1), default=32, help="Images per batch and process"),
    click.option("--npz", type=_file, help="Write all images to one file instead of a folder"),
    click.option("--grid", type=_file, help="Contact sheet of all images, a PNG"),
    click.option("--subdirs", is_flag=True, help="Use a subfolder for every thousand seeds"),
    click.option("--overwrite", is_flag=True, help="Replace existing images, also those with other settings"),
)
@cli.device_option()
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
    """Generate one image per seed, optionally guided by a second network.

    Image k depends on seed k alone, whatever --batch and the number of processes. Complete images of the same settings
    are kept: repeat the command to resume.

    \b
    python generate.py --net main.safetensors --seeds 0-63 --outdir out
    python generate.py --net main.safetensors --gnet weaker.safetensors \\
        --guidance 2 --seeds 0-63 --outdir out
    torchrun --standalone --nproc-per-node 8 generate.py --net ... --outdir out
    """
    path = _folder_of(outdir, npz)
    if subdirs and outdir is None:
        raise click.UsageError("--subdirs goes with --outdir")
    for seed, count in Counter(seeds).items():
        if count > 1:
            raise click.UsageError(f"--seeds names {seed} more than once")
    if grid is not None and len(seeds) > _MAX_GRID:
        raise click.UsageError(f"--grid shows at most {_MAX_GRID} images; --seeds names {len(seeds)}")
    with dist.session(device) as where:
        generation = prepare(request, where)
        dist.print0(generation.summary)
        folder = ImageFolder(path, subdirs, generation.settings)
        if npz is not None and dist.on_rank0(_is_complete, npz, seeds, folder.all_settings, overwrite):
            dist.print0(f"{npz} already holds these images")
            return
        _generate(generation, folder, seeds, batch, overwrite)
        if grid is not None:
            dist.on_rank0(_write_grid, grid, folder, seeds)
        if npz is not None:
            dist.on_rank0(_pack, npz, folder, seeds)


def _folder_of(outdir: Path | None, npz: Path | None) -> Path:
    """The folder that images are written to: --outdir, or one beside --npz until all images are complete."""
    if outdir is not None and npz is None:
        return outdir
    if npz is not None and outdir is None:
        return npz.with_name(f"{npz.name}.parts")
    raise click.UsageError("give one of --outdir (a PNG per seed) and --npz (one file)")


def _generate(
    generation: Generation, folder: ImageFolder, seeds: tuple[int, ...], batch_size: int, overwrite: bool
) -> None:
    """Generate the images that are missing in the folder."""
    dist.on_rank0(folder.claim, seeds, overwrite)
    missing = folder.missing(seeds)
    if len(missing) < len(seeds):
        dist.print0(f"Skipping {len(seeds) - len(missing)} of {len(seeds)} images that already exist")
    if missing:
        run = {
            "seeds": seed_ranges(missing),
            "command": shlex.join(sys.argv),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "batch": batch_size,
            "processes": dist.world_size(),
            **provenance(generation.engine.device),
        }
        dist.on_rank0(folder.note_run, run)
        # closing ends the progress bar before an error is printed, so that the error is the last line
        with contextlib.closing(generation.batches(missing, batch_size)) as batches:
            folder.save(batches)
    dist.barrier()


def _write_grid(path: Path, folder: ImageFolder, seeds: tuple[int, ...]) -> None:
    images = [to_image(pixels) for pixels, _ in folder.read(seeds)]
    with atomic_write(path) as file:
        contact_sheet(images, columns=math.ceil(math.sqrt(len(images)))).save(file, "PNG")


def _record_of(npz: Path) -> Path:
    return npz.with_name(f"{npz.name}.json")


def _is_complete(npz: Path, seeds: tuple[int, ...], settings: dict[str, Any], overwrite: bool) -> bool:
    """Whether `npz` already holds the images of this run. Raises ValueError if it holds others that must stay."""
    if overwrite or not npz.exists():
        return False
    record = read_record(_record_of(npz))
    if record is None:
        raise ValueError(f"{npz} exists, but its record {_record_of(npz).name} does not; use --overwrite to replace it")
    changed = settings_differences(record["settings"], settings)
    if changed:
        raise ValueError(
            f"{npz} was made with other settings ({'; '.join(changed[:4])}); use --overwrite to replace it"
        )
    with np.load(npz) as arrays:
        if arrays["seeds"].tolist() != list(seeds):
            raise ValueError(f"{npz} holds other seeds; choose another file, or use --overwrite to replace it")
    return True


def _pack(npz: Path, folder: ImageFolder, seeds: tuple[int, ...]) -> None:
    write_npz(npz, seeds, folder.read(seeds))
    os.replace(folder.path / RECORD, _record_of(npz))
    shutil.rmtree(folder.path)


if __name__ == "__main__":
    main()
