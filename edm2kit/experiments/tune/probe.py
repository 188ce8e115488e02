"""What guides do to the denoising error, at every noise level, without generating an image.

At noise level sigma let D be the main network's estimate, D_n the guide's, and x0 the clean image, which is known for
images from a data set. The guided estimate D_n + w (D - D_n) has the smallest squared error at

    w*(sigma) = E<x0 - D_n, D - D_n> / E|D - D_n|^2 = 1 + E<x0 - D, D - D_n> / E|D - D_n|^2.

Both are averages over images, so some hundred images are enough. If D is exact, its error is orthogonal to any function
of the noisy image, and w* is 1 for every guide.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from edm2kit.denoiser import Denoiser, for_images, for_step
from edm2kit.torch_utils.dist import progress_bar
from edm2kit.torch_utils.rng import StackedGenerator, derive_seed

_NORMAL_95 = 1.959964


@dataclass(frozen=True)
class GuideAtLevel:
    """One guide at one noise level, over all images.

    - `weight`: the least-squares weight w*, with its 95% interval `low` to `high`.
    - `size`: |D - D_n| relative to |D|. `cosine`: of the angle between D - D_n and D.
    - `loss`, `guide_loss`: mean squared error of D and of D_n per value, times EDM's weight
      (sigma^2 + sigma_data^2) / (sigma sigma_data)^2.
    - `gain`: the share of the main network's squared error that guidance with w* would remove.
    """

    guide: str
    sigma: float
    weight: float
    low: float
    high: float
    size: float
    cosine: float
    loss: float
    guide_loss: float
    gain: float


@dataclass(frozen=True)
class ProbeResult:
    """Every guide at every level, from the highest; `angles` maps pairs of guides to the cosine of their differences
    by level."""

    num_images: int
    sigmas: tuple[float, ...]
    levels: Mapping[str, Sequence[GuideAtLevel]]
    angles: Mapping[tuple[str, str], Sequence[float]]


class _Sums:
    """Per-image inner products of one noise level, collected batch by batch; float64 on the CPU."""

    def __init__(self) -> None:
        self.parts: dict[Any, list[torch.Tensor]] = {}

    def add(self, key: Any, a: torch.Tensor, b: torch.Tensor) -> None:
        product = (
            (a.double() * b.double()).flatten(1).sum(dim=1) if a.device.type != "mps" else (a * b).flatten(1).sum(1)
        )
        self.parts.setdefault(key, []).append(product.double().cpu())

    def of(self, key: Any) -> torch.Tensor:
        return torch.cat(self.parts[key])


@torch.no_grad()
def probe(
    main: Denoiser,
    doubled: Mapping[str, Denoiser],
    images: torch.Tensor,
    conditions: Any,
    sigmas: Sequence[float],
    *,
    sigma_data: float = 0.5,
    batch_size: int = 32,
    seed: int = 0,
) -> ProbeResult:
    """Compare every guide with the main network on `images`, encoded, float32 [N, C, H, W].

    `doubled` holds each guide as the main network guided by it with weight 2, which is D + (D - D_n): so any method of
    the registry with a weighted difference can be probed. `conditions` are labels [N, K], a `Condition` or None;
    `sigmas` noise levels, positive. All guides see the same noise, and image k's depends on seed and k alone. Raises
    ValueError for fewer than two images.
    """
    if len(images) < 2:
        raise ValueError(f"a probe needs at least 2 images, better 500; got {len(images)}")
    descending = sorted(sigmas, reverse=True)
    steps = torch.tensor([*descending, 0.0], device=images.device)
    sums = [_Sums() for _ in descending]
    with progress_bar(len(images) * len(descending), "eval", what="probe") as bar:
        for start in range(0, len(images), batch_size):
            x0 = images[start : start + batch_size]
            numbers = range(start, start + len(x0))
            condition = None if conditions is None else conditions[start : start + batch_size]
            rng = StackedGenerator(images.device, [derive_seed(seed, "probe", k) for k in numbers])
            guides = {}
            for name, denoiser in doubled.items():
                own = StackedGenerator(images.device, [derive_seed(seed, "probe guidance", k) for k in numbers])
                guides[name] = for_images(denoiser, own)
            for i, level in enumerate(sums):
                x = x0 + steps[i] * rng.randn_like(x0)
                _add_level(level, main, guides, x0, x, i, steps, condition)
                bar.update(len(x0))
    found: dict[str, list[GuideAtLevel]] = {name: [] for name in doubled}
    angles: dict[tuple[str, str], list[float]] = {}
    for sigma, level in zip(descending, sums, strict=True):
        scale = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2 / images[0].numel()
        for name in doubled:
            found[name].append(_summarise(name, sigma, level, scale))
        names = list(doubled)
        for a, one in enumerate(names):
            for other in names[a + 1 :]:
                cosine = (
                    level.of((one, other)).sum() / (level.of((one, one)).sum() * level.of((other, other)).sum()).sqrt()
                )
                angles.setdefault((one, other), []).append(float(cosine))
    return ProbeResult(len(images), tuple(descending), found, angles)


def _add_level(
    level: _Sums,
    main: Denoiser,
    guides: Mapping[str, Denoiser],
    x0: torch.Tensor,
    x: torch.Tensor,
    i: int,
    steps: torch.Tensor,
    condition: Any,
) -> None:
    D = main(x, steps[i], condition)
    error = x0 - D
    level.add("error", error, error)
    level.add("D", D, D)
    differences = {}
    for name, guided in guides.items():
        difference = for_step(guided, i, steps)(x, steps[i], condition) - D
        differences[name] = difference
        level.add((name, "error"), error, difference)
        level.add((name, "D"), difference, D)
        for other, earlier in differences.items():
            level.add((other, name), earlier, difference)


def _summarise(name: str, sigma: float, level: _Sums, scale: float) -> GuideAtLevel:
    along, square = level.of((name, "error")), level.of((name, name))
    error, D = level.of("error").sum(), level.of("D").sum()
    total = square.sum()
    if total <= 0:
        raise ValueError(
            f"guide {name} never differs from the main network (first at noise level {sigma:g}); is it the same file?"
        )
    above_one = along.sum() / total
    # of a ratio of two averages, to first order
    residuals = along - above_one * square
    n = len(square)
    standard_error = float((residuals.square().sum() * n / (n - 1)).sqrt() / total)
    weight = 1 + float(above_one)
    guide_error = error + 2 * along.sum() + total  # x0 - D_n = (x0 - D) + (D - D_n)
    return GuideAtLevel(
        guide=name,
        sigma=sigma,
        weight=weight,
        low=weight - _NORMAL_95 * standard_error,
        high=weight + _NORMAL_95 * standard_error,
        size=float((total / D).sqrt()),
        cosine=float(level.of((name, "D")).sum() / (total * D).sqrt()),
        loss=float(error) / n * scale,
        guide_loss=float(guide_error) / n * scale,
        gain=float(above_one**2 * total / error),
    )


@dataclass(frozen=True)
class Prediction:
    """What the probe expects of one guide: an interval to search, None if it has no opinion, and why, in words.

    `gain` is the share of the squared error that the best weights remove, averaged over all levels, counting those
    whose interval lies above 1.
    """

    guide: str
    interval: tuple[float, float] | None
    gain: float
    text: str


def predict(result: ProbeResult) -> list[Prediction]:
    """The guides, the most promising first."""
    found = [_predict(name, levels) for name, levels in result.levels.items()]
    return sorted(found, key=lambda one: -one.gain)


def _predict(name: str, levels: Sequence[GuideAtLevel]) -> Prediction:
    helping = [level.low > 1 for level in levels]
    gain = sum(level.gain for level, helps in zip(levels, helping, strict=True) if helps) / len(levels)
    runs = _runs(helping)
    opposing = [level.sigma for level in levels if level.high < 1]
    against = ""
    if opposing:
        against = (
            f" The weight is below 1 at {_range(opposing)}: there the guide knows something that the main network does "
            "not, and leading away from it costs accuracy."
        )
    if not runs:
        return Prediction(
            name,
            None,
            0.0,
            f"{name}: at no level is the least-squares weight above 1 beyond chance, so the probe has no opinion. "
            "Guidance may still help, as it also sharpens what the average over images hides; search the complete "
            f"range of noise levels.{against}",
        )
    first, last = max(runs, key=lambda run: sum(level.gain for level in levels[run[0] : run[1] + 1]))
    inside = levels[first : last + 1]
    hi = math.inf if first == 0 else math.sqrt(levels[first - 1].sigma * levels[first].sigma)
    lo = 0.0 if last == len(levels) - 1 else math.sqrt(levels[last].sigma * levels[last + 1].sigma)
    top = max(inside, key=lambda level: level.weight)
    return Prediction(
        name,
        (float(f"{lo:.3g}"), float(f"{hi:.3g}")),
        gain,
        f"{name}: guidance reduces even the denoising error at {_range([level.sigma for level in inside])}; the "
        f"least-squares weight is largest at noise level {top.sigma:.3g}, {top.weight:.2f} ({top.low:.2f} to "
        f"{top.high:.2f}), and the best weights remove {gain:.2%} of the squared error on average over levels. Search "
        f"weights from {max(1.1, top.low):.1f} up; the best weight for images is usually larger.{against}",
    )


def _range(sigmas: Sequence[float]) -> str:
    if len(sigmas) == 1:
        return f"noise level {sigmas[0]:.3g}"
    return f"noise levels {min(sigmas):.3g} to {max(sigmas):.3g}"


def _runs(flags: Sequence[bool]) -> list[tuple[int, int]]:
    """First and last position of every run of true flags."""
    runs: list[tuple[int, int]] = []
    for k, flag in enumerate(flags):
        if flag and runs and runs[-1][1] == k - 1:
            runs[-1] = (runs[-1][0], k)
        elif flag:
            runs.append((k, k))
    return runs


def summary(result: ProbeResult) -> str:
    """The prediction in plain words, a paragraph per guide and one on what to search."""
    predictions = predict(result)
    lines = [one.text for one in predictions]
    best = predictions[0]
    if best.interval is None:
        lines.append("No guide stands out: search all of them, over all noise levels.")
    else:
        lo, hi = best.interval
        lines.append(
            f"Search {best.guide} first, with guidance for sigma in ({lo:g}, {hi:g}] and somewhat beyond. This is a "
            "forecast from denoising errors; only generated images decide."
        )
    return "\n".join(lines)
