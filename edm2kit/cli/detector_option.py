"""The option --detector: detectors of the user's own, registered before the other options are read."""

from typing import Any

import click

from edm2kit.cli import click_types as cli
from edm2kit.metrics.detectors.clip import CMMD_MODEL, clip_detector
from edm2kit.metrics.detectors.exported import exported_detector
from edm2kit.metrics.detectors.registry import register_detector
from edm2kit.metrics.registry import ALL, FDR, METRICS

_CMMD = "clip"


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
