"""What people wait for when they try the project: commands as a user runs them, each as a process of its own."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image

from benchmarks import harness
from benchmarks.trainers import preset_config
from edm2kit.cli import click_types as cli
from edm2kit.metrics.detectors.inception import InceptionV3
from edm2kit.metrics.detectors.registry import load_detector
from edm2kit.models import Precond, full_architecture
from edm2kit.snapshots.file_format import Header, save_snapshot
from edm2kit.torch_utils.files import provenance

COMMANDS = (
    "generate.py", "train.py", "calculate_metrics.py", "reconstruct_phema.py", "scripts/dataset_tool.py",
    "scripts/reproduce.py", "scripts/distill.py", "scripts/train_classifier.py", "scripts/convert_snapshot.py",
    "scripts/count_flops.py", "scripts/toy_example.py", "scripts/compare_guidance.py", "scripts/tune.py",
    "scripts/report.py",
)  # fmt: skip
MODULES = (
    "generate", "train", "metrics", "phema", "dataset", "reproduce", "distill", "classifier", "convert", "flops", "toy",
    "compare", "tune", "report",
)  # fmt: skip
NETWORK = "edm2-img64-xs"  # pixels: its images need no VAE
_SCORED = 50_000


@dataclass(frozen=True)
class Row:
    """One figure: `value` in `unit`, and the `goal`, which is reached by lower values unless `more_is_better`.

    A figure to compare others with has no goal.
    """

    name: str
    value: float
    unit: str
    goal: float | None
    more_is_better: bool = False
    note: str = ""

    @property
    def is_reached(self) -> bool:
        if self.goal is None:
            return True
        return self.value >= self.goal if self.more_is_better else self.value <= self.goal


@click.command(cls=cli.Command)
@click.option("--pictures", default=2000, show_default=True, help="Number of pictures to convert")
@click.option("--demo", is_flag=True, help="Also run scripts/demo.sh, which takes up to 15 minutes")
@harness.out_option
def main(pictures: int, demo: bool, out: Path) -> None:
    """Time --help of every command, a first image, a conversion and features for a score; under 5 minutes."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for row in measure(Path(folder), pictures, demo):
            rows.append(row)
            click.echo(f"{row.name}: {row.value:.3g} {row.unit}")
    record = {
        "job": "end_to_end",
        "kind": "end_to_end",
        "notes": {"skipped": {} if demo else {"demo.sh in total": "python -m benchmarks.end_to_end --demo"}},
        "rows": [vars(row) | {"is_reached": row.is_reached} for row in rows],
        "command": harness.command(),
        "provenance": provenance(),
        "cpu": harness.cpu(),
    }
    harness.save(record, out)


def measure(folder: Path, pictures: int, demo: bool = False) -> Iterator[Row]:
    """Every figure."""
    for command in COMMANDS:
        times = [seconds(command, "--help") for _ in range(3)]
        yield Row(f"`{command} --help`", min(times), "s", 1.0, note="least of 3; not held up by `import torch`")
    yield Row("`import torch`, for comparison", min(_seconds_of(["-c", "import torch"]) for _ in range(3)), "s", None)
    for name in MODULES:
        times = [_seconds_of(["-c", f"import edm2kit.cli.{name}"]) for _ in range(3)]
        yield Row(
            f"import of edm2kit.cli.{name}", min(times), "s", 2.0, note="least of 3; `import torch` is most of it"
        )
    yield first_image(folder)
    yield conversion(folder, pictures)
    yield scoring()
    yield scoring_lite()
    if demo:
        yield demonstration(folder)


def seconds(command: str, *arguments: object) -> float:
    """The time that a command of the project takes; RuntimeError with its output if it fails."""
    return _seconds_of([str(harness.ROOT / command), *map(str, arguments)])


def _seconds_of(arguments: list[str]) -> float:
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=harness.ROOT)
    elapsed = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed: {done.stderr}")
    return elapsed


def first_image(folder: Path) -> Row:
    """generate.py with a network of published size and random weights: one image, all steps, loading included."""
    config = preset_config(NETWORK)
    architecture = full_architecture(64, 3, 1000, config.sigma_data, config.network)
    torch.manual_seed(0)
    snapshot = folder / "net.safetensors"
    save_snapshot(snapshot, Precond(**architecture).state_dict(), Header(architecture, {"kind": "rgb"}, 0, None))
    elapsed = seconds("generate.py", "--net", snapshot, "--seeds", 0, "--outdir", folder / "images", "--device", "cpu")
    return Row(f"first image of {NETWORK}, 32 steps, unguided", elapsed, "s", 45.0)


def conversion(folder: Path, count: int) -> Row:
    """dataset_tool.py convert: photos of 400x300 to 64x64, on all cores."""
    source, random = folder / "photos", np.random.default_rng(0)
    source.mkdir()
    coarse = random.integers(0, 256, (count, 30, 40, 3), dtype=np.uint8)
    for k, pixels in enumerate(coarse):
        Image.fromarray(pixels).resize((400, 300), Image.Resampling.BICUBIC).save(source / f"{k:06d}.jpg", quality=90)
    target = [
        "--source",
        source,
        "--dest",
        folder / "photos.zip",
        "--resolution",
        "64x64",
        "--transform",
        "center-crop",
    ]
    elapsed = seconds("scripts/dataset_tool.py", "convert", *target)
    return Row(f"conversion of {count} photos to 64x64", count / elapsed, "images/s", 150.0, more_is_better=True)


def scoring() -> Row:
    """Features of 50,000 images for FID, from the pace of Inception on batches of 32 (random weights)."""
    torch.manual_seed(0)
    return Row("features of 50,000 images for FID, extrapolated", _scoring_minutes(InceptionV3()), "minutes", 60.0)


def scoring_lite() -> Row:
    """The same for fd_lite0, with its weights."""
    minutes = _scoring_minutes(load_detector("fd_lite0"))
    return Row("features of 50,000 images for fd_lite0, extrapolated", minutes, "minutes", 10.0)


def _scoring_minutes(detector: Callable[[torch.Tensor], object]) -> float:
    images = torch.randint(0, 256, (32, 3, 64, 64), dtype=torch.uint8)
    run: Callable[[], object] = torch.no_grad()(lambda: detector(images))
    pace = min(harness.interleave({"features": run}, runs=5, warmup=1)["features"]) / len(images)
    return _SCORED * pace / 60


def demonstration(folder: Path) -> Row:
    """scripts/demo.sh from start to end: pictures, two networks, EMA, guidance, scores."""
    began = time.perf_counter()
    subprocess.run(["bash", harness.ROOT / "scripts" / "demo.sh", folder / "demo"], check=True)
    return Row("demo.sh in total", (time.perf_counter() - began) / 60, "minutes", 15.0)


if __name__ == "__main__":
    main()
