"""The options of calculate_metrics.py that name detectors and metrics: --detector and --metrics."""

from typing import Any

import click

from edm2kit.cli import click_types as cli
from edm2kit.metrics.detectors.clip import CMMD_MODEL, clip_detector
from edm2kit.metrics.detectors.exported import exported_detector
from edm2kit.metrics.detectors.registry import check_names, register_detector
from edm2kit.metrics.registry import ALL, FDR, METRICS, check_metrics

_CMMD = "clip"


class MetricNames(click.ParamType):
    """Names separated by commas, as a tuple: those of detectors, and of metrics too unless `only_detectors`."""

    name = "names"

    def __init__(self, only_detectors: bool = False) -> None:
        self.check = check_names if only_detectors else check_metrics

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if not isinstance(value, str):
            return tuple(value)
        names = tuple(dict.fromkeys(name.strip() for name in value.split(",")))
        try:
            self.check(names)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return names


class NewDetector(click.ParamType):
    """NAME=SOURCE, which is registered as NAME; SOURCE is a .pt2 file, or a CLIP or SigLIP model."""

    name = "detector"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        name, _, source = str(value).partition("=")
        try:
            _register(name, source)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return name


def detector_option() -> cli.Decorator:
    """`--detector NAME=SOURCE`; the names are then known to --metrics and to reference statistics."""
    return click.option(
        "--detector",
        "own_detectors",
        metavar="N=PATH",
        type=NewDetector(),
        multiple=True,
        is_eager=True,  # before --metrics is checked
        help="Add a detector: .pt2 of torch.export, or CLIP or SigLIP",
    )


def _register(name: str, source: str) -> None:
    if not source and name != _CMMD:
        raise ValueError(f"{name!r} has no source; give NAME=FILE.pt2, NAME=FOLDER, NAME=HUB/NAME, or {_CMMD}")
    if name in METRICS or name in (ALL, FDR):
        raise ValueError(f"{name!r} is a metric; choose another name")
    if source.lower().endswith(".pt2"):
        register_detector(name, exported_detector(source))
    else:
        register_detector(name, clip_detector(source or CMMD_MODEL))
