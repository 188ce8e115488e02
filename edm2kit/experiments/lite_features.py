"""What fd_lite0, fd_lite1 and fd_lite2 see, and what they cost: measured on labelled photos of the user's."""

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F

from edm2kit.cli import click_types as cli
from edm2kit.cli.image_source import open_images
from edm2kit.experiments.documents import checkout, markdown_table, write_parts
from edm2kit.metrics.detectors.registry import DETECTORS, load_detector
from edm2kit.metrics.frechet import frechet_distance, frechet_influence
from edm2kit.metrics.moments import FeatureStatistics, Moments
from edm2kit.metrics.neighbours import nearest_indices
from edm2kit.metrics.registry import METRICS, applies
from edm2kit.metrics.score import Sample
from edm2kit.torch_utils.files import code_commit, provenance, write_json

RECORD = Path("experiments", "lite_features", "record.json")
_NAMES = ("fd_lite0", "fd_lite1", "fd_lite2", "fd_random")
_NEIGHBOURS = 10
_BATCH = 32
_COST_IMAGES = 10000
_NOISE = 8.0  # standard deviation in grey levels


def _statistics(features: torch.Tensor) -> FeatureStatistics:
    moments = Moments(features.shape[1])
    moments.add(features)
    _, mean, covariance = moments.mean_and_covariance()
    return FeatureStatistics(mean, covariance, None)


def _distance(features: torch.Tensor, other: torch.Tensor) -> float:
    ours, theirs = _statistics(features), _statistics(other)
    return frechet_distance(ours.mean, ours.covariance, theirs.mean, theirs.covariance)


def neighbour_accuracy(
    features: torch.Tensor, classes: torch.Tensor, references: torch.Tensor, reference_classes: torch.Tensor
) -> float:
    """The fraction of images whose class is the most frequent one among their 10 nearest references (cosine)."""
    nearest = nearest_indices(F.normalize(features, dim=1), F.normalize(references, dim=1), _NEIGHBOURS)
    votes = F.one_hot(reference_classes[nearest]).sum(dim=1)
    return (votes.argmax(dim=1) == classes).double().mean().item()


def _degraded(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Images blurred by a 3x3 mean, and with noise."""
    pixels = images.float()
    blurred = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0)) * _NOISE
    return {
        "blurred": blurred.round().to(torch.uint8),
        "noisy": (pixels + noise).round().clamp(0, 255).to(torch.uint8),
    }


def _timed(run: Callable[[], Any]) -> dict[str, float]:
    wall, processor = time.monotonic(), time.process_time()
    run()
    return {"elapsed_sec": time.monotonic() - wall, "cpu_sec": time.process_time() - processor}


def measure(name: str, images: torch.Tensor, classes: torch.Tensor, num_distance: int) -> dict[str, Any]:
    """One detector on labelled images [N, 3, H, W]: accuracy of nearest neighbours, distances, seconds per image.

    The first 3/4 of the images are references, the rest is classified. The distances compare the first `num_distance`
    images with as many others, as they are, blurred and noisy.
    """
    detector = load_detector(name)

    def features(pixels: torch.Tensor) -> torch.Tensor:
        return torch.cat([detector(batch) for batch in pixels.split(_BATCH)])

    detector(images[:_BATCH])
    cost = _timed(lambda: features(images[: 4 * _BATCH]))
    found = features(images)
    split = len(images) * 3 // 4
    others = images[num_distance : 2 * num_distance]
    first = found[:num_distance]
    return {
        "images_per_cpu_sec": 4 * _BATCH / cost["cpu_sec"],
        "images_per_sec": 4 * _BATCH / cost["elapsed_sec"],
        "neighbour_accuracy": neighbour_accuracy(found[split:], classes[split:], found[:split], classes[:split]),
        "references": split,
        "num_distance": num_distance,
        "distances": {
            "real": _distance(found[num_distance : 2 * num_distance], first),
            **{kind: _distance(features(pixels), first) for kind, pixels in _degraded(others).items()},
        },
    }


def measure_cost(name: str) -> dict[str, Any]:
    """Processor seconds of every metric of `name` for 10,000 images against 10,000: made-up features of that size."""
    num_features = DETECTORS[name].num_features
    mixing = torch.randn(num_features, num_features, generator=torch.Generator().manual_seed(0)) / num_features**0.5

    def rows(seed: int) -> torch.Tensor:
        noise = torch.randn(_COST_IMAGES, num_features, generator=torch.Generator().manual_seed(seed))
        return (noise @ mixing).relu_()

    generated, real, heldout = rows(1), rows(2), rows(3)
    statistics, reference = _statistics(generated), _statistics(real)
    head = getattr(load_detector(name).net, "fc", None)
    classes = torch.arange(_COST_IMAGES) % 10
    sample = Sample(generated, statistics, reference, real, heldout, head, labels=classes, real_labels=classes)
    costs = {"interval": _timed(lambda: frechet_influence(generated, statistics, reference))}
    for metric, entry in METRICS.items():
        if applies(metric, name) and entry.in_all:
            costs[metric] = _timed(lambda compute=entry.compute: compute(sample))  # type: ignore[misc]
    return {"images": _COST_IMAGES, "metrics": costs, "cpu_sec": sum(cost["cpu_sec"] for cost in costs.values())}


def document_parts(record: Mapping[str, Any]) -> dict[str, str]:
    """The generated parts of docs/metrics.md: what the detectors see, and a table of all metrics."""
    rows = []
    for name, found in record["detectors"].items():
        distances = found["distances"]
        cells = [f"{distances[kind]:.4g}" for kind in ("real", "blurred", "noisy")]
        rows.append((name, f"{found['neighbour_accuracy']:.2f}", *cells))
    head = ("detector", "kNN-10 accuracy", "real", "blurred", "noisy")
    return {"lite": markdown_table(head, rows), "metrics": metrics_table()}


def metrics_table() -> str:
    """A Markdown table of METRICS."""
    metric_rows = []
    for name, metric in METRICS.items():
        needs = ", ".join(f"`--{need}`" for need in metric.needs if need in ("real", "heldout"))
        metric_rows.append((f"`{name}`", metric.text, metric.better, needs, ", ".join(metric.detectors) or "all"))
    return markdown_table(("metric", "what it is", "better", "needs", "detectors"), metric_rows)


@click.command(cls=cli.Command)
@click.option("--images", metavar="PATH", required=True, help="Photos in a folder or .zip with one folder per class.")
@click.option("--num", type=click.IntRange(min=100), default=1600, show_default=True, help="Images to use.")
@click.option(
    "--detectors",
    metavar="NAMES",
    default=",".join(_NAMES),
    show_default=True,
    help="Detectors to measure; with --publish, the others keep their values from the record of the same images.",
)
@click.option("--publish", is_flag=True, help="Also write the record and docs/metrics.md in the checkout.")
def main(images: str, num: int, detectors: str, publish: bool) -> None:
    """Measure what the EfficientNet-Lite detectors see, and what they cost."""
    source = open_images(images)
    picked = np.random.default_rng(0).permutation(len(source))[:num].tolist()
    pixels = torch.from_numpy(np.stack([source.read(index) for index in picked]))
    names = [Path(source.where(index)).parent.name for index in picked]
    _, numbers = np.unique(names, return_inverse=True)
    classes = torch.from_numpy(numbers).long()
    record: dict[str, Any] = {"images": Path(images).name, "num": num, "detectors": {}, **provenance()}
    if publish and (checkout() / RECORD).exists():
        former = json.loads((checkout() / RECORD).read_text(encoding="utf-8"))
        if (former["images"], former["num"]) == (record["images"], num):
            record["detectors"], record["cost"] = former["detectors"], former["cost"]
    for name in detectors.split(","):
        found = {**measure(name, pixels, classes, num // 2), "commit": code_commit(), "load": os.getloadavg()[0]}
        record["detectors"][name] = found
        click.echo(f"{name}: {json.dumps(found)}")
        if name == _NAMES[0]:
            record["cost"] = measure_cost(name)
            click.echo(f"all metrics of {name}: {record['cost']['cpu_sec']:.0f} core seconds for {_COST_IMAGES} images")
        if publish:  # after each detector, so that a stopped run can go on with --detectors
            record["detectors"] = dict(sorted(record["detectors"].items()))
            write_json(checkout() / RECORD, record)
            write_parts(checkout() / "docs" / "metrics.md", document_parts(record))


if __name__ == "__main__":
    main()
