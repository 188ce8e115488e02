"""The command-line options of the sampler, and what --help-solver prints."""

from collections.abc import Callable
from typing import Any

import click

from edm2kit.cli import click_types as cli
from edm2kit.cli.field_options import Interval, options_from
from edm2kit.sampling.noise_levels import LEVELS
from edm2kit.sampling.restart import Restart
from edm2kit.sampling.solvers import SOLVERS, Churn, Sampler, TimeTravel

_SOLVER_OPTIONS = {"time-travel": ("travel_interval", "times"), "restart": ("intervals",)}
_LEVELS_HELP = {
    "karras": "evenly spaced in sigma^(1/rho), as published for EDM2",
    "ays-sd15": "table for Stable Diffusion 1.5, stretched to --sigma_min and --sigma_max",
    "ays-sdxl": "table for Stable Diffusion XL, likewise",
    "ays-svd": "table for Stable Video Diffusion, likewise",
    "own": "those of the pipeline's own scheduler, for models of diffusers, where they are the default",
    "gits": "fitted to the guided denoiser first, at the price of 256 images of 60 steps",
}


def sampler_options() -> list[cli.Decorator]:
    """Every option of the sampler, in the order of --help."""
    return [
        *options_from(Sampler, "num_steps", "solver"),
        cli.printing_option("--help-solver", solver_help, "Describe a solver; or give list, or levels", "NAME"),
        *options_from(Sampler, "sigma_min", "sigma_max", "rho", "levels"),
        *options_from(Churn),
        *options_from(TimeTravel),
        click.option(
            "--travel-interval",
            type=Interval(),
            hidden=True,
            help="Noise levels (LO, HI] whose steps are repeated"
            f"  [default: {TimeTravel.sigma_lo:g},{TimeTravel.sigma_hi:g}]",
        ),
        *options_from(Restart),
    ]


def solver_help(name: str) -> str:
    """What --help-solver prints: a line per solver for "list", per schedule for "levels", else one solver's options.

    Raises click.UsageError for an unknown name.
    """
    formatter = click.HelpFormatter()
    if name == "list":
        formatter.write_dl([(solver, _first_sentence(SOLVERS[solver])) for solver in SOLVERS])
        return formatter.getvalue().rstrip()
    if name == "levels":
        formatter.write_dl([(levels, _LEVELS_HELP[levels]) for levels in LEVELS])
        return formatter.getvalue().rstrip()
    if name not in SOLVERS:
        raise click.UsageError(f"--help-solver {name}: expected one of list, levels, {', '.join(SOLVERS)}")
    formatter.write_text(f"{name}: {_first_sentence(SOLVERS[name])}")
    own = _SOLVER_OPTIONS.get(name, ())
    if own:
        with formatter.section("Options"):
            options = [option for option in _all_options() if option.name in own]
            formatter.write_dl([(option.opts[0], option.help or "") for option in options])
    return formatter.getvalue().rstrip()


def _first_sentence(solver: Callable[..., Any]) -> str:
    return (solver.__doc__ or "").split("\n\n")[0].strip()


def _all_options() -> list[click.Option]:
    @click.command()
    def ask() -> None: ...

    for option in reversed(sampler_options()):
        ask = option(ask)
    return [parameter for parameter in ask.params if isinstance(parameter, click.Option)]
