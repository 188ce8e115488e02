"""The life of a training run: settle its configuration, check its folder, write its records, train."""

import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn

from edm2kit.data.batches import STOP_SIGNALS, GlobalOrder, micro_batch_sizes, training_batches
from edm2kit.data.dataset import Source, enlarged_fraction, open_source, read_encoder_record, reading_notices
from edm2kit.models.encoders import ENCODERS, Encoder, make_encoder
from edm2kit.models.networks import NETWORKS
from edm2kit.models.preconditioning import PRECISIONS, slow_precision
from edm2kit.snapshots.file_format import Header
from edm2kit.torch_utils import dist
from edm2kit.torch_utils.files import atomic_write, differences, exclusive, free_bytes, provenance
from edm2kit.training.augmentation import NUM_LABELS
from edm2kit.training.checkpoint import DivergenceError, list_checkpoints, read_run_id
from edm2kit.training.config import AUTO, TrainConfig, config_to_dict, read_yaml, refuse_changes, run_id, write_config
from edm2kit.training.fine_tuning import adopt_source, check_source
from edm2kit.training.log import Forecast, RunLog, make_forecast, schedule_warnings
from edm2kit.training.loop import Trainer, training_loop
from edm2kit.training.loss import TrainingLoss
from edm2kit.training.micro_batches import fitting_size, largest_divisor, memory_advice, recorded_size
from edm2kit.training.stop import diagnosis, leave_last_good_network
from edm2kit.training.wandb_log import WandbLog

CONFIG_NAME = "config.yaml"
RECORD_NAME = "run.json"


@dataclass(frozen=True)
class Run:
    """A training run whose settings are complete and agree with its data; nothing has been written yet.

    `header` is that of the run's snapshots, except for nimg and ema_std. `notices` are sentences that the user should
    read before training starts. `micro_batches` are the images of each forward pass of one process in one step.

    Example:

        run = prepare_run(config, Path("runs/main"))
        run.describe(device)
        run.train(device)
    """

    config: TrainConfig
    dataset: Source
    encoder: Encoder
    header: Header
    notices: list[str]
    data_identity: Mapping[str, Any]
    micro_batches: list[int]
    run_dir: Path
    processes: int
    heldout: Source | None = None  # with --holdout; `dataset` is the rest

    def forecast(self) -> Forecast:
        """Parameters, steps, memory and disk."""
        architecture = dict(self.header.architecture)
        return make_forecast(self.config, architecture, max(self.micro_batches), self.processes)

    def describe(self, device: torch.device, free_gpu_bytes: int | None = None) -> None:
        """Print the data, the forecast, what looks like a mistake, the notices and the configuration.

        `free_gpu_bytes` is the memory of each GPU to compare with, instead of that of `device`.
        """
        config, dataset = self.config, self.dataset
        shape = "x".join(str(n) for n in dataset.item_shape)
        labels = dataset.condition_space if config.cond else "no labels"
        held_out = "" if self.heldout is None else f"; {len(self.heldout)} more are held out"
        dist.print0(f"data               {dataset.path}: {len(dataset)} items of {shape}, {labels}{held_out}")
        sizes = "+".join(map(str, self.micro_batches[:3]))
        if len(self.micro_batches) > 3:
            sizes += "+..."
        dist.print0(f"batch              {config.batch_size} images: {self.processes} processes, {sizes} images each")
        forecast = self.forecast()
        for line in forecast.lines():
            dist.print0(line)
        dist.print0(f"epochs             {config.duration_nimg / len(dataset):,.1f}")
        if free_gpu_bytes is None and device.type == "cuda":
            free_gpu_bytes = torch.cuda.mem_get_info(device)[0]
        if free_gpu_bytes is not None:
            advice = memory_advice(forecast, free_gpu_bytes, max(self.micro_batches))
            if advice is not None:
                dist.warn0(advice)
        free = dist.on_rank0(free_bytes, self.run_dir)
        if forecast.disk_bytes > free:
            dist.warn0(
                f"the run needs {forecast.disk_bytes / 1e9:.1f} GB of disk, and {free / 1e9:.1f} GB are free at "
                f"{self.run_dir}; use a larger --snapshot interval, or another disk"
            )
        for warning in schedule_warnings(config, len(dataset)):
            dist.warn0(warning)
        self.print_notices()
        for name, value in self.header.training_config.items():
            text = str(value)
            dist.print0(f"  {name:22s}{text if len(text) <= 400 else text[:397] + '...'}")
        if config.precision != "fp32" and (slow := slow_precision(PRECISIONS[config.precision], device)):
            dist.warn0(f"--precision {config.precision}: {slow}")

    def print_notices(self) -> None:
        """Print what the user should know before training starts."""
        for notice in self.notices:
            dist.print0(f"Note: {notice}")

    def train(
        self,
        device: torch.device,
        *,
        loss_fn: TrainingLoss | None = None,
        on_snapshot: Callable[[nn.Module, int], Any] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        tensorboard: bool = False,
        wandb: bool = False,
    ) -> bool:
        """Train from the newest checkpoint, or from the start, to the end; returns whether it stopped before that.

        `loss_fn` is EDM2's unless given. `on_snapshot(net, nimg)` is called on every rank with the longest EMA. If
        `should_stop()` is true on any rank, all save and return. Raises ValueError if another job trains in the folder.
        """
        config = self.config
        with contextlib.ExitStack() as stack:
            dist.on_rank0(stack.enter_context, exclusive(self.run_dir))
            dist.on_rank0(self.write_records, provenance(device))
            trainer = Trainer(config, self.header, self.encoder, device, loss_fn)
            micro_batches = self.micro_batches
            if config.batch_gpu == AUTO and device.type == "cuda":
                micro_batches = self._rehearsed(trainer)
                fitted = dataclasses.replace(self, micro_batches=micro_batches)
                dist.on_rank0(fitted.write_records, provenance(device))
            order = GlobalOrder(len(self.dataset), config.seed)
            batches = partial(
                training_batches,
                self.dataset,
                order,
                batch_size=config.batch_size,
                rank=dist.rank(),
                world_size=dist.world_size(),
                batch_gpu=max(micro_batches),
                workers=config.workers,
            )
            online = stack.enter_context(WandbLog(self.run_dir, self.header.training_config)) if wandb else None
            log = RunLog(self.run_dir, config.duration_nimg, device, tensorboard, online)
            if self.heldout is not None:
                from edm2kit.training.heldout_loss import HeldoutLoss, with_heldout  # most runs do without

                size = max(micro_batches)
                measure = HeldoutLoss(config, self.encoder, self.dataset, self.heldout, size, device, loss_fn)
                on_snapshot = with_heldout(measure, log.heldout, on_snapshot)
            try:
                return training_loop(trainer, batches, micro_batches, self.run_dir, log, on_snapshot, should_stop)
            except DivergenceError as error:
                leave_last_good_network(trainer, self.run_dir)
                raise ValueError(diagnosis(error, self, order)) from error

    def _rehearsed(self, trainer: Trainer) -> list[int]:
        """The micro-batches after a rehearsal on every rank; halved, once, if a rank has no memory left."""
        size, failed = max(self.micro_batches), None
        # Adam's moments come with the first step
        needed = make_forecast(self.config, dict(self.header.architecture), size, dist.world_size()).memory.optimizer
        try:
            trainer.rehearse(size, needed)
        except Exception as error:
            if not dist.is_out_of_memory(error):
                raise
            failed = (str(error).splitlines() or [type(error).__name__])[0]
        if not dist.any_rank(failed is not None):
            return self.micro_batches
        torch.cuda.empty_cache()
        share = sum(self.micro_batches)
        smaller = largest_divisor(share, size // 2)
        dist.warn0(f"{size} images per forward pass do not fit ({failed or 'on another rank'}); trying {smaller}")
        trainer.rehearse(smaller, needed)
        return micro_batch_sizes(self.config.batch_size, dist.world_size(), smaller)

    def write_records(self, made_by: Mapping[str, str]) -> None:
        """Write the resolved configuration and the description of the run beside its results."""
        record = {
            "run_id": self.header.run_id,
            "network": self.header.network,
            "architecture": dict(self.header.architecture),
            "data_identity": dict(self.data_identity),
            "data_files": {
                "path": str(self.dataset.path.absolute()),
                "sha256": self.dataset.files_digest(),
                "stamp": self.dataset.files_stamp(),
            },
            "label_names": self.header.label_names,
            "world_size": dist.world_size(),
            "micro_batches": self.micro_batches,
            "command": sys.argv,
            **made_by,
        }
        with atomic_write(self.run_dir / RECORD_NAME, "w") as file:
            json.dump(record, file, indent=2)
        write_config(self.config, self.run_dir / CONFIG_NAME)


def prepare_run(
    config: TrainConfig,
    run_dir: str | Path,
    teacher: Mapping[str, Any] | None = None,
    processes: int | None = None,
    device: torch.device | None = None,
) -> Run:
    """Settle everything that depends on the data and the number of processes, and check the run folder.

    `teacher` describes the denoiser that the run distils, if it does; it becomes part of the run's identity.
    `processes` plans for another number of them than there are. With `--batch-gpu auto`, `device` is where the
    micro-batches must fit; a resumed run keeps those that it began with. Writes nothing. Raises ValueError if
    configuration and data do not agree (labels are missing, the batch does not divide over the processes), or if the
    folder holds another run.
    """
    run = resolve(config, open_source(config.data, use_labels=config.cond), Path(run_dir), teacher, processes)
    recorded = check_run_dir(run)
    if recorded is not None:
        # a run that an earlier version began recorded less, so its run_id differs: it keeps that of its snapshots
        run = dataclasses.replace(run, header=dataclasses.replace(run.header, run_id=recorded["run_id"]))
    if config.batch_gpu == AUTO:
        share, architecture = sum(run.micro_batches), dict(run.header.architecture)
        size = recorded_size(recorded, run.processes)
        if size is None:
            size = fitting_size(config, architecture, share, run.processes, device or torch.device("cpu"))
        sizes = micro_batch_sizes(config.batch_size, run.processes, size)
        run = dataclasses.replace(run, micro_batches=sizes)
    return run


def resolve(
    config: TrainConfig,
    dataset: Source,
    run_dir: Path = Path(),
    teacher: Mapping[str, Any] | None = None,
    processes: int | None = None,
) -> Run:
    """As `prepare_run`, with an open data set and without a look at the run folder."""
    if config.cond and not dataset.label_dim:
        raise ValueError(
            f"{dataset.path} has no labels (no dataset.json, or one without labels). Add them with "
            "scripts/dataset_tool.py convert, or train without labels: --cond false"
        )
    heldout = None
    if config.holdout:
        from edm2kit.data.holdout import split  # most runs do without

        dataset, heldout = split(dataset, config.holdout)
    encoder = _fitting_encoder(config, dataset)
    config = dataclasses.replace(config, encoder=encoder.spec())
    if config.init_from is not None:
        config = adopt_source(config)
    if teacher is not None and (config.flip or config.augment):
        raise ValueError("distillation learns from images as they are; leave out flip and augment")
    architecture = NETWORKS[config.network_kind].full_architecture(
        img_resolution=dataset.resolution,
        img_channels=dataset.num_channels if config.encoder["kind"] == "rgb" else dataset.num_channels // 2,
        label_dim=dataset.label_dim if config.cond else 0,
        sigma_data=config.sigma_data,
        network=_with_augmentation(config),
    )
    identity, training_config = dataset.identity(), config_to_dict(config)
    if config.cond and dataset.labels is not None and (empty := dataset.condition_space.empty_classes(dataset.labels)):
        training_config["classes_without_images"] = empty
    if teacher is not None:
        identity["teacher"] = training_config["teacher"] = dict(teacher)
    header = Header(
        architecture=architecture,
        encoder=config.encoder,
        nimg=0,
        ema_std=None,
        label_names=dataset.label_names if config.cond else None,
        dtype=config.snapshot_dtype,
        run_id=run_id(config, identity),
        training_config=training_config,
        network=config.network_kind,
        label_kind="vectors" if config.cond and dataset.condition_space.kind == "vectors" else "classes",
    )
    processes = processes or dist.world_size()
    sizes = micro_batch_sizes(config.batch_size, processes, config.max_micro_batch)
    notices = reading_notices(dataset)
    if enlarged := enlarged_fraction(dataset):
        notices.append(
            f"about {enlarged:.0%} of the images were enlarged to {dataset.resolution} pixels, so they are soft"
        )
    if config.init_from is not None:
        notices += check_source(config, header)
    return Run(config, dataset, encoder, header, notices, identity, sizes, run_dir, processes, heldout)


def _fitting_encoder(config: TrainConfig, dataset: Source) -> Encoder:
    """The encoder for the data; raises ValueError if the configuration names one that does not fit."""
    fitting = "rgb" if dataset.item_dtype == np.uint8 else "vae"
    spec = dict(config.encoder)
    if spec == {"kind": "auto"}:
        spec = {"kind": fitting}
        if source := read_encoder_record(dataset):
            spec["vae_name"] = source.vae_name
    elif spec == {"kind": "vae"} and fitting == "vae" and (source := read_encoder_record(dataset)):
        spec["vae_name"] = source.vae_name
    if spec.get("kind") in [kind for kind in ENCODERS if kind != fitting]:
        if fitting == "rgb":
            raise ValueError(
                f"{dataset.path} holds pixels, but the configuration is for latents. Encode them "
                f"(`python scripts/dataset_tool.py encode --source {dataset.path} --dest latents.zip`), or use one "
                "for pixels, such as edm2-img64-s for 64x64"
            )
        raise ValueError(
            f"{dataset.path} holds latents, but the configuration is for pixels. Use the pixels that they were made "
            "of, or a preset for latents, such as edm2-img512-s"
        )
    return make_encoder(spec)


def _with_augmentation(config: TrainConfig) -> Mapping[str, Any]:
    """The arguments of the network, which takes augmentation labels if the run has any.

    Raises ValueError if the images or the network do not suit --flip and --augment.
    """
    if (config.flip or config.augment) and config.encoder["kind"] != "rgb":
        raise ValueError(
            "--flip and --augment change pixels, but the data are latents; mirror or augment the images before encoding"
        )
    if not config.augment:
        return config.network
    if "augment_dim" not in NETWORKS[config.network_kind].defaults:
        raise ValueError(f"a {config.network_kind} network takes no augmentation labels; train without --augment")
    return {**config.network, "augment_dim": NUM_LABELS}


def check_run_dir(run: Run) -> dict[str, Any] | None:
    """The record of the run in the run folder, if there is one; ValueError, with the differences, for another run.

    A damaged record is not needed if the checkpoint says that the run is the same: its run_id covers all of it.
    """
    run_dir, config_path, record_path = run.run_dir, run.run_dir / CONFIG_NAME, run.run_dir / RECORD_NAME
    if not config_path.exists():
        _refuse_checkpoints_of_others(run)
        is_new = not list_checkpoints(run_dir)
        if is_new and record_path.exists() and b'"run_id"' not in record_path.read_bytes():
            raise ValueError(f"{record_path} is not the record of a training run; use another --outdir")
        return None
    try:
        record = json.loads(record_path.read_text(encoding="utf-8"))
        identity = record["data_identity"]
        if not isinstance(identity, dict) or not isinstance(record["run_id"], str):
            raise ValueError("data_identity is not a mapping, or run_id is not text")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if _run_id_of_checkpoints(run_dir) == run.header.run_id:
            dist.warn0(f"{record_path} is damaged or missing ({error}); writing it again")
            return None
        raise ValueError(f"{record_path} is damaged or missing ({error}); use another --outdir") from error
    if changed := differences(identity.get("teacher"), run.data_identity.get("teacher"), "teacher"):
        raise ValueError(f"{run_dir} holds a run with another teacher ({'; '.join(changed[:4])}); use another --outdir")
    try:
        refuse_changes(read_yaml(config_path), run.config, run_dir)
    except ValueError as error:
        if _run_id_of_checkpoints(run_dir) != run.header.run_id:
            raise
        dist.warn0(f"{config_path} is damaged ({error}); writing it again")
    keys = [key for key in identity if identity[key] != run.data_identity.get(key)]
    if record.get("label_names") not in (None, list(run.header.label_names or ())):
        keys.append("label_names")
    if keys:
        raise ValueError(
            f"{run_dir} holds a run on other images than --data {run.config.data} (differs in {', '.join(keys)}). "
            "Use the same data to resume it, or another --outdir"
        )
    before, path = record.get("data_files"), str(run.dataset.path.absolute())
    if isinstance(before, dict) and before.get("path") == path:
        if before.get("sha256") != run.dataset.files_digest():
            dist.warn0(
                f"{path} is another file than the run began with: its checksums differ, though not the images that are "
                "compared (up to 4096). If it holds other images, use another --outdir"
            )
        elif dist.rank() == 0 and "stamp" in before and before["stamp"] != run.dataset.files_stamp():
            dist.warn0(
                f"files in {path} have changed since the run last began (sizes or times), though not the images that "
                "are compared (up to 4096). If it holds other images, use another --outdir"
            )
    return record


def _run_id_of_checkpoints(run_dir: Path) -> str | None:
    """The run that the newest checkpoint belongs to; None if there is none that says so."""
    found = (read_run_id(path) for path in reversed(list_checkpoints(run_dir)))
    return next((run_id for run_id in found if run_id is not None), None)


def _refuse_checkpoints_of_others(run: Run) -> None:
    """Raise ValueError if the folder lacks its configuration, but has a checkpoint of a run with another run_id."""
    found = _run_id_of_checkpoints(run.run_dir)
    if found not in (None, run.header.run_id):
        raise ValueError(
            f"{list_checkpoints(run.run_dir)[-1]} belongs to another run ({found}) than these settings and images make "
            f"({run.header.run_id}), and {CONFIG_NAME} is missing. Restore that file, or use another --outdir"
        )


class StopRequest:
    """A callable that returns True after a signal, once `max_sec` seconds have passed, or after torchrun has ended.

    Signals are SIGTERM, SIGUSR1, SIGUSR2, SIGXCPU (a soft limit of processor time), SIGHUP (a terminal that closes; not
    under nohup) and a first Ctrl-C; a second one interrupts at once. Before the first call there is nothing to save, so
    that signals other than Ctrl-C end the process. Use it as a context manager, which restores the former signal
    handlers. Make it before the processes meet: torchrun may end meanwhile.
    """

    def __init__(self, max_sec: float | None = None) -> None:
        self._deadline_sec = None if max_sec is None else time.monotonic() + max_sec
        self._asked = self._started = False
        self._torchrun = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def __call__(self) -> bool:
        self._started = True
        if self._torchrun is not None and not self._asked and os.getppid() != self._torchrun:
            # killed alone (out of memory, kill -9): nobody would end these processes, or know of them
            dist.warn0(f"torchrun (process {self._torchrun}) has ended; saving and stopping")
            self._asked = True
        return self._asked or (self._deadline_sec is not None and time.monotonic() > self._deadline_sec)

    def __enter__(self) -> "StopRequest":
        self._former: dict[int, Any] = {}
        for number in STOP_SIGNALS:
            if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
                self._former[number] = signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self._started and number != signal.SIGINT:
            raise SystemExit(128 + number)
        self._asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *error: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
