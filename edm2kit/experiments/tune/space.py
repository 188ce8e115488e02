"""What a search may choose: method and guide, the guide's age, both EMA lengths, weight and interval, all in steps."""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from edm2kit.cli.generation import Request
from edm2kit.cli.generation_options import parse_request
from edm2kit.experiments.tune.sources import NetworkSource, Version
from edm2kit.guidance.registry import METHODS

UNGUIDED = "none"
BASELINE: Mapping[str, Any] = {"way": "unguided"}  # the parameter values of the main network alone, as it is usually
_INTERVAL_STEPS = 6
_YOUTH = 8  # part of the main network's training that the first guide has had
_INTERVAL_SHARE = 0.55  # of the sampling steps, at most, are left out at either end
_SEARCHED = ("--net", "--gnet", "--preset", "--guidance", "--interval", "--guidance-method")


@dataclass(frozen=True)
class Candidate:
    """One way to generate; `method` is a name of the space, `guide` None for methods without a guide network."""

    method: str
    weight: float
    main: Version
    guide: Version | None = None
    interval: tuple[float, float] | None = None

    @property
    def key(self) -> str:
        """Text that two candidates share if they generate the same images."""
        parts = [self.method, self.weight, str(self.main), str(self.guide), self.interval]
        return json.dumps(parts)

    def __str__(self) -> str:
        if self.method == UNGUIDED:
            return f"unguided, {self.main}"
        text = f"{self.method}, w {self.weight:g}, {self.main}"
        if self.guide is not None:
            text += f", guide {self.guide}"
        if self.interval is not None:
            text += ", sigma in ({:g}, {:g}]".format(*self.interval)
        return text


class Suggest(Protocol):
    """How a parameter gets its value: a number from 0 to `count` - 1, or one of several names."""

    def number(self, name: str, count: int) -> int: ...
    def name(self, name: str, choices: Sequence[str]) -> str: ...


@dataclass(frozen=True)
class Way:
    """One guidance method with one guide (or none), and the request that all its candidates share."""

    title: str
    method: str
    guide: NetworkSource | None
    request: Request
    own: tuple[str, ...] = ()  # options of the method


@dataclass(frozen=True)
class Space:
    """All candidates. `ways` by title; `main_lengths` and `guide_lengths` are EMA lengths to try, () where fixed.

    `ages` are training times by guide; `weights` (lowest, highest) by way; `sigmas` the noise levels of the sampler if
    the interval is searched, () if it is fixed at `interval`.
    """

    main: NetworkSource
    plain: Request
    ways: Mapping[str, Way]
    main_lengths: tuple[float, ...]
    guide_lengths: Mapping[tuple[str, int], tuple[float, ...]]
    ages: Mapping[str, tuple[int, ...]]
    weights: Mapping[str, tuple[float, float]]
    sigmas: tuple[float, ...] = ()
    interval: tuple[float, float] | None = None
    weight_intervals: int = 40  # between the lowest and the highest weight

    def pick(self, suggest: Suggest) -> dict[str, Any]:
        """Values for the parameters that a candidate has, by name, as `suggest` chooses them."""
        title = suggest.name("way", list(self.ways)) if len(self.ways) > 1 else next(iter(self.ways))
        values: dict[str, Any] = {"way": title}
        for name, count in self.sizes(title).items():
            values[name] = suggest.number(name, count) if count > 1 else 0
        return values

    def sizes(self, title: str) -> dict[str, int]:
        """The number of values of each parameter of a way, in the order of their choice."""
        way = self.ways[title]
        sizes = {"main_ema": max(len(self.main_lengths), 1)}
        if way.method == UNGUIDED:
            return sizes
        sizes["weight"] = len(self.weight_steps(title))
        if way.guide is not None:
            sizes[f"age of {way.guide.name}"] = len(self.ages[way.guide.name])
            counts = [len(self.lengths_of(way.guide, age)) for age in self.ages[way.guide.name]]
            sizes["guide_ema"] = max(1, *counts)
        if self.sigmas:
            sizes["skip_high"] = sizes["skip_low"] = len(self._skips())
        return sizes

    def weight_steps(self, title: str) -> list[float]:
        """The weights of a way, evenly spaced; 1, which is off, is left out."""
        low, high = self.weights[title]
        count = self.weight_intervals
        steps = [round(low + (high - low) * k / count, 4) for k in range(count + 1)]
        return [step for step in dict.fromkeys(steps) if step != 1]

    def lengths_of(self, guide: NetworkSource, age: int) -> tuple[float, ...]:
        """The EMA lengths of a guide at a training time, () if they are not searched."""
        return self.guide_lengths.get((guide.name, age), ())

    def _skips(self) -> list[int]:
        """Numbers of sampling steps that may be left out at one end."""
        most = int(_INTERVAL_SHARE * len(self.sigmas))
        return sorted({round(most * k / (_INTERVAL_STEPS - 1)) for k in range(_INTERVAL_STEPS)})

    def candidate(self, values: Mapping[str, Any]) -> Candidate:
        """The candidate that parameter values mean."""
        main = self.main.usual
        if values["way"] == BASELINE["way"]:
            return Candidate(UNGUIDED, 1.0, main)
        way = self.ways[values["way"]]
        if self.main_lengths:
            main = Version(self.main.name, main.nimg, self.main_lengths[values["main_ema"]])
        if way.method == UNGUIDED:
            return Candidate(UNGUIDED, 1.0, main)
        guide = None
        if way.guide is not None:
            age = self.ages[way.guide.name][values[f"age of {way.guide.name}"]]
            lengths = self.lengths_of(way.guide, age)
            if lengths:  # an early time may have fewer
                guide = Version(way.guide.name, age, lengths[min(values["guide_ema"], len(lengths) - 1)])
            else:
                guide = way.guide.usual_at(age)
        interval = self.interval
        if self.sigmas:
            skips = self._skips()
            interval = self.steps_to_interval(skips[values["skip_high"]], skips[values["skip_low"]])
        return Candidate(way.title, self.weight_steps(way.title)[values["weight"]], main, guide, interval)

    def steps_to_interval(self, skip_high: int, skip_low: int) -> tuple[float, float] | None:
        """The interval (lo, hi] that leaves out so many steps at either end, at least one step remaining."""
        if skip_high == skip_low == 0:
            return None
        skip_low = min(skip_low, len(self.sigmas) - 1 - skip_high)
        hi = math.inf if skip_high == 0 else float(f"{self.sigmas[skip_high]:.5g}")
        lo = 0.0 if skip_low == 0 else float(f"{self.sigmas[len(self.sigmas) - skip_low]:.5g}")
        return lo, hi

    def starts(self) -> list[dict[str, Any]]:
        """Where the search begins: every way at a modest weight and usual EMA lengths.

        Guides are young, as in the autoguidance paper: about an eighth of the main network's training. If the interval
        is searched, each way begins twice: everywhere, and without the lowest third of the noise levels.
        """
        found = []
        for title, way in self.ways.items():
            sizes = self.sizes(title)
            values: dict[str, Any] = {"way": title, **dict.fromkeys(sizes, 0)}
            values["main_ema"] = _middle(self.main_lengths, self.main.usual.ema_std)
            if "weight" in sizes:
                steps = self.weight_steps(title)
                published = METHODS[way.method].weight
                modest = published or (1.5 if way.guide is None else 2.0)
                values["weight"] = min(range(len(steps)), key=lambda k: abs(steps[k] - modest))
            if way.guide is not None:
                ages = self.ages[way.guide.name]
                young = min(range(len(ages)), key=lambda k: abs(ages[k] - self.main.usual.nimg / _YOUTH))
                values[f"age of {way.guide.name}"] = young
                values["guide_ema"] = _middle(self.lengths_of(way.guide, ages[young]), way.guide.usual.ema_std)
            found.append(values)
            if "skip_low" in sizes:
                found.append({**values, "skip_low": round(0.6 * (sizes["skip_low"] - 1))})
        return found

    @property
    def count(self) -> int:
        """The number of combinations of parameter values."""
        return sum(math.prod(self.sizes(title).values()) for title in self.ways)

    def request(self, candidate: Candidate) -> Request:
        """The request for a candidate's images; its networks are named, not found at these paths."""
        if candidate.method == UNGUIDED:
            return replace(self.plain, net=str(candidate.main))
        way = self.ways[candidate.method]
        guidance = replace(way.request.guidance, weight=candidate.weight, interval=candidate.interval)
        gnet = None if candidate.guide is None else str(candidate.guide)
        return replace(way.request, net=str(candidate.main), gnet=gnet, guidance=guidance)

    def describe(self) -> dict[str, Any]:
        """The space as JSON, to recognise it again."""
        return {
            "main": [self.main.path, sorted((w.header.nimg, w.header.ema_std or 0) for w in self.main.weights)],
            "run_id": self.main.weights[0].header.run_id,
            "ways": {title: [way.method, way.guide and way.guide.path] for title, way in self.ways.items()},
            "main_lengths": list(self.main_lengths),
            "guide_lengths": {f"{name} {age}": list(found) for (name, age), found in self.guide_lengths.items()},
            "ages": {name: list(found) for name, found in self.ages.items()},
            "weights": {name: list(found) for name, found in self.weights.items()},
            "sigmas": list(self.sigmas),
            "interval": self.interval,
        }


def _middle(lengths: Sequence[float], wanted: float | None) -> int:
    if not lengths:
        return 0
    return min(range(len(lengths)), key=lambda k: abs(lengths[k] - (wanted or 0)))


def make_ways(
    methods: Sequence[str],
    main: NetworkSource,
    guides: Sequence[NetworkSource],
    words: Sequence[str],
    start: Sequence[str] | None = None,
) -> dict[str, Way]:
    """Every method with every guide that it can use, by title.

    `methods` are names, possibly followed by options of the method ("pag --pag-match yes"); `words` are options of
    generate.py for all, which follow after `start`, by default --net of the main network. Raises ValueError if a method
    is unknown or does not take the options, if an option is one that the search chooses, and if a guide is used by none
    of the methods.
    """
    for word in words:
        name = word.partition("=")[0]
        if name in _SEARCHED:
            raise ValueError(f"{name} is chosen by the search; leave it out of the options for all images")
    found: dict[str, Way] = {}
    used: set[str] = set()
    for text in methods:
        name, *own = shlex.split(text)
        for guide in _guides_for(name, guides):
            base = [*(start or ["--net", main.path]), "--guidance-method", name, *own, *words]
            if name != UNGUIDED:
                base += ["--guidance", "2"]
            if guide is not None:
                base += ["--gnet", guide.path]
                used.add(guide.name)
            request = parse_request(base)
            title = text if guide is None or len(guides) == 1 else f"{text} with {guide.name}"
            found[title] = Way(title, name, guide, request, tuple(own))
    idle = [guide.name for guide in guides if guide.name not in used]
    if idle:
        raise ValueError(f"none of the methods {', '.join(methods)} uses the guide {idle[0]}; leave it out")
    return found


def _guides_for(name: str, guides: Sequence[NetworkSource]) -> list[NetworkSource | None]:
    method = METHODS.get(name)
    if method is None:
        return [None]  # parse_request says what is wrong
    if method.needs_gnet:
        if not guides:
            raise ValueError(f"guidance method {name} needs a guide network; give --guide PATH")
        return list(guides)
    if method.takes_gnet:
        unconditional = [one for one in guides if one.weights[0].header.architecture.get("label_dim") == 0]
        return list(unconditional) or [None]
    return [None]
