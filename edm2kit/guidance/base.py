"""What guidance methods and rules consist of: networks to build on, options, and a description for tables and help."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from edm2kit.denoiser import Denoiser, describe


@dataclass(frozen=True)
class Parts:
    """What a method may build on: the main network `net`, and the other networks that were given.

    - `gnet`: the guide network to lead away from, weaker or unconditional.
    - `uncond`: an unconditional network in addition to `gnet`, for methods that take both.
    - `pixels`: a differentiable function from what the networks generate (latents) to pixels in [-1, 1]; None if the
      networks generate pixels.

    Example: `guide(Choice("autoguidance", 2.0), Parts(net, gnet=weaker_net))`.
    """

    net: Denoiser
    gnet: Denoiser | None = None
    uncond: Denoiser | None = None
    pixels: Callable[[torch.Tensor], torch.Tensor] | None = None

    __repr__ = describe


@dataclass(frozen=True)
class Option:
    """One setting of a method or rule: `--name` on the command line, `keyword` for its build function.

    `name` starts with the name of its owner, so that no two owners share an option. `parse` turns text into a value;
    it raises ValueError saying what was expected. `help` is a full phrase, with the unit; if `default` is None, which
    means not given, it says what is done then.

    Example: `Option("pag-match", one_of("no", "yes"), "no", "Rescale V to the RMS of the attention output")`.
    """

    name: str
    parse: Callable[[str], Any]
    default: Any
    help: str
    keyword: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "keyword", self.name.replace("-", "_"))

    def checked(self, value: Any) -> Any:
        """`value`, given from Python: a text is read as on the command line, and numbers are in the same range.

        Raises ValueError that names the option.
        """
        if not isinstance(value, str | int | float) or value == self.default:
            return value
        try:
            parsed = self.parse(str(value))
        except ValueError as error:
            raise ValueError(f"--{self.name}: {error}") from error
        return parsed if isinstance(value, str) else value


@dataclass(frozen=True)
class Method:
    """A guidance method: exactly one of `negative` and `build`, and what tables and help say about it.

    `negative(parts, *, <options>)` returns what the main network is led away from: a denoiser, or a
    `edm2kit.guidance.combine.DerivedNegative`. Such methods can be combined with each other and with any rule.
    `build(parts, weight, *, <options>)` returns the guided denoiser itself; if `around` is set, `parts.net` may be any
    denoiser, so the method can be applied on top of others. Both refuse, by ValueError, networks that they cannot act
    on. At weight 1 a method is off: the same images bit for bit, at the cost of the main network alone.

    - `summary`: what it does, one phrase. `pick_when`: when to choose it, one line.
    - `evaluations`: network evaluations in one guided evaluation, the plain one included ("2 main").
    - `weight`: the published default, None if there is none.
    - `needs_gnet`: cannot do without a guide network. `takes_gnet`: uses one if it is given.
    - `takes_uncond`: uses an unconditional network in addition to the guide network, if it is given.
    - `drops_condition(parts)`: whether the main network is evaluated without its condition, as only networks trained
      with label dropout can be.
    - `remembers`: acts by earlier evaluations of the same run, so the first step of a run or interval is not guided.
    - `formula`, `term` (what D_neg is) and `source` (the paper) are for the table of methods.

    Example:

        METHOD = Method("naive truncation", "1 main", negative=lambda parts: lambda x, sigma, condition=None: x)
    """

    summary: str
    evaluations: str
    build: Callable[..., Denoiser] | None = None
    needs_gnet: bool = False
    options: tuple[Option, ...] = ()
    negative: Callable[..., Any] | None = None
    around: bool = False
    weight: float | None = None
    takes_gnet: bool = False
    takes_uncond: bool = False
    drops_condition: Callable[[Parts], bool] | None = None
    remembers: bool = False
    formula: str = "D_neg + w (D - D_neg)"
    term: str = ""
    source: str = ""
    pick_when: str = ""

    def __post_init__(self) -> None:
        if (self.build is None) == (self.negative is None):
            raise ValueError(f"the method {self.summary!r} needs exactly one of build and negative")

    def __repr__(self) -> str:
        return f"Method: {self.summary}; {self.evaluations}{_option_names(self.options)}"


@dataclass(frozen=True)
class Rule:
    """Another way to combine D and the negatives: `make(*, <options>)` returns a `edm2kit.guidance.combine.Combine`."""

    summary: str
    make: Callable[..., Any]
    options: tuple[Option, ...] = ()
    formula: str = ""
    source: str = ""
    pick_when: str = ""

    def __repr__(self) -> str:
        return f"Rule: {self.summary}{_option_names(self.options)}"


def _option_names(options: tuple[Option, ...]) -> str:
    return "".join(f"\n  --{option.name}: {option.help}" for option in options[:4])
