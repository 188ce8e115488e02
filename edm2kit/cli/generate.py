"""Generate images from a trained network, optionally guided by a second one.

The images are in a folder, a PNG per seed, with a record of the settings; both are checked before images are reused.
"""

from edm2kit.cli import help_pages

if __name__ == "__main__":
    help_pages.answer("generate")  # before torch is imported

import contextlib
import dataclasses
import itertools
import json
import re
import shlex
import sys
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image, PngImagePlugin

from edm2kit.cli import click_types as cli
from edm2kit.cli.click_types import check_output, check_without_images, check_writable
from edm2kit.cli.generation import Generation, Request, prepare, with_files
from edm2kit.cli.generation_options import SECTIONS, generation_options
from edm2kit.cli.grids import MAX_IMAGES, check_names, grid_title, parse_weights, write_grid
from edm2kit.cli.npz import check_npz, pack, record_of, remove_parts
from edm2kit.data.labels import RECORD
from edm2kit.guidance.records import settings_differences
from edm2kit.models.encoders import to_image
from edm2kit.sampling.engine import ImageBatch, complete_batches
from edm2kit.torch_utils import dist
from edm2kit.torch_utils.file_threads import FileThreads, Job
from edm2kit.torch_utils.files import (
    atomic_write,
    exclusive,
    file_lock,
    patience,
    provenance,
    remove_partial_files,
    write_json,
)

_SEEDS = re.compile(r"\d{1,18}(-\d{1,18})?(,\d{1,18}(-\d{1,18})?)*")
_folder = click.Path(path_type=Path, file_okay=False)
_file = click.Path(path_type=Path, dir_okay=False)


def seed_ranges(seeds: Iterable[int]) -> str:
    """Seeds as --seeds takes them, such as 0-63,70."""
    runs: list[tuple[int, int]] = []
    for seed in sorted(seeds):
        if runs and seed == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], seed)
        else:
            runs.append((seed, seed))
    texts = []
    for first, last in runs:
        texts.append(str(first) if first == last else f"{first}-{last}")
    return ",".join(texts)


@dataclass(frozen=True)
class ImageFolder:
    """A folder of images {seed:06d}.png, all made with the same `settings`; with `subdirs`, grouped by thousands."""

    path: Path
    subdirs: bool
    settings: Mapping[str, Any]

    def file(self, seed: int) -> Path:
        """Where the image of a seed belongs."""
        folder = self.path / f"{seed // 1000 * 1000:06d}" if self.subdirs else self.path
        return folder / f"{seed:06d}.png"

    @property
    def all_settings(self) -> dict[str, Any]:
        """What the record holds: `subdirs` is a setting too, because a folder has one layout."""
        return {**self.settings, "subdirs": self.subdirs}

    def claim(self, seeds: Sequence[int], overwrite: bool) -> None:
        """Make sure that the images in the folder were made with these settings, or remove them if `overwrite` is set.

        Overwriting removes the images of `seeds` and, if the settings differ, every image of the old record, so that a
        folder never holds a mixture. Writes a record without runs if there is none, so that another process sees the
        settings. To be called on rank 0 while the folder is `held`. Raises ValueError with the differences.
        """
        with self._record_lock():
            self._claim(seeds, overwrite)
            if not (self.path / RECORD).exists():
                write_json(self.path / RECORD, {"settings": self.all_settings, "runs": []})

    def _claim(self, seeds: Sequence[int], overwrite: bool) -> None:
        old = read_record(self.path / RECORD)
        reasons = []
        if old is not None:
            reasons = settings_differences(old["settings"], self.all_settings)
        else:
            existing = [self.file(seed) for seed in seeds if self.file(seed).exists()]
            if existing:
                reasons = [f"{existing[0].name} without {RECORD}"]
        if not overwrite:
            if reasons:
                raise ValueError(
                    f"{self.path} holds images made with other settings ({'; '.join(reasons[:4])}); "
                    "choose another folder, or use --overwrite to replace them"
                )
            return
        self._remove(seeds)
        if old is not None and reasons:
            before = ImageFolder(self.path, old["settings"].get("subdirs", False), {})
            for run in old["runs"]:
                before._remove(cli.IntRanges().convert(run["seeds"], None, None))
            (self.path / RECORD).unlink()

    def _remove(self, seeds: Iterable[int]) -> None:
        for seed in seeds:
            self.file(seed).unlink(missing_ok=True)

    def missing(self, seeds: Sequence[int]) -> list[int]:
        """Those of `seeds` without a complete image, the same list on every rank; each rank checks its share."""
        share = seeds[dist.rank() :: dist.world_size()]
        found = dist.gather_objects([seed for seed in share if not _is_complete_png(self.file(seed), seed)])
        return sorted(seed for part in found for seed in part)

    @contextlib.contextmanager
    def held(self, alone: bool) -> Iterator[None]:
        """Keep others from writing this folder inside the block; those with equal settings may, unless `alone`.

        Raises ValueError on every rank if another process writes there.
        """
        with contextlib.ExitStack() as stack:
            dist.on_rank0(stack.enter_context, exclusive(self.path, shared=not alone))
            for folder in self.path.glob("*000/") if self.subdirs and dist.rank() == 0 else ():
                remove_partial_files(folder)
            yield

    def _record_lock(self) -> contextlib.AbstractContextManager[None]:
        """Held while the record is read and written: another process may write its own runs into it."""
        return file_lock(self.path / f".{RECORD}.lock", patience(str(self.path / RECORD)))

    def note_run(self, run: Mapping[str, Any]) -> None:
        """Add a run to the record, on rank 0; it has at least the key `seeds`, as from `seed_ranges`."""
        with self._record_lock():
            record = read_record(self.path / RECORD) or {"settings": self.all_settings, "runs": []}
            record["runs"].append(dict(run))
            write_json(self.path / RECORD, record)

    def save(self, batches: Iterable[ImageBatch], wanted: Container[int]) -> None:
        """Write the images of the seeds in `wanted`, each batch while the next is generated.

        Raises OSError if that fails, and ValueError if it takes longer than `dist.timeout_sec` allows.
        """
        with FileThreads(4, complete=True) as threads:
            writing: list[Job[None]] = []
            for batch in batches:
                for job in writing:
                    job.result()
                pixels = batch.images.cpu().numpy()
                classes = [None] * len(batch.seeds) if batch.classes is None else batch.classes.tolist()
                images = (one for one in zip(batch.seeds, classes, pixels, strict=True) if one[0] in wanted)
                writing = [threads.submit(f"writing {self.file(one[0])}", self._write, *one) for one in images]
            for job in writing:
                job.result()

    def _write(self, seed: int, index: int | None, pixels: np.ndarray) -> None:
        notes = PngImagePlugin.PngInfo()
        notes.add_text("seed", str(seed))
        if index is not None:
            notes.add_text("class", str(index))
        with atomic_write(self.file(seed)) as file:
            to_image(pixels).save(file, "PNG", pnginfo=notes, compress_level=3)

    def read(self, seeds: Iterable[int]) -> Iterator[tuple[np.ndarray, int | None]]:
        """Yield (pixels, class or None) of each seed; pixels are uint8 [C,H,W].

        Raises ValueError if an image cannot be read.
        """
        for seed in seeds:
            try:
                with Image.open(self.file(seed)) as image:
                    pixels, index = np.asarray(image), image.info.get("class")
            except (OSError, SyntaxError) as error:
                raise ValueError(f"{self.file(seed)} cannot be read ({error}); run the same command again") from error
            pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
            if index is not None and not str(index).isdecimal():
                raise ValueError(
                    f"{self.file(seed)}: the class noted in it is {index!r:.60}; delete it to make it again"
                )
            yield pixels, None if index is None else int(index)


def read_record(path: Path) -> dict[str, Any] | None:
    """The record of images and the runs that made them; None if there is none. Raises ValueError if it is damaged."""
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record["settings"], dict) and all(_SEEDS.fullmatch(run["seeds"]) for run in record["runs"]):
            return record
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise ValueError(f"{path} is damaged; choose another place, or delete it together with its images")


def _is_complete_png(path: Path, seed: int) -> bool:
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()  # the checksum of every chunk, up to the last
            return image.info.get("seed", str(seed)) == str(seed)  # not another picture under this name
    except (OSError, SyntaxError, ValueError):
        return False


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
    click.option(
        "--grid-weights",
        metavar="LIST",
        type=cli.Parsed(parse_weights),
        help="Columns of --grid: weights such as 1,1.5,2 in place of that of --guidance",
    ),
    click.option("--subdirs", is_flag=True, help="Use a subfolder for every thousand seeds"),
    click.option("--overwrite", is_flag=True, help="Replace existing images, also those with other settings"),
)
@cli.device_option()
@cli.timeout_option()
@cli.tf32_option()
@cli.deterministic_option()
def main(
    request: Request,
    seeds: tuple[int, ...],
    outdir: Path | None,
    subdirs: bool,
    npz: Path | None,
    grid: Path | None,
    grid_weights: tuple[float, ...] | None,
    batch: int,
    overwrite: bool,
    device: str,
) -> None:
    """Generate one image per seed, optionally guided by a second network.

    Noise and label of image k depend on seed k alone. --batch and the number of processes change rounding only: single
    pixels by one grey level in fp32, more of them in fp16 and bf16. With --batch 1 on CPUs of one kind, they change
    nothing. Complete images of the same settings are kept: repeat the command to resume.

    \b
    python generate.py --preset cifar10-autoguidance --seeds 0-63 --grid sheet.png
    python generate.py --net main.safetensors --seeds 0-63 --outdir out
    python generate.py --net runs/main --gnet runs/guide --guidance 2 --outdir out
    torchrun --standalone --nproc-per-node 8 generate.py --net ... --outdir out
    """
    single = npz or grid  # the file that holds all images, without --outdir
    if outdir is not None and npz is None:
        path = outdir
    elif single is not None and outdir is None:
        path = single.with_name(f"{single.name}.parts")  # until all images are complete
    else:
        raise click.UsageError("give one of --outdir (a PNG per seed) and --npz (one file), or only --grid (a sheet)")
    if subdirs and outdir is None:
        raise click.UsageError("--subdirs goes with --outdir; --npz and --grid alone write a single file")
    if len(set(seeds)) < len(seeds):
        seed = next(first for first, second in itertools.pairwise(sorted(seeds)) if first == second)
        raise click.UsageError(f"--seeds names {seed} more than once")
    if grid_weights and (grid is None or npz is not None):
        raise click.UsageError("--grid-weights goes with --grid, and not with --npz")
    if grid_weights and request.gnet is None and request.guidance.method == "none":
        raise click.UsageError("--grid-weights needs guidance: give --gnet, or --guidance-method")
    if grid is not None and len(seeds) * len(grid_weights or (0,)) > MAX_IMAGES:
        raise click.UsageError(f"--grid shows at most {MAX_IMAGES} images; --seeds names {len(seeds)}")
    _check_outputs(path, outdir, npz, grid)
    with dist.session(device) as where:
        request = with_files(request)
        if grid is not None and grid_weights:
            columns = [
                _generate_column(request, weight, where, path, subdirs, seeds, batch, overwrite)
                for weight in grid_weights
            ]
            places = ((folder, seed) for row in zip(*columns, strict=True) for seed in seeds for folder in row)
            pixels = (image for folder, seed in places for image, _ in folder.read([seed]))
            titles = [f"weight {weight:g}" for weight in grid_weights]
            dist.on_rank0(write_grid, grid, pixels, f"Guidance, seeds {seed_ranges(seeds)}", len(columns), titles)
            _remove_unless_kept(path, outdir, grid)
            return
        generation = prepare(request, where)
        dist.print0(generation.summary)
        title = "" if grid is None else grid_title(generation.summary, seed_ranges(seeds))
        prompts = by_prompt(generation)
        if len(prompts) > 1:
            if npz is not None:
                raise ValueError("--npz holds the images of one prompt; use --outdir, or give one prompt")
            folders = [ImageFolder(path / prompt_folder(k), subdirs, one.settings) for k, one in enumerate(prompts)]
            for one, folder in zip(prompts, folders, strict=True):
                _generate(one, folder, seeds, batch, overwrite)
            if grid is not None:
                pixels = (image for folder in folders for image, _ in folder.read(seeds))
                dist.on_rank0(write_grid, grid, pixels, title, len(seeds))  # a row per prompt
            _remove_unless_kept(path, outdir, grid)
            return
        folder = ImageFolder(path, subdirs, generation.settings)
        if npz is not None and dist.on_rank0(_is_complete, npz, folder, seeds, overwrite):
            for place in (npz.parent, path):  # what killed processes left there
                dist.on_rank0(remove_partial_files, place)
            dist.print0(f"{npz} already holds these images")
            return
        with folder.held(alone=overwrite or outdir is None):
            _generate(generation, folder, seeds, batch, overwrite)
            if grid is not None:
                dist.on_rank0(write_grid, grid, (image for image, _ in folder.read(seeds)), title)
            if npz is not None:
                dist.on_rank0(_pack, npz, folder, seeds)
            else:
                _remove_unless_kept(path, outdir, grid)


def _remove_unless_kept(path: Path, outdir: Path | None, grid: Path | None) -> None:
    if outdir is None:
        dist.on_rank0(remove_parts, path)
        dist.print0(f"Wrote {grid}; with --outdir the images are kept, too")


def _check_outputs(folder: Path, outdir: Path | None, npz: Path | None, grid: Path | None) -> None:
    """Refuse outputs that cannot be written, or that would replace something else."""
    check_writable(folder)
    others = [
        path for path in folder.glob("[!.]*") if outdir is None and not path.name.startswith(("weight-", "prompt-"))
    ]
    if others and not (folder / RECORD).exists():
        raise ValueError(
            f"{folder} is needed for unfinished images, but holds other files; move it, or choose another name"
        )
    if npz is not None or grid is not None:
        check_names(npz, grid)
    if outdir is not None and npz is None and not (folder / RECORD).exists():
        check_without_images(folder)
    if npz is not None:
        check_output(npz, "set of generated images")
        read_record(record_of(npz))  # raises ValueError if there is another file, which would be replaced
    if grid is not None:
        check_output(grid, "contact sheet")
        if outdir is not None and grid.resolve().is_relative_to(outdir.resolve()) and grid.stem.isdecimal():
            raise ValueError(f"--grid {grid} has the name of one of the images; choose another name")


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
        if generation.engine.possible_classes:
            names = generation.engine.class_names
            run |= {"num_classes": generation.engine.label_dim, "label_names": None if names is None else list(names)}
        dist.on_rank0(folder.note_run, run)
        todo = complete_batches(sorted(seeds), missing, batch_size, generation.engine.device)
        if others := len(todo) - len(missing):
            dist.print0(f"Generating {others} of them again without writing them: rounding depends on the batch")
        # closing ends the progress bar before an error is printed, so that the error is the last line
        with contextlib.closing(generation.batches(todo, batch_size)) as batches:
            folder.save(batches, frozenset(missing))
    dist.barrier()


def by_prompt(generation: Generation) -> list[Generation]:
    """The same for each prompt alone; `generation` itself if there is at most one prompt."""
    texts = getattr(generation.engine.prompts, "texts", ())
    if len(texts) < 2:
        return [generation]
    parts = []
    for number, text in enumerate(texts):
        settings = {**generation.settings, "diffusers": {**generation.settings["diffusers"], "prompts": [text]}}
        engine = dataclasses.replace(generation.engine, classes=[number])
        parts.append(Generation(engine, settings, generation.summary))
    return parts


def prompt_folder(number: int) -> str:
    """The name of the folder for the images of a prompt, if there are several."""
    return f"prompt-{number:04d}"


def _generate_column(
    request: Request,
    weight: float,
    where: torch.device,
    path: Path,
    subdirs: bool,
    seeds: tuple[int, ...],
    batch: int,
    overwrite: bool,
) -> list[ImageFolder]:
    """The images of one guidance weight: a folder per prompt."""
    guidance = dataclasses.replace(request.guidance, weight=weight)
    generation = prepare(dataclasses.replace(request, guidance=guidance), where)
    dist.print0(generation.summary)
    prompts = by_prompt(generation)
    folders = []
    for number, one in enumerate(prompts):
        place = path / f"weight-{weight:g}"
        if len(prompts) > 1:
            place = place / prompt_folder(number)
        folders.append(ImageFolder(place, subdirs, one.settings))
        with folders[-1].held(alone=overwrite):
            _generate(one, folders[-1], seeds, batch, overwrite)
    return folders


def _is_complete(npz: Path, folder: ImageFolder, seeds: tuple[int, ...], overwrite: bool) -> bool:
    if overwrite or not npz.exists():
        return False
    records = read_record(record_of(npz)), read_record(folder.path / RECORD)
    return check_npz(npz, records[0], folder.path, records[1], seeds, folder.all_settings)


def _pack(npz: Path, folder: ImageFolder, seeds: tuple[int, ...]) -> None:
    pack(npz, folder.path, read_record(folder.path / RECORD), seeds, folder.read(seeds))


if __name__ == "__main__":
    main()
