"""Images in half precision against float32: the CIFAR-10 networks of the package, the same seeds, from start to end.

A faster way is as good as float32 if it changes images less than other seeds do, and changes no distance that compares
sets of images. Both are measured with sets of equal size, because a Frechet distance depends on the number of images.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import harness
from edm2kit.cli import click_types as cli
from edm2kit.cli.generation import prepare
from edm2kit.cli.generation_options import parse_request
from edm2kit.metrics.detectors.registry import Detector, load_detector
from edm2kit.metrics.moments import Moments, statistics_of
from edm2kit.metrics.reference import Reference, load_reference
from edm2kit.metrics.scoring import REPLICATES, Measurement, Scorer, image_features
from edm2kit.models.compilation import can_compile
from edm2kit.models.preconditioning import PRECISIONS, slow_precision
from edm2kit.torch_utils import dist
from edm2kit.torch_utils.files import provenance

PRESETS = ("cifar10", "cifar10-autoguidance")
DETECTOR = "fd_lite0"
FLOAT32, OTHER_SEEDS = "fp32", "fp32, other seeds"
# way -> --precision and --compile
WAYS = {
    "bf16": ("bf16", "off"),
    "fp16": ("fp16", "off"),
    "bf16, compiled": ("bf16", "on"),
    "fp16, CUDA graphs": ("fp16", "graphs"),
    "fp16, compiled": ("fp16", "on"),
}
ON_GPU_ONLY = ("fp16, CUDA graphs", "fp16, compiled")
BATCH = {"cpu": 50, "cuda": 500, "mps": 100}


@click.command(cls=cli.Command)
@click.option("--num", metavar="N", type=click.IntRange(2), default=500, show_default=True, help="Images of each set")
@click.option("--only", type=click.Choice(PRESETS), multiple=True, help="Only this preset; may be repeated")
@click.option("--compiled", is_flag=True, help="Also compile the networks; takes minutes")
@click.option("--half", is_flag=True, help="Also use precisions for which the CPU has no instructions")
@click.option("--device", metavar="NAME", default="cpu", show_default=True, help="cuda, mps or cpu")
@click.option("--ref", type=click.Path(exists=True, dir_okay=False), help=f"Reference statistics of {DETECTOR}")
@harness.out_option
def main(num: int, only: tuple[str, ...], compiled: bool, half: bool, device: str, ref: str | None, out: Path) -> None:
    """Compare images in half precision with float32 and with other seeds.

    Writes precision.json, or precision_gpu.json on a GPU.
    """
    reference = None if ref is None else load_reference(ref)
    presets: dict[str, Any] = {}
    with dist.session(device) as picked:
        ways, skipped = ways_here(compiled, half, picked)
        record = {
            "job": "precision" if picked.type == "cpu" else "precision_gpu",
            "kind": "precision",
            "detector": DETECTOR,
            "num": num,
            "presets": presets,
            "reference": reference and {"file": Path(str(ref)).name, "num_images": reference.num_images},
            "notes": {"skipped": skipped},
            "command": harness.command(),
            "provenance": provenance(picked),
            "cpu": harness.cpu(),
        }
        for preset in only or PRESETS:
            presets[preset] = measure(preset, ways, num, reference, picked)
            for way, row in presets[preset].items():
                click.echo(f"{preset}, {way}: {row}")
            harness.save(record, out)


def ways_here(compiled: bool, half: bool, device: torch.device) -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
    """The ways of WAYS to measure on `device`, and why the others are skipped."""
    ways, skipped = {}, {}
    for way, (precision, compiling) in WAYS.items():
        if way in ON_GPU_ONLY and device.type != "cuda":
            continue
        slow = None if half else slow_precision(PRECISIONS[precision], device)
        if slow is not None:
            skipped[f"images in {way}"] = slow
        elif compiling == "on" and not compiled:
            skipped[f"images in {way}"] = "python -m benchmarks.precision --compiled"
        elif compiling == "on" and device.type == "cpu" and not can_compile():
            skipped[f"images in {way}"] = "this machine has no C++ compiler"
        else:
            ways[way] = (precision, compiling)
    return ways, skipped


def measure(
    preset: str, ways: Mapping[str, tuple[str, str]], num: int, reference: Reference | None, device: torch.device
) -> dict[str, dict[str, Any]]:
    """The rows of one preset by way: seeds 0 to num - 1 in float32 and faster ways, and `num` other seeds."""
    sets = {FLOAT32: images(preset, "fp32", "off", range(num), device)}
    sets[OTHER_SEEDS] = images(preset, "fp32", "off", range(num, 2 * num), device)
    for way, (precision, compiling) in ways.items():
        sets[way] = images(preset, precision, compiling, range(num), device)
    return compare(sets, load_detector(DETECTOR, device=device), reference, device)


@torch.no_grad()
def images(preset: str, precision: str, compiling: str, seeds: range, device: torch.device) -> torch.Tensor:
    """The images of a preset of the package, uint8 [N, 3, H, W], on the CPU."""
    request = parse_request(["--preset", preset, "--precision", precision, "--compile", compiling])
    generation = prepare(request, device)
    return torch.cat([batch.images.cpu() for batch in generation.batches(seeds, BATCH[device.type])])


def compare(
    sets: Mapping[str, torch.Tensor], detector: Detector, reference: Reference | None, device: torch.device
) -> dict[str, dict[str, Any]]:
    """What each set is like beside FLOAT32, image by image and as a set, beside OTHER_SEEDS, and beside real images.

    - `pixels`: mean absolute difference from the float32 image of the same position, in grey levels.
    - `from_fp32`: Frechet distance from the float32 set; for a faster way, that of the same seeds.
    - `from_others`: distance from the set of other seeds, which no way shares seeds with.
    - `from_real`: value and 95% interval of the distance from `reference`, if there is one.
    """
    features = {name: image_features(pixels, [detector], device)[detector.name] for name, pixels in sets.items()}

    def distance(name: str, to: Reference, replicates: int = 0) -> Measurement:
        scorer = Scorer(to, [detector], device, replicates=replicates)
        return scorer.measure_features({detector.name: features[name]}, warn_if_few=False)

    known = {}
    for name in (FLOAT32, OTHER_SEEDS):
        moments = Moments(detector.num_features)
        moments.add(features[name])
        known[name] = Reference(*statistics_of([detector], [moments]), {})
    rows: dict[str, dict[str, Any]] = {}
    for name, pixels in sets.items():
        row: dict[str, Any] = {"pixels": pixel_difference(pixels, sets[FLOAT32])}
        for key, other in (("from_fp32", FLOAT32), ("from_others", OTHER_SEEDS)):
            row[key] = None if name == other else distance(name, known[other]).values[detector.name]
        if reference is not None:
            measured = distance(name, reference, REPLICATES)
            low, high = measured.intervals[detector.name]
            row["from_real"] = [measured.values[detector.name], low, high]
        rows[name] = row
    return rows


def pixel_difference(images: torch.Tensor, others: torch.Tensor) -> float:
    """The mean absolute difference of two uint8 tensors of the same shape, in grey levels."""
    return (images.short() - others.short()).abs().double().mean().item()


if __name__ == "__main__":
    main()
