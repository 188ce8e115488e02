"""Every way to guide, by name: what the command lines offer and the tables list."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from guidance.guided import Guided
from guidance.interval import GuidanceInterval
from guidance.truncation import truncated
from torch_utils.denoiser import Denoiser


@dataclass(frozen=True)
class Parts:
    """What a method may build on: the main network, and a guide network where one was given."""

    net: Denoiser
    gnet: Denoiser | None = None


@dataclass(frozen=True)
class Option:
    """One setting of one method: `--name` on the command line, `name` (with underscores) for its build function.

    `parse` turns the text into a value and raises ValueError saying what was expected. A name belongs to one
    method alone: start it with the method's name.
    """

    name: str
    parse: Callable[[str], Any]
    default: Any
    help: str

    @property
    def keyword(self) -> str:
        return self.name.replace("-", "_")


@dataclass(frozen=True)
class Method:
    """A guidance method: `build(parts, weight, *, <its options>)` returns the guided denoiser.

    `evaluations` is the cost of one guided evaluation in words; `needs_gnet` tells whether it takes a guide network.
    """

    summary: str
    evaluations: str
    build: Callable[..., Denoiser]
    needs_gnet: bool = False
    options: tuple[Option, ...] = ()


@dataclass(frozen=True)
class Choice:
    """A method with its settings, as asked for and as recorded.

    `interval` is (sigma_lo, sigma_hi], beyond which the main network runs alone; None means everywhere.
    """

    method: str = "none"
    weight: float = 1.0
    interval: tuple[float, float] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


NO_GUIDANCE = Choice()


def _none(parts: Parts, weight: float) -> Denoiser:
    if weight != 1:
        raise ValueError(f"guidance weight {weight:g} without a guidance method; give a guide network, or weight 1")
    return parts.net


def _pair(parts: Parts, weight: float) -> Denoiser:
    assert parts.gnet is not None
    return Guided(parts.net, parts.gnet, weight)


def _truncation(parts: Parts, weight: float) -> Denoiser:
    return truncated(parts.net, weight)


METHODS = {
    "none": Method("the main network alone", "1 main", _none),
    "pair": Method(
        "away from a second network: a weaker one is autoguidance, an unconditional one classifier-free guidance",
        "1 main + 1 guide",
        _pair,
        needs_gnet=True,
    ),
    "truncation": Method("naive truncation: the score multiplied by the weight", "1 main", _truncation),
}


def guide(choice: Choice, parts: Parts) -> Denoiser:
    """The denoiser that `choice` describes.

    Raises ValueError where a guide network is missing or would go unused, and on settings the method refuses.
    """
    method = METHODS[choice.method]
    if method.needs_gnet and parts.gnet is None:
        raise ValueError(f"guidance method {choice.method} needs a guide network, and none was given")
    if not method.needs_gnet and parts.gnet is not None:
        raise ValueError(f"guidance method {choice.method} takes no guide network, and one was given")
    guided = method.build(parts, choice.weight, **choice.options)
    return guided if choice.interval is None else GuidanceInterval(guided, parts.net, *choice.interval)
