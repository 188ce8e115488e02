"""edm2kit-train doctor RUN: what is wrong with a training run, and what to do."""

import dataclasses
from pathlib import Path

import click

from edm2kit.cli import click_types as cli
from edm2kit.data.dataset import Source, open_source
from edm2kit.data.holdout import split
from edm2kit.experiments.runs.doctor import examine, report_lines
from edm2kit.experiments.runs.expected_loss import measure_moments
from edm2kit.experiments.runs.folder import RunFolder, open_run
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
@cli.section("Compute", cli.device_option())
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
        source, why = _training_set(folder, data)
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


def _training_set(folder: RunFolder, path: str | None) -> tuple[Source | None, str]:
    """The images that the run trains on, without held-out ones, or None and the reason."""
    config = folder.config
    try:
        source = open_source(path or config.data, use_labels=config.cond)
        if config.holdout:
            source, _ = split(source, config.holdout)
    except ValueError as error:
        if path is not None:
            raise
        return None, f"the training set cannot be opened ({error}); give --data"
    recorded = folder.record.get("data_identity", {})
    found = source.identity()
    changed = [key for key in recorded if key != "teacher" and recorded[key] != found.get(key)]
    if changed:
        text = f"{source.path} is not the data set that the run was trained on (differs in {', '.join(changed)})"
        if path is not None:
            raise ValueError(text)
        return None, f"{text}; give --data"
    return source, ""
