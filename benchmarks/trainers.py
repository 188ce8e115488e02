"""Trainers to measure: the real training step on random images, without data set and run folder."""

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from edm2kit.data.batches import MicroBatch
from edm2kit.models import full_architecture
from edm2kit.models.encoders import RGBEncoder
from edm2kit.snapshots.file_format import Header
from edm2kit.torch_utils import dist
from edm2kit.training.config import TrainConfig, config_from_dict, preset_path, read_yaml
from edm2kit.training.loop import Trainer

SMALL = {"model_channels": 64, "channel_mult": [1, 2, 2], "num_blocks": 2}


def preset_config(preset: str, **changes: Any) -> TrainConfig:
    """A preset's configuration with `changes`."""
    return config_from_dict({**read_yaml(preset_path(preset)), **changes}, preset)


def make_trainer(
    config: TrainConfig, resolution: int = 32, channels: int = 3, classes: int = 10, device: torch.device | str = "cpu"
) -> Trainer:
    """A trainer like that of train.py; its latents are the images themselves."""
    architecture = full_architecture(resolution, channels, classes, config.sigma_data, config.network)
    header = Header(architecture, {"kind": "rgb"}, 0, None)
    return Trainer(config, header, RGBEncoder(), torch.device(device))


def images_for(trainer: Trainer, batch: int) -> Iterator[MicroBatch]:
    """The same `batch` random images again and again, at new positions in the global order."""
    net = trainer.net
    shape = (batch, net.img_channels, net.img_resolution, net.img_resolution)
    raw = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(dist.rank()))
    labels = torch.eye(max(net.label_dim, 1))[torch.arange(batch) % max(net.label_dim, 1)]
    for first in itertools.count(dist.rank() * batch, batch * dist.world_size()):
        yield MicroBatch(raw, labels, torch.arange(first, first + batch))


class Clock:
    """Seconds spent in functions, by name; `watch` adds a function."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def watch(self, owner: object, method: str, name: str) -> None:
        """Add the time of every future call of `owner.method` to `name`."""
        setattr(owner, method, self.timed(getattr(owner, method), name))

    def timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

        return run
