"""Reading training images in random order: 64x64 RGB, and latents."""

import io
import itertools
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image

from benchmarks import harness
from benchmarks.harness import Comparison, Work
from benchmarks.plain_io import PlainDataset
from edm2kit.cli import click_types as cli
from edm2kit.data.batches import GlobalOrder, training_batches
from edm2kit.data.dataset import ImageDataset
from edm2kit.data.image_files import encode_png

BATCH = 64
_BATCHES = 30  # per run; the next run continues in the same endless order


@click.command(cls=cli.Command)
@harness.runs_option()
@harness.only_option(["rgb", "latents", "latents_fp16"])
@click.option("--num", default=6144, show_default=True, help="Images; a tenth of that in latents")
@harness.out_option
def main(runs: int, only: tuple[str, ...], num: int, out: Path) -> None:
    """Compare reading batches with decoding files one by one; writes data_*.json."""
    for name in only or ("rgb", "latents", "latents_fp16"):
        with tempfile.TemporaryDirectory() as folder:
            job = pixels(Path(folder), num) if name == "rgb" else latents(Path(folder), num // 10, "fp16" in name)
            harness.save(harness.measure(job, runs), out)


def pixels(folder: Path, num: int) -> Comparison:
    """Smooth pictures, stored by Pillow without compression (plain) and as dataset_tool.py stores them."""
    pictures = [_picture(k) for k in range(num)]
    write_zip(folder / "pillow.zip", [_pillow_png(picture) for picture in pictures], "png")
    write_zip(folder / "ours.zip", [encode_png(picture) for picture in pictures], "png")
    contenders = {
        "plain": plain(folder / "pillow.zip"),
        "plain, of our files": plain(folder / "ours.zip"),
        "training_batches": batches(folder / "ours.zip"),
        "training_batches, of Pillow's files": batches(folder / "pillow.zip"),
    }
    size = ImageDataset(folder / "ours.zip").read(np.zeros(1, int)).nbytes
    return job("data_rgb64", contenders, 20, folder / "pillow.zip", folder / "ours.zip", size)


def latents(folder: Path, num: int, half: bool) -> Comparison:
    """Latents as `dataset_tool.py encode` stores them; both ways read the same files."""
    rng = np.random.default_rng(0)
    dtype = np.float16 if half else np.float32
    files = [_npy(rng.standard_normal((8, 64, 64)).astype(dtype)) for _ in range(num)]
    path = write_zip(folder / "latents.zip", files, "npy")
    contenders = {"plain": plain(path), "training_batches": batches(path)}
    name = "data_latents_fp16" if half else "data_latents"
    return job(name, contenders, None if half else 8, path, path, len(files[0]))


def job(
    name: str, contenders: dict[str, Callable], goal: float | None, plain_path: Path, path: Path, size: int
) -> Comparison:
    return Comparison(
        name,
        contenders,
        work=Work(_BATCHES * BATCH * size, "bytes", "file_read"),
        goals={} if goal is None else {"training_batches": goal},
        errors={"training_batches": difference(plain_path, path)},
        error_kind="largest difference of a value",
        notes={"images": _BATCHES * BATCH, "batch": BATCH, "files": "in the operating system's cache", "workers": 0},
    )


def write_zip(path: Path, files: list[bytes], suffix: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for k, data in enumerate(files):
            archive.writestr(f"{k // 1000:05d}/img{k:08d}.{suffix}", data)
    return path


def plain(path: Path) -> Callable[[], None]:
    """Read the next images of a random order, one at a time."""
    dataset = PlainDataset(path)
    order, position = GlobalOrder(len(dataset), 0), itertools.count(0, BATCH)

    def run() -> None:
        for _ in range(_BATCHES):
            dataset.batch(order.indices(next(position), BATCH))

    return run


def batches(path: Path) -> Callable[[], None]:
    """Take the next batches as training does, without workers."""
    dataset = ImageDataset(path)
    stream = training_batches(dataset, GlobalOrder(len(dataset), 0), 0, BATCH, rank=0, world_size=1)

    def run() -> None:
        for _ in range(_BATCHES):
            next(stream)

    return run


def difference(plain_path: Path, path: Path) -> float:
    """Largest difference of a value over all images; 0 if both ways read the same."""
    slow, fast = PlainDataset(plain_path), ImageDataset(path)
    indices = np.random.default_rng(0).permutation(len(fast))
    worst = 0.0
    for part in np.array_split(indices, max(1, len(fast) // BATCH)):
        raw, _ = slow.batch(part)
        worst = max(worst, float((raw.float() - torch.from_numpy(fast.read(part)).float()).abs().max()))
    return worst


def _picture(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    return Image.fromarray(noise).resize((64, 64), Image.Resampling.BICUBIC)


def _pillow_png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="png", compress_level=0)
    return file.getvalue()


def _npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


if __name__ == "__main__":
    main()
