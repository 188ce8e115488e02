"""How fast a network trains on this machine: complete steps on the real data, for a few seconds."""

import contextlib
import time

import torch

from edm2kit.data.batches import GlobalOrder, micro_batch_sizes, training_batches
from edm2kit.data.dataset import Source
from edm2kit.training.config import TrainConfig
from edm2kit.training.loop import Trainer
from edm2kit.training.run import resolve

_WARM_UP_STEPS, _LEAST_STEPS = 2, 3


def images_per_sec(config: TrainConfig, source: Source, device: torch.device, seconds: float) -> float:
    """Images per second of one process that trains as configured, from steps during about `seconds`.

    Reading, both averages and the optimizer are included; snapshots are not. At least three steps are timed after two
    that are not, however long they take. Writes nothing. Raises ValueError as `edm2kit.training.run.prepare_run`.
    """
    run = resolve(config, source)
    trainer = Trainer(run.config, run.header, run.encoder, device)
    rounds = len(micro_batch_sizes(config.batch_size, 1, config.max_micro_batch))
    order = GlobalOrder(len(source), config.seed)
    batches = training_batches(
        source, order, 0, config.batch_size, rank=0, world_size=1, batch_gpu=config.max_micro_batch, workers=0
    )
    with contextlib.closing(batches):
        for _ in range(_WARM_UP_STEPS):
            trainer.step(batches, rounds)
        _wait_for(device)
        steps, started = 0, time.monotonic()
        while steps < _LEAST_STEPS or time.monotonic() - started < seconds:
            trainer.step(batches, rounds)
            _wait_for(device)
            steps += 1
        return steps * config.batch_size / (time.monotonic() - started)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
