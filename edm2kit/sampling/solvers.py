"""Solvers: from noise to an image along the probability-flow ODE, or with fresh noise along the way."""

from dataclasses import dataclass, field
from typing import Any

import torch

from edm2kit.denoiser import Denoiser, after_step, for_step
from edm2kit.sampling.churn import NO_CHURN, Churn, RandnLike
from edm2kit.sampling.erk import Stiffness, erk
from edm2kit.sampling.noise_levels import karras_sigmas
from edm2kit.sampling.time_travel import TimeTravel, time_travel


@torch.no_grad()
def heun(
    denoiser: Denoiser,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    labels: torch.Tensor | None = None,
    randn_like: RandnLike = torch.randn_like,
    churn: Churn = NO_CHURN,
) -> torch.Tensor:
    """Second-order steps, Euler to the last; 2N - 1 evaluations for N steps.

    `noise` [N,C,H,W] of unit variance, `sigmas` falling and ending in 0. The state and the result have the dtype
    of `sigmas`. Karras et al. 2022 (EDM), Alg. 1 and, with churn, Alg. 2.
    """
    x = noise.to(sigmas.dtype) * sigmas[0]
    for i in range(len(sigmas) - 1):
        D = for_step(denoiser, i, sigmas)
        x_hat, sigma_hat = churn.raise_noise(x, i, sigmas, randn_like)
        sigma_next = sigmas[i + 1]
        d = (x_hat - D(x_hat, sigma_hat, labels).to(x.dtype)) / sigma_hat
        x = x_hat + (sigma_next - sigma_hat) * d
        if i < len(sigmas) - 2:
            d_next = (x - D(x, sigma_next, labels).to(x.dtype)) / sigma_next
            x = x_hat + (sigma_next - sigma_hat) * (d + d_next) / 2
        x = after_step(D, x, i, sigmas)
    return x


@torch.no_grad()
def euler(
    denoiser: Denoiser,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    labels: torch.Tensor | None = None,
    randn_like: RandnLike = torch.randn_like,
    churn: Churn = NO_CHURN,
) -> torch.Tensor:
    """First-order steps, one evaluation each (deterministic DDIM in these variables); arguments as in `heun`."""
    x = noise.to(sigmas.dtype) * sigmas[0]
    for i in range(len(sigmas) - 1):
        D = for_step(denoiser, i, sigmas)
        x, sigma_hat = churn.raise_noise(x, i, sigmas, randn_like)
        d = (x - D(x, sigma_hat, labels).to(x.dtype)) / sigma_hat
        x = after_step(D, x + (sigmas[i + 1] - sigma_hat) * d, i, sigmas)
    return x


SOLVERS = {"heun": heun, "euler": euler, "erk": erk, "time-travel": time_travel}
# what a solver takes as its last argument, where it has settings of its own
SETTINGS: dict[str, type] = {"erk": Stiffness, "time-travel": TimeTravel}


@dataclass(frozen=True)
class Sampler:
    """A solver with its noise levels: (denoiser, noise, labels, randn_like) -> x0, in `dtype`.

    The defaults are those of the published EDM2 results. `settings` are the solver's own, such as a `TimeTravel`;
    None means its defaults. Raises ValueError on settings that make no schedule or belong to another solver, an
    unknown solver, or a `dtype` below float32. The metadata of a field describes its command-line option.
    """

    num_steps: int = field(default=32, metadata={"option": "--steps", "help": "Number of steps", "min": 1})
    sigma_min: float = field(default=0.002, metadata={"option": "--sigma_min", "help": "Last noise level", "min": 0})
    sigma_max: float = field(default=80.0, metadata={"option": "--sigma_max", "help": "First noise level", "min": 0})
    rho: float = field(
        default=7.0,
        metadata={"option": "--rho", "help": "Exponent of the schedule; higher: smaller last steps", "min": 0},
    )
    churn: Churn = NO_CHURN
    solver: str = field(
        default="heun",
        metadata={"option": "--solver", "metavar": "NAME", "choices": tuple(SOLVERS), "help": ", ".join(SOLVERS)},
    )
    dtype: torch.dtype = torch.float32
    settings: Any = None

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ValueError(f"solver {self.solver!r} is unknown; expected one of {', '.join(SOLVERS)}")
        if self.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"the solver's dtype is {self.dtype}; expected torch.float32 or torch.float64")
        if self.settings is not None and type(self.settings) is not SETTINGS.get(self.solver):
            raise ValueError(f"settings {self.settings} do not belong to the solver {self.solver}")
        self.sigmas()

    def sigmas(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """The noise levels, [num_steps + 1]."""
        return karras_sigmas(self.num_steps, self.sigma_min, self.sigma_max, self.rho, self.dtype, device)

    def __call__(
        self,
        denoiser: Denoiser,
        noise: torch.Tensor,
        labels: torch.Tensor | None = None,
        randn_like: RandnLike = torch.randn_like,
    ) -> torch.Tensor:
        own = () if self.settings is None else (self.settings,)
        return SOLVERS[self.solver](denoiser, noise, self.sigmas(noise.device), labels, randn_like, self.churn, *own)


PUBLISHED = Sampler()


def edm_sampler(
    denoiser: Denoiser,
    noise: torch.Tensor,
    labels: torch.Tensor | None = None,
    *,
    num_steps: int = Sampler.num_steps,
    sigma_min: float = Sampler.sigma_min,
    sigma_max: float = Sampler.sigma_max,
    rho: float = Sampler.rho,
    S_churn: float = Churn.S_churn,
    S_min: float = Churn.S_min,
    S_max: float = Churn.S_max,
    S_noise: float = Churn.S_noise,
    dtype: torch.dtype = Sampler.dtype,
    randn_like: RandnLike = torch.randn_like,
) -> torch.Tensor:
    """The EDM sampler: Heun steps on the Karras schedule.

    `noise` [N,C,H,W] of unit variance; `labels` [N,K] or None, handed to the denoiser as they are. Returns x0 in
    `dtype` (float32 or float64, the solver's own precision). Karras et al. 2022 (EDM), Alg. 2.
    """
    churn = Churn(S_churn=S_churn, S_min=S_min, S_max=S_max, S_noise=S_noise)
    sampler = Sampler(num_steps, sigma_min, sigma_max, rho, churn, dtype=dtype)
    return sampler(denoiser, noise, labels, randn_like)
