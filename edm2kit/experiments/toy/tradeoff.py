"""The trade-off: outliers removed against branches lost, as each method's weight grows."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edm2kit.experiments.toy import drawing
from edm2kit.experiments.toy.evaluation import TRUTH, UNGUIDED, summary
from edm2kit.experiments.toy.methods import METHODS

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(record: dict[str, Any], stem: Path) -> None:
    """Write the picture to `stem`.png and .pdf, from the record that `evaluation.evaluate` made."""
    with drawing.style():
        fig, (ax,) = drawing.figure(1, width=5.2, height=3.6)
        for name, method in METHODS.items():
            _draw_curve(ax, record, name, method.title, method.weights)
        for name, marker, label in ((UNGUIDED, "o", "No guidance"), (TRUTH, "*", "Exact samples")):
            found = summary(record, name, 1.0)
            x, y = found["lost_mass"].mean, found["outside"].mean
            ax.scatter(x, y, marker=marker, s=45, color="black", zorder=5)
            ax.annotate(label, (x, y), xytext=(7, 0), textcoords="offset points", va="center")
        ax.set(xlim=(-0.02, None), ylim=(0, None))
        ax.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
        ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
        ax.set_xlabel("Lost: true mass of branches that got less than half of theirs")
        ax.set_ylabel("Outliers: samples outside the 99% level")
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#dddddd", linewidth=0.4)
        ax.legend(frameon=False, fontsize=7)
        drawing.save(fig, stem)


def _draw_curve(ax: "Axes", record: dict[str, Any], name: str, title: str, weights: tuple[float, ...]) -> None:
    points = [summary(record, UNGUIDED, 1.0), *(summary(record, name, weight) for weight in weights)]
    x, y = [p["lost_mass"].mean for p in points], [p["outside"].mean for p in points]
    colour = drawing.COLOURS[name]
    ax.errorbar(
        x,
        y,
        xerr=[p["lost_mass"].std for p in points],
        yerr=[p["outside"].std for p in points],
        color=colour,
        marker="o",
        markersize=2.5,
        linewidth=1,
        elinewidth=0.5,
        label=title,
    )
    last = f"$w={weights[-1]:g}$"
    ax.annotate(last, (x[-1], y[-1]), xytext=(4, 4), textcoords="offset points", color=colour, fontsize=6.5)
