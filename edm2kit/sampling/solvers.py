"""Solvers, from noise to an image: Heun, Euler (deterministic DDIM), ERK-Guid and time travel, with optional churn.

A solver is a function `(denoiser, noise, sigmas, condition, randn_like) -> x0`. It knows nothing about networks,
weights or guidance. To add one, write such a function and enter it in SOLVERS. Solvers that remember evaluations of
earlier steps are in multistep.py, restart sampling is in restart.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from edm2kit.conditions import ConditionLike
from edm2kit.denoiser import Denoiser, after_step, for_step, levels_of
from edm2kit.sampling.multistep import deis, dpmpp2m, dpmpp3m, ipndm, unipc
from edm2kit.sampling.noise_levels import (
    AYS,
    LEVELS,
    NO_CHURN,
    TEACHER_STEPS,
    Churn,
    RandnLike,
    ays_sigmas,
    karras_sigmas,
    listed_sigmas,
    parse_levels,
    refuse_churn,
    refuse_negative,
)
from edm2kit.sampling.restart import Restart, restart


@torch.no_grad()
def heun(
    denoiser: Denoiser,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    condition: ConditionLike = None,
    randn_like: RandnLike = torch.randn_like,
    churn: Churn = NO_CHURN,
) -> torch.Tensor:
    """Second-order steps, the last one first-order: 2N - 1 evaluations for N steps.

    `noise` [N,C,H,W] has unit variance; `sigmas` [num_steps + 1] fall and end with 0; `condition` goes to the denoiser
    unchanged. The state and the result have the dtype of `sigmas`. `randn_like` is only called with churn. Karras et
    al. 2022 (EDM), Alg. 1; Alg. 2 with churn.

    Example: `heun(net, torch.randn(4, 3, 64, 64), karras_sigmas(32, 0.002, 80, 7))`.
    """
    x = noise.to(sigmas.dtype) * sigmas[0]
    for i in range(len(sigmas) - 1):
        D = for_step(denoiser, i, sigmas)
        x_hat, sigma_hat = churn.raise_noise(x, i, sigmas, randn_like)
        sigma_next = sigmas[i + 1]
        d = (x_hat - D(x_hat, sigma_hat, condition).to(x.dtype)) / sigma_hat
        x = x_hat + (sigma_next - sigma_hat) * d
        if i < len(sigmas) - 2:
            d_next = (x - D(x, sigma_next, condition).to(x.dtype)) / sigma_next
            x = x_hat + (sigma_next - sigma_hat) * (d + d_next) / 2
        x = after_step(D, x, i, sigmas)
    return x


@torch.no_grad()
def euler(
    denoiser: Denoiser,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    condition: ConditionLike = None,
    randn_like: RandnLike = torch.randn_like,
    churn: Churn = NO_CHURN,
) -> torch.Tensor:
    """First-order steps, one evaluation each; in these variables the same as deterministic DDIM.

    Arguments as in `heun`. Song et al. 2020 (DDIM); Karras et al. 2022 (EDM), App. B.

    Example: `euler(net, torch.randn(4, 3, 64, 64), karras_sigmas(63, 0.002, 80, 7))`.
    """
    x = noise.to(sigmas.dtype) * sigmas[0]
    for i in range(len(sigmas) - 1):
        D = for_step(denoiser, i, sigmas)
        x, sigma_hat = churn.raise_noise(x, i, sigmas, randn_like)
        d = (x - D(x, sigma_hat, condition).to(x.dtype)) / sigma_hat
        x = after_step(D, x + (sigmas[i + 1] - sigma_hat) * d, i, sigmas)
    return x


@dataclass(frozen=True)
class Stiffness:
    """The strength of ERK-Guid's correction (`w_stiff`; 0 is Heun) and the stiffness from which on it acts (`w_con`).

    The defaults are for 32 steps; `Stiffness.published` has those of fewer. Raises ValueError on a negative setting.
    """

    w_stiff: float = 2.0
    w_con: float = 0.5

    def __post_init__(self) -> None:
        refuse_negative(self)

    @classmethod
    def published(cls, num_steps: int) -> "Stiffness":
        """The values for EDM2-S at 512x512 with 8, 16 or 32 steps, the nearest; `w_stiff` 0.5 to 2.5 for 32."""
        if num_steps**2 < 8 * 16:
            return cls(0.5, 0.1)
        return cls(0.75, 0.3) if num_steps**2 < 16 * 32 else cls()

    def correction(
        self, x: torch.Tensor, d: torch.Tensor, x_before: torch.Tensor, d_before: torch.Tensor, h: torch.Tensor
    ) -> torch.Tensor:
        """-h (w_stiff h rho)^2 <d, v> v where rho > w_con, else 0; see `erk`."""
        rho, v = stiffness_of(x, d, x_before, d_before)
        along = (d * v).sum(dim=tuple(range(1, d.ndim)), keepdim=True)
        return torch.where(rho > self.w_con, -h * (self.w_stiff * h * rho) ** 2 * along * v, 0.0)


def stiffness_of(
    x: torch.Tensor, d: torch.Tensor, x_before: torch.Tensor, d_before: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """How fast the slope changes between two points at the same noise level, and in which direction.

    Points and slopes are [N,C,H,W]. Returns |d - d'| / |x - x'| per image, [N,1,1,1], and the unit vector along
    d - d'; both are 0 if nothing changes.
    """
    pixels = tuple(range(1, x.ndim))
    change = d - d_before
    length = torch.linalg.vector_norm(change, dim=pixels, keepdim=True)
    distance = torch.linalg.vector_norm(x - x_before, dim=pixels, keepdim=True)
    known = (length > 0) & (distance > 0)
    return torch.where(known, length / distance, 0.0), torch.where(known, change / length, 0.0)


@torch.no_grad()
def erk(
    denoiser: Denoiser,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    condition: ConditionLike = None,
    randn_like: RandnLike = torch.randn_like,
    churn: Churn = NO_CHURN,
    stiffness: Stiffness | None = None,
) -> torch.Tensor:
    """ERK-Guid: Heun steps corrected along the direction in which the slope changes most; 2N - 1 evaluations.

    Each step is followed by a move of -h z^2 <d, v> v. Two points at the same noise level, the Euler prediction of the
    last step and its result, give the direction v in which their slopes differ and the rate rho of the difference; h
    is the width of the step and z = w_stiff h rho. There is no correction for images with rho up to `w_con`, in the
    first and the last step, and after churn (the two points then have different noise levels). Without `stiffness`,
    the published one for this number of steps. Other arguments as in `heun`. See docs/guidance.md.
    """
    stiffness = Stiffness.published(len(sigmas) - 1) if stiffness is None else stiffness
    x = noise.to(sigmas.dtype) * sigmas[0]
    euler_point = None  # (x, d) at the Euler prediction of the last step
    for i in range(len(sigmas) - 1):
        D = for_step(denoiser, i, sigmas)
        x_hat, sigma_hat = churn.raise_noise(x, i, sigmas, randn_like)
        sigma_next = sigmas[i + 1]
        d = (x_hat - D(x_hat, sigma_hat, condition).to(x.dtype)) / sigma_hat
        x = x_hat + (sigma_next - sigma_hat) * d
        if i < len(sigmas) - 2:
            d_next = (x - D(x, sigma_next, condition).to(x.dtype)) / sigma_next
            predicted = (x, d_next)
            x = x_hat + (sigma_next - sigma_hat) * (d + d_next) / 2
            if euler_point is not None and not churn.raises_noise(i, sigmas):
                x = x + stiffness.correction(x_hat, d, *euler_point, sigma_hat - sigma_next)
            euler_point = predicted
        x = after_step(D, x, i, sigmas)
    return x


@dataclass(frozen=True)
class TimeTravel:
    """How many times to take the steps from noise levels in (`sigma_lo`, `sigma_hi`]; all others are taken once.

    The defaults are those of FreeDoM on ImageNet (Yu et al. 2023: t from 500 to 800). Raises ValueError if `times` is
    below 1 or the levels are in the wrong order.
    """

    times: int = field(
        default=10, metadata={"option": "--travel-times", "help": "How often to take a step", "min": 1, "hidden": True}
    )
    sigma_lo: float = 3.4
    sigma_hi: float = 26.0

    def __post_init__(self) -> None:
        if self.times < 1:
            raise ValueError(f"time travel takes a step {self.times} times; expected at least 1")
        if not 0 <= self.sigma_lo <= self.sigma_hi:
            raise ValueError(f"time travel in ({self.sigma_lo:g}, {self.sigma_hi:g}]; expected 0 <= lo <= hi")

    def times_at(self, sigma: float) -> int:
        """How many times to take the step that starts at `sigma`."""
        return self.times if self.sigma_lo < sigma <= self.sigma_hi else 1


FREEDOM = TimeTravel()


@torch.no_grad()
def time_travel(
    denoiser: Denoiser,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    condition: ConditionLike = None,
    randn_like: RandnLike = torch.randn_like,
    churn: Churn = NO_CHURN,
    travel: TimeTravel = FREEDOM,
) -> torch.Tensor:
    """Euler steps, some of them repeated: fresh noise leads back from sigma_next to sigma, then the step is retaken.

    Also called recurrence or resampling. Each repetition costs one evaluation and is a step of its own to the denoiser.
    With an exact denoiser the way back leaves the distribution of x unchanged. Other arguments as in `heun`. Lugmayr et
    al. 2022 (RePaint), Sec. 4.2; Yu et al. 2023 (FreeDoM), Alg. 2.
    """
    x = noise.to(sigmas.dtype) * sigmas[0]
    for i in range(len(sigmas) - 1):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        for repetitions_left in reversed(range(travel.times_at(levels_of(sigmas)[i]))):
            D = for_step(denoiser, i, sigmas)
            x, sigma_hat = churn.raise_noise(x, i, sigmas, randn_like)
            d = (x - D(x, sigma_hat, condition).to(x.dtype)) / sigma_hat
            x = after_step(D, x + (sigma_next - sigma_hat) * d, i, sigmas)
            if repetitions_left:
                x = x + (sigma**2 - sigma_next**2).sqrt() * randn_like(x)
    return x


SOLVERS: dict[str, Callable[..., torch.Tensor]] = {
    "heun": heun,
    "euler": euler,
    "erk": erk,
    "time-travel": time_travel,
    "dpmpp2m": dpmpp2m,
    "dpmpp3m": dpmpp3m,
    "unipc": unipc,
    "deis": deis,
    "ipndm": ipndm,
    "restart": restart,
}
# solvers whose evaluations must not be taken apart by churn
WITHOUT_CHURN = ("dpmpp2m", "dpmpp3m", "unipc", "deis", "ipndm", "restart")
# the settings of a solver's own, which it takes as its last argument
SETTINGS: dict[str, type] = {"erk": Stiffness, "time-travel": TimeTravel, "restart": Restart}


@dataclass(frozen=True)
class Sampler:
    """A solver with its noise levels: a callable (denoiser, noise, condition, randn_like) -> x0, in `dtype`.

    The defaults are those of the published EDM2 results. `settings` are those of the solver itself, such as a
    `TimeTravel`; None means its defaults. `levels` is one of LEVELS or a list of num_steps noise levels. Raises
    ValueError on an unknown solver, settings of another solver, churn with a solver that cannot take it, noise levels
    that do not fall, or a `dtype` other than float32 and float64. The metadata of a field describes its command-line
    option.

    Example: `images = Sampler(num_steps=18, solver="euler")(denoiser, noise, labels)`
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
        metadata={"option": "--solver", "metavar": "NAME", "choices": tuple(SOLVERS), "help": "See --help-solver list"},
    )
    dtype: torch.dtype = torch.float32
    settings: Any = None
    levels: str | tuple[float, ...] = field(
        default="karras",
        metadata={
            "option": "--levels",
            "metavar": "NAME|LIST",
            "parse": parse_levels,
            "help": "List, or a name: --help-solver levels",
        },
    )

    def __repr__(self) -> str:
        parts = [self.solver, f"{self.num_steps} steps", f"sigma {self.sigma_max:g} to {self.sigma_min:g}"]
        if self.levels != "karras":
            parts.append(f"levels {self.levels}")
        if self.rho != 7:
            parts.append(f"rho {self.rho:g}")
        if self.dtype != torch.float32:
            parts.append(str(self.dtype).removeprefix("torch."))
        extras = [repr(one) for one in (self.churn, self.settings) if one not in (NO_CHURN, None)]
        return f"Sampler({', '.join([*parts, *extras])})"

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ValueError(f"solver {self.solver!r} is unknown; expected one of {', '.join(SOLVERS)}")
        if self.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"the solver's dtype is {self.dtype}; expected torch.float32 or torch.float64")
        if self.settings is not None and type(self.settings) is not SETTINGS.get(self.solver):
            raise ValueError(f"settings {self.settings} do not belong to the solver {self.solver}")
        if self.solver in WITHOUT_CHURN:
            refuse_churn(self.solver, self.churn)
        if isinstance(self.levels, str) and self.levels not in LEVELS:
            raise ValueError(f"noise levels {self.levels!r} are unknown; expected one of {', '.join(LEVELS)}")
        if not isinstance(self.levels, str) and len(self.levels) != self.num_steps:
            raise ValueError(f"{len(self.levels)} noise levels for {self.num_steps} steps; expected one for each step")
        if self.levels not in ("gits", "own"):
            self.sigmas()
        elif self.levels == "gits" and not 2 <= self.num_steps <= TEACHER_STEPS:
            raise ValueError(f"steps is {self.num_steps}; the noise levels of GITS take 2 to {TEACHER_STEPS} steps")

    def sigmas(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """The noise levels, [num_steps + 1].

        Raises ValueError for "gits", which depends on the denoiser, and "own", which depends on its scheduler.
        """
        if not isinstance(self.levels, str):
            return listed_sigmas(self.levels, self.dtype, device)
        if self.levels == "gits":
            raise ValueError("the noise levels of GITS depend on the denoiser; see gits_sigmas")
        if self.levels == "own":
            raise ValueError("a model's own noise levels depend on its scheduler; see diffusers_pipeline.own_levels")
        if self.levels in AYS:
            return ays_sigmas(self.levels, self.num_steps, self.sigma_min, self.sigma_max, self.dtype, device)
        return karras_sigmas(self.num_steps, self.sigma_min, self.sigma_max, self.rho, self.dtype, device)

    def __call__(
        self,
        denoiser: Denoiser,
        noise: torch.Tensor,
        condition: ConditionLike = None,
        randn_like: RandnLike = torch.randn_like,
    ) -> torch.Tensor:
        """Turn `noise` [N,C,H,W] of unit variance into x0, of the same shape."""
        own = () if self.settings is None else (self.settings,)
        sigmas = self.sigmas(noise.device)
        return SOLVERS[self.solver](denoiser, noise, sigmas, condition, randn_like, self.churn, *own)

    def evaluations(self) -> int:
        """How often a denoiser is called for one image; a guided one may evaluate several networks in each call.

        Raises ValueError as `sigmas` does.
        """
        calls = 0

        def counting(x: torch.Tensor, sigma: torch.Tensor, condition: Any = None, /) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return torch.zeros_like(x)

        self(counting, torch.zeros(1, 1, 1, 1))
        return calls


PUBLISHED = Sampler()


def edm_sampler(
    denoiser: Denoiser,
    noise: torch.Tensor,
    labels: ConditionLike = None,
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
    """The EDM sampler: Heun steps at the noise levels of Karras et al., with EDM2's names for all settings.

    `noise` [N,C,H,W] has unit variance; `labels`, [N,K] or another condition, go to the denoiser unchanged. Returns x0
    in `dtype` (float32 or float64, the precision of the solver). Karras et al. 2022 (EDM), Alg. 2.

    Example: `edm_sampler(Guided(main, guide, 2.0), torch.randn(4, 3, 64, 64), labels, num_steps=32)`
    """
    churn = Churn(S_churn=S_churn, S_min=S_min, S_max=S_max, S_noise=S_noise)
    sampler = Sampler(num_steps, sigma_min, sigma_max, rho, churn, dtype=dtype)
    return sampler(denoiser, noise, labels, randn_like)
