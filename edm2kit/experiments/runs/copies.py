"""Are generated images copies of training images? Nearest neighbours and AuthPct."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from edm2kit.cli.generation import Request, prepare
from edm2kit.cli.output_kinds import sheet_notes
from edm2kit.data.archive import spread_evenly
from edm2kit.data.dataset import Source
from edm2kit.data.image_files import labelled_sheet
from edm2kit.experiments.runs.findings import COPIES, Check, Finding
from edm2kit.experiments.runs.folder import RunFolder
from edm2kit.experiments.runs.snapshot_losses import BATCH, generated_images
from edm2kit.metrics.detectors.registry import load_detectors
from edm2kit.metrics.neighbours import neighbourhood
from edm2kit.metrics.scoring import image_features
from edm2kit.models.encoders import to_image
from edm2kit.torch_utils.dist import progress_bar
from edm2kit.torch_utils.files import atomic_write

DETECTOR = "fd_lite0"
MAX_TRAINING = 50_000
_NEAR_HALF = 0.35  # AuthPct of a perfect model is near 0.5
_BELOW_HELDOUT = 0.1
_PAIRS = 16


@dataclass(frozen=True)
class Nearest:
    """Of each image: whether it is authentic, and the training image nearest to it.

    `closeness` is its distance to that image, relative to the distance of that image to its own nearest training image:
    small for copies.
    """

    is_authentic: np.ndarray
    nearest: np.ndarray
    closeness: np.ndarray

    @property
    def share(self) -> float:
        """AuthPct as a share."""
        return float(self.is_authentic.mean())

    @property
    def error(self) -> float:
        """The standard error of the share."""
        return (self.share * (1 - self.share) / len(self.is_authentic)) ** 0.5


def nearest_images(training: torch.Tensor, images: torch.Tensor) -> Nearest:
    """Compare features, float32 [N, F] of training images and [M, F] of others. Alaa et al. 2022 (arXiv 2102.08921)."""
    found = neighbourhood(training, images)
    own = found.real_squared_distance[found.nearest_real]
    closeness = (found.squared_distance_to_real / own.clamp(min=1e-30)).sqrt()
    return Nearest((own < found.squared_distance_to_real).numpy(), found.nearest_real.numpy(), closeness.numpy())


def check_copies(
    run: RunFolder,
    training: Source,
    heldout: Source | None,
    device: torch.device,
    count: int,
    sheet: Path | None = None,
    detector: str | None = None,
) -> Check:
    """Compare `count` generated images with the training images, and held-out images with them in the same way.

    `detector` is DETECTOR unless given. `sheet` is where the generated images that are nearest to a training image are
    shown beside it.
    """
    detector = detector or DETECTOR
    if training.item_dtype != np.uint8:
        return Check(COPIES, not_looked="the data are latents; use calculate_metrics.py --real with the images")
    if not run.headers:
        return Check(COPIES, not_looked="the run has no snapshot to generate with")
    try:
        detectors = load_detectors([detector], device)
    except ValueError as error:
        return Check(COPIES, not_looked=f"{detector} cannot be loaded ({error})")
    path = max(run.headers, key=lambda one: (run.headers[one].nimg, run.headers[one].ema_std or 0))
    engine = prepare(Request(str(path), precision=run.config.precision), device).engine
    images = torch.cat([batch.cpu() for batch in generated_images(engine, count, "generated images")])
    numbers = spread_evenly(len(training), MAX_TRAINING)

    def features(source: Source, picked: np.ndarray, what: str) -> torch.Tensor:
        return image_features(_batches(source, picked, what), detectors, device)[detector]

    real = features(training, numbers, "features of training images")
    found = nearest_images(real, image_features(images, detectors, device)[detector])
    seen = f"AuthPct {found.share:.1%} \u00b1 {found.error:.1%} of {count} generated images, by {detector} features, "
    seen += f"against {len(numbers):,} training images (near 50% if nothing is copied, 100% if they look like none)"
    if len(numbers) < len(training):
        seen += f", which are not all {len(training):,}: copies of others are not found"
    copied = found.share + 3 * found.error < _NEAR_HALF
    evidence = f"AuthPct {found.share:.1%} \u00b1 {found.error:.1%}; without copies it is near 50%"
    if heldout is not None and len(heldout) > 5:
        others = nearest_images(real, features(heldout, spread_evenly(len(heldout), count), "held-out images"))
        seen += f"; {others.share:.1%} \u00b1 {others.error:.1%} of {len(others.nearest)} held-out images"
        errors = (found.error**2 + others.error**2) ** 0.5
        copied = others.share - found.share > max(_BELOW_HELDOUT, 3 * errors)
        evidence = f"AuthPct {found.share:.1%} of generated images, {others.share:.1%} of held-out images"
    order = np.argsort(found.closeness, kind="stable")[:_PAIRS]
    rows = []
    for k in order[:3]:
        name = training.item_name(int(numbers[found.nearest[k]]))
        rows.append(f"seed {k} is {found.closeness[k]:.2f} times as far from {name} as that is from its own neighbour")
    if sheet is not None:
        _write_pairs(sheet, training, numbers, images, found, order)
        rows.append(f"the {len(order)} nearest pairs are in {sheet}")
    if not copied:
        return Check(COPIES, seen, rows=rows)
    advice = (
        "Look at the pairs (--sheet). Use an earlier snapshot, more images, --augment 0.12, --dropout, or fewer "
        "--channels; remove duplicates from the training set"
    )
    finding = Finding("Generated images are too close to training images: the network copies.", evidence, advice)
    return Check(COPIES, seen, [finding], rows=rows)


def _batches(source: Source, numbers: np.ndarray, what: str) -> Iterator[torch.Tensor]:
    with progress_bar(len(numbers), what=what) as bar:
        for start in range(0, len(numbers), BATCH):
            part = numbers[start : start + BATCH]
            yield torch.from_numpy(np.ascontiguousarray(source.read(part)))
            bar.update(len(part))


def _write_pairs(
    path: Path, training: Source, numbers: np.ndarray, images: torch.Tensor, found: Nearest, order: np.ndarray
) -> None:
    """Generated images beside the training images nearest to them, nearest first."""
    pictures, captions = [], []
    for k in order:
        number = int(numbers[found.nearest[k]])
        raw = training.read(np.array([number]))[0]
        pictures += [to_image(images[k].numpy()), to_image(raw)]
        captions += [f"seed {k}, {found.closeness[k]:.2f}", Path(training.item_name(number)).name]
    title = "Generated images, each with the training image nearest to it at its right; 0 is a copy, about 1 is usual"
    picture = labelled_sheet(pictures, 8, title=title, captions=captions)
    with atomic_write(path) as file:
        picture.save(file, "PNG", pnginfo=sheet_notes())
