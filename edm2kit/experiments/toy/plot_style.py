"""What the toy's figures share: colours, windows of the plane, the outline of the truth, files of print quality."""

import importlib.util
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edm2kit.experiments.toy.measures import Yardstick
from edm2kit.experiments.toy.mixture import Mixture
from edm2kit.experiments.toy.tree import components
from edm2kit.torch_utils.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CLASS_A, CLASS_B = "#e08214", "#8a8a8a"
INK, OUTLIER = "#1f3a5f", "#c2185b"
COLOURS = {  # by method; distinguishable with colour blindness
    "autoguidance": "#0072b2",
    "cfg": "#d55e00",
    "mixed": "#9467bd",
    "cfg-apg": "#cc79a7",
    "cfg-interval": "#e69f00",
    "auto-interval": "#56b4e9",
    "input-noise": "#8c6d31",
    "truncation": "#009e73",
}
_STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 7.5,
    "axes.linewidth": 0.5,
    "axes.titlesize": 7.5,
    "axes.titlepad": 3,
    "pdf.fonttype": 42,  # embedded TrueType: text in the PDF stays text
    "savefig.facecolor": "white",
}


@dataclass(frozen=True)
class Window:
    """A rectangle of the plane."""

    left: float
    right: float
    bottom: float
    top: float

    def grid(self, columns: int) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
        """A grid of square cells: coordinates x [columns] and y [rows], and its points [rows*columns,2]."""
        rows = round(columns * (self.top - self.bottom) / (self.right - self.left))
        x, y = np.linspace(self.left, self.right, columns), np.linspace(self.bottom, self.top, rows)
        points = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
        return x, y, torch.from_numpy(points).float()

    def shows(self, x: torch.Tensor) -> torch.Tensor:
        """Which of the points [N,2] lie inside, bool [N]."""
        inside_x = (x[:, 0] > self.left) & (x[:, 0] < self.right)
        return inside_x & (x[:, 1] > self.bottom) & (x[:, 1] < self.top)


def check_can_draw() -> None:
    """Raises ValueError if matplotlib is not installed; call it before minutes of training, not after."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the figures need matplotlib. Run: pip install 'matplotlib>=3.8'")


def style() -> AbstractContextManager[None]:
    """matplotlib's settings for drawing and saving a figure, as a context manager."""
    from matplotlib import rc_context

    return rc_context(_STYLE)  # type: ignore[arg-type]  # its keys are a Literal of 300 names


def figure(columns: int, width: float, height: float) -> tuple["Figure", list["Axes"]]:
    """A figure with a row of panels, `width` and `height` in inches; needs no display."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height), layout="constrained")
    return fig, list(fig.subplots(1, columns, squeeze=False)[0])


def show_window(ax: "Axes", window: Window) -> None:
    """Make a panel show `window`, without ticks."""
    ax.set(xlim=(window.left, window.right), ylim=(window.bottom, window.top), xticks=[], yticks=[], aspect="equal")


def draw_truth(ax: "Axes", window: Window, classes: str, colour: str, filled: bool = True) -> None:
    """Draw the region above the 99% level of one class, with its outline."""
    x, y, logp, level = outline(window, classes)
    if filled:
        ax.contourf(x, y, logp, levels=[level, np.inf], colors=[colour], alpha=0.22, zorder=0)
    ax.contour(x, y, logp, levels=[level], colors=[colour], linewidths=0.5, alpha=0.9, linestyles="solid", zorder=1)


@cache
def outline(window: Window, classes: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """The exact log-density on a grid, x [W], y [H] and log p [H,W], and the level that 99% of the samples exceed."""
    truth = Mixture(components(classes))
    x, y, points = window.grid(500)
    return x, y, truth.logp(points).reshape(len(y), len(x)).numpy(), Yardstick.of(truth, 1, seed=0).level


def save(fig: "Figure", stem: Path) -> None:
    """Write `stem`.png and `stem`.pdf; the same figure gives the same bytes."""
    for suffix, metadata in ((".png", {"Software": None}), (".pdf", {"CreationDate": None})):
        with atomic_write(stem.with_suffix(suffix)) as file:
            fig.savefig(file, format=suffix[1:], dpi=300, metadata=metadata)
