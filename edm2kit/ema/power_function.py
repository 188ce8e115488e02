"""Power-function EMA: its profiles, which are pure mathematics, and running averages of any PyTorch module.

The profile with exponent gamma that ends at time t weighs the weights of time s <= t by (gamma + 1) s^gamma /
t^(gamma + 1). Its relative standard deviation ("length") is its standard deviation divided by t. Times count training
images.
"""

import copy
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import nn

MAX_STD = 12**-0.5  # 0.2886...: the relative standard deviation of a plain average, gamma = 0


def exp_to_std(exp: ArrayLike) -> np.ndarray:
    """Relative standard deviation of the profile with exponent gamma. Karras et al. 2023, Eq. 123.

    Example: `exp_to_std(6.94)` is 0.10.
    """
    exp = np.asarray(exp, dtype=np.float64)
    return np.sqrt((exp + 1) / ((exp + 2) ** 2 * (exp + 3)))


def std_to_exp(std: ArrayLike) -> np.ndarray:
    """Exponent gamma of the profile with relative standard deviation `std`, in (0, 0.2886].

    Raises ValueError outside that range: no profile is wider than a plain average. Karras et al. 2023, Eq. 126.

    Example: `std_to_exp(0.10)` is 6.94.
    """
    std = np.asarray(std, dtype=np.float64)
    if not np.all((std > 0) & (std <= MAX_STD)):
        raise ValueError(
            f"an EMA length (relative standard deviation) must be above 0 and at most 0.2886; got {std.tolist()}"
        )
    exponents = []
    for inverse_square in std.flatten() ** -2:
        roots = np.roots([1, 7, 16 - inverse_square, 12 - inverse_square])
        exponents.append(roots.real[np.abs(roots.imag) < 1e-6].max())
    return np.array(exponents).reshape(std.shape)


def power_function_beta(std: float, t_next: float, t_delta: float) -> float:
    """Weight of the old average in the update that ends at time `t_next`. Karras et al. 2023, Eq. 127.

    Times count images; `t_next` includes the `t_delta` images of the update itself. Raises ValueError if the length
    `std` is out of range.

    Example: `power_function_beta(0.10, t_next=4096, t_delta=2048)` is 0.004.
    """
    return float((1 - t_delta / t_next) ** (std_to_exp(std) + 1))


def profile_inner_product(t_a: ArrayLike, exp_a: ArrayLike, t_b: ArrayLike, exp_b: ArrayLike) -> np.ndarray:
    """Inner products of profiles that end at times `t_a`, `t_b`; arrays broadcast. Eq. 151."""
    t_a, exp_a, t_b, exp_b = (np.asarray(value, dtype=np.float64) for value in (t_a, exp_a, t_b, exp_b))
    ratio = t_a / t_b
    power = np.where(t_a < t_b, exp_b, -exp_a)
    return (exp_a + 1) * (exp_b + 1) * ratio**power / ((exp_a + exp_b + 1) * np.maximum(t_a, t_b))


def solve_posthoc_coefficients(
    in_ofs: ArrayLike, in_std: ArrayLike, out_ofs: ArrayLike, out_std: ArrayLike
) -> np.ndarray:
    """Weights that turn stored EMA snapshots into EMAs of other lengths. Karras et al. 2023, Algorithm 3.

    `in_ofs`, `in_std` [n]: time and length of each snapshot. `out_ofs`, `out_std` [m]: time and length of each target;
    a scalar time applies to all. Returns float64 [n, m]; each column sums to 1. The least-squares solution is computed
    in float64. Snapshots later than a target have weight 0 in it. Raises ValueError if a target has no snapshot.

    Example: `solve_posthoc_coefficients([1e6, 2e6], [0.05, 0.10], 2e6, [0.07])` has shape [2, 1].
    """
    in_t, in_exp = np.asarray(in_ofs, dtype=np.float64), std_to_exp(in_std)
    out_exp = std_to_exp(np.atleast_1d(np.asarray(out_std, dtype=np.float64)))
    out_t = np.broadcast_to(np.asarray(out_ofs, dtype=np.float64), out_exp.shape)
    if in_t.shape != in_exp.shape or in_t.ndim != 1:
        raise ValueError(f"in_ofs {in_t.shape} and in_std {in_exp.shape} must be lists of equal length")
    coefficients = np.zeros((len(in_t), len(out_t)))
    for target in np.unique(out_t):
        rows, columns = np.flatnonzero(in_t <= target), np.flatnonzero(out_t == target)
        if len(rows) == 0:
            raise ValueError(f"no snapshot at or before {target:.0f} images")
        t, exp = in_t[rows, None], in_exp[rows, None]
        A = profile_inner_product(t, exp, t.T, exp.T)
        B = profile_inner_product(t, exp, out_t[None, columns], out_exp[None, columns])
        X = np.linalg.solve(A, B)
        coefficients[np.ix_(rows, columns)] = X / X.sum(axis=0)
    return coefficients


def profile_fit(
    coefficients: np.ndarray, in_ofs: np.ndarray, in_std: np.ndarray, out_ofs: float, out_std: float
) -> tuple[float, float | None]:
    """How closely the sum of profiles with these `coefficients` fits the target profile.

    Returns the L2 distance between the two, relative to the target's norm, and the relative standard deviation of the
    sum, None if the sum oscillates too much to have one. All inputs [n]. Karras et al. 2023, Section 3.2.
    """
    exp, out_exp = std_to_exp(in_std), std_to_exp(out_std)
    own = float(profile_inner_product(out_ofs, out_exp, out_ofs, out_exp))
    cross = profile_inner_product(in_ofs, exp, out_ofs, out_exp)
    square = coefficients @ profile_inner_product(in_ofs[:, None], exp[:, None], in_ofs, exp) @ coefficients
    distance = float(square - 2 * coefficients @ cross) + own
    # moments of the profile t^gamma on [0, t]
    mean = coefficients @ (in_ofs * (exp + 1) / (exp + 2))
    variance = coefficients @ (in_ofs**2 * (exp + 1) / (exp + 3)) - mean**2
    std = math.sqrt(variance) / out_ofs if variance > 0 else None
    return math.sqrt(max(distance, 0.0) / own), std


class PowerFunctionEMA:
    """Running power-function averages of a module's parameters, one per relative standard deviation.

    `averages` holds a frozen copy of the module for each of `stds`. Buffers are copied, not averaged. Raises
    ValueError if a length is out of range. Karras et al. 2023, Eq. 127.

    Example:

        ema = PowerFunctionEMA(net, stds=(0.05, 0.10))
        for nimg in range(batch_size, duration + 1, batch_size):
            train_step(net)
            ema.update(nimg, batch_size)
        net_for_sampling = ema.network(1)
    """

    def __init__(self, net: nn.Module, stds: Sequence[float] = (0.050, 0.100)):
        std_to_exp(stds)  # refuses impossible lengths now, not at the first update
        self.net, self.stds = net, tuple(stds)
        self.averages = [copy.deepcopy(net).eval().requires_grad_(False) for _ in self.stds]

    def __repr__(self) -> str:
        net = repr(self.net).partition("\n")[0]
        return f"PowerFunctionEMA: lengths {', '.join(f'{std:g}' for std in self.stds)}\n  net: {net}"

    @torch.no_grad()
    def update(self, nimg: int, batch_size: int) -> None:
        """Add the current parameters: `nimg` images seen so far, `batch_size` of them since the last update."""
        parameters: list[torch.Tensor] = list(self.net.parameters())
        for std, average in zip(self.stds, self.averages, strict=True):
            beta = power_function_beta(std, t_next=nimg, t_delta=batch_size)
            averaged: list[torch.Tensor] = list(average.parameters())
            torch._foreach_lerp_(averaged, parameters, 1 - beta)
            for target, source in zip(average.buffers(), self.net.buffers(), strict=True):
                target.copy_(source)

    def weights(self, number: int) -> dict[str, torch.Tensor]:
        """The state dict of average `number`."""
        return self.averages[number].state_dict()

    def network(self, number: int) -> nn.Module:
        """Average `number` as a module to call."""
        return self.averages[number]

    def state_dict(self) -> dict[str, dict[str, torch.Tensor]]:
        """The state dict of every average, by its length in three decimals."""
        return {f"{std:.3f}": self.weights(number) for number, std in enumerate(self.stds)}

    def load_state_dict(self, state: dict[str, dict[str, torch.Tensor]]) -> None:
        """Restore the averages that `state_dict` returned; raises ValueError if the lengths differ."""
        names = [f"{std:.3f}" for std in self.stds]
        if sorted(state) != sorted(names):
            raise ValueError(f"the checkpoint holds EMA lengths {sorted(state)}; this run tracks {names}")
        for name, average in zip(names, self.averages, strict=True):
            average.load_state_dict(state[name])
