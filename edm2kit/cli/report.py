"""Show training runs as one HTML page each, or compare them on one."""

from edm2kit.cli import help_pages

if __name__ == "__main__":
    help_pages.answer("report")  # before torch is imported

import shlex
import sys
from pathlib import Path

import click

from edm2kit.cli import click_types as cli
from edm2kit.experiments.runs.expected_loss import measure_moments
from edm2kit.experiments.runs.folder import open_run, training_set
from edm2kit.experiments.runs.report import Reported, write_report
from edm2kit.models.encoders import make_encoder
from edm2kit.torch_utils.files import code_commit


@click.command(cls=cli.Command)
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--dest",
    metavar="FILE",
    type=cli.OutputFile("page of this program"),
    help="HTML file to write  [default: report.html in RUN, or here for several]",
)
def main(runs: tuple[Path, ...], dest: Path | None) -> None:
    """Write a page about training runs: findings, losses, learning rate, speed, samples over time, scores, settings.

    Several runs are compared on one page. The page is a single file that needs nothing else. Samples are shown if
    training generated them, scores if their cards (--record) are in the run's folder or the one above it.

    \b
    python scripts/report.py runs/main
    python scripts/report.py runs/main runs/guide --dest both.html
    """
    path = dest or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    cli.check_output(path, "page of this program")
    reported = []
    for name, folder in zip(_names(runs), runs, strict=True):
        run = open_run(folder)
        source, why = training_set(run)
        if run.is_distillation:
            source, why = None, "the run distils a denoiser, whose loss is another one"
        moments = None if source is None else measure_moments(source, make_encoder(run.config.encoder))
        reported.append(Reported(name, run, moments, why))
    about = f"{shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])} \u00b7 commit {code_commit()[:12]}"
    write_report(path, reported, about)
    click.echo(f"Wrote {path}")


def _names(runs: tuple[Path, ...]) -> list[str]:
    """The name of each folder, with its parents as far as names are equal otherwise. Raises ValueError for the same."""
    full = [folder.resolve() for folder in runs]
    if len(set(full)) < len(full):
        raise ValueError("the same run is named twice")
    for depth in range(1, max(len(path.parts) for path in full) + 1):
        names = ["/".join(path.parts[-depth:]) for path in full]
        if len(set(names)) == len(names):
            break
    return names


if __name__ == "__main__":
    main()
