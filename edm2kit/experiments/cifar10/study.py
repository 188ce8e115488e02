"""The study of guidance on CIFAR-10 as one command with seven steps, each of which resumes."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from edm2kit.cli import click_types as cli
from edm2kit.data.convert import convert, find_labels, open_pictures
from edm2kit.experiments.cifar10 import report
from edm2kit.experiments.cifar10.ablation import ablate
from edm2kit.experiments.cifar10.measure import score, tune
from edm2kit.experiments.cifar10.settings import (
    BATCH,
    HELD_OUT_PER_CLASS,
    METHODS,
    RUNS,
    SCORE_SEEDS,
    SYNTHETIC_IMAGES,
    UNGUIDED_SAMPLER,
)
from edm2kit.experiments.cifar10.training_settings import try_settings
from edm2kit.snapshots.run_folder import newest_of_folders
from edm2kit.training.stop import stopped_exit_code

_out = click.option(
    "--out",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    default="cifar10-out",
    show_default=True,
    help="Folder of the study",
)
_names = click.option(
    "--methods",
    metavar="NAMES",
    default=",".join(METHODS),
    help=f"Methods, separated by commas  [default: all: {', '.join(METHODS)}]",
)


@click.group(cls=cli.Group)
def main() -> None:
    """Guidance compared on CIFAR-10, with networks that a CPU trains in hours.

    \b
    python scripts/cifar10_study.py data --source cifar-10-python.tar.gz
    python scripts/cifar10_study.py train --hours 3
    python scripts/cifar10_study.py tune
    python scripts/cifar10_study.py score
    python scripts/cifar10_study.py publish

    Every step resumes if it is repeated. `train` continues a run that was complete if it is given more images, and
    `tune` and `score` measure again what has changed.
    """


@main.command()
@_out
@click.option(
    "--source",
    metavar="PATH",
    required=True,
    help="cifar-10-python.tar.gz, or a folder or zip of the images in class folders",
)
def data(out: Path, source: str) -> None:
    """Convert the images: 4,500 of each class to OUT/train.zip, the last 500 to OUT/heldout.zip."""
    archive = open_pictures(source)
    labels = find_labels(archive, "auto")
    if labels is None:
        raise ValueError(f"{source} has no classes; use the archive of CIFAR-10, or class folders")
    held_out = last_of_each_class(labels.values, HELD_OUT_PER_CLASS)
    out.mkdir(parents=True, exist_ok=True)
    for name, picked in (("train.zip", ~held_out), ("heldout.zip", held_out)):
        convert(
            source,
            out / name,
            resolution=(32, 32),
            transform="center-crop",
            max_images=None,
            label_source="auto",
            workers=1,
            skip_broken=False,
            picked=np.flatnonzero(picked),
        )


def last_of_each_class(classes: np.ndarray, count: int) -> np.ndarray:
    """Whether each image is among the last `count` of its class: bool [N] from int64 [N]."""
    found = np.zeros(len(classes), bool)
    for index in np.unique(classes):
        found[np.flatnonzero(classes == index)[-count:]] = True
    return found


@main.command()
@_out
@click.option("--hours", metavar="H", type=cli.AtLeast(float, 0.0), help="Save and stop after this time, per network")
@click.option("--nimg", metavar="NIMG", help="Images to train the main network, or that of --only, on, such as 4Mi")
@click.option("--only", type=click.Choice(list(RUNS)), help="Train one network only")
@click.option("--from-box", is_flag=True, help="Start from the main network of the package")
@click.option("--precision", metavar="NAME", help="bf16, or fp32 for a CPU without its instructions  [default: bf16]")
def train(
    out: Path, hours: float | None, nimg: str | None, only: str | None, from_box: bool, precision: str | None
) -> None:
    """Train the guides, the unconditional and the main network, and a copy of it on its own images (SIMS).

    A run that is complete is skipped.
    """
    complete = True
    for run in RUNS if only is None else [only]:
        data = out / "train.zip"
        words = [*RUNS[run], "--outdir", str(out / "runs" / run), "--samples", "0", "--workers", "0"]
        if run == "sims":
            if not complete:
                break  # it starts from the main network
            net, data = _latest_main(out), out / "synthetic.zip"
            _draw_synthetic(net, data)
            words += ["--init-from", str(net)]
        if hours is not None:
            words += ["--max-time", f"{hours:g}h"]
        if nimg is not None and run == (only or "main"):
            words += ["--duration", nimg]
        if precision is not None:
            words += ["--precision", precision]
        if from_box and run == "main":  # the guide of the package is an early state of the main network
            words += ["--init-from", str(report.BOX / f"cifar10-{run}.safetensors")]
        # a process of its own, as training takes signals and sets threads
        complete = _run("train", f"training of {run}", [*words, "--data", str(data)])


def _latest_main(out: Path) -> Path:
    return Path(newest_of_folders({"main": str(out / "runs" / "main")})["main"])


def _draw_synthetic(net: Path, dest: Path) -> None:
    """A data set of SYNTHETIC_IMAGES images of the network alone, with equal shares of the classes."""
    if dest.exists():
        return
    folder = dest.with_suffix("")
    seeds = ["--seeds", f"0-{SYNTHETIC_IMAGES - 1}", "--balanced", "--batch", str(BATCH), "--subdirs"]
    _run("generate", "generating", ["--net", str(net), *UNGUIDED_SAMPLER, *seeds, "--outdir", str(folder)])
    _run("dataset", "converting", ["convert", "--source", str(folder), "--dest", str(dest)])


def _run(command: str, what: str, words: list[str]) -> bool:
    """Whether a command ended by itself, and was not stopped to be resumed. Raises ValueError if it failed."""
    done = subprocess.run([sys.executable, "-m", f"edm2kit.cli.{command}", *words])
    if done.returncode not in (0, stopped_exit_code()):
        raise ValueError(f"{what} ended with exit code {done.returncode}; see above")
    return done.returncode == 0


def _chosen(methods: str) -> list[str]:
    names = [name.strip() for name in methods.split(",") if name.strip()]
    for name in names:
        if name not in (*METHODS, "real"):
            raise click.UsageError(f"unknown method {name!r}; available: {', '.join(METHODS)}")
    return names


@main.command("tune")
@_out
@_names
@click.option(
    "--num", type=cli.AtLeast(int, 12), default=1000, show_default=True, help="Images of the search's last comparison"
)
def tune_command(out: Path, methods: str, num: int) -> None:
    """Search the best settings of each method by fd_infinity with edm2kit-tune.

    A search that has ended is skipped, unless the main network was trained further.
    """
    tune(out, num, _chosen(methods))


@main.command("score")
@_out
@_names
@click.option("--num", type=cli.AtLeast(int, 2), default=1000, show_default=True, help="Images per range of seeds")
@click.option("--large", is_flag=True, help="Only the metrics of fd_lite0; for a table of many images")
def score_command(out: Path, methods: str, num: int, large: bool) -> None:
    """Score the best settings, and held-out images, on three ranges of fresh seeds."""
    names = _chosen(methods)
    score(out, num, names if large else ["real", *names], SCORE_SEEDS, _print, large)


@main.command("settings")
@_out
@click.option(
    "--nimg", metavar="NIMG", type=cli.Size(), default="32Ki", show_default=True, help="Images that each run trains on"
)
@click.option("--num", type=cli.AtLeast(int, 2), default=1000, show_default=True, help="Images to score")
@click.option("--device", metavar="NAME", default="cpu", show_default=True, help="To train on: cuda, mps or cpu")
def settings_command(out: Path, nimg: int, num: int, device: str) -> None:
    """Try training settings: short runs that differ from the preset in one setting each."""
    try_settings(out, nimg, num, device, _print)


@main.command("ablation")
@_out
@click.option("--num", type=cli.AtLeast(int, 2), default=500, show_default=True, help="Images of each combination")
@click.option("--device", metavar="NAME", default="cpu", show_default=True, help="cuda, mps or cpu")
def ablation_command(out: Path, num: int, device: str) -> None:
    """Score guides and weights, and both EMA lengths, around the best settings of autoguidance."""
    ablate(out, num, device, _print)


@main.command()
@_out
@click.option("--box", is_flag=True, help="Also replace the networks and presets that come with the package")
def publish(out: Path, box: bool) -> None:
    """Write records, figures and sheets to experiments/cifar10/ of the checkout."""
    report.publish(out, box, _print)


_print: Callable[[Any], None] = click.echo

if __name__ == "__main__":
    main()
