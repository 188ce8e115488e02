"""Distil guidance: train one network to give the guided answer in a single evaluation."""

from edm2kit.cli import help_pages

if __name__ == "__main__":
    help_pages.answer("distill")  # before torch is imported

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch

from edm2kit.cli import click_types as cli
from edm2kit.cli.field_options import options_from
from edm2kit.cli.generation import Request, prepare, with_files
from edm2kit.cli.generation_options import generation_options
from edm2kit.conditions import FloatVectors
from edm2kit.denoiser import Denoiser, Wrapper, after_step, for_images, for_step
from edm2kit.guidance.records import settings_differences
from edm2kit.guidance.registry import METHODS, method_name
from edm2kit.snapshots.loading import open_weights
from edm2kit.torch_utils import dist
from edm2kit.torch_utils.rng import StackedGenerator
from edm2kit.training.config import TrainConfig
from edm2kit.training.distillation import DistillationLoss
from edm2kit.training.run import RECORD_NAME, Run, StopRequest, prepare_run
from edm2kit.training.stop import stopped_exit_code

_NOISE_LEVELS = ("P_mean", "P_std")
# where distilling differs from training
_DEFAULTS = {
    "duration_nimg": 8 << 20,
    "ref_lr": 0.002,
    "snapshot_every_nimg": 1 << 20,
    "checkpoint_every_nimg": 1 << 20,
}
_AS_TRAINED = dict.fromkeys(_NOISE_LEVELS, "as the network was trained")
# options of generate.py that make no difference to what a network can learn
_SOLVER_ONLY = ("solver", "S_churn", "S_min", "S_max", "S_noise", "times", "travel_interval")
_UNLISTED = ("classes", "balanced", "timeout", *_SOLVER_ONLY)


@click.command(cls=cli.Command, sections=("Networks", "Distillation"), unlisted=_UNLISTED)
@generation_options
@cli.section(
    "Distillation",
    click.option("--data", metavar="ZIP|DIR", required=True, help="Training data of the network"),
    click.option(
        "--outdir",
        metavar="DIR",
        type=click.Path(file_okay=False),
        required=True,
        help="Run folder; repeat the command to resume",
    ),
    *options_from(TrainConfig, "duration_nimg", "batch_size", "batch_gpu", "ref_lr", defaults=_DEFAULTS),
    *options_from(TrainConfig, *_NOISE_LEVELS, defaults=_AS_TRAINED),
    *options_from(TrainConfig, "seed", "workers", "status_every_nimg"),
    *options_from(TrainConfig, "snapshot_every_nimg", "checkpoint_every_nimg", defaults=_DEFAULTS),
    click.option(
        "--max-time",
        metavar="TIME",
        type=cli.Parsed(cli.parse_duration_sec),
        help="Save and stop after 90s, 45m, 11.5h or 2d",
    ),
    cli.timeout_option(),
)
@cli.device_option()
def main(request: Request, outdir: str, max_time: float | None, device: str, **options: Any) -> None:
    """Distil guidance: fine-tune a copy of the network to give the guided answer in a single evaluation.

    Takes the guidance options of generate.py; the guidance weight is fixed once learned. The resulting snapshots are
    used without a guide.

    \b
    python scripts/distill.py --net main.safetensors --gnet weaker.safetensors --guidance 2 \\
        --data img64.zip --outdir runs/distilled
    python generate.py --net runs/distilled/network-snapshot-0008388-0.050.safetensors --outdir out
    """
    check_request(request)
    cli.check_writable(Path(outdir))
    stop = StopRequest(max_time)
    with dist.session(device) as picked, stop:
        request = with_files(request)
        generation = prepare(request, picked, labels_from_data=True)
        teacher, sigmas = generation.engine.denoiser, request.sampler.sigmas(picked)
        check_teacher(teacher, sigmas, generation.engine.shape, generation.engine.label_dim)
        config = configure(request, options, generation.settings["precision"])
        run = prepare_run(config, outdir, teacher=as_recorded(generation.settings, Path(outdir)), device=picked)
        check_labels(run, generation.engine.label_dim)
        if run.header.label_kind == "vectors" and run.dataset.labels is not None:
            teacher = VectorTeacher(teacher, torch.from_numpy(run.dataset.labels))
        dist.print0(generation.summary)
        run.print_notices()
        loss = DistillationLoss(teacher, sigmas, run.config.P_mean, run.config.P_std, run.config.sigma_data)
        has_stopped = run.train(picked, loss_fn=loss, should_stop=stop)
    if has_stopped:
        raise click.exceptions.Exit(stopped_exit_code(can_resume=run.config.checkpoint_every_nimg > 0))


@dataclass(frozen=True)
class VectorTeacher(Wrapper):
    """A teacher whose labels are vectors; `pool` [M, D] are those of the data, for independent conditions (ICG)."""

    teacher: Denoiser
    pool: torch.Tensor = field(compare=False)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, condition: Any = None) -> torch.Tensor:
        return self.teacher(x, sigma, FloatVectors(condition, self.pool))


def check_request(request: Request) -> None:
    """Raise ValueError if `request` has no guidance, or guidance that one network cannot learn."""
    if request.net.startswith("diffusers:"):
        raise ValueError("guidance of a model of diffusers: only snapshots of this project can be fine-tuned to it")
    if request.guidance.method == "none":
        raise ValueError("there is no guidance to distil; give --gnet and --guidance W, or a --guidance-method")
    if request.classes is not None or request.labels is not None:
        raise ValueError("the network learns all labels of --data; leave out --class, --balanced and --labels")
    if request.guidance.options.get("apg_momentum"):
        raise ValueError("a single network cannot learn momentum, which depends on earlier steps; add --apg-momentum 0")
    names = (request.guidance.method, *(name for name, _ in request.guidance.also))
    for name in names:
        if METHODS[method_name(name)].remembers:
            raise ValueError(f"a single network cannot learn {name}, which leads away from earlier steps; leave it out")
    if request.guidance.rule == "fbg":
        raise ValueError("a single network cannot learn feedback, which depends on earlier steps; choose another rule")


def check_teacher(teacher: Denoiser, sigmas: torch.Tensor, shape: tuple[int, int, int], label_dim: int) -> None:
    """Raise ValueError if `teacher` moves images between evaluations, which a network cannot learn."""
    device = sigmas.device
    own = StackedGenerator(device, [0])
    x, labels = own.randn([1, *shape]), torch.eye(1, label_dim, device=device) if label_dim else None
    teacher = for_images(teacher, own)
    for i in range(len(sigmas) - 1):
        step = for_step(teacher, i, sigmas)
        with torch.no_grad():
            step(x * sigmas[i], sigmas[i], labels)
            moved = after_step(step, x, i, sigmas)
        if not torch.equal(moved, x):
            raise ValueError(
                "this guidance moves images after steps instead of changing D; a network cannot learn that"
            )


def configure(request: Request, options: dict[str, Any], precision: str) -> TrainConfig:
    """The training configuration: starts from the main network's weights, at the noise levels it was trained on."""
    header = open_weights(request.net).header
    # NVIDIA's published networks have their noise levels inside "loss"
    trained = {**header.training_config.get("loss", {}), **header.training_config}
    levels = {name: trained[name] for name in _NOISE_LEVELS if name in trained}
    given = {name: value for name, value in options.items() if value is not None}
    return TrainConfig(
        **{**_DEFAULTS, **levels, **given},
        init_from=request.net,
        cond=header.architecture["label_dim"] > 0,
        sigma_data=header.architecture.get("sigma_data", TrainConfig.sigma_data),
        precision=precision,
        ref_batches=0,
        rampup_nimg=0,
    )


def as_recorded(settings: Mapping[str, Any], run_dir: Path) -> Mapping[str, Any]:
    """The teacher's settings in the words of the run in this folder, if it has the same teacher."""
    path = run_dir / RECORD_NAME
    if not path.exists():
        return settings
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))["data_identity"].get("teacher")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return settings  # damaged, which `prepare_run` reports
    return settings if settings_differences(recorded, settings) else recorded


def check_labels(run: Run, label_dim: int) -> None:
    """Raise ValueError if the data of `run` have other classes than the teacher, which has `label_dim`."""
    found = run.header.architecture["label_dim"]
    if found != label_dim:
        raise ValueError(
            f"--data {run.config.data} has {found} classes, the network {label_dim}; use its training data"
        )


if __name__ == "__main__":
    main()
