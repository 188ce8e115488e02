"""Noise levels at which a solver evaluates the denoiser."""

import math

import torch


def karras_sigmas(
    num_steps: int,
    sigma_min: float,
    sigma_max: float,
    rho: float,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Noise levels that fall from `sigma_max` to `sigma_min`, evenly spaced in sigma^(1/rho), followed by 0.

    Returns [num_steps + 1], computed in float64 and rounded to `dtype`; a single step goes from `sigma_max` to 0.
    Raises ValueError if the levels would not fall. Karras et al. 2022 (EDM), Eq. 5.

    Example: `karras_sigmas(32, 0.002, 80, 7)`
    """
    if num_steps < 1:
        raise ValueError(f"steps is {num_steps}; expected at least 1")
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"sigma_min is {sigma_min:g} and sigma_max {sigma_max:g}; expected 0 < sigma_min < sigma_max")
    if not 0 < rho < math.inf:
        raise ValueError(f"rho is {rho:g}; expected a number above 0")
    # on the CPU, because some accelerators have no float64
    fraction = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    sigmas = (first + fraction * (last - first)) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)]).to(dtype).to(device)
