"""Score generated images: Frechet distances from reference statistics."""

import itertools
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from edm2kit.cli import click_types as cli
from edm2kit.cli.generation import Request, prepare
from edm2kit.cli.generation_options import generation_options
from edm2kit.cli.image_source import image_batches, open_images
from edm2kit.metrics.detectors.registry import DETECTORS, check_names, load_detector
from edm2kit.metrics.reference import Reference, save_reference
from edm2kit.metrics.scoring import Scorer, image_features, image_statistics, make_scorer, summary, table
from edm2kit.torch_utils import dist
from edm2kit.torch_utils.files import fetch, sha256_of
from edm2kit.torch_utils.provenance import provenance
from edm2kit.torch_utils.records import write_json

_REAL_WORKERS = 2  # threads that read


class MetricNames(click.ParamType):
    """Metric names separated by commas, as a tuple."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if not isinstance(value, str):
            return tuple(value)
        names = tuple(dict.fromkeys(name.strip() for name in value.split(",")))
        try:
            check_names(names)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return names


@dataclass(frozen=True)
class Task:
    """What calc and gen have in common: against what, by what and where to score."""

    ref: str
    metrics: tuple[str, ...] | None
    num: int
    real: str | None
    record: Path | None
    batch: int
    weights_dir: str | None


def _together(*options: Callable) -> Callable:
    """Several click options as one decorator."""

    def decorate(command: Callable) -> Callable:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_METRICS = f"Of {', '.join(DETECTORS)}; fd_random needs no download and compares with no published number."
_images_options = _together(
    click.option(
        "--batch", type=click.IntRange(min=1), default=32, show_default=True, help="Images at once, per process."
    ),
    click.option("--weights-dir", metavar="DIR", help="Where detector weights lie; else the cache, else a download."),
    click.option("--device", default="auto", show_default=True, help="auto, cuda, mps or cpu."),
)
_score_options = _together(
    click.option(
        "--ref", metavar="PATH|URL", required=True, help="Reference statistics: .npz of `ref`, or EDM2's .pkl."
    ),
    click.option("--metrics", type=MetricNames(), help=f"{_METRICS} [default: all that --ref holds]"),
    # torchrun takes --num for its own --numa-binding, unless a lone -- stands before the script
    click.option(
        "--num",
        "--num-images",
        type=click.IntRange(min=2),
        default=50000,
        show_default=True,
        help="Number of images; under torchrun spelt out.",
    ),
    click.option(
        "--real",
        metavar="PATH",
        help="Real images (folder, .zip or .npz), --num of which measure precision, recall, density and coverage too.",
    ),
    click.option("--record", type=click.Path(path_type=Path, dir_okay=False), help="JSON file of results and origin."),
    _images_options,
)
_workers = click.option(
    "--workers", type=click.IntRange(min=1), default=2, show_default=True, help="Threads that read images."
)


@click.group(cls=cli.Group)
def main() -> None:
    """Score images by the Frechet distance of their features from a reference (lower is better).

    \b
    python calculate_metrics.py ref --data real.zip --dest real.npz
    python calculate_metrics.py calc --images out --ref real.npz
    python calculate_metrics.py gen --net main.safetensors --gnet weaker.safetensors --guidance 2 --ref real.npz
    torchrun --standalone --nproc-per-node 8 calculate_metrics.py gen --num-images 50000 ...
    """


@main.command()
@click.option("--images", metavar="PATH", required=True, help="Folder, .zip, or .npz of generate.py.")
@_score_options
@click.option(
    "--seed",
    "seeds",
    type=cli.IntRanges(),
    default="0",
    show_default=True,
    help="Selects --num images where there are more; several, such as 0,1,2, score several selections.",
)
@_workers
def calc(images: str, num: int, seeds: tuple[int, ...], workers: int, device: str, **task: Any) -> None:
    """Score the images in a folder, zip or .npz."""
    task = Task(num=num, **task)
    with dist.session(device) as where:
        source = open_images(images)
        if len(source) < num:
            raise ValueError(f"{images} holds {len(source)} images, --num asks for {num}; add images or lower --num")
        if len(source) == num and len(seeds) > 1:
            raise ValueError(f"{images} holds exactly --num images: every --seed selects the same; give one")
        runs = {
            f"selection {seed}": image_batches(source, _select(len(source), num, seed), task.batch, workers)
            for seed in seeds
        }
        _score(task, _scorer(task, where), runs, {"images": images, "num_images": num, "seeds": list(seeds)})


def _select(available: int, num: int, seed: int) -> np.ndarray:
    """Sorted positions of `num` of `available` images."""
    return np.sort(np.random.default_rng(seed).permutation(available)[:num])


@main.command()
@generation_options
@_score_options
@click.option(
    "--seed",
    "seeds",
    type=cli.IntRanges(),
    default="0",
    show_default=True,
    help="First of --num seeds; several score several ranges: 0,50000,100000 as in the papers.",
)
def gen(request: Request, num: int, seeds: tuple[int, ...], device: str, **task: Any) -> None:
    """Score images as a network draws them, without writing them; takes the options of generate.py."""
    for first, second in itertools.pairwise(sorted(seeds)):
        if second - first < num:
            raise click.UsageError(
                f"--seed {first} and {second} with --num {num} share images; the next range starts at {first + num}"
            )
    task = Task(num=num, **task)
    with dist.session(device) as where:
        scorer = _scorer(task, where)
        generation = prepare(request, where)
        dist.print0(generation.summary)
        runs = {
            f"seeds {start}-{start + num - 1}": (
                batch.images for batch in generation.batches(range(start, start + num), task.batch)
            )
            for start in seeds
        }
        _score(task, scorer, runs, {"settings": generation.settings, "num_images": num, "seeds": list(seeds)})


def _scorer(task: Task, device: torch.device) -> Scorer:
    scorer = make_scorer(fetch(task.ref), device, task.metrics, task.weights_dir)
    if task.real is None:
        return scorer
    source = open_images(task.real)
    if len(source) < task.num:
        raise ValueError(f"--real {task.real} holds {len(source)} images, --num asks for as many as {task.num}")
    batches = image_batches(source, _select(len(source), task.num, 0), task.batch, _REAL_WORKERS)
    return replace(scorer, real=image_features(batches, scorer.detectors, device))


def _score(task: Task, scorer: Scorer, runs: Mapping[str, Iterable[torch.Tensor]], origin: Mapping[str, Any]) -> None:
    """Score each run, print the table, write the record."""
    started, begin_sec = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    results = {}
    for name, batches in runs.items():
        results[name] = scorer.score(batches)
        dist.print0(f"{name}: {', '.join(f'{metric} {value:.6g}' for metric, value in results[name].items())}")
    if len(runs) > 1:
        dist.print0(table(results))
    record = {
        "command": shlex.join(sys.argv),
        "started": started,
        "elapsed_sec": time.monotonic() - begin_sec,
        **origin,
        "results": summary(results),
        "detectors": {detector.name: detector.fingerprint for detector in scorer.detectors},
        "reference": {
            "path": task.ref,
            "sha256": sha256_of(fetch(task.ref)),
            "num_images": scorer.reference.num_images,
            "source": scorer.reference.source,
        },
        "real": task.real,
        "batch": task.batch,
        "processes": dist.world_size(),
        **provenance(scorer.device),
    }
    if task.record is not None:
        dist.on_rank0(write_json, task.record, record)


@main.command()
@click.option("--data", metavar="PATH", required=True, help="Real images: folder, .zip or .npz.")
@click.option("--dest", metavar="NPZ", required=True, type=click.Path(path_type=Path, dir_okay=False), help="Result.")
@click.option("--metrics", type=MetricNames(), default="fid,fd_dinov2", show_default=True, help=_METRICS)
@_workers
@_images_options
def ref(
    data: str, dest: Path, metrics: tuple[str, ...], workers: int, batch: int, weights_dir: str | None, device: str
) -> None:
    """Measure the reference statistics of real images, all of them."""
    if dest.suffix != ".npz":
        raise click.UsageError(f"--dest {dest}: reference statistics are an .npz")
    with dist.session(device) as where:
        source = open_images(data)
        detectors = [load_detector(name, where, weights_dir) for name in metrics]
        batches = image_batches(source, range(len(source)), batch, workers)
        count, statistics = image_statistics(batches, detectors, where)
        origin = {"command": shlex.join(sys.argv), "data": data, **provenance(where)}
        dist.on_rank0(save_reference, dest, Reference(count, statistics, origin))
        dist.print0(f"{dest}: {', '.join(metrics)} of {count} images")


if __name__ == "__main__":
    main()
