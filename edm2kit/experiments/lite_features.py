"""What fd_lite0, fd_lite1 and fd_lite2 see, and what they cost: measured on labelled photos of the user's."""

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F

from edm2kit.cli import click_types as cli
from edm2kit.cli.image_source import ScoredImages, image_batches, open_images
from edm2kit.experiments.documents import checkout, markdown_table, write_parts
from edm2kit.metrics.detectors.registry import load_detector
from edm2kit.metrics.frechet import frechet_distance, frechet_influence
from edm2kit.metrics.moments import FeatureStatistics, Moments
from edm2kit.metrics.neighbours import nearest_indices
from edm2kit.metrics.reference import Reference
from edm2kit.metrics.registry import ALL, METRICS, applies, pair_visitors
from edm2kit.metrics.score import Sample
from edm2kit.metrics.scoring import REPLICATES, Images, Scorer, image_features
from edm2kit.torch_utils.files import code_commit, provenance, write_json

RECORD = Path("experiments", "lite_features", "record.json")
_NAMES = ("fd_lite0", "fd_lite1", "fd_lite2", "fd_random")
_NEIGHBOURS = 10
_BATCH = 32
_COST_IMAGES = 10000
_COST_READ = 2000  # of these are read, and their features computed
_COST_REPEATS = 3  # of which the median counts
_READERS = 2  # threads
_SHOWN_PART = 0.002  # of the pass
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


def measure_cost(name: str, images: Images, num: int = _COST_IMAGES) -> dict[str, Any]:
    """Processor seconds of a pass of `num` images for the Frechet distance of `name` alone, and of all other metrics.

    Reading `images` and their features are measured, and multiplied to `num` images; moments and distance are those of
    `num` made-up features. The metrics, with their intervals, compare made-up features of `num` generated, real and
    held-out images. `ratio` is the cost of a pass with all metrics, divided by that of the pass alone; `metrics` has
    the parts, without moments and bootstrap.
    """
    detector = load_detector(name)
    num_features = detector.num_features
    mixing = torch.randn(num_features, num_features, generator=torch.Generator().manual_seed(0)) / num_features**0.5

    def rows(seed: int) -> torch.Tensor:
        noise = torch.randn(num, num_features, generator=torch.Generator().manual_seed(seed))
        return (noise @ mixing).relu_()

    generated, real, heldout = rows(1), rows(2), rows(3)
    own, reference = _statistics(generated), _statistics(real)
    classes = torch.arange(num) % 10
    alone = Scorer(Reference(num, {name: reference}), [detector], torch.device("cpu"))
    complete = replace(alone, real={name: real}, heldout={name: heldout})
    complete = replace(complete, real_labels=classes, names=(ALL,), replicates=REPLICATES)

    found: list[torch.Tensor] = []
    features = _timed(lambda: found.append(image_features(images, [detector], alone.device)[name]))
    distance = _median(lambda: alone.measure_features({name: generated}))
    everything = _median(lambda: complete.measure_features({name: generated}, classes))
    one_pass = {key: features[key] * num / len(found[0]) + distance[key] for key in features}
    besides = {key: everything[key] - distance[key] for key in everything}

    names = [metric for metric, entry in METRICS.items() if entry.in_all and applies(metric, name)]
    head = getattr(detector.net, "fc", None)
    sample = Sample(generated, own, reference, real, heldout, head, None, classes, classes, 0, pair_visitors(names))
    parts = {
        "interval": _timed(lambda: frechet_influence(generated, own, reference)),
        "pairs": _timed(lambda: sample.neighbours),
        **{metric: _timed(partial(METRICS[metric].compute, sample)) for metric in names},
    }
    return {
        "detector": name,
        "images": num,
        "images_read": len(found[0]),
        "pass": one_pass,
        "besides": besides,
        "ratio": 1 + besides["cpu_sec"] / one_pass["cpu_sec"],
        "metrics": parts,
        "load": os.getloadavg()[0],
        **provenance(),
    }


def _median(run: Callable[[], Any]) -> dict[str, float]:
    """The median of the seconds of several runs."""
    runs = [_timed(run) for _ in range(_COST_REPEATS)]
    return {key: statistics.median(one[key] for one in runs) for key in runs[0]}


def cost_table(cost: Mapping[str, Any]) -> str:
    """What all metrics cost besides a pass, as a sentence and a Markdown table."""
    whole = cost["pass"]["cpu_sec"]
    lines = [
        ("reading, features and Fréchet distance", cost["pass"]),
        ("all other metrics, all intervals", cost["besides"]),
    ]
    shared = ", ".join(f"`{name}`" for name in cost["metrics"] if name in METRICS and METRICS[name].pairs is not None)
    texts = {"interval": "of these: interval of the Fréchet distance", "pairs": f"of these: pairs of images ({shared})"}
    for name, part in cost["metrics"].items():
        if part["cpu_sec"] >= _SHOWN_PART * whole:
            lines.append((texts.get(name, f"of these: `{name}`"), part))
    rows = [(text, f"{one['cpu_sec']:.1f}", f"{one['cpu_sec'] / whole:.3f}") for text, one in lines]
    sentence = (
        f"A pass of {cost['images']:,} images with all metrics of `{cost['detector']}` costs **{cost['ratio']:.2f} "
        "times** the pass for its Fréchet distance alone (processor seconds; the last column: as part of that pass; "
        f"{cost['load']:.1f} programs wanted the processor):"
    )
    return f"{sentence}\n\n" + markdown_table(("what", "seconds", "of the pass"), rows, "lrr")


def document_parts(record: Mapping[str, Any]) -> dict[str, str]:
    """The generated parts of docs/metrics.md: what the detectors see, a table of all metrics, and what they cost."""
    rows = []
    for name, found in record["detectors"].items():
        distances = found["distances"]
        cells = [f"{distances[kind]:.4g}" for kind in ("real", "blurred", "noisy")]
        rows.append((name, f"{found['neighbour_accuracy']:.2f}", *cells))
    head = ("detector", "kNN-10 accuracy", "real", "blurred", "noisy")
    return {"lite": markdown_table(head, rows), "metrics": metrics_table(), "cost": cost_table(record["cost"])}


def metrics_table() -> str:
    """A Markdown table of METRICS."""
    metric_rows = []
    for name, metric in METRICS.items():
        needs = ", ".join(f"`--{need}`" for need in metric.needs if need in ("real", "heldout"))
        metric_rows.append(
            (f"`{name}`", metric.text, metric.better, needs, ", ".join(metric.detectors) or "all but `sfid`")
        )
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
@click.option("--cost-only", is_flag=True, help="Only measure what all metrics of fd_lite0 cost.")
@click.option("--publish", is_flag=True, help="Also write the record and docs/metrics.md in the checkout.")
def main(images: str, num: int, detectors: str, cost_only: bool, publish: bool) -> None:
    """Measure what the EfficientNet-Lite detectors see, and what they cost."""
    source = open_images(images)
    order = np.random.default_rng(0).permutation(len(source))
    picked = order[:num].tolist()
    record: dict[str, Any] = {"images": Path(images).name, "num": num, "detectors": {}, **provenance()}
    if publish and (checkout() / RECORD).exists():
        former = json.loads((checkout() / RECORD).read_text(encoding="utf-8"))
        if (former["images"], former["num"]) == (record["images"], num):
            record["detectors"], record["cost"] = former["detectors"], former["cost"]
            if cost_only:
                record = former
    names = [] if cost_only else detectors.split(",")
    pixels, classes = _labelled(source, picked) if names else (torch.empty(0), torch.empty(0))
    for name in names:
        found = {**measure(name, pixels, classes, num // 2), "commit": code_commit(), "load": os.getloadavg()[0]}
        record["detectors"][name] = found
        click.echo(f"{name}: {json.dumps(found)}")
        if publish:  # after each detector, so that a stopped run can go on with --detectors
            _publish(record)
    if cost_only or _NAMES[0] in names:
        read = np.resize(order, _COST_READ).tolist()
        cost = measure_cost(_NAMES[0], image_batches(source, read, _BATCH, _READERS))
        record["cost"] = cost
        click.echo(
            f"all metrics of {_NAMES[0]} for {cost['images']} images: {cost['ratio']:.2f} of the pass for its distance "
            f"alone ({cost['pass']['cpu_sec']:.1f} core seconds, and {cost['besides']['cpu_sec']:.1f} besides)"
        )
        if publish:
            _publish(record)


def _labelled(source: ScoredImages, picked: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, uint8 [N, 3, H, W], and the numbers of their folders, int64 [N]."""
    pixels = torch.from_numpy(np.stack([source.read(index) for index in picked]))
    _, numbers = np.unique([Path(source.where(index)).parent.name for index in picked], return_inverse=True)
    return pixels, torch.from_numpy(numbers).long()


def _publish(record: dict[str, Any]) -> None:
    record["detectors"] = dict(sorted(record["detectors"].items()))
    write_json(checkout() / RECORD, record)
    if "cost" in record:
        write_parts(checkout() / "docs" / "metrics.md", document_parts(record))


if __name__ == "__main__":
    main()
