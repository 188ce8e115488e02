"""Figure 2: what the main network and its guide believe, and where that leads samples, close up."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from edm2kit.denoiser import Denoiser, after_step, for_step
from edm2kit.experiments.toy import drawing
from edm2kit.experiments.toy.methods import METHODS, NUM_STEPS, Nets
from edm2kit.experiments.toy.mixture import Mixture
from edm2kit.experiments.toy.model import ScoreDenoiser, ToyNet
from edm2kit.experiments.toy.tree import components
from edm2kit.sampling.solvers import edm_sampler
from edm2kit.torch_utils.rng import derive_seed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WINDOW = drawing.Window(0.52, 1.40, -0.18, 0.70)
SIGMA = 0.06  # between the width of a branch and the gap to the next
_ARROWS = 15
_TRAJECTORIES = 160

LogDensity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x [N,2], sigma) -> [N]


def draw(main: ToyNet, guide: ToyNet, seed: int, stem: Path) -> None:
    """Write the picture to `stem`.png and .pdf."""
    method = METHODS["autoguidance"]
    weight = method.figure_weight
    assert weight is not None
    nets = Nets(*(ScoreDenoiser(net.score) for net in (main, guide, guide)))
    with drawing.style(), torch.no_grad():
        fig, axes = drawing.figure(5, width=10, height=2.3)
        _draw_density(axes[0], main, rf"(a) $p_1(x;\,\sigma)$, $\sigma={SIGMA:g}$", "Oranges")
        _draw_density(axes[1], guide, r"(b) $p_0(x;\,\sigma)$, the guide", "Oranges")
        _draw_density(axes[2], lambda x, sigma: main(x, sigma) - guide(x, sigma), r"(c) ratio $p_1/p_0$", "PuOr_r")
        _draw_trajectories(axes[3], nets.main, seed, "(d) Trajectories without guidance")
        _draw_trajectories(axes[4], method.denoiser(nets, weight), seed, f"(e) With autoguidance, $w={weight:g}$")
        drawing.save(fig, stem)


def _draw_density(ax: "Axes", logp: LogDensity, title: str, colours: str) -> None:
    """A density, or for a diverging colour map a ratio on a logarithmic scale, under the arrows of its gradient."""
    x, y, points = WINDOW.grid(240)
    values = logp(points, torch.tensor(SIGMA)).reshape(len(y), len(x))
    if colours == "PuOr_r":
        values = values - values.median()
        limits = (-values.abs().quantile(0.95).item(), values.abs().quantile(0.95).item())
    else:
        values = (values - values.max()).exp()
        limits = (0.0, values.quantile(0.995).item())
    extent = (WINDOW.left, WINDOW.right, WINDOW.bottom, WINDOW.top)
    # the colour map spans past the limits so that arrows and outline stay readable on it
    ax.imshow(
        values.numpy(), extent=extent, origin="lower", cmap=colours, vmin=limits[0], vmax=1.3 * limits[1], zorder=0
    )
    drawing.draw_truth(ax, WINDOW, "A", "#444444", filled=False)
    cell = (WINDOW.right - WINDOW.left) / _ARROWS
    inner = drawing.Window(
        WINDOW.left + cell / 2, WINDOW.right - cell / 2, WINDOW.bottom + cell / 2, WINDOW.top - cell / 2
    )
    _, _, feet = inner.grid(_ARROWS)
    arrows = torch.func.grad(lambda feet: logp(feet, torch.tensor(SIGMA)).sum())(feet)
    # longest arrow: one cell; the square root keeps short ones visible
    length = arrows.norm(dim=1, keepdim=True)
    arrows = arrows / length * (length / length.quantile(0.98)).sqrt().clamp(max=1) * cell
    style = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.005, "color": "#222222", "zorder": 2}
    ax.quiver(*feet.T.numpy(), *arrows.T.numpy(), pivot="mid", **style)
    drawing.show_window(ax, WINDOW)
    ax.set_title(title)


@dataclass(frozen=True)
class Recorder:
    """`denoiser`, taking down where every step of a sampling run ends."""

    denoiser: Denoiser
    path: list[torch.Tensor] = field(default_factory=list)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        return self.denoiser(x, sigma, labels)

    def for_step(self, i: int, sigmas: torch.Tensor) -> "Recorder":
        return Recorder(for_step(self.denoiser, i, sigmas), self.path)

    def after_step(self, x: torch.Tensor, i: int, sigmas: torch.Tensor) -> torch.Tensor:
        x = after_step(self.denoiser, x, i, sigmas)
        self.path.append(x)
        return x


def _draw_trajectories(ax: "Axes", denoiser: Denoiser, seed: int, title: str) -> None:
    """Paths of the ODE from exact samples at SIGMA down to no noise."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "toy trajectories"))
    truth = Mixture(components("A"))
    noisy = truth.sample(20 * _TRAJECTORIES, generator, sigma=SIGMA)
    noisy = noisy[WINDOW.shows(noisy)][:_TRAJECTORIES]
    recorder = Recorder(denoiser)
    edm_sampler(recorder, (noisy / SIGMA)[:, :, None, None], num_steps=NUM_STEPS, sigma_max=SIGMA)
    paths = torch.stack([noisy, *(x.flatten(1) for x in recorder.path)])
    drawing.draw_truth(ax, WINDOW, "A", drawing.CLASS_A)
    ax.plot(*paths.numpy().transpose(2, 0, 1), color=drawing.INK, linewidth=0.35, alpha=0.6, zorder=2)
    ax.scatter(*paths[-1].T.numpy(), s=3, color=drawing.INK, linewidths=0, zorder=3)
    drawing.show_window(ax, WINDOW)
    ax.set_title(title)
