"""The guidance methods that the toy compares, and sampling with them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from edm2kit.denoiser import Denoiser, for_images
from edm2kit.experiments.toy.mixture import Mixture
from edm2kit.experiments.toy.model import ScoreDenoiser, fast_score
from edm2kit.experiments.toy.training import RECIPES, load_network
from edm2kit.experiments.toy.tree import components
from edm2kit.guidance.registry import Choice, Parts, guide
from edm2kit.sampling.solvers import edm_sampler
from edm2kit.torch_utils.rng import StackedGenerator, derive_seed

SIGMA_MAX = 5.0
NUM_STEPS = 32


@dataclass(frozen=True)
class Nets:
    """The denoisers of one training seed, named as in RECIPES; of class A, of class A, and of both classes."""

    main: Denoiser
    guide: Denoiser
    both: Denoiser


def load_nets(outdir: Path, seed: int, compiled: bool = False) -> Nets:
    """The three trained networks, sped up by torch.compile if `compiled`. Raises ValueError if one is missing."""
    return Nets(**{role: ScoreDenoiser(fast_score(load_network(outdir, role, seed), compiled)) for role in RECIPES})


@dataclass(frozen=True)
class ToyMethod:
    """One curve of the comparison: `choice` is a method of edm2kit.guidance, `parts` selects its networks.

    `weights` are those measured, without 1, which is no guidance; `figure_weight` is the one in the paper's figure, if
    any.
    """

    title: str
    choice: Choice
    parts: Callable[[Nets], Parts]
    weights: tuple[float, ...]
    figure_weight: float | None = None

    def denoiser(self, nets: Nets, weight: float) -> Denoiser:
        """The guided denoiser of one training seed."""
        return guide(replace(self.choice, weight=weight), self.parts(nets))


def _autoguidance_parts(nets: Nets) -> Parts:
    return Parts(nets.main, nets.guide)


def _cfg_parts(nets: Nets) -> Parts:
    return Parts(nets.main, nets.both)


def _all_parts(nets: Nets) -> Parts:
    return Parts(nets.main, nets.guide, uncond=nets.both)


def _main_alone(nets: Nets) -> Parts:
    return Parts(nets.main)


_WEIGHTS, _FEW_WEIGHTS = (1.25, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0), (1.5, 2.0, 3.0, 4.0)
_TRUNCATION_WEIGHTS = (1.02, 1.05, 1.1, 1.2, 1.4)
_INTERVAL = (0.0, 0.3)  # the later half of the steps, when each sample is on its branch or next to it
_NOISE = {"input_noise_delta": 0.2}

# the settings of the published record; EDM2's norm means nothing in two dimensions
_APG = {"apg_norm": 15.0, "apg_momentum": -0.5, "apg_update": "step"}

# Methods that need attention, labels or the statistics of an image cannot act on the toy's networks.
TOY_METHODS = {
    "autoguidance": ToyMethod("Autoguidance", Choice("autoguidance"), _autoguidance_parts, _WEIGHTS, 3.0),
    "cfg": ToyMethod("Classifier-free guidance", Choice("cfg"), _cfg_parts, _WEIGHTS, 4.0),
    "mixed": ToyMethod("CFG and autoguidance, half each", Choice("cfg-plus-autoguidance"), _all_parts, _FEW_WEIGHTS),
    "cfg-apg": ToyMethod("CFG, projected (APG)", Choice("cfg", options=_APG, rule="apg"), _cfg_parts, _FEW_WEIGHTS),
    "cfg-interval": ToyMethod("CFG at low noise", Choice("cfg", interval=_INTERVAL), _cfg_parts, _FEW_WEIGHTS),
    "auto-interval": ToyMethod(
        "Autoguidance at low noise", Choice("autoguidance", interval=_INTERVAL), _autoguidance_parts, _FEW_WEIGHTS
    ),
    "input-noise": ToyMethod(
        "Away from noisier input", Choice("input-noise", options=_NOISE), _main_alone, _FEW_WEIGHTS
    ),
    "truncation": ToyMethod("Naive truncation", Choice("truncation"), _main_alone, _TRUNCATION_WEIGHTS, 1.4),
}


def start(num: int, seed: int) -> torch.Tensor:
    """Starting points of `num` trajectories: exact samples of class A at sigma 5, divided by 5, float32 [num,2,1,1]."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "toy start"))
    x = Mixture(components("A")).sample(num, generator, sigma=SIGMA_MAX)
    return (x / SIGMA_MAX)[:, :, None, None]


def sample(denoiser: Denoiser, noise: torch.Tensor) -> torch.Tensor:
    """Samples [N,2] from the starting points `noise` (see `start`): 32 Heun steps from sigma 5 to 0.002, then to 0.

    Random methods use one generator per point, seeded with the index of the point.
    """
    follower = for_images(denoiser, StackedGenerator("cpu", range(len(noise))))
    return edm_sampler(follower, noise, num_steps=NUM_STEPS, sigma_min=0.002, sigma_max=SIGMA_MAX, rho=7).flatten(1)
