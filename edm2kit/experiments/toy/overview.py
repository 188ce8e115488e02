"""Figure 1: samples of every kind of guidance beside the truth."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from edm2kit.experiments.toy import drawing
from edm2kit.experiments.toy.measures import Yardstick
from edm2kit.experiments.toy.methods import METHODS, Nets, sample, start
from edm2kit.experiments.toy.mixture import Mixture
from edm2kit.experiments.toy.tree import components
from edm2kit.torch_utils.rng import derive_seed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WINDOW = drawing.Window(-0.74, 1.42, -0.66, 1.50)
_MEASURED = 8192
_SHOWN = 4096


def samples(nets: Nets, seed: int) -> dict[str, torch.Tensor]:
    """The samples [N,2] of each panel, by its title, in order."""
    noise = start(_MEASURED, seed)
    panels = {
        "Ground truth": Mixture(components("A")).sample(
            _MEASURED, torch.Generator().manual_seed(derive_seed(seed, "toy exact"))
        ),
        "No guidance": sample(nets.main, noise),
    }
    for name in ("cfg", "truncation", "autoguidance"):
        method = METHODS[name]
        assert method.figure_weight is not None
        denoiser = method.denoiser(nets, method.figure_weight)
        panels[f"{method.title}, $w={method.figure_weight:g}$"] = sample(denoiser, noise)
    return panels


def draw(nets: Nets, seed: int, stem: Path) -> None:
    """Write the picture to `stem`.png and .pdf; the numbers below its panels are those of these samples."""
    yardstick = Yardstick.of(Mixture(components("A")), _MEASURED, seed)
    with drawing.style():
        fig, axes = drawing.figure(5, width=10, height=2.45)
        for ax, letter, (title, x) in zip(axes, "abcde", samples(nets, seed).items(), strict=True):
            _draw_panel(ax, x, yardstick)
            ax.set_title(f"({letter}) {title}")
        drawing.save(fig, stem)


def _draw_panel(ax: "Axes", x: torch.Tensor, yardstick: Yardstick) -> None:
    found = yardstick.measure(x)
    drawing.draw_truth(ax, WINDOW, "B", drawing.CLASS_B)
    drawing.draw_truth(ax, WINDOW, "A", drawing.CLASS_A)
    shown = x[:_SHOWN]
    outside = yardstick.truth.logp(shown) < yardstick.level
    for points, colour, size in ((shown[~outside], drawing.INK, 0.6), (shown[outside], drawing.OUTLIER, 1.5)):
        ax.scatter(*points.T.numpy(), s=size, color=colour, linewidths=0, zorder=2, rasterized=True)
    drawing.show_window(ax, WINDOW)
    ax.set_xlabel(f"outside {100 * found['outside']:.1f}%, lost {100 * found['lost_mass']:.1f}%", labelpad=3)
