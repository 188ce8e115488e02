"""The toy's figures: samples of every kind of guidance, densities and trajectories close up, and the trade-off."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from edm2kit.denoiser import Denoiser, Wrapper
from edm2kit.experiments.toy import plot_style as style
from edm2kit.experiments.toy.evaluation import TRUTH, UNGUIDED, summary
from edm2kit.experiments.toy.measures import Yardstick
from edm2kit.experiments.toy.methods import NUM_STEPS, TOY_METHODS, Nets, ToyMethod, sample, start
from edm2kit.experiments.toy.mixture import Mixture
from edm2kit.experiments.toy.model import ScoreDenoiser, ToyNet
from edm2kit.experiments.toy.tree import components
from edm2kit.sampling.solvers import edm_sampler
from edm2kit.torch_utils.rng import derive_seed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TREE_WINDOW = style.Window(-0.74, 1.42, -0.66, 1.50)
_MEASURED, _SHOWN = 8192, 4096  # samples of Figure 1

_DETAIL_WINDOW = style.Window(0.52, 1.40, -0.18, 0.70)
_DETAIL_SIGMA = 0.06  # between the width of a branch and the gap to the next one
_ARROWS = 15  # per row
_TRAJECTORIES = 160

LogDensity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x [N,2], sigma) -> [N]


def draw_samples(nets: Nets, seed: int, stem: Path) -> None:
    """Write Figure 1, samples of every kind of guidance next to the truth, to `stem`.png and .pdf.

    The numbers below the panels are those of the samples shown.
    """
    yardstick = Yardstick.of(Mixture(components("A")), _MEASURED, seed)
    with style.style():
        fig, axes = style.figure(5, width=10, height=2.45)
        for ax, letter, (title, x) in zip(axes, "abcde", _samples(nets, seed).items(), strict=True):
            _sample_panel(ax, x, yardstick)
            ax.set_title(f"({letter}) {title}")
        style.save(fig, stem)


def _samples(nets: Nets, seed: int) -> dict[str, torch.Tensor]:
    """Samples [N,2] by the title of their panel, in order."""
    noise = start(_MEASURED, seed)
    generator = torch.Generator().manual_seed(derive_seed(seed, "toy exact"))
    panels = {
        "Ground truth": Mixture(components("A")).sample(_MEASURED, generator),
        "No guidance": sample(nets.main, noise),
    }
    for name in ("cfg", "truncation", "autoguidance"):
        method = TOY_METHODS[name]
        weight = _figure_weight(method)
        panels[f"{method.title}, $w={weight:g}$"] = sample(method.denoiser(nets, weight), noise)
    return panels


def _figure_weight(method: ToyMethod) -> float:
    if method.figure_weight is None:
        raise ValueError(f"{method.title} is not part of the paper's figures; give it a figure_weight")
    return method.figure_weight


def _sample_panel(ax: "Axes", x: torch.Tensor, yardstick: Yardstick) -> None:
    found = yardstick.measure(x)
    style.draw_truth(ax, TREE_WINDOW, "B", style.CLASS_B)
    style.draw_truth(ax, TREE_WINDOW, "A", style.CLASS_A)
    shown = x[:_SHOWN]
    outside = yardstick.truth.logp(shown) < yardstick.level
    for points, colour, size in ((shown[~outside], style.INK, 0.6), (shown[outside], style.OUTLIER, 1.5)):
        ax.scatter(points[:, 0], points[:, 1], s=size, color=colour, linewidths=0, zorder=2, rasterized=True)
    style.show_window(ax, TREE_WINDOW)
    ax.set_xlabel(f"outside {100 * found['outside']:.1f}%, lost {100 * found['lost_mass']:.1f}%", labelpad=3)


def draw_detail(main: ToyNet, guide: ToyNet, seed: int, stem: Path) -> None:
    """Write Figure 2, learned densities and trajectories close up, to `stem`.png and .pdf."""
    method = TOY_METHODS["autoguidance"]
    weight = _figure_weight(method)
    nets = Nets(ScoreDenoiser(main.score), ScoreDenoiser(guide.score), ScoreDenoiser(guide.score))

    def log_ratio(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return main(x, sigma) - guide(x, sigma)

    with style.style(), torch.no_grad():
        fig, axes = style.figure(5, width=10, height=2.3)
        _density_panel(axes[0], main, rf"(a) $p_1(x;\,\sigma)$, $\sigma={_DETAIL_SIGMA:g}$")
        _density_panel(axes[1], guide, r"(b) $p_0(x;\,\sigma)$, the guide")
        _density_panel(
            axes[2], lambda x, sigma: main(x, sigma) - guide(x, sigma), r"(c) ratio $p_1/p_0$", is_ratio=True
        )
        _trajectory_panel(axes[3], nets.main, seed, "(d) Trajectories without guidance")
        _trajectory_panel(axes[4], method.denoiser(nets, weight), seed, f"(e) With autoguidance, $w={weight:g}$")
        style.save(fig, stem)


def _density_panel(ax: "Axes", logp: LogDensity, title: str, is_ratio: bool = False) -> None:
    """A density, or the logarithm of a ratio of densities, with arrows along its gradient."""
    window = _DETAIL_WINDOW
    x, y, points = window.grid(240)
    values = logp(points, torch.tensor(_DETAIL_SIGMA)).reshape(len(y), len(x))
    if is_ratio:
        values = values - values.median()
        high = values.abs().quantile(0.95).item()
        low, colours = -high, "PuOr_r"
    else:
        values = (values - values.max()).exp()
        low, high, colours = 0.0, values.quantile(0.995).item(), "Oranges"
    ax.imshow(
        values.numpy(),
        extent=(window.left, window.right, window.bottom, window.top),
        origin="lower",
        cmap=colours,
        vmin=low,
        vmax=1.3 * high,  # arrows and outline stay visible on colours that are not the darkest
        zorder=0,
    )
    style.draw_truth(ax, window, "A", "#444444", filled=False)
    _draw_gradient(ax, logp)
    style.show_window(ax, window)
    ax.set_title(title)


def _draw_gradient(ax: "Axes", logp: LogDensity) -> None:
    window = _DETAIL_WINDOW
    cell = (window.right - window.left) / _ARROWS
    inner = style.Window(
        window.left + cell / 2, window.right - cell / 2, window.bottom + cell / 2, window.top - cell / 2
    )
    _, _, feet = inner.grid(_ARROWS)
    arrows = torch.func.grad(lambda feet: logp(feet, torch.tensor(_DETAIL_SIGMA)).sum())(feet)
    # the longest arrow fills a cell; the square root keeps short ones visible
    length = arrows.norm(dim=1, keepdim=True)
    arrows = arrows / length * (length / length.quantile(0.98)).sqrt().clamp(max=1) * cell
    ax.quiver(
        *feet.T.numpy(),
        *arrows.T.numpy(),
        pivot="mid",
        angles="xy",
        scale_units="xy",
        scale=1,
        width=0.005,
        color="#222222",
        zorder=2,
    )


@dataclass(frozen=True)
class PathRecorder(Wrapper):
    """`denoiser`, which also records where each step of a sampling run ends."""

    denoiser: Denoiser
    path: list[torch.Tensor] = field(default_factory=list)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, condition: Any = None, /) -> torch.Tensor:
        return self.denoiser(x, sigma, condition)

    def after_step(self, x: torch.Tensor, i: int, sigmas: torch.Tensor) -> torch.Tensor:
        x = super().after_step(x, i, sigmas)
        self.path.append(x)
        return x


def _trajectory_panel(ax: "Axes", denoiser: Denoiser, seed: int, title: str) -> None:
    """Paths of the ODE from exact samples at _DETAIL_SIGMA down to no noise."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "toy trajectories"))
    noisy = Mixture(components("A")).sample(20 * _TRAJECTORIES, generator, sigma=_DETAIL_SIGMA)
    noisy = noisy[_DETAIL_WINDOW.shows(noisy)][:_TRAJECTORIES]
    recorder = PathRecorder(denoiser)
    noise = (noisy / _DETAIL_SIGMA)[:, :, None, None]
    edm_sampler(recorder, noise, num_steps=NUM_STEPS, sigma_max=_DETAIL_SIGMA)
    paths = torch.stack([noisy, *(x.flatten(1) for x in recorder.path)])
    style.draw_truth(ax, _DETAIL_WINDOW, "A", style.CLASS_A)
    ax.plot(*paths.numpy().transpose(2, 0, 1), color=style.INK, linewidth=0.35, alpha=0.6, zorder=2)
    ax.scatter(paths[-1, :, 0], paths[-1, :, 1], s=3, color=style.INK, linewidths=0, zorder=3)
    style.show_window(ax, _DETAIL_WINDOW)
    ax.set_title(title)


def draw_tradeoff(record: Mapping[str, Any], stem: Path) -> None:
    """Write the trade-off, outliers against lost branches as weights grow, to `stem`.png and .pdf.

    `record` is that of `evaluation.evaluate`.
    """
    with style.style():
        fig, (ax,) = style.figure(1, width=5.2, height=3.6)
        for name, method in TOY_METHODS.items():
            _draw_curve(ax, record, name, method)
        for name, marker, label in ((UNGUIDED, "o", "No guidance"), (TRUTH, "*", "Exact samples")):
            found = summary(record, name, 1.0)
            x, y = found["lost_mass"].mean, found["outside"].mean
            ax.scatter(x, y, marker=marker, s=45, color="black", zorder=5)
            ax.annotate(label, (x, y), xytext=(7, 0), textcoords="offset points", va="center")
        ax.set(xlim=(-0.02, None), ylim=(0, None))
        ax.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
        ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
        ax.set_xlabel("Lost: true mass of branches that got less than half of their share")
        ax.set_ylabel("Outliers: samples outside the 99% level")
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#dddddd", linewidth=0.4)
        ax.legend(frameon=False, fontsize=7)
        style.save(fig, stem)


def _draw_curve(ax: "Axes", record: Mapping[str, Any], name: str, method: ToyMethod) -> None:
    points = [summary(record, UNGUIDED, 1.0), *(summary(record, name, weight) for weight in method.weights)]
    x = [point["lost_mass"].mean for point in points]
    y = [point["outside"].mean for point in points]
    colour = style.COLOURS[name]
    ax.errorbar(
        x,
        y,
        xerr=[point["lost_mass"].std for point in points],
        yerr=[point["outside"].std for point in points],
        color=colour,
        marker="o",
        markersize=2.5,
        linewidth=1,
        elinewidth=0.5,
        label=method.title,
    )
    last = f"$w={method.weights[-1]:g}$"
    ax.annotate(last, (x[-1], y[-1]), xytext=(4, 4), textcoords="offset points", color=colour, fontsize=6.5)
