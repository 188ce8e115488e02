"""Teach one network to answer at once what a guided pair answers in several evaluations."""

import contextlib
import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from edm2kit.cli import click_types as cli
from edm2kit.cli.generation import Request, prepare
from edm2kit.cli.generation_options import generation_options
from edm2kit.data.dataset import ImageDataset
from edm2kit.denoiser import Denoiser, after_step, for_images, for_step
from edm2kit.models.edm2 import Precond
from edm2kit.models.encoders import make_encoder
from edm2kit.snapshots.weights import open_weights
from edm2kit.torch_utils import dist
from edm2kit.torch_utils.locks import exclusive
from edm2kit.torch_utils.provenance import provenance
from edm2kit.torch_utils.records import differences
from edm2kit.torch_utils.rng import StackedGenerator
from edm2kit.torch_utils.stopping import StopRequest, parse_duration_sec
from edm2kit.training.config import TrainConfig, run_id
from edm2kit.training.distillation import DistillationLoss
from edm2kit.training.log import RunLog
from edm2kit.training.loop import Trainer, training_loop
from edm2kit.training.run import RECORD_NAME, Run, check_run_dir, resolve, stream_batches, write_records

_NOISE_LEVELS = ("P_mean", "P_std")


@click.command(cls=cli.Command)
@generation_options
@click.option("--data", metavar="ZIP|DIR", required=True, help="Images to add noise to: those the network learnt from.")
@click.option("--outdir", metavar="DIR", required=True, help="Run folder; the same command again resumes the run.")
@click.option("--duration", "duration_nimg", type=cli.Size(), default="8Mi", show_default=True, help="Images to see.")
@click.option("--lr", "ref_lr", type=float, default=0.002, show_default=True, help="Learning rate, all along.")
@click.option(
    "--batch", "batch_size", type=cli.Size(), default=TrainConfig.batch_size, show_default=True, help="Images a step."
)
@click.option("--batch-gpu", type=cli.Size(), help="At most so many images in one pass on each process.")
@click.option("--P_mean", "P_mean", type=float, help="Mean of ln(sigma).  [default: as the network was trained]")
@click.option("--P_std", "P_std", type=float, help="Standard deviation of ln(sigma).  [default: likewise]")
@click.option("--seed", type=int, default=0, show_default=True, help="Random seed of the whole run.")
@click.option(
    "--workers",
    type=int,
    default=TrainConfig.workers,
    show_default=True,
    help="Processes that read images; 0: this one.",
)
@click.option(
    "--status", "status_every_nimg", type=cli.Size(), default=TrainConfig.status_every_nimg, show_default=True
)
@click.option("--snapshot", "snapshot_every_nimg", type=cli.Size(), default="1Mi", show_default=True)
@click.option("--checkpoint", "checkpoint_every_nimg", type=cli.Size(), default="1Mi", show_default=True)
@click.option("--max-time", metavar="TIME", help="Save and stop in good order after 90s, 45m, 11.5h or 2d")
@click.option("--device", default="auto", show_default=True, help="auto, cuda, mps or cpu.")
def main(request: Request, outdir: str, max_time: str | None, device: str, **options: Any) -> None:
    """Distil a guided network: fine-tune a copy of it to give, in one evaluation, the guided answer.

    Takes the guidance options of generate.py; one weight is learnt, for good. What comes out are snapshots like any
    others: draw from them without a guide.

    \b
    python scripts/distill.py --net main.safetensors --gnet weaker.safetensors --guidance 2 \\
        --data img64.zip --outdir runs/distilled
    python generate.py --net runs/distilled/network-snapshot-0008388-0.050.safetensors --outdir out
    """
    _check_request(request)
    max_sec = None if max_time is None else parse_duration_sec(max_time)
    run_dir = Path(outdir)
    with dist.session(device) as picked, StopRequest(max_sec) as stop, contextlib.ExitStack() as held:
        generation = prepare(request, picked)
        teacher, sigmas = generation.engine.denoiser, request.sampler.sigmas(picked)
        check_teacher(teacher, sigmas, generation.engine.shape, generation.engine.label_dim)
        config, settings = configure(request, options, generation.settings["precision"]), dict(generation.settings)
        dataset = ImageDataset(config.data, use_labels=config.cond)
        run = taught_by(resolve(config, dataset), settings, generation.engine.label_dim)
        check_teacher_of(run, run_dir)
        check_run_dir(run, run_dir)
        dist.print0(generation.summary)
        for notice in run.notices:
            dist.print0(f"Note: {notice}")
        dist.on_rank0(held.enter_context, exclusive(run_dir))
        dist.on_rank0(write_records, run, run_dir, provenance(picked), sys.argv)
        loss = DistillationLoss(teacher, sigmas, run.config.P_mean, run.config.P_std, run.config.sigma_data)
        training_loop(
            Trainer(run.config, run.header, make_encoder(run.config.encoder), picked, loss),
            partial(stream_batches, run, dataset),
            len(run.micro_batches),
            run_dir,
            RunLog(run_dir, run.config.duration_nimg, picked),
            on_snapshot=_no_samples,
            should_stop=stop,
        )


def _no_samples(net: Precond, nimg: int) -> None:
    """Snapshots come without sample images; generate.py draws them."""


def _check_request(request: Request) -> None:
    if request.guidance.method == "none":
        raise ValueError("there is no guidance to distil: give --gnet and --guidance W, or a --guidance-method")
    if request.classes is not None:
        raise ValueError("a student learns every class that --data shows; leave out --class and --balanced")
    if request.guidance.options.get("apg_momentum"):
        raise ValueError("momentum remembers earlier steps, which one network cannot: add --apg-momentum 0")


def check_teacher(teacher: Denoiser, sigmas: torch.Tensor, shape: tuple[int, int, int], label_dim: int) -> None:
    """ValueError where `teacher` moves images between evaluations, which no network could learn."""
    device = sigmas.device
    own = StackedGenerator(device, [0])
    x, labels = own.randn([1, *shape]), torch.eye(label_dim, device=device)[:1] if label_dim else None
    teacher = for_images(teacher, own)
    for i in range(len(sigmas) - 1):
        step = for_step(teacher, i, sigmas)
        with torch.no_grad():
            step(x * sigmas[i], sigmas[i], labels)
            moved = after_step(step, x, i, sigmas)
        if not torch.equal(moved, x):
            raise ValueError("this guidance moves images after steps instead of changing D: no network can learn it")


def configure(request: Request, options: dict[str, Any], precision: str) -> TrainConfig:
    """The student's training: from the main network's weights, at the noise levels that it was trained on."""
    header = open_weights(request.net).header
    trained = {**header.training_config.get("loss", {}), **header.training_config}  # published files have it inside
    levels = {name: trained[name] for name in _NOISE_LEVELS if name in trained}
    given = {name: value for name, value in options.items() if value is not None}
    return TrainConfig(
        **{**levels, **given},
        init_from=request.net,
        cond=header.architecture["label_dim"] > 0,
        sigma_data=header.architecture.get("sigma_data", TrainConfig.sigma_data),
        precision=precision,
        ref_batches=0,
        rampup_nimg=0,
    )


def taught_by(run: Run, settings: dict[str, Any], label_dim: int) -> Run:
    """`run` that knows its teacher, a network of `label_dim` classes: in its records, its identity and its snapshots.

    Raises ValueError where the data have other classes.
    """
    if (found := run.header.architecture["label_dim"]) != label_dim:
        raise ValueError(
            f"--data {run.config.data} has {found} classes, the network {label_dim}; use what it learnt from"
        )
    identity = {**run.data_identity, "teacher": settings}
    header = dataclasses.replace(
        run.header,
        run_id=run_id(run.config, identity),
        training_config={**run.header.training_config, "teacher": settings},
    )
    return dataclasses.replace(run, header=header, data_identity=identity)


def check_teacher_of(run: Run, run_dir: Path) -> None:
    """ValueError where the folder holds a student of another teacher, naming what differs."""
    path = run_dir / RECORD_NAME
    if path.exists():
        there = json.loads(path.read_text(encoding="utf-8"))["data_identity"].get("teacher")
        if changed := differences(there, run.data_identity["teacher"], "teacher"):
            raise ValueError(
                f"{run_dir} holds a run by another teacher ({'; '.join(changed[:4])}); use another --outdir"
            )


if __name__ == "__main__":
    main()
