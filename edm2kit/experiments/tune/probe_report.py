"""What a probe reads and leaves: held-out images; a CSV, a JSON record and a page with figures."""

import csv
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edm2kit.conditions import FloatVectors
from edm2kit.data.dataset import open_source
from edm2kit.experiments.pages import figures, page
from edm2kit.experiments.tune.probe import GuideAtLevel, Prediction, ProbeResult
from edm2kit.snapshots.loading import Snapshot
from edm2kit.torch_utils.files import atomic_write, plain_json, provenance, write_json
from edm2kit.torch_utils.rng import StackedGenerator, derive_seed

RECORD, TABLE, PAGE = "probe.json", "probe.csv", "index.html"


def load_images(path: str, num: int, main: Snapshot, device: torch.device) -> tuple[torch.Tensor, Any]:
    """`num` images of a data set, evenly spread and encoded, float32 [N, C, H, W], and their conditions.

    Raises ValueError if the data set has fewer, or does not fit the network.
    """
    net = main.net
    source = open_source(path, use_labels=net.label_dim > 0)
    if len(source) < num:
        raise ValueError(f"{path} has {len(source)} images, fewer than --num {num}")
    if source.label_dim != net.label_dim:
        raise ValueError(f"{path} has labels of {source.label_dim} numbers, the main network takes {net.label_dim}")
    indices = np.arange(num) * len(source) // num
    rng = StackedGenerator(device, [derive_seed("probe encoder", int(k)) for k in indices])
    images = main.encoder.encode(torch.from_numpy(np.ascontiguousarray(source.read(indices))).to(device), rng)
    expected = (net.img_channels, net.img_resolution, net.img_resolution)
    if tuple(images.shape[1:]) != expected:
        found = "x".join(map(str, images.shape[1:]))
        raise ValueError(f"{path} has images of {found}, the main network takes {'x'.join(map(str, expected))}")
    if not net.label_dim:
        return images, None
    labels = torch.from_numpy(source.read_labels(indices)).float().to(device)
    return images, FloatVectors(labels, labels) if main.header.label_kind == "vectors" else labels


def write(
    result: ProbeResult, predictions: Sequence[Prediction], outdir: Path, command: str, device: torch.device
) -> Path:
    """Write record, table and page; returns the path of the page."""
    levels = [dataclasses.asdict(level) for found in result.levels.values() for level in found]
    record = {
        "command": command,
        "num_images": result.num_images,
        "levels": levels,
        "angles": [
            {"guides": list(pair), "sigma": sigma, "cosine": cosine}
            for pair, found in result.angles.items()
            for sigma, cosine in zip(result.sigmas, found, strict=True)
        ],
        "prediction": [dataclasses.asdict(one) for one in predictions],
        **provenance(device),
    }
    write_json(outdir / RECORD, plain_json(record))
    text = io.StringIO()
    table = csv.DictWriter(text, [field.name for field in dataclasses.fields(GuideAtLevel)], lineterminator="\n")
    table.writeheader()
    table.writerows(levels)
    with atomic_write(outdir / TABLE, "w") as file:
        file.write(text.getvalue())
    _write_page(result, predictions, outdir / PAGE, command, str(record["commit"]))
    return outdir / PAGE


def _write_page(result: ProbeResult, predictions: Sequence[Prediction], path: Path, command: str, commit: str) -> None:
    blocks = [page.heading("What to search")]
    blocks += [page.paragraph(one.text) for one in predictions]
    blocks.append(
        page.paragraph(
            "The least-squares weight w* is the one with the smallest squared error of D_n + w (D - D_n) against the "
            "clean image. It is 1 where the main network's error has nothing to do with the guide. Images often gain "
            "from larger weights than w*, so this orders guides and noise levels; only a search decides."
        )
    )
    for name, found in result.levels.items():
        sigmas = [level.sigma for level in found]
        blocks.append(page.heading(name))
        weight = figures.Curve(
            "least-squares weight, 95% interval",
            sigmas,
            [level.weight for level in found],
            [level.low for level in found],
            [level.high for level in found],
        )
        chart = figures.line_chart([weight], "noise level", "w*", log_x=True, references=[(1.0, "guidance off")])
        blocks.append(page.figure(chart, f"{name}: the weight that minimises the denoising error."))
        losses = [
            figures.Curve("main network", sigmas, [level.loss for level in found]),
            figures.Curve("guide", sigmas, [level.guide_loss for level in found]),
        ]
        chart = figures.line_chart(losses, "noise level", "loss", log_x=True, log_y=True)
        blocks.append(page.figure(chart, "Denoising loss with EDM's weight, smaller is better."))
        sizes = [
            figures.Curve("size |D - D_n| / |D|", sigmas, [level.size for level in found]),
            figures.Curve("cosine of the angle to D", sigmas, [level.cosine for level in found]),
        ]
        chart = figures.line_chart(sizes, "noise level", "size, cosine", log_x=True)
        blocks.append(page.figure(chart, "Size and direction of the difference between the two networks."))
    if result.angles:
        blocks.append(page.heading("How alike the guides are"))
        curves = [
            figures.Curve(f"{a} and {b}", list(result.sigmas), cosines) for (a, b), cosines in result.angles.items()
        ]
        chart = figures.line_chart(curves[:6], "noise level", "cosine", log_x=True)
        blocks.append(page.figure(chart, "Cosine between the differences of two guides; 1 means the same direction."))
    page.write_page(
        path,
        "Guides compared without sampling",
        blocks,
        f"{command} · {result.num_images} images · commit {commit[:12]}",
    )
