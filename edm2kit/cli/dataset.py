"""Make and check training sets: edm2kit-dataset, or scripts/dataset_tool.py."""

from edm2kit.cli import help_pages

if __name__ == "__main__":
    help_pages.answer("dataset")  # before torch is imported

import os
import re
import sys
from pathlib import Path
from typing import Any

import click

from edm2kit.cli.click_types import (
    AtLeast,
    Decorator,
    Group,
    Parsed,
    check_writable,
    device_option,
    parse_duration_sec,
    section,
    timeout_option,
)
from edm2kit.data import check as dataset_check
from edm2kit.data import convert as dataset_convert
from edm2kit.data import encode as dataset_encode
from edm2kit.data.crops import TRANSFORMS
from edm2kit.data.image_files import IMAGE_EXTENSIONS
from edm2kit.data.workers import num_cpus
from edm2kit.models.vae import STABILITY_VAE
from edm2kit.torch_utils.dist import one_line, pick_device


class Resolution(click.ParamType):
    """A side such as 64, or width x height such as 256x144, as (width, height)."""

    name = "resolution"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        match = re.fullmatch(r"(\d+)(?:x(\d+))?", str(value))
        if match is None:
            self.fail(f"{value!r:.60} is not a size; write for example 64 or 64x64", param, ctx)
        return int(match[1]), int(match[2] or match[1])


_OTHER_SUFFIXES = (".tar", ".tgz", ".gz", ".xz", ".7z", ".rar", ".npz", ".npy", ".h5", ".tfrecord", *IMAGE_EXTENSIONS)
_SOURCE_HELP = "Training set: folder, zip, .npy arrays, or hf:FOLDER"


class Destination(click.Path):
    """A data set to write; refused at once if its place cannot be written."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if path.is_symlink() and path.is_dir():
            path = path.resolve()  # the link stays, and the folder that it leads to is replaced
        try:
            check_writable(path if path.is_symlink() and not path.exists() else path.absolute().parent)
            if path.is_mount():
                raise ValueError(f"{path} is a mounted volume, which cannot be replaced; name a folder in it")
            if path.suffix.lower() in _OTHER_SUFFIXES and not path.is_dir():
                raise ValueError(f"{path} has the suffix of another kind of file; name a folder or a .zip")
        except (ValueError, OSError) as error:
            self.fail(one_line(str(error)), param, ctx)
        return path


_dest = click.option(
    "--dest", metavar="ZIP|DIR", type=Destination(), required=True, help="Folder or .zip file to write"
)
_processes = click.option(
    "--workers",
    metavar="N",
    type=click.IntRange(min=1),
    default=num_cpus,
    show_default=False,
    help="Number of worker processes  [default: one per CPU]",
)


@click.group(cls=Group)
def main() -> None:
    """Make and check training sets.

    \b
    From images to a training set:      convert
    From pixels to latents and back:    encode, decode
    Find everything that is wrong:      check
    Settings for a training set:        advise

    The same command is called edm2kit-dataset and scripts/dataset_tool.py.
    """


@main.command()
@section(
    "Input and output",
    click.option(
        "--source",
        metavar="PATH",
        required=True,
        help="Folder (with subfolders) or zip of images, hf:FOLDER, or CIFAR's archive cifar-10-python.tar.gz",
    ),
    _dest,
    click.option(
        "--max-images",
        metavar="N",
        type=click.IntRange(min=1),
        help="Maximum number of images, the same for each class  [default: all]",
    ),
    click.option(
        "--labels",
        "label_source",
        type=click.Choice(["auto", "json", "folders", "none"]),
        default="auto",
        help="Labels from dataset.json, from top-level folders, or from whichever is there (auto)",
    ),
    click.option("--skip-broken", is_flag=True, help="Skip and list images that cannot be read, instead of stopping"),
)
@section(
    "Image size",
    click.option(
        "--resolution",
        type=Resolution(),
        help="Width and height of the result, such as 64 or 64x64  [default: unchanged]",
    ),
    click.option("--transform", type=click.Choice(list(TRANSFORMS)), default="none", help="How to make images square"),
    click.option("--as-stored", is_flag=True, help="Ignore EXIF orientation and color profiles"),
)
@section(
    "Storage and speed",
    click.option(
        "--store",
        type=click.Choice(list(dataset_convert.STORES)),
        default="plain",
        help="plain: read without decoding; compact: smaller, compressed",
    ),
    _processes,
    timeout_option(),
)
def convert(**options: Any) -> None:
    """Convert images to a training set: square PNG files of one size, and dataset.json with their labels.

    \b
    python scripts/dataset_tool.py convert --source photos --dest photos64.zip \\
        --resolution 64x64 --transform center-crop

    \b
    --transform
      none                  The whole image, resized (Lanczos) to --resolution if
                            that is given; only for images that are square.
      center-crop           Largest central square, resized (Lanczos).
      center-crop-wide      Largest central part with the aspect ratio of
                            --resolution, such as 256x144, resized (Lanczos), with
                            black bars above and below to make it square: 256x256.
      center-crop-dhariwal  As for ImageNet in ADM and EDM2: halved by averaging,
                            resized (bicubic), central square. For comparison
                            with published numbers.

    The side of the result must be a power of two. Images smaller than --resolution are enlarged. The result is grey if
    all images are grey, otherwise RGB. Photos are turned upright (EXIF) and converted to sRGB; the tools that made the
    published data sets do neither: --as-stored. Transparency is dropped, 16-bit images keep their upper 8 bits. HEIC
    photos need the extra heic: pip install 'edm2kit[heic]'.

    Labels in dataset.json are classes or lists of floats. Images of generate.py keep the classes noted in them.

    cifar-10-python.tar.gz and cifar-100-python.tar.gz are read as they are published; ?split=test behind the name takes
    their test images.

    Unfinished work stays in DEST.partial; run the same command again to resume. The PNG files are not compressed, so
    that training reads them without decoding; --store compact makes photos smaller and reading slower
    (docs/own-images.md has numbers). To make an existing training set faster to read, convert it again without
    --resolution and --transform.
    """
    dataset_convert.convert(**options)


_max_images = click.option(
    "--max-images",
    metavar="N",
    type=click.IntRange(min=1),
    help="Maximum number of images, evenly spread over the source  [default: all]",
)


def _vae_options(vae: Decorator) -> Decorator:
    return section(
        "VAE and speed",
        vae,
        click.option(
            "--batch", metavar="N", type=click.IntRange(min=1), default=32, help="Images per process at a time"
        ),
        click.option(
            "--workers", metavar="N", type=click.IntRange(min=1), default=4, help="Reading threads per process"
        ),
        device_option(),
        timeout_option(),
    )


@main.command()
@section(
    "Input and output",
    click.option("--source", metavar="PATH", required=True, help=_SOURCE_HELP),
    _dest,
    _max_images,
    click.option(
        "--dtype",
        type=click.Choice(list(dataset_encode.DTYPES)),
        default="fp32",
        help="Precision of stored latents",
    ),
)
@_vae_options(
    click.option("--vae", metavar="NAME|DIR", default=STABILITY_VAE, help="VAE: a Hugging Face name or a folder")
)
def encode(**options: Any) -> None:
    """Encode pixels to the latents of a VAE, which latent networks are trained on.

    Stores the mean and standard deviation of the posterior; training samples from it. Use torchrun for several GPUs.
    Prints the disk space it needs. Run the same command again to resume.
    """
    dataset_encode.encode(**options)


@main.command()
@section(
    "Input and output",
    click.option("--source", metavar="PATH", required=True, help="Latents, as written by encode"),
    _dest,
    _max_images,
)
@_vae_options(
    click.option("--vae", metavar="NAME|DIR", help="Name or folder of the same VAE  [default: as encode recorded]")
)
def decode(**options: Any) -> None:
    """Decode latents to pixels, to see how much detail the VAE keeps."""
    dataset_encode.decode(**options)


@main.command()
@click.option("--source", metavar="PATH", required=True, help=_SOURCE_HELP)
@click.option(
    "--budget",
    metavar="TIME",
    type=Parsed(parse_duration_sec),
    required=True,
    help="Training time of both networks, such as 45m or 3h",
)
@click.option(
    "--outdir",
    metavar="DIR",
    type=click.Path(file_okay=False),
    required=True,
    help="Folder to write configurations and commands to",
)
@click.option("--channels", metavar="N", type=int, help="Width of the main network  [default: what fits the budget]")
@click.option(
    "--throughput",
    metavar="R",
    type=AtLeast(float, 1e-6),
    help="Images/s with --channels  [default: measured]",
)
@click.option("--device", metavar="NAME", default="auto", help="Device that will train: auto, cuda, mps or cpu")
def advise(
    source: str, budget: float, outdir: str, channels: int | None, throughput: float | None, device: str
) -> None:
    """Choose settings for a training set: configurations of a main network and its guide, and all commands.

    Looks at the images (number, resolution, classes) and at this machine (images per second), and writes main.yaml,
    guide.yaml and commands.sh, which explain themselves. The same as train.py --auto. docs/own-images.md has the rules.

    \b
    python scripts/dataset_tool.py advise --source photos64.zip --budget 3h --outdir runs/photos
    """
    from edm2kit.cli.advice import advise as write_advice  # training, which no other command here needs

    write_advice(source, budget, outdir, pick_device(device), throughput, channels)


@main.command()
@click.option("--source", metavar="PATH", required=True, help=_SOURCE_HELP)
@_processes
@timeout_option()
def check(source: str, workers: int) -> None:
    """Read every file of a training set; print counts, shapes and labels, and list everything that is wrong.

    The exit code is 1 if there are problems.
    """
    if not dataset_check.check(source, workers):
        sys.exit(1)


if __name__ == "__main__":
    main()
