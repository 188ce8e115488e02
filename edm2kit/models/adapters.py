"""Denoisers made of other people's networks: noise, velocity, v or x0 predictions turned into D(x; sigma, condition).

A network of another project sees x_t = a x0 + s n at a time t of its own. With sigma = s / a, that is x_t = a x for
the x = x0 + sigma n that denoisers see, so one formula per kind of prediction is all it takes. Guidance, solvers and
metrics then work unchanged, and networks of different kinds can guide each other: all of them speak (x, sigma).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch

from edm2kit.conditions import ConditionLike
from edm2kit.denoiser import describe


class Schedule(Protocol):
    """The noise schedule of a network: where on it a noise level lies."""

    def at(self, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(a, s, t) for noise levels [N]: x_t = a x0 + s n with s / a = sigma, at the network's time t."""
        ...

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The lowest and the highest noise level that the network knows; infinity if it has no upper limit."""
        ...


@dataclass(frozen=True)
class Flow:
    """Rectified flow: x_t = (1 - t) x0 + t n, with t from 0 to 1, given to the network times `time_scale`.

    Example: `Flow(time_scale=1000)`, as in Stable Diffusion 3.
    """

    time_scale: float = 1.0

    def at(self, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        t = sigma / (1 + sigma)
        return 1 / (1 + sigma), t, t * self.time_scale

    @property
    def sigma_range(self) -> tuple[float, float]:
        return 0.0, float("inf")


@dataclass(frozen=True)
class VP:
    """Variance-preserving in continuous time: a^2 + s^2 = 1. `time` maps sigma [N] to what the network takes as time.

    Example, the cosine schedule a = cos(pi t / 2): `VP(lambda sigma: sigma.atan() * 2 / torch.pi)`.
    """

    time: Callable[[torch.Tensor], torch.Tensor]

    def at(self, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        a = (1 + sigma.square()).rsqrt()
        return a, sigma * a, self.time(sigma)

    @property
    def sigma_range(self) -> tuple[float, float]:
        return 0.0, float("inf")


@dataclass(frozen=True, eq=False)
class DiscreteVP:
    """Variance-preserving in discrete time: `alphas_cumprod` [T] is a^2 of the steps 0 ... T - 1.

    Between steps, the time is interpolated linearly in log(sigma). Outside of `sigma_range`, the network is given its
    first or last time, and x_t keeps the scale of the noise level asked for. A last step without any signal (a = 0,
    "zero terminal SNR") has no finite noise level; it counts as a^2 = 2^-24, as in diffusers.

    Raises ValueError if the values do not fall from below 1 to at least 0.

    Example: `DiscreteVP((1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0))`.
    """

    alphas_cumprod: torch.Tensor

    def __post_init__(self) -> None:
        values = self.alphas_cumprod
        falls = values.ndim == 1 and len(values) > 1 and bool((values.diff() < 0).all())
        if not falls or not 0 <= float(values[-1]) < float(values[0]) < 1:
            raise ValueError("alphas_cumprod must be a list that falls from below 1 to at least 0, a value per step")

    @cached_property
    def sigmas(self) -> torch.Tensor:
        """Noise level of each step, float64 [T], rising."""
        a2 = self.alphas_cumprod.detach().cpu().double().clamp_min(2.0**-24)
        return ((1 - a2) / a2).sqrt()

    @cached_property
    def _logs(self) -> dict[tuple[torch.device, torch.dtype], torch.Tensor]:
        return {}

    def at(self, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        a = (1 + sigma.square()).rsqrt()
        return a, sigma * a, self.time(sigma)

    def time(self, sigma: torch.Tensor) -> torch.Tensor:
        """The step of each noise level, from 0 to T - 1, not rounded."""
        place = sigma.device, sigma.dtype
        if place not in self._logs:  # copied to a device once: each copy makes the host wait
            self._logs[place] = self.sigmas.log().to(sigma.dtype).to(sigma.device)
        logs, log_sigma = self._logs[place], sigma.log().contiguous()
        above = torch.searchsorted(logs, log_sigma).clamp(1, len(logs) - 1)
        low, high = logs[above - 1], logs[above]
        fraction = ((log_sigma - low) / (high - low)).clamp(0, 1)
        return (above - 1).to(sigma.dtype) + fraction

    @property
    def sigma_range(self) -> tuple[float, float]:
        return float(self.sigmas[0]), float(self.sigmas[-1])


def _from_epsilon(
    output: torch.Tensor, x: torch.Tensor, sigma: torch.Tensor, a: torch.Tensor, s: torch.Tensor
) -> torch.Tensor:
    return x - sigma * output


def _from_v(
    output: torch.Tensor, x: torch.Tensor, sigma: torch.Tensor, a: torch.Tensor, s: torch.Tensor
) -> torch.Tensor:
    # Salimans and Ho 2022: v = a n - s x0
    return a * (a * x) - s * output


def _from_x0(
    output: torch.Tensor, x: torch.Tensor, sigma: torch.Tensor, a: torch.Tensor, s: torch.Tensor
) -> torch.Tensor:
    return output


def _from_flow(
    output: torch.Tensor, x: torch.Tensor, sigma: torch.Tensor, a: torch.Tensor, s: torch.Tensor
) -> torch.Tensor:
    # Lipman et al. 2023, Liu et al. 2023: v = n - x0, the slope of (1 - t) x0 + t n
    return a * x - s * output


# what a network predicts -> D from (its output, x, sigma, a, s)
PREDICTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "epsilon": _from_epsilon,
    "v": _from_v,
    "x0": _from_x0,
    "flow": _from_flow,
}


@dataclass(frozen=True)
class Adapted:
    """A network of another project as a denoiser.

    - `network(x_t, t, condition)` predicts: x_t [N, C, H, W] and t [N] in the dtype of x, as `schedule` scales them.
      It returns [N, C, H, W], or [N, 2C, H, W] if it also learned the variance; that half is dropped.
    - `schedule`: `Flow`, `VP`, `DiscreteVP` or your own `Schedule`.
    - `prediction`: "epsilon" (the noise), "v" (a n - s x0), "x0", or "flow" (the velocity n - x0 of a `Flow`).
    - `label_dim`: number of classes or length of a label, 0 if the network takes none; guidance asks for it.

    Raises ValueError for an unknown prediction, and for "flow" without `Flow` or "v" with it.

    Example, a velocity network guided by a noise-predicting one:

        main = Adapted(lambda x, t, labels: sit(x, t, labels), Flow(), "flow")
        weak = Adapted(lambda x, t, labels: dit(x, t, labels), DiscreteVP(alphas_cumprod), "epsilon")
        images = edm_sampler(Guided(main, weak, 2.0), noise, labels)
    """

    network: Callable[..., torch.Tensor]
    schedule: Schedule
    prediction: str
    label_dim: int = 0

    __repr__ = describe

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction {self.prediction!r} is unknown; available: {', '.join(PREDICTIONS)}")
        is_flow = isinstance(self.schedule, Flow)
        if self.prediction == "flow" and isinstance(self.schedule, VP | DiscreteVP):
            raise ValueError("a flow velocity belongs to the schedule Flow; for a variance-preserving one use 'v'")
        if self.prediction == "v" and is_flow:
            raise ValueError("v = a n - s x0 belongs to a variance-preserving schedule; with Flow use 'flow'")

    def __call__(
        self, x: torch.Tensor, sigma: torch.Tensor | float, condition: ConditionLike = None, /, **edits: Any
    ) -> torch.Tensor:
        """D, in the shape and dtype of x (float32 or float64)."""
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
        a, s, t = self.schedule.at(sigma)
        column = [-1] + [1] * (x.ndim - 1)
        output = self.network(a.reshape(column) * x, t, condition, **edits)
        return to_D(self.prediction, output, x, *(v.reshape(column) for v in (sigma, a, s)))


def to_D(
    prediction: str, output: torch.Tensor, x: torch.Tensor, sigma: torch.Tensor, a: torch.Tensor, s: torch.Tensor
) -> torch.Tensor:
    """D from what a network predicts; a learned variance, the second half of the channels, is dropped.

    Raises ValueError if the output has neither as many channels as x nor twice as many.
    """
    channels = x.shape[1]
    if output.shape[1] == 2 * channels:
        output = output[:, :channels]
    if output.shape != x.shape:
        raise ValueError(
            f"the network returned {list(output.shape)} for x {list(x.shape)}; expected the same shape, or twice as "
            "many channels if it learned the variance"
        )
    return PREDICTIONS[prediction](output.to(x.dtype), x, sigma, a, s)


@dataclass(frozen=True)
class Rescaled:
    """A denoiser for images or latents y, used on x = (y - shift) / scale: how networks of two scales meet.

    If x has the noise level sigma, y has scale * sigma. Raises ValueError if the scale is not positive.

    Example, latents of standard deviation 0.5 for a network that was trained on latents of 1: `Rescaled(net, 2.0)`.
    """

    denoiser: Callable[..., Any]
    scale: float
    shift: float = 0.0

    __repr__ = describe

    def __post_init__(self) -> None:
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"scale is {self.scale:g}; expected a number above 0")

    @property
    def label_dim(self) -> int:
        """That of the denoiser, 0 if it has none."""
        return getattr(self.denoiser, "label_dim", 0)

    def __call__(
        self, x: torch.Tensor, sigma: torch.Tensor | float, condition: ConditionLike = None, /
    ) -> torch.Tensor:
        return (self.denoiser(self.scale * x + self.shift, self.scale * sigma, condition) - self.shift) / self.scale
