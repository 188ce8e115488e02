"""Make and check training sets: `python scripts/dataset_tool.py --help`."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from edm2kit.cli.click_types import Group
from edm2kit.data import check as dataset_check
from edm2kit.data import convert as dataset_convert
from edm2kit.data import encode as dataset_latents
from edm2kit.data.crops import TRANSFORMS
from edm2kit.data.workers import num_cpus
from edm2kit.models.vae import STABILITY_VAE


class Resolution(click.ParamType):
    """A side such as 64, or width x height such as 256x144, as (width, height)."""

    name = "resolution"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        match = re.fullmatch(r"(\d+)(?:x(\d+))?", str(value))
        if match is None:
            self.fail(f"{value!r} is not a size; write for example 64 or 64x64", param, ctx)
        return int(match[1]), int(match[2] or match[1])


_WORKERS = click.option(
    "--workers", type=click.IntRange(min=1), default=num_cpus, show_default="one per CPU", help="Number of processes."
)


@click.group(cls=Group)
def main() -> None:
    """Make and check training sets."""


@main.command()
@click.option("--source", type=click.Path(path_type=Path), required=True, help="Folder or zip of images.")
@click.option("--dest", type=click.Path(path_type=Path), required=True, help="Folder or .zip to write.")
@click.option("--resolution", type=Resolution(), help="Size of the result, such as 64 or 64x64.  [default: as it is]")
@click.option("--transform", type=click.Choice(list(TRANSFORMS)), default="none", show_default=True, help="See above.")
@click.option(
    "--max-images", type=click.IntRange(min=1), help="Take at most so many, equally from each class.  [default: all]"
)
@click.option(
    "--labels",
    "label_source",
    type=click.Choice(["auto", "json", "folders", "none"]),
    default="auto",
    show_default=True,
    help="Classes from dataset.json in the source, from top-level folders, or (auto) whichever there is; images of "
    "generate.py keep theirs.",
)
@click.option("--skip-broken", is_flag=True, help="Leave out images that cannot be read, and name them.")
@_WORKERS
def convert(**options: Any) -> None:
    """Turn images into a training set: square PNG files of one size, and dataset.json.

    The work is kept in DEST.partial until it is whole; a command that was stopped goes on when it is run again.
    Neither the .zip nor the PNG files in it are compressed: training reads them without decoding. To make an existing
    training set faster to read, convert it once more, without --resolution and --transform.

    \b
    --transform
      none                  The whole image, resized (Lanczos) to --resolution if
                            that is given; only for images that are square.
      center-crop           Largest central square, resized (Lanczos).
      center-crop-wide      Largest central part of the shape of --resolution,
                            say 256x144, resized (Lanczos), with black bars above
                            and below to make it square: 256x256.
      center-crop-dhariwal  As ImageNet in ADM and EDM2: halved by averaging,
                            resized (bicubic), central square. For comparison
                            with published numbers.

    Images smaller than --resolution are enlarged. Grey images stay grey if all are; else all become RGB.
    Transparency is dropped, 16-bit images keep their upper 8 bits, and EXIF orientation is ignored, as in the tools
    that made the published data sets. The side of the result must be a power of two.
    """
    dataset_convert.convert(**options)


def _latent_options(command: Callable[..., None]) -> Callable[..., None]:
    """What encode and decode share."""
    threads = click.option("--workers", type=click.IntRange(min=1), default=4, show_default=True, help="Readers each.")
    for option in (
        click.option("--device", default="auto", show_default=True, help="auto, cuda, mps or cpu."),
        threads,
        click.option(
            "--batch", type=click.IntRange(min=1), default=32, show_default=True, help="Images at once, each."
        ),
        click.option("--max-images", type=click.IntRange(min=1), help="Take so many, evenly spread.  [default: all]"),
        click.option("--dest", type=click.Path(path_type=Path), required=True, help="Folder or .zip to write."),
        click.option("--source", type=click.Path(path_type=Path), required=True, help="Training set, folder or zip."),
    ):
        command = option(command)
    return command


@main.command()
@_latent_options
@click.option("--vae", metavar="NAME|DIR", default=STABILITY_VAE, show_default=True, help="Hub name, or a folder.")
@click.option("--dtype", type=click.Choice(list(dataset_latents.DTYPES)), default="fp32", show_default=True)
def encode(**options: Any) -> None:
    """Turn pixels into latents of the VAE, which latent networks train on.

    Stores the mean and the standard deviation of the posterior, from which training draws. Runs on all GPUs under
    torchrun. A command that was stopped goes on when it is run again; what it will need of the disk is told first.
    """
    dataset_latents.encode(**options)


@main.command()
@_latent_options
@click.option("--vae", metavar="NAME|DIR", help="Where the VAE lies.  [default: as encode recorded]")
def decode(**options: Any) -> None:
    """Turn latents that encode wrote back into pixels, to see what the VAE keeps of them."""
    dataset_latents.decode(**options)


@main.command()
@click.option("--source", type=click.Path(path_type=Path), required=True, help="Folder or zip to look at.")
@_WORKERS
def check(source: Path, workers: int) -> None:
    """Read every file of a training set; print counts, shapes and classes, and name everything that is wrong.

    Exit code 1 where something is wrong.
    """
    if not dataset_check.check(source, workers):
        sys.exit(1)


if __name__ == "__main__":
    main()
