"""Restart sampling: intervals of noise levels that are passed several times, each time with fresh noise."""

from dataclasses import dataclass, field

import torch

from edm2kit.conditions import ConditionLike
from edm2kit.denoiser import Denoiser, after_step, for_step, levels_of, move_levels
from edm2kit.sampling.noise_levels import NO_CHURN, Churn, RandnLike, karras_sigmas, refuse_churn

Interval = tuple[int, int, float, float]


def parse_intervals(text: str) -> tuple[Interval, ...]:
    """Intervals from "4,1,1.09,1.92 6,6,0.06,0.3". Raises ValueError if the text is something else."""
    intervals = []
    for part in text.split():
        try:
            levels, times, low, high = part.split(",")
            intervals.append((int(levels), int(times), float(low), float(high)))
        except ValueError:
            raise ValueError(
                f"{part!r} is not an interval LEVELS,TIMES,LO,HI; write for example 4,1,1.09,1.92"
            ) from None
    return Restart(tuple(intervals)).intervals


@dataclass(frozen=True)
class Restart:
    """Where to restart: (levels, times, sigma_lo, sigma_hi) of each interval.

    When the run reaches `sigma_lo`, moved to the nearest noise level of the run, noise leads back to `sigma_hi` and
    Heun steps over `levels` noise levels down to `sigma_lo` again, `times` times. The default is ours: the paper's
    table for ImageNet-64 (36 steps, 203 evaluations in all) as we remember it, not compared with it. What is above the
    first noise level of the run is left out, and so is an interval without room between two levels of the run. Raises
    ValueError if an interval has fewer than 2 levels or is not in order.
    """

    intervals: tuple[Interval, ...] = field(
        default=(
            (4, 1, 19.35, 40.79),
            (4, 1, 1.09, 1.92),
            (4, 5, 0.59, 1.09),
            (4, 5, 0.30, 0.59),
            (6, 6, 0.06, 0.30),
        ),
        metadata={
            "option": "--restart-intervals",
            "metavar": "LIST",
            "help": "Intervals LEVELS,TIMES,LO,HI separated by spaces: from noise level LO, noise leads back to HI, and"
            " steps over LEVELS noise levels down to LO; TIMES times",
            "parse": parse_intervals,
            "default_shown": "ours, after ImageNet-64",
            "hidden": True,
        },
    )

    def __post_init__(self) -> None:
        for levels, times, low, high in self.intervals:
            if levels < 2 or times < 0:
                raise ValueError(
                    f"restart interval {levels},{times},{low:g},{high:g}: expected at least 2 levels and 0 times"
                )
            if not 0 < low < high:
                raise ValueError(f"restart interval ({low:g}, {high:g}]; expected 0 < lo < hi")

    def after_steps(self, sigmas: torch.Tensor) -> dict[int, list[tuple[int, int, float]]]:
        """(levels, times, sigma_hi) of the restarts after each step, by the number of the step."""
        found: dict[int, list[tuple[int, int, float]]] = {}
        # on the CPU: values read from a GPU would make the host wait
        levels_of_run = torch.tensor(levels_of(sigmas), dtype=sigmas.dtype)
        top, reached = float(levels_of_run[0]), levels_of_run[1:-1]  # a restart ends above 0
        for levels, times, low, high in self.intervals:
            if len(reached) == 0 or low >= top:
                continue
            step = int((reached - low).abs().argmin())
            high = min(high, top)
            if float(reached[step]) < high:
                found.setdefault(step, []).append((levels, times, high))
        return found


DEFAULT = Restart()


@torch.no_grad()
def restart(
    denoiser: Denoiser,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    condition: ConditionLike = None,
    randn_like: RandnLike = torch.randn_like,
    churn: Churn = NO_CHURN,
    settings: Restart = DEFAULT,
) -> torch.Tensor:
    """Heun steps, with restarts from higher noise levels: 2N - 1 evaluations, and 2 (levels - 1) for each restart.

    The fresh noise of a restart contracts the errors made before it; the ODE steps add little of their own. Other
    arguments as in `heun`. Raises ValueError with churn. Xu et al. 2023 (arXiv 2306.14878), Alg. 1.

    Example: `restart(net, torch.randn(4, 3, 64, 64), karras_sigmas(36, 0.002, 80, 7))`.
    """
    refuse_churn("restart", churn)
    x = noise.to(sigmas.dtype) * sigmas[0]
    restarts = settings.after_steps(sigmas)
    for i in range(len(sigmas) - 1):
        x = _heun_step(denoiser, x, i, sigmas, condition)
        for levels, times, sigma_hi in restarts.get(i, ()):
            run, first = _with_interval(sigmas, i + 1, levels, sigma_hi)
            for _ in range(times):
                x = x + (run[first] ** 2 - sigmas[i + 1] ** 2).sqrt() * randn_like(x)
                for k in range(first, first + levels - 1):
                    x = _heun_step(denoiser, x, k, run, condition)
    return x


def _with_interval(sigmas: torch.Tensor, end: int, levels: int, sigma_hi: float) -> tuple[torch.Tensor, int]:
    """The noise levels of a run that passes an interval from `sigma_hi` to sigmas[end], and where that begins.

    So a denoiser that follows the run, guided in an interval of noise levels for example, sees all of it.
    """
    run = torch.tensor(levels_of(sigmas), dtype=sigmas.dtype)  # on the CPU, so that the host does not wait for a GPU
    inside = karras_sigmas(levels, float(run[end]), sigma_hi, 7.0, sigmas.dtype)[:-1]
    inside[-1] = run[end]
    above = run[run > inside[0]]
    return move_levels(torch.cat([above, inside, run[end + 1 :]]), sigmas.device), len(above)


def _heun_step(
    denoiser: Denoiser, x: torch.Tensor, i: int, sigmas: torch.Tensor, condition: ConditionLike
) -> torch.Tensor:
    D = for_step(denoiser, i, sigmas)
    sigma, sigma_next = sigmas[i], sigmas[i + 1]
    d = (x - D(x, sigma, condition).to(x.dtype)) / sigma
    x_next = x + (sigma_next - sigma) * d
    if i < len(sigmas) - 2:
        d_next = (x_next - D(x_next, sigma_next, condition).to(x.dtype)) / sigma_next
        x_next = x + (sigma_next - sigma) * (d + d_next) / 2
    return after_step(D, x_next, i, sigmas)
