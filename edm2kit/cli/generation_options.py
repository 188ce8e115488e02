"""The command-line options that decide what an image is, and the Request made from them."""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from edm2kit.cli import click_types as cli
from edm2kit.cli.field_options import Interval, option_fields, options_from
from edm2kit.cli.generation import Request
from edm2kit.cli.presets import boxed_presets, find_preset, load_presets, preset_file, preset_words
from edm2kit.cli.sampler_options import sampler_options
from edm2kit.conditions import ALL_CLASSES
from edm2kit.guidance.base import Method, Option, Rule
from edm2kit.guidance.registry import (
    ALIASES,
    METHODS,
    OPTION_ALIASES,
    RULES,
    Choice,
    all_methods,
    all_options,
    all_rules,
    method_name,
    methods_of,
)
from edm2kit.guidance.reuse import NO_REUSE, Reuse
from edm2kit.guidance.table import method_lines, table_text
from edm2kit.guidance.weight_schedule import CFG_PLUS_PLUS, SCHEDULES
from edm2kit.sampling.noise_levels import refuse_churn
from edm2kit.sampling.restart import Restart
from edm2kit.sampling.solvers import SETTINGS, WITHOUT_CHURN, Churn, Sampler, TimeTravel

SECTIONS = ("Networks", "Seeds and output", "Guidance", "Sampler")  # the order of --help
_FIELDS = {config: option_fields(config) for config in (Request, Reuse, Sampler, Churn, TimeTravel, Restart)}
_DIFFUSERS = (
    "prompt", "prompts", "negative", "gnet_lora", "gnet_lora_scale", "pixels", "offload", "vae_tiling",
)  # fmt: skip
_WITH_GUIDE = "autoguidance"  # the method if --gnet is given and no method is named


class MethodName(click.ParamType):
    """The name of a guidance method."""

    name = "method"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return method_name(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class WeightedMethod(MethodName):
    """A guidance method with its weight, METHOD=W, as a pair."""

    name = "method=w"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        name, _, weight = value.partition("=")
        try:
            number = float(weight)
        except ValueError:
            self.fail(f"{value!r:.60} is not a method with its weight; write for example pag=3", param, ctx)
        return super().convert(name, param, ctx), number


def generation_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a click command with every option that decides what an image is.

    The command receives them as one keyword argument, `request` (a `edm2kit.cli.generation.Request`); contradictions
    among them are click usage errors. The options of guidance methods come from `edm2kit.guidance.registry.METHODS`.
    """

    @functools.wraps(command)
    def with_request(**options: Any) -> Any:
        request = _take_request(options)
        return command(request=request, **options)

    for section in reversed(_option_sections()):
        with_request = section(with_request)
    return with_request


def parse_request(words: Sequence[str]) -> Request:
    """The request that these words of a command line describe. Raises ValueError with the reason if there is none."""

    @click.command()
    @generation_options
    def ask(request: Request) -> Request:
        return request

    try:
        return ask.main(list(words), standalone_mode=False)
    except click.ClickException as error:
        raise ValueError(f"{' '.join(words)!r} asks for no images: {error.format_message()}") from error


def _option_sections() -> list[cli.Decorator]:
    return [
        cli.section(
            "Networks",
            *options_from(Request, "net", "gnet", "uncond"),
            click.option(
                "--preset",
                metavar="NAME|YAML",
                help="Settings by name or from a file; options override",
            ),
            cli.printing_option(
                "--list-presets",
                lambda _: "\n".join([*boxed_presets(), *load_presets()]),
                "Print the names of presets and exit",
            ),
            *options_from(Request, "precision", "vae", "compile"),
            *options_from(Request, *_DIFFUSERS),
            cli.printing_option(
                "--help-diffusers",
                lambda _: diffusers_help(),
                "Options of diffusers:... networks: prompts, LoRA, size",
                hidden=True,  # --net names it
            ),
        ),
        cli.section(
            "Seeds and output",
            *options_from(Request, "classes", "labels"),
            click.option("--balanced", is_flag=True, help="Cycle through all classes by seed"),
        ),
        cli.section(
            "Guidance",
            click.option(
                "--guidance",
                "weight",
                metavar="W",
                type=float,
                help="Weight; 1 is off  [default: published, if any]",
            ),
            click.option("--interval", type=Interval(), help="Only at noise levels in (LO, HI]  [default: all]"),
            click.option(
                "--guidance-method",
                "method",
                type=MethodName(),
                help=f"See --help-guidance list  [default: {_WITH_GUIDE} if --gnet, else none]",
            ),
            click.option(
                "--guidance-also",
                "also",
                type=WeightedMethod(),
                multiple=True,
                help="Another method with its weight; repeatable",
            ),
            click.option(
                "--guidance-rule",
                "rule",
                type=click.Choice(list(all_rules())),
                default=Choice.rule,
                metavar="NAME",
                help="How terms combine: --help-guidance list",
            ),
            click.option(
                "--guidance-schedule",
                "schedule",
                metavar="NAME",
                type=click.Choice(SCHEDULES),
                default=Choice.schedule,
                help=f"How weights vary: {', '.join(SCHEDULES)}",
            ),
            *options_from(Reuse),
            cli.printing_option(
                "--help-guidance",
                method_help,
                "Describe a method or rule; or give list",
                "METHOD",
            ),
            cli.printing_option(
                "--list-guidance", lambda _: table_text(), "Print the table of methods and rules and exit"
            ),
        ),
        cli.section("Guidance", *(_method_option(name, option) for name, option in all_options())),
        cli.section(
            "Sampler",
            *sampler_options(),
        ),
    ]


def _method_option(owner: str, option: Option) -> cli.Decorator:
    old_names = [f"--{old.replace('_', '-')}" for old, new in OPTION_ALIASES.items() if new == option.keyword]
    return click.option(
        f"--{option.name}",
        *old_names,
        option.keyword,
        type=cli.Parsed(option.parse),
        hidden=True,  # --help-guidance shows it
        help=f"{owner}: {_method_option_help(option)}",
    )


def _method_option_help(option: Option) -> str:
    # without a value to show, the text says what is done
    return option.help if option.default is None else f"{option.help}  [default: {option.default}]"


def method_help(name: str) -> str:
    """What --help-guidance prints: a line per method for "list", else one method or rule with its own options.

    Raises click.UsageError for an unknown name.
    """
    if name == "list":
        return "\n".join(method_lines())
    owners: dict[str, Method | Rule] = {**all_methods(), **all_rules()}
    if name in ALIASES:
        name = method_name(name)
    if name not in owners:
        raise click.UsageError(f"--help-guidance {name}: expected one of list, {', '.join(owners)}")
    owner = owners[name]
    formatter = click.HelpFormatter()
    formatter.write_text(f"{name}: {owner.summary}.")
    facts = [("pick it when", owner.pick_when), ("formula", owner.formula), ("source", owner.source)]
    if isinstance(owner, Method):
        weight = "none, give --guidance W" if owner.weight is None else f"{owner.weight:g}"
        facts += [("evaluations", owner.evaluations), ("default weight", weight)]
    with formatter.indentation():
        formatter.write_dl([(f"{title}:", text) for title, text in facts if text])
    if owner.options:
        with formatter.section("Options"):
            formatter.write_dl([(f"--{option.name}", _method_option_help(option)) for option in owner.options])
    return formatter.getvalue().rstrip()


def diffusers_help() -> str:
    """What --help-diffusers prints: how to name networks of diffusers, and the options for these only."""

    @click.command()
    def ask() -> None: ...

    for decorate in options_from(Request, *_DIFFUSERS):
        ask = decorate(ask)
    formatter = click.HelpFormatter()
    formatter.write_text(
        "--net, --gnet and --uncond take models of the diffusers library: diffusers:FOLDER, a pipeline that was saved "
        "with save_pretrained, or diffusers:org/name[@revision] on the Hugging Face hub. docs/any-model.md has "
        "commands, memory and limits."
    )
    with formatter.section("Options"):
        options = [parameter for parameter in ask.params if isinstance(parameter, click.Option)]
        rows = []
        for option in options:
            metavar = "" if option.is_flag else f" {option.metavar}"
            rows.append((f"{option.opts[0]}{metavar}", option.help or ""))
        formatter.write_dl(rows)
    return formatter.getvalue().rstrip()


def _take_request(options: dict[str, Any]) -> Request:
    """Remove the options that belong to a request from `options`, and return the request."""
    name = options.pop("preset")
    file = None if name is None else preset_file(name)
    if file is not None:
        _apply_preset_file(options, file)
    elif name is not None:
        _apply_preset(options, name)
    if options["net"] is None:
        raise click.UsageError("give --net, or --preset")
    if options["classes"] is not None and not options["classes"].strip():
        raise click.UsageError("--class is empty; name a class, or use --balanced for all")
    if options.pop("balanced"):
        if options["classes"] is not None:
            raise click.UsageError("--balanced cycles through all classes, --class through a list; give one")
        options["classes"] = ALL_CLASSES
    guidance, sampler = _take_guidance(options), _take_sampler(options)
    if guidance.schedule == CFG_PLUS_PLUS and sampler.solver != "euler":
        raise click.UsageError(
            f"--guidance-schedule {CFG_PLUS_PLUS} is CFG++ with --solver euler only, not {sampler.solver}"
        )
    return Request(guidance=guidance, sampler=sampler, **cli.given_options(options, _FIELDS[Request]))


def _apply_preset(options: dict[str, Any], preset_name: str) -> None:
    """Give the options that were left open the values of a preset."""
    try:
        preset = find_preset(preset_name)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    values: dict[str, Any] = {"net": preset.net}
    # a method without a guide network has a weight of its own
    if options["method"] is None or METHODS[options["method"]].needs_gnet:
        values |= {"gnet": preset.gnet, "weight": preset.guidance, "interval": preset.interval}
    for name, value in values.items():
        if options[name] is None:
            options[name] = value


def _apply_preset_file(options: dict[str, Any], path: Path) -> None:
    """Give the options that are not on the command line the values of a preset file.

    If the command line names another guidance method, the file's guidance is left out, as it was chosen for its method.
    """

    def ask(**found: Any) -> dict[str, Any]:
        return found

    for section in reversed(_option_sections()):
        ask = section(ask)
    command = click.command()(ask)
    own = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    printing = {"--help", *(name for option in own if option.is_eager for name in option.opts)}
    flags = ["help", *(name.removeprefix("--") for option in own if option.is_flag for name in option.opts)]
    try:
        words = preset_words(path, flags)
        for word in printing.intersection(words):
            raise ValueError(f"{word} prints something, and sets nothing; leave it out of the file")
        preset = command.main(words, standalone_mode=False)
    except (click.ClickException, ValueError) as error:
        reason = error.format_message() if isinstance(error, click.ClickException) else str(error)
        raise click.UsageError(f"--preset {path}: {reason}") from error
    if preset["preset"] is not None:
        raise click.UsageError(f"--preset {path} names another preset; copy its options into the file")
    method = options["method"]
    kept = set(preset)
    if method is not None and method != (preset["method"] or _WITH_GUIDE):
        others = {"method", "also", "rule", "schedule", *_FIELDS[Reuse], *(one.keyword for _, one in all_options())}
        kept -= others if METHODS[method].needs_gnet else {*others, "gnet", "uncond", "weight", "interval"}
    context = click.get_current_context()
    for name in kept:
        if context.get_parameter_source(name) in (None, ParameterSource.DEFAULT):
            options[name] = preset[name]


def _take_sampler(options: dict[str, Any]) -> Sampler:
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


def _take_guidance(options: dict[str, Any]) -> Choice:
    """Remove the guidance options from `options`, except the networks, and return the choice that they describe."""
    method = options.pop("method")
    if options["gnet"] is not None and options["gnet_lora"] is not None:
        raise click.UsageError("give one guide network: --gnet, or --gnet-lora")
    gnet = options["gnet"] or options["gnet_lora"]
    if method is None:
        method = "none" if gnet is None else _WITH_GUIDE
    also, rule, schedule = options.pop("also"), options.pop("rule"), options.pop("schedule")
    names = [method, *(name for name, _ in also)]
    own_options = _take_method_options(options, {**{name: METHODS[name] for name in names}, rule: RULES[rule]})
    _check_networks(names, gnet, options["uncond"])
    weight, interval = options.pop("weight"), options.pop("interval")
    try:
        reuse_options = cli.given_options(options, _FIELDS[Reuse])
        reuse = Reuse(**reuse_options) if reuse_options else NO_REUSE
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if reuse != NO_REUSE and all(METHODS[name].negative is None for name in names):
        raise click.UsageError(
            "--guidance-every, --guidance-stop and --guidance-once reuse a weighted difference; "
            f"guidance method {method} has none"
        )
    if method == "none":
        if weight not in (None, 1) or interval is not None:
            given = "--interval" if weight in (None, 1) else f"--guidance {weight:g}"
            raise click.UsageError(f"{given} needs a guide network; give --gnet, or another --guidance-method")
        weight = 1.0
    elif weight is None:
        weight = METHODS[method].weight
    if weight is None:
        raise click.UsageError(f"guidance method {method} needs a weight: give --guidance W (1 is off)")
    for number in (weight, *(value for _, value in also)):
        if not math.isfinite(number):
            raise click.UsageError(f"--guidance {number} is not a finite number")
    choice = Choice(method, weight, interval, own_options, also, rule, schedule, reuse)
    try:
        methods_of(choice)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    return choice


def _check_networks(names: Sequence[str], gnet: str | None, uncond: str | None) -> None:
    """Refuse a network that is missing or would not be used."""
    takes_gnet = takes_uncond = False
    for name in names:
        method = METHODS[name]
        if method.needs_gnet and gnet is None:
            raise click.UsageError(f"--guidance-method {name} needs --gnet")
        takes_gnet |= method.needs_gnet
        takes_gnet |= method.takes_gnet
        takes_uncond |= method.takes_uncond
    if gnet is not None and not takes_gnet:
        raise click.UsageError(f"--guidance-method {names[0]} takes no --gnet")
    if uncond is not None and not takes_uncond:
        raise click.UsageError(f"--guidance-method {names[0]} takes no --uncond")


def _take_method_options(options: dict[str, Any], chosen: dict[str, Method | Rule]) -> dict[str, Any]:
    """Remove all options of methods and rules, and return those of the chosen ones with defaults filled in."""
    taken = {}
    for name, option in all_options():
        value = options.pop(option.keyword)
        if name in chosen:
            taken[option.keyword] = option.default if value is None else value
        elif value is not None:
            kind = "method" if name in METHODS else "rule"
            raise click.UsageError(f"--{option.name} belongs to --guidance-{kind} {name}, not {', '.join(chosen)}")
    return taken
