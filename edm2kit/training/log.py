"""What a training run reports: a forecast before it starts, then statistics, status lines and TensorBoard events."""

import contextlib
import itertools
import json
import os
import resource
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from edm2kit.models.networks import NETWORKS
from edm2kit.models.preconditioning import PRECISIONS, Preconditioner
from edm2kit.torch_utils import dist
from edm2kit.torch_utils.files import atomic_write
from edm2kit.training.config import TrainConfig, most_epochs
from edm2kit.training.loss import EDM2Loss

if TYPE_CHECKING:
    from edm2kit.training.wandb_log import WandbLog

STATS_NAME, HELDOUT_NAME = "stats.jsonl", "heldout.jsonl"
STOPPED_NAME = "stopped.txt"  # is there as long as a run has stopped to be resumed
_GB = 1e9
_MAX_PENDING = 8192  # values on the device, each at least half a KB there


class RunningStats:
    """Mean and count of named quantities since the last `collect`.

    `add` only keeps the values; the host waits for the device in `collect`, once, and sums in float64 on the CPU.
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._pending: list[tuple[str, torch.Tensor | float, tuple[float, torch.Tensor, float] | None]] = []

    def add(
        self, name: str, values: torch.Tensor | float, between: tuple[float, torch.Tensor, float] | None = None
    ) -> None:
        """Add all of `values`, or with `between` = (low, x, high) those with low <= x < high, x shaped as `values`.

        The tensors must not change afterwards.
        """
        if isinstance(values, torch.Tensor) and values.requires_grad:
            values = values.detach()
        self._pending.append((name, values, between))
        if len(self._pending) >= _MAX_PENDING:
            self._sum_up()

    def _sum_up(self) -> None:
        """Add the values kept so far to the sums."""
        used = [x for _, values, between in self._pending for x in (values, between and between[1])]
        kept = {id(x): x for x in used if isinstance(x, torch.Tensor)}
        on_host = dict(zip(kept, _on_host(list(kept.values())), strict=True))
        for name, values, between in self._pending:
            numbers = on_host.get(id(values), torch.as_tensor(values)).double()
            if between is not None:
                low, x, high = between
                numbers = numbers[(on_host[id(x)] >= low) & (on_host[id(x)] < high)]
            moments = torch.stack([torch.tensor(float(numbers.numel()), dtype=torch.float64), numbers.sum()])
            self._sums[name] = self._sums[name] + moments if name in self._sums else moments
        self._pending = []

    def collect(self) -> dict[str, tuple[float, int]]:
        """(mean, count) over all ranks by name, in the order first added; then start over.

        Every rank must have added the same names. The mean of no values is NaN.
        """
        self._sum_up()
        if not self._sums:
            return {}
        names = list(self._sums)
        totals = dist.all_reduce_sum_(torch.stack(list(self._sums.values()))).tolist()
        self._sums = {}
        return {name: (s / c if c else float("nan"), int(c)) for name, (c, s) in zip(names, totals, strict=True)}


def _on_host(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """`tensors` of one device as float32 on the CPU, in a single copy; an Apple GPU has no float64."""
    if not tensors:
        return []
    flat = torch.cat([tensor.flatten().float() for tensor in tensors]).cpu()
    return [p.view(t.shape) for p, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]


class RunLog:
    """Writes status lines to the terminal, `stats.jsonl` to the run folder and, if asked for, TensorBoard events.

    `wandb` gets the same. Raises ValueError if TensorBoard is asked for but not installed.
    """

    def __init__(
        self,
        run_dir: Path,
        duration_nimg: int,
        device: torch.device,
        tensorboard: bool = False,
        wandb: "WandbLog | None" = None,
    ):
        self.run_dir, self.duration_nimg, self.device = run_dir, duration_nimg, device
        self._wandb = wandb
        self._make_writer: Any = None
        self._writer: Any = None
        self._last = self._said = (0, 0.0)  # images and seconds at the last status, and at the last line
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ValueError("--tensorboard needs the package tensorboard: pip install tensorboard") from error
            self._make_writer = SummaryWriter

    def begin(self, nimg: int, elapsed_sec: float) -> None:
        """Report where the run starts; drop statistics later than that, so that the file reads like a single run's."""
        self._last = self._said = (nimg, elapsed_sec)
        for name in (STATS_NAME, HELDOUT_NAME):
            dist.on_rank0(drop_later_lines, self.run_dir / name, nimg)
        dist.on_rank0(partial((self.run_dir / STOPPED_NAME).unlink, missing_ok=True))
        dist.print0(f"Resuming at {nimg} images" if nimg else "Starting at image 0")

    def progress(self, nimg: int, elapsed_sec: float) -> None:
        """Between status lines that are far apart: speed and time left, half a minute after the last line."""
        images, seconds = nimg - self._said[0], elapsed_sec - self._said[1]
        if seconds >= 30:
            self._said = (nimg, elapsed_sec)
            dist.print0(self._line({"nimg": nimg, "elapsed_sec": elapsed_sec, "images_per_sec": images / seconds}))

    def status(self, nimg: int, elapsed_sec: float, stats: dict[str, tuple[float, int]]) -> None:
        """Record the means since the last status."""
        images, seconds = nimg - self._last[0], elapsed_sec - self._last[1]
        self._last = self._said = (nimg, elapsed_sec)
        record: dict[str, Any] = {"nimg": nimg, "elapsed_sec": round(elapsed_sec, 3)}
        record["images_per_sec"] = round(images / max(seconds, 1e-9), 3)
        record |= {name: mean for name, (mean, count) in stats.items() if count} | memory_gb(self.device)
        mean, count = stats["nonfinite_gradients"]  # recorded as a total since the last status
        record["nonfinite_gradients"] = round(mean * count)
        self._write(STATS_NAME, nimg, record, {name: record[name] for name in sorted(record.keys() - {"nimg"})})
        dist.print0(self._line(record))

    def heldout(self, nimg: int, means: Mapping[str, Any]) -> None:
        """Record the loss on held-out images, as from `HeldoutLoss.measure`."""
        scalars = {f"{side}/{name}": value for side in ("heldout", "training") for name, value in means[side].items()}
        self._write(HELDOUT_NAME, nimg, {"nimg": nimg, **means}, scalars)
        text = f"{nimg:,} images  loss of the longest EMA: {means['heldout']['loss']:.4f} on {means['images']}"
        dist.print0(f"{text} held-out images, {means['training']['loss']:.4f} on training images")

    def picture(self, nimg: int, pixels: np.ndarray | None) -> None:
        """Show a sheet of samples, uint8 [H, W] or [H, W, 3], in TensorBoard and wandb, on rank 0."""
        if pixels is None or dist.rank() != 0:
            return
        if self._wandb is not None:
            self._wandb.picture(nimg, pixels)
        if self._make_writer is not None:
            with self._on_trouble(f"the samples at {nimg} images"):
                colours = pixels if pixels.ndim == 3 else pixels[:, :, None]
                self._events(nimg).add_image("samples", colours, global_step=nimg, dataformats="HWC")
                self._events(nimg).flush()

    def _write(self, name: str, nimg: int, record: Mapping[str, Any], scalars: Mapping[str, float]) -> None:
        """Append a line to a file of statistics, and show the scalars in TensorBoard, on rank 0."""
        if dist.rank() != 0:
            return
        if self._wandb is not None:
            self._wandb.write({"nimg": nimg, **scalars})
        with self._on_trouble(f"the statistics at {nimg} images"):
            append_line(self.run_dir / name, json.dumps(record))
            if self._make_writer is None:
                return
            for name, value in scalars.items():
                self._events(nimg).add_scalar(name, value, global_step=nimg)
            self._events(nimg).flush()

    def _events(self, nimg: int) -> Any:
        if self._writer is None:
            self._writer = self._make_writer(str(self.run_dir / "tensorboard"), purge_step=nimg)
        return self._writer

    @contextlib.contextmanager
    def _on_trouble(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            dist.warn0(f"{what} could not be written ({error}); training continues")

    def _line(self, record: dict[str, Any]) -> str:
        nimg, rate = record["nimg"], record["images_per_sec"]
        left = timedelta(seconds=round((self.duration_nimg - nimg) / max(rate, 1e-9)))
        parts = [f"{nimg:,} images ({min(nimg / self.duration_nimg, 1):.1%})"]
        if "loss" in record:
            parts.append(f"loss {record['loss']:.4f}  lr {record['lr']:.5f}  grad {record['gradient_norm']:.3f}")
            parts.append(f"mem {record.get('gpu_peak_gb', record['cpu_peak_gb']):.2f} GB")
        parts.append(f"{rate:.1f} img/s  {timedelta(seconds=round(record['elapsed_sec']))} elapsed, {left} left")
        if record.get("nonfinite_gradients"):
            parts.append(f"{record['nonfinite_gradients']} non-finite gradients set to 0")
        return "  ".join(parts)

    def stopped(self, nimg: int, is_saved: bool) -> None:
        """Report that the run was asked to stop, and whether it can be resumed."""
        saved = "state saved. Run the same command to resume." if is_saved else "no state saved: --checkpoint is 0."
        text = f"Stopped at {nimg} images; {saved}"
        dist.print0(text)
        if dist.rank() == 0 and is_saved:
            # an error such as a full disk does not matter: the state is safe
            with contextlib.suppress(OSError), atomic_write(self.run_dir / STOPPED_NAME, "w") as file:
                file.write(text + "\n")

    def finished(self, nimg: int) -> None:
        """Report that the run is complete."""
        dist.print0(f"Finished at {nimg} images; results are in {self.run_dir}")


def memory_gb(device: torch.device) -> dict[str, float]:
    """Peak memory of this process in GB (1e9 bytes): host memory and, on a CUDA device, GPU memory."""
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"cpu_peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)}
    if device.type == "cuda":
        peaks["gpu_peak_gb"] = round(torch.cuda.max_memory_reserved(device) / 1e9, 3)
    return peaks


def append_line(path: Path, line: str) -> None:
    """Add `line` to a text file, all of it or nothing: half a line of a full disk would spoil the next one, too."""
    content = line.encode() + b"\n"
    # a link in a folder from elsewhere is not followed
    with open(path, "ab", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666)) as file:
        before = os.fstat(file.fileno()).st_size
        try:
            while content:
                content = content[file.write(content) :]
        except OSError:
            file.truncate(before)
            raise


def drop_later_lines(path: Path, nimg: int) -> None:
    """Remove the lines of a statistics file that are later than `nimg` images, or damaged."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_bytes().splitlines():
        try:
            if json.loads(line)["nimg"] <= nimg:
                kept.append(line + b"\n")
        except (ValueError, KeyError, TypeError, RecursionError):
            continue  # the last process was killed while it wrote this line, or the disk damaged it
    with atomic_write(path) as file:
        file.writelines(kept)


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
        net = NETWORKS[config.network_kind].build(**architecture).train()
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
    snapshots = -(-config.duration_nimg // config.snapshot_every_nimg) if config.snapshot_every_nimg else 0
    checkpoints = -(-config.duration_nimg // config.checkpoint_every_nimg) if config.checkpoint_every_nimg else 0
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


def schedule_warnings(config: TrainConfig, num_images: int) -> list[str]:
    """What looks like a mistake in the schedule of a run on `num_images` images, and shows only at its end."""
    duration, every, found = config.duration_nimg, config.snapshot_every_nimg, []
    regularised = bool(config.augment and config.network.get("dropout"))
    epochs, most = duration / num_images, most_epochs(num_images, regularised)
    if epochs > most:
        remedy = "" if regularised or config.encoder["kind"] == "vae" else ", or both --dropout and --augment"
        found.append(
            f"{epochs:,.0f} epochs of {num_images:,} images: the network will memorise them. Use --duration "
            f"{most * num_images} or less, or more images{remedy}"
        )
    if config.rampup_nimg >= duration:
        found.append(
            f"the learning rate never reaches --lr: its --rampup takes {config.rampup_nimg:,} of {duration:,} images; "
            f"use --rampup {duration // 32} for example"
        )
    if every == 0:
        found.append("there will be no snapshots, which --snapshot 0 says")
    elif every >= duration:
        found.append(
            "snapshots come at one time only, the end, so no other EMA length can be rebuilt; use --snapshot "
            f"{max(1000, duration // 16)} for example"
        )
    return found
