"""Which raw snapshots of a published run an average is rebuilt from, and how well that can be done."""

import math
from functools import cache

import numpy as np

from training.phema import profile_inner_product, solve_posthoc_coefficients, std_to_exp

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


@cache
def fit_error(times: tuple[int, ...], nimg: int, ema_std: float) -> float:
    """L2 distance of the rebuilt profile from the wanted one, relative to the wanted one's norm.

    Karras et al. 2023, Section 3.2; 0 is perfect, and 0.1 changes the length by about a twentieth.
    """
    t = np.repeat(np.array(times, dtype=np.float64), len(STORED_STDS))
    stds = np.tile(STORED_STDS, len(times))
    c = solve_posthoc_coefficients(t, stds, [nimg], [ema_std])[:, 0]
    exponents, wanted = std_to_exp(stds), std_to_exp(ema_std)
    own = profile_inner_product(nimg, wanted, nimg, wanted)
    cross = c @ profile_inner_product(t, exponents, nimg, wanted)
    ours = c @ profile_inner_product(t[:, None], exponents[:, None], t, exponents) @ c
    return math.sqrt(max(float(ours - 2 * cross + own), 0.0) / float(own))
