"""Kernel distances (MMD) between features: KID, which is called KDD on DINOv2 features, and CMMD."""

import numpy as np
import torch

from edm2kit.metrics.score import Sample, Score

_SUBSETS = 100
_SUBSET_SIZE = 1000
_CMMD_SIGMA, _CMMD_SCALE = 10.0, 1000.0
_BLOCK_ROWS = 2048
_SYMMETRIC_ROWS = 200


def kid(sample: Sample) -> Score:
    """The kernel distance with k(x, y) = (x y / F + 1)^3: unbiased, the mean of 100 random subsets of 1000 images.

    Subsets have all images if there are fewer than 1000. Can be negative if the sets are alike. Binkowski et al. 2018
    (arXiv 1801.01401). Published tables often show it times 1000.
    """
    generated, real = sample.generated.double(), sample.real_features.double()
    centre = real.mean(dim=0)
    size = min(_SUBSET_SIZE, len(generated), len(real))
    rng = np.random.default_rng(sample.seed)
    # one subset says it all if both sets are used completely
    num_subsets = 1 if size == len(generated) == len(real) else _SUBSETS
    values = []
    influence = torch.zeros(len(generated), dtype=torch.float64, device=generated.device)
    times = torch.zeros_like(influence)
    for _ in range(num_subsets):
        picked = torch.from_numpy(rng.choice(len(generated), size, replace=False)).to(generated.device)
        picked_real = torch.from_numpy(rng.choice(len(real), size, replace=False)).to(generated.device)
        x, y = generated[picked], real[picked_real]
        to_own, real_to_own = (_sum_to_others(rows, centre) / (size - 1) for rows in (x, y))
        to_real = _cubic(x, y, centre).mean(dim=1)
        values.append(float(to_own.mean() + real_to_own.mean() - 2 * to_real.mean()))
        effect = 2 * (to_own - to_real)
        influence[picked] += effect - effect.mean()
        times[picked] += 1
    influence = (influence / times.clamp(min=1))[times > 0]
    between = float(np.var(values, ddof=1)) / num_subsets if num_subsets > 1 else 0.0
    return Score(float(np.mean(values)), (influence - influence.mean()).cpu(), between)


def _sum_to_others(x: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """The sum of kernel values of each of N rows with the N - 1 others, [N]; only half of the pairs are computed."""
    sums = -((x.square().sum(dim=1) / x.shape[1] + 1) ** 3)  # that of a row with itself
    for start in range(0, len(x), _SYMMETRIC_ROWS):
        kernel = _cubic(x[start : start + _SYMMETRIC_ROWS], x[start:], centre)
        sums[start : start + _SYMMETRIC_ROWS] += kernel.sum(dim=1)
        sums[start + _SYMMETRIC_ROWS :] += kernel[:, _SYMMETRIC_ROWS:].sum(dim=0)
    return sums


def _cubic(x: torch.Tensor, y: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """(x y / F + 1)^3 of float64 rows, [N, M]."""
    # Products of deviations from the centre in float32 are twice as fast; their rounding errors are random and small
    # beside x y, and average out over a million pairs.
    product = ((x - centre).float() @ (y - centre).float().T).double()
    product += ((x - centre) @ centre)[:, None] + y @ centre
    product.div_(x.shape[1]).add_(1)
    return product * product * product


def cmmd(sample: Sample) -> Score:
    """CMMD: 1000 times the squared MMD with a Gaussian kernel of sigma 10, of features of unit length.

    The biased estimate with all pairs, as published. Jayasumana et al. 2023 (arXiv 2401.09603), who use the CLIP
    ViT-L/14@336 image embedding; values of other detectors compare only with themselves.
    """
    x = torch.nn.functional.normalize(sample.generated.double(), dim=1)
    y = torch.nn.functional.normalize(sample.real_features.double(), dim=1)
    to_own, to_real, real_to_own = _mean_gaussian(x, x), _mean_gaussian(x, y), _mean_gaussian(y, y)
    value = to_own.mean() + real_to_own.mean() - 2 * to_real.mean()
    effect = 2 * _CMMD_SCALE * (to_own - to_real)
    return Score(float(value) * _CMMD_SCALE, (effect - effect.mean()).cpu())


def _mean_gaussian(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The mean kernel value of each row of `x` over all rows of `y`, both of unit length."""
    gamma = 1 / (2 * _CMMD_SIGMA**2)
    # |x - y|^2 = 2 - 2 x y for rows of unit length
    return torch.cat([torch.exp(-gamma * (2 - 2 * rows @ y.T)).mean(dim=1) for rows in x.split(_BLOCK_ROWS)])
