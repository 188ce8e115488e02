"""Power-function EMA and its post-hoc reconstruction (Karras et al. 2023, Section 3 and Appendix C)."""

import copy
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

MAX_STD = 12**-0.5  # the relative std of a plain average, gamma = 0


def exp_to_std(exp: np.ndarray | float) -> np.ndarray:
    """Relative standard deviation of the profile with exponent gamma. Eq. 123."""
    exp = np.asarray(exp, dtype=np.float64)
    return np.sqrt((exp + 1) / ((exp + 2) ** 2 * (exp + 3)))


def std_to_exp(std: np.ndarray | float) -> np.ndarray:
    """Exponent gamma of the profile with relative standard deviation `std`, in (0, 0.2886]. Eq. 126.

    Raises ValueError outside that range: no profile is wider than a plain average.
    """
    std = np.asarray(std, dtype=np.float64)
    if not np.all((std > 0) & (std <= MAX_STD)):
        raise ValueError(f"an EMA length (relative std) lies above 0 and at most {MAX_STD:.4f}; got {std.tolist()}")
    inv_square = std.flatten() ** -2
    roots = [np.roots([1, 7, 16 - v, 12 - v]) for v in inv_square]
    return np.array([r.real[np.abs(r.imag) < 1e-6].max() for r in roots]).reshape(std.shape)


def power_function_beta(std: float, t_next: float, t_delta: float) -> float:
    """Weight that the old average keeps in the update which ends at time `t_next`. Eq. 127.

    Times count images: `t_next` includes the update's own `t_delta`.
    """
    return float((1 - t_delta / t_next) ** (std_to_exp(std) + 1))


def profile_inner_product(t_a: np.ndarray, exp_a: np.ndarray, t_b: np.ndarray, exp_b: np.ndarray) -> np.ndarray:
    """Inner product of profiles that end at times t_a, t_b; arrays broadcast. Eq. 151."""
    ratio = t_a / t_b
    power = np.where(t_a < t_b, exp_b, -exp_a)
    return (exp_a + 1) * (exp_b + 1) * ratio**power / ((exp_a + exp_b + 1) * np.maximum(t_a, t_b))


def solve_posthoc_coefficients(
    in_ofs: Sequence[float], in_std: Sequence[float], out_ofs: float | Sequence[float], out_std: Sequence[float]
) -> np.ndarray:
    """Weights that turn stored EMA snapshots into EMAs of other lengths. Algorithm 3.

    `in_ofs`, `in_std` [n]: time (images) and relative std of each snapshot; `out_ofs`, `out_std` [m]: the targets
    (a scalar time serves all). Returns float64 [n, m]; each column sums to 1. Least squares in float64.
    Snapshots later than a target get weight 0 there. Raises ValueError where a target has no snapshot.
    """
    in_t, in_exp = np.asarray(in_ofs, dtype=np.float64), std_to_exp(np.asarray(in_std))
    out_exp = std_to_exp(np.atleast_1d(np.asarray(out_std)))
    out_t = np.broadcast_to(np.asarray(out_ofs, dtype=np.float64), out_exp.shape)
    if in_t.shape != in_exp.shape or in_t.ndim != 1:
        raise ValueError(f"in_ofs {in_t.shape} and in_std {in_exp.shape} must be equally long lists")
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
    """How near the sum of profiles that `coefficients` make comes to the wanted one.

    The L2 distance of the two, relative to the wanted one's norm; and the sum's own relative std, None where it
    oscillates too much to have one. Karras et al. 2023, Section 3.2. All inputs [N].
    """
    exp, out_exp = std_to_exp(in_std), std_to_exp(out_std)
    own = float(profile_inner_product(out_ofs, out_exp, out_ofs, out_exp))
    cross = profile_inner_product(in_ofs, exp, out_ofs, out_exp)
    square = coefficients @ profile_inner_product(in_ofs[:, None], exp[:, None], in_ofs, exp) @ coefficients
    distance = float(square - 2 * coefficients @ cross) + own
    # moments of the profile t^gamma on [0, t]
    mean = coefficients @ (in_ofs * (exp + 1) / (exp + 2))
    variance = coefficients @ (in_ofs**2 * (exp + 1) / (exp + 3)) - mean**2
    return math.sqrt(max(distance, 0.0) / own), math.sqrt(variance) / out_ofs if variance > 0 else None


class PowerFunctionEMA:
    """Running power-function averages of a network's weights, one per relative std. Eq. 127.

    Buffers are copied, not averaged. `averages` holds a frozen copy of the network for each of `stds`.
    """

    def __init__(self, net: nn.Module, stds: Sequence[float] = (0.050, 0.100)):
        self.net, self.stds = net, tuple(stds)
        self.averages = [copy.deepcopy(net).eval().requires_grad_(False) for _ in self.stds]
        std_to_exp(np.array(self.stds))  # refuse impossible lengths at once, not after hours

    @torch.no_grad()
    def update(self, nimg: int, batch_size: int) -> None:
        """Take in the current weights: `nimg` images seen including the last `batch_size` since the last update."""
        weights = list(self.net.parameters())
        for std, average in zip(self.stds, self.averages, strict=True):
            beta = power_function_beta(std, t_next=nimg, t_delta=batch_size)
            torch._foreach_lerp_(list(average.parameters()), weights, 1 - beta)
            for target, source in zip(average.buffers(), self.net.buffers(), strict=True):
                target.copy_(source)

    def weights(self, number: int) -> dict[str, torch.Tensor]:
        """The state dict of average `number`."""
        return self.averages[number].state_dict()

    def network(self, number: int) -> nn.Module:
        """Average `number` as a network to call."""
        return self.averages[number]

    def state_dict(self) -> dict[str, dict[str, torch.Tensor]]:
        """Every average's state dict, keyed by its std."""
        return {f"{std:.3f}": self.weights(number) for number, std in enumerate(self.stds)}

    def load_state_dict(self, state: dict[str, dict[str, torch.Tensor]]) -> None:
        """Take averages up where `state_dict` left them; raises ValueError where the lengths differ."""
        names = [f"{std:.3f}" for std in self.stds]
        if sorted(state) != sorted(names):
            raise ValueError(f"the checkpoint holds EMA lengths {sorted(state)}; this run keeps {names}")
        for name, average in zip(names, self.averages, strict=True):
            average.load_state_dict(state[name])
