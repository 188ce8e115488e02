"""Which raw snapshots of a published run an average is rebuilt from, and how well that can be done."""

from functools import cache

import numpy as np

from edm2kit.ema.power_function import profile_fit, solve_posthoc_coefficients

STORED_STDS = (0.050, 0.100)  # EMA lengths that the runs stored
_GOOD_FIT = 0.005  # relative error of the rebuilt profile; below it, more snapshots change nothing that can be measured
_COARSEST = 16


@cache
def raw_times(nimg: int, ema_std: float, every_nimg: int) -> tuple[int, ...]:
    """Times of the snapshots to take: as few as give a good fit, evenly spaced, up to `nimg`; else all there are.

    Every `every_nimg` images two were stored, of lengths STORED_STDS. For long runs a quarter to half of them do.
    """
    spacings = [every_nimg << k for k in reversed(range(_COARSEST.bit_length()))]
    candidates = [tuple(range(nimg, 0, -spacing))[::-1] for spacing in spacings]
    good = (times for times in candidates if len(times) > 1 and fit_error(times, nimg, ema_std) <= _GOOD_FIT)
    return next(good, candidates[-1])


def fit_error(times: tuple[int, ...], nimg: int, ema_std: float) -> float:
    """L2 distance of the rebuilt profile from the wanted one, relative to the wanted one's norm.

    Karras et al. 2023, Section 3.2; 0 is perfect, and 0.1 changes the length by about a twentieth.
    """
    return fit(times, nimg, ema_std)[0]


@cache
def fit(times: tuple[int, ...], nimg: int, ema_std: float) -> tuple[float, float | None]:
    """The error, and the EMA length that the rebuilt average really has."""
    t, stds = np.repeat(np.array(times, dtype=np.float64), len(STORED_STDS)), np.tile(STORED_STDS, len(times))
    coefficients = solve_posthoc_coefficients(t, stds, [nimg], [ema_std])[:, 0]
    return profile_fit(coefficients, t, stds, nimg, ema_std)
