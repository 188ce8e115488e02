"""What a training run will need: parameters, memory and disk, computed before it starts."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from edm2kit.models.networks import build_network, network_kind
from edm2kit.models.preconditioning import PRECISIONS, Preconditioner
from edm2kit.training.config import TrainConfig
from edm2kit.training.loss import EDM2Loss

_GB = 1e9


@dataclass(frozen=True)
class Memory:
    """Bytes on each process, not counting allocator overhead and workspaces."""

    weights: int  # and their gradients
    optimizer: int
    averages: int
    activations: int  # saved for the backward pass of one micro-batch
    sampling: int = 0  # a complete EMA, gathered for sample images if the EMAs are sharded

    @property
    def state(self) -> int:
        return self.weights + self.optimizer + self.averages

    @property
    def total(self) -> int:
        return self.state + max(self.activations, self.sampling)


@dataclass(frozen=True)
class Forecast:
    """The needs of a run: number of parameters, number of optimizer steps, memory and disk in bytes.

    `memory` is that of the run as configured; `choices` holds that of other options, by their names.
    """

    parameters: int
    steps: int
    memory: Memory
    choices: dict[str, Memory]
    snapshot_bytes: int  # one file
    num_snapshots: int
    checkpoint_bytes: int  # one file
    num_checkpoints: int

    @property
    def disk_bytes(self) -> int:
        # one checkpoint more than is kept, because an old one is deleted only after the new one is complete
        return self.snapshot_bytes * self.num_snapshots + self.checkpoint_bytes * (self.num_checkpoints + 1)

    def lines(self) -> list[str]:
        """The forecast as text."""
        memory = self.memory
        gathered = ""
        if memory.sampling:
            gathered_gb = (self.checkpoint_bytes - memory.weights // 2) / _GB
            gathered = f", gathered in {gathered_gb:.2f} GB of rank 0's memory"
        return [
            f"parameters         {self.parameters / 1e6:.1f} M",
            f"optimizer steps    {self.steps}",
            f"memory per process {memory.total / _GB:.2f} GB at least: {memory.weights / _GB:.2f} for weights and "
            f"gradients, {memory.optimizer / _GB:.2f} for Adam, {memory.averages / _GB:.2f} for EMAs, "
            f"{memory.activations / _GB:.2f} for the activations of one micro-batch",
            *(f"  with {name:35s}{choice.total / _GB:.2f} GB" for name, choice in self.choices.items()),
            f"disk               {self.disk_bytes / _GB:.2f} GB: {self.num_snapshots} snapshots of "
            f"{self.snapshot_bytes / _GB:.3f}, {self.num_checkpoints} checkpoints of {self.checkpoint_bytes / _GB:.3f}"
            + gathered,
        ]


def make_forecast(config: TrainConfig, architecture: dict[str, Any], micro_batch: int, world_size: int) -> Forecast:
    """Compute the forecast without allocating the network, which is built on the meta device."""
    with torch.device("meta"):
        net = build_network(architecture, network_kind(config.network)).train()
    net.compute_dtype = PRECISIONS[config.precision]
    sizes = [p.numel() for p in net.parameters()]
    parameters, num_averages = sum(sizes), len(config.ema_stds)
    activations = {again: activation_bytes(net, micro_batch, again) for again in (False, True)}

    def memory(recompute: bool, shard: bool) -> Memory:
        kept = max(shares(sizes, world_size)) if shard else parameters
        sampling = parameters * 4 if shard and world_size > 1 else 0
        return Memory(parameters * 8, kept * 8, kept * 4 * num_averages, activations[recompute], sampling)

    choices = {}
    for recompute, shard in itertools.product((False, True), (False, True)):
        options = f"--recompute {str(recompute).lower()}"
        if world_size > 1:
            options += f" --shard {str(shard).lower()}"
        elif shard != config.shard:
            continue  # a single process has nothing to shard
        if (recompute, shard) != (config.recompute, config.shard):
            choices[options] = memory(recompute, shard)
    value_bytes = 4 if config.snapshot_dtype == "float32" else 2
    snapshots = -(-config.duration_nimg // config.snapshot_every_nimg)
    checkpoints = -(-config.duration_nimg // config.checkpoint_every_nimg)
    return Forecast(
        parameters=parameters,
        steps=-(-config.duration_nimg // config.batch_size),
        memory=memory(config.recompute, config.shard),
        choices=choices,
        snapshot_bytes=parameters * value_bytes,
        num_snapshots=snapshots * num_averages,
        checkpoint_bytes=parameters * 4 * (3 + num_averages),
        num_checkpoints=min(checkpoints, config.keep_checkpoints or checkpoints),
    )


def shares(sizes: Sequence[int], world_size: int) -> list[int]:
    """Number of weights on each rank if tensors of these sizes are sharded, as ZeroRedundancyOptimizer does it.

    Largest first, each tensor goes to the rank with the fewest weights.
    """
    kept = [0] * world_size
    for size in sorted(sizes, reverse=True):
        kept[kept.index(min(kept))] += size
    return kept


def activation_bytes(net: Preconditioner, micro_batch: int, recompute: bool = False) -> int:
    """Bytes that autograd keeps for the backward pass of `micro_batch` images; `net` is on the meta device.

    Each storage counts once, weights do not count. With `recompute`, every block keeps only its inputs, and in the
    backward pass one block at a time has its other activations too.
    """
    weights = {p.untyped_storage()._cdata for p in net.parameters()}
    # holding a storage prevents its address from being reused
    outside: dict[int, torch.UntypedStorage] = {}
    inside: dict[nn.Module, dict[int, torch.UntypedStorage]] = {}
    where = [outside]

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            where[-1][storage._cdata] = storage
        return tensor

    def enter(block: nn.Module, inputs: tuple[Any, ...]) -> None:
        for tensor in inputs[:2] if recompute else ():
            if isinstance(tensor, torch.Tensor):
                keep(tensor)
        where.append(inside.setdefault(block, {}))

    def leave(block: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        where.pop()

    hooks = [h for b in net.raw.blocks for h in (b.register_forward_pre_hook(enter), b.register_forward_hook(leave))]
    images = torch.empty(micro_batch, net.img_channels, net.img_resolution, net.img_resolution, device="meta")
    labels = torch.empty(micro_batch, net.label_dim, device="meta") if net.label_dim else None
    fused = partial(net, attention=dict.fromkeys(net.attention_blocks, _FusedAttention.apply))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = EDM2Loss()(fused, images, labels).sum()
    for hook in hooks:
        hook.remove()
    del loss
    if recompute:
        return _nbytes(outside) + max((_nbytes(found, but=outside) for found in inside.values()), default=0)
    return _nbytes(outside | {key: storage for found in inside.values() for key, storage in found.items()})


class _FusedAttention(torch.autograd.Function):
    """Keeps what fused attention keeps; the meta device would keep the full attention matrices."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        answer = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, answer)
        return answer


def _nbytes(storages: dict[int, torch.UntypedStorage], but: Iterable[int] = ()) -> int:
    return sum(storage.nbytes() for key, storage in storages.items() if key not in but)
