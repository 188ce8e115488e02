"""What a run will need, known before it starts: parameters, memory, disk."""

from dataclasses import dataclass
from typing import Any

import torch

from training.config import TrainConfig
from training.loop import COMPUTE_DTYPES
from training.loss import EDM2Loss
from training.networks import Precond

_GB = 1e9


@dataclass(frozen=True)
class Forecast:
    """`parameters` counts; memory per process and disk in bytes; `steps` optimizer steps in all."""

    parameters: int
    steps: int
    state_bytes: int  # weights, gradients, Adam's two moments, averages
    activation_bytes: int  # saved for the backward pass of one micro-batch
    snapshot_bytes: int  # one file
    num_snapshots: int
    checkpoint_bytes: int  # one file
    num_checkpoints: int

    @property
    def memory_bytes(self) -> int:
        return self.state_bytes + self.activation_bytes

    @property
    def disk_bytes(self) -> int:
        # one more checkpoint than is kept: the old one goes when the new one is safe
        return self.snapshot_bytes * self.num_snapshots + self.checkpoint_bytes * (self.num_checkpoints + 1)

    def lines(self) -> list[str]:
        """The forecast for people."""
        return [
            f"parameters        {self.parameters / 1e6:.1f} M",
            f"optimizer steps   {self.steps}",
            f"memory a process  {self.memory_bytes / _GB:.2f} GB at least: {self.state_bytes / _GB:.2f} for weights, "
            f"gradients, Adam and averages, {self.activation_bytes / _GB:.2f} for the activations of a micro-batch",
            f"disk              {self.disk_bytes / _GB:.2f} GB: {self.num_snapshots} snapshots of "
            f"{self.snapshot_bytes / _GB:.3f}, {self.num_checkpoints} checkpoints of {self.checkpoint_bytes / _GB:.3f}",
        ]


def make_forecast(config: TrainConfig, architecture: dict[str, Any], micro_batch: int) -> Forecast:
    """Compute the forecast without allocating the network (on the meta device)."""
    with torch.device("meta"):
        net = Precond(**architecture).train()
    net.compute_dtype = COMPUTE_DTYPES[config.precision]
    parameters = sum(p.numel() for p in net.parameters())
    num_averages = len(config.ema_stds)
    half = 2 if config.snapshot_dtype != "float32" else 4
    snapshots = -(-config.duration_nimg // config.snapshot_every_nimg)
    checkpoints = -(-config.duration_nimg // config.checkpoint_every_nimg)
    return Forecast(
        parameters=parameters,
        steps=-(-config.duration_nimg // config.batch_size),
        state_bytes=parameters * 4 * (4 + num_averages),
        activation_bytes=activation_bytes(net, micro_batch),
        snapshot_bytes=parameters * half,
        num_snapshots=snapshots * num_averages,
        checkpoint_bytes=parameters * 4 * (3 + num_averages),
        num_checkpoints=min(checkpoints, config.keep_checkpoints or checkpoints),
    )


def activation_bytes(net: Precond, micro_batch: int) -> int:
    """Bytes that autograd keeps for the backward pass of the loss of `micro_batch` images; `net` on meta.

    Each storage counts once, weights do not. The allocator's own overhead and work space come on top.
    """
    weights = {p.untyped_storage()._cdata for p in net.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage  # holding it keeps its identity from being used again
        return tensor

    images = torch.empty(1, net.img_channels, net.img_resolution, net.img_resolution, device="meta")
    labels = torch.empty(1, net.label_dim, device="meta") if net.label_dim else None
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = EDM2Loss()(net, images, labels).sum()
    per_image = sum(s.nbytes() for s in saved.values())
    del loss
    # normalised weights are saved once, whatever the batch
    once = sum(p.numel() for p in net.parameters()) * (4 + net.compute_dtype.itemsize)
    return max(per_image - once, 0) * micro_batch + once
