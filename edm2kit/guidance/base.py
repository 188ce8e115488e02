"""What a guidance method says about itself: how it is built, what it costs, where it comes from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from edm2kit.denoiser import Denoiser


@dataclass(frozen=True)
class Parts:
    """What a method may build on: the main network, and guide networks where they were given.

    `gnet` is the network to be led away from; `uncond` an unconditional one beside it, for methods that take both.
    `pixels` makes pixels from -1 to 1 of what the networks draw, differentiably; None where they draw pixels.
    """

    net: Denoiser
    gnet: Denoiser | None = None
    uncond: Denoiser | None = None
    pixels: Callable[[torch.Tensor], torch.Tensor] | None = None


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
    """A guidance method, told in one of two ways.

    `negative(parts, *, <its options>)` returns what the main network is led away from (see `edm2kit.guidance.combine`):
    such methods add up with each other. `build(parts, weight, *, <its options>)` returns the whole guided denoiser;
    with `around` it takes any denoiser as `parts.net`, and so goes around what other methods make.

    `evaluations` is the cost of one guided evaluation in words ("2 main": two calls of the main network, plain one
    included); `weight` the published default, None where there is none; `needs_gnet` and `takes_uncond` tell what
    guide networks it builds on; `needs_empty_labels` that the main network must know what no label means. The
    other texts are for tables: `term` is what D_neg is.
    """

    summary: str
    evaluations: str
    build: Callable[..., Denoiser] | None = None
    needs_gnet: bool = False
    options: tuple[Option, ...] = ()
    negative: Callable[..., Denoiser] | None = None
    around: bool = False
    weight: float | None = None
    takes_uncond: bool = False
    needs_empty_labels: bool = False
    formula: str = "D_neg + w (D - D_neg)"
    term: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        if (self.build is None) == (self.negative is None):
            raise ValueError(f"the method {self.summary!r} needs one of build and negative")


@dataclass(frozen=True)
class Rule:
    """Another way to put D and the negatives together: `make(*, <its options>)` returns a `combined.Combine`."""

    summary: str
    make: Callable[..., Any]
    options: tuple[Option, ...] = ()
    formula: str = ""
    source: str = ""
