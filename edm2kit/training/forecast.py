"""What a run will need, known before it starts: parameters, memory, disk."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from edm2kit.models.edm2 import Precond
from edm2kit.models.edm2_blocks import Block
from edm2kit.torch_utils.precision import PRECISIONS
from edm2kit.training.config import TrainConfig
from edm2kit.training.loss import EDM2Loss

_GB = 1e9


@dataclass(frozen=True)
class Memory:
    """Bytes on each process; the allocator's own overhead and work space come on top."""

    weights: int  # and their gradients
    optimizer: int
    averages: int
    activations: int  # saved for the backward pass of one micro-batch
    drawing: int = 0  # a whole average, put together to draw samples with where it is kept in shares

    @property
    def state(self) -> int:
        return self.weights + self.optimizer + self.averages

    @property
    def total(self) -> int:
        return self.state + max(self.activations, self.drawing)


@dataclass(frozen=True)
class Forecast:
    """`parameters` counts; `steps` optimizer steps in all; disk in bytes.

    `memory` of the run as configured; `choices` what it would be with other options, by their names.
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
        # one more checkpoint than is kept: the old one goes when the new one is safe
        return self.snapshot_bytes * self.num_snapshots + self.checkpoint_bytes * (self.num_checkpoints + 1)

    def lines(self) -> list[str]:
        """The forecast for people."""
        memory = self.memory
        # a whole average is drawn from where averages are kept in shares, and there checkpoints are put together
        gathered = f", put together in {(self.checkpoint_bytes - memory.weights // 2) / _GB:.2f} GB of rank 0's memory"
        return [
            f"parameters        {self.parameters / 1e6:.1f} M",
            f"optimizer steps   {self.steps}",
            f"memory a process  {memory.total / _GB:.2f} GB at least: {memory.weights / _GB:.2f} for weights and "
            f"gradients, {memory.optimizer / _GB:.2f} for Adam, {memory.averages / _GB:.2f} for averages, "
            f"{memory.activations / _GB:.2f} for the activations of a micro-batch",
            *(f"  with {name:34s}{choice.total / _GB:.2f} GB" for name, choice in self.choices.items()),
            f"disk              {self.disk_bytes / _GB:.2f} GB: {self.num_snapshots} snapshots of "
            f"{self.snapshot_bytes / _GB:.3f}, {self.num_checkpoints} checkpoints of {self.checkpoint_bytes / _GB:.3f}"
            + (gathered if memory.drawing else ""),
        ]


def make_forecast(config: TrainConfig, architecture: dict[str, Any], micro_batch: int, world_size: int) -> Forecast:
    """Compute the forecast without allocating the network (on the meta device)."""
    with torch.device("meta"):
        net = Precond(**architecture).train()
    net.compute_dtype = PRECISIONS[config.precision]
    sizes = [p.numel() for p in net.parameters()]
    parameters, num_averages = sum(sizes), len(config.ema_stds)
    activations = {again: activation_bytes(net, micro_batch, again) for again in (False, True)}

    def memory(recompute: bool, shard: bool) -> Memory:
        kept = max(shares(sizes, world_size)) if shard else parameters
        drawing = parameters * 4 if shard and world_size > 1 else 0
        return Memory(parameters * 8, kept * 8, kept * 4 * num_averages, activations[recompute], drawing)

    half = 2 if config.snapshot_dtype != "float32" else 4
    snapshots = -(-config.duration_nimg // config.snapshot_every_nimg)
    checkpoints = -(-config.duration_nimg // config.checkpoint_every_nimg)
    return Forecast(
        parameters=parameters,
        steps=-(-config.duration_nimg // config.batch_size),
        memory=memory(config.recompute, config.shard),
        choices={name: memory(*given) for name, given in _choices(config, world_size)},
        snapshot_bytes=parameters * half,
        num_snapshots=snapshots * num_averages,
        checkpoint_bytes=parameters * 4 * (3 + num_averages),
        num_checkpoints=min(checkpoints, config.keep_checkpoints or checkpoints),
    )


def _choices(config: TrainConfig, world_size: int) -> Iterable[tuple[str, tuple[bool, bool]]]:
    for recompute, shard in itertools.product((False, True), (False, True) if world_size > 1 else (config.shard,)):
        if (recompute, shard) != (config.recompute, config.shard):
            sharing = f" --shard {str(shard).lower()}" if world_size > 1 else ""
            yield f"--recompute {str(recompute).lower()}{sharing}", (recompute, shard)


def shares(sizes: Sequence[int], world_size: int) -> list[int]:
    """How many weights each rank keeps of tensors with `sizes` weights: the largest first, each to the emptiest rank.

    It is how ZeroRedundancyOptimizer shares tensors out.
    """
    kept = [0] * world_size
    for size in sorted(sizes, reverse=True):
        kept[kept.index(min(kept))] += size
    return kept


def activation_bytes(net: Precond, micro_batch: int, recompute: bool = False) -> int:
    """Bytes that autograd keeps for the backward pass of the loss of `micro_batch` images; `net` on meta.

    Each storage counts once, weights do not. With `recompute` blocks keep what goes into them, and on the way back
    one at a time has its insides.
    """
    weights = {p.untyped_storage()._cdata for p in net.parameters()}
    # holding a storage keeps its identity from being used again
    outside: dict[int, torch.UntypedStorage] = {}
    inside: dict[Block, dict[int, torch.UntypedStorage]] = {}
    where = [outside]

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            where[-1][storage._cdata] = storage
        return tensor

    def enter(block: Block, inputs: tuple[Any, ...]) -> None:
        for tensor in inputs[:2] if recompute else ():
            keep(tensor)
        where.append(inside.setdefault(block, {}))

    def leave(block: Block, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        where.pop()

    blocks = [module for module in net.modules() if isinstance(module, Block)]
    hooks = [h for b in blocks for h in (b.register_forward_pre_hook(enter), b.register_forward_hook(leave))]
    images = torch.empty(micro_batch, net.img_channels, net.img_resolution, net.img_resolution, device="meta")
    labels = torch.empty(micro_batch, net.label_dim, device="meta") if net.label_dim else None
    fused = partial(net, attention=dict.fromkeys(net.attention_blocks, _FusedAttention.apply))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = EDM2Loss()(fused, images, labels).sum()
    for hook in hooks:
        hook.remove()
    del loss
    if recompute:
        return _nbytes(outside) + max(_nbytes(found, but=outside) for found in inside.values())
    return _nbytes(outside | {key: storage for found in inside.values() for key, storage in found.items()})


class _FusedAttention(torch.autograd.Function):
    """What fused attention keeps; the meta device itself would keep all the products of attention."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        answer = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, answer)
        return answer


def _nbytes(storages: dict[int, torch.UntypedStorage], but: Iterable[int] = ()) -> int:
    return sum(storage.nbytes() for key, storage in storages.items() if key not in but)
