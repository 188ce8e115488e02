"""Measures of a set of samples against the exact distribution of class A."""

import math
from dataclasses import dataclass

import torch

from edm2kit.experiments.toy.mixture import Mixture
from edm2kit.torch_utils.rng import derive_seed

_LEVEL_SAMPLES = 1 << 16
_PROJECTIONS = 128

# name -> (heading, decimals), in the order of the tables
MEASURES = {
    "outside": ("Outside the 99% level", 3),
    "mean_log_density": ("Mean log-density", 2),
    "lost_mass": ("Lost branch mass", 3),
    "branches_held": ("Branches held", 3),
    "sliced_wasserstein": ("Sliced Wasserstein", 3),
}


@dataclass(frozen=True)
class Yardstick:
    """The exact distribution, with what is sampled from it once.

    `level` is the log-density that 99% of the distribution exceeds; `reference` are exact samples [N,2], as many as
    in the sets that are measured.
    """

    truth: Mixture
    level: float
    reference: torch.Tensor

    @classmethod
    def of(cls, truth: Mixture, num: int, seed: int) -> "Yardstick":
        """The yardstick for sets of `num` samples; `seed` decides the exact samples."""
        generator = torch.Generator().manual_seed(derive_seed(seed, "toy yardstick"))
        level = truth.logp(truth.sample(_LEVEL_SAMPLES, generator)).quantile(0.01).item()
        return cls(truth, level, truth.sample(num, generator))

    def measure(self, x: torch.Tensor) -> dict[str, float]:
        """The MEASURES of the samples `x` [N,2].

        - outside: share of the samples whose exact density is below the 99% level.
        - mean_log_density: their mean exact log-density (nats), which is minus the cross-entropy.
        - lost_mass: true mass of the branches that got less than half of their share.
        - branches_held: share of the branches that got half of their true mass or more.
        - sliced_wasserstein: distance to exact samples, 2-Wasserstein over 128 directions.
        """
        logp = self.truth.logp(x)
        mass = torch.from_numpy(self.truth.parts.branch_mass)
        got = torch.bincount(self.truth.branch_of(x), minlength=len(mass)) / len(x)
        held = got >= mass / 2
        return {
            "outside": (logp < self.level).float().mean().item(),
            "mean_log_density": logp.mean().item(),
            "lost_mass": mass[~held].sum().item(),
            "branches_held": held.float().mean().item(),
            "sliced_wasserstein": sliced_wasserstein(x, self.reference),
        }


def sliced_wasserstein(a: torch.Tensor, b: torch.Tensor) -> float:
    """Sliced 2-Wasserstein distance of two equally large sets of points [N,2]: root mean square over directions."""
    if a.shape != b.shape:
        raise ValueError(f"the sets have shapes {list(a.shape)} and {list(b.shape)}; expected equally many points")
    angle = torch.arange(_PROJECTIONS) * (math.pi / _PROJECTIONS)
    directions = torch.stack([angle.cos(), angle.sin()])
    return ((a @ directions).sort(dim=0).values - (b @ directions).sort(dim=0).values).square().mean().sqrt().item()
