"""edm2kit-train doctor RUN: what is wrong with a training run, and what to do."""

import dataclasses
from pathlib import Path

import click
import torch

from edm2kit.cli import click_types as cli
from edm2kit.data.dataset import Source, open_source
from edm2kit.data.holdout import Part, split
from edm2kit.experiments.runs.doctor import examine, report_lines
from edm2kit.experiments.runs.expected_loss import measure_moments
from edm2kit.experiments.runs.findings import COPIES, EMA_LENGTH, Check
from edm2kit.experiments.runs.folder import RunFolder, open_run, training_set
from edm2kit.models.encoders import make_encoder
from edm2kit.torch_utils import dist
from edm2kit.training.log import STOPPED_NAME

FOUND = 3  # exit code


@click.command(
    name="doctor", cls=cli.Command, epilog="Exit code: 0 if nothing is wrong, 3 with findings, 1 and 2 for errors."
)
@click.argument("run", metavar="RUN", type=click.Path(path_type=Path))
@cli.section(
    "Input",
    click.option("--data", metavar="PATH", help="Training set, if it has moved  [default: as the run says]"),
    click.option("--heldout", metavar="PATH", help="Images that the run did not see, prepared like its training set"),
    click.option("--num", metavar="N", type=cli.AtLeast(int, 2), default=2048, help="Images of either side to compare"),
)
@cli.section(
    "With networks",
    click.option("--ema", is_flag=True, help="Rebuild other EMA lengths in memory and compare their losses"),
    click.option(
        "--ref",
        metavar="NPZ",
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        help="Also compare their distances from this reference, with --num images each",
    ),
    click.option("--copies", metavar="N", type=cli.AtLeast(int, 6), help="Generate N images and look for copies"),
    click.option(
        "--sheet",
        metavar="PNG",
        type=cli.OutputFile("contact sheet"),
        help="Picture of the generated images that are nearest to training images, with --copies",
    ),
)
@cli.section("Compute", cli.device_option(), cli.timeout_option())
def doctor(
    run: Path,
    data: str | None,
    heldout: str | None,
    num: int,
    ema: bool,
    ref: Path | None,
    copies: int | None,
    sheet: Path | None,
    device: str,
) -> None:
    """Look for faults in a training run: its log, configuration, snapshots and data. Nothing in RUN is changed.

    Compares the loss at each noise level with what the data allow to expect, and training with held-out images; looks
    at gradients, learning rate, schedule, speed, memory and snapshots. Says what it could not look at.

    \b
    python train.py doctor runs/main
    python train.py doctor runs/main --heldout others.zip --ema --copies 1000
    """
    if sheet is not None and copies is None:
        raise click.UsageError("--sheet goes with --copies")
    if ref is not None and not ema:
        raise click.UsageError("--ref goes with --ema")
    folder = open_run(run)
    with dist.session(device) as where:
        source, why = training_set(folder, data)
        encoder = make_encoder(folder.config.encoder)
        others: Source | None = None
        if heldout is not None:
            from edm2kit.experiments.runs.snapshot_losses import measure_heldout  # needed by this option alone

            if source is None:
                raise ValueError(f"--heldout compares with the training set, and {why}")
            others = open_source(heldout, use_labels=folder.config.cond)
            folder = dataclasses.replace(folder, heldout=[measure_heldout(folder, source, others, where, num)])
        elif isinstance(source, Part):
            _, others = split(source.whole, folder.config.holdout)
        moments = None if source is None else measure_moments(source, encoder)
        checks = examine(folder, moments, why)
        if ema or copies is not None:
            checks += _with_networks(folder, source, why, others, num, ema, ref, copies, sheet, where)
        if not ema:
            checks.append(Check(EMA_LENGTH, not_looked="this evaluates networks; add --ema"))
        if copies is None:
            checks.append(Check(COPIES, not_looked="this generates images; add --copies 1000"))
    stopped = "; stopped, run its command again to resume" if (run / STOPPED_NAME).exists() else ""
    click.echo(f"{run}: {folder.nimg:,} of {folder.config.duration_nimg:,} images{stopped}\n")
    click.echo("\n".join(map(dist.one_line, report_lines(checks))))
    if any(check.findings for check in checks):
        raise click.exceptions.Exit(FOUND)


def _with_networks(
    folder: RunFolder,
    source: Source | None,
    why: str,
    others: Source | None,
    num: int,
    ema: bool,
    ref: Path | None,
    copies: int | None,
    sheet: Path | None,
    device: torch.device,
) -> list[Check]:
    """The checks that evaluate networks, as far as they were asked for."""
    from edm2kit.experiments.runs.copies import check_copies  # these two import the sampler and detectors
    from edm2kit.experiments.runs.ema_lengths import check_by_loss, check_by_score

    if source is None:
        raise ValueError(f"--ema and --copies need the training set, and {why}")
    checks = []
    if ema:
        checks.append(check_by_loss(folder, source, others, device, num))
    if ref is not None:
        checks.append(check_by_score(folder, ref, device, num))
    if copies is not None:
        checks.append(check_copies(folder, source, others, device, copies, sheet))
    return checks
