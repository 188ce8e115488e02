"""One self-contained page where a slider moves the guidance weight over samples drawn beforehand."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scripts.toy import drawing
from scripts.toy.measures import Yardstick
from scripts.toy.methods import METHODS, Method, Nets, sample, start
from scripts.toy.mixture import Mixture
from scripts.toy.overview import WINDOW
from scripts.toy.tree import components
from torch_utils.files import atomic_write
from torch_utils.provenance import code_commit

TEMPLATE = Path(__file__).with_name("page.html")
_STOPS = 13
_UNITS = 8192  # per unit of the plane: 16 bits reach to +-4, and a pixel is many units


def write(nets: Nets, seed: int, path: Path, num: int = 2048) -> None:
    """Write the page: every method at 13 weights from 1 up, always from the same `num` starting points."""
    noise, truth = start(num, seed), Mixture(components("A"))
    yardstick = Yardstick.of(truth, num, seed)
    data = {
        "window": [WINDOW.left, WINDOW.right, WINDOW.bottom, WINDOW.top],
        "units": _UNITS,
        "outlines": {"A": _outline("A"), "B": _outline("B")},
        "methods": {name: _method(method, nets, noise, yardstick) for name, method in METHODS.items()},
        "about": {"samples": num, "seed": seed, "commit": code_commit()},
    }
    html = TEMPLATE.read_text(encoding="utf-8").replace('"DATA"', json.dumps(data, separators=(",", ":")))
    with atomic_write(path, "w") as file:
        file.write(html)


def page_weights(method: Method) -> list[float]:
    """The slider's stops, 1 (no guidance) to the largest weight of the comparison."""
    return [round(float(w), 4) for w in np.linspace(1.0, max(method.weights), _STOPS)]


def _method(method: Method, nets: Nets, noise: torch.Tensor, yardstick: Yardstick) -> dict[str, Any]:
    weights = page_weights(method)
    sets = [sample(method.denoiser(nets, weight), noise) for weight in weights]
    found = [yardstick.measure(x) for x in sets]
    return {
        "title": method.title,
        "weights": weights,
        "points": [_packed(x) for x in sets],
        "outliers": [(yardstick.truth.logp(x) < yardstick.level).nonzero()[:, 0].tolist() for x in sets],
        "outside": [round(one["outside"], 4) for one in found],
        "lost": [round(one["lost_mass"], 4) for one in found],
    }


def _packed(x: torch.Tensor) -> str:
    """Points [N,2] as base64 of little-endian int16, x and y in turn."""
    units = (x * _UNITS).round().clamp(-32768, 32767).numpy().astype("<i2")
    return base64.b64encode(units.tobytes()).decode("ascii")


def _outline(classes: str) -> list[list[float]]:
    """The 99% level's outlines as lists of x, y, x, y, ..."""
    x, y, logp, level = drawing.outline(WINDOW, classes)
    with drawing.style():
        _, (ax,) = drawing.figure(1, 1, 1)
        segments = ax.contour(x, y, logp, levels=[level]).allsegs[0]
    return [np.round(segment[::2], 3).ravel().tolist() for segment in segments if len(segment) > 4]
