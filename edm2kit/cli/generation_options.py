"""The command-line options that decide what an image is."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import click

from edm2kit.cli.generation import Request
from edm2kit.cli.presets import find_preset
from edm2kit.guidance.registry import METHODS, RULES, Choice, Method, Option, Rule, methods_of
from edm2kit.guidance.table import method_lines, table_text
from edm2kit.guidance.weight_schedule import SCHEDULES
from edm2kit.sampling.solvers import SOLVERS, Churn, Sampler
from edm2kit.sampling.time_travel import TimeTravel
from edm2kit.torch_utils.precision import PRECISIONS

_NUMBER = click.FloatRange(min=0)


class Interval(click.ParamType):
    """Two noise levels LO,HI as a pair of floats."""

    name = "lo,hi"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, float]:
        if isinstance(value, tuple):
            return value
        try:
            lo, hi = (float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a pair of noise levels; write for example 0.28,2.90 or 0.28,inf", param, ctx)
        if not 0 <= lo < hi:
            self.fail(f"{value} runs backwards; expected LO < HI, both from 0", param, ctx)
        return lo, hi


class WeightedMethod(click.ParamType):
    """A guidance method with its weight, NAME=W, as a pair."""

    name = "name=w"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        if isinstance(value, tuple):
            return value
        name, _, weight = value.partition("=")
        try:
            number = float(weight)
        except ValueError:
            self.fail(f"{value!r} is not a method with its weight; write for example pag=3", param, ctx)
        if name not in METHODS:
            self.fail(f"{name!r} is not one of {', '.join(METHODS)}", param, ctx)
        return name, number


class Parsed(click.ParamType):
    """A value read by an option's own function."""

    def __init__(self, option: Option):
        self.option, self.name = option, "value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self.option.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


_NETWORKS = (
    click.option(
        "--preset",
        metavar="NAME",
        help="Published networks and settings, from edm2kit/configs/generate.yaml; options override.",
    ),
    click.option("--net", metavar="PATH|URL", help="Network snapshot; needed without --preset."),
    click.option("--gnet", metavar="PATH|URL", help="Guide network: weaker (autoguidance) or unconditional (CFG)."),
    click.option(
        "--uncond", metavar="PATH|URL", help="Unconditional network beside --gnet, for methods that take both."
    ),
    click.option(
        "--guidance", metavar="W", type=float, help="Guidance weight: D_guide + W * (D_net - D_guide); 1 is off."
    ),
    click.option(
        "--interval", type=Interval(), help="Guide only at noise levels in (LO, HI], rounded to steps as a whole."
    ),
    click.option("--class", "classes", metavar="LIST", help="Classes by number or name, in turn by seed: 3,7 or cat."),
    click.option("--balanced", is_flag=True, help="All classes in turn by seed, instead of one drawn from each seed."),
    click.option("--vae", metavar="NAME|DIR", help="VAE that decodes latents. [default: the one the snapshot names]"),
    click.option(
        "--precision",
        type=click.Choice(["auto", *PRECISIONS]),
        default="auto",
        help="Inside the networks; auto is fp16 on a CUDA device, fp32 elsewhere.",
    ),
    click.option("--compile", "compiled", is_flag=True, help="Compile the networks: minutes, for many images' sake."),
)
_SAMPLER = (
    click.option("--steps", "num_steps", type=click.IntRange(min=1), default=Sampler.num_steps, show_default=True),
    click.option("--sigma_min", type=_NUMBER, default=Sampler.sigma_min, show_default=True, help="Last noise level."),
    click.option("--sigma_max", type=_NUMBER, default=Sampler.sigma_max, show_default=True, help="First noise level."),
    click.option("--rho", type=_NUMBER, default=Sampler.rho, show_default=True, help="More: smaller steps at the end."),
    click.option("--S_churn", "S_churn", type=_NUMBER, default=Churn.S_churn, help="Noise added, 0 for none."),
    click.option("--S_min", "S_min", type=_NUMBER, default=Churn.S_min, help="Lowest noise level to add noise at."),
    click.option("--S_max", "S_max", type=_NUMBER, default=Churn.S_max, help="Highest noise level to add noise at."),
    click.option("--S_noise", "S_noise", type=_NUMBER, default=Churn.S_noise, help="Scale of the noise added."),
    click.option("--solver", type=click.Choice(list(SOLVERS)), default=Sampler.solver, show_default=True),
    click.option(
        "--travel-times",
        type=click.IntRange(min=1),
        help=f"time-travel: how often to take a step, with fresh noise to go back.  [default: {TimeTravel.times}]",
    ),
    click.option(
        "--travel-interval",
        type=Interval(),
        help="time-travel: the noise levels whose steps are taken again.  "
        f"[default: {TimeTravel.sigma_lo:g},{TimeTravel.sigma_hi:g}]",
    ),
)


def generation_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a click command with every option that decides what an image is.

    The command receives them as one keyword argument, `request` (a `edm2kit.cli.generation.Request`); contradictions
    among them are click usage errors. The options of guidance methods come from `edm2kit.guidance.registry.METHODS`.
    """

    @functools.wraps(command)
    def with_request(**given: Any) -> Any:
        request = _take_request(given)
        return command(request=request, **given)

    for option in reversed((*_NETWORKS, *_method_options(), *_SAMPLER)):
        with_request = option(with_request)
    return with_request


def parse_request(words: Sequence[str]) -> Request:
    """The request that these words of a command line ask for; ValueError, with the reason, where they make none."""

    @click.command()
    @generation_options
    def ask(request: Request) -> Request:
        return request

    try:
        return ask.main(list(words), standalone_mode=False)
    except click.ClickException as error:
        raise ValueError(f"{' '.join(words)!r} asks for no images: {error.format_message()}") from error


def _print_table(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        click.echo(table_text())
        ctx.exit()


def _method_options() -> list[Callable[..., Any]]:
    lines = "\n".join(method_lines())
    options = [
        click.option(
            "--guidance-method",
            "method",
            type=click.Choice(list(METHODS)),
            help="[default: pair with --gnet, else none] With the cost of one evaluation:\n\n\b\n" + lines,
        ),
        click.option(
            "--guidance-also", "also", type=WeightedMethod(), multiple=True, help="A further method and its weight."
        ),
        click.option(
            "--guidance-rule",
            "rule",
            type=click.Choice(list(RULES)),
            default=Choice.rule,
            show_default=True,
            help="How the differences are put together; costs nothing.",
        ),
        click.option(
            "--guidance-schedule",
            "schedule",
            type=click.Choice(list(SCHEDULES)),
            default=Choice.schedule,
            show_default=True,
            help="How the weights follow the noise level; off where the weight is 1.",
        ),
        click.option(
            "--list-guidance",
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_print_table,
            help="Print the table of guidance methods and stop.",
        ),
    ]
    for name, owner in {**METHODS, **RULES}.items():
        for option in owner.options:
            default = "" if option.default is None else f" [default: {option.default}]"
            text = f"{name}: {option.help}{default}"
            options.append(click.option(f"--{option.name}", option.keyword, type=Parsed(option), help=text))
    return options


def _take_request(given: dict[str, Any]) -> Request:
    """Take what belongs to a request out of `given`."""
    _fill_in_preset(given)
    churn = Churn(**{name: given.pop(name) for name in ("S_churn", "S_min", "S_max", "S_noise")})
    steps = {name: given.pop(name) for name in ("num_steps", "sigma_min", "sigma_max", "rho", "solver")}
    sampler = Sampler(**steps, churn=churn, settings=_take_travel(given, steps["solver"]))
    net, gnet, precision, vae = (given.pop(name) for name in ("net", "gnet", "precision", "vae"))
    classes = given.pop("classes")
    if given.pop("balanced"):
        if classes is not None:
            raise click.UsageError("--balanced is for all classes; a list given to --class is in equal shares already")
        classes = ""
    uncond, compiled = given.pop("uncond"), given.pop("compiled")
    guidance = _take_guidance(given, gnet, uncond)
    return Request(net, gnet, guidance, sampler, classes, precision, vae, uncond, compiled)


def _take_travel(given: dict[str, Any], solver: str) -> TimeTravel | None:
    times, interval = given.pop("travel_times"), given.pop("travel_interval")
    if solver == "time-travel":
        lo, hi = interval or (TimeTravel.sigma_lo, TimeTravel.sigma_hi)
        return TimeTravel(TimeTravel.times if times is None else times, lo, hi)
    if times is not None or interval is not None:
        raise click.UsageError(f"--travel-times and --travel-interval belong to --solver time-travel, not {solver}")
    return None


def _fill_in_preset(given: dict[str, Any]) -> None:
    """Give the options that were left open the values of --preset."""
    name = given.pop("preset")
    if name is not None:
        try:
            preset = find_preset(name)
        except ValueError as error:
            raise click.UsageError(str(error)) from error
        values = {"net": preset.net}
        # a method without a guide network has a weight of its own
        if given["method"] is None or METHODS[given["method"]].needs_gnet:
            values |= {"gnet": preset.gnet, "guidance": preset.guidance, "interval": preset.interval}
        given.update({key: value for key, value in values.items() if given[key] is None})
    if given["net"] is None:
        raise click.UsageError("give --net, or --preset")


def _take_guidance(given: dict[str, Any], gnet: str | None, uncond: str | None) -> Choice:
    weight, interval, name = given.pop("guidance"), given.pop("interval"), given.pop("method")
    also, rule, schedule = given.pop("also"), given.pop("rule"), given.pop("schedule")
    if name is None:
        name = "none" if gnet is None else "pair"
    named = [name, *(method for method, _ in also)]
    set_options = _take_options(given, {**{method: METHODS[method] for method in named}, rule: RULES[rule]})
    _check_networks(named, gnet, uncond)
    if name == "none" and (weight not in (None, 1) or interval is not None):
        what = "--interval" if weight in (None, 1) else f"--guidance {weight:g}"
        raise click.UsageError(f"{what} needs a guide network; give --gnet, or another --guidance-method")
    if weight is None:
        weight = 1.0 if name == "none" else METHODS[name].weight
    if weight is None:
        raise click.UsageError(f"guidance method {name} needs a weight: give --guidance W (1 is off)")
    for number in (weight, *(value for _, value in also)):
        if not math.isfinite(number):
            raise click.UsageError(f"--guidance {number} is not a finite number")
    choice = Choice(name, weight, interval, set_options, also, rule, schedule)
    try:
        methods_of(choice)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    return choice


def _take_options(given: dict[str, Any], owners: dict[str, Method | Rule]) -> dict[str, Any]:
    """The options of `owners` out of `given`, defaults filled in; those of other methods are refused."""
    taken = {}
    for name, known in {**METHODS, **RULES}.items():
        for option in known.options:
            value = given.pop(option.keyword)
            if name in owners:
                taken[option.keyword] = option.default if value is None else value
            elif value is not None:
                kind = "method" if name in METHODS else "rule"
                raise click.UsageError(f"--{option.name} belongs to --guidance-{kind} {name}, not {', '.join(owners)}")
    return taken


def _check_networks(names: list[str], gnet: str | None, uncond: str | None) -> None:
    needing = [name for name in names if METHODS[name].needs_gnet]
    if needing and gnet is None:
        raise click.UsageError(f"--guidance-method {needing[0]} needs --gnet")
    if not needing and gnet is not None:
        raise click.UsageError(f"--guidance-method {names[0]} takes no --gnet")
    if uncond is not None and not any(METHODS[name].takes_uncond for name in names):
        raise click.UsageError(f"--guidance-method {names[0]} takes no --uncond")
