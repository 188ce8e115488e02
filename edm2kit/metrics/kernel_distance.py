"""Kernel distances (MMD) between features: KID, which is called KDD on DINOv2 features, and CMMD."""

from dataclasses import dataclass

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
    (arXiv 1801.01401). Published tables often show it times 1000. Raises ValueError for fewer than two images.
    """
    size = min(_SUBSET_SIZE, len(sample.generated), len(sample.real_features))
    if size < 2:
        counts = f"{len(sample.generated)} generated and {len(sample.real_features)} real ones"
        raise ValueError(f"kid compares pairs of images; got {counts}")
    rng = np.random.default_rng(sample.seed)
    # one subset says it all if both sets are used completely
    num_subsets = 1 if size == len(sample.generated) == len(sample.real_features) else _SUBSETS
    centre = sample.real_features.mean(dim=0, dtype=torch.float64)
    generated, real = (_Deviations.of(rows, centre) for rows in (sample.generated, sample.real_features))
    values = []
    influence = torch.zeros(len(sample.generated), dtype=torch.float64, device=sample.generated.device)
    times = torch.zeros_like(influence)
    for _ in range(num_subsets):
        picked = torch.from_numpy(rng.choice(len(sample.generated), size, replace=False)).to(influence.device)
        picked_real = torch.from_numpy(rng.choice(len(sample.real_features), size, replace=False)).to(influence.device)
        to_own, to_real, real_to_own = _kernel_means(generated.pick(picked), real.pick(picked_real))
        values.append(float(to_own.mean() + real_to_own.mean() - 2 * to_real.mean()))
        effect = 2 * (to_own - to_real)
        influence[picked] += effect - effect.mean()
        times[picked] += 1
    influence = (influence / times.clamp(min=1))[times > 0]
    between = float(np.var(values, ddof=1)) / num_subsets if num_subsets > 1 else 0.0
    return Score(float(np.mean(values)), (influence - influence.mean()).cpu(), between)


@dataclass(frozen=True)
class _Deviations:
    """Rows less a centre c, in float32, and what the products need besides: x y = (x - c) (y - c) + of_x + of_y.

    Products of deviations in float32 are twice as fast as of rows in float64; their rounding errors are random and
    small beside x y, and average out over a million pairs.
    """

    rows: torch.Tensor  # float32 [N, F]
    rest: torch.Tensor  # float64 [N]

    @classmethod
    def of(cls, rows: torch.Tensor, centre: torch.Tensor) -> "_Deviations":
        deviations = rows.double() - centre
        return cls(deviations.float(), deviations @ centre + centre.square().sum() / 2)

    def pick(self, numbers: torch.Tensor) -> "_Deviations":
        return _Deviations(self.rows[numbers], self.rest[numbers])


def _kernel_means(x: _Deviations, y: _Deviations) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Means of (x y / F + 1)^3 for each of N rows of both sets: x to other x, x to all y, y to other y; float64 [N].

    Every pair is computed once: from the blocks on and above the diagonal of the products of all rows of both.
    """
    n, features = len(x.rest), x.rows.shape[1]
    rows, rest = torch.cat([x.rows, y.rows]), torch.cat([x.rest, y.rest]) / features + 0.5
    sums = torch.zeros(2, 2 * n, dtype=torch.float64, device=rest.device)  # with all x, and with all y
    for start in range(0, 2 * n, _SYMMETRIC_ROWS):
        end = min(start + _SYMMETRIC_ROWS, 2 * n)
        kernel = (rows[start:end] @ rows[start:].T).double().div_(features)
        kernel.add_(rest[start:end, None]).add_(rest[start:]).pow_(3)
        kernel.diagonal().zero_()  # a row with itself
        split = max(n - start, 0)  # columns from here on are of y
        sums[0, start:end] += kernel[:, :split].sum(dim=1)
        sums[1, start:end] += kernel[:, split:].sum(dim=1)
        beyond = kernel[:, end - start :]
        in_x = max(min(n, end) - start, 0)  # rows up to here are of x
        sums[0, end:] += beyond[:in_x].sum(dim=0)
        sums[1, end:] += beyond[in_x:].sum(dim=0)
    return sums[0, :n] / (n - 1), sums[1, :n] / n, sums[1, n:] / (n - 1)


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
