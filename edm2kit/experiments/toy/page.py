"""A self-contained HTML page with a slider for the guidance weight, over samples generated in advance."""

import base64
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edm2kit.experiments.toy import plot_style
from edm2kit.experiments.toy.figures import TREE_WINDOW
from edm2kit.experiments.toy.measures import Yardstick
from edm2kit.experiments.toy.methods import TOY_METHODS, Nets, ToyMethod, sample, start
from edm2kit.experiments.toy.mixture import Mixture
from edm2kit.experiments.toy.tree import components
from edm2kit.torch_utils.files import atomic_write, code_commit
from edm2kit.torch_utils.rng import derive_seed

TEMPLATE = Path(__file__).with_name("page.html")
_STOPS = 13
_UNITS = 8192  # per unit of the plane: 16 bits reach to +-4, and a pixel is many units


def write(nets: Nets, seed: int, path: Path, num: int = 2048) -> None:
    """Write the page: every method at 13 weights from 1 up, always from the same `num` starting points."""
    noise, truth = start(num, seed), Mixture(components("A"))
    yardstick = Yardstick.of(truth, num, seed)
    plain = _slider_stop(sample(nets.main, noise), yardstick)
    exact = _slider_stop(truth.sample(num, torch.Generator().manual_seed(derive_seed(seed, "toy exact"))), yardstick)
    methods: dict[str, Any] = {}
    for name, method in TOY_METHODS.items():
        weights = page_weights(method)
        stops = [plain]
        for weight in weights[1:]:
            stops.append(_slider_stop(sample(method.denoiser(nets, weight), noise), yardstick))
        methods[name] = {"title": method.title, "weights": weights, "stops": [asdict(stop) for stop in stops]}
    data = {
        "window": [TREE_WINDOW.left, TREE_WINDOW.right, TREE_WINDOW.bottom, TREE_WINDOW.top],
        "units": _UNITS,
        "outlines": {"A": _outline("A"), "B": _outline("B")},
        "methods": methods,
        # with so few samples thin branches are empty by chance; the measures of exact samples show how much
        "about": {"samples": num, "seed": seed, "commit": code_commit()[:12], "exact": exact.measured},
    }
    html = TEMPLATE.read_text(encoding="utf-8").replace('"DATA"', json.dumps(data, separators=(",", ":")))
    with atomic_write(path, "w") as file:
        file.write(html)


def page_weights(method: ToyMethod) -> list[float]:
    """The weights of the slider's stops, from 1 (no guidance) to the largest of the comparison."""
    return [round(float(w), 4) for w in np.linspace(1.0, max(method.weights), _STOPS)]


@dataclass(frozen=True)
class SliderStop:
    """One stop of the slider: samples, indices of those outside the 99% level, and two measures.

    `points` is base64 of little-endian int16: x, y, x, y, ... in 1/8192 of a unit.
    """

    points: str
    outliers: list[int]
    measured: dict[str, float]


def _slider_stop(x: torch.Tensor, yardstick: Yardstick) -> SliderStop:
    units = (x * _UNITS).round().clamp(-32768, 32767).numpy().astype("<i2")
    points = base64.b64encode(units.tobytes()).decode("ascii")
    outliers = (yardstick.truth.logp(x) < yardstick.level).nonzero()[:, 0].tolist()
    found = yardstick.measure(x)
    return SliderStop(points, outliers, {"outside": round(found["outside"], 4), "lost": round(found["lost_mass"], 4)})


def _outline(classes: str) -> list[list[float]]:
    """Closed outlines of the 99% level, each as a list x, y, x, y, ..."""
    x, y, logp, level = plot_style.outline(TREE_WINDOW, classes)
    # a rim below the level, so that outlines cut off by the window are closed along it
    rim = [2 * axis[[0]] - axis[[1]] for axis in (x, x[::-1], y, y[::-1])]
    logp = np.pad(logp, 1, constant_values=level - 1)
    with plot_style.style():
        _, (ax,) = plot_style.figure(1, 1, 1)
        contours = ax.contour(np.concatenate([rim[0], x, rim[1]]), np.concatenate([rim[2], y, rim[3]]), logp, [level])
    return [np.round(segment[::2], 3).ravel().tolist() for segment in contours.allsegs[0] if len(segment) > 4]
