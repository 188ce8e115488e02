"""Train a diffusion network, main or guide, in one process or many (torchrun)."""

import contextlib
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from edm2kit.cli import click_types as cli
from edm2kit.cli.image_folder import contact_sheet, to_image
from edm2kit.cli.presets import summary
from edm2kit.data.dataset import ImageDataset
from edm2kit.models.edm2 import Precond
from edm2kit.models.encoders import Encoder, make_encoder
from edm2kit.sampling.engine import Engine, share_of_rank
from edm2kit.sampling.solvers import Sampler
from edm2kit.torch_utils import dist
from edm2kit.torch_utils.files import atomic_write
from edm2kit.torch_utils.locks import exclusive
from edm2kit.torch_utils.precision import PRECISIONS, slow_precision
from edm2kit.torch_utils.provenance import provenance
from edm2kit.torch_utils.stopping import StopRequest, parse_duration_sec
from edm2kit.training.config import TrainConfig, config_from_dict, preset_names, preset_path, read_yaml
from edm2kit.training.forecast import make_forecast
from edm2kit.training.log import RunLog
from edm2kit.training.loop import Trainer, training_loop
from edm2kit.training.run import Run, check_run_dir, resolve, stream_batches, write_records

SAMPLE_BATCH = 16


@click.command(cls=cli.Command, epilog=f"Presets, smallest first: {summary(preset_names())}")
@cli.section(
    "Run",
    click.option(
        "--outdir", metavar="DIR", required=True, help="Run folder; repeat the same command to resume its run"
    ),
    *cli.options_from(TrainConfig, "data"),
    click.option("--preset", metavar="NAME", help="Configuration that comes with the package; see below"),
    click.option("--config", "config_file", metavar="YAML", help="A configuration of your own instead"),
    *cli.options_from(TrainConfig, "duration_nimg", "batch_size", "init_from", "cond", "seed"),
    click.option("--vae", metavar="NAME|DIR", help="VAE of the latents  [default: as the data say]"),
    click.option("--max-time", metavar="TIME", help="Save and stop after 90s, 45m, 11.5h or 2d"),
    click.option("-n", "--dry-run", is_flag=True, help="Print the configuration and a forecast, then stop"),
)
@cli.section(
    "Network and loss",
    click.option("--channels", metavar="N", type=int, help="Channels of the first level (64 multiples for attention)"),
    click.option("--dropout", metavar="P", type=click.FloatRange(0, 1, max_open=True), help="Dropout probability"),
    *cli.options_from(TrainConfig, "label_dropout", "P_mean", "P_std"),
)
@cli.section("Learning rate", *cli.options_from(TrainConfig, "ref_lr", "ref_batches", "rampup_nimg"))
@cli.section(
    "Speed and memory",
    *cli.options_from(TrainConfig, "batch_gpu", "precision"),
    click.option("--fp16", type=bool, metavar="BOOL", help="Short for --precision fp16 (true) or fp32 (false)"),
    *cli.options_from(TrainConfig, "loss_scaling", "recompute", "shard", "cudnn_benchmark", "workers"),
    click.option("--device", default="auto", help="auto, cuda, mps or cpu"),
)
@cli.section(
    "Snapshots and logs",
    *cli.options_from(TrainConfig, "snapshot_every_nimg", "checkpoint_every_nimg", "status_every_nimg"),
    click.option("--samples", metavar="N", type=click.IntRange(0), default=16, help="Images generated per snapshot"),
    click.option("--tensorboard", is_flag=True, help="Also write TensorBoard events"),
)
def main(
    outdir: str,
    preset: str | None,
    config_file: str | None,
    samples: int,
    tensorboard: bool,
    max_time: str | None,
    device: str,
    dry_run: bool,
    **options: Any,
) -> None:
    """Train a diffusion network and save EMA snapshots of it.

    Options override the values of --preset or --config. A smaller, shorter run of the same kind makes a guide network
    for autoguidance.

    \b
    python train.py --preset edm2-img64-s --data img64.zip --outdir runs/s
    torchrun --standalone --nproc-per-node 8 train.py --preset edm2-img64-s ...
    """
    max_sec = None if max_time is None else parse_duration_sec(max_time)
    config = compose_config(preset, config_file, options)
    with dist.session(device) as picked, StopRequest(max_sec) as stop, contextlib.ExitStack() as held:
        dataset = ImageDataset(config.data, use_labels=config.cond)
        run = resolve(config, dataset)
        check_run_dir(run, Path(outdir))
        describe(run, dataset)
        if slow := slow_precision(PRECISIONS[run.config.precision], picked):
            dist.warn0(f"--precision {run.config.precision}: {slow}")
        encoder = make_encoder(run.config.encoder)
        if dry_run:
            return
        check_decoder(encoder, run, samples, picked)
        dist.on_rank0(held.enter_context, exclusive(outdir))
        dist.on_rank0(write_records, run, Path(outdir), provenance(picked), sys.argv)
        training_loop(
            Trainer(run.config, run.header, encoder, picked),
            partial(stream_batches, run, dataset),
            len(run.micro_batches),
            Path(outdir),
            RunLog(Path(outdir), run.config.duration_nimg, picked, tensorboard),
            on_snapshot=partial(draw_samples, encoder, Path(outdir), samples, picked),
            should_stop=stop,
        )


def compose_config(preset: str | None, config_file: str | None, options: dict[str, Any]) -> TrainConfig:
    """A YAML file's values, overridden by the options that were given."""
    if preset and config_file:
        raise ValueError("--preset and --config both name a configuration; give one")
    path = preset_path(preset) if preset else config_file
    values = read_yaml(path) if path else {}
    given = {name: value for name, value in options.items() if value is not None}
    if (fp16 := given.pop("fp16", None)) is not None:
        if "precision" in given:
            raise ValueError("--fp16 and --precision both set the precision; give one")
        given["precision"] = "fp16" if fp16 else "fp32"
    if (vae := given.pop("vae", None)) is not None:
        values["encoder"] = {**(values.get("encoder") or {}), "kind": "vae", "vae_name": vae}
    network = dict(values.get("network") or {})
    for option, argument in (("channels", "model_channels"), ("dropout", "dropout")):
        if option in given:
            network[argument] = given.pop(option)
    return config_from_dict({**values, **given, "network": network}, str(path or "options"))


def describe(run: Run, dataset: ImageDataset) -> None:
    """Print what will be trained on what, and what it will need."""
    config, label_dim = run.config, run.header.architecture["label_dim"]
    shape = "x".join(str(n) for n in dataset.raw_shape)
    classes = f"{label_dim} classes" if label_dim else "no labels"
    dist.print0(f"data              {dataset.path}: {len(dataset)} items of {shape}, {classes}")
    sizes = "+".join(map(str, run.micro_batches[:3])) + ("+..." if len(run.micro_batches) > 3 else "")
    dist.print0(f"batch             {config.batch_size} images: {dist.world_size()} processes, {sizes} images each")
    forecast = make_forecast(config, dict(run.header.architecture), max(run.micro_batches), dist.world_size())
    for line in forecast.lines():
        dist.print0(line)
    for notice in run.notices:
        dist.print0(f"Note: {notice}")
    for name, value in run.header.training_config.items():
        dist.print0(f"  {name:22s}{value}")


def check_decoder(encoder: Encoder, run: Run, samples: int, device: torch.device) -> None:
    """Find out now, not at the first snapshot, that sample images cannot be decoded."""
    if not samples:
        return
    size = run.header.architecture["img_resolution"]
    try:
        encoder.decode(torch.zeros(1, run.header.architecture["img_channels"], size, size, device=device))
    except ValueError as error:
        raise ValueError(f"sample images cannot be decoded: {error}. Or train without them: --samples 0") from error


def draw_samples(encoder: Encoder, run_dir: Path, count: int, device: torch.device, net: Precond, nimg: int) -> None:
    """Write samples-KIMG.png: images of seeds 0 to count - 1, the classes in turn."""
    if not count:
        return
    shape = (net.img_channels, net.img_resolution, net.img_resolution)
    classes = range(net.label_dim) if net.label_dim else None
    engine = Engine(net, encoder.decode, Sampler(), shape, net.label_dim, device, classes)
    mine = [(b.seeds, b.images.cpu().numpy()) for b in engine.batches(share_of_rank(range(count)), SAMPLE_BATCH)]
    parts = [part for rank_parts in dist.gather_objects(mine) for part in rank_parts]
    order = np.argsort(np.concatenate([seeds for seeds, _ in parts]))
    images = np.concatenate([images for _, images in parts])[order]
    dist.on_rank0(write_sheet, images, run_dir / f"samples-{nimg // 1000:07d}.png")


def write_sheet(images: np.ndarray, path: Path) -> None:
    """Write images, uint8 [N, C, H, W], as one square picture."""
    with atomic_write(path) as file:
        contact_sheet([to_image(image) for image in images], math.ceil(math.sqrt(len(images)))).save(file, "png")


if __name__ == "__main__":
    main()
