"""The training loop: optimizer steps, snapshots, checkpoints.

A resumed run equals an uninterrupted one bit for bit on a CPU; on a GPU up to rounding, or with --deterministic.
"""

import contextlib
import dataclasses
import inspect
import math
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from edm2kit.data.batches import MicroBatch, next_step
from edm2kit.ema.power_function import PowerFunctionEMA
from edm2kit.models.encoders import Encoder
from edm2kit.models.networks import NETWORKS
from edm2kit.models.preconditioning import PRECISIONS, Preconditioner
from edm2kit.snapshots.file_format import Header, save_snapshot, snapshot_name
from edm2kit.torch_utils import dist
from edm2kit.torch_utils.rng import StackedGenerator, derive_seed
from edm2kit.training.checkpoint import (
    DivergenceError,
    bad_losses,
    check_finite,
    checkpoint_state,
    join_parts,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    usable_checkpoint,
)
from edm2kit.training.config import TrainConfig
from edm2kit.training.fine_tuning import start_from_
from edm2kit.training.learning_rate import learning_rate
from edm2kit.training.log import RunLog, RunningStats
from edm2kit.training.loss import EDM2Loss, TrainingLoss, noise_bins
from edm2kit.training.stop import leave_network, remove_snapshots, save_after, write_missing_snapshots

_LOOK_EVERY_STEPS = 16  # looking at a counter makes the host wait for an accelerator


class Trainer:
    """The state of a training run on one rank, and the step that changes it.

    `header` is that of the snapshots, except for nimg and ema_std. `loss_fn` is EDM2's unless given.
    """

    def __init__(
        self,
        config: TrainConfig,
        header: Header,
        encoder: Encoder,
        device: torch.device,
        loss_fn: TrainingLoss | None = None,
    ):
        torch.manual_seed(derive_seed(config.seed, "init"))
        # the fastest algorithm of a benchmark may be another one in the next run
        repeatable = torch.are_deterministic_algorithms_enabled()
        torch.backends.cudnn.benchmark = config.cudnn_benchmark and not repeatable
        self.config, self.encoder, self.device = config, encoder, device
        # channels last is 1.2 times as fast on a CPU, and the layout that tensor cores need
        self.kind = NETWORKS[header.network]
        self.net = self.kind.build(**header.architecture).train()
        self.net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload] # torch's stubs lack it
        learned = dict(self.net.named_parameters())
        self.header = dataclasses.replace(header, buffers=tuple(n for n in self.net.state_dict() if n not in learned))
        self.net.compute_dtype = PRECISIONS[config.precision]
        if config.init_from is not None:
            start_from_(self.net, config.init_from)
        if config.recompute:
            self.net.recompute_in_training_()
        self.optimizer, self.ema = _optimizer_and_averages(self.net, config, device)
        self.loss_fn = loss_fn or EDM2Loss(config.P_mean, config.P_std, config.sigma_data)
        self.stats = RunningStats()
        self.nimg, self.elapsed_sec = 0, 0.0
        self.stops: list[int] = []  # images at which a stopped run left snapshots that its schedule does not have
        self.num_steps = 0
        self.is_whole = True  # weights, moments and averages are all at `nimg`
        self._is_normalized = False  # whether the next step finds its weights normalised, as a failed one left them
        self._recent_steps: list[tuple[torch.Tensor | float, torch.Tensor]] = []  # non-finite gradients, and the norm
        self._lost_steps = 0  # steps in a row without usable gradients
        self._last_losses: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.ddp = _distribute(self.net, device)
        self._flat_gradient: torch.Tensor | None = None
        if self.ddp is self.net and device.type != "cpu":
            self._flat_gradient = _flatten_gradients_(self.net)
        if config.compile == "on":
            from edm2kit.models.compilation import compile_

            compile_(self.net)

    def step(self, micro_batches: Iterator[MicroBatch], rounds: int) -> None:
        """One optimizer step over this rank's share of the next global batch, in `rounds` micro-batches."""
        self.num_steps += 1
        self._last_losses.clear()
        if not self._is_normalized:
            self.kind.normalize_weights_(self.net)
            self._is_normalized = True
        self._clear_gradients()
        for k in range(rounds):
            # ranks exchange gradients in the last backward pass of the step only
            with self._without_exchange() if k < rounds - 1 else contextlib.nullcontext():
                self._accumulate(next(micro_batches))
        lr = learning_rate(
            self.nimg, self.config.batch_size, self.config.ref_lr, self.config.ref_batches, self.config.rampup_nimg
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._sanitize_gradients()
        self.stats.add("lr", lr)
        self.is_whole = False
        self.optimizer.step()
        self.nimg += self.config.batch_size
        self.ema.update(self.nimg, self.config.batch_size)
        self.is_whole, self._is_normalized = True, False

    def _clear_gradients(self) -> None:
        if self._flat_gradient is None:
            self.optimizer.zero_grad(set_to_none=True)
        else:
            self._flat_gradient.zero_()

    def _without_exchange(self) -> contextlib.AbstractContextManager[None]:
        return self.ddp.no_sync() if isinstance(self.ddp, DistributedDataParallel) else contextlib.nullcontext()

    def rehearse(self, size: int, reserved_bytes: int = 0) -> None:
        """A forward and backward pass on this rank with `size` images of zeros; the state of training stays as it was.

        `reserved_bytes` of the device's memory are set aside during it, for what a step needs beyond.
        """
        architecture, resolution = self.header.architecture, self.net.img_resolution
        images = torch.zeros(size, architecture["img_channels"], resolution, resolution, device=self.device)
        images = images.contiguous(memory_format=torch.channels_last)
        labels = torch.zeros(size, self.net.label_dim, device=self.device) if self.net.label_dim else None
        reserved = torch.empty(reserved_bytes, dtype=torch.uint8, device=self.device)
        with self._without_exchange():
            loss, _ = self.loss_fn.terms(self.ddp, images, labels, StackedGenerator(self.device, range(size)))
            loss.sum().backward()
        del reserved
        self._clear_gradients()

    def compile_if_it_pays_(self, size: int, rounds: int) -> None:
        """Compile the network if that shortens the run, of `rounds` micro-batches of `size` images a step."""
        from edm2kit.models.compilation import compile_if_it_pays_

        steps_left = max(self.config.duration_nimg - self.nimg, 0) // self.config.batch_size
        run = partial(self.rehearse, size)
        compile_if_it_pays_([self.net], run, steps_left * rounds, self.device, "training step")

    def _accumulate(self, batch: MicroBatch) -> None:
        batch = batch.to(self.device)
        config, positions = self.config, batch.positions.tolist()
        rng = StackedGenerator(self.device, [derive_seed(config.seed, "image", p) for p in positions])
        torch.manual_seed(derive_seed(config.seed, "dropout", positions[0]))  # only dropout uses the global generator
        images = self.encoder.encode(batch.raw, rng).contiguous(memory_format=torch.channels_last)
        net: Callable[..., Any] = self.ddp
        augment_dim = self.header.architecture.get("augment_dim", 0)
        if config.flip or augment_dim:
            images, augmentation = self._augmented(images, positions)
            net = partial(self.ddp, augment=augmentation) if augment_dim else self.ddp
        labels = batch.labels if self.net.label_dim else None
        if labels is not None and config.label_dropout:
            labels = drop_labels(labels, positions, config.label_dropout, config.seed)
        loss, sigma = self.loss_fn.terms(net, images, labels, rng)
        # DDP averages gradients over ranks; the loss is a sum over the global batch divided by its size
        scale = config.loss_scaling * dist.world_size() / config.batch_size
        loss.sum().mul(scale).backward()
        image_loss = loss.detach().mean(dim=(1, 2, 3))
        self._last_losses.append((batch.positions, image_loss, sigma))
        self.stats.add("loss", image_loss)
        for name, low, high in noise_bins(config.P_mean, config.P_std):
            self.stats.add(name, image_loss, between=(low, sigma, high))

    def _augmented(self, images: torch.Tensor, positions: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The images as --flip and --augment change them, and the labels that tell the network how."""
        from edm2kit.training import augmentation  # most runs do without

        config = self.config
        if config.flip:
            images = augmentation.flip_half(images, positions, config.seed)
        labels = torch.zeros(len(positions), augmentation.NUM_LABELS, device=images.device)
        if config.augment:
            images, labels = augmentation.augment(images, positions, config.seed, config.augment)
        return images.contiguous(memory_format=torch.channels_last), labels

    @torch.no_grad()
    def _sanitize_gradients(self) -> None:
        """Undo loss scaling, replace non-finite gradients by 0 and count them; call after the all-reduce."""
        gradients = _joined(p.grad for p in self.net.parameters() if p.grad is not None)
        if self.config.loss_scaling != 1:
            torch._foreach_div_(gradients, self.config.loss_scaling)
        count: torch.Tensor | float = 0.0
        # with a finite norm there is nothing to replace, but looking at it would stall an accelerator
        if self.device.type != "cpu":
            count = torch.stack([_replace_nonfinite_(part) for part in gradients]).sum()
        norm = torch.stack(torch._foreach_norm(gradients)).norm()
        if self.device.type == "cpu" and not norm.isfinite():
            count = torch.stack([_replace_nonfinite_(part) for part in gradients]).sum()
            norm = torch.stack(torch._foreach_norm(gradients)).norm()
            if not norm.isfinite():
                # Adam squares gradients: one whose square is infinite would stop its weight for good
                count = torch.tensor(sum(part.numel() for part in gradients))
                torch._foreach_zero_(gradients)
                norm = torch.zeros([])
        self._recent_steps.append((count, norm))
        self.stats.add("gradient_norm", norm)
        # all ranks hold the same gradients, so each adds its part of the count
        self.stats.add("nonfinite_gradients", count / dist.world_size())

    def is_due(self, every_nimg: int, at_end: bool) -> bool:
        """Whether the last step reached or passed a multiple of `every_nimg`, or is the end; never if that is 0."""
        if every_nimg == 0:
            return False
        return at_end or self.nimg // every_nimg > (self.nimg - self.config.batch_size) // every_nimg

    def check_gradients(self, at_end: bool = False) -> None:
        """Raise DivergenceError on every rank after too many steps in a row whose gradients were mostly not finite.

        At the end, raise it if all steps of this process were so, however few.
        """
        if self.device.type != "cpu" and self.num_steps % _LOOK_EVERY_STEPS and not at_end:
            return
        total = sum(parameter.numel() for parameter in self.net.parameters() if parameter.requires_grad)
        for count, norm in self._recent_steps:
            if not math.isfinite(float(norm)):
                raise DivergenceError("the gradients are too large for Adam to square", self.nimg, [])
            self._lost_steps = self._lost_steps + 1 if 2 * float(count) >= total else 0
        self._recent_steps.clear()
        limit = self.config.max_lost_steps
        is_all = at_end and 0 < self.num_steps == self._lost_steps
        if limit == 0 or not (self._lost_steps >= limit or is_all):
            return
        steps = "1 step" if self._lost_steps == 1 else f"{self._lost_steps} steps in a row"
        reason = f"in {steps}, most gradients were not finite"
        raise DivergenceError(reason, self.nimg, bad_losses(self._last_losses))

    def save_snapshots(self, run_dir: Path) -> None:
        """Write a snapshot of each EMA, and remove those that the run left when it was stopped before."""
        for number, std in enumerate(self.ema.stds):
            self.save_snapshot(run_dir / snapshot_name(self.nimg, std), number)
        if self.stops:
            dist.on_rank0(remove_snapshots, run_dir, [n for n in self.stops if n != self.nimg], self.ema.stds)
            self.stops.clear()

    def save_snapshot(self, path: Path, number: int) -> None:
        """Write a snapshot of the EMA of this number."""
        header = dataclasses.replace(self.header, nimg=self.nimg, ema_std=self.ema.stds[number])
        dist.on_rank0(save_snapshot, path, self.ema.weights(number), header)

    def progress(self) -> dict[str, Any]:
        """Where the run is, as plain numbers and strings for a checkpoint."""
        progress = {"nimg": self.nimg, "elapsed_sec": self.elapsed_sec, "run_id": self.header.run_id}
        if self.stops:
            progress["stops"] = list(self.stops)
        if self._is_normalized:
            progress["is_normalized"] = True
        return progress

    def save_checkpoint(self, run_dir: Path) -> None:
        """Write the state to resume from, then delete old ones. Every rank must call it."""
        state = checkpoint_state(self.net, self.optimizer, self.ema, self.progress())
        dist.on_rank0(save_checkpoint, run_dir, state)
        dist.on_rank0(prune_checkpoints, run_dir, self.config.keep_checkpoints)

    def resume(self, run_dir: Path) -> None:
        """Continue from the newest checkpoint that is not damaged, if there is one."""
        dist.on_rank0(join_parts, run_dir)
        if path := dist.on_rank0(usable_checkpoint, run_dir, self.header.run_id):
            progress = load_checkpoint(path, self.net, self.optimizer, self.ema, self.device)
            self.nimg, self.elapsed_sec = progress["nimg"], progress["elapsed_sec"]
            self.stops = list(progress.get("stops", []))
            self.is_whole, self._is_normalized = True, progress.get("is_normalized", False)
        elif dist.rank() == 0 and next(run_dir.glob("network-snapshot-*.safetensors"), None) is not None:
            dist.warn0(
                f"{run_dir} has snapshots, but no checkpoint: training starts again at image 0 and replaces them"
            )


def _optimizer_and_averages(
    net: Preconditioner, config: TrainConfig, device: torch.device
) -> tuple[torch.optim.Optimizer, PowerFunctionEMA]:
    arguments: dict[str, Any] = {
        "lr": config.ref_lr,
        "betas": config.adam_betas,
        "eps": config.adam_eps,
        "fused": device.type != "mps",
    }
    if config.shard and dist.world_size() > 1:
        from edm2kit.training.sharding import ShardedAdam, ShardedEMA  # importing its base class takes two seconds

        optimizer = ShardedAdam(net.parameters(), **arguments)
        return optimizer, ShardedEMA(net, optimizer, config.ema_stds)
    return torch.optim.Adam(net.parameters(), **arguments), PowerFunctionEMA(net, config.ema_stds)


def _flatten_gradients_(net: nn.Module) -> torch.Tensor:
    """Make the gradients of `net` views of one buffer, which is returned, so that few kernels see all of them."""
    # kernels read four numbers at a time if they start at a multiple of 16 bytes, so odd sizes come last
    parameters = sorted((p for p in net.parameters() if p.requires_grad), key=lambda p: p.numel() % 4 != 0)
    flat = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        # in the memory layout of the parameter, which fused optimizers are fastest with
        parameter.grad = part.as_strided(parameter.shape, parameter.stride())
    return flat


def _joined(gradients: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The same memory as `gradients` in fewer tensors: gradients that fill one buffer become slices of it.

    Slices have at most 64 Mi elements, so that temporary results stay small.
    """
    by_buffer: dict[int, list[torch.Tensor]] = {}
    for gradient in gradients:
        by_buffer.setdefault(gradient.untyped_storage()._cdata, []).append(gradient)
    parts: list[torch.Tensor] = []
    for found in by_buffer.values():
        size = found[0].untyped_storage().nbytes() // found[0].element_size()
        if sum(gradient.numel() for gradient in found) == size:
            parts += found[0].as_strided([size], [1], 0).split(1 << 26)
        else:
            parts += found
    return parts


def _replace_nonfinite_(values: torch.Tensor) -> torch.Tensor:
    """Replace NaN and infinity in `values` by 0, in place; returns their number, without waiting for the device."""
    nonzero = values.count_nonzero()
    torch.nan_to_num(values, nan=0, posinf=0, neginf=0, out=values)
    return nonzero - values.count_nonzero()


def _distribute(net: Preconditioner, device: torch.device) -> nn.Module:
    """The network with gradients averaged over ranks; the network itself if there is a single rank."""
    if dist.world_size() == 1:
        return net
    # buffers never change, so they need no broadcast; torch 2.13 renamed the option
    known = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    no_broadcast: dict[str, Any] = {option: False}
    # gradients of 1x1 convolutions may differ in strides, but not in memory layout
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    return DistributedDataParallel(
        net,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,  # without it, there is a second copy of all gradients
        **no_broadcast,
    )


def drop_labels(labels: torch.Tensor, positions: Sequence[int], probability: float, seed: int) -> torch.Tensor:
    """Label dropout for classifier-free guidance: each row of `labels` [N, K] is set to 0 with this probability.

    Which rows are dropped depends only on `seed` and on the images' `positions` in the global order. Ho & Salimans
    2022 (arXiv 2207.12598).
    """
    # its own random stream, so that noise and noise levels are the same with and without label dropout
    rng = StackedGenerator(labels.device, [derive_seed(seed, "label dropout", position) for position in positions])
    return labels * (rng.rand([len(positions), 1]) >= probability)


def training_loop(
    trainer: Trainer,
    batches: Callable[[int], Generator[MicroBatch, None, None]],
    sizes: Sequence[int],
    run_dir: Path,
    log: RunLog,
    on_snapshot: Callable[[nn.Module, int], Any] | None,
    should_stop: Callable[[], bool],
) -> bool:
    """Train to `duration_nimg`, or until `should_stop()` is true on any rank; then save, and return on all ranks.

    Returns whether it stopped early. A run that does leaves its state, and snapshots of all EMAs.
    `batches(nimg)` streams this rank's micro-batches from image `nimg` on; those of a step have `sizes` images.
    `on_snapshot(net, nimg)` is called on every rank after each snapshot with the longest EMA; a picture that it returns
    is logged.
    """
    config, rounds = trainer.config, len(sizes)
    trainer.resume(run_dir)
    log.begin(trainer.nimg, trainer.elapsed_sec)
    if trainer.nimg >= config.duration_nimg and config.snapshot_every_nimg:
        write_missing_snapshots(trainer, run_dir)
    if config.compile == "auto" and not dist.repeats_bits(trainer.device):
        trainer.compile_if_it_pays_(max(sizes), rounds)
    started = time.monotonic() - trainer.elapsed_sec
    should_stop()  # from now on, a signal asks to stop instead of ending the set-up
    with contextlib.closing(batches(trainer.nimg)) as micro_batches:
        step_batches, error = next_step(micro_batches, rounds, trainer.nimg < config.duration_nimg)
        dist.raise_together(error)
        while trainer.nimg < config.duration_nimg:
            with _saved_on_error(trainer, run_dir):
                trainer.step(iter(step_batches), rounds)
                trainer.elapsed_sec = time.monotonic() - started
                done = trainer.nimg >= config.duration_nimg
                trainer.check_gradients(at_end=done)
                # read ahead: if an image cannot be read on any rank, all are between two steps and can save
                step_batches, error = next_step(micro_batches, rounds, not done)
                stopping = dist.any_rank(should_stop() or error is not None)
                report = trainer.is_due(config.status_every_nimg, at_end=done or stopping)
                snapshot = trainer.is_due(config.snapshot_every_nimg, at_end=done)
                checkpoint = trainer.is_due(config.checkpoint_every_nimg, at_end=done or stopping)
                if report or snapshot or checkpoint or done:
                    check_finite(trainer.net, trainer.optimizer, trainer.ema, trainer.nimg)
                if report:
                    log.status(trainer.nimg, trainer.elapsed_sec, trainer.stats.collect())
                elif config.status_every_nimg:
                    log.progress(trainer.nimg, trainer.elapsed_sec)
                if snapshot:
                    trainer.save_snapshots(run_dir)
                    if on_snapshot is not None:
                        picture = on_snapshot(trainer.ema.network(len(config.ema_stds) - 1), trainer.nimg)
                        log.picture(trainer.nimg, picture)
            leaves_network = stopping and not done and not snapshot and config.snapshot_every_nimg > 0
            if leaves_network:
                trainer.stops.append(trainer.nimg)
            if checkpoint:
                trainer.save_checkpoint(run_dir)
            if stopping and not done:
                log.stopped(trainer.nimg, is_saved=config.checkpoint_every_nimg > 0)
                if leaves_network:
                    leave_network(trainer, run_dir)
                dist.raise_together(error)
                return True
    log.finished(trainer.nimg)
    return False


@contextlib.contextmanager
def _saved_on_error(trainer: Trainer, run_dir: Path) -> Iterator[None]:
    """If the block fails on any rank, save the state before the error goes on, unless it is not sound."""
    try:
        yield
    except DivergenceError:
        raise
    except Exception as error:
        save_after(error, trainer, run_dir)
        raise
