"""What the study trains, searches and compares; every number that decides a result is here or in configs/train/."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

# preset of train.py -> the images it is trained on by default, which --nimg changes
RUNS = {"main": "cifar10", "guide": "cifar10-guide"}
HELD_OUT_PER_CLASS = 500  # the last ones of each class are not trained on
REFERENCE_IMAGES = 5_000  # training images, evenly over the classes, that distances are measured from
DETECTORS = ("fd_lite0", "fd_lite2")  # the first is tuned on, the second confirms
TUNED_ON = "fd_lite0"
METRICS = (*DETECTORS, "fd_lite0.kid", "fd_lite0.precision", "fd_lite0.recall", "fd_lite0.coverage")
INFINITY = "fd_lite0.fd_infinity"  # of the images of all ranges together, as it needs many
TUNE_SEED = 5_000_000  # seeds of the search; never among those that are scored
SCORE_SEEDS = (0, 100_000, 200_000)
SHEET_SEEDS = range(900_000, 900_040)
PRECISION = "bf16"
BATCH = 64
PART = 500  # images whose features are kept at a time


@dataclass(frozen=True)
class Setting:
    """One way to generate images, from networks of the study.

    - `ema`: EMA length of the main network. `nimg`: its training images, None for the latest snapshot.
    - `guide`: None, "uncond" (the main network without its label: classifier-free guidance), or a run of RUNS.
    - `guide_nimg`, `guide_ema`: as for the main network.
    - `weight`, `interval`: of guidance; (0, inf) is everywhere.
    - `sampler`: the remaining options of generate.py.
    """

    ema: float
    nimg: int | None = None
    guide: str | None = None
    guide_nimg: int | None = None
    guide_ema: float | None = None
    weight: float = 1.0
    interval: tuple[float, float] = (0.0, float("inf"))
    sampler: tuple[str, ...] = ("--solver", "dpmpp2m", "--steps", "12")

    def with_values(self, values: Mapping[str, Any]) -> "Setting":
        """A copy with other values of some fields."""
        return replace(self, **values)


@dataclass(frozen=True)
class Method:
    """A row of the table: where its search starts, and the values to try, one group of fields after the other.

    `base` names the method whose best setting is the start, instead of `start`. Each axis is a list of values of one
    or more fields; the best one stays for the axes that follow.
    """

    title: str
    axes: Sequence[Sequence[Mapping[str, Any]]]
    start: Mapping[str, Any] = field(default_factory=dict)
    base: str | None = None


def axis(name: str, *values: Any) -> list[dict[str, Any]]:
    """An axis of one field."""
    return [{name: value} for value in values]


def _in_parts(intervals: Sequence[tuple[float, float]], *weights: float) -> list[dict[str, Any]]:
    """An axis of intervals and weights together."""
    return [{"interval": interval, "weight": weight} for interval in intervals for weight in weights]


KI = 1024
_SAMPLER = ("--solver", "dpmpp2m", "--steps", "12", "--sigma_min")
_SAMPLERS = axis("sampler", *((*_SAMPLER, level) for level in ("0.02", "0.05", "0.08")))
_EMAS = axis("ema", 0.05, 0.10, 0.15)
_GUIDES = [
    {"guide": run, "guide_nimg": nimg, "weight": weight}
    for run, nimg in (("main", 32 * KI), ("main", 64 * KI), ("main", 128 * KI), ("guide", 40 * KI))
    for weight in (1.25, 1.5, 2.0)
]
START = Setting(ema=0.10, sampler=(*_SAMPLER, "0.05"))
METHODS: dict[str, Method] = {
    "none": Method("no guidance", [_EMAS, _SAMPLERS]),
    "cfg": Method(
        "classifier-free guidance",
        [axis("weight", 1.25, 1.5, 2.0, 3.0)],
        {"guide": "uncond", "weight": 1.5},
        "none",
    ),
    "cfg-interval": Method(
        "classifier-free guidance in an interval",
        [_in_parts([(0.0, 1.0)], 1.5, 2.0) + _in_parts([(0.5, 80.0)], 2.0, 3.0)],
        base="cfg",
    ),
    "autoguidance": Method(
        "autoguidance",
        [_GUIDES, axis("guide_ema", 0.05, 0.10, 0.15)],
        {"guide": "main", "guide_nimg": 64 * KI, "guide_ema": 0.10, "weight": 1.5},
        "none",
    ),
    "autoguidance-interval": Method(
        "autoguidance in an interval",
        [
            _in_parts([(0.0, 1.0), (0.0, 3.0), (0.5, 80.0)], 1.5, 2.0)
            + _in_parts([(1.5, 80.0)], 2.0, 3.0)
            + _in_parts([(0.5, 80.0)], 2.5, 3.0)
        ],
        base="autoguidance",
    ),
}
