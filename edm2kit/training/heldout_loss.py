"""The loss on images kept out of training (--holdout), beside that of the same network on training images."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from edm2kit.data.archive import spread_evenly
from edm2kit.data.dataset import Source
from edm2kit.models.encoders import Encoder
from edm2kit.torch_utils import dist
from edm2kit.torch_utils.rng import StackedGenerator, derive_seed
from edm2kit.training.config import TrainConfig
from edm2kit.training.loss import EDM2Loss, TrainingLoss, noise_bins

MAX_IMAGES = 2048  # of either side, at each measurement


@dataclass(frozen=True)
class HeldoutLoss:
    """Measures a network on held-out images and on as many training images, without dropout or augmentation.

    Image k of either side has the same noise level and the same noise at every call; both depend on the seed of the run
    and k alone, and no random state of training is used. At most `max_images` of each side are used, evenly spread.
    `loss_fn` is EDM2's unless given.
    """

    config: TrainConfig
    encoder: Encoder
    training: Source
    heldout: Source
    batch_size: int
    device: torch.device
    loss_fn: TrainingLoss | None = None
    max_images: int = MAX_IMAGES
    shows_progress: bool = False

    def measure(self, net: nn.Module) -> dict[str, Any]:
        """Means over all noise levels ("loss") and within each range of them, as `stats.jsonl` names them.

        Every rank must call it. Returns {"images": held-out images, "heldout": means, "training": means, "gap_error":
        standard errors of their differences}. Raises ValueError, on every rank, if an image cannot be read on any.
        """
        count = min(len(self.heldout), self.max_images)
        sides = {}
        for name, source in (("heldout", self.heldout), ("training", self.training)):
            sides[name] = self.losses(net, source, spread_evenly(len(source), count))
        record: dict[str, Any] = {"images": count, "heldout": {}, "training": {}, "gap_error": {}}
        ranges = [("loss", 0.0, float("inf")), *noise_bins(self.config.P_mean, self.config.P_std)]
        for name, low, high in ranges:
            errors = []
            for side, (losses, sigma) in sides.items():
                inside = losses[(sigma >= low) & (sigma < high)]
                if len(inside) < 2:
                    break
                record[side][name] = float(inside.mean())
                errors.append(float(inside.var(ddof=1)) / len(inside))
            if len(errors) == len(sides):
                record["gap_error"][name] = sum(errors) ** 0.5
        return record

    @torch.no_grad()
    def losses(self, net: nn.Module, source: Source, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The loss and the noise level of items `numbers` of a source, float64 [N] each, on every rank.

        The k-th has the noise of number k at every call, whatever the image. Raises ValueError as `measure`.
        """
        loss_fn = self.loss_fn or EDM2Loss(self.config.P_mean, self.config.P_std, self.config.sigma_data)
        own = np.arange(dist.rank(), len(numbers), dist.world_size())
        found: dict[int, tuple[float, float]] = {}
        error = None
        bar = dist.progress_bar(len(own), "eval", what="losses", hidden=not self.shows_progress)
        with _in_eval_mode(net), bar:
            try:
                for start in range(0, len(own), self.batch_size):
                    ks = own[start : start + self.batch_size]
                    rng = StackedGenerator(self.device, [derive_seed(self.config.seed, "held-out", int(k)) for k in ks])
                    raw = torch.from_numpy(np.ascontiguousarray(source.read(numbers[ks]))).to(self.device)
                    labels = None
                    if getattr(net, "label_dim", 0):
                        labels = torch.from_numpy(source.read_labels(numbers[ks])).to(self.device)
                    images = self.encoder.encode(raw, rng).contiguous(memory_format=torch.channels_last)
                    loss, sigma = loss_fn.terms(net, images, labels, rng)
                    pairs = zip(loss.double().mean(dim=(1, 2, 3)).tolist(), sigma.tolist(), strict=True)
                    found.update(zip(ks.tolist(), pairs, strict=True))
                    bar.update(len(ks))
            except (ValueError, OSError) as caught:
                error = caught
        dist.raise_together(error)
        for part in dist.gather_objects(found):
            found.update(part)
        losses, sigmas = zip(*(found[k] for k in range(len(numbers))), strict=True)
        return np.array(losses), np.array(sigmas)


@contextlib.contextmanager
def _in_eval_mode(net: nn.Module) -> Any:
    was_training = net.training
    net.eval()
    try:
        yield
    finally:
        net.train(was_training)


def with_heldout(
    measure: HeldoutLoss,
    write: Callable[[int, Mapping[str, Any]], None],
    after: Callable[[nn.Module, int], Any] | None,
) -> Callable[[nn.Module, int], Any]:
    """A function for `training_loop` that measures, calls `write(nimg, record)`, and then does what `after` does."""

    def on_snapshot(net: nn.Module, nimg: int) -> Any:
        write(nimg, measure.measure(net))
        return after(net, nimg) if after is not None else None

    return on_snapshot
