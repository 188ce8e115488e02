"""edm2kit-train doctor RUN: what is wrong with a training run, and what to do."""

import dataclasses
from pathlib import Path

import click

from edm2kit.cli import click_types as cli
from edm2kit.data.dataset import open_source
from edm2kit.experiments.runs.doctor import examine, report_lines
from edm2kit.experiments.runs.expected_loss import measure_moments
from edm2kit.experiments.runs.folder import open_run, training_set
from edm2kit.models.encoders import make_encoder
from edm2kit.torch_utils import dist

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
@cli.section("Compute", cli.device_option(), cli.timeout_option())
def doctor(run: Path, data: str | None, heldout: str | None, num: int, device: str) -> None:
    """Look for faults in a training run: its log, configuration, snapshots and data. Nothing in RUN is changed.

    Compares the loss at each noise level with what the data allow to expect, and training with held-out images; looks
    at gradients, learning rate, schedule, speed, memory and snapshots. Says what it could not look at.

    \b
    python train.py doctor runs/main
    python train.py doctor runs/main --heldout others.zip
    """
    folder = open_run(run)
    with dist.session(device) as where:
        source, why = training_set(folder, data)
        encoder = make_encoder(folder.config.encoder)
        if heldout is not None:
            from edm2kit.experiments.runs.snapshot_losses import measure_heldout  # needed by this option alone

            if source is None:
                raise ValueError(f"--heldout compares with the training set, and {why}")
            others = open_source(heldout, use_labels=folder.config.cond)
            folder = dataclasses.replace(folder, heldout=[measure_heldout(folder, source, others, where, num)])
        moments = None if source is None else measure_moments(source, encoder)
        checks = examine(folder, moments, why)
    click.echo(f"{run}: {folder.nimg:,} of {folder.config.duration_nimg:,} images\n")
    click.echo("\n".join(report_lines(checks)))
    if any(check.findings for check in checks):
        raise click.exceptions.Exit(FOUND)
