"""The command-line options of the sampler, and the Sampler made from them."""

from collections.abc import Callable
from typing import Any

import click

from edm2kit.cli import click_types as cli
from edm2kit.cli.field_options import Interval, option_fields, options_from
from edm2kit.sampling.noise_levels import LEVELS, refuse_churn
from edm2kit.sampling.restart import Restart
from edm2kit.sampling.solvers import SETTINGS, SOLVERS, WITHOUT_CHURN, Churn, Sampler, TimeTravel

_FIELDS = {config: option_fields(config) for config in (Sampler, Churn, TimeTravel, Restart)}
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


def take_sampler(options: dict[str, Any]) -> Sampler:
    """Remove the options of the sampler from `options`, and return it. Raises click.UsageError if they contradict.

    Raises ValueError if a setting is out of range.
    """
    churn = Churn(**cli.given_options(options, _FIELDS[Churn]))
    steps = cli.given_options(options, _FIELDS[Sampler])
    own = {
        "time-travel": cli.given_options(options, _FIELDS[TimeTravel]),
        "restart": cli.given_options(options, _FIELDS[Restart]),
    }
    of_diffusers = str(options.get("net") or "").startswith("diffusers:")
    if of_diffusers and not {"levels", "sigma_min", "sigma_max", "rho"} & steps.keys():
        steps["levels"] = "own"
    interval = options.pop("travel_interval")
    if interval is not None:
        own["time-travel"]["sigma_lo"], own["time-travel"]["sigma_hi"] = interval
    solver = steps.get("solver", Sampler.solver)
    for name, given in own.items():
        if given and name != solver:
            named = {"time-travel": "--travel-times and --travel-interval", "restart": "--restart-intervals"}[name]
            raise click.UsageError(f"{named} belong to --solver {name}, not {solver}")
    levels = steps.get("levels")
    if isinstance(levels, tuple):
        ends = {"num_steps": len(levels), "sigma_max": levels[0], "sigma_min": levels[-1]}
        for name, value in ends.items():
            if steps.setdefault(name, value) != value:
                raise click.UsageError(
                    f"--levels lists {len(levels)} noise levels; leave out --{name.removeprefix('num_')}"
                )
        if len(levels) == 1:
            del steps["sigma_min"]
    if solver in WITHOUT_CHURN:
        try:
            refuse_churn(solver, churn)
        except ValueError as error:
            raise click.UsageError(str(error)) from error
    return Sampler(**steps, churn=churn, settings=SETTINGS[solver](**own[solver]) if solver in own else None)
