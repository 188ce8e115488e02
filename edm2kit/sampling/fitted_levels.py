"""Noise levels of a sampler fitted to the denoiser of an engine (GITS)."""

import dataclasses
from typing import Any

import numpy as np
import torch

from edm2kit.conditions import ConditionLike
from edm2kit.denoiser import Denoiser
from edm2kit.sampling.engine import Engine
from edm2kit.sampling.noise_levels import TEACHER_STEPS, euler_deviations, gits_sigmas, karras_sigmas
from edm2kit.sampling.solvers import Sampler

IMAGES, BATCH = 256, 32  # the published number of images


def with_fitted_levels(engine: Engine, sampler: Sampler) -> Sampler:
    """`sampler` with a list of noise levels that GITS fits to the engine's denoiser, on images of fixed seeds.

    Takes 60 evaluations of 256 images. See `edm2kit.sampling.noise_levels.gits_sigmas`.

    Example: `sampler = with_fitted_levels(engine, Sampler(10, solver="euler", levels="gits"))`
    """
    teacher = karras_sigmas(
        TEACHER_STEPS, sampler.sigma_min, sampler.sigma_max, sampler.rho, sampler.dtype, engine.device
    )
    found = []

    def fit(denoiser: Denoiser, noise: torch.Tensor, condition: ConditionLike, _: Any) -> torch.Tensor:
        found.append(euler_deviations(denoiser, noise, condition, teacher))
        return noise

    fitting = dataclasses.replace(engine, sampler=fit, decode=lambda x: x)
    for first in range(0, IMAGES, BATCH):
        fitting.generate(range(first, first + BATCH))
    sigmas = gits_sigmas(np.mean(found, axis=0), sampler.num_steps, teacher)
    return dataclasses.replace(sampler, levels=tuple(sigmas[:-1].tolist()))
