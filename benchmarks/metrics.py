"""Fréchet distances, covariances, and the detectors' images per second."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import numpy as np
import torch
from torch import nn

from benchmarks import harness, plain_detectors, plain_io
from benchmarks.harness import Comparison, Work
from edm2kit.cli import click_types as cli
from edm2kit.metrics.detectors.dinov2 import DINOv2ViT
from edm2kit.metrics.detectors.inception import InceptionV3
from edm2kit.metrics.frechet import frechet_distance
from edm2kit.metrics.moments import Moments

_ROWS, _BATCH = 8192, 64
_IMAGES = {"inception": 16, "dinov2": 2}


@click.command(cls=cli.Command)
@harness.runs_option()
@click.option("--only", metavar="JOB", multiple=True, help="Only this one; may be repeated")
@harness.out_option
def main(runs: int, only: tuple[str, ...], out: Path) -> None:
    """Compare distances, covariances and detectors with plain code; writes a record for each."""
    jobs: dict[str, Callable[[], Comparison]] = {
        "frechet_2048": partial(frechet, 2048, 18),
        "frechet_1024": partial(frechet, 1024, 10),
        "covariance_2048": covariance,
        "detector_inception": partial(detector, "inception", InceptionV3, plain_detectors.PlainInception),
        "detector_dinov2": partial(detector, "dinov2", DINOv2ViT, plain_detectors.PlainDINOv2),
    }
    if unknown := set(only) - set(jobs):
        raise click.BadParameter(f"{min(unknown)} is unknown; available: {', '.join(jobs)}")
    for name in only or jobs:
        harness.save(harness.measure(jobs[name](), runs, warmup=1), out)


def frechet(num_features: int, goal: float) -> Comparison:
    """The distance of two regular covariances with decaying spectra, like those of features."""
    rng = np.random.default_rng(0)
    spectrum = np.arange(1, num_features + 1) ** -0.7
    moments = []
    for _ in range(2):
        rows = rng.standard_normal((2 * num_features, num_features)) * spectrum
        moments += [rows.mean(0), np.cov(rows, rowvar=False)]
    ours, plain = partial(frechet_distance, *moments), partial(plain_io.frechet_distance, *moments)
    return Comparison(
        f"frechet_{num_features}",
        {"plain": plain, "frechet_distance": ours},
        goals={"frechet_distance": goal},
        errors={"frechet_distance": abs(ours() - (exact := plain())) / exact},
        error_kind="relative difference of the distances",
        notes={"features": num_features},
    )


def covariance() -> Comparison:
    """Float64 covariance of 2048 features that come 64 rows at a time."""
    features = torch.randn(_ROWS, 2048, generator=torch.Generator().manual_seed(0)) + 1

    def accumulate(make: Callable) -> np.ndarray:
        moments = make(2048)
        for batch in features.split(_BATCH):
            moments.add(batch)
        return moments.mean_and_covariance()[-1]

    ours, plain = partial(accumulate, Moments), partial(accumulate, plain_io.PlainMoments)
    return Comparison(
        "covariance_2048",
        {"plain": plain, "Moments": ours},
        work=Work(_ROWS * 2048 * 2049 / 2, "multiply-adds", "matmul_fp64"),
        goals={"Moments": 6},
        errors={"Moments": harness.relative_error(torch.from_numpy(ours()), torch.from_numpy(plain()))},
        error_kind="of the covariance, relative norm",
        notes={"rows": _ROWS, "batch": _BATCH, "multiply_adds": "of one half of the symmetric matrix"},
    )


def detector(name: str, make: type[nn.Module], make_plain: type[nn.Module]) -> Comparison:
    """Features of 64x64 images with random weights."""
    torch.manual_seed(0)
    net, plain = make(), make_plain()
    plain.load_state_dict(net.state_dict())
    images = torch.randint(0, 256, (_IMAGES[name], 3, 64, 64), dtype=torch.uint8)
    run = torch.no_grad()
    return Comparison(
        f"detector_{name}",
        {"plain": partial(run(plain.forward), images), "default": partial(run(net.forward), images)},
        work=Work(len(images), "images"),
        errors={"default": harness.relative_error(run(net.forward)(images), run(plain.forward)(images))},
        error_kind="of the features, relative norm",
        notes={"batch": len(images), "size": 64, "weights": "random"},
    )


if __name__ == "__main__":
    main()
