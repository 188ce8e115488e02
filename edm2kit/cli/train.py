"""Train a diffusion network, main or guide, in one process or in many.

`torchrun train.py ...`, `torchrun -m edm2kit.cli.train ...` and `torchrun --no-python edm2kit-train ...` are the same.
"""

from edm2kit.cli import help_pages

if __name__ == "__main__":
    help_pages.answer("train")  # before torch is imported

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import nn

from edm2kit.cli import click_types as cli
from edm2kit.cli.field_options import options_from
from edm2kit.cli.presets import summary
from edm2kit.data.dataset import ImageDataset
from edm2kit.data.image_files import labelled_sheet
from edm2kit.models.encoders import to_image
from edm2kit.sampling.solvers import Sampler
from edm2kit.torch_utils import dist
from edm2kit.torch_utils.files import atomic_write, short
from edm2kit.torch_utils.rng import StackedGenerator
from edm2kit.training.config import TrainConfig, config_from_dict, option_of, preset_names, preset_path, read_yaml
from edm2kit.training.run import CONFIG_NAME, Run, StopRequest, prepare_run
from edm2kit.training.stop import stopped_exit_code

SAMPLE_BATCH = 16


class TrainCommand(cli.Command):
    """`train.py`, and `train.py doctor RUN`, which is a command of its own."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs.pop("args", None)
        words = sys.argv[1:] if given is None else list(given)
        if words[:1] != ["doctor"]:
            return super().main(given, *args[1:], **kwargs)
        from edm2kit.cli.doctor import doctor  # needed by this word alone

        return doctor.main(words[1:], **{**kwargs, "prog_name": f"{Path(sys.argv[0]).name} doctor"})


@click.command(cls=TrainCommand, epilog=f"Presets, smallest first: {summary(preset_names())}")
@cli.section(
    "Run",
    click.option(
        "--outdir",
        metavar="DIR",
        type=click.Path(file_okay=False),
        required=True,
        help="Run folder; repeat the command to resume",
    ),
    *options_from(TrainConfig, "data"),
    click.option("--preset", metavar="NAME", help="Configuration that comes with the package; see below"),
    click.option("--config", "config_file", metavar="YAML", help="A configuration of your own instead"),
    *options_from(TrainConfig, "duration_nimg", "batch_size", "init_from", "cond", "seed"),
    click.option("--vae", metavar="NAME|DIR", help="VAE of the latents  [default: as the data say]"),
    click.option(
        "--max-time",
        metavar="TIME",
        type=cli.Parsed(cli.parse_duration_sec),
        help="Save and stop after 90s, 45m, 11.5h or 2d",
    ),
    cli.timeout_option(),
    click.option("-n", "--dry-run", is_flag=True, help="Print the configuration and a forecast, then stop"),
)
@cli.section(
    "Plan",
    click.option("--auto", is_flag=True, help="Write configurations and commands to --outdir, then stop"),
    click.option(
        "--budget", metavar="TIME", type=cli.Parsed(cli.parse_duration_sec), help="Training time for --auto, such as 3h"
    ),
    click.option(
        "--throughput", metavar="R", type=cli.AtLeast(float, 1e-6), help="Images/s to assume for --auto and -n"
    ),
    click.option(
        "--measure",
        metavar="TIME",
        type=cli.Parsed(cli.parse_duration_sec),
        help="Measure images/s for this time, with -n",
    ),
    click.option("--gpus", metavar="N", type=cli.AtLeast(int, 1), help="Plan for N GPUs, with -n"),
    click.option("--gpu-memory", metavar="GB", type=cli.AtLeast(float, 1), help="Memory of each of them, with -n"),
)
@cli.section(
    "Network and loss",
    click.option("--channels", metavar="N", type=int, help="Channels of the first level (64 multiples for attention)"),
    click.option("--dropout", metavar="P", type=click.FloatRange(0, 1, max_open=True), help="Dropout probability"),
    *options_from(TrainConfig, "label_dropout", "flip", "augment", "P_mean", "P_std"),
)
@cli.section("Learning rate", *options_from(TrainConfig, "ref_lr", "ref_batches", "rampup_nimg"))
@cli.section(
    "Speed and memory",
    *options_from(TrainConfig, "batch_gpu", "compile", "precision"),
    click.option("--fp16", type=bool, metavar="BOOL", help="Short for --precision fp16 (true) or fp32 (false)"),
    *options_from(TrainConfig, "loss_scaling", "recompute", "shard", "cudnn_benchmark", "workers"),
    cli.device_option(),
    *cli.numerics_options(),
)
@cli.section(
    "Snapshots and logs",
    *options_from(TrainConfig, "snapshot_every_nimg", "checkpoint_every_nimg", "status_every_nimg", "holdout"),
    click.option(
        "--samples", metavar="N", type=cli.AtLeast(int, 0, 1024), default=16, help="Images generated per snapshot"
    ),
    click.option("--tensorboard", is_flag=True, help="Also write TensorBoard events"),
    click.option("--wandb", is_flag=True, help="Also log to Weights & Biases"),
)
def main(
    outdir: str,
    preset: str | None,
    config_file: str | None,
    samples: int,
    tensorboard: bool,
    wandb: bool,
    max_time: float | None,
    device: str,
    dry_run: bool,
    auto: bool,
    budget: float | None,
    throughput: float | None,
    measure: float | None,
    gpus: int | None,
    gpu_memory: float | None,
    **options: Any,
) -> None:
    """Train a diffusion network and save EMA snapshots of it.

    Options override --preset or --config. A smaller, shorter run makes a guide network. Exit code 0: the run is
    complete; 75: it stopped early; resume it.

    \b
    python train.py --preset edm2-img64-s --data img64.zip --outdir runs/s
    torchrun --standalone --nproc-per-node 8 train.py --preset edm2-img64-s ...
    python train.py doctor runs/s     what is wrong with a run, and what to do
    """
    if auto:
        write_advice(outdir, budget, throughput, device, preset or config_file, options)
        return
    if budget is not None:
        raise ValueError("--budget belongs to --auto; the length of a run is its --duration")
    if not dry_run and (throughput or measure or gpus or gpu_memory):
        raise ValueError("--throughput, --measure, --gpus and --gpu-memory are for planning: add -n")
    if not dry_run:
        cli.check_writable(Path(outdir))
    config = compose_config(preset, config_file, options)
    stop = StopRequest(max_time)
    with dist.session(device) as picked, stop:
        run = prepare_run(config, outdir, processes=gpus, device=picked)
        run.describe(picked, None if gpu_memory is None else round(gpu_memory * 1e9))
        if dry_run:
            forecast_time(run, picked, throughput, measure)
            return
        if samples:
            check_decoder(run, picked)
            check_place(run)
        has_stopped = run.train(
            picked,
            on_snapshot=partial(write_samples, run, samples, picked) if samples else None,
            should_stop=stop,
            tensorboard=tensorboard,
            wandb=wandb,
        )
    if has_stopped:
        raise click.exceptions.Exit(stopped_exit_code(can_resume=run.config.checkpoint_every_nimg > 0))


def forecast_time(run: Run, device: torch.device, throughput: float | None, measure_sec: float | None) -> None:
    """Print how long the run will take at `throughput` images/s, or at the speed measured for `measure_sec`."""
    processes = run.processes
    how = "as given"
    if throughput is None and measure_sec is not None:
        from edm2kit.training.throughput import images_per_sec  # needed by this option alone

        share = run.config.batch_size // processes
        alone = dataclasses.replace(run.config, batch_size=share)
        throughput = images_per_sec(alone, run.dataset, device, measure_sec) * processes
        how = "measured here"
        if processes > dist.world_size():
            how = f"{processes} times what one process reached here, without the time to exchange gradients"
    if throughput is None:
        dist.print0("time               unknown: add --measure 60s, or --throughput with the images/s of all GPUs")
        return
    left = timedelta(seconds=round(run.config.duration_nimg / throughput))
    dist.print0(f"time               {left} at {throughput:,.1f} images/s ({how}), without samples and snapshots")


def write_advice(
    outdir: str,
    budget: float | None,
    throughput: float | None,
    device: str,
    configuration: str | None,
    options: Mapping[str, Any],
) -> None:
    """Carry out --auto; raises ValueError for options that it decides itself."""
    from edm2kit.cli.advice import advise  # needed by this option alone

    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    decided = [name for name, value in options.items() if value is not None and name not in ("data", "channels")]
    given = [option_of(name) if name in fields else f"--{name}" for name in decided]
    if configuration or given:
        raise ValueError(f"--auto decides about {', '.join(given) or configuration}; change the files that it writes")
    if budget is None or options.get("data") is None:
        raise ValueError("--auto needs --data and --budget, such as --budget 3h: training time of both networks")
    advise(options["data"], budget, outdir, dist.pick_device(device), throughput, options.get("channels"))


def compose_config(preset: str | None, config_file: str | None, options: Mapping[str, Any]) -> TrainConfig:
    """The values of a preset or YAML file, overridden by the options that were given (those that are not None)."""
    if preset and config_file:
        raise ValueError("--preset and --config both name a configuration; give one")
    path = preset_path(preset) if preset else config_file
    values = {} if path is None else read_yaml(path)
    given = {name: value for name, value in options.items() if value is not None}
    if "fp16" in given:
        if "precision" in given:
            raise ValueError("--fp16 and --precision both set the precision; give one")
        given["precision"] = "fp16" if given.pop("fp16") else "fp32"
    where = "options" if path is None else str(path)
    for part in ("encoder", "network"):
        if values.get(part) is None:
            values.pop(part, None)
        elif not isinstance(values[part], Mapping):
            raise ValueError(f"{where}: {part} must be a mapping; got {short(values[part])}")
    if "vae" in given:
        values["encoder"] = {**values.get("encoder", {}), "kind": "vae", "vae_name": given.pop("vae")}
    network = dict(values.get("network", {}))
    for option, argument in (("channels", "model_channels"), ("dropout", "dropout")):
        if option in given:
            network[argument] = given.pop(option)
    return config_from_dict({**values, **given, "network": network}, where, options=given)


def check_decoder(run: Run, device: torch.device) -> None:
    """Raise ValueError now, not at the first snapshot, if sample images cannot be decoded."""
    size = run.header.architecture["img_resolution"]
    try:
        run.encoder.decode(torch.zeros(1, run.header.architecture["img_channels"], size, size, device=device))
    except ValueError as error:
        raise ValueError(f"sample images cannot be decoded: {error}. To train without them: --samples 0") from error


def check_place(run: Run) -> None:
    """Raise ValueError if the samples of a new run would lie among its training images, and become some of them."""
    source = getattr(run.dataset, "whole", run.dataset)  # without held-out images
    if (run.run_dir / CONFIG_NAME).exists() or not isinstance(source, ImageDataset):
        return
    if run.run_dir.resolve().is_relative_to(source.path.resolve()):
        raise ValueError(
            f"--outdir {run.run_dir} is inside --data {run.config.data}, so the run's samples would be trained on; "
            "choose a folder outside"
        )


@torch.no_grad()
def write_samples(run: Run, count: int, device: torch.device, net: nn.Module, nimg: int) -> np.ndarray:
    """Write samples-KIMG.png: images of seeds 0 to count - 1, cycling through classes or the first label vectors.

    They are the images that generate.py makes from these seeds and labels. Returns the pixels of the sheet.
    """
    architecture = run.header.architecture
    shape = [architecture["img_channels"], architecture["img_resolution"], architecture["img_resolution"]]
    num_labels, vectors = architecture["label_dim"], None
    if run.header.label_kind == "vectors" and run.dataset.labels is not None:
        vectors = torch.from_numpy(run.dataset.labels[:count])
        num_labels = len(vectors)
    mine: dict[int, np.ndarray] = {}
    own_seeds = range(count)[dist.rank() :: dist.world_size()]
    for start in range(0, len(own_seeds), SAMPLE_BATCH):
        seeds = own_seeds[start : start + SAMPLE_BATCH]
        rng = StackedGenerator(device, seeds)
        noise = rng.randn([len(seeds), *shape])
        labels = None
        if num_labels:
            picked = torch.tensor([seed % num_labels for seed in seeds])
            rows = torch.nn.functional.one_hot(picked, num_labels) if vectors is None else vectors[picked]
            labels = rows.float().to(device)
        latents = Sampler()(net, noise, labels, rng.randn_like)
        mine.update(zip(seeds, run.encoder.decode(latents).cpu().numpy(), strict=True))
    images: dict[int, np.ndarray] = {}
    for part in dist.gather_objects(mine):
        images.update(part)
    captions = [f"class {seed % num_labels}" for seed in range(count)] if num_labels else []
    if names := run.header.label_names:
        captions = [names[seed % len(names)] for seed in range(count)]
    elif run.header.label_kind == "vectors":
        captions = [f"label {seed % num_labels}" for seed in range(count)]
    title = f"{nimg:,} images, EMA {run.config.ema_stds[-1]:.3f}, {Sampler().num_steps} steps, seeds 0 to {count - 1}"
    path = run.run_dir / f"samples-{nimg // 1000:07d}.png"
    return dist.on_rank0(write_sheet, [images[seed] for seed in range(count)], captions, title, path)


def write_sheet(images: Sequence[np.ndarray], captions: Sequence[str], title: str, path: Path) -> np.ndarray:
    """Write images, each uint8 [C, H, W], as one square picture, and return its pixels."""
    columns = math.ceil(math.sqrt(len(images)))
    sheet = labelled_sheet([to_image(image) for image in images], columns, title=title, captions=captions)
    with atomic_write(path) as file:
        sheet.save(file, "png")
    return np.asarray(sheet)


if __name__ == "__main__":
    main()
