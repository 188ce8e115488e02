"""Losses of a run's snapshots on images, and images of the snapshots, with progress bars."""

from collections.abc import Iterator
from typing import Any

import torch

from edm2kit.data.dataset import Source
from edm2kit.experiments.runs.folder import RunFolder
from edm2kit.models.preconditioning import PRECISIONS
from edm2kit.sampling.engine import Engine
from edm2kit.snapshots.loading import load_snapshot
from edm2kit.torch_utils.dist import progress_bar
from edm2kit.training.heldout_loss import HeldoutLoss

BATCH = 32


def measure_heldout(
    run: RunFolder, training: Source, heldout: Source, device: torch.device, max_images: int
) -> dict[str, Any]:
    """A line as in heldout.jsonl for the newest snapshot of the longest EMA, on images that the run did not see.

    Raises ValueError if the run has no snapshot or the images do not fit the network.
    """
    if not run.headers:
        raise ValueError(f"{run.path} has no snapshots to measure")
    if (training.item_shape, training.condition_space) != (heldout.item_shape, heldout.condition_space):
        raise ValueError(
            f"{heldout.path} has items of {list(heldout.item_shape)} ({heldout.condition_space}), the training set "
            f"{list(training.item_shape)} ({training.condition_space}); prepare both alike"
        )
    path = max(run.headers, key=lambda one: (run.headers[one].nimg, run.headers[one].ema_std or 0))
    snapshot = load_snapshot(path, device, PRECISIONS[run.config.precision])
    measure = HeldoutLoss(run.config, snapshot.encoder, training, heldout, BATCH, device, None, max_images, True)
    return {"nimg": snapshot.header.nimg, **measure.measure(snapshot.net)}


def generated_images(engine: Engine, count: int, what: str) -> Iterator[torch.Tensor]:
    """The images of seeds 0 to count - 1 in batches, uint8 [n, C, H, W], with a progress bar that is called `what`."""
    with progress_bar(count, what=what) as bar:
        for batch in engine.batches(range(count), BATCH):
            yield batch.images
            bar.update(len(batch.images))
