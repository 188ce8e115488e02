"""Every guidance method and rule by name, registering more of them, and the guided denoiser of a choice."""

import importlib.metadata
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from edm2kit.denoiser import Denoiser
from edm2kit.guidance.base import Method, Option, Parts, Rule
from edm2kit.guidance.classifier import classifier_guidance
from edm2kit.guidance.combine import Negative, lead_away, linear
from edm2kit.guidance.interval import GuidanceInterval
from edm2kit.guidance.losses import loss_guidance
from edm2kit.guidance.own_network import (
    cads,
    dropout_and_noise,
    erg,
    higs,
    icg,
    pag,
    s2,
    sag,
    seg,
    self_guidance,
    sg_prev,
    slg,
    sliding_window,
    tpg,
    truncation,
    tsg,
)
from edm2kit.guidance.reuse import NO_REUSE, Reuse, Reusing
from edm2kit.guidance.rules import RULES
from edm2kit.guidance.second_network import autoguidance, cfg, cfg_plus_autoguidance, reg
from edm2kit.guidance.weight_schedule import SCHEDULES, with_schedule
from edm2kit.torch_utils import dist

ENTRY_POINTS = "edm2kit.guidance"  # packages offer a Method or Rule under its name in this entry-point group


@dataclass(frozen=True)
class Choice:
    """A guidance method with its settings, as asked for and as recorded.

    - `method`: a key of METHODS; `weight`: 1 is off.
    - `interval`: noise levels (sigma_lo, sigma_hi] outside which the main network runs alone; None is everywhere.
    - `options`: those of the methods and of the rule, by keyword; what is left out has its default.
    - `also`: further methods, each with its weight.
    - `rule`: a key of RULES, how the results are combined.
    - `schedule`: one of SCHEDULES, how the weights follow the noise level.
    - `reuse`: how often the negatives are evaluated.

    Example: `Choice("cfg", 1.5, also=(("pag", 3.0),), rule="rescale")`.
    """

    method: str = "none"
    weight: float = 1.0
    interval: tuple[float, float] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    also: tuple[tuple[str, float], ...] = ()
    rule: str = "linear"
    schedule: str = "constant"
    reuse: Reuse = NO_REUSE


NO_GUIDANCE = Choice()


def _without_guidance(parts: Parts, weight: float) -> Denoiser:
    if weight != 1:
        raise ValueError(
            f"guidance weight {weight:g} without a guidance method; give a guide network or a method, or use weight 1"
        )
    return parts.net


METHODS: dict[str, Method] = {
    "none": Method(
        "the main network alone", "1 main", _without_guidance, formula="D", pick_when="comparing with others"
    ),
    "autoguidance": autoguidance.METHOD,
    "cfg": cfg.METHOD,
    "cfg-plus-autoguidance": cfg_plus_autoguidance.METHOD,
    "reg": reg.METHOD,
    "truncation": truncation.METHOD,
    "pag": pag.METHOD,
    "seg": seg.METHOD,
    "sag": sag.METHOD,
    "icg": icg.METHOD,
    "tsg": tsg.METHOD,
    "sliding-window": sliding_window.METHOD,
    "slg": slg.METHOD,
    "s2": s2.METHOD,
    "tpg": tpg.METHOD,
    "erg": erg.METHOD,
    "self-guidance": self_guidance.METHOD,
    "sg-prev": sg_prev.METHOD,
    "classifier": classifier_guidance.METHOD,
    "loss": loss_guidance.METHOD,
    "dropout": dropout_and_noise.DROPOUT,
    "input-noise": dropout_and_noise.INPUT_NOISE,
    "cads": cads.METHOD,
    "higs": higs.METHOD,
}

# names of the previous release -> current names; to be removed with the next release
ALIASES: dict[str, str] = {
    "pair": "autoguidance",
    "joint": "cfg",
    "mixed": "cfg-plus-autoguidance",
    "windows": "sliding-window",
}
OPTION_ALIASES: dict[str, str] = {  # by keyword
    "mixed_share": "cfg_plus_autoguidance_share",
    "windows_size": "sliding_window_size",
}

_plugins_loaded = False


def register_method(name: str, method: Method) -> None:
    """Make `method` available as `name`, in `Choice` and on the command lines, like the built-in methods.

    Raises ValueError if the name is taken or cannot be an option's value, or if an option does not start with the
    name. Registering the same method again does nothing.

    Example:

        def unconditional_mean(parts, *, shrink_to):
            return lambda x, sigma, condition=None: torch.full_like(x, shrink_to)

        register_method("shrink", Method(
            "shrink: away from a constant image", "1 main", negative=unconditional_mean,
            options=(Option("shrink-to", number(-1, 1), 0.0, "Value of the constant image, from -1 to 1"),),
        ))
    """
    _check_entry(name, method, METHODS)
    METHODS[name] = method


def register_rule(name: str, rule: Rule) -> None:
    """Make `rule` available as `name`; the same conditions as for `register_method`."""
    _check_entry(name, rule, RULES)
    RULES[name] = rule


def _check_entry(name: str, entry: Method | Rule, registry: Mapping[str, Any]) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
        raise ValueError(f"{name!r} cannot be a name in guidance; use lower-case letters, digits and hyphens")
    is_taken = name in {**METHODS, **RULES, **ALIASES}
    if is_taken and registry.get(name) is not entry:
        raise ValueError(f"the name {name!r} is taken by another guidance method or rule; choose another")
    for option in entry.options:
        if not option.name.startswith(f"{name}-"):
            raise ValueError(f"option {option.name!r} of {name} must start with its owner's name: {name}-...")


def load_plugins() -> None:
    """Register the methods and rules that installed packages offer in the entry-point group `edm2kit.guidance`.

    Each entry point is a `Method` or a `Rule`; its name is the name it is registered under. What cannot be loaded is
    reported in one line that names the distribution, and skipped. Later calls do nothing.
    """
    global _plugins_loaded
    if _plugins_loaded:
        return
    _plugins_loaded = True
    for entry_point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            entry = entry_point.load()
            if isinstance(entry, Method):
                register_method(entry_point.name, entry)
            elif isinstance(entry, Rule):
                register_rule(entry_point.name, entry)
            else:
                raise TypeError(f"{entry_point.value} is a {type(entry).__name__}, not a Method or Rule")
        except Exception as error:  # a broken package must not break the others
            source = "an installed package" if entry_point.dist is None else f"package {entry_point.dist.name}"
            dist.warn0(
                f"{source} offers guidance {entry_point.name!r}, which cannot be loaded and is skipped: "
                f"{type(error).__name__}: {error}"
            )


def all_methods() -> Mapping[str, Method]:
    """Every method by name, those of installed packages included."""
    load_plugins()
    return METHODS


def all_rules() -> Mapping[str, Rule]:
    """Every rule by name, those of installed packages included."""
    load_plugins()
    return RULES


def method_name(name: str) -> str:
    """The current name of a method, given its current name or the one of the previous release (with a warning).

    Raises ValueError if there is no such method.
    """
    if name in ALIASES:
        dist.warn0(f"guidance method {name!r} is now called {ALIASES[name]!r}; the next release drops the old name")
        return ALIASES[name]
    if name not in METHODS and name not in all_methods():
        raise ValueError(f"there is no guidance method {name!r}; available: {', '.join(METHODS)}")
    return name


def with_current_names(choice: Choice) -> Choice:
    """`choice` with its methods and options under their current names. Raises ValueError for unknown names."""
    if choice.rule not in RULES and choice.rule not in all_rules():
        raise ValueError(f"unknown guidance rule {choice.rule!r}; available: {', '.join(RULES)}")
    if choice.schedule not in SCHEDULES:
        raise ValueError(f"there is no guidance schedule {choice.schedule!r}; available: {', '.join(SCHEDULES)}")
    return replace(
        choice,
        method=method_name(choice.method),
        also=tuple((method_name(name), weight) for name, weight in choice.also),
        options={OPTION_ALIASES.get(keyword, keyword): value for keyword, value in choice.options.items()},
    )


def methods_of(choice: Choice) -> dict[str, float]:
    """The methods of `choice` with their weights. Raises ValueError if they cannot be combined."""
    choice = with_current_names(choice)
    weights = {choice.method: choice.weight}
    for name, weight in choice.also:
        if name in weights:
            raise ValueError(f"guidance method {name} is named twice; give each method one weight")
        weights[name] = weight
    if len(weights) == 1:
        return weights
    for name in weights:
        if METHODS[name].negative is None and not METHODS[name].around:
            raise ValueError(f"guidance method {name} cannot be combined with other methods")
    return weights


def parts_for(name: str, names: Iterable[str], parts: Parts) -> Parts:
    """What of `parts` the method `name` gets among all methods `names` of a choice.

    A guide network belongs to the methods that need one; a method that merely takes one gets it if no other needs it.
    """
    if METHODS[name].needs_gnet or not any(METHODS[other].needs_gnet for other in names):
        return parts
    return replace(parts, gnet=None)


def name_by_networks(choice: Choice, parts: Parts) -> Choice:
    """`choice` with autoguidance called `cfg` if its guide network is the unconditional one of a conditional network.

    Both are the same formula; the name says what the images are guided by.
    """
    choice = with_current_names(choice)
    is_conditional = getattr(parts.net, "label_dim", 0) > 0
    guide_is_unconditional = getattr(parts.gnet, "label_dim", None) == 0
    if choice.method != "autoguidance" or not is_conditional or not guide_is_unconditional:
        return choice
    others = dict(choice.also)
    if "cfg" in others or any(METHODS[name].needs_gnet for name in others):
        return choice
    return replace(choice, method="cfg")


def drops_condition(choice: Choice, parts: Parts) -> bool:
    """Whether `choice` evaluates the main network without its condition, which it must have been trained for."""
    names = methods_of(choice)
    for name in names:
        test = METHODS[name].drops_condition
        if test is not None and test(parts_for(name, names, parts)):
            return True
    return False


def guide(choice: Choice, parts: Parts) -> Denoiser:
    """The denoiser that `choice` describes, built on `parts`.

    Raises ValueError if a guide network is missing or would not be used, if methods cannot be combined, if a weight is
    not finite, and if a method refuses its settings or the network; TypeError for an option that nothing in the choice
    has. All of this is found out before anything is evaluated.

    Example: `guide(Choice("autoguidance", 2.0, interval=(0.28, 2.90)), Parts(net, weaker_net))`.
    """
    choice = with_current_names(choice)
    weights = methods_of(choice)
    for name, weight in weights.items():
        if not math.isfinite(weight):
            raise ValueError(f"the guidance weight is {weight} ({name}); expected a finite number (1 is off)")
    _check_parts(weights, parts)
    options = _options_by_owner(choice, weights)
    guided = _led_away(choice, _negatives(choice, weights, parts, options), parts.net, options["rule"])
    # methods with a formula of their own go around the weighted differences
    for name, weight in weights.items():
        build = METHODS[name].build
        if build is None:
            continue
        guided = build(replace(parts_for(name, weights, parts), net=guided), weight, **options[name])
        if choice.schedule != "constant":
            guided = with_schedule(guided, choice.schedule, name)
    if choice.interval is None:
        return guided
    return GuidanceInterval(guided, parts.net, *choice.interval)


def _negatives(
    choice: Choice, weights: Mapping[str, float], parts: Parts, options: Mapping[str, Mapping[str, Any]]
) -> list[Negative]:
    """What the methods of `choice` that have a D_neg lead away from."""
    active = [weight for weight in weights.values() if weight != 1]
    negatives = []
    for name, weight in weights.items():
        method = METHODS[name]
        if method.negative is None:
            continue
        source = method.negative(parts_for(name, weights, parts), **options[name])
        if method.remembers and choice.reuse != NO_REUSE:
            raise ValueError(
                f"guidance method {name} evaluates nothing that could be saved: its negative comes from earlier "
                "steps. Leave out --guidance-every, --guidance-once and --guidance-stop"
            )
        if len(active) > 1 and hasattr(source, "in_combination"):
            source = source.in_combination()
        negatives.append(Negative(source, weight))
    return negatives


def _led_away(choice: Choice, negatives: list[Negative], net: Denoiser, rule_options: Mapping[str, Any]) -> Denoiser:
    """`net` led away from `negatives` by the rule, schedule and reuse of `choice`; `net` itself if there are none."""
    if not negatives:
        if choice.rule != "linear":
            raise ValueError(f"a rule needs a weighted difference; guidance method {choice.method} has none")
        if choice.reuse != NO_REUSE:
            raise ValueError(f"only a weighted difference can be reused; guidance method {choice.method} has none")
        return net
    rule = linear if choice.rule == "linear" else RULES[choice.rule].make(**rule_options)
    guided: Denoiser
    if choice.reuse == NO_REUSE:
        guided = lead_away(net, negatives, rule)
    else:
        guided = Reusing(net, tuple(negatives), rule, reuse=choice.reuse)
    if choice.schedule == "constant":
        return guided
    return with_schedule(guided, choice.schedule, choice.method)


def _check_parts(names: Iterable[str], parts: Parts) -> None:
    asked = ", ".join(names)
    methods = [METHODS[name] for name in names]
    needs_gnet = any(method.needs_gnet for method in methods)
    takes_gnet = any(method.takes_gnet for method in methods)
    takes_uncond = any(method.takes_uncond for method in methods)
    if needs_gnet and parts.gnet is None:
        raise ValueError(f"guidance method {asked} needs a guide network, and none was given")
    if parts.gnet is not None and not needs_gnet and not takes_gnet:
        raise ValueError(f"guidance method {asked} takes no guide network, and one was given")
    if parts.uncond is not None and not takes_uncond:
        raise ValueError(f"guidance method {asked} takes no second guide network, and an unconditional one was given")


def _options_by_owner(choice: Choice, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Every option by the method that owns it, and by "rule"; the first method gets unknown ones, and refuses them."""
    owners: dict[str, Method | Rule] = {"rule": RULES[choice.rule]}
    owners.update((name, METHODS[name]) for name in names)
    values: dict[str, dict[str, Any]] = {}
    owner_of: dict[str, str] = {}
    known: dict[str, Option] = {}
    for name, owner in owners.items():
        values[name] = {option.keyword: option.default for option in owner.options}
        owner_of.update(dict.fromkeys(values[name], name))
        known.update((option.keyword, option) for option in owner.options)
    for keyword, value in choice.options.items():
        value = known[keyword].checked(value) if keyword in known else value
        values[owner_of.get(keyword, choice.method)][keyword] = value
    return values


def all_options() -> list[tuple[str, Option]]:
    """(owner, option) of every method and rule, those of installed packages included."""
    owners: dict[str, Method | Rule] = {**all_methods(), **all_rules()}
    return [(name, option) for name, owner in owners.items() for option in owner.options]
