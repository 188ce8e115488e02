"""Every way to guide, by name: what the command lines offer and the tables list."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from edm2kit.denoiser import Denoiser
from edm2kit.guidance.base import Method, Option, Parts, Rule
from edm2kit.guidance.classifier import classifier_guidance as classifier
from edm2kit.guidance.combine import Beside, Combine, Combined, linear
from edm2kit.guidance.guided import Guided
from edm2kit.guidance.interval import GuidanceInterval
from edm2kit.guidance.losses import loss_guidance as loss_method
from edm2kit.guidance.network_call import Perturbed
from edm2kit.guidance.own_network import dropout_and_noise as degraded
from edm2kit.guidance.own_network import icg, pag, sag, seg, truncation, tsg
from edm2kit.guidance.own_network import sliding_window as windows
from edm2kit.guidance.rules import apg, rescale
from edm2kit.guidance.second_network import autoguidance as pair
from edm2kit.guidance.second_network import cfg as joint
from edm2kit.guidance.second_network import cfg_plus_autoguidance as mixed
from edm2kit.guidance.weight_schedule import SCHEDULES, WeightSchedule

__all__ = ["METHODS", "NO_GUIDANCE", "RULES", "Choice", "Method", "Option", "Parts", "Rule", "guide", "methods_of"]


@dataclass(frozen=True)
class Choice:
    """A method with its settings, as asked for and as recorded.

    `interval` is (sigma_lo, sigma_hi], beyond which the main network runs alone; None means everywhere. `also` are
    further methods, each with a weight of its own; `rule` (a key of RULES) how they are put together; `schedule`
    (a key of SCHEDULES) how the weights follow the noise level. `options` are those of the methods and of the rule.
    """

    method: str = "none"
    weight: float = 1.0
    interval: tuple[float, float] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    also: tuple[tuple[str, float], ...] = ()
    rule: str = "linear"
    schedule: str = "constant"


NO_GUIDANCE = Choice()


def _none(parts: Parts, weight: float) -> Denoiser:
    if weight != 1:
        raise ValueError(f"guidance weight {weight:g} without a guidance method; give a guide network, or weight 1")
    return parts.net


METHODS = {
    "none": Method("the main network alone", "1 main", _none, formula="D"),
    "pair": pair.METHOD,
    "cfg": joint.METHOD,
    "mixed": mixed.METHOD,
    "truncation": truncation.METHOD,
    "pag": pag.METHOD,
    "seg": seg.METHOD,
    "sag": sag.METHOD,
    "icg": icg.METHOD,
    "tsg": tsg.METHOD,
    "windows": windows.METHOD,
    "classifier": classifier.METHOD,
    "loss": loss_method.METHOD,
    "dropout": degraded.DROPOUT,
    "input-noise": degraded.INPUT_NOISE,
}

RULES = {
    "linear": Rule("the sum over the negatives", lambda: linear, formula="D + sum of (w_i - 1) (D - D_neg_i)"),
    "apg": apg.RULE,
    "rescale": rescale.RULE,
}


def methods_of(choice: Choice) -> dict[str, float]:
    """The methods of `choice` with their weights; ValueError where one is named twice, or does not combine."""
    named = [(choice.method, choice.weight), *choice.also]
    names = [name for name, _ in named]
    if len(names) > 1:
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"guidance method {twice[0]} is named twice")
        if alone := [name for name in names if METHODS[name].negative is None and not METHODS[name].around]:
            raise ValueError(
                f"guidance method {alone[0]} does not combine with others: it is no sum of differences, nor does it go "
                "around what others make"
            )
    return dict(named)


def guide(choice: Choice, parts: Parts) -> Denoiser:
    """The denoiser that `choice` describes.

    Raises ValueError where a guide network is missing or would go unused, where methods do not combine, and on
    settings that a method refuses; TypeError on an option that nothing in the choice has.
    """
    weights = methods_of(choice)
    _check_parts(weights, parts)
    options = _sorted_options(choice, weights)
    negatives = {name: METHODS[name].negative for name in weights if METHODS[name].negative is not None}
    guided = parts.net
    if negatives:
        negs = [negative(parts, **options[name]) for name, negative in negatives.items()]
        rule = RULES[choice.rule].make(**options["rule"])
        guided = _lead_away(parts.net, negs, [weights[name] for name in negatives], rule)
        guided = _scheduled(guided, choice)
    elif choice.rule != "linear":
        raise ValueError(f"a rule needs a weighted difference; guidance method {choice.method} has none")
    for name, weight in weights.items():
        if name not in negatives:
            guided = _scheduled(METHODS[name].build(replace(parts, net=guided), weight, **options[name]), choice)
    return guided if choice.interval is None else GuidanceInterval(guided, parts.net, *choice.interval)


def _scheduled(guided: Any, choice: Choice) -> Denoiser:
    if choice.schedule == "constant":
        return guided
    if not hasattr(guided, "scaled"):
        raise ValueError(f"a schedule needs a weight to change; guidance method {choice.method} has none")
    return WeightSchedule(guided, SCHEDULES[choice.schedule])


def _lead_away(net: Denoiser, negs: Sequence[Any], weights: Sequence[float], rule: Combine) -> Guided | Combined:
    if len(negs) == 1 and rule is linear and not isinstance(negs[0], Beside | Perturbed):
        return Guided(net, negs[0], weights[0])
    return Combined(net, tuple(negs), tuple(weights), rule)


def _check_parts(names: Iterable[str], parts: Parts) -> None:
    asked = ", ".join(names)
    needs_gnet = any(METHODS[name].needs_gnet for name in names)
    if needs_gnet and parts.gnet is None:
        raise ValueError(f"guidance method {asked} needs a guide network, and none was given")
    if not needs_gnet and parts.gnet is not None:
        raise ValueError(f"guidance method {asked} takes no guide network, and one was given")
    if parts.uncond is not None and not any(METHODS[name].takes_uncond for name in names):
        raise ValueError(f"guidance method {asked} takes no unconditional network beside, and one was given")


def _sorted_options(choice: Choice, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """All options by the method that owns them, and "rule"; those of nobody go to the first method, which says so."""
    owners: dict[str, Method | Rule] = {"rule": RULES[choice.rule], **{name: METHODS[name] for name in names}}
    taken = {name: {option.keyword: option.default for option in owner.options} for name, owner in owners.items()}
    for keyword, value in choice.options.items():
        has = [name for name, owner in owners.items() if keyword in [option.keyword for option in owner.options]]
        taken[has[0] if has else choice.method][keyword] = value
    return taken
