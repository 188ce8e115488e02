"""The parts of edm2kit-metrics that score nothing: the list of metrics, what score cards say, and how they differ."""

from pathlib import Path
from typing import Any

import click

from edm2kit.cli import click_types as cli
from edm2kit.guidance.registry import all_methods
from edm2kit.metrics.card import explain, read_card, scores_side_by_side
from edm2kit.metrics.detectors.registry import DETECTORS
from edm2kit.metrics.registry import METRICS
from edm2kit.sampling.solvers import Sampler
from edm2kit.torch_utils.dist import one_line

_card = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.command(name="list", cls=cli.Command, short_help="Show all detectors and metrics.")
def list_command() -> None:
    """Show all detectors and metrics, what their values mean, and what they need."""
    click.echo("Detectors: their Frechet distance from the reference (lower is better)")
    for name, spec in DETECTORS.items():
        click.echo(f"  {name:17} {spec.num_features} features; {spec.preprocessing}")
        if spec.caution:
            click.echo(f"  {'':17} {spec.caution}")
    click.echo("Metrics of the features of a detector")
    for name, metric in METRICS.items():
        click.echo(f"  {name:17} {metric.text} ({metric.better})")
        if options := [f"--{need}" for need in metric.needs if need in ("real", "heldout")]:
            click.echo(f"  {'':17} needs {' and '.join(options)}")
        if metric.detectors:
            click.echo(f"  {'':17} only with {', '.join(metric.detectors)}")
    click.echo(
        "  fdr               distances divided by those of ImageNet's validation set, mean over encoders (lower)"
    )


@click.command(name="explain", cls=cli.Command, short_help="Show what differs between two score cards.")
@click.argument("first", metavar="A.json", type=_card)
@click.argument("second", metavar="B.json", type=_card)
def explain_command(first: Path, second: Path) -> None:
    """Show what differs between two score cards, and which way that usually moves a score."""
    records = [read_card(first), read_card(second)]
    differing = explain(*records) or ["Nothing that decides a score differs."]
    for line in [*scores_side_by_side(*records), *differing]:
        click.echo(one_line(line))


def evaluations(sampler: Any, method: str) -> dict[str, Any]:
    """What a card says about the work behind an image: calls of the denoiser, and the networks that each evaluates."""
    if not isinstance(sampler, Sampler):  # a model of diffusers with its own scheduler
        return {}
    return {"evaluations": {"per_image": sampler.evaluations(), "each": all_methods()[method].evaluations}}
